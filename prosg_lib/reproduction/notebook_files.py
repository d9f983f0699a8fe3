"""The course's notebooks as files: which there are, what they take, whether they are clean; and running one of them."""

import ast
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prosg_lib import files, paths, strict
from prosg_lib.errors import UserError

PARAMETERS_TAG = "parameters"
REQUIRED_PARAMETERS = ("profile", "seed")

FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
"""Code within Markdown."""

_REPORT = "_reproduction_report"

KERNEL_START_S = 300
CELL_S = 12 * 3600
"""The longest that a cell may take: more than any training of a shipped profile takes on two cores, or a download."""


def course() -> list[Path]:
    """The course's notebooks in the order of their numbers, 06 before 06b; the report on all of them comes last.

    Raises:
        UserError: there are none.
    """
    found = paths.notebooks_dir().glob("[0-9][0-9]*_*.ipynb")
    found = sorted(found, key=lambda path: (path.stem.endswith(_REPORT), path.stem))
    if not found:
        raise UserError(f"{paths.notebooks_dir()} holds no notebook named like 00_tour.ipynb; restore the checkout.")
    return found


@dataclass
class _Cell:
    cell_type: str
    source: str | list[str]
    metadata: dict
    id: str | None = None
    outputs: list = field(default_factory=list)
    execution_count: int | None = None
    attachments: dict = field(default_factory=dict)


@dataclass
class _Notebook:
    cells: list[_Cell]
    metadata: dict
    nbformat: Literal[4]
    nbformat_minor: int


def _read(path: Path) -> dict[str, Any]:
    found = files.read_json(path)
    strict.read_as(_Notebook, found, path)
    return found


def cells(path: Path) -> list[dict[str, Any]]:
    """A notebook's cells, each source as one text.

    Raises:
        UserError: it is missing or no notebook.
    """
    return [{**cell, "source": "".join(cell["source"])} for cell in _read(path)["cells"]]


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of a page, or of a notebook's Markdown cells."""
    name = path.relative_to(paths.repo_root()).as_posix()
    if path.suffix != ".ipynb":
        yield name, files.read_text(path)
        return
    for index, cell in enumerate(cells(path)):
        if cell["cell_type"] == "markdown":
            yield f"{name}, cell {index}", cell["source"]


def tags(cell: Mapping[str, Any]) -> list[str]:
    """A cell's tags."""
    found = cell["metadata"].get("tags")
    return found if isinstance(found, list) else []


def parameters(path: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's parameters: the assignments in its cell tagged `parameters`.

    Raises:
        UserError: not exactly one such cell, or something else than `name = literal` in it.
    """
    tagged = [cell for cell in cells(path) if cell["cell_type"] == "code" and PARAMETERS_TAG in tags(cell)]
    if len(tagged) != 1:
        raise UserError(f"{path.name} has {len(tagged)} code cells tagged '{PARAMETERS_TAG}'; give it exactly one.")
    try:
        statements = ast.parse(tagged[0]["source"]).body
        return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"{path.name}, parameters cell: {error}; write one `name = literal` a line.") from error


def problems(path: Path) -> list[str]:
    """What keeps a notebook from being committed, one sentence each; empty for a clean one.

    Clean is: valid, kernelspec python3, no outputs and execution counts, one parameters cell that has profile and seed,
    and ids that stay, so that a change shows as a change of the cells it touches.
    """
    import nbformat  # a second and more, and only needed here

    try:
        notebook = _read(path)
        ids = [cell.get("id") for cell in notebook["cells"]]
        with warnings.catch_warnings(action="ignore"):  # of ids that are missing or there twice, which it repairs
            nbformat.validate(notebook)
    except (UserError, nbformat.ValidationError) as error:
        return [f"{path.name}: not a valid notebook: {str(error).splitlines()[0]}"]
    found = []
    kernel = notebook["metadata"].get("kernelspec", {})
    if kernel.get("name") != "python3" or kernel.get("language", "python") != "python":
        found.append("its kernelspec is not python3; set metadata.kernelspec to name python3, language python")
    if "papermill" in notebook["metadata"]:
        found.append("it is a copy that papermill executed; commit the source")
    if None in ids:
        found.append("it is older than nbformat 4.5, so its cells have no ids; open and save it in JupyterLab")
    elif len(set(ids)) != len(ids):
        found.append("two cells have the same id")
    if ids == [str(index) for index in range(len(ids))]:
        found.append("its ids are 0, 1, 2, ..., which change with every insertion; strip outputs with --keep-id")
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"] is not None):
            found.append(f"cell {index} has outputs or an execution count; clear all outputs before committing")
    try:
        missing = [name for name in REQUIRED_PARAMETERS if name not in parameters(path)]
        found += [f"its parameters cell does not set {name}" for name in missing]
    except UserError as error:
        found.append(str(error))
    return [f"{path.name}: {sentence}" for sentence in found]


def execute(source: Path, target: Path, values: Mapping[str, Any]) -> None:
    """Executes a notebook in a kernel of this Python and writes the executed copy, also when a cell fails.

    Raises:
        UserError: a cell failed, took longer than `CELL_S`, the copy could not be written, or the kernel did not start
            or died (the copy then calls every cell completed, which is not to be believed).
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    from prosg_lib.reproduction.kernel import ThisPython

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            source,
            target,
            parameters=dict(values),
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            cwd=source.parent,
            start_timeout=KERNEL_START_S,
            iopub_timeout=KERNEL_START_S,  # for outputs that arrive after a cell's end
            execution_timeout=CELL_S,
            coalesce_streams=True,  # a progress bar is one line in the copy, not a thousand
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=40"],  # no warning that messages within one machine are not encrypted
        )
    except PapermillExecutionError as error:
        first, *_ = error.source.strip().splitlines() or [""]
        *_, last = error.evalue.strip().splitlines() or [""]
        raise UserError(f"In [{error.exec_count}] (`{first[:60]}`): {error.ename}: {last.strip()}") from error
    except CellTimeoutError as error:
        raise UserError(f"a cell ran for more than {CELL_S / 3600:g} hours and was ended") from error
    except RuntimeError as error:
        raise UserError(f"its kernel died ({error}); often memory was short (a smaller profile needs less)") from error
    except OSError as error:
        raise UserError(f"a file could not be written: {error}") from error
