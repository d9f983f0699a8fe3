"""The tokenizer of RWKV's World models, from the vocabulary file that comes with them (rwkv_vocab_v20230424.txt).

One line per token: its index, the token as a Python string or bytes literal, and its length in bytes. A text is encoded
by greedy longest match on its bytes. Index 0 is not in the file: it ends a text and is never part of one.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from prosg_lib import files
from prosg_lib.errors import UserError, reason
from prosg_lib.text.tokenizer import utf8

_END = -1  # key of a trie node, besides the bytes that continue: the index of the token that ends here


class WorldTokenizer:
    """Text <-> token ids, with the interface of `tokenizer.Tokenizer`. Any UTF-8 text survives the round trip.

    Args:
        tokens: index -> the token's bytes.
    """

    kind = "world"
    ends = (0,)
    starts = ()

    def __init__(self, tokens: Mapping[int, bytes]):
        self._tokens = dict(tokens)
        self._trie: dict = {}
        for index, token in self._tokens.items():
            node = self._trie
            for byte in token:
                node = node.setdefault(byte, {})
            node[_END] = index
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode_long(text))

    def encode_long(self, text: str) -> list[int]:
        """Like `encode`, but without a cache; for long texts.

        Raises:
            UserError: half a character is in the text; or no token matches at some byte of the text; the full
                vocabulary has a token for every byte.
        """
        data, ids, start = utf8(text), [], 0
        while start < len(data):
            index, end = self._longest(data, start)
            if index is None:
                raise UserError(
                    f"no token of this vocabulary covers byte {data[start]:#04x} (byte {start} of the text); use one "
                    "with all 256 bytes"
                )
            ids.append(index)
            start = end
        return ids

    def _longest(self, data: bytes, start: int) -> tuple[int | None, int]:
        """The longest token at `start`, and where it ends."""
        node, found = self._trie, (None, start)
        for place in range(start, len(data)):
            node = node.get(data[place])
            if node is None:
                break
            if _END in node:
                found = node[_END], place + 1
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with replacement characters for bytes that are not UTF-8, such as half a character."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text's bytes. An id without a token (0, and unused rows of the embedding) adds nothing."""
        return b"".join(self._tokens.get(index, b"") for index in ids)

    @property
    def vocab(self) -> int:
        """Rows of the embedding: the highest index plus one, rounded up to a multiple of 64."""
        return -(-(max(self._tokens) + 1) // 64) * 64

    def to_json(self) -> str:
        return json.dumps({index: token.decode("latin-1") for index, token in self._tokens.items()})

    signature = to_json  # identifies it in a record

    @classmethod
    def from_json(cls, text: str, where: object = "the text") -> WorldTokenizer:
        """Raises a UserError that names `where` if it is not a tokenizer."""
        try:
            return cls({int(index): token.encode("latin-1") for index, token in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} is not a World tokenizer ({reason(error)}); copy the file again") from error


@lru_cache(maxsize=4)
def load_world_tokenizer(path: str | Path) -> WorldTokenizer:
    """The tokenizer of a vocabulary file.

    Raises:
        UserError: the file is missing or is not text, or a line is not `index 'token' length` (of the token in bytes),
            or repeats an index or a token; names the line.
    """
    lines = files.read_text(path).removesuffix("\n").split("\n")
    tokens: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            index, token = _token(line)
            if index in tokens:
                raise ValueError(f"index {index} is repeated")
            if token in seen:
                raise ValueError(f"the token of index {seen[token]} is repeated")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; copy the file again") from error
        tokens[index], seen[token] = token, index
    return WorldTokenizer(tokens)


def _token(line: str) -> tuple[int, bytes]:
    """A line's index and token."""
    index, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not (index.isdecimal() and length.isdecimal() and literal and max(len(index), len(length)) < 10):
        raise ValueError("not `index 'token' length`")
    try:
        token = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{literal[:40]!r} is not a Python string or bytes literal") from None
    token = token.encode() if isinstance(token, str) else token
    if not isinstance(token, bytes) or not token or int(index) == 0:
        raise ValueError("not an index above 0 with a string or bytes that are not empty")
    if len(token) != int(length):
        raise ValueError(f"the token has {len(token)} bytes, not {length}")
    return int(index), token
