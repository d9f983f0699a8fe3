"""Load or train models that can do the established tests of memory (`forgetting`), and what writes into their weights.

A recurrent model that goes on from the dialogues', a transformer of the same width and layers, and for the recurrent
one a token-wise generator and an adapter with a real gradient step. All train on problems of the training split, in the
suite's cells of at most `SuiteSizes.longest` tokens, each test as often as another; the longer cells are asked only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib import processes, stages
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.transformer import new_llama
from prosg_lib.errors import UserError
from prosg_lib.forgetting import Material, Setting, problem_of, settings
from prosg_lib.generator import Generator
from prosg_lib.lowrank import applied
from prosg_lib.objectives import autocast_on
from prosg_lib.pair_stages import ECHOES
from prosg_lib.profiles import get_profile
from prosg_lib.sizes import PairTraining
from prosg_lib.stages import PLENTY, Thrift
from prosg_lib.tasks import mqar
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.problems import VERSION, Problem, ProblemBatch, collate
from prosg_lib.tasks.prose import ProseTokens, load_prose
from prosg_lib.tokenizer import load_tokenizer
from prosg_lib.training import RECIPE, Loss
from prosg_lib.transformer_stages import copying_first

MODELS = {"recurrent": "rwkv4-suite", "transformer": "llama-suite"}
WAYS = ("token", "adapter")
"""What writes the memory into the recurrent model's weights."""

_TEXT_WEIGHT = 0.1  # of the tokens that are not judged: mostly noise that nobody could know
_CARRIED = 0.5  # share of a generator's steps in which the state has read the memory, too


def checkpoint_name(what: str, profile: str) -> str:
    """`rwkv4-suite` is the cpu profile's recurrent model, `rwkv4-suite-token` the generator for it."""
    own = MODELS[what] if what in MODELS else f"{MODELS['recurrent']}-{what}"
    return own + stages.ending(profile)


@dataclass(frozen=True)
class Mixed(Examples):
    """Problems of several tests, each test's of one length; in one table, most of it would be padding."""

    tests: tuple[ProblemBatch, ...]

    def __len__(self) -> int:
        return sum(map(len, self.tests))

    def part(self, start: int, stop: int) -> Self:
        pieces, before = [], 0
        for batch in self.tests:
            own = range(max(start - before, 0), min(stop - before, len(batch)))
            if own:
                pieces.append(batch.part(own.start, own.stop))
            before += len(batch)
        return type(self)(tuple(pieces), source=self.whole, first=self.first + start)

    def to(self, device: torch.device) -> Self:
        return type(self)(tuple(batch.to(device) for batch in self.tests), source=self.whole, first=self.first)


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
        return Mixed(tuple(collate([self.problem(cell, n) for n in some]) for cell, some in own if some))

    def problem(self, cell: Setting, number: int) -> Problem:
        return problem_of(cell, self.material, self.seed, number, "train")


def practice(profile: str, material: Material) -> dict[str, list[tuple[int, Setting]]]:
    """The cells that are trained on, by test, each with the tokens of a problem of it.

    Raises:
        UserError: none is short enough.
    """
    sizes = get_profile(profile)
    cells, _ = settings(sizes.suite.practice, material.tokenizer.vocab)
    short: dict[str, list[tuple[int, Setting]]] = {}
    for cell in cells:
        first = problem_of(cell, material, 0, 0, "train")
        size = len(first.memory) + len(first.rest)
        if size <= sizes.suite.longest:
            short.setdefault(first.task, []).append((size, cell))
    if not short:
        raise UserError(f"no test of profile {profile!r} has at most {sizes.suite.longest} tokens to train on")
    return short


def _draw(profile: str, training: PairTraining, seed: int) -> Draw:
    tokenizer = load_tokenizer()
    material = Material(tokenizer, ProseTokens.of(load_prose(), "train", tokenizer))
    return Draw(practice(profile, material), get_profile(profile).suite.longest, material, training, seed)


def _mean(loss_of: Callable[[int, ProblemBatch], Loss]) -> Callable[[int, Mixed], Loss]:
    """The loss of several tests: the mean of theirs."""

    def mean(step: int, batch: Mixed) -> Loss:
        found = [loss_of(step, test) for test in batch.tests]
        count = len(batch.whole.tests)
        parts = {name: sum(loss.parts[name] for loss in found) / count for name in found[0].parts}
        return Loss(sum(loss.total for loss in found) / count, parts)

    return mean


