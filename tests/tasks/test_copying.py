"""Copying: the text is said again token for token, and what is judged is all of it."""

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.copying import Copy, pool, problem
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_the_second_text_is_the_first(tokenizer):
    """As texts, and as tokens: the gold ones stand in the memory in the same order without a gap."""
    found = problem(Copy(7), tokenizer, "test", 0, 0)
    told, again = tokenizer.decode(found.memory), tokenizer.decode((*found.rest, found.gold[-1]))
    words = told.removeprefix("Text: ").removesuffix("\n")
    assert again == f"The text once more: {words}"
    assert len(words.split(" ")) == 7
    assert set(words.split(" ")) <= set(pool())
    memory = found.memory
    assert any(memory[i : i + len(found.gold)] == found.gold for i in range(len(memory)))
    assert [(*found.rest, found.gold[-1])[place + 1] for place in found.judged] == list(found.gold)


def test_words_are_drawn_alike_and_independently(tokenizer):
    """In long texts every word of the pool comes, none much oftener than the others, and some twice."""
    words = [tokenizer.decode(problem(Copy(400), tokenizer, "train", 0, n).gold).split() for n in range(20)]
    counts = [sum(text.count(word) for text in words) for word in pool()]
    mean = 8000 / len(pool())
    assert len(pool()) > 300
    assert min(counts) > 0
    assert sum((c - mean) ** 2 / mean for c in counts) < len(pool()) + 4 * (2 * len(pool())) ** 0.5
    assert len(set(words[0])) < 400


def test_no_text_is_in_two_splits(tokenizer):
    """Also where a text is a single word."""
    found = {split: {problem(Copy(1), tokenizer, split, 0, n).gold for n in range(100)} for split in SPLITS}
    assert found["train"] & found["test"] == found["train"] & found["validation"] == set()
    assert found["validation"] & found["test"] == set()


def test_a_problem_is_its_seed(tokenizer):
    """Again the same; another with another seed or number."""
    first = problem(Copy(5), tokenizer, "test", 0, 0)
    assert problem(Copy(5), tokenizer, "test", 0, 0) == first
    assert problem(Copy(5), tokenizer, "test", 1, 0) != first != problem(Copy(5), tokenizer, "test", 0, 1)


@pytest.mark.parametrize("words", [0, -1, 2.0, True])
def test_a_number_of_words_that_cannot_be(words):
    with pytest.raises(UserError, match="number of words to copy"):
        Copy(words)
