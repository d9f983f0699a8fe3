"""docs/natural_prompts.py: from a model and generators to tables, and the answers that they follow from."""

import runpy
import sys

import pandas as pd
import pytest
import torch
from families import talking

from prosg_lib import paths
from prosg_lib.backbones import loading
from prosg_lib.generators.normalised import NormalisedTokenGenerator
from prosg_lib.text import prose
from prosg_lib.training import checkpoints

SCRIPT = paths.repo_root() / "docs" / "natural_prompts.py"


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_what_it_measures_and_keeps(monkeypatch, tmp_path, capsys, chat):
    lm = talking(1000)
    torch.manual_seed(0)
    generator = NormalisedTokenGenerator(lm, 2, 8, ("o_proj",)).eval()
    little = prose.Prose("own", dict.fromkeys(prose.SPLITS, prose.own_sentences("test")[:40]))
    monkeypatch.setattr(loading, "load_model", lambda name, window: lm)
    monkeypatch.setattr(checkpoints, "load_generator", lambda name, model: generator)
    monkeypatch.setattr(prose, "load_prose", lambda: little)
    out = tmp_path / "answers.jsonl.gz"
    given = ["--generator", "token", "--prompts", "2", "--distance", "0", "--prose", "8", "--out", str(out), *chat]
    monkeypatch.setattr(sys, "argv", ["natural_prompts.py", *given])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown, rows = capsys.readouterr().out, pd.read_json(out, lines=True)
    methods = ["none", "base", "repeated", "prosg-token", "wrong", "alone", "wrong-alone"]
    assert rows.method.tolist() == [method for method in methods for _ in range(2)]
    assert rows.predicted.map(len).tolist() == rows.gold.map(len).tolist()
    for method in methods:
        assert f"| {method} " in shown
        assert f"perplexity of prose, {method}: " in shown
