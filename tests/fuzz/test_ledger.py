"""Ledgers, promises, what runs recorded, and notebooks, damaged or made up: a report and a check, or one UserError."""

import json
from pathlib import Path

import pytest
from fuzzing import changed, damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.reproduction import links, report, run

SMOKE = get_profile("smoke")
FACTS = {"commit": "abc", "device": "CPU", "versions": {"python": "3.11"}}
RUN = {"notebook": "00_fine", "profile": "smoke", "seed": 0}
EXACT, SPREAD, HOSTILE = {"exact": True}, {"spread": 0.1}, "<script>alert('&amp;')</script>"
COUNT = {"reference": 2, **EXACT}
PROMISE = {"name": "p", "sentence": HOSTILE, "since": "2026-11-29", "notebook": "00_fine", "relation": "at_least"}
TEXT = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["It is 0.5<!--claim smoke 00_fine a-->."]}
BADGE = TEXT | {"id": "b", "source": [f"[Colab]({links.badge(Path('00_fine.ipynb'))})"]}
CODE = {"cell_type": "code", "id": "c", "metadata": {"tags": ["parameters"]}, "source": "profile = ''\nseed = 0"}
CONTENTS = {
    "expected/00_fine.smoke.json": {
        "own": FACTS,
        "books": FACTS | {"digest": "d"},
        "claims": {"a": {"reference": 0.5, **SPREAD, "books": COUNT}, "b": COUNT},
    },
    "expected/promises.json": [PROMISE | {"claims": ["a", "b"], "bar": -2.0, "profiles": ["smoke"]}],
    "notebooks/00_fine.ipynb": {
        "cells": [
            TEXT,
            BADGE,
            *(
                cell | {"outputs": [], "execution_count": None}
                for cell in (CODE | {"id": "s", "metadata": {}, "source": links.set_up_cell()}, CODE)
            ),
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    },
    "runs/smoke/claims/00_fine.json": {
        **(RUN | FACTS),
        "peak_mb": 20.5,
        "books": None,
        "claims": {"a": {"value": 0.6, **SPREAD, "source": HOSTILE}, HOSTILE: {"value": 2.0, **EXACT}},
    },
    "runs/smoke/run.json": {
        "00_fine": {
            **{"notebook": "00_fine", "status": "failed", "seconds": 1.5, "peak_mb": None, "seed": 0},
            **{"parameters": {"profile": "smoke"}, "error": HOSTILE},
        }
    },
    "runs/smoke/figures/line.json": {**RUN, **FACTS, "claims": ["a"], "alt": HOSTILE},
}


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    (root / "pyproject.toml").write_bytes((paths.repo_root() / "pyproject.toml").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "repo_root", lambda: root)
        patch.delenv("PROSG_RUNS", raising=False)
        yield root


def put(checkout, **others):
    """The files as they should be, and others in place of some of them."""
    for name, content in CONTENTS.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(json.dumps(others.get(name, content)))
    (checkout / "runs" / "smoke" / "figures" / "line.png").write_bytes(b"PNG")


def everything(checkout):
    """The report's page, and what `prosg check` finds."""
    page = tried(lambda: report.render(report.build(SMOKE), checkout / "runs" / "smoke"))
    assert page is None or "<script" not in page
    return page, tried(run.check)


@given(data=st.data())
@fuzz(60)
def test_damaged_files(checkout, data):
    put(checkout)
    path = checkout / data.draw(st.sampled_from(sorted(CONTENTS)))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    everything(checkout)


@given(data=st.data())
@fuzz(140)
def test_other_values(checkout, data):
    """Another value at any place of any file, or none."""
    name = data.draw(st.sampled_from(sorted(CONTENTS)))
    others = json_values() | st.sampled_from([HOSTILE, "\ud800", {"a": HOSTILE}])
    put(checkout, **{name: data.draw(changed(CONTENTS[name], others))})
    everything(checkout)


def test_as_they_should_be(checkout):
    put(checkout)
    page, problems = everything(checkout)
    assert problems == []
    assert page.count("&lt;script&gt;") >= 5
