"""The open world: splits share nothing, a prompt read again gives every right answer, and how an answer is judged."""

import itertools
import random
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from prosg_lib.errors import UserError
from prosg_lib.tasks import open_wording as wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT
from prosg_lib.tasks.open_wording import LEVELS, UNKNOWN, Level, Verdict, judge
from prosg_lib.tasks.open_world import Item, OpenWorld, Shape, natural_prompts, open_batch
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

WORDS = wording.words()
FULL = Shape(facts=6, distance=64, probes=4, others=2, before=24, unknown=2, instructions=2, updates=2, query=True)

EVERY_LEVEL = [("train", "known"), ("train", "further"), *itertools.product(("validation", "test"), LEVELS)]
every_level = pytest.mark.parametrize(("split", "level"), EVERY_LEVEL)


@cache
def data_of(split: str, level: str = "known", seed: int = 0) -> OpenWorld:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {split: own_sentences(split)[:200]}), split, tokenizer)
    drawn = Level(split, further=True) if level == "further" else Level.named(level, split)
    return OpenWorld(tokenizer, prose, drawn, seed)


# What belongs to a split


def parts(split: str) -> dict[str, list[str]]:
    """All that belongs to one split, by what it is."""
    instructions = WORDS["instructions"].values()
    return {
        "values": [v.casefold() for by_split in wording.values().values() for v in by_split[split]],
        "slots": [slot for by_split in WORDS["slots"].values() for slot in by_split[split]],
        "sentences": [f for by_split in WORDS["frames"].values() for f in by_split[split]],
        "sentences of instructions": [sentence for spec in instructions for sentence in spec[split]],
        "words of instructions": [word for spec in instructions for word in spec["words"][split]],
        "names": WORDS["others"][split],
        "cues": WORDS["cues"][split],
    }


def test_further_wordings_are_in_no_split():
    for tables in (WORDS["frames"], WORDS["instructions"]):
        for kind, table in tables.items():
            assert len(set(table["further"])) == len(table["further"]) >= 5, kind
            held = {sentence.casefold() for split in SPLITS for sentence in table[split]}
            assert not held & {sentence.casefold() for sentence in table["further"]}, kind


@pytest.mark.parametrize("what", parts("train"))
@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(SPLITS, 2)])
def test_splits_share_nothing(what, a, b):
    first, second = set(parts(a)[what]), set(parts(b)[what])
    assert min(len(first), len(second)) >= 4
    assert not first & second


def test_there_is_enough_of_everything():
    """A hundred and fifty slots to train on and forty to test on, a thousand values a split; each slot has one type."""
    count = {split: {what: len(found) for what, found in parts(split).items()} for split in SPLITS}
    assert count["train"]["slots"] >= 150
    assert count["test"]["slots"] >= 40
    assert min(count[split]["values"] for split in SPLITS) >= 1000
    slots = [slot for split in SPLITS for slot in parts(split)["slots"]]
    assert len(slots) == len(set(slots))
    assert {wording.type_of(slot) for slot in slots} == wording.values().keys()


def test_values_have_one_to_five_tokens():
    encode = load_tokenizer().encode_long
    lengths = {len(encode(" " + v)) for by_split in wording.values().values() for vs in by_split.values() for v in vs}
    assert lengths == {1, 2, 3, 4, 5}


def test_an_answer_can_be_taken_apart():
    """No value has a comma, or is a listed word of instructions."""
    words = {w for split in SPLITS for w in parts(split)["words of instructions"]}
    values = {v for by_split in wording.values().values() for split in SPLITS for v in by_split[split]}
    assert not words & (values | {UNKNOWN})
    assert not [v for v in values | words if "," in v or "." in v]


# A prompt read again, with nothing but the words that its level may use


