"""SQuAD as pairs of a paragraph and a question about it (Rajpurkar et al. 2016, arXiv 1606.05250).

One of the tasks of Zhang, Choshen and Andreas (2025, arXiv 2506.20989). Their template is not public; ours is

    context:  The Panthers defense gave up just 308 points, ranking sixth in the league, ...
    query:    Question: How many points did the Panthers defense surrender?
              Answer:
    answer:   308
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.files import json_kind, read_json
from prosg_lib.tasks.pairs import Pair, is_right, normalised
from prosg_lib.text.prose import SPLITS, check_split, split_titles

HUB = "rajpurkar/squad"


@dataclass(frozen=True)
class SquadPair(Pair):
    """A pair that knows every answer which SQuAD's annotators gave; `answer` is the first of them.

    Attributes:
        answers: in SQuAD's order, each once.
    """

    answers: tuple[str, ...]

    def accepts(self, generated: str) -> bool:
        """Whether the first line of a continuation is one of the answers: SQuAD's exact match."""
        return any(is_right(generated, answer) for answer in self.answers)


def squad(split: str, source: str | Path = "hub") -> tuple[SquadPair, ...]:
    """The questions of one split, in the source's order.

    SQuAD has a training set and a development set; its test set is not public. From the hub, "test" is the development
    set, "validation" are the questions on a tenth of the training set's articles, "train" those on its others. The
    articles of a local file are divided by title: a tenth, at least one, each to validation and test. So no article
    is ever in two splits.

    Left out are questions that SQuAD 2.0 marks as impossible, and those that need no paragraph, because an answer
    stands in the question ("Is it A or B?") or is nothing but an article or punctuation.

    Args:
        split: "train", "validation" or "test".
        source: "hub" (`rajpurkar/squad` through `datasets`), or a file in SQuAD's JSON format.
    Raises:
        UserError: there is no such split; the hub cannot be reached; the file is missing, not JSON, or malformed, which
            is named by its place in the JSON; or no question is left.
    """
    check_split(split)
    records = _hub(split) if source == "hub" else _file(split, Path(source))
    pairs = tuple(
        SquadPair(r.context, f"Question: {r.question}\nAnswer:", r.answers[0], r.answers)
        for r in records
        if r.answers and _needs_context(r)
    )
    if not pairs:
        raise UserError(
            f"the {split} split of {HUB if source == 'hub' else source} has no question that its paragraph answers; "
            "use a file with more questions"
        )
    return pairs


@dataclass(frozen=True)
class _Record:
    title: str
    context: str
    question: str
    answers: tuple[str, ...]  # none where SQuAD 2.0 says that the paragraph has no answer

    @classmethod
    def of(cls, title: str, context: str, question: str, answers: Iterable[str]) -> _Record:
        """White space made even: some questions start or end with it, and a paragraph is one line."""
        title, context, question, *answers = (" ".join(text.split()) for text in (title, context, question, *answers))
        return cls(title, context, question, tuple(dict.fromkeys(answers)))


def _needs_context(record: _Record) -> bool:
    question = f" {normalised(record.question)} "
    answers = [normalised(answer) for answer in record.answers]
    return all(answer and f" {answer} " not in question for answer in answers)


def _hub(split: str) -> Iterator[_Record]:
    from datasets import load_dataset

    try:
        data = load_dataset(HUB)
    except Exception as error:
        raise UserError(
            f"{HUB} cannot be loaded ({type(error).__name__}); without a network give a file in SQuAD's JSON format"
        ) from error
    rows = data["validation" if split == "test" else "train"]
    held = set(split_titles(data["train"]["title"])["validation"])
    for row in rows:
        if split == "test" or (row["title"] in held) == (split == "validation"):
            yield _Record.of(row["title"], row["context"], row["question"], row["answers"]["text"])


def _file(split: str, path: Path) -> list[_Record]:
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a file in SQuAD's JSON format, or source='hub'")
    records = list(_records(path, read_json(path)))
    titles = split_titles(r.title for r in records)
    if not all(titles.values()):
        raise UserError(
            f"{path} has {len({r.title for r in records})} articles with questions; three splits need at least "
            f"{len(SPLITS)}; add articles"
        )
    kept = set(titles[split])
    return [r for r in records if r.title in kept]


def _records(path: Path, file) -> Iterator[_Record]:
    """Every question of the file, checked."""
    for at, article in _each(path, "", file, "data"):
        title = _text(path, at, article, "title")
        for in_article, paragraph in _each(path, at, article, "paragraphs"):
            context = _text(path, in_article, paragraph, "context")
            for in_paragraph, question in _each(path, in_article, paragraph, "qas"):
                yield _question(path, in_paragraph, question, title, context)


def _question(path: Path, at: str, question, title: str, context: str) -> _Record:
    asked = _text(path, at, question, "question")
    if question.get("is_impossible") is True:
        return _Record.of(title, context, asked, [])
    answers = []
    for place, answer in _each(path, at, question, "answers"):
        text = _text(path, place, answer, "text")
        start = answer.get("answer_start")
        if type(start) is not int or start < 0 or context[start : start + len(text)] != text:
            raise _error(
                path,
                f"{place}.answer_start",
                f"{text!r} does not stand at {start!r} of the context; write the number of characters before it",
            )
        answers.append(text)
    if not answers:
        raise _error(path, f"{at}.answers", 'empty; give an answer, or mark the question "is_impossible": true')
    return _Record.of(title, context, asked, answers)


def _error(path: Path, place: str, what: str) -> UserError:
    return UserError(f"{path}, {place}: {what}")


def _field(path: Path, at: str, record, name: str):
    if not isinstance(record, dict):
        raise _error(path, at or "the whole", f"an object was expected, not {json_kind(record)}; write {{...}}")
    place = f"{at}.{name}".lstrip(".")
    if name not in record:
        raise _error(path, place, "missing; write it as SQuAD's own files do")
    return place, record[name]


def _each(path: Path, at: str, record, name: str) -> Iterator[tuple[str, object]]:
    place, values = _field(path, at, record, name)
    if not isinstance(values, list):
        raise _error(path, place, f"a list was expected, not {json_kind(values)}; write [...]")
    for i, value in enumerate(values):
        yield f"{place}[{i}]", value


def _text(path: Path, at: str, record, name: str) -> str:
    place, value = _field(path, at, record, name)
    if not isinstance(value, str):
        raise _error(path, place, f"text was expected, not {json_kind(value)}; write it in quotes")
    if not value.strip():
        raise _error(path, place, "empty; write some text, or remove the record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _error(path, place, "holds half of a surrogate pair, which is no character; correct it") from None
    return value
