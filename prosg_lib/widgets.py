"""What people drag and click in a notebook. A static figure beside it shows the same (`plots.knowledge_grid`)."""

from __future__ import annotations

import html

import ipywidgets
import pandas as pd

from prosg_lib.errors import UserError
from prosg_lib.plots import PALETTE, styles


def knowledge_html(table: pd.DataFrame, distance: int, prompt: int) -> str:
    """One prompt's questions and every method's answers at one distance, as an HTML table.

    Words beside each answer say whether it is right, not colour alone; texts are escaped.

    Args:
        table: of `recall.knowledge`.
    Raises:
        UserError: the table has no such distance or prompt.
    """
    part = table[(table.distance == distance) & (table.prompt == prompt)]
    if part.empty:
        raise UserError(
            f"the table has no prompt {prompt} at {distance} tokens; there are the prompts "
            f"{_listed(table.prompt)} at the distances {_listed(table.distance)}"
        )
    methods = list(dict.fromkeys(part.method))
    cells = part.set_index(["slot", "method"])
    head = "".join(f'<th scope="col">{html.escape(_label(method))}</th>' for method in methods)
    rows = []
    for slot in dict.fromkeys(part.slot):
        first = cells.loc[(slot, methods[0])]
        answers = "".join(_answer(cells.loc[(slot, method)]) for method in methods)
        rows.append(
            f'<tr><th scope="row">{html.escape(slot)}: {html.escape(first.value)}</th>'
            f"<td>{html.escape(first.question)}</td>{answers}</tr>"
        )
    known = ", ".join(f"{_label(m)} {int(part[part.method == m].right.sum())} of {len(rows)}" for m in methods)
    return (
        f"<table><caption>{distance:,} tokens after the prompt, still known: {html.escape(known)}</caption>"
        f'<thead><tr><th scope="col">the prompt said</th><th scope="col">question</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def knowledge_slider(table: pd.DataFrame, prompt: int) -> ipywidgets.VBox:
    """A slider for the distance, above the facts that each method still knows there (`knowledge_html`)."""
    distances = sorted(table.distance.unique().tolist())
    slider = ipywidgets.SelectionSlider(
        options=[(f"{d:,}", d) for d in distances],
        value=distances[0],
        description="tokens between prompt and question",
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="34em"),
    )
    shown = ipywidgets.HTML(knowledge_html(table, distances[0], prompt))

    def show(change) -> None:
        shown.value = knowledge_html(table, change["new"], prompt)

    slider.observe(show, names="value")
    return ipywidgets.VBox([slider, shown])


def _answer(row: pd.Series) -> str:
    colour, verdict = (PALETTE["blue"], "✓ right") if row.right else (PALETTE["vermillion"], "✗ wrong")
    return f'<td>{html.escape(row.answer) or "(nothing)"} <span style="color:{colour}">{verdict}</span></td>'


def _label(method: str) -> str:
    return styles([method])[method].label


def _listed(column: pd.Series) -> str:
    return ", ".join(f"{v}" for v in sorted(column.unique().tolist()))
