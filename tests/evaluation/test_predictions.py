"""Predictions in a file: everything comes back, equal content gives equal bytes, and damage is reported."""

import gzip
import json

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from prosg_lib.errors import UserError
from prosg_lib.evaluation.predictions import header_path, read, write

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


@pytest.mark.parametrize("rows", [PROBLEMS, DIALOGUES])
def test_what_is_written_comes_back(tmp_path, rows):
    """Header and rows, numbers to the last bit; a file alone can be read too, by pandas as well."""
    path = tmp_path / "a.jsonl.gz"
    write(path, HEADER, rows)
    header, found = read(path)
    assert header == HEADER
    assert_frame_equal(found, rows, check_exact=True)
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


def test_missing_and_damaged_files(tmp_path):
    """Each is named in the message; a file that is cut short anywhere is refused."""
    path = tmp_path / "a.jsonl.gz"
    with pytest.raises(UserError, match=r"a\.jsonl\.gz does not exist"):
        read(path)
    write(path, HEADER, PROBLEMS)
    whole = path.read_bytes()
    for cut in range(1, len(whole), 10):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"a\.jsonl\.gz is cut short or damaged"):
            read(path)
    for content in (b"", b"text", b"\xff\xfe", b"[1]", b"\n\n"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
            read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "$x^|\n"}, "method should be a name of letters"),
        ({"distance": "far"}, "distance should be a whole number"),
        ({"seed": -1}, "whole numbers should be from 0"),
        ({"prompt": 10**30}, "whole numbers should be from 0"),
        ({"instructions": {"tone": "kind"}}, "instructions"),
        ({"gold": [3, 4]}, r"gold\[0\] should be text"),
        ({"predicted": ["Oslo"]}, "predicted should have as many answers as gold"),
        ({"gold": [], "predicted": []}, "predicted should have as many answers as gold, at least one"),
        ({"competing_right": 9}, "competing_right should be at most competing_total"),
        ({"a\n\x1b[31m": 1}, "a +should be left out"),
    ],
)
def test_a_row_of_another_kind_is_refused(tmp_path, change, message):
    """With its number, and what should stand there."""
    rows = DIALOGUES.to_dict("records")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [rows[0], rows[1] | change])))
    with pytest.raises(UserError, match=rf"a\.jsonl, row 2: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"suite": "a", "suite": "b"}', "'suite' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"items": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"items": NaN}', "cannot be used"),
        ("[1]", "an object"),
        ('{"sha256": "0"}', "was changed, or belongs to other rows than those of"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, text, message):
    """The same holds for rows; without it they are read as they are."""
    path = tmp_path / "a.jsonl.gz"
    write(path, HEADER, PROBLEMS)
    header_path(path).write_text(text)
    with pytest.raises(UserError, match=rf"a\.json.*{message}"):
        read(path)
    elsewhere = tmp_path / "elsewhere" / path.name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    assert_frame_equal(read(elsewhere)[1], PROBLEMS)


def test_a_header_belongs_to_its_rows(tmp_path):
    """However they are compressed, but not when an answer is another."""
    path, plain = tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl"
    write(path, HEADER, PROBLEMS)
    text = gzip.decompress(path.read_bytes()).decode()
    plain.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert read(plain)[0] == HEADER
    plain.write_text(text.replace("[3, 4]", "[3, 5]", 1))
    with pytest.raises(UserError, match="belongs to other rows"):
        read(plain)
