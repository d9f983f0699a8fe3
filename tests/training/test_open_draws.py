"""Trainings on the open world: everything sees the same items; losses are weighted sums by kind, and can be lowered."""

from dataclasses import replace

import pytest
import torch
from checks import token_generator
from tiny import assert_parts_add_up

from prosg_lib.config.sizes import Curriculum, OpenCurriculum, Training
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT
from prosg_lib.tasks.open_wording import Level
from prosg_lib.tasks.open_world import OpenBatch, OpenWorld, Shape, open_batch
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training.objectives import generator_objective, lm_objective
from prosg_lib.training.open_draws import QUESTIONS, generator_draw, lm_draw

SIZES = Training(20, 4, 1e-3, (3, 6, 12), (0, 64, 128))
CURRICULUM = Curriculum(alone=0.25, local=0.75)
ALONE, MIXED, LOCAL = 0, 10, 19
"""A step of each part of a generator's training."""


@pytest.fixture(scope="module")
def data() -> OpenWorld:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {"train": own_sentences("train")[:60]}), "train", tokenizer)
    return OpenWorld(tokenizer, prose, Level.named("known", "train"), 0)


def batch_of(data) -> OpenBatch:
    """With every kind of token in it; prompts of different lengths."""
    shape = Shape(2, 120, 2, others=1, before=20, unknown=1, instructions=1, prose=0.0)
    batch = open_batch(data, data.items(3, shape))
    assert {TEXT, ANSWER, COMPETING} <= set(batch.kind.unique().tolist())
    return batch


def without_others(batch: OpenBatch) -> OpenBatch:
    """Answers about other people are text."""
    return replace(batch, kind=batch.kind.masked_fill(batch.kind == COMPETING, TEXT))


def objective_of(lm, kind: str):
    """What is trained, and its loss."""
    if kind == "lm":
        return lm.requires_grad_(True), lm_objective(lm)
    generator = token_generator(lm.requires_grad_(False), std=0.3).to(lm.emb.weight.dtype)
    return generator, generator_objective(lm, generator, SIZES, 0, curriculum=CURRICULUM)


# What is drawn


def test_everything_is_trained_on_the_same_items(data, monkeypatch):
    """At every step the same batch, no item at two steps, but for the model's first steps."""
    taken = []
    real = OpenWorld.items
    monkeypatch.setattr(
        OpenWorld,
        "items",
        lambda self, count, shape, start=0: taken.append((start, count)) or real(self, 1, shape, start),
    )
    draws = [lm_draw(data, SIZES), generator_draw(data, SIZES, OpenCurriculum())]
    for step in range(SIZES.steps):
        model, generator = (draw(step) for draw in draws)
        assert taken == [(4 * step, 4)] * (1 if step < draws[0].copies else 2)
        taken.clear()
        if step >= draws[0].copies:
            assert torch.equal(model.context, generator.context)
            assert torch.equal(model.rest, generator.rest)
    assert [draw.near for draw in draws] == [14, 14]
    assert [draw.copies for draw in draws] == [2, 0]


