"""Raw predictions in a file: what every method said to every item, so that every number can be computed again.

A gzip file of JSON Lines. The first line is the header, one object: what was measured, with what, and how many rows
follow. Every other line is one item and method::

    {"task": "copy", "cell": {"words": 2}, "seed": 0, "item": 5, "method": "base",
     "gold": [311, 87], "predicted": [311, 4], "right": false}
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.tasks.rows import Place, check_columns, check_text, json_rows

KIND = "prosg predictions"
VERSION = 1
"""Of the format."""

_COLUMNS = ("task", "cell", "seed", "item", "method", "gold", "predicted", "right")
_HEADER = {
    "kind": str,
    "version": int,
    "rows": int,
    "suite": str,
    "model": str,
    "fingerprint": str,
    "methods": list,
    "seeds": list,
    "items": int,
    "command": str,
    "device": str,
    "versions": dict,
}


@dataclass(frozen=True)
class Prediction:
    """What a method said to one item.

    Attributes:
        task, cell: the test, and its settings by name.
        seed, item: which item of it; equal for all methods that answered the same one.
        gold, predicted: token ids at the judged positions, one or more, equally many.
    """

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

    def row(self) -> dict:
        """As a line of the file."""
        own = {name: getattr(self, name) for name in _COLUMNS}
        return own | {"cell": dict(self.cell), "gold": list(self.gold), "predicted": list(self.predicted)}


def write(path: str | Path, header: Mapping[str, object], predictions: Iterable[Prediction]) -> None:
    """Writes a file, atomically; the same content gives the same bytes.

    Args:
        header: JSON-able; kind, version and the number of rows are added.
    Raises:
        UserError: the disk is full; a previous file is as it was.
    """
    rows = [_line(prediction.row()) for prediction in predictions]
    first = _line({"kind": KIND, "version": VERSION, "rows": len(rows), **header})
    files.write_bytes(path, gzip.compress("".join([first, *rows]).encode(), mtime=0))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: str | Path) -> tuple[dict, list[Prediction]]:
    """What `write` wrote: header and predictions, in their order.

    Raises:
        UserError: the file is missing, damaged, cut short, not of this kind, or says something that cannot be: the
            message names the line.
    """
    path = Path(path)
    lines = json_rows(path, _text(path), _COLUMNS)
    place, header = next(lines, (Place(path, 1), {}))
    _check_header(place, header)
    found, seen = [], set()
    for place, row in lines:
        prediction = _prediction(place, row)
        name = (prediction.method, prediction.task, tuple(prediction.cell.items()), prediction.seed, prediction.item)
        if name in seen:
            raise place.error("the same item, seed and method are there twice; remove one")
        seen.add(name)
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


def _check_header(place: Place, header: dict) -> None:
    if header.get("kind") != KIND:
        raise place.error(f"no header of {KIND}; give a file that `prosg evaluate` wrote")
    if header.get("version") != VERSION:
        raise place.error(f"format {header.get('version')!r}, and {VERSION} is known here; take a newer version")
    for name, kind in _HEADER.items():
        if not isinstance(header.get(name), kind) or isinstance(header[name], bool):
            raise place.error(f"the header's {name} is missing or of another kind; copy the file again")


def _prediction(place: Place, row: dict) -> Prediction:
    check_columns(place, list(row), _COLUMNS)
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
    found = Prediction(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k != "right"})
    if found.right is not row["right"]:
        raise place.error(f"it says {row['right']}, but the token ids say {found.right}; copy the file again", "right")
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
