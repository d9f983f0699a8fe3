"""From predictions to numbers: by hand, paired, and all of it written or nothing."""

import json
import random

import numpy as np
import pytest
from scipy import stats

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.evaluation.power import smallest_difference
from prosg_lib.evaluation.predictions import Prediction
from prosg_lib.reproduction import forgetting_report
from prosg_lib.reproduction.forgetting_report import results, write

HEADER = {
    "suite": "forgetting",
    "model": "some-model",
    "generator": "its-generator",
    "fingerprint": "0123456789abcdef",
    "methods": ["base", "none", "prosg-token"],
    "seeds": [0],
    "items": 4,
    "command": "prosg evaluate --model some-model",
    "device": "CPU: one",
    "versions": {"python": "3"},
    "left_out": ["MQAR of 512 tokens"],
}
CELLS = {
    "copy": [{"words": 2}, {"words": 4}],
    "mqar": [{"length": 64, "pairs": 4}],
    "phonebook": [{"lines": 3}, {"lines": 10}],
    "passkey": [{"length": n, "depth": d} for n in (64, 128) for d in (0.0, 1.0)],
}


def said(task, cell, item, method, *hits):
    """A prediction that is right at the places where `hits` is 1."""
    gold = tuple(range(10, 10 + len(hits)))
    return Prediction(
        task, cell, 0, item, method, gold, tuple(g if hit else 0 for g, hit in zip(gold, hits, strict=True))
    )


@pytest.fixture(scope="module")
def found():
    """Four items a cell; how right, by chance, but for two methods at copying."""
    rng = random.Random(0)
    rows = []
    for task, cells in CELLS.items():
        for cell in cells:
            for item in range(4):
                for method, odds in zip(HEADER["methods"], (0.5, 0.0, 0.9), strict=True):
                    hits = [int(rng.random() < odds) for _ in range(4)]
                    if task == "copy" and method == "prosg-token":
                        hits = [1, 1, 1, 1]
                    if task == "copy" and method == "base":
                        hits = [1, 1, 1, 1] if cell["words"] == 2 and item else [1, 1, 1, 0]
                    rows.append(said(task, cell, item, method, *hits))
    return rows


def scores(found, task, method, exact):
    return np.array([float(p.right) if exact else p.share for p in found if p.task == task and p.method == method])


def test_scores_are_shares_of_tokens_or_all_or_nothing(found):
    """Means of cells and of all of them, by test: copying and MQAR count tokens, the others whole answers."""
    tasks = results(HEADER, found)["tasks"]
    assert list(tasks) == list(CELLS)
    for task, part in tasks.items():
        for m in HEADER["methods"]:
            own = scores(found, task, m, exact=task in ("phonebook", "passkey"))
            assert part["overall"]["methods"][m]["value"] == pytest.approx(own.mean(), abs=1e-6)
            cells = own.reshape(len(CELLS[task]), 4).mean(1)
            assert [c["methods"][m]["value"] for c in part["cells"]] == pytest.approx(cells.tolist(), abs=1e-6)
        assert [c["cell"] for c in part["cells"]] == CELLS[task]
        assert part["overall"]["items"] == 4 * len(CELLS[task])
        assert {c["items"] for c in part["cells"]} == {4}


def test_cells_of_one_size_count_together(found):
    """Passkeys of one length at all depths are one mean; of the other tests every cell has a size of its own."""
    tasks = results(HEADER, found)["tasks"]
    for task, part in tasks.items():
        if task != "passkey":
            assert [c["methods"] for c in part["sizes"]] == [c["methods"] for c in part["cells"]]
    assert [(c["cell"], c["items"]) for c in tasks["passkey"]["sizes"]] == [({"length": 64}, 8), ({"length": 128}, 8)]
    for m in HEADER["methods"]:
        by_length = scores(found, "passkey", m, exact=True).reshape(2, 8).mean(1)
        assert [c["methods"][m]["value"] for c in tasks["passkey"]["sizes"]] == pytest.approx(by_length, abs=1e-6)


