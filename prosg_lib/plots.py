"""Figures: one palette, one style a method, and helpers for the figures that notebooks and reports share."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prosg_lib.errors import UserError

if TYPE_CHECKING:  # what only draws should not wait for torch
    from prosg_lib.evaluation.baselines import Baseline
    from prosg_lib.evaluation.memory_tests import Test
    from prosg_lib.evaluation.statistics import Estimate

# Okabe & Ito (2008), "Color Universal Design": distinguishable with any common colour vision.
PALETTE = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#777777",
}


class MethodStyle(NamedTuple):
    """How a method looks in every figure; no two share a marker, so colour is never the only difference."""

    label: str
    colour: str
    marker: str
    linestyle: str

    def kwargs(self) -> dict[str, str]:
        """Keyword arguments for `Axes.plot` and `Axes.errorbar`."""
        return {"label": self.label, "color": self.colour, "marker": self.marker, "linestyle": self.linestyle}


METHOD_STYLE = {
    "base": MethodStyle("plain model", PALETTE["black"], "o", "-"),
    "prosg-final": MethodStyle("ProSG, final state", PALETTE["orange"], "s", "-"),
    "prosg-token": MethodStyle("ProSG, token by token", PALETTE["blue"], "^", "-"),
    "wrong": MethodStyle("another prompt's delta", PALETTE["vermillion"], "x", "--"),
    "static": MethodStyle("static delta", PALETTE["purple"], "D", "--"),
    "static-read": MethodStyle("static delta, prompt read", PALETTE["sky"], "*", "--"),
    "none": MethodStyle("no prompt", PALETTE["grey"], "v", ":"),
    "repeated": MethodStyle("prompt repeated", PALETTE["green"], "P", "-."),
    "transformer": MethodStyle("transformer, looks back", PALETTE["black"], "+", ":"),
    "adapter": MethodStyle("gradient step", PALETTE["purple"], "p", "-"),
    "alone": MethodStyle("its delta alone", PALETTE["sky"], "h", "-."),
    "final-alone": MethodStyle("final state, its delta alone", PALETTE["orange"], "<", "-."),
    "adapter-alone": MethodStyle("gradient step alone", PALETTE["orange"], "d", "-."),
    "adapter-wrong": MethodStyle("another's gradient step", PALETTE["vermillion"], "1", ":"),
}

_FAMILY_STYLE = {
    "twice": MethodStyle("prompt read twice", PALETTE["orange"], "<", "-."),
    "every": MethodStyle("prompt read again", PALETTE["green"], ">", "-."),
    "reinject": MethodStyle("state re-injected", PALETTE["vermillion"], "h", "-."),
    "offset": MethodStyle("state offset", PALETTE["purple"], "p", "-."),
    "tuned": MethodStyle("state tuned", PALETTE["sky"], "d", "-."),
    "lora": MethodStyle("LoRA on the prompt", PALETTE["grey"], "X", "-."),
    "last": MethodStyle("transformer, last tokens", PALETTE["sky"], "1", ":"),
}
"""By family of `Baseline`."""

_SPARE = [MethodStyle("", PALETTE[c], m, ":") for c, m in {"grey": "2", "green": "3", "orange": "4"}.items()]


def styles(methods: Iterable[str | Baseline]) -> dict[str, MethodStyle]:
    """The style of every method by its name; a baseline has its numbers in the label, "prompt read again, 128".

    A name that is not known here is its own label, in a spare style.
    """
    found: dict[str, MethodStyle] = {}
    for method in methods:
        if isinstance(method, str):
            spare = _SPARE[len(found) % len(_SPARE)]
            found[method] = METHOD_STYLE.get(method, spare._replace(label=method))
        else:
            look = _FAMILY_STYLE[method.family]
            found[method.name] = look._replace(label=", ".join([look.label, *(f"{n:g}" for n in astuple(method))]))
    return found


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Readable defaults for the figures drawn inside `with plots.style():`."""
    with mpl.rc_context(
        {
            "figure.figsize": (7.0, 4.2),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.prop_cycle": mpl.cycler(color=[PALETTE[c] for c in PALETTE if c not in ("yellow", "grey")]),
            "grid.alpha": 0.3,
            "lines.linewidth": 1.8,
            "lines.markersize": 6,
            "legend.frameon": False,
        }
    ):
        yield


