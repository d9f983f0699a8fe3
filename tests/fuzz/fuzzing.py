"""Files that a user may hand over, whatever is in them: a value that is equal to what was written, or one UserError.

Each module here fuzzes one kind of file. The same short run is part of every test run; `PROSG_FUZZ=20` makes it 20
times as long, with other examples each time.
"""

import os
from copy import deepcopy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from prosg_lib.errors import UserError

TIMES = int(os.environ.get("PROSG_FUZZ", "1"))


def fuzz(examples):
    """Settings of a test with so many examples in a short run."""
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def json_values():
    """Anything that a JSON file may hold where something else was expected."""
    odd = st.sampled_from([None, True, False, 0, -1, 1, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "1", [], {}])
    leaves = odd | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    )


def places(value, at=()):
    """Every place within a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*at, key))


@st.composite
def changed(draw, value, others):
    """The JSON value with one of `others` at one of its places, or without that place."""
    value = {"root": deepcopy(value)}
    *outer, last = draw(st.sampled_from([("root", *place) for place in places(value["root"])]))
    inner = value
    for key in outer:
        inner = inner[key]
    if draw(st.booleans()) and outer:
        del inner[last]
    else:
        inner[last] = draw(others)
    return value["root"]


@st.composite
def damaged(draw, content):
    """The bytes of a file with some changed, cut off, put in or taken out."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["change", "cut", "insert", "remove"])):
            case "change" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del content[at : at + draw(st.integers(1, 9))]
    return bytes(content)


def tried(f, *args):
    """What `f` returns, or None where it refuses with a UserError of one line; any other error passes."""
    try:
        return f(*args)
    except UserError as error:
        message = str(error)
    assert 10 < len(message) < 2000, message
    assert "\n" not in message.strip(), message
    return None
