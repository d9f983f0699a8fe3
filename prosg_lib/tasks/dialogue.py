"""The constructed data set: a prompt of facts and instructions, other text, then questions about the prompt.

An item, as text (K = 3 facts, one instruction; the body is cut to exactly the distance asked for)::

    User: My home town is Oslo. You should know that my pet is a parrot ... Call me captain.     <- prompt
    Tom's home town is Rome. ... prose ... Q: What is Tom's home town? A: Rome.                   <- body, d tokens
    User: Tell me my home town.                                                                   <- probe
    Bot: Oslo, captain.

`User` speaks in prompt and probes, where the instructions apply; the body has facts about other people that compete
with the user's, questions about them, and prose. Splits differ in wording (each has frames of its own) and in values:
every slot's 16 values fall in three classes, a prompt of the validation or test split holds three facts of its class,
and no training prompt holds more than two, so that no three of them ever met in training.

Everything follows from a seed; items are drawn by number, so any of them can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.examples import Examples
from prosg_lib.text.prose import SPLITS, ProseTokens
from prosg_lib.text.tokenizer import Tokenizer

VERSION = 1
"""Goes up when the same seed would give other items; checkpoints of another version are not loaded."""

TEXT, ANSWER, COMPETING = 1, 2, 3
"""What a token counts as: text, a word of an answer about the prompt, or of one about other people; 0: padding."""

_OWN_CLASS = 3  # facts of the split's own value class in a validation or test prompt
_RECENT = 4  # a competing question is about one of the last so many competing facts


@dataclass(frozen=True)
class Fact:
    slot: str
    value: str


@dataclass(frozen=True)
class Probe:
    """A question about one fact, and its answer in full: opener, value, address and closer as instructed."""

    fact: Fact
    question: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One dialogue. body_kind says for every body token whether it is TEXT or a COMPETING answer."""

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


@lru_cache(maxsize=1)
def words() -> dict:
    """Slots, values, instructions, frames and names: `data/dialogue_words.json`."""
    return json.loads((data_dir() / "dialogue_words.json").read_text(encoding="utf-8"))


CLASSES = ("common", "common", "validation", "test")
"""A slot's values belong to these in turn: 8 are common, 4 each are held out from meeting in training."""


@cache
def values_of(slot: str, kind: str) -> tuple[str, ...]:
    """A slot's values of one class."""
    return tuple(v for i, v in enumerate(words()["slots"][slot]["values"]) if CLASSES[i % len(CLASSES)] == kind)


def draw_facts(count: int, split: str, rng: random.Random) -> tuple[Fact, ...]:
    """Facts about different slots, their values drawn by class as the split demands."""
    slots = list(words()["slots"])
    if not 1 <= count <= len(slots):
        raise UserError(f"{count} facts asked for; a prompt holds 1 to {len(slots)}")
    # Training sees the held-out values too, two of each class at most; the other splits bring three of their own.
    quota = {"test": 2, "validation": 2} if split == "train" else {split: _OWN_CLASS}
    classes = [c for c, n in quota.items() for _ in range(n)]
    if split == "train":
        classes += ["common"] * max(0, 6 - len(classes))
        rng.shuffle(classes)
    classes = (classes + ["common"] * count)[:count]
    rng.shuffle(classes)
    facts = []
    for slot, kind in zip(rng.sample(slots, count), classes, strict=True):
        facts.append(Fact(slot, rng.choice(values_of(slot, kind))))
    return tuple(facts)


def statement(fact: Fact, who: str | None, split: str, rng: random.Random) -> str:
    """A sentence that says the fact of the user (who = None) or of somebody else."""
    spec = words()["slots"][fact.slot]
    verbs = spec["verbs"] if split == "train" else [spec["held_out_verbs"][split]]
    if rng.random() < 0.3:
        verb = rng.choice(verbs)
        return f"I {verb[0]} {fact.value}." if who is None else f"{who} {verb[1]} {fact.value}."
    return rng.choice(words()["frames"]["statements"][split]).format_map(_names(fact, who))


@lru_cache(maxsize=1)
def asides() -> dict:
    """More wording for training only: `data/dialogue_asides.json`."""
    return json.loads((data_dir() / "dialogue_asides.json").read_text(encoding="utf-8"))


def reworded(sentence: str, kind: str, fact: Fact, rng: random.Random) -> str:
    """A sentence about the user in other words: another frame or any slot's verb, some with an aside before or behind.

    A generator that has seen few wordings learns them by heart, and writes nothing for the next one; the language
    model has not seen these, so that the generator meets what the model makes of unfamiliar wording. With the verb of
    another slot ("I play the cloak.") the value alone says what is told, as it does with a verb never seen.
    """
    draw = rng.random()
    if kind == "statements" and draw < 0.2:
        sentence = f"I {rng.choice(_verbs())} {fact.value}."
    elif draw < 0.6:
        sentence = rng.choice(asides()[kind]).format_map(_names(fact, None))
    sentence = introduced(sentence, rng)
    if kind == "statements" and rng.random() < 0.2:
        sentence = f"{sentence.removesuffix('.')}, {rng.choice(asides()['after'])}."
    return sentence


