"""What is minimised on the dialogues of the open world: one distribution of examples for everything that is trained.

Language model, generators, controls and rivals draw items from the same numbers. Only the first steps have other sizes:
the language model's prompts have few facts, the generators' questions stand immediately behind the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.sizes import Curriculum, Training
from prosg_lib.deltas.applying import applied
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT
from prosg_lib.tasks.open_world import OpenBatch, OpenWorld, Shape, open_batch
from prosg_lib.training.loop import Loss
from prosg_lib.training.objectives import NAMES, Within, autocast_on, divergence, token_losses

QUESTIONS = 6
"""About the prompt's facts, at most; with as many facts as that or more, exactly so many."""

COPIES = 0.2
"""Share of the language model's steps with random tokens that are repeated. Without them, 1,200 steps of dialogues
taught an RWKV-4 what answers look like, and not to copy: immediately after the prompt it recalled 0.05."""

LESSONS = ((0.3, 2), (0.5, 4))
"""Then: up to which share of its steps a prompt has at most how many facts, immediately before the questions."""

_SHORT, _LONG = (2, 3, 5), (3, 5, 8, 12)  # lengths of what is repeated, in the first and second half of these steps


@dataclass(frozen=True)
class OpenDraw:
    """Step -> batch. Sizes are drawn once for a whole batch.

    Attributes:
        near: so many first steps have questions immediately behind the prompt.
        copies: so many first steps have random tokens, which are repeated, in the place of dialogues.
        lessons: (first steps, most facts in them), ascending; in the first one a prompt states facts of the user's and
            nothing else.
    """

    data: OpenWorld
    sizes: Training
    near: int
    copies: int = 0
    lessons: tuple[tuple[int, int], ...] = ()

    def __call__(self, step: int) -> OpenBatch:
        if 0 <= step < self.copies:
            return self._copies(step)
        shape = self.shape(step)
        return open_batch(self.data, self.data.items(self.sizes.batch, shape, start=step * self.sizes.batch))

    def _copies(self, step: int) -> OpenBatch:
        """Random tokens, and the same again: only what is repeated counts."""
        rng, vocab = random.Random(f"{self.data.seed}/copies/{step}"), self.data.tokenizer.vocab
        length = rng.choice(_SHORT if step < self.copies // 2 else _LONG)
        ids = torch.tensor([rng.choices(range(vocab), k=length) for _ in range(self.sizes.batch)])
        first, valid = ids[:, :1], torch.ones(len(ids), 1, dtype=torch.bool)
        kind = torch.full((len(ids), 2 * length - 1), ANSWER)
        kind[:, : length - 1] = 0
        return OpenBatch(first, valid, first, valid, torch.cat([ids[:, 1:], ids], 1), kind)

    def shape(self, step: int) -> Shape:
        rng = random.Random(f"{self.data.seed}/{step}")
        facts, distance = rng.choice(self.sizes.facts), rng.choice(self.sizes.distances)
        facts = min(facts, len(self.data.level.slots()) - 2)
        before = rng.choice((0, 0, 32, 128))
        if step < self.near:
            distance = before = 0
        if most := next((most for steps, most in self.lessons if step < steps), None):
            facts = min(facts, rng.randint(1, most))
        if self.lessons and step < self.lessons[0][0]:
            return Shape(facts, distance, facts)
        return Shape(
            facts,
            distance,
            probes=min(facts, QUESTIONS),
            others=rng.choice((0, 1, 2)),
            before=before,
            unknown=rng.choice((0, 1, 1)),
            instructions=rng.choice((0, 1, 1, 2)),
            updates=min(rng.choice((0, 0, 1, 2)), facts),
            query=distance >= 64 and rng.random() < 0.3,
        )


def lm_draw(data: OpenWorld, sizes: Training) -> OpenDraw:
    lessons = tuple((int(share * sizes.steps), most) for share, most in LESSONS)
    return OpenDraw(data, sizes, lessons[-1][0], int(COPIES * sizes.steps), lessons)


def lm_objective(lm: LanguageModel, autocast: bool = False) -> Callable[[int, OpenBatch], Loss]:
    """Next-token loss over whole dialogues; the words of answers count more than all the text around them."""

    def loss_of(step: int, batch: OpenBatch) -> Loss:
        ids, kind = torch.cat([batch.context, batch.rest], 1), _all_kinds(batch)
        valid = torch.cat([batch.context_valid, torch.ones_like(batch.rest, dtype=torch.bool)], 1)
        with autocast_on(ids.device, autocast):
            hidden, _ = lm.step_through(ids[:, :-1], None, valid[:, :-1])
            within = Within(_all_kinds(batch.whole)[:, 1:], batch.rows)
            losses = token_losses(lm, hidden, ids[:, 1:], kind[:, 1:], 0.3, step, within)
        weights = {TEXT: 0.3, ANSWER: 1.0, COMPETING: 0.5}
        total = sum(weights[k] * v for k, v in losses.items())
        return Loss(total, {NAMES[k]: v for k, v in losses.items()})

    return loss_of


def _all_kinds(batch: OpenBatch) -> Tensor:
    """The kinds of context and rest, (B, C + T)."""
    return torch.cat([batch.context_valid.long() * TEXT, batch.kind], 1)


def generator_draw(data: OpenWorld, sizes: Training, curriculum: Curriculum) -> OpenDraw:
    return OpenDraw(data, sizes, int(curriculum.alone * sizes.steps))


def generator_objective(
    lm: LanguageModel,
    generator: Generator,
    seed: int,
    sizes: Training,
    curriculum: Curriculum,
    autocast: bool = False,
) -> Callable[[int, OpenBatch], Loss]:
    """End to end (V1): loss of the answers, given the change of the weights; the model itself stays frozen.

    First the change alone; then distances and carried states are mixed, with the loss of competing answers and of the
    text; last comes locality, KL(model without the change || with it) on the text: what it could do, it shall still do.
    """

    def loss_of(step: int, batch: OpenBatch) -> Loss:
        alone, local = step < int(curriculum.alone * sizes.steps), step >= int(curriculum.local * sizes.steps)
        blank = alone or random.Random(f"blank/{seed}/{step}").random() < curriculum.blank
        ids, targets, kind = batch.rest[:, :-1], batch.rest[:, 1:], batch.kind[:, 1:]
        within = Within(batch.whole.kind[:, 1:], batch.rows)
        with autocast_on(ids.device, autocast):
            delta, start = generator(lm, batch.prompt, batch.prompt_valid)
            if blank:
                start = None
            elif batch.context.shape[1] > batch.prompt.shape[1]:  # the prompt is in mid-text
                with torch.no_grad():
                    _, start = lm.step_through(batch.context, None, batch.context_valid)
            with applied(lm, delta):
                hidden, _ = lm.step_through(ids, start)
            losses = token_losses(lm, hidden, targets, kind, 0.3, step, within)
            parts = {NAMES[k]: v for k, v in losses.items()}
            if local:
                with torch.no_grad():
                    plain, _ = lm.step_through(ids, start)
                parts["locality"] = divergence(lm, plain, hidden, kind, 0.3, step, within)
        weights = {ANSWER: 1.0} if alone else {TEXT: 0.5, ANSWER: 1.0, COMPETING: 1.0}
        total = sum(weight * losses[k] for k, weight in weights.items() if k in losses)
        return Loss(total + curriculum.locality * parts["locality"] if local else total, parts)

    return loss_of
