"""The study of ablations: what differs in a variant, and what is measured of it."""

import json
from dataclasses import replace

import pandas as pd
from tiny import TINY

from prosg_lib import paths
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import Evaluation, Study
from prosg_lib.evaluation.ablation_study import BLANK, CARRIED, measure, variants

SMALL = replace(
    TINY,
    evaluation=Evaluation(2, 2, 1, (0, 1), (0, 8), (1,)),
    study=Study(2, 2, (1,), (0, 8), others=1, prompts=2, groups=("basis", "seed", "rank")),
)


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


def test_every_variant_is_measured_on_the_same_prompts(small_world, tmp_path):
    """From a blank state at distance 0, and with the state carried over at the nearest and the farthest."""
    with small_world(SMALL, tmp_path):
        rows = measure(get_profile("tiny"))
    assert list(rows.variant.unique()) == ["token-wise", "another seed (1)", "rank 1"]
    counts = rows.groupby(["variant", "state", "distance"]).size()
    assert (counts == 4).all()
    assert set(counts.index.droplevel(0)) == {(BLANK, 0), (CARRIED, 0), (CARRIED, 8)}
    assert rows.recall.between(0, 1).all()


def test_the_shipped_measurements_are_of_all_variants():
    """And of some that later versions cannot train."""
    folder = paths.data_dir() / "measured"
    rows = pd.read_json(folder / "ablations.jsonl.gz", lines=True)
    trained = pd.read_json(folder / "ablation_variants.jsonl", lines=True)
    found = {(v.label, v.group) for v in variants(get_profile("cpu"))}
    assert (
        found
        <= set(zip(rows.variant, rows.group, strict=True))
        == set(zip(trained.variant, trained.group, strict=True))
    )
    assert rows.groupby("variant").size().nunique() == 1
    for variant in variants(get_profile("cpu")):
        kept = trained[trained.variant == variant.label].iloc[0]
        assert (kept.recipe, kept.seed) == (variant.recipe, variant.seed)
        assert kept.changes == json.loads(json.dumps(variant.changes))
