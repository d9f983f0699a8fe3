"""The WKV recurrence of RWKV-4: step by step, which is the reference, and chunk-parallel over time.

Glossary of shapes: B batch, T time, D channels, C chunk length, n = T / C chunks, R the chunks of all sequences.

For every channel on its own (RWKV-4, "Reinventing RNNs for the Transformer Era", eq. 16)::

    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same sum with v = 1)

The recurrence carries numerator and denominator. Both can be as large as e^80, so they are kept relative to a
common factor e^m ("the gauge"): the pair (num, den) stands for (num e^m, den e^m), and any m is right.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prosg_lib.backbones.overridable import overridable
from prosg_lib.backbones.state import state_dtype

BLANK = -1e38
"""Gauge of a state that has seen nothing: e^BLANK is zero in every dtype, and BLANK stays finite, unlike -inf."""

CHUNK = 32
"""Chunk length: a T x T sum per channel becomes T / 32 sums of 32 x 32; 32 and 64 were fastest on a CPU."""

# Within one gauge, e^{k - m} must not underflow, nor 1 / den^2 (second derivatives) overflow. Largest spread of the
# keys for which that holds; wider ones are computed in float64, and wider still step by step.
_SPREAD = {torch.float32: 40.0, torch.float64: 300.0}

# Ages, in units of the decay, after which a token no longer counts: beside the current token, whose weight is at least
# e^{-_SPREAD}, it vanishes in rounding.
_FADED = {torch.float32: 70.0, torch.float64: 600.0}


class WKVState(NamedTuple):
    """What the recurrence remembers, (B, D) each: sums num e^m over the values, den e^m over the weights."""

    num: Tensor
    den: Tensor
    m: Tensor


def wkv(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None, valid: Tensor | None = None
) -> tuple[Tensor, WKVState]:
    """WKV in the dtype of k, by sums in float32 or above: a single token step by step, several in chunks.

    Arguments and results as in `wkv_recurrent`.
    """
    dtype, form = state_dtype(k), wkv_recurrent if k.shape[1] == 1 else wkv_chunked
    with torch.autocast(k.device.type, enabled=False):  # sums over many tokens need the digits
        out, state = form(w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype), state, valid)
    return out.to(k.dtype), state


def wkv_recurrent(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None, valid: Tensor | None = None
) -> tuple[Tensor, WKVState]:
    """The recurrence as written, one token after the other: the reference, and the path for single tokens.

    Accumulates in float64: next to a key of 80, float32 would round a decay of 1e-3 away.

    Args:
        w: decay per step, > 0, (D,).
        u: bonus of the current token, (D,).
        k, v: keys and values, (B, T, D).
        state: what came before; None for nothing.
        valid: (B, T), False at left padding, which the state must not see.
    Returns:
        wkv (B, T, D), zero where not valid, and the state after the last token.
    """
    dtype = k.dtype
    if state is None:
        zeros = torch.zeros_like(k[:, 0])
        state = WKVState(zeros, zeros, torch.full_like(zeros, BLANK))
    w, u, k, v, num, den, m = (x.double() for x in (w, u, k, v, *state))
    outputs = []
    for t in range(k.shape[1]):
        kt, vt = k[:, t], v[:, t]
        top = torch.maximum(m, u + kt).detach()
        past, now = torch.exp(m - top), torch.exp(u + kt - top)
        out = (past * num + now * vt) / (past * den + now)
        top = torch.maximum(m - w, kt).detach()
        past, now = torch.exp(m - w - top), torch.exp(kt - top)
        new = WKVState(past * num + now * vt, past * den + now, top)
        if valid is not None:
            keep = valid[:, t, None]
            out = torch.where(keep, out, 0.0)
            new = WKVState(*(torch.where(keep, a, b) for a, b in zip(new, (num, den, m), strict=True)))
        outputs.append(out.to(dtype))
        num, den, m = new
    return torch.stack(outputs, 1), WKVState(num.to(dtype), den.to(dtype), m.to(dtype))


def wkv_chunked(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: WKVState | None = None,
    valid: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, WKVState]:
    """The same sums for all times at once: causal convolutions, one small Toeplitz matrix product a channel.

    Arguments and results as in `wkv_recurrent`. Exact for every length. Where the keys spread too wide for one gauge in
    the given dtype, the sums are taken in float64, or step by step (`_SPREAD`).
    """
    lowest = (k if valid is None else k.masked_fill(~valid[..., None], torch.inf)).amin(1)
    k = k if valid is None else k.masked_fill(~valid[..., None], BLANK)
    gauge = k.amax(1)
    if state is not None:
        gauge = torch.maximum(gauge, state.m)
    gauge = gauge.detach()
    spread = _item((gauge - torch.minimum(lowest, gauge) + torch.relu(-u)).detach().amax())
    if not spread <= _SPREAD[torch.float64]:
        return wkv_recurrent(w, u, k, v, state, valid)
    if spread <= _SPREAD.get(k.dtype, -1.0):
        return _in_one_gauge(w, u, k, v, state, valid, gauge, chunk)
    double = None if state is None else WKVState(*(x.double() for x in state))
    wide = (x.double() for x in (w, u, k, v))
    out, end = _in_one_gauge(*wide, double, valid, gauge.double(), chunk)
    return out.to(k.dtype), WKVState(*(x.to(k.dtype) for x in end))


def _item(spread: Tensor) -> float:
    """The number; under torch.func's vmap, which has many at once, the largest spread that float64 has room for."""
    try:
        return spread.item()
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return _SPREAD[torch.float64]


