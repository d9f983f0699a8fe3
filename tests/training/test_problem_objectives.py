"""Training on the established tests: what a step has, and what is minimised."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY as SMALL
from torch.testing import assert_close

from prosg_lib.config.sizes import PairTraining
from prosg_lib.errors import UserError
from prosg_lib.tasks.problems import Material
from prosg_lib.text.prose import ProseTokens
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import work
from prosg_lib.training.problem_objectives import (
    ProblemDraw,
    generator_problem_objective,
    lm_problem_objective,
    practice,
)


@pytest.fixture(autouse=True)
def place(small_world, tmp_path):
    with small_world(SMALL, tmp_path):
        yield


def draw():
    tokenizer = load_tokenizer()
    material = Material(tokenizer, ProseTokens.of(work.load_prose(), "train", tokenizer))
    return ProblemDraw(practice(SMALL, material), SMALL.suite.longest, material, SMALL.suite.recurrent, 0)


def test_cells_are_the_short_ones_and_problems_those_of_training():
    """All four tests are there; what is drawn is of the training split, and nothing that is asked later."""
    material, cells = draw().material, draw().cells
    assert set(cells) == {"copy", "mqar", "phonebook", "passkey"}
    for task, settings in cells.items():
        for size, cell in settings:
            problem = cell.problem(material, "train", 0, 0)
            assert problem.task == task
            assert len(problem.memory) + len(problem.rest) == size <= SMALL.suite.longest
    assert "mqar" not in practice(replace(SMALL, suite=replace(SMALL.suite, longest=60)), material)
    held = {c.problem(material, "test", 0, n).memory for cs in cells.values() for _, c in cs for n in (0, 1)}
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
    parts = [lm_problem_objective(lm)(0, part).parts["answer"] for part in batch.split(1)]
    assert_close(lm_problem_objective(lm)(0, batch).parts["answer"], wanted, rtol=1e-4, atol=1e-4)
    assert_close(sum(parts), wanted, rtol=1e-4, atol=1e-4)

    def nothing_written(lm, ids, valid):
        return None, lm.step_through(ids, None, valid)[1]

    found = {
        round(generator_problem_objective(lm, nothing_written, 0)(step, batch).total.item(), 4) for step in range(12)
    }
    assert found == {round(wanted.item(), 4), round(mean(lambda test: None).item(), 4)}


def test_without_a_short_test_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match="no test of the profile tiny has at most 3 tokens"):
        practice(replace(SMALL, suite=replace(SMALL.suite, longest=3)), draw().material)
