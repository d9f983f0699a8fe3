"""The suites that are known by name, and their results from a file of predictions alone."""

from __future__ import annotations

from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.reproduction import dialogue_report, forgetting_report

REPORTS = {"forgetting": forgetting_report.write, "dialogue": dialogue_report.write}
"""What writes the results of a suite: (folder, header, rows)."""


def recompute(file: str | Path, out: str | Path) -> None:
    """All numbers, the page and the figures, from a file of predictions alone, which says what suite it is of.

    Raises:
        UserError: the file is missing, damaged or of an unknown suite; nothing is written then.
    """
    folder = output_folder(out)
    header, rows = predictions.read(file)
    REPORTS[header["suite"]](folder, header, rows)


def output_folder(out: str | Path) -> Path:
    """A UserError where the name is a file's."""
    folder = Path(out).expanduser().resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; name a folder that results can be written to")
    return folder
