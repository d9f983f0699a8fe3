"""Which choices of a generator matter: each variant differs from the basis in one choice, everything else is the same.

Every variant is trained for as long, on the same dialogues in the same order, and answers the same questions of the
validation split. A difference comes from the choice, or from one training's luck, which is why the basis is trained
with other seeds as well. Measurements are kept as JSON Lines, so that the checkpoints need not be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from prosg_lib import paths, provenance
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import Profile
from prosg_lib.evaluation import predictions, recall
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import Shape
from prosg_lib.training import distributed, stages
from prosg_lib.training.ablations import Ablation, checkpoint_name, plan_of
from prosg_lib.training.stages import PLENTY, Thrift

SPLIT = "validation"
"""Choices are made on it; the test split has no say here."""

BLANK, CARRIED = "blank", "carried"
"""The state when the questions are asked: blank, so that only the delta knows the prompt, or carried over from it."""


@dataclass(frozen=True)
class Variant:
    """A generator that differs from the basis in one choice.

    Attributes:
        group: what kind of choice; label: which one.
        seed: of the training.
    """

    group: str
    label: str
    spec: Ablation
    seed: int

    def name(self, profile: Profile) -> str:
        """Of its checkpoint and its measurement."""
        return checkpoint_name(self.spec, profile, self.seed)


def variants(profile: Profile, seed: int = 0) -> tuple[Variant, ...]:
    """The study of a profile, the basis first.

    Args:
        seed: of the trainings.
    """
    study, size, layers = profile.study, profile.token, range(profile.model.layers)
    half = len(layers) // 2
    common = {"steps": study.steps, "batch": study.batch, "facts": study.facts, "distances": study.distances}
    token, final, supervised, mend = (Ablation(stage, **common) for stage in ("token", "final", "supervised", "mend"))

    def maps(word: str) -> tuple[str, ...]:
        return tuple(name for name in size.maps if name.startswith(word))

    choices = {
        "rank": {f"rank {rank}": {"rank": rank} for rank in (1, 4, 16) if rank < size.rank},
        "width": {f"width {size.width // 4}": {"width": size.width // 4}},
        "maps": {"time mixing alone": {"maps": maps("att")}, "channel mixing alone": {"maps": maps("ffn")}},
        "layers": {
            f"layers 0 to {half - 1}": {"layers": tuple(layers[:half])},
            f"layers {half} to {layers[-1]}": {"layers": tuple(layers[half:])},
        },
        "label": {"no next token": {"label": False}},
        "course": {
            "never alone first": {"alone": 0.0},
            "never a blank state": {"alone": 0.0, "blank": 0.0},
            "always a blank state": {"blank": 1.0},
            "no locality": {"locality": 0.0},
            "more locality": {"locality": 10.0},
        },
    }
    found = [Variant("basis", "token-wise", token, seed)]
    found += [Variant("seed", f"another seed ({seed + n})", token, seed + n) for n in range(1, study.others + 1)]
    for group, labels in choices.items():
        found += [Variant(group, label, replace(token, **changes), seed) for label, changes in labels.items()]
    methods = {
        "V2, directions alone": replace(supervised, lessons=0.0),
        "V2, taught by answers": supervised,
        "V2, taught by prompts": replace(supervised, teacher="prompt"),
        "V3": mend,
        "V3, smaller steps": replace(mend, step=0.01),
        "V3, larger steps": replace(mend, step=1.0),
        "V3, much larger steps": replace(mend, step=10.0),
    }
    found += [Variant("method", label, spec, seed) for label, spec in methods.items()]
    found.append(Variant("state", "final state, all", final, seed))
    return tuple(v for v in found if v.group in study.groups)


def measure(profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY) -> pd.DataFrame:
    """Recall of all variants: kept measurements that fit are taken, missing ones are trained, measured and kept.

    Args:
        seed: of the language model and of the trainings, except those with other seeds.
        retrain: take nothing that is shipped; what was measured here since `stages.forget` is taken.
        thrift: of what is trained.
    Returns:
        As `recall.measure`, method being the variant's label, and also group and state (`BLANK`, at distance 0, or
        `CARRIED`).
    Raises:
        UserError: a damaged file; diverged training.
    """
    lm = stages.load_or_train("lm", profile, seed, retrain, thrift)
    shipped = [] if retrain or not shipped_path().is_file() else [predictions.read(shipped_path())]
    parts = []
    for variant in variants(profile, seed):
        plan, name = plan_of(variant.spec, profile, lm, variant.seed, thrift), variant.name(profile)
        record = {"generator": plan.record, "measured": stages.plain(_measuring(profile))}
        own = stages.kept(profile) / f"{name}{stages.MEASURED}"
        kept = [*shipped, *([predictions.read(own)] if own.is_file() else [])]
        entries = ((header["variants"].get(name), rows[rows.variant == name]) for header, rows in kept)
        entry, rows = next(((e, r) for e, r in entries if e and e["record"] == record), (None, None))
        if entry:
            distributed.say(f"{variant.label}: measured before, on {entry['device']}: same sizes, seed and data")
        else:
            rows = _measure(lm, variant.spec.stage, stages.obtain(plan, profile, retrain), profile)
            rows = rows.assign(variant=name)
            if distributed.first():
                predictions.write(own, {"variants": {name: {"record": record, **provenance.facts()}}}, rows)
            distributed.wait()
        parts.append(rows.drop(columns="variant").assign(method=variant.label, group=variant.group))
    return pd.concat(parts, ignore_index=True)


def shipped_path() -> Path:
    """Where the repository keeps the measurements of all variants."""
    return paths.data_dir() / "measured" / "ablations.jsonl.gz"


def _measuring(profile: Profile) -> dict:
    own = {"prompts": profile.study.prompts, "probes": profile.evaluation.probes, "seeds": profile.evaluation.seeds}
    return own | {"split": SPLIT, "facts": profile.evaluation.main_facts, "distances": _distances(profile)}


def _distances(profile: Profile) -> list[int]:
    return [0, max(profile.study.distances)]


def _measure(lm: LanguageModel, stage: str, generator: Generator, profile: Profile) -> pd.DataFrame:
    evaluation, found = profile.evaluation, []
    facts, probes = evaluation.main_facts, min(evaluation.probes, evaluation.main_facts)
    for seed in evaluation.seeds:
        data = stages.dialogues(SPLIT, seed)
        given = (lm, {stage: generator}, [stage], data, _distances(profile), facts, profile.study.prompts, probes)
        found.append(recall.measure(*given).assign(state=CARRIED))
        items = data.items(profile.study.prompts, Shape(facts, 0, probes, instructions=2))
        delta = generator.memorize(lm, [list(data.encode_prompt(item)) for item in items])
        alone = recall.recall_alone(lm, delta, data, items)
        shared = {"distance": 0, "facts": facts, "seed": seed, "state": BLANK, "competing_total": 0}
        found.append(pd.DataFrame([shared | {"prompt": n, "recall": share} for n, share in enumerate(alone.tolist())]))
    columns = ["state", "distance", "facts", "seed", "prompt", "recall", "competing_total", "competing"]
    return pd.concat(found, ignore_index=True)[columns].fillna({"competing": 0.0})