def test_intervals_enclose_and_differences_are_paired(found):
    """The interval of a method's difference to the plain model is that of differences item by item: where they are
    the same for every item, it has no width although both methods scatter."""
    rows = [said("copy", {"words": 2}, i, m, *([1] * (i + k) + [0] * (8 - i - k)))
            for i in range(6) for k, m in enumerate(("base", "none"))]  # fmt: skip
    part = results(HEADER | {"methods": ["base", "none"]}, rows)["tasks"]["copy"]
    assert part["against"] == {"none": {"value": 0.125, "low": 0.125, "high": 0.125}}
    assert part["power"]["seen"]["none"] == pytest.approx(0.0, abs=1e-6)
    one = part["overall"]["methods"]["base"]
    assert one["low"] < one["value"] < one["high"]


def test_the_power_statement(found):
    """For the items of one cell, of all, and with the scatter of each method's differences to the plain model."""
    part = results(HEADER, found)["tasks"]["passkey"]
    assert part["power"]["cell"] == pytest.approx(smallest_difference(4), abs=1e-6)
    assert part["power"]["any"] == pytest.approx(smallest_difference(16), abs=1e-6)
    apart = scores(found, "passkey", "prosg-token", True) - scores(found, "passkey", "base", True)
    expected = smallest_difference(16, stats.tstd(apart))
    assert part["power"]["seen"]["prosg-token"] == pytest.approx(expected, abs=1e-6)
    assert set(part["power"]["seen"]) == set(part["against"]) == {"none", "prosg-token"}


def test_the_most_words_that_are_copied(found):
    """By bar: the plain model has nine tenths of two words right, and all of none; ProSG all of four."""
    largest = results(HEADER, found)["tasks"]["copy"]["largest"]
    assert largest == {"base": {"1": 0, "0.9": 2}, "none": {"1": 0, "0.9": 0}, "prosg-token": {"1": 4, "0.9": 4}}
    assert "largest" not in results(HEADER, found)["tasks"]["mqar"]


def test_the_order_of_rows_does_not_matter(found):
    """But for the order in which tests and cells are shown."""
    shuffled = sorted(found, key=lambda p: (list(CELLS).index(p.task), CELLS[p.task].index(p.cell), -p.item, p.method))
    assert results(HEADER, shuffled) == results(HEADER, found)


def test_what_is_written(found, tmp_path):
    """JSON, a page with every table and figure, the figures; the page's numbers are the JSON's."""
    write(tmp_path / "out", HEADER, found)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["copy.png", "mqar.png", "passkey.png", "phonebook.png", "results.json", "results.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    kept = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert kept == results(HEADER, found)
    page = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    for task, part in kept["tasks"].items():
        assert f"## {part['title']}" in page
        assert f"]({task}.png)" in page
        for cell in part["cells"]:
            one = cell["methods"]["base"]
            assert f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in page
        assert f"a difference of {part['power']['cell']:.2f} in one cell (4 items)" in page
    assert "| most words with 90% right | 2 | 0 | 4 |" in page
    assert "Left out: MQAR of 512 tokens." in page
    assert "two-sided 5%, power 80%" in page
    assert f"up to {stats.binomtest(0, 4).proportion_ci(0.95).high:.2f} of all there are may still differ" in page
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))


def test_nothing_is_half_written(found, tmp_path, monkeypatch):
    """Where a figure cannot be drawn, or the disk is full, the folder is as it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.md").write_text("before")

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", fail)
    with pytest.raises(UserError, match="The disk is full"):
        write(tmp_path / "out", HEADER, found)
    monkeypatch.setattr(forgetting_report, "figures", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out", HEADER, found)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "results.md"]
    assert (tmp_path / "out" / "results.md").read_text() == "before"


def test_what_cannot_be_compared_is_refused(found):
    """Another test, an item that a method lacks, a method that is missing or not announced, nothing at all."""
    with pytest.raises(UserError, match="a test 'riddles'; there are copy"):
        results(HEADER, [said("riddles", {}, 0, "base", 1)])
    last = found[-1]
    with pytest.raises(
        UserError, match=r"passkey \(length 128, depth 1\): the methods .* did not answer the same items"
    ):
        results(HEADER, found[:-1])
    with pytest.raises(UserError, match="did not answer the same items"):
        results(HEADER | {"methods": ["base"]}, found)
    with pytest.raises(UserError, match="did not answer the same items"):
        results(HEADER, [p for p in found if p.method != last.method])
    with pytest.raises(UserError, match="no predictions"):
        results(HEADER, [])
