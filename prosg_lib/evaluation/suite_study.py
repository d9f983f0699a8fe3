"""The established tests, asked of the models that were trained on them (`suite_stages`), every method side by side.

What was said is kept, a file a model and what writes into its weights, as `prosg evaluate` writes it; so nobody has to
wait for it again, and every number can be computed from the files alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prosg_lib import paths
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.sizes import Profile
from prosg_lib.evaluation import forgetting, predictions
from prosg_lib.evaluation.predictions import Prediction
from prosg_lib.generators.base import Generator
from prosg_lib.training import distributed, stages
from prosg_lib.training.stages import PLENTY, Thrift
from prosg_lib.training.suite_stages import MODELS, WAYS, checkpoint_name, suite_model, suite_way

SHOWN = {
    "token": {m: m for m in ("base", "none", "repeated", "prosg-token", "alone", "wrong")},
    "adapter": {"adapter": "adapter", "alone": "adapter-alone", "wrong": "adapter-wrong"},
    "transformer": {"base": "transformer"},
}
"""What was asked -> its methods that are compared, and what they are called then. All read the same problems."""


def names(profile: Profile) -> list[str]:
    """Of all checkpoints of the study."""
    return [checkpoint_name(what, profile) for what in (*MODELS, *WAYS)]


def measured(
    profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> tuple[dict, list[Prediction]]:
    """What is kept and fits is taken; what is missing is trained and asked, and kept.

    Args:
        seed: of the trainings and of the problems.
        retrain: take nothing that is shipped; what was done here since `stages.forget` is taken.
        thrift: of what is trained.
    Returns:
        Header and rows, as `forgetting_report.results` takes them, of all methods in `SHOWN`.
    Raises:
        UserError: unknown profile; a kept file that is damaged; diverged training.
    """
    given = (profile, seed, retrain, thrift)
    lm = suite_model("recurrent", *given)
    asked = {
        "token": (lm, suite_way("token", *given)),
        "adapter": (lm, suite_way("adapter", *given)),
        "transformer": (suite_model("transformer", *given), None),
    }
    found = {what: _kept_or_asked(what, *models, profile, seed, retrain) for what, models in asked.items()}
    rows = [
        replace(row, method=SHOWN[what][row.method])
        for what, (_, answered) in found.items()
        for row in answered
        if row.method in SHOWN[what]
    ]
    return found["token"][0] | {"methods": [m for shown in SHOWN.values() for m in shown.values()]}, rows


def shipped(what: str, profile: Profile) -> Path:
    """Where the repository keeps the predictions of a checkpoint, if it does."""
    return paths.data_dir() / "established" / f"{checkpoint_name(what, profile)}{stages.PREDICTED}"


def _kept_or_asked(
    what: str, lm: LanguageModel, generator: Generator | None, profile: Profile, seed: int, retrain: bool
) -> tuple[dict, list[Prediction]]:
    items = profile.forgetting.items
    wanted = stages.plain(forgetting.described(lm, generator, profile, (seed,), items))
    own = stages.kept(profile) / f"{checkpoint_name(what, profile)}{stages.PREDICTED}"
    for path in (own,) if retrain else (shipped(what, profile), own):
        if path.is_file():
            header, rows = predictions.read(path)
            if wanted.items() <= header.items():
                distributed.say(f"{path.name}: asked before, on {header['device']}: same model, generator and problems")
                return header, rows
    recurrent = checkpoint_name("recurrent", profile)
    named = {
        "model": recurrent if generator else checkpoint_name(what, profile),
        "generator": checkpoint_name(what, profile) if generator else None,
        "command": f"prosg train suite --profile {profile.name} --seed {seed}",
    }
    header, rows = forgetting.measured(lm, generator, named, profile, (seed,), items)
    if distributed.first():
        predictions.write(own, header, rows)
    distributed.wait()
    return predictions.read(own)
