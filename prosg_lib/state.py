"""RecurrentState: what a recurrent language model knows after a prompt, as one object of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecurrentState:
    """The state vectors of a batch of sequences.

    Attributes:
        tensors: name -> (B, layers, ...), batch first. Which names there are is the backbone's affair; RWKV-4 has
            its five vectors a block: att_shift, ffn_shift, num, den, m, each (B, layers, D); RWKV-7 the two shifts and
            a matrix a head, wkv (B, layers, H, N, N).
    """

    tensors: dict[str, Tensor]

    @property
    def batch(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def nbytes(self) -> int:
        """Bytes of one sequence's state; the same however long the text was."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    def select(self, rows: Tensor | list[int] | slice) -> Self:
        """The states of some sequences of the batch; rows may repeat (one state, many continuations)."""
        return self._map(lambda t: t[rows])

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> Self:
        """As `Tensor.to`: move to a device, or change the dtype."""
        return self._map(lambda t: t.to(*args, **kwargs))

    @classmethod
    def cat(cls, states: list[Self]) -> Self:
        """One batch out of several."""
        return cls({name: torch.cat([s.tensors[name] for s in states]) for name in states[0].tensors})

    def _map(self, f) -> Self:
        return type(self)({name: f(t) for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Normaliser:
    """Fixed per-channel statistics of state features, collected over texts (advice of RWKV's author: do not pool).

    Attributes:
        mean, std: (F,).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Statistics of features (N, F) over the N texts; channels that never change get the unit scale."""
        std = features.std(0) if len(features) > 1 else torch.zeros_like(features[0])
        return cls(features.mean(0), torch.where(std > 1e-6, std, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, F), zero mean and unit variance over the texts of `fit`, outliers cut at 5 deviations."""
        return ((features - self.mean) / self.std).clamp(-5.0, 5.0)