def _in_one_gauge(w, u, k, v, state, valid, gauge, chunk) -> tuple[Tensor, WKVState]:
    """Numerator and denominator for the whole sequence in one gauge, so that no maximum has to be carried along.

    Works on (D, ..., T): every channel is then one matrix in a batched product, and nothing else is transposed.
    """
    batch, time, width = k.shape
    k, v = _channels_first(k), _channels_first(v)  # (D, B, T)
    w, gauge = w[:, None, None], gauge.t()  # (D, 1, 1), (D, B)
    weight = torch.exp(k - gauge[..., None])
    if valid is not None:
        weight = weight * valid
    past = None
    if state is not None:
        start = torch.stack([state.num.t(), state.den.t()], 1) * torch.exp(state.m.t() - gauge)[:, None]  # (D, 2, B)
        seen = torch.ones(1, time, device=k.device) if valid is None else valid.to(k.dtype)
        age = seen.cumsum(1) - seen  # tokens since the given state
        past = start[..., None] * _faded(w * age)[:, None]
    at_end, decays = _decays(w, u, min(chunk, time), time)
    out, end = weighted_means(weight, v, past, valid, at_end, decays)
    if state is not None:
        end = end + start * _faded(w * seen.sum(1, keepdim=True).t())
    out = out.view(width, -1).t().contiguous().view(batch, time, width)

    # Carry the state with den = 1, so that its gauge follows what is remembered now and not the largest key ever.
    num, den = (x.t() for x in end.unbind(1))
    size = torch.where(den > 0, den, 1.0).detach()
    m = torch.where(den > 0, gauge.t() + torch.log(size), BLANK).detach()
    return out, WKVState(num / size, den / size, m)


def _channels_first(x: Tensor) -> Tensor:
    batch, time, width = x.shape
    return x.reshape(batch * time, width).t().contiguous().view(width, batch, time)


class Decays(NamedTuple):
    """How much of a number is left at another place.

    Attributes:
        within: of place i at place t of the same chunk, (D, C, C).
        total: of a chunk's places in the total at its end, (D, 1, C).
        over: of a chunk's total at the beginning of another, (D, n, n).
        since: of what there was at a chunk's beginning at its places, (D, 1, C).
    """

    within: Tensor
    total: Tensor
    over: Tensor
    since: Tensor

    def transposed(self) -> Decays:
        """Those of the transposed map, by which gradients of the sums flow back."""
        return Decays(self.within.mT, self.since, self.over.mT, self.total)


