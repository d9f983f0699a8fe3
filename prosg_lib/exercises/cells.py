"""An exercise as the four cells of a notebook: task, stub, check, and a folded solution.

Write a markdown cell with the id `ex-3-1-task` where exercise 3.1 should stand; `python -m prosg_lib.exercises.cells
notebooks/03_low_rank_gradients.ipynb` puts the four cells there, or writes them again where they are.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prosg_lib import exercises, files
from prosg_lib.exercises.checking import Exercise

TASK, STUB, CHECK, SOLUTION = "exercise", "exercise-stub", "exercise-check", "solution"
"""Tags of the four cells."""

_PARTS = ("task", "stub", "check", "solution")


def cells(exercise: Exercise) -> list[dict[str, Any]]:
    """The four cells of an exercise, as nbformat has them."""
    stars = "★" * exercise.stars + "☆" * (3 - exercise.stars)
    task = (
        f"### Exercise {exercise.number}: {exercise.title}\n\n{stars} about {exercise.minutes} minutes\n\n"
        f"{exercise.task}\n\n<details><summary>Hint</summary>\n\n{exercise.hint}\n\n</details>"
    )
    ids = [f"ex-{exercise.number.replace('.', '-')}-{part}" for part in _PARTS]
    solution = f"<details><summary>Solution</summary>\n\n```python\n{code(exercise.solution)}\n```\n\n</details>"
    return [
        markdown(task, ids[0], TASK),
        _code(stub(exercise.solution), ids[1], STUB),
        _code(f'exercises.check("{exercise.number}", {exercise.name})', ids[2], CHECK),
        markdown(solution, ids[3], SOLUTION),
    ]


def code(function: Callable, name: str = "") -> str:
    """A function's source without its docstring; a lambda's as a function of that name."""
    if function.__name__ == "<lambda>":
        return _written_out(function, name)
    lines, node = _parsed(function)
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return "\n".join(lines)


def stub(function: Callable) -> str:
    """A function's signature and docstring, with nothing done."""
    lines, node = _parsed(function)
    return "\n".join([*lines[: node.body[0].end_lineno], "    raise NotImplementedError"])


def _parsed(function: Callable) -> tuple[list[str], ast.FunctionDef]:
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    return source.split("\n"), ast.parse(source).body[0]


def _written_out(function: Callable, name: str) -> str:
    module = inspect.getsource(inspect.getmodule(function))
    first = function.__code__.co_firstlineno
    node = next(n for n in ast.walk(ast.parse(module)) if isinstance(n, ast.Lambda) and n.lineno == first)
    arguments = ", ".join(inspect.signature(function).parameters)
    return f"def {name}({arguments}):\n    return {ast.get_source_segment(module, node.body)}"


def markdown(source: str, name: str, tag: str) -> dict[str, Any]:
    """A markdown cell."""
    return {"cell_type": "markdown", "id": name, "metadata": {"tags": [tag]}, "source": source.splitlines(True)}


def _code(source: str, name: str, tag: str) -> dict[str, Any]:
    cell = {"cell_type": "code", "execution_count": None, "id": name, "metadata": {"tags": [tag]}, "outputs": []}
    return {**cell, "source": source.splitlines(True)}


def number_of(cell: dict[str, Any]) -> tuple[str, str] | None:
    """The exercise and the part of it ("task", "stub", "check", "solution") that a cell is; None for other cells."""
    found = re.fullmatch(rf"ex-(\d+)-(\d+)-({'|'.join(_PARTS)})", cell.get("id") or "")
    return (f"{found[1]}.{found[2]}", found[3]) if found else None


def refresh(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with every exercise as its module has it, at the place of its task."""
    kept: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        match number_of(cell):
            case None:
                kept.append(cell)
            case (number, "task"):
                kept += cells(exercises.find(number))
    return {**notebook, "cells": kept}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        files.write_text(name, json.dumps(refresh(files.read_json(Path(name))), indent=1, ensure_ascii=False) + "\n")
