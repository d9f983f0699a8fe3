"""Predictions in a file: all comes back, and whatever was done to the file is named."""

import contextlib
import gzip
import json
import random
from dataclasses import replace

import pytest

from prosg_lib import predictions
from prosg_lib.errors import UserError
from prosg_lib.predictions import Prediction, read, write

HEADER = {
    "suite": "forgetting",
    "model": "ä model",
    "fingerprint": "0123456789abcdef",
    "methods": ["base", "none"],
    "seeds": [0, 1],
    "items": 2,
    "command": "prosg evaluate",
    "device": "CPU",
    "versions": {"python": "3"},
}
FOUND = [
    Prediction("passkey", {"length": 64, "depth": 0.5}, seed, item, method, (3, 4), (3, 4 + item))
    for seed in (0, 1)
    for item in (0, 1)
    for method in ("base", "none")
]


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "a.jsonl.gz", HEADER, FOUND)
    return tmp_path / "a.jsonl.gz"


def lines(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def rewrite(path, rows):
    path.write_bytes(
        gzip.compress("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode())
    )


def test_what_is_written_comes_back(path):
    """Header and predictions, equal and in their order; scores follow from the token ids."""
    header, found = read(path)
    assert {name: header[name] for name in HEADER} == HEADER
    assert header["rows"] == len(FOUND)
    assert found == FOUND
    assert [p.right for p in found[:4]] == [True, True, False, False]
    assert [p.share for p in found[:4]] == [1.0, 1.0, 0.5, 0.5]


def test_the_same_content_is_the_same_file(path, tmp_path):
    """Byte by byte, so no time of writing is in it; nothing else is left in the folder."""
    write(tmp_path / "b.jsonl.gz", HEADER, FOUND)
    assert (tmp_path / "b.jsonl.gz").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_lines_are_as_documented(path):
    """One object a line: the header, then an item and method each."""
    header, first, *_ = lines(path)
    assert header["kind"] == predictions.KIND
    assert list(first) == ["task", "cell", "seed", "item", "method", "gold", "predicted", "right"]
    assert first["cell"] == {"length": 64, "depth": 0.5}
    assert first["right"] is True


def test_wherever_it_is_cut_or_damaged_it_is_refused(path):
    """Every length, and 300 flipped bits: a UserError, or exactly what was written (gzip's header has bits that count
    for nothing)."""
    whole, expected = path.read_bytes(), read(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read(path)
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert read(path) == expected


def test_missing_or_foreign_files(tmp_path):
    """Each named, with a remedy."""
    with pytest.raises(UserError, match="does not exist; give the file"):
        read(tmp_path / "none.jsonl.gz")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "text").write_text("{}")
    with pytest.raises(UserError, match="is no gzip file"):
        read(tmp_path / "text")
    for content in (b"", b"\n", b"{}\n", b'{"kind": "other"}'):
        (tmp_path / "other.gz").write_bytes(gzip.compress(content))
        with pytest.raises(UserError, match="line 1: no header of prosg predictions"):
            read(tmp_path / "other.gz")
    (tmp_path / "bytes.gz").write_bytes(gzip.compress(b"\xff\xfe"))
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "bytes.gz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "line 1: format 2"),
        ({"methods": "base"}, "line 1: the header's methods"),
        ({"rows": True}, "line 1: the header's rows"),
        ({"rows": 9}, "speaks of 9 rows, and there are 8"),
    ],
)
def test_a_changed_header(path, change, said):
    header, *rows = lines(path)
    rewrite(path, [header | change, *rows])
    with pytest.raises(UserError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"right": False}, "'right': it says False, but the token ids say True"),
        ({"right": 1}, "it says 1"),
        ({"predicted": [3]}, "'predicted': not as many"),
        ({"gold": []}, "'gold': a list of token ids"),
        ({"gold": [3, "4"]}, "'gold': a list of token ids"),
        ({"seed": "0"}, "'seed': a whole number"),
        ({"cell": [1]}, "'cell': an object of numbers"),
        ({"cell": {"length": "long"}}, "'cell': an object of numbers"),
        ({"task": ""}, "'task': empty"),
        ({"more": 1}, "'more': unknown column"),
    ],
)
def test_a_changed_row(path, change, said):
    """The message has the line and the column."""
    header, first, *rows = lines(path)
    rewrite(path, [header, first | change, *rows])
    with pytest.raises(UserError, match=rf"line 2.*{said}"):
        read(path)


def test_other_rows_than_there_should_be(path):
    """One left out, one twice, one without a column, one that is no JSON."""
    header, first, *rows = lines(path)
    for content, said in (
        ([header, *rows], "8 rows, and there are 7"),
        ([header, first, first, *rows[1:]], "line 3: the same item"),
        ([header, {k: v for k, v in first.items() if k != "item"}, *rows], "line 2, column 'item'"),
        ([header, "{", *rows], "line 2: not JSON"),
    ):
        rewrite(path, content)
        with pytest.raises(UserError, match=said):
            read(path)


def test_no_number_is_no_json(tmp_path):
    """What JSON has not is never written; the previous file stays."""
    bad = replace(FOUND[0], cell={"depth": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "a.jsonl.gz", HEADER, [bad])
    assert list(tmp_path.iterdir()) == []
