"""The elementwise linear recurrence h_t = a_t h_{t-1} + b_t, on which Mamba and the RG-LRU are built."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t, in two loops of sqrt(T) steps instead of one loop of T.

    Time is cut into blocks. All blocks step through their tokens in parallel, starting from zero, and keep the product
    of their decays; then the state at each block's start is carried from one block to the next. Decays are multiplied
    and never divided, so this is as stable as the plain loop.

    Args:
        a, b: (B, T, ...).
        start: h_0, (B, ...).
    Returns:
        (B, T, ...).
    """
    time = a.shape[1]
    size = math.isqrt(time - 1) + 1
    filler = (0, 0) * (a.ndim - 2) + (0, -time % size)
    blocks = (F.pad(t, filler).unflatten(1, (-1, size)).unbind(2) for t in (a, b))
    h, decay = [], []
    for a_t, b_t in zip(*blocks, strict=True):  # (B, blocks, ...)
        h.append(a_t * h[-1] + b_t if h else b_t)
        decay.append(a_t * decay[-1] if decay else a_t)
    starts = [start]
    for end, product in zip(h[-1].unbind(1)[:-1], decay[-1].unbind(1)[:-1], strict=True):
        starts.append(end + product * starts[-1])
    from_start = torch.stack(decay, 2) * torch.stack(starts, 1)[:, :, None]
    return (torch.stack(h, 2) + from_start).flatten(1, 2)[:, :time]