class Reader:
    """Finds facts in sentences; a sentence that is not of the level, or is about a value that is not, is not found."""

    def __init__(self, split: str, level: str):
        def of(part: str) -> str:
            return split if part in LEVELS.get(level, ()) else "train"

        def wordings(table: dict) -> list[re.Pattern]:
            further = table["further"] if level == "further" else []
            return [self._pattern(frame) for frame in table[of("wordings")] + further]

        self.values = {
            kind: {v.casefold(): v for v in by_split[of("values")]} for kind, by_split in wording.values().items()
        }
        self.names = {f"{name}'s".casefold(): name for name in WORDS["others"][of("values")]} | {"my": None}
        self.slots = {s for by_split in WORDS["slots"].values() for s in by_split[of("slots")]}
        self.frames = {kind: wordings(table) for kind, table in WORDS["frames"].items()}
        self.asked = {kind: wordings(table) for kind, table in WORDS["instructions"].items()}
        made_up = {kind: self.values["person" if kind == "address" else "word"].keys() for kind in self.asked}
        self.words = {
            kind: made_up[kind] | {word.casefold() for word in spec["words"][of("values")]}
            for kind, spec in WORDS["instructions"].items()
        }
        self.cues = WORDS["cues"][of("values")]

    def _pattern(self, frame: str) -> re.Pattern:
        gaps = {
            "poss": "|".join(map(re.escape, self.names)),
            "noun": "|".join(sorted(map(re.escape, self.slots), key=len, reverse=True)),
            "cue": r"\w+",
            "v": "[^,;.]+",
        }

        def gap(match: re.Match) -> str:
            kind, number = re.fullmatch(r"([a-z]+)(\d?)", match[1].lower()).groups()
            return f"(?P<{kind}{number or 1}>{gaps[kind]})"

        return re.compile(re.sub(r"\\{(\w+)\\}", gap, re.escape(frame)), re.IGNORECASE)

    def facts(self, kind: str, sentence: str) -> list[tuple]:
        """(who, slot, value) of each fact that a sentence of this kind states; of a question there is no value."""
        found = set()
        for match in filter(None, (pattern.fullmatch(sentence) for pattern in self.frames[kind])):
            gap = match.groupdict()
            facts = []
            for n in ("1", "2") if kind == "two" else ("1",):
                slot, value = gap["noun" + n], gap.get("v" + n, "")
                known = self.values[wording.type_of(slot)].get(value.casefold(), "no value") if value else None
                facts.append((self.names[gap["poss" + n].casefold()], slot, known))
            if all(value != "no value" for *_, value in facts):
                found.add(tuple(facts))
        assert len(found) <= 1, (sentence, found)
        return list(found.pop()) if found else []

    def question(self, sentence: str) -> tuple:
        """(who, slot)."""
        kinds = [kind for kind in self.frames if kind.startswith("question")]
        ((who, slot),) = {fact[:2] for kind in kinds for fact in self.facts(kind, sentence)}
        return who, slot

    def plain(self, sentence: str) -> str:
        """Without asides."""
        for pattern in self.frames["before"]:
            sentence = re.sub(f"^{pattern.pattern} ", "", sentence)
        for pattern in self.frames["after"]:
            sentence = re.sub(f", {pattern.pattern}\\.$", ".", sentence)
        return sentence

    def prompt(self, text: str) -> tuple[dict, dict, dict, list]:
        """By (who, slot) the newest values, and those that were corrected; instructions; (cue, slot) of a later
        question."""
        newest, corrected, instructions, queries = {}, {}, {}, []
        for sentence in re.split(r"(?<=[.?]) ", text.removeprefix("User: ").removesuffix("\n")):
            if any(p.fullmatch(sentence) for p in self.frames["small_talk"]):
                continue
            # An aside may look like the start of another sentence ("Listen, is how ...").
            for plain in dict.fromkeys((self.plain(sentence), sentence)):
                update = self.facts("update", plain)
                facts = update or self.facts("one", plain) or self.facts("two", plain)
                query = next(filter(None, (p.fullmatch(plain) for p in self.frames["query"])), None)
                orders = {}
                for kind, patterns in self.asked.items():
                    for match in filter(None, (pattern.fullmatch(plain) for pattern in patterns)):
                        if match["v1"].casefold() in self.words[kind]:
                            orders[kind] = match["v1"].casefold()
                if facts or query or orders:
                    break
            assert sum(map(bool, (facts, query, orders))) == 1, f"{sentence!r} is not of this level"
            for who, slot, value in facts:
                assert ((who, slot) in newest) == bool(update)
                if update:
                    corrected[who, slot] = newest[who, slot]
                newest[who, slot] = value
            instructions |= orders
            if query:
                assert query["cue1"].casefold() in self.cues
                queries.append((query["cue1"].casefold(), query["noun1"]))
        return newest, corrected, instructions, queries


@cache
def reader_of(split: str, level: str) -> Reader:
    return Reader(split, level)


