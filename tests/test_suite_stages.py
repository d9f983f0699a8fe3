"""Models of the established tests: what they are trained on, and that each is trained once, kept and found again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_stages import TINY
from torch.testing import assert_close

from prosg_lib import cli, forgetting, profiles, stages, suite_stages
from prosg_lib.errors import UserError
from prosg_lib.sizes import Forgetting, PairTraining, SuiteSizes
from prosg_lib.suite_stages import checkpoint_name, model_objective, suite_model, suite_way, way_objective
from prosg_lib.tasks.prose import SPLITS, Prose, own_sentences

SMALL = replace(
    TINY,
    forgetting=Forgetting(2, (1, 3), ((64, 4),), (3,), (40,), (0.5,)),
    suite=SuiteSizes(*4 * (PairTraining(2, 2, 1e-3, warmup=1),), longest=150),
)


@pytest.fixture(autouse=True)
def little(monkeypatch, tmp_path):
    """Little prose, the profile `tiny`, and a folder of this test's own."""
    lines = own_sentences("test")[:40]
    prose = Prose("a little", dict.fromkeys(SPLITS, lines))
    for room in (stages, suite_stages, forgetting):
        monkeypatch.setattr(room, "load_prose", lambda: prose)
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    monkeypatch.setitem(profiles.PROFILES, "tiny", SMALL)
    stages.dialogues.cache_clear()
    stages._prose.cache_clear()
    yield
    stages.dialogues.cache_clear()
    stages._prose.cache_clear()


def draw():
    return suite_stages._draw("tiny", SMALL.suite.recurrent, 0)


def test_cells_are_the_short_ones_and_problems_those_of_training(monkeypatch):
    """All four tests are there; what is drawn is of the training split, another batch each step, the same one again."""
    material, cells = draw().material, draw().cells
    assert set(cells) == {"copy", "mqar", "phonebook", "passkey"}
    for task, settings in cells.items():
        for cell in settings:
            problem = forgetting.problem_of(cell, material, 0, 0, "train")
            assert problem.task == task
            assert len(problem.memory) + len(problem.rest) <= SMALL.suite.longest
    shorter = replace(SMALL, suite=replace(SMALL.suite, longest=60))
    monkeypatch.setitem(profiles.PROFILES, "tiny", shorter)
    assert "mqar" not in suite_stages.practice("tiny", material)
    monkeypatch.setitem(profiles.PROFILES, "tiny", SMALL)
    one, two, again = draw()(3), draw()(4), draw()(3)
    assert torch.equal(one.rest, again.rest)
    assert one.rest.shape != two.rest.shape or not torch.equal(one.rest, two.rest)
    asked = {tuple(row.tolist()) for n in range(30) for row in draw()(n).memory.ids}
    held = [forgetting.problem_of(c, material, 0, n).memory for cs in cells.values() for c in cs for n in (0, 1)]
    assert not asked & set(held)


def test_losses_are_those_of_the_judged_positions(lm):
    """Read in one pass or with the state carried over: the mean cross-entropy of the gold tokens, a part's being its
    share of the whole; with the memory in the weights or in none of them."""
    batch = draw()(5)
    parts = [model_objective(lm)(0, part).parts["answer"] for part in batch.split(1)]
    hidden, _ = lm.step_through(batch.rest, lm.step_through(*batch.memory[:1], None, batch.memory.valid)[1], None)
    gold = torch.stack([batch.gold[row, place] for row, place in batch.judged.nonzero()])
    wanted = F.cross_entropy(lm.read_out(hidden[batch.judged]), gold)
    assert_close(model_objective(lm)(0, batch).parts["answer"], wanted, rtol=1e-4, atol=1e-4)
    assert_close(sum(parts), wanted, rtol=1e-4, atol=1e-4)

    def nothing_written(lm, ids, valid):
        return None, lm.step_through(ids, None, valid)[1]

    blank = F.cross_entropy(lm.read_out(lm.step_through(batch.rest, None, None)[0][batch.judged]), gold)
    found = {round(way_objective(lm, nothing_written, 0)(step, batch).total.item(), 4) for step in range(12)}
    assert found == {round(wanted.item(), 4), round(blank.item(), 4)}


def test_trained_once_and_then_loaded(monkeypatch, capsys):
    """By the command line; each is found by its file's name afterwards, and the suite runs with it."""
    for what in ("recurrent", "transformer", "token", "adapter"):
        assert cli.main(["train", f"suite-{what}", "--profile", "tiny"]) == 0
    assert "suite adapter: training" in capsys.readouterr().out
    monkeypatch.setattr(stages, "fit", None)
    lm = suite_model("recurrent", "tiny")
    assert suite_model("transformer", "tiny").grows
    for what in ("token", "adapter"):
        way = suite_way(what, "tiny")
        path = stages.kept("tiny") / f"{checkpoint_name(what, 'tiny')}.safetensors"
        same = stages.load_generator(str(path), lm)
        for a, b in zip(way.parameters(), same.parameters(), strict=True):
            assert torch.equal(a, b)
    assert checkpoint_name("transformer", "cpu") == "llama-suite"
    assert checkpoint_name("token", "cpu") == "rwkv4-suite-token"


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(UserError, match="unknown backbone 'rwkv5'; there are recurrent, transformer"):
        suite_model("rwkv5", "tiny")
    with pytest.raises(UserError, match="unknown method 'final'; there are token, adapter"):
        suite_way("final", "tiny")
    with pytest.raises(UserError, match="adapter needs second derivatives"):
        suite_way("adapter", "tiny", thrift=stages.Thrift(recompute=True))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(SMALL, suite=replace(SMALL.suite, longest=3)))
    with pytest.raises(UserError, match="no test of profile 'tiny' has at most 3 tokens"):
        suite_model("recurrent", "tiny")
