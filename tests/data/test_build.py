"""What `data/` ships: made again it is the same, and differences are found; the datasheet's numbers are the data's."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest

from prosg_lib.errors import UserError
from prosg_lib.files import read_json
from prosg_lib.paths import data_dir
from prosg_lib.tasks import dialogue, wording
from prosg_lib.text.prose import SPLITS, own_sentences
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

SCRIPT = data_dir() / "build.py"
spec = importlib.util.spec_from_file_location("data_build", SCRIPT)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

SHIPPED = (*build.WORDS, build.TOKENIZER, build.SAMPLE, build.MANIFEST)
BOOKS = os.environ.get("PROSG_TEST_DATA", "")

make_sample = build.sample


@cache
def sample_of(bpe: str, version: int) -> str:
    """The sample, made once for each tokenizer and version: it takes two seconds."""
    return make_sample(Tokenizer.from_json(bpe))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what is shipped, for `build` and `check` to work on, on a machine without the books."""
    monkeypatch.setattr(build, "sample", lambda tokenizer: sample_of(tokenizer.to_json(), dialogue.VERSION))
    for name in SHIPPED:
        shutil.copy(data_dir() / name, tmp_path)
    for name in build.TRAINED:
        (tmp_path / name).symlink_to(data_dir() / name)
    monkeypatch.setattr(build, "data_dir", lambda: tmp_path)
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    return tmp_path


def other_books(folder, monkeypatch):
    (folder / "data" / "books").mkdir(parents=True)
    for b in range(3):
        (folder / "data" / "books" / f"{b}.txt").write_text(f"A different book, number {b}, with one long paragraph.\n")
    monkeypatch.setenv("PROSG_TEST_DATA", str(folder / "data"))


def test_the_shipped_files_pass():
    """As a reader runs it, without the books: everything that can be made again is the same."""
    environment = {name: value for name, value in os.environ.items() if name != "PROSG_TEST_DATA"}
    done = subprocess.run([sys.executable, SCRIPT, "check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok  dialogue_sample.jsonl: made again, the same" in done.stdout
    assert "--  tokenizer.json: not trained again, PROSG_TEST_DATA is not set" in done.stdout
    assert "NOT" not in done.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_a_changed_file_is_found(copy, capsys, name):
    """One more character anywhere, and the check fails and names the file."""
    path = copy / name
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert not build.check()
    assert f"NOT {name}" in capsys.readouterr().out


def test_a_changed_version_is_found(copy, capsys, monkeypatch):
    """If items were drawn differently, the sample would not be the shipped one."""
    monkeypatch.setattr(dialogue, "VERSION", dialogue.VERSION + 1)
    assert not build.check()
    printed = capsys.readouterr().out
    assert "NOT dialogue_sample.jsonl: made again" in printed
    assert "NOT MANIFEST.json: made again" in printed


def test_other_books_are_not_compared(copy, capsys, monkeypatch):
    other_books(copy, monkeypatch)
    assert build.check()
    assert "the books in PROSG_TEST_DATA are not those" in capsys.readouterr().out


def test_only_the_right_books_give_a_tokenizer(copy, monkeypatch):
    """Another tokenizer would make every checkpoint useless: without the right books nothing is written."""
    before = {name: (copy / name).read_bytes() for name in SHIPPED}
    with pytest.raises(UserError, match="set PROSG_TEST_DATA to a folder whose subfolder `books`"):
        build.build()
    other_books(copy, monkeypatch)
    with pytest.raises(UserError, match=r"these are not the books of .*MANIFEST\.json"):
        build.build()
    assert before == {name: (copy / name).read_bytes() for name in SHIPPED}


def test_a_missing_file_is_named(copy, capsys):
    (copy / "dialogue_sample.jsonl").unlink()
    assert build.main(["check"]) == 2
    assert re.search(r"dialogue_sample\.jsonl does not exist", capsys.readouterr().err)


@pytest.mark.skipif(not BOOKS, reason="PROSG_TEST_DATA is not set: the tokenizer's books are missing")
def test_build_gives_the_shipped_files(copy, monkeypatch):
    """From the books, byte for byte."""
    monkeypatch.setenv("PROSG_TEST_DATA", BOOKS)
    made = SHIPPED[len(build.WORDS) :]
    for name in made:
        (copy / name).unlink()
    build.build()
    for name in made:
        assert (copy / name).read_bytes() == (data_dir() / name).read_bytes(), name


# The datasheet


def facts() -> dict[str, str]:
    """The numbers in the datasheet's table, computed."""
    table, manifest, more = wording.words(), read_json(data_dir() / "MANIFEST.json"), wording.asides()
    slots, instructions = table["slots"], table["instructions"]
    books = [manifest["books"][s] for s in SPLITS]
    rows = {
        "slots": len(slots),
        "values a slot": {len(spec["values"]) for spec in slots.values()},
        "values in all": sum(len(spec["values"]) for spec in slots.values()),
        "values a slot by class (common, validation, test)": [
            len(wording.values_of("home", kind)) for kind in ("common", "validation", "test")
        ],
        "names of other people": len(table["others"]),
        "kinds of instruction": len(instructions),
        "words an instruction": {len(spec["words"]) for spec in instructions.values()},
        "sample dialogues": [build.SAMPLE_COUNTS[s] for s in SPLITS],
        "characters of own sentences": [len("".join(own_sentences(s))) for s in SPLITS],
        "characters of the books": [book["characters"] for book in books],
        "books": [len(book["files"]) for book in books],
        "tokens of the tokenizer": load_tokenizer().vocab,
        "statement frames": [len(table["frames"]["statements"][s]) for s in SPLITS],
        "question frames": [len(table["frames"]["questions"][s]) for s in SPLITS],
        "verbs a slot": [len(slots["home"]["verbs"]), 1, 1],
        "sentences an instruction": [len(instructions["opener"][s]) for s in SPLITS],
        "more statement and question frames, for generators' training": [
            len(more["statements"]),
            len(more["questions"]),
        ],
        "asides before and after a sentence, for generators' training": [len(more["before"]), len(more["after"])],
        "more sentences an instruction, for generators' training": {len(v) for v in more["instructions"].values()},
    }
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


def test_every_slot_and_instruction_has_the_counts_in_the_table():
    """The table gives one number for all of them."""
    table = wording.words()
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
        titles = [name.removesuffix(".txt") for name in manifest["books"][split]["files"]]
        assert re.findall(r"`([^`]+)`", line) == titles
    for name, digest in manifest["sha256"].items():
        assert f"| `{name}` | `{digest}` |" in text
    assert f"`{manifest['data_hash']}`" in text
    assert f"`{manifest['data_hash_rich']}`" in text
