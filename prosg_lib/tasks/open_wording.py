"""The wording of the open world: values and slots that belong to one split each, and sentences about them.

A fact is a slot ("dentist") with a value ("Fadin"), of the user or of somebody else. Values, slots, sentences, names
and the words of instructions are each divided among the splits, so that a level can take any of them from a held-out
split: an answer about a new value can only be copied, and a question about a new slot only be found by its words.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks.answer_form import taken_apart
from prosg_lib.text.prose import SPLITS, check_split

LEVELS = {
    "known": (),
    "values": ("values",),
    "slots": ("slots",),
    "wordings": ("wordings",),
    "all": ("values", "slots", "wordings"),
}
"""What is new at each level; everything else is as in training."""


@cache
def words() -> dict:
    """Slots, sentences, instructions and names: `data/open_world.json`, each by split."""
    return files.read_json(data_dir() / "open_world.json")


@cache
def values() -> dict[str, dict[str, list[str]]]:
    """Values by type and split: `data/open_values.json`."""
    return files.read_json(data_dir() / "open_values.json")


_LONGEST_COINED = 14  # characters

UNKNOWN = "you did not tell me"
"""The right answer to a question about what was never said."""


@dataclass(frozen=True)
class Fact:
    """A slot of somebody (who; None: the user), and its value."""

    slot: str
    value: str
    who: str | None = None

    @property
    def key(self) -> tuple[str | None, str]:
        return self.who, self.slot


@cache
def type_of(slot: str) -> str:
    """The type of a slot's values; a coined slot has any, and always the same."""
    types = words()["slots"]
    listed = (t for t, splits in types.items() if any(slot in names for names in splits.values()))
    return next(listed, None) or random.Random(slot).choice(sorted(types))


@dataclass(frozen=True)
class Level:
    """Where an item's parts come from: of the split what is new, and of training everything else.

    Attributes:
        split: "train", "validation" or "test".
        new: "values", "slots" and "wordings", as far as they are of the split.
        most: only so many slots, the same ones whenever they are drawn; 0: all.
        coined: share of the values and slots that are in no list: the beginning of one that is and the end of another.
        further: whether training's wordings are all that there are, or those of its first steps.
    """

    split: str
    new: tuple[str, ...] = ()
    most: int = 0
    coined: float = 0.0
    further: bool = False

    def __post_init__(self):
        check_split(self.split)

    @property
    def name(self) -> str:
        """Enters the seed of every item, so its characters must never change."""
        others = {"most": self.most, "coined": self.coined, "further": self.further}
        more = "".join(f", {name}={value}" for name, value in others.items() if value)
        return f"Level(split={self.split!r}, new={self.new!r}){more}"

    @classmethod
    def named(cls, name: str, split: str) -> Level:
        """One of `LEVELS`."""
        if name not in LEVELS:
            raise UserError(f"unknown level {name!r}; there are {', '.join(LEVELS)}")
        return cls(split, LEVELS[name])

    def _split(self, part: str) -> str:
        return self.split if part in self.new else "train"

    def slots(self) -> list[str]:
        names = _slots(self._split("slots"))
        return sorted(names, key=_mixed)[: self.most] if self.most else names

    def some_slots(self, count: int, rng: random.Random) -> list[str]:
        """Different ones; where there are only so many (`most`), none is coined."""
        found, slots = [], self.slots()
        for slot in rng.sample(slots, count):
            drawn = slot if self.most else self._coined(slot, slots, _all_slots(), rng)
            while drawn in found:
                drawn = self._coined(slot, slots, _all_slots(), rng)
            found.append(drawn)
        return found

    def value(self, slot: str, rng: random.Random, other_than: str | None = None) -> str:
        """A value of the slot's type."""
        drawn = self._value(type_of(slot), rng)
        return drawn if drawn != other_than else self.value(slot, rng, other_than)

    def _value(self, kind: str, rng: random.Random) -> str:
        listed = values()[kind][self._split("values")]
        return self._coined(rng.choice(listed), listed, _all_values(), rng)

    def _coined(self, word: str, others: Sequence[str], known: Set[str], rng: random.Random) -> str:
        """The word, or as often as `coined` says its beginning and the end of another; in no split's list."""
        if not self.coined or rng.random() >= self.coined:
            return word
        while True:
            end = rng.choice(others)
            made = word[: rng.randint(1, len(word))] + end[rng.randrange(len(end)) :]
            if made.casefold() not in known and len(made) <= _LONGEST_COINED:
                return made

    def others(self) -> list[str]:
        return words()["others"][self._split("values")]

    def cues(self) -> list[str]:
        return words()["cues"][self._split("values")]

    def instruction(self, kind: str, rng: random.Random) -> tuple[str, str]:
        """A word, and a sentence that asks for it. Half of the words are made up: there are too few real ones for a
        model to learn that any word will do."""
        table = words()["instructions"][kind]
        word = rng.choice(table["words"][self._split("values")])
        if rng.random() < 0.5:
            word = self._value("person" if kind == "address" else "word", rng)
            word = word.capitalize() if kind == "opener" else word
        return word, rng.choice(self._wordings(table)).format(v=word)

    def sentence(self, kind: str, rng: random.Random, **gaps: str) -> str:
        """A sentence of one kind (`words()["frames"]`)."""
        return rng.choice(self._wordings(words()["frames"][kind])).format_map(gaps)

    def _wordings(self, table: Mapping[str, list[str]]) -> list[str]:
        split = self._split("wordings")
        return table[split] + table["further"] if self.further and split == "train" else table[split]

    def statement(self, facts: Sequence[Fact], rng: random.Random, update: bool = False) -> str:
        """One sentence that states one fact or two; update: that corrects an earlier one."""
        if len(facts) == 2:
            gaps = {f"{name}{i}": text for i, f in enumerate(facts, 1) for name, text in _gaps(f).items()}
            return self.sentence("two", rng, **gaps)
        return self.sentence("update" if update else "one", rng, **_gaps(facts[0]))

    def question(self, fact: Fact, rng: random.Random) -> str:
        special = f"question_{type_of(fact.slot)}"
        kind = special if special in words()["frames"] and rng.random() < 0.25 else "question"
        return self.sentence(kind, rng, **_gaps(fact))

    def embellished(self, sentence: str, rng: random.Random) -> str:
        """The sentence, at times with an aside before or after it."""
        if rng.random() < 0.15:
            start = sentence[0].lower() + sentence[1:] if sentence.split()[0] in _first_words() else sentence
            sentence = f"{self.sentence('before', rng)} {start}"
        if sentence.endswith(".") and rng.random() < 0.1:
            sentence = f"{sentence.removesuffix('.')}, {self.sentence('after', rng)}."
        return sentence


