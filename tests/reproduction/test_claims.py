"""Claims: what may be recorded, when a measurement agrees, what the ledger keeps, and which quotes are right."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims, ledger, quotes

ESTIMATE = SimpleNamespace(value=0.5, low=0.402, high=0.598)  # a standard error of 0.05


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, without a ledger; no record begun, no books."""
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    monkeypatch.setattr(claims, "_current", None)
    return tmp_path


def begin(seed=0):
    claims.begin("99_test", profile=get_profile("smoke"), seed=seed)


def agrees(value, **entry):
    (row,) = ledger.compare({"a": {"value": value}}, {"a": entry})
    return row["holds"]


def write_ledger(checkout, **entries):
    path = checkout / "expected" / "99_test.smoke.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"notebook": "99_test", "profile": "smoke", "claims": entries}))
    return path


@pytest.mark.parametrize(
    "module", ["", ".reproduction.claims", ".reproduction.promises", ".reproduction.quotes", ".config"]
)
def test_reading_claims_and_settings_loads_neither_torch_nor_transformers(module):
    code = f"import sys, prosg_lib{module}\nassert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# Recording


def test_finish_writes_what_was_recorded_with_its_provenance(checkout, capsys):
    """The claims file has the numbers, how each is judged, and where they came from; a table is shown."""
    begin(seed=3)
    claims.record("recall/base@512", ESTIMATE)
    claims.record("tensor", torch.tensor([0.5]), spread=0.1)
    claims.record("numpy", np.float32(2.0), tolerance=1e-3)
    claims.record("bytes", np.int64(10240))
    claims.record("same", True)
    claims.record("minutes", 1.5, shown=True)
    claims.record("kept", 0.75, spread=0.02, source="data/measured/kept.jsonl")
    claims.finish()
    written = json.loads((checkout / "runs" / "smoke" / "claims" / "99_test.json").read_text())
    assert written["claims"].pop("recall/base@512") == {"value": 0.5, "spread": pytest.approx(0.05)}
    assert written["claims"] == {
        "tensor": {"value": 0.5, "spread": 0.1},
        "numpy": {"value": 2.0, "tolerance": 1e-3},
        "bytes": {"value": 10240.0, "exact": True},
        "same": {"value": 1.0, "exact": True},
        "minutes": {"value": 1.5, "shown": True},
        "kept": {"value": 0.75, "spread": 0.02, "source": "data/measured/kept.jsonl"},
    }
    assert (written["notebook"], written["profile"], written["seed"]) == ("99_test", "smoke", 3)
    assert written["books"] is None
    assert written["peak_mb"] > 20
    assert written["versions"].keys() == {"python", "torch", "transformers", "prosg_lib"}
    assert written["commit"]
    assert written["device"]
    shown = capsys.readouterr().out
    assert "recall/base@512" in shown
    assert "not in the ledger" in shown
    assert "0.75 (re-read from data/measured/kept.jsonl)" in shown


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("a", math.nan, {}, "'a' is nan .*finite"),
        ("a", torch.tensor(-math.inf), {}, "'a' is .*finite"),
        ("a", SimpleNamespace(value=0.5, low=math.nan, high=1), {}, "spread of nan; .*finite"),
        ("a", "0.5", {}, "'a' is not a number"),
        ("a", None, {}, "'a' is not a number"),
        ("a", [1.0, 2.0], {}, "'a' is not a number"),
        ("a", torch.ones(2), {}, "'a' is not a number"),
        ("a", 1j, {}, "'a' is not a number"),
        ("there", 1, {}, "'there' is recorded already"),
        ("", 1, {}, "cannot name a claim"),
        ("two words", 1, {}, "cannot name a claim"),
        ("a--b", 1, {}, "cannot name a claim"),
        ("a<b", 1, {}, "cannot name a claim"),
        (3, 1, {}, "cannot name a claim"),
    ],
)
def test_record_refuses_what_is_no_number_or_no_name(name, value, options, message):
    """NaN compares false with everything; a name stands in an HTML comment between blanks."""
    begin()
    claims.record("there", 1)
    with pytest.raises(UserError, match=message):
        claims.record(name, value, **options)


