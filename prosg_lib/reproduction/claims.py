"""Measurements: named numbers that a notebook records. What was expected of them is in `ledger.py`."""

import hashlib
import math
import numbers
import os
import re
from dataclasses import dataclass, field
from typing import Any

from prosg_lib import files, paths, provenance
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger


@dataclass
class Context:
    """The notebook that is recording now."""

    notebook: str
    profile: str
    seed: int
    values: dict[str, ledger.Row] = field(default_factory=dict)
    finished: bool = False


_current: Context | None = None


def begin(notebook: str, profile: Profile, seed: int) -> None:
    """Starts a notebook's record; a second call starts it anew, so that a notebook can be run twice in one kernel."""
    global _current
    _current = Context(notebook, profile.name, int(seed))
    if profile.name == "smoke":
        print("Profile smoke: tiny models that learned nothing, to test the code. The text describes the profile cpu.")


def current() -> Context:
    """The record begun last.

    Raises:
        UserError: none was begun.
    """
    if _current is None:
        raise UserError("No claims were begun; run the cell with claims.begin(notebook, profile=..., seed=...) first.")
    return _current


def record(
    name: str,
    value: Any,
    *,
    spread: float | None = None,
    tolerance: float | None = None,
    shown: bool = False,
    source: str | None = None,
) -> None:
    """Records one number under a name such as `recall/prosg@512`.

    Args:
        value: a finite number. An integer or a truth value is exact. An `Estimate` (value, low, high) brings its own
            spread, half of its 95 % interval over 1.96. A tensor or array of one element will do.
        spread: standard error of the value over items or seeds; where a float has neither spread nor tolerance, the
            floor alone decides.
        tolerance: for a deterministic number: how far another machine's arithmetic may take it.
        shown: it is shown and not judged (a time, a peak of memory).
        source: the shipped file from which the number was read again instead of measured.
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
        raise UserError(f"Claim {name!r} is recorded already; choose another name, or {again}.")
    if hasattr(value, "low"):
        value, spread = value.value, (value.high - value.low) / 2 / 1.96 if spread is None else spread
    elements = value.numel() if hasattr(value, "numel") else getattr(value, "size", None)
    plain = value.item() if elements == 1 else value
    if not isinstance(plain, numbers.Real):
        raise UserError(f"Claim {name!r} is not a number but {value!r}; record a float.")
    entry: ledger.Row = {"value": float(plain)}
    if shown:
        entry["shown"] = True
    elif tolerance is not None:
        entry["tolerance"] = float(tolerance)
    elif isinstance(plain, numbers.Integral) and spread is None:
        entry["exact"] = True
    else:
        entry["spread"] = float(spread or 0.0)
    if not all(math.isfinite(number) for number in entry.values()):
        raise UserError(
            f"Claim {name!r} is {value} with a spread of {spread}; both have to be finite numbers, so look at what "
            "they were computed from."
        )
    context.values[name] = entry | ({"source": source} if source else {})


def share_error(share: float, answers: int) -> float:
    """Standard error of a share of independent answers, above 0 for shares of 0 and 1 as well (Agresti, Coull 1998)."""
    adjusted = (share * answers + 2) / (answers + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (answers + 4))


def books_digest() -> str | None:
    """Names the books that notebooks read; None where they read the project's own prose."""
    folder = paths.extra_data("books")
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.txt")):
        digest.update(os.fsencode(path.name) + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def finish() -> None:
    """Ends the record: writes runs/<profile>/claims/<notebook>.json and shows measured beside expected.

    Raises:
        UserError: no record was begun, or it is finished already.
    """
    context = current()
    if context.finished:
        raise UserError("claims.finish() ran already; run the notebook again from the cell with claims.begin.")
    found = {
        "notebook": context.notebook,
        "profile": context.profile,
        "seed": context.seed,
        **provenance.facts(),
        "peak_mb": provenance.peak_mb(),
        "books": books_digest(),
        "claims": context.values,
    }
    files.write_json(ledger.measured_path(context.notebook, context.profile), found)
    context.finished = True
    ledger.show(ledger.judge(found, context.notebook, context.profile))
