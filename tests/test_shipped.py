"""What a clone contains: checkpoints that are quickly fetched, and measured tables that say what they are."""

import pandas as pd
import pytest

from prosg_lib import paths

CHECKPOINTS, MEASURED = (paths.data_dir() / name for name in ("checkpoints", "measured"))
TABLES = sorted(path.name for path in MEASURED.iterdir() if path.name != "README.md")


def test_checkpoints_are_small():
    """At most 35 MB with their logs and cards: one training of each, what notebooks load."""
    files = list(CHECKPOINTS.iterdir())
    assert sum(path.stat().st_size for path in files) <= 35e6
    names = {path.stem for path in files}
    assert {path.name for path in files} == {
        f"{name}{ending}" for name in names for ending in (".safetensors", ".jsonl", ".md")
    }
    assert not [name for name in names if "-seed" in name]


@pytest.mark.parametrize("name", TABLES)
def test_a_measured_table_is_read_by_pandas_and_described(name):
    assert len(pd.read_json(MEASURED / name, lines=True)) > 0
    assert f"`{name}`" in (MEASURED / "README.md").read_text()