def test_wrong_order_is_refused():
    """record and finish need begin; nothing comes after finish; begin starts anew."""
    for step in (lambda: claims.record("a", 1), claims.finish, claims.current):
        with pytest.raises(UserError, match="No claims were begun"):
            step()
    begin()
    claims.record("a", 1)
    claims.finish()
    with pytest.raises(UserError, match=r"after claims\.finish"):
        claims.record("b", 1)
    with pytest.raises(UserError, match="ran already"):
        claims.finish()
    begin()
    claims.record("a", 2)


def test_the_standard_error_of_a_share_is_never_zero():
    """For many answers it is the usual one; for none right it is what a few more answers may still show."""
    assert claims.share_error(0.3, 10_000) == pytest.approx(math.sqrt(0.3 * 0.7 / 10_000), rel=1e-2)
    assert claims.share_error(0.0, 48) == pytest.approx(claims.share_error(1.0, 48)) == pytest.approx(0.0267, abs=1e-4)


# Comparing


@pytest.mark.parametrize(
    ("value", "entry", "expected"),
    [
        (458752, {"reference": 458752, "exact": True}, True),
        (458753, {"reference": 458752, "exact": True}, False),
        (0.98, {"reference": 0.97, "tolerance": 0.01}, True),  # 0.98 - 0.97 is more than 0.01 in binary fractions
        (0.981, {"reference": 0.97, "tolerance": 0.01}, False),
        (0.91, {"reference": 0.97, "spread": 0.02}, True),
        (0.909, {"reference": 0.97, "spread": 0.02}, False),
        (1.04, {"reference": 0.97, "spread": 0.02}, False),  # better than the reference is off as well
        (0.99, {"reference": 1.0, "spread": 0.0}, True),
        (0.989, {"reference": 1.0, "spread": 0.0}, False),
        (126, {"reference": 125, "spread": 0.0}, True),
        (126.3, {"reference": 125, "spread": 0.0}, False),
        (1e9, {"reference": 1.0, "shown": True}, None),
    ],
)
def test_measurements_agree_within_their_spread_and_no_further(value, entry, expected):
    """On the edge and beyond it, on both sides."""
    assert agrees(value, **entry) is expected


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 10))
def test_a_wider_spread_never_turns_a_measurement_down_and_every_one_can_fail(value, reference, spread):
    """And the reference itself agrees; far enough away nothing does, on neither side."""
    assert agrees(reference, reference=reference, spread=0.0)
    assert not agrees(value, reference=reference, spread=spread) or agrees(
        value, reference=reference, spread=2 * spread
    )
    far = 31 + 0.02 * abs(reference)
    assert not agrees(reference + far, reference=reference, spread=spread)
    assert not agrees(reference - far, reference=reference, spread=spread)


def test_a_noisier_run_does_not_pass_more_easily():
    """The ledger's spread decides, not the run's."""
    measured = {"a": {"value": 0.5, "spread": 10.0}}
    assert ledger.compare(measured, {"a": {"reference": 0.9, "spread": 0.01}})[0]["holds"] is False


def test_missing_and_unexpected_claims_do_not_hold():
    """A claim that was not measured fails, and so does one that nobody checks."""
    new, gone = ledger.compare({"new": {"value": 1.0}}, {"gone": {"reference": 1.0, "spread": 0.1}})
    assert (new["name"], new["expected"], new["holds"]) == ("new", None, False)
    assert (gone["name"], gone["value"], gone["holds"]) == ("gone", None, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (917504.0, "917,504"),
        (0.97222, "0.9722"),
        (7.0, "7"),
        (5.69e-6, "5.69e-06"),
        (1234.5, "1234"),
        (None, "not measured"),
    ],
)
def test_counts_are_written_in_full_and_measurements_to_four_digits(value, text):
    assert ledger.number_text(value) == text


def test_the_table_says_in_words_what_holds():
    rows = ledger.compare(
        {"a": {"value": 0.5}, "b": {"value": 2.0, "source": "data/b.jsonl"}, "new": {"value": 1}, "t": {"value": 3}},
        {
            "a": {"reference": 0.9, "spread": 0.01},
            "b": {"reference": 2, "exact": True},
            "t": {"reference": 9, "shown": True},
            "gone": {"reference": 1, "tolerance": 0.1},
        },
    )
    assert ledger.table(rows).to_numpy().tolist() == [
        ["a", "0.5", "0.9 ± 0.03", "NO"],
        ["b", "2 (re-read from data/b.jsonl)", "exactly 2", "yes"],
        ["new", "1", "not in the ledger", "NO"],
        ["t", "3", "9 (not judged)", "–"],
        ["gone", "not measured", "1 ± 0.1", "NO"],
    ]


