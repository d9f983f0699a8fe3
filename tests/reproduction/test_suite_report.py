"""The report on predictions: its numbers are those that notebooks compute, all of it is written or nothing, and what
cannot be compared is refused; `prosg evaluate`, both ways."""

import json
import os
import random
from dataclasses import replace
from functools import partial, reduce
from itertools import product

import pandas as pd
import pytest
import torch
from torch import nn

from prosg_lib import cli, files
from prosg_lib.config import PROFILES, profiles
from prosg_lib.config.sizes import Forgetting
from prosg_lib.errors import UserError
from prosg_lib.evaluation import memory_tests, predictions
from prosg_lib.evaluation.memory_tests import most_copied, scored
from prosg_lib.evaluation.recall import judged
from prosg_lib.evaluation.statistics import (
    by_distance,
    by_training,
    difference,
    differences,
    estimate,
    gap_recovered,
    half_life,
    locality,
    mean,
)
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.reproduction import suite_report
from prosg_lib.reproduction.suite_report import FILE, page, sections
from prosg_lib.text.prose import SPLITS, Prose, own_sentences

METHODS = ["base", "none", "repeated", "mine"]
ODDS = {"base": (0.9, 0.6, 0.1), "none": (0.1, 0.1, 0.1), "repeated": (0.9, 0.9, 0.9), "mine": (0.8, 0.8, 0.8)}
DISTANCES = (0, 16, 64)
HEADER = {"suite": "dialogue", "model": "some-model", "command": "prosg reproduce", "seeds": [0, 1], "left_out": ["x"]}
CELLS = {
    "copy": [{"words": 2}, {"words": 4}],
    "mqar": [{"length": 64, "pairs": 4}],
    "phonebook": [{"lines": 3}, {"lines": 10}],
    "passkey": [{"length": n, "depth": d} for n in (64, 128) for d in (0.0, 0.5, 1.0)],
}


@pytest.fixture(scope="module")
def dialogues():
    """Two questions about each of four prompts a seed, right by chance; nobody else is mentioned at first."""
    rng, rows = random.Random(0), []
    for facts, seed, method in product((1, 6), (0, 1), METHODS):
        for (distance, odds), prompt in product(zip(DISTANCES, ODDS[method], strict=True), range(4)):
            total = 3 if distance else 0
            rows.append(
                {"method": method, "training": 0, "distance": distance, "facts": facts, "seed": seed, "prompt": prompt}
                | {"instructions": {"closer": "over"}, "questions": ["Where?", "Town?"], "gold": ["Oslo", "Oslo"]}
                | {"predicted": [" Oslo, over." if rng.random() < odds else " Rome." for _ in range(2)]}
                | {"competing_total": total, "competing_right": rng.randint(0, total)}
            )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def problems():
    """Four items a cell of every memory test, right by chance."""
    rng, rows = random.Random(0), []
    for task, item, (method, odds) in product(CELLS, range(4), (("base", 0.5), ("none", 0.0), ("prosg-token", 0.9))):
        for cell in CELLS[task]:
            gold = list(range(10, 14))
            predicted = [g if rng.random() < odds else 0 for g in gold]
            row = {"task": task, "cell": cell, "seed": 0, "item": item, "method": method}
            rows.append(row | {"gold": gold, "predicted": predicted})
    return pd.DataFrame(rows)


def recompute(tmp_path, rows, name="out", header=HEADER):
    """What the command makes of a file: name -> bytes."""
    predictions.write(tmp_path / "kept.jsonl.gz", header, rows)
    out = tmp_path / name
    assert cli.main(["evaluate", "--from-predictions", str(tmp_path / "kept.jsonl.gz"), "--out", str(out)]) == 0
    return {file.name: file.read_bytes() for file in out.iterdir()}


def test_numbers_about_dialogues_are_those_of_the_statistics(dialogues):
    """Every table of a section is what the functions that notebooks call make of the same rows; a method with several
    trainings has each one's recall as well."""
    other = dialogues[dialogues.method == "mine"].assign(training=1, predicted=[[" Oslo, over.", " Rome."]] * 48)
    frame = judged(pd.concat([dialogues, other], ignore_index=True))
    for section in sections(pd.concat([dialogues, other], ignore_index=True)):
        facts, tables = int(section.name.split("_")[1]), section.tables
        assert tables["Recall"].equals(by_distance(estimate, frame, METHODS, facts))
        assert tables["Gap recovered"].equals(by_distance(gap_recovered, frame, ["base", "mine"], facts))
        following = partial(estimate, column="followed")
        assert tables["Instructions kept"].equals(by_distance(following, frame, METHODS, facts))
        assert tables["Recall of each training of mine"].equals(by_training(frame, "mine", facts))
        ahead, whole = tables["Recall minus the plain model's"], tables["Over the whole text"]
        assert list(ahead.index) == METHODS[1:]
        for method in METHODS:
            assert whole["half-life (tokens)"][method] == half_life(frame, method, facts)
        for method in METHODS[1:]:
            assert ahead.loc[method].to_dict() == differences(frame, method, "base", facts)
            assert whole["about others"][method] == locality(frame, method, "base", facts)


