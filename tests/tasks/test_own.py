"""A user's own file: what it may hold, and that every mistake is named by file, line and column."""

import csv
import io
import json

import pytest

from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.dialogue import TEXT, Dialogues, Verdict, dialogue_batch, judge
from prosg_lib.tasks.own import COLUMNS, read_items
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

GOOD = {
    "split": "test",
    "prompt": "User: I live in Oslo, by the sea. Call me captain.",
    "body": "It rained, and it rained; über alles.\nThen it stopped.",
    "probes": [{"question": "Where do I live?", "answer": "Oslo, captain.", "value": "Oslo"}],
    "instructions": {"address": "captain"},
}


def row(**changes) -> dict:
    return GOOD | changes


def probe(**changes) -> dict:
    return row(probes=[GOOD["probes"][0] | changes])


def without(name: str, source: dict = GOOD) -> dict:
    return {k: v for k, v in source.items() if k != name}


def write(tmp_path, *rows, name="mine.jsonl"):
    """A file of these rows; a row that is text is written as it is."""
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def read(path, **options):
    return read_items(path, load_tokenizer(), **options)


# What can be read


def test_the_shipped_sample_reads_back():
    """Every row gives an item that says what the row says."""
    path, tokenizer = data_dir() / "dialogue_sample.jsonl", load_tokenizer()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = read(path)
    for made, item in zip(rows, items, strict=True):
        assert item.prompt == made["prompt"] + "\n"
        assert tokenizer.decode(item.body) == made["body"]
        assert item.instructions == made["instructions"]
        assert [(p.question, p.answer, p.fact.value) for p in item.probes] == [
            (p["question"], p["answer"], p["value"]) for p in made["probes"]
        ]
        assert all(judge(p.answer, p.fact.value, item.instructions) == Verdict(True, 1.0) for p in item.probes)


def test_one_split_of_a_file():
    path = data_dir() / "dialogue_sample.jsonl"
    assert [len(read(path, split=s)) for s in ("train", "validation", "test")] == [40, 20, 20]


def test_a_row_becomes_an_item(tmp_path):
    """The body ends with a line; all of it is text; a slot is kept where there is one."""
    (item, named) = read(write(tmp_path, GOOD, "", probe(slot="home")))
    tokenizer = load_tokenizer()
    assert item.prompt == GOOD["prompt"] + "\n"
    assert tokenizer.decode(item.body) == GOOD["body"] + "\n"
    assert item.body_kind == (TEXT,) * len(item.body)
    assert (item.facts[0].slot, named.facts[0].slot, named.facts[0].value) == ("", "home", "Oslo")


def test_items_of_ones_own_make_a_batch(tmp_path):
    """They go where items of the data set go."""
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"test": own_sentences("test")[:20]}), "test", tokenizer)
    data = Dialogues(tokenizer, prose, "test", 0)
    items = read(write(tmp_path, GOOD, row(body="", prompt="One sentence"), row(prompt="Two lines.\nOf text. ")))
    batch = dialogue_batch(data, items)
    assert batch.rest.shape[0] == 3
    assert all(data.encode_prompt(item) == tokenizer.encode(item.prompt) for item in items)


def test_words_of_ones_own(tmp_path):
    """Values of several words, and words of instruction that the project does not know."""
    own = row(
        probes=[{"question": "Where?", "answer": "Arr, Oslo, Norway, matey.", "value": "Oslo, Norway"}],
        instructions={"opener": "Arr", "address": "matey"},
    )
    (item,) = read(write(tmp_path, own))
    assert judge("Arr, Oslo, Norway, matey.", item.probes[0].fact.value, item.instructions) == Verdict(True, 1.0)


def test_marks_and_line_ends_of_windows(tmp_path):
    """A byte order mark and CR LF change nothing; a line separator inside a text is text."""
    text = json.dumps(row(body="one\u2028two"), ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode())
    assert len(read(tmp_path / "mine.jsonl")) == 2


def as_csv(*rows, header=COLUMNS) -> str:
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(header)
    for r in rows:
        table.writerow([r[c] if isinstance(r[c], str) else json.dumps(r[c]) for c in header])
    return out.getvalue()


def test_csv_gives_the_same_items(tmp_path):
    """Columns in any order, cells with line breaks, bodies longer than csv's own limit."""
    rows = [GOOD, row(body="A long line.\n" * 12_000)]
    (tmp_path / "mine.csv").write_text(as_csv(*rows, header=COLUMNS[::-1]), encoding="utf-8", newline="")
    assert read(tmp_path / "mine.csv") == read(write(tmp_path, *rows))


# What cannot, and what is said

