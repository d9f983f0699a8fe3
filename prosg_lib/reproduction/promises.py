"""Promises: bars that were set before anything was measured, and never follow a result.

All are in one file, `expected/promises.json`, a list of

    name      one word, for good
    sentence  what is promised
    since     the day it was committed
    notebook  which records the claims; a benchmark's name where `profiles` is ["benchmark"]
    profiles  in which it is judged; every one where the key is absent
    claims    one claim, or two: then the first less the second is judged
    relation  at_least or at_most
    bar       a number

Nothing writes the file. A broken promise stays there, and a test compares every bar with the file's history in git.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prosg_lib import files, paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims

if TYPE_CHECKING:
    import pandas as pd

FILE = "promises.json"
KEYS = {"name", "sentence", "since", "notebook", "claims", "relation", "bar"}
SIGNS = {"at_least": 1, "at_most": -1}


def load() -> list[dict[str, Any]]:
    """All promises, in the file's order; none where there is no file.

    Raises:
        UserError: the file is malformed; names the promise.
    """
    path = paths.expected_dir() / FILE
    if not path.is_file():
        return []
    found = files.read_json(path)
    for promise in found:
        if not KEYS <= promise.keys() <= KEYS | {"profiles"} or promise["relation"] not in SIGNS:
            raise UserError(
                f"{path}, promise {promise.get('name')!r}: it needs {', '.join(sorted(KEYS))}, may have profiles, and "
                "its relation is at_least or at_most."
            )
    return found


def kept(promise: Mapping[str, Any], value: float) -> bool:
    """Whether a value is on the promised side of the bar."""
    sign = SIGNS[promise["relation"]]
    return sign * value >= sign * promise["bar"] - 1e-12 * max(1.0, abs(promise["bar"]))


def judge(measured: Mapping[str, Mapping[str, claims.Row]], profile: str) -> list[dict[str, Any]]:
    """Every promise with its verdict, broken ones first.

    Args:
        measured: notebook -> what it recorded in a run of this profile.
    Returns:
        Rows: the promise, value, kept, source ("this run", or the ledger where this run did not measure it: another
        profile, a benchmark, data that is not here), and newly_broken (kept by the reference run, and not by this one).
    """
    rows = []
    for promise in load():
        profiles = promise.get("profiles") or [profile, "cpu"]  # of a profile without a ledger, the reference is cpu's
        told, source = _reference(promise, profiles)
        value = None
        if profile in profiles:
            found = measured.get(promise["notebook"], {})
            value = _difference([found.get(name, {}).get("value") for name in promise["claims"]])
        source = source if value is None else "this run"
        broken_before = told is not None and not kept(promise, told)
        value = told if value is None else value
        holds = value is not None and kept(promise, value)
        newly = source == "this run" and not holds and not broken_before
        rows.append({**promise, "value": value, "kept": holds, "source": source, "newly_broken": newly})
    return sorted(rows, key=lambda row: row["kept"])


def _reference(promise: Mapping[str, Any], profiles: Sequence[str]) -> tuple[float | None, str]:
    for profile in profiles:
        ledger = claims.expected_claims(promise["notebook"], profile)
        if all(name in ledger for name in promise["claims"]):
            entries = [ledger[name] for name in promise["claims"]]
            read = "" if all("reference" in entry for entry in entries) else " with the books"
            value = _difference([claims.reference(entry)["reference"] for entry in entries])
            return value, f"ledger, {promise['notebook']}.{profile}{read}"
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
            "measured": claims.number_text(row["value"]),
            "bar": f"{row['relation'].replace('_', ' ')} {claims.number_text(row['bar'])}",
            "kept": "yes" if row["kept"] else "BROKEN",
            "measured in": row["source"],
            "since": row["since"],
        }
        for row in rows
    ]
    return pd.DataFrame(lines, columns=["promise", "measured", "bar", "kept", "measured in", "since"])
