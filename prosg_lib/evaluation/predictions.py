"""What every method answered, kept as JSON Lines that pandas reads; every number can be computed again from it.

`predictions.jsonl.gz` has one row an item and method, and `predictions.json` beside it the header: what was measured,
with what, and by which command. In a file about dialogues a row is one prompt at one distance::

    {"method": "base", "training": 0, "distance": 64, "facts": 6, "seed": 0, "prompt": 5,
     "instructions": {"closer": "over"}, "questions": ["Tell me my home town."], "gold": ["Oslo"],
     "predicted": [" Rome, over."], "competing_total": 4, "competing_right": 3}

and in one about the established memory tests it is one problem::

    {"task": "copy", "cell": {"words": 2}, "seed": 0, "item": 5, "method": "base", "gold": [311, 87],
     "predicted": [311, 4]}

`pandas.read_json(path, lines=True)` reads either.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from prosg_lib import files
from prosg_lib.errors import UserError

NEEDED = {
    "dialogue": {"method", "distance", "facts", "seed", "prompt", "instructions", "gold", "predicted"},
    "forgetting": {"task", "cell", "seed", "item", "method", "gold", "predicted"},
}
"""Columns by which a file of either suite is known."""


def write(path: str | Path, header: Mapping[str, object], rows: pd.DataFrame) -> None:
    """Writes rows to `path` (.jsonl.gz) and the header beside it; equal content gives equal bytes.

    Raises:
        UserError: the disk is full.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_dict("records"))
    files.write_bytes(path, gzip.compress("".join(lines).encode(), mtime=0))
    files.write_json(header_path(path), header)


def header_path(path: str | Path) -> Path:
    """Where the header of a file of rows is: "a/b.jsonl.gz" -> "a/b.json"."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + ".json")


def read(path: str | Path) -> tuple[dict, pd.DataFrame]:
    """Header and rows, in their order; the header is empty where the file beside it is missing.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the file that `prosg evaluate` wrote")
    try:
        rows = pd.read_json(path, lines=True, precise_float=True, dtype=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is damaged or not JSON Lines ({error}); copy it again") from error
    header = header_path(path)
    return (files.read_json(header) if header.is_file() else {}), rows


def suite_of(rows: pd.DataFrame) -> str:
    """Which suite the rows belong to, by their columns.

    Raises:
        UserError: to none.
    """
    for suite, columns in NEEDED.items():
        if columns <= set(rows):
            return suite
    wanted = " or ".join(f"{', '.join(sorted(columns))} ({suite})" for suite, columns in NEEDED.items())
    raise UserError(f"the rows are no predictions; they need the columns {wanted}")
