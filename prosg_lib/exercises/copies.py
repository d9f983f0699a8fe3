"""Copies of the course for a class: the students' without solutions, the instructor's with all there is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prosg_lib import exercises, files
from prosg_lib.errors import UserError
from prosg_lib.exercises import cells
from prosg_lib.exercises.checking import Exercise, reply
from prosg_lib.reproduction import notebook_files

_SOLUTIONS = re.compile(r"\n*<details>\s*<summary>Solutions?</summary>.*?</details>\n*", re.DOTALL)
_BADGE = re.compile(r"\[!\[Open in Colab\]\(.*?\)\]\(.*?\)\n*")


def write(kind: str, folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Writes a copy of every notebook of the course.

    Args:
        kind: "student" or "instructor".
        folder: made if need be; other files in it stay.
        overwrite: replace copies that are there.
    Returns:
        What was written, in the course's order.
    Raises:
        UserError: the folder is the course's own or cannot be written to, or holds such files and may not be
            overwritten; nothing was written.
    """
    make = {"student": student, "instructor": instructor}[kind]
    course, folder = notebook_files.course(), Path(folder)
    if folder.resolve() == course[0].parent.resolve():
        raise UserError(f"{folder} holds the course itself; write the copies into another folder.")
    files.check_writable(folder, "OUT")
    there = [path.name for path in course if (folder / path.name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder} holds {', '.join(there)} already; give another folder, or --overwrite.")
    for path in course:
        copy = make(files.read_json(path))
        files.write_text(folder / path.name, json.dumps(copy, indent=1, ensure_ascii=False) + "\n")
    return [folder / path.name for path in course]


def student(notebook: dict[str, Any]) -> dict[str, Any]:
    """Without solutions, and without the badge, which opens the copy that has them."""
    kept = []
    for cell in notebook["cells"]:
        if cells.SOLUTION in notebook_files.tags(cell):
            continue
        if cell["cell_type"] == "markdown":
            text = _BADGE.sub("", _SOLUTIONS.sub("\n\n", "".join(cell["source"]))).strip()
            if not text:
                continue
            cell = {**cell, "source": text.splitlines(True)}
        kept.append(cell)
    return {**notebook, "cells": kept}


def instructor(notebook: dict[str, Any]) -> dict[str, Any]:
    """With a plan of the exercises after the title, and after each what a teacher wants to know of it."""
    kept: list[dict[str, Any]] = []
    placed = []
    for cell in notebook["cells"]:
        kept.append(cell)
        match cells.number_of(cell):
            case (number, "solution"):
                placed.append(exercises.find(number))
                kept.append(cells.markdown(_notes(placed[-1]), f"ex-{number.replace('.', '-')}-notes", "instructor"))
    if placed:
        kept.insert(1, cells.markdown(_plan(placed), "instructor-plan", "instructor"))
    return {**notebook, "cells": kept}


def _plan(placed: Sequence[Exercise]) -> str:
    rows = [f"| {e.number} | {e.title} | {'★' * e.stars} | {e.minutes} |" for e in placed]
    total = sum(e.minutes for e in placed)
    head = [
        "**Instructor's copy.** Exercises of this notebook:",
        "",
        "| exercise | | difficulty | minutes |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, f"| all | | | {total} |"])


def _notes(exercise: Exercise) -> str:
    """Timing, misconception, discussion, and every typical wrong answer with the check's reply to it."""
    parts = [
        f"**For the instructor: exercise {exercise.number}**, about {exercise.minutes} minutes",
        f"**Typical misconception.** {exercise.misconception}",
        "**To discuss.**\n\n" + "\n".join(f"- {prompt}" for prompt in exercise.discussion),
        "**Typical wrong answers, and the check's reply.**",
    ]
    for mistake in exercise.mistakes:
        code = cells.code(mistake.answer, exercise.name)
        parts.append(f"```python\n{code}\n```\n\n> {reply(exercise, mistake.answer).text}")
    return "\n\n".join(parts)
