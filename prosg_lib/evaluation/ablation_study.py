"""Which choices of a generator matter: each variant differs from the basis in one choice, everything else is the same.

Every variant is trained for as long, on the same dialogues in the same order, and answers the same questions of the
validation split. A difference comes from the choice, or from one training's luck, which is why the basis is trained
with other seeds as well. The variants are data: data/measured/ablation_variants.jsonl.
"""

from __future__ import annotations

import pandas as pd

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import Profile
from prosg_lib.evaluation import recall
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import Shape, load_dialogues
from prosg_lib.training.load_or_train import load_or_train

SPLIT = "validation"
"""Choices are made on it; the test split has no say here."""

BLANK, CARRIED = "blank", "carried"
"""The state when the questions are asked: blank, so that only the delta knows the prompt, or carried over from it."""


def measure(
    lm: LanguageModel,
    variants: pd.DataFrame,
    profile: Profile,
    retrain: bool = False,
    prompts: int = 24,
    distance: int = 256,
) -> pd.DataFrame:
    """Recall of all variants, each loaded or trained, as in data/measured/ablations.jsonl.gz.

    Args:
        lm: which all of them are for.
        variants: one row a generator: variant and group (its label, and the choice that it is about), and recipe, seed
            and changes, as in `load_or_train`.
        retrain: as in `load_or_train`.
        prompts: that each is asked about, a seed of the evaluation.
        distance: the larger of the two between prompt and question; the smaller is 0.
    Returns:
        As `recall.measure`, but for the method; and also variant, group and state (`BLANK`, at distance 0, or
        `CARRIED`).
    Raises:
        UserError: a recipe or setting that does not exist; diverged training.
    """
    parts = []
    for variant in variants.itertuples():
        generator = load_or_train(variant.recipe, profile, variant.seed, retrain, variant.changes, lm)
        found = _recall(lm, generator, profile, prompts, distance)
        parts.append(found.assign(variant=variant.variant, group=variant.group))
    return pd.concat(parts, ignore_index=True)


def _recall(lm: LanguageModel, generator: Generator, profile: Profile, prompts: int, distance: int) -> pd.DataFrame:
    facts, found = profile.evaluation.main_facts, []
    probes, given = min(profile.evaluation.probes, facts), {"generator": generator}
    for seed in profile.evaluation.seeds:
        data = load_dialogues(SPLIT, seed)
        carried = recall.measure(lm, given, list(given), data, [0, distance], facts, prompts, probes)
        found.append(carried.assign(state=CARRIED))
        items = data.items(prompts, Shape(facts, 0, probes, instructions=2))
        delta = generator.memorize(lm, [list(data.encode_prompt(item)) for item in items])
        alone = recall.recall_alone(lm, delta, data, items)
        shared = {"distance": 0, "facts": facts, "seed": seed, "state": BLANK, "competing_total": 0}
        found.append(pd.DataFrame([shared | {"prompt": n, "recall": share} for n, share in enumerate(alone.tolist())]))
    columns = ["state", "distance", "facts", "seed", "prompt", "recall", "competing_total", "competing"]
    return pd.concat(found, ignore_index=True)[columns].fillna({"competing": 0.0})
