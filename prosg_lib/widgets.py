"""Figures with sliders and boxes: live in a notebook, and as HTML that needs no kernel and nothing from elsewhere.

What is shown is one function of their values (`Page`); both forms call it. Beside each stands a static figure.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import ipywidgets
import numpy as np
from matplotlib.image import imsave

from prosg_lib.errors import UserError

_STYLE = """<style>
.prosg { --ink: #1a1a1a; --paper: #fff; --line: #767676; color-scheme: light; color: var(--ink);
  background: var(--paper); font: 14px/1.5 system-ui, sans-serif; padding: 0.7em 1em; overflow-x: auto }
.prosg .controls:not([hidden]) { display: grid; grid-template-columns: max-content minmax(8em, 24em) max-content;
  gap: 0.1em 0.8em; align-items: center }
.prosg .controls label { display: contents; font-weight: 600 } .prosg .controls input { accent-color: #0072b2 }
.prosg .controls input[type=checkbox] { justify-self: start; width: 1.2em; height: 1.2em; margin: 0.25em 0 }
.prosg table { border-collapse: collapse; margin: 0.4em 0 0.8em; color: inherit; font-size: inherit; text-align: left }
.prosg caption, .prosg figcaption { text-align: left; padding: 0.2em 0; color: inherit; font-size: inherit }
.prosg caption { font-weight: 600 }
.prosg tr { background: none !important }
.prosg td, .prosg th { border: 1px solid var(--line); padding: 0.2em 0.5em; text-align: left !important;
  color: inherit; line-height: 1.6 }
.prosg td b { display: inline-block; margin: 0.05em 0; padding: 0 0.3em; white-space: nowrap;
  background: rgb(0 114 178 / calc(0.7 * var(--share))); font-weight: inherit }
.prosg figure { margin: 0.4em 0 } .prosg svg { display: block; max-width: 100%; height: auto }
.prosg .on { fill: #0072b2; stroke: var(--ink) } .prosg .off { fill: none; stroke: var(--line); stroke-dasharray: 2 1 }
.prosg .edge { fill: none; stroke: var(--line) } .prosg svg text { fill: var(--ink); font-size: 11px }
@media (prefers-color-scheme: dark) { .prosg { --ink: #eee; --paper: #1b1b1b; --line: #9a9a9a; color-scheme: dark } }
</style>"""

# Runs in the page, with {id} and {data} filled in; an output that is shown in two places is set up in both.
_SCRIPT = """(() => {
  const data = DATA;
  const place = (input) => Number(input.type === "checkbox" ? input.checked : input.value);
  for (const root of document.querySelectorAll('[data-prosg="ID"]')) {
    if (root.dataset.ready) continue;
    root.dataset.ready = "yes";
    const controls = root.querySelector(".controls"), inputs = [...controls.querySelectorAll("input")];
    const summary = root.querySelector("[role=status]"), blocks = [...root.querySelectorAll(".block")];
    const show = () => {
      let number = 0;
      inputs.forEach((input, i) => {
        const shown = data.options[i][place(input)];
        number = number * data.options[i].length + place(input);
        if (input.type === "range") input.setAttribute("aria-valuetext", shown);
        controls.querySelectorAll(".at")[i].textContent = shown;
      });
      const page = data.pages[number];
      summary.textContent = data.texts[page[0]];
      blocks.forEach((block, i) => { block.innerHTML = data.texts[page[i + 1]]; });
    };
    inputs.forEach((input) => input.addEventListener("input", show));
    controls.hidden = false;
    show();
  }
})();"""


class Control(NamedTuple):
    """One slider: what it is called, the values that it can stand at, the first of them shown, and how they are put."""

    label: str
    values: Sequence[float]
    start: float
    form: str = "{:,g}"

    def shown(self) -> list[str]:
        return [self.form.format(value) for value in self.values]


class Tick(NamedTuple):
    """A box to tick: what it is called, and whether it is ticked at first."""

    label: str
    start: bool
    values = (False, True)

    def shown(self) -> list[str]:
        return ["off", "on"]


class Page(NamedTuple):
    """What the sliders show at one setting.

    Attributes:
        summary: plain text; a screen reader says it after each move.
        blocks: HTML, one below the other, as many at every setting.
    """

    summary: str
    blocks: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Sliders:
    """Sliders above what they show. As a cell's last value it is shown in the form that needs no kernel.

    Attributes:
        page: the values of the controls -> Page.
    Raises:
        UserError: a control starts at a value that it does not have.
    """

    controls: tuple[Control | Tick, ...]
    page: Callable[..., Page]

    def __post_init__(self):
        for control in self.controls:
            if control.start not in control.values:
                have = ", ".join(control.shown())
                raise UserError(f"{control.label} cannot start at {control.start}; its values are {have}")

    def live(self) -> ipywidgets.VBox:
        """As widgets, which need a running kernel: each page is made when it is asked for."""
        sliders = [_live(control) for control in self.controls]
        shown = ipywidgets.HTML()

        def show(_=None) -> None:
            summary, blocks = self.page(*(slider.value for slider in sliders))
            shown.value = f'{_STYLE}<div class="prosg"><p>{html.escape(summary)}</p>{"".join(blocks)}</div>'

        for slider in sliders:
            slider.observe(show, names="value")
        show()
        return ipywidgets.VBox([*sliders, shown])

    def html(self) -> str:
        """As HTML that works without a kernel and without a network: every page is in it, each text once.

        Without scripts (on GitHub, or in a notebook that is not trusted) it shows the page at the start.
        """
        texts: dict[str, int] = {}
        pages = [
            [texts.setdefault(text, len(texts)) for text in (page.summary, *page.blocks)]
            for page in (self.page(*values) for values in product(*(control.values for control in self.controls)))
        ]
        data = {"options": [control.shown() for control in self.controls], "texts": [*texts], "pages": pages}
        packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        name = hashlib.sha256(packed.encode()).hexdigest()[:12]
        first = self._first()
        inputs = "".join(
            f"<label><span>{html.escape(control.label)}</span>{_input(control)}</label>"
            '<span class="at" aria-hidden="true"></span>'
            for control in self.controls
        )
        script = _SCRIPT.replace("ID", name).replace("DATA", packed)
        return (
            f'<div class="prosg" data-prosg="{name}">{_STYLE}<div class="controls" hidden>{inputs}</div>'
            f'<p role="status">{html.escape(first.summary)}</p>'
            + "".join(f'<div class="block">{block}</div>' for block in first.blocks)
            + f"<script>{script}</script></div>"
        )

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return self._first().summary

    def _first(self) -> Page:
        return self.page(*(control.start for control in self.controls))


def _live(control: Control | Tick) -> ipywidgets.Widget:
    if isinstance(control, Tick):
        return ipywidgets.Checkbox(value=control.start, description=control.label, indent=False)
    return ipywidgets.SelectionSlider(
        options=list(zip(control.shown(), control.values, strict=True)),
        value=control.start,
        description=control.label,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="34em"),
    )


def _input(control: Control | Tick) -> str:
    if isinstance(control, Tick):
        return f'<input type="checkbox"{" checked" * control.start}>'
    place = list(control.values).index(control.start)
    return f'<input type="range" min="0" max="{len(control.values) - 1}" value="{place}">'


def typed(
    field: ipywidgets.Text | ipywidgets.Textarea,
    button: str,
    make: Callable[[str, list | None], tuple[str, Sliders]],
) -> ipywidgets.VBox:
    """A field to type in, a button, and below them the live form of what `make` makes of the text; needs a kernel.

    Args:
        make: the text, and how the controls below stand (None: there are none yet) -> a message and new controls. What
            it cannot read it refuses with a `UserError`, which is shown; the controls below then stay.
    """
    press, message = ipywidgets.Button(description=button), ipywidgets.HTML()
    whole = ipywidgets.VBox([field, press, message])

    def read(_=None) -> None:
        press.disabled, message.value = True, "reading …"
        try:
            below = whole.children[3].children[:-1] if len(whole.children) > 3 else None
            said, sliders = make(field.value, below and [control.value for control in below])
            message.value = html.escape(said)
            whole.children = (field, press, message, sliders.live())
        except UserError as error:
            message.value = html.escape(str(error))
        finally:
            press.disabled = False

    press.on_click(read)
    read()
    return whole


def shaded(text: str, share: float) -> str:
    """A table cell's HTML on blue, the deeper the larger the share; it stays readable on light and on dark ground."""
    return f"<b style=--share:{min(1.0, max(0.0, share)):.2f}>{text}</b>"


def rank_slider(singular: Sequence[float], shape: tuple[int, int], ranks: int = 32) -> Sliders:
    """The best approximation of a matrix by rank: its spectrum with the kept part marked, energy kept, error, size.

    Args:
        singular: the matrix' singular values, largest first.
        shape: (out, in).
        ranks: the largest rank on the slider, unless there are fewer singular values.
    """
    values = np.asarray(singular, dtype=float)
    energy, full = np.cumsum(values**2) / np.sum(values**2), math.prod(shape)

    def page(rank: int) -> Page:
        error, numbers = math.sqrt(max(0.0, 1 - energy[rank - 1])), rank * sum(shape)
        summary = (
            f"Rank {rank} of {len(values)}: {energy[rank - 1]:.1%} of the energy kept, relative error {error:.2f}, "
            f"{numbers:,} numbers instead of {full:,}."
        )
        return Page(summary, (_bars(values / values[0], rank, summary),))

    last = min(ranks, len(values))
    return Sliders((Control("rank r", tuple(range(1, last + 1)), min(4, last), "{}"),), page)


def _bars(heights: np.ndarray, kept: int, words: str) -> str:
    """A bar a singular value, sigma_i / sigma_1: the first `kept` filled, the others outlined."""
    wide, tall = max(4, 560 // len(heights)), 150

    def path(part: range) -> str:
        return "".join(f"M{i * wide} {tall}v{-tall * heights[i]:.1f}h{wide - 2}V{tall}z" for i in part)

    return (
        f'<figure><svg viewBox="-4 -4 {len(heights) * wide + 8} {tall + 24}" width="{len(heights) * wide + 8}" '
        f'role="img" aria-label="{html.escape(words)}"><path class="on" d="{path(range(kept))}"/>'
        f'<path class="off" d="{path(range(kept, len(heights)))}"/>'
        f'<path class="edge" d="M{kept * wide - 1} 0V{tall + 4}"/>'
        f'<text x="0" y="{tall + 16}">1</text><text x="{kept * wide + 2}" y="{tall + 16}">r = {kept}</text></svg>'
        "<figcaption>singular values σ<sub>i</sub> / σ<sub>1</sub>; filled: kept by rank r</figcaption></figure>"
    )


def decay_slider(
    matrix_of: Callable[[float], Sequence[Sequence[float]]],
    decays: Sequence[float] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
    chunk: int = 32,
) -> Sliders:
    """A channel's Toeplitz matrix by decay, with the edges of the chunks.

    Args:
        matrix_of: decay w -> matrix (T, T) of weights from 0 to 1, one row a token that reads.
    """

    def page(decay: float) -> Page:
        summary = (
            f"Decay w = {decay:g}: a weight halves every {math.log(2) / decay:.1f} tokens; "
            f"after {chunk} tokens {math.exp(-chunk * decay):.2g} of it is left."
        )
        return Page(summary, (_matrix(np.asarray(matrix_of(decay), dtype=float), chunk, summary),))

    return Sliders((Control("decay w", tuple(decays), decays[len(decays) // 3], "{:g}"),), page)


def _matrix(weights: np.ndarray, chunk: int, words: str) -> str:
    """An image of weights from 0 to 1, one pixel each, blue by opacity, with lines at every `chunk`."""
    size = len(weights)
    blue = np.broadcast_to(np.array([0, 114, 178, 0], dtype=np.uint8), (size, size, 4)).copy()
    blue[..., 3] = np.rint(255 * weights.clip(0, 1))
    image = io.BytesIO()
    imsave(image, blue, format="png")
    lines = "".join(f"M0 {at}H{size}M{at} 0V{size}" for at in range(chunk, size, chunk)) + f"M0 0H{size}V{size}H0z"
    return (
        f'<figure><svg viewBox="0 0 {size} {size}" width="330" role="img" aria-label="{html.escape(words)}">'
        f'<image width="{size}" height="{size}" style="image-rendering: pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"/>'
        f'<path class="edge" stroke-width="{size / 300:.2f}" d="{lines}"/></svg>'
        "<figcaption>down: the token t that reads; to the right: the token i that is read</figcaption></figure>"
    )
