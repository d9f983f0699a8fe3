"""What methods said to questions about their prompts, kept in a file, and all that follows from it: numbers, a page and
figures of recall against distance. They are those of `evaluate`; nothing is looked at but the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from prosg_lib import plots, provenance
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation.predictions import Answers
from prosg_lib.evaluation.recall import (
    Estimate,
    by_distance,
    by_training,
    differences,
    estimate,
    gap_recovered,
    half_life,
    judged,
    locality,
)
from prosg_lib.plots import PALETTE, MethodStyle
from prosg_lib.reproduction import suite_pages
from prosg_lib.reproduction.suite_pages import TEST, Number, detectable, estimate_of, grid, number, said, size

SUITE = "dialogue"
_ENDS = ("none", "repeated")  # between them lies the gap


def keep(
    path: str | Path, answers: Sequence[Answers], lm: LanguageModel, model: str, profile: str, split: str, command: str
) -> None:
    """Writes all that was said into a file that `prosg evaluate --from-predictions` reads.

    Args:
        answers: of `evaluate.answers`.
        model: the language model's name; profile, split: what it was asked; command: what does it again.
    Raises:
        UserError: the disk is full; a previous file is as it was.
    """
    header = {
        "suite": SUITE,
        "model": model,
        "fingerprint": lm.fingerprint(),
        "methods": list(dict.fromkeys(row.method for row in answers)),
        "profile": profile,
        "split": split,
        "seeds": list(dict.fromkeys(row.seed for row in answers)),
        "command": command,
        **provenance.facts(),
    }
    predictions.write(path, header, answers)


def results(header: Mapping, answers: Sequence[Answers]) -> dict:
    """All numbers, JSON-able.

    Args:
        header, answers: as `predictions.read` gives them.
    Returns:
        header: as given. parts: one a number of facts in the prompt, each with `facts`, `prompts` (of all seeds) and
        `distances`; by method and for each of the distances `recall`, `followed` (instructions kept), `gap` (recovered)
        and `against` (recall minus the plain model's, paired, with a band that covers the whole curve); by method
        `competing` (right answers about other people, as a ratio to the plain model's) and `half_life` (tokens; None:
        longer than the largest distance); `trainings`, by method that has several, and by their numbers, the recall of
        each at the distances, with intervals over prompts (all other numbers are means over them); `power`, the
        smallest difference of two methods at one distance that so many prompts can show (`power.smallest_difference`).
        What a file lacks the methods or instructions for is empty; not every method need be asked with every number of
        facts.
    Raises:
        UserError: there are no answers, or methods were not asked the same.
    """
    methods = header["methods"]
    _check_comparable(methods, answers)
    frame = judged(answers)
    return {
        "header": dict(header),
        "parts": [_part(frame[frame.facts == facts], methods, facts) for facts in sorted(set(frame.facts.tolist()))],
    }


def _check_comparable(methods: Sequence[str], answers: Iterable[Answers]) -> None:
    """Methods are compared prompt by prompt, so all must have been asked the same at every distance."""
    asked: dict[int, dict[tuple[str, int], dict[tuple[int, int, int], tuple]]] = {}
    for row in answers:
        own = asked.setdefault(row.facts, {}).setdefault((row.method, row.training), {})
        own[row.distance, row.seed, row.prompt] = (row.instructions, row.questions, row.gold, row.asked)
    if not asked:
        raise UserError("there are no predictions; evaluate at least one prompt")
    everyone = {method for some in asked.values() for method, _ in some}
    for facts, each in asked.items():
        first, *others = each.values()
        distances, prompts = {name[0] for name in first}, {name[1:] for name in first}
        alike = everyone == set(methods) and all(_alike(first, other) for other in others)
        if not alike or len(first) != len(distances) * len(prompts):
            raise UserError(
                f"{_facts(facts)}: the methods {', '.join(methods)} were not asked the same about the same prompts at "
                "every distance; evaluate them together"
            )


def _alike(one: dict[tuple, tuple], other: dict[tuple, tuple]) -> bool:
    """Whether two methods were asked the same; one that says nothing about other people may have been asked nothing."""
    return one.keys() == other.keys() and all(
        a[:-1] == other[name][:-1] and (a[-1] == other[name][-1] or 0 in (a[-1], other[name][-1]))
        for name, a in one.items()
    )


def _part(frame: pd.DataFrame, methods: Sequence[str], facts: int) -> dict:
    methods = [method for method in methods if method in set(frame.method)]

    def by_method(statistic: Callable[..., Estimate], some: Sequence[str]) -> dict[str, list[Number]]:
        found = by_distance(statistic, frame, some, facts)
        return {method: [number(cell) for cell in found.loc[method]] for method in some}

    prompts = frame.groupby(["seed", "prompt"]).ngroups
    others = [m for m in methods if m != "base"] if "base" in methods else []
    return {
        "facts": facts,
        "prompts": prompts,
        "distances": sorted(set(frame.distance.tolist())),
        "recall": by_method(estimate, methods),
        "followed": by_method(partial(estimate, column="followed"), methods if frame.followed.notna().any() else []),
        "gap": by_method(gap_recovered, [m for m in methods if m not in _ENDS] if {*_ENDS} <= {*methods} else []),
        "against": {m: [number(e) for e in differences(frame, m, "base", facts).values()] for m in others},
        "competing": {m: number(locality(frame, m, "base", facts)) for m in others},
        "half_life": {m: _finite(half_life(frame, m, facts)) for m in methods},
        "trainings": {
            method: {str(n): [number(cell) for cell in row] for n, row in by_training(frame, method, facts).iterrows()}
            for method in methods
            if frame[frame.method == method].training.nunique() > 1
        },
        "power": detectable(prompts),
    }


def _finite(tokens: float) -> float | None:
    return round(tokens, 6) if math.isfinite(tokens) else None


def write(folder: str | Path, header: Mapping, answers: Sequence[Answers]) -> None:
    """results.json, results.md and the figures, all of them or none.

    Raises:
        UserError: as `results`; the disk is full.
    """
    found = results(header, answers)
    images = figures(found)
    page = markdown(found, {name: alt for name, (alt, _) in images.items()})
    suite_pages.write(folder, found, page, {name: image for name, (_, image) in images.items()})


def figures(found: Mapping) -> dict[str, tuple[str, bytes]]:
    """Name -> what the figure shows in words, and a PNG: recall against distance, one figure a number of facts.

    Args:
        found: of `results`.
    """
    drawn = {}
    with plots.style():
        for part in found["parts"]:
            alt, figure = _recall(part)
            drawn[_figure_name(part)] = (alt, plots.png(figure))
    return drawn


def _figure_name(part: Mapping) -> str:
    return f"recall_{part['facts']}_facts"


def _recall(part: Mapping) -> tuple[str, Figure]:
    methods, distances = list(part["recall"]), part["distances"]
    cells = [[estimate_of(cell) for cell in part["recall"][m]] for m in methods]
    figure = Figure(figsize=(7.5, 4.6))
    ax = figure.subplots()
    looks = {m: _look(m) for m in methods}
    plots.estimates_by_distance(ax, pd.DataFrame(cells, index=methods, columns=distances), looks)
    ax.set(ylim=(-0.03, 1.03), ylabel="recall (exact match)", title=f"{_facts(part['facts'])} in the prompt")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ends = "; ".join(
        f"{looks[m].label} {row[0].value:.2f} and {row[-1].value:.2f}" for m, row in zip(methods, cells, strict=True)
    )
    alt = (
        f"Recall of {_facts(part['facts'])} against the distance between prompt and question, at {distances[0]:,} and "
        f"at {distances[-1]:,} tokens: {ends}. Bars are 95 % intervals over {_over(part['trainings'])}."
    )
    return alt, figure


def _over(several: Iterable[str]) -> str:
    """What intervals are over, in words, where these methods have several trainings."""
    labels = ", ".join(_look(method).label for method in several)
    return "prompts" + (f", and over trainings where there are several ({labels})" if labels else "")


def _look(method: str) -> MethodStyle:
    try:
        return plots.style_of(method)
    except UserError:  # of a later version, or somebody's own
        return MethodStyle(method, PALETTE["grey"], ".", "-")


def _facts(count: int) -> str:
    return "1 fact" if count == 1 else f"{count} facts"


TABLES = {
    "recall": ("Recall", "Share of the questions that are answered with the right value and nothing else."),
    "against": (
        "Recall minus the plain model's",
        "Prompt by prompt; the bands cover a method's whole curve in 95 of 100 cases.",
    ),
    "gap": ("Gap recovered", "0: as good as no prompt; 1: as good as the prompt read again right before the question."),
    "followed": ("Instructions kept", "Share of the prompt's instructions that an answer keeps."),
}
"""By distance: a table's title, and what its numbers are."""


def markdown(found: Mapping, alts: Mapping[str, str]) -> str:
    """The page: tables by distance, with intervals, and the power statement, for every number of facts.

    Args:
        found: of `results`. alts: of the figures, by name; those that are there are shown.
    """
    header = found["header"]
    several = dict.fromkeys(method for part in found["parts"] for method in part["trainings"])
    lines = suite_pages.heading(header, f"{header['split']} split, sizes of {header['profile']}", _over(several))
    for part in found["parts"]:
        distances = part["distances"]
        lines += [f"## {_facts(part['facts'])} in the prompt", ""]
        lines += [f"{part['prompts']} prompts a method; columns are distances in tokens.", ""]
        name = _figure_name(part)
        if name in alts:
            lines += [f"![{alts[name]}]({name}.png)", ""]
        for column, (title, meaning) in TABLES.items():
            if part[column]:
                rows = [[_look(m).label, *map(said, cells)] for m, cells in part[column].items()]
                lines += [f"### {title}", "", meaning, "", *grid(["", *(f"{d:,}" for d in distances)], rows), ""]
        for method, each in part["trainings"].items():
            rows = [[f"training {n}", *map(said, cells)] for n, cells in each.items()]
            lines += [f"### Recall of every training: {_look(method).label}", "", "Intervals are over prompts.", ""]
            lines += [*grid(["", *(f"{d:,}" for d in distances)], rows), ""]
        lines += ["### Over the whole text", "", *_whole_table(part), ""]
        lines += [
            f"What the prompts can show ({TEST}): between two methods at one distance a difference in recall of "
            f"{size(part['power'])} ({part['prompts']} prompts), whatever the answers are.",
            "",
        ]
    return "\n".join(lines)


def _whole_table(part: Mapping) -> list[str]:
    far = f"more than {part['distances'][-1]:,}"
    rows = [
        [_look(m).label, far if tokens is None else f"{tokens:,.0f}", said(part["competing"].get(m))]
        for m, tokens in part["half_life"].items()
    ]
    return grid(["", "half-life of recall (tokens)", "right answers about other people, of the plain model's"], rows)
