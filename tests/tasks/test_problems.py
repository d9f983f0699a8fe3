"""The established tests of memory: what all of them share, and copying, phone book and passkey."""

import random
import re

import numpy as np
import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.copying import Copy, pool
from prosg_lib.tasks.mqar import Mqar
from prosg_lib.tasks.passkey import Passkey
from prosg_lib.tasks.phonebook import Phonebook
from prosg_lib.tasks.problems import (
    Material,
    Problem,
    draw_content,
    encode_pieces,
    problem_batch,
    split_of,
    with_answer,
)
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def material(tokenizer):
    text = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:60]))
    return Material(tokenizer, ProseTokens.of(text, "test", tokenizer))


# What all tests share


def test_an_answer_is_judged_where_it_is_predicted():
    """Its first token at the question's last one, and so on; its last token is not read."""
    problem = with_answer("copy", {"words": 2}, [7, 8], [1, 2, 3], [10, 11, 12])
    assert problem.rest == (1, 2, 3, 10, 11)
    assert [problem.rest[: place + 1][-1] for place in problem.judged] == [3, 10, 11]
    assert problem.gold == (10, 11, 12)


def test_memory_is_padded_on_the_left_and_the_rest_on_the_right():
    """So every memory ends where the rest begins, and no padding precedes what is judged."""
    short = Problem("a", {}, (1,), (5, 6), (1,), (9,))
    long = Problem("a", {}, (2, 3, 4), (7, 8, 9, 10), (0, 3), (9, 9))
    batch = problem_batch([short, long])
    assert batch.memory.ids.tolist() == [[0, 0, 1], [2, 3, 4]]
    assert batch.memory.valid.tolist() == [[False, False, True], [True] * 3]
    assert batch.rest.tolist() == [[5, 6, 0, 0], [7, 8, 9, 10]]
    assert batch.judged.tolist() == [[False, True, False, False], [True, False, False, True]]
    assert batch.gold.tolist() == [[0, 9, 0, 0], [9, 0, 0, 9]]
    assert len(batch) == 2
    assert batch.part(1, 2).rest.tolist() == [[7, 8, 9, 10]]


def disjoint(found):
    return not (
        found["train"] & found["test"] or found["train"] & found["validation"] or found["validation"] & found["test"]
    )


def test_splits_have_nothing_in_common():
    """No content that any name leads to in one split occurs in another, whatever the seeds."""
    found = {s: {draw_content(lambda rng: rng.randrange(300), s, f"number {n}") for n in range(500)} for s in SPLITS}
    assert disjoint(found)
    assert all(split_of(content) == split for split, contents in found.items() for content in contents)


def test_shares_of_the_splits():
    """Eight tenths, one and one, within four standard deviations of 20,000 contents."""
    splits = [split_of(n) for n in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.1) < 4 * (0.09 / 20_000) ** 0.5
    assert abs(splits.count("validation") / 20_000 - 0.1) < 4 * (0.09 / 20_000) ** 0.5


def test_pieces_have_the_same_tokens_everywhere(tokenizer):
    """A number after a name in a book has the same tokens as after the name in the question."""
    whole = encode_pieces(tokenizer, "Ada:", " 402", "\n")
    assert whole == (*encode_pieces(tokenizer, "Ada:"), *encode_pieces(tokenizer, " 402", "\n"))


@pytest.mark.parametrize(
    "setting", [Copy(5), Phonebook(3), Passkey(40, 0.5), Mqar(64, 4)], ids=lambda s: type(s).__name__
)
def test_a_problem_is_a_function_of_its_seed(setting, material):
    """Made again it is the same, whatever the global random states; another split, seed or number gives another."""
    first = setting.problem(material, "test", 0, 0)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - it is what must not matter
    assert setting.problem(material, "test", 0, 0) == first
    others = [setting.problem(material, split, 0, 0) for split in SPLITS if split != "test"]
    others += [setting.problem(material, "test", 1, 0), setting.problem(material, "test", 0, 1)]
    assert all(other.memory != first.memory for other in others)


# Copying


def test_the_second_text_is_the_first(tokenizer, material):
    """As texts, and as tokens: the gold tokens occur in the memory in the same order without a gap."""
    found = Copy(7).problem(material, "test", 0, 0)
    memory, again = tokenizer.decode(found.memory), tokenizer.decode((*found.rest, found.gold[-1]))
    words = memory.removeprefix("Text: ").removesuffix("\n")
    assert again == f"The text once more: {words}"
    assert len(words.split(" ")) == 7
    assert set(words.split(" ")) <= set(pool())
    ids = found.memory
    assert any(ids[i : i + len(found.gold)] == found.gold for i in range(len(ids)))
    assert [(*found.rest, found.gold[-1])[place + 1] for place in found.judged] == list(found.gold)


def test_words_are_drawn_uniformly_and_independently(tokenizer, material):
    """In long texts every word of the pool occurs, none much more often than the others, and some twice."""
    words = [tokenizer.decode(Copy(400).problem(material, "train", 0, n).gold).split() for n in range(20)]
    counts = [sum(text.count(word) for text in words) for word in pool()]
    mean = 8000 / len(pool())
    assert len(pool()) > 300
    assert min(counts) > 0
    assert sum((c - mean) ** 2 / mean for c in counts) < len(pool()) + 4 * (2 * len(pool())) ** 0.5
    assert len(set(words[0])) < 400


