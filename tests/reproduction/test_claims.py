"""Claims: what may be recorded, when one holds, what the ledger keeps, and which quotes are right."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims, quotes
from prosg_lib.text.prose import Prose


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder for runs; no record begun."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("PROSG_RUN_ID", raising=False)
    monkeypatch.setattr(claims, "_current", None)
    return tmp_path / "runs"


def entry(value, tolerance=0.0, kind="absolute", **more):
    return {"value": value, "tolerance": tolerance, "kind": kind, **more}


def holds(kind, value, bar, tolerance):
    (row,) = claims.compare({"a": value}, {"a": entry(bar, tolerance, kind)})
    return row["holds"]


def write_ledger(folder, notebook="99_test", profile="smoke", **entries):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{notebook}.{profile}.json"
    path.write_text(json.dumps({"notebook": notebook, "profile": profile, "claims": entries}))
    return path


# Recording


def test_finish_writes_what_was_recorded_with_its_provenance(runs, monkeypatch, capsys):
    """The claims file has the numbers, the run's id, and where they came from; the table is shown."""
    monkeypatch.setenv("PROSG_RUN_ID", "this-run")
    claims.begin("99_test", profile=get_profile("smoke"), seed=3)
    claims.record("recall/base@512", 0.25)
    claims.record("tensor", torch.tensor([0.5]))
    claims.record("numpy", np.float32(2.0))
    claims.finish()
    written = json.loads((runs / "smoke" / "claims" / "99_test.json").read_text())
    assert written["claims"] == {"recall/base@512": 0.25, "tensor": 0.5, "numpy": 2.0}
    assert (written["notebook"], written["profile"], written["seed"]) == ("99_test", "smoke", 3)
    assert written["run_id"] == "this-run"
    assert written["versions"].keys() == {"python", "torch", "transformers", "prosg_lib"}
    assert written["commit"]
    assert written["device"]
    shown = capsys.readouterr().out
    assert "recall/base@512" in shown
    assert "not in the ledger" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_record_refuses_what_is_not_finite(runs, value):
    """NaN compares false with everything, so it must not get into a ledger."""
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    with pytest.raises(UserError, match=r"'a' is .*finite"):
        claims.record("a", value)


@pytest.mark.parametrize("value", ["0.5", None, [1.0, 2.0], torch.ones(2), 1j])
def test_record_refuses_what_is_no_number(runs, value):
    """A text that looks like a number, a list and a tensor of several are mistakes."""
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    with pytest.raises(UserError, match="'a' is no number"):
        claims.record("a", value)


def test_record_refuses_a_name_twice(runs):
    """Two numbers under one name: one of them would be lost."""
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    claims.record("a", 1)
    with pytest.raises(UserError, match="'a' is recorded already"):
        claims.record("a", 1)


@pytest.mark.parametrize("name", ["", "two words", "a--b", "a<b", "a>b", 3])
def test_record_refuses_a_name_that_no_quote_could_hold(runs, name):
    """A name stands in an HTML comment between blanks."""
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    with pytest.raises(UserError, match="cannot name a claim"):
        claims.record(name, 1)


def test_wrong_order_is_refused(runs):
    """record and finish need begin; nothing comes after finish; begin starts anew."""
    for step in (lambda: claims.record("a", 1), claims.finish, claims.current):
        with pytest.raises(UserError, match="No claims were begun"):
            step()
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    claims.record("a", 1)
    claims.finish()
    with pytest.raises(UserError, match=r"after claims\.finish"):
        claims.record("b", 1)
    with pytest.raises(UserError, match="ran already"):
        claims.finish()
    claims.begin("99_test", profile=get_profile("smoke"), seed=0)
    claims.record("a", 2)


# Comparing


@pytest.mark.parametrize(
    ("kind", "value", "bar", "tolerance", "expected"),
    [
        ("exact", 458752, 458752, 0, True),
        ("exact", 458753, 458752, 5, False),
        ("absolute", 0.98, 0.97, 0.01, True),  # 0.98 - 0.97 is more than 0.01 in binary fractions
        ("absolute", 0.96, 0.97, 0.01, True),
        ("absolute", 0.981, 0.97, 0.01, False),
        ("relative", 105, 100, 0.05, True),
        ("relative", -105, -100, 0.05, True),
        ("relative", 105.1, 100, 0.05, False),
        ("relative", -100, 100, 0.05, False),
        ("at_least", 0.9, 0.9, 0, True),
        ("at_least", 5.0, 0.9, 0, True),
        ("at_least", 0.88, 0.9, 0.02, True),
        ("at_least", 0.879, 0.9, 0.02, False),
        ("at_most", 0.9, 0.9, 0, True),
        ("at_most", -5.0, 0.9, 0, True),
        ("at_most", 0.921, 0.9, 0.02, False),
    ],
)
def test_kinds_hold_up_to_their_tolerance_and_no_further(kind, value, bar, tolerance, expected):
    """Each kind at its edge, on the edge, and beyond it."""
    assert holds(kind, value, bar, tolerance) is expected