def test_numbers_about_memory_tests_are_those_of_the_statistics(problems):
    """By cell and over all of them, paired with the plain model; the order of rows does not matter."""
    for task, section in zip(CELLS, sections(problems), strict=True):
        own, table = scored(problems).query("task == @task"), section.tables["Score"]
        cells = {name: part for (_, name), part in own.groupby(["cell", "name"])} | {"all": own}
        assert list(table.index) == [*cells, "all, minus the plain model"]
        for method in ("base", "none", "prosg-token"):
            assert [table[method][name] for name in cells] == [mean(part, method, "score") for part in cells.values()]
            ahead = None if method == "base" else difference(own, method, "base", "score")
            assert table[method]["all, minus the plain model"] == ahead
        if task == "copy":
            assert section.tables["Most words copied"]["90% right"]["base"] == most_copied(own, "base", 0.9)
    backwards = problems.iloc[::-1].sort_values("task", key=lambda t: t.map(list(CELLS).index), kind="stable")
    for one, other in zip(sections(problems), sections(backwards), strict=True):
        assert one.tables["Score"].loc["all", "base"].value == other.tables["Score"].loc["all", "base"].value


@pytest.mark.parametrize("kind", ["dialogues", "problems"])
def test_the_page_says_what_the_numbers_say(kind, request, tmp_path):
    """The JSON has every section's tables, the page every number and every figure with words for those who do not see
    it; from the same file everything is the same, byte by byte."""
    rows = request.getfixturevalue(kind)
    written = recompute(tmp_path, rows)
    text, found = written["results.md"].decode(), json.loads(written["results.json"])
    assert found["header"] == HEADER
    assert "`some-model`" in text
    assert "- left out: x" in text
    assert set(written) == {"results.json", "results.md", *(f"{s['name']}.png" for s in found["sections"])}
    for section in found["sections"]:
        assert f"## {section['title']}\n" in text
        assert f"![{section['alt']}]({section['name']}.png)" in text
        assert "plain model" in section["alt"]
        assert written[f"{section['name']}.png"].startswith(b"\x89PNG")
        for title, table in section["tables"].items():
            assert f"### {title}\n" in text
            for cell in (cell for line in table.values() for cell in line.values() if isinstance(cell, dict)):
                if cell["value"] is not None:
                    assert f"{cell['value']:.2f} [" in text
    assert "nan" not in text
    assert recompute(tmp_path, rows, "again") == written


def test_what_a_file_lacks_is_left_out(dialogues):
    """Without a plain model, bounds, instructions or other people, the tables that need them are not there."""
    some = dialogues[dialogues.method == "mine"].assign(instructions=[{}] * 48, competing_total=0, competing_right=0)
    parts = sections(some)
    assert [title for title, table in parts[0].tables.items() if len(table)] == ["Recall", "Over the whole text"]
    assert "| mine " in page({}, parts)
    assert "### Gap" not in page({}, parts)


def test_methods_must_have_answered_the_same(dialogues, problems):
    """An item that a method lacks, answered twice, or with another gold answer, in either kind of file."""
    changed = dialogues.copy()
    changed.at[len(changed) - 1, "gold"] = ["Rome", "Rome"]
    for rows in (
        dialogues.iloc[:-1],
        pd.concat([dialogues, dialogues.iloc[-1:]]),
        pd.concat([dialogues, dialogues.iloc[-1:].assign(training=1)]),
        changed,
        problems.iloc[:-1],
    ):
        with pytest.raises(UserError, match=r"(facts 6|task passkey): the methods base, .* did not answer the same"):
            sections(rows)
    sections(dialogues[(dialogues.facts == 6) | (dialogues.method == "base")])  # the sections may have other methods
    with pytest.raises(UserError, match="facts 1: the methods base"):
        sections(dialogues[(dialogues.distance != 16) | (dialogues.prompt != 0)])  # all methods, but not everywhere


