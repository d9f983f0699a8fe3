"""Promises: which are kept, which a run breaks, and that no bar follows a result."""

import json
import subprocess
from dataclasses import asdict

import pytest

from prosg_lib import paths, strict
from prosg_lib.errors import UserError
from prosg_lib.reproduction import promises


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=paths.repo_root(), capture_output=True, text=True)


def test_promises_never_change():
    """Every version of the file that git knows: each promise is still there, with its relation and bar."""
    commits = git("log", "--format=%H", "--", "expected/promises.json").stdout.split()
    if not commits:
        pytest.skip("no history of expected/promises.json here (a copy without git)")
    now = {promise.name: asdict(promise) for promise in promises.load()}
    for commit in commits:
        for then in json.loads(git("show", f"{commit}:expected/promises.json").stdout):
            for key in ("relation", "bar", "since"):
                assert now.get(then["name"], {}).get(key) == then[key], f"{then['name']}: {key} was {then[key]}"
    if len(commits) == 1 and git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip("a shallow clone: compared with the one version that it has")


def test_every_promise_is_judged_in_a_fresh_clone():
    """By this run or by the ledger; names and sentences are their own; some are broken, and stay listed."""
    rows = promises.judge({}, "cpu")
    assert [row["name"] for row in rows if row["value"] is None] == []
    assert len({row["name"] for row in rows}) == len({row["sentence"] for row in rows}) == len(rows)
    broken = {row["name"] for row in rows if not row["kept"]}
    assert {"v2-half-512", "v2-half-1024", "step-squad", "gpu-time", "gpu-time-torchopt"} <= broken
    assert [row["kept"] for row in rows] == sorted(row["kept"] for row in rows)  # broken ones first


PROMISE = {"sentence": "It works.", "since": "2026-11-29", "notebook": "99_test", "relation": "at_least", "bar": 0.9}


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """Writes promises, and what the reference run measured in `cpu`."""
    monkeypatch.setattr(paths, "expected_dir", lambda: tmp_path)

    def write(made, **references):
        (tmp_path / promises.FILE).write_text(json.dumps(made))
        entries = {name: {"reference": value, "spread": 0.0} for name, value in references.items()}
        (tmp_path / "99_test.cpu.json").write_text(json.dumps({"claims": entries}))

    return write


def judge(profile="cpu", **values):
    measured = {"99_test": {name: {"value": value} for name, value in values.items()}}
    return [(r["value"], r["kept"], r["newly_broken"], r["source"]) for r in promises.judge(measured, profile)]


@pytest.mark.parametrize(
    ("relation", "bar", "value", "kept"),
    [
        ("at_least", 0.9, 0.9, True),
        ("at_least", 0.9, 0.8999, False),
        ("at_least", 0.3, 0.1 + 0.2, True),
        ("at_most", 0.3, 0.1 + 0.2, True),
        ("at_most", 0.03, 0.0301, False),
        ("at_most", 0.03, -5.0, True),
    ],
)
def test_bars_hold_on_the_edge_and_not_beyond(relation, bar, value, kept):
    made = PROMISE | {"name": "a", "claims": ["a"], "relation": relation, "bar": bar}
    assert strict.read_as(promises.Promise, made, "").kept(value) is kept


def test_a_run_breaks_a_promise_only_where_the_reference_run_kept_it(ledger):
    """What the reference run broke is listed as broken, and is no news."""
    made = [PROMISE | {"name": "good", "claims": ["a"]}, PROMISE | {"name": "bad", "claims": ["b"]}]
    ledger(made, a=0.95, b=0.2)
    assert judge(a=0.85, b=0.1) == [(0.85, False, True, "this run"), (0.1, False, False, "this run")]
    assert judge(a=0.9, b=0.9) == [(0.9, True, False, "this run"), (0.9, True, False, "this run")]


def test_what_a_run_did_not_measure_is_judged_by_the_ledger(ledger):
    """Another profile, a claim that was not recorded; and two claims are the first less the second."""
    made = [PROMISE | {"name": "lead", "claims": ["a", "b"], "bar": 0.0, "profiles": ["cpu"]}]
    ledger(made, a=0.95, b=0.2)
    told = (pytest.approx(0.75), True, False, "ledger, 99_test.cpu")
    assert judge(profile="smoke", a=0.1, b=0.2) == [told]
    assert judge(a=0.1) == [told]
    assert judge(a=0.1, b=0.2) == [(pytest.approx(-0.1), False, True, "this run")]
    ledger(made)
    assert judge() == [(None, False, False, "not measured")]


def test_the_table_says_in_words_what_is_kept(ledger):
    made = [PROMISE | {"name": "good", "claims": ["a"]}, PROMISE | {"name": "bad", "claims": ["b"]}]
    ledger(made, a=0.95, b=0.2)
    table = promises.table(promises.judge({}, "cpu"))
    assert table.to_numpy().tolist() == [
        ["It works.", "0.2", "at least 0.9", "BROKEN", "ledger, 99_test.cpu", "2026-11-29"],
        ["It works.", "0.95", "at least 0.9", "yes", "ledger, 99_test.cpu", "2026-11-29"],
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"relation": "about"}, "relation should be 'at_least' or 'at_most'"),
        ({"tolerance": 0.1}, "tolerance should be left out"),
        ({"bar": True}, "bar should be a finite number"),
        ({"claims": []}, "claims should be"),
    ],
)
def test_a_malformed_promise_is_named(ledger, change, said):
    """No tolerance: a bar is a bar."""
    ledger([PROMISE | {"name": "good", "claims": ["a"]} | change])
    with pytest.raises(UserError, match=rf"promises\.json: \[0\]\.{said}"):
        promises.load()
