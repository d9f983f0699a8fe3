"""The study of ablations: what differs in a variant, that it is measured once, and which files are taken for it."""

import json
from dataclasses import replace

import pytest
from pandas.testing import assert_frame_equal
from test_ablations import TINY

from prosg_lib import cli, files
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import Evaluation, Study
from prosg_lib.errors import UserError
from prosg_lib.evaluation import ablation_study
from prosg_lib.evaluation.ablation_study import BLANK, CARRIED, measured, variants
from prosg_lib.training import stages

SMALL = replace(
    TINY,
    evaluation=Evaluation(2, 2, 1, (0, 1), (0, 8), (1,)),
    study=Study(2, 2, (1,), (0, 8), others=1, prompts=2, groups=("basis", "seed", "rank")),
)


@pytest.fixture
def place(small_world, tmp_path):
    """An empty folder of checkpoints."""
    with small_world(SMALL, tmp_path):
        yield stages.kept(get_profile("tiny"))


def test_a_variant_is_the_basis_in_all_but_its_own_choice():
    """In every profile: labels and checkpoints are each one's own; steps, batch, facts and distances are the same."""
    for profile in PROFILES.values():
        study, found = profile.study, variants(profile)
        assert len({v.label for v in found}) == len({v.name(profile) for v in found}) == len(found)
        assert found[0].group == "basis"
        for variant in found:
            shared = {"steps": study.steps, "batch": study.batch, "facts": study.facts, "distances": study.distances}
            own = {k: v for k, v in variant.spec.changes.items() if k not in shared}
            assert shared.items() <= variant.spec.changes.items()
            assert len(own) <= (2 if variant.label == "never a blank state" else 1)


def test_every_choice_of_the_study_is_in_the_large_profiles():
    """rank, width, maps, layers, what is seen of token and state, the course, and other seeds."""
    for profile in map(get_profile, ("cpu", "gpu", "paper")):
        changed = set().union(*(v.spec.changes for v in variants(profile)))
        assert {"rank", "width", "maps", "layers", "label", "alone", "blank", "locality"} <= changed
        assert {v.seed for v in variants(profile, 5)} == {5, 6, 7}


def test_measured_once(place, monkeypatch, capsys):
    """The second time nothing is trained and nothing asked, and the table is the same; prompts, states and distances
    are all there."""
    assert cli.main(["train", "ablations", "--profile", "tiny"]) == 0
    monkeypatch.setattr(stages, "fit", None)
    monkeypatch.setattr(ablation_study, "_measure", None)
    first = measured(get_profile("tiny"))
    assert "rank 1: measured before" in capsys.readouterr().out
    assert set(first.method) == {"token-wise", "another seed (1)", "rank 1"}
    rows = first.groupby(["method", "state", "distance"]).size()
    assert (rows == 4).all()
    assert set(rows.index.droplevel(0)) == {(BLANK, 0), (CARRIED, 0), (CARRIED, 8)}
    assert first.recall.between(0, 1).all()
    assert_frame_equal(measured(get_profile("tiny")), first)


def test_what_was_measured_of_another_training_is_not_taken(place):
    """A file whose record is another's is measured anew; `stages.forget` removes it with the checkpoint."""
    measured(get_profile("tiny"))
    path = place / f"{variants(get_profile('tiny'))[0].name(get_profile('tiny'))}{stages.MEASURED}"
    kept = files.read_json(path)
    kept["record"]["generator"]["seed"], kept["rows"]["recall"] = 7, [9.0] * len(kept["rows"]["recall"])
    path.write_text(json.dumps(kept))
    assert measured(get_profile("tiny")).recall.max() <= 1
    assert files.read_json(path)["record"]["generator"]["seed"] == 0
    stages.forget(get_profile("tiny"))
    assert not path.exists()


def test_shipped_measurements_are_taken_but_not_when_training_anew(place, monkeypatch, tmp_path):
    """What the repository keeps stands for a training, unless one is asked for."""
    first = measured(get_profile("tiny"))
    monkeypatch.setattr(ablation_study.paths, "data_dir", lambda: tmp_path / "data")
    for variant in variants(get_profile("tiny")):
        own = place / f"{variant.name(get_profile('tiny'))}{stages.MEASURED}"
        files.write_bytes(ablation_study.shipped(variant, get_profile("tiny")), own.read_bytes())
        own.unlink()
    asked = []
    monkeypatch.setattr(ablation_study, "_measure", lambda *given: asked.append(given[1]) or first.head(1))
    assert_frame_equal(measured(get_profile("tiny")), first)
    assert not asked
    measured(get_profile("tiny"), retrain=True)
    assert len(asked) == len(variants(get_profile("tiny")))


@pytest.mark.parametrize("content", ["[]", '{"kind": "prosg ablation", "version": 2}', "{"])
def test_a_damaged_file_is_named(place, content):
    measured(get_profile("tiny"))
    path = place / f"{variants(get_profile('tiny'))[0].name(get_profile('tiny'))}{stages.MEASURED}"
    path.write_text(content)
    with pytest.raises(UserError, match=path.name.replace("+", r"\+")):
        measured(get_profile("tiny"))
