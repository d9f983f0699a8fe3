"""Dataclasses from JSON: equal values or one sentence that names the source and the field."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from prosg_lib.config import PROFILES, Profile
from prosg_lib.errors import UserError
from prosg_lib.strict import read_as


@dataclass(frozen=True)
class Size:
    rank: int
    scale: float = 1.0
    maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    name: str
    right: bool
    cell: tuple[int, float]
    size: Size | None
    how: Literal["read", "write"]
    counts: dict[str, list[int]]
    rest: Any = None


GOOD = {
    "name": "a",
    "right": True,
    "cell": [1, 2],
    "size": {"rank": 3, "maps": ["x"]},
    "how": "read",
    "counts": {"b": [1]},
}


def test_a_dataclass_comes_back():
    assert read_as(Row, GOOD, "here") == Row("a", True, (1, 2.0), Size(3, 1.0, ("x",)), "read", {"b": [1]})
    assert read_as(list[Size], [{"rank": 1}], "here") == [Size(1)]
    assert read_as(Row, GOOD | {"size": None, "rest": [{}]}, "here").rest == [{}]


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_come_back(name):
    """Every type that the settings use."""
    assert read_as(Profile, json.loads(json.dumps(asdict(PROFILES[name]))), name) == PROFILES[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name should be text"),
        ({"name": "\ud800"}, "name should be text without half characters"),
        ({"right": 1}, "right should be true or false"),
        ({"cell": [True, 1]}, r"cell\[0\] should be a whole number"),
        ({"cell": [1.0, 1]}, r"cell\[0\] should be a whole number"),
        ({"cell": [1, float("nan")]}, r"cell\[1\] should be a finite number"),
        ({"cell": [1, 10**400]}, r"cell\[1\] should be a finite number"),
        ({"cell": [1, 2, 3]}, "cell should be a list of 2"),
        ({"cell": "12"}, "cell should be a list"),
        ({"size": 3}, "size should be an object or null"),
        ({"size": {}}, "size.rank should be there, and a whole number"),
        ({"size": {"rank": "3"}}, "size.rank should be a whole number"),
        ({"size": {"rank": 3, "width": 1}}, r"size.width should be left out \(there are rank, scale, maps\)"),
        ({"how": "sing"}, "how should be 'read' or 'write'"),
        ({"counts": {"b": [None]}}, r"counts.b\[0\] should be a whole number"),
        ({"counts": []}, "counts should be an object"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=f"the file: {message}"):
        read_as(Row, GOOD | change, "the file")


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_what_is_no_object(value):
    with pytest.raises(UserError, match="the file: its content should be an object"):
        read_as(Row, value, "the file")
