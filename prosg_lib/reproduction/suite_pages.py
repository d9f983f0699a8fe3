"""What the reports of all suites share: numbers in JSON and in tables, and files that are all there or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from prosg_lib import files
from prosg_lib.evaluation import power
from prosg_lib.evaluation.recall import Estimate

Number = dict[str, float | None]
"""An estimate in JSON: value, low and high; None for NaN."""


def number(found: Estimate) -> Number:
    """An estimate for JSON, to 6 digits."""
    return {name: None if math.isnan(value) else round(value, 6) for name, value in asdict(found).items()}


def estimate_of(found: Number) -> Estimate:
    """What `number` was made of."""
    return Estimate(**{name: math.nan if value is None else value for name, value in found.items()})


def detectable(items: int, deviation: float | None = None) -> float | None:
    """`power.smallest_difference` for JSON, to 6 digits."""
    found = power.smallest_difference(items, deviation)
    return None if found is None else round(found, 6)


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]


def said(found: Number | None) -> str:
    """A cell: the value with its interval, or a dash where there is none."""
    return "–" if found is None or found["value"] is None else str(estimate_of(found))


def size(difference: float | None) -> str:
    """A detectable difference in a sentence."""
    return "no size" if difference is None else f"{difference:.2f}"


TEST = f"paired t-test, two-sided {power.LEVEL:.0%}, power {power.POWER:.0%}"
"""What `detectable` is about."""


def heading(header: Mapping, measured: str, over: str) -> list[str]:
    """A page's first lines: what was measured, with what, and how.

    Args:
        header: of a file of predictions.
        measured: how much, in words; over: what intervals are over.
    """
    with_what = f" with `{header['generator']}`" if header.get("generator") else ""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return [
        f"# {header['suite'].capitalize()}: `{header['model']}`{with_what}",
        "",
        f"`{header['command']}`",
        "",
        f"Model {header['fingerprint']}; seeds {', '.join(map(str, header['seeds']))}, {measured}; {header['device']}; "
        f"{versions}. In brackets: 95 % bootstrap intervals over {over}.",
        "",
    ]


def write(folder: str | Path, found: Mapping, page: str, images: Mapping[str, bytes]) -> None:
    """results.json, results.md and the figures (PNG, by name), all of them or none.

    Raises:
        UserError: the disk is full; `folder` is as it was.
    """

    def fill(place: Path) -> None:
        files.write_json(place / "results.json", found)
        files.write_text(place / "results.md", page)
        for name, image in images.items():
            files.write_bytes(place / f"{name}.png", image)

    files.write_folder(folder, fill)
