"""Pairs: those that fit are kept whole, the others are counted; answers are compared as in SQuAD."""

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.pairs import Pair, fitted, is_right
from prosg_lib.text.tokenizer import load_tokenizer


def test_what_is_too_long_is_counted_and_never_cut():
    short, long_context, long_query = Pair("a b c", "q", "x"), Pair("a " * 50, "q", "x"), Pair("a", "q " * 50, "x")
    found = fitted([long_context, short, long_query], load_tokenizer(), 20, 20)
    assert found.pairs == (short,)
    assert found.too_long == 2
    assert str(found) == "1 pairs; 2 left out as too long"
    with pytest.raises(UserError, match="none of 1 pairs fits into 20 tokens"):
        fitted([long_context], load_tokenizer(), 20, 20)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" The Nile.", True),
        ("nile\nMore text", True),
        ("Nile river", False),
        ("", False),
        ("\n Nile", True),
    ],
)
def test_an_answer_is_compared_without_case_articles_and_punctuation(said, right):
    assert is_right(said, "the Nile") == right


@pytest.mark.parametrize("name", ["context", "query", "answer"])
def test_an_empty_part_is_refused(name):
    with pytest.raises(UserError, match=f"empty {name}"):
        Pair(**({"context": "c", "query": "q", "answer": "a"} | {name: " "}))
