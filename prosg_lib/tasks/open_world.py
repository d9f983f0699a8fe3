"""The dialogues of an open world: prompts about values, slots and wordings that nobody trained on.

An item, as text (its body has exactly the requested number of tokens)::

    ... other text ...                                                           <- before it, where it is in mid-text
    User: My dentist is Fadin and Tom's gate is K27. Call me captain. ...        <- prompt: facts, instructions
    Actually, my dentist is now Jilan.                                           <- an update; the newest value counts
    Vera's lamp is red drum. ... prose ... Q: What is Vera's lamp? A: red drum.  <- body, d tokens
    User: Who is my dentist?                                                     <- probe
    Bot: Jilan, captain.
    User: What is my rent?                                                       <- a probe about what was never said
    Bot: you did not tell me, captain.

A prompt may also hold a question to be answered later: "When I say go, tell me my hat." The body then states the hat,
and the probe is "Go.".

Everything follows from a seed; an item is drawn by its number, so any one can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks import open_wording as wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.open_wording import UNKNOWN, Fact, Level
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

VERSION = 3
"""Increased whenever the same seed would give different items; checkpoints of another version are not loaded."""

_RECENT = 4  # a competing question is about one of this many latest competing facts
_TWO = 0.25  # share of the sentences that state two facts
_SMALL_TALK = 0.15  # chance of a sentence that says nothing, after each one that does
_QUERY_ROOM = 48  # tokens that a body needs to state the fact that a query is about


@dataclass(frozen=True)
class Probe:
    """A question and its full answer.

    Attributes:
        value: what has to be said, without the words of instructions.
        about: the fact's key, where it is about one that the prompt states.
        accept: what may be said instead.
        kind: "fact" (the user's), "other" (somebody else's, in the prompt), "update", "unknown" or "query".
    """

    question: str
    answer: str
    value: str
    kind: str
    about: tuple[str | None, str] | None = None
    accept: tuple[str, ...] = ()

    @property
    def right(self) -> tuple[str, ...]:
        """The answers of which any will do, without the words of instructions."""
        return self.value, *self.accept


@dataclass(frozen=True)
class Item:
    """One dialogue. body_kind is TEXT or COMPETING for every token of the body."""

    prompt: str
    facts: tuple[Fact, ...]
    instructions: dict[str, str]
    before: tuple[int, ...]
    body: tuple[int, ...]
    body_kind: tuple[int, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of an item.

    Attributes:
        facts: that the prompt states about the user; others: about other people.
        distance: tokens between prompt and probes; before: tokens in front of the prompt.
        probes: questions about those facts; unknown: questions about what was never said.
        instructions: in the prompt.
        updates: facts of the user's that the prompt corrects later.
        query: whether the prompt holds a question about the body, which is asked as well; rivals: facts of the user's
            that the body states beside the one that it is about.
        prose: share of the body's units that are prose.
    """

    facts: int
    distance: int
    probes: int
    others: int = 0
    before: int = 0
    unknown: int = 0
    instructions: int = 0
    updates: int = 0
    query: bool = False
    rivals: int = 0
    prose: float = 0.5

    def __post_init__(self):
        possible = min(self.distance, self.before, self.others, self.unknown, self.instructions, self.facts - 1) >= 0
        if not possible or not 0 < self.probes <= self.facts + self.others or not 0 <= self.updates <= self.facts:
            raise UserError(
                f"no item is {self}; facts are 1 or more, probes 1 to the number of facts, updates at most the user's"
            )
        room = _QUERY_ROOM * (1 + self.rivals)
        if self.query and self.distance < room:
            raise UserError(f"no item is {self}; with a query the distance is at least {room}")
        if self.rivals < 0 or (self.rivals and not self.query):
            raise UserError(f"no item is {self}; rivals are 0 or more, and there are none without a query")

    @property
    def name(self) -> str:
        """Enters the seed of every item, so its characters must never change."""
        sizes = f"facts={self.facts}, distance={self.distance}, probes={self.probes}, others={self.others}"
        more = f"before={self.before}, unknown={self.unknown}, instructions={self.instructions}"
        rivals = f", rivals={self.rivals}" if self.rivals else ""
        return f"Shape({sizes}, {more}, updates={self.updates}, query={self.query}{rivals}, prose={self.prose})"


