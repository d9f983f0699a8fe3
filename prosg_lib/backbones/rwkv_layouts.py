"""RWKV weights in the layouts of others: the author's .pth files, and `transformers.RwkvForCausalLM`.

The project's own state dicts use the author's names. The author's tensors differ in shape alone: vectors of a time or
channel mix are (1, 1, D), and RWKV-7's r_k has no leading dimension. `transformers` has renamed everything, and has a
class for RWKV-4 only.
"""

from __future__ import annotations

import re
from typing import TypeVar

import torch
from torch import Tensor

from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.errors import UserError

MARKS = {"blocks.0.att.time_first": RWKV4, "blocks.0.att.r_k": RWKV7}
"""A tensor that only one generation's weights contain, and that generation."""

_UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""Tensors that some RWKV-7 files hold and nothing reads: the first layer has no earlier values to mix in."""

_MERGE = "; merge the LoRA into the model's weights first, by the program that trained it"

_HF_NAMES = (  # the author's name -> the name in transformers, applied in order
    (r"^emb\.", "rwkv.embeddings."),
    (r"^ln_out\.", "rwkv.ln_out."),
    (r"^blocks\.(\d+)\.ln0\.", r"rwkv.blocks.\1.pre_ln."),
    (r"^blocks\.(\d+)\.att\.", r"rwkv.blocks.\1.attention."),
    (r"^blocks\.(\d+)\.ffn\.", r"rwkv.blocks.\1.feed_forward."),
    (r"^blocks\.", "rwkv.blocks."),
    (r"time_mix_k$", "time_mix_key"),
    (r"time_mix_v$", "time_mix_value"),
    (r"time_mix_r$", "time_mix_receptance"),
)


def from_author(weights: dict[str, Tensor]) -> RWKV:
    """The model whose weights these are, in float32 with memory of its own.

    Args:
        weights: an author's .pth file, of either generation and any float dtype; or a state dict of `RWKV4` or `RWKV7`.
    Raises:
        UserError: the weights are of no known generation; a tensor is missing, unknown, of a wrong shape, or quantised.
    """
    weights = _without_wrappers(weights)
    if "blocks.0.att.r_k" not in weights and any(name.endswith("att.ln_x.weight") for name in weights):
        raise UserError("these are weights of RWKV-5 or RWKV-6, which are not read here; take an RWKV-4 or RWKV-7")
    generation = next((generation for mark, generation in MARKS.items() if mark in weights), None)
    if generation is None and any("lora" in name.lower() for name in weights):
        raise UserError(f"these weights are a LoRA alone{_MERGE}")
    if generation is None:
        marks = " nor ".join(f"{mark} ({generation.__name__})" for mark, generation in MARKS.items())
        raise UserError(
            f"these {len(weights)} tensors ({', '.join(sorted(weights)[:3])}) belong to no known model: they contain "
            f"neither {marks}; give the weights of an RWKV, or the whole folder of a model of transformers"
        )
    if generation is RWKV7:
        weights = {name: tensor for name, tensor in weights.items() if name not in _UNUSED}
    try:
        config = _rwkv4_config(weights) if generation is RWKV4 else _rwkv7_config(weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"these weights are not a whole {generation.__name__}: {error}") from error
    with torch.device("meta"):  # every number is replaced
        model = generation(config)
    return _filled(model, weights)


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what is in front of the names in files of wrapped models: `module.` (DataParallel), `_orig_mod.`
    (torch.compile), `_forward_module.` (Lightning, DeepSpeed), or several of them."""
    for name in weights:
        for mark in MARKS:
            wrapper = name.removesuffix(mark)
            if wrapper != name and wrapper.endswith("."):
                return {n.removeprefix(wrapper): tensor for n, tensor in weights.items()}
    return weights


