"""The ledger: what the reference run measured, and how far another run may be from it.

A file of it, `expected/<notebook>.<profile>.json`, has for every name what the reference run measured. How far another
run may be from it follows from the number's own spread:

    {"reference": 0.86, "spread": 0.012}    |measured - reference| <= max(3 spread, 0.01 max(1, |reference|))
    {"reference": 0.32, "tolerance": 0.02}  |measured - reference| <= tolerance, which the notebook states
    {"reference": 10240, "exact": true}     measured = reference: a count, a size, an identity
    {"reference": 18.4, "shown": true}      not judged: a time or a peak of memory, which says more of the machine

`spread` is a standard error, over items or over seeds. The same checkpoints asked the same items give the same numbers,
but for rounding; with other items (another `--seed`) two runs differ by sqrt(2) spreads, and 3 spreads are exceeded
once in 30 numbers. The floor, one hundredth, is for arithmetic: another processor adds in another order, and now and
then a greedily chosen word flips. Always the ledger's spread decides, so noisy data does not pass more easily.

The reference run reads what every clone has, the project's own prose. What the same numbers are where the books of
`data/DATASHEET.md` are there is a second column, `"books": {...}`; a run that reads those books is judged by it.
Bars that were promised are not here but in `promises.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prosg_lib import files, paths, strict
from prosg_lib.errors import UserError

if TYPE_CHECKING:  # pandas takes half a second, and whoever checks quotes does not need it
    import pandas as pd

SPREADS = 3.0
FLOOR = 0.01
BENCHMARK = "benchmark"  # stands in place of a profile in a ledger that a benchmark wrote
ON_GPU = "-cuda"  # suffix of a benchmark's name where it ran on a GPU, so that it does not replace the CPU's ledger

Row = dict[str, Any]


# What the files hold


@dataclass(kw_only=True)
class _Judged:
    """How a number is judged: one of the first four says it."""

    spread: float = 0.0
    tolerance: float = 0.0
    exact: Literal[True] = True
    shown: Literal[True] = True
    source: str = ""


@dataclass(kw_only=True)
class _Measured(_Judged):
    value: float


@dataclass(kw_only=True)
class _Reference(_Judged):
    reference: float


@dataclass(kw_only=True)
class Origin:
    """Where numbers and figures came from."""

    notebook: str
    profile: str
    seed: int
    commit: str
    device: str
    versions: dict[str, str]


@dataclass(kw_only=True)
class _Run(Origin):
    peak_mb: float | None
    books: str | None
    claims: dict[str, dict]


@dataclass(kw_only=True)
class _Ledger:
    """A notebook's ledger has the first four fields, a benchmark's the next five."""

    notebook: str = ""
    profile: str = ""
    own: dict[str, Any] = field(default_factory=dict)
    books: dict[str, Any] = field(default_factory=dict)
    benchmark: str = ""
    command: str = ""
    device: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    claims: dict[str, dict]


def _read(path: Path, cls: type) -> dict[str, Any]:
    found = files.read_json(path)
    strict.read_as(cls, found, path)
    return found


def _check(path: Path, cls: type[_Judged], entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        strict.read_as(cls, entry, f"{path}, claim {name!r}")
        how = entry.keys() & {"spread", "tolerance", "exact", "shown"}
        if len(how) != 1 or entry[how.pop()] < 0:
            raise UserError(f"{path}, claim {name!r}: it needs one of spread and tolerance, from 0, exact, shown.")


def measured_path(notebook: str, profile: str) -> Path:
    """Where a notebook's last run is kept."""
    return paths.runs_dir(profile) / "claims" / f"{notebook}.json"


def measured(notebook: str, profile: str) -> dict[str, Any] | None:
    """What a notebook's last run recorded (`claims.finish` writes it); None where it did not finish.

    Raises:
        UserError: the file is damaged, or it is another notebook's or profile's.
    """
    path = measured_path(notebook, profile)
    if not path.is_file():
        return None
    found = _read(path, _Run)
    if (found["notebook"], found["profile"]) != (notebook, profile):
        raise UserError(f"{path} is of {found['notebook']} with the profile {found['profile']}; run {notebook} again.")
    _check(path, _Measured, found["claims"])
    return found


def path_of(notebook: str, profile: str) -> Path:
    """The ledger's file for a notebook and profile."""
    return paths.expected_dir() / f"{notebook}.{profile}.json"


def expected(notebook: str, profile: str) -> dict[str, Any]:
    """One file of the ledger: notebook, profile, own and books (seed, device, versions), claims.

    Raises:
        UserError: it is missing or malformed; names the file and the claim.
    """
    path = path_of(notebook, profile)
    found = _read(path, _Ledger)
    for column in _columns(found["claims"]):
        _check(path, _Reference, column)
    return found


def expected_claims(notebook: str, profile: str) -> dict[str, Row]:
    """The ledger's claims for a notebook and profile; none where it has no file for them."""
    return expected(notebook, profile)["claims"] if path_of(notebook, profile).is_file() else {}


def reference(entry: Row) -> Row:
    """What texts quote of a claim: the reference run's own prose, or the books where a claim needs them."""
    return entry if "reference" in entry else entry["books"]


