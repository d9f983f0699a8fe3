"""Passkey: the text is exactly as long as asked for, and the key stands where it should."""

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.passkey import Passkey, problem
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def prose(tokenizer):
    text = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:60]))
    return ProseTokens.of(text, "test", tokenizer)


@pytest.mark.parametrize("length", [40, 41, 300])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_and_depth(tokenizer, prose, length, depth):
    """The memory has exactly so many tokens; before the sentence with the key is its share of all other tokens, to
    the nearest token."""
    found = problem(Passkey(length, depth), tokenizer, prose, "test", 0, 0)
    assert len(found.memory) == length
    key = tokenizer.decode(found.gold)
    before, sentence, after = tokenizer.decode(found.memory).partition(f"\nThe pass key is{key}.\n")
    assert sentence
    ids = len(tokenizer.encode(before)), len(tokenizer.encode(after))
    room = length - (len(tokenizer.encode("\nThe pass key is")) + len(found.gold) + len(tokenizer.encode(".\n")))
    where = next(i for i in range(length) if found.memory[i : i + len(found.gold)] == found.gold)
    assert where - len(tokenizer.encode("\nThe pass key is")) == round(depth * room)
    assert (ids[0] == 0) is (depth == 0.0)
    assert (ids[1] == 0) is (depth == 1.0)


def test_the_question_asks_for_the_key_alone(tokenizer, prose):
    """It ends where the number begins, and the number, of five digits, is what is judged."""
    found = problem(Passkey(100, 0.5), tokenizer, prose, "test", 0, 0)
    text = tokenizer.decode((*found.rest, found.gold[-1]))
    question, _, key = text.rpartition(" ")
    assert question == "What is the pass key? The pass key is"
    assert tokenizer.decode(found.gold) == f" {key}"
    assert len(key) == 5
    assert key.isdigit()
    assert len(found.judged) == len(found.gold)


def test_no_key_is_in_two_splits(tokenizer, prose):
    found = {
        split: {problem(Passkey(40, 0.5), tokenizer, prose, split, 0, n).gold for n in range(200)} for split in SPLITS
    }
    assert found["train"] & found["test"] == found["train"] & found["validation"] == set()
    assert found["validation"] & found["test"] == set()


def test_a_problem_is_its_seed(tokenizer, prose):
    """Key and text, both."""
    first = problem(Passkey(60, 0.5), tokenizer, prose, "test", 0, 0)
    assert problem(Passkey(60, 0.5), tokenizer, prose, "test", 0, 0) == first
    for other in (("test", 1, 0), ("test", 0, 1)):
        found = problem(Passkey(60, 0.5), tokenizer, prose, *other)
        assert found.gold != first.gold
        assert found.memory[:8] != first.memory[:8]


def test_what_cannot_be_made(tokenizer, prose):
    """A depth outside the text, a text shorter than the key's sentence, and one longer than the prose."""
    with pytest.raises(UserError, match=r"depth 1\.2"):
        Passkey(40, 1.2)
    with pytest.raises(UserError, match="a passkey's text is 0"):
        Passkey(0, 0.5)
    with pytest.raises(UserError, match="the sentence with the key alone has"):
        problem(Passkey(5, 0.5), tokenizer, prose, "test", 0, 0)
    with pytest.raises(UserError, match="add more text"):
        problem(Passkey(10**6, 0.5), tokenizer, prose, "test", 0, 0)