@dataclass(frozen=True)
class OpenWorld:
    """The data set of one level and seed. Items are a pure function of (seed, level, number, shape)."""

    tokenizer: Tokenizer
    prose: ProseTokens
    level: Level
    seed: int

    @property
    def name(self) -> str:
        """Enters the seed of the prose that losses are measured on."""
        return self.level.name

    def item(self, number: int, shape: Shape) -> Item:
        """Item `number` of this shape.

        Raises:
            UserError: the level has fewer slots than the shape asks for.
        """
        level, rng = self.level, random.Random(f"{VERSION}/{self.seed}/{self.level.name}/{number}/{shape.name}")
        facts = self._facts(shape, rng)
        kinds = rng.sample(sorted(wording.words()["instructions"]), min(shape.instructions, 3))
        drawn = {kind: level.instruction(kind, rng) for kind in sorted(kinds)}
        instructions = {kind: word for kind, (word, _) in drawn.items()}

        sentences = self._sentences(facts, rng)
        extra = [sentence for _, sentence in drawn.values()]
        stated, cue = [], ""  # facts of the body's, the queried one first
        if shape.query:
            stated.append(self._new_fact(facts, rng))
            cue = rng.choice(level.cues())
            extra.append(level.sentence("query", rng, cue=cue, poss="my", noun=stated[0].slot))
            for _ in range(shape.rivals):
                stated.append(self._new_fact([*facts, *stated], rng))
        for sentence in extra:
            sentences.insert(rng.randrange(len(sentences) + 1), sentence)
        newest = list(facts)
        for i in rng.sample([i for i, f in enumerate(facts) if f.who is None], shape.updates):
            newest[i] = Fact(facts[i].slot, level.value(facts[i].slot, rng, facts[i].value))
            sentences.append(level.statement([newest[i]], rng, update=True))
        sentences = [text for s in sentences for text in self._with_small_talk(level.embellished(s, rng), rng)]

        before, _ = self._body(shape.before, shape.prose, [], rng)
        body, body_kind = self._body(shape.distance, shape.prose, stated, rng)
        probes = self._probes(facts, newest, shape, stated, rng)
        if stated:
            probes.append((f"{cue[0].upper()}{cue[1:]}.", stated[0].value, "query", None))
        rng.shuffle(probes)
        return Item(
            "User: " + " ".join(sentences) + "\n",
            tuple(newest),
            instructions,
            tuple(before),
            tuple(body),
            tuple(body_kind),
            tuple(Probe(q, full_answer(value, instructions), value, *rest) for q, value, *rest in probes),
        )

    def items(self, count: int, shape: Shape, start: int = 0) -> list[Item]:
        return [self.item(start + i, shape) for i in range(count)]

    def natural(self, distance: int, limit: int | None = None) -> list[Item]:
        """The prompts without templates of the level's split, `data/natural_prompts.jsonl`, in front of such a body.

        Args:
            limit: only so many.
        """
        found = []
        for number, row in enumerate(natural_prompts(self.level.split)[:limit]):
            rng = random.Random(f"{VERSION}/{self.seed}/{self.level.name}/natural/{number}")
            body, kinds = self._body(distance, Shape(1, distance, 1).prose, [], rng)
            probes = tuple(
                Probe(q["question"], q["answer"] + ".", q["answer"], "fact", accept=tuple(q["accept"]))
                for q in row["questions"]
            )
            found.append(Item(f"User: {row['text']}\n", (), {}, (), tuple(body), tuple(kinds), probes))
        return found

    def _facts(self, shape: Shape, rng: random.Random) -> list[Fact]:
        """The user's facts about different slots and those of others, in the order in which they are stated."""
        slots = self.level.slots()
        if shape.facts > len(slots) - 1:
            raise UserError(f"a prompt of this level cannot hold {shape.facts} facts; choose 1 to {len(slots) - 1}")
        if shape.others > len(slots):
            raise UserError(
                f"a prompt of this level cannot hold {shape.others} facts about others; choose 0 to {len(slots)}"
            )
        mine = self.level.some_slots(shape.facts, rng)
        keys: list[tuple[str | None, str]] = [(None, slot) for slot in mine]
        while len(keys) < shape.facts + shape.others:
            key = rng.choice(self.level.others()), rng.choice(mine if rng.random() < 0.5 else slots)
            keys += [key] * (key not in keys)
        rng.shuffle(keys)
        return [Fact(slot, self.level.value(slot, rng), who) for who, slot in keys]

    def _new_fact(self, facts: list[Fact], rng: random.Random) -> Fact:
        """A fact of the user's about a slot that the prompt does not mention for the user."""
        known = {f.slot for f in facts if f.who is None}
        slot = rng.choice([s for s in self.level.slots() if s not in known])
        return Fact(slot, self.level.value(slot, rng))

    def _sentences(self, facts: list[Fact], rng: random.Random) -> list[str]:
        """One sentence a fact, or two."""
        sentences, i = [], 0
        while i < len(facts):
            count = 2 if rng.random() < _TWO and i + 1 < len(facts) else 1
            sentences.append(self.level.statement(facts[i : i + count], rng))
            i += count
        return sentences

    def _with_small_talk(self, sentence: str, rng: random.Random) -> list[str]:
        return [sentence] + [self.level.sentence("small_talk", rng)] * (rng.random() < _SMALL_TALK)

    def _probes(
        self, facts: list[Fact], newest: list[Fact], shape: Shape, stated: list[Fact], rng: random.Random
    ) -> list[tuple]:
        """(question, right value, kind, key) of questions about the prompt's facts, and about what it never said."""
        changed = [i for i, (old, new) in enumerate(zip(facts, newest, strict=True)) if old != new]
        others = [i for i in range(len(facts)) if i not in changed]
        # As many of the updated ones as there is room for, beside at least one that stayed where there is one.
        room = max(1, shape.probes - 1, shape.probes - len(others))
        first = rng.sample(changed, min(len(changed), room))
        asked = first + rng.sample(others, min(len(others), shape.probes - len(first)))
        probes = []
        for i in asked:
            kind = "update" if i in changed else "fact" if facts[i].who is None else "other"
            probes.append((self.level.question(newest[i], rng), newest[i].value, kind, facts[i].key))
        known, slots = {f.key for f in (*facts, *stated)}, self.level.slots()
        theirs = [f.slot for f in facts if f.who is not None and (None, f.slot) not in known]
        for _ in range(shape.unknown):
            slot = rng.choice(theirs) if theirs and rng.random() < 0.4 else rng.choice(slots)
            while (None, slot) in known:
                slot = rng.choice(slots)
            probes.append((self.level.question(Fact(slot, ""), rng), UNKNOWN, "unknown", None))
        return probes

    def _body(self, length: int, prose: float, stated: list[Fact], rng: random.Random) -> tuple[list[int], list[int]]:
        """`length` tokens of other people's facts, questions about them, and prose, ending with a whole line.

        stated: facts of the user's; a line of it states each, the first one anywhere among them.
        """
        encode, level, ids, kinds = self.tokenizer.encode_long, self.level, [], []
        recent: list[Fact] = []
        slots, others = level.slots(), level.others()
        told = [encode(f"User: {level.statement([fact], rng)}\n") for fact in stated]
        left = sum(map(len, told))
        places = sorted(rng.random() * max(0, length - left - 1) for _ in told or [()])
        rng.shuffle(told)
        while True:
            answer: list[int] = []
            draw = rng.random()
            if told and len(ids) >= places[-len(told)]:
                line = told.pop(0)
                ids, kinds, left = [*ids, *line], [*kinds, *[TEXT] * len(line)], left - len(line)
                continue
            if draw < prose:
                unit = [*self.prose.passage(rng.randint(12, 40), rng), *encode("\n")]
            elif draw < prose + (1 - prose) * 0.55 or not recent:
                slot = rng.choice(slots)
                fact = Fact(slot, level.value(slot, rng), rng.choice(others))
                recent = [*[f for f in recent if f.key != fact.key][-_RECENT + 1 :], fact]
                unit = encode(level.statement([fact], rng) + "\n")
            else:
                fact = rng.choice(recent)
                unit = [*encode(f"Q: {level.question(fact, rng)}\n"), *encode("A:")]
                answer = encode(f" {fact.value}.")
            end = encode("\n") if answer else []
            if len(ids) + len(unit) + len(answer) + len(end) + left > length:
                break
            ids += [*unit, *answer, *end]
            kinds += [TEXT] * len(unit) + [COMPETING] * len(answer) + [TEXT] * len(end)
        short, rest = length - len(ids) - left, [token for line in told for token in line]
        if short > 0:
            rest = [*rest, *self.prose.passage(short, rng)[:-1], *encode("\n")]
        return [*ids, *rest], [*kinds, *[TEXT] * len(rest)]

    def row(self, item: Item) -> dict:
        """An item as texts: a row of `data/open_sample.jsonl`."""
        return {
            "split": self.level.split,
            "new": list(self.level.new),
            "before": self.tokenizer.decode(item.before),
            "prompt": item.prompt.removesuffix("\n"),
            "body": self.tokenizer.decode(item.body),
            "probes": [
                {"question": p.question, "answer": p.answer, "value": p.value, "kind": p.kind} for p in item.probes
            ],
            "instructions": item.instructions,
        }

    def encode_prompt(self, item: Item) -> list[int]:
        return self.tokenizer.encode_long(item.prompt)

    def encode_probe(self, probe: Probe) -> tuple[list[int], list[int]]:
        """Token ids of the question, up to and including `Bot:`, and of the answer with its end of line."""
        encode = self.tokenizer.encode_long
        return encode(f"User: {probe.question}\n") + encode("Bot:"), encode(f" {probe.answer}") + encode("\n")

    def probes_of(self, item: Item) -> tuple[list[int], list[int]]:
        """All probes with their answers, one after the other: token ids, and the kind of each token."""
        ids, kinds = [], []
        for probe in item.probes:
            question, answer = self.encode_probe(probe)
            ids += [*question, *answer]
            kinds += [TEXT] * len(question) + [ANSWER] * len(answer)
        return ids, kinds


