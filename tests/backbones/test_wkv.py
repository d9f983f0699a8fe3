"""The chunk-parallel WKV is the recurrence: outputs, states, first and second derivatives, whatever goes in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from prosg_lib.backbones import wkv as module
from prosg_lib.backbones.wkv import BLANK, WKVState, wkv_chunked, wkv_recurrent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def inputs(time, dtype=torch.float64, *, batch=2, width=4, keys=2.0, seed=0, given=False):
    """w from 1e-3 to 20 over the channels, keys uniform in ±keys."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1

    w = torch.logspace(-3, torch.tensor(20.0).log10().item(), width, dtype=torch.float64)
    tensors = [w, draw(width), keys * draw(batch, time, width), draw(batch, time, width)]
    if given:
        tensors += [draw(batch, width), draw(batch, width).abs() + 0.1, keys * draw(batch, width)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def read(form, tensors, valid=None):
    """Outputs, and of the end state what does not depend on the gauge: the weighted mean and the log of the weight."""
    state = WKVState(*tensors[4:]) if len(tensors) > 4 else None
    out, end = form(*tensors[:4], state, valid)
    seen = end.den > 0
    den = torch.where(seen, end.den, 1.0)
    return out, torch.where(seen, end.num / den, 0.0), torch.where(seen, den.log() + end.m, 0.0)


def compare(tensors, valid=None, tolerance=None):
    """Both forms: outputs, end state, and the gradient of a random functional of both for every input."""
    g = torch.Generator().manual_seed(9)
    results = []
    for form in (wkv_recurrent, wkv_chunked):
        results.append(read(form, tensors, valid))
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype) for r in results[0]]
    grads = [
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, result, strict=True)), tensors)
        for result in results
    ]
    t = tolerance or TOLERANCE[tensors[0].dtype]
    for slow, fast in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.isfinite(fast).all()
        assert_close(fast, slow, rtol=t, atol=t)
    return results[1], grads[1]