@given(st.sampled_from(claims.KINDS[:5]), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 10))
def test_a_wider_tolerance_never_turns_a_claim_down(kind, value, bar, tolerance):
    """Whatever holds with a tolerance holds with a wider one; and the bar itself always holds."""
    assert holds(kind, bar, bar, 0)
    assert not holds(kind, value, bar, tolerance) or holds(kind, value, bar, 2 * tolerance)


def test_ordering_compares_two_measured_numbers():
    """An ordering looks at what the other claim measured now, not at what it measured once."""
    ledger = {"a": entry("b", 0.1, "ordering"), "b": entry(0.5, 1)}
    (row, _) = claims.compare({"a": 0.45, "b": 0.5}, ledger)
    assert row == {
        "name": "a",
        "value": 0.45,
        "expected": 0.5,
        "tolerance": 0.1,
        "kind": "ordering",
        "than": "b",
        "holds": True,
    }
    assert not claims.compare({"a": 0.45, "b": 0.6}, ledger)[0]["holds"]
    assert not claims.compare({"a": 0.45}, ledger)[0]["holds"]  # the other was not measured


def test_missing_and_unexpected_claims_do_not_hold():
    """A claim that was not measured fails, and so does one that nobody checks."""
    new, gone = claims.compare({"new": 1.0}, {"gone": entry(1.0)})
    assert (new["name"], new["kind"], new["holds"], new["expected"]) == ("new", "unexpected", False, None)
    assert (gone["name"], gone["value"], gone["holds"]) == ("gone", None, False)


def test_on_other_prose_only_promises_and_counts_are_judged():
    """What asks for the reference run's own numbers is left open, right or wrong; what was not measured still fails."""
    ledger = {
        "near": entry(0.5, 0.1),
        "share": entry(10, 0.1, "relative"),
        "least": entry(0.9, 0, "at_least"),
        "most": entry(0.9, 0, "at_most"),
        "count": entry(3, 0, "exact"),
        "order": entry("near", 0, "ordering"),
        "gone": entry(0.5, 0.1),
    }
    measured = {"near": 0.5, "share": 20, "least": 0.8, "most": 0.8, "count": 3, "order": 0.4}
    same = {row["name"]: row["holds"] for row in claims.compare(measured, ledger)}
    other = {row["name"]: row["holds"] for row in claims.compare(measured, ledger, same_prose=False)}
    judged = {"least": False, "most": True, "count": True, "order": False, "gone": False}
    assert same == {"near": True, "share": False} | judged
    assert other == {"near": None, "share": None} | judged
    rows = claims.compare(measured, ledger, same_prose=False)
    assert claims.table_text(rows).count("other prose") == claims.table_html(rows).count("other prose") == 2


def test_claims_about_own_data_may_be_missing_elsewhere(tmp_path):
    """On the reference run's prose they are judged as any other; elsewhere not at all, measured or not."""
    own = {"own_data": True}
    ledger = {"least": entry(0.9, 0, "at_least") | own, "gone": entry(3, 0, "exact") | own, "all": entry(1, 0, "exact")}
    measured = {"least": 0.8, "all": 1}
    same = {row["name"]: row["holds"] for row in claims.compare(measured, ledger)}
    other = {row["name"]: row["holds"] for row in claims.compare(measured, ledger, same_prose=False)}
    assert same == {"least": False, "gone": False, "all": True}
    assert other == {"least": None, "gone": None, "all": True}


