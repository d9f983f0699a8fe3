"""What is minimised: first the language model's loss, then a generator's on the frozen model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.sizes import Curriculum, Training
from prosg_lib.deltas.applying import applied
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT, DialogueBatch, Dialogues, Shape, dialogue_batch
from prosg_lib.tasks.open_world import OpenBatch
from prosg_lib.training.loop import Loss


@dataclass(frozen=True)
class Draw:
    """Step -> batch. The number of facts and the distance are drawn once for a whole batch.

    easy_steps: so many first steps have questions right behind the prompt, and at most `easy_facts` facts.
    instructions: numbers of instructions that prompts are drawn with; a step draws one.
    """

    data: Dialogues
    sizes: Training
    easy_steps: int
    easy_facts: int
    instructions: tuple[int, ...]

    def __call__(self, step: int) -> DialogueBatch:
        rng = random.Random(f"{self.data.seed}/{step}")
        facts, distance = rng.choice(self.sizes.facts), rng.choice(self.sizes.distances)
        if step < self.easy_steps:
            facts, distance = min(facts, self.easy_facts), 0
        shape = Shape(facts, distance, min(facts, 6), instructions=rng.choice(self.instructions))
        return dialogue_batch(self.data, self.data.items(self.sizes.batch, shape, start=step * self.sizes.batch))


def lottery(kind: Tensor, share: float, seed: int) -> Tensor:
    """A random share of the positions, drawn on the CPU so that every device draws the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(kind.shape, generator=generator) < share).to(kind.device)


class Within(NamedTuple):
    """The batch that some rows are a part of: the kinds of all its targets, (B', T), and which rows of it they are."""

    kind: Tensor
    rows: slice


def _drawn(kind: Tensor, share: float, seed: int, within: Within | None) -> tuple[Tensor, dict[int, int]]:
    """Where tokens are read out, (B, T): at all answers, and at a random share of the ordinary text; and how many of
    each kind there are in the whole batch, so that the parts' losses add up to its mean."""
    everything, rows = within or (kind, slice(None))
    chosen = (everything >= ANSWER) | ((everything == TEXT) & lottery(everything, share, seed))
    counts = {k: int((chosen & (everything == k)).sum()) for k in (TEXT, ANSWER, COMPETING)}
    return chosen[rows].to(kind.device), counts


def token_losses(
    lm, hidden: Tensor, targets: Tensor, kind: Tensor, share: float, seed: int, within: Within | None = None
) -> dict[int, Tensor]:
    """Mean cross-entropy by kind of target token, in nats; of some rows of a batch, what they add to its mean.

    Of the ordinary text only a random share is read out: an unbiased mean for a fraction of the softmax.

    Args:
        hidden: (B, T, D); targets: (B, T), the next tokens; kind: (B, T), of the targets.
        within: the batch that these rows are a part of; None: they are all of it.
    """
    chosen, counts = _drawn(kind, share, seed, within)
    losses = F.cross_entropy(lm.read_out(hidden[chosen]).float(), targets[chosen], reduction="none")
    return {k: losses[kind[chosen] == k].sum() / count for k, count in counts.items() if count}


NAMES = {TEXT: "text", ANSWER: "answer", COMPETING: "competing"}


EASY = 0.35
"""Share of the language model's training with few facts and questions right behind them: recall is learned there."""


def lm_draw(data: Dialogues, sizes: Training) -> Draw:
    return Draw(data, sizes, int(EASY * sizes.steps), 4, (0, 1, 1, 2))


def lm_objective(lm: LanguageModel, autocast: bool = False) -> Callable[[int, DialogueBatch | OpenBatch], Loss]:
    """Next-token loss over whole dialogues; the words of answers count more than all the text around them."""

    def loss_of(step: int, batch: DialogueBatch | OpenBatch) -> Loss:
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


def _all_kinds(batch: DialogueBatch | OpenBatch) -> Tensor:
    """The kinds of context and rest, (B, C + T)."""
    return torch.cat([batch.context_valid.long() * TEXT, batch.kind], 1)


USUAL = Curriculum()


def generator_draw(data: Dialogues, sizes: Training, curriculum: Curriculum = USUAL) -> Draw:
    return Draw(data, sizes, int(curriculum.alone * sizes.steps), 24, (0, 1, 2, 2))


def generator_objective(
    lm: LanguageModel,
    generator: Generator,
    sizes: Training,
    seed: int,
    autocast: bool = False,
    curriculum: Curriculum = USUAL,
) -> Callable[[int, DialogueBatch | OpenBatch], Loss]:
    """End to end (V1): loss of the answers, given the change of the weights; the model itself stays frozen.

    First the change alone; then distances and carried states are mixed, with the loss of competing answers and of the
    text; last comes locality, KL(model without the change || with it) on the text: what it could do, it shall still do.
    """

    def loss_of(step: int, batch: DialogueBatch | OpenBatch) -> Loss:
        alone, local = step < int(curriculum.alone * sizes.steps), step >= int(curriculum.local * sizes.steps)
        blank = alone or random.Random(f"blank/{seed}/{step}").random() < curriculum.blank
        ids, targets, kind = batch.rest[:, :-1], batch.rest[:, 1:], batch.kind[:, 1:]
        within = Within(batch.whole.kind[:, 1:], batch.rows)
        with autocast_on(ids.device, autocast):
            delta, start = generator(lm, batch.prompt, batch.prompt_valid)
            if blank:
                start = None
            elif batch.context.shape != batch.prompt.shape:  # the prompt is in mid-text
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


def divergence(
    lm: LanguageModel,
    plain: Tensor,
    hidden: Tensor,
    kind: Tensor,
    share: float,
    seed: int,
    within: Within | None = None,
) -> Tensor:
    """Mean KL(p_plain || p_hidden) of the next token, nats, over a random share of the ordinary text.

    Args:
        as in `token_losses`.
    """
    chosen, counts = _drawn(kind, share, seed, within)
    text = chosen & (kind == TEXT)
    teacher = F.log_softmax(lm.read_out(plain[text]).float(), -1)
    student = F.log_softmax(lm.read_out(hidden[text]).float(), -1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / counts[TEXT]


def autocast_on(device: torch.device, wanted: bool):
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)