@every_level
def test_every_right_answer_follows_from_the_text(split, level):
    """A reader that knows only the level's words finds each fact, and with it the answers: what a level does not name
    is as in training, and what it names is never so. The newest value counts; what was not said is not there."""
    reader, data = reader_of(split, level), data_of(split, level)
    kinds, answered = [], 0
    for item in data.items(25, FULL):
        newest, corrected, instructions, queries = reader.prompt(item.prompt)
        assert newest == {fact.key: fact.value for fact in item.facts}
        assert {k: word.casefold() for k, word in item.instructions.items()} == instructions
        assert (len(newest), len(corrected)) == (8, 2)
        assert all(who is None and newest[who, slot] != old for (who, slot), old in corrected.items())
        for probe in item.probes:
            kinds.append(probe.kind)
            assert probe.answer == full_answer(probe.value, item.instructions)
            if probe.kind == "query":
                ((cue, slot),) = queries
                assert probe.question.casefold() == f"{cue}."
                assert (None, slot) not in newest
                lines = data.tokenizer.decode(item.body).split("\n")
                stated = [line.removeprefix("User: ") for line in lines if line.startswith("User: ")]
                if stated:  # see the test of the lines that are missing
                    assert [reader.facts("one", line) for line in stated] == [[(None, slot, probe.value)]]
                answered += bool(stated)
                continue
            who, slot = key = reader.question(probe.question)
            if probe.kind == "unknown":
                assert who is None
                assert key not in newest
                assert probe.value == UNKNOWN
                assert probe.about is None
            else:
                assert probe.value == newest[key]
                assert probe.about == key
                expected = "update" if key in corrected else "other" if who else "fact"
                assert probe.kind == expected
    assert set(kinds) == {"fact", "other", "update", "unknown", "query"}
    assert kinds.count("update") == 25 * 2
    assert len(kinds) == 25 * (4 + 2 + 1)
    assert answered >= 24


def test_a_query_with_rivals_cannot_be_answered_from_the_body_alone():
    """The body states as many facts of the user's as were asked for, in any order; the prompt tells which is meant."""
    reader, data, places = reader_of("test", "values"), data_of("test", "values"), []
    for item in data.items(40, Shape(2, 256, 1, query=True, rivals=2)):
        _, _, _, ((_, slot),) = reader.prompt(item.prompt)
        lines = data.tokenizer.decode(item.body).split("\n")
        stated = [line.removeprefix("User: ") for line in lines if line.startswith("User: ")]
        found = {fact[1]: fact[2] for line in stated for fact in reader.facts("one", line)}
        (probe,) = [probe for probe in item.probes if probe.kind == "query"]
        assert len(found) == len(stated) == 3
        assert found[slot] == probe.value
        places.append(list(found).index(slot))
    assert {*places} == {0, 1, 2}


def test_the_body_states_what_a_later_question_is_about():
    """In every item, also where other lines fill the body up to its last token."""
    data = data_of("test", "slots")
    for item in data.items(300, FULL):
        assert "User: " in data.tokenizer.decode(item.body)


def test_what_was_never_said_is_not_what_a_later_question_is_about():
    """Its fact is in the body."""
    reader = reader_of("test", "slots")
    for item in data_of("test", "slots").items(100, FULL):
        ((_, slot),) = reader.prompt(item.prompt)[3]
        unknown = [reader.question(probe.question)[1] for probe in item.probes if probe.kind == "unknown"]
        assert slot not in unknown


def test_an_aside_leaves_values_and_names_as_they_are():
    """Not "By the way, fadin is my dentist": the first letter of a sentence becomes small only in ordinary words."""
    for item in data_of("train").items(1500, Shape(6, 0, 1)):
        assert all(fact.value in item.prompt for fact in item.facts)