# The ledger


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "its content should be an object"),
        ({"claim": {}}, "claim should be left out"),
        ({"claims": {}, "books": 3}, "books should be an object"),
        ({"claims": {"a": {}}}, "claim 'a': reference should be there"),
        ({"claims": {"a": {"reference": "0.5", "spread": 0.1}}}, "claim 'a': reference should be a finite number"),
        ({"claims": {"a": {"reference": 1, "exact": False}}}, "claim 'a': exact should be True"),
        ({"claims": {"a": {"reference": 1, "spread": -0.1}}}, "claim 'a': it needs one of spread and tolerance"),
        ({"claims": {"a": {"reference": 1}}}, "claim 'a': it needs one of"),
        ({"claims": {"a": {"reference": 1, "shown": True, "exact": True}}}, "claim 'a': it needs one of"),
        ({"claims": {"a": {"books": {"reference": 1, "bar": 0}}}}, "claim 'a': bar should be left out"),
    ],
)
def test_a_malformed_ledger_names_file_claim_and_field(checkout, content, message):
    """And so does what a notebook's run left, where a value stands in place of a reference."""
    write_ledger(checkout).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"99_test\.smoke\.json.* {message}"):
        ledger.expected("99_test", "smoke")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, "seed should be a whole number"),
        ({"notebook": "98_other"}, "is of 98_other with the profile smoke; run 99_test again"),
        ({"claims": {"a": {"reference": 1, "exact": True}}}, "claim 'a': reference should be left out"),
        ({"claims": {"a": {"value": 1, "spread": -1}}}, "claim 'a': it needs one of"),
    ],
)
def test_a_malformed_record_names_file_claim_and_field(change, message):
    finish_run(a=1)
    path = ledger.measured_path("99_test", "smoke")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"99_test\.json.* {message}"):
        ledger.measured("99_test", "smoke")


def test_a_claim_that_stands_twice_is_refused(checkout):
    """Not the last taken, as JSON's readers do."""
    write_ledger(checkout).write_text('{"claims": {"a": {"reference": 1, "exact": true}, "a": {}}}')
    with pytest.raises(UserError, match=r"99_test\.smoke\.json.*'a'"):
        ledger.expected("99_test", "smoke")


def finish_run(**values):
    begin(seed=5)
    for name, value in values.items():
        claims.record(name, value, spread=0.01)
    claims.finish()


def books_are_there(checkout, monkeypatch, text="a book"):
    (checkout / "data" / "books").mkdir(parents=True, exist_ok=True)
    (checkout / "data" / "books" / "one.txt").write_text(text)
    monkeypatch.setenv("PROSG_TEST_DATA", str(checkout / "data"))


def test_the_ledger_has_a_column_for_own_prose_and_one_for_the_books(checkout, monkeypatch):
    """Every run is judged by the column of what it read; a number that the books do not change stands there once."""

    def holds(**values):
        finish_run(**values)
        found = ledger.measured("99_test", "smoke")
        return {row["name"]: row["holds"] for row in ledger.judge(found, "99_test", "smoke")}

    finish_run(same=0.5, other=0.2)
    assert ledger.update("smoke", ["99_test"]) == [checkout / "expected" / "99_test.smoke.json"]
    books_are_there(checkout, monkeypatch)
    finish_run(same=0.5, other=0.4, cloze=0.9)
    ledger.update("smoke", ["99_test"])
    found = ledger.expected("99_test", "smoke")
    assert found["claims"] == {
        "same": {"reference": 0.5, "spread": 0.01},
        "other": {"reference": 0.2, "spread": 0.01, "books": {"reference": 0.4, "spread": 0.01}},
        "cloze": {"books": {"reference": 0.9, "spread": 0.01}},
    }
    assert found["own"].keys() == {"seed", "device", "versions"}
    assert found["books"]["digest"] == claims.books_digest()
    assert holds(same=0.5, other=0.4, cloze=0.9) == {"same": True, "other": True, "cloze": True}
    assert holds(same=0.5, other=0.2) == {"same": True, "other": False, "cloze": False}
    books_are_there(checkout, monkeypatch, "another book")  # which the ledger does not know
    assert holds(same=0.5, other=0.2, cloze=0.9) == {"same": True, "other": True, "cloze": True}
    assert holds(same=0.5, other=0.2) == {"same": True, "other": True}
    monkeypatch.delenv("PROSG_TEST_DATA")
    assert holds(same=0.5, other=0.2) == {"same": True, "other": True}
    assert [row["holds"] for row in ledger.judge(None, "99_test", "smoke")] == [False, False]
    finish_run(same=0.6)  # `other` is no longer recorded; whether `cloze` is, only a run with the books can say
    ledger.update("smoke", ["99_test"])
    same = {"reference": 0.6, "spread": 0.01, "books": {"reference": 0.5, "spread": 0.01}}
    cloze = {"books": {"reference": 0.9, "spread": 0.01}}
    assert ledger.expected("99_test", "smoke")["claims"] == {"same": same, "cloze": cloze}
    finish_run(same=0.6, new=0.1)
    ledger.update("smoke", ["99_test"])
    books_are_there(checkout, monkeypatch)
    finish_run(new=0.2)
    ledger.update("smoke", ["99_test"])
    new = {"reference": 0.1, "spread": 0.01, "books": {"reference": 0.2, "spread": 0.01}}
    assert ledger.expected("99_test", "smoke")["claims"] == {"new": new}


