"""Texts and questions about them, for a model that others trained: what its window has lost, it is asked about.

Open-world dialogues, passages with questions, sentences to complete, prompts as people write them: each becomes a
`Conversation`, a prompt and questions that are asked one by one. There are two forms. `READING` is the one in which
SmolLM2 answers best with the prompt in front of it (docs/smollm2.md has the comparison)::

    prompt:    Text: My dentist is Fadin and Tom's gate is K27.
    question:  Question: Who is my dentist?
               Answer:
    answer:     Fadin

and `chat` is the model's own chat template, in which people talk to it::

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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby

import torch
from torch import Tensor

from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.tasks import open_wording as wording
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.open_world import OpenWorld, Shape, load_open_world, natural_prompts
from prosg_lib.tasks.pair_sources import pairs_of
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.chat_template import BEGUN, format_of
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.text.prose import ProseTokens
from prosg_lib.text.tokenizer import Tokenizer

VERSION = 2
"""Increased whenever the same seed would give different conversations."""

COINED = 0.5
"""Share of the values and slots that are coined, so that answers are copied and not learned by heart."""

UNANSWERABLE = 0.1
"""Share of the open-world prompts of which something is asked that they do not say. With two thirds a generator learned
to say so of everything."""

_ATTEMPTS = 100  # draws for each prompt of a batch
_CHOICE = 4  # times as many prompts as a batch has are drawn, and those of about the same length are taken together


@dataclass(frozen=True)
class Question:
    """answers: right ones, of which any will do; the first is what is trained on."""

    text: str
    answers: tuple[str, ...]
    kind: str = "fact"


@dataclass(frozen=True)
class Conversation:
    """A prompt, and questions about it.

    Attributes:
        values: strings in all of these texts that any other of their kind (of `open_values.json`) could stand for.
    """

    prompt: str
    questions: tuple[Question, ...]
    values: Mapping[str, str] = field(default_factory=dict)


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
            {swapped["value"]: swapped["kind"] for swapped in row["values"]},
        )
        for row in natural_prompts(split)
    ]


def retold(said: Conversation, rng: random.Random) -> Conversation:
    """The same with another of the training's values in the place of each of its own, so that it has to be read."""
    if not said.values:
        return said
    others = {own: rng.choice(wording.values()[kind]["train"]) for own, kind in said.values.items()}
    longest_first = sorted(others, key=len, reverse=True)
    any_value = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")

    def told(text: str) -> str:
        return any_value.sub(lambda found: others[found[0]], text)

    questions = (replace(q, text=told(q.text), answers=tuple(map(told, q.answers))) for q in said.questions)
    return Conversation(told(said.prompt), tuple(questions))


SOURCES = ("natural", "known", "values", "slots", "all", "passages")
"""What can be asked about: prompts as people write them; open-world dialogues by what is new in them
(`open_wording.LEVELS`); passages with SQuAD's questions."""

_FACTS = 5  # that an open-world prompt states, all of them asked about


def load(source: str, split: str, tokenizer: Tokenizer, profile: Profile) -> Iterator[Conversation]:
    """Conversations of one of `SOURCES`, in a fixed order; those of the open world do not end.

    Raises:
        UserError: unknown source, or this machine does not have its data.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; there are {', '.join(SOURCES)}")
    if source == "natural":
        return iter(of_people(split))
    if source == "passages":
        return iter(of_pairs(pairs_of("squad", split, profile, tokenizer).pairs))
    data = load_open_world(source, split, 0, tokenizer)
    return (of_open_world(data, number, Shape(_FACTS, 0, _FACTS)) for number in count())


# Forms


@dataclass(frozen=True)
class Form:
    """How a prompt, a question up to where its answer begins, and an answer with what ends it are written down.

    opening: examples that the plain model needs in front, to answer in this form; "" where they do not help.
    """

    prompt: Callable[[str], str]
    question: Callable[[str], str]
    answer: Callable[[str], str]
    opening: str = ""


READING = Form(
    lambda text: f"Text: {text}\n",
    lambda text: f"Question: {text}\nAnswer:",
    lambda text: f" {text.removesuffix('.')}\n",
    "Text: My bus is the 42 and my cat Mia is afraid of dogs.\n"
    "Question: What is my cat called?\nAnswer: Mia\nQuestion: Which bus do I take?\nAnswer: 42\n\n"
    "Text: You help at Bellows, a shoe shop. We close at half past five.\n"
    "Question: When do you close?\nAnswer: half past five\n\n",
)


def chat(tokenizer: Tokenizer) -> Form:
    """The form of the model's files, as `chat.Chat` writes it; where they have none, that of the dialogues."""
    written = format_of(tokenizer)
    lead = "" if written.space else " "
    return Form(
        lambda text: written.remembered(text, more=False) + written.remembered_end,
        lambda text: written.question(text, BEGUN),
        lambda text: written.answered("", lead + text, BEGUN),
    )


def fits(said: Conversation, tokenizer: Tokenizer, form: Form, room: int) -> bool:
    """Whether the prompt and any one of its questions, answered, are at most so many tokens."""
    encode = tokenizer.encode
    turns = (len(encode(form.question(q.text))) + len(encode(form.answer(q.answers[0]))) for q in said.questions)
    return len(encode(form.prompt(said.prompt))) + max(turns) <= room


