"""The constructed data set: a prompt of facts and instructions, other text, then questions about the prompt.

An item, as text (3 facts, one instruction; the body has exactly the requested number of tokens)::

    User: My home town is Oslo. You should know that my pet is a parrot ... Call me captain.     <- prompt
    Tom's home town is Rome. ... prose ... Q: What is Tom's home town? A: Rome.                   <- body, d tokens
    User: Tell me my home town.                                                                   <- probe
    Bot: Oslo, captain.

`User` speaks in prompt and probes, where the instructions apply. The body has prose, facts about other people that
compete with the user's, and questions about them. Splits differ in wording (each has its own frames) and in
combinations of values: a slot's 16 values fall into three classes; a validation or test prompt holds three facts of its
split's class, and no training prompt holds more than two of them, so no such three ever occurred together in training.

Everything follows from a seed; an item is drawn by its number, so any one can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from torch import Tensor

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.examples import Examples
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.text.prose import ProseTokens, check_split, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
"""Increased whenever the same seed would give different items; checkpoints of another version are not loaded."""

TEXT, ANSWER, COMPETING = 1, 2, 3
"""Kinds of token: text, a word of an answer about the prompt, or of an answer about other people; 0 is padding."""

CLASSES = ("common", "common", "validation", "test")
"""A slot's values belong to these in turn: 8 are common, 4 each are kept from occurring together in training."""

_OWN_CLASS = 3  # facts with values of the split's own class in a validation or test prompt
_RECENT = 4  # a competing question is about one of this many latest competing facts


# Words and sentences


@cache
def words() -> dict:
    """Slots, values, instructions, frames and names: `data/dialogue_words.json`."""
    return files.read_json(data_dir() / "dialogue_words.json")


@cache
def asides() -> dict:
    """Additional wording, for training only: `data/dialogue_asides.json`."""
    return files.read_json(data_dir() / "dialogue_asides.json")


@dataclass(frozen=True)
class Fact:
    slot: str
    value: str


@cache
def values_of(slot: str, kind: str) -> tuple[str, ...]:
    """A slot's values of one class."""
    return tuple(v for i, v in enumerate(words()["slots"][slot]["values"]) if CLASSES[i % len(CLASSES)] == kind)


def draw_facts(count: int, split: str, rng: random.Random) -> tuple[Fact, ...]:
    """Facts about different slots, with values from the classes that the split prescribes."""
    slots = list(words()["slots"])
    if not 1 <= count <= len(slots):
        raise UserError(f"a prompt cannot hold {count} facts; choose 1 to {len(slots)}")
    # Training has the held-out values too, but at most two of each class; the other splits have three of their own.
    quota = {"test": 2, "validation": 2} if split == "train" else {split: _OWN_CLASS}
    classes = [c for c, n in quota.items() for _ in range(n)]
    if split == "train":
        classes += ["common"] * max(0, 6 - len(classes))
        rng.shuffle(classes)
    classes = (classes + ["common"] * count)[:count]
    rng.shuffle(classes)
    return tuple(
        Fact(slot, rng.choice(values_of(slot, kind)))
        for slot, kind in zip(rng.sample(slots, count), classes, strict=True)
    )


def statement(fact: Fact, who: str | None, split: str, rng: random.Random) -> str:
    """A sentence that states a fact about the user (who = None) or about somebody else."""
    spec = words()["slots"][fact.slot]
    verbs = spec["verbs"] if split == "train" else [spec["held_out_verbs"][split]]
    if rng.random() < 0.3:
        mine, theirs = rng.choice(verbs)
        return f"I {mine} {fact.value}." if who is None else f"{who} {theirs} {fact.value}."
    return rng.choice(words()["frames"]["statements"][split]).format_map(_gaps(fact, who))


def question(fact: Fact, who: str | None, split: str, rng: random.Random) -> str:
    """A question about the user (who = None) or about somebody else."""
    return rng.choice(words()["frames"]["questions"][split]).format_map(_gaps(fact, who))


def _gaps(fact: Fact, who: str | None) -> dict[str, str]:
    """What fills the gaps of a frame."""
    poss, capital = ("my", "My") if who is None else (f"{who}'s", f"{who}'s")
    return {"poss": poss, "Poss": capital, "noun": words()["slots"][fact.slot]["noun"], "v": fact.value}


