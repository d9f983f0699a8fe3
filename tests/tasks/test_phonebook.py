"""Phone book: two lines of it are the examples, and a third one's number is asked for."""

import re

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.phonebook import Phonebook, problem
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize("lines", [3, 4, 40])
def test_examples_and_question_are_lines_of_the_book(tokenizer, lines):
    """Names and numbers are different; the answer is the asked name's number, in the tokens that it has in the book."""
    for number in range(10):
        found = problem(Phonebook(lines), tokenizer, "test", 0, number)
        book = tokenizer.decode(found.memory).splitlines()
        assert len(set(book)) == len({line.split(":")[0] for line in book}) == lines
        assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+: \d{3}-\d{3}-\d{4}", line) for line in book)
        shown = tokenizer.decode((*found.rest, found.gold[-1])).split("\n")
        assert len(set(shown)) == 3
        assert set(shown) <= set(book)
        assert tokenizer.decode(found.gold) == " " + shown[-1].split(": ")[1]
        ids = found.memory
        assert any(ids[i : i + len(found.gold)] == found.gold for i in range(len(ids)))


def test_every_line_is_asked_about(tokenizer):
    """The place of the asked line in the book is any, and the examples' are."""
    places, examples = set(), set()
    for number in range(60):
        found = problem(Phonebook(4), tokenizer, "train", 0, number)
        book = tokenizer.decode(found.memory).splitlines()
        first, _, asked = tokenizer.decode((*found.rest, found.gold[-1])).split("\n")
        places.add(book.index(asked))
        examples.add(book.index(first))
    assert places == examples == set(range(4))


def test_a_book_is_in_one_split_and_its_seeds(tokenizer):
    """Again the same; other splits, seeds and numbers have others."""
    first = problem(Phonebook(3), tokenizer, "test", 0, 0)
    assert problem(Phonebook(3), tokenizer, "test", 0, 0) == first
    others = [problem(Phonebook(3), tokenizer, split, 0, 0) for split in SPLITS if split != "test"]
    others += [problem(Phonebook(3), tokenizer, "test", 1, 0), problem(Phonebook(3), tokenizer, "test", 0, 1)]
    assert all(other.memory != first.memory for other in others)


@pytest.mark.parametrize(("lines", "said"), [(2, "3 or more"), (10_001, "names for 10000"), ("4", "'4'")])
def test_a_book_that_cannot_be(lines, said):
    with pytest.raises(UserError, match=said):
        Phonebook(lines)
