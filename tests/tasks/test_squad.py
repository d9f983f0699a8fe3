"""SQuAD: which questions become pairs, how articles are split, and the errors for files that cannot be used."""

import copy
import json
import os
from pathlib import Path

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks.pairs import normalised
from prosg_lib.tasks.squad import squad
from prosg_lib.text.prose import SPLITS

DATA = os.environ.get("PROSG_TEST_DATA", "")


def article(i, paragraphs=2):
    """An article whose every paragraph names it."""
    contexts = [f"In town {i} the mill number {j} was built by the miller Bran{i}x{j}." for j in range(paragraphs)]
    questions = [
        {"question": f" Who built  mill {j} of town {i}? ", "id": f"{i}-{j}", "answers": [at(c, f"Bran{i}x{j}")]}
        for j, c in enumerate(contexts)
    ]
    return {
        "title": f"Town_{i}",
        "paragraphs": [{"context": c, "qas": [q]} for c, q in zip(contexts, questions, strict=True)],
    }


def at(context, text):
    return {"text": text, "answer_start": context.index(text)}


def write(path, articles):
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "squad.json", [article(i) for i in range(12)])


# Pairs


def test_a_question_becomes_a_pair(file):
    """Context, query and answer as drawn in the module's docstring, with single spaces between words."""
    pairs = {p.answer: p for split in SPLITS for p in squad(split, file)}
    pair = pairs["Bran3x1"]
    assert pair.context == "In town 3 the mill number 1 was built by the miller Bran3x1."
    assert pair.query == "Question: Who built mill 1 of town 3?\nAnswer:"
    assert pair.answers == ("Bran3x1",)


def towns_of(pairs):
    return [int(pair.context.split()[2]) for pair in pairs]


def test_articles_are_not_divided(file):
    """Every question is in one split, each split has one, and an article's questions are together, in their order."""
    towns = {split: towns_of(squad(split, file)) for split in SPLITS}
    assert sum(map(len, towns.values())) == 24
    assert len(set.union(*map(set, towns.values()))) == sum(len(set(t)) for t in towns.values()) == 12
    assert [len(set(towns[s])) for s in SPLITS] == [10, 1, 1]
    assert towns["train"] == sorted(towns["train"])


def test_the_split_depends_on_titles_alone(file):
    """Another order and other paragraphs leave each article in its split; the same title twice is one article."""
    before = set(towns_of(squad("test", file)))
    articles = [article(i, paragraphs=1) for i in reversed(range(12))]
    again = [article(i) for i in range(12)]
    assert set(towns_of(squad("test", write(file, articles + again)))) == before
    assert len(squad("test", file)) == 3


def test_every_gold_answer_is_kept(file):
    """The answers of all annotators are kept, without repetition; the first is the pair's."""
    articles = [article(i, paragraphs=1) for i in range(3)]
    for a in articles:
        paragraph = a["paragraphs"][0]
        texts = ["the miller Bran", "Bran", "the miller Bran"]
        paragraph["qas"][0]["answers"] = [at(paragraph["context"], text) for text in texts]
    (pair,) = squad("test", write(file, articles))
    assert pair.answer == "the miller Bran"
    assert pair.answers == ("the miller Bran", "Bran")


def test_questions_that_need_no_paragraph_are_left_out(file):
    """SQuAD 2.0's impossible ones, those that contain an answer, and those whose answer is an article."""
    articles = [article(i, paragraphs=1) for i in range(3)]
    for a in articles:
        paragraph = a["paragraphs"][0]
        context = paragraph["context"]
        paragraph["qas"] += [
            {"question": "Who burnt it?", "is_impossible": True, "answers": []},
            {"question": "Was it a Mill or a house?", "is_impossible": False, "answers": [at(context, "the mill")]},
            {"question": "Which word comes fourth?", "answers": [at(context, "the")]},
            {"question": "Was it milled?", "answers": [at(context, "mill")]},
        ]
    pairs = squad("test", write(file, articles))
    assert [p.query for p in pairs][1:] == ["Question: Was it milled?\nAnswer:"]
    assert len(pairs) == 2


def rows_of(articles):
    """As `datasets` has them."""
    questions = [(a["title"], p["context"], q) for a in articles for p in a["paragraphs"] for q in p["qas"]]
    return [
        {
            "id": q["id"],
            "title": title,
            "context": context,
            "question": q["question"],
            "answers": {key: [answer[key] for answer in q["answers"]] for key in ("text", "answer_start")},
        }
        for title, context, q in questions
    ]


@pytest.mark.parametrize("text", [json.dumps, lambda rows: "\n".join(map(json.dumps, rows))], ids=["list", "lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
def test_rows_are_read_as_the_nested_file(file, tmp_path, text, mark):
    """What the errors ask for: one row a question, as a list or one a line; no answer means impossible."""
    articles = [article(i) for i in range(12)]
    rows = rows_of(articles)
    rows.append(rows[0] | {"question": "Who burnt it?", "answers": {"text": [], "answer_start": []}})
    (tmp_path / "rows.json").write_bytes(mark + text(rows).encode())
    for split in SPLITS:
        assert squad(split, tmp_path / "rows.json") == squad(split, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "row 3: not in SQuAD's format"),
        ({"answers": {"text": ["Bran"]}}, "row 3: 'answer_start' is missing; .*, or as rows"),
        ({"answers": {"text": ["Bran"], "answer_start": [0]}}, "row 3: .*'Bran' does not stand at character 0"),
        ({"answers": {"text": ["Bran"], "answer_start": []}}, "row 3: not in SQuAD's format"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, message):
    rows = rows_of([article(i) for i in range(3)])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows[:2], rows[2] | change, *rows[3:]])))
    with pytest.raises(UserError, match=message):
        squad("train", tmp_path / "rows.jsonl")


