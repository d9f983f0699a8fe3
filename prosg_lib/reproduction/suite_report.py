"""A report from predictions: numbers (JSON), a page (Markdown) and figures (PNG), from the file of predictions alone.

Both kinds of predictions become sections: of dialogues one a number of facts in the prompt, of the memory tests one a
test. A section has tables of estimates and one figure.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from prosg_lib import files, paths, plots
from prosg_lib.backbones.loading import load_model
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import memory_tests, predictions, recall
from prosg_lib.evaluation.memory_tests import TESTS
from prosg_lib.evaluation.statistics import (
    Estimate,
    by_distance,
    by_training,
    difference,
    differences,
    estimate,
    gap_recovered,
    half_life,
    locality,
    mean,
)
from prosg_lib.training.checkpoints import load_generator, own_generator
from prosg_lib.training.distributed import device

FILE = "predictions.jsonl.gz"

_MOST_ITEMS = 100_000  # of a cell and seed; all problems are made before the first is measured

MEANINGS = {
    "Recall": "Share of the questions that are answered with exactly the right value.",
    "Recall minus the plain model's": "Paired; each band covers a method's whole curve in 95 of 100 cases.",
    "Gap recovered": "0: as without the prompt; 1: as with the prompt repeated immediately before the question.",
    "Instructions kept": "Share of the prompt's instructions that an answer follows.",
    "Over the whole text": "Half-life of recall, and right answers about other people relative to the plain model's.",
    "Score": "Mean over the problems of a cell, and over all cells.",
}
"""What the numbers of a table are, by its title."""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: of the figure's file; title: of the section.
        note: what the section is about, in a sentence.
        tables: title -> cells are `Estimate`, numbers or None; methods are its rows or its columns.
        figure, alt: what is drawn, and the same in words.
    """

    name: str
    title: str
    note: str
    tables: Mapping[str, pd.DataFrame]
    figure: Figure
    alt: str


def evaluate(
    model: str,
    generator: str | None,
    profile: Profile,
    seeds: Sequence[int],
    items: int | None,
    out: str | Path,
    command: str,
) -> None:
    """`prosg evaluate --model`: the memory tests' predictions for all methods, and the report on them.

    Args:
        model: as `load_model` takes it; generator: as `load_generator` does; None: the model's own,
            if one is shipped.
        items: problems a cell and seed; None: the profile's.
        command: the command line, for the record.
    Raises:
        UserError: something is missing, damaged or does not fit, or `out` cannot be written to.
    """
    items = profile.forgetting.items if items is None else items
    if not 2 <= items <= _MOST_ITEMS:
        raise UserError(
            f"--items {items} is outside 2 to {_MOST_ITEMS:,}; at least two are needed in a cell, because one is the "
            "other's wrong memory"
        )
    file = output_folder(out) / FILE
    lm = load_model(model).to(device()).requires_grad_(False)
    generator = generator or own_generator(model)
    chosen = None if generator is None else load_generator(generator, lm)
    named = {"model": model, "generator": generator, "command": command}
    try:
        memory_tests.run(lm, chosen, named, profile, seeds, items, file)
    except KeyboardInterrupt:
        print(f"Finished cells are kept in {file.parent}; the same command goes on from there.", file=sys.stderr)
        raise
    print(f"all answers are in {file}")
    recompute(file, out)


def recompute(file: str | Path, out: str | Path) -> None:
    """`prosg evaluate --from-predictions`: results.json, results.md and the figures.

    All of them are complete before the first takes its place.

    Raises:
        UserError: the file is missing or damaged, its methods cannot be compared, or `out` cannot be written to.
    """
    header, rows = predictions.read(file)
    folder = output_folder(out)
    parts = sections(rows)

    with plots.style():
        content = {f"{part.name}.png": plots.png(part.figure) for part in parts}
    found = {"header": header, "sections": list(map(_numbers, parts))}
    numbers = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("results.json", numbers), ("results.md", page(header, parts))):
        content[name] = text.encode("utf-8", "backslashreplace")
    files.write_folder(folder, lambda place: [(place / name).write_bytes(content[name]) for name in content])


def output_folder(out: str | Path) -> Path:
    """The folder that results go to, made if need be.

    Raises:
        UserError: it cannot be written to.
    """
    folder = paths.expanded(out)
    files.check_writable(folder, "--out")
    return folder


def sections(rows: pd.DataFrame) -> list[Section]:
    """The report's sections.

    Args:
        rows: as `predictions.read` returns them.
    Raises:
        UserError: the methods did not answer the same.
    """
    if "task" not in rows:
        _check_paired(rows, "facts", ["seed", "prompt"], "distance")
        scores = recall.judged(rows)
        with plots.style():
            return [_dialogue(part, facts) for facts, part in scores.groupby("facts")]
    _check_paired(rows.assign(cell=rows.cell.astype(str), training=0), "task", ["cell", "seed", "item"])
    scores = memory_tests.scored(rows)
    with plots.style():
        return [_memory_test(part, task) for task, part in scores.groupby("task", sort=False)]


def _check_paired(rows: pd.DataFrame, group: str, item: list[str], *places: str) -> None:
    """Methods are compared item by item, so within a group all must have answered the same items, once each, and at all
    places."""
    answered = ["method", "training", *places]
    for name, part in rows.assign(gold=rows.gold.astype(str)).groupby(group):
        if not (part.groupby([*item, "gold", *answered]).size().unstack(answered) == 1).all(axis=None):
            raise UserError(
                f"{group} {name}: the methods {', '.join(part.method.unique())} did not answer the same items; "
                "evaluate them together"
            )


