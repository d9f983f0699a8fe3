"""Training on the established tests of memory: the problems of every step, and what is minimised on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import Profile
from prosg_lib.config.sizes import PairTraining
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.problems import Material, ProblemBatch, problem_batch
from prosg_lib.tasks.suite import Setting, settings
from prosg_lib.training.loop import Loss
from prosg_lib.training.objectives import autocast_on

_TEXT_WEIGHT = 0.1  # of the tokens that are not judged: mostly noise that nobody could know


_CARRIED = 0.5  # share of a generator's steps in which the state has read the memory, too


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


def lm_problem_objective(lm: LanguageModel, autocast: bool = False) -> Callable[[int, Mixed], Loss]:
    """Next-token loss over memory and rest in one pass; the judged positions count, the others hardly."""

    def loss_of(step: int, batch: ProblemBatch) -> Loss:
        ids = torch.cat([batch.memory.ids, batch.rest], 1)
        valid = torch.cat([batch.memory.valid, torch.ones_like(batch.judged)], 1)
        with autocast_on(ids.device, autocast):
            hidden, _ = lm.step_through(ids, None, valid)
            answer = _losses(lm, hidden[:, -batch.rest.shape[1] :], batch)
            valid_memory = batch.memory.valid[:, :-1]
            logits = lm.read_out(hidden[:, : valid_memory.shape[1]][valid_memory]).float()
            share = len(batch) / len(batch.whole)
            text = F.cross_entropy(logits, batch.memory.ids[:, 1:][valid_memory]) * share
        return Loss(answer + _TEXT_WEIGHT * text, {"answer": answer, "text": text})

    return _mean(loss_of)


def generator_problem_objective(
    lm: LanguageModel, generator: Generator, seed: int, autocast: bool = False
) -> Callable[[int, Mixed], Loss]:
    """Loss of the judged positions with the memory in the weights, from a blank state or from the memory's."""

    def loss_of(step: int, batch: ProblemBatch) -> Loss:
        carried = random.Random(f"carried/{seed}/{step}").random() < _CARRIED
        with autocast_on(batch.rest.device, autocast):
            delta, state = generator(lm, batch.memory.ids, batch.memory.valid)
            with applied(lm, delta):
                hidden, _ = lm.step_through(batch.rest, state if carried else None, None)
            answer = _losses(lm, hidden, batch)
        return Loss(answer, {"answer": answer})

    return _mean(loss_of)


@dataclass(frozen=True)
class ProblemDraw:
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
        problems = [[cell.problem(self.material, "train", self.seed, n) for n in some] for cell, some in own if some]
        return Mixed(tuple(map(problem_batch, problems)))


def practice(profile: Profile, material: Material) -> dict[str, list[tuple[int, Setting]]]:
    """The cells that are trained on, by test, each with the tokens of a problem of it.

    Raises:
        UserError: none is short enough.
    """
    longest = profile.suite.longest
    cells, _ = settings(profile.suite.practice, material.tokenizer.vocab)
    short: dict[str, list[tuple[int, Setting]]] = {}
    for cell in cells:
        first = cell.problem(material, "train", 0, 0)
        size = len(first.memory) + len(first.rest)
        if size <= longest:
            short.setdefault(first.task, []).append((size, cell))
    if not short:
        raise UserError(f"no test of the profile {profile.name} has at most {longest} tokens to train on")
    return short