@pytest.mark.parametrize(("split", "level"), [("train", "known"), ("test", "all")])
def test_competing_questions_have_the_right_answer(split, level):
    """In the body: about somebody else's fact that stands before it, with the latest value; the answers are marked."""
    reader, data, answered = reader_of(split, level), data_of(split, level), 0
    for item in data.items(8, Shape(3, 400, 1, prose=0.0)):
        known, asked = {}, None
        lines = data.tokenizer.decode(item.body).split("\n")
        for line in lines[:-2]:  # the last one may be prose that fills up the distance
            if line.startswith("Q: "):
                asked = reader.question(line.removeprefix("Q: "))
            elif line.startswith("A: "):
                assert line == f"A: {known[asked]}."
                answered += 1
            else:
                ((who, slot, value),) = reader.facts("one", line)
                assert who is not None
                known[who, slot] = value
        marked = data.tokenizer.decode(
            [t for t, k in zip(item.body, item.body_kind, strict=True) if k == COMPETING]
        ).removesuffix(".")
        assert marked == "".join(line.removeprefix("A:") for line in lines if line.startswith("A: ")).removesuffix(".")
    assert answered > 30


def test_a_held_out_level_differs_from_training_in_what_it_names_alone():
    """By what a reader of training's words can make of its questions: new slots and sentences are unreadable, others
    are not."""
    reader = reader_of("train", "known")

    def readable(level: str) -> bool:
        try:
            for item in data_of("test", level).items(10, FULL):
                for probe in item.probes:
                    if probe.kind != "query":
                        reader.question(probe.question)
        except ValueError:
            return False
        return True

    assert {level: readable(level) for level in ("known", "slots", "wordings", "all")} == {
        "known": True,
        "slots": False,
        "wordings": False,
        "all": False,
    }


# What an item holds


@pytest.mark.parametrize("prose", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("distance", [0, 1, 2, 17, 48, 300])
def test_distance_is_exact(distance, prose):
    """Exactly so many tokens stand before the prompt and behind it, and they end with a line."""
    data = data_of("test", "all")
    for item in data.items(8, Shape(3, distance, 2, before=distance // 2, query=distance >= 48, prose=prose)):
        assert len(item.body) == len(item.body_kind) == distance
        assert len(item.before) == distance // 2
        for text in (item.before, item.body):
            assert not text or data.tokenizer.decode(text).endswith("\n")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(6, 0, 8, others=2),
        Shape(3, 0, 3, updates=2),
        Shape(1, 0, 1, updates=1),
        Shape(2, 0, 2, updates=2),
    ],
)
def test_there_are_as_many_probes_as_asked_for(shape):
    """Each about another fact, though all of them were corrected."""
    for item in data_of("train").items(10, shape):
        assert len({probe.about for probe in item.probes}) == len(item.probes) == shape.probes


def test_every_item_can_be_made_alone():
    """By its number, by another object, in any order, whatever the global random states; others are different."""
    items = data_of("test", "all").items(6, FULL, start=10)
    fresh = OpenWorld(load_tokenizer(), data_of("test", "all").prose, Level.named("all", "test"), 0)
    random.seed(3)
    torch.manual_seed(3)
    assert [fresh.item(n, FULL) for n in (15, 12, 10)] == [items[5], items[2], items[0]]
    others = [data.item(10, FULL) for data in (data_of("test", "all", 1), data_of("test"), data_of("train"))]
    assert len({item.prompt for item in (*items, *others)}) == 9


BIG = len(parts("train")["slots"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shape(3, 10, 0), "probes 1 to the number of facts"),
        (lambda: Shape(3, 10, 5, others=1), "probes 1 to the number of facts"),
        (lambda: Shape(0, 10, 1, others=2), "facts are 1 or more"),
        (lambda: Shape(3, -1, 1), r"no item is Shape\(facts=3, distance=-1"),
        (lambda: Shape(3, 0, 1, updates=4), "updates at most the user's"),
        (lambda: Shape(3, 47, 1, query=True), "with a query the distance is at least 48"),
        (lambda: Shape(3, 95, 1, query=True, rivals=1), "with a query the distance is at least 96"),
        (lambda: Shape(3, 64, 1, rivals=1), "there are none without a query"),
        (lambda: data_of("train").item(0, Shape(BIG, 0, 1)), f"cannot hold {BIG} facts; choose 1 to {BIG - 1}"),
        (
            lambda: data_of("test", "slots").item(0, Shape(1, 0, 1, others=50)),
            "cannot hold 50 facts about others; choose 0 to 49",
        ),
        (lambda: Level.named("new", "test"), "unknown level 'new'; there are known, values, slots, wordings, all"),
        (lambda: Level.named("all", "dev"), "unknown split 'dev'; there are train, validation, test"),
    ],
)
def test_impossible_items_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_largest_prompt_holds_every_slot_but_one():
    item = data_of("test", "slots").item(0, Shape(48, 0, 48, unknown=1))
    (unknown,) = [probe for probe in item.probes if probe.kind == "unknown"]
    assert len({fact.slot for fact in item.facts}) == 48
    assert reader_of("test", "slots").question(unknown.question)[1] not in {fact.slot for fact in item.facts}


