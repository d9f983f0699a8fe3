"""The wording of the dialogues: facts and instructions as sentences, and what an answer about them is worth.

Splits differ in their frames and verbs, and in combinations of values: a slot's 16 values fall into three classes; a
validation or test prompt holds three facts of its split's class, and no training prompt holds more than two of them, so
no such three ever occurred together in training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.answer_form import taken_apart

CLASSES = ("common", "common", "validation", "test")
"""A slot's values belong to these in turn: 8 are common, 4 each are kept from occurring together in training."""

_OWN_CLASS = 3  # facts with values of the split's own class in a validation or test prompt


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


@dataclass(frozen=True)
class Verdict:
    """What a generated answer got right: the value, and the share of the instructions (None if there are none)."""

    recalled: bool
    followed: float | None


@cache
def _instruction_words() -> dict[str, frozenset[str]]:
    return {kind: frozenset(spec["words"]) for kind, spec in words()["instructions"].items()}


def judge(generated: str, value: str, instructions: Mapping[str, str]) -> Verdict:
    """Compare a generated answer with the right value and the prompt's instructions (kind -> word).

    Recall is an exact match: apart from instruction words, the answer must be the value and nothing else. When an
    instruction is followed: see `answer_form.taken_apart`.
    """
    said, followed = taken_apart(generated, instructions, _instruction_words())
    return Verdict(said == value, followed)
