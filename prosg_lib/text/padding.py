"""Texts of different lengths as one table of token ids, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Token ids of left-padded rows, and where they are no padding, both (..., T)."""

    ids: Tensor
    valid: Tensor


def left_padded(rows: Sequence[Sequence[int]]) -> Rows:
    """Rows of token ids, all at least one long, as tensors."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Rows(ids, torch.arange(longest) >= longest - lengths[:, None])