# Natural prompts


@pytest.mark.parametrize(
    ("split", "prompts", "questions"), [("train", 1795, 9874), ("validation", 20, 107), ("test", 120, 600)]
)
def test_natural_prompts(split, prompts, questions):
    """Every answer stands in its text and in none of its questions, and is judged right; so is all that is accepted."""
    rows = natural_prompts(split)
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == prompts
    asked = [(row, q) for row in rows for q in row["questions"]]
    assert len({(row["id"], q["question"]) for row, q in asked}) == questions
    for row, q in asked:
        assert q["answer"].casefold() in row["text"].casefold()
        assert q["answer"].casefold() not in q["question"].casefold()
        for right in (q["answer"], *q["accept"]):
            assert judge(f" {right}.", {}) == Verdict(right, None)


def test_natural_prompts_of_training_are_others():
    """No six words of theirs stand in a prompt that is measured, and no question about one of those is asked."""

    def sixes(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.casefold())
        return set(zip(*(words[i:] for i in range(6)), strict=False))

    trained, measured = natural_prompts("train"), [*natural_prompts("validation"), *natural_prompts("test")]
    held = set().union(*(sixes(row["text"]) for row in measured))
    assert not [row["id"] for row in trained if sixes(row["text"]) & held]
    asked = {(q["question"], q["answer"]) for row in measured for q in row["questions"]}
    assert not [row["id"] for row in trained for q in row["questions"] if (q["question"], q["answer"]) in asked]


def test_values_of_natural_prompts_can_be_swapped():
    """They stand in the text as whole words and are of a kind that has values. What is measured has none."""
    rows = natural_prompts("train")
    for row in rows:
        for value in row["values"]:
            assert re.search(rf"(?<!\w){re.escape(value['value'])}(?!\w)", row["text"])
            assert wording.values()[value["kind"]]["train"]
    assert sum(bool(row["values"]) for row in rows) > len(rows) / 2
    assert not any(row["values"] for split in ("validation", "test") for row in natural_prompts(split))


def test_natural_prompts_have_a_body():
    """Of the split's own level, as long as asked for; the questions are the file's."""
    data, rows = data_of("test", "all"), natural_prompts("test")[:3]
    items = data.natural(distance=70, limit=3)
    assert [item.prompt for item in items] == [f"User: {row['text']}\n" for row in rows]
    assert [[p.question for p in item.probes] for item in items] == [
        [q["question"] for q in r["questions"]] for r in rows
    ]
    assert {len(item.body) for item in items} == {70}
    assert len({item.body for item in items}) == 3
    (probe, *_), right = items[0].probes, rows[0]["questions"][0]
    assert (probe.answer, probe.right) == (f"{right['answer']}.", (right["answer"], *right["accept"]))


# What an answer says

ALL = {"opener": "Of course", "address": "captain", "closer": "over"}


@pytest.mark.parametrize(
    ("generated", "instructions", "said", "followed"),
    [
        ("Of course, red drum, captain, over.", ALL, "red drum", 1.0),
        (" Of course, red drum, captain, over.\n", ALL, "red drum", 1.0),
        ("red drum", {}, "red drum", None),
        ("", {}, "", None),
        ("red drum.", ALL, "red drum", 0.0),
        ("Sure, red drum, captain, over.", ALL, "red drum", 2 / 3),
        ("Of course, Fadin, red drum, captain, over.", ALL, "Fadin, red drum", 1.0),
        ("red drum, over, captain.", {"closer": "over"}, "red drum, over", 0.0),
        ("captain, red drum.", {"address": "captain"}, "captain, red drum", 0.0),
        ("over, red drum.", {"closer": "over"}, "over, red drum", 0.0),
        ("of course, red drum.", {"opener": "Of course"}, "of course, red drum", 0.0),
        ("you did not tell me, captain.", {"address": "captain"}, UNKNOWN, 1.0),
        ("Absolutely, red drum.", {}, "red drum", None),
        ("Yo, red drum.", {"opener": "Yo"}, "red drum", 1.0),
        ("judge.", {}, "judge", None),
        ("Of course, captain.", ALL, "Of course, captain", 2 / 3),
    ],
)
def test_judge(generated, instructions, said, followed):
    """Words of instructions of any split are taken off, each in its place; what is left is the value."""
    assert judge(generated, instructions) == Verdict(said, followed if followed is None else pytest.approx(followed))


