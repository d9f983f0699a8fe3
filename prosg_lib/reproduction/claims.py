"""Named numbers: what a notebook measured, and what was expected of it.

A notebook records; the ledger (`expected/<notebook>.<profile>.json`) holds for every claim

    value      the bar: the number to meet, or for an ordering the name of the claim to reach
    tolerance  how far from the bar still counts as met
    kind       exact      measured = value, up to the last bits
               absolute   |measured - value| <= tolerance
               relative   |measured - value| <= tolerance * |value|
               at_least   measured >= value - tolerance
               at_most    measured <= value + tolerance
               ordering   measured >= (measured value of the claim named by `value`) - tolerance
    reference  what the reference run measured; the number that texts quote

The text between prompt and question is whatever prose a machine has, and numbers depend on it: `absolute` and
`relative` claims, which ask for the reference run's numbers, are judged only in a run on that run's prose. Promises
(`at_least`, `at_most`, `ordering`) and counts (`exact`) are always judged, but for those that the ledger marks as
`own_data`: they are about data that other machines need not have, and may be missing there.
"""

import html
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosg_lib import files, paths, provenance
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.text.prose import load_prose

KINDS = ("exact", "absolute", "relative", "at_least", "at_most", "ordering")
DEFAULT_KIND = "absolute"
DEFAULT_TOLERANCE = (
    0.05  # five points of a recall or a rate, which most claims are; others are set by hand in the ledger
)
OF_THE_PROSE = ("absolute", "relative")
BENCHMARK = "benchmark"  # stands where a ledger's file has a profile, if a benchmark wrote it
ON_GPU = "-cuda"  # behind the benchmark's name, if it ran on a GPU: beside what a CPU measured, not in its place
UNEXPECTED = "unexpected"  # the kind shown for a claim that no ledger knows; a claim nobody checks is no claim

Row = dict[str, Any]


@dataclass
class Context:
    """The notebook that is recording now."""

    notebook: str
    profile: str
    seed: int
    values: dict[str, float] = field(default_factory=dict)
    finished: bool = False


_current: Context | None = None


def begin(notebook: str, profile: Profile, seed: int) -> None:
    """Starts a notebook's record; a second call starts it anew, so that a notebook can be run twice in one kernel."""
    global _current
    _current = Context(notebook, profile.name, int(seed))


def current() -> Context:
    """The record begun last.

    Raises:
        UserError: none was begun.
    """
    if _current is None:
        raise UserError("No claims were begun; run the cell with claims.begin(notebook, profile=..., seed=...) first.")
    return _current


def record(name: str, value: float) -> None:
    """Records one number under a name such as `recall/prosg@512`.

    Args:
        value: a finite real number; a tensor or array of one element will do.
    Raises:
        UserError: no record was begun or it is finished already, the name is taken or not one word, or the value is
            not a finite number.
    """
    context = current()
    again = "run the notebook again from the cell with claims.begin"
    if context.finished:
        raise UserError(f"Claim {name!r} comes after claims.finish(); record it in a cell before, and {again}.")
    # A quote stands in an HTML comment and is split at blanks, so a name is one word without "--".
    if not isinstance(name, str) or not re.fullmatch(r"[^\s<>]+", name) or "--" in name:
        raise UserError(f"{name!r} cannot name a claim: use one word without blanks, '<', '>' and '--'.")
    if name in context.values:
        raise UserError(
            f"Claim {name!r} is recorded already ({context.values[name]:.6g}); choose another name, or {again}."
        )
    try:
        if isinstance(value, str):
            raise TypeError("a text")
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"Claim {name!r} is no number but {value!r}; record a float.") from error
    if not math.isfinite(number):
        raise UserError(
            f"Claim {name!r} is {number}; a claim is a finite number, so look at what it was computed from."
        )
    context.values[name] = number


def measured_path(run_dir: Path, notebook: str) -> Path:
    """Where `finish` writes, in `run_dir` = runs/<profile>."""
    return Path(run_dir) / "claims" / f"{notebook}.json"


def finish() -> None:
    """Ends the record: writes runs/<profile>/claims/<notebook>.json and shows measured beside expected.

    Raises:
        UserError: no record was begun, or it is finished already.
    """
    context = current()
    if context.finished:
        raise UserError("claims.finish() ran already; run the notebook again from the cell with claims.begin.")
    prose = load_prose()
    record = {
        "notebook": context.notebook,
        "profile": context.profile,
        "seed": context.seed,
        # Set by `prosg reproduce`: tells the file of this very run from one that an earlier run left.
        "run_id": os.environ.get("PROSG_RUN_ID"),
        "finished": time.time(),
        **provenance.facts(),
        "prose": {"source": prose.source, "sha256": prose.sha256},
        "claims": context.values,
    }
    files.write_json(measured_path(paths.runs_dir(context.profile), context.notebook), record)
    context.finished = True
    show(judge(record, context.notebook, context.profile))


