"""Prose: its sources, how it is split, and the errors when it is missing."""

import os
import random
import shutil

import datasets
import numpy as np
import pytest

from prosg_lib.errors import UserError
from prosg_lib.text import prose
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, load_prose, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


@pytest.fixture
def bare(offline, tmp_path, monkeypatch):
    """A machine with no books, an empty Hugging Face cache, and no network."""
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write_books(folder, count, paragraphs=12):
    """Books whose every paragraph names its book."""
    folder.mkdir(parents=True, exist_ok=True)
    for b in range(count):
        lines = [f"This is paragraph number {i} of the long book number {b}, and no other." for i in range(paragraphs)]
        (folder / f"book-{b}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


# Our own sentences


def test_sha256_identifies_the_text():
    """Neither the source nor the order of the splits matters; every paragraph, its end and its split do."""
    one = Prose("a", {"train": ["x", "y"], "validation": ["z"], "test": ["w"]})
    assert one.sha256 == Prose("b", dict(reversed(one.paragraphs.items()))).sha256
    others = [{"train": ["x\ny"]}, {"train": ["y", "x"]}, {"train": ["x"], "validation": ["y", "z"]}, {"test": ["v"]}]
    hashes = {Prose("a", one.paragraphs | other).sha256 for other in others}
    assert len(hashes - {one.sha256}) == len(others)


def test_own_sentences_follow_from_the_split():
    """The same split gives the same paragraphs; no two splits have a paragraph in common."""
    made = {split: own_sentences(split) for split in SPLITS}
    assert made == {split: own_sentences(split) for split in SPLITS}
    sets = [set(lines) for lines in made.values()]
    assert len(set.union(*sets)) == sum(map(len, sets))
    assert all(line.endswith(".") and line[0].isupper() for lines in made.values() for line in lines)


# A folder


@pytest.mark.parametrize("count", [3, 7, 25])
def test_a_book_is_in_one_split(tmp_path, count):
    """Every book's paragraphs are all in one split, no split is empty, a tenth each is held out."""
    loaded = load_prose(str(write_books(tmp_path / "shelf", count)))
    assert loaded.source == "shelf"
    books = {split: {line.split("number ")[2] for line in lines} for split, lines in loaded.paragraphs.items()}
    assert sum(map(len, books.values())) == len(set.union(*books.values())) == count
    held = max(1, count // 10)
    assert [len(books[s]) for s in SPLITS] == [count - 2 * held, held, held]


def test_a_books_split_depends_on_titles_alone(tmp_path):
    """Another text under the same title stays in its split."""
    folder = write_books(tmp_path, 5)
    before = load_prose(str(folder)).paragraphs
    edition = "Another edition of this book, with other words, but of the same title."
    (folder / "book-2.txt").write_text(edition)
    expected = {s: [edition if "book number 2" in line else line for line in lines] for s, lines in before.items()}
    after = load_prose(str(folder)).paragraphs
    assert {s: set(lines) for s, lines in after.items()} == {s: set(lines) for s, lines in expected.items()}


def test_names_of_books_may_be_any_bytes(tmp_path):
    """Linux has names that are no text."""
    folder = write_books(tmp_path, 3)
    (folder / "book-1.txt").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))
    assert sum(map(len, load_prose(str(folder)).paragraphs.values())) == 36


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_books_are_divided(tmp_path, count):
    """Then the paragraphs are divided: none is in two splits, none is left out."""
    loaded = load_prose(str(write_books(tmp_path, count, paragraphs=40)))
    lines = [line for s in SPLITS for line in loaded.paragraphs[s]]
    assert len(lines) == len(set(lines)) == 40 * count
    assert all(loaded.paragraphs.values())


def test_hard_wrapped_books_are_read_by_paragraph(tmp_path):
    """Lines between blank lines are joined if a file is hard-wrapped, and only then."""
    wrapped = "It was a dark and stormy night, and\nthe rain fell in torrents on us all.\n\n" * 40
    (tmp_path / "a.txt").write_text(wrapped)
    lines = [x for split in SPLITS for x in load_prose(str(tmp_path)).paragraphs[split]]
    assert set(lines) == {"It was a dark and stormy night, and the rain fell in torrents on us all."}
    (tmp_path / "a.txt").write_text(
        ("A line that is longer than a wrapped one, " * 4 + "\nand its neighbour below it, of some length\n\n") * 40
    )
    assert len([x for split in SPLITS for x in load_prose(str(tmp_path)).paragraphs[split]]) == 80


