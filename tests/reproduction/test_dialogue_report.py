"""From what was said about dialogues to numbers: the measured ones exactly, all of them or none."""

import gzip
import json
import random
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest

from prosg_lib import cli
from prosg_lib.config.sizes import Evaluation
from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation import recall as evaluate
from prosg_lib.evaluation.power import smallest_difference
from prosg_lib.evaluation.predictions import Answers
from prosg_lib.evaluation.recall import by_distance, differences, estimate, gap_recovered, half_life, judged, locality
from prosg_lib.reproduction import dialogue_report, suites
from prosg_lib.reproduction.dialogue_report import keep, markdown, results
from prosg_lib.tasks.dialogue import Dialogues
from prosg_lib.text.prose import ProseTokens, own_sentences

METHODS = ["base", "none", "repeated", "every-64"]
DISTANCES = (0, 16, 64)
ODDS = {"base": (0.9, 0.6, 0.1), "none": (0.1, 0.1, 0.1), "repeated": (0.9, 0.9, 0.9), "every-64": (0.8, 0.8, 0.8)}
HEADER = {
    "suite": "dialogue",
    "model": "some-model",
    "fingerprint": "0123456789abcdef",
    "methods": METHODS,
    "profile": "tiny",
    "split": "test",
    "seeds": [0, 1],
    "command": "prosg reproduce",
    "device": "CPU: one",
    "versions": {"python": "3"},
}


@pytest.fixture(scope="module")
def told():
    """Two questions about each of four prompts a seed, right by chance; about other people nobody is asked at first."""
    rng, found = random.Random(0), []
    for facts, seed, method in product((1, 6), (0, 1), METHODS):
        for (distance, odds), prompt in product(zip(DISTANCES, ODDS[method], strict=True), range(4)):
            said = tuple(" Oslo, over." if rng.random() < odds else " Rome." for _ in range(2))
            about = ({"closer": "over"}, ("Where?", "Town?"), ("Oslo", "Oslo"))
            asked = 3 if distance else 0
            found.append(Answers(method, distance, facts, seed, prompt, *about, said, asked, rng.randint(0, asked)))
    return found


@pytest.fixture
def kept(told, tmp_path):
    predictions.write(tmp_path / "kept.jsonl.gz", HEADER, told)
    return tmp_path / "kept.jsonl.gz"


def recompute(path, out):
    assert cli.main(["evaluate", "--from-predictions", str(path), "--out", str(out)]) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_a_models_answers_give_the_measured_table_again(make_lm, tmp_path):
    """A sweep of a tiny model: what was kept, judged again, is the measured table exactly, and the command writes the
    same numbers, page and figures every time."""
    lm = make_lm(layers=1, width=8).requires_grad_(False)
    encode = lm.tokenizer.encode_long
    lines = [np.array(encode(text + "\n"), dtype=np.int32) for text in own_sentences("test")[:60]]
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines])[:-1]])
    data = Dialogues(lm.tokenizer, ProseTokens(np.concatenate(lines), starts), "test", 0)
    sizes = Evaluation(3, 2, 2, (0, 1), (0, 40), (2, 3))
    given = (lm, {}, ["base", "none", "repeated"], "test", sizes, lambda split, seed: replace(data, seed=seed))
    measured, said = evaluate.sweep(*given), evaluate.answers(*given)
    keep(tmp_path / "kept.gz", said, lm, "tiny", "smoke", "test", "prosg reproduce")
    header, rows = predictions.read(tmp_path / "kept.gz")
    assert rows == said
    pd.testing.assert_frame_equal(judged(rows), measured, check_exact=True)
    assert (header["methods"], header["seeds"]) == (["base", "none", "repeated"], [0, 1])
    assert header["fingerprint"] == lm.fingerprint()
    assert {"commit", "device", "versions"} <= header.keys()
    first = recompute(tmp_path / "kept.gz", tmp_path / "a" / "b")
    assert sorted(first) == ["recall_2_facts.png", "recall_3_facts.png", "results.json", "results.md"]
    assert recompute(tmp_path / "kept.gz", tmp_path / "c") == first
    many = json.loads(first["results.json"])["parts"][1]
    assert (many["facts"], many["prompts"], many["distances"]) == (3, 6, [0, 40])
    own = measured[(measured.facts == 3) & (measured.method == "base") & (measured.distance == 40)]
    assert many["recall"]["base"][1]["value"] == pytest.approx(own.recall.mean(), abs=1e-6)


