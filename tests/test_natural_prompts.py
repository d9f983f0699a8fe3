"""docs/natural_prompts.py: from a model and generators to tables, and the answers that they follow from."""

import runpy
import sys

import pandas as pd
import pytest
import torch
from families import talking

from prosg_lib import paths
from prosg_lib.backbones import loading
from prosg_lib.evaluation import conversation_recall as recall
from prosg_lib.generators.normalised import NormalisedTokenGenerator
from prosg_lib.text import chitchat, prose
from prosg_lib.text.prose import SPLITS, Prose
from prosg_lib.training import checkpoints

SCRIPT = paths.repo_root() / "docs" / "natural_prompts.py"


@pytest.mark.parametrize("more", [[], ["--chat"], ["--filler", "conversation"]])
def test_what_it_measures_and_keeps(monkeypatch, tmp_path, capsys, more):
    """Both kinds of text are measured where there are both; what stands before the questions is the one asked for."""
    lm = talking(1000)
    torch.manual_seed(0)
    generator = NormalisedTokenGenerator(lm, 2, 8, ("o_proj",)).eval()
    little = Prose("own", dict.fromkeys(SPLITS, prose.own_sentences("test")[:40]))
    monkeypatch.setattr(loading, "load_model", lambda name, window: lm)
    monkeypatch.setattr(checkpoints, "load_generator", lambda name, model: generator)
    talk, filler, answers = Prose("talk", dict.fromkeys(SPLITS, ["A: Hi", "B: Hello"] * 9)), [], recall.answers
    monkeypatch.setattr(prose, "load_prose", lambda: little)
    monkeypatch.setattr(chitchat, "source", lambda: "talk 1.0" if more else None)
    monkeypatch.setattr(chitchat, "load_conversations", lambda: talk)
    monkeypatch.setattr(recall, "answers", lambda *given: filler.append(given[4]) or answers(*given))
    out = tmp_path / "answers"
    given = ["--generator", "token", "--prompts", "2", "--distance", "0", "--prose", "8", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["natural_prompts.py", *given])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown, rows = capsys.readouterr().out, pd.read_json(f"{out}.jsonl.gz", lines=True)
    methods = ["none", "base", "repeated", "prosg-token", "wrong", "alone", "wrong-alone"]
    assert rows.method.tolist() == [method for method in methods for _ in range(2)]
    assert rows.predicted.map(len).tolist() == rows.gold.map(len).tolist()
    kind = "conversation" if "--filler" in more else "prose"
    assert set(rows.filler) == {kind}
    assert lm.tokenizer.decode(filler[0].ids).startswith("A: Hi\nB: Hello") == (kind == "conversation")
    for method in methods:
        assert f"| {method} " in shown
        assert f"perplexity of prose, {method}: " in shown
        assert (f"perplexity of conversation, {method}: " in shown) == bool(more)
    assert (f"perplexity of conversation: not measured; {chitchat.INSTALL}" in shown) == (not more)
    losses = pd.read_json(f"{out}_losses.jsonl.gz", lines=True)
    assert losses.method.tolist() == [method for method in methods for _ in range(2 if more else 1)]
    assert losses.losses.map(len).eq(2).all()
    assert losses.losses.map(min).gt(0).all()
