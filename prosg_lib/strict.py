"""Dataclasses from JSON, strictly: what a file says is checked once, where it is read."""

import re
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prosg_lib.errors import UserError

_HALF = re.compile(r"[\ud800-\udfff]")  # pandas, files and terminals have no place for them
_NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}


class _Unfit(Exception):
    """Place within the value, and what should stand there."""


def read_as(cls: Any, value: Any, where: object) -> Any:
    """`value`, parsed from JSON, as an instance of `cls`.

    Args:
        cls: a dataclass, whose fields may be of any of these types: int, float, str, bool, None, Literal, tuple, list
            and dict of them, dataclasses, unions, and Any or object for what is not checked.
        where: names the source in messages: a path, "the header of a.safetensors".
    Raises:
        UserError: a field is missing, unknown, of another type, of another length, or not finite.
    """
    try:
        return _as(cls, value, "")
    except _Unfit as unfit:
        place, wanted = unfit.args
        place = place[:200].removeprefix(".") or "its content"
        raise UserError(f"{where}: {place} should be {wanted}.") from None


def _as(cls: Any, value: Any, at: str) -> Any:
    origin, inner = get_origin(cls) or cls, get_args(cls)
    if origin in (Any, object):
        return value
    if origin in (Union, types.UnionType):
        return _first_of(inner, value, at)
    if origin is Literal and value in inner and type(value) in map(type, inner):
        return value
    if is_dataclass(origin) and isinstance(value, dict):
        return _dataclass(origin, value, at)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_as(t, v, f"{at}[{i}]") for i, (t, v) in enumerate(_items(origin, inner, value, at)))
    if origin is dict and isinstance(value, dict):
        return {_as(inner[0], k, at): _as(inner[1], v, f"{at}.{k}") for k, v in value.items()} if inner else value
    if origin is float and type(value) in (int, float) and abs(value) < 1e308:
        return float(value)
    if origin is str and type(value) is str and _HALF.search(value):
        raise _Unfit(at, "text without half characters (lone surrogates)")
    if origin in (int, str, bool, type(None)) and type(value) is origin:
        return value
    raise _Unfit(at, _named(cls))


def _dataclass(cls: type, value: dict, at: str) -> Any:
    wanted, types_ = {field.name: field for field in fields(cls) if field.init}, _types(cls)
    for name in value.keys() - wanted.keys():
        raise _Unfit(f"{at}.{name}", f"left out (there are {', '.join(wanted)})")
    for name, field in wanted.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise _Unfit(f"{at}.{name}", f"there, and {_named(types_[name])}")
    return cls(**{name: _as(types_[name], part, f"{at}.{name}") for name, part in value.items()})


@cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _items(origin: type, inner: tuple, value: list, at: str) -> list[tuple[Any, Any]]:
    if origin is tuple and inner and inner[-1] is not ...:
        if len(value) != len(inner):
            raise _Unfit(at, f"a list of {len(inner)}")
        return list(zip(inner, value, strict=True))
    return [(inner[0] if inner else Any, v) for v in value]


def _first_of(options: tuple, value: Any, at: str) -> Any:
    inside = _Unfit(at, " or ".join(map(_named, options)))
    for option in options:
        try:
            return _as(option, value, at)
        except _Unfit as unfit:
            if unfit.args[0] != at:
                inside = unfit
    raise inside


def _named(cls: Any) -> str:
    origin = get_origin(cls) or cls
    if origin is Literal:
        return " or ".join(map(repr, get_args(cls)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_named, get_args(cls)))
    return _NAMES.get(origin) or ("a list" if origin in (tuple, list) else "an object")
