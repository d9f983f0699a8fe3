"""Load or train a generator that is another in one respect: rank, maps, layers, what it sees, how it is trained.

`stages.load_or_train` does the same for the generators that a profile describes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Self

from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.sizes import Profile, Training
from prosg_lib.errors import UserError
from prosg_lib.generators.base import edited_maps
from prosg_lib.tasks.dialogue import data_hash
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import stages
from prosg_lib.training.loop import RECIPE
from prosg_lib.training.objectives import USUAL, Curriculum
from prosg_lib.training.stages import PLENTY, Thrift

STAGES = ("token", "final", "supervised", "mend")
"""The generators that can be varied."""

_WARMUP = 6
"""A shorter training rises to its learning rate in a sixth of its steps, if that is sooner than the profile's."""


@dataclass(frozen=True)
class Ablation:
    """What is another than in the profile; None: nothing.

    Attributes:
        stage: one of `STAGES`.
        rank, width, maps: as in `GeneratorSize`.
        layers: numbers of the blocks whose maps are changed.
        features: kinds of state features that a final-state generator sees (`LanguageModel.state_feature_names`).
        label: whether a token-wise generator sees the next token.
        alone, blank, local, locality: as in `Curriculum`.
        lessons, teacher, strength, directions, rank_of_teacher, foresight: as in `SupervisedSize`.
        step: as in `TransformedSize`.
        steps, batch, lr, facts, distances, warmup: as in `Training`.
    """

    stage: str
    rank: int | None = None
    width: int | None = None
    maps: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    features: tuple[str, ...] | None = None
    label: bool | None = None
    alone: float | None = None
    blank: float | None = None
    local: float | None = None
    locality: float | None = None
    lessons: float | None = None
    teacher: str | None = None
    strength: float | None = None
    directions: bool | None = None
    rank_of_teacher: int | None = None
    foresight: float | None = None
    step: float | None = None
    steps: int | None = None
    batch: int | None = None
    lr: float | None = None
    facts: tuple[int, ...] | None = None
    distances: tuple[int, ...] | None = None
    warmup: int | None = None

    @classmethod
    def of(cls, stage: str, changes: Iterable[str]) -> Self:
        """From texts: `rank=8`, `layers=0,1`, `features=ratio,weight`, `label=false`.

        Raises:
            UserError: a text is no such change.
        """
        kinds, values = {field.name: field.type for field in fields(cls)[1:]}, {}
        for text in changes:
            name, _, value = text.partition("=")
            if name not in kinds or not value:
                raise UserError(f"{text!r} is no NAME=VALUE; names are {', '.join(kinds)}")
            try:
                parts = [_read(kinds[name], part) for part in value.split(",")]
            except ValueError as error:
                raise UserError(f"{text!r} has no value for {name}, which is {kinds[name]}") from error
            if "tuple" not in kinds[name] and len(parts) > 1:
                raise UserError(f"{text!r} has {len(parts)} values; {name} has one")
            values[name] = tuple(parts) if "tuple" in kinds[name] else parts[0]
        return cls(stage, **values)

    @property
    def changes(self) -> dict:
        """What is another, by name, in order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def name(self) -> str:
        """Of the checkpoint, behind the model's: `token-rank8`, `token-layers0+1`, `final-featuresratio`."""
        said = ("+".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in self.changes.values())
        return "-".join([self.stage, *(name + value for name, value in zip(self.changes, said, strict=True))])


def _read(kind: str, text: str) -> bool | int | float | str:
    """A value, as its field's annotation says it; a ValueError where it is none."""
    for name, read in {"bool": ("false", "true").index, "int": int, "float": float}.items():
        if name in kind:
            return bool(read(text)) if name == "bool" else read(text)
    return text


def checkpoint_name(spec: Ablation, profile: Profile, seed: int = 0) -> str:
    """`rwkv4-dialogue-token-rank8` is one of the cpu profile's."""
    return f"rwkv4-dialogue-{spec.name}" + (f"-seed{seed}" if seed else "") + stages.ending(profile)


