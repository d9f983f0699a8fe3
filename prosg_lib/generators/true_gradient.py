"""The true gradient of a prompt's own loss, and how close a low-rank change is to it; no matrix is formed.

The gradient of a map's weight is G = sum_t g_t x_t^T = Gamma^T X, and a change of it is U V^T. Their distance is

    ||U V^T - Gamma^T X||_F^2
        = tr(U^T U V^T V) - 2 tr((Gamma U)^T (X V)) + sum_ij (Gamma Gamma^T)_ij (X X^T)_ij,

which needs products of r x r, T x r and T x T only. (DNI, Jaderberg et al. 2016, arXiv 1608.05343, compares gradients
of activations, where this is not needed; comparing those of weights, in factors, is our reading.)

Glossary of shapes: B prompts, T tokens, r rank; Gamma (B, T, out), X (B, T, in); U (B, out, r), V (B or 1, in, r).
"""

from __future__ import annotations

import re

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.gradient_factors import TokenFactors, sequence_factors, spectrum
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError


def prompt_gradient(
    lm: LanguageModel, names: list[str], ids: Tensor, valid: Tensor | None = None
) -> tuple[dict[str, TokenFactors], RecurrentState]:
    """Factors of the gradient of each prompt's own NLL (summed over its tokens, nats), and the state after the prompt.

    Args:
        names: of the maps.
        ids: (B, T), left-padded where `valid` (B, T) is False.
    Returns:
        map -> Gamma and X of the tokens that have a next one, (B, T - 1, ...); Gamma is zero at padding.
    """
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    states = []

    def loss() -> Tensor:
        hidden, state = lm.step_through(ids, None, valid)
        states.append(state.detach())
        losses = F.cross_entropy(lm.read_out(hidden[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * valid[:, :-1]).sum()

    found, mask = sequence_factors(lm, names, loss), valid[:, :-1, None]
    return {n: TokenFactors(g[:, :-1] * mask, x[:, :-1]) for n, (g, x) in found.items()}, states[0]


def squared_norm(factors: TokenFactors) -> Tensor:
    """||G||_F^2 of each prompt, (B,)."""
    g, x = factors
    return ((g @ g.mT) * (x @ x.mT)).sum((-2, -1))


def change_squared_norm(change: Factors) -> Tensor:
    """||U V^T||_F^2 of each prompt, (B,)."""
    u, v = change
    return ((u.mT @ u) * (v.mT @ v)).sum((-2, -1))


def inner_product(change: Factors, factors: TokenFactors) -> Tensor:
    """<U V^T, G> of each prompt, (B,)."""
    return ((factors.grad_output @ change.U) * (factors.x @ change.V)).sum((-2, -1))


def squared_error(change: Factors, factors: TokenFactors) -> Tensor:
    """||U V^T - G||_F^2 of each prompt, (B,); differentiable in U and V."""
    return change_squared_norm(change) - 2 * inner_product(change, factors) + squared_norm(factors)


def reading_directions(factors: TokenFactors, rank: int) -> Tensor:
    """The `rank` orthonormal directions, shared by all prompts, that read the most of their gradients, (in, rank).

    They maximise the mean of ||G V||_F^2 / ||G||_F^2: the leading right singular vectors of all R_b X_b / ||G_b||_F,
    stacked, with Gamma_b^T = Q_b R_b. No G is formed.

    Raises:
        UserError: the gradients of all prompts together have fewer directions.
    """
    core = torch.linalg.qr(factors.grad_output.mT)[1] @ factors.x  # (B, min(T, out), in)
    core = core / core.flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None]
    found = torch.linalg.svd(core.flatten(0, 1), full_matrices=False)[2]
    if not 1 <= rank <= len(found):
        raise UserError(f"{rank} reading directions asked for, but these gradients have 1 to {len(found)}")
    return found[:rank].mT


@torch.no_grad()
def agreement(delta: LowRankDelta, gradients: dict[str, TokenFactors]) -> pd.DataFrame:
    """How close each prompt's change is to a step down its true gradient, by map.

    Args:
        delta: one change per prompt.
        gradients: map -> the gradients of the same B prompts.
    Returns:
        One row per map and prompt: prompt, map, layer (-1 where the name has no number), kind (the map's name within
        its layer), cosine (of U V^T and -G, 0 where either is 0), best (the largest cosine that any change of that rank
        can have, Eckart-Young), reads (the largest with this V, ||G V (V^T V)^-1/2||_F / ||G||_F).
    Raises:
        UserError: a gradient is missing, or of another number of prompts.
    """
    missing = delta.factors.keys() - gradients.keys()
    if missing:
        raise UserError(f"there is no gradient to compare with for these maps: {', '.join(sorted(missing))}")
    tables = []
    for name, change in delta.factors.items():
        factors, rank = gradients[name], change.U.shape[-1]
        if len(factors.x) != delta.batch:
            raise UserError(f"{delta.batch} changes but the gradients of {len(factors.x)} prompts; give one each")
        energy = spectrum(factors).square()
        total = energy.sum(-1).clamp(min=1e-30)
        lengths = (change_squared_norm(change).clamp(min=0) * total).clamp(min=1e-30).sqrt()
        along = TokenFactors(factors.grad_output, factors.x @ torch.linalg.qr(change.V)[0])
        columns = {
            "cosine": -inner_product(change, factors) / lengths,
            "best": (energy[:, :rank].sum(-1) / total).sqrt(),
            "reads": (squared_norm(along) / total).clamp(min=0).sqrt(),
        }
        numbered = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        layer, kind = (int(numbered[1]), numbered[2]) if numbered else (-1, name)
        place = {"prompt": range(len(total)), "map": name, "layer": layer, "kind": kind}
        tables.append(pd.DataFrame(place | {n: c.double().cpu().tolist() for n, c in columns.items()}))
    return pd.concat(tables, ignore_index=True)