def png(fig: Figure) -> bytes:
    """The figure as an image; the same figure gives the same bytes."""
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=150)
    return image.getvalue()


@dataclass(frozen=True)
class Picture:
    """A PNG that a notebook shows with its words.

    JupyterLab, Colab and nbconvert leave out an image's alt text; of HTML they keep it. The image alone is there for
    what shows no HTML, such as a PDF.
    """

    content: bytes
    alt: str
    width: int

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        image = base64.b64encode(self.content).decode("ascii")
        shown = f'<img src="data:image/png;base64,{image}" alt="{html.escape(self.alt)}" width="{self.width}">'
        facts = {"alt": self.alt, "width": self.width}
        return {"text/html": shown, "image/png": image, "text/plain": self.alt}, {"image/png": facts}


def describe(fig: Figure, alt: str) -> Picture:
    """The figure as it is now, as a picture with these words; from now on notebooks show that when they show it."""
    from IPython.display import display

    found = Picture(png(fig), alt, round(100 * fig.get_figwidth()))
    fig._ipython_display_ = lambda: display(found)  # not _repr_mimebundle_: the PNG would be drawn a second time
    return found


_ROOM = 1 / 7  # share of the axis that a number of some thousands needs to stand upright beside the next


def name_places(ax: Axes, places: Sequence[int]) -> None:
    """A tick at every one of these places of a logarithmic x axis, and no other; slanted where two are close."""
    steps = np.diff(np.log([place for place in places if place > 0]))
    crowded = len(steps) > 0 and steps.min() < _ROOM * steps.sum()
    ax.set_xticks(list(places), [f"{place:,}" for place in places], rotation=45 if crowded else 0)
    ax.minorticks_off()


def estimates_by_distance(ax: Axes, table: pd.DataFrame, looks: Mapping[str, MethodStyle] | None = None) -> None:
    """`estimates` of a table of `statistics.by_distance`, on a logarithmic axis with 0 at its left end.

    Args:
        table: one row a method, one column a distance, cells `Estimate`.
        looks: method -> style, where it is not that of `styles`.
    """
    estimates(ax, table, looks)
    ax.set_xscale("symlog", linthresh=min((d for d in table if d > 0), default=1), linscale=0.5)
    name_places(ax, list(table))
    ax.set_xlabel("distance between prompt and question (tokens)")


def estimates_by_size(ax: Axes, table: pd.DataFrame, test: Test) -> str:
    """`estimates` of a table of `memory_tests.by_size`; returns in words what is seen.

    Args:
        table: as in `estimates_by_distance`, columns are sizes.
    """
    estimates(ax, table)
    ax.set_xscale("log")
    name_places(ax, list(table))
    ax.set(xlabel=test.size_label, ylabel=test.score, ylim=(-0.03, 1.03), title=test.title)
    return f"{test.title}, {test.score} by {test.size_label}, {in_words(table)}."


def in_words(table: pd.DataFrame) -> str:
    """Every method's values at the first and last place of a table of estimates."""
    looks, (first, *_, last) = styles(table.index), [*table, *list(table)[-1:]]
    ends = (f"{looks[m].label} {row[first].value:.2f} and {row[last].value:.2f}" for m, row in table.iterrows())
    return f"at {first:,} and at {last:,}: {'; '.join(ends)}"


def estimates(ax: Axes, table: pd.DataFrame, looks: Mapping[str, MethodStyle] | None = None) -> None:
    """One line a method with its intervals: one row a method, one column a place on the x axis; looks as above."""
    looks = styles(table.index) | dict(looks or {})
    for method, cells in table.iterrows():
        bars = np.transpose([cell.bars for cell in cells])
        values = [cell.value for cell in cells]
        ax.errorbar(table.columns, values, bars, capsize=2.5, elinewidth=1.0, **looks[method].kwargs())


