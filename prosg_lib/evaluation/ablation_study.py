"""Which choices of a generator matter: one thing at a time is another, and all else is the same.

Every variant is trained as long, on the same dialogues in the same order, and asked the same questions of the
validation split; a difference is a difference of the choice, or of one training's luck, which is why the basis is
trained with other seeds, too. What was measured is kept, a small file a variant, so that the checkpoints need not be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from prosg_lib import files, paths, provenance
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import recall
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import Shape
from prosg_lib.training import distributed, stages
from prosg_lib.training.ablations import Ablation, checkpoint_name, plan_of
from prosg_lib.training.stages import PLENTY, Thrift

KIND, VERSION = "prosg ablation", 1
SPLIT = "validation"
"""Choices are made by it; the test split has nothing to say here."""

BLANK, CARRIED = "blank", "carried"
"""What the state is when the questions are asked: nothing but the change knows the prompt, or the state has read it."""


@dataclass(frozen=True)
class Variant:
    """One choice that is another.

    Attributes:
        group: what kind of choice; label: which.
        seed: of the training.
    """

    group: str
    label: str
    spec: Ablation
    seed: int

    def name(self, profile: Profile) -> str:
        """Of its checkpoint and of its kept measurement."""
        return checkpoint_name(self.spec, profile, self.seed)


def variants(profile: Profile, seed: int = 0) -> tuple[Variant, ...]:
    """The study of a profile, the basis first.

    Args:
        seed: of the trainings.
    Raises:
        UserError: unknown profile.
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
    ways = {
        "V2, directions alone": replace(supervised, lessons=0.0),
        "V2, taught by answers": supervised,
        "V2, taught by prompts": replace(supervised, teacher="prompt"),
        "V3": mend,
        "V3, smaller steps": replace(mend, step=0.01),
        "V3, larger steps": replace(mend, step=1.0),
        "V3, much larger steps": replace(mend, step=10.0),
    }
    found += [Variant("way", label, spec, seed) for label, spec in ways.items()]
    found.append(Variant("state", "final state, all", final, seed))
    return tuple(v for v in found if v.group in study.groups)


def measured(profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY) -> pd.DataFrame:
    """Recall of all variants: what is kept and fits is taken, what is missing is trained and measured, and kept.

    Args:
        seed: of the language model and of the trainings, but for those of other seeds.
        retrain: take nothing that is shipped; what was measured here since `stages.forget` is taken.
        thrift: of what is trained.
    Returns:
        As `evaluate.measure`, method being the variant's label, and besides group and state (`BLANK` at distance 0, or
        `CARRIED`).
    Raises:
        UserError: a kept file that is damaged; diverged training.
    """
    lm = stages.load_or_train("lm", profile, seed, retrain, thrift)
    command = f"prosg train ablations --profile {profile.name} --seed {seed}"
    found = [_kept_or_measured(v, profile, lm, retrain, thrift, command) for v in variants(profile, seed)]
    return pd.concat(found, ignore_index=True)


def shipped(variant: Variant, profile: Profile) -> Path:
    """Where the repository keeps the measurement of a variant, if it does."""
    return paths.data_dir() / "ablations" / f"{variant.name(profile)}.json"


def _kept_or_measured(
    variant: Variant, profile: Profile, lm: LanguageModel, retrain: bool, thrift: Thrift, command: str
) -> pd.DataFrame:
    plan = plan_of(variant.spec, profile, lm, variant.seed, thrift)
    record = {"generator": plan.record, "measured": stages.plain(_measuring(profile))}
    own = stages.kept(profile) / f"{variant.name(profile)}{stages.MEASURED}"
    for path in (own,) if retrain else (shipped(variant, profile), own):
        if path.is_file() and (kept := _read(path))["record"] == record:
            where = kept["provenance"]["device"]
            distributed.say(f"{variant.label}: measured before, on {where}: same sizes, seed and data")
            return _labelled(pd.DataFrame(kept["rows"]), variant)
    generator = stages.obtain(plan, profile, retrain)
    rows = _measure(lm, variant.spec.stage, generator, profile)
    if distributed.first():
        facts = provenance.facts() | {"command": command}
        columns = {name: rows[name].tolist() for name in rows}
        kept = {"kind": KIND, "version": VERSION, "record": record, "provenance": facts, "rows": columns}
        files.write_text(own, json.dumps(kept, allow_nan=False) + "\n")
    distributed.wait()
    return _labelled(rows, variant)


def _read(path: Path) -> dict:
    kept = files.read_json(path)
    whole = isinstance(kept, dict) and kept.keys() >= {"record", "provenance", "rows"}
    if not whole or (kept.get("kind"), kept.get("version")) != (KIND, VERSION):
        raise UserError(
            f"{path} is no measurement of a generator, or of another version; remove it, and it is made anew"
        )
    return kept


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
        found.append(recall.measure(*given).assign(state=CARRIED).fillna({"competing": 0.0}))
        items = data.items(profile.study.prompts, Shape(facts, 0, probes, instructions=2))
        delta = generator.memorize(lm, [list(data.encode_prompt(item)) for item in items])
        alone = recall.recall_alone(lm, delta, data, items)
        shared = {"distance": 0, "facts": facts, "seed": seed, "state": BLANK, "asked": 0}
        found.append(pd.DataFrame([shared | {"prompt": n, "recall": recall} for n, recall in enumerate(alone)]))
    columns = ["state", "distance", "facts", "seed", "prompt", "recall", "asked", "competing"]
    return pd.concat(found, ignore_index=True)[columns].fillna({"competing": 0.0})


def _labelled(rows: pd.DataFrame, variant: Variant) -> pd.DataFrame:
    return rows.assign(method=variant.label, group=variant.group)
