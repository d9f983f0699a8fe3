"""A gradient step on every family of models: it lowers the loss of its text, and has the outer gradient that plain
autograd and finite differences find."""

import pytest
import torch
from families import CLOSE, DEVICES, FAMILIES, rows_of
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from prosg_lib.errors import UserError
from prosg_lib.generators.base import ALL_MAPS
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.gradient_steps.one_step import adapted
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.text.padding import Rows, left_padded

TEXTS = rows_of((7, 12))
QUERIES = torch.tensor(rows_of((8, 8), 3))


@pytest.fixture(params=FAMILIES)
def lm(request, device):
    return FAMILIES[request.param]().to(device).eval().requires_grad_(False)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def contexts(device):
    """`TEXTS`, padded."""
    return Rows(*(t[:, None].to(device) for t in left_padded(TEXTS)))


def nll(logits, rows):
    """Next-token NLL of rows of tokens, on the right in their logits: the mean of each, added up."""
    return sum(
        cross_entropy(many[len(many) - len(row) :][:-1], torch.tensor(row[1:], device=many.device))
        for many, row in zip(logits, rows, strict=True)
    )


def after_step(method, lm, contexts, ids, valid=None):
    return adapted(method, lm, contexts)(ids, torch.ones_like(ids).bool() if valid is None else valid)


def against_random(logits):
    """The mean of the logits, each times a random number."""
    along = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.device)
    return (logits * along).double().mean()


@torch.no_grad()
def assert_learns(method, lm, contexts):
    """A step on the contexts lowers their loss."""
    losses = []
    for lr in (0.0, method.lr):
        method.lr = lr
        losses.append(nll(after_step(method, lm, contexts, contexts.ids[:, 0], contexts.valid[:, 0]), TEXTS))
    assert losses[1] < losses[0] - 1e-3


def test_a_step_in_an_adapter(lm, device, contexts):
    """It lowers the context's loss, and has the outer gradient that finite differences measure."""
    queries = QUERIES.to(device)
    torch.manual_seed(1)
    method = AdapterStep(lm, 2, ALL_MAPS, 1.0).to(device)
    for u in method.U.parameters():
        torch.nn.init.normal_(u, std=0.01)
    assert_learns(method, lm, contexts)
    parameters = list(method.parameters())
    slopes = torch.autograd.grad(against_random(after_step(method, lm, contexts, queries)), parameters)
    length = torch.cat([s.flatten() for s in slopes]).norm()
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for p, s in zip(parameters, slopes, strict=True):
                p.add_(s, alpha=step / length.item())
            values.append(against_random(after_step(method, lm, contexts, queries)))
    assert_close((values[0] - values[1]) / 2e-3, length.double(), rtol=0.02, atol=0)


def test_a_step_on_all_weights(lm, device, contexts):
    """It lowers the context's loss. Logits and outer gradient are those of each example alone, not padded, through the
    graph of plain SGD; also where the class cannot run the weights of several examples at once."""
    queries = QUERIES.to(device)
    method = WeightStep(lm, None, 1e-3).to(device)
    assert_learns(method, lm, contexts)
    found, expected = after_step(method, lm, contexts, queries), []
    for row, query in zip(TEXTS, queries, strict=True):
        weights, ids = method.start(lm), torch.tensor([row], device=device)
        logits = torch.func.functional_call(lm, weights, (ids,))[0]
        inner = torch.autograd.grad(nll(logits, [row]), list(weights.values()), create_graph=True, allow_unused=True)
        after = {n: w if g is None else w - 1e-3 * g for (n, w), g in zip(weights.items(), inner, strict=True)}
        expected.append(torch.func.functional_call(lm, after, (query[None],))[0][0])
    expected = torch.stack(expected)
    assert_close(found, expected, **CLOSE)
    slopes, same = (
        torch.cat([g.flatten() for g in torch.autograd.grad(against_random(logits), list(method.parameters()))])
        for logits in (found, expected)
    )
    assert (slopes - same).norm() < 1e-3 * same.norm()


def test_a_class_without_a_second_derivative_is_named(contexts, monkeypatch):
    """With a package installed whose kernels have none: every way that would differentiate twice names the class and
    the remedy, instead of training with a wrong gradient; a first-order step is taken."""
    lm = FAMILIES["mamba2"]().requires_grad_(False).to(contexts.ids.device)
    monkeypatch.setattr(lm, "_installed", lambda: ["mamba_ssm"])
    for method in (AdapterStep(lm, 2, ALL_MAPS, 1.0), WeightStep(lm, None, 1e-3), MapStep(lm, 1e-3)):
        with pytest.raises(UserError, match="a Mamba2 has no second derivative with the kernels of mamba_ssm; uninst"):
            adapted(method, lm, contexts)
    for kind, sizes in ((AdapterStep, (2, ALL_MAPS, 1.0)), (WeightStep, (None, 1e-3))):
        method = kind(lm, *sizes, second_order=False).to(contexts.ids.device)
        assert torch.isfinite(after_step(method, lm, contexts, QUERIES.to(contexts.ids.device))).all()