def test_short_paragraphs_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["x" * prose._SHORTEST] * 30 + ["y" * (prose._SHORTEST - 1)] * 30))
    assert sum(map(len, load_prose(str(tmp_path)).paragraphs.values())) == 30


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: f.mkdir(), r"no \.txt files in .*shelf"),
        (lambda f: None, r"shelf does not exist"),
        (lambda f: write_books(f, 1, paragraphs=5), r"holds 5 paragraphs .* at least 30"),
        (
            lambda f: (write_books(f, 3), (f / "bad.txt").write_bytes(b"abc\xff")),
            r"bad\.txt is not UTF-8 text \(byte 3\)",
        ),
        (lambda f: (write_books(f, 3), (f / "short.txt").write_text("Too short.")), r"short\.txt has no paragraph"),
        (lambda f: (write_books(f, 3), shutil.copy(f / "book-1.txt", f / "copy.txt")), "hold the same text"),
    ],
    ids=["empty", "missing", "few", "encoding", "short", "copy"],
)
def test_a_folder_that_cannot_be_used(tmp_path, prepare, message):
    folder = tmp_path / "shelf"
    prepare(folder)
    with pytest.raises(UserError, match=message):
        load_prose(str(folder))


# WikiText, and the default


def test_wikitext_from_the_hub(bare, monkeypatch):
    """Short lines (headings) are left out; words are separated by single spaces."""
    text = ["", " = Heading = \n", " A paragraph of WikiText ,  tokenised , long enough to stay . \n"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {split: {"text": text} for split in SPLITS})
    loaded = load_prose("wikitext")
    assert loaded.source == "wikitext-2"
    assert loaded.paragraphs["test"] == ["A paragraph of WikiText , tokenised , long enough to stay ."]


def test_wikitext_without_a_network(bare, monkeypatch):
    """If the hub cannot be reached, or in the libraries' offline mode: one clear error with a remedy."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", bare / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Salesforce/wikitext cannot be loaded .*PROSG_TEST_DATA"):
        load_prose("wikitext")

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"Salesforce/wikitext cannot be loaded \(ConnectionError\).*PROSG_TEST_DATA"):
        load_prose("wikitext")


def test_the_default_is_the_books_and_else_our_own(bare, monkeypatch):
    """A variable that points nowhere is a mistake, not a request for other prose."""
    assert load_prose().source == "own sentences"
    write_books(bare / "data" / "books", 3)
    monkeypatch.setenv("PROSG_TEST_DATA", str(bare / "data"))
    assert load_prose().source == "books"
    (bare / "other" / "xquad").mkdir(parents=True)
    monkeypatch.setenv("PROSG_TEST_DATA", str(bare / "other"))  # it has other tasks' data
    assert load_prose().source == "own sentences"
    for folder in (bare / "elsewhere", "~nobody-here/data", "x" * 300):
        monkeypatch.setenv("PROSG_TEST_DATA", str(folder))
        with pytest.raises(UserError, match=r"PROSG_TEST_DATA is .*(elsewhere|xxx).*unset|the whole path instead of ~"):
            load_prose()


# Tokens


def test_passages_start_where_a_paragraph_starts():
    """A passage has the requested length, and is the text from the start of a paragraph."""
    tokenizer = load_tokenizer()
    lines = own_sentences("test")[:50]
    tokens = ProseTokens.of(Prose("own", {"test": lines}), "test", tokenizer)
    text = "\n".join([*lines, ""])
    assert tokenizer.decode(tokens.ids.tolist()) == text
    rng = random.Random(0)
    for length in (1, 12, 200):
        passage = tokens.passage(length, rng)
        assert len(passage) == length
        start = text.index(tokenizer.decode(passage))
        assert start == 0 or text[start - 1] == "\n"
    assert tokens.passage(20, random.Random(5)) == tokens.passage(20, random.Random(5))
    assert np.array_equal(tokens.ids[: len(tokens.ids)], tokens.passage(len(tokens.ids), rng))


def test_passages_are_spread_and_share_nothing():
    """Each begins where a paragraph does, none overlaps the next, and another draw begins elsewhere."""
    tokens = ProseTokens.of(Prose("own", {"test": own_sentences("test")[:200]}), "test", load_tokenizer())
    found = tokens.passages(8, 60, random.Random(0))
    assert found.shape == (8, 60)
    whole = tokens.ids.tolist()
    places = [next(s for s in tokens.starts if whole[s : s + 60] == row) for row in found.tolist()]
    gaps = np.diff(places)
    assert (gaps >= 60).all()
    assert np.ptp(gaps) < 2 * np.diff(tokens.starts).max()
    assert np.array_equal(found, tokens.passages(8, 60, random.Random(0)))
    assert not np.array_equal(found, tokens.passages(8, 60, random.Random(1)))
    assert np.array_equal(tokens.passages(1, len(whole), random.Random(0))[0], tokens.ids)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p: p("test").passage(500, random.Random(0)), "only 5 tokens, fewer than 500; add more text"),
        (lambda p: p("test").passages(1, 500, random.Random(0)), "too few for 1 separate passages of 500"),
        (lambda p: p("test").passages(3, 2, random.Random(0)), "too few for 3 separate passages of 2"),
        (lambda p: p("validation"), r"the validation split of this prose .* is empty"),
        (lambda p: p("dev"), "unknown split 'dev'"),
    ],
)
def test_too_little_prose(use, message):
    short = Prose("own", {"test": ["Short."], "validation": []})
    with pytest.raises(UserError, match=message):
        use(lambda split: ProseTokens.of(short, split, load_tokenizer()))
