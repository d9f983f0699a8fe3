"""Checkpoints: what each was trained as, the module it holds, and where it is.

A checkpoint is a safetensors file whose header has `kind` ("lm" or "generator"), `record` and `provenance`. The record
decides whether it is taken for a recipe; the provenance says where it came from and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from prosg_lib import files, paths
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7
from prosg_lib.config import Profile
from prosg_lib.config.sizes import (
    AdapterSize,
    GeneratorSize,
    LaterAdapterSize,
    Mamba2Size,
    ProbeSize,
    RWKV4Config,
    RWKV7Config,
    StateSize,
    StepSize,
    SupervisedSize,
    TransformedSize,
    TransformerConfig,
)
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator, check_model, edited_maps
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.mend import TransformedGradient
from prosg_lib.generators.normalised import NormalisedStatic, NormalisedTokenGenerator
from prosg_lib.generators.states import StateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep, RatedAdapterStep
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.strict import read_as
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import distributed
from prosg_lib.training.recipes import LANGUAGE_MODELS, Size
from prosg_lib.training.state_probe import StateProbe

VERSION = 1
"""Goes up when the same recipe, seed and data would train to something else; other versions do not load."""


@dataclass(frozen=True)
class Record:
    """What a checkpoint was trained as; `load_or_train.record_of` says what each field is."""

    recipe: str
    version: int
    seed: int
    data: str | dict
    module: dict[str, object]
    training: dict[str, object]
    course: dict[str, object]
    lm: str | None
    start: dict[str, object] | None


@dataclass(frozen=True)
class Header:
    """A checkpoint's header."""

    kind: Literal["lm", "generator"]
    record: Record
    provenance: dict[str, object]


def header_of(meta: dict, path: Path) -> Header:
    """A checkpoint's header, as `files.load_meta` gives it.

    Raises:
        UserError: this version does not read it.
    """
    return read_as(Header, meta, f"{path} is of another version (remove it, and it is trained again)")


STEP = "/step"  # ends the name of the steps of a matrix in 8 bits; no parameter's name has a slash


def in_eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with every matrix rounded to 8 bits, in steps of 1/127 of a row's largest number, or a
    column's where there are fewer of these."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            along = 1 if len(tensor) <= tensor.shape[1] else 0
            step = (tensor.float().abs().amax(along, keepdim=True) / 127).clamp(min=1e-30)
            found[name] = (tensor.float() / step).round().to(torch.int8)
            found[name + STEP] = step
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """`files.load_tensors`, with matrices in 8 bits multiplied out."""
    tensors, meta = files.load_tensors(path)
    steps = {name.removesuffix(STEP): tensors.pop(name) for name in [*tensors] if name.endswith(STEP)}
    return tensors | {name: tensors[name] * step for name, step in steps.items() if name in tensors}, meta


def _maps(size: GeneratorSize | LaterAdapterSize, lm: LanguageModel) -> tuple[str, ...]:
    """Endings of the names of the maps that a generator or adapter changes, or the names of those in its layers."""
    if not size.layers:
        return size.maps
    found = {layer: [n for n in edited_maps(lm, size.maps) if f".{layer}." in f".{n}"] for layer in size.layers}
    missing = [str(layer) for layer, names in found.items() if not names]
    if missing:
        raise UserError(f"no map {', '.join(size.maps)} in layer {', '.join(missing)}; layers count from 0")
    return tuple(name for names in found.values() for name in names)


def _width(size: GeneratorSize, lm: LanguageModel) -> int:
    return size.width or 2 * lm.config.width


def _token_wise(
    size: GeneratorSize, lm: LanguageModel, generator: type[TokenGenerator] = TokenGenerator
) -> TokenGenerator:
    return generator(lm, size.rank, _width(size, lm), _maps(size, lm), label=size.label)


def _final_state(size: GeneratorSize, lm: LanguageModel) -> FinalStateGenerator:
    return FinalStateGenerator(lm, size.rank, _width(size, lm), _maps(size, lm))


def _states(size: StateSize, lm: LanguageModel) -> StateGenerator:
    ends = lm.needed_tokenizer().encode(".") if size.sentences else ()
    return StateGenerator(lm, size.rank, _width(size, lm), _maps(size, lm), size.terms, size.term, ends)


def _transformed(size: TransformedSize, lm: LanguageModel) -> TransformedGradient:
    return TransformedGradient(lm, size.rank, _width(size, lm), _maps(size, lm), size.step)


def _llama(size: TransformerConfig, lm: None) -> LanguageModel:
    from prosg_lib.backbones.hub_transformer import new_llama  # here, because transformers takes seconds to import

    return new_llama(size)


def _mamba2(size: Mamba2Size, lm: None) -> LanguageModel:
    from prosg_lib.backbones.hub_families import new_mamba2  # as above

    return new_mamba2(size.settings)


