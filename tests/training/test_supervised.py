"""Lessons in predicting true gradients: their loss, that it falls on other prompts, and what comes after them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_parts_add_up
from torch import nn
from torch.testing import assert_close

from prosg_lib.config.sizes import SupervisedSize, Training
from prosg_lib.deltas.gradient_factors import best_rank
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.generators.true_gradient import agreement, prompt_gradient, squared_norm
from prosg_lib.tasks.dialogue import ANSWER, TEXT, DialogueBatch
from prosg_lib.training.objectives import generator_objective
from prosg_lib.training.supervised import (
    TEACHERS,
    answer_gradient,
    start_directions,
    steps_of,
    supervised_objective,
    unexplained,
)

MAPS = ("att.output", "ffn.key")
SIZES = Training(10, 4, 1e-3, (1,), (0,))
SIZE = SupervisedSize(3, 16, MAPS, lessons=0.5)


def batch_of(seed=0, rows=4, prompt=9, rest=8, words=12):
    """Dialogues of few words, whose answers are the prompt's last tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (rows, prompt + rest), generator=g)
    ids[:, prompt + 3 : prompt + 6] = ids[:, prompt - 3 : prompt]
    kind = torch.full((rows, rest), TEXT)
    kind[:, 3:6] = ANSWER
    valid = torch.arange(prompt) >= torch.randint(4, (rows, 1), generator=g)
    return DialogueBatch(ids[:, :prompt], valid, ids[:, prompt:], kind)


def make(lm, trained=True, **more):
    torch.manual_seed(0)
    generator = TokenGenerator(lm.requires_grad_(False), 3, 16, MAPS, **more)
    if trained:
        for p in nn.ModuleList([generator.heads, generator.keys]).parameters():
            nn.init.normal_(p, std=0.1)
    return generator.to(lm.emb.weight.dtype).eval()


def test_the_share_left_unexplained_is_that_of_the_matrices(lm64):
    """||s U V^T + c G||^2 / ||c G||^2 by map and prompt, to 1e-10, with gradients; 1 for no change, 0 for -c G."""
    batch, generator = batch_of(), make(lm64)
    true, _ = prompt_gradient(lm64, generator.names, batch.prompt, batch.prompt_valid)
    steps = steps_of(lm64, true, 0.05)
    delta, _ = generator(lm64, batch.prompt, batch.prompt_valid)
    found, expected = unexplained(delta, true, steps), []
    for name, (u, v) in delta.factors.items():
        wanted = -steps[name] * true[name].grad_output.mT @ true[name].x
        expected.append((delta.scale * u @ v.mT - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2)))
        size = wanted.square().sum((1, 2)).mean().sqrt()
        assert_close(size, 0.05 * lm64.editable()[name].weight.norm(), rtol=1e-8, atol=0)
    assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    heads = list(generator.heads.parameters())
    slopes = [torch.autograd.grad(t.sum(), heads, retain_graph=True) for t in (found, torch.stack(expected))]
    assert_close(*slopes, rtol=1e-9, atol=1e-10)
    nothing, _ = make(lm64, trained=False)(lm64, batch.prompt, batch.prompt_valid)
    assert_close(unexplained(nothing, true, steps), torch.ones_like(found), rtol=1e-12, atol=0)
    exact = {n: best_rank(true[n], 8) for n in true}  # eight tokens with a next one
    perfect = replace(delta, factors={n: Factors(-steps[n] / delta.scale * u, v) for n, (u, v) in exact.items()})
    assert unexplained(perfect, true, steps).abs().max() < 1e-10