def judge(found: Mapping[str, Any] | None, notebook: str, profile: str) -> list[Row]:
    """The rows of `compare` for what a notebook recorded.

    Args:
        found: what `finish` wrote; None: nothing, so that nothing holds.
    """
    measured = found["claims"] if found else {}
    if not path_of(notebook, profile).is_file():
        return compare(measured, {})
    ledger = expected(notebook, profile)
    with_books = bool(found and found["books"] and found["books"] == ledger.get("books", {}).get("digest"))
    column = {
        name: entry.get("books", entry) if with_books else reference(entry)
        for name, entry in ledger["claims"].items()
        if with_books or "reference" in entry or name in measured  # the last: with other books than the ledger's
    }
    return compare(measured, column)


def compare(measured: Mapping[str, Row], expected: Mapping[str, Row]) -> list[Row]:
    """Measured numbers against one column of the ledger.

    Returns:
        One row a claim, measured ones first in their order: name, value (None: not measured), source, expected (None:
        not in the ledger), tolerance (None: not judged), holds (None: not judged). What was expected and not measured
        does not hold, nor does what was measured and is not in the ledger: a number that nobody checks is no claim.
    """
    rows = []
    for name in [*measured, *(name for name in expected if name not in measured)]:
        entry, found = expected.get(name), measured.get(name, {})
        row: Row = {"name": name, "value": found.get("value"), "source": found.get("source"), "expected": None}
        row |= {"tolerance": None, "holds": False}
        if entry is not None:
            row |= {"expected": entry["reference"], "tolerance": allowed(entry)}
            if row["value"] is not None:
                row["holds"] = None if row["tolerance"] is None else _near(row)
        rows.append(row)
    return rows


def allowed(entry: Row) -> float | None:
    """How far another run may be from an entry's reference; None: as far as it likes."""
    if "shown" in entry:
        return None
    if "spread" in entry:
        return max(SPREADS * entry["spread"], FLOOR * max(1.0, abs(entry["reference"])))
    return entry.get("tolerance", 0.0)


def _near(row: Row) -> bool:
    rounding = 1e-12 * max(1.0, abs(row["expected"]))  # so that 0.98 is within 0.01 of 0.97, binary fractions or not
    return abs(row["value"] - row["expected"]) <= row["tolerance"] + rounding


def number_text(value: float | None) -> str:
    """A number to be read: counts, of bytes for instance, in full; anything else to four digits."""
    if value is None:
        return "not measured"
    return f"{int(value):,}" if abs(value) >= 1000 and float(value).is_integer() else f"{value:.4g}"


def expected_text(row: Row) -> str:
    """What a row asks for, in words: `0.97 ± 0.036`, `exactly 10,240`."""
    if row["expected"] is None:
        return "not in the ledger"
    text = number_text(row["expected"])
    if row["tolerance"] is None:
        return f"{text} (not judged)"
    return f"{text} ± {row['tolerance']:.2g}" if row["tolerance"] else f"exactly {text}"


def table(rows: Sequence[Row]) -> "pd.DataFrame":
    """Rows of `compare` in words: claim, measured, expected, holds."""
    import pandas as pd

    holds = {True: "yes", False: "NO", None: "–"}
    lines = [
        {
            "claim": row["name"],
            "measured": number_text(row["value"]) + (f" (re-read from {row['source']})" if row["source"] else ""),
            "expected": expected_text(row),
            "holds": holds[row["holds"]],
        }
        for row in rows
    ]
    return pd.DataFrame(lines, columns=["claim", "measured", "expected", "holds"])


def show(rows: Sequence[Row]) -> None:
    """Displays rows of `compare` in a notebook, or prints them."""
    import pandas as pd
    from IPython.display import display

    whole = ("display.max_rows", None, "display.max_columns", None, "display.max_colwidth", None, "display.width", 200)
    with pd.option_context(*whole):
        display(table(rows).set_index("claim"))


def update(profile: str, notebooks: Iterable[str]) -> list[Path]:
    """Writes the ledger from a finished run: its column (own prose, or the books) with what the run measured.

    What a notebook no longer records is dropped from both columns; a run without the books keeps the claims that only
    the books have. Promises are in another file, which is not touched.

    Args:
        notebooks: those that the run finished.
    Returns:
        The files written.
    """
    written = []
    for notebook in notebooks:
        found = measured(notebook, profile)
        path = path_of(notebook, profile)
        ledger = expected(notebook, profile) if path.is_file() else {"claims": {}}
        facts = {key: found[key] for key in ("seed", "device", "versions")}
        new = {
            name: {"reference": entry["value"]} | {key: entry[key] for key in entry if key != "value"}
            for name, entry in found["claims"].items()
        }
        own, books = _columns(ledger["claims"])
        if found["books"]:
            books, facts["digest"] = new, found["books"]
            own = {name: entry for name, entry in own.items() if name in new}
        else:
            books = {name: entry for name, entry in books.items() if name in new or name not in own}
            own = new
        ledger = {
            "notebook": notebook,
            "profile": profile,
            "own": ledger.get("own"),
            "books": ledger.get("books"),
            "books" if found["books"] else "own": facts,
            "claims": {name: _joined(own.get(name), books.get(name)) for name in [*own, *(books.keys() - own.keys())]},
        }
        files.write_json(path, {key: value for key, value in ledger.items() if value is not None})
        written.append(path)
    return written


def _columns(entries: Mapping[str, Row]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Own prose and books, each name -> entry; a number that the books do not change is in both."""
    own = {name: {k: v for k, v in entry.items() if k != "books"} for name, entry in entries.items()}
    books = {name: entry.get("books", own[name]) for name, entry in entries.items()}
    return {name: entry for name, entry in own.items() if entry}, books


def _joined(own: Row | None, books: Row | None) -> Row:
    return own if books in (None, own) else (own or {}) | {"books": books}
