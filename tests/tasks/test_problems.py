"""Problems: what all the tests of memory share, their padding, and splits that have nothing in common."""

import random

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.problems import Problem, asked, drawn, problem_batch, split_of, tokens
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer


def test_an_answer_is_judged_where_it_is_predicted():
    """The first token behind the question's last one, and so on; the last one itself is not read."""
    problem = asked("copy", {"words": 2}, [7, 8], [1, 2, 3], [10, 11, 12])
    assert problem.rest == (1, 2, 3, 10, 11)
    assert [problem.rest[: place + 1][-1] for place in problem.judged] == [3, 10, 11]
    assert problem.gold == (10, 11, 12)


def test_memory_is_padded_on_the_left_and_the_rest_on_the_right():
    """So that every memory ends where the rest begins, and padding is never before what is judged."""
    short = Problem("a", {}, (1,), (5, 6), (1,), (9,))
    long = Problem("a", {}, (2, 3, 4), (7, 8, 9, 10), (0, 3), (9, 9))
    batch = problem_batch([short, long])
    assert batch.memory.ids.tolist() == [[0, 0, 1], [2, 3, 4]]
    assert batch.memory.valid.tolist() == [[False, False, True], [True] * 3]
    assert batch.rest.tolist() == [[5, 6, 0, 0], [7, 8, 9, 10]]
    assert batch.judged.tolist() == [[False, True, False, False], [True, False, False, True]]
    assert len(batch) == 2
    assert batch.part(1, 2).rest.tolist() == [[7, 8, 9, 10]]


def test_splits_have_nothing_in_common():
    """All contents that any name leads to in one split are in no other, whatever the seeds."""
    found = {
        split: {drawn(lambda rng: rng.randrange(300), split, f"number {n}") for n in range(500)} for split in SPLITS
    }
    assert found["train"] & found["validation"] == found["train"] & found["test"] == set()
    assert found["validation"] & found["test"] == set()
    assert all(split_of(content) == split for split, contents in found.items() for content in contents)


def test_a_draw_depends_on_its_name_and_split_alone():
    """The same name gives the same content, another name another; no global random state takes part."""

    def draw(rng):
        return rng.random()

    random.seed(0)
    first = drawn(draw, "test", "a")
    random.seed(1)
    assert drawn(draw, "test", "a") == first
    assert drawn(draw, "test", "b") != first


def test_shares_of_the_splits():
    """Eight tenths, one and one, within four deviations of 20,000 contents."""
    splits = [split_of(n) for n in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.1) < 4 * (0.09 / 20_000) ** 0.5
    assert abs(splits.count("validation") / 20_000 - 0.1) < 4 * (0.09 / 20_000) ** 0.5


def test_too_few_contents_are_refused():
    """A test split of something that is always the same cannot be; the message names it."""
    same = next(n for n in range(100) if split_of(n) == "train")
    with pytest.raises(UserError, match="coin: too few different contents for a test split"):
        drawn(lambda rng: same, "test", "coin")


def test_unknown_split():
    with pytest.raises(UserError, match="unknown split 'tset'"):
        drawn(lambda rng: 1, "tset", "a")


def test_pieces_have_the_same_tokens_everywhere():
    """A number behind a name in a book has the tokens that it has behind the name in the question."""
    tokenizer = load_tokenizer()
    assert tokens(tokenizer, "Ada:", " 402", "\n") == (*tokens(tokenizer, "Ada:"), *tokens(tokenizer, " 402", "\n"))
    with pytest.raises(UserError, match="no tokens of ''"):
        tokens(tokenizer, "")
