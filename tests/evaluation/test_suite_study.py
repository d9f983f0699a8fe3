"""The established tests asked of what was trained on them: once, side by side, and which files are taken for it."""

import pytest
from test_suite_stages import SMALL

from prosg_lib import cli, files
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import forgetting, predictions, suite_study
from prosg_lib.evaluation.suite_study import SHOWN, measured
from prosg_lib.reproduction import forgetting_report
from prosg_lib.training import stages


@pytest.fixture(autouse=True)
def place(small_world, tmp_path):
    with small_world(SMALL, tmp_path / "runs"):
        yield stages.kept(get_profile("tiny"))


def test_all_methods_answer_the_same_problems(place, capsys):
    """By the command line; a table of every test follows, paired, with the transformer and both ways' controls. What is
    kept are files as `prosg evaluate` writes them."""
    assert cli.main(["train", "suite", "--profile", "tiny"]) == 0
    header, rows = measured(get_profile("tiny"))
    assert header["methods"] == [m for shown in SHOWN.values() for m in shown.values()]
    found = forgetting_report.results(header, rows)
    assert set(found["tasks"]) == {"copy", "mqar", "phonebook", "passkey"}
    for part in found["tasks"].values():
        assert set(part["against"]) == set(header["methods"]) - {"base"}
    kept = sorted(path.name for path in place.glob(f"*{stages.PREDICTED}"))
    assert kept == [
        f"{n}-tiny.predictions.jsonl.gz" for n in ("llama-suite", "rwkv4-suite-adapter", "rwkv4-suite-token")
    ]
    says = {row.item: row.predicted for row in predictions.read(place / kept[0])[1] if row.method == "base"}
    assert says == {row.item: row.predicted for row in rows if row.method == "transformer"}


def test_asked_once_and_again_where_something_else_was_asked(place, monkeypatch, capsys):
    """What is kept is taken, from the repository too, unless all is to be trained anew; another generator's is not."""
    first = measured(get_profile("tiny"))
    asked = []
    once = forgetting.measured
    monkeypatch.setattr(forgetting, "measured", lambda *given: asked.append(given[2]["model"]) or once(*given))
    assert measured(get_profile("tiny")) == first
    assert "asked before" in capsys.readouterr().out
    assert not asked
    own = place / f"rwkv4-suite-token-tiny{stages.PREDICTED}"
    monkeypatch.setattr(suite_study.paths, "data_dir", lambda: place.parent / "data")
    shipped = suite_study.shipped("token", get_profile("tiny"))
    files.write_bytes(shipped, own.read_bytes())
    own.unlink()
    assert measured(get_profile("tiny")) == first
    assert not asked
    header, rows = predictions.read(shipped)
    predictions.write(shipped, header | {"generator_fingerprint": "another"}, rows)
    assert measured(get_profile("tiny")) == first
    assert asked == ["rwkv4-suite-tiny"]
    stages.forget(get_profile("tiny"), ["rwkv4-suite-token-tiny"])
    assert not own.exists()


def test_a_damaged_file_is_named(place):
    measured(get_profile("tiny"))
    path = place / f"llama-suite-tiny{stages.PREDICTED}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=path.name):
        measured(get_profile("tiny"))


def test_what_is_shipped_fits_the_shipped_models(monkeypatch):
    """Nothing is trained or asked for the reference's numbers."""
    monkeypatch.setattr(stages, "fit", None)
    monkeypatch.setattr(forgetting, "measured", None)
    header, rows = measured(get_profile("cpu"))
    assert header["seeds"] == [0]
    assert {row.method for row in rows} == set(header["methods"])
