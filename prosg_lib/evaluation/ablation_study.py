"""Which choices of a generator matter: each variant differs from the basis in one choice, everything else is the same.

Every variant is trained for as long, on the same dialogues in the same order, and answers the same questions of the
validation split. A difference comes from the choice, or from one training's luck, which is why the basis is trained
with other seeds as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import Profile
from prosg_lib.evaluation import recall
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import Shape, load_dialogues
from prosg_lib.training.load_or_train import load_or_train
from prosg_lib.training.recipes import checkpoint_name

SPLIT = "validation"
"""Choices are made on it; the test split has no say here."""

BLANK, CARRIED = "blank", "carried"
"""The state when the questions are asked: blank, so that only the delta knows the prompt, or carried over from it."""


@dataclass(frozen=True)
class Variant:
    """A generator that differs from the basis in one choice.

    Attributes:
        group: what kind of choice; label: which one.
        recipe: its name; changes: settings that differ from the recipe's, as in `load_or_train`.
        seed: of the training.
    """

    group: str
    label: str
    recipe: str
    changes: Mapping[str, object]
    seed: int

    def name(self, profile: Profile) -> str:
        """Of its checkpoint and its measurement."""
        return checkpoint_name(self.recipe, profile, self.seed, self.changes)


def variants(profile: Profile, seed: int = 0) -> tuple[Variant, ...]:
    """The study of a profile, the basis first.

    Args:
        seed: of the trainings.
    """
    study, size, layers = profile.study, profile.token, range(profile.model.layers)
    half = len(layers) // 2
    common = {f"training.{name}": getattr(study, name) for name in ("steps", "batch", "facts", "distances")}

    def variant(
        group: str, label: str, changes: Mapping[str, object], kind: str = "token", seed: int = seed
    ) -> Variant:
        return Variant(group, label, f"rwkv4-dialogue-{kind}", common | changes, seed)

    def maps(word: str) -> tuple[str, ...]:
        return tuple(name for name in size.maps if name.startswith(word))

    choices = {
        "rank": {f"rank {rank}": {"size.rank": rank} for rank in (1, 4, 16) if rank < size.rank},
        "width": {f"width {size.width // 4}": {"size.width": size.width // 4}},
        "maps": {"time mixing alone": {"size.maps": maps("att")}, "channel mixing alone": {"size.maps": maps("ffn")}},
        "layers": {
            f"layers 0 to {half - 1}": {"size.layers": tuple(layers[:half])},
            f"layers {half} to {layers[-1]}": {"size.layers": tuple(layers[half:])},
        },
        "label": {"no next token": {"size.label": False}},
        "curriculum": {
            "never alone first": {"curriculum.alone": 0.0},
            "never a blank state": {"curriculum.alone": 0.0, "curriculum.blank": 0.0},
            "always a blank state": {"curriculum.blank": 1.0},
            "no locality": {"curriculum.locality": 0.0},
            "more locality": {"curriculum.locality": 10.0},
        },
    }
    found = [variant("basis", "token-wise", {})]
    found += [variant("seed", f"another seed ({seed + n})", {}, seed=seed + n) for n in range(1, study.others + 1)]
    for group, labels in choices.items():
        found += [variant(group, label, changes) for label, changes in labels.items()]
    found += [
        variant("method", "V2, directions alone", {"size.lessons": 0.0}, "supervised"),
        variant("method", "V2, taught by answers", {}, "supervised"),
        variant("method", "V2, taught by prompts", {"size.teacher": "prompt"}, "supervised"),
        variant("method", "V3", {}, "mend"),
        variant("method", "V3, smaller steps", {"size.step": 0.01}, "mend"),
        variant("method", "V3, larger steps", {"size.step": 1.0}, "mend"),
        variant("method", "V3, much larger steps", {"size.step": 10.0}, "mend"),
        variant("state", "final state, all", {}, "final"),
    ]
    return tuple(v for v in found if v.group in study.groups)


def measure(profile: Profile, seed: int = 0, retrain: bool = False) -> pd.DataFrame:
    """Recall of all variants, each loaded or trained, as in data/measured/ablations.jsonl.gz.

    Args:
        seed: of the language model and of the trainings, except those with other seeds.
        retrain: as in `load_or_train`.
    Returns:
        As `recall.measure`, but for the method; and also variant (its label), group and state (`BLANK`, at distance 0,
        or `CARRIED`).
    Raises:
        UserError: diverged training.
    """
    lm, parts = load_or_train("rwkv4-dialogue", profile, seed, retrain), []
    for variant in variants(profile, seed):
        generator = load_or_train(variant.recipe, profile, variant.seed, retrain, variant.changes, lm)
        parts.append(_measure(lm, generator, profile).assign(variant=variant.label, group=variant.group))
    return pd.concat(parts, ignore_index=True)


def _distances(profile: Profile) -> list[int]:
    return [0, max(profile.study.distances)]


def _measure(lm: LanguageModel, generator: Generator, profile: Profile) -> pd.DataFrame:
    evaluation, found = profile.evaluation, []
    facts, probes = evaluation.main_facts, min(evaluation.probes, evaluation.main_facts)
    for seed in evaluation.seeds:
        data = load_dialogues(SPLIT, seed)
        given = (
            lm,
            {"generator": generator},
            ["generator"],
            data,
            _distances(profile),
            facts,
            profile.study.prompts,
            probes,
        )
        found.append(recall.measure(*given).assign(state=CARRIED))
        items = data.items(profile.study.prompts, Shape(facts, 0, probes, instructions=2))
        delta = generator.memorize(lm, [list(data.encode_prompt(item)) for item in items])
        alone = recall.recall_alone(lm, delta, data, items)
        shared = {"distance": 0, "facts": facts, "seed": seed, "state": BLANK, "competing_total": 0}
        found.append(pd.DataFrame([shared | {"prompt": n, "recall": share} for n, share in enumerate(alone.tolist())]))
    columns = ["state", "distance", "facts", "seed", "prompt", "recall", "competing_total", "competing"]
    return pd.concat(found, ignore_index=True)[columns].fillna({"competing": 0.0})
