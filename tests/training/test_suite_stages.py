"""Models of the established tests: what they are trained on, and that each is trained once, kept and found again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_stages import TINY
from torch.testing import assert_close

from prosg_lib import cli
from prosg_lib.config import get_profile, profiles
from prosg_lib.config.sizes import Forgetting, PairTraining, SuiteSizes
from prosg_lib.errors import UserError
from prosg_lib.tasks.suite import problem_of
from prosg_lib.training import stages, suite_stages
from prosg_lib.training.problem_objectives import model_objective, way_objective
from prosg_lib.training.suite_stages import checkpoint_name, suite_model, suite_way

SMALL = replace(
    TINY,
    forgetting=Forgetting(2, (1, 3), ((64, 4),), (3,), (40,), (0.5,)),
    suite=SuiteSizes(*4 * (PairTraining(2, 2, 1e-3, warmup=1),), longest=150),
)


@pytest.fixture(autouse=True)
def place(small_world, tmp_path):
    with small_world(SMALL, tmp_path):
        yield


def draw():
    return suite_stages._draw(get_profile("tiny"), SMALL.suite.recurrent, 0)


def test_cells_are_the_short_ones_and_problems_those_of_training(monkeypatch):
    """All four tests are there; what is drawn is of the training split, and nothing that is asked later."""
    material, cells = draw().material, draw().cells
    assert set(cells) == {"copy", "mqar", "phonebook", "passkey"}
    for task, settings in cells.items():
        for size, cell in settings:
            problem = problem_of(cell, material, 0, 0, "train")
            assert problem.task == task
            assert len(problem.memory) + len(problem.rest) == size <= SMALL.suite.longest
    shorter = replace(SMALL, suite=replace(SMALL.suite, longest=60))
    monkeypatch.setitem(profiles.PROFILES, "tiny", shorter)
    assert "mqar" not in suite_stages.practice(get_profile("tiny"), material)
    monkeypatch.setitem(profiles.PROFILES, "tiny", SMALL)
    held = {problem_of(c, material, 0, n).memory for cs in cells.values() for _, c in cs for n in (0, 1)}
    for step in range(8):
        for test in draw()(step).tests:
            assert not held & {tuple(ids[valid].tolist()) for ids, valid in zip(*test.memory, strict=True)}


def test_a_step_has_all_tests_and_the_first_ones_are_short():
    """Every problem is drawn once, of every test about as many; cells come in by length, and half-way all are there; a
    step is always the same, and the next another."""
    long = replace(draw(), training=PairTraining(100, 8, 1e-3))
    for step, tests in ((0, 1), (50, 4), (99, 4)):
        batch = long(step)
        assert len(batch) == 8
        assert len(batch.tests) == tests
        assert {len(test) for test in batch.tests} == {8 // tests}
    lengths = [max(t.memory.ids.shape[1] + t.rest.shape[1] for t in long(step).tests) for step in range(100)]
    shortest = min(size for cells in long.cells.values() for size, _ in cells)
    assert lengths[0] <= shortest
    names = 10  # people's names are not equally long
    assert all(size <= shortest + (150 - shortest) * step / 50 + names for step, size in enumerate(lengths[:50]))
    assert max(lengths[50:]) > max(lengths[:25])
    one, two, again = (torch.cat([t.memory.ids.flatten() for t in long(n).tests]) for n in (60, 61, 60))
    assert torch.equal(one, again)
    assert one.shape != two.shape or not torch.equal(one, two)
    assert [len(test) for test in draw()(1).tests] == [1, 1]  # two problems have no room for four tests


def test_parts_of_a_mixed_batch_are_all_of_it():
    """Cut anywhere, across tests too: the same rows in their order, and the whole is remembered."""
    batch = replace(draw(), training=PairTraining(2, 7, 1e-3))(1)
    assert len(batch.tests) == 4
    rows = [row.tolist() for test in batch.tests for row in test.gold]
    for size in (1, 3, 7):
        parts = [part.to(torch.device("cpu")) for part in batch.split(size)]
        assert [len(part) for part in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
        assert [row.tolist() for part in parts for test in part.tests for row in test.gold] == rows
        assert all(len(part.whole.tests) == 4 for part in parts)


def test_losses_are_the_mean_over_tests_of_their_judged_positions(lm):
    """Read in one pass or with the state carried over: the mean cross-entropy of the gold tokens, each test's own, a
    part's being its share of the whole; with the memory in the weights or in none of them."""
    batch = replace(draw(), training=PairTraining(2, 6, 1e-3))(1)

    def mean(start):
        found = []
        for test in batch.tests:
            hidden, _ = lm.step_through(test.rest, start(test), None)
            gold = torch.stack([test.gold[row, place] for row, place in test.judged.nonzero()])
            found.append(F.cross_entropy(lm.read_out(hidden[test.judged]), gold))
        return sum(found) / len(found)

    wanted = mean(lambda test: lm.step_through(test.memory.ids, None, test.memory.valid)[1])
    parts = [model_objective(lm)(0, part).parts["answer"] for part in batch.split(1)]
    assert_close(model_objective(lm)(0, batch).parts["answer"], wanted, rtol=1e-4, atol=1e-4)
    assert_close(sum(parts), wanted, rtol=1e-4, atol=1e-4)

    def nothing_written(lm, ids, valid):
        return None, lm.step_through(ids, None, valid)[1]

    found = {round(way_objective(lm, nothing_written, 0)(step, batch).total.item(), 4) for step in range(12)}
    assert found == {round(wanted.item(), 4), round(mean(lambda test: None).item(), 4)}


def test_trained_once_and_then_loaded(monkeypatch, capsys):
    """By the command line; each is found by its file's name afterwards, and the suite runs with it."""
    for what in ("recurrent", "transformer", "token", "adapter"):
        assert cli.main(["train", f"suite-{what}", "--profile", "tiny"]) == 0
    assert "suite adapter: training" in capsys.readouterr().out
    monkeypatch.setattr(stages, "fit", None)
    lm = suite_model("recurrent", get_profile("tiny"))
    assert suite_model("transformer", get_profile("tiny")).state_grows
    for what in ("token", "adapter"):
        way = suite_way(what, get_profile("tiny"))
        path = stages.kept(get_profile("tiny")) / f"{checkpoint_name(what, get_profile('tiny'))}.safetensors"
        same = stages.load_generator(str(path), lm)
        for a, b in zip(way.parameters(), same.parameters(), strict=True):
            assert torch.equal(a, b)
    assert checkpoint_name("transformer", get_profile("cpu")) == "llama-suite"
    assert checkpoint_name("token", get_profile("cpu")) == "rwkv4-suite-token"


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(UserError, match="unknown backbone 'rwkv5'; there are recurrent, transformer"):
        suite_model("rwkv5", get_profile("tiny"))
    with pytest.raises(UserError, match="unknown method 'final'; there are token, adapter"):
        suite_way("final", get_profile("tiny"))
    with pytest.raises(UserError, match="adapter needs second derivatives"):
        suite_way("adapter", get_profile("tiny"), thrift=stages.Thrift(recompute=True))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(SMALL, suite=replace(SMALL.suite, longest=3)))
    with pytest.raises(UserError, match="no test of profile 'tiny' has at most 3 tokens"):
        suite_model("recurrent", get_profile("tiny"))