# Tokens and tensors


def test_a_batch_is_padded_on_the_side_that_is_read_first_or_last():
    """Prompt and context on the left, the rest on the right; kinds mark the answers, and are 0 at the padding."""
    data = data_of("train")
    shapes = [replace(FULL, facts=facts, before=before) for facts, before in ((6, 24), (2, 0), (9, 40))]
    items = [data.item(n, shape) for n, shape in enumerate(shapes)]
    batch = open_batch(data, items)
    encode = data.tokenizer.encode_long
    for row, item in enumerate(items):
        prompt = encode(item.prompt)
        assert batch.prompt[row, batch.prompt_valid[row]].tolist() == prompt
        assert batch.context[row, batch.context_valid[row]].tolist() == [*item.before, *prompt]
        assert batch.prompt_valid[row].long().diff().min() >= 0  # True from somewhere on, to the end
        assert batch.prompt_valid[row, -1]
        assert batch.context_valid[row].long().diff().min() >= 0
        assert batch.context_valid[row, -1]
        there = batch.kind[row] > 0
        probes = "".join(f"User: {p.question}\nBot: {p.answer}\n" for p in item.probes)
        assert data.tokenizer.decode(batch.rest[row, there].tolist()) == data.tokenizer.decode(item.body) + probes
        assert there.long().diff().max() <= 0
        answers = batch.rest[row, batch.kind[row] == ANSWER].tolist()
        assert data.tokenizer.decode(answers) == "".join(f" {p.answer}\n" for p in item.probes)
        assert set(batch.kind[row, :64].tolist()) <= {TEXT, COMPETING}
    assert batch.prompt.shape[1] == max(len(encode(item.prompt)) for item in items)


def test_a_row_of_the_sample_is_the_item_as_text():
    data = data_of("test", "values")
    item: Item = data.item(0, FULL)
    row = data.row(item)
    assert (row["split"], row["new"]) == ("test", ["values"])
    assert (row["prompt"] + "\n", row["instructions"]) == (item.prompt, item.instructions)
    assert data.tokenizer.encode_long(row["body"]) == list(item.body)
    assert [probe["answer"] for probe in row["probes"]] == [probe.answer for probe in item.probes]


def test_a_level_of_few_slots_has_the_same_ones_of_several_types():
    """For prompts that are to be about few things; everything else is drawn as ever."""
    few = Level("train", most=8).slots()
    assert few == Level("train", most=20).slots()[:8]
    assert len(set(few)) == 8
    assert set(few) < set(Level("train").slots())
    assert len({wording.type_of(slot) for slot in few}) > 3
    data = OpenWorld(load_tokenizer(), data_of("train").prose, Level("train", most=8), 0)
    assert {fact.slot for item in data.items(20, Shape(6, 64, 6, others=1)) for fact in item.facts} == set(few)


def test_coined_values_and_slots_are_in_no_list():
    """As many as asked for, new ones all the time; a coined slot keeps its type, and its questions have answers."""
    data = data_of("train")
    data = replace(data, level=replace(data.level, coined=0.5))
    facts = [fact for item in data.items(100, Shape(6, 0, 6)) for fact in item.facts]
    listed = {
        what: {word.casefold() for split in SPLITS for word in parts(split)[what]} for what in ("values", "slots")
    }
    for what, words in {"values": [f.value for f in facts], "slots": [f.slot for f in facts]}.items():
        coined = [word for word in words if word.casefold() not in listed[what]]
        assert 0.4 < len(coined) / len(facts) < 0.6
        assert len(set(coined)) > 0.95 * len(coined)
        in_training = {word.casefold() for word in parts("train")[what]}
        assert {word.casefold() for word in words} - in_training == {word.casefold() for word in coined}
    assert {wording.type_of(fact.slot) for fact in facts} == set(WORDS["slots"])
    few = replace(data, level=replace(data.level, most=8))
    slots = {fact.slot for item in few.items(20, Shape(6, 0, 6)) for fact in item.facts}
    assert slots <= {*few.level.slots()}