def ablated(
    spec: Ablation,
    profile: Profile,
    seed: int = 0,
    retrain: bool = False,
    thrift: Thrift = PLENTY,
    lm: LanguageModel | None = None,
) -> nn.Module:
    """The trained generator of a specification; loaded or trained.

    Args:
        seed: of the generator and its dialogues.
        retrain, thrift: as in `stages.load_or_train`.
        lm: the language model that it is for; None: the profile's own, of seed 0.
    Raises:
        UserError: as `plan_of`; damaged checkpoint; diverged training.
    """
    lm = lm or stages.load_or_train("lm", profile, 0, retrain, thrift)
    return stages.obtain(plan_of(spec, profile, lm, seed, thrift), profile, retrain)


def trainings(
    profile: Profile,
    seed: int = 0,
    retrain: bool = False,
    thrift: Thrift = PLENTY,
    lm: LanguageModel | None = None,
) -> dict[int, nn.Module]:
    """The token-wise generator of a profile, trained more than once: another seed each, and all else is the same.

    Args:
        seed: of the first training, `stages.load_or_train`'s, and of the language model that all of them are for.
        retrain, thrift, lm: as in `ablated`.
    Returns:
        Number (`Evaluation.trainings`) -> generator, in order; the training's seed is `seed` + number.
    Raises:
        UserError: as `ablated`.
    """
    lm = lm or stages.load_or_train("lm", profile, seed, retrain, thrift)
    return {
        number: ablated(Ablation("token"), profile, seed + number, retrain, thrift, lm)
        if number
        else stages.load_or_train("token", profile, seed, retrain, thrift)
        for number in profile.evaluation.trainings
    }


def plan_of(spec: Ablation, profile: Profile, lm: LanguageModel, seed: int = 0, thrift: Thrift = PLENTY) -> stages.Plan:
    """How to come by `ablated` for the profile's language model.

    Raises:
        UserError: unknown stage or profile; a change that this stage knows nothing of, or that it cannot make.
    """
    if spec.stage not in STAGES:
        raise UserError(f"unknown stage {spec.stage!r}; there are {', '.join(STAGES)}")
    sizes = profile
    size, training = stages.size_of(spec.stage, sizes), getattr(sizes, f"{spec.stage}_training")
    course, options, unknown = USUAL, {}, []
    own = {"final": ("features",), "token": ("label",), "supervised": ("label",)}.get(spec.stage, ())
    for name, value in spec.changes.items():
        if name in _names(size):
            size = replace(size, **{name: value})
        elif name in _names(training):
            training = replace(training, **{name: value})
        elif name in _names(course):
            course = replace(course, **{name: value})
        elif name in own:
            options[name] = value
        elif name != "layers":
            unknown.append(name)
    if unknown:
        raise UserError(f"a {spec.stage} generator has no {', '.join(unknown)} to be changed")
    if spec.steps is not None and spec.warmup is None:
        training = replace(training, warmup=min(training.warmup, max(1, spec.steps // _WARMUP)))
    if spec.layers is not None:
        size = replace(size, maps=_in_layers(lm, size.maps, spec.layers))
    return stages.Plan(
        spec.name,
        checkpoint_name(spec, profile, seed),
        "generator",
        _record(spec, seed, lm, size, training, course, options),
        lambda: stages.new_module(spec.stage, size, lm, **options),
        lambda module: stages.generator_work(module, lm, size, training, sizes, seed, course),
        training,
        seed,
        lm,
        thrift,
    )


def _names(settings) -> set[str]:
    return {field.name for field in fields(settings)}


def _in_layers(lm: LanguageModel, maps: tuple[str, ...], layers: tuple[int, ...]) -> tuple[str, ...]:
    """Full names of the maps that end so and are in one of these blocks."""
    found = {layer: [n for n in edited_maps(lm, maps) if f".{layer}." in f".{n}"] for layer in layers}
    missing = [layer for layer, names in found.items() if not names]
    if missing or not layers:
        raise UserError(f"no such map in layer {', '.join(map(str, missing)) or 'of any number'}")
    return tuple(name for names in found.values() for name in names)


def _record(
    spec: Ablation, seed: int, lm: LanguageModel, size: stages.Size, training: Training, course: Curriculum, options
) -> dict:
    return stages.plain(
        {
            "stage": spec.stage,
            "ablation": spec.changes,
            "seed": seed,
            "recipe": RECIPE,
            "data": data_hash(load_tokenizer(), rich=True),
            "training": asdict(training),
            "generator": asdict(size),
            "course": asdict(course),
            "options": options,
            "lm": lm.fingerprint(),
        }
    )
