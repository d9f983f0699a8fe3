"""The tokenizer: any text survives, pieces equal the whole, and every value is one token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from prosg_lib import files
from prosg_lib.config.sizes import VOCAB
from prosg_lib.errors import UserError
from prosg_lib.tasks.wording import words
from prosg_lib.text.library_tokenizer import LibraryTokenizer, folder_tokenizer
from prosg_lib.text.tokenizer import TextPieces, Tokenizer, load_tokenizer
from prosg_lib.text.world_tokenizer import WorldTokenizer

ENGLISH = st.lists(
    st.sampled_from(
        ["Oslo", "is", " ", "  ", "\n", "\n\n", ".", ", ", "User:", "Bot:", "’s", "'s", "captain", "7", "é"]
    )
).map("".join)


@settings(deadline=None)
@given(st.text() | ENGLISH)
def test_any_text_survives_the_round_trip(text):
    """Whatever can be written in UTF-8 is decoded to what was encoded, and the ids are in range."""
    tokenizer = load_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tuple(tokenizer.encode_long(text)) == ids
    assert all(0 <= i < tokenizer.vocab for i in ids)


@settings(deadline=None)
@given(ENGLISH | st.text(), st.data())
def test_pieces_give_the_ids_of_the_whole(text, data):
    """Cut anywhere before a space or after a newline, nothing changes."""
    tokenizer = load_tokenizer()
    places = [i for i in range(1, len(text)) if text[i] == " " or text[i - 1] == "\n"]
    cuts = sorted(data.draw(st.sets(st.sampled_from(places)))) if places else []
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert tuple(i for piece in pieces for i in tokenizer.encode(piece)) == tokenizer.encode(text)


def test_no_token_spans_white_space():
    """What the promise about pieces rests on: white space only at a token's start, and one character of it."""
    tokenizer = load_tokenizer()
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab)]
    assert not [t for t in texts if any(c.isspace() for c in t[1:])]


def test_every_value_name_and_instruction_word_is_one_token():
    """So that recall of any value is one prediction, and none is easier for being shorter."""
    tokenizer, table = load_tokenizer(), words()
    all_words = [v for spec in table["slots"].values() for v in spec["values"]]
    all_words += [v for spec in table["instructions"].values() for v in spec["words"]] + table["others"]
    assert [w for w in all_words if len(tokenizer.encode(" " + w)) != 1] == []


def test_marks_are_tokens_of_their_own():
    """A value, the comma and the full stop after it, and the end of the line are one token each."""
    tokenizer = load_tokenizer()
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" Oslo, captain.\n")] == [
        " Oslo",
        ",",
        " captain",
        ".",
        "\n",
    ]


def test_training_is_repeatable():
    """The same texts in the same order give the same tokenizer, of the requested size."""
    texts = ["My home town is Oslo, over.\nMy pet is a parrot.", "Ünïcode – “quoted”"] * 20
    first, second = (Tokenizer.train(texts, 300) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.vocab == 300
    assert Tokenizer.from_json(first.to_json()).encode("Oslo, 東京") == first.encode("Oslo, 東京")


def test_shipped_tokenizer_has_the_size_that_models_expect():
    assert load_tokenizer().vocab == VOCAB


BYTES = [i for i in range(VOCAB) if "\ufffd" in load_tokenizer().decode([i])]  # tokens that are part of a character


@settings(deadline=None)
@given(st.lists(st.sampled_from(BYTES) | st.integers(0, VOCAB - 1), max_size=30))
def test_pieces_of_any_tokens_are_their_text(ids):
    """Together they equal `decode`, even for bytes that are not text; each piece is final and ends with a character;
    only a few tokens are kept."""
    tokenizer = load_tokenizer()
    pieces, text = TextPieces(tokenizer), ""
    for n, token in enumerate(ids, 1):
        text += pieces.push(token)
        whole = tokenizer.decode(ids[:n])
        assert text in (whole, whole.removesuffix("\ufffd"))
        assert len(pieces._ids) <= 4
    assert text + pieces.rest() == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_as_one_piece():
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("a東!")
    assert len(ids) == 5
    pieces = TextPieces(tokenizer)
    assert [pieces.push(token) for token in ids] == ["a", "", "", "東", "!"]
    pieces = TextPieces(tokenizer)
    assert [pieces.push(token) for token in ids[:3]] == ["a", "", ""]
    assert pieces.rest() == "\ufffd"


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        load_tokenizer(tmp_path / "nowhere.json")
    panics = json.loads(load_tokenizer().to_json())
    panics["model"]["continuing_subword_prefix"] = "much longer than a token"
    for content in ("{}", json.dumps(panics)):
        (tmp_path / "foreign.json").write_text(content)
        with pytest.raises(UserError, match=r"foreign\.json is not a tokenizer \("):
            load_tokenizer(tmp_path / "foreign.json")


def test_the_vocabulary_reaches_to_the_highest_id():
    """A model with fewer rows would be asked for one that it does not have."""
    bpe = json.loads(load_tokenizer().to_json())
    bpe["model"] |= {"vocab": {"a": 7, "b": 900}, "merges": []}
    assert Tokenizer.from_json(json.dumps(bpe)).vocab == 901


def test_half_a_character_is_refused():
    """Python's name for what a terminal or a JSON file may hold; no tokenizer takes it."""
    for tokenizer in (load_tokenizer(), WorldTokenizer({1: b"a"})):
        with pytest.raises(UserError, match=r"the text has half a character, '\\ud83d', at place 1"):
            tokenizer.encode("a\ud83d")


def slow(folder, merges=("a b</w>",), **settings):
    """A tokenizer that is Python, in a folder: a few letters and one merge."""
    folder.mkdir()
    files.write_json(folder / "vocab.json", {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "a@@": 4, "aa@@": 5})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CTRLTokenizer", **settings})
    return folder_tokenizer(folder)


def test_the_signature_of_a_tokenizer_without_a_file_of_its_own(tmp_path):
    """It does not depend on the folder or on saving again, but on merges, settings and classes. Tokenizers with a
    tokenizer.json are identified by that, as in every checkpoint's record."""
    first = slow(tmp_path / "first")
    assert isinstance(first, LibraryTokenizer)
    assert first.decode(first.encode("ab aab")) == "ab aab"
    first.save(tmp_path / "again")
    same = [slow(tmp_path / "second"), folder_tokenizer(tmp_path / "again")]
    assert {tokenizer.signature() for tokenizer in same} == {first.signature()}
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    others = [
        slow(tmp_path / "merged", ("a a",)),
        slow(tmp_path / "set", unk_token="a"),
        folder_tokenizer(tmp_path / "bytes"),
    ]
    assert len({tokenizer.signature() for tokenizer in [first, *others]}) == 4
    own, world = load_tokenizer(), WorldTokenizer({1: b"a"})
    assert (own.signature(), world.signature()) == (own.to_json(), world.to_json())
