"""From raw predictions to the numbers of the suite, a page and figures; nothing else is looked at.

A score is the share of judged tokens that are right (copy, mqar), or 1 where all of them are and else 0 (phonebook,
passkey). Intervals are bootstraps over items, paired where methods are compared (`evaluate.resampled`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prosg_lib.errors import UserError
from prosg_lib.evaluation import power
from prosg_lib.evaluation.predictions import Prediction
from prosg_lib.evaluation.recall import resampled
from prosg_lib.reproduction import suite_pages
from prosg_lib.reproduction.forgetting_figures import figures, label
from prosg_lib.reproduction.suite_pages import TEST, detectable, grid, number, said, size


class Task(NamedTuple):
    """How a test is shown: its size, and whether its score is a share of tokens, or all of them or nothing."""

    title: str
    score: str
    by_token: bool
    size: str


TASKS = {
    "copy": Task("Copying random words", "share of the text's tokens said right", True, "words"),
    "mqar": Task("Multi-query associative recall", "share of the queries answered right", True, "length"),
    "phonebook": Task("Phone book", "share of the numbers said exactly", False, "lines"),
    "passkey": Task("Passkey", "share of the keys said exactly", False, "length"),
}

BARS = (1.0, 0.9)
"""Of copying: the largest number of words with such a share of the tokens right is told."""


def results(header: Mapping, predictions: Sequence[Prediction]) -> dict:
    """All numbers of a suite, JSON-able.

    Args:
        header, predictions: as `predictions.read` gives them.
    Returns:
        header: as given. tasks: by name, `title` and `score` in words; `cells`, each with its settings, its items and
        every method's mean score with interval; `sizes`, the same over all cells of one size (`TASKS`), and `overall`
        over all cells; `against`, every method's score minus the plain model's, paired; `power`, the smallest
        difference that so many items can show (`power.smallest_difference`), for one cell and for all of them: "any",
        whatever the answers are, and by method with the scatter of its differences to the plain model. For copying
        `largest`: by method and bar.
    Raises:
        UserError: a test that is not known, a method without predictions, or methods that answered different items.
    """
    methods = header["methods"]
    tasks: dict[str, dict] = {}
    for task, cells in _grouped(predictions, methods).items():
        pooled = np.concatenate([scores for _, scores in cells], 1)
        found = {
            "title": TASKS[task].title,
            "score": TASKS[task].score,
            "cells": [_cell(dict(cell), methods, scores) for cell, scores in cells],
            "sizes": _by_size(cells, TASKS[task].size, methods),
            "overall": {"items": pooled.shape[1], "methods": _means(methods, pooled)},
            "against": {},
            "power": {"cell": detectable(cells[0][1].shape[1]), "any": detectable(pooled.shape[1]), "seen": {}},
        }
        if "base" in methods:
            base = pooled[methods.index("base")]
            for method, row in zip(methods, pooled, strict=True):
                if method != "base":
                    found["against"][method] = number(resampled((row - base)[None], lambda means: means[0]))
                    found["power"]["seen"][method] = detectable(pooled.shape[1], float((row - base).std(ddof=1)))
        if task == "copy":
            found["largest"] = {m: _largest(m, found["cells"]) for m in methods}
        tasks[task] = found
    return {"header": dict(header), "tasks": tasks}


def _grouped(predictions: Iterable[Prediction], methods: Sequence[str]) -> dict[str, list[tuple[tuple, np.ndarray]]]:
    """task -> its cells, each with (methods, items) scores, the same items in the same order for every method."""
    scores: dict[str, dict[tuple, dict[str, dict[tuple[int, int], float]]]] = {}
    for found in predictions:
        if found.task not in TASKS:
            raise UserError(f"the predictions are of a test {found.task!r}; there are {', '.join(TASKS)}")
        score = found.share if TASKS[found.task].by_token else float(found.right)
        cell = scores.setdefault(found.task, {}).setdefault(tuple(found.cell.items()), {})
        cell.setdefault(found.method, {})[found.seed, found.item] = score
    if not scores:
        raise UserError("there are no predictions; evaluate at least one item")
    return {
        task: [(name, _table(task, name, cell, methods)) for name, cell in cells.items()]
        for task, cells in scores.items()
    }


def _table(
    task: str, name: tuple, cell: Mapping[str, Mapping[tuple[int, int], float]], methods: Sequence[str]
) -> np.ndarray:
    items = sorted(next(iter(cell.values())))
    if set(cell) != set(methods) or any(sorted(answered) != items for answered in cell.values()):
        raise UserError(
            f"{task} ({', '.join(f'{k} {v:g}' for k, v in name)}): the methods {', '.join(methods)} did not answer the "
            "same items; evaluate them together"
        )
    return np.array([[cell[method][item] for item in items] for method in methods])


def _cell(cell: dict, methods: Sequence[str], scores: np.ndarray) -> dict:
    return {"cell": cell, "items": scores.shape[1], "methods": _means(methods, scores)}


def _means(methods: Sequence[str], scores: np.ndarray) -> dict[str, dict]:
    return {m: number(resampled(row[None], lambda means: means[0])) for m, row in zip(methods, scores, strict=True)}


def _by_size(cells: Sequence[tuple[tuple, np.ndarray]], size: str, methods: Sequence[str]) -> list[dict]:
    """As `_cell`, of all cells of one size together, in the order in which sizes come."""
    found: dict[float, list[np.ndarray]] = {}
    for cell, scores in cells:
        found.setdefault(dict(cell)[size], []).append(scores)
    return [_cell({size: value}, methods, np.concatenate(parts, 1)) for value, parts in found.items()]


def _largest(method: str, cells: Sequence[dict]) -> dict[str, int]:
    """The largest number of words with such a share right, by bar; 0: none of those that were asked."""
    return {
        f"{bar:g}": max((c["cell"]["words"] for c in cells if c["methods"][method]["value"] >= bar - 1e-6), default=0)
        for bar in BARS
    }


def write(folder: str | Path, header: Mapping, predictions: Sequence[Prediction]) -> None:
    """results.json, results.md and the figures, all of them or none.

    Raises:
        UserError: as `results`; the disk is full.
    """
    found = results(header, predictions)
    images = figures(found)
    page = markdown(found, {name: alt for name, (alt, _) in images.items()})
    suite_pages.write(folder, found, page, {name: image for name, (_, image) in images.items()})


def markdown(found: Mapping, alts: Mapping[str, str]) -> str:
    """The page: a table a test, with intervals and the power statement.

    Args:
        found: of `results`. alts: of the figures, by name; those that are there are shown.
    """
    header = found["header"]
    lines = suite_pages.heading(header, f"{header['items']} items a cell and seed", "items")
    for reason in header.get("left_out", ()):
        lines += [f"Left out: {reason}.", ""]
    for task, part in found["tasks"].items():
        lines += [f"## {part['title']}", "", f"Score: {part['score']}.", "", *_tables(part), ""]
        if "largest" in part:
            lines += [*_largest_table(part["largest"]), ""]
        lines += [_power_sentence(part), ""]
        if task in alts:
            lines += [f"![{alts[task]}]({task}.png)", ""]
    return "\n".join(lines)


def _tables(part: Mapping) -> list[str]:
    names = [", ".join(f"{name} {value:g}" for name, value in c["cell"].items()) for c in part["cells"]]
    methods = list(part["overall"]["methods"])
    heads = [label(m) for m in methods]
    rows = [
        [name, *(said(cell["methods"][m]) for m in methods)] for name, cell in zip(names, part["cells"], strict=True)
    ]
    rows.append(["**all**", *(said(part["overall"]["methods"][m]) for m in methods)])
    if part["against"]:
        rows.append(["minus plain model", *(said(part["against"].get(m)) for m in methods)])
    return grid(["", *heads], rows)


def _largest_table(largest: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = [[f"most words with {float(bar):.0%} right", *(str(found[f"{bar:g}"]) for found in largest.values())]
            for bar in BARS]  # fmt: skip
    return grid(["", *map(label, largest)], rows)


def _power_sentence(part: Mapping) -> str:
    cell, items = part["cells"][0]["items"], part["overall"]["items"]
    seen = [value for value in part["power"]["seen"].values() if value]
    text = (
        f"What the items can show ({TEST}): between two methods a difference of {size(part['power']['cell'])} in one "
        f"cell ({cell} items) and of {size(part['power']['any'])} over all of them ({items} items), whatever the "
        "answers are"
    )
    if seen:
        text += (
            f"; with the scatter seen here, {min(seen):.2f} to {max(seen):.2f} between a method and the plain model "
            "over all of them"
        )
    other = 1 - (power.LEVEL / 2) ** (1 / cell)
    return (
        f"{text}. Where all {cell} items of a cell scored alike, up to {other:.2f} of all there are may still differ."
    )