def test_numbers_are_those_of_evaluate(told):
    """Every estimate of a report is what the functions that notebooks call make of the same rows."""
    frame, found = judged(told), results(HEADER, told)
    assert found["header"] == HEADER
    assert [part["facts"] for part in found["parts"]] == [1, 6]
    for part in found["parts"]:
        facts = part["facts"]

        def same(numbers, estimates):
            for one, other in zip(numbers, estimates, strict=True):
                expected = {"value": other.value, "low": other.low, "high": other.high}
                assert one == pytest.approx({k: None if np.isnan(v) else v for k, v in expected.items()}, abs=1e-6)

        for column, statistic in {
            "recall": estimate,
            "followed": partial(estimate, column="followed"),
            "gap": gap_recovered,
        }.items():
            methods = ["base", "every-64"] if column == "gap" else METHODS
            assert list(part[column]) == methods
            for method, estimates in by_distance(statistic, frame, methods, facts).iterrows():
                same(part[column][method], estimates)
        assert list(part["against"]) == list(part["competing"]) == METHODS[1:]
        for method in METHODS[1:]:
            same(part["against"][method], differences(frame, method, "base", facts).values())
            same([part["competing"][method]], [locality(frame, method, "base", facts)])
        for method, tokens in part["half_life"].items():
            expected = half_life(frame, method, facts)
            assert tokens == (pytest.approx(expected, abs=1e-6) if np.isfinite(expected) else None)
        assert part["prompts"] == 8
        assert part["power"] == pytest.approx(smallest_difference(8), abs=1e-6)


def test_answers_are_judged_and_not_believed(told, kept, tmp_path):
    """Whoever changes an answer in the file changes the numbers; there is no place to write another verdict into."""
    before = results(HEADER, told)["parts"][1]["recall"]["none"]
    header, *rows = [json.loads(line) for line in gzip.decompress(kept.read_bytes()).decode().splitlines()]
    for row in rows:
        if row["method"] == "none":
            row["predicted"] = [" Oslo."] * 2
    kept.write_bytes(gzip.compress("\n".join(map(json.dumps, [header, *rows])).encode()))
    part = json.loads(recompute(kept, tmp_path / "out")["results.json"])["parts"][1]
    assert [cell["value"] for cell in part["recall"]["none"]] == [1.0, 1.0, 1.0]
    assert [cell["value"] for cell in part["followed"]["none"]] == [0.0, 0.0, 0.0]
    assert before[0]["value"] < 0.5


def test_the_page_says_what_the_numbers_say(told, kept, tmp_path):
    """Every table with the JSON's numbers, every figure with words for those who do not see it, the power statement."""
    written = recompute(kept, tmp_path / "out")
    page, found = written["results.md"].decode(), json.loads(written["results.json"])
    assert found["parts"] == results(HEADER, told)["parts"]
    assert "`some-model`" in page
    assert "seeds 0, 1, test split, sizes of tiny" in page
    assert "## 1 fact in the prompt" in page
    assert "| prompt read again, 64 |" in page
    for part in found["parts"]:
        name = f"recall_{part['facts']}_facts"
        assert written[f"{name}.png"].startswith(b"\x89PNG")
        (alt,) = [line for line in page.splitlines() if line.endswith(f"]({name}.png)")]
        one, far = part["recall"]["base"][0], part["recall"]["base"][-1]
        assert f"plain model {one['value']:.2f} and {far['value']:.2f};" in alt
        assert f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in page
        assert f"a difference in recall of {part['power']:.2f} (8 prompts)" in page
    for title in ("Recall", "Recall minus the plain model's", "Gap recovered", "Instructions kept"):
        assert page.count(f"### {title}\n") == 2
    assert "| more than 64 |" in page
    assert "nan" not in page


