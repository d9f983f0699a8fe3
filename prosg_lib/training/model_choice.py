"""The model and the generator that a user names, of whatever kind: shipped, in a folder, or on the hub.

`stages.load_generator` reads what was trained on dialogues; here what was trained on pairs is read, too.
"""

from __future__ import annotations

from pathlib import Path

from prosg_lib import files
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.loading import load_model
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.training import pair_stages, stages

_WAYS = ("adapter", "token", "final")
"""Methods of `pair_stages` that make a low-rank change."""


def choose_model(name: str) -> LanguageModel:
    """A model in evaluation mode, frozen, on the GPU where there is one.

    Args:
        name: as `load_model` takes it.
    Raises:
        UserError: there is nothing of that name, or it is damaged; see there.
    """
    return load_model(name).to(stages.device()).eval().requires_grad_(False)


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