@cache
def _first_words() -> frozenset[str]:
    """The words that sentences begin with and that are small inside of one: neither "I" nor what fills a gap."""
    tables = [*words()["frames"].values(), *words()["instructions"].values()]
    sentences = [s for table in tables for split in (*SPLITS, "further") for s in table[split]]
    return frozenset(["My", *(s.split()[0] for s in sentences if s[0] != "{")]) - {"I"}


@cache
def _slots(split: str) -> list[str]:
    return [slot for splits in words()["slots"].values() for slot in splits[split]]


@cache
def _all_slots() -> frozenset[str]:
    return frozenset(slot.casefold() for split in SPLITS for slot in _slots(split))


@cache
def _all_values() -> frozenset[str]:
    return frozenset(v.casefold() for splits in values().values() for listed in splits.values() for v in listed)


@cache
def _mixed(slot: str) -> float:
    """Puts slots in an order that mixes their types."""
    return random.Random(slot).random()


def _gaps(fact: Fact) -> dict[str, str]:
    """What fills the gaps of a sentence."""
    poss, capital = ("my", "My") if fact.who is None else (f"{fact.who}'s", f"{fact.who}'s")
    return {"poss": poss, "Poss": capital, "noun": fact.slot, "v": fact.value}


@dataclass(frozen=True)
class Verdict:
    """What a generated answer says: the value it gives, and the share of the instructions that it follows.

    Attributes:
        said: the answer without the words of instructions.
        followed: None if there are no instructions.
    """

    said: str
    followed: float | None


@cache
def _instruction_words() -> dict[str, frozenset[str]]:
    table = words()["instructions"]
    return {kind: frozenset(w for names in spec["words"].values() for w in names) for kind, spec in table.items()}


def judge(generated: str, instructions: Mapping[str, str]) -> Verdict:
    """Take an answer apart (`answer_form.taken_apart`). One that is nothing but words of instructions is a value."""
    said, followed = taken_apart(generated, instructions, _instruction_words())
    return Verdict(said or generated.strip().removesuffix("."), followed)