@overridable
def weighted_means(
    weight: Tensor, v: Tensor, past: Tensor | None, valid: Tensor | None, at_end: Tensor, decays: Decays
) -> tuple[Tensor, Tensor]:
    """The decayed sums of weight v, divided by those of `weight`: wkv.

    Args:
        weight, v: (D, B, T).
        past: what an earlier state adds to both sums, (D, 2, B, T).
        valid: (B, T); elsewhere the mean is zero.
        at_end: what is left of each chunk's total after T, (D, 1, n).
    Returns:
        the means (D, B, T), and both sums after T, without the past, (D, 2, B).
    """
    sums, totals, _ = decayed_sums(torch.stack([weight * v, weight], 1), decays)
    num, den = (sums if past is None else sums + past).unbind(1)
    if valid is not None:  # cut before dividing: 0/0 at a padded position would poison every gradient
        num, den = num * valid, torch.where(valid, den, 1.0)
    return num / den, torch.bmm(totals, at_end.mT).view(sums.shape[:-1])


def decayed_sums(x: Tensor, decays: Decays) -> tuple[Tensor, Tensor, Tensor]:
    """x (D, ..., T) -> y_t = sum_{i<t} e^{-(t-1-i) w} x_i + e^u x_t, same shape.

    The same thing on two levels: inside chunks, then over the chunks' totals, which decay by e^{-C w}. The totals, and
    what each chunk finds at its beginning, (D, R / n, n), are returned with the sums.
    """
    rows = in_chunks(x, decays)
    totals, found = chunk_totals(rows, decays)
    sums = torch.bmm(rows, decays.within).add_(torch.bmm(found.view(len(x), -1, 1), decays.since))
    return out_of_chunks(sums, x), totals, found


def chunk_totals(rows: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """Of chunks (D, R, C), the totals, and what each chunk finds of those before it, (D, R / n, n)."""
    totals = torch.bmm(rows, decays.total.mT).view(len(rows), -1, decays.over.shape[1])
    return totals, torch.bmm(totals, decays.over)


def in_chunks(x: Tensor, decays: Decays) -> Tensor:
    """x (D, ..., T) -> (D, R, C), one chunk a row; the first of each sequence is filled up with zeros."""
    chunk = decays.within.shape[-1]
    missing = -x.shape[-1] % chunk
    return (torch.nn.functional.pad(x, (missing, 0)) if missing else x).reshape(len(x), -1, chunk)


def out_of_chunks(rows: Tensor, x: Tensor) -> Tensor:
    """The inverse of `in_chunks`: rows (D, R, C) in the shape of x, without what was filled up."""
    return rows.view(*x.shape[:-1], -1)[..., -x.shape[-1] :]


def _decays(w: Tensor, u: Tensor, chunk: int, time: int) -> tuple[Tensor, Decays]:
    """For w (D, 1, 1) and u (D,): what is left of the totals after the last chunk, (D, 1, n), and all others."""
    fine, coarse = _powers(w, chunk), _powers(chunk * w, -(-time // chunk))
    decays = Decays(_toeplitz(fine, torch.exp(u)), fine.flip(-1), _toeplitz(coarse, None), fine)
    return coarse.flip(-1), decays


def _powers(w: Tensor, length: int) -> Tensor:
    """e^{-a w} for the ages a = 0, 1, ...: (D, 1, length)."""
    return _faded(w * torch.arange(length, device=w.device))


def _toeplitz(powers: Tensor, bonus: Tensor | None) -> Tensor:
    """(D, length, length): column t weighs position i < t by e^{-(t-1-i) w}, i = t by the bonus (None: 0)."""
    length = powers.shape[-1]
    none = torch.zeros_like(powers)
    now = none[..., :1] if bonus is None else bonus[:, None, None]
    by_lag = torch.cat([none[..., 1:], now, powers[..., :-1]], -1)[:, 0]  # t - i from 1 - length to length - 1
    return by_lag.unfold(-1, length, 1).flip(-2)


def _faded(age: Tensor) -> Tensor:
    """e^{-age}, and 0 where that no longer matters: processors are many times slower on denormal numbers."""
    return torch.where(age < _FADED[age.dtype], torch.exp(-age), 0.0)
