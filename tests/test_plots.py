"""Styles and axes that all figures share."""

import pytest
from matplotlib.figure import Figure

from prosg_lib import plots
from prosg_lib.evaluation.baselines import METHODS, Baseline, Reinjection
from prosg_lib.evaluation.memory_tests import METHODS as MORE
from prosg_lib.evaluation.memory_tests import methods_of


@pytest.mark.parametrize(
    "methods",
    [
        [*METHODS, *(kind() for kind in Baseline.__subclasses__()), "transformer", "one of", "several others"],
        [
            *methods_of(None),
            *MORE,
            "prosg-token",
            "prosg-final",
            "static-read",
            "wrong",
            "adapter-wrong",
            "transformer",
        ],
    ],
)
def test_no_two_methods_of_a_figure_share_a_marker(methods):
    """So colour is never the only difference; every method has a style, a name that is not known included."""
    looks = plots.styles(methods)
    assert len(looks) == len(methods)
    assert len({look.marker for look in looks.values()}) == len(methods)
    assert len({look.label for look in looks.values()}) == len(methods)


def test_labels():
    """A baseline's numbers stand in its label, and an unknown name is its own label."""
    assert plots.styles([Reinjection(64, 0.3)])["reinject-64-0.3"].label == "state re-injected, 64, 0.3"
    assert plots.styles(["prosg-token"]) == {"prosg-token": plots.METHOD_STYLE["prosg-token"]}
    assert plots.styles(["mine"])["mine"].label == "mine"


@pytest.mark.parametrize(
    ("places", "slant"),
    [((64, 256, 1024), 0), ((0, 64, 128, 256, 512, 1024, 4096), 0), ((64, 512, 1024, 1536), 45), ((7,), 0)],
)
def test_crowded_numbers_are_slanted(places, slant):
    """On a logarithmic axis; every place has its number."""
    ax = Figure().subplots()
    plots.name_places(ax, places)
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{place:,}" for place in places]
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {slant}