@pytest.mark.skipif(not DATA, reason="PROSG_TEST_DATA is not set: no real questions")
def test_real_questions():
    """XQuAD: of 1,190 questions five contain their answer and are left out; every other answer is in its paragraph and
    not in its question, and no paragraph is in two splits."""
    path = Path(DATA) / "xquad" / "xquad.en.json"
    pairs = {split: squad(split, path) for split in SPLITS}
    assert {split: len(p) for split, p in pairs.items()} == {"train": 995, "validation": 87, "test": 103}
    contexts = [{p.context for p in part} for part in pairs.values()]
    assert len(set.union(*contexts)) == sum(map(len, contexts)) == 240
    for pair in (p for part in pairs.values() for p in part):
        assert pair.answer in pair.context
        assert f" {normalised(pair.answer)} " not in f" {normalised(pair.query)} "


def test_from_the_hub(monkeypatch):
    """The development set is the test split; a tenth of the training articles, whole, is the validation split."""
    import datasets

    def rows(numbers):
        found = []
        for i in numbers:
            for p in article(i)["paragraphs"]:
                answers = {"text": [p["qas"][0]["answers"][0]["text"]]}
                found.append({"title": f"Town_{i}", "context": p["context"], "question": "Who?", "answers": answers})
        return datasets.Dataset.from_list(found)

    data = {"rajpurkar/squad": {"train": rows(range(20)), "validation": rows(range(20, 23))}}
    monkeypatch.setattr(datasets, "load_dataset", data.__getitem__)
    towns = {split: set(towns_of(squad(split))) for split in SPLITS}
    assert towns["test"] == {20, 21, 22}
    assert len(towns["validation"]) == 2
    assert towns["train"] | towns["validation"] == set(range(20))
    assert not towns["train"] & towns["validation"]


# What is refused


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, r"squad\.json does not exist"),
        (lambda p: p.write_text('{"data":\n oops}'), r"squad\.json, line 2: not JSON"),
        (lambda p: p.write_bytes(b'{"data": "\xe9"}'), r"squad\.json is not UTF-8 text \(byte 10\)"),
        (lambda p: write(p, []), "has questions on 0 articles; three splits need at least 3"),
        (
            lambda p: write(p, [article(i) for i in range(2)]),
            "has questions on 2 articles; three splits need at least 3",
        ),
        (
            lambda p: write(p, [impossible(i) for i in range(3)]),
            "the train split of .* has no question that its paragraph",
        ),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, prepare, message):
    prepare(tmp_path / "squad.json")
    with pytest.raises(UserError, match=message):
        squad("train", tmp_path / "squad.json")


def impossible(i):
    found = article(i, paragraphs=1)
    found["paragraphs"][0]["qas"][0] |= {"is_impossible": True, "answers": []}
    return found


def test_an_unknown_split_is_named(file):
    with pytest.raises(UserError, match="unknown split 'dev'; there are train, validation, test"):
        squad("dev", file)


_Q = ("data", 3, "paragraphs", 1, "qas", 0)
_AT = r"squad\.json, data\[3\]\.paragraphs\[1\]\.qas\[0\]: "


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((), 5, r"squad\.json, data: not in SQuAD's format"),
        (("data",), "text", r"squad\.json, data\[0\]: not in SQuAD's format"),
        (("data", 3), None, r"squad\.json, data\[3\]: not in SQuAD's format"),
        (("data", 3, "title"), 5, r"squad\.json, data\[3\]\.paragraphs\[0\]\.qas\[0\]: not in SQuAD's format"),
        ((*_Q, "question"), "Who? \ud83d", rf"{_AT}not in SQuAD's format .*surrogates not allowed"),
        (_Q[:4], {"qas": [{"is_impossible": True}]}, rf"{_AT}'context' is missing; write it as"),
        ((*_Q, "answers"), [], rf"{_AT}.*no answer and not marked"),
        ((*_Q, "answers"), "Bran", rf"{_AT}not in SQuAD's format"),
        ((*_Q, "answers", 0), {"text": "Bran"}, rf"{_AT}'answer_start' is missing"),
        ((*_Q, "answers", 0, "text"), "Bren", rf"{_AT}.*'Bren' does not stand at character 52"),
        ((*_Q, "answers", 0, "answer_start"), "51", rf"{_AT}not in SQuAD's format"),
        ((*_Q, "answers", 0, "answer_start"), -9, rf"{_AT}.* at character -9 of the context"),
    ],
)
def test_a_malformed_record_is_named_by_its_place(file, place, value, message):
    """One error, with the path inside the JSON, for any split."""
    whole = {"root": copy.deepcopy(json.loads(file.read_text()))}
    record, keys = whole, ["root", *place]
    for key in keys[:-1]:
        record = record[key]
    record[keys[-1]] = value
    file.write_text(json.dumps(whole["root"]))
    for split in SPLITS:
        with pytest.raises(UserError, match=message):
            squad(split, file)