BAD = {
    "not JSON": ("{'split': 'test'}", None, r"not JSON at character 2"),
    "cut short": (json.dumps(GOOD)[:-5], None, r"not JSON at character \d+"),
    "not an object": ("[1, 2]", None, r"a JSON object was expected, not a list"),
    "nested too deep": ("[" * 100_000, None, r"not JSON .*nested too deep"),
    "unknown column": (row(distance=12), "distance", r"unknown column; remove or rename"),
    "missing column": (without("body"), "body", r"the column is missing; every row has split, prompt"),
    "wrong split": (row(split="dev"), "split", r"unknown split 'dev'; write one of train, validation, test"),
    "split of a wrong type": (row(split=["test"]), "split", r"unknown split \['test'\]"),
    "empty prompt": (row(prompt="  "), "prompt", r"empty; write some text"),
    "prompt of a wrong type": (row(prompt=7), "prompt", r"text was expected, not a number"),
    "body of a wrong type": (row(body=None), "body", r"text was expected, not null"),
    "half a character": (row(body="\ud800"), "body", r"half of a surrogate pair"),
    "probes no list": (row(probes={}), "probes", r"a list of one question or more"),
    "no probe": (row(probes=[]), "probes", r"a list of one question or more"),
    "probe no object": (row(probes=["Where?"]), "probes[0]", r"an object was expected, not text"),
    "probe without value": (row(probes=[without("value", GOOD["probes"][0])]), "probes[0].value", r"missing"),
    "unknown in a probe": (probe(anser="Oslo."), "probes[0].anser", r"unknown column; a probe has question"),
    "empty answer": (probe(answer=""), "probes[0].answer", r"empty"),
    "second probe": (row(probes=[GOOD["probes"][0], {"question": ""}]), "probes[1].answer", r"missing"),
    "value of a wrong type": (probe(value=True), "probes[0].value", r"text was expected, not true or false"),
    "answer in two lines": (probe(answer="Oslo,\ncaptain."), "probes[0].answer", r"line break"),
    "answer without its word": (probe(answer="Oslo."), "probes[0].answer", r"write 'Oslo, captain\.'"),
    "answer without its value": (probe(answer="Rome, captain."), "probes[0].answer", r"write 'Oslo, captain\.'"),
    "value is an order": (
        probe(value="boss", answer="boss.") | {"instructions": {}},
        "probes[0].value",
        r"choose other words",
    ),
    "instructions no object": (row(instructions=[]), "instructions", r"an object was expected, not a list; write \{\}"),
    "unknown instruction": (row(instructions={"tone": "kind"}), "instructions.tone", r"address, closer, opener"),
    "empty instruction": (row(instructions={"address": ""}), "instructions.address", r"empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_by_file_line_and_column(tmp_path, case):
    """Two good rows, then the bad one."""
    bad, column, message = BAD[case]
    with pytest.raises(UserError, match=message) as caught:
        read(write(tmp_path, GOOD, GOOD, bad))
    where = f"{tmp_path / 'mine.jsonl'}, line 3" + (f", column {column!r}: " if column else ": ")
    assert str(caught.value).startswith(where)


def test_rows_of_other_splits_are_checked_too(tmp_path):
    with pytest.raises(UserError, match=r"line 2, column 'prompt'"):
        read(write(tmp_path, GOOD, row(split="train", prompt="")), split="test")


CSV_BAD = {
    "unknown column": (as_csv().replace("body", "corpus"), 1, "corpus", r"unknown column"),
    "column twice": (as_csv().replace("body", "prompt"), 1, "prompt", r"twice"),
    "missing column": (as_csv(header=COLUMNS[:4]), 1, "instructions", r"the column is missing"),
    "too few cells": (as_csv(GOOD) + "test,prompt\r\n", 4, None, r"2 cells under 5 columns"),
    "probes no JSON": (as_csv(GOOD, row(probes="Oslo")), 4, "probes", r"not JSON"),
    "wrong split": (as_csv(GOOD, row(split="dev")), 4, "split", r"unknown split 'dev'"),
    "stray quote": (as_csv(GOOD) + 'test,"a"b,c,[],{}\r\n', 4, None, r"not CSV"),
}


@pytest.mark.parametrize("case", CSV_BAD)
def test_a_mistake_in_csv_is_named(tmp_path, case):
    """The line is where the row starts; a row before it spans two lines."""
    text, line, column, message = CSV_BAD[case]
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    where = f"{path}, line {line}" + (f", column {column!r}: " if column else ": ")
    assert str(caught.value).startswith(where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone\.jsonl does not exist"),
        ("mine.xlsx", b"", r"mine\.xlsx is neither \.jsonl nor \.csv"),
        ("mine.jsonl", b"\n\n", r"mine\.jsonl has no rows"),
        ("mine.csv", b"", r"mine\.csv, line 1, column 'split': the column is missing"),
        ("mine.jsonl", b"{}\n\xff\n", r"mine\.jsonl, line 2: not UTF-8 text \(byte 3"),
    ],
)
def test_a_file_that_will_not_do(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "mine.jsonl").mkdir()
    with pytest.raises(UserError, match=r"mine\.jsonl cannot be read"):
        read(tmp_path / "mine.jsonl")


def test_a_split_that_is_not_there(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"no row of the split 'train', only of test"):
        read(path, split="train")
    with pytest.raises(UserError, match=r"unknown split 'dev'"):
        read(path, split="dev")