MODULES: dict[str, tuple[type[Size], Callable[..., nn.Module]]] = {
    "rwkv4": (RWKV4Config, lambda size, lm: RWKV4(size)),
    "rwkv7": (RWKV7Config, lambda size, lm: RWKV7(size)),
    "llama": (TransformerConfig, _llama),
    "mamba2": (Mamba2Size, _mamba2),
    "token": (GeneratorSize, _token_wise),
    "normalised": (GeneratorSize, lambda size, lm: _token_wise(size, lm, NormalisedTokenGenerator)),
    "supervised": (SupervisedSize, _token_wise),
    "final": (GeneratorSize, _final_state),
    "states": (StateSize, _states),
    "mend": (TransformedSize, _transformed),
    "probe": (ProbeSize, lambda size, lm: StateProbe(lm, size.width)),
    "static": (GeneratorSize, lambda size, lm: StaticDelta(lm, size.rank, _maps(size, lm))),
    "normalised-static": (GeneratorSize, lambda size, lm: NormalisedStatic(lm, size.rank, _maps(size, lm))),
    "adapter": (AdapterSize, lambda size, lm: AdapterStep(lm, size.rank, size.maps, size.lr)),
    "rated-adapter": (
        LaterAdapterSize,
        lambda size, lm: RatedAdapterStep(lm, size.rank, _maps(size, lm), size.lr),
    ),
    "weights": (StepSize, lambda size, lm: WeightStep(lm, size.rank or None, size.lr)),
    "maps": (StepSize, lambda size, lm: MapStep(lm, size.lr)),
}
"""Kind -> its class of sizes, and (sizes, language model that it is for) -> the untrained module."""

_OTHER_WORK = dict.fromkeys(("weights", "maps"), "changes all weights of the model") | {
    "probe": "reads facts off a state"
}


def new_module(kind: str, size: Size, lm: LanguageModel | None = None) -> nn.Module:
    """The untrained module of a kind; lm: the model it is for, None for a language model.

    Raises:
        UserError: the sizes do not fit the model, each other, or this machine's memory.
    """
    try:
        return MODULES[kind][1](size, lm)
    except UserError:
        raise
    except Exception as error:  # whatever a model's class says of sizes that it cannot have
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"no {kind} has these sizes: {size} ({why})") from error


def built(module: nn.Module, path: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """The module with a checkpoint's tensors, frozen, in evaluation mode, on the device; `checkpoint` is the path.

    Raises:
        UserError: the tensors are not the module's, or not all numbers.
    """
    wrong = [name for name, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if wrong:
        raise UserError(f"{path} has something other than finite numbers in {wrong[0]}; remove it and train it again")
    try:
        module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the tensors of its record; remove it and train it again") from error
    module.checkpoint = path
    if isinstance(module, LanguageModel):
        module.tokenizer = load_tokenizer()
    return module.to(distributed.device()).eval().requires_grad_(False)


def shipped(name: str) -> Path:
    """Where the repository ships a checkpoint, if it does."""
    return paths.data_dir() / "checkpoints" / f"{name}.safetensors"


def kept(name: str, profile: Profile) -> Path:
    """Where a checkpoint that was trained here is kept."""
    return paths.runs_dir(profile.name) / "checkpoints" / f"{name}.safetensors"


def retraining(profile: Profile) -> str | None:
    """When the retraining in progress began; None if there is none. Checkpoints trained meanwhile have it in their
    provenance, so that each is trained once, however often it is interrupted; until then the earlier one stays."""
    path = _marker(profile)
    return files.read_text(path) if path.exists() else None


def begin_retraining(profile: Profile) -> None:
    """Let `load_or_train` with `retrain` take only what is trained from now on, or since an interrupted retraining."""
    if began := retraining(profile):
        distributed.say(f"resuming the retraining of {began}; to start over, first remove {_marker(profile)}")
    else:
        files.write_text(_marker(profile), f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}")


def end_retraining(profile: Profile) -> None:
    _marker(profile).unlink(missing_ok=True)


def _marker(profile: Profile) -> Path:
    return paths.runs_dir(profile.name) / "retraining.txt"


def load_generator(name: str, lm: LanguageModel) -> Generator:
    """A shipped generator (`rwkv4-dialogue-token`) or one in a file, for the model it was trained for, on its device.

    Raises:
        UserError: there is none of that name, the file is damaged or holds no generator, or it was trained for another
            model.
    """
    path = generator_file(name)
    tensors, meta = read(path)
    if meta.get("kind") != "generator":
        raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a generator")
    record = header_of(meta, path).record
    check_model(record.lm, lm, path.name)
    kind, sizes = str(record.module.get("kind")), {k: v for k, v in record.module.items() if k != "kind"}
    if kind not in MODULES.keys() - {*LANGUAGE_MODELS}:
        raise UserError(f"{path} is of another version: it holds a module of kind {kind!r}")
    if kind in _OTHER_WORK:
        raise UserError(
            f"{path.name} {_OTHER_WORK[kind]} ({kind}), so it makes no delta; take an adapter or a generator"
        )
    size = read_as(MODULES[kind][0], sizes, f"{path}, record.module")
    with torch.device("meta"):  # a file may ask for more than there is memory for
        expected = new_module(kind, size, lm).state_dict()
    if {(name, t.shape) for name, t in expected.items()} != {(name, t.shape) for name, t in tensors.items()}:
        raise UserError(f"{path} does not hold the tensors of its record; remove it and train it again")
    return built(new_module(kind, size, lm), path, tensors).to(next(lm.parameters()).device)


def generator_file(name: str) -> Path:
    """Where a shipped generator of that name is, or would be; a name that ends in .safetensors is a path itself."""
    return Path(name) if name.endswith(".safetensors") else shipped(name)


def own_generator(model: str) -> str | None:
    """The name of the token-wise generator that is shipped with a shipped model; None where there is none."""
    own = f"{model}-token"
    named = Path(model).name == model and not Path(model).exists()
    return own if named and shipped(model).is_file() and generator_file(own).is_file() else None
