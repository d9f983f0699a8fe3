"""The gradient of a linear map as a sum over tokens, its spectrum, and its best approximation of rank r.

The gradient of the weight is a sum of outer products, one per token: G = sum_t g_t x_t^T, with x_t the map's input and
g_t the gradient at its output. Everything here works on these two factors and never forms G.

Glossary of shapes: B batch, T tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from prosg_lib.deltas.applying import as_written
from prosg_lib.deltas.low_rank import EditableModel
from prosg_lib.errors import UserError


@contextmanager
def captured_inputs(lm: EditableModel, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs x of the named maps, (B, T, in), in the dict that it yields.

    T counts all tokens read while the context lasts; passes are concatenated, because some models read in pieces.
    """
    inputs: dict[str, Tensor] = {}
    maps = lm.editable()

    def keep(name):
        def hook(module, args):
            inputs[name] = torch.cat([inputs[name], args[0]], 1) if name in inputs else args[0]

        return hook

    with as_written(), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(maps[name].register_forward_pre_hook(keep(name)))
        yield inputs


@contextmanager
def captured_passes(lm: EditableModel, names: Iterable[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Collect inputs and outputs of the named maps in the dict that it yields: name -> a pair (B, T, in), (B, T, out)
    for each forward pass, of which there are several where a text is read in pieces.

    The outputs are part of the graph even where all weights are frozen, so a loss can be differentiated by them.
    """
    passes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name):
        def hook(module, args, out):
            out = out if out.requires_grad else out.detach().requires_grad_()  # the graph has to start somewhere
            passes[name].append((args[0], out))
            return out

        return hook

    maps = lm.editable()
    with as_written(), ExitStack() as hooks:
        for name in passes:
            hooks.enter_context(maps[name].register_forward_hook(keep(name)))
        yield passes


class TokenFactors(NamedTuple):
    """A gradient as a sum over tokens, G = grad_output^T x: grad_output (..., T, out), x (..., T, in)."""

    grad_output: Tensor
    x: Tensor


def sequence_factors(lm: EditableModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """Per-token factors of the weight gradient of each named map, sequence by sequence, from one backward pass.

    Args:
        names: editable maps.
        loss_of: runs the model's forward pass and returns a scalar loss.
    Returns:
        name -> TokenFactors (B, T, ...), T being all tokens that were read. Where the loss is a sum over sequences,
        grad_output[b].T @ x[b] is the gradient of sequence b's own loss.
    """
    with torch.enable_grad(), captured_passes(lm, names) as passes:
        loss = loss_of()
    seen = {name: tuple(each) for name, each in passes.items()}  # recomputed blocks add to `passes` in the backward
    grads = iter(torch.autograd.grad(loss, [out for name in names for _, out in seen[name]]))
    return {
        name: TokenFactors(
            torch.cat([next(grads) for _ in seen[name]], 1).detach(),
            torch.cat([x for x, _ in seen[name]], 1).detach(),
        )
        for name in names
    }


def gradient_factors(lm: EditableModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """`sequence_factors` of the whole batch at once, (B T, ...): grad_output.T @ x is the weight's gradient."""
    found = sequence_factors(lm, names, loss_of)
    return {name: TokenFactors(*(t.flatten(0, 1) for t in factors)) for name, factors in found.items()}


def spectrum(factors: TokenFactors) -> Tensor:
    """Singular values of G, largest first, (..., min(T, in, out))."""
    return _thin_svd(factors)[1]


def best_rank(factors: TokenFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of G (Eckart-Young).

    Returns:
        U (..., out, rank), V (..., in, rank) with U V^T the truncated SVD of G.
    Raises:
        UserError: rank is not in 1 .. min(T, out, in); the gradient has no more directions than that.
    """
    u, s, v = _thin_svd(factors)
    if not 1 <= rank <= s.shape[-1]:
        raise UserError(f"rank {rank} is not possible: this gradient has {s.shape[-1]} directions; choose 1 to that")
    root = s[..., None, :rank].sqrt()
    return u[..., :rank] * root, v[..., :rank] * root


def _thin_svd(factors: TokenFactors) -> tuple[Tensor, Tensor, Tensor]:
    """g^T = Q_g R_g and x^T = Q_x R_x, so G = Q_g (R_g R_x^T) Q_x^T: the SVD of a core of at most T x T."""
    g, x = factors
    if g.shape[-2] != x.shape[-2]:
        raise UserError(f"{g.shape[-2]} rows of grad_output but {x.shape[-2]} of x; both need one row per token")
    q_g, r_g = torch.linalg.qr(g.mT)
    q_x, r_x = torch.linalg.qr(x.mT)
    u, s, vt = torch.linalg.svd(r_g @ r_x.mT, full_matrices=False)
    return q_g @ u, s, q_x @ vt.mT