def test_nothing_is_half_written(dialogues, tmp_path, monkeypatch):
    """Where the disk is full, the folder is as it was."""
    predictions.write(tmp_path / "kept.jsonl.gz", HEADER, dialogues)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.md").write_text("before")

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match=r"/out could not be written: the disk is full.*--out"):
        suite_report.recompute(tmp_path / "kept.jsonl.gz", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.md"]
    assert (tmp_path / "out" / "results.md").read_text() == "before"


# The command


@pytest.fixture
def small(monkeypatch, make_lm):
    """A random model, a generator for it, little prose and few problems; nothing is read from disk."""
    sizes = Forgetting(3, (1, 2), ((16, 2),), (3,), (32,), (0.0, 1.0))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(PROFILES["smoke"], name="tiny", forgetting=sizes))
    prose = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:20]))
    monkeypatch.setattr(memory_tests, "load_prose", lambda: prose)
    lm = make_lm(layers=1, width=8)

    def generator(name, lm):
        torch.manual_seed(0)
        made = TokenGenerator(lm, 2, 8, ("att.output",))
        for p in made.heads.parameters():
            nn.init.normal_(p)
        return made.eval()

    monkeypatch.setattr(suite_report, "load_model", lambda name: lm)
    monkeypatch.setattr(suite_report, "load_generator", generator)


@pytest.mark.usefixtures("small")
def test_everything_is_computed_again_from_the_file(tmp_path, capsys):
    """The command, and then the file alone, elsewhere: JSON, page and figures are the same byte by byte."""
    first = tmp_path / "a" / "b"
    line = f"evaluate --model some --generator its --profile tiny --seed 0 3 --out {first}"
    assert cli.main(line.split()) == 0
    assert "cell" in capsys.readouterr().err  # progress
    reported = {path.name: path.read_bytes() for path in first.iterdir() if not path.name.startswith("predictions")}
    images = [f"{task}.png" for task in CELLS]
    assert sorted(reported) == sorted([*images, "results.json", "results.md"])
    header, rows = predictions.read(first / FILE)
    assert (header["model"], header["generator"], header["command"]) == ("some", "its", f"prosg {line}")
    assert {"commit", "device", "versions"} <= header.keys()
    assert list(rows.method.unique()) == ["base", "none", "repeated", "prosg-token", "alone", "wrong"]
    assert recompute(tmp_path, rows, header=header) == reported


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model some --profile tin --out OUT", "unknown profile 'tin'"),
        ("--model some --profile tiny --out OUT --items 1", "--items 1 is outside 2 to 100,000"),
        ("--model some --profile tiny --out OUT --items 999999999", "--items 999999999 is outside"),
        ("--model some --profile tiny --out FILE", "choose another with --out"),
        ("--model some --profile tiny --out LINK", "choose another with --out"),
        ("--from-predictions nothing.gz --out OUT", "nothing.gz does not exist"),
        ("--from-predictions FILE --out OUT", "file, row 1, line 1: not JSON"),
        ("--from-predictions FILE --generator x --out OUT", "--generator goes with --model"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, line, message):
    """Exit code 2, and no file or folder is new."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    places = {name.upper(): str(tmp_path / name) for name in ("out", "file", "link")}
    words = [reduce(lambda word, name: word.replace(name, places[name]), places, word) for word in line.split()]
    assert cli.main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prosg: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("small")
def test_an_interrupted_measurement_goes_on(tmp_path, capsys, monkeypatch):
    """After Ctrl-C the same command measures what is missing, and the result is that of one run; another
    seed is another measurement."""
    line = "evaluate --model some --generator its --profile tiny --out {}"
    assert cli.main(line.format(tmp_path / "whole").split()) == 0
    answered, measured = memory_tests.answered, []

    def stops(lm, generator, problems):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(problems[0].task)
        return answered(lm, generator, problems)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(memory_tests, "answered", stops)
        assert cli.main(line.format(out).split()) == 130
        assert f"Finished cells are kept in {out}; the same command goes on" in capsys.readouterr().err
        assert cli.main([*line.format(out).split(), "--seed", "1"]) == 130
        measured.clear()
        assert cli.main(line.format(out).split()) == 130
        assert measured == ["mqar", "phonebook"]
    assert cli.main(line.format(out).split()) == 0
    for file in (tmp_path / "whole").glob("*.png"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert predictions.read(out / FILE)[1].equals(predictions.read(tmp_path / "whole" / FILE)[1])
    assert not list(out.glob("unfinished*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user who may not do everything")
@pytest.mark.usefixtures("small")
def test_a_folder_of_somebody_elses(tmp_path, capsys):
    """Is found out first; one's own folder in it is enough."""
    own = tmp_path / "own"
    own.mkdir()
    tmp_path.chmod(0o555)
    line = "evaluate --model some --profile tiny --out {}"
    assert cli.main(line.format(tmp_path / "out").split()) == 2
    assert "choose another with --out" in capsys.readouterr().err
    assert cli.main(line.format(own).split()) == 0
