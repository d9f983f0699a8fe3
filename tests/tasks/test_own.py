"""A user's own file: what it may contain, and that every mistake is named by file, line and column."""

import json

import pytest

from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.dialogue import TEXT, Dialogues, Verdict, dialogue_batch, judge
from prosg_lib.tasks.own import read_items
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

PROBE = {"question": "Where do I live?", "answer": "Oslo, captain.", "value": "Oslo"}
GOOD = {
    "split": "test",
    "prompt": "User: I live in Oslo, by the sea. Call me captain.",
    "body": "It rained, and it rained; über alles.\nThen it stopped.",
    "probes": [PROBE],
    "instructions": {"address": "captain"},
}


def row(**changes) -> dict:
    return GOOD | changes


def probe(**changes) -> dict:
    return row(probes=[PROBE | changes])


def write(tmp_path, *rows):
    """A file of these rows; a row that is text is written unchanged."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def read(path, **options):
    return read_items(path, load_tokenizer(), **options)


# What can be read


def test_the_shipped_sample_reads_back():
    """Every row gives an item with the row's texts; a split can be chosen."""
    path, tokenizer = data_dir() / "dialogue_sample.jsonl", load_tokenizer()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for made, item in zip(rows, read(path), strict=True):
        assert item.prompt == made["prompt"] + "\n"
        assert tokenizer.decode(item.body) == made["body"]
        assert item.instructions == made["instructions"]
        assert [(p.question, p.answer, p.fact.value) for p in item.probes] == [
            (p["question"], p["answer"], p["value"]) for p in made["probes"]
        ]
        assert all(judge(p.answer, p.fact.value, item.instructions) == Verdict(True, 1.0) for p in item.probes)
    assert [len(read(path, split=s)) for s in ("train", "validation", "test")] == [40, 20, 20]


def test_own_items_make_a_batch(tmp_path):
    """They can be used like items of the data set; the body ends with a line, and all of it is text."""
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"test": own_sentences("test")[:20]}), "test", tokenizer)
    data = Dialogues(tokenizer, prose, "test", 0)
    items = read(write(tmp_path, GOOD, "", row(body="", prompt="One sentence"), row(prompt="Two lines.\nOf text. ")))
    assert tokenizer.decode(items[0].body) == GOOD["body"] + "\n"
    assert items[0].body_kind == (TEXT,) * len(items[0].body)
    assert dialogue_batch(data, items).rest.shape[0] == 3
    assert all(data.encode_prompt(item) == tokenizer.encode(item.prompt) for item in items)


def test_own_words(tmp_path):
    """Values of several words, and words of instructions that are not in the project's lists."""
    own = row(
        probes=[{"question": "Where?", "answer": "Arr, Oslo, Norway, matey.", "value": "Oslo, Norway"}],
        instructions={"opener": "Arr", "address": "matey"},
    )
    (item,) = read(write(tmp_path, own))
    assert judge("Arr, Oslo, Norway, matey.", item.probes[0].fact.value, item.instructions) == Verdict(True, 1.0)


def test_line_ends_and_marks_of_windows(tmp_path):
    """A byte order mark and CR LF change nothing; a line separator inside a text is text."""
    text = json.dumps(row(body="one\u2028two"), ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode())
    assert len(read(tmp_path / "mine.jsonl")) == 2


# What is refused

BAD = {
    "not JSON": ("{'split': 'test'}", r"not JSON at character 2"),
    "cut short": (json.dumps(GOOD)[:-5], r"not JSON at character \d+"),
    "not an object": ("[1, 2]", r"a row must be an object with the columns split, prompt, .* found \[1, 2\]"),
    "nested too deep": ("[" * 100_000, r"recursion"),
    "unknown column": (row(distance=12), r"and no others; found split, .*, distance"),
    "missing column": ({k: v for k, v in GOOD.items() if k != "body"}, r"a row must be an object with the columns"),
    "wrong split": (row(split="dev"), r"column 'split': unknown split 'dev'; write one of train, validation, test"),
    "split of a wrong type": (row(split=["test"]), r"column 'split': unknown split \['test'\]"),
    "empty prompt": (row(prompt="  "), r"column 'prompt': must be text, but is '  '"),
    "prompt of a wrong type": (row(prompt=7), r"column 'prompt': must be text, but is 7"),
    "body of a wrong type": (row(body=None), r"column 'body': must be text, but is None"),
    "half a character": (row(body="\ud800"), r"column 'body': has half of a surrogate pair"),
    "probes no list": (row(probes={}), r"column 'probes': must be a list of at least one question"),
    "no probe": (row(probes=[]), r"column 'probes': must be a list of at least one question"),
    "probe no object": (row(probes=["Where?"]), r"column 'probes\[0\]': a probe must be an object .* found 'Where\?'"),
    "unknown in a probe": (probe(anser="Oslo."), r"column 'probes\[0\]': a probe must be .* found question, .*anser"),
    "second probe": (row(probes=[PROBE, {"question": ""}]), r"column 'probes\[1\]': a probe must be an object"),
    "empty answer": (probe(answer=""), r"column 'probes\[0\]\.answer': must be text"),
    "value of a wrong type": (probe(value=True), r"column 'probes\[0\]\.value': must be text, but is True"),
    "answer in two lines": (probe(answer="Oslo,\ncaptain."), r"column 'probes\[0\]\.answer': has a line break"),
    "answer without its word": (probe(answer="Oslo."), r"column 'probes\[0\]\.answer': .*write 'Oslo, captain\.'"),
    "answer without its value": (probe(answer="Rome, captain."), r"column 'probes\[0\]\.answer': .*write 'Oslo, capt"),
    "value is an instruction": (
        probe(value="boss", answer="boss.") | {"instructions": {}},
        r"column 'probes\[0\]\.value': .*choose other words",
    ),
    "instructions no object": (row(instructions=[]), r"column 'instructions': must be an object"),
    "unknown instruction": (row(instructions={"tone": "kind"}), r"of address, closer, opener"),
    "empty instruction": (row(instructions={"address": ""}), r"column 'instructions\.address': must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_by_file_line_and_column(tmp_path, case):
    """Two good rows, then the bad one; also if only another split is wanted."""
    bad, message = BAD[case]
    path = write(tmp_path, GOOD, row(split="train"), bad)
    for options in ({}, {"split": "train"}):
        with pytest.raises(UserError, match=rf"^{path}, line 3: .*{message}"):
            read(path, **options)


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (None, None, r"mine\.jsonl cannot be read \(No such file.*check the path"),
        (b"\n\n", None, r"mine\.jsonl has no rows"),
        (b"{}\n\xff\n", None, r"mine\.jsonl is not UTF-8 text \(byte 3\)"),
        (json.dumps(GOOD).encode(), "train", r"no row of the split 'train', only of test"),
        (json.dumps(GOOD).encode(), "dev", r"unknown split 'dev'"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, split, message):
    if content is not None:
        (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "mine.jsonl", split=split)
