"""Apply a low-rank delta while a model runs, without writing its weights: y = x W^T + scale (x V) U^T."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from prosg_lib.deltas.low_rank import EditableModel, Factors, LowRankDelta, changed_maps
from prosg_lib.errors import UserError


def applied(lm: EditableModel, delta: LowRankDelta | None) -> AbstractContextManager[None]:
    """A context in which every map that the delta names computes y = x W^T + scale (x V) U^T.

    The delta is checked and prepared once, here. The context may be entered again and again, as generation does at
    every step.

    Raises:
        UserError: the delta was made for another model, or names a map that this model does not have.
    """
    return nullcontext() if delta is None else _Applied(changed_maps(lm, delta), delta)


def as_written() -> AbstractContextManager[None]:
    """A context in which every module runs as it is written, also where `torch.compile` compiled it: compiled code
    ignores the hooks that are added to a module later.

    Raises:
        UserError: compiled code is running already.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return nullcontext()
    with suppress(RuntimeError):  # PyTorch's own, where compiled code is running
        if not torch.compiler.is_compiling():
            return torch.compiler.set_stance("force_eager")
    raise UserError(
        "a model that torch.compile runs ignores changes of its weights; "
        'call it inside of `with torch.compiler.set_stance("force_eager"):`'
    )


class _Applied(AbstractContextManager):
    def __init__(self, maps: dict[str, nn.Module], delta: LowRankDelta):
        self._hooks = [(maps[name], _AddDelta(f, delta.scale, maps[name])) for name, f in delta.factors.items()]
        self._handles = None

    def __enter__(self) -> None:
        if self._handles is not None:  # entered a second time, so probably many more times
            for _, hook in self._hooks:
                hook.make_contiguous()
        self._as_written = as_written()
        self._as_written.__enter__()
        self._handles = [module.register_forward_hook(hook) for module, hook in self._hooks]

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        self._as_written.__exit__(*error)


class _AddDelta:
    """Forward hook of a linear map that adds scale (x V) U^T to its output."""

    def __init__(self, factors: Factors, scale: float, module: nn.Module):
        self.u, self.v = (t.to(module.weight).transpose(1, 2) for t in factors)  # (B, r, out), (B, r, in)
        self.scale = scale

    def make_contiguous(self) -> None:
        """Copy the factors into the order that single tokens read them in.

        A decoding step then takes a third of the time; the copy itself costs as much as a few steps.
        """
        self.u, self.v = self.u.contiguous(), self.v.contiguous()

    def __call__(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        u, v = self.u.to(x.dtype), self.v.to(x.dtype)
        if not {len(u), len(v)} <= {1, len(x)}:
            raise UserError(f"{len(x)} sequences but a delta of batch {max(len(u), len(v))}; select() one per sequence")
        read = x @ v[0].t() if len(v) == 1 else torch.bmm(x, v.transpose(1, 2))  # (B, T, r)
        return torch.baddbmm(out, read, u.expand(len(x), -1, -1), alpha=self.scale)


class LogitsOf(Protocol):
    """A model with its context already taken in, as a function of the tokens that follow."""

    def __call__(self, ids: Tensor, valid: Tensor | None, last: int | None = None) -> Tensor:
        """Logits (B, T, vocab) for token ids (B, T), whose left padding is where `valid` is False; with `last`, only
        those of so many final positions, (B, last, vocab)."""


def with_delta(lm: Callable[..., tuple[Tensor, object]], delta: LowRankDelta | None) -> LogitsOf:
    """The model under a delta, reading from a blank state."""
    return lambda ids, valid, last=None: lm(ids, None, delta, valid, last)[0]
