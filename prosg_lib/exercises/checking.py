"""What an exercise is, and how an answer is checked.

An answer is run on random inputs in float64 and compared with the library's function or an independent formula. Wrong
answers that people tend to give are kept as code: whoever makes the same mistake computes the same numbers, so the
check recognises it and says what is meant for it. Any other answer is described by what is wrong with it: an exception,
a shape, a sign, a factor.
"""

from __future__ import annotations

import inspect
import linecache
import numbers
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mistake:
    """A wrong answer as somebody would write it, and what the check says of it; a lambda where it is one expression."""

    answer: Callable[..., Any]
    says: str


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    Attributes:
        number: notebook and place in it, "3.1".
        stars: difficulty, 1 to 3.
        task, hint: markdown. The function's docstring has the shapes.
        solution: its name and arguments are those that the answer must have.
        expected: the library's function or another formula, of the same arguments.
        cases: makes the arguments of a few calls, anew each time, random ones from a fixed seed.
        results: names of what the function returns.
        why: what is said of a right answer: what it is good for.
        misconception, discussion: for whoever teaches.
        seen: what is compared, by name, where results may differ and still be right (signs of singular vectors).
        also: a further objection to an answer whose numbers are right; None: none.
    """

    number: str
    title: str
    stars: int
    minutes: int
    task: str
    hint: str
    solution: Callable[..., Any]
    expected: Callable[..., Any]
    cases: Callable[[], Sequence[tuple]]
    results: tuple[str, ...]
    why: str
    mistakes: tuple[Mistake, ...]
    misconception: str
    discussion: tuple[str, ...]
    seen: Callable[..., Mapping[str, Any]] | None = None
    also: Callable[[Callable[..., Any]], str | None] | None = None

    @property
    def name(self) -> str:
        """Of the function."""
        return self.solution.__name__


def random_tensors(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Of these shapes, in float64, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


class Reply(NamedTuple):
    """right is None where there is no answer yet."""

    right: bool | None
    text: str


class _Raised(NamedTuple):
    kind: str
    message: str
    line: str


def reply(exercise: Exercise, answer: Any) -> Reply:
    """What there is to say about an answer."""
    head = f"Exercise {exercise.number} ({exercise.title}): "
    if not callable(answer):
        if answer is None or answer is Ellipsis:
            return Reply(None, f"{head}not answered yet.")
        return Reply(False, f"{head}not yet. Give the check the function itself: {exercise.name}, without brackets.")
    objection = _wrong_arguments(exercise, answer)
    if objection:
        return Reply(False, f"{head}not yet. {objection}")
    found = _outcomes(exercise, answer)
    if any(result is Ellipsis for result in found):
        return Reply(None, f"{head}not answered yet. Write `{exercise.name}` in the cell above.")
    if any(result is None for result in found):
        return Reply(None, f"{head}not answered yet: `{exercise.name}` returns None. Does it end with `return`?")
    wanted = _outcomes(exercise, exercise.expected)
    objection = _objection(exercise, found, wanted) or (exercise.also and exercise.also(answer))
    return Reply(False, f"{head}not yet. {objection}") if objection else Reply(True, f"{head}right! {exercise.why}")


def _wrong_arguments(exercise: Exercise, answer: Callable) -> str | None:
    wanted = list(inspect.signature(exercise.solution).parameters)
    try:
        given = [name for name, p in inspect.signature(answer).parameters.items() if p.default is p.empty]
    except (TypeError, ValueError):  # a builtin says nothing of its arguments
        return None
    if given == wanted:
        return None
    ask, have = f"({', '.join(wanted)})", f"({', '.join(given)})"
    if len(given) != len(wanted):
        return f"`{exercise.name}` takes {len(wanted)} arguments {ask}, and yours takes {len(given)} {have}."
    return f"The arguments of `{exercise.name}` are {ask}, in this order, and yours are {have}."


def _outcomes(exercise: Exercise, answer: Callable) -> list[Any]:
    """What a function returns in every case, or the exception that it raises."""
    found = []
    for arguments in exercise.cases():
        try:
            found.append(answer(*arguments))
        except Exception as error:
            if isinstance(error, NotImplementedError) and not str(error):  # the stub's; torch raises some with a text
                return [Ellipsis]
            found.append(_Raised(type(error).__name__, str(error).strip().partition("\n")[0], _line(error, answer)))
    return found


def _line(error: Exception, answer: Callable) -> str:
    """The line of the answer that an exception came through last."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return linecache.getline(own[-1].filename, own[-1].lineno).strip() if own else ""


