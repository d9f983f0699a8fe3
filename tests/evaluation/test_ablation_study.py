"""The study of ablations: what is measured of a variant, and what is shipped of it."""

from dataclasses import replace

import pandas as pd
from tiny import TINY

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.config.sizes import Evaluation
from prosg_lib.evaluation.ablation_study import BLANK, CARRIED, measure
from prosg_lib.training.load_or_train import load_or_train

SMALL = replace(TINY, evaluation=Evaluation(2, 2, 1, (0, 1), (0, 8), (1,)))


def test_every_variant_is_measured_on_the_same_prompts(small_world, tmp_path):
    """From a blank state at distance 0, and with the state carried over at the nearest and the farthest."""
    short = {"training.steps": 2, "training.batch": 2, "training.facts": (1,), "training.distances": (0, 8)}
    rows = [("token-wise", "basis", 0, short), ("rank 1", "rank", 1, short | {"size.rank": 1})]
    variants = pd.DataFrame(rows, columns=["variant", "group", "seed", "changes"]).assign(recipe="rwkv4-dialogue-token")
    with small_world(SMALL, tmp_path):
        profile = get_profile("tiny")
        rows = measure(load_or_train("rwkv4-dialogue", profile), variants, profile, prompts=2, distance=8)
    counts = rows.groupby(["variant", "group", "state", "distance"]).size()
    assert (counts == 4).all()
    cells = {(BLANK, 0), (CARRIED, 0), (CARRIED, 8)}
    assert set(counts.index) == {(name, group, *cell) for name, group, *_ in variants.to_numpy() for cell in cells}
    assert rows.recall.between(0, 1).all()


def test_the_shipped_measurements_are_of_all_variants():
    folder = paths.data_dir() / "measured"
    rows = pd.read_json(folder / "ablations.jsonl.gz", lines=True)
    trained = pd.read_json(folder / "ablation_variants.jsonl", lines=True)
    assert set(zip(rows.variant, rows.group, strict=True)) == set(zip(trained.variant, trained.group, strict=True))
    assert rows.groupby("variant").size().nunique() == 1
    assert trained.variant.is_unique
