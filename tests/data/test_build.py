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
from prosg_lib.tasks import dialogue, open_world, wording
from prosg_lib.text.prose import SPLITS, own_sentences
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

SCRIPT = data_dir() / "build.py"
spec = importlib.util.spec_from_file_location("data_build", SCRIPT)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

SHIPPED = (*build.WORDS, *build.MADE, build.MANIFEST)
BOOKS = os.environ.get("PROSG_TEST_DATA", "")

MAKE = {name: getattr(build, name) for name in ("sample", "open_values", "open_sample")}


@cache
def made_of(name: str, bpe: str, versions: tuple[int, int]) -> str:
    """A file, made once for each tokenizer and versions: it takes seconds."""
    return MAKE[name](Tokenizer.from_json(bpe))


def made_once(name: str):
    return lambda tokenizer: made_of(name, tokenizer.to_json(), (dialogue.VERSION, open_world.VERSION))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what is shipped, for `build` and `check` to work on, on a machine without the books."""
    for name in MAKE:
        monkeypatch.setattr(build, name, made_once(name))
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
    for name in ("dialogue_sample.jsonl", "open_values.json", "open_sample.jsonl"):
        assert f"ok  {name}: made again, the same" in done.stdout
    assert "--  tokenizer.json: not trained again, PROSG_TEST_DATA is not set" in done.stdout
    assert "NOT" not in done.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_a_changed_file_is_found(copy, capsys, name):
    """One more character anywhere, and the check fails and names the file."""
    path = copy / name
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert not build.check()
    assert f"NOT {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("drawing", "name"), [(dialogue, build.SAMPLE), (open_world, build.OPEN_SAMPLE)])
def test_a_changed_version_is_found(copy, capsys, monkeypatch, drawing, name):
    """If items were drawn differently, the sample would not be the shipped one."""
    monkeypatch.setattr(drawing, "VERSION", drawing.VERSION + 1)
    assert not build.check()
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT")]
    assert wrong == [
        f"NOT {name}: made again, the same",
        "NOT MANIFEST.json: made again, the same (except for the books)",
    ]


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


def tables() -> list[dict[str, str]]:
    """Those of the datasheet that have numbers: what -> number."""
    text = (data_dir() / "DATASHEET.md").read_text(encoding="utf-8")
    return [
        dict(re.findall(r"^\| ([^|]+?) \| ([\d, ]+) \|$", table, re.MULTILINE))
        for table in text.split("| what | number |\n")[1:]
    ]


def test_the_datasheets_tables_are_the_datas(capsys):
    """That of the dialogues, and that of the open world as the command in the datasheet prints it."""
    dialogues, opened = tables()
    assert dialogues == facts()
    assert build.main(["counts"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [f"| {what} | {number} |" for what, number in opened.items()] == printed


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
    assert f"`{manifest['open_data_hash']}`" in text


def test_word_parts_are_not_in_the_hash_of_the_open_world(monkeypatch):
    """Values are, so that a checkpoint fits until an item changes."""
    words, tokenizer = open_world.wording.words(), load_tokenizer()
    before = open_world.data_hash(tokenizer)
    monkeypatch.setattr(open_world.wording, "words", lambda: words | {"parts": {}})
    assert open_world.data_hash(tokenizer) == before
    monkeypatch.setattr(open_world.wording, "words", lambda: words | {"cues": {}})
    assert open_world.data_hash(tokenizer) != before


def test_values_are_divided_by_their_hash():
    """Whatever its case."""
    for by_split in open_world.wording.values().values():
        for split in SPLITS:
            assert {build.split_of(v) for v in by_split[split]} == {split}
    assert {build.split_of(text) for text in ("Fadin", "fadin", "FADIN")} == {build.split_of("Fadin")}
