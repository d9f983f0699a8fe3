"""The model and the generator that a user names, of whatever kind: shipped, in a folder, or on the hub.

`models.load_model` reads recurrent models; here attention models are read, too, and what the project ships of other
families, whose sizes stand in the checkpoints' records.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers.utils import cached_file

from prosg_lib import files, pair_stages, paths, stages
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.registry import LOADERS, loader
from prosg_lib.backbones.transformer import TransformerConfig, load_transformer, new_llama
from prosg_lib.errors import UserError
from prosg_lib.generator import Generator
from prosg_lib.gradient_step import AdapterStep
from prosg_lib.models import load_model
from prosg_lib.pretrained_stages import new_small
from prosg_lib.profiles import get_profile
from prosg_lib.tokenizer import load_tokenizer

_WAYS = ("adapter", "token", "final")
"""Methods of `pair_stages` that make a low-rank change."""


def choose_model(name: str) -> LanguageModel:
    """A model in evaluation mode, frozen, on the GPU where there is one.

    Args:
        name: what `models.load_model` takes; any shipped language model; a folder or a hub id of a causal transformer.
    Raises:
        UserError: there is nothing of that name, or it is damaged; see there.
    """
    shipped = _shipped(name)
    if shipped is not None and _family(shipped) is not None:
        lm = _of_family(shipped)
    elif shipped is None and _is_transformer(name):
        lm = load_transformer(name)
    else:
        lm = load_model(name)
    return lm.to(stages.device()).eval().requires_grad_(False)


def _shipped(name: str) -> Path | None:
    path = paths.data_dir() / "checkpoints" / f"{name}.safetensors"
    return path if Path(name).name == name and not Path(name).exists() and path.is_file() else None


def _family(path: Path) -> str | None:
    """ "mamba2" or "llama"; None for what `load_model` reads."""
    record = files.load_tensors(path)[1].get("record", {})
    return {"small": "mamba2", "transformer model": "llama"}.get(record.get("stage"))


def _of_family(path: Path) -> LanguageModel:
    tensors, meta = files.load_tensors(path)
    sizes = meta["record"]["model"]
    if _family(path) == "llama":
        lm: nn.Module = new_llama(TransformerConfig(**sizes))
    else:
        lm = new_small(replace(get_profile("cpu").pretrained, settings=tuple(sizes.items())))
    lm.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    lm.tokenizer = load_tokenizer()
    return lm


def _is_transformer(name: str) -> bool:
    """Whether a folder or a hub id is of a class that no recurrent adapter reads."""
    path = Path(name).expanduser()
    if path.is_dir():
        config = path / "config.json"
    elif path.exists() or path.is_absolute() or name.count("/") != 1:
        return False
    else:
        try:
            config = Path(cached_file(name, "config.json"))
        except (OSError, ValueError):
            return False  # `load_model` says what is wrong with it
    found = files.read_json(config) if config.is_file() else {}
    kind = found.get("model_type") if isinstance(found, dict) else None
    loader("rwkv")  # registers the project's own adapters
    return kind is not None and kind not in LOADERS


def choose_generator(name: str, lm: LanguageModel) -> Generator:
    """A generator for the model, on its device: what `stages.load_generator` takes, or one trained on pairs.

    Raises:
        UserError: there is none of that name, the file is damaged or no generator, or it is another model's.
    """
    path = Path(name) if name.endswith(".safetensors") else paths.data_dir() / "checkpoints" / f"{name}.safetensors"
    tensors, meta = files.load_tensors(path)
    record = meta.get("record", {})
    if "way" not in record and record.get("stage") != "adapter":
        return stages.load_generator(name, lm)
    if record["lm"] != lm.fingerprint():
        raise UserError(f"{path.name} was trained for model {record['lm']}, not for this one ({lm.fingerprint()})")
    found = _adapter(record["generator"], lm) if "way" not in record else _of_pairs(path, record, lm)
    found.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return found.to(next(lm.parameters()).device).eval().requires_grad_(False)


def _adapter(size: dict, lm: LanguageModel) -> AdapterStep:
    return AdapterStep(lm, size["rank"], tuple(size["maps"]), size["lr"])


def _of_pairs(path: Path, record: dict, lm: LanguageModel) -> Generator:
    method = record["way"]["method"]
    if method not in _WAYS:
        raise UserError(
            f"{path.name} changes all weights of the model ({method}), and its step is no low-rank change; take one of "
            f"the methods {', '.join(_WAYS)}"
        )
    return pair_stages.new_way(method, lm, record["stage"].partition(" ")[0], "cpu")


def own_generator(model: str) -> str | None:
    """The name of the token-wise generator that is shipped with a shipped model; None where there is none."""
    own = f"{model}-token"
    return own if Path(model).name == model and _shipped(own) is not None else None