def test_no_text_is_in_two_splits(material):
    """Even if a text is a single word."""
    assert disjoint({s: {Copy(1).problem(material, s, 0, n).gold for n in range(100)} for s in SPLITS})


# Phone book


@pytest.mark.parametrize("lines", [3, 4, 40])
def test_examples_and_question_are_lines_of_the_book(tokenizer, material, lines):
    """Names and numbers differ; the answer is the number of the name in question, in the tokens of the book."""
    for number in range(10):
        found = Phonebook(lines).problem(material, "test", 0, number)
        book = tokenizer.decode(found.memory).splitlines()
        assert len(set(book)) == len({line.split(":")[0] for line in book}) == lines
        assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+: \d{3}-\d{3}-\d{4}", line) for line in book)
        shown = tokenizer.decode((*found.rest, found.gold[-1])).split("\n")
        assert len(set(shown)) == 3
        assert set(shown) <= set(book)
        assert tokenizer.decode(found.gold) == " " + shown[-1].split(": ")[1]
        ids = found.memory
        assert any(ids[i : i + len(found.gold)] == found.gold for i in range(len(ids)))


def test_every_line_can_be_the_question(tokenizer, material):
    """The line in question has any place in the book, and so have the examples."""
    questions, examples = set(), set()
    for number in range(60):
        found = Phonebook(4).problem(material, "train", 0, number)
        book = tokenizer.decode(found.memory).splitlines()
        first, _, last = tokenizer.decode((*found.rest, found.gold[-1])).split("\n")
        questions.add(book.index(last))
        examples.add(book.index(first))
    assert questions == examples == set(range(4))


# Passkey


@pytest.mark.parametrize("length", [40, 41, 300])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_and_depth(tokenizer, material, length, depth):
    """The memory has exactly the requested length; the share of other tokens before the key is the depth."""
    found = Passkey(length, depth).problem(material, "test", 0, 0)
    assert len(found.memory) == length
    key = tokenizer.decode(found.gold)
    before, sentence, after = tokenizer.decode(found.memory).partition(f"\nThe pass key is{key}.\n")
    assert sentence
    start, end = len(tokenizer.encode("\nThe pass key is")), len(tokenizer.encode(".\n"))
    where = next(i for i in range(length) if found.memory[i : i + len(found.gold)] == found.gold)
    assert where - start == round(depth * (length - start - len(found.gold) - end))
    assert (before == "") is (depth == 0.0)
    assert (after == "") is (depth == 1.0)


def test_only_the_key_is_judged(tokenizer, material):
    """The question ends where the number begins; the number has five digits."""
    found = Passkey(100, 0.5).problem(material, "test", 0, 0)
    question, _, key = tokenizer.decode((*found.rest, found.gold[-1])).rpartition(" ")
    assert question == "What is the pass key? The pass key is"
    assert tokenizer.decode(found.gold) == f" {key}"
    assert len(key) == 5
    assert key.isdigit()
    assert len(found.judged) == len(found.gold)


def test_no_key_is_in_two_splits(material):
    setting = Passkey(40, 0.5)
    assert disjoint({s: {setting.problem(material, s, 0, n).gold for n in range(200)} for s in SPLITS})


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: draw_content(lambda rng: 1, "tset", "a"), "unknown split 'tset'"),
        (
            lambda material: draw_content(lambda rng: 0, "test", "coin"),
            "coin: too few different contents for a test split",
        ),
        (lambda m: encode_pieces(m.tokenizer, ""), "no tokens for ''"),
        (lambda m: Copy(0), "number of words to copy is 0"),
        (lambda m: Copy(2.0), "number of words to copy is 2.0"),
        (lambda m: Copy(True), "number of words to copy is True"),
        (lambda m: Phonebook(2), "is 2; it must be a whole number of 3 or more"),
        (lambda m: Phonebook("4"), "is '4'"),
        (lambda m: Phonebook(10_001), "cannot have 10001 lines; the largest has 10000"),
        (lambda m: Passkey(100, 1.1), r"depth 1\.1; depths are 0 \(beginning\) to 1 \(end\)"),
        (lambda m: Passkey(5, 0.5).problem(m, "test", 0, 0), "the sentence with the key has"),
        (lambda m: Passkey(10**6, 0.5).problem(m, "test", 0, 0), "this prose has only"),
        (lambda m: Mqar(63, 4), "the length must be even"),
        (lambda m: Mqar(64, 17), "at least four times the number of pairs"),
        (lambda m: Mqar(64, 0), "number of pairs is 0"),
        (lambda m: Mqar(64, 4, 64), "a vocabulary of more than 64"),
        (lambda m: Mqar(64, 4, 8192.0), "vocabulary is 8192.0"),
    ],
)
def test_impossible_problems_are_refused_by_name(make, message, material):
    with pytest.raises(UserError, match=message):
        make(material)
