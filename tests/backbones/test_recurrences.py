"""The chunk-parallel forms of RWKV-4's and RWKV-7's recurrences are the step-by-step ones: outputs, states, first and
second derivatives, whatever goes in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize
from torch.testing import assert_close

from prosg_lib.backbones import wkv as module
from prosg_lib.backbones.wkv import BLANK, WKVState, wkv_chunked, wkv_recurrent
from prosg_lib.backbones.wkv7 import wkv7_chunked, wkv7_recurrent

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
GIVEN = pytest.mark.parametrize("given_state", [False, True])


class WKV:
    """RWKV-4: w and u (D,), k and v (B, T, D), and num, den, m (B, D) of a given state."""

    forms = (wkv_recurrent, wkv_chunked)
    per_token, state = slice(2, 4), slice(4, None)
    exact = 1e-10

    @staticmethod
    def inputs(time, dtype=torch.float64, *, batch=2, size=4, keys=2.0, seed=0, given=False):
        """w from 1e-3 to 20 over the channels, keys uniform in ±keys."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1

        w = torch.logspace(-3, torch.tensor(20.0).log10().item(), size, dtype=torch.float64)
        tensors = [w, draw(size), keys * draw(batch, time, size), draw(batch, time, size)]
        if given:
            tensors += [draw(batch, size), draw(batch, size).abs() + 0.1, keys * draw(batch, size)]
        return [t.to(dtype).requires_grad_() for t in tensors]

    @staticmethod
    def run(form, tensors, valid=None, **chunk):
        """Outputs, and of the end state what does not depend on the gauge: weighted mean, log of the weight."""
        out, end = form(*tensors[:4], WKVState(*tensors[4:]) if tensors[4:] else None, valid, **chunk)
        seen = end.den > 0
        den = torch.where(seen, end.den, 1.0)
        return out, torch.where(seen, end.num / den, 0.0), torch.where(seen, den.log() + end.m, 0.0)

    @staticmethod
    def definition(tensors):
        """RWKV-4 paper, eq. 16, as two loops; a state that is given is one more token, e^-w older than the first."""
        w, u, k, v, num, den, m = (t.detach() for t in tensors)
        out = torch.zeros_like(v)
        for t in range(k.shape[1]):
            old = torch.exp(m - t * w)
            weights = [torch.exp(-(t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
            above = sum((a * v[:, i] for i, a in enumerate(weights)), old * num)
            out[:, t] = above / sum(weights, old * den)
        return (out,)


class WKV7:
    """RWKV-7: r, w, k, v, kappa and a (B, T, H, N), and a given state (B, H, N, N)."""

    forms = (wkv7_recurrent, wkv7_chunked)
    per_token, state = slice(0, 6), slice(6, None)
    exact = 1e-9

    @staticmethod
    def inputs(time, dtype=torch.float64, *, batch=2, heads=2, size=5, seed=0, given=False):
        """As RWKV-7 makes them: decays from hardly any to the fastest, keys of length 1."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=g, dtype=torch.float64)

        r, k, v, kappa = draw(4, batch, time, heads, size)
        w = -math.exp(-0.5) * torch.sigmoid(4 * draw(batch, time, heads, size))
        a = torch.sigmoid(2 * draw(batch, time, heads, size))
        tensors = [r, w, k, v, normalize(kappa, dim=-1), a]
        if given:
            tensors.append(draw(batch, heads, size, size))
        return [t.to(dtype).requires_grad_() for t in tensors]

    @staticmethod
    def run(form, tensors, valid=None, **chunk):
        return form(*tensors[:6], tensors[6] if tensors[6:] else None, valid, **chunk)

    @staticmethod
    def definition(tensors):
        """With a whole transition matrix a token, one sequence and one head at a time."""
        r, w, k, v, kappa, a, state = (t.detach() for t in tensors)
        y, end = torch.zeros_like(v), torch.zeros_like(state)
        for b in range(v.shape[0]):
            for h in range(v.shape[2]):
                s = state[b, h]
                for t in range(v.shape[1]):
                    at = b, t, h
                    transition = torch.diag(torch.exp(w[at])) - torch.outer(kappa[at], a[at] * kappa[at])
                    s = s @ transition + torch.outer(v[at], k[at])
                    y[at] = s @ r[at]
                end[b, h] = s
        return y, end


BOTH = pytest.mark.parametrize("rule", [WKV, WKV7], ids=["rwkv4", "rwkv7"])


def tolerance(rule, dtype):
    return rule.exact if dtype == torch.float64 else 1e-4


def left_padded(time, lengths):
    return torch.arange(time) >= time - torch.tensor(lengths)[:, None]


def part(rule, tensors, rows=slice(None), tokens=slice(None)):
    """Some sequences, and of them some tokens."""
    cut = list(tensors)
    cut[rule.per_token] = [t[rows, tokens] for t in tensors[rule.per_token]]
    cut[rule.state] = [t[rows] for t in tensors[rule.state]]
    return cut


def compare(rule, tensors, valid=None):
    """Both forms: outputs, end state, and the gradient of a random functional of both for every input."""
    g = torch.Generator().manual_seed(9)
    results = [rule.run(form, tensors, valid) for form in rule.forms]
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype) for r in results[0]]
    grads = [
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, result, strict=True)), tensors)
        for result in results
    ]
    t = tolerance(rule, tensors[0].dtype)
    for slow, fast in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.isfinite(fast).all()
        assert_close(fast, slow, rtol=t, atol=t * max(1.0, slow.abs().max().item() if rule is WKV7 else 1.0))
    return results[1], grads[1]


@BOTH
def test_both_forms_are_the_definition(rule):
    tensors = rule.inputs(37, given=True)
    for form in rule.forms:
        for found, expected in zip(rule.run(form, tensors), rule.definition(tensors), strict=False):
            assert_close(found, expected, rtol=1e-12, atol=1e-12)


@BOTH
@GIVEN
@DTYPES
@settings(deadline=None, max_examples=6)
@given(time=st.integers(1, 200), seed=st.integers(0, 10_000))
def test_chunked_equals_recurrent(rule, dtype, given_state, time, seed):
    compare(rule, rule.inputs(time, dtype, seed=seed, given=given_state))


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 1000])
def test_the_chunk_length_changes_nothing(rule, chunk):
    tensors = rule.inputs(100, given=True)
    found, expected = rule.run(rule.forms[1], tensors, chunk=chunk), rule.run(rule.forms[0], tensors)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@BOTH
def test_two_pieces_are_the_whole(rule):
    tensors, form = rule.inputs(150), rule.forms[1]
    whole, end = form(*tensors)
    first, state = form(*part(rule, tensors, tokens=slice(47)))
    second, end_of_two = form(*part(rule, tensors, tokens=slice(47, None)), state)
    assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    if rule is WKV:  # of which only ratios are given, not the gauge
        end, end_of_two = (torch.stack([s.num / s.den, s.den.log() + s.m]) for s in (end, end_of_two))
    assert_close(end_of_two, end, rtol=1e-12, atol=1e-12)


@BOTH
@GIVEN
@DTYPES
def test_padding(rule, dtype, given_state):
    """Padded forms agree, are zero at padding and pass no gradient there, and give every row what it gives alone."""
    lengths, t = [70, 1, 33], tolerance(rule, dtype)
    tensors = rule.inputs(70, dtype, batch=3, given=given_state)
    valid = left_padded(70, lengths)
    (out, *end), grads = compare(rule, tensors, valid)
    for values in (out, *grads[rule.per_token]):
        assert torch.equal(values[~valid], torch.zeros_like(values[~valid]))
    for row, n in enumerate(lengths):
        rows = slice(row, row + 1)
        alone = rule.run(rule.forms[0], part(rule, tensors, rows, slice(70 - n, None)))
        assert_close((out[rows, 70 - n :], *(s[rows] for s in end)), alone, rtol=t, atol=t)


@BOTH
@DTYPES
def test_a_row_of_padding_only_keeps_its_state(rule, dtype):
    """And poisons no gradient, which `compare` looks at."""
    tensors = rule.inputs(40, dtype, given=True)
    (_, *end), _ = compare(rule, tensors, left_padded(40, [40, 0]))
    before = [tensors[6]] if rule is WKV7 else [tensors[4] / tensors[5], tensors[5].log() + tensors[6]]
    assert_close([t[1] for t in end], [t[1] for t in before], rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_twice_differentiable(rule, which, padded):
    tensors = rule.inputs(3, size=2, given=True, **{"heads": 1} if rule is WKV7 else {})
    if rule is WKV:  # decays of the extremes have second derivatives at the edge of what finite differences resolve
        tensors[0] = torch.tensor([0.05, 1.3], dtype=torch.float64, requires_grad=True)
    valid = left_padded(3, [3, 2]) if padded else None

    def function(*t):
        return rule.run(rule.forms[which], t, valid, **{"chunk": 2} if which else {})

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize(
    ("rule", "tensors"),
    [
        (WKV, WKV.inputs(20, batch=3, keys=19.0, given=True)),  # which one gauge barely holds
        (WKV, WKV.inputs(20, batch=3, keys=80.0, given=True)),
        (WKV7, WKV7.inputs(70, batch=3, given=True)),
    ],
    ids=["rwkv4, keys of 19", "rwkv4, keys of 80", "rwkv7"],
)
def test_second_derivatives_over_several_chunks(rule, tensors):
    """Hessian-vector products of both forms agree, with a row of padding only beside."""
    time = tensors[2].shape[1]
    valid, products = left_padded(time, [time, 11, 0]), []
    for form in rule.forms:
        out, *_ = rule.run(form, tensors, valid)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        products.append(torch.autograd.grad(sum(torch.tanh(g).sum() for g in first), tensors))
    for slow, fast in zip(*products, strict=True):
        assert_close(fast, slow, rtol=1e-8, atol=1e-8 * max(1.0, slow.abs().max().item()))
    assert max(slow.abs().max() for slow in products[0]) > 1e-3


@BOTH
@pytest.mark.parametrize("which", [0, 1])
def test_many_at_once_by_vmap(rule, which):
    """torch.func.vmap over copies, each with a padding of its own, is a loop over them; so are its gradients."""
    form, copies = rule.forms[which], [rule.inputs(40, seed=seed, given=True) for seed in range(3)]
    valid = torch.stack([left_padded(40, lengths) for lengths in ([40, 3], [17, 0], [40, 40])])
    stacked = [torch.stack(tensors).detach().requires_grad_() for tensors in zip(*copies, strict=True)]
    results = torch.func.vmap(lambda v, *t: rule.run(form, t, v))(valid, *stacked)
    grads = torch.autograd.grad(sum(t.square().sum() for t in results), stacked)
    for i, tensors in enumerate(copies):
        expected = rule.run(form, tensors, valid[i])
        assert_close([t[i] for t in results], list(expected), rtol=1e-10, atol=1e-10)
        alone = torch.autograd.grad(sum(t.square().sum() for t in expected), tensors)
        assert_close([t[i] for t in grads], list(alone), rtol=1e-9, atol=1e-9)


# RWKV-4: the spread of the keys decides in which precision the sums are taken.


@GIVEN
@DTYPES
@pytest.mark.parametrize("time", [1, 31, 300])
def test_keys_of_80_either_way(dtype, given_state, time):
    compare(WKV, WKV.inputs(time, dtype, keys=80.0, given=given_state))


@DTYPES
def test_very_wide_keys_go_step_by_step(dtype, monkeypatch):
    """No gauge holds keys of ±400; the sums must then be taken with a maximum carried along."""
    tensors = WKV.inputs(50, dtype, keys=400.0, given=True)
    monkeypatch.setattr(module, "_in_one_gauge", None)  # calling it would raise
    out, *_ = WKV.run(wkv_chunked, tensors)
    assert torch.equal(out, WKV.run(wkv_recurrent, tensors)[0])
    assert torch.isfinite(out).all()


def test_narrow_float32_keys_stay_in_float32(monkeypatch):
    """Ordinary keys must take the fast path: neither float64 nor step by step."""
    seen = []
    original = module._in_one_gauge
    monkeypatch.setattr(module, "_in_one_gauge", lambda *a: seen.append(a[2].dtype) or original(*a))
    for keys in (10.0, 80.0):
        wkv_chunked(*WKV.inputs(50, torch.float32, keys=keys))
    assert seen == [torch.float32, torch.float64]


@DTYPES
def test_a_row_of_padding_only_leaves_a_blank_state_blank(dtype):
    _, end = wkv_chunked(*WKV.inputs(40, dtype), None, left_padded(40, [40, 0]))
    assert [t[1].unique().tolist() for t in end] == [[0.0], [0.0], [torch.tensor(BLANK, dtype=dtype).item()]]


# RWKV-7


@torch.no_grad()
@pytest.mark.parametrize("decay", [math.exp(-0.5), 1e-4])
@pytest.mark.parametrize("taken", [1e-3, 1 - 1e-3])
@pytest.mark.parametrize("same_key", [False, True])
def test_float32_at_the_extremes(decay, taken, same_key):
    """The fastest and the slowest decay, everything taken out or nothing, and one key all the time, which makes the
    triangular system as bad as it gets: outputs and state keep six digits of the float64 recurrence's."""
    tensors = WKV7.inputs(400, torch.float32, batch=1, heads=1, size=64)
    tensors[1].fill_(-decay)
    tensors[5].fill_(taken)
    if same_key:
        tensors[4][:] = tensors[4][:, :1].clone()
    expected = WKV7.run(wkv7_recurrent, [t.double() for t in tensors])
    for found, exact in zip(WKV7.run(wkv7_chunked, tensors), expected, strict=True):
        assert (found - exact).abs().max() < 3e-6 * exact.abs().max()


@pytest.mark.parametrize("form", WKV7.forms)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_is_never_looked_at(form, garbage):
    """Whatever stands there, even no numbers at all; a row of padding only has its state unchanged, bit by bit."""
    tensors, valid = WKV7.inputs(40, given=True), left_padded(40, [25, 0])
    expected = WKV7.run(form, tensors, valid)
    with torch.no_grad():
        for x in tensors[:6]:
            x[~valid] = garbage
    out, end = WKV7.run(form, tensors, valid)
    assert torch.equal(out, expected[0])
    assert torch.equal(end, expected[1])
    assert torch.equal(end[1], tensors[6][1])
    for grad in torch.autograd.grad(out.sum() + end.sum(), tensors):
        assert torch.isfinite(grad).all()
