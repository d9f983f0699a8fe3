"""Files of predictions: what comes out is what was written, or every number of a report on other valid rows."""

import gzip
import json
from itertools import product

import pandas as pd
import pytest
from fuzzing import damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st

from prosg_lib.evaluation.predictions import header_path, read, write
from prosg_lib.reproduction.suite_report import page, sections

HEADER = {"suite": "some", "model": "a", "seeds": [0], "left_out": []}
DIALOGUES = [
    {"method": method, "training": 0, "distance": distance, "facts": 1, "seed": 0, "prompt": prompt}
    | {"instructions": {"closer": "over"}, "questions": ["Where?"], "gold": ["Oslo"], "predicted": [" Oslo, over."]}
    | {"competing_total": 2, "competing_right": prompt}
    for method, distance, prompt in product(("base", "none", "repeated"), (0, 16), range(2))
]
PROBLEMS = [
    {"task": task, "cell": cell, "seed": 0, "item": item, "method": method, "gold": [3, 4], "predicted": [3, item]}
    for (task, cell), item, method in product(
        {"copy": {"words": 2}, "passkey": {"length": 64, "depth": 0.5}}.items(), (0, 4), ("base", "none")
    )
]
KINDS = pytest.mark.parametrize("rows", [DIALOGUES, PROBLEMS], ids=["dialogues", "problems"])


def report(path):
    """All that `prosg evaluate --from-predictions` computes, before it is written."""
    header, rows = read(path)
    return page(header, sections(rows)).encode()


@KINDS
@given(data=st.data())
@fuzz(100)
def test_damaged_files(tmp_path_factory, rows, data):
    """A flipped bit is found, wherever it is, but for a name that becomes another, the checksum's too."""
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl.gz"
    write(path, HEADER, pd.DataFrame(rows))
    file = data.draw(st.sampled_from([path, header_path(path)]))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    found = tried(read, path)
    if found:
        assert found[1].equals(pd.DataFrame(rows))
        assert found[0] == HEADER or len(found[0]) > len(HEADER)


@KINDS
@given(data=st.data())
@fuzz(50)
def test_other_values(tmp_path_factory, rows, data):
    """Another value at any place, or at the same place of all rows, of some methods: a report or a message."""
    path, rows = tmp_path_factory.mktemp("fuzz") / "a.jsonl", json.loads(json.dumps(rows))
    kept = data.draw(st.sets(st.sampled_from(["base", "none", "repeated"]), min_size=1))
    rows = [row for row in rows if row["method"] in kept] or rows
    column, value = data.draw(st.sampled_from(sorted(rows[0]))), data.draw(json_values())
    inside = isinstance(rows[0][column], (list, dict)) and rows[0][column] and data.draw(st.booleans())
    for row in rows if data.draw(st.booleans()) else rows[:1]:
        if inside:
            place = 0 if isinstance(row[column], list) else data.draw(st.sampled_from([*row[column], "new"]))
            row[column][place] = value
        else:
            row[column] = value
    path.write_text("\n".join(map(json.dumps, rows)))
    header = data.draw(st.sampled_from([HEADER, {}, dict.fromkeys(HEADER, value), {"more": value}, value]))
    header_path(path).write_text(json.dumps(header))
    tried(report, path)


@given(content=st.binary(max_size=99) | st.text(max_size=99).map(str.encode), zipped=st.booleans())
@fuzz(100)
def test_anything_else(tmp_path_factory, content, zipped):
    """Bytes of another kind are no predictions."""
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert tried(read, path) is None
