"""The model and the generator that a user names, of whatever kind: shipped, in a folder, or on the hub.

`models.load_model` reads recurrent models, and `stages.load_generator` what was trained on dialogues; here attention
models of others are read, too, and what was trained on pairs.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

from prosg_lib import files
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import load_transformer
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.registry import LOADERS, loader
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.training import pair_stages, stages

_WAYS = ("adapter", "token", "final")
"""Methods of `pair_stages` that make a low-rank change."""


def choose_model(name: str) -> LanguageModel:
    """A model in evaluation mode, frozen, on the GPU where there is one.

    Args:
        name: what `models.load_model` takes; or a folder or a hub id of a causal transformer.
    Raises:
        UserError: there is nothing of that name, or it is damaged; see there.
    """
    lm = load_transformer(name) if _is_transformer(name) else load_model(name)
    return lm.to(stages.device()).eval().requires_grad_(False)


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
    path = stages.generator_file(name)
    record = files.load_meta(path).get("record", {})
    if "way" not in record:
        return stages.load_generator(name, lm)
    if record["lm"] != lm.fingerprint():
        raise UserError(f"{path.name} was trained for model {record['lm']}, not for this one ({lm.fingerprint()})")
    found = _of_pairs(path, record, lm)
    found.load_state_dict({name: tensor.float() for name, tensor in files.load_tensors(path)[0].items()})
    return found.to(next(lm.parameters()).device).eval().requires_grad_(False)


def _of_pairs(path: Path, record: dict, lm: LanguageModel) -> Generator:
    method = record["way"]["method"]
    if method not in _WAYS:
        raise UserError(
            f"{path.name} changes all weights of the model ({method}), and its step is no low-rank change; take one of "
            f"the methods {', '.join(_WAYS)}"
        )
    return pair_stages.new_way(method, lm, record["stage"].partition(" ")[0], get_profile("cpu"))
