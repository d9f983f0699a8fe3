"""Raw predictions in a file: what every method said to every item, so that every number can be computed again.

A gzip file of JSON Lines. The first line is the header, one object: what was measured, with what, and how many rows
follow. Every other line is one item and method. In a file of the suite "forgetting"::

    {"task": "copy", "cell": {"words": 2}, "seed": 0, "item": 5, "method": "base",
     "gold": [311, 87], "predicted": [311, 4], "right": false}

and of the suite "dialogue"::

    {"method": "base", "distance": 64, "facts": 6, "seed": 0, "prompt": 5, "instructions": {"closer": "over"},
     "questions": ["Tell me my home town."], "gold": ["Oslo"], "predicted": [" Rome, over."], "asked": 4, "right": 3,
     "training": 0}
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.tasks.own import check_instructions
from prosg_lib.tasks.rows import Place, check_columns, check_text, json_rows, read_json

KIND = "prosg predictions"
_HEADER = {
    "kind": str,
    "version": int,
    "rows": int,
    "suite": str,
    "model": str,
    "fingerprint": str,
    "methods": list,
    "seeds": list,
    "command": str,
    "device": str,
    "versions": dict,
}


@dataclass(frozen=True)
class Prediction:
    """What a method said to one item of the suite "forgetting".

    Attributes:
        task, cell: the test, and its settings by name.
        seed, item: which item of it; equal for all methods that answered the same one.
        gold, predicted: token ids at the judged positions, one or more, equally many.
    """

    version: ClassVar = 1
    columns: ClassVar = ("task", "cell", "seed", "item", "method", "gold", "predicted", "right")
    since: ClassVar = {}
    header: ClassVar = {"items": int}

    task: str
    cell: Mapping[str, float]
    seed: int
    item: int
    method: str
    gold: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def right(self) -> bool:
        """Whether all of it is right."""
        return self.gold == self.predicted

    @property
    def share(self) -> float:
        """The share of tokens that are right."""
        return sum(a == b for a, b in zip(self.gold, self.predicted, strict=True)) / len(self.gold)

    @property
    def name(self) -> tuple:
        """Which item and method it is; no other row of a file has the same."""
        return self.method, self.task, tuple(self.cell.items()), self.seed, self.item

    @classmethod
    def of(cls, place: Place, row: dict) -> Self:
        """A line of a file, checked."""
        for name in ("task", "method"):
            check_text(place, name, row[name])
        for name in ("seed", "item"):
            if not _whole(row[name]):
                raise place.error("a whole number was expected", name)
        cell = row["cell"]
        if not isinstance(cell, dict) or not all(_whole(v) or isinstance(v, float) for v in cell.values()):
            raise place.error("an object of numbers was expected", "cell")
        for name in ("gold", "predicted"):
            if not isinstance(row[name], list) or not row[name] or not all(map(_whole, row[name])):
                raise place.error("a list of token ids was expected, at least one", name)
        if len(row["gold"]) != len(row["predicted"]):
            raise place.error("not as many token ids as gold ones", "predicted")
        found = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "right"})
        if found.right is not row["right"]:
            raise place.error(
                f"it says {row['right']}, but the token ids say {found.right}; copy the file again", "right"
            )
        return found


@dataclass(frozen=True)
class Answers:
    """What a method said to the questions about one prompt at one distance: an item of the suite "dialogue".

    Attributes:
        distance, facts: tokens between prompt and questions, and facts in the prompt.
        seed, prompt: which prompt; equal for all methods and distances that were asked about the same one.
        instructions: of the prompt, the word by kind, as `tasks.dialogue.judge` takes them.
        questions, gold, predicted: texts, one of each a question, one or more: the question, the value that is right,
            and the whole answer as it was generated.
        asked, right: words of answers about other people in the text since the distance before, and how many of them
            the model puts first.
        training: which training of the method's generator it is, of those that were asked the same (format 2; what is
            older, or was trained once or not at all, is 0).
    """

    version: ClassVar = 2
    columns: ClassVar = (
        "method", "distance", "facts", "seed", "prompt", "instructions", "questions", "gold", "predicted", "asked",
        "right", "training",
    )  # fmt: skip
    since: ClassVar = {"training": 2}
    header: ClassVar = {"profile": str, "split": str}

    method: str
    distance: int
    facts: int
    seed: int
    prompt: int
    instructions: Mapping[str, str]
    questions: tuple[str, ...]
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    asked: int
    right: int
    training: int = 0

    @property
    def name(self) -> tuple:
        """Which prompt, distance, method and training it is; no other row of a file has the same."""
        return self.method, self.training, self.distance, self.facts, self.seed, self.prompt

    @classmethod
    def of(cls, place: Place, row: dict) -> Self:
        """A line of a file, checked."""
        check_text(place, "method", row["method"])
        lowest = {"distance": 0, "facts": 1, "seed": None, "prompt": 0, "asked": 0, "right": 0, "training": 0}
        for name, least in lowest.items():
            if name not in row:  # of an older format, and has its default
                continue
            if not _whole(row[name]) or (least is not None and row[name] < least):
                raise place.error("a whole number was expected" + ("" if least is None else f", {least} or more"), name)
        if row["right"] > row["asked"]:
            raise place.error(f"more than the {row['asked']} that were asked; copy the file again", "right")
        check_instructions(place, row["instructions"])
        for name in ("questions", "gold", "predicted"):
            if not isinstance(row[name], list) or not row[name]:
                raise place.error("a list of texts was expected, at least one", name)
            if len(row[name]) != len(row["questions"]):
                raise place.error("not as many texts as questions", name)
            for text in row[name]:
                check_text(place, name, text, empty=name == "predicted")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


ROWS: dict[str, type[Prediction] | type[Answers]] = {"forgetting": Prediction, "dialogue": Answers}
"""What the rows of a suite are. Each kind has the version of its format, its columns in their order, the version since
when there is a column, if not the first, and what a header needs besides."""


def write(path: str | Path, header: Mapping[str, object], rows: Iterable[Prediction | Answers]) -> None:
    """Writes a file, atomically; the same content gives the same bytes.

    Args:
        header: JSON-able; kind, version and the number of rows are added.
        rows: of the header's suite.
    Raises:
        UserError: the disk is full; a previous file is as it was.
    """
    rows = list(rows)
    lines = [_line({name: getattr(row, name) for name in row.columns}) for row in rows]
    version = rows[0].version if rows else 1
    first = _line({"kind": KIND, "version": version, "rows": len(lines), **header})
    files.write_bytes(path, gzip.compress("".join([first, *lines]).encode(), mtime=0))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=dict) + "\n"  # of a mapping of another kind


def read(path: str | Path) -> tuple[dict, list[Prediction] | list[Answers]]:
    """What `write` wrote, now or in an older format: header and rows, in their order.

    Raises:
        UserError: the file is missing, damaged, cut short, not of this kind, of a suite that is not known, or says
            something that cannot be: the message names the line.
    """
    path = Path(path)
    first, _, rest = _text(path).partition("\n")
    header = read_json(Place(path, 1), None, first or "{}")
    kind = _kind(Place(path, 1), header)
    columns = [name for name in kind.columns if kind.since.get(name, 1) <= header["version"]]
    found, seen = [], set()
    for place, row in json_rows(path, "\n" + rest, columns):  # the header's line stays the first
        check_columns(place, list(row), columns)
        prediction = kind.of(place, row)
        if prediction.name in seen:
            raise place.error("the same item and method as in a row before; remove one")
        seen.add(prediction.name)
        found.append(prediction)
    if len(found) != header["rows"]:
        raise UserError(
            f"{path} is cut short or was changed: its header speaks of {header['rows']} rows, and there are "
            f"{len(found)}; copy it again"
        )
    return header, found


def _text(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the file that `prosg evaluate` wrote") from None
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is no gzip file ({error}); give the .jsonl.gz that `prosg evaluate` wrote") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that `prosg evaluate` wrote") from error


def _kind(place: Place, header: Any) -> type[Prediction] | type[Answers]:
    """What rows follow a header, which is checked."""
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise place.error(f"no header of {KIND}; give a file that `prosg evaluate` or a notebook wrote")
    _check_header(place, header, _HEADER)
    if header["suite"] not in ROWS:
        raise place.error(f"the suite {header['suite']!r} is not known; there are {', '.join(ROWS)}")
    kind = ROWS[header["suite"]]
    if not 1 <= header["version"] <= kind.version:
        raise place.error(f"format {header['version']}, and {kind.version} is known here; take a newer version")
    _check_header(place, header, kind.header)
    return kind


def _check_header(place: Place, header: dict, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if not isinstance(header.get(name), kind) or isinstance(header[name], bool):
            raise place.error(f"the header's {name} is missing or of another kind; copy the file again")
        if name == "methods" and not all(isinstance(method, str) for method in header[name]):
            raise place.error("the header's methods are not names; copy the file again")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
