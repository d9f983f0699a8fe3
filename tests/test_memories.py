"""Memories added and removed: the bank's numbers against the library's own sum, and what its forms say."""

import re

import pytest
import torch
from matplotlib import pyplot as plt

from prosg_lib import memories
from prosg_lib.generators.several_prompts import common_part, joint_delta
from prosg_lib.tasks.dialogue import Shape


@pytest.fixture
def made(lm, writing):
    """A generator that changes something, its common part, and a bank of three memories with two facts each."""
    generator, data = writing
    item = data.item(0, Shape(6, 0, 6))
    common = common_part(lm, generator, ["My pet is a cat.", "I live in Rome."])
    return generator, common, memories.Bank.of_item(lm, generator, item, 3, common)


def product(delta, name):
    u, v = delta.factors[name]
    return delta.scale * u[0] @ v[0].T


@pytest.mark.parametrize(("inside", "once"), [((1, 1, 1), True), ((1, 0, 1), True), ((0, 1, 1), False), ((0, 1, 0), 1)])
def test_the_sum_is_the_librarys(lm, made, inside, once):
    """What is in the bank is `joint_delta` of those texts, with the common part once or not."""
    generator, common, bank = made
    texts = [text for text, ticked in zip(bank.texts, inside, strict=True) if ticked]
    wanted, found = joint_delta("add", lm, generator, texts, common if once else None), bank.delta(inside, once)
    for name in wanted.factors:
        torch.testing.assert_close(product(found, name), product(wanted, name), rtol=1e-4, atol=1e-5)


def test_a_memory_that_is_removed_leaves_nothing(made):
    """Adding B and C to A and removing both again is A; with none in there is no change."""
    bank = made[2]
    assert bank.delta((0, 0, 0)) is None
    back = bank.delta((1, 1, 1)) + bank.each.select([1]).scaled(-1) + bank.each.select([2]).scaled(-1)
    back = back + bank.common.scaled(2)
    for name in back.factors:
        torch.testing.assert_close(product(back, name), product(bank.each.select([0]), name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("inside", "scale"), [((1, 0, 1), 0.5), ((1, 1, 1), 0.0), ((0, 0, 0), 1.0)])
def test_probabilities_are_the_models_own(lm, made, inside, scale):
    """Against each question read alone, from a blank state; scale 0 and an empty bank are the plain model."""
    bank = made[2]
    delta, found = bank.delta(inside), bank.answers(inside, True, scale)
    for row, probe in zip(found.itertuples(), [p for group in bank.probes for p in group], strict=True):
        ids = torch.tensor([lm.tokenizer.encode(f"User: {probe.question}\nBot:")])
        with torch.no_grad():
            logits, _ = lm(ids, None, delta.scaled(scale) if delta and scale else None)
        chances = logits[0, -1].softmax(-1)
        assert row.p == pytest.approx(float(chances[lm.tokenizer.encode(f" {row.value}")[0]]), rel=1e-3)
        assert row.p_favourite == pytest.approx(float(chances.max()), rel=1e-3)
        assert row.value == probe.fact.value
    assert found.inside.tolist() == [bool(ticked) for ticked in inside for _ in range(2)]


def test_page_and_figure_say_the_same(made):
    bank = made[2]
    page, found = bank.page(True, False, True, True, 1.0), bank.answers((1, 0, 1))
    assert page.summary.startswith("In the weights: A and C, at scale 1, the common part once. The model would name ")
    assert f"{found[~found.inside].known.sum()} of the 2 values that are not" in page.summary
    assert re.findall(r"(\w) \((in|out)\)<br>", page.blocks[0]) == [("A", "in"), ("B", "out"), ("C", "in")]
    assert [text in page.blocks[0] for text in bank.texts] == [True] * 3
    figure, ax = plt.subplots()
    words = bank.draw(ax)
    named = page.summary.split("would name ")[1].removesuffix(".")
    assert f"with all but B, {named};" in words
    assert len(ax.texts) == 6 * 6  # nothing, A, A+B, A+B+C, all but B, plain sum; six facts
    figure.canvas.draw()
    plt.close(figure)


def test_every_setting_is_in_the_form_without_a_kernel(made):
    sliders = made[2].sliders([True, True, False])
    assert [control.start for control in sliders.controls] == [True, True, False, True, 1.0]
    shown = sliders.html()
    for ticks in ((True,) * 3, (False,) * 3, (False, True, False)):
        for once in (True, False):
            assert made[2].page(*ticks, once, 0.5).summary in shown


def test_memories_of_ones_own(lm, made):
    """One a line; what cannot be asked about, and too many, are explained, and what was there stays."""
    generator, common, _ = made
    whole = memories.own_memories(lm, generator, ["My pet is a parrot.", "I live in Oslo."], common)
    area, button, _, below = whole.children
    below.children[1].value = False
    assert "1 of the" in below.children[-1].value or "0 of the" in below.children[-1].value
    assert "In the weights: A, " in below.children[-1].value
    below.children[-2].value = 0.5
    for text, says in (("I live in Atlantis.", "no fact"), ("\n".join(["I live in Oslo."] * 7), "that is 7 memories")):
        area.value = text
        button.click()
        assert says in whole.children[2].value
        assert whole.children[3] is below
    area.value = "I live in Oslo.\n\nI live in Rome.\nMy pet is a cat."
    button.click()
    assert whole.children[2].value == "3 memories"
    assert [c.value for c in whole.children[3].children[:-1]] == [True, True, True, True, 0.5]