# Quotes


def quoted(checkout, text, **references):
    entries = {name: {"reference": value, "spread": 0.0} for name, value in references.items()}
    write_ledger(checkout, **entries)
    (checkout / "README.md").write_text(text)
    return quotes.check_quotes()


@pytest.mark.parametrize(
    ("number", "reference"),
    [
        ("0.97", 0.974),
        ("0.97", 0.965),
        ("1.0", 0.951),
        ("12,300", 12300.4),
        ("97 %", 0.974),
        ("97.4 %", 0.974),
        ("**0.97**", 0.97),
        ("\u22120.5", -0.52),
    ],
)
def test_quotes_within_half_of_the_last_digit_are_right(checkout, number, reference):
    assert quoted(checkout, f"It is {number}<!--claim smoke 99_test a-->.", a=reference) == []


@pytest.mark.parametrize(
    ("number", "reference", "ledger"),
    [("0.97", 0.976, "0.976"), ("97 %", 0.976, "97.6 %"), ("0.5", -0.5, "-0.5"), ("1.00", 0.99, "0.99")],
)
def test_quotes_further_off_are_wrong(checkout, number, reference, ledger):
    """File, line, quoted number and the ledger's number are all named."""
    assert quoted(checkout, f"one\ntwo {number}<!--claim smoke 99_test a-->", a=reference) == [
        f"README.md, line 2: quotes {number} for `smoke 99_test a`: the ledger has {ledger}; correct the text, "
        "or measure again"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5<!--claim smoke 99_test b-->", "no claim of that name"),
        ("0.5<!--claim cpu 99_test a-->", r"99_test\.cpu\.json has no claim"),
        ("0.5<!--claim 99_test a-->", "PROFILE NOTEBOOK NAME"),
        ("about <!--claim smoke 99_test a-->", "no number stands directly before"),
    ],
)
def test_quotes_of_nothing_are_problems(checkout, text, message):
    """An unknown claim, a malformed comment and a comment without a number are not passed over."""
    (problem,) = quoted(checkout, text, a=0.5)
    assert re.search(message, problem)


def test_a_claim_that_needs_the_books_is_quoted_from_their_column(checkout):
    write_ledger(checkout, a={"books": {"reference": 0.5, "spread": 0.0}})
    (checkout / "README.md").write_text("0.5<!--claim smoke 99_test a-->")
    assert quotes.check_quotes() == []


def test_quotes_are_found_in_every_text_but_not_in_fenced_code(checkout):
    """README, data sheets and Markdown cells are read; code cells and fences, which show how to quote, are not."""
    wrong = "7<!--claim smoke 99_test a-->"
    (checkout / "data").mkdir()
    (checkout / "data" / "datasheet.md").write_text(wrong)
    (checkout / "notebooks").mkdir()
    cells = [{"cell_type": kind, "metadata": {}, "source": ["a\n", wrong]} for kind in ("code", "markdown")]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (checkout / "notebooks" / "99_test.ipynb").write_text(json.dumps(notebook))
    found = quoted(checkout, f"```\n{wrong}\n```\n{wrong}", a=0.5)
    places = ["README.md, line 4", "data/datasheet.md, line 1", "notebooks/99_test.ipynb, cell 1, line 2"]
    assert [problem.partition(":")[0] for problem in found] == places
