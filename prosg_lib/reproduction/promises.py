"""Promises: bars that were set before anything was measured, and never follow a result.

All are in one file, `expected/promises.json`. Nothing writes it; a broken promise stays there, and a test compares
every bar with the file's history in git.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from prosg_lib import files, paths, strict
from prosg_lib.reproduction import ledger

if TYPE_CHECKING:
    import pandas as pd

FILE = "promises.json"


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        name: one word, for good; sentence: what is promised; since: the day it was committed.
        notebook: which records the claims; a benchmark's name where `profiles` is ("benchmark",).
        claims: one claim, or two: then the first less the second is judged.
        profiles: in which it is judged; every one where there is none.
    """

    name: str
    sentence: str
    since: str
    notebook: str
    claims: tuple[str] | tuple[str, str]
    relation: Literal["at_least", "at_most"]
    bar: float
    profiles: tuple[str, ...] = ()

    def kept(self, value: float) -> bool:
        """Whether a value is on the promised side of the bar."""
        sign = 1 if self.relation == "at_least" else -1
        return sign * value >= sign * self.bar - 1e-12 * max(1.0, abs(self.bar))


def load() -> list[Promise]:
    """All promises, in the file's order; none where there is no file.

    Raises:
        UserError: the file is malformed; names the promise's place and the field.
    """
    path = paths.expected_dir() / FILE
    return strict.read_as(list[Promise], files.read_json(path), path) if path.is_file() else []


def judge(measured: Mapping[str, Mapping[str, ledger.Row]], profile: str) -> list[dict[str, Any]]:
    """Every promise with its verdict, broken ones first.

    Args:
        measured: notebook -> what it recorded in a run of this profile.
    Returns:
        Rows: the promise, value, kept, source ("this run", or the ledger where this run did not measure it: another
        profile, a benchmark, data that is not here), and newly_broken (kept by the reference run, and not by this one).
    """
    rows = []
    for promise in load():
        profiles = promise.profiles or (profile, "cpu")  # of a profile without a ledger, the reference is cpu's
        reference, source = _reference(promise, profiles)
        value = None
        if profile in profiles:
            found = measured.get(promise.notebook, {})
            value = _difference([found.get(name, {}).get("value") for name in promise.claims])
        source = source if value is None else "this run"
        broken_before = reference is not None and not promise.kept(reference)
        value = reference if value is None else value
        holds = value is not None and promise.kept(value)
        newly = source == "this run" and not holds and not broken_before
        rows.append({**asdict(promise), "value": value, "kept": holds, "source": source, "newly_broken": newly})
    return sorted(rows, key=lambda row: row["kept"])


def _reference(promise: Promise, profiles: Sequence[str]) -> tuple[float | None, str]:
    for profile in profiles:
        expected = ledger.expected_claims(promise.notebook, profile)
        if all(name in expected for name in promise.claims):
            entries = [expected[name] for name in promise.claims]
            read = "" if all("reference" in entry for entry in entries) else " with the books"
            value = _difference([ledger.reference(entry)["reference"] for entry in entries])
            return value, f"ledger, {promise.notebook}.{profile}{read}"
    return None, "not measured"


def _difference(values: Sequence[float | None]) -> float | None:
    if None in values:
        return None
    return values[0] - sum(values[1:])


def table(rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows of `judge` in words: promise, measured, bar, kept, measured in, since."""
    import pandas as pd

    lines = [
        {
            "promise": row["sentence"],
            "measured": ledger.number_text(row["value"]),
            "bar": f"{row['relation'].replace('_', ' ')} {ledger.number_text(row['bar'])}",
            "kept": "yes" if row["kept"] else "BROKEN",
            "measured in": row["source"],
            "since": row["since"],
        }
        for row in rows
    ]
    return pd.DataFrame(lines, columns=["promise", "measured", "bar", "kept", "measured in", "since"])
