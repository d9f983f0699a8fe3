"""Functions that a TorchFunctionMode can replace, as it can PyTorch's own. `second_order` replaces them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a function of tensors: what it computes stays as written, and the active mode may compute it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args[:1]):
            return handle_torch_function(call, args[:1], *args, **kwargs)
        return function(*args, **kwargs)

    return call
