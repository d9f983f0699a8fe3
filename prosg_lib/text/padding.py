"""Token sequences of different lengths as one tensor, padded with zeros on the left or on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Rows(NamedTuple):
    """Token ids of left-padded rows, and a mask that is False at the padding, both (..., T)."""

    ids: Tensor
    valid: Tensor


def left_padded(rows: Sequence[Sequence[int]]) -> Rows:
    """Sequences, (B, T) with T the longest of them; every row ends with its last token."""
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    valid = np.zeros_like(table, dtype=bool)
    for ids, mask, row in zip(table, valid, rows, strict=True):
        start = len(ids) - len(row)
        ids[start:], mask[start:] = row, True
    return Rows(torch.from_numpy(table), torch.from_numpy(valid))


def right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Sequences, (B, T) with T the longest of them; every row begins with its first token."""
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for ids, row in zip(table, rows, strict=True):
        ids[: len(row)] = row
    return torch.from_numpy(table)
