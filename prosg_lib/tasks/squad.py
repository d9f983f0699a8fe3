"""SQuAD as pairs of a paragraph and a question about it (Rajpurkar et al. 2016, arXiv 1606.05250).

One of the tasks of Zhang, Choshen and Andreas (2025, arXiv 2506.20989). Their template is not public; ours is::

    context:  The Panthers defense gave up just 308 points, ranking sixth in the league, ...
    query:    Question: How many points did the Panthers defense surrender?
              Answer:
    answer:   308
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.tasks.pairs import Pair, normalised
from prosg_lib.text.prose import SPLITS, check_split, from_hub, split_titles

HUB = "rajpurkar/squad"


@dataclass(frozen=True)
class SquadPair(Pair):
    """A pair with the answers of all of SQuAD's annotators; `answer` is the first of them.

    Attributes:
        answers: in SQuAD's order, without repetition.
    """

    answers: tuple[str, ...]


def squad(split: str, source: str | Path = "hub") -> tuple[SquadPair, ...]:
    """The questions of one split, in the source's order.

    SQuAD has a training set and a development set; its test set is not public. From the hub, "test" is the development
    set, "validation" has the questions on a tenth of the training set's articles, and "train" those on the others. The
    articles of a local file are divided by title: a tenth, at least one, each for validation and test. No article is
    ever in two splits.

    Left out are questions that SQuAD 2.0 marks as impossible, and questions that need no paragraph, because an answer
    occurs in the question ("Is it A or B?") or is nothing but an article or punctuation.

    Args:
        split: "train", "validation" or "test".
        source: "hub" (`rajpurkar/squad` through `datasets`); a file in SQuAD's JSON format; or one of rows as the hub
            has them, one a line or in one list.
    Raises:
        UserError: there is no such split; the hub cannot be reached; the file is missing or not in SQuAD's format
            (the error gives the place); or no question is left.
    """
    check_split(split)
    pairs = tuple(filter(None, _hub(split) if source == "hub" else _file(split, Path(source))))
    if not pairs:
        raise UserError(
            f"the {split} split of {HUB if source == 'hub' else source} has no question that its paragraph answers; "
            "use a file with more questions"
        )
    return pairs


def _pair(context: str, question: str, answers: Iterable[str]) -> SquadPair | None:
    """None where there is no answer, or no need of the paragraph.

    With single spaces between words: some questions start or end with a space, and a paragraph is one line.
    """
    context, question, *answers = (" ".join(text.split()) for text in (context, question, *answers))
    asked, words = f" {normalised(question)} ", [normalised(answer) for answer in answers]
    if not answers or not all(answer and f" {answer} " not in asked for answer in words):
        return None
    answers = tuple(dict.fromkeys(answers))
    return SquadPair(context, f"Question: {question}\nAnswer:", answers[0], answers)


def _hub(split: str) -> Iterator[SquadPair | None]:
    data = from_hub(HUB, local="xquad/xquad.en.json, which is in SQuAD's JSON format")
    rows = data["validation" if split == "test" else "train"]
    validation = set(split_titles(data["train"]["title"])["validation"])
    for row in rows:
        if split == "test" or (row["title"] in validation) == (split == "validation"):
            yield _pair(row["context"], row["question"], row["answers"]["text"])


def _file(split: str, path: Path) -> list[SquadPair | None]:
    found = list(_titled(path))
    titles = split_titles(title for title, _ in found)
    if not all(titles.values()):
        raise UserError(
            f"{path} has questions on {len({title for title, _ in found})} articles; three splits need at least "
            f"{len(SPLITS)}; add articles"
        )
    kept = set(titles[split])
    return [pair for title, pair in found if title in kept]


def _titled(path: Path) -> Iterator[tuple[str, SquadPair | None]]:
    """Every question of a file, with the title of its article."""
    content = files.read_rows(path) if "}\n{" in files.read_text(path) else files.read_json(path)
    place = "data"
    try:
        if isinstance(content, list):
            for i, row in enumerate(content):
                place = f"row {i + 1}"
                spans = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                yield _question(row["title"], row["context"], row["question"], list(spans))
            return
        for i, article in enumerate(content["data"]):
            place = f"data[{i}]"
            title = article["title"]
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{i}].paragraphs[{j}]"
                for k, item in enumerate(paragraph["qas"]):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    impossible = item.get("is_impossible") is True
                    spans = [] if impossible else [(a["text"], a["answer_start"]) for a in item["answers"]]
                    if not spans and not impossible:
                        raise ValueError('no answer and not marked "is_impossible": true')
                    yield _question(title, paragraph["context"], item["question"], spans)
    except KeyError as error:
        raise UserError(f"{path}, {place}: {error} is missing; {_REMEDY}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}, {place}: not in SQuAD's format ({error}); {_REMEDY}") from None


_REMEDY = "write it as SQuAD's own files, or as rows with title, context, question and answers, as `datasets` has them"


def _question(title: str, context: str, question: str, spans: list[tuple[str, int]]) -> tuple[str, SquadPair | None]:
    (title + context + question).encode()  # no half characters, which no tokenizer takes
    for text, start in spans:
        if start < 0 or not text or context[start : start + len(text)] != text:
            raise ValueError(f"{text[:99]!r} does not stand at character {start} of the context")
    return " ".join(title.split()), _pair(context, question, [text for text, _ in spans])
