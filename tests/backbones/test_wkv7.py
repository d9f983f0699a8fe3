"""The chunk-parallel delta rule is the recurrence: outputs, states, first and second derivatives, whatever goes in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize
from torch.testing import assert_close

from prosg_lib.backbones.wkv7 import wkv7_chunked, wkv7_recurrent

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
FORMS = (wkv7_recurrent, wkv7_chunked)


def inputs(time, dtype=torch.float64, *, batch=2, heads=2, size=5, seed=0, given=False):
    """r, w, k, v, kappa, a as RWKV-7 makes them: decays from hardly any to the fastest, keys of length 1."""
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


def run(form, tensors, valid=None, **kwargs):
    return form(*tensors[:6], tensors[6] if len(tensors) > 6 else None, valid, **kwargs)


def compare(tensors, valid=None):
    """Both forms: outputs, end state, and the gradient of a random functional of both for every input."""
    g = torch.Generator().manual_seed(9)
    results = [run(form, tensors, valid) for form in FORMS]
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r.dtype) for r in results[0]]
    grads = [
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, result, strict=True)), tensors)
        for result in results
    ]
    t = TOLERANCE[tensors[0].dtype]
    for slow, fast in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.isfinite(fast).all()
        assert_close(fast, slow, rtol=t, atol=t * max(1.0, slow.abs().max().item()))
    return results[1], grads[1]


def by_matrices(tensors):
    """The definition with a whole transition matrix a token, one sequence and one head at a time."""
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


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_the_definition(form):
    tensors = inputs(37, given=True)
    for found, expected in zip(run(form, tensors), by_matrices(tensors), strict=True):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(deadline=None, max_examples=6)
@given(time=st.integers(1, 150), seed=st.integers(0, 10_000))
def test_chunked_equals_recurrent(dtype, given_state, time, seed):
    compare(inputs(time, dtype, seed=seed, given=given_state))


@pytest.mark.parametrize("chunk", [1, 7, 16, 32, 64, 1000])
def test_the_chunk_length_changes_nothing(chunk):
    tensors = inputs(100, given=True)
    for found, expected in zip(run(wkv7_chunked, tensors, chunk=chunk), run(wkv7_recurrent, tensors), strict=True):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("decay", [math.exp(-0.5), 1e-4])
@pytest.mark.parametrize("taken", [1e-3, 1 - 1e-3])
@pytest.mark.parametrize("same_key", [False, True])
def test_float32_at_the_extremes(decay, taken, same_key):
    """The fastest and the slowest decay, everything taken out or nothing, and one key all the time, which makes the
    triangular system as bad as it gets: outputs and state keep six digits of the float64 recurrence's."""
    tensors = inputs(400, torch.float32, batch=1, heads=1, size=64)
    tensors[1].fill_(-decay)
    tensors[5].fill_(taken)
    if same_key:
        tensors[4][:] = tensors[4][:, :1].clone()
    expected = run(wkv7_recurrent, [t.double() for t in tensors])
    for found, exact in zip(run(wkv7_chunked, tensors), expected, strict=True):
        assert (found - exact).abs().max() < 3e-6 * exact.abs().max()


def left_padded(time, lengths):
    return torch.arange(time) >= time - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding(dtype, given_state):
    """Padded forms agree, are zero at padding and pass no gradient there, and give every row what it gives alone."""
    lengths = [70, 1, 33]
    tensors = inputs(70, dtype, batch=3, given=given_state)
    valid = left_padded(70, lengths)
    (out, end), grads = compare(tensors, valid)
    assert torch.equal(out[~valid], torch.zeros_like(out[~valid]))
    for grad in grads[:6]:
        assert torch.equal(grad[~valid], torch.zeros_like(grad[~valid]))
    t = TOLERANCE[dtype]
    for row, n in enumerate(lengths):
        alone = [x[row : row + 1, 70 - n :] for x in tensors[:6]] + [s[row : row + 1] for s in tensors[6:]]
        expected, expected_end = run(wkv7_recurrent, alone)
        assert_close(out[row : row + 1, 70 - n :], expected, rtol=t, atol=t)
        assert_close(end[row : row + 1], expected_end, rtol=t, atol=t)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_is_never_looked_at(form, garbage):
    """Whatever stands there, even no numbers at all; a row of padding only leaves its state as it was, bit by bit."""
    tensors = inputs(40, given=True)
    valid = left_padded(40, [25, 0])
    expected, expected_end = run(form, tensors, valid)
    with torch.no_grad():
        for x in tensors[:6]:
            x[~valid] = garbage
    out, end = run(form, tensors, valid)
    assert torch.equal(out, expected)
    assert torch.equal(end, expected_end)
    assert torch.equal(end[1], tensors[6][1])
    for grad in torch.autograd.grad(out.sum() + end.sum(), tensors):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_twice_differentiable(form, padded):
    tensors = inputs(3, size=2, heads=1, given=True)
    valid = left_padded(3, [3, 2]) if padded else None

    def function(*t):
        return run(form, t, valid, **({"chunk": 2} if form is wkv7_chunked else {}))

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_second_derivatives_over_several_chunks():
    """Hessian-vector products of both forms agree, with a row of padding only beside."""
    tensors = inputs(70, batch=3, given=True)
    valid = left_padded(70, [70, 41, 0])
    products = []
    for form in FORMS:
        out, end = run(form, tensors, valid)
        first = torch.autograd.grad(out.square().sum() + end.square().sum(), tensors, create_graph=True)
        products.append(torch.autograd.grad(sum(torch.tanh(g).sum() for g in first), tensors))
    for slow, fast in zip(*products, strict=True):
        assert slow.abs().max() > 1e-3
        assert_close(fast, slow, rtol=1e-8, atol=1e-8 * slow.abs().max().item())


def test_two_pieces_are_the_whole():
    tensors = inputs(150)
    whole, end = run(wkv7_chunked, tensors)
    first, state = run(wkv7_chunked, [t[:, :47] for t in tensors])
    second, end_of_two = run(wkv7_chunked, [*(t[:, 47:] for t in tensors), state])
    assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    assert_close(end_of_two, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_many_at_once_by_vmap(form):
    """torch.func.vmap over copies, each with a padding of its own, is a loop over them; so are its gradients."""
    copies = [inputs(40, seed=seed, given=True) for seed in range(3)]
    valid = torch.stack([left_padded(40, lengths) for lengths in ([40, 3], [17, 0], [40, 40])])
    stacked = [torch.stack(tensors).detach().requires_grad_() for tensors in zip(*copies, strict=True)]
    out, end = torch.func.vmap(lambda v, *t: run(form, t, v))(valid, *stacked)
    grads = torch.autograd.grad(out.square().sum() + end.square().sum(), stacked)
    for i, tensors in enumerate(copies):
        expected, expected_end = run(form, tensors, valid[i])
        assert_close(out[i], expected, rtol=1e-10, atol=1e-10)
        assert_close(end[i], expected_end, rtol=1e-10, atol=1e-10)
        alone = torch.autograd.grad(expected.square().sum() + expected_end.square().sum(), tensors)
        for found, one in zip(grads, alone, strict=True):
            assert_close(found[i], one, rtol=1e-9, atol=1e-9)
