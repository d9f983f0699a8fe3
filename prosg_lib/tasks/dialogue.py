"""The constructed data set: a prompt of facts and instructions, other text, then questions about the prompt.

An item, as text (3 facts, one instruction; the body has exactly the requested number of tokens)::

    User: My home town is Oslo. You should know that my pet is a parrot ... Call me captain.     <- prompt
    Tom's home town is Rome. ... prose ... Q: What is Tom's home town? A: Rome.                   <- body, d tokens
    User: Tell me my home town.                                                                   <- probe
    Bot: Oslo, captain.

`User` speaks in prompt and probes, where the instructions apply. The body has prose, facts about other people that
compete with the user's, and questions about them. Splits differ in wording and in combinations of values
(`tasks.wording`).

Everything follows from a seed; an item is drawn by its number, so any one can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from prosg_lib.errors import UserError
from prosg_lib.tasks import wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.wording import Fact
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.text.prose import ProseTokens, check_split, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
"""Increased whenever the same seed would give different items; checkpoints of another version are not loaded."""

TEXT, ANSWER, COMPETING = 1, 2, 3
"""Kinds of token: text, a word of an answer about the prompt, or of an answer about other people; 0 is padding."""

_RECENT = 4  # a competing question is about one of this many latest competing facts


@dataclass(frozen=True)
class Probe:
    """A question about one fact, and its full answer: the value with the words of the instructions around it."""

    fact: Fact
    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One dialogue. body_kind is TEXT or COMPETING for every token of the body."""

    prompt: str
    facts: tuple[Fact, ...]
    instructions: dict[str, str]
    body: tuple[int, ...]
    body_kind: tuple[int, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of an item: facts and instructions in the prompt, tokens between prompt and probes, number of probes."""

    facts: int
    distance: int
    probes: int
    instructions: int = 0
    prose: float = 0.5  # share of the body's units that are prose

    @property
    def name(self) -> str:
        """Enters the seed of every item, so its characters must never change."""
        sizes = f"facts={self.facts}, distance={self.distance}, probes={self.probes}"
        return f"Shape({sizes}, instructions={self.instructions}, prose={self.prose})"


@dataclass(frozen=True)
class Dialogues:
    """The data set of one split and seed. Items are a pure function of (seed, split, number, shape).

    rich: word prompts and questions in more ways (`reworded`), and count an answer's punctuation as part of it; for the
        training of generators. A model with a delta must keep the form of its answers, which the plain one has.
    """

    tokenizer: Tokenizer
    prose: ProseTokens
    split: str
    seed: int
    rich: bool = False

    def __post_init__(self):
        check_split(self.split)
        if self.rich and self.split != "train":
            raise UserError(f"the {self.split} split has no rich form; rich wording is for training")

    @property
    def name(self) -> str:
        """Enters the seed of the prose that losses are measured on."""
        return self.split

    def item(self, number: int, shape: Shape) -> Item:
        """Item `number` of this shape.

        Raises:
            UserError: an impossible shape (no facts, a negative distance, more probes than facts).
        """
        if shape.distance < 0 or not 0 < shape.probes <= shape.facts:
            raise UserError(f"no item is {shape.name}; the distance is at least 0, and probes are 1 to facts")
        rng = random.Random(f"{VERSION}/{self.seed}/{self.split}/{number}/{shape.name}")
        facts = wording.draw_facts(shape.facts, self.split, rng)
        table = wording.words()["instructions"]
        kinds = rng.sample(sorted(table), min(shape.instructions, len(table)))
        instructions = {kind: rng.choice(table[kind]["words"]) for kind in sorted(kinds)}
        sentences = [self._worded(wording.statement, "statements", f, rng) for f in facts]
        for kind, word in instructions.items():
            frame = rng.choice(table[kind][self.split])
            if self.rich:
                if rng.random() < 0.5:
                    frame = rng.choice(wording.asides()["instructions"][kind])
                frame = wording.introduced(frame, rng)
            sentences.insert(rng.randrange(len(sentences) + 1), frame.format(v=word))
        body, body_kind = self._body(shape, rng)
        probes = tuple(
            Probe(f, self._worded(wording.question, "questions", f, rng), full_answer(f.value, instructions))
            for f in rng.sample(facts, shape.probes)
        )
        return Item("User: " + " ".join(sentences) + "\n", facts, instructions, tuple(body), tuple(body_kind), probes)

    def items(self, count: int, shape: Shape, start: int = 0) -> list[Item]:
        return [self.item(start + i, shape) for i in range(count)]

    def row(self, item: Item) -> dict:
        """An item as texts: a row of `data/dialogue_sample.jsonl`."""
        return {
            "split": self.split,
            "prompt": item.prompt.removesuffix("\n"),
            "body": self.tokenizer.decode(item.body),
            "probes": [{"question": p.question, "answer": p.answer, "value": p.fact.value} for p in item.probes],
            "instructions": item.instructions,
        }

    def _worded(self, sentence: Callable[..., str], kind: str, fact: Fact, rng: random.Random) -> str:
        plain = sentence(fact, None, self.split, rng)
        return wording.reworded(plain, kind, fact, rng) if self.rich else plain

    def _body(self, shape: Shape, rng: random.Random) -> tuple[list[int], list[int]]:
        """`shape.distance` tokens of competing facts, questions about them, and prose, ending with a whole line."""
        encode, ids, kinds = self.tokenizer.encode, [], []
        recent: list[tuple[str, Fact]] = []
        slots = [s for s in wording.words()["slots"] if s != "name"]
        while True:
            answer: tuple[int, ...] = ()
            draw = rng.random()
            if draw < shape.prose:
                unit = (*self.prose.passage(rng.randint(12, 40), rng), *encode("\n"))
            elif draw < shape.prose + (1 - shape.prose) * 0.55 or not recent:
                slot = rng.choice(slots)
                fact = Fact(slot, rng.choice(wording.words()["slots"][slot]["values"]))
                who = rng.choice(wording.words()["others"])
                others = [r for r in recent if (r[0], r[1].slot) != (who, slot)]
                recent = [*others[-_RECENT + 1 :], (who, fact)]
                unit = encode(wording.statement(fact, who, self.split, rng) + "\n")
            else:
                who, fact = rng.choice(recent)
                unit = encode(f"Q: {wording.question(fact, who, self.split, rng)}\n") + encode("A:")
                answer = encode(f" {fact.value}.") + encode("\n")
            if len(ids) + len(unit) + len(answer) > shape.distance:
                break
            ids += [*unit, *answer]
            kinds += [TEXT] * len(unit) + [TEXT if t in self._punctuation else COMPETING for t in answer]
        short = shape.distance - len(ids)
        if short:
            ids += [*self.prose.passage(short, rng)[:-1], *encode("\n")]
            kinds += [TEXT] * short
        return ids, kinds

    # Tokens. Texts are encoded in pieces that the tokenizer remembers; the ids are those of the whole text.

    def encode_prompt(self, item: Item) -> tuple[int, ...]:
        encode = self.tokenizer.encode
        first, *rest = item.prompt.removesuffix("\n").split(". ")
        pieces = [first, *(" " + r for r in rest)]
        ids = [t for p in pieces[:-1] for t in encode(p + ".")]
        return (*ids, *encode(pieces[-1]), *encode("\n"))

    def encode_probe(self, probe: Probe) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the question, up to and including `Bot:`, and of the answer with its end of line."""
        encode = self.tokenizer.encode
        question = encode("User: " + probe.question + "\n") + encode("Bot:")
        return question, encode(" " + probe.answer) + encode("\n")

    def probes_of(self, item: Item) -> tuple[list[int], list[int]]:
        """All probes with their answers, one after the other: token ids, and the kind of each token."""
        ids, kinds = [], []
        text = frozenset() if self.rich else self._punctuation
        for probe in item.probes:
            question, answer = self.encode_probe(probe)
            ids += [*question, *answer]
            kinds += [TEXT] * len(question) + [TEXT if t in text else ANSWER for t in answer]
        return ids, kinds

    @cached_property
    def _punctuation(self) -> frozenset[int]:
        """Tokens that are the same in every answer, and do not count as words of a language model's answer."""
        return frozenset(t for mark in (",", ".", "\n") for t in self.tokenizer.encode(mark))


@dataclass(frozen=True)
class DialogueBatch(Examples):
    """Dialogues as tensors: the prompt, left-padded, and what follows it, right-padded.

    Attributes:
        prompt: (B, P).
        prompt_valid: (B, P), False at the padding.
        rest: body and probes, (B, T).
        kind: (B, T), TEXT, ANSWER or COMPETING; 0 at the padding.
    """

    prompt: Tensor
    prompt_valid: Tensor
    rest: Tensor
    kind: Tensor

    @property
    def context(self) -> Tensor:
        """All that is read before `rest`: here the prompt, (B, P)."""
        return self.prompt

    @property
    def context_valid(self) -> Tensor:
        return self.prompt_valid


def dialogue_batch(data: Dialogues, items: list[Item]) -> DialogueBatch:
    """Items -> one batch."""
    prompts = left_padded([data.encode_prompt(item) for item in items])
    rests, kinds = [], []
    for item in items:
        ids, kind = data.probes_of(item)
        rests.append([*item.body, *ids])
        kinds.append([*item.body_kind, *kind])
    return DialogueBatch(*prompts, right_padded(rests), right_padded(kinds))


def data_hash(tokenizer: Tokenizer, rich: bool = False) -> str:
    """Identifies the data of a checkpoint, except for the prose: tokenizer, words, and how items are drawn.

    The prose in the bodies is the user's (a folder, WikiText, or our own), so it is recorded and not part of the hash.
    """
    digest = hashlib.sha256(f"{VERSION}".encode())
    digest.update(tokenizer.signature().encode())
    digest.update(json.dumps(wording.words(), sort_keys=True).encode())
    if rich:
        digest.update(json.dumps(wording.asides(), sort_keys=True).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def load_dialogues(split: str, seed: int, rich: bool = False, tokenizer: Tokenizer | None = None) -> Dialogues:
    """The data set of a split and seed, with the prose that this machine has; distances count the tokenizer's tokens.

    Args:
        tokenizer: a model's; None: the project's own.
    """
    tokenizer = tokenizer or load_tokenizer()
    return Dialogues(tokenizer, _prose(split, tokenizer), split, seed, rich)


@lru_cache(maxsize=6)
def _prose(split: str, tokenizer: Tokenizer) -> ProseTokens:
    return ProseTokens.of(load_prose(), split, tokenizer)
