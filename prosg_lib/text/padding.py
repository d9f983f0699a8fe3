"""Token sequences of different lengths as one tensor, padded with zeros on the left or on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Rows(NamedTuple):
    """Token ids of left-padded rows, and a mask that is False at the padding, both (..., T)."""

    ids: Tensor
    valid: Tensor


def left_padded(rows: Sequence[Sequence[int]]) -> Rows:
    """Sequences, (B, T) with T the longest of them; every row ends with its last token."""
    ids = _padded(rows, "left")
    places = torch.arange(ids.shape[1], 0, -1)  # counted from the end
    return Rows(ids, places <= torch.tensor([[len(row)] for row in rows]))


def right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Sequences, (B, T) with T the longest of them; every row begins with its first token."""
    return _padded(rows, "right")


def _padded(rows: Sequence[Sequence[int]], side: str) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