def _losses(lm: LanguageModel, hidden: Tensor, batch: ProblemBatch) -> Tensor:
    """Cross-entropy at the judged positions of the rest, nats, a part's share of its whole batch's mean."""
    said = lm.read_out(hidden[batch.judged]).float()
    return F.cross_entropy(said, batch.gold[batch.judged], reduction="sum") / batch.whole.judged.sum()


def model_objective(lm: LanguageModel, autocast: bool = False) -> Callable[[int, Mixed], Loss]:
    """Next-token loss over memory and rest in one pass; the judged positions count, the others hardly."""

    def loss_of(step: int, batch: ProblemBatch) -> Loss:
        ids = torch.cat([batch.memory.ids, batch.rest], 1)
        valid = torch.cat([batch.memory.valid, torch.ones_like(batch.judged)], 1)
        with autocast_on(ids.device, autocast):
            hidden, _ = lm.step_through(ids, None, valid)
            answer = _losses(lm, hidden[:, -batch.rest.shape[1] :], batch)
            told = batch.memory.valid[:, :-1]
            logits = lm.read_out(hidden[:, : told.shape[1]][told]).float()
            share = len(batch) / len(batch.whole)
            text = F.cross_entropy(logits, batch.memory.ids[:, 1:][told]) * share
        return Loss(answer + _TEXT_WEIGHT * text, {"answer": answer, "text": text})

    return _mean(loss_of)


def way_objective(lm: LanguageModel, way: Generator, seed: int, autocast: bool = False) -> Callable[[int, Mixed], Loss]:
    """Loss of the judged positions with the memory in the weights, from a blank state or from the memory's."""

    def loss_of(step: int, batch: ProblemBatch) -> Loss:
        carried = random.Random(f"carried/{seed}/{step}").random() < _CARRIED
        with autocast_on(batch.rest.device, autocast):
            delta, state = way(lm, batch.memory.ids, batch.memory.valid)
            with applied(lm, delta):
                hidden, _ = lm.step_through(batch.rest, state if carried else None, None)
            answer = _losses(lm, hidden, batch)
        return Loss(answer, {"answer": answer})

    return _mean(loss_of)


def suite_model(
    backbone: str, profile: str, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
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
    sizes = get_profile(profile)
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
        draw, autocast = _draw(profile, training, seed), processes.bfloat16(sizes.autocast)
        loss_of = model_objective(model, autocast)
        if backbone == "recurrent":
            return draw, loss_of
        model.model.set_attn_implementation("sdpa")  # no second derivative is needed here
        return copying_first(model, training, seed, draw, loss_of)

    plan = _plan(backbone, "lm", profile, seed, record, new, work, thrift)
    return stages.obtain(plan, profile, retrain)


def suite_way(method: str, profile: str, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY) -> nn.Module:
    """What writes a test's memory into the weights of the recurrent model: "token" or "adapter", of the profile's size.

    Raises:
        UserError: unknown method or profile; damaged checkpoint; diverged training; an adapter that is to be trained
            with blocks that are run again.
    """
    if method not in WAYS:
        raise UserError(f"unknown method {method!r}; there are {', '.join(WAYS)}")
    if method == "adapter":
        thrift.for_gradient_step(method)
    sizes = get_profile(profile)
    lm = suite_model("recurrent", profile, seed, retrain, thrift)
    size, training = stages.size_of(method, sizes), getattr(sizes.suite, method)
    record = {"stage": method, "generator": asdict(size), "lm": lm.fingerprint()}

    def work(way):
        return _draw(profile, training, seed), way_objective(lm, way, seed, processes.bfloat16(sizes.autocast))

    def new():
        return stages.new_module(method, size, lm)

    plan = _plan(method, "generator", profile, seed, record, new, work, thrift, lm)
    return stages.obtain(plan, profile, retrain)


def _plan(what, kind, profile, seed, record, new, work, thrift, lm=None) -> stages.Plan:
    sizes = get_profile(profile)
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
