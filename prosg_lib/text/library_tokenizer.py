"""Tokenizers of other models: whatever a model's folder has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer

_PLACES = ("name_or_path", "is_local", "local_files_only")
"""Settings of a tokenizer of `transformers` that record where it was loaded from."""


class LibraryTokenizer(Tokenizer):
    """Text <-> token ids by a tokenizer of `transformers` that has no tokenizer.json: sentencepiece, bytes, others."""

    def encode_long(self, text):
        return self._bpe.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self._bpe.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def vocab(self):
        return len(self._bpe)

    def to_json(self):
        raise UserError(f"a {type(self._bpe).__name__} has no tokenizer.json; save the model in layout 'transformers'")

    def signature(self):
        """A hash of its files: settings, and merges, a sentencepiece model or whatever else it consists of."""
        digest = hashlib.sha256(json.dumps(self._bpe.get_vocab(), sort_keys=True).encode())
        with TemporaryDirectory() as folder:
            self._bpe.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                content = file.read_bytes()
                if file.name == "tokenizer_config.json":
                    settings = {name: value for name, value in json.loads(content).items() if name not in _PLACES}
                    content = json.dumps(settings, sort_keys=True).encode()
                digest.update(file.name.encode() + content)
        return digest.hexdigest()

    def save(self, folder):
        files.write_folder(folder, self._bpe.save_pretrained)


_OTHER_FILES = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def folder_tokenizer(folder: Path, vocab: int) -> Tokenizer | None:
    """The tokenizer in a model's folder, of any kind; None if there is none. Code in the folder is never run.

    Args:
        vocab: of the model; it is often larger than the tokenizer's because it is rounded up.
    Raises:
        UserError: the tokenizer is damaged, needs code of its own, or has more tokens than the model.
    """
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    elif any((folder / name).exists() for name in _OTHER_FILES):
        tokenizer = _library_tokenizer(folder)
    else:
        return None
    if tokenizer.vocab > vocab:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab} tokens, but the model only {vocab}; "
            "replace it by the tokenizer that the model was trained with"
        )
    return tokenizer


def _library_tokenizer(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return LibraryTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    except Exception as error:  # the library raises whatever its parsers raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(
            f"the tokenizer in {folder} could not be loaded ({reason}); put a tokenizer.json there, "
            "or remove its files to load the model without one"
        ) from error
