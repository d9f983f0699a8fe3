"""Predictions in a file: everything comes back, equal content gives equal bytes, and damage is reported."""

import gzip
import json

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from prosg_lib.errors import UserError
from prosg_lib.evaluation.predictions import header_path, read, suite_of, write

HEADER = {"suite": "dialogue", "model": "ä model", "seeds": [0, 1], "versions": {"python": "3"}}
PROBLEMS = pd.DataFrame(
    [
        {"task": "passkey", "cell": {"length": 64, "depth": 0.1 + 0.2}, "seed": 0, "item": item, "method": method,
         "gold": [3, 4], "predicted": [3, 4 + item]}
        for item in (0, 1)
        for method in ("base", "none")
    ]
)  # fmt: skip
DIALOGUES = pd.DataFrame(
    [
        {"method": "base", "training": 0, "distance": d, "facts": 6, "seed": 0, "prompt": 1, "instructions": {},
         "questions": ["Where?", "2026-01-01?"], "gold": ["Oslo", "Ä"], "predicted": [" Oslo, over.", ""],
         "competing_total": 3, "competing_right": 2}
        for d in (0, 64)
    ]
)  # fmt: skip


@pytest.mark.parametrize(("rows", "suite"), [(PROBLEMS, "forgetting"), (DIALOGUES, "dialogue")])
def test_what_is_written_comes_back(tmp_path, rows, suite):
    """Header and rows, numbers to the last bit; a file alone can be read too, by pandas as well."""
    path = tmp_path / "a.jsonl.gz"
    write(path, HEADER, rows)
    header, found = read(path)
    assert header == HEADER
    assert_frame_equal(found, rows, check_exact=True)
    assert suite_of(found) == suite
    assert len(pd.read_json(path, lines=True)) == len(rows)
    header_path(path).unlink()
    assert read(path)[0] == {}


def test_the_same_content_is_the_same_file(tmp_path):
    """Byte by byte, so no time of writing is in it; one JSON object a line."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl.gz", HEADER, PROBLEMS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    lines = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().splitlines()
    assert list(map(json.loads, lines)) == PROBLEMS.to_dict("records")


def test_missing_damaged_or_foreign_files(tmp_path):
    """Each is named in the message; a file that is cut short anywhere is refused."""
    path = tmp_path / "a.jsonl.gz"
    with pytest.raises(UserError, match=r"a\.jsonl\.gz does not exist; give the file that `prosg evaluate` wrote"):
        read(path)
    write(path, HEADER, PROBLEMS)
    whole = path.read_bytes()
    for cut in range(1, len(whole), 10):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged"):
            read(path)
    for content in (b"text", b"\xff\xfe"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged"):
            read(path)
    with pytest.raises(UserError, match="the rows are no predictions; they need the columns"):
        suite_of(pd.DataFrame({"recall": [1.0]}))
