"""The suite's figures: scores by size, one line a method, and for passkeys a map of length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prosg_lib import plots
from prosg_lib.plots import METHOD_STYLE, PALETTE, MethodStyle
from prosg_lib.reproduction.suite_pages import estimate_of

STYLES = METHOD_STYLE | {
    "adapter": MethodStyle("gradient step", PALETTE["purple"], "p", "-"),
    "alone": MethodStyle("its delta alone", PALETTE["sky"], "h", "-."),
    "adapter-alone": MethodStyle("gradient step alone", PALETTE["orange"], "d", "-."),
    "adapter-wrong": MethodStyle("another's gradient step", PALETTE["vermillion"], "1", ":"),
}

_AXES = {
    "copy": ("words to repeat", "share of tokens right"),
    "mqar": ("length of the sequence (tokens)", "share of queries right"),
    "phonebook": ("lines of the phone book", "share of numbers right"),
    "passkey": ("length of the text (tokens)", "share of keys right"),
}
"""task -> labels of the x axis, its size, and of the y axis."""


def label(method: str) -> str:
    """What a method is called in tables and figures."""
    return STYLES[method].label if method in STYLES else method


def figures(found: Mapping) -> dict[str, tuple[str, bytes]]:
    """Name -> what the figure shows in words, and a PNG.

    Args:
        found: of `forgetting_report.results`.
    """
    with plots.style():
        drawn = {task: _map(part) if task == "passkey" else _lines(task, part) for task, part in found["tasks"].items()}
        return {task: (alt, plots.png(figure)) for task, (alt, figure) in drawn.items()}


def by_size(ax: Axes, task: str, part: Mapping, methods: Sequence[str] | None = None) -> str:
    """Draws scores by a test's size, one line a method, cells of one size together; returns in words what is seen.

    Args:
        part: of `forgetting_report.results`' tasks. methods: those to draw; None: all.
    """
    methods = list(part["overall"]["methods"]) if methods is None else list(methods)
    x, y = _AXES[task]
    places = [place for cell in part["sizes"] for place in cell["cell"].values()]
    cells = [[estimate_of(cell["methods"][m]) for cell in part["sizes"]] for m in methods]
    table = pd.DataFrame(cells, index=methods, columns=places)
    plots.estimates(ax, table, {m: STYLES.get(m, MethodStyle(m, PALETTE["grey"], ".", "-")) for m in methods})
    ax.set_xscale("log")
    plots.name_places(ax, places)
    ax.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.03), title=part["title"])
    ends = "; ".join(
        f"{label(m)} {table.loc[m].iloc[0].value:.2f} and {table.loc[m].iloc[-1].value:.2f}" for m in methods
    )
    return f"{part['title']}, {y} by {x}, at {places[0]:,} and at {places[-1]:,}: {ends}."


def _lines(task: str, part: Mapping) -> tuple[str, Figure]:
    figure = Figure(figsize=(7.0, 4.2))
    ax = figure.subplots()
    alt = by_size(ax, task, part)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return alt, figure


def _map(part: Mapping) -> tuple[str, Figure]:
    methods = list(part["overall"]["methods"])
    lengths, depths = (sorted({cell["cell"][name] for cell in part["cells"]}) for name in ("length", "depth"))
    figure = Figure(figsize=(3.1 * min(3, len(methods)) + 0.6, 2.9 * -(-len(methods) // 3)))
    axes = figure.subplots(-(-len(methods) // 3), min(3, len(methods)), squeeze=False, sharex=True, sharey=True)
    for ax, method in zip(axes.flat, methods, strict=False):
        shares = {(c["cell"]["depth"], c["cell"]["length"]): c["methods"][method]["value"] for c in part["cells"]}
        grid = pd.DataFrame([[shares.get((d, n), float("nan")) for n in lengths] for d in depths])
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (depth, length), share in shares.items():
            ax.text(lengths.index(length), depths.index(depth), f"{share:.2f}", ha="center", va="center", fontsize=8,
                    color="black" if share > 0.55 else "white")  # fmt: skip
        ax.set_title(label(method), fontsize=10)
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        ax.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        ax.set(xlabel="length of the text (tokens)", ylabel="depth of the key")
        ax.label_outer()
        ax.grid(False)
    for ax in axes.flat[len(methods) :]:
        ax.set_visible(False)
    figure.colorbar(image, ax=axes, label="share of keys right")
    means = "; ".join(f"{label(m)} {part['overall']['methods'][m]['value']:.2f}" for m in methods)
    return (
        f"{part['title']}: one map a method of the share of keys right by length and depth; over all of it: {means}.",
        figure,
    )