# Batches


@dataclass(frozen=True)
class ConversationBatch(Examples):
    """Conversations as tensors.

    Attributes:
        prompt, valid: (B, P), left-padded; valid is False at the padding.
        turns: (B, Q, T), each question with its answer, right-padded with zeros.
        answer: (B, Q, T), True at the tokens of answers; nowhere in a row that has no question.
        prose: (B, L), passages of prose or conversation, to which the prompts have nothing to say.
        opening: (B, E), what a teacher reads in front of the prompt; no tokens where there is no teacher.
    """

    prompt: Tensor
    valid: Tensor
    turns: Tensor
    answer: Tensor
    prose: Tensor
    opening: Tensor


def conversation_batch(
    tokenizer: Tokenizer, form: Form, conversations: Sequence[Conversation], prose: Sequence[Sequence[int]]
) -> ConversationBatch:
    """Conversations -> one batch; every prompt has as many rows of questions as the one with most."""
    most = max(len(c.questions) for c in conversations)
    turns, answers = [], []
    for conversation in conversations:
        for question in conversation.questions:
            asked = tokenizer.encode(form.question(question.text))
            said = tokenizer.encode(form.answer(question.answers[0]))
            turns.append([*asked, *said])
            answers.append([*[0] * len(asked), *[1] * len(said)])
        for rows in (turns, answers):
            rows += [[] for _ in range(most - len(conversation.questions))]
    prompt = left_padded([tokenizer.encode(form.prompt(c.prompt)) for c in conversations])
    shape = len(conversations), most, -1
    opening = torch.tensor(tokenizer.encode(form.opening), dtype=torch.long).expand(len(conversations), -1)
    return ConversationBatch(
        *prompt, right_padded(turns).view(shape), right_padded(answers).view(shape).bool(), torch.tensor(prose), opening
    )


@dataclass(frozen=True)
class ConversationDraw:
    """Step -> batch. The kind of conversation, its form, and how much an open-world prompt says are drawn once a step.

    Attributes:
        sources: conversations by kind, beside those of the open world.
        turns: the order of the kinds, of which each has two steps; "open" is the open world.
        forms: of which a step draws one.
        facts: numbers of facts of an open-world prompt, of which a step draws one.
        easy: number of first steps whose prompts state at most two facts and nothing else.
        questions: Q, at most.
        longest: tokens that a prompt and the longest of its turns have together, at most: what the window holds.
        passage: L.
        talk: real conversations, of which every second passage is then; None: all passages are prose.
    """

    world: OpenWorld
    sources: dict[str, Sequence[Conversation]]
    turns: tuple[str, ...]
    forms: tuple[Form, ...]
    batch: int
    facts: tuple[int, ...]
    easy: int
    questions: int
    longest: int
    passage: int
    seed: int
    talk: ProseTokens | None = None

    def __call__(self, step: int) -> ConversationBatch:
        rng = random.Random(f"{VERSION}/{self.seed}/{step}")
        kind = "open" if step < self.easy else self.turns[step // 2 % len(self.turns)]
        draw = self._open(step, rng) if kind == "open" else lambda _: self._chosen(kind, rng)
        form, found, number = rng.choice(self.forms), [], 0
        many = 1 if kind == "open" else _CHOICE
        while len(found) < many * self.batch:
            if number > _ATTEMPTS * self.batch:
                raise UserError(
                    f"hardly any prompt of kind {kind!r} fits into {self.longest} tokens with its questions; load the "
                    "model with a larger window"
                )
            drawn = draw(number)
            asked = rng.sample(drawn.questions, min(self.questions, len(drawn.questions)))
            number += 1
            drawn = replace(drawn, questions=tuple(asked))
            if fits(drawn, self.world.tokenizer, form, self.longest):
                found.append(drawn)
        begin = rng.randrange(len(found) - self.batch + 1)
        found = sorted(found, key=lambda one: len(one.prompt))[begin : begin + self.batch]
        texts = [self.world.prose, self.talk or self.world.prose]
        prose = [texts[i % 2].passage(self.passage, rng) for i in range(len(found))]
        return conversation_batch(self.world.tokenizer, form, found, prose)

    def _chosen(self, kind: str, rng: random.Random) -> Conversation:
        said = rng.choice(self.sources[kind])
        return retold(said, rng) if rng.random() < COINED else said

    def _open(self, step: int, rng: random.Random) -> Callable[[int], Conversation]:
        level = replace(self.world.level, coined=COINED, further=True)
        world, facts = replace(self.world, level=level), rng.choice(self.facts)
        shape = Shape(
            facts,
            0,
            probes=facts,
            others=rng.choice((0, 1, 2)),
            unknown=int(rng.random() < UNANSWERABLE),
            instructions=rng.choice((0, 0, 1)),
            updates=min(rng.choice((0, 0, 1)), facts),
        )
        if step < self.easy:
            shape = Shape(rng.choice((1, 2)), 0, 1)
        first = step * 4 * self.batch  # enough numbers, even if some prompts are too long
        return lambda number: of_open_world(world, first + number, shape)
