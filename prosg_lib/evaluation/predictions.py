"""What every method answered, kept as JSON Lines that pandas reads; every number can be computed again from it.

`predictions.jsonl.gz` has one row an item and method, and `predictions.json` beside it the header: what was measured,
with what, and by which command. In a file about dialogues a row is one prompt at one distance (`Dialogue`)::

    {"method": "base", "training": 0, "distance": 64, "facts": 6, "seed": 0, "prompt": 5,
     "instructions": {"closer": "over"}, "questions": ["Tell me my home town."], "gold": ["Oslo"],
     "predicted": [" Rome, over."], "competing_total": 4, "competing_right": 3}

and in one about the established memory tests it is one problem (`Problem`)::

    {"task": "copy", "cell": {"words": 2}, "seed": 0, "item": 5, "method": "base", "gold": [311, 87],
     "predicted": [311, 4]}

`pandas.read_json(path, lines=True)` reads either.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.strict import read_as

_CHECKSUM = "sha256"
"""The header's entry that holds it and its rows together."""

_METHOD = re.compile(r"\w[\w .,:()+#*-]{0,79}")


@dataclass(frozen=True)
class Dialogue:
    """A row about one prompt: the answers to its questions after `distance` tokens of text.

    Attributes:
        training: number of the method's training, 0 where there is one or none.
        instructions: kind -> word.
        competing_total, competing_right: words of answers about other people in the text since the distance before, and
            how many of them the model ranks first.
    """

    method: str
    training: int
    distance: int
    facts: int
    seed: int
    prompt: int
    instructions: dict[Literal["opener", "closer", "address"], str]
    questions: list[str]
    gold: list[str]
    predicted: list[str]
    competing_total: int
    competing_right: int


@dataclass(frozen=True)
class Problem:
    """A row about one problem of a memory test: token ids at its judged positions."""

    task: str
    cell: dict[str, int | float]
    seed: int
    item: int
    method: str
    gold: list[int]
    predicted: list[int]


def write(path: str | Path, header: Mapping[str, object], rows: pd.DataFrame) -> None:
    """Writes rows to `path` (.jsonl.gz) and the header beside it; equal content gives equal bytes.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    records = rows.to_dict("records")
    write_rows(path, records)
    files.write_json(header_path(path), {**header, _CHECKSUM: digest([header, *records])})


def write_rows(path: str | Path, rows: Iterable[Mapping]) -> None:
    """As `write`, without a header."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    files.write_bytes(path, gzip.compress("".join(lines).encode("utf-8", "backslashreplace"), mtime=0))


def digest(rows: Iterable[Mapping]) -> str:
    """Of what rows say, however they are compressed."""
    return hashlib.sha256("\n".join(map(json.dumps, rows)).encode()).hexdigest()


def header_path(path: str | Path) -> Path:
    """Where the header of a file of rows is: "a/b.jsonl.gz" -> "a/b.json"."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + ".json")


def read(path: str | Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Header and rows, in their order; the header is empty where the file beside it is missing.

    Raises:
        UserError: a file is missing or damaged, a row is neither a `Dialogue` nor a `Problem`, or the header belongs to
            other rows.
    """
    rows = files.read_rows(path)
    if not rows:
        raise UserError(f"{path} has no predictions; give a file that `prosg evaluate` wrote")
    kind = Problem if "task" in rows[0] else Dialogue
    for number, row in enumerate(rows, 1):
        _check(vars(read_as(kind, row, f"{path}, row {number}")), f"{path}, row {number}")
    beside = header_path(path)
    if not beside.exists():
        return {}, pd.DataFrame(rows)
    header = read_as(dict[str, Any], files.read_json(beside), beside)
    with files.errors_of(beside, "read"):
        json.dumps(header, allow_nan=False)
    if header.pop(_CHECKSUM, None) not in (None, digest([header, *rows])):
        raise UserError(
            f"{beside} was changed, or belongs to other rows than those of {path}; copy both files again, or give the "
            "rows alone, in another folder"
        )
    return header, pd.DataFrame(rows)


def _check(row: Mapping[str, Any], where: str) -> None:
    """What a row's types do not say."""
    if not all(0 <= value <= 10**18 for value in row.values() if isinstance(value, int)):
        raise UserError(f"{where}: its whole numbers should be from 0 to 10^18")
    if not _METHOD.fullmatch(row["method"]):
        raise UserError(f"{where}: method should be a name of letters, digits and . , : ( ) + # * -")
    if not len(row["gold"]) == len(row["predicted"]) > 0:
        raise UserError(f"{where}: predicted should have as many answers as gold, at least one")
    if row.get("competing_right", 0) > row.get("competing_total", 0):
        raise UserError(f"{where}: competing_right should be at most competing_total")
