"""What `data/` ships: made again it is the same, and what differs is found; the datasheet's numbers are the data's."""

import os
import re
import shutil
from functools import cache

import pytest

from prosg_lib.errors import UserError
from prosg_lib.files import read_json
from prosg_lib.paths import data_dir
from prosg_lib.tasks import build, dialogue
from prosg_lib.text.prose import SPLITS, own_sentences
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

SHIPPED = ("dialogue_words.json", "dialogue_asides.json", "tokenizer.json", "dialogue_sample.jsonl", "MANIFEST.json")
BOOKS = os.environ.get("PROSG_TEST_DATA", "")
books_here = pytest.mark.skipif(not BOOKS, reason="PROSG_TEST_DATA is not set: the tokenizer's books are not here")


make_sample = build._sample


@cache
def sample_of(bpe: str, version: int) -> str:
    """The sample, made once for each tokenizer and version of the drawing: it takes two seconds."""
    return make_sample(Tokenizer.from_json(bpe))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what is shipped, for `build` and `check` to work on, on a machine without the books."""
    monkeypatch.setattr(build, "_sample", lambda tokenizer: sample_of(tokenizer.to_json(), dialogue.VERSION))
    for name in SHIPPED:
        shutil.copy(data_dir() / name, tmp_path)
    monkeypatch.setattr(build, "data_dir", lambda: tmp_path)
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    return tmp_path


def some_books(folder):
    folder.mkdir(parents=True)
    for b in range(3):
        (folder / f"{b}.txt").write_text(f"Another book than those, number {b}, with a paragraph of some length.\n")


def test_without_the_books_the_rest_is_checked(copy, capsys):
    """The sample is made again, and it is said what was not and why."""
    assert build.check()
    said = capsys.readouterr().out
    assert "ok  dialogue_sample.jsonl: made again, the same" in said
    assert "--  tokenizer.json: not trained again, PROSG_TEST_DATA is not set" in said
    assert "NOT" not in said


@pytest.mark.parametrize("name", SHIPPED)
def test_a_changed_file_is_found(copy, capsys, name):
    """One more character anywhere, and the check fails and names the file."""
    path = copy / name
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert not build.check()
    assert f"NOT {name}" in capsys.readouterr().out


def test_a_changed_recipe_is_found(copy, capsys, monkeypatch):
    """Were items drawn otherwise, the sample would not be the one that is shipped."""
    monkeypatch.setattr(dialogue, "VERSION", dialogue.VERSION + 1)
    assert not build.check()
    said = capsys.readouterr().out
    assert "NOT dialogue_sample.jsonl: made again" in said
    assert "NOT MANIFEST.json: made again" in said


def test_other_books_are_not_compared(copy, capsys, monkeypatch):
    some_books(copy / "data" / "books")
    monkeypatch.setenv("PROSG_TEST_DATA", str(copy / "data"))
    assert build.check()
    assert "the books in PROSG_TEST_DATA are not those" in capsys.readouterr().out


def test_build_keeps_the_tokenizer_from_other_books(copy, monkeypatch):
    """Another tokenizer would make every checkpoint useless: without the right books nothing is written."""
    before = {name: (copy / name).read_bytes() for name in SHIPPED}
    with pytest.raises(UserError, match="set PROSG_TEST_DATA to a folder whose subfolder `books`"):
        build.build()
    some_books(copy / "data" / "books")
    monkeypatch.setenv("PROSG_TEST_DATA", str(copy / "data"))
    with pytest.raises(UserError, match=r"these are not the books of .*MANIFEST\.json"):
        build.build()
    assert before == {name: (copy / name).read_bytes() for name in SHIPPED}


def test_a_missing_file_is_named(copy):
    (copy / "dialogue_sample.jsonl").unlink()
    with pytest.raises(UserError, match=r"dialogue_sample\.jsonl is missing; restore it"):
        build.check()


@books_here
def test_build_gives_the_shipped_files(copy, monkeypatch):
    """From the books, byte for byte."""
    monkeypatch.setenv("PROSG_TEST_DATA", BOOKS)
    for name in SHIPPED[2:]:
        (copy / name).unlink()
    build.build()
    for name in SHIPPED[2:]:
        assert (copy / name).read_bytes() == (data_dir() / name).read_bytes(), name


# The datasheet


def facts() -> dict[str, str]:
    """The numbers that the datasheet states, computed."""
    table, manifest = dialogue.words(), read_json(data_dir() / "MANIFEST.json")
    slots, orders = table["slots"], table["instructions"]
    size = {s: len("".join(own_sentences(s))) for s in SPLITS}
    rows = {
        "slots": len(slots),
        "values a slot": {len(spec["values"]) for spec in slots.values()},
        "values in all": sum(len(spec["values"]) for spec in slots.values()),
        "values a slot by class (common, validation, test)": [
            len(dialogue.values_of("home", kind)) for kind in ("common", "validation", "test")
        ],
        "names of other people": len(table["others"]),
        "kinds of instruction": len(orders),
        "words an instruction": {len(spec["words"]) for spec in orders.values()},
        "sample dialogues": [build._SAMPLE[s] for s in SPLITS],
        "characters of own sentences": [size[s] for s in SPLITS],
        "characters of the books": [manifest["books"][s]["characters"] for s in SPLITS],
        "books": [len(manifest["books"][s]["files"]) for s in SPLITS],
        "tokens of the tokenizer": load_tokenizer().vocab,
    }
    for name, key in (("statement", "statements"), ("question", "questions")):
        rows[f"{name} frames"] = [len(table["frames"][key][s]) for s in SPLITS]
    rows["verbs a slot"] = [len(slots["home"]["verbs"]), 1, 1]
    rows["sentences an instruction"] = [len(orders["opener"][s]) for s in SPLITS]
    more = dialogue.asides()
    rows["more statement and question frames, for generators' training"] = [
        len(more["statements"]),
        len(more["questions"]),
    ]
    rows["asides before and after a sentence, for generators' training"] = [len(more["before"]), len(more["after"])]
    rows["more sentences an instruction, for generators' training"] = {len(v) for v in more["instructions"].values()}
    return {name: _written(value) for name, value in rows.items()}


def _written(value) -> str:
    if isinstance(value, list):
        return ", ".join(_written(v) for v in value)
    if isinstance(value, set):
        (value,) = value
    return f"{value:,}"


def test_the_datasheets_table_is_the_datas():
    text = (data_dir() / "DATASHEET.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| ([^|]+?) \| ([\d, ]+) \|$", text, re.MULTILINE))
    assert stated == facts()


def test_every_slot_and_order_has_the_counts_that_the_table_states():
    """The table gives one number for all."""
    table = dialogue.words()
    assert {len(spec["verbs"]) for spec in table["slots"].values()} == {2}
    assert all(spec["held_out_verbs"].keys() == {"validation", "test"} for spec in table["slots"].values())
    for split in SPLITS:
        assert len({len(spec[split]) for spec in table["instructions"].values()}) == 1


def test_the_datasheet_names_books_and_hashes():
    """Every book under its split, every file with its hash."""
    text = (data_dir() / "DATASHEET.md").read_text(encoding="utf-8")
    manifest = read_json(data_dir() / "MANIFEST.json")
    for split in SPLITS:
        (line,) = re.findall(rf"^- \*\*{split}\*\*: (.*)$", text, re.MULTILINE)
        assert re.findall(r"`([^`]+)`", line) == [
            name.removesuffix(".txt") for name in manifest["books"][split]["files"]
        ]
    for name, digest in manifest["sha256"].items():
        assert f"| `{name}` | `{digest}` |" in text
    assert f"`{manifest['data_hash']}`" in text
    assert f"`{manifest['data_hash_rich']}`" in text