def _dialogue(frame: pd.DataFrame, facts: int) -> Section:
    methods = list(frame.method.unique())
    others = [m for m in methods if m != "base"] if "base" in methods else []
    between = [m for m in methods if m not in ("none", "repeated")] if {"none", "repeated"} <= {*methods} else []
    following = methods if frame.followed.notna().any() else []
    several = [m for m in methods if frame[frame.method == m].training.nunique() > 1]
    whole = {m: {"half-life (tokens)": half_life(frame, m, facts)} for m in methods}
    for m in others:
        whole[m]["about others"] = locality(frame, m, "base", facts)
    recalls = by_distance(estimate, frame, methods, facts)
    tables = {
        "Recall": recalls,
        "Recall minus the plain model's": pd.DataFrame({m: differences(frame, m, "base", facts) for m in others}).T,
        "Gap recovered": by_distance(gap_recovered, frame, between, facts),
        "Instructions kept": by_distance(partial(estimate, column="followed"), frame, following, facts),
        "Over the whole text": pd.DataFrame(whole).T,
    }
    tables |= {f"Recall of each training of {m}": by_training(frame, m, facts) for m in several}
    figure = Figure(figsize=(7.5, 4.6))
    ax = figure.subplots()
    plots.estimates_by_distance(ax, recalls)
    title = f"{facts} {'fact' if facts == 1 else 'facts'} in the prompt"
    ax.set(ylim=(-0.03, 1.03), ylabel="recall (exact match)", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    prompts = frame.groupby(["seed", "prompt"]).ngroups
    note = f"{prompts} prompts a method; columns are distances in tokens."
    alt = f"Recall of {title} against distance, {plots.in_words(recalls)}. Bars are 95 % intervals."
    return Section(f"recall_{facts}_facts", title, note, tables, figure, alt)


def _memory_test(scores: pd.DataFrame, task: str) -> Section:
    methods, test = list(scores.method.unique()), TESTS[task]
    cells = {name: part for (_, name), part in scores.groupby(["cell", "name"])} | {"all": scores}
    lines = {name: {m: mean(part, m, "score") for m in methods} for name, part in cells.items()}
    if "base" in methods:
        ahead = {m: difference(scores, m, "base", "score") for m in methods if m != "base"}
        lines["all, minus the plain model"] = {"base": None} | ahead
    tables = {"Score": pd.DataFrame(lines).T}
    if task == "copy":
        copied = {
            f"{share:.0%} right": [memory_tests.most_copied(scores, m, share) for m in methods] for share in (1, 0.9)
        }
        tables["Most words copied"] = pd.DataFrame(copied, index=methods)
    figure = Figure(figsize=(7.0, 4.2))
    ax = figure.subplots()
    alt = plots.estimates_by_size(ax, memory_tests.by_size(scores, methods), test)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    items = scores[scores.method == methods[0]].groupby("cell").size().max()
    note = f"Score: {test.score}; {items} items a cell and method."
    return Section(task, test.title, note, tables, figure, alt)


def page(header: Mapping, parts: Iterable[Section]) -> str:
    """results.md: where the numbers come from, and every section's figure and tables."""
    named = [f"`{header[name]}`" for name in ("model", "generator") if header.get(name)]
    lines = [f"# {str(header.get('suite', 'results')).capitalize()}{': ' if named else ''}{' with '.join(named)}", ""]
    known = ("command", "fingerprint", "profile", "split", "seeds", "items", "left_out", "device", "commit", "versions")
    lines += [f"- {name.replace('_', ' ')}: {_text(header[name])}" for name in known if header.get(name)]
    lines += ["", "In brackets: 95 % bootstrap intervals over items, and over trainings where there are several.", ""]
    labels = {name: look.label for name, look in plots.METHOD_STYLE.items()}
    for part in parts:
        lines += [f"## {part.title}", "", part.note, "", f"![{part.alt}]({part.name}.png)", ""]
        for title, table in part.tables.items():
            if not table.empty:
                shown = table.rename(index=labels, columns=labels).map(_text)
                lines += [f"### {title}", "", *([MEANINGS[title], ""] if title in MEANINGS else [])]
                lines += [shown.to_markdown(disable_numparse=True), ""]
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, float) and not math.isfinite(value):
        return "–" if math.isnan(value) else "longer than measured"
    missing = value is None or (isinstance(value, Estimate) and math.isnan(value.value))
    return "–" if missing else f"{value:,.0f}" if isinstance(value, float) else str(value)


def _numbers(part: Section) -> dict:
    """A section as JSON: every table by method and column; NaN and infinity become null."""

    def plain(value):
        if isinstance(value, Estimate):
            return {name: plain(one) for name, one in vars(value).items()}
        return round(float(value), 6) if value is not None and math.isfinite(value) else None

    tables = {
        title: {str(m): {str(c): plain(v) for c, v in row.items()} for m, row in table.iterrows()}
        for title, table in part.tables.items()
        if not table.empty
    }
    return {"name": part.name, "title": part.title, "note": part.note, "alt": part.alt, "tables": tables}
