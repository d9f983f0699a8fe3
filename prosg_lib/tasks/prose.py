"""Prose: what a dialogue is interrupted by, and what perplexity is measured on.

Three sources: a folder of .txt files (one paragraph a line or blank lines between them), WikiText through `datasets`,
or, where neither is there, sentences of our own making. A book is never in two splits.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prosg_lib.errors import UserError
from prosg_lib.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
_OWN_SENTENCES = {"train": 20_000, "validation": 3_000, "test": 3_000}


@dataclass(frozen=True)
class Prose:
    """Paragraphs by split, and where they come from."""

    source: str
    paragraphs: dict[str, list[str]]


def load_prose(source: str = "auto") -> Prose:
    """Prose of a source.

    Args:
        source: "own"; "wikitext" (hub id Salesforce/wikitext, wikitext-2-raw-v1); a folder of .txt files; or "auto":
            the folder `books` in $PROSG_TEST_DATA if that is set, else our own sentences.
    Raises:
        UserError: the folder holds no text, or WikiText cannot be had.
    """
    if source == "auto":
        root = os.environ.get("PROSG_TEST_DATA")
        source = str(Path(root) / "books") if root else "own"
    if source == "own":
        return Prose("own sentences", {split: own_sentences(split) for split in SPLITS})
    if source == "wikitext":
        return _wikitext()
    return _folder(Path(source))


def _folder(folder: Path) -> Prose:
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise UserError(f"no .txt files in {folder}; name a folder of plain-text books, or use prose='own'")
    texts = {p: _paragraphs(p) for p in paths}
    if len(paths) < 3:
        lines = [line for p in paths for line in texts[p]]
        if len(lines) < 30:
            raise UserError(f"{folder} holds {len(lines)} paragraphs; three splits need at least 30")
        a, b = int(0.8 * len(lines)), int(0.9 * len(lines))
        return Prose(folder.name, dict(zip(SPLITS, (lines[:a], lines[a:b], lines[b:]), strict=True)))
    # By title, in an order that depends on the titles alone: a tenth, at least one book, each to validation and test.
    order = sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    held = max(1, len(order) // 10)
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    return Prose(folder.name, {s: [x for p in part for x in texts[p]] for s, part in zip(SPLITS, parts, strict=True)})


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or take it out") from error
    return [line for raw in text.splitlines() if len(line := " ".join(raw.split())) >= 40]


def _wikitext() -> Prose:
    from datasets import load_dataset

    try:
        data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    except Exception as error:
        raise UserError(
            f"WikiText cannot be loaded ({type(error).__name__}); without a network use prose='own' or a folder of .txt"
        ) from error
    lines = {s: [" ".join(x.split()) for x in data[s]["text"]] for s in SPLITS}
    return Prose("wikitext-2", {s: [x for x in lines[s] if len(x) >= 40] for s in SPLITS})


_WHO = [
    "the old miller",
    "a young painter",
    "the ferryman",
    "her grandmother",
    "the schoolmaster",
    "a tired soldier",
    "the baker's son",
    "the widow",
    "a stranger",
    "the night watchman",
    "the clockmaker",
    "a small girl",
    "the captain's wife",
    "the gardener",
    "two brothers",
]
_DID = [
    "walked slowly past",
    "waited a long time near",
    "spoke quietly about",
    "had never forgotten",
    "looked out over",
    "came back to",
    "wrote a letter about",
    "stood alone before",
    "dreamed again of",
    "was afraid of",
    "ran all the way to",
    "told nobody about",
]
_WHAT = [
    "the frozen river",
    "the empty station",
    "a house on the hill",
    "the harbour at dawn",
    "the burning mill",
    "the narrow bridge",
    "that summer evening",
    "the road to the village",
    "an open window",
    "the dark orchard",
    "the church tower",
    "a broken gate",
]
_HOW = [
    "while the rain went on",
    "before the lamps were lit",
    "as if nothing had happened",
    "and the dog followed",
    "with a heavy heart",
    "long after the others had gone",
    "because the winter was near",
    "without saying a word",
    "and then the wind turned",
    "though it was already late",
]


def own_sentences(split: str) -> list[str]:
    """Paragraphs of three to five made-up sentences, from a seed that depends on the split alone."""
    rng = random.Random(f"own prose, {split}")
    sentences = [
        f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}, {rng.choice(_HOW)}."
        for _ in range(_OWN_SENTENCES[split])
    ]
    sentences = [s[0].upper() + s[1:] for s in sentences]
    paragraphs, i = [], 0
    while i < len(sentences):
        n = rng.randint(3, 5)
        paragraphs.append(" ".join(sentences[i : i + n]))
        i += n
    return paragraphs


@dataclass(frozen=True)
class ProseTokens:
    """One split as a line of token ids with the places where a paragraph starts."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, prose: Prose, split: str, tokenizer: Tokenizer) -> ProseTokens:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        lines = [tokenizer.encode_long(p + "\n") for p in prose.paragraphs[split]]
        lengths = np.array([len(x) for x in lines])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return cls(np.concatenate([np.array(x, dtype=np.int32) for x in lines]), starts)

    def passage(self, length: int, rng: random.Random) -> list[int]:
        """`length` tokens from the start of a random paragraph on, over paragraphs' ends where they are short."""
        last = len(self.ids) - length
        if last < 0:
            raise UserError(
                f"this prose has {len(self.ids)} tokens; a passage of {length} was asked for; add more text"
            )
        start = int(self.starts[rng.randrange(len(self.starts))])
        start = min(start, last)
        return self.ids[start : start + length].tolist()
