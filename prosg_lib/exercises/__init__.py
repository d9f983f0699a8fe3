"""The course's exercises: what is asked, the solution, typical wrong answers, and a check that teaches.

In a notebook: `exercises.check("3.1", gradient)`. There is one module a notebook, named like it. Notebooks 06, 06b and
06c count their exercises together.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prosg_lib.errors import UserError

if TYPE_CHECKING:  # the exercises themselves need torch, which takes seconds to import
    from prosg_lib.exercises.checking import Exercise

MODULES = {
    0: ("tour",),
    1: ("state_derivation",),
    2: ("prompt_forgetting",),
    3: ("low_rank_gradients",),
    4: ("synthetic_gradients",),
    5: ("meta_training",),
    6: ("forgetting_evaluation", "what_else", "other_ways"),
    7: ("gradient_as_prompt",),
    8: ("pretrained_models",),
    9: ("reproduction_report",),
    10: ("others_models",),
}
"""By the notebook's number."""


def of_notebook(number: int) -> tuple[Exercise, ...]:
    """The exercises of a notebook in order; none where it has none of this form."""
    modules = (import_module(f"prosg_lib.exercises.{name}") for name in MODULES.get(number, ()))
    return tuple(exercise for module in modules for exercise in module.EXERCISES)


def find(number: str) -> Exercise:
    """The exercise of that number, such as "3.1".

    Raises:
        UserError: there is none.
    """
    notebook = int(number.split(".")[0]) if number.split(".")[0].isdecimal() else -1
    found = {exercise.number: exercise for exercise in of_notebook(notebook)}
    if number not in found:
        known = ", ".join(found) or ", ".join(f"{n}.1 ..." for n in MODULES)
        raise UserError(f"There is no exercise {number!r}; there are {known}.")
    return found[number]


def check(number: str, answer: Any) -> None:
    """Prints that an answer is right and why, what is wrong with it, or that there is none yet.

    Args:
        number: such as "3.1".
        answer: the function that was to be written; the function itself, not its result.
    """
    from prosg_lib.exercises.checking import reply

    print(reply(find(number), answer).text)