def test_a_run_is_judged_by_the_prose_of_the_ledger(runs, tmp_path, monkeypatch):
    """`finish` records the prose and `update` keeps it; the same text is the same prose under any name."""
    ledger = tmp_path / "expected"
    prose = Prose("some folder", {"train": ["a"], "validation": ["b"], "test": ["c"]})
    monkeypatch.setattr(claims, "load_prose", lambda: prose)
    finish_run(a=0.5)
    claims.update(runs / "smoke", "smoke", ledger)
    kept = claims.expected("99_test", "smoke", ledger)["prose"]
    assert kept == {"source": "some folder", "sha256": prose.sha256}

    def hold():
        finish_run(a=0.9)
        found = json.loads(claims.measured_path(runs / "smoke", "99_test").read_text())
        return [row["holds"] for row in claims.judge(found, "99_test", "smoke", ledger)]

    prose = Prose("moved", prose.paragraphs)
    assert hold() == [False]
    prose = Prose("moved", prose.paragraphs | {"test": ["d"]})
    assert hold() == [None]
    assert claims.judge(None, "99_test", "smoke", ledger)[0]["holds"] is False


def test_tables_say_in_words_what_holds():
    """Text and HTML name both numbers and say yes or no; names are escaped."""
    rows = claims.compare(
        {"a&b": 0.5, "c": 2.0, "new": 1.0},
        {
            "a&b": entry(0.9, 0.02, "at_least"),
            "c": entry(2.1, 0.1, "relative"),
            "d": entry("c", 0, "ordering"),
            "e": entry(3, 0, "at_most"),
        },
    )
    text = claims.table_text(rows).splitlines()
    assert re.fullmatch(r"a&b\s+0\.5\s+at least 0\.9 - 0\.02\s+NO", text[2])
    assert re.fullmatch(r"c\s+2\s+2\.1 ± 10 %\s+yes", text[3])
    assert re.fullmatch(r"new\s+1\s+not in the ledger\s+NO", text[4])
    assert re.fullmatch(r"d\s+not measured\s+at least c \(2\)\s+NO", text[5])
    assert re.fullmatch(r"e\s+not measured\s+at most 3\s+NO", text[6])
    page = claims.table_html(rows)
    assert "a&amp;b" in page
    assert page.count("<strong>no</strong>") == 4
    assert page.count('scope="col"') == 4


# The ledger


@pytest.mark.parametrize(
    ("value", "said"),
    [(917504.0, "917,504"), (0.97222, "0.9722"), (128.04, "128"), (7.0, "7"), (5.69e-6, "5.69e-06"), (1234.5, "1234")],
)
def test_counts_are_said_in_full_and_measurements_to_four_digits(value, said):
    row = {"notebook": "n", "name": "a", "value": value, "expected": value, "tolerance": 0.0, "kind": "exact"}
    assert claims.value_text(row) == said
    assert claims.bar_text(row) == f"exactly {said}"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (entry(1, 0, "about"), "unknown kind 'about'"),
        (entry("x", 0, "absolute"), "the value is 'x'"),
        (entry(True), "the value is True"),
        (entry(1, -1), "the tolerance is -1"),
        (entry(1, "wide"), "the tolerance is 'wide'"),
        (entry("nobody", 0, "ordering"), "name of another claim"),
        (entry("a", 0, "ordering"), "name of another claim"),
        (entry(1, reference="x"), "the reference is 'x'"),
        (3, "not an object"),
    ],
)
def test_malformed_ledger_names_file_and_claim(tmp_path, broken, said):
    """A hand edits the ledger, so a slip is said with its place."""
    write_ledger(tmp_path, a=broken)
    with pytest.raises(UserError, match=rf"99_test\.smoke\.json, claim 'a': .*{said}"):
        claims.expected("99_test", "smoke", tmp_path)


def test_ledger_with_malformed_prose_is_named(tmp_path):
    """It decides what is judged."""
    path = write_ledger(tmp_path, a=entry(1))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prose": {"source": "books"}}))
    with pytest.raises(UserError, match=r"99_test\.smoke\.json: 'prose' has no text 'sha256'"):
        claims.expected("99_test", "smoke", tmp_path)


def test_ledger_without_claims_is_named(tmp_path):
    """So is a file of another shape."""
    (tmp_path / "99_test.smoke.json").write_text("[]")
    with pytest.raises(UserError, match=r"99_test\.smoke\.json has no object 'claims'"):
        claims.expected("99_test", "smoke", tmp_path)


def finish_run(**values):
    claims.begin("99_test", profile=get_profile("smoke"), seed=5)
    for name, value in values.items():
        claims.record(name, value)
    claims.finish()


