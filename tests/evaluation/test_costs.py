"""Costs: what is counted is all that is kept, what is timed has its quartiles, and both are drawn for every method."""

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

from prosg_lib import plots
from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.errors import UserError
from prosg_lib.evaluation import costs
from prosg_lib.evaluation.baselines import FineTunedLora, ReadAgain, ReadTwice, Reinjection, StateOffset, start
from prosg_lib.evaluation.costs import measure
from prosg_lib.evaluation.statistics import Estimate
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator

BASELINES = [ReadTwice(), ReadAgain(16), Reinjection(8), StateOffset(), FineTunedLora(2)]
METHODS = ["base", "prosg-token", "static", "none", "repeated", *BASELINES]
SMALL = {"tokens": 12, "distance": 20, "answer": 4, "rounds": 3}
mpl.use("Agg")


@pytest.fixture
def generators(lm):
    maps = ("att.output", "ffn.value")
    return {"token": TokenGenerator(lm, 2, 8, maps).eval(), "static": StaticDelta(lm, 2, maps)}


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return new_llama(TransformerConfig("llama", 2048, width=16, layers=2, ffn=32, heads=2)).eval().with_kv_cache()


def test_bytes_are_those_of_all_that_is_kept(lm, generators, llama):
    """The state for every method; the prompt's own factors, not those that all prompts share; the prompt's tokens where
    they are read again; its state where that comes back; keys and values of all tokens of a transformer."""
    found = measure(lm, generators, METHODS, {"transformer": (llama, "base")}, **SMALL).set_index("method").kept_bytes
    state = 3 * 5 * 16 * 4
    assert {found[m] for m in ("base", "static", "none", "twice")} == {state}
    assert found["repeated"] == found["every-16"] == state + 12 * 8
    assert found["reinject-8-0.3"] == found["offset-0.03"] == 2 * state
    assert found["prosg-token"] == state + 3 * (16 + 16) * 2 * 4  # U alone: V is the generator's
    delta = start(FineTunedLora(2), lm, {}, [[1, 2, 3]]).delta
    assert found["lora-2-0.001"] == state + delta.nbytes()
    assert found["transformer"] == 2 * 2 * 16 * (12 + 20) * 4 + 8


def test_times_are_those_of_the_tokens_that_are_read(lm, generators, monkeypatch):
    """By a clock that goes on by a second for every token: until the text may follow, and a token of it with its share
    of what is read again. Learning by descent takes longer than reading."""
    clock, step_through = [0], lm.step_through

    def ticking(ids, *rest, **named):
        clock[0] += ids.numel()
        return step_through(ids, *rest, **named)

    monkeypatch.setattr(lm, "step_through", ticking)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    rows = measure(lm, generators, METHODS, **SMALL | {"tokens": 64}).set_index("method") / 1e3
    absorbed = {"base": 64, "prosg-token": 64, "none": 0, "twice": 128, "every-16": 64}
    assert rows.absorb_ms[list(absorbed)].to_dict() == absorbed
    assert (rows.absorb_ms_low["twice"], rows.token_ms_high["base"]) == (128, 1)
    assert rows.absorb_ms["lora-2-0.001"] > 64
    tokens = {"base": 1, "prosg-token": 1, "twice": 1, "repeated": 1 + 64 / 4, "every-16": 1 + 64 / 16}
    assert rows.token_ms[list(tokens)].to_dict() == tokens


def test_sizes_below_one_are_refused(lm):
    """No tokens or rounds: nothing could be measured."""
    with pytest.raises(UserError, match="at least 1"):
        measure(lm, {}, ["base"], rounds=0)


def test_recall_is_drawn_against_every_cost(lm, generators):
    """Three panels with the methods that have a recall, at their costs, on logarithmic axes; of a family the second is
    hollow; the words for those who do not see it name them all."""
    twice = [ReadAgain(4), ReadAgain(8)]
    table, looks = measure(lm, generators, ["base", "prosg-token", *twice], **SMALL), plots.styles(twice)
    table.loc[0, "absorb_ms"] = 0.0
    recall = {m: Estimate(0.5, 0.4, 0.6) for m in ("base", "every-4", "every-8")}
    axes = Figure().subplots(1, 3)
    plots.recall_against_costs(axes, table, recall, looks)
    for ax, column in zip(axes, plots.COSTS, strict=True):
        assert ax.get_xscale() == "log"
        drawn = {c.get_label(): c.lines[0] for c in ax.containers}
        assert set(drawn) == {"plain model", "prompt read again, 4", "prompt read again, 8"}
        assert drawn["prompt read again, 8"].get_xdata()[0] == table[column][3]
        assert drawn["prompt read again, 8"].get_markerfacecolor() == "white"
        assert drawn["prompt read again, 4"].get_markerfacecolor() != "white"
        assert drawn["plain model"].get_xdata()[0] > 0
    words = plots.cost_alt(table, recall, 512, looks)
    assert all(label in words for label in ("plain model: recall 0.50", "prompt read again, 4", "512 tokens"))
    assert "ProSG" not in words
