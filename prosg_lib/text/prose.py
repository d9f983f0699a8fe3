"""Prose: what a dialogue is interrupted by, and what perplexity is measured on.

Three sources: a folder of .txt files (one paragraph a line, or hard-wrapped with blank lines between paragraphs),
WikiText through `datasets`, or, where neither is there, sentences of our own making. A book is never in two splits.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
_OWN_SENTENCES = {"train": 20_000, "validation": 3_000, "test": 3_000}


def check_split(split: str) -> None:
    """Says so where there is no split of this name.

    Raises:
        UserError: it is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")


def split_titles(titles: Iterable[str]) -> dict[str, list[str]]:
    """Titles by split: a tenth, at least one, each to validation and test. The order depends on the titles alone."""
    order = sorted(set(titles), key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    held = max(1, len(order) // 10)
    return dict(zip(SPLITS, (order[2 * held :], order[:held], order[held : 2 * held]), strict=True))


@dataclass(frozen=True)
class Prose:
    """Paragraphs by split, and where they come from."""

    source: str
    paragraphs: dict[str, list[str]]

    @property
    def sha256(self) -> str:
        """Names the text: equal exactly where every split's paragraphs are."""
        text = json.dumps([self.paragraphs[split] for split in SPLITS], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_prose(source: str = "auto") -> Prose:
    """Prose of a source.

    Args:
        source: "own"; "wikitext" (hub id Salesforce/wikitext, wikitext-2-raw-v1); a folder of .txt files; or "auto":
            the folder `books` in $PROSG_TEST_DATA if that is set, else WikiText where an earlier load left it on this
            machine, else our own sentences. "auto" never uses the network.
    Raises:
        UserError: the folder is missing or holds no text, or WikiText cannot be had.
    """
    if source == "auto":
        source = str(books_folder() or ("wikitext" if _cached_wikitext() else "own"))
    if source == "own":
        return Prose("own sentences", {split: own_sentences(split) for split in SPLITS})
    if source == "wikitext":
        return _wikitext()
    return _folder(Path(source))


def books_folder() -> Path | None:
    """The folder `books` in $PROSG_TEST_DATA; None where that is not set.

    Raises:
        UserError: it is set, and there is no such folder.
    """
    root = os.environ.get("PROSG_TEST_DATA")
    if not root:
        return None
    folder = Path(root).expanduser() / "books"
    if not folder.is_dir():
        raise UserError(
            f"PROSG_TEST_DATA is {root}, but there is no folder {folder}; put .txt files there, or unset the variable"
        )
    return folder


def books_by_split(folder: Path) -> dict[str, list[Path]]:
    """The .txt files of a folder by split: a tenth, at least one, each to validation and test.

    The order depends on the titles (file names) alone. With fewer than three files every split has all of them, and
    the paragraphs are divided instead.

    Raises:
        UserError: there is no such folder, or no .txt file in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of plain-text books, or use prose='own'")
    paths = sorted(p for p in folder.glob("*.txt") if p.is_file())
    if not paths:
        raise UserError(f"no .txt files in {folder}; name a folder of plain-text books, or use prose='own'")
    if len(paths) < 3:
        return dict.fromkeys(SPLITS, paths)
    return {split: [folder / name for name in names] for split, names in split_titles(p.name for p in paths).items()}


def _folder(folder: Path) -> Prose:
    books = books_by_split(folder)
    texts = {p: _paragraphs(p) for p in sorted({p for part in books.values() for p in part})}
    if len(texts) < 3:
        lines = [line for text in texts.values() for line in text]
        if len(lines) < 30:
            raise UserError(
                f"{folder} holds {len(lines)} paragraphs of {_SHORTEST} characters or more; three splits need at least "
                "30; add text, or use prose='own'"
            )
        a, b = int(0.8 * len(lines)), int(0.9 * len(lines))
        return Prose(folder.name, dict(zip(SPLITS, (lines[:a], lines[a:b], lines[b:]), strict=True)))
    _refuse_copies(texts)
    return Prose(folder.name, {split: [x for p in part for x in texts[p]] for split, part in books.items()})


def _refuse_copies(texts: dict[Path, list[str]]) -> None:
    """The same book under two names could be in two splits."""
    seen: dict[tuple[str, ...], Path] = {}
    for path, lines in texts.items():
        if not lines:
            raise UserError(f"{path} has no paragraph of {_SHORTEST} characters or more; take it out of the folder")
        twin = seen.setdefault(tuple(lines), path)
        if twin is not path:
            raise UserError(f"{twin} and {path.name} hold the same text; take one of them out of the folder")


_SHORTEST = 40  # characters of a paragraph; shorter ones are headings and the like
_WRAPPED = 100  # a file whose lines are all shorter than this is hard-wrapped


def _paragraphs(path: Path) -> list[str]:
    return [line for line in text_lines(path) if len(line) >= _SHORTEST]


def text_lines(path: Path) -> list[str]:
    """The paragraphs of a plain-text file, headings and other short ones among them, white space made even.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it or take it out") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a file of plain text") from error
    lines = [" ".join(raw.split()) for raw in text.splitlines()]
    if "" in lines and max(map(len, lines)) < _WRAPPED:
        lines = [" ".join(block) for filled, block in groupby(lines, key=bool) if filled]
    return [line for line in lines if line]


def _wikitext() -> Prose:
    """WikiText from the local cache, or else from the hub."""
    from datasets import Dataset, load_dataset

    if cached := _cached_wikitext():
        try:
            data = {s: Dataset.from_file(str(file)) for s, file in cached.items()}
        except Exception as error:
            folder = cached["train"].parent
            raise UserError(f"the WikiText in {folder} cannot be read ({error}); remove that folder") from error
    else:
        try:
            data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        except Exception as error:
            raise UserError(
                f"WikiText cannot be loaded ({type(error).__name__}); "
                "without a network use a folder of .txt files or, where prose is asked for, prose='own'"
            ) from error
    lines = {s: [" ".join(x.split()) for x in data[s]["text"]] for s in SPLITS}
    return Prose("wikitext-2", {s: [x for x in lines[s] if len(x) >= _SHORTEST] for s in SPLITS})


def _cached_wikitext() -> dict[str, Path]:
    """The files by split that `datasets` left in its cache, the newest; empty where there are none.

    Looked up by hand: `datasets` itself asks the hub first, and takes seconds to import.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets")).expanduser()
    folders = list(cache.glob("Salesforce___wikitext/wikitext-2-raw-v1/*/*"))
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True):
        files = {split: folder / f"wikitext-{split}.arrow" for split in SPLITS}
        if all(file.is_file() for file in files.values()):
            return files
    return {}


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
        check_split(split)
        if not prose.paragraphs[split]:
            raise UserError(f"the {split} split of this prose ({prose.source}) is empty; add more text")
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

    def passages(self, count: int, length: int, rng: random.Random) -> np.ndarray:
        """`count` passages in the text's order, (count, length), each from a paragraph's start on: a systematic sample.

        They begin at equal distances, the first at a random place; no two have a token in common.

        Raises:
            UserError: there is not text enough between one beginning and the next.
        """
        places = (np.arange(count) + rng.random()) / count * len(self.ids)
        starts = self.starts[np.searchsorted(self.starts, places, side="right") - 1]
        starts = np.minimum(starts, len(self.ids) - length)
        if starts[0] < 0 or (np.diff(starts) < length).any():
            raise UserError(
                f"this prose has {len(self.ids)} tokens; {count} passages of {length} that share none were asked for; "
                "add more text, or ask for fewer"
            )
        return self.ids[starts[:, None] + np.arange(length)]
