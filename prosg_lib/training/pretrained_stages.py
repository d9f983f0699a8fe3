"""Load or train, for a model that others wrote: the small one that stands in for a hub's, and a generator for any.

`stages` does the same for the project's own RWKV-4 and its generators.
"""

from __future__ import annotations

import re
from dataclasses import asdict

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_families import new_mamba2
from prosg_lib.config.sizes import GeneratorSize, PretrainedSizes, Profile
from prosg_lib.generators.base import ALL_MAPS
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import Dialogues, data_hash
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import stages
from prosg_lib.training.loop import RECIPE
from prosg_lib.training.objectives import generator_draw, generator_objective, lm_draw, lm_objective

SMALL = "mamba2-dialogue"
"""The small model's name, and its checkpoint's."""


def dialogues_of(lm: LanguageModel, split: str, seed: int, rich: bool = False) -> Dialogues:
    """The dialogue data set in the model's own tokens; distances are counted in them.

    Raises:
        UserError: the model has no tokenizer.
    """
    return stages.dialogues(split, seed, rich, lm.needed_tokenizer())


def small_model(profile: Profile, seed: int = 0, retrain: bool = False) -> LanguageModel:
    """A small Mamba-2 of `transformers`, made and trained here on the dialogues: see `PretrainedSizes`.

    Raises:
        UserError: unknown profile; damaged checkpoint; diverged training.
    """
    sizes = profile.pretrained
    record = {
        "stage": "small",
        "seed": seed,
        "recipe": RECIPE,
        "data": data_hash(load_tokenizer()),
        "model": dict(sizes.settings),
        "training": asdict(sizes.lm),
    }

    def work(model):
        model.tokenizer = load_tokenizer()
        return lm_draw(dialogues_of(model, "train", seed), sizes.lm), lm_objective(model)

    name = SMALL + stages.ending(profile)
    plan = stages.Plan(name, name, "lm", stages.plain(record), lambda: new_small(sizes), work, sizes.lm, seed)
    return stages.obtain(plan, profile, retrain)


def new_small(sizes: PretrainedSizes) -> LanguageModel:
    """The small model, untrained and without a tokenizer."""
    return new_mamba2(dict(sizes.settings))


def generator_for(
    lm: LanguageModel,
    source: str,
    profile: Profile,
    seed: int = 0,
    retrain: bool = False,
    maps: tuple[str, ...] = ALL_MAPS,
) -> TokenGenerator:
    """A token-wise generator for a model, trained on the dialogues; the model itself stays as it is.

    Args:
        lm: any backbone with a state of a fixed size and a tokenizer.
        source: what to call the model, in the checkpoint's name.
        maps: endings of the maps' names that it changes.
    Raises:
        UserError: unknown profile; no map ends so, or one is too small; no tokenizer; damaged checkpoint; diverged
            training.
    """
    sizes = profile.pretrained
    size = GeneratorSize(sizes.rank, 2 * lm.config.width, maps)
    record = {
        "stage": "token",
        "seed": seed,
        "recipe": RECIPE,
        "data": data_hash(lm.needed_tokenizer(), rich=True),
        "training": asdict(sizes.token_training),
        "generator": asdict(size),
        "lm": lm.fingerprint(),
    }

    def work(generator):
        batch_of = generator_draw(dialogues_of(lm, "train", seed, rich=True), sizes.token_training)
        return batch_of, generator_objective(lm, generator, sizes.token_training, seed)

    called = re.sub(r"[^\w.]+", "-", source).strip("-")
    name = f"{called}-token" + stages.ending(profile)
    plan = stages.Plan(
        name,
        name,
        "generator",
        stages.plain(record),
        lambda: TokenGenerator(lm, size.rank, size.width, size.maps),
        work,
        sizes.token_training,
        seed,
    )
    return stages.obtain(plan, profile, retrain)
