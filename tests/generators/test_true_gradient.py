"""True gradients of prompts and answers as factors, and the distance of a change from them, against whole matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prosg_lib.deltas.gradient_factors import TokenFactors, best_rank, gradient_factors, sequence_factors
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.true_gradient import (
    agreement,
    change_squared_norm,
    inner_product,
    prompt_gradient,
    reading_directions,
    squared_error,
    squared_norm,
)
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT, DialogueBatch
from prosg_lib.training.supervised import TEACHERS, answer_gradient, teacher

NAMES = ["blocks.0.att.output", "blocks.2.ffn.key"]


def random_factors(rows=3, tokens=11, out=6, width=9, rank=4, shared=True):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    change = Factors(draw(rows, out, rank), draw(1 if shared else rows, width, rank))
    return change, TokenFactors(draw(rows, tokens, out), draw(rows, tokens, width))


def dense(factors):
    return factors.grad_output.mT @ factors.x


def batch_of(lm, rows=4, prompt=9, rest=13):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(lm.config.vocab, (rows, prompt + rest), generator=g)
    kind = torch.where(torch.rand(rows, rest, generator=g) < 0.4, ANSWER, TEXT)
    kind[0, 3] = COMPETING
    kind *= torch.arange(rest) < torch.tensor([13, 7, 9, 11])[:rows, None]
    valid = torch.arange(prompt) >= torch.tensor([0, 8, 1, 4])[:rows, None]
    return DialogueBatch(ids[:, :prompt], valid, ids[:, prompt:], kind)


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


def test_norms_and_products_are_those_of_the_matrices():
    change, factors = random_factors()
    whole = change.U @ change.V.mT
    assert_close(squared_norm(factors), dense(factors).square().sum((1, 2)), rtol=1e-10, atol=1e-10)
    assert_close(change_squared_norm(change), whole.square().sum((1, 2)), rtol=1e-10, atol=1e-10)
    assert_close(inner_product(change, factors), (whole * dense(factors)).sum((1, 2)), rtol=1e-10, atol=1e-10)


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


def test_rows_of_a_batch_are_each_its_own_gradient(lm64):
    """`sequence_factors` keeps sequences apart; together they are `gradient_factors`."""
    ids = torch.randint(2000, (3, 8), generator=torch.Generator().manual_seed(0))

    def loss_of(rows):
        return lambda: F.cross_entropy(lm64(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    found = sequence_factors(lm64, NAMES, loss_of(ids))
    whole = gradient_factors(lm64, NAMES, loss_of(ids))
    for name in NAMES:
        for row in range(3):
            alone = gradient_factors(lm64, [name], loss_of(ids[[row]]))[name]
            assert_close(dense(TokenFactors(*(t[row] for t in found[name]))), dense(alone), rtol=1e-10, atol=1e-12)
        assert_close(dense(found[name]).sum(0), dense(whole[name]), rtol=1e-10, atol=1e-12)


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


def test_the_answers_gradient_is_automatic_differentiations(lm64):
    """Of the NLL of ANSWER tokens alone, from a blank state; the prompt has no part in it."""
    batch = batch_of(lm64)
    found = answer_gradient(lm64, NAMES, batch)
    for row in range(len(batch)):
        logits = lm64(batch.rest[[row], :-1])[0][0]
        asked = batch.kind[row, 1:] == ANSWER
        loss = F.cross_entropy(logits[asked], batch.rest[row, 1:][asked], reduction="sum")
        for name in NAMES:
            expected = torch.autograd.grad(loss, lm64.editable()[name].weight, retain_graph=True)[0]
            assert expected.abs().max() > 1e-6
            assert_close(dense(found[name])[row], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_step_down_a_teachers_gradient_lowers_its_loss(lm64, name):
    """The sign is right, and the loss falls by as much as the gradient's norm says."""
    batch, step = batch_of(lm64), 1e-4
    factors = teacher(name)(lm64, NAMES, batch)
    delta = LowRankDelta(
        {n: Factors(-step * f.grad_output.mT, f.x.mT) for n, f in factors.items()}, lm64.fingerprint()
    )  # of as many ranks as tokens

    def loss(change):
        if name == "answers":
            logits, asked = lm64(batch.rest[:, :-1], None, change)[0], batch.kind[:, 1:] == ANSWER
            return F.cross_entropy(logits[asked], batch.rest[:, 1:][asked], reduction="sum")
        logits = lm64(batch.prompt, None, change, batch.prompt_valid)[0][:, :-1]
        told = batch.prompt_valid[:, :-1]
        return F.cross_entropy(logits[told], batch.prompt[:, 1:][told], reduction="sum")

    expected = step * sum(squared_norm(f).sum() for f in factors.values())
    assert_close(loss(None) - loss(delta), expected, rtol=0.05, atol=0)


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
        (lambda change, factors: teacher("nobody"), "unknown teacher 'nobody'; there are prompt, answers"),
        (lambda change, factors: reading_directions(factors, 10), "10 reading directions .* have 1 to 9"),
        (lambda change, factors: agreement(LowRankDelta({"a.0.b": change}, "x"), {}), r"no gradient .*: a\.0\.b"),
        (two_prompts, "3 changes but the gradients of 2 prompts"),
    ],
)
def test_mistakes_are_explained(mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(*random_factors())
