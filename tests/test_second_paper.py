"""docs/second_paper.py: from a model and trained steps to the table, and the answers that it follows from."""

import runpy
import sys

import pandas as pd
import pytest
import torch
from families import causal

from prosg_lib import paths
from prosg_lib.backbones import loading
from prosg_lib.config import get_profile
from prosg_lib.gradient_steps.adapter_step import RatedAdapterStep
from prosg_lib.tasks import pair_sources
from prosg_lib.tasks.pairs import Fitted, Pair
from prosg_lib.training import checkpoints

SCRIPT = paths.repo_root() / "docs" / "second_paper.py"
PAIRS = tuple(Pair(f"Ann has room {i // 2}.", f"Question: Q{i}?\nAnswer:", f"A{i}") for i in range(6))


@pytest.mark.parametrize("split", [[], ["--split", "test"]])
def test_what_it_measures_and_keeps(monkeypatch, tmp_path, capsys, split):
    """All pairs by every method, with the wrong-context and no-context controls, on the validation split unless another
    is asked for; intervals over contexts; the paper's numbers beside."""
    lm, asked = causal(), []
    torch.manual_seed(0)
    step = RatedAdapterStep(lm, 2, ("layers.1.mlp.down_proj",), 1.0).eval()
    monkeypatch.setattr(loading, "load_model", lambda name: lm)
    monkeypatch.setattr(checkpoints, "load_generator", lambda name, model: step)
    monkeypatch.setattr(pair_sources, "pairs_of", lambda *given: asked.append(given) or Fitted(PAIRS, 0))
    out = tmp_path / "answers.jsonl.gz"
    monkeypatch.setattr(sys, "argv", ["second_paper.py", "--trained", "a/lc.safetensors", "--out", str(out), *split])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown, rows = capsys.readouterr().out, pd.read_json(out, lines=True)
    methods = ["prompted", "none", "untrained", "wrong untrained", "lc", "wrong lc"]
    assert list(rows) == [*methods, "passage", "query"]
    assert rows.passage.tolist() == [0, 0, 1, 1, 2, 2]
    assert [given[:2] for given in asked] == [("squad", split[-1] if split else "validation")]
    assert "6 pairs about 3 contexts" in shown
    lines = {line.split("|")[1].strip(): line for line in shown.splitlines() if line.startswith("| ")}
    assert list(lines)[1:] == [
        "no context",
        "the context in front of the query",
        "one step, untrained",
        "one step, untrained, wrong context",
        "one step, lc",
        "one step, lc, wrong context",
    ]
    assert lines["no context"].split("|")[4].strip() == "0.352"
    assert lines["one step, lc"].split("|")[4].strip() == "0.72"
    assert "lc, its own context over a wrong one: " in shown


def test_the_untrained_step_has_the_recipes_sizes(monkeypatch):
    """Where nothing trained is given; at another inner rate if one is asked for."""
    script = runpy.run_path(str(SCRIPT))
    made = []
    monkeypatch.setitem(script["untrained"].__globals__, "new_module", lambda *given: made.append(given) or given[2])
    lm = torch.nn.Linear(1, 1)
    lm.lr = 5.0
    assert script["untrained"](lm, [], get_profile("cpu"), None).lr == 5.0
    assert script["untrained"](lm, [], get_profile("cpu"), 7.0).lr == 7.0
    assert [(kind, size.layers) for kind, size, _ in made] == [("rated-adapter", tuple(range(22, 30)))] * 2
