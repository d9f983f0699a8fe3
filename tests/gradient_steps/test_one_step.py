"""The differentiable gradient step: what it is, what it keeps and recomputes, and its exact outer gradient."""

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from prosg_lib.errors import NotFinite, UserError
from prosg_lib.gradient_steps.one_step import gradient_step, gradient_steps


def test_quadratic_step_and_its_outer_gradient():
    """loss = w^T A w / 2: the step is (I - lr A) w, and so is its derivative; first order, the derivative is 1."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    w = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.7, 0.2], dtype=torch.float64)
    for second_order, expected in ((True, v - 0.1 * a @ v), (False, v)):
        (stepped,) = gradient_step([lambda p: p["w"] @ a @ p["w"] / 2], {"w": w}, 0.1, second_order).values()
        assert_close(stepped, w - 0.1 * a @ w)
        assert_close(torch.autograd.grad(stepped @ v, w)[0], expected)


def test_terms_of_a_loss_give_the_step_of_their_sum():
    """Step and outer gradient; a term that is linear, or does not use all tensors, adds no curvature."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    start = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in (("w", [1.0, -3.0]), ("b", [0.5]))}
    terms = [lambda p: p["w"] @ a @ p["w"], lambda p: (p["b"] ** 3).sum() * p["w"][0], lambda p: 2 * p["b"].sum()]
    found = []
    for given in (terms, [lambda p: sum(term(p) for term in terms)]):
        stepped = gradient_step(given, start, 0.1)
        outer = (stepped["w"] ** 2).sum() + stepped["b"].sum()
        found.append([*stepped.values(), *torch.autograd.grad(outer, list(start.values()))])
    assert_close(*found)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_terms_that_are_not_kept_are_recomputed_for_an_exact_outer_gradient(kept):
    """Each runs once for the step, and once more in the backward pass; first order, never again. A second outer
    gradient is as exact."""
    calls = []
    terms = [lambda p, i=i: calls.append(i) or (p["w"] ** 3).sum() for i in range(3)]
    for second_order, again, once_more in ((True, [2, 1, 0][kept:], [2, 1, 0]), (False, [], [])):
        w = torch.tensor([1.0, -3.0], requires_grad=True)
        calls.clear()
        outer = gradient_step(terms, {"w": w}, 0.1, second_order, kept)["w"].sum()
        (first,) = torch.autograd.grad(outer, w, retain_graph=True)
        assert calls == [0, 1, 2, *again]
        assert_close(first, 1 - 0.1 * 18 * w.detach() if second_order else torch.ones(2))
        assert torch.equal(torch.autograd.grad(outer, w)[0], first)
        assert calls == [0, 1, 2, *again, *once_more]


def test_graphs_that_are_differentiated_twice_have_lean_second_derivatives():
    """Those of kept terms, and of others when they are recomputed; no other has them."""
    w, x = torch.ones(4, requires_grad=True), torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    seen = []

    def loss(params):
        normed = layer_norm(params["w"] * x, (4,), w.detach(), w.detach())
        seen.append("_LayerNormBackward" in normed.grad_fn.name())
        return normed.square().sum()

    for second_order, kept, expected in ((True, 1, [True]), (True, 0, [False, True]), (False, 1, [False])):
        gradient_step([loss], {"w": w}, 0.1, second_order, kept)["w"].sum().backward()
        assert seen == expected
        seen.clear()


def test_nothing_is_kept_without_an_outer_gradient():
    """Without autograd, or from a start that needs no gradient, a step makes no graph of its gradient."""

    def loss(p):
        return (p["w"] ** 3).sum().mul(_Watched.apply(p["w"]).sum())

    class _Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return torch.ones_like(w)

        @staticmethod
        def backward(ctx, g):
            graphs.append(torch.is_grad_enabled())
            return torch.zeros_like(g)

    graphs = []
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    gradient_step([loss], {"w": w}, 0.1)
    gradient_step([loss], {"w": w}, 0.1, second_order=False)
    gradient_step([loss], {"w": w.detach()}, 0.1)
    with torch.no_grad():
        gradient_step([loss], {"w": w}, 0.1)
    assert graphs == [True, False, False, False]


def test_of_several_steps_all_but_the_last_are_recomputed():
    """The outer gradient of three steps is that of plain autograd through three; one graph at a time is kept."""
    calls = []
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda p, i=i: calls.append(i) or (p["w"] ** 3).sum() * (i + 1) for i in range(3)]
    (found,) = torch.autograd.grad(gradient_steps(losses, {"w": w}, 0.01)["w"].pow(2).sum(), w)
    assert calls == [0, 1, 2, 1, 0]
    stepped = w
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss({"w": stepped}), stepped, create_graph=True)
        stepped = stepped - 0.01 * gradient
    assert_close(found, torch.autograd.grad(stepped.pow(2).sum(), w)[0])
    calls.clear()
    gradient_steps(losses, {"w": w}, 0.01, second_order=False)["w"].sum().backward()
    assert calls == [0, 1, 2]


def test_a_loss_that_is_not_finite_is_one_clear_error():
    with pytest.raises(UserError, match="loss of the context is inf"):
        gradient_step([lambda p: p["w"].sum() / 0.0], {"w": torch.ones(2)}, 0.1)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_that_is_not_finite_is_one_too(bad):
    """In any term, any tensor, and a single number of it: the slope of a root at zero, where the loss is finite."""
    terms = [lambda p: p["w"].square().sum(), lambda p: p["w"].sum() + p["v"].sqrt().sum()]
    start = {"w": torch.ones(2), "v": torch.tensor([4.0, 0.0])}
    with pytest.raises(NotFinite, match="gradient of the context's loss is not finite"):
        gradient_step([terms[1 - bad], terms[bad]], start, 0.1)
    start["v"][1] = 4.0
    assert_close(gradient_step(terms, start, 0.1)["v"], torch.tensor([3.975, 3.975]))
