"""The recurrence of RWKV-7, a generalised delta rule: token by token, which is the reference, and chunk-parallel.

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456. Every head keeps a
matrix S that maps keys to values. Each token decays it, removes what it holds under one key, and writes a value under
another::

    S_t = S_{t-1} diag(e^{w_t}) - (S_{t-1} kappa_t) (a_t * kappa_t)^T + v_t k_t^T,        y_t = S_t r_t

Glossary of shapes: B batch, T time, H heads, N head size, C chunk length, n = T / C chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 32
"""Chunk length: short enough for its decays (below), long enough that the loop over chunks is short."""


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence for any number of tokens: a single one step by step, several in chunks. See `wkv7_recurrent`."""
    form = wkv7_recurrent if k.shape[1] == 1 else wkv7_chunked
    with torch.autocast(k.device.type, enabled=False):  # sums over many tokens need the digits
        return form(r, w, k, v, kappa, a, state, valid)


def wkv7_recurrent(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token after the other: the reference, and the path for single tokens.

    Args:
        r: where to read, (B, T, H, N), as all of these.
        w: log of the decay, from -e^{-1/2} to 0: RWKV-7 has w = -e^{-1/2} sigmoid(...).
        k, v: key and value that are written.
        kappa: the key whose value is removed, of length 1.
        a: how much of it is removed, 0 to 1.
        state: S before the first token, rows of values and columns of keys, (B, H, N, N); None for zero.
        valid: (B, T), False at left padding, which the state must not see.
    Returns:
        y (B, T, H, N), zero where not valid, and S after the last token, (B, H, N, N).
    """
    r, w, k, v, kappa, a = _nothing_at_padding((r, w, k, v, kappa, a), valid)
    s = _blank(k) if state is None else state
    decay, back, outputs = torch.exp(w), a * kappa, []
    for t in range(k.shape[1]):
        held = s @ kappa[:, t, :, :, None]  # (B, H, N, 1)
        s = s * decay[:, t, :, None] - held * back[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        outputs.append((s @ r[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1), s


def wkv7_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    valid: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same in matrix products over chunks; only the state goes from chunk to chunk in a loop.

    Arguments and results as in `wkv7_recurrent`. Let u_t = S_{t-1} kappa_t be what is removed at t, and e^{G_t} the
    decay from the chunk's start S_0 to after t. Then, with products and quotients channel by channel,

        S_t = S_0 e^{G_t} + sum_{i<=t} (v_i k_i^T - u_i (a_i kappa_i)^T) e^{G_t - G_i},

    and u_t = S_{t-1} kappa_t is a triangular system in the chunk's u (as in Yang et al. 2024, "Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length"). e^{G_t - G_i} is never above 1, but in a matrix product it
    is one factor for t times one for i. Taken relative to the middle of the chunk, e^{G_C / 2}, both lie within
    e^{±C/2 e^{-1/2}}, that is e^{±10} for C = 32: none overflows, none is lost.
    """
    time, size = k.shape[1], k.shape[3]
    chunk = min(chunk, time)
    s = (_blank(k) if state is None else state).mT  # keys x values
    parts = _nothing_at_padding((r, w, k, v, kappa, a), valid)
    r, w, k, v, kappa, a = (_in_chunks(x, chunk) for x in parts)  # (B, H, n, C, N)
    grown = w.cumsum(-2)
    middle = grown[..., -1:, :] / 2
    early, late = torch.exp(middle - grown), torch.exp(grown - middle)
    k, back, r = k * early, a * kappa * early, r * late
    kappa = kappa * torch.exp(grown - w - middle)  # u_t reads before t fades anything

    # What every token reads of what every token of its chunk wrote, or removed; later ones are cut off.
    written, taken = (torch.cat([kappa, r], -2) @ x.mT for x in (k, back))  # (B, H, n, 2 C, C)
    u_written, u_taken = written[..., :chunk, :].tril(-1), taken[..., :chunk, :].tril(-1)
    y_written, y_taken = written[..., chunk:, :].tril(), taken[..., chunk:, :].tril()

    # (1 + u_taken) u = kappa S + u_written v: solved for all chunks at once, before S is known.
    right = torch.cat([kappa, u_written @ v], -1)
    of_state, of_values = torch.linalg.solve_triangular(u_taken, right, upper=False, unitriangular=True).split(size, -1)

    starts, u = [], []
    steps = (torch.exp(middle).mT, of_state, of_values, k.mT @ v, back.mT)
    for half, reads, fixed, added, removes in zip(*(x.unbind(2) for x in steps), strict=True):
        s = half * s
        starts.append(s)
        u.append(fixed + reads @ s)
        s = half * (s + added - removes @ u[-1])
    y = r @ torch.stack(starts, 2) + y_written @ v - y_taken @ torch.stack(u, 2)
    return y.flatten(2, 3)[:, :, -time:].transpose(1, 2), s.mT


def _nothing_at_padding(tensors: Iterable[Tensor], valid: Tensor | None) -> Iterable[Tensor]:
    """Zeros where not valid: such a token decays nothing, removes nothing, writes nothing and reads nothing."""
    return tensors if valid is None else [x.masked_fill(~valid[..., None, None], 0.0) for x in tensors]


def _blank(k: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], *k.shape[2:], k.shape[3])


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, N) -> (B, H, n, C, N), the first chunk padded in front with tokens that do nothing."""
    x = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, -x.shape[1] % chunk, 0))
    return x.unflatten(2, (-1, chunk))
