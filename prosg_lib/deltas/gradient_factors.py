"""The gradient of a linear map as a sum over tokens, its spectrum, and its best approximation of rank r."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prosg_lib.errors import UserError

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel


@contextmanager
def captured_inputs(lm: LanguageModel, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, what is read leaves the inputs x of the named maps, (B, T, in), in the dict it yields.

    T: all tokens read, one piece after the other, because some models read a batch in pieces.
    """
    inputs: dict[str, Tensor] = {}
    maps = lm.editable()

    def keep(name):
        def hook(module, args):
            inputs[name] = torch.cat([inputs[name], args[0]], 1) if name in inputs else args[0]

        return hook

    handles = [maps[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(lm: LanguageModel, names: Iterable[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """While it lasts, what is read leaves the inputs and outputs of the named maps in the dict it yields: name -> a
    pair (B, T, in), (B, T, out) for each pass, of which there are several where a text is read in pieces.

    Outputs can be differentiated by, also where all weights are frozen.
    """
    passes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name):
        def hook(module, args, out):
            out = out if out.requires_grad else out.detach().requires_grad_()  # the graph has to start somewhere
            passes[name].append((args[0], out))
            return out

        return hook

    maps = lm.editable()
    handles = [maps[name].register_forward_hook(keep(name)) for name in passes]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


class TokenFactors(NamedTuple):
    """A gradient as a sum over tokens, G = delta^T x: delta (..., tokens, out), x (..., tokens, in)."""

    delta: Tensor
    x: Tensor


def sequence_factors(lm: LanguageModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """Per-token factors of the weight gradient of each named map, from one backward pass, one row a sequence.

    Args:
        names: editable maps.
        loss_of: runs the model's forward pass and returns a scalar loss.
    Returns:
        name -> TokenFactors, delta (B, T, out) and x (B, T, in), T being all tokens that were read. Where the loss is a
        sum over sequences, a row's product delta.T @ x is the gradient of that sequence's own loss.
    """
    with torch.enable_grad(), watched(lm, names) as passes:
        loss = loss_of()
    seen = {name: tuple(each) for name, each in passes.items()}  # blocks that are run again add to `passes`
    grads = iter(torch.autograd.grad(loss, [out for name in names for _, out in seen[name]]))
    return {
        name: TokenFactors(
            torch.cat([next(grads) for _ in seen[name]], 1).detach(),
            torch.cat([x for x, _ in seen[name]], 1).detach(),
        )
        for name in names
    }


def gradient_factors(lm: LanguageModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """As `sequence_factors`, of the whole batch at once: delta (B T, out), x (B T, in); delta.T @ x equals the
    weight's gradient."""
    found = sequence_factors(lm, names, loss_of)
    return {name: TokenFactors(*(t.flatten(0, 1) for t in factors)) for name, factors in found.items()}


def spectrum(factors: TokenFactors) -> Tensor:
    """Singular values of G = delta^T x, largest first, (..., min(tokens, in, out)), without forming G."""
    return _thin_svd(factors)[1]


def best_rank(factors: TokenFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of G = delta^T x, without forming G (Eckart-Young).

    Returns:
        U (..., out, rank), V (..., in, rank) with U V^T the truncated SVD of G.
    Raises:
        UserError: rank is not in 1 .. min(tokens, out, in); the gradient has no more directions than that.
    """
    u, s, v = _thin_svd(factors)
    if not 1 <= rank <= s.shape[-1]:
        raise UserError(f"rank {rank} asked for, but this gradient has 1 to {s.shape[-1]} directions")
    root = s[..., None, :rank].sqrt()
    return u[..., :rank] * root, v[..., :rank] * root


def _thin_svd(factors: TokenFactors) -> tuple[Tensor, Tensor, Tensor]:
    """delta^T = Q_d R_d and x^T = Q_x R_x, so G = Q_d (R_d R_x^T) Q_x^T: the SVD of a core no larger than tokens."""
    delta, x = factors
    if delta.shape[-2] != x.shape[-2]:
        raise UserError(f"{delta.shape[-2]} rows of delta but {x.shape[-2]} of x; one of each per token")
    q_d, r_d = torch.linalg.qr(delta.mT)
    q_x, r_x = torch.linalg.qr(x.mT)
    u, s, vt = torch.linalg.svd(r_d @ r_x.mT, full_matrices=False)
    return q_d @ u, s, q_x @ vt.mT
