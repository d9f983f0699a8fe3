"""Prose: the text between a prompt and its questions, and the text that perplexity is measured on.

Three sources: a folder of .txt files (one paragraph a line, or hard-wrapped with blank lines between paragraphs),
WikiText through `datasets`, or made-up sentences of our own. A book is never in two splits.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir, extra_data
from prosg_lib.text.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
_OWN_SENTENCES = {"train": 20_000, "validation": 3_000, "test": 3_000}
_PARTS = ("person", "act", "thing", "circumstance")
_SHORTEST = 40  # characters of a paragraph; shorter ones are mostly headings
_WRAPPED = 100  # a file whose lines are all shorter than this is hard-wrapped


def check_split(split: str) -> None:
    """Raise a UserError unless there is a split of this name."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")


def split_titles(titles: Iterable[str]) -> dict[str, list[str]]:
    """Titles by split: a tenth, at least one, each for validation and test. The order depends on the titles alone."""
    # The name of a file may be half a character.
    order = sorted(set(titles), key=lambda title: hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest())
    tenth = max(1, len(order) // 10)
    return dict(zip(SPLITS, (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]), strict=True))


@dataclass(frozen=True)
class Prose:
    """Paragraphs by split, and the name of their source."""

    source: str
    paragraphs: dict[str, list[str]]

    @property
    def sha256(self) -> str:
        """Identifies the text: equal if and only if the paragraphs of every split are."""
        text = json.dumps([self.paragraphs[split] for split in SPLITS], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_prose(source: str = "auto") -> Prose:
    """Prose of a source.

    Args:
        source: "own"; "wikitext" (hub id Salesforce/wikitext, wikitext-2-raw-v1); a folder of .txt files; or "auto":
            the folder `books` in $PROSG_TEST_DATA if that is set, and otherwise our own sentences.
    Raises:
        UserError: the folder is missing or holds no text, or WikiText cannot be loaded.
    """
    if source == "auto":
        source = str(extra_data("books") or "own")
    if source == "own":
        return Prose("own sentences", {split: own_sentences(split) for split in SPLITS})
    if source == "wikitext":
        return _wikitext()
    return _folder(Path(source))


def _folder(folder: Path) -> Prose:
    """The books of a folder, which their titles (file names) assign to the splits. With fewer than three files the
    paragraphs are divided instead."""
    texts = {p.name: [line for line in text_lines(p) if len(line) >= _SHORTEST] for p in text_files(folder)}
    if len(texts) < 3:
        lines = [line for text in texts.values() for line in text]
        if len(lines) < 30:
            raise UserError(
                f"{folder} holds {len(lines)} paragraphs of {_SHORTEST} characters or more; three splits need at least "
                "30; add text, or use prose='own'"
            )
        a, b = int(0.8 * len(lines)), int(0.9 * len(lines))
        return Prose(folder.name, dict(zip(SPLITS, (lines[:a], lines[a:b], lines[b:]), strict=True)))
    seen: dict[tuple[str, ...], str] = {}
    for name, lines in texts.items():
        if not lines:
            raise UserError(
                f"{folder / name} has no paragraph of {_SHORTEST} characters or more; remove it from the folder"
            )
        twin = seen.setdefault(tuple(lines), name)
        if twin != name:  # the same book could be in two splits
            raise UserError(f"{folder / twin} and {name} hold the same text; remove one of them from the folder")
    books = split_titles(texts)
    return Prose(folder.name, {split: [line for name in books[split] for line in texts[name]] for split in SPLITS})


def text_files(folder: Path) -> list[Path]:
    """The .txt files of a folder, by name.

    Raises:
        UserError: the folder is missing, cannot be read, or has none.
    """
    with files.errors_of(folder, "read"):
        found = sorted(p for p in folder.iterdir() if p.suffix == ".txt" and p.is_file())
    if not found:
        raise UserError(f"no .txt files in {folder}; give a folder of plain text")
    return found


def text_lines(path: Path) -> list[str]:
    """The paragraphs of a plain-text file, including headings, with single spaces between words.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    lines = [" ".join(raw.split()) for raw in files.read_text(path).splitlines()]
    if "" in lines and max(map(len, lines)) < _WRAPPED:
        lines = [" ".join(block) for filled, block in groupby(lines, key=bool) if filled]
    return [line for line in lines if line]


def from_hub(*name: str, local: str):
    """A data set through `datasets`: from its cache, or else from the hub.

    Args:
        name: its id, and a configuration of it.
        local: what $PROSG_TEST_DATA may hold in its place.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*name)
    except Exception as error:
        raise UserError(
            f"{name[0]} cannot be loaded ({type(error).__name__}); without a network, set PROSG_TEST_DATA to a folder "
            f"with {local}"
        ) from error


