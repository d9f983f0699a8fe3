"""The forgetting explorer: its numbers against the model's own, and what its forms say."""

import re
from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt

from prosg_lib import explorer
from prosg_lib.errors import UserError
from prosg_lib.tasks.dialogue import Shape

DISTANCES, SCALES = (0, 24), (0.0, 0.5, 1.0)


@pytest.fixture
def small(writing):
    """A generator that changes something, a data set, and an item of it."""
    generator, data = writing
    return generator, data, data.item(0, Shape(3, 24, 3, instructions=1))


@pytest.fixture
def found(lm, small):
    generator, data, item = small
    return explorer.explore(lm, generator, data, data.encode_prompt(item), item.probes, item.body, DISTANCES, SCALES)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", SCALES)
def test_probabilities_are_the_models_own(lm, small, found, distance, scale):
    """Against one answer read alone, from the state after prompt and text; scale 0 without any delta."""
    generator, data, item = small
    prompt, probe = data.encode_prompt(item), item.probes[1]
    delta = generator.memorize(lm, [prompt]).scaled(scale) if scale else None
    state = lm.derive_state([prompt])
    if distance:
        state = lm.derive_state([item.body[:distance]], state, delta)
    question, answer = data.encode_probe(probe)
    with torch.no_grad():
        logits, _ = lm(torch.tensor([[*question, *answer]]), state, delta)
    chances = logits[0, len(question) - 1 : -2].softmax(-1)
    table = found.table[(found.table.distance == distance) & (found.table.scale == scale)]
    rows = table[table.slot == probe.fact.slot]
    assert rows.p.tolist() == pytest.approx(chances[range(len(answer) - 1), answer[:-1]].tolist(), rel=1e-3)
    assert rows.p_favourite.tolist() == pytest.approx(chances.max(-1).values.tolist(), rel=1e-3)
    assert "".join(rows.token) == probe.answer.replace(" ", "")
    assert found.values(distance, scale).value.tolist() == [p.fact.value for p in item.probes]


def test_sizes_are_those_of_the_change(lm, small, found):
    """Relative Frobenius norms of the matrices, written out."""
    generator, data, item = small
    delta = generator.memorize(lm, [data.encode_prompt(item)])
    for name, (u, v) in delta.factors.items():
        layer, kind = int(name.split(".")[1]), name.split(".", 2)[2]
        wanted = (delta.scale * u[0] @ v[0].T).norm() / lm.editable()[name].weight.norm()
        assert found.sizes.loc[layer, kind] == pytest.approx(wanted.item(), rel=1e-4)


def test_page_and_figure_say_the_same(found):
    """The number of values known, in both; the plain model's answers do not depend on the scale."""
    page, other = found.page(24, 1.0), found.page(24, 0.5)
    plain, changed = (int(found.values(24, s).known.sum()) for s in (0.0, 1.0))
    assert f"the plain model would name {plain} of 3 values" in page.summary
    assert f"ProSG at scale 1 would name {changed} of 3" in page.summary
    assert f"Another's at scale 1 would name {changed} of 3" in replace(found, name="Another's").page(24, 1.0).summary
    columns = [re.findall(r"<td>(.*?)</td>", p.blocks[0]) for p in (page, other)]
    assert columns[0][::2] == columns[1][::2]
    assert columns[0][1::2] != columns[1][1::2]
    figure, axes = plt.subplots(2, 2)
    words = found.draw(axes.flat, 24)
    assert f"the plain model would name {plain} of 3 values, and ProSG at scale 1 would name {changed} of 3." in words
    assert len(axes.flat[1].texts) == len(found.table[(found.table.distance == 24) & (found.table.scale == 1.0)])
    figure.canvas.draw()
    plt.close(figure)


def test_every_setting_is_in_the_form_without_a_kernel(found):
    shown = found.sliders(24).html()
    for distance in DISTANCES:
        for scale in SCALES:
            assert found.page(distance, scale).summary in shown


def test_facts_are_found_in_a_prompt_of_ones_own():
    """Values in their order, each once; instruction words shape the answers; nothing to ask about is said."""
    probes = explorer.probes_in("I live in Oslo, with a parrot. Oslo! Call me captain.")
    assert [(p.fact.slot, p.fact.value, p.answer) for p in probes] == [
        ("home", "Oslo", "Oslo, captain."), ("pet", "parrot", "parrot, captain.")]  # fmt: skip
    assert "my home town" in probes[0].question
    with pytest.raises(UserError, match="Try, for example: my pet is"):
        explorer.probes_in("I live in Atlantis.")


def test_own_prompt_is_read_when_the_button_is_pressed(lm, small):
    """New facts, with the sliders where they stood; what cannot be asked about is explained, and nothing is lost."""
    generator, data, item = small
    whole = explorer.own_prompt(lm, generator, data, item, DISTANCES, 24, SCALES)
    line, button, message, box = whole.children
    assert line.value == item.prompt.strip().removeprefix("User: ")
    box.children[1].value = 0.5
    line.value = "My pet is a parrot."
    button.click()
    *_, message, box = whole.children
    assert "1 facts: parrot" in message.value
    assert [slider.value for slider in box.children[:2]] == [24, 0.5]
    assert "of 1 values" in box.children[2].value
    line.value = "<Nothing>."
    button.click()
    assert "no fact that the model could know" in message.value
    assert "of 1 values" in whole.children[3].children[2].value