def ledger_path(notebook: str, profile: str, expected_dir: Path | None = None) -> Path:
    """The ledger's file for a notebook and profile."""
    return (expected_dir or paths.expected_dir()) / f"{notebook}.{profile}.json"


def expected(notebook: str, profile: str, expected_dir: Path | None = None) -> dict[str, Any]:
    """One file of the ledger: notebook, profile, seeds, device, versions, prose, claims.

    Raises:
        UserError: it is missing or malformed; names the file and the claim.
    """
    path = ledger_path(notebook, profile, expected_dir)
    ledger = files.read_json(path)
    if not isinstance(ledger, dict) or not isinstance(ledger.get("claims"), dict):
        raise UserError(f"{path} has no object 'claims'; restore it or write it anew with --update-expected.")
    if "prose" in ledger and not isinstance((ledger["prose"] or {}).get("sha256"), str):
        raise UserError(f"{path}: 'prose' has no text 'sha256'; restore it or write it anew with --update-expected.")
    for name, entry in ledger["claims"].items():
        _check_entry(path, name, entry, ledger["claims"])
    return ledger


def expected_claims(notebook: str, profile: str, expected_dir: Path | None = None) -> dict[str, Any]:
    """The ledger's claims for a notebook and profile; none where it has no file for them."""
    if not ledger_path(notebook, profile, expected_dir).is_file():
        return {}
    return expected(notebook, profile, expected_dir)["claims"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_entry(path: Path, name: str, entry: Any, entries: Mapping[str, Any]) -> None:
    where = f"{path}, claim {name!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not an object with value, tolerance, kind and reference.")
    kind, value, tolerance = (entry.get(key) for key in ("kind", "value", "tolerance"))
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind {kind!r}; one of {', '.join(KINDS)}.")
    if not _is_number(tolerance) or tolerance < 0:
        raise UserError(f"{where}: the tolerance is {tolerance!r}; a number from 0 up.")
    if kind == "ordering":
        if value not in entries or value == name:
            raise UserError(
                f"{where}: an ordering's value is the name of another claim of the same file, not {value!r}."
            )
    elif not _is_number(value):
        raise UserError(f"{where}: the value is {value!r}; a number for the kind {kind!r}.")
    if not isinstance(entry.get("own_data", False), bool):
        raise UserError(f"{where}: own_data is {entry['own_data']!r}; true or false.")
    if "reference" in entry and not _is_number(entry["reference"]):
        raise UserError(f"{where}: the reference is {entry['reference']!r}; a number.")


def judge(found: Mapping[str, Any] | None, notebook: str, profile: str, expected_dir: Path | None = None) -> list[Row]:
    """The rows of `compare` for what a notebook recorded.

    Args:
        found: what `finish` wrote; None: nothing, so that nothing holds.
    """
    ledger = expected(notebook, profile, expected_dir) if ledger_path(notebook, profile, expected_dir).is_file() else {}
    prose = [side["prose"]["sha256"] for side in (found or {}, ledger) if side.get("prose")]
    return compare(found["claims"] if found else {}, ledger.get("claims", {}), same_prose=len(set(prose)) < 2)


def compare(
    measured: Mapping[str, float], expected: Mapping[str, Mapping[str, Any]], same_prose: bool = True
) -> list[Row]:
    """Measured numbers against the ledger's.

    Args:
        measured: claim name -> number.
        expected: claim name -> {"value", "tolerance", "kind"}.
        same_prose: both are of the same prose.
    Returns:
        One row a claim, measured ones first in their order: name, value (None: not measured), expected (the number to
        meet, None where there is none), tolerance, kind, holds; an ordering has `than`, the other claim's name, too.
        What was expected but not measured does not hold, nor does what was measured but not expected. holds is None
        where a claim cannot be judged, because it depends on the prose, which is another.
    """
    rows = []
    for name in [*measured, *(name for name in expected if name not in measured)]:
        value, entry = measured.get(name), expected.get(name)
        if entry is None:
            rows.append(
                {"name": name, "value": value, "expected": None, "tolerance": None, "kind": UNEXPECTED, "holds": False}
            )
            continue
        kind, tolerance, bar = entry["kind"], entry["tolerance"], entry["value"]
        row: Row = {"name": name, "value": value, "expected": bar, "tolerance": tolerance, "kind": kind}
        if kind == "ordering":
            row["than"], bar = bar, measured.get(bar)
            row["expected"] = bar
        row["holds"] = value is not None and bar is not None and _holds(kind, value, bar, tolerance)
        if not same_prose and (entry.get("own_data", False) or (value is not None and kind in OF_THE_PROSE)):
            row["holds"] = None
        rows.append(row)
    return rows


