"""The course's notebooks: clean, and every proof that stands in one as a `test_` function holds.

A notebook's cells tagged `proof` (imports and helpers included) are executed in order in one namespace, after its
parameters, with the profile smoke; the test functions that they define are tests here, named notebook::function.
"""

import ast
import functools
import re

import pytest

from prosg_lib.reproduction import notebook_files as notebooks

PROOF_TAG = "proof"
COURSE = notebooks.course()


def code_cells(path):
    return [cell for cell in notebooks.cells(path) if cell["cell_type"] == "code"]


def functions(source):
    """Names of the test functions that a cell defines; lines that only IPython understands are left out."""
    plain = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
    found = [node for node in ast.parse(plain).body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in found if node.name.startswith("test_")]


PROOFS = [
    (path, name)
    for path in COURSE
    for cell in code_cells(path)
    if PROOF_TAG in notebooks.tags(cell)
    for name in functions(cell["source"])
]


@functools.cache
def namespace(path):
    """What a notebook's proofs define."""
    defined = {"__name__": path.stem, **notebooks.parameters(path), "profile": "smoke"}
    for number, cell in enumerate(code_cells(path)):
        if PROOF_TAG in notebooks.tags(cell):
            exec(compile(cell["source"], f"{path.name}, code cell {number}", "exec"), defined)
    return defined


@pytest.mark.parametrize(("path", "name"), PROOFS, ids=[f"{path.stem}::{name}" for path, name in PROOFS])
def test_proof(path, name):
    """What a notebook says it proves, it proves."""
    namespace(path)[name]()


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    """No outputs, kernelspec python3, a parameters cell, ids that stay; no test function outside a proof cell, where
    nobody would run it; no two proofs of one name, of which only the last would be run."""
    assert notebooks.problems(path) == []
    stray = [cell["source"] for cell in code_cells(path) if PROOF_TAG not in notebooks.tags(cell)]
    assert [name for source in stray for name in functions(source)] == []
    names = [name for other, name in PROOFS if other == path]
    assert len(set(names)) == len(names)
