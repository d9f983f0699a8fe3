"""WikiText as pairs of a passage and a sentence of it that breaks off before a name or a number.

A task of Zhang, Choshen and Andreas (2025, arXiv 2506.20989), on the text of Merity et al. (2016, arXiv 1609.07843).
How they turned WikiText into queries is not public; this is our reading of the task, a cloze::

    context:  The case attracted ... Another contemporary, Gilbert Foliot, who was Bishop of Hereford, wrote ...
    query:    Complete from the passage:
              Another contemporary, Gilbert Foliot, who was Bishop of
    answer:   Hereford

The answer occurs in the passage and cannot be known otherwise: it occurs in no other passage of the split, and none of
its words is in the query.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.tasks.pairs import Pair, normalised
from prosg_lib.text.prose import SPLITS, check_split, load_prose, split_titles, text_files, text_lines

INSTRUCTION = "Complete from the passage:\n"
LEAD = 5  # least number of words of the sentence in the query; fewer do not determine the answer
LONGEST = 4  # largest number of words of an answer
LONGEST_SENTENCE = 10_000  # characters; anything longer is a list or a table, and takes time that grows with the square


def wikitext(split: str, source: str | Path = "hub", words: int = 1000) -> tuple[Pair, ...]:
    """One pair for each passage of at least two sentences that has a suitable name or number.

    Articles of a local source are divided by title, a tenth, at least one, each for validation and test; an article is
    never in two splits. A title is a line ` = Title = `, as in WikiText, or else the file's name; with fewer than three
    titles the paragraphs are divided instead. WikiText's own three files keep their splits, whether they are called
    wiki.train.tokens, wiki.train.raw or train.txt; valid.txt and test.txt alone are divided anew.

    Args:
        split: "train", "validation" or "test".
        source: "hub" (`Salesforce/wikitext`, wikitext-2-raw-v1, through `datasets`), a folder of .txt files, or a file
            of plain text. WikiText's tokenised form is turned into ordinary text.
        words: a passage is as many whole sentences of a paragraph as fit into this many words.
    Returns:
        Pairs in the text's order. Which of its names or numbers a passage asks for follows from its text alone.
    Raises:
        UserError: there is no such split; the hub cannot be reached; a file is missing or not UTF-8 text; only some of
            WikiText's own files are there; or the text yields no pair.
    """
    passages = list(_passages(split, source, words))
    pairs = tuple(_pairs(passages))
    if not pairs:
        raise UserError(
            f"the {split} split of {'WikiText' if source == 'hub' else source} has {len(passages)} paragraphs, but no "
            "name or number that occurs in a single paragraph of several sentences; give more text"
        )
    return pairs


def copied(split: str, source: str | Path, words: int) -> tuple[Pair, ...]:
    """One pair for every passage of a source: a sentence broken off at any word, and the words that follow.

    Practice in completing from a passage, for pretraining: there are many more of these than of names that occur in one
    passage only. An answer may occur in other passages too. Arguments as in `wikitext`.
    """
    pairs = []
    for passage in _passages(split, source, words):
        rng = random.Random(f"0 copied {passage}")
        sentence = rng.choice(list(_sentences(passage))).split()
        if len(sentence) > LEAD and "<unk>" not in passage:
            at = rng.randrange(LEAD, len(sentence))
            answer = " ".join(sentence[at : at + rng.randint(1, LONGEST)])
            pairs.append(Pair(passage, INSTRUCTION + " ".join(sentence[:at]), answer))
    return tuple(pairs)


def named(split: str, source: str | Path, words: int) -> tuple[Pair, ...]:
    """One pair for every suitable name or number of a source, even if it occurs in several passages.

    Practice for the task itself, in larger numbers than `wikitext` gives. Arguments as in `wikitext`.
    """
    return tuple(
        Pair(passage, INSTRUCTION + start, answer)
        for passage in _passages(split, source, words)
        for start, answer in _clozes(passage)
    )


_OFFICIAL = re.compile(r"(wiki\.)?(train|valid|test)(?:ation)?(?:\.(?:tokens|raw|txt))+", re.IGNORECASE)
_TITLE = re.compile(r"= ([^=].*) =")


def _local(split: str, path: Path) -> list[str]:
    with files.errors_of(path, "read"):
        is_folder = path.is_dir()
    if is_folder and (own := _official(path)):
        return text_lines(own[split])
    articles: dict[str, list[str]] = {}
    for file in text_files(path) if is_folder else [path]:
        title = file.name
        for line in text_lines(file):
            if found := _TITLE.fullmatch(line):
                title = found[1]
            else:
                articles.setdefault(title, []).append(line)
    if len(articles) < len(SPLITS):
        articles = {line: [line] for part in articles.values() for line in part}
    kept = set(split_titles(articles)[split])
    return [line for title, part in articles.items() if title in kept for line in part]


def _official(folder: Path) -> dict[str, Path] | None:
    """WikiText's own files by split; None where the folder has other texts."""
    with files.errors_of(folder, "read"):
        found = [(name, p) for p in folder.iterdir() if (name := _OFFICIAL.fullmatch(p.name)) and p.is_file()]
    if not any(name[1] or name[2].lower() == "train" for name, _ in found):
        return None
    if sorted(name[2].lower() for name, _ in found) != ["test", "train", "valid"]:
        raise UserError(
            f"{folder} has {', '.join(sorted(p.name for _, p in found))} of WikiText; its splits are three files: "
            "put train.txt, valid.txt and test.txt there, each once"
        )
    own = {name[2].lower(): p for name, p in found}
    return {split: own[part] for split, part in zip(SPLITS, ("train", "valid", "test"), strict=True)}


# WikiText's tokens

