"""The sliders and widgets, and the table of single answers that they and their figures show."""

import base64
import html
import io
import json
import math
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from ipywidgets import HTML, Checkbox, SelectionSlider
from matplotlib import pyplot as plt

from prosg_lib import plots, widgets
from prosg_lib.errors import UserError
from prosg_lib.evaluation.recall import knowledge, measure
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import Dialogues, Shape
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences


def row(method, distance, slot, value, answer, right):
    question = f"Tell me my {slot}."
    return {"method": method, "distance": distance, "prompt": 0, "slot": slot, "value": value, "question": question,
            "answer": answer, "right": right, "followed": 1.0}  # fmt: skip


@pytest.fixture
def sums():
    """Two sliders above their values and sum; a page without anything that differs between some settings."""
    controls = (widgets.Control("first", (1, 2, 3), 2, "{}"), widgets.Control("second", (0.5, 1000), 0.5))
    return widgets.Sliders(controls, lambda a, b: widgets.Page(f"{a} < {b}?", (f"<p>{a + b}</p>", "<b>the same</b>")))


def test_live_sliders_show_the_page_they_stand_at(sums):
    """Each move makes the page of its setting; only what the versions 7.7.1 and 8 of ipywidgets share is used."""
    first, second, shown = sums.live().children
    assert isinstance(first, SelectionSlider)
    assert isinstance(shown, HTML)
    assert "2 &lt; 0.5?" in shown.value
    first.value, second.value = 3, 1000
    assert "3 &lt; 1000?" in shown.value
    assert "<p>1003</p><b>the same</b>" in shown.value
    assert second.options == (("0.5", 0.5), ("1,000", 1000))


def test_the_form_without_a_kernel_holds_every_page(sums):
    """Pages in the order of the sliders, the last fastest; each text is there once; nothing from outside."""
    shown = sums.html()
    data = json.loads(re.search(r"const data = (.*);\n", shown).group(1))
    pages = [[data["texts"][number] for number in page] for page in data["pages"]]
    assert pages == [[f"{a} < {b}?", f"<p>{a + b}</p>", "<b>the same</b>"] for a, b in product((1, 2, 3), (0.5, 1000))]
    assert data["texts"].count("<b>the same</b>") == 1
    assert shown.count("</script>") == 1
    assert not re.search(r"https?:|src=|@import|url\(", shown)
    assert repr(sums) == "2 < 0.5?"
    assert '<p role="status">2 &lt; 0.5?</p>' in shown  # what is seen where scripts do not run
    assert re.findall(r"<span>(.*?)</span><input type=\"range\" min=\"0\" max=\"(.)\" value=\"(.)\">", shown) == [
        ("first", "2", "1"), ("second", "1", "0")]  # fmt: skip


def test_a_slider_starts_at_one_of_its_values():
    with pytest.raises(UserError, match="rank cannot start at 3; its values are 1, 2"):
        widgets.Sliders((widgets.Control("rank", (1, 2), 3),), lambda rank: widgets.Page("", ()))


@pytest.mark.parametrize("ticked", [True, False])
def test_a_box_to_tick_is_off_or_on(ticked):
    """In both forms, where it starts and what it gives; beside a slider."""
    controls = (widgets.Tick("memory A", ticked), widgets.Control("scale", (0, 1), 1, "{}"))
    boxes = widgets.Sliders(controls, lambda a, b: widgets.Page(f"{a} and {b}", ()))
    box, slider, shown = boxes.live().children
    assert isinstance(box, Checkbox)
    assert f"{ticked} and 1" in shown.value
    box.value, slider.value = not ticked, 0
    assert f"{not ticked} and 0" in shown.value
    page = boxes.html()
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))
    assert [data["texts"][number] for (number,) in data["pages"]] == [
        "False and 0",
        "False and 1",
        "True and 0",
        "True and 1",
    ]
    assert f'<input type="checkbox"{" checked" if ticked else ""}>' in page


def test_rank_slider_says_what_a_rank_keeps():
    """Energy, error and size by hand; as many bars filled as the rank, the others outlined."""
    slider = widgets.rank_slider([8, 4, 2, 1], (128, 512), ranks=3)
    assert slider.controls[0].values == (1, 2, 3)
    page = slider.page(2)
    kept = 80 / 85
    assert f"{kept:.1%} of the energy kept, relative error {math.sqrt(1 - kept):.2f}, 1,280 numbers" in page.summary
    filled, outlined = re.findall(r'class="o[nf]+" d="(.*?)"', page.blocks[0])
    assert (filled.count("M"), outlined.count("M")) == (2, 2)