def test_the_answers_gradient_is_automatic_differentiations(lm64):
    """Of the NLL of ANSWER tokens alone, from a blank state; the prompt has no part in it."""
    batch, names = batch_of(), ["blocks.0.att.output", "blocks.2.ffn.key"]
    found = answer_gradient(lm64, names, batch)
    for row in range(len(batch)):
        logits = lm64(batch.rest[[row], :-1])[0][0]
        asked = batch.kind[row, 1:] == ANSWER
        loss = F.cross_entropy(logits[asked], batch.rest[row, 1:][asked], reduction="sum")
        for name in names:
            expected = torch.autograd.grad(loss, lm64.editable()[name].weight, retain_graph=True)[0]
            assert expected.abs().max() > 1e-6
            assert_close(found[name].grad_output[row].t() @ found[name].x[row], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_step_down_a_teachers_gradient_lowers_its_loss(lm64, name):
    """The sign is right, and the loss falls by as much as the gradient's norm says."""
    batch, step = batch_of(), 1e-4
    factors = TEACHERS[name](lm64, list(lm64.editable())[:2], batch)
    delta = LowRankDelta(
        {n: Factors(-step * f.grad_output.mT, f.x.mT) for n, f in factors.items()}, lm64.fingerprint()
    )  # of as many ranks as tokens

    def loss(change):
        if name == "answers":
            logits, asked = lm64(batch.rest[:, :-1], None, change)[0], batch.kind[:, 1:] == ANSWER
            return F.cross_entropy(logits[asked], batch.rest[:, 1:][asked], reduction="sum")
        logits = lm64(batch.prompt, None, change, batch.prompt_valid)[0][:, :-1]
        read = batch.prompt_valid[:, :-1]
        return F.cross_entropy(logits[read], batch.prompt[:, 1:][read], reduction="sum")

    expected = step * sum(squared_norm(f).sum() for f in factors.values())
    assert_close(loss(None) - loss(delta), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", TEACHERS)
def test_lessons_are_learned_for_other_prompts(lm, name):
    """A few steps lower the error on prompts that were not among them, below that of no change."""
    size, generator = replace(SIZE, teacher=name, lessons=1.0, strength=0.3), make(lm, trained=False).train()
    loss_of = supervised_objective(lm, generator, SIZES, 0, size, batch_of(100, rows=16))
    optimiser = torch.optim.Adam(generator.parameters(), 5e-3)
    held_out = batch_of(101, rows=16)

    def error():
        generator.eval()
        with torch.no_grad():
            found = loss_of(0, held_out).total.item()
        generator.train()
        return found

    before = error()
    assert before == pytest.approx(1.0, abs=1e-5)
    for step in range(60):
        optimiser.zero_grad()
        loss_of(0, batch_of(step, rows=16)).total.backward()
        optimiser.step()
    assert error() < before - 0.02


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_in_parts_is_the_batch(lm64, size):
    """Loss, what the log says of it, and gradients."""
    generator, batch = make(lm64), batch_of()
    loss_of = supervised_objective(lm64, generator, SIZES, 0, SIZE, batch_of(1))
    assert_parts_add_up(loss_of, 0, batch, size, generator.parameters(), rtol=1e-8, atol=1e-10)


def test_padding_is_not_learned_from(lm64):
    """The error of a prompt is the same alone, without its padding."""
    generator, batch = make(lm64), batch_of()
    true, _ = prompt_gradient(lm64, generator.names, batch.prompt, batch.prompt_valid)
    steps = steps_of(lm64, true, 0.05)
    errors = unexplained(generator(lm64, batch.prompt, batch.prompt_valid)[0], true, steps)
    assert (~batch.prompt_valid).any()
    for row in range(len(batch)):
        ids = batch.prompt[[row]][:, batch.prompt_valid[row]]
        alone, _ = prompt_gradient(lm64, generator.names, ids)
        assert_close(unexplained(generator(lm64, ids)[0], alone, steps)[:, 0], errors[:, row], rtol=1e-8, atol=1e-10)


def test_after_the_lessons_it_is_trained_as_every_generator(lm64):
    """From the same step on, with the same loss of the same batch: no step more, and no other data."""
    generator, batch = make(lm64), batch_of()
    taught = supervised_objective(lm64, generator, SIZES, 7, SIZE, batch)
    plain = generator_objective(lm64, generator, SIZES, 7)
    for step in range(10):
        found, expected = taught(step, batch), plain(step, batch)
        assert (found.parts.keys() == expected.parts.keys()) == (step >= 5)
        if step >= 5:
            assert torch.equal(found.total, expected.total)


def test_without_the_label_the_next_token_is_unseen(lm64):
    """The change hangs on every token's successor with the label, and on none but through the sum without it."""
    ids = batch_of(prompt=6).prompt[:1]
    other = ids.clone()
    other[0, -1] += 1
    for label in (True, False):
        generator = make(lm64, label=label)
        first, second = (generator(lm64, text)[0].factors["blocks.0.ffn.key"].U for text in (ids, other))
        assert ((first - second).abs().max() < 1e-12) == (not label)


def test_directions_are_the_teachers(lm64):
    """They read more of other dialogues' gradients than random ones; nothing else of the generator is touched."""
    sample, other = batch_of(1, rows=16), batch_of(2, rows=16)
    for name in TEACHERS:
        plain, taught = make(lm64), make(lm64)
        start_directions(lm64, taught, replace(SIZE, teacher=name), sample)
        true = TEACHERS[name](lm64, plain.names, other)
        first, second = (agreement(g(lm64, other.prompt, other.prompt_valid)[0], true) for g in (plain, taught))
        assert second.reads.mean() > first.reads.mean() + 0.1
        for weight, tensor in taught.state_dict().items():
            assert torch.equal(tensor, plain.state_dict()[weight]) != weight.startswith("V.")


def test_a_final_state_generator_takes_lessons_too(lm64):
    generator = FinalStateGenerator(lm64, 2, 8, MAPS).double()
    loss_of = supervised_objective(lm64, generator, SIZES, 0, SIZE, batch_of(1))
    assert loss_of(0, batch_of()).total.item() == pytest.approx(1.0, abs=1e-9)


def test_in_half_precision_the_lesson_is_nearly_the_same(lm):
    """Under autocast, as on a GPU: what is compared is compared in the generator's own precision."""
    batch = batch_of()
    losses = {}
    for autocast in (False, True):
        generator = make(lm)
        loss = supervised_objective(lm, generator, SIZES, 0, SIZE, batch_of(1), autocast)(0, batch)
        loss.total.backward()
        assert generator.heads["blocks_0_ffn_key"].weight.grad.isfinite().all()
        losses[autocast] = loss.total.item()
    assert losses[True] == pytest.approx(losses[False], rel=0.1)
