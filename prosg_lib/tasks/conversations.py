"""Texts and questions about them, as conversations with a model that others trained, in its own chat format.

Open-world dialogues, passages with questions, sentences to complete, prompts as people write them: each becomes a
`Conversation`, a prompt and questions that are asked one by one::

    prompt:    <|im_start|>user
               My dentist is Fadin and Tom's gate is K27.<|im_end|>
    question:  <|im_start|>user
               Who is my dentist?<|im_end|>
               <|im_start|>assistant
    answer:    Fadin.<|im_end|>

Glossary of shapes: B prompts, P tokens of a prompt, Q questions each, T tokens of a question and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.open_world import OpenWorld, Shape, natural_prompts
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.chat_template import BEGUN, format_of
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.text.tokenizer import Tokenizer

VERSION = 1
"""Increased whenever the same seed would give different conversations."""

COINED = 0.5
"""Share of the values and slots that are coined, so that answers are copied and not learned by heart."""


@dataclass(frozen=True)
class Question:
    """answers: right ones, of which any will do; the first is what is trained on."""

    text: str
    answers: tuple[str, ...]
    kind: str = "fact"


@dataclass(frozen=True)
class Conversation:
    """A prompt, and questions about it."""

    prompt: str
    questions: tuple[Question, ...]


# Sources


def of_open_world(data: OpenWorld, number: int, shape: Shape) -> Conversation:
    """An open-world dialogue without its body: facts, instructions, updates, and what was never said."""
    item = data.item(number, shape)
    text = item.prompt.removeprefix("User: ").removesuffix("\n")
    return Conversation(text, tuple(Question(p.question, (p.answer,), p.kind) for p in item.probes))


def of_pairs(pairs: Iterable[Pair]) -> list[Conversation]:
    """Pairs about the same context, which stand together, as one conversation."""
    return [
        Conversation(context, tuple(Question(_asked(p), (f"{p.answer}.", *getattr(p, "answers", ()))) for p in about))
        for context, about in groupby(pairs, lambda pair: pair.context)
    ]


def _asked(pair: Pair) -> str:
    return pair.query.removeprefix("Question: ").removesuffix("\nAnswer:")


def of_people(split: str) -> list[Conversation]:
    """The prompts without templates, `data/natural_prompts.jsonl`."""
    return [
        Conversation(
            row["text"],
            tuple(Question(q["question"], (q["answer"], *q["accept"])) for q in row["questions"]),
        )
        for row in natural_prompts(split)
    ]


# The format


def prompt_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of a prompt, as a generator reads it."""
    form = format_of(tokenizer)
    return tokenizer.encode(form.remembered(text, more=False) + form.remembered_end)


def question_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Token ids of a question, up to where its answer begins."""
    return tokenizer.encode(format_of(tokenizer).question(text, BEGUN))


def answer_ids(tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
    """Token ids of an answer, with what ends it."""
    form = format_of(tokenizer)
    return tokenizer.encode(form.answered("", ("" if form.space else " ") + answer, BEGUN))


# Batches


@dataclass(frozen=True)
class ConversationBatch(Examples):
    """Conversations as tensors.

    Attributes:
        prompt, valid: (B, P), left-padded; valid is False at the padding.
        turns: (B, Q, T), each question with its answer, right-padded with zeros.
        answer: (B, Q, T), True at the tokens of answers; nowhere in a row that has no question.
        prose: (B, L), passages to which the prompts have nothing to say.
    """

    prompt: Tensor
    valid: Tensor
    turns: Tensor
    answer: Tensor
    prose: Tensor


def conversation_batch(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], prose: Sequence[Sequence[int]]
) -> ConversationBatch:
    """Conversations -> one batch; every prompt has as many rows of questions as the one with most."""
    most = max(len(c.questions) for c in conversations)
    turns, answers = [], []
    for conversation in conversations:
        for question in conversation.questions:
            asked, said = question_ids(tokenizer, question.text), answer_ids(tokenizer, question.answers[0])
            turns.append([*asked, *said])
            answers.append([*[0] * len(asked), *[1] * len(said)])
        for rows in (turns, answers):
            rows += [[] for _ in range(most - len(conversation.questions))]
    prompt = left_padded([prompt_ids(tokenizer, c.prompt) for c in conversations])
    shape = len(conversations), most, -1
    return ConversationBatch(
        *prompt, right_padded(turns).view(shape), right_padded(answers).view(shape).bool(), torch.tensor(prose)
    )


@dataclass(frozen=True)
class ConversationDraw:
    """Step -> batch. The kind of conversation, and how much an open-world prompt says, are drawn once a step.

    Attributes:
        sources: conversations by kind, beside those of the open world.
        turns: the order of the kinds; "open" is the open world.
        facts: numbers of facts of an open-world prompt, of which a step draws one.
        easy: number of first steps whose prompts state at most two facts and nothing else.
        questions: Q, at most.
        longest: tokens that a prompt and the longest of its turns have together, at most: what the window holds.
        passage: L.
    """

    world: OpenWorld
    sources: dict[str, Sequence[Conversation]]
    turns: tuple[str, ...]
    batch: int
    facts: tuple[int, ...]
    easy: int
    questions: int
    longest: int
    passage: int
    seed: int

    def __call__(self, step: int) -> ConversationBatch:
        rng = random.Random(f"{VERSION}/{self.seed}/{step}")
        kind = "open" if step < self.easy else self.turns[step % len(self.turns)]
        draw = self._open(step, rng) if kind == "open" else lambda _: rng.choice(self.sources[kind])
        found: list[Conversation] = []
        number = 0
        while len(found) < self.batch:
            drawn = draw(number)
            asked = rng.sample(drawn.questions, min(self.questions, len(drawn.questions)))
            number += 1
            if self._fits(drawn := replace(drawn, questions=tuple(asked))):
                found.append(drawn)
        prose = [self.world.prose.passage(self.passage, rng) for _ in found]
        return conversation_batch(self.world.tokenizer, found, prose)

    def _open(self, step: int, rng: random.Random) -> Callable[[int], Conversation]:
        level = replace(self.world.level, coined=COINED, further=True)
        world, facts = replace(self.world, level=level), rng.choice(self.facts)
        shape = Shape(
            facts,
            0,
            probes=facts,
            others=rng.choice((0, 1, 2)),
            unknown=rng.choice((0, 1, 1)),
            instructions=rng.choice((0, 0, 1)),
            updates=min(rng.choice((0, 0, 1)), facts),
        )
        if step < self.easy:
            shape = Shape(rng.choice((1, 2)), 0, 1)
        first = step * 4 * self.batch  # enough numbers, even if some prompts are too long
        return lambda number: of_open_world(world, first + number, shape)

    def _fits(self, drawn: Conversation) -> bool:
        tokenizer = self.world.tokenizer
        turns = (
            len(question_ids(tokenizer, q.text)) + len(answer_ids(tokenizer, q.answers[0])) for q in drawn.questions
        )
        return len(prompt_ids(tokenizer, drawn.prompt)) + max(turns) <= self.longest
