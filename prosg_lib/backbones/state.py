"""RecurrentState: what a recurrent language model remembers after a prompt, as one object."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states, and of the sums in them: float32 where the model computes in half precision."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


@dataclass(frozen=True)
class RecurrentState:
    """The state vectors of a batch of sequences.

    Attributes:
        tensors: name -> (B, ...), batch first. The names depend on the backbone. RWKV-4 has five vectors per block:
            att_shift, ffn_shift, num, den, m, each (B, layers, D); RWKV-7 has the two shifts and a matrix per head,
            wkv (B, layers, H, N, N); models of `transformers` have "3.conv", "3.state", ... by layer
            (`backbones.hub_recurrent.Recurrent`).
        model: the model that made the state, if one did; any other refuses it.
    """

    tensors: dict[str, Tensor]
    model: weakref.ref | None = field(default=None, repr=False, compare=False)

    @property
    def batch(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def nbytes(self) -> int:
        """Bytes of one sequence's state. They do not depend on the length of the text, except where `state_grows`: keys
        and values of attention layers count as they are stored, padded to the longest text of the batch."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    def select(self, rows: Tensor | list[int] | slice) -> Self:
        """The states of some sequences of the batch; rows may repeat (one state, many continuations)."""
        return replace(self, tensors={name: tensor[rows] for name, tensor in self.tensors.items()})

    def detach(self) -> Self:
        """The same numbers, cut off from the graph that they were computed in."""
        return replace(self, tensors={name: tensor.detach() for name, tensor in self.tensors.items()})

    def __getstate__(self) -> dict:
        """For copying and pickling, which a weak reference does not allow."""
        return {"tensors": self.tensors, "model": None}


@dataclass(frozen=True)
class Normaliser:
    """Fixed statistics of state features, channel by channel, collected over texts.

    Attributes:
        mean, std: (F,).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> Self:
        """Statistics of features (N, F) over N texts; channels that never change get scale 1."""
        std = features.std(0) if len(features) > 1 else torch.zeros_like(features[0])
        return cls(features.mean(0), torch.where(std > 1e-6, std, 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, F), zero mean and unit variance over the texts of `fit`, outliers cut at 5 deviations."""
        return ((features - self.mean) / self.std).clamp(-5.0, 5.0)
