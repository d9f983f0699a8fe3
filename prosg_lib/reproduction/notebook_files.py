"""The course's notebooks as files: which there are, what they take, whether they are clean; and running one of them.

`python -m prosg_lib.reproduction.notebook_files SOURCE TARGET PARAMETERS` executes one notebook; `reproduce` starts it
as a process of its own, so that a kernel that takes its process along does not take the run along.
"""

import ast
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prosg_lib.errors import UserError

# jsonschema, beneath nbformat, imports rfc3987_syntax where it is installed, which takes four seconds in every process,
# for a kind of address that no notebook holds. It does without where the import fails, so for this moment it does.
_ABSENT = {} if "rfc3987_syntax" in sys.modules else {"rfc3987_syntax": None}
sys.modules.update(_ABSENT)
import nbformat  # noqa: E402

for _name in _ABSENT:
    del sys.modules[_name]

PARAMETERS_TAG = "parameters"
REQUIRED_PARAMETERS = ("profile", "seed")


def course(folder: Path) -> list[Path]:
    """The notebooks of a folder in the order of their numbers.

    Raises:
        UserError: there are none.
    """
    found = sorted(path for path in Path(folder).glob("*.ipynb") if re.match(r"\d\d_", path.name))
    if not found:
        raise UserError(f"{folder} holds no notebook named like 00_tour.ipynb; give the checkout's notebooks folder.")
    return found


def read(path: Path) -> nbformat.NotebookNode:
    """One notebook.

    Raises:
        UserError: it is missing or no notebook.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ids that are there twice; `problems` says it
            return nbformat.read(path, as_version=nbformat.NO_CONVERT)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no notebook ({str(error).splitlines()[0]:.100}); restore it.") from error


def tags(cell: Mapping[str, Any]) -> list[str]:
    """A cell's tags."""
    return cell["metadata"].get("tags", [])


def parameters(path: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's parameters: the assignments in its cell tagged `parameters`.

    Raises:
        UserError: not exactly one such cell, or something else than `name = literal` in it.
    """
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code" and PARAMETERS_TAG in tags(cell)]
    if len(cells) != 1:
        raise UserError(f"{path.name} has {len(cells)} code cells tagged '{PARAMETERS_TAG}'; give it exactly one.")
    found: dict[str, Any] = {}
    try:
        for statement in ast.parse(cells[0]["source"]).body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                target = statement.target
            else:
                raise ValueError(f"line {statement.lineno} is no assignment")
            if not isinstance(target, ast.Name):
                raise ValueError(f"line {statement.lineno} assigns to no plain name")
            found[target.id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path.name}, parameters cell: {error}; write one `name = literal` a line.") from error
    return found


def problems(path: Path) -> list[str]:
    """What keeps a notebook from being committed, one sentence each; empty for a clean one.

    Clean is: valid, kernelspec python3, no outputs and execution counts, one parameters cell that has profile and seed,
    and ids that stay, so that a change shows as a change of the cells it touches.
    """
    try:
        notebook = read(path)
        nbformat.validate(notebook)
    except (UserError, nbformat.ValidationError) as error:
        return [f"{path.name}: not a valid notebook: {str(error).splitlines()[0]}"]
    found = []
    kernel = notebook["metadata"].get("kernelspec", {})
    if kernel.get("name") != "python3" or kernel.get("language", "python") != "python":
        found.append("its kernelspec is not python3; set metadata.kernelspec to name python3, language python")
    if "papermill" in notebook["metadata"]:
        found.append("it is a copy that papermill executed; commit the source")
    if (notebook["nbformat"], notebook["nbformat_minor"]) < (4, 5):
        found.append("it is older than nbformat 4.5, so its cells have no ids; open and save it in JupyterLab")
    # From the file itself, because reading a notebook repairs ids that are there twice.
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if "id" in cell]
    if len(set(ids)) != len(ids):
        found.append("two cells have the same id")
    if ids and ids == [str(index) for index in range(len(ids))]:
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
        PapermillExecutionError: a cell failed.
        DeadKernelError: the kernel died; the copy then calls every cell completed, which is not to be believed.
    """
    import papermill

    papermill.execute_notebook(
        source,
        target,
        parameters=dict(values),
        kernel_name="python3",
        cwd=source.parent,
        start_timeout=180,
        coalesce_streams=True,  # a progress bar is one line in the copy, not a thousand
        progress_bar=True,
    )


def main(arguments: list[str]) -> None:
    source, target, values = arguments
    execute(Path(source), Path(target), json.loads(values))


if __name__ == "__main__":
    main(sys.argv[1:])