def estimates_of_variants(
    axes: Sequence[Axes], table: pd.DataFrame, groups: Mapping[str, str], band: Iterable[str]
) -> None:
    """One panel a column and one line a row, first at the top: a dot with its interval, groups by colour and marker.

    Args:
        axes: one a column, with a common y axis.
        table: one row a variant, cells `Estimate`; a column's name is its x axis' label.
        groups: variant -> the group it belongs to.
        band: variants that differ only by chance; a stripe spans from the lowest of them to the highest.
    """
    looks = {}
    for group in groups.values():
        colours = [name for name in PALETTE if name not in ("yellow", "grey")]
        looks.setdefault(group, (PALETTE[colours[len(looks) % len(colours)]], "os^Dv<>Phpd"[len(looks)]))
    for ax, (label, cells) in zip(axes, table.items(), strict=True):
        alike = [cells[name].value for name in band]
        ax.axvspan(min(alike), max(alike), color="0.85", zorder=0)
        for y, (name, found) in enumerate(cells.items()):
            colour, marker = looks[groups[name]]
            bar = [[length] for length in found.bars]
            ax.errorbar([found.value], [y], xerr=bar, color=colour, marker=marker, capsize=2.5, elinewidth=1.0)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(table)), table.index)
    axes[0].set_ylim(len(table) - 0.5, -0.5)


COSTS = {
    "absorb_ms": "time to take in a prompt (ms)",
    "token_ms": "time a token afterwards (ms)",
    "kept_bytes": "kept of one text (bytes)",
}
"""The columns of `costs.measure` that a figure shows, and what its axes say."""


def recall_against_costs(
    axes: Sequence[Axes],
    costs: pd.DataFrame,
    recall: Mapping[str, Estimate],
    looks: Mapping[str, MethodStyle] | None = None,
) -> None:
    """Three panels: recall with its interval against each cost, costs on logarithmic axes with their quartiles.

    Where several methods share a marker, the later ones are hollow. A method whose cost is zero stands at the left
    edge of that panel.

    Args:
        axes: one a cost, in the order of `COSTS`.
        costs: of `costs.measure`, one row a method.
        recall: method -> `Estimate`, all at one distance; methods without costs are left out.
        looks: as in `estimates_by_distance`.
    """
    rows = [row for row in costs.to_dict("records") if row["method"] in recall]
    looks = styles(row["method"] for row in rows) | dict(looks or {})
    for ax, (column, label) in zip(axes, COSTS.items(), strict=True):
        floor = min((row[column] for row in rows if row[column] > 0), default=1.0) / 2
        seen = set()
        for row in rows:
            look, found = looks[row["method"]], recall[row["method"]]
            x = max(row[column], floor)
            low, high = row.get(f"{column}_low", x), row.get(f"{column}_high", x)
            ax.errorbar(
                [x],
                [found.value],
                [[length] for length in found.bars],
                [[max(0.0, x - max(low, floor))], [max(0.0, high - x)]],
                capsize=2.5,
                elinewidth=1.0,
                markersize=8,
                markerfacecolor="white" if look.marker in seen else look.colour,
                **look._replace(linestyle="none").kwargs(),
            )
            seen.add(look.marker)
        ax.set_xscale("log")
        if column.endswith("_ms"):  # 2 and 5, not 2 x 10^0
            ax.xaxis.set_major_formatter("{x:g}")
            low, high = ax.get_xlim()
            if high < 30 * low:  # otherwise powers of ten are enough
                ax.xaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5)))
                ax.xaxis.set_minor_formatter("{x:g}")
            else:
                ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        ax.set_xlabel(label)


def cost_alt(
    costs: pd.DataFrame,
    recall: Mapping[str, Estimate],
    distance: int,
    looks: Mapping[str, MethodStyle] | None = None,
) -> str:
    """The figure of `recall_against_costs` in words, for `save_figure`."""
    looks = styles(costs.method) | dict(looks or {})
    values = [
        f"{looks[row.method].label}: recall {recall[row.method].value:.2f}, {row.absorb_ms:.3g} ms a prompt, "
        f"{row.token_ms:.3g} ms a token, {row.kept_bytes:,} bytes"
        for row in costs.itertuples()
        if row.method in recall
    ]
    return (
        f"Recall {distance} tokens after the prompt against three costs, one panel each, on logarithmic axes: time to "
        f"take in a prompt, time a token afterwards, bytes kept. {'; '.join(values)}. Bars are 95 % intervals over "
        "prompts, and quartiles of the times."
    )


