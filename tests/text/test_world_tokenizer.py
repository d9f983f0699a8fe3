"""The World tokenizer: any text survives, the longest token wins, and malformed files are refused with their line."""

from pathlib import Path

import pytest
import rwkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.text.world_tokenizer import WorldTokenizer, load_world_tokenizer

PIECES = ["\n\n", " the", " them", "them", "ther", "theremin", "é", "東", "東京", "京都", "\U0001f600", "\x85"]
CUT = [b"\xe6\x9d", b"\x9f\x98\x80", b" \xe4"]  # parts of characters, of which the real vocabulary has many, too
TOKENS = dict(enumerate([bytes([b]) for b in range(256)] + [p.encode() for p in PIECES] + CUT, 1))

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nUser: What is 12345 x 67890?\tBot: 838102050.  \r\n",
    "Съешь ещё этих мягких французских булок, да выпей же чаю.",
    "人人生而自由,在尊严和权利上一律平等。すべての人間は、生まれながらにして自由であり、",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. כל בני האדם נולדו בני חורין",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # \U0001f600 \U0001f468‍\U0001f469‍\U0001f467 ‮ \x00\x7f",
]


def write(path, tokens):
    """In the format of the real file: text as a string, other bytes as bytes."""

    def literal(token):
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)

    path.write_text("".join(f"{i} {literal(t)} {len(t)}\n" for i, t in tokens.items()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_world_tokenizer(write(tmp_path_factory.mktemp("world") / "vocab.txt", TOKENS))


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from([*PIECES, "the", " ", "x", "東北"])).map("".join))
def test_any_text_survives_the_round_trip(tokenizer, text):
    """Decoding gives back any text that UTF-8 can write, and no longer token would match anywhere."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tuple(tokenizer.encode_long(text)) == ids
    data, start = text.encode(), 0
    for index in ids:
        assert TOKENS[index] == max((t for t in TOKENS.values() if data.startswith(t, start)), key=len)
        start += len(TOKENS[index])
    assert start == len(data)


def test_the_longest_match_is_not_the_first(tokenizer):
    """A token that extends a shorter one, and one that matches only half-way: `there` is `ther` and `e`."""

    def pieces(text):
        return [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)]

    assert pieces("theremin") == [b"theremin"]
    assert pieces("theremi") == [b"ther", b"e", b"m", b"i"]
    assert pieces(" theme") == [b" them", b"e"]
    assert pieces("東京東都") == ["東京".encode(), "東".encode(), b"\xe9", b"\x83", b"\xbd"]
    assert pieces("杨") == [b"\xe6\x9d", b"\xa8"]


def test_parts_of_characters(tokenizer):
    """Bytes are returned unchanged; as text they equal what the project's own tokenizer gives."""
    cut = [i for i, token in TOKENS.items() if token in CUT]
    assert tokenizer.decode_bytes(cut) == b"".join(CUT)
    own = load_tokenizer()
    assert len(own.encode("\U0001f600")) == 4
    for n in range(5):
        byte_by_byte = [1 + byte for byte in "\U0001f600".encode()[:n]]
        assert tokenizer.decode([1 + ord("a"), *byte_by_byte]) == "a" + own.decode(own.encode("\U0001f600")[:n])
    assert tokenizer.decode([1 + 0xFF, 1 + ord("b"), 1 + 0x80]) == "\ufffdb\ufffd"


def test_ids_without_a_token_add_nothing(tokenizer):
    """The end of a text, 0, and the embedding's spare rows."""
    (a,) = tokenizer.encode("a")
    assert tokenizer.decode([a, 0, tokenizer.vocab - 1, a]) == "aa"
    assert tokenizer.ends == (0,)


def test_size_of_the_vocabulary(tokenizer):
    assert tokenizer.vocab == 320
    assert WorldTokenizer({i: bytes([i]) for i in range(1, 64)}).vocab == 64
    assert WorldTokenizer({i: bytes([i]) for i in range(1, 65)}).vocab == 128


def test_json_round_trip(tokenizer):
    again = WorldTokenizer.from_json(tokenizer.to_json())
    assert again.vocab == tokenizer.vocab
    assert again.to_json() == tokenizer.to_json()
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


def test_a_byte_without_a_token_is_named():
    few = WorldTokenizer({1: b"a", 2: b"bc"})
    assert few.encode("abca") == (1, 2, 1)
    with pytest.raises(UserError, match=r"covers byte 0x63 \(byte 1 of the text\)"):
        few.encode("acb")
    with pytest.raises(UserError, match=r"covers byte 0x62 \(byte 2 of the text\)"):
        few.encode("aab")  # begins a token, but does not end one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", r"not `index 'token' length`"),
        ("3 'c'", r"not `index 'token' length`"),
        ("three 'c' 1", r"not `index 'token' length`"),
        ("-3 'c' 1", r"not `index 'token' length`"),
        ("1" * 5000 + " 'c' 1", r"not `index 'token' length`"),
        ("3 'c 1", '"\'c" is not a Python string'),
        ("3 c 1", "'c' is not a Python string"),
        ("3 open('x') 1", r"open\('x'\)\" is not a Python string"),
        ("3 ['c'] 1", "not an index above 0 with a string or bytes"),
        ("3 '' 0", "bytes that are not empty"),
        ("0 'c' 1", "not an index above 0"),
        (r"3 '\ud800' 3", "surrogates not allowed"),
        ("3 'é' 1", "the token has 2 bytes, not 1"),
        (r"3 b'\xc3' 2", "the token has 1 bytes, not 2"),
        ("2 'c' 1", "index 2 is repeated"),
        ("3 'a' 1", "the token of index 1 is repeated"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "vocab.txt"
    path.write_text(f"1 'a' 1\n2 'b' 1\n{line}\n4 'd' 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"vocab\.txt, line 3: .*{message}"):
        load_world_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", r"mine\.txt, line 1"), (b"1 'a' 1\n\xff\xfe", r"not UTF-8 text \(byte 8\)")],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_world_tokenizer(tmp_path / "mine.txt")


def test_lines_may_end_as_on_windows(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"1 'a' 1\r\n2 '\\r\\n' 2\r\n")
    assert load_world_tokenizer(tmp_path / "vocab.txt").encode("a\r\n") == (1, 2)


def test_the_real_vocabulary_as_the_authors_package_reads_it(tmp_path):
    """Ids of texts in several scripts. Theirs takes seconds and 300 MB for the whole file, so it gets only the lines
    whose tokens occur in the texts: a greedy match can use no others."""
    folder = Path(rwkv.__file__).parent
    ours = load_world_tokenizer(folder / "rwkv_vocab_v20230424.txt")
    assert ours.vocab == 65536
    everything = "\0".join(TEXTS).encode()
    tokens = {i: ours.decode_bytes([i]) for i in range(1, 65530)}
    assert len(set(tokens.values())) == 65529
    theirs = TRIE_TOKENIZER(write(tmp_path / "few.txt", {i: t for i, t in tokens.items() if t in everything}))
    for text in TEXTS:
        ids = ours.encode_long(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text
    assert max(len(ours.decode([i])) for i in ours.encode_long(TEXTS[0])) >= 5
