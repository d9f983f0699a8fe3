"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

PEFT adds (alpha / r) B A to a weight W (out, in), with A (r, in) and B (out, r); with `use_rslora` alpha / sqrt(r)
(LoRA, Hu et al. 2021, section 4.1; rsLoRA, Kalajdzievski 2023). Here the same change is U V^T.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.strict import read_as

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight")

# Settings that do not change what an adapter computes, or that are read below. Any other setting might.
_PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "qalora_group_size"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
}
_UNSET = (None, False, "none", [], {})
REAL = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
"""What factors may be made of."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others also change the base model's weights


@dataclass(frozen=True)
class _Settings:
    """Those of adapter_config.json on which the change depends, as PEFT has them."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


def save(
    folder: str | Path, changes: Mapping[str, tuple[Tensor, Tensor]], transposed: bool, base_model: str | None
) -> None:
    """Write a low-rank change of a model of `transformers` as an adapter.

    All maps get the largest rank, padded with zeros, and alpha = r, so that every reader of adapters understands it.

    Args:
        changes: module name in that model -> U (out, r), V (in, r).
        transposed: the modules store their weights as (in, out), as GPT-2's do.
    """
    rank = max(u.shape[1] for u, _ in changes.values())
    tensors = {}
    for name, (u, v) in changes.items():
        u, v = (F.pad(t.detach().cpu(), (0, rank - t.shape[1])) for t in (u, v))
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": v.t(), f"{_PREFIX}{name}.lora_B.weight": u}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(changes),
    }
    files.save_tensors(Path(folder) / WEIGHTS, tensors, None)
    files.write_json(Path(folder) / CONFIG, config)


def load(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read an adapter: module name in its model -> U (out, r), V (in, r), float32, with the adapter's scale in U.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit; the adapter is not a LoRA, or is more than a
            low-rank change.
    """
    folder = Path(folder)
    config = files.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG} does not describe a LoRA adapter; only those are low-rank changes")
    more = {key: value for key, value in config.items() if key not in _PLAIN and value not in _UNSET}
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        more["init_lora_weights"] = config["init_lora_weights"]
    if more:
        listed = ", ".join(f"{key} = {value!r}" for key, value in more.items())
        raise UserError(f"{folder / CONFIG} has {listed}, which is more than a low-rank change; train it without that")
    numbers = {key: config[key] for key in _Settings.__dataclass_fields__ if key in config}
    settings = read_as(_Settings, numbers, folder / CONFIG)
    tensors = files.load_foreign_tensors(folder / WEIGHTS)
    names = sorted({match[1] for key in tensors if (match := _KEY.fullmatch(key))})
    parts = {name: [f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB"] for name in names}
    wrong = tensors.keys() ^ {key for keys in parts.values() for key in keys}
    if wrong or not parts:
        raise UserError(
            f"{folder / WEIGHTS} is not a plain LoRA's, with one lora_A and one lora_B per module and nothing else; "
            f"unexpected or missing: {', '.join(sorted(wrong)[:4]) or 'any module'}"
        )
    ranks = _by_name(settings.rank_pattern, settings.r, names, folder / CONFIG)
    alphas = _by_name(settings.alpha_pattern, settings.lora_alpha, names, folder / CONFIG)
    changes = {}
    for name, keys in parts.items():
        (a, b), rank = (tensors[key] for key in keys), ranks[name]
        if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1] == rank > 0 and {a.dtype, b.dtype} <= REAL):
            raise UserError(
                f"{folder / WEIGHTS}: the factors of {name} are A {described(a)} and B {described(b)}; they should be "
                f"(rank, inputs) and (outputs, rank), floating point, of rank {rank} as {CONFIG} says"
            )
        scale = alphas[name] / (rank**0.5 if settings.use_rslora else rank)
        changes[name] = b.float() * scale, a.float().t()
    return changes


def described(t: Tensor) -> str:
    """Shape and type, for messages."""
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


_SEARCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None) for name in names], sys.stdout)
"""
_SECONDS = 5


def _by_name(patterns: Mapping[str, float] | None, default: float, names: list[str], config: Path) -> dict[str, float]:
    """Every module's own number: that of the first pattern, a regular expression, that matches the end of its name.

    They are matched in a process of its own, which can be stopped: a foreign expression may take forever.
    """
    if not patterns:
        return dict.fromkeys(names, default)
    work = json.dumps([list(patterns), names])
    try:
        command = [sys.executable, "-I", "-c", _SEARCH]
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"{config} has patterns that are not regular expressions, or take more than {_SECONDS} s to match: "
            f"{', '.join(map(repr, patterns))[:200]}; give the modules' names instead"
        ) from error
    return {n: default if p is None else patterns[p] for n, p in zip(names, json.loads(done.stdout), strict=True)}
