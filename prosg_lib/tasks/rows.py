"""Files of rows that a user wrote: read line by line, and every mistake named by file, line and column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.files import json_kind
from prosg_lib.tasks.dialogue import words


@dataclass(frozen=True)
class Place:
    """Where in the file we are, for the error that may follow."""

    path: Path
    line: int

    def error(self, what: str, column: str | None = None) -> UserError:
        return UserError(f"{self.path}, line {self.line}" + (f", column {column!r}" if column else "") + f": {what}")


def text_of(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise Place(path, line).error(f"not UTF-8 text (byte {error.start} of the file); save it as UTF-8") from error


def json_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[Place, dict]]:
    """The objects of JSON Lines; blank lines are skipped.

    Args:
        columns: what a row has, for the error; `check_columns` checks it.
    Raises:
        UserError: a line is no JSON object.
    """
    # Only "\n" ends a row; splitlines() would also cut at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = Place(path, number)
        row = read_json(place, None, line)
        if not isinstance(row, dict):
            wanted = f"write {{...}} with the columns {', '.join(columns)}"
            raise place.error(f"a JSON object was expected, not {json_kind(row)}; {wanted}")
        yield place, row


def read_json(place: Place, column: str | None, text: str):
    """What a line or a cell holds; a UserError where it is not JSON."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise place.error(f"not JSON{where} ({getattr(error, 'msg', 'nested too deep')}); correct it", column) from None


def check_columns(place: Place, found: Sequence[str], columns: Sequence[str]) -> None:
    """A UserError unless the columns found are these, each once, in any order."""
    for name in found:
        if name not in columns:
            raise place.error(f"unknown column; remove or rename it, there are {', '.join(columns)}", name)
        if found.count(name) > 1:
            raise place.error("the column is there twice; remove one", name)
    for name in columns:
        if name not in found:
            raise place.error(f"the column is missing; every row has {', '.join(columns)}", name)


def check_text(place: Place, column: str, value, *, empty: bool = False, one_line: bool = False) -> None:
    """A UserError unless the value is text, with something in it (or empty), in one line where it has to be."""
    if not isinstance(value, str):
        raise place.error(f"text was expected, not {json_kind(value)}; write it in quotes", column)
    if not empty and not value.strip():
        raise place.error("empty; write some text, or remove the row", column)
    if one_line and "\n" in value.strip():
        raise place.error("holds a line break, which ends a question or an answer; write it in one line", column)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise place.error("holds half of a surrogate pair, which is no character; correct it", column) from None


def check_instructions(place: Place, value) -> None:
    """A UserError unless the value is an object of instructions: a word, in one line, by kind."""
    if not isinstance(value, dict):
        raise place.error(
            f"an object was expected, not {json_kind(value)}; write {{}} where nothing is instructed", "instructions"
        )
    kinds = sorted(words()["instructions"])
    for kind, word in value.items():
        if kind not in kinds:
            raise place.error(f"unknown kind of instruction; there are {', '.join(kinds)}", f"instructions.{kind}")
        check_text(place, f"instructions.{kind}", word, one_line=True)
