"""What is drawn for a training on the open world: one distribution of examples for everything that is trained.

Language model, generators, controls and rivals draw the same items, step by step, in the same lessons: prompts of few
facts first, then the questions still immediately after the prompt, then all distances. Only a language model begins
with repeated tokens. What is minimised is in `objectives`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from prosg_lib.config.sizes import Curriculum, OpenCurriculum, Training
from prosg_lib.tasks.dialogue import ANSWER
from prosg_lib.tasks.open_world import OpenBatch, OpenWorld, Shape, open_batch

QUESTIONS = 6
"""About the prompt's facts, at most; with as many facts as that or more, exactly so many."""

COPIES = 0.1
"""Share of the language model's steps with random tokens that are repeated. Without them, 1,200 steps of dialogues
taught an RWKV-4 what answers look like, and not to copy: immediately after the prompt it recalled 0.05."""

LESSONS = ((0.2, 2), (0.45, 4))
"""Up to which share of the steps a prompt has at most how many facts."""

COINED, COINED_FROM, FURTHER_FROM = 0.5, 0.5, 0.65
"""Share of the values and slots that are coined, from which share of the steps on; and from which one on there are
further wordings. Of a language model's training these came in when the need was seen. At 0.46 of its steps it recalled
three facts 0.59 with values that it was trained on and 0.32 with others: 8,813 values are few enough to be learned by
heart. So are 44 sentences: at 0.58 it recalled 0.52 in known wordings and 0.22 in others."""

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
        share, level = step / self.sizes.steps, self.data.level
        level = replace(level, coined=COINED if share >= COINED_FROM else 0.0, further=share >= FURTHER_FROM)
        data = replace(self.data, level=level)
        return open_batch(data, data.items(self.sizes.batch, self.shape(step), start=step * self.sizes.batch))

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
    return replace(generator_draw(data, sizes, OpenCurriculum()), copies=int(COPIES * sizes.steps))


def generator_draw(data: OpenWorld, sizes: Training, curriculum: Curriculum) -> OpenDraw:
    lessons = tuple((int(share * sizes.steps), most) for share, most in LESSONS)
    return OpenDraw(data, sizes, int(curriculum.alone * sizes.steps), lessons=lessons)