@cache
def _verbs() -> tuple[str, ...]:
    """The training verbs of all slots."""
    return tuple(verb[0] for spec in words()["slots"].values() for verb in spec["verbs"])


def introduced(sentence: str, rng: random.Random) -> str:
    """Some sentences with an aside before them."""
    if rng.random() >= 0.3:
        return sentence
    start = sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]
    return f"{rng.choice(asides()['before'])} {start}"


def _names(fact: Fact, who: str | None) -> dict[str, str]:
    mine = who is None
    return {
        "poss": "my" if mine else f"{who}'s",
        "Poss": "My" if mine else f"{who}'s",
        "noun": words()["slots"][fact.slot]["noun"],
        "v": fact.value,
    }


def question(fact: Fact, who: str | None, split: str, rng: random.Random) -> str:
    """A question about the user (who = None) or about somebody else."""
    return rng.choice(words()["frames"]["questions"][split]).format_map(_names(fact, who))


def full_answer(value: str, instructions: dict[str, str]) -> str:
    """`Well, Oslo, captain, over.`: the value, with what the instructions ask for around it."""
    parts = [instructions.get("opener"), value, instructions.get("address"), instructions.get("closer")]
    return ", ".join(p for p in parts if p) + "."


@dataclass(frozen=True)
class Verdict:
    """What a generated answer got right: the value, and the share of the instructions (None where there are none)."""

    recalled: bool
    followed: float | None


def judge(generated: str, value: str, instructions: Mapping[str, str]) -> Verdict:
    """Compare a generated answer with the right value and the prompt's instructions, the word by kind.

    Recall is an exact match: what the answer says besides instruction words must be the value and nothing else. An
    instruction is followed where its word stands in its place: the opener first, the closer last, the address after
    the value.
    """
    parts = generated.strip().removesuffix(".").split(", ")
    spoken = {kind: {*spec["words"], instructions.get(kind)} for kind, spec in words()["instructions"].items()}
    opener = parts.pop(0) if parts and parts[0] in spoken["opener"] else None
    closer = parts.pop() if parts and parts[-1] in spoken["closer"] else None
    address = parts.pop() if parts and parts[-1] in spoken["address"] else None
    said = {"opener": opener, "address": address, "closer": closer}
    followed = [said[kind] == word for kind, word in instructions.items()]
    return Verdict(", ".join(parts) == value, sum(followed) / len(followed) if followed else None)