def knowledge_grid(axes: Sequence[Axes], table: pd.DataFrame, prompt: int) -> None:
    """One panel a method: a prompt's facts downwards, distances to the right, and in every cell the answer given.

    Right answers stand on blue with a tick, wrong ones on white with a cross.

    Args:
        axes: one a method, in the order of the table.
        table: of `recall.knowledge`.
    """
    part, looks = table[table.prompt == prompt], styles(table.method.unique())
    facts, distances = list(dict.fromkeys(part.slot)), sorted(part.distance.unique().tolist())
    for ax, (method, rows) in zip(axes, part.groupby("method", sort=False), strict=True):
        for row in rows.itertuples():
            x, y = distances.index(row.distance), facts.index(row.slot)
            colour = PALETTE["blue"] if row.right else "white"
            ax.add_patch(mpl.patches.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="0.75"))
            text = ("✓ " if row.right else "✗ ") + (row.answer if len(row.answer) <= 32 else row.answer[:31] + "…")
            ax.text(x, y, text.replace(", ", ",\n").replace(". ", ".\n"), ha="center", va="center", fontsize=7.5,
                    color="white" if row.right else "black", parse_math=False)  # fmt: skip
        ax.set_title(looks[method].label)
        ax.set_xlim(-0.5, len(distances) - 0.5)
        ax.set_ylim(len(facts) - 0.5, -0.5)
        ax.set_xticks(range(len(distances)), [f"{d:,}" for d in distances])
        ax.set_yticks(range(len(facts)), [f"{r.slot}: {r.value}" for r in rows.drop_duplicates("slot").itertuples()])
        ax.set_xlabel("distance between prompt and question (tokens)")
        ax.grid(False)


def knowledge_mosaic(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """One panel a method: every fact of every prompt a row, distances to the right; a square: right, a dot: wrong.

    Above every column stands the share of right answers.

    Args:
        axes: one a method, in the order of the table.
        table: of `recall.knowledge`.
    """
    distances, looks = sorted(table.distance.unique().tolist()), styles(table.method.unique())
    for ax, (method, rows) in zip(axes, table.groupby("method", sort=False), strict=True):
        wide = rows.pivot(index=["prompt", "slot"], columns="distance", values="right").to_numpy(dtype=bool)
        ys, xs = wide.nonzero()
        ax.scatter(xs, ys, marker="s", s=34, color=looks[method].colour)
        ys, xs = (~wide).nonzero()
        ax.scatter(xs, ys, marker=".", s=8, color=PALETTE["grey"])
        per = len(wide) // rows.prompt.nunique()
        for line in range(per, len(wide), per):
            ax.axhline(line - 0.5, color="0.8", linewidth=0.8)
        ax.set_title(looks[method].label, pad=22)
        for x, share in enumerate(wide.mean(0)):
            ax.annotate(f"{share:.0%}", (x, 1), (0, 4), xycoords=("data", "axes fraction"),
                        textcoords="offset points", ha="center")  # fmt: skip
        ax.set_xlim(-0.5, len(distances) - 0.5)
        ax.set_ylim(len(wide) - 0.5, -0.5)
        ax.set_xticks(range(len(distances)), [f"{d:,}" for d in distances])
        ax.set_yticks([(i + 0.5) * per - 0.5 for i in range(rows.prompt.nunique())],
                      [f"prompt {i}" for i in range(rows.prompt.nunique())])  # fmt: skip
        ax.set_xlabel("distance (tokens)")
        ax.grid(False)


def coloured_tokens(tokens: Sequence[str], values: Sequence[float]) -> str:
    """A text as HTML, each token on blue, darker the larger its value; hovering shows the value itself.

    Args:
        tokens: their texts, including spaces.
        values: one a token, 0 or more.
    Raises:
        UserError: the numbers of tokens and values differ.
    """
    if len(tokens) != len(values):
        raise UserError(f"{len(tokens)} tokens but {len(values)} values; one of each is needed")
    largest = max(values, default=0) or 1
    spans = []
    for token, value in zip(tokens, values, strict=True):
        share = max(0.0, value / largest)
        text = html.escape(token).replace("\n", "⏎")
        spans.append(
            f'<span title="{value:.3g}" style="background: rgba(0, 114, 178, {share:.2f}); '
            f'color: {"white" if share > 0.93 else "black"}">{text}</span>'
        )
    return '<p style="background: white; padding: 0.5em; line-height: 1.7">' + "".join(spans) + "</p>"