def to_author(model: RWKV) -> dict[str, Tensor]:
    """The state dict in the layout of the author's .pth files."""

    def laid_out(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(".r_k"):
            return tensor[0]  # (heads, head size)
        if isinstance(model, RWKV4):
            return tensor[None, None] if "time_mix" in name else tensor
        return tensor[None, None] if tensor.ndim == 1 and "ln" not in name else tensor

    return {name: laid_out(name, tensor) for name, tensor in model.state_dict().items()}


def from_hf(weights: dict[str, Tensor]) -> RWKV4:
    """The model whose weights these are, from the state dict of `transformers.RwkvForCausalLM`.

    Raises:
        UserError: they are not that class's, or see `from_author`.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("rwkv.blocks.")}
    if not layers:
        raise UserError("these weights are not those of transformers' RwkvForCausalLM: no name begins with rwkv.blocks")
    with torch.device("meta"):  # only for the names
        names = {_hf_name(name): name for name in RWKV4(RWKV4Config(1, 1, len(layers), 1)).state_dict()}
    return from_author({names.get(name, name): tensor for name, tensor in weights.items()})


def to_hf(model: RWKV4) -> dict[str, Tensor]:
    """The state dict in the layout of `transformers.RwkvForCausalLM`."""
    return {_hf_name(name): tensor for name, tensor in to_author(model).items()}


def _hf_name(name: str) -> str:
    for pattern, replacement in _HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _rwkv4_config(weights: dict[str, Tensor]) -> RWKV4Config:
    vocab, width = weights["emb.weight"].shape
    return RWKV4Config(vocab, width, _layers(weights), weights["blocks.0.ffn.key.weight"].shape[0])


def _rwkv7_config(weights: dict[str, Tensor]) -> RWKV7Config:
    vocab, width = weights["emb.weight"].shape
    layers = _layers(weights)
    ffn, _ = weights["blocks.0.ffn.key.weight"].shape
    *_, _heads, head = weights["blocks.0.att.r_k"].shape
    decay, rate, gate = (weights[f"blocks.0.att.{name}"].shape[1] for name in ("w1", "a1", "g1"))
    value = weights["blocks.1.att.v1"].shape[1] if layers > 1 else 0
    return RWKV7Config(vocab, width, layers, ffn, head, decay, rate, value, gate)


def _layers(weights: dict[str, Tensor]) -> int:
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if numbers != {str(number) for number in range(len(numbers))}:  # also before a billionth block is made
        raise ValueError(f"its {len(numbers)} blocks are not those from 0 to {len(numbers) - 1}")
    return len(numbers)


Model = TypeVar("Model", bound=RWKV)


def _filled(model: Model, weights: dict[str, Tensor]) -> Model:
    """The model with these weights, copied; shapes may differ in dimensions of size 1."""
    layout, kind = to_author(model), type(model).__name__
    missing, unknown = layout.keys() - weights.keys(), weights.keys() - layout.keys()
    if missing or unknown:
        remedy = ""
        if missing == {"head.weight"}:
            remedy = '; if the head is tied, save it, too: weights["head.weight"] = weights["emb.weight"].clone()'
        elif any("lora" in name.lower() for name in unknown):
            remedy = _MERGE
        raise UserError(
            f"these weights are not a whole {kind}: {len(missing)} tensors missing ({', '.join(sorted(missing)[:3])}), "
            f"{len(unknown)} unknown ({', '.join(sorted(unknown)[:3])}){remedy}"
        )
    for name, tensor in weights.items():
        if [n for n in tensor.shape if n > 1] != [n for n in layout[name].shape if n > 1]:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(layout[name].shape)}")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            what = tensor.dtype if tensor.layout is torch.strided else tensor.layout
            raise UserError(f"{name} is {what}; quantised or sparse weights cannot be read, take the float16 file")
    own = model.state_dict()
    copied = {n: t.to("cpu", torch.float32, copy=True).reshape(own[n].shape) for n, t in weights.items()}
    model.load_state_dict(copied, assign=True)
    return model
