"""Applying a low-rank change while a model runs, without touching its weights: y = x W^T + scale (x V) U^T."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from prosg_lib.errors import UserError

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.low_rank import Factors, LowRankDelta, maps_of


def applied(lm: LanguageModel, delta: LowRankDelta | None) -> AbstractContextManager[None]:
    """While it lasts, y = x W^T + scale (x V) U^T in every map that the delta names; W itself is never written.

    Checked and prepared here, once; what is returned may be entered again and again, as generation does at every step.

    Raises:
        UserError: the delta was made for another model, or names a map that this one does not have.
    """
    return nullcontext() if delta is None else _Applied(maps_of(lm, delta), delta)


class _Applied(AbstractContextManager):
    def __init__(self, maps: dict[str, nn.Module], delta: LowRankDelta):
        self._adders = [(maps[name], _Adder(f, delta.scale, maps[name])) for name, f in delta.factors.items()]
        self._handles = None

    def __enter__(self) -> None:
        if self._handles is not None:  # so it is entered again and again
            for _, adder in self._adders:
                adder.lay_out()
        self._handles = [module.register_forward_hook(adder) for module, adder in self._adders]

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


class _Adder:
    """Adds scale (x V) U^T to what a linear map says, as a forward hook of it."""

    def __init__(self, factors: Factors, scale: float, module: nn.Module):
        self.u, self.v = (t.to(module.weight.dtype).transpose(1, 2) for t in factors)  # (B, r, out), (B, r, in)
        self.scale = scale

    def lay_out(self) -> None:
        """Order the factors in memory as single tokens need them: a step takes a third of the time then, and the copy
        takes as long as a few steps."""
        self.u, self.v = self.u.contiguous(), self.v.contiguous()

    def __call__(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        u, v = self.u.to(x.dtype), self.v.to(x.dtype)
        if not {len(u), len(v)} <= {1, len(x)}:
            raise UserError(f"{len(x)} sequences but a delta of batch {max(len(u), len(v))}; select() one per sequence")
        read = x @ v[0].t() if len(v) == 1 else torch.bmm(x, v.transpose(1, 2))  # (B, T, r)
        return torch.baddbmm(out, read, u.expand(len(x), -1, -1), alpha=self.scale)


class LogitsOf(Protocol):
    """A model that has taken something in, as a function."""

    def __call__(self, ids: Tensor, valid: Tensor | None, last: int | None = None) -> Tensor:
        """Logits (B, T, vocab) after token ids (B, T), `valid` where they are no padding; or of the `last` so many
        positions alone, (B, last, vocab)."""


def with_delta(lm: LanguageModel, delta: LowRankDelta | None) -> LogitsOf:
    """The model with a change, from a blank state."""
    return lambda ids, valid, last=None: lm(ids, None, delta, valid, last)[0]