def test_what_a_file_has_not_is_left_out(told):
    """Without a plain model, bounds, instructions or other people, the tables that need them are not there; a method
    that is not known here has its own name."""
    some = [replace(row, method="mine", instructions={}, asked=0, right=0) for row in told if row.method == "every-64"]
    found = results(HEADER | {"methods": ["mine"]}, some)
    part = found["parts"][0]
    assert not any(part[name] for name in ("followed", "gap", "against", "competing"))
    assert "| mine |" in markdown(found, {})
    assert "### Gap" not in markdown(found, {})
    assert "mine 0." in dialogue_report.figures(found)["recall_6_facts"][0]
    alone = [replace(row, asked=0, right=0) for row in told]
    assert results(HEADER, alone)["parts"][0]["competing"]["none"] == {"value": None, "low": None, "high": None}


def test_methods_may_be_asked_with_some_numbers_of_facts_alone(told):
    """A part has the methods that were asked there, and its numbers are those without the others; a method that says
    nothing about other people is compared in all else."""
    fewer = [row for row in told if row.facts == 6 or row.method in ("base", "none")]
    parts = {part["facts"]: part for part in results(HEADER, fewer)["parts"]}
    whole = {part["facts"]: part for part in results(HEADER, told)["parts"]}
    assert parts[6] == whole[6]
    for facts in parts.keys() - {6}:
        assert set(parts[facts]["recall"]) == {"base", "none"}
        assert parts[facts]["recall"]["base"] == whole[facts]["recall"]["base"]
    silent = [replace(row, asked=0, right=0) if row.method == "none" else row for row in told]
    found = results(HEADER, silent)["parts"][-1]
    assert found["competing"]["none"]["value"] is None
    assert found["recall"] == whole[found["facts"]]["recall"]


def test_trainings_are_reported_together_and_one_by_one(told, kept, tmp_path):
    """Every number of a method with two trainings is over both, as `evaluate` has it; each one's recall is that of a
    file of its own."""
    other = [replace(row, predicted=(" Oslo, over.", " Rome."), training=1) for row in told if row.method == "every-64"]
    predictions.write(kept, HEADER, [*told, *other])
    written = recompute(kept, tmp_path / "out")
    found, page = json.loads(written["results.json"]), written["results.md"].decode()
    before = results(HEADER, told)
    frame = judged([*told, *other])
    for part, one in zip(found["parts"], before["parts"], strict=True):
        mean = estimate(frame, "every-64", 64, part["facts"])
        cell = part["recall"]["every-64"][-1]
        assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((mean.value, mean.low, mean.high), abs=1e-6)
        assert part["recall"]["base"] == one["recall"]["base"]
        assert part["prompts"] == one["prompts"]
        assert part["trainings"]["every-64"]["0"] == one["recall"]["every-64"]
        assert [cell["value"] for cell in part["trainings"]["every-64"]["1"]] == [0.5, 0.5, 0.5]
        assert one["trainings"] == {}
        lead = differences(frame, "every-64", "base", part["facts"])[64]
        assert part["against"]["every-64"][-1]["low"] == pytest.approx(lead.low, abs=1e-6)
    assert "intervals over prompts, and over trainings where there are several (prompt read again, 64)" in page
    assert page.count("### Recall of every training: prompt read again, 64") == 2
    assert "| training 1 | 0.50 [0.50, 0.50] |" in page


def test_what_cannot_be_compared_is_refused(told, kept, tmp_path, capsys):
    """Methods, prompts, distances or questions that are not those of the others: one error, and nothing is written."""
    last = told[-1]
    for methods, rows in (
        (METHODS[:3], told),
        ([*METHODS, "twice"], told),
        (METHODS, told[:-1]),
        (METHODS, [*told[:-1], replace(last, gold=("Rome", "Rome"))]),
        (METHODS, [*told[:-1], replace(last, asked=4)]),
        (METHODS, [*told, replace(last, training=1)]),
        (METHODS, [row for row in told if (row.facts, row.prompt, row.distance) != (6, 3, 64)]),
    ):
        with pytest.raises(UserError, match=r"facts?: the methods base, .* were not asked the same"):
            results(HEADER | {"methods": methods}, rows)
    with pytest.raises(UserError, match="no predictions"):
        results(HEADER, [])
    predictions.write(kept, HEADER, told[:-1])
    assert cli.main(["evaluate", "--from-predictions", str(kept), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_every_suite_has_rows_and_a_report():
    """What can be read can be reported, and the other way round."""
    assert set(suites.REPORTS) == set(predictions.ROWS)
