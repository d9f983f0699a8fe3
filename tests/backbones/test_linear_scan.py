"""The scan in blocks is the plain loop over time: its values, its gradients, and the gradients of those."""

import pytest
import torch
from torch.testing import assert_close

from prosg_lib.backbones.linear_scan import linear_scan


def plain(a, b, start):
    """One step after the other."""
    h = [start]
    for t in range(a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h[1:], 1)


def random_inputs(time, shape=(3, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(2, time, *shape, generator=g, dtype=torch.float64)
    b = torch.randn(2, time, *shape, generator=g, dtype=torch.float64)
    return a, b, torch.randn(2, *shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 16, 17, 100])
def test_values(time):
    for shape in ((), (3,), (3, 4)):
        inputs = random_inputs(time, shape)
        assert_close(linear_scan(*inputs), plain(*inputs))


@pytest.mark.parametrize("time", [1, 3, 7])
def test_gradients(time):
    """Of all three inputs, and their gradients' gradients: a gradient step inside a training needs those."""
    inputs = [t.requires_grad_() for t in random_inputs(time, (2,))]
    assert torch.autograd.gradcheck(linear_scan, inputs)
    assert torch.autograd.gradgradcheck(linear_scan, inputs)
    slopes = torch.autograd.grad(linear_scan(*inputs).square().sum(), inputs)
    for one, other in zip(slopes, torch.autograd.grad(plain(*inputs).square().sum(), inputs), strict=True):
        assert_close(one, other)


def test_resets_and_long_texts_are_exact():
    """A decay of zero forgets all that was before, and a product of a thousand small decays is zero, not NaN."""
    a, b, start = random_inputs(1000)
    a, start = a * 1e-3, start * 1e30
    a[:, 500] = 0
    found = linear_scan(a, b, start)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 500], b[:, 500])
    assert_close(found, plain(a, b, start))
