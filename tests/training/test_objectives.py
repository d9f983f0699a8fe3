"""Means over a batch's tokens: those of a loop, and the sums of what its parts add to them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_parts_add_up
from torch import nn
from torch.testing import assert_close

from prosg_lib.config.sizes import Training
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT, DialogueBatch
from prosg_lib.training.objectives import divergence, generator_objective, lm_objective, lottery, token_losses

SIZES = Training(10, 5, 1e-3, (1,), (0,))


def batch_of(lm, rows: int = 5, prompt: int = 6, rest: int = 12) -> DialogueBatch:
    """Dialogues of random tokens of several lengths; the last row alone asks about others."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(lm.config.vocab, (rows, prompt + rest), generator=g)
    kind = torch.where(torch.rand(rows, rest, generator=g) < 0.3, ANSWER, TEXT)
    kind[-1, 2:5] = COMPETING
    kind *= torch.arange(rest) < torch.tensor([12, 7, 9, 11, 8])[:, None]
    valid = torch.arange(prompt) >= torch.tensor([0, 3, 1, 2, 0])[:, None]
    return DialogueBatch(ids[:, :prompt], valid, ids[:, prompt:], kind)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_losses_are_means_by_kind_to_the_last_bit(lm, share):
    """As PyTorch's own mean has them, value and gradient: shipped weights were trained so."""
    batch = batch_of(lm)
    hidden, _ = lm.step_through(batch.rest[:, :-1], None, None)
    targets, kind = batch.rest[:, 1:], batch.kind[:, 1:]
    found = token_losses(lm, hidden, targets, kind, share, 3)
    lucky = lottery(kind, share, 3)
    for k in (TEXT, ANSWER, COMPETING):
        chosen = (kind == k) & (lucky | (k != TEXT))
        if not chosen.any():
            assert k not in found
            continue
        expected = F.cross_entropy(lm.read_out(hidden)[chosen], targets[chosen], reduction="none").mean()
        assert_close(found[k], expected, rtol=1e-6, atol=0)
        where = (kind >= ANSWER) | ((kind == TEXT) & lucky)
        losses = F.cross_entropy(lm.read_out(hidden[where]).float(), targets[where], reduction="none")
        mean = losses[kind[where] == k].mean()
        assert torch.equal(found[k], mean)
        weights = list(lm.parameters())
        slopes = [torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (found[k], mean)]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_divergence_is_a_mean_over_the_chosen_text(lm):
    """In nats; zero where nothing was changed."""
    batch = batch_of(lm)
    hidden = lm.step_through(batch.rest[:, :-1], None, None)[0].detach()
    other, kind = hidden + torch.randn_like(hidden), batch.kind[:, 1:]
    chosen = (kind == TEXT) & lottery(kind, 0.5, 1)
    teacher, student = (F.log_softmax(lm.read_out(h[chosen]), -1) for h in (hidden, other))
    expected = (teacher.exp() * (teacher - student)).sum(1).mean()
    assert expected > 0.01
    assert_close(divergence(lm, hidden, other, kind, 0.5, 1), expected, rtol=1e-5, atol=1e-7)
    assert divergence(lm, hidden, hidden, kind, 0.5, 1) == 0


def objective(lm, kind: str):
    if kind == "lm":
        lm.requires_grad_(True)
        return lm, lm_objective(lm)
    torch.manual_seed(1)
    generator = TokenGenerator(lm.requires_grad_(False), 4, 16, ("att.output", "ffn.value")).eval()
    for weight in generator.parameters():
        nn.init.normal_(weight, std=0.3)
    return generator, generator_objective(lm, generator, SIZES, 0)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "step"), [("lm", 0), ("generator", 0), ("generator", 5), ("generator", 9)])
def test_a_batch_in_parts_is_the_batch(lm64, kind, step, size):
    """Losses, what the log says, and gradients; though parts have other numbers of each kind of token."""
    module, loss_of = objective(lm64, kind)
    batch, module = batch_of(lm64), module.double()
    assert_parts_add_up(loss_of, step, batch, size, module.parameters(), rtol=1e-4, atol=1e-6)
    part = batch.split(size)[0]
    assert loss_of(step, batch).parts.keys() >= {"text", "answer", "competing"}
    alone = loss_of(step, replace(part, source=None, first=0)).total
    assert abs(alone - loss_of(step, part).total) > 0.01  # a part's own mean is something else
