"""The suite's figures: every axis named, every method in every figure, and words for those who do not see them."""

import pytest
from matplotlib.figure import Figure

from prosg_lib import plots
from prosg_lib.evaluation.problem_evaluation import METHODS as MORE
from prosg_lib.evaluation.problem_evaluation import methods_of
from prosg_lib.reproduction.forgetting_figures import STYLES, figures, label

METHODS = ["base", "adapter", "alone", "wrong"]
CELLS = {
    "copy": [{"words": n} for n in (1, 5, 20)],
    "mqar": [{"length": 64, "pairs": 4}, {"length": 128, "pairs": 8}],
    "phonebook": [{"lines": 3}],
    "passkey": [{"length": n, "depth": d} for n in (64, 256) for d in (0.0, 0.5, 1.0)],
}


@pytest.fixture
def found():
    def estimates(value):
        return {m: {"value": value, "low": value - 0.05, "high": value + 0.05} for m in METHODS}

    return {
        "tasks": {
            task: {
                "title": task.title(),
                "cells": [{"cell": cell, "methods": estimates(0.1 * i)} for i, cell in enumerate(cells)],
                "sizes": [
                    {"cell": dict([*cell.items()][:1]), "methods": estimates(0.1 * i)} for i, cell in enumerate(cells)
                ],
                "overall": {"methods": estimates(0.25)},
            }
            for task, cells in CELLS.items()
        }
    }


@pytest.fixture
def drawn(found, monkeypatch):
    """task -> the figure, before it became an image."""
    kept = []
    png = plots.png
    monkeypatch.setattr(plots, "png", lambda figure: kept.append(figure) or png(figure))
    figures(found)
    return dict(zip(CELLS, kept, strict=True))


def test_axes_are_named_and_every_method_is_there(drawn):
    """Lines by size with a legend of all methods; x and y say what they are."""
    for task, x in (("copy", "words to repeat"), ("mqar", "length of the sequence (tokens)"), ("phonebook", "lines")):
        (ax,) = drawn[task].axes
        assert x in ax.get_xlabel()
        assert "share of" in ax.get_ylabel()
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [label(m) for m in METHODS]
        assert [round(t) for t in ax.get_xticks()] == [next(iter(cell.values())) for cell in CELLS[task]]


def test_the_map_of_lengths_and_depths(drawn):
    """A panel a method; every square has its number, in its place, and the colours their bar."""
    *panels, bar = drawn["passkey"].axes
    shown = [ax for ax in panels if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == [label(m) for m in METHODS]
    ax = shown[0]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(0, 0): "0.00", (0, 1): "0.10", (0, 2): "0.20", (1, 0): "0.30", (1, 1): "0.40", (1, 2): "0.50"}
    assert ax.images[0].get_array()[1, 1] == pytest.approx(0.4)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "0.5", "1"]
    assert shown[-1].get_xlabel() == "length of the text (tokens)"
    assert shown[0].get_ylabel() == "depth of the key"
    assert bar.get_ylabel() == "share of keys right"


def test_what_they_say_in_words(found):
    """The figures' texts have the numbers of every method."""
    images = figures(found)
    assert list(images) == list(CELLS)
    for task, (alt, image) in images.items():
        assert image.startswith(b"\x89PNG")
        assert all(label(m) in alt for m in METHODS)
        assert ("0.25" if task == "passkey" else "0.00") in alt


def test_the_same_numbers_are_the_same_image(found):
    """Byte by byte, so that what is recomputed can be compared."""
    assert figures(found) == figures(found)


def test_no_two_methods_look_alike():
    """Colour is never the only difference: no two methods of one figure share a marker, and all have a style."""
    every = {*methods_of(None), *MORE, "prosg-token", "prosg-final", "static-read", "wrong"}
    assert every <= set(STYLES)
    assert len({STYLES[m].marker for m in every}) == len(every)
    assert label("a method of a later version") == "a method of a later version"


@pytest.mark.parametrize(
    ("places", "slant"),
    [((64, 256, 1024), 0), ((0, 64, 128, 256, 512, 1024, 4096), 0), ((64, 512, 1024, 1536), 45), ((7,), 0)],
)
def test_numbers_that_would_run_into_each_other_stand_aslant(places, slant):
    """On a logarithmic axis; every place has its number."""
    ax = Figure().subplots()
    plots.name_places(ax, places)
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{place:,}" for place in places]
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {slant}