@dataclass(frozen=True)
class Dialogues:
    """The data set of one split and seed. Items are a pure function of (seed, split, number, shape).

    rich: word prompts and questions in more ways (`reworded`), and count the punctuation of answers as part of them;
        for the training of generators. A changed model is to keep the form of its answers, which the plain one has.
    """

    tokenizer: Tokenizer
    prose: ProseTokens
    split: str
    seed: int
    rich: bool = False

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"unknown split {self.split!r}; there are {', '.join(SPLITS)}")
        if self.rich and self.split != "train":
            raise UserError(f"the {self.split} split has no richer form; it is for training")

    def item(self, number: int, shape: Shape) -> Item:
        """Item `number` of this shape.

        Raises:
            UserError: a shape that cannot be made (no facts, a negative distance, more probes than facts).
        """
        if shape.distance < 0 or not 0 < shape.probes <= shape.facts:
            raise UserError(f"no item has {shape}: the distance is 0 or more, and probes are 1 to the number of facts")
        rng = random.Random(f"{VERSION}/{self.seed}/{self.split}/{number}/{shape}")
        facts = draw_facts(shape.facts, self.split, rng)
        table = words()["instructions"]
        kinds = rng.sample(sorted(table), min(shape.instructions, len(table)))
        instructions = {kind: rng.choice(table[kind]["words"]) for kind in sorted(kinds)}
        sentences = [self._said(statement, "statements", f, rng) for f in facts]
        for kind, word in instructions.items():
            said = rng.choice(table[kind][self.split])
            if self.rich:
                said = introduced(rng.choice(asides()["instructions"][kind]) if rng.random() < 0.5 else said, rng)
            sentences.insert(rng.randrange(len(sentences) + 1), said.format(v=word))
        body, kind = self._body(shape, rng)
        probes = tuple(
            Probe(f, self._said(question, "questions", f, rng), full_answer(f.value, instructions))
            for f in rng.sample(facts, shape.probes)
        )
        return Item("User: " + " ".join(sentences) + "\n", facts, instructions, tuple(body), tuple(kind), probes)

    def _said(self, sentence, kind: str, fact: Fact, rng: random.Random) -> str:
        plain = sentence(fact, None, self.split, rng)
        return reworded(plain, kind, fact, rng) if self.rich else plain

    def items(self, count: int, shape: Shape, start: int = 0) -> list[Item]:
        return [self.item(start + i, shape) for i in range(count)]

    def _body(self, shape: Shape, rng: random.Random) -> tuple[list[int], list[int]]:
        """`shape.distance` tokens of competing facts, questions about them, and prose, ending in whole lines."""
        encode, ids, kind = self.tokenizer.encode, [], []
        recent: list[tuple[str, Fact]] = []
        slots = [s for s in words()["slots"] if s != "name"]
        while True:
            answer: tuple[int, ...] = ()
            draw = rng.random()
            if draw < shape.prose:
                unit = (*self.prose.passage(rng.randint(12, 40), rng), *encode("\n"))
            elif draw < shape.prose + (1 - shape.prose) * 0.55 or not recent:
                slot = rng.choice(slots)
                fact = Fact(slot, rng.choice(words()["slots"][slot]["values"]))
                who = rng.choice(words()["others"])
                others = [r for r in recent if (r[0], r[1].slot) != (who, slot)]
                recent = [*others[-_RECENT + 1 :], (who, fact)]
                unit = encode(statement(fact, who, self.split, rng) + "\n")
            else:
                who, fact = rng.choice(recent)
                unit = encode(f"Q: {question(fact, who, self.split, rng)}\n") + encode("A:")
                answer = encode(f" {fact.value}.") + encode("\n")
            if len(ids) + len(unit) + len(answer) > shape.distance:
                break
            ids += [*unit, *answer]
            kind += [TEXT] * len(unit) + [TEXT if t in self._marks else COMPETING for t in answer]
        short = shape.distance - len(ids)
        if short:
            ids += [*self.prose.passage(short, rng)[:-1], *encode("\n")]
            kind += [TEXT] * short
        return ids, kind

    def encode_probe(self, probe: Probe) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the question, up to and with `Bot:`, and of the answer, with its end of line."""
        encode = self.tokenizer.encode
        question = encode("User: " + probe.question + "\n") + encode("Bot:")
        return question, encode(" " + probe.answer) + encode("\n")

    def encode_prompt(self, item: Item) -> tuple[int, ...]:
        encode = self.tokenizer.encode
        first, *rest = item.prompt.removesuffix("\n").split(". ")
        pieces = [first, *(" " + r for r in rest)]
        ids = [t for p in pieces[:-1] for t in encode(p + ".")]
        return (*ids, *encode(pieces[-1]), *encode("\n"))

    def probes_of(self, item: Item) -> tuple[list[int], list[int]]:
        """All probes with their answers, one after the other: ids, and the kind of each."""
        ids, kind = [], []
        marks = frozenset() if self.rich else self._marks
        for probe in item.probes:
            question, answer = self.encode_probe(probe)
            ids += [*question, *answer]
            kind += [TEXT] * len(question) + [TEXT if t in marks else ANSWER for t in answer]
        return ids, kind

    @cached_property
    def _marks(self) -> frozenset[int]:
        """Punctuation, the same in every answer: not what a language model's answers are weighed by."""
        return frozenset(t for mark in (",", ".", "\n") for t in self.tokenizer.encode(mark))


@dataclass(frozen=True)
class DialogueBatch(Examples):
    """Dialogues as tensors: the prompt, left-padded, and what follows it, right-padded.

    Attributes:
        prompt: (B, P), with prompt_valid (B, P).
        rest: body and probes, (B, T), with kind (B, T): 0 padding, TEXT, ANSWER, COMPETING.
    """

    prompt: Tensor
    prompt_valid: Tensor
    rest: Tensor
    kind: Tensor


def dialogue_batch(data: Dialogues, items: list[Item]) -> DialogueBatch:
    """Items -> one batch."""
    prompts = [data.encode_prompt(item) for item in items]
    rests, kinds = [], []
    for item in items:
        ids, kind = data.probes_of(item)
        rests.append([*item.body, *ids])
        kinds.append([*item.body_kind, *kind])
    return DialogueBatch(
        _padded(prompts, left=True),
        _padded([[1] * len(p) for p in prompts], left=True).bool(),
        _padded(rests),
        _padded(kinds),
    )


def _padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[slice(len(line) - len(row), None) if left else slice(len(row))] = row
    return torch.from_numpy(table)


def to_row(data: Dialogues, item: Item) -> dict:
    """An item as a JSON object of plain texts: the columns of a user's own file (`tasks.own`)."""
    return {
        "split": data.split,
        "prompt": item.prompt.removesuffix("\n"),
        "body": data.tokenizer.decode(item.body),
        "probes": [{"question": p.question, "answer": p.answer, "value": p.fact.value} for p in item.probes],
        "instructions": item.instructions,
    }


def data_hash(tokenizer: Tokenizer, rich: bool = False) -> str:
    """Names the data that a checkpoint was trained on, apart from the prose: tokenizer, words and the drawing of items.

    The prose between is the user's (a folder, WikiText, or our own), so it is recorded and not part of the hash.
    """
    digest = hashlib.sha256(f"{VERSION}".encode())
    digest.update(tokenizer.signature().encode())
    digest.update(json.dumps(words(), sort_keys=True).encode())
    if rich:
        digest.update(json.dumps(asides(), sort_keys=True).encode())
    return digest.hexdigest()[:16]
