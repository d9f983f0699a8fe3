"""Text <-> token ids: byte-level BPE, trained on prose and dialogues."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

from prosg_lib import files
from prosg_lib.errors import UserError, reason
from prosg_lib.paths import data_dir
from prosg_lib.text.chat_template import ChatTemplate

AS_IT_IS = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Settings in a folder's tokenizer_config.json with which `transformers` adds nothing to its tokenizer.json."""


class Tokenizer:
    """Text <-> token ids, by any tokenizer.json. With the project's own, any UTF-8 text survives the round trip.

    The project's own may also encode a text in pieces, cut before a space or after a newline: the pieces' ids are those
    of the whole, because a token has at most one white-space character, at its start.
    """

    kind = "bpe"
    ends: tuple[int, ...] = ()  # tokens that end a text for every model with this tokenizer
    starts: tuple[int, ...] = ()  # tokens in front of a whole text, according to its files; `encode` gives pieces
    template: ChatTemplate | None = None  # how its files say that a conversation is written

    def __init__(self, bpe: BPE):
        self._bpe = bpe
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        self.starts = _before(self._ids("a", True), self._ids("a", False))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode_long(text))

    def encode_long(self, text: str) -> list[int]:
        """Like `encode`, but without a cache; for long texts.

        Raises:
            UserError: half a character (a lone surrogate) is in the text.
        """
        utf8(text)
        return self._ids(text, False)

    def _ids(self, text: str, special: bool) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._bpe.decode(list(ids))

    @cached_property
    def vocab(self) -> int:
        """The highest id plus one: how many rows of an embedding it needs, even if some ids have no token."""
        return max(self._bpe.get_vocab().values(), default=-1) + 1

    def to_json(self) -> str:
        return self._bpe.to_str(pretty=False)

    def signature(self) -> str:
        """Identifies this tokenizer in a record, wherever its files are: equal only for equal tokenizers."""
        return self.to_json()

    def save(self, folder: str | Path) -> None:
        """Write it to a model's folder, where this project and `transformers` find it."""
        files.write_text(Path(folder) / "tokenizer.json", self.to_json())
        more = {} if self.template is None else {"chat_template": self.template.source, **self.template.special}
        files.write_json(Path(folder) / "tokenizer_config.json", AS_IT_IS | more)

    @classmethod
    def from_json(cls, text: str, where: object = "the text") -> Tokenizer:
        """Raises a UserError that names `where` if it is not a tokenizer."""
        try:
            bpe = BPE.from_str(text)
            bpe.no_truncation()  # a file may say how its texts were cut and padded in training
            bpe.no_padding()
            return cls(bpe)
        except BaseException as error:  # the library has bare Exceptions, and panics, which are not Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"{where} is not a tokenizer ({reason(error)}); copy the file again") from error

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises UserError if the file is missing or is not a tokenizer."""
        return cls.from_json(files.read_text(path), path)

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """Learn the merges from texts; the same texts in the same order give the same tokenizer."""
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)


def utf8(text: str) -> bytes:
    """The text's bytes; a UserError if there are none, because half a character (a lone surrogate) is in it."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has half a character, {text[error.start]!r}, at place {error.start}; take it out"
        ) from None


def _before(whole: list[int], part: list[int]) -> tuple[int, ...]:
    """What stands in front of `part` in `whole`."""
    places = (i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part)
    return tuple(whole[: next(places, 0)])


class TextPieces:
    """The tokens of one text, one at a time -> the text in pieces, each as soon as its characters are complete.

    A character of up to four bytes may be spread over as many tokens. The pieces together are what `decode` gives for
    all tokens, even if their bytes are not text; only a few tokens are kept, however long the text.
    """

    _UNKNOWN = "\ufffd"  # what `decode` writes for bytes that are not, or not yet, a character

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the latest tokens, as far back as their text may change or is needed
        self._given = 0  # number of characters of their text that were returned

    def push(self, token: int) -> str:
        """The text that the token adds; "" if it ends in the middle of a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = text.removesuffix(self._UNKNOWN)
        piece, self._given = whole[self._given :], len(whole)
        if whole == text:  # all complete; one token stays, because some decoders trim the beginning of a text
            self._ids, self._given = [token], len(self._decode([token]))
        else:
            self._forget(text)
        return piece

    def _forget(self, text: str) -> None:
        """Keep only the tokens of the incomplete character: cut where no character reaches across."""
        for kept in range(1, min(4, len(self._ids))):
            before, after = self._decode(self._ids[:-kept]), self._decode(self._ids[-kept:])
            if after and before + after == text:
                self._ids, self._given = self._ids[-kept:], self._given - len(before)
                return

    def rest(self) -> str:
        """The text of a character that was never completed, when no further token comes."""
        return self._decode(self._ids)[self._given :]


@lru_cache(maxsize=4)
def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The shipped tokenizer, or the one in a file; read once.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    return Tokenizer.from_file(Path(path) if path else data_dir() / "tokenizer.json")