@dataclass(frozen=True)
class OpenBatch(Examples):
    """Dialogues as tensors: the prompt and its context, left-padded, and what follows them, right-padded.

    Attributes:
        prompt, prompt_valid: the prompt alone, (B, P); valid is False at the padding.
        context, context_valid: the text before it and the prompt, (B, C).
        rest: body and probes, (B, T).
        kind: (B, T), TEXT, ANSWER or COMPETING; 0 at the padding.
    """

    prompt: Tensor
    prompt_valid: Tensor
    context: Tensor
    context_valid: Tensor
    rest: Tensor
    kind: Tensor


def open_batch(data: OpenWorld, items: list[Item]) -> OpenBatch:
    """Items -> one batch."""
    prompts = [data.encode_prompt(item) for item in items]
    rests, kinds = [], []
    for item in items:
        ids, kind = data.probes_of(item)
        rests.append([*item.body, *ids])
        kinds.append([*item.body_kind, *kind])
    contexts = [[*item.before, *prompt] for item, prompt in zip(items, prompts, strict=True)]
    return OpenBatch(*left_padded(prompts), *left_padded(contexts), right_padded(rests), right_padded(kinds))


def natural_prompts(split: str) -> list[dict]:
    """Prompts without templates: rows with id, split, kind, text, questions (question, answer, accept), and, of the
    training split, values (value, kind), in whose place any other of their kind could stand."""
    return [row for row in files.read_rows(data_dir() / "natural_prompts.jsonl") if row["split"] == split]


def data_hash(tokenizer: Tokenizer) -> str:
    """Identifies the data of a checkpoint, except for the prose: tokenizer, words, and how items are drawn."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    digest.update(tokenizer.signature().encode())
    drawn_from = {name: part for name, part in wording.words().items() if name != "parts"}
    for part in (drawn_from, wording.values()):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=16)
def load_open_world(level: str, split: str, seed: int, tokenizer: Tokenizer | None = None, most: int = 0) -> OpenWorld:
    """The data set of a level (`open_wording.LEVELS`), split and seed, with the prose that this machine has.

    Args:
        tokenizer: a model's; None: the project's own.
        most: see `Level`.
    """
    tokenizer = tokenizer or load_tokenizer()
    return OpenWorld(tokenizer, _prose(split, tokenizer), replace(Level.named(level, split), most=most), seed)


@lru_cache(maxsize=6)
def _prose(split: str, tokenizer: Tokenizer) -> ProseTokens:
    return ProseTokens.of(load_prose(), split, tokenizer)
