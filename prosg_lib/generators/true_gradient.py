"""The true gradient of what a prompt says, and how near a low-rank change is to it; no matrix is ever formed.

Of each map's weight the gradient is G = sum_t delta_t x_t^T = Delta^T X, and a change is s U V^T. What is compared is

    ||U V^T - Delta^T X||_F^2 = tr(U^T U V^T V) - 2 tr((Delta U)^T (X V)) + sum_ij (Delta Delta^T)_ij (X X^T)_ij,

where only matrices of r x r, T x r and T x T are made. (In DNI, Jaderberg et al. 2016, arXiv 1608.05343, the gradient
is an activation's, and its squared error needs no such care; that it is a weight's, in factors, is our reading.)

Glossary of shapes: B prompts, T tokens, r rank; Delta (B, T, out), X (B, T, in); U (B, out, r), V (B or 1, in, r).
"""

from __future__ import annotations

import re

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.gradient_factors import TokenFactors, best_rank, sequence_factors, spectrum
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError


def prompt_gradient(
    lm: LanguageModel, names: list[str], ids: Tensor, valid: Tensor | None = None
) -> tuple[dict[str, TokenFactors], RecurrentState]:
    """Factors of the gradient of each prompt's own NLL (a sum over its tokens, nats), and the state after the prompt.

    Args:
        names: of the maps; ids: (B, T), left-padded where `valid` (B, T) is False.
    Returns:
        By map Delta and X of the tokens that have a next one, (B, T - 1, ...), Delta zero at padding.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    after = []

    def loss() -> Tensor:
        hidden, state = lm.step_through(ids, None, valid)
        after.append(state.detach())
        losses = F.cross_entropy(lm.read_out(hidden[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * valid[:, :-1]).sum()

    found = sequence_factors(lm, names, loss)
    told = valid[:, :-1, None]
    return {n: TokenFactors(delta[:, :-1] * told, x[:, :-1]) for n, (delta, x) in found.items()}, after[0]


def squared_norm(factors: TokenFactors) -> Tensor:
    """||Delta^T X||_F^2 of each row, (B,)."""
    delta, x = factors
    return ((delta @ delta.mT) * (x @ x.mT)).sum((-2, -1))


def change_squared_norm(change: Factors) -> Tensor:
    """||U V^T||_F^2 of each row, (B,)."""
    u, v = change
    return ((u.mT @ u) * (v.mT @ v)).sum((-2, -1))


def inner_product(change: Factors, factors: TokenFactors) -> Tensor:
    """<U V^T, Delta^T X> of each row, (B,)."""
    return ((factors.grad_output @ change.U) * (factors.x @ change.V)).sum((-2, -1))


def squared_error(change: Factors, factors: TokenFactors) -> Tensor:
    """||U V^T - Delta^T X||_F^2 of each row, (B,); differentiable in U and V.

    Raises:
        UserError: other numbers of outputs or inputs than the gradient's.
    """
    if (change.U.shape[-2], change.V.shape[-2]) != (factors.grad_output.shape[-1], factors.x.shape[-1]):
        raise UserError(
            f"a change of {change.U.shape[-2]} x {change.V.shape[-2]} weights has no distance to a gradient of "
            f"{factors.grad_output.shape[-1]} x {factors.x.shape[-1]}"
        )
    return change_squared_norm(change) - 2 * inner_product(change, factors) + squared_norm(factors)


def truncated(factors: TokenFactors, rank: int) -> TokenFactors:
    """The best rank-`rank` part of a gradient, in the form of one of `rank` tokens (`best_rank`).

    Raises:
        UserError: the gradient has not so many directions.
    """
    u, v = best_rank(factors, rank)
    return TokenFactors(u.mT, v.mT)


def reading_directions(factors: TokenFactors, rank: int) -> Tensor:
    """The `rank` directions, shared by all prompts, that read the most of their gradients, (in, rank), orthonormal.

    They maximise the mean of ||G V||_F^2 / ||G||_F^2: the leading right singular vectors of the R_b X_b / ||G_b||_F,
    one below the other, where Delta_b^T = Q_b R_b, so that no G is formed.

    Raises:
        UserError: all prompts together have not so many directions.
    """
    core = torch.linalg.qr(factors.grad_output.mT)[1] @ factors.x  # (B, min(T, out), in)
    core = core / core.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    found = torch.linalg.svd(core.flatten(0, 1), full_matrices=False)[2]
    if not 1 <= rank <= len(found):
        raise UserError(f"{rank} reading directions asked for, but these gradients have 1 to {len(found)}")
    return found[:rank].mT


@torch.no_grad()
def agreement(delta: LowRankDelta, gradients: dict[str, TokenFactors]) -> pd.DataFrame:
    """How near each prompt's change is to a step down its true gradient, by map.

    Args:
        delta: one change a prompt; gradients: by map (`TEACHERS`), of the same B prompts.
    Returns:
        One row a map and prompt: prompt, map, layer, kind (the map's name in its layer), cosine (of U V^T and -G, 0
        where one of them is 0), best (the largest cosine that any change of that rank can have, Eckart-Young), reads
        (the largest with the change's own reading directions, ||G V (V^T V)^-1/2||_F / ||G||_F).
    Raises:
        UserError: a gradient is missing, or of another number of prompts.
    """
    missing = delta.factors.keys() - gradients.keys()
    if missing:
        raise UserError(f"the change has maps without a gradient to compare with: {', '.join(sorted(missing))}")
    tables = []
    for name, change in delta.factors.items():
        factors, rank = gradients[name], change.U.shape[-1]
        if len(factors.x) != delta.batch:
            raise UserError(f"{delta.batch} changes but the gradients of {len(factors.x)} prompts; give one each")
        energy = spectrum(factors).square()
        whole = energy.sum(-1).clamp(min=1e-30)
        lengths = (change_squared_norm(change).clamp(min=0) * whole).clamp(min=1e-30).sqrt()
        along = TokenFactors(factors.grad_output, factors.x @ torch.linalg.qr(change.V)[0])
        number, layer, kind = len(whole), *_place(name)
        tables.append(
            pd.DataFrame(
                {
                    "prompt": range(number),
                    "map": name,
                    "layer": layer,
                    "kind": kind,
                    "cosine": _list(-inner_product(change, factors) / lengths),
                    "best": _list((energy[:, :rank].sum(-1) / whole).sqrt()),
                    "reads": _list((squared_norm(along) / whole).clamp(min=0).sqrt()),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _list(values: Tensor) -> list[float]:
    return values.double().cpu().tolist()


def _place(name: str) -> tuple[int, str]:
    """Number of a map's layer, and its name there; -1 where the name has no number."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (-1, name)