def _holds(kind: str, value: float, bar: float, tolerance: float) -> bool:
    rounding = 1e-12 * max(1.0, abs(bar))  # so that 0.97 +- 0.01 holds 0.98, whatever binary fractions make of it
    if kind == "exact":
        return abs(value - bar) <= rounding
    if kind == "absolute":
        return abs(value - bar) <= tolerance + rounding
    if kind == "relative":
        return abs(value - bar) <= tolerance * abs(bar) + rounding
    if kind == "at_most":
        return value <= bar + tolerance + rounding
    if kind in ("at_least", "ordering"):
        return value >= bar - tolerance - rounding
    raise UserError(f"Unknown kind of claim {kind!r}; one of {', '.join(KINDS)}.")


def bar_text(row: Row) -> str:
    """What a row asks for, in words: `0.97 ± 0.05`, `at least 0.8`, `at least none@512 (0.12)`."""
    kind, bar, tolerance = row["kind"], row["expected"], row["tolerance"]
    if kind == UNEXPECTED:
        return "not in the ledger"
    number = _number_text(bar)
    if kind == "exact":
        return f"exactly {number}"
    if kind == "absolute":
        return f"{number} ± {tolerance:g}"
    if kind == "relative":
        return f"{number} ± {100 * tolerance:g} %"
    sign, slack = ("+", f" + {tolerance:g}") if kind == "at_most" else ("-", f" - {tolerance:g}")
    slack = slack if tolerance else ""
    if kind == "ordering":
        return f"at least {row['than']} ({number}){slack}"
    return f"at {'most' if sign == '+' else 'least'} {number}{slack}"


def value_text(row: Row) -> str:
    """The measured number of a row, to be read."""
    return _number_text(row["value"])


def _number_text(value: float | None) -> str:
    """Counts, of bytes for instance, in full; anything else to four digits."""
    if value is None:
        return "not measured"
    return f"{int(value):,}" if abs(value) >= 1000 and float(value).is_integer() else f"{value:.4g}"


HOLDS = {True: "yes", False: "NO", None: "other prose"}
"""What a table says of a row; None: it cannot be judged on this prose."""


def table_text(rows: Sequence[Row]) -> str:
    """The rows as lines of plain text, for a terminal."""
    head = ("claim", "measured", "expected", "holds")
    cells = [(row["name"], value_text(row), bar_text(row), HOLDS[row["holds"]]) for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def table_html(rows: Sequence[Row]) -> str:
    """The rows as an HTML table; whether a claim holds is said in words, not by colour alone."""
    head = "".join(f'<th scope="col">{word}</th>' for word in ("claim", "measured", "expected", "holds"))
    body = "".join(
        f'<tr><th scope="row"><code>{html.escape(row["name"])}</code></th>'
        f"<td>{value_text(row)}</td><td>{html.escape(bar_text(row))}</td>"
        f"<td>{'<strong>no</strong>' if row['holds'] is False else HOLDS[row['holds']]}</td></tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class _Table:
    """Shown as a table by Jupyter, as text anywhere else."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        return table_text(self.rows)

    def _repr_html_(self) -> str:
        return table_html(self.rows)


def show(rows: Sequence[Row]) -> None:
    """Displays rows of `compare` in a notebook, or prints them."""
    from IPython.display import display

    display(_Table(rows))


def update(
    run_dir: Path, profile: str, expected_dir: Path | None = None, notebooks: Iterable[str] | None = None
) -> list[Path]:
    """Writes the ledger from a finished run: refreshes every `reference`, the seeds, device, versions and prose.

    Entries that exist keep their kind, value and tolerance, so a bar is never loosened here, and stay where the run did
    not measure them. New ones get kind "absolute", the measured value and a tolerance of 0.05 (`DEFAULT_TOLERANCE`);
    edit the file where another kind or bar is meant.

    Args:
        run_dir: runs/<profile>.
        notebooks: only these; all that the run recorded where None.
    Returns:
        The files written.
    Raises:
        UserError: there is nothing recorded, or it is of another profile.
    """
    folder = Path(run_dir) / "claims"
    names = sorted(path.stem for path in folder.glob("*.json")) if notebooks is None else list(notebooks)
    if not names:
        raise UserError(f"{folder} holds no claims; run `prosg reproduce --profile {profile}` first.")
    written = []
    for notebook in names:
        measured = files.read_json(measured_path(run_dir, notebook))
        if measured["profile"] != profile:
            raise UserError(
                f"{measured_path(run_dir, notebook)} is of the profile {measured['profile']!r}, not {profile!r}; "
                "name the profile that was run."
            )
        entries = expected_claims(notebook, profile, expected_dir)
        for name, value in measured["claims"].items():
            default = {"value": value, "tolerance": DEFAULT_TOLERANCE, "kind": DEFAULT_KIND}
            entries[name] = {**entries.get(name, default), "reference": value}
        path = ledger_path(notebook, profile, expected_dir)
        files.write_json(
            path,
            {
                "notebook": notebook,
                "profile": profile,
                "seeds": [measured["seed"]],
                "device": measured["device"],
                "versions": measured["versions"],
                "prose": measured["prose"],
                "claims": entries,
            },
        )
        written.append(path)
    return written