_TOKENISED, _ORDINARY = re.compile(r" [,;] | @[-,.]@ | \.$"), re.compile(r"\w, ")
_CLOSING = re.compile(r"[,.;:!?)\]%°′″♭♯”’]|\.\.\.|['’]\w+")
_OPENING = re.compile(r"[(\[$£€¥#“‘]")
_BOTH = re.compile(r" @([-,.])@ | ([/‑]) | (’) (?=(?:s|t|m|d|re|ve|ll) )|(?<=\d) ([–:]) (?=\d)")


def detokenised(text: str) -> str:
    """Ordinary text from a tokenised paragraph (` @-@ `, ` , `, ` " `). Ordinary text is returned unchanged."""
    if len(_TOKENISED.findall(text)) <= len(_ORDINARY.findall(text)):
        return text
    tokens = _BOTH.sub(lambda m: "".join(filter(None, m.groups())), text).split(" ")
    pieces, glue = [], True
    quoted = {'"': False, "'": False}
    for before, token in pairwise(["", *tokens]):
        closes, opens = _CLOSING.fullmatch(token), _OPENING.fullmatch(token)
        # An apostrophe on its own is a quotation mark, or belongs to a plural: the ships ' guns.
        if token in quoted and (token == '"' or quoted[token] or not before.endswith(("s", "<unk>"))):
            closes, opens = quoted[token], not quoted[token]
            quoted[token] = opens
        elif token == "'":
            closes = True
        pieces.append(token if glue or closes else " " + token)
        glue = bool(opens)
    return "".join(pieces)


# Names and numbers

_NAME = r"[A-ZÀ-ÖØ-Þ]\w*(?:-\w+|['’](?!s\b)\w+)*"
_NUMBER = r"[$£€]?\d+(?:[.,:]\d+)*(?:–\d+(?:[.,]\d+)*)?(?:%|s|st|nd|rd|th)?"
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
# A whole name (never cut, not even before its "J."), and nothing that is only the beginning of a word.
_RUN = re.compile(
    rf"(?<= )(?>\d\d? {_MONTH}(?: \d+)?|{_NAME}(?: {_NAME})*(?: {_NUMBER})?|{_NUMBER})(?![\w'’%°/–-]|(?<= [A-Z])\.)"
)
_SENTENCE_END = re.compile(r"[.!?][\"”’')\]]* (?=[\"“‘(\[]?[A-ZÀ-ÖØ-Þ0-9])")
_ABBREVIATION = re.compile(  # the longest has four letters
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Mt|Ft|Lt|Col|Gen|Maj|Capt|Sgt|Rev|Prof|Sr|Jr|No|Vol|vs|ca|c)\."
)


def _pairs(passages: list[str]) -> Iterator[Pair]:
    candidates = [list(_clozes(passage)) for passage in passages]
    answers = {tuple(_words(answer)) for clozes in candidates for _, answer in clozes}
    lengths = {len(words) for words in answers}
    passages_with: Counter[tuple[str, ...]] = Counter()
    for passage in passages:
        words = _words(passage)
        passages_with.update({tuple(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)} & answers)
    for passage, clozes in zip(passages, candidates, strict=True):
        unique = [cloze for cloze in clozes if passages_with[tuple(_words(cloze[1]))] == 1]
        if unique:
            # The text is the seed, so that a passage's query does not depend on the passages before it.
            start, answer = random.Random(f"0 {passage}").choice(unique)
            yield Pair(passage, INSTRUCTION + start, answer)


def _clozes(passage: str) -> Iterator[tuple[str, str]]:
    """The start of a sentence and the name or number that follows, for every suitable one in the passage."""
    sentences = list(_sentences(passage))
    for sentence in sentences if len(sentences) > 1 else []:
        for run in _RUN.finditer(sentence) if len(sentence) <= LONGEST_SENTENCE else []:
            start, answer = sentence[: run.start() - 1], run[0]
            last = start.split()[-1]
            if (
                len(start.split()) >= LEAD
                and len(answer.split()) <= LONGEST
                and len(normalised(answer)) > 1
                and "<unk>" not in sentence[: run.end() + len(" <unk>")]  # all readable, and the name is whole
                # After a colon or quotation mark a capital need not mean a name; after a name it is a part of that one.
                and (last[-1] in ",;)" or (last[-1].isalnum() and last.lstrip("\"'“‘(")[0].islower()))
                and start.count("(") == start.count(")")  # in brackets a number is often a conversion
                and not set(_words(answer)) & set(_words(start))
                and passage.count(start) == 1
            ):
                yield start, answer


def _sentences(passage: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(passage):
        stop = end.start() + 1
        # Only what can be one is searched: all since the last end would take time that grows with the square.
        if not any(m.end() == stop for m in _ABBREVIATION.finditer(passage, max(start, stop - 5), stop)):
            yield passage[start : end.end() - 1]
            start = end.end()
    yield passage[start:]


def _passages(split: str, source: str | Path, words: int) -> Iterator[str]:
    """Ordinary text without headings: the pieces that paragraphs are cut into."""
    check_split(split)
    for line in load_prose("wikitext").paragraphs[split] if source == "hub" else _local(split, Path(source)):
        if not line.startswith("= "):
            yield from _cut(detokenised(line), words)


def _cut(paragraph: str, words: int) -> Iterator[str]:
    """Pieces of whole sentences with at most this many words; a longer sentence is a piece of its own."""
    kept: list[str] = []
    for sentence in _sentences(paragraph):
        if kept and len(" ".join([*kept, sentence]).split()) > words:
            yield " ".join(kept)
            kept = []
        kept.append(sentence)
    yield " ".join(kept)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:[.,]\d+)*", text.lower())
