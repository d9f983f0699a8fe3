"""Every exercise against its solution, the untouched stub, typical wrong answers, and answers of the right shape only.

A wrong answer must be refused with the message that is meant for it, and no two of an exercise share one.
"""

import ast
import copy
import inspect
import math

import numpy as np
import pytest
import torch

from prosg_lib import exercises
from prosg_lib.errors import UserError
from prosg_lib.exercises import cells
from prosg_lib.exercises.checking import reply
from prosg_lib.reproduction import notebook_files

ALL = [exercise for number in exercises.MODULES for exercise in exercises.of_notebook(number)]
MISTAKES = [(exercise, mistake) for exercise in ALL for mistake in exercise.mistakes]
every = pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.number)


def built(source):
    """The function that a cell defines, in a namespace as a notebook's."""
    space = {"torch": torch, "np": np, "math": math}
    exec(compile(source, "a cell", "exec"), space)
    return list(space.values())[-1]


@every
def test_the_solution_passes(exercise):
    found = reply(exercise, built(cells.code(exercise.solution)))
    assert found.right
    assert exercise.why in found.text


@every
def test_the_stub_is_not_answered(exercise):
    for untouched in (built(cells.stub(exercise.solution)), None, ...):
        found = reply(exercise, untouched)
        assert found.right is None
        assert "not answered yet" in found.text
    assert reply(exercise, with_arguments(exercise, "return None")).right is None
    assert reply(exercise, with_arguments(exercise, "...")).right is None


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES, ids=lambda x: getattr(x, "number", None) or x.says[:40])
def test_a_mistake_is_recognised(exercise, mistake):
    found = reply(exercise, mistake.answer)
    assert found.right is False
    assert mistake.says in found.text


@every
def test_every_mistake_has_its_own_message(exercise):
    says = [mistake.says for mistake in exercise.mistakes]
    assert len(says) >= 3
    assert len(set(says)) == len(says)


@every
def test_the_right_shape_is_not_enough(exercise):
    """Zeros, ones and random numbers of the right shapes, and the right result of another call."""
    rng = torch.Generator().manual_seed(3)

    def in_the_place_of(make):
        def answer(*arguments):
            result = exercise.expected(*arguments)
            made = [
                make(torch.as_tensor(part).double()) for part in (result if isinstance(result, tuple) else [result])
            ]
            return tuple(made) if isinstance(result, tuple) else made[0]

        answer.__signature__ = inspect.signature(exercise.solution)
        return answer

    for make in (
        torch.zeros_like,
        torch.ones_like,
        lambda part: torch.rand(part.shape, generator=rng, dtype=part.dtype),
        lambda part: part * 1.001 if part.dtype.is_floating_point and part.any() else part + 1,
        lambda part: part.float().half().double() + 1e-3,
    ):
        assert reply(exercise, in_the_place_of(make)).right is False


OTHER = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
}


def mutants(source):
    """The source with one operator, sign, transposition or number changed, once for each of them."""
    tree = ast.parse(source)
    for place in range(sum(1 for _ in ast.walk(tree))):
        changed = copy.deepcopy(tree)
        match list(ast.walk(changed))[place]:
            case ast.BinOp(op=op) as node if type(op) in OTHER:
                node.op = OTHER[type(op)]()
            case ast.Compare(ops=[op]) as node if type(op) in OTHER:
                node.ops = [OTHER[type(op)]()]
            case ast.UnaryOp(op=ast.USub()) as node:
                node.op = ast.UAdd()
            case ast.Attribute(attr="T" | "mT") as node:
                node.attr = "data"
            case ast.Constant(value=int() | float()) as node:
                node.value += 1
            case _:
                continue
        yield ast.unparse(changed)


@every
@pytest.mark.filterwarnings("ignore")
def test_a_solution_with_one_thing_changed_is_refused(exercise):
    for source in mutants(cells.code(exercise.solution)):
        assert reply(exercise, built(source)).right is False, source


def with_arguments(exercise, body):
    """A function of the right name and arguments."""
    return built(f"def {exercise.name}({', '.join(inspect.signature(exercise.solution).parameters)}):\n    {body}")


@every
def test_wrong_arguments_get_a_sentence(exercise):
    names = list(inspect.signature(exercise.solution).parameters)
    fewer = built(f"def {exercise.name}({', '.join(names[1:])}):\n    return 0")
    others = built(f"def {exercise.name}({', '.join(n + '_' for n in names)}):\n    return 0")
    assert f"takes {len(names)} arguments" in reply(exercise, fewer).text
    assert "in this order" in reply(exercise, others).text
    assert "without brackets" in reply(exercise, 3.0).text


@every
def test_an_exception_is_named(exercise):
    found = reply(exercise, with_arguments(exercise, "return nowhere"))
    assert found.right is False
    assert "NameError" in found.text
    assert "nowhere" in found.text


def test_what_nobody_foresaw_is_described():
    """Sign, factor, transposition, a missing result, and the line of an exception in a file."""
    exercise = exercises.find("3.1")
    for answer, says in (
        (lambda g, x: -g.T @ x, "the sign is wrong"),
        (lambda g, x: 3 * g.T @ x, "3 times what it should be"),
        (lambda g, x: (g.T @ x, x), "returns 2 results"),
        (lambda g, x: g, "has the shape (7, 5)"),
        (lambda g, x: (g.T @ x).mT.double() * 2, "It looks transposed"),
        (lambda g, x: g.T @ x + torch.nan, "NaN or infinite"),
        (lambda g, x: "a gradient", "of the type str"),
        (lambda g, x: g @ x, "in the line"),
    ):
        assert says in reply(exercise, answer).text
    text = reply(exercises.find("2.3"), lambda method, none, repeated: none / 3).text
    assert "`share_of_gap(0.55, 0.1, 0.7)` should be 0.75, and yours gives 0.03333." in text


def test_the_check_prints(capsys):
    exercises.check("2.3", None)
    assert "Exercise 2.3 (the share of a gap): not answered yet" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"There is no exercise '3\.9'; there are 3\.1"):
        exercises.check("3.9", None)


@pytest.mark.parametrize("path", notebook_files.course(), ids=lambda path: path.stem)
def test_a_notebook_shows_its_exercises(path):
    """The four cells of each are as its module has them, and stand in the order of their numbers."""
    notebook = notebook_files._read(path)
    numbers = [cells.number_of(cell)[0] for cell in notebook["cells"] if cells.number_of(cell)]
    assert numbers == sorted(numbers)
    source = [(c["id"], "".join(c["source"]), c["metadata"]) for c in notebook["cells"]]
    again = [(c["id"], "".join(c["source"]), c["metadata"]) for c in cells.refresh(notebook)["cells"]]
    assert source == again, f"run python -m prosg_lib.exercises.cells notebooks/{path.name}"