def reworded(sentence: str, kind: str, fact: Fact, rng: random.Random) -> str:
    """A statement or question about the user in other words: another frame, any slot's verb, an aside before or after.

    A generator that sees few wordings learns them by heart, and writes nothing for a new one. The language model has
    not seen these, so the generator meets what the model makes of unfamiliar wording. With the verb of another slot
    ("I play the cloak.") only the value shows what the fact is, as with a verb that was never seen.
    """
    draw = rng.random()
    if kind == "statements" and draw < 0.2:
        sentence = f"I {rng.choice(_verbs())} {fact.value}."
    elif draw < 0.6:
        sentence = rng.choice(asides()[kind]).format_map(_gaps(fact, None))
    sentence = introduced(sentence, rng)
    if kind == "statements" and rng.random() < 0.2:
        sentence = f"{sentence.removesuffix('.')}, {rng.choice(asides()['after'])}."
    return sentence


@cache
def _verbs() -> tuple[str, ...]:
    """The training verbs of all slots."""
    return tuple(verb[0] for spec in words()["slots"].values() for verb in spec["verbs"])


def introduced(sentence: str, rng: random.Random) -> str:
    """The sentence, three times in ten with an aside before it."""
    if rng.random() >= 0.3:
        return sentence
    start = sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]
    return f"{rng.choice(asides()['before'])} {start}"


# What an answer is worth


def full_answer(value: str, instructions: Mapping[str, str]) -> str:
    """`Well, Oslo, captain, over.`: the value, surrounded by the words of the instructions."""
    parts = [instructions.get("opener"), value, instructions.get("address"), instructions.get("closer")]
    return ", ".join(p for p in parts if p) + "."


@dataclass(frozen=True)
class Verdict:
    """What a generated answer got right: the value, and the share of the instructions (None if there are none)."""

    recalled: bool
    followed: float | None


def judge(generated: str, value: str, instructions: Mapping[str, str]) -> Verdict:
    """Compare a generated answer with the right value and the prompt's instructions (kind -> word).

    Recall is an exact match: apart from instruction words, the answer must be the value and nothing else. An
    instruction is followed if its word stands in its place: the opener first, the closer last, the address after the
    value.
    """
    parts = generated.strip().removesuffix(".").split(", ")
    known = {kind: {*spec["words"], instructions.get(kind)} for kind, spec in words()["instructions"].items()}
    found = {"opener": parts.pop(0) if parts and parts[0] in known["opener"] else None}
    for kind in ("closer", "address"):
        found[kind] = parts.pop() if parts and parts[-1] in known[kind] else None
    followed = [found[kind] == word for kind, word in instructions.items()]
    return Verdict(", ".join(parts) == value, sum(followed) / len(followed) if followed else None)


# Items


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

    def item(self, number: int, shape: Shape) -> Item:
        """Item `number` of this shape.

        Raises:
            UserError: an impossible shape (no facts, a negative distance, more probes than facts).
        """
        if shape.distance < 0 or not 0 < shape.probes <= shape.facts:
            raise UserError(f"no item is {shape.name}; the distance is at least 0, and probes are 1 to facts")
        rng = random.Random(f"{VERSION}/{self.seed}/{self.split}/{number}/{shape.name}")
        facts = draw_facts(shape.facts, self.split, rng)
        table = words()["instructions"]
        kinds = rng.sample(sorted(table), min(shape.instructions, len(table)))
        instructions = {kind: rng.choice(table[kind]["words"]) for kind in sorted(kinds)}
        sentences = [self._worded(statement, "statements", f, rng) for f in facts]
        for kind, word in instructions.items():
            frame = rng.choice(table[kind][self.split])
            if self.rich:
                frame = introduced(rng.choice(asides()["instructions"][kind]) if rng.random() < 0.5 else frame, rng)
            sentences.insert(rng.randrange(len(sentences) + 1), frame.format(v=word))
        body, body_kind = self._body(shape, rng)
        probes = tuple(
            Probe(f, self._worded(question, "questions", f, rng), full_answer(f.value, instructions))
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
        return reworded(plain, kind, fact, rng) if self.rich else plain

    def _body(self, shape: Shape, rng: random.Random) -> tuple[list[int], list[int]]:
        """`shape.distance` tokens of competing facts, questions about them, and prose, ending with a whole line."""
        encode, ids, kinds = self.tokenizer.encode, [], []
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
    digest.update(json.dumps(words(), sort_keys=True).encode())
    if rich:
        digest.update(json.dumps(asides(), sort_keys=True).encode())
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
