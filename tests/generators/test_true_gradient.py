"""True gradients of prompts as factors, and the distance of a change from them, against whole matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prosg_lib.deltas.gradient_factors import TokenFactors, best_rank
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.true_gradient import (
    agreement,
    prompt_gradient,
    reading_directions,
    squared_error,
)

NAMES = ["blocks.0.att.output", "blocks.2.ffn.key"]


def random_factors(rows=3, tokens=11, out=6, width=9, rank=4, shared=True):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    change = Factors(draw(rows, out, rank), draw(1 if shared else rows, width, rank))
    return change, TokenFactors(draw(rows, tokens, out), draw(rows, tokens, width))


def dense(factors):
    return factors.grad_output.mT @ factors.x


@pytest.mark.parametrize("shared", [True, False])
def test_the_factored_error_is_the_dense_one(shared):
    """To 1e-10 in float64, value and gradient, whether V is shared or each prompt has its own."""
    change, factors = random_factors(shared=shared)
    u, v = (t.requires_grad_() for t in change)
    found = squared_error(Factors(u, v), factors)
    expected = (u @ v.mT - dense(factors)).square().sum((1, 2))
    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    slopes = [torch.autograd.grad((e * weights).sum(), (u, v)) for e in (found, expected)]
    assert_close(*slopes, rtol=1e-10, atol=1e-10)


def test_no_change_is_closer_than_the_best_of_its_rank():
    """Eckart-Young, by `best_rank`: of rank 4 the error is least, of full rank zero."""
    change, factors = random_factors()
    least = squared_error(Factors(*best_rank(factors, 4)), factors)
    assert (squared_error(change, factors) > least).all()
    assert (least > 0.1).all()
    assert_close(squared_error(Factors(*best_rank(factors, 6)), factors), torch.zeros_like(least), rtol=0, atol=1e-8)


def test_shared_reading_directions_read_the_most():
    """The leading eigenvectors of sum_b G_b^T G_b / ||G_b||^2, each prompt with equal weight."""
    _, factors = random_factors()
    factors = TokenFactors(factors.grad_output * torch.tensor([1.0, 10.0, 0.1])[:, None, None], factors.x)
    unit = dense(factors) / dense(factors).flatten(1).norm(dim=1)[:, None, None]
    values = torch.linalg.eigvalsh((unit.mT @ unit).sum(0)).flip(0)
    for rank in (1, 4):
        v = reading_directions(factors, rank)
        assert_close(v.t() @ v, torch.eye(rank, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        assert_close((unit @ v).square().sum(), values[:rank].sum(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_a_prompts_gradient_is_automatic_differentiations(lm64, prompts):
    """Of its summed NLL, whatever its padding; one of a single token has none. The state is the prompt's."""
    ids, valid = lm64.encode_prompts(prompts)
    found, state = prompt_gradient(lm64, NAMES, ids, valid)
    for row, prompt in enumerate(prompts):
        one = torch.tensor([prompt])
        logits, after = lm64(one)
        loss = F.cross_entropy(logits[0, :-1], one[0, 1:], reduction="sum")
        for name in NAMES:
            weight = lm64.editable()[name].weight
            expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
            assert_close(dense(found[name])[row], expected, rtol=1e-8, atol=1e-10)
            assert (expected.abs().max() > 1e-6) == (len(prompt) > 1)
        assert_close(lm64.state_features(state)[row], lm64.state_features(after)[0], rtol=1e-8, atol=1e-8)
    assert not any(t.requires_grad for factors in found.values() for t in factors)


def test_agreement_is_the_cosine_of_the_matrices(lm64):
    """By map and prompt; the bounds hold, and the changes that they are bounds of reach them."""
    ids = torch.randint(2000, (3, 14), generator=torch.Generator().manual_seed(3))
    gradients, _ = prompt_gradient(lm64, NAMES, ids)
    g = torch.Generator().manual_seed(1)
    factors = {}
    for name, true in gradients.items():
        v = torch.randn(1, true.x.shape[2], 3, generator=g, dtype=torch.float64)
        noise = torch.randn(3, true.grad_output.shape[2], 3, generator=g, dtype=torch.float64)
        factors[name] = Factors(-dense(true) @ v + noise * dense(true).norm() * 0.1, v)
    table = agreement(LowRankDelta(factors, lm64.fingerprint(), 0.1), gradients)
    assert len(table) == 6
    for row in table.itertuples():
        change = (factors[row.map].U @ factors[row.map].V.mT)[row.prompt]
        true = dense(gradients[row.map])[row.prompt]
        assert_close(row.cosine, float(-(change * true).sum() / change.norm() / true.norm()), rtol=1e-8, atol=1e-10)
        assert 0 < row.cosine < row.reads < row.best < 1
        assert (f"blocks.{row.layer}.{row.kind}") == row.map
    along = {
        n: Factors(-dense(f) @ torch.linalg.qr(factors[n].V)[0], torch.linalg.qr(factors[n].V)[0])
        for n, f in gradients.items()
    }
    table = agreement(LowRankDelta(along, lm64.fingerprint()), gradients)
    assert_close(table.cosine.tolist(), table.reads.tolist(), rtol=1e-8, atol=1e-10)
    best = {n: Factors(*best_rank(TokenFactors(-f.grad_output, f.x), 3)) for n, f in gradients.items()}
    table = agreement(LowRankDelta(best, lm64.fingerprint()), gradients)
    assert_close(table.cosine.tolist(), table.best.tolist(), rtol=1e-8, atol=1e-10)
    nothing = {n: Factors(0 * u, v) for n, (u, v) in factors.items()}
    assert (agreement(LowRankDelta(nothing, lm64.fingerprint()), gradients).cosine == 0).all()


def two_prompts(change, factors):
    return agreement(LowRankDelta({"a.0.b": change}, "x"), {"a.0.b": TokenFactors(*(t[:2] for t in factors))})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda change, factors: reading_directions(factors, 10), "10 reading directions .* have 1 to 9"),
        (lambda change, factors: agreement(LowRankDelta({"a.0.b": change}, "x"), {}), r"no gradient .*: a\.0\.b"),
        (two_prompts, "3 changes but the gradients of 2 prompts"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(*random_factors())