def _objection(exercise: Exercise, found: list[Any], wanted: list[Any]) -> str | None:
    """What is wrong with results; None where all are right."""
    compared = [_compared(exercise, f, w) for f, w in zip(found, wanted, strict=True)]
    differences = [what or _difference(*pair) for what, pair in compared]
    if not any(differences):
        return None
    with warnings.catch_warnings(action="ignore"):  # of the wrong answers, which nobody wrote
        known = [m.says for m in exercise.mistakes if _alike(exercise, found, _outcomes(exercise, m.answer), wanted)]
    case = next(i for i, what in enumerate(differences) if what)
    raised = f"{differences[case]} " if isinstance(found[case], _Raised) else ""
    if known:
        return raised + known[0]
    return _example(exercise, exercise.cases()[case], found[case], wanted[case]) or differences[case]


def _compared(exercise: Exercise, found: Any, wanted: Any) -> tuple[str | None, tuple[dict, dict]]:
    """What is wrong with the form of a result, or the parts of both to compare, by name."""
    if isinstance(found, _Raised):
        line = f" in the line `{found.line}`" if found.line else ""
        return f"It raised {found.kind}{line}: {found.message.rstrip('.')}.", ({}, {})
    results, parts, names = _parts(found), _parts(wanted), exercise.results
    if len(results) != len(parts):
        return f"It should return {', '.join(names)}, and yours returns {len(results)} results.", ({}, {})
    for name, result, part in zip(names, results, parts, strict=True):
        if not isinstance(result, Tensor):
            return f"{name} should be numbers, and yours is of the type {type(result).__name__}.", ({}, {})
        if result.shape != part.shape:
            return _wrong_shape(name, result, part), ({}, {})
    if exercise.seen is None:
        return None, (dict(zip(names, results, strict=True)), dict(zip(names, parts, strict=True)))
    return None, tuple({n: _number(p) for n, p in exercise.seen(*each).items()} for each in (results, parts))


def _parts(result: Any) -> list[Any]:
    return [_number(part) for part in result] if isinstance(result, list | tuple) else [_number(result)]


def _number(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.detach().cpu().double()
    if isinstance(part, numbers.Real) or hasattr(part, "__array__"):
        with suppress(TypeError, ValueError):  # an array of texts
            return torch.as_tensor(np.asarray(part, float))
    return part


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True)


def _alike(exercise: Exercise, found: list[Any], mistaken: list[Any], wanted: list[Any]) -> bool:
    """Whether two functions did the same in every case."""
    for f, m, w in zip(found, mistaken, wanted, strict=True):
        if isinstance(f, _Raised) or isinstance(m, _Raised):
            if not (isinstance(f, _Raised) and isinstance(m, _Raised) and f[:2] == m[:2]):
                return False
            continue
        (_, (a, _)), (_, (b, _)) = _compared(exercise, f, w), _compared(exercise, m, w)
        a, b = (a, b) if a and b else (dict(enumerate(_parts(f))), dict(enumerate(_parts(m))))
        if a.keys() != b.keys() or not all(isinstance(a[n], Tensor) and _close(a[n], b[n]) for n in a):
            return False
    return True


def _wrong_shape(name: str, found: Tensor, wanted: Tensor) -> str:
    says = f"{name} has the shape {tuple(found.shape)}, and it should be {tuple(wanted.shape)}."
    if found.ndim == 2 and found.mT.shape == wanted.shape:
        right = "The numbers are right; they are" if _close(found.mT, wanted) else "It looks"
        return f"{says} {right} transposed."
    return says


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The kind of difference between numbers of the same shape; None where there is none."""
    for name, w in wanted.items():
        f = found[name]
        if _close(f, w):
            continue
        if not f.isfinite().all() and w.isfinite().all():
            return f"{name}: {int((~f.isfinite()).sum())} of {f.numel()} numbers are NaN or infinite."
        if _close(f, -w):
            return f"{name}: the sign is wrong; every number is the negative of what it should be."
        if f.ndim == 2 and f.shape[0] == f.shape[1] and _close(f.mT, w):
            return f"{name}: it is transposed."
        factor = float((f * w).sum() / (w * w).sum())
        if w.numel() > 3 and factor and _close(f, factor * w):
            return f"{name}: everything is {factor:.3g} times what it should be; a factor is missing, or one too many."
        if f.numel() == 1:
            return f"{name}: {_brief(float(f))} instead of {_brief(float(w))}."
        right = int(torch.isclose(f, w, rtol=1e-6, atol=1e-8, equal_nan=True).sum())
        return f"{name}: the shape is right and the numbers are not ({right} of {f.numel()} are right)."
    return None


def _example(exercise: Exercise, arguments: tuple, found: Any, wanted: Any) -> str:
    """The call that went wrong, where it is short enough to be read."""
    call = f"{exercise.name}({', '.join(map(repr, arguments))})"
    if isinstance(found, _Raised) or len(call) > 120 or "tensor" in call or "array" in call:
        return ""
    return f"`{call}` should be {_brief(wanted)}, and yours gives {_brief(found)}."


def _brief(result: Any) -> str:
    plain = isinstance(result, numbers.Real) and not isinstance(result, int | np.bool_)
    return f"{float(result):.4g}" if plain else repr(result)