def test_a_model_first_repeats_random_tokens(data):
    """All of them, and nothing else counts; the sequences of its first steps are the shortest."""
    draw = lm_draw(data, replace(SIZES, steps=200))
    lengths = []
    for step in range(draw.copies):
        batch = draw(step)
        whole, kind = torch.cat([batch.context, batch.rest], 1), torch.cat([0 * batch.context, batch.kind], 1)
        first, again = whole.chunk(2, 1)
        assert torch.equal(first, again)
        assert (kind.chunk(2, 1)[0] == 0).all()
        assert (kind.chunk(2, 1)[1] == ANSWER).all()
        lengths.append(first.shape[1])
    assert max(lengths[: draw.copies // 2]) == 5
    assert max(lengths[draw.copies // 2 :]) == 12
    assert not torch.equal(draw(0).rest[0, :2], draw(0).rest[1, :2])


def test_shapes_are_of_the_sizes(data):
    """Every number of facts and every distance occurs; a question for later only where the body has room for it."""
    draw = generator_draw(data, replace(SIZES, steps=400), OpenCurriculum())
    shapes = [draw.shape(step) for step in range(draw.near, 400)]
    assert {shape.facts for shape in shapes} == {3, 6, 12}
    assert {shape.distance for shape in shapes} == {0, 64, 128}
    assert {shape.probes for shape in shapes} == {3, QUESTIONS}
    for name in ("before", "others", "unknown", "instructions", "updates"):
        assert len({getattr(shape, name) for shape in shapes}) > 1, name
    assert all(shape.distance >= 64 for shape in shapes if shape.query)
    assert 0.1 < sum(shape.query for shape in shapes) / len(shapes) < 0.3
    assert shapes == [draw.shape(step) for step in range(draw.near, 400)]
    assert shapes != [replace(draw, data=replace(data, seed=1)).shape(step) for step in range(draw.near, 400)]


def test_first_steps_ask_immediately_behind_the_prompt(data):
    """Of two facts at most, then four, then of any number."""
    draw = generator_draw(data, replace(SIZES, steps=100), OpenCurriculum())
    shapes = [draw.shape(step) for step in range(100)]
    facts = [shape.facts for shape in shapes]
    assert (set(facts[:20]), set(facts[20:45]), set(facts[45:])) == ({1, 2}, {1, 2, 3, 4}, {3, 6, 12})
    assert set(shapes[:20]) == {Shape(1, 0, 1), Shape(2, 0, 2)}
    assert {(shape.distance, shape.before, shape.query) for shape in shapes[:70]} == {(0, 0, False)}
    assert {shape.distance for shape in shapes[70:]} == {0, 64, 128}


# What is minimised


def test_the_loss_of_a_model_is_a_sum_by_kind(lm, data):
    """Answers count most, other people's half, text least; without competing answers there is no such part."""
    _, loss_of = objective_of(lm, "lm")
    loss = loss_of(0, batch_of(data))
    expected = 0.3 * loss.parts["text"] + loss.parts["answer"] + 0.5 * loss.parts["competing"]
    torch.testing.assert_close(loss.total, expected)
    assert loss_of(0, without_others(batch_of(data))).parts.keys() == {"text", "answer"}


def test_the_loss_of_a_generator_follows_the_curriculum(lm, data):
    """First the answers alone; then text and competing answers, too; at last with locality."""
    _, loss_of = objective_of(lm, "generator")
    batch = batch_of(data)
    alone, mixed, local = (loss_of(step, batch) for step in (ALONE, MIXED, LOCAL))
    torch.testing.assert_close(alone.total, alone.parts["answer"])
    for loss in (mixed, local):
        expected = 0.5 * loss.parts["text"] + loss.parts["answer"] + loss.parts["competing"]
        locality = loss.parts.get("locality", torch.zeros(()))
        torch.testing.assert_close(loss.total, expected + CURRICULUM.locality * locality)
    assert "locality" not in mixed.parts
    assert local.parts["locality"] > 1e-3
    assert loss_of(MIXED, without_others(batch)).parts.keys() == {"text", "answer"}


def test_the_state_is_that_of_all_the_text_before(lm, data):
    """Where a prompt stands in mid-text, the change is made from the prompt alone and the state from all of it; while
    the change is trained alone, there is no state."""
    generator = token_generator(lm.requires_grad_(False), std=0.3)
    loss_of = generator_objective(lm, generator, SIZES, 0, curriculum=replace(CURRICULUM, blank=0.0))
    blank = generator_objective(lm, generator, SIZES, 0, curriculum=replace(CURRICULUM, blank=1.0))
    there = batch_of(data)
    without = replace(there, context=there.prompt, context_valid=there.prompt_valid)
    for loss, step, same in ((loss_of, ALONE, True), (loss_of, MIXED, False), (blank, MIXED, True)):
        first, second = (loss(step, batch).parts["answer"] for batch in (there, without))
        assert torch.equal(first, second) == same


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "step"), [("lm", 0), ("generator", ALONE), ("generator", MIXED), ("generator", LOCAL)]
)
def test_a_batch_in_parts_is_the_batch(lm64, data, kind, step, size):
    """Losses, what the log says, and gradients; though parts have other numbers of each kind of token."""
    module, loss_of = objective_of(lm64, kind)
    assert_parts_add_up(loss_of, step, batch_of(data), size, module.parameters(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "step"), [("lm", 0), ("generator", ALONE), ("generator", LOCAL)])
def test_a_few_steps_lower_the_loss(lm, data, kind, step):
    module, loss_of = objective_of(lm, kind)
    batch, losses = batch_of(data), []
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(6):
        loss = loss_of(step, batch)
        losses.append((loss.total.item(), loss.parts["answer"].item()))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert losses[-1][0] < losses[0][0] - 0.1
    assert losses[-1][1] < losses[0][1] - 0.1
