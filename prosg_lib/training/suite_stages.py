"""Load or train models that can do the established tests of memory (`forgetting`), and what writes into their weights.

A recurrent model that goes on from the dialogues', a transformer of the same width and layers, and for the recurrent
one a token-wise generator and an adapter with a real gradient step. All train on problems of the training split, in the
suite's cells of at most `SuiteSizes.longest` tokens, each test as often as another; the longer cells are asked only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import PairTraining, Profile
from prosg_lib.errors import UserError
from prosg_lib.tasks import mqar
from prosg_lib.tasks.problems import VERSION, Problem, problem_batch
from prosg_lib.tasks.suite import Material, Setting, problem_of, settings
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import distributed, stages
from prosg_lib.training.loop import RECIPE
from prosg_lib.training.pair_stages import ECHOES
from prosg_lib.training.problem_objectives import Mixed, model_objective, way_objective
from prosg_lib.training.stages import PLENTY, Thrift
from prosg_lib.training.transformer_stages import copying_first

MODELS = {"recurrent": "rwkv4-suite", "transformer": "llama-suite"}


WAYS = ("token", "adapter")
"""What writes the memory into the recurrent model's weights."""


def checkpoint_name(what: str, profile: Profile) -> str:
    """`rwkv4-suite` is the cpu profile's recurrent model, `rwkv4-suite-token` the generator for it."""
    own = MODELS[what] if what in MODELS else f"{MODELS['recurrent']}-{what}"
    return own + stages.ending(profile)


@dataclass(frozen=True)
class Draw:
    """Step -> problems of all tests, training split; a cell of each.

    The first steps have the shortest cells alone, and half-way through the training there are all of them: with long
    ones from the start nothing was looked up after half of it.

    Attributes:
        cells: by test, each with the tokens of a problem of it.
        longest: tokens that a problem has at most; training: its steps, and problems a step.
    """

    cells: Mapping[str, Sequence[tuple[int, Setting]]]
    longest: int
    material: Material
    training: PairTraining
    seed: int

    def __call__(self, step: int) -> Mixed:
        rng = random.Random(f"suite/{self.seed}/{step}")
        shortest = min(size for cells in self.cells.values() for size, _ in cells)
        room = shortest + (self.longest - shortest) * min(1.0, 2 * step / self.training.steps)
        fitting = {test: [cell for size, cell in cells if size <= room] for test, cells in self.cells.items()}
        found = [rng.choice(cells) for _, cells in sorted(fitting.items()) if cells]
        numbers = range(step * self.training.batch, (step + 1) * self.training.batch)
        # A small batch has not all tests in it; later steps have the others.
        own = [(cell, numbers[n :: len(found)]) for n, cell in enumerate(rng.sample(found, len(found)))]
        return Mixed(tuple(problem_batch([self.problem(cell, n) for n in some]) for cell, some in own if some))

    def problem(self, cell: Setting, number: int) -> Problem:
        return problem_of(cell, self.material, self.seed, number, "train")


def practice(profile: Profile, material: Material) -> dict[str, list[tuple[int, Setting]]]:
    """The cells that are trained on, by test, each with the tokens of a problem of it.

    Raises:
        UserError: none is short enough.
    """
    sizes = profile
    cells, _ = settings(sizes.suite.practice, material.tokenizer.vocab)
    short: dict[str, list[tuple[int, Setting]]] = {}
    for cell in cells:
        first = problem_of(cell, material, 0, 0, "train")
        size = len(first.memory) + len(first.rest)
        if size <= sizes.suite.longest:
            short.setdefault(first.task, []).append((size, cell))
    if not short:
        raise UserError(f"no test of profile {profile.name!r} has at most {sizes.suite.longest} tokens to train on")
    return short


def _draw(profile: Profile, training: PairTraining, seed: int) -> Draw:
    tokenizer = load_tokenizer()
    material = Material(tokenizer, ProseTokens.of(load_prose(), "train", tokenizer))
    return Draw(practice(profile, material), profile.suite.longest, material, training, seed)


def suite_model(
    backbone: str, profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> LanguageModel:
    """A language model that knows the tests when it has read the memory.

    Args:
        backbone: "recurrent" goes on from the dialogues' RWKV-4; "transformer" starts from nothing, with random tokens
            said twice.
        retrain, thrift: as in `stages.load_or_train`.
    Raises:
        UserError: unknown backbone or profile; damaged checkpoint; diverged training.
    """
    if backbone not in MODELS:
        raise UserError(f"unknown backbone {backbone!r}; there are {', '.join(MODELS)}")
    sizes = profile
    training = getattr(sizes.suite, backbone)
    if backbone == "recurrent":
        before = stages.load_or_train("lm", profile, seed, retrain, thrift)
        record = {"model": asdict(before.config), "lm": before.fingerprint()}

        def new():
            model = RWKV4(before.config)
            model.load_state_dict(before.state_dict())
            return model

    else:
        size = sizes.pairs.transformer_size
        record = {"model": asdict(size), "echoes": ECHOES}

        def new():
            return new_llama(size)

    def work(model):
        model.tokenizer = load_tokenizer()
        draw, autocast = _draw(profile, training, seed), distributed.bfloat16(sizes.autocast)
        loss_of = model_objective(model, autocast)
        if backbone == "recurrent":
            return draw, loss_of
        model.model.set_attn_implementation("sdpa")  # no second derivative is needed here
        return copying_first(model, training, seed, draw, loss_of)

    plan = _plan(backbone, "lm", profile, seed, record, new, work, thrift)
    return stages.obtain(plan, profile, retrain)


def suite_way(
    method: str, profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> nn.Module:
    """What writes a test's memory into the weights of the recurrent model: "token" or "adapter", of the profile's size.

    Raises:
        UserError: unknown method or profile; damaged checkpoint; diverged training; an adapter that is to be trained
            with blocks that are run again.
    """
    if method not in WAYS:
        raise UserError(f"unknown method {method!r}; there are {', '.join(WAYS)}")
    if method == "adapter":
        thrift.for_gradient_step(method)
    sizes = profile
    lm = suite_model("recurrent", profile, seed, retrain, thrift)
    size, training = stages.size_of(method, sizes), getattr(sizes.suite, method)
    record = {"stage": method, "generator": asdict(size), "lm": lm.fingerprint()}

    def work(way):
        return _draw(profile, training, seed), way_objective(lm, way, seed, distributed.bfloat16(sizes.autocast))

    def new():
        return stages.new_module(method, size, lm)

    plan = _plan(method, "generator", profile, seed, record, new, work, thrift, lm)
    return stages.obtain(plan, profile, retrain)


def _plan(what, kind, profile, seed, record, new, work, thrift, lm=None) -> stages.Plan:
    sizes = profile
    label, training = f"suite {what}", getattr(sizes.suite, what)
    data = {
        "problems": VERSION,
        "mqar": mqar.VOCAB,
        "cells": sizes.suite.practice.cells,
        "longest": sizes.suite.longest,
    }
    record = {"stage": label, "seed": seed, "recipe": RECIPE, "data": data, "training": asdict(training)} | record
    name = checkpoint_name(what, profile)
    return stages.Plan(label, name, kind, stages.plain(record), new, work, training, seed, lm, thrift)