def brute_force(w, u, k, v):
    """The definition (RWKV-4 paper, eq. 16) as two loops."""
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        weights = [torch.exp(-(t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        out[:, t] = sum(a * v[:, i] for i, a in enumerate(weights)) / sum(weights)
    return out


def test_both_forms_are_the_definition():
    w, u, k, v = inputs(37)
    expected = brute_force(w, u, k, v)
    assert_close(wkv_recurrent(w, u, k, v)[0], expected, rtol=1e-12, atol=1e-12)
    assert_close(wkv_chunked(w, u, k, v)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(deadline=None, max_examples=8)
@given(time=st.integers(1, 300), seed=st.integers(0, 10_000))
def test_chunked_equals_recurrent(dtype, given_state, time, seed):
    compare(inputs(time, dtype, seed=seed, given=given_state))


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("time", [1, 31, 300])
def test_keys_of_80_either_way(dtype, given_state, time):
    compare(inputs(time, dtype, keys=80.0, given=given_state))


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 1000])
def test_the_chunk_length_changes_nothing(chunk):
    tensors = inputs(100, given=True)
    state = WKVState(*tensors[4:])
    out, end = wkv_chunked(*tensors[:4], state, chunk=chunk)
    expected, expected_end = wkv_recurrent(*tensors[:4], state)
    assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert_close(end.num / end.den, expected_end.num / expected_end.den, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_very_wide_keys_go_step_by_step(dtype, monkeypatch):
    """No gauge holds keys of ±400; the sums must then be taken with a maximum carried along."""
    tensors = inputs(50, dtype, keys=400.0, given=True)
    monkeypatch.setattr(module, "_in_one_gauge", None)  # calling it would raise
    out, *_ = read(wkv_chunked, tensors)
    expected, *_ = read(wkv_recurrent, tensors)
    assert torch.equal(out, expected)
    assert torch.isfinite(out).all()


def test_narrow_float32_keys_stay_in_float32(monkeypatch):
    """Ordinary keys must take the fast path: neither float64 nor step by step."""
    seen = []
    original = module._in_one_gauge
    monkeypatch.setattr(module, "_in_one_gauge", lambda *a: seen.append(a[2].dtype) or original(*a))
    wkv_chunked(*inputs(50, torch.float32, keys=10.0))
    wkv_chunked(*inputs(50, torch.float32, keys=80.0))
    assert seen == [torch.float32, torch.float64]


def left_padded(time, lengths):
    return torch.arange(time) >= time - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding(dtype, given_state):
    """Padded forms agree, are zero at padding, and give every row what it gives alone."""
    lengths = [70, 1, 33]
    tensors = inputs(70, dtype, batch=3, given=given_state)
    valid = left_padded(70, lengths)
    (out, mean, weight), grads = compare(tensors, valid)
    assert torch.equal(out[~valid], torch.zeros_like(out[~valid]))
    assert torch.equal(grads[2][~valid], torch.zeros_like(grads[2][~valid]))
    for row, n in enumerate(lengths):
        w, u, k, v, *state = tensors
        alone = [w, u, k[row : row + 1, 70 - n :], v[row : row + 1, 70 - n :], *(s[row : row + 1] for s in state)]
        expected = read(wkv_recurrent, alone)
        t = TOLERANCE[dtype]
        assert_close(out[row : row + 1, 70 - n :], expected[0], rtol=t, atol=t)
        assert_close(mean[row : row + 1], expected[1], rtol=t, atol=t)
        assert_close(weight[row : row + 1], expected[2], rtol=t, atol=t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_padding_only(dtype):
    """It leaves the state as it was (blank without one), and poisons no gradient."""
    valid = left_padded(40, [40, 0])
    for given_state in (False, True):
        tensors = inputs(40, dtype, given=given_state)
        (out, mean, weight), grads = compare(tensors, valid)
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        for grad in grads:
            assert torch.isfinite(grad).all()
        if given_state:
            num, den, m = (t[1] for t in tensors[4:])
            assert_close(mean[1], num / den, rtol=1e-5, atol=1e-5)
            assert_close(weight[1], den.log() + m, rtol=1e-5, atol=1e-5)
        else:
            _, end = wkv_chunked(*tensors[:4], None, valid)
            assert end.num[1].eq(0).all()
            assert end.den[1].eq(0).all()
            assert end.m[1].eq(BLANK).all()


@pytest.mark.parametrize("form", [wkv_chunked, wkv_recurrent])
@pytest.mark.parametrize("padded", [False, True])
def test_twice_differentiable(form, padded):
    time = 4
    tensors = inputs(time, width=2, given=True)
    # decays of the extremes have second derivatives at the edge of what finite differences resolve
    tensors[0] = torch.tensor([0.05, 1.3], dtype=torch.float64, requires_grad=True)
    valid = left_padded(time, [4, 2]) if padded else None

    def function(*t):
        state = WKVState(*t[4:])
        out, end = form(*t[:4], state, valid, **({"chunk": 2} if form is wkv_chunked else {}))
        return out, end.num / end.den, end.den.log() + end.m

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_second_derivatives_at_wide_keys():
    """Hessian-vector products of both forms agree where one gauge barely holds the keys, and with a padded row."""
    for keys in (19.0, 80.0):
        tensors = inputs(20, keys=keys, given=True)
        valid = left_padded(20, [20, 0])
        products = []
        for form in (wkv_recurrent, wkv_chunked):
            out, *_ = read(form, tensors, valid)
            first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            products.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
        for slow, fast in zip(*products, strict=True):
            assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_two_pieces_are_the_whole():
    w, u, k, v = inputs(150)
    whole, end = wkv_chunked(w, u, k, v)
    first, state = wkv_chunked(w, u, k[:, :47], v[:, :47])
    second, end_of_two = wkv_chunked(w, u, k[:, 47:], v[:, 47:], state)
    assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    assert_close(end_of_two.num / end_of_two.den, end.num / end.den, rtol=1e-12, atol=1e-12)
    assert_close(end_of_two.den.log() + end_of_two.m, end.den.log() + end.m, rtol=1e-12, atol=1e-12)
