"""The precision that a model is fastest in, on a device, without becoming another model."""

from __future__ import annotations

from pathlib import Path

import torch

from prosg_lib.backbones.base import LanguageModel

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64, and of ARM
_CPU = Path("/proc/cpuinfo")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers itself. Where it does not, PyTorch does, 15 to 35 times slower than
    it multiplies float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # a T4 has 7.5
    if device.type != "cpu" or not _CPU.is_file():
        return False
    return any(
        _FLAGS & set(line.lower().split())
        for line in _CPU.read_text().splitlines()
        if line.lower().startswith(("flags", "features"))
    )


def in_fastest_precision(lm: LanguageModel) -> LanguageModel:
    """The model in bfloat16 where its device has it and every weight is such a number; else as it is.

    So its fingerprint stays: weights that rounding would change are left in float32.
    """
    weights = list(lm.state_dict().values())
    if has_bfloat16(weights[0].device) and all(torch.equal(w, w.bfloat16().to(w.dtype)) for w in weights):
        return lm.to(torch.bfloat16)
    return lm