def test_decay_slider_shows_the_matrix_it_is_given():
    """The image has the weights as opacity; the words have the half-life."""
    asked = []

    def matrix_of(decay):
        asked.append(decay)
        return np.tril(np.ones((40, 40)))

    page = widgets.decay_slider(matrix_of, (0.1, 0.2)).page(0.1)
    assert asked == [0.1]
    assert f"halves every {math.log(2) / 0.1:.1f} tokens; after 32 tokens 0.041" in page.summary
    image = plt.imread(io.BytesIO(base64.b64decode(re.search(r"base64,(.*?)\"", page.blocks[0]).group(1))), "png")
    np.testing.assert_array_equal(image[..., 3], np.tril(np.ones((40, 40))))
    assert "M0 32H40M32 0V40" in page.blocks[0]


@pytest.fixture
def table():
    """Two facts at two distances; the plain model loses one of them."""
    return pd.DataFrame(
        [
            row("base", 0, "pet", "parrot", "parrot.", True),
            row("base", 0, "home", "Oslo", "Oslo.", True),
            row("base", 64, "pet", "parrot", "<b>cat & dog</b> $5^ $6^.", False),
            row("base", 64, "home", "Oslo", "Oslo.", True),
            row("prosg-token", 0, "pet", "parrot", "parrot.", True),
            row("prosg-token", 0, "home", "Oslo", "", False),
            row("prosg-token", 64, "pet", "parrot", "parrot.", True),
            row("prosg-token", 64, "home", "Oslo", "Oslo.", True),
        ]
    )


@pytest.fixture
def measured(lm):
    """The same prompts by `knowledge` and by `measure`, with an untrained model."""
    data = Dialogues(lm.tokenizer, ProseTokens.of(Prose("own", {"test": own_sentences("test")}), "test", lm.tokenizer),
                     "test", seed=3)  # fmt: skip
    generators = {"token": TokenGenerator(lm, 2, 8, ("att.output",))}
    methods = ("base", "prosg-token")
    known = knowledge(lm, generators, methods, data, (0, 24), facts=3, prompts=2)
    return data, known, measure(lm, generators, methods, data, (0, 24), facts=3, prompts=2, probes=3)


def test_knowledge_counts_what_measure_counts(measured):
    """The share of right answers a prompt is its recall, the mean of `followed` its instruction rate."""
    _, known, means = measured
    shares = known.groupby(["method", "distance", "prompt"])[["right", "followed"]].mean()
    wanted = means.set_index(["method", "distance", "prompt"])
    pd.testing.assert_series_equal(shares.right, wanted.recall.sort_index(), check_names=False)
    pd.testing.assert_series_equal(shares.followed, wanted.followed.sort_index(), check_names=False)


def test_knowledge_tells_the_facts_in_the_order_of_the_prompt(measured):
    """Every fact once, with its own question, as the prompt tells them."""
    data, known, _ = measured
    for number, part in known[(known.method == "base") & (known.distance == 24)].groupby("prompt"):
        item = data.item(number, Shape(3, 24, 3, instructions=2))
        assert list(zip(part.slot, part.value, strict=True)) == [(f.slot, f.value) for f in item.facts]
        assert set(part.question) == {p.question for p in item.probes}


def test_figures_show_what_the_table_has(table):
    """Grid: the answers of every cell as they are, ticked or crossed; mosaic: as many squares as right answers."""
    figure, axes = plt.subplots(1, 2)
    plots.knowledge_grid(axes, table, prompt=0)
    texts = [[t.get_text() for t in ax.texts] for ax in axes]
    assert [sum(t.startswith("✓") for t in panel) for panel in texts] == [3, 3]
    assert "✗ <b>cat & dog</b> $5^ $6^." in texts[0]
    figure.canvas.draw()  # which would read $...$ as a formula
    plt.close(figure)
    figure, axes = plt.subplots(1, 2)
    plots.knowledge_mosaic(axes, table)
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [3, 3]
    assert [len(ax.collections[1].get_offsets()) for ax in axes] == [1, 1]
    plt.close(figure)


def test_coloured_tokens_show_the_text_itself():
    """Every token once and in order, escaped; the larger its value the deeper its colour, the largest in full."""
    shown = plots.coloured_tokens(["a<b", " c", "\n"], [0.5, 2.0, 0.0])
    texts = re.findall(r">([^<]*)</span>", shown)
    assert [html.unescape(t) for t in texts] == ["a<b", " c", "⏎"]
    assert re.findall(r"rgba\(0, 114, 178, ([0-9.]+)\)", shown) == ["0.25", "1.00", "0.00"]
    assert re.findall(r'title="([^"]*)"', shown) == ["0.5", "2", "0"]
    with pytest.raises(UserError, match="2 tokens but 1 values"):
        plots.coloured_tokens(["a", "b"], [1.0])
