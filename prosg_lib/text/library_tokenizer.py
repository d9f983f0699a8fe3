"""Tokenizers of other models: whatever a model's folder has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from prosg_lib import files
from prosg_lib.errors import UserError, reason
from prosg_lib.text.chat_template import ChatTemplate
from prosg_lib.text.tokenizer import AS_IT_IS, Tokenizer

_PLACES = ("name_or_path", "is_local", "local_files_only")
"""Settings of a tokenizer of `transformers` that record where it was loaded from."""


class LibraryTokenizer(Tokenizer):
    """Text <-> token ids by a tokenizer of `transformers` that is Python: bytes, some older ones."""

    def _ids(self, text, special):
        return self._bpe.encode(text, add_special_tokens=special)

    def decode(self, ids):
        return self._bpe.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

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


_FILES = ("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, of any kind, with the ids that `transformers` gives a text; None if there is
    none. Code in the folder is never run.

    Raises:
        UserError: the tokenizer is damaged, or needs code of its own.
    """
    own, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if own.exists() and (not settings.exists() or files.read_json(settings) == AS_IT_IS):
        return Tokenizer.from_file(own)
    if not any((folder / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return of_library(found)
    except BaseException as error:  # the library raises whatever its parsers raise, and panics
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(
            f"the tokenizer in {folder} could not be loaded ({reason(error)}); remove tokenizer_config.json if a "
            "tokenizer.json is there, or all of its files to load the model without a tokenizer"
        ) from error


def of_library(found) -> Tokenizer:
    """A tokenizer of `transformers` as one of this project, with its chat template."""
    backend = getattr(found, "backend_tokenizer", None)
    tokenizer = LibraryTokenizer(found) if backend is None else Tokenizer.from_json(backend.to_str())
    source = found.chat_template
    if isinstance(source, dict):  # several, by name
        source = source.get("default")
    if source:
        special = {name: str(token) for name, token in found.special_tokens_map.items() if isinstance(token, str)}
        tokenizer.template = ChatTemplate(source, special)
    return tokenizer
