"""Predictions in a file: all comes back, and whatever was done to the file is named."""

import contextlib
import gzip
import json
import random
from dataclasses import replace

import pytest

from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation.predictions import Answers, Prediction, read, write

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

TALK = {k: v for k, v in HEADER.items() if k != "items"} | {"suite": "dialogue", "profile": "smoke", "split": "test"}
SAID = [
    Answers(
        method, distance, 6, 0, 1, {"closer": "over"}, ("Where?", "Who?"), ("Oslo", "Ä"), (" Oslo, over.", ""), 3, 2
    )
    for method in ("base", "none")
    for distance in (0, 64)
]


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "a.jsonl.gz", HEADER, FOUND)
    return tmp_path / "a.jsonl.gz"


@pytest.fixture
def talk(tmp_path):
    write(tmp_path / "talk.jsonl.gz", TALK, SAID)
    return tmp_path / "talk.jsonl.gz"


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


def test_answers_come_back(talk):
    """Texts as they were generated, empty ones too; nothing in a line says what they are worth."""
    header, found = read(talk)
    assert {name: header[name] for name in TALK} == TALK
    assert found == SAID
    first = lines(talk)[1]
    assert list(first)[:6] == ["method", "distance", "facts", "seed", "prompt", "instructions"]
    assert list(first)[6:] == ["questions", "gold", "predicted", "asked", "right", "training"]
    assert (first["gold"], first["predicted"], first["asked"]) == (["Oslo", "Ä"], [" Oslo, over.", ""], 3)


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
        ({"items": None}, "line 1: the header's items"),
        ({"methods": [1]}, "line 1: the header's methods are not names"),
        ({"suite": "riddles"}, "line 1: the suite 'riddles' is not known; there are forgetting, dialogue"),
        ({"suite": "dialogue"}, "line 1: the header's profile"),
        ({"suite": "dialogue", "profile": "", "split": ""}, "line 2, column 'task': unknown column"),
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recall": 1.0}, "'recall': unknown column"),
        ({"method": 1}, "'method': text was expected"),
        ({"distance": -1}, "'distance': a whole number was expected, 0 or more"),
        ({"facts": 0}, "'facts': a whole number was expected, 1 or more"),
        ({"seed": 0.5}, "'seed': a whole number was expected"),
        ({"prompt": True}, "'prompt': a whole number"),
        ({"training": -1}, "'training': a whole number was expected, 0 or more"),
        ({"right": 4}, "'right': more than the 3 that were asked"),
        ({"instructions": ["over"]}, "'instructions': an object was expected"),
        ({"instructions": {"tone": "kind"}}, "'instructions.tone': unknown kind"),
        ({"instructions": {"closer": 1}}, "'instructions.closer': text was expected"),
        ({"questions": []}, "'questions': a list of texts"),
        ({"gold": "Oslo"}, "'gold': a list of texts"),
        ({"gold": ["Oslo", ""]}, "'gold': empty"),
        ({"predicted": ["Oslo"]}, "'predicted': not as many texts"),
        ({"predicted": ["Oslo", 1]}, "'predicted': text was expected"),
    ],
)
def test_changed_answers(talk, change, said):
    """The message has the line and the column here, too."""
    header, first, second, *rows = lines(talk)
    rewrite(talk, [header, first, second | change, *rows])
    with pytest.raises(UserError, match=rf"line 3.*{said}"):
        read(talk)


def test_answers_of_the_older_format_are_those_of_one_training(talk, path):
    """Format 1 had no trainings, and its rows may have no such column; format 3 is refused; the other suite's rows are
    still as they were."""
    header, *rows = lines(talk)
    assert (header["version"], lines(path)[0]["version"]) == (2, 1)
    older = [{k: v for k, v in row.items() if k != "training"} for row in rows]
    rewrite(talk, [header | {"version": 1}, *older])
    assert read(talk)[1] == SAID
    for version, some, said in (
        (1, rows, "line 2, column 'training': unknown column"),
        (2, older, "line 2, column 'training': the column is missing"),
        (3, rows, "line 1: format 3, and 2 is known here; take a newer version"),
        (0, rows, "line 1: format 0"),
    ):
        rewrite(talk, [header | {"version": version}, *some])
        with pytest.raises(UserError, match=said):
            read(talk)


def test_a_prompt_is_asked_about_once(talk):
    """By the same method and training at the same distance; another training is another row."""
    header, first, second, *rows = lines(talk)
    rewrite(talk, [header, first, second | {"distance": first["distance"], "training": 1}, *rows])
    assert [row.training for row in read(talk)[1]] == [0, 1, 0, 0]
    rewrite(talk, [header, first, second | {"distance": first["distance"]}, *rows])
    with pytest.raises(UserError, match="line 3: the same item"):
        read(talk)


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
