"""Drawings that explain an architecture."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from prosg_lib.plots import PALETTE

_EDITED = {"facecolor": PALETTE["blue"], "edgecolor": PALETTE["blue"], "linewidth": 1.5}
_STATE = {"facecolor": "white", "edgecolor": PALETTE["vermillion"], "linewidth": 1.8, "linestyle": "--"}
_PLAIN = {"facecolor": "white", "edgecolor": "black", "linewidth": 1.2}

RWKV4_BLOCK_ALT = (
    "A block of RWKV-4 as two rows, each with a residual path over it. Time mix: layer norm ln1, token shift (state: "
    "att_shift), the maps att.receptance, att.key and att.value, the weighted mean WKV of keys and values (state: num, "
    "den, m), times the sigmoid of the receptance, then att.output. Channel mix: layer norm ln2, token shift "
    "(state: ffn_shift), the maps ffn.receptance and ffn.key, relu squared, ffn.value, times the sigmoid of the "
    "receptance. Filled boxes, which ProSG edits: att.value, att.output, ffn.key, ffn.value."
)


def rwkv4_block(ax: Axes) -> None:
    """One block of RWKV-4, left to right: filled boxes are the maps that a delta edits, dashed ones hold the state."""
    _row(ax, 4.2, "time mix", "ln1", "att_shift", "x", "x'")
    _box(ax, 4.6, 5.1, "att.receptance", _PLAIN)
    _box(ax, 4.6, 4.2, "att.key", _PLAIN)
    _box(ax, 4.6, 3.3, "att.value", _EDITED)
    _box(ax, 6.9, 5.1, "sigmoid", _PLAIN)
    _box(ax, 6.9, 3.75, "WKV: weighted\nmean of values", _PLAIN, height=0.9)
    _box(ax, 6.9, 2.75, "num, den, m", _STATE)
    _sign(ax, 8.6, 4.2, "×")
    _box(ax, 10.0, 4.2, "att.output", _EDITED)
    for y in (5.1, 4.2, 3.3):
        _arrow(ax, (3.2, 4.2), (3.85, y))
    for start, end in (
        ((5.35, 5.1), (6.1, 5.1)),
        ((5.35, 4.2), (6.12, 3.9)),
        ((5.35, 3.3), (6.12, 3.6)),
        ((7.65, 5.1), (8.48, 4.35)),
        ((7.67, 3.75), (8.45, 4.1)),
        ((8.78, 4.2), (9.25, 4.2)),
        ((10.77, 4.2), (11.18, 4.2)),
    ):
        _arrow(ax, start, end)
    _arrow(ax, (6.9, 3.0), (6.9, 3.3), style="<->")

    _row(ax, 0.6, "channel mix", "ln2", "ffn_shift", "x'", "x''")
    _box(ax, 4.6, 1.3, "ffn.receptance", _PLAIN)
    _box(ax, 4.6, -0.1, "ffn.key", _EDITED)
    _box(ax, 6.9, 1.3, "sigmoid", _PLAIN)
    _box(ax, 6.5, -0.1, "relu²", _PLAIN, width=0.9)
    _box(ax, 8.1, -0.1, "ffn.value", _EDITED)
    _sign(ax, 10.0, 0.6, "×")
    for start, end in (
        ((3.2, 0.6), (3.85, 1.3)),
        ((3.2, 0.6), (3.85, -0.1)),
        ((5.37, 1.3), (6.13, 1.3)),
        ((5.37, -0.1), (6.03, -0.1)),
        ((6.97, -0.1), (7.33, -0.1)),
        ((7.67, 1.3), (9.83, 0.68)),
        ((8.87, -0.1), (9.85, 0.5)),
        ((10.17, 0.6), (11.18, 0.6)),
    ):
        _arrow(ax, start, end)
    for x, look, text in ((1.6, _EDITED, "edited by ProSG"), (5.4, _STATE, "state, kept from token to token")):
        ax.add_patch(FancyBboxPatch((x - 0.55, -1.45), 0.5, 0.25, boxstyle="round,pad=0.04", **look))
        ax.text(x + 0.1, -1.33, text, va="center")
    ax.set(xlim=(-0.6, 12.4), ylim=(-1.6, 6.1), aspect="equal")
    ax.axis("off")


def _row(ax: Axes, y: float, title: str, norm: str, state: str, before: str, after: str) -> None:
    """What both halves begin and end with: residual path, layer norm, token shift with its state, sum."""
    top = y + 1.55
    ax.text(-0.35, top + 0.1, title, weight="bold", fontsize=12)
    ax.text(-0.35, y, before, va="center", ha="center", style="italic")
    ax.text(12.1, y, after, va="center", ha="center", style="italic")
    _arrow(ax, (11.53, y), (11.95, y))
    _box(ax, 0.85, y, norm, _PLAIN, width=0.7)
    _box(ax, 2.5, y, "token shift", _PLAIN, width=1.35)
    _box(ax, 2.5, y - 0.85, state, _STATE, width=1.35)
    _arrow(ax, (-0.1, y), (0.47, y))
    _arrow(ax, (1.22, y), (1.8, y))
    _arrow(ax, (2.5, y - 0.6), (2.5, y - 0.27), style="<->")
    _sign(ax, 11.35, y, "+")
    ax.plot([0.15, 0.15, 11.35], [y, top, top], color="black", linewidth=1.2)
    _arrow(ax, (11.35, top), (11.35, y + 0.18))


def _box(ax: Axes, x: float, y: float, text: str, look: dict, width: float = 1.5, height: float = 0.5) -> None:
    corner, size = (x - width / 2, y - height / 2), (width, height)
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02,rounding_size=0.08", zorder=2, **look))
    edited = look is _EDITED
    ax.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3, color="white" if edited else "black",
            weight="bold" if edited else "normal")  # fmt: skip


def _sign(ax: Axes, x: float, y: float, text: str) -> None:
    ax.add_patch(Circle((x, y), 0.17, zorder=2, **_PLAIN))
    ax.text(x, y, text, ha="center", va="center", fontsize=12, zorder=3)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "->") -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": style, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0})
