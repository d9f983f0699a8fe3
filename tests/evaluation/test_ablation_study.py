"""The study of ablations: what differs in a variant, that it is measured once, and which files are taken for it."""

from dataclasses import replace

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from tiny import TINY

from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import Evaluation, Study
from prosg_lib.errors import UserError
from prosg_lib.evaluation import ablation_study, predictions
from prosg_lib.evaluation.ablation_study import BLANK, CARRIED, measure, variants
from prosg_lib.training import load_or_train
from prosg_lib.training.checkpoints import MEASURED, forget, kept

SMALL = replace(
    TINY,
    evaluation=Evaluation(2, 2, 1, (0, 1), (0, 8), (1,)),
    study=Study(2, 2, (1,), (0, 8), others=1, prompts=2, groups=("basis", "seed", "rank")),
)


@pytest.fixture
def place(small_world, tmp_path):
    """An empty folder of checkpoints."""
    with small_world(SMALL, tmp_path):
        yield kept("any", SMALL).parent


def test_a_variant_is_the_basis_in_all_but_its_own_choice():
    """In every profile: labels and checkpoints are each one's own; steps, batch, facts and distances are the same."""
    for profile in PROFILES.values():
        study, found = profile.study, variants(profile)
        assert len({v.label for v in found}) == len({v.name(profile) for v in found}) == len(found)
        assert found[0].group == "basis"
        for variant in found:
            shared = {f"training.{name}": getattr(study, name) for name in ("steps", "batch", "facts", "distances")}
            own = {k: v for k, v in variant.changes.items() if k not in shared}
            assert shared.items() <= variant.changes.items()
            assert len(own) <= (2 if variant.label == "never a blank state" else 1)


def test_every_choice_of_the_study_is_in_the_large_profiles():
    """rank, width, maps, layers, what is seen of token and state, the course, and other seeds."""
    for profile in map(get_profile, ("cpu", "gpu", "paper")):
        changed = set().union(*(v.changes for v in variants(profile)))
        sizes = {f"size.{name}" for name in ("rank", "width", "maps", "layers", "label")}
        assert sizes | {f"curriculum.{name}" for name in ("alone", "blank", "locality")} <= changed
        assert {v.seed for v in variants(profile, 5)} == {5, 6, 7}


def test_measured_once(place, monkeypatch, capsys):
    """The second time nothing is trained and nothing asked, and the table is the same; prompts, states and distances
    are all there."""
    measure(SMALL)
    monkeypatch.setattr(load_or_train, "fit", None)
    monkeypatch.setattr(ablation_study, "_measure", None)
    first = measure(get_profile("tiny"))
    assert "rank 1: measured before" in capsys.readouterr().out
    assert set(first.method) == {"token-wise", "another seed (1)", "rank 1"}
    rows = first.groupby(["method", "state", "distance"]).size()
    assert (rows == 4).all()
    assert set(rows.index.droplevel(0)) == {(BLANK, 0), (CARRIED, 0), (CARRIED, 8)}
    assert first.recall.between(0, 1).all()
    assert_frame_equal(measure(get_profile("tiny")), first)


def test_a_measurement_of_another_training_is_not_taken(place):
    """A file whose record differs is measured anew; `forget` removes it; a damaged one is named."""
    tiny = get_profile("tiny")
    first, (basis, *_) = measure(tiny), variants(tiny)
    path = place / f"{basis.name(tiny)}{MEASURED}"
    header, rows = predictions.read(path)
    header["variants"][basis.name(tiny)]["record"]["trained"]["seed"] = 7
    predictions.write(path, header, rows.assign(recall=9.0))
    assert_frame_equal(measure(tiny), first)
    assert predictions.read(path)[0]["variants"][basis.name(tiny)]["record"]["trained"]["seed"] == 0
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=path.name.replace("+", r"\+")):
        measure(tiny)
    forget(tiny)
    assert not path.exists()


def test_shipped_measurements_are_taken_but_not_when_training_anew(place, monkeypatch, tmp_path):
    """What the repository keeps, all variants in one file, stands for a training, unless one is asked for."""
    tiny = get_profile("tiny")
    first = measure(tiny)
    monkeypatch.setattr(ablation_study.paths, "data_dir", lambda: tmp_path / "data")
    headers, parts = zip(*(predictions.read(path) for path in place.glob(f"*{MEASURED}")), strict=True)
    every = {name: entry for header in headers for name, entry in header["variants"].items()}
    predictions.write(ablation_study.shipped_path(), {"variants": every}, pd.concat(parts))
    forget(tiny)
    measured = []
    monkeypatch.setattr(ablation_study, "_measure", lambda *given: measured.append(given[1]) or first.head(1))
    assert_frame_equal(measure(tiny), first)
    assert not measured
    measure(tiny, retrain=True)
    assert len(measured) == len(variants(tiny))


def test_what_is_shipped_fits_the_profile(monkeypatch):
    """Nothing is trained or measured for the reference's numbers."""
    monkeypatch.setattr(load_or_train, "fit", None)
    monkeypatch.setattr(ablation_study, "_measure", None)
    assert set(measure(get_profile("cpu")).method) == {variant.label for variant in variants(get_profile("cpu"))}