def _wikitext() -> Prose:
    data = from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", local="wikitext-2/ or books/")
    lines = {s: [" ".join(x.split()) for x in data[s]["text"]] for s in SPLITS}
    return Prose("wikitext-2", {s: [x for x in lines[s] if len(x) >= _SHORTEST] for s in SPLITS})


def own_sentences(split: str) -> list[str]:
    """Paragraphs of three to five made-up sentences, from the word lists in `data/own_sentences.json`.

    The seed depends on the split alone: 20,000 sentences for training, 3,000 each for validation and test.
    """
    rng, lists = random.Random(f"own prose, {split}"), files.read_json(data_dir() / "own_sentences.json")
    sentences = []
    for _ in range(_OWN_SENTENCES[split]):
        person, act, thing, circumstance = (rng.choice(lists[part]) for part in _PARTS)
        sentences.append(f"{person[0].upper()}{person[1:]} {act} {thing}, {circumstance}.")
    paragraphs, start = [], 0
    while start < len(sentences):
        size = rng.randint(3, 5)
        paragraphs.append(" ".join(sentences[start : start + size]))
        start += size
    return paragraphs


@dataclass(frozen=True)
class ProseTokens:
    """One split as one sequence of token ids.

    Attributes:
        ids: all tokens, (N,) int32.
        starts: positions at which a paragraph starts, ascending.
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, prose: Prose, split: str, tokenizer: Tokenizer) -> ProseTokens:
        check_split(split)
        if not prose.paragraphs[split]:
            raise UserError(f"the {split} split of this prose ({prose.source}) is empty; add more text")
        lines = [tokenizer.encode_long(p + "\n") for p in prose.paragraphs[split]]
        lengths = np.array([len(x) for x in lines])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return cls(np.concatenate([np.array(x, dtype=np.int32) for x in lines]), starts)

    def passage(self, length: int, rng: random.Random) -> list[int]:
        """`length` tokens from the start of a random paragraph; continues into the next paragraphs if it is short.

        Raises:
            UserError: the prose is shorter.
        """
        last = len(self.ids) - length
        if last < 0:
            raise UserError(f"this prose has only {len(self.ids)} tokens, fewer than {length}; add more text")
        start = min(int(self.starts[rng.randrange(len(self.starts))]), last)
        return self.ids[start : start + length].tolist()

    def passages(self, count: int, length: int, rng: random.Random) -> np.ndarray:
        """A systematic sample of `count` passages, (count, length), in the text's order; each starts a paragraph.

        They start at equal distances, the first at a random place, and do not overlap.

        Raises:
            UserError: there is too little text between one start and the next.
        """
        places = (np.arange(count) + rng.random()) / count * len(self.ids)
        starts = self.starts[np.searchsorted(self.starts, places, side="right") - 1]
        starts = np.minimum(starts, len(self.ids) - length)
        if starts[0] < 0 or (np.diff(starts) < length).any():
            raise UserError(
                f"this prose has only {len(self.ids)} tokens, too few for {count} separate passages of {length}; "
                "add more text, or take fewer"
            )
        return self.ids[starts[:, None] + np.arange(length)]
