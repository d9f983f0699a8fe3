"""Results of benchmarks: kept as claims are, quoted as claims are, and what was counted is what the code counts now."""

import importlib
import json
import re
import sys

import pytest
import torch

from prosg_lib import files, paths
from prosg_lib.reproduction import ledger, promises, quotes

sys.path.append(str(paths.repo_root() / "benchmarks"))  # where they import each other from, when they run

import result
import scale


def quoted():
    """benchmark -> the names that README quotes of it."""
    found = {}
    text = (paths.repo_root() / "README.md").read_text(encoding="utf-8")
    for benchmark, name in re.findall(r"<!--claim benchmark (\S+) (\S+)-->", text):
        found.setdefault(benchmark, []).append(name)
    return found


@pytest.fixture
def keep(tmp_path, monkeypatch, capsys):
    """Keeps a result as a benchmark called `race`, run with an option, would; -> its ledger and what was printed."""
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["somewhere/benchmarks/race.py", "--rounds", "3", "--keep"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(*arguments, **named):
        result.finish(*arguments, **named)
        path = tmp_path / "expected" / "race.benchmark.json"
        return files.read_json(path) if path.is_file() else None, capsys.readouterr().out

    return call


def test_a_result_is_kept_as_a_measurement(keep):
    """With the command and the machine, but no date: ratios are shown, counts exact; goals are no part of it."""
    kept, printed = keep({"a": 1.23456, "b": 0.5}, {"a": 1.5}, lower_is_better=True, keep=True, counts={"c/d": 7})
    assert kept["claims"] == {
        "a": {"reference": 1.2346, "shown": True},
        "b": {"reference": 0.5, "shown": True},
        "c/d": {"reference": 7, "exact": True},
    }
    assert kept["command"] == "python benchmarks/race.py --rounds 3 --keep"
    assert {"device", "versions", "threads"} < kept.keys()
    assert ledger.expected("race", "benchmark") == kept
    *_, last = printed.splitlines()
    assert json.loads(last)["ratios"] == {"a": 1.23}


def test_a_gpus_result_is_kept_beside_a_cpus(keep, monkeypatch):
    keep({"a": 1.0}, {"a": 1.5}, lower_is_better=True, keep=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    keep({"a": 2.0}, {"a": 1.5}, lower_is_better=True, keep=True)
    found = {name: ledger.expected(name, "benchmark") for name in ("race", "race-cuda")}
    assert [kept["claims"]["a"]["reference"] for kept in found.values()] == [1.0, 2.0]


def test_nothing_is_kept_unasked(keep):
    kept, printed = keep({"a": 1.0}, {"a": 1.5}, lower_is_better=False)
    assert kept is None
    assert json.loads(printed)["goals"] == {"a": 1.5}


def test_a_kept_number_is_quoted_as_a_claim(keep, tmp_path):
    keep({"a": 1.2345}, {"a": 1.5}, lower_is_better=True, keep=True)
    for number, problems in (("1.23", 0), ("1.24", 1), ("123 %", 0)):
        (tmp_path / "README.md").write_text(f"It takes {number}<!--claim benchmark race a--> times as long.")
        assert len(quotes.check_quotes()) == problems


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    """A package, a ledger that can be written to, and whatever else a user can correct: one sentence, no traceback."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/race.py", "--keep"])
    with pytest.raises(SystemExit, match="2"):
        result.parser("Race.", needs=["torch", "no_such_package"]).parse_args()
    assert "no_such_package missing; install with: pip install no_such_package" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr(result.paths, "expected_dir", lambda: tmp_path / "file")
    with pytest.raises(SystemExit, match=r"race.py: The folder .* cannot be written to"):
        result.run(result.parser("Race.").parse_args)


def test_one_command_keeps_all_that_readme_quotes():
    """`make benchmarks` runs the benchmarks whose numbers are in README, and each has been kept."""
    makefile = (paths.repo_root() / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)
    assert quoted().keys() <= set(listed.split())
    for benchmark, names in quoted().items():
        assert set(names) <= ledger.expected(benchmark, ledger.BENCHMARK)["claims"].keys()


def test_what_fits_is_what_is_counted_now():
    """Every batch of the table in docs/results.md, of every published size, counted again."""
    kept = {n: e["reference"] for n, e in ledger.expected("scale", "benchmark")["claims"].items() if "exact" in e}
    for name, (layers, width) in scale.PUBLISHED.items():
        lm = scale.RWKV4Config(50277, width, layers, 4 * width)
        for what, batch in scale.fitting(lm, scale.LARGE).items():
            assert kept[f"{name}/{what}"] == batch


def test_goals_are_what_was_promised():
    """A benchmark's goal and the bar of its promise are one number."""
    for promise in promises.load():
        if promise.profiles == (ledger.BENCHMARK,) and not promise.notebook.endswith(ledger.ON_GPU):
            goals = importlib.import_module(promise.notebook).GOALS
            assert goals[promise.claims[0]] == promise.bar
