"""Rows and texts: what is read equals what was written, or one UserError says what is wrong with the file."""

import gzip
import json
from pathlib import Path

import pytest
import rwkv
from fuzzing import changed, damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st

from prosg_lib import files
from prosg_lib.tasks.pair_batches import pair_batch
from prosg_lib.tasks.squad import squad
from prosg_lib.tasks.wikitext import copied, named, wikitext
from prosg_lib.text.prose import SPLITS, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.text.world_tokenizer import load_world_tokenizer

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\ufeff\x00"  # what Python or an editor takes for the end of a line
ANY_TEXT = st.text(st.characters(exclude_categories=[]) | st.sampled_from(BREAKS), max_size=30)  # half characters, too
ROWS = st.lists(st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers() | json_values(), max_size=4), max_size=4)


@fuzz(150)
@given(ROWS, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_rows_come_back(tmp_path_factory, rows, ascii_only, mark, zipped, newline):
    """Whatever their texts hold; with a byte order mark, Windows' ends of lines, or gzipped."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + newline for row in rows)
    content = mark + text.encode("utf-8", "backslashreplace")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert json.dumps(files.read_rows(path)) == json.dumps(rows)  # NaN is not equal to itself


@fuzz(120)
@given(ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()).flatmap(damaged) | st.binary(max_size=60))
def test_damaged_rows(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    for written in (content, gzip.compress(content)[: len(content)], gzip.compress(content)):
        path.write_bytes(written)
        tried(files.read_rows, path)
        tried(files.read_json, path)


def article(i):
    context = f"In town {i} the mill was built by the miller Bran{i}."
    answer = {"text": f"Bran{i}", "answer_start": context.index("Bran")}
    return {
        "title": f"Town {i}",
        "paragraphs": [{"context": context, "qas": [{"question": f"Who built mill {i}?", "answers": [answer]}]}],
    }


def row(i):
    paragraph = article(i)["paragraphs"][0]
    (answer,) = paragraph["qas"][0]["answers"]
    answers = {key: [value] for key, value in answer.items()}
    return {"title": f"Town {i}", "context": paragraph["context"], "question": "Who?", "answers": answers}


@pytest.mark.parametrize(
    "whole", [{"data": [article(i) for i in range(3)]}, [row(i) for i in range(3)]], ids=["nested", "rows"]
)
def test_squad(tmp_path_factory, whole):
    path = tmp_path_factory.getbasetemp() / "squad.json"

    @fuzz(150)
    @given(changed(whole, ANY_TEXT | json_values()), st.booleans())
    def check(value, as_lines):
        lines = as_lines and isinstance(value, list)
        path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value))
        for split in SPLITS:
            pairs = tried(squad, split, path)
            if pairs:
                pair_batch([[pair] for pair in pairs], load_tokenizer())
                assert all(pair.answer in pair.context for pair in pairs)

    check()


WORDS = ["St.", "A.", "Mr.", "Anna", "Town", "7", "1,5", "3 May", "was", "it", "(", ")", "@-@", ",", ".", "!", "<unk>"]
PASSAGE = st.lists(st.sampled_from([*WORDS, '"', "=", "\n", "\n\n"]) | ANY_TEXT, max_size=60).map(" ".join)


@fuzz(150)
@given(st.lists(PASSAGE.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40), max_size=4))
def test_texts(tmp_path_factory, texts):
    """Pairs and prose of a folder: whatever is asked for stands in the context, and only there."""
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text)
    for split in SPLITS:
        pairs = [pair for make in (wikitext, copied, named) for pair in tried(make, split, folder, 20) or ()]
        assert all(pair.answer in pair.context for pair in pairs)
        if pairs:
            pair_batch([[pair] for pair in pairs], load_tokenizer())
    prose = tried(load_prose, str(folder))
    assert prose is None or set(prose.paragraphs) == set(SPLITS)


@fuzz(200)
@given(ANY_TEXT)
def test_any_text_is_encoded_or_refused(text):
    for tokenizer in (load_tokenizer(), world()):
        ids = tried(tokenizer.encode, text)
        assert tokenizer.decode(ids) == text if ids is not None else any("\ud800" <= c <= "\udfff" for c in text)


def world():
    return load_world_tokenizer(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt")


SMALL = Tokenizer.train(["A small town."], 260)
VOCABULARY = "".join(f"{i} {bytes([i - 1])!r} 1\n" for i in range(1, 257)) + "257 'é' 2\n"


@fuzz(120)
@given(st.data())
def test_damaged_tokenizers(tmp_path_factory, data):
    """A tokenizer that is accepted encodes and decodes."""
    folder = tmp_path_factory.getbasetemp()
    own = json.loads(SMALL.to_json())
    content = (
        changed(own, ANY_TEXT | json_values()).map(json.dumps).map(str.encode)
        | damaged(SMALL.to_json().encode())
        | st.binary(max_size=40)
    )
    (folder / "tokenizer.json").write_bytes(data.draw(content))
    (folder / "vocab.txt").write_bytes(data.draw(damaged(VOCABULARY.encode()) | st.binary(max_size=40)))
    for read, name in ((Tokenizer.from_file, "tokenizer.json"), (load_world_tokenizer.__wrapped__, "vocab.txt")):
        tokenizer = tried(read, folder / name)
        if tokenizer is not None:
            ids = tried(tokenizer.encode, "A small town. é")
            assert all(0 <= i < tokenizer.vocab for i in ids or ())
            assert isinstance(tokenizer.decode(range(tokenizer.vocab)), str)