def test_update_refreshes_references_and_never_touches_a_bar(runs, tmp_path):
    """Kind, value and tolerance stay, even of a claim that fails or was not measured; new ones get the default."""
    ledger = tmp_path / "expected"
    write_ledger(ledger, kept=entry(0.9, 0.01, "at_least", reference=0.95), gone=entry(1.0, reference=1.0))
    finish_run(kept=0.2, new=0.7)
    assert claims.update(runs / "smoke", "smoke", ledger) == [ledger / "99_test.smoke.json"]
    found = claims.expected("99_test", "smoke", ledger)
    assert found["claims"] == {
        "kept": entry(0.9, 0.01, "at_least", reference=0.2),
        "gone": entry(1.0, reference=1.0),
        "new": entry(0.7, 0.05, "absolute", reference=0.7),
    }
    assert found["seeds"] == [5]
    assert found["device"]
    assert found["versions"]["torch"]


def test_update_refuses_another_profile_and_an_empty_run(runs, tmp_path):
    """Numbers of one profile do not get into the ledger of another."""
    finish_run(a=1)
    with pytest.raises(UserError, match="of the profile 'smoke', not 'cpu'"):
        claims.update(runs / "smoke", "cpu", tmp_path / "expected")
    with pytest.raises(UserError, match="holds no claims"):
        claims.update(runs / "cpu", "cpu", tmp_path / "expected")


# Quotes


def quoted(tmp_path, text, **references):
    write_ledger(tmp_path / "expected", **{name: entry(0, reference=value) for name, value in references.items()})
    (tmp_path / "README.md").write_text(text)
    return [(problem.line, problem.quoted, problem.reason) for problem in quotes.check_quotes(tmp_path)]


@pytest.mark.parametrize(
    ("number", "reference"),
    [
        ("0.97", 0.974),
        ("0.97", 0.965),
        ("1.0", 0.951),
        ("12,300", 12300.4),
        ("97 %", 0.974),
        ("97%", 0.965),
        ("97.4 %", 0.974),
        ("**0.97**", 0.97),
        ("-0.5", -0.52),
        ("\u22120.5", -0.52),
        ("3", 3.4),
    ],
)
def test_quotes_within_half_a_unit_of_their_last_digit_are_right(tmp_path, number, reference):
    """A number is judged at the precision it is quoted with."""
    assert quoted(tmp_path, f"It is {number}<!--claim smoke 99_test a--> here.", a=reference) == []


@pytest.mark.parametrize(
    ("number", "reference", "ledger"),
    [
        ("0.97", 0.976, "0.976"),
        ("97 %", 0.976, "97.6 %"),
        ("3", 3.6, "3.6"),
        ("0.5", -0.5, "-0.5"),
        ("1.00", 0.99, "0.99"),
    ],
)
def test_quotes_further_off_are_wrong(tmp_path, number, reference, ledger):
    """File, line, quoted number and the ledger's number are all said."""
    found = quoted(tmp_path, f"one\ntwo {number}<!--claim smoke 99_test a-->", a=reference)
    assert found == [(2, number, f"the ledger has {ledger}; correct the text, or measure again")]
    assert str(quotes.check_quotes(tmp_path)[0]).startswith(f"README.md, line 2: quotes {number} for `smoke 99_test a`")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5<!--claim smoke 99_test b-->", "no reference value of that name"),
        ("0.5<!--claim cpu 99_test a-->", r"99_test\.cpu\.json has no reference"),
        ("0.5<!--claim 99_test a-->", "PROFILE NOTEBOOK NAME"),
        ("about <!--claim smoke 99_test a-->", "no number stands directly before"),
    ],
)
def test_quotes_of_nothing_are_problems(tmp_path, text, said):
    """An unknown claim, a malformed comment and a comment without a number are not passed over."""
    ((_, _, reason),) = quoted(tmp_path, text, a=0.5)
    assert re.search(said, reason)


def test_quotes_are_found_in_every_text_but_not_in_fenced_code(tmp_path):
    """README, data sheets and Markdown cells are read; code cells and fences, which show how to quote, are not."""
    wrong = "7<!--claim smoke 99_test a-->"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datasheet.md").write_text(wrong)
    (tmp_path / "notebooks").mkdir()
    cells = [{"cell_type": "code", "source": [wrong]}, {"cell_type": "markdown", "source": ["a\n", wrong]}]
    (tmp_path / "notebooks" / "99_test.ipynb").write_text(json.dumps({"cells": cells}))
    quoted(tmp_path, f"```\n{wrong}\n```\n{wrong}", a=0.5)
    found = [(problem.file, problem.line) for problem in quotes.check_quotes(tmp_path)]
    assert found == [("README.md", 4), ("data/datasheet.md", 1), ("notebooks/99_test.ipynb, cell 1", 2)]
