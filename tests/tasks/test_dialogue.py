"""The constructed data set: what an item holds, that splits share nothing, and how an answer is judged."""

import itertools
import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from prosg_lib.errors import UserError
from prosg_lib.tasks import dialogue, wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT, Dialogues, Shape, dialogue_batch
from prosg_lib.tasks.wording import Fact, Verdict, judge
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

WORDS = wording.words()
SLOTS, INSTRUCTIONS = WORDS["slots"], WORDS["instructions"]

each_split = pytest.mark.parametrize("split", SPLITS)


@cache
def data_of(split: str, seed: int = 0, rich: bool = False) -> Dialogues:
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {split: own_sentences(split)[:200]}), split, tokenizer)
    return Dialogues(tokenizer, prose, split, seed, rich)


def many(split: str, count: int = 30, rich: bool = False, **shape):
    shape = Shape(**{"facts": 6, "distance": 40, "probes": 3, "instructions": 2} | shape)
    return data_of(split, rich=rich).items(count, shape)


def statements(fact: Fact, who: str | None, split: str) -> list[str]:
    """Every sentence that states this fact in this split."""
    spec, frames = SLOTS[fact.slot], WORDS["frames"]["statements"][split]
    verbs = spec["verbs"] if split == "train" else [spec["held_out_verbs"][split]]
    framed = [frame.format_map(wording._gaps(fact, who)) for frame in frames]
    return framed + [f"I {v[0]} {fact.value}." if who is None else f"{who} {v[1]} {fact.value}." for v in verbs]


def questions(slot: str, who: str | None, split: str) -> list[str]:
    """Every question about this slot in this split."""
    frames = WORDS["frames"]["questions"][split]
    return [frame.format_map(wording._gaps(Fact(slot, ""), who)) for frame in frames]


# What an item holds


@each_split
@pytest.mark.parametrize("facts", [1, 3, 24])
def test_a_prompt_states_its_facts_and_instructions(split, facts):
    """The requested number of facts about different slots, each stated once in the split's words; instructions too."""
    for item in many(split, 10, facts=facts, probes=1):
        assert len({f.slot for f in item.facts}) == len(item.facts) == facts
        assert item.prompt.startswith("User: ")
        assert item.prompt.endswith(".\n")
        sentences = set(item.prompt[len("User: ") : -1].replace(". ", ".\n").split("\n"))
        orders = {o.format(v=word) for kind, word in item.instructions.items() for o in INSTRUCTIONS[kind][split]}
        assert len(item.instructions) == len(orders & sentences) == 2
        assert all(len(sentences & set(statements(fact, None, split))) == 1 for fact in item.facts)
        assert len(sentences) == facts + 2


@pytest.mark.parametrize("distance", [0, 1, 2, 17, 64, 300])
@pytest.mark.parametrize("prose", [0.0, 0.5, 1.0])
def test_distance_is_exact(distance, prose):
    """The requested number of tokens stands between prompt and probes, and they end with a line."""
    for item in many("test", 8, distance=distance, prose=prose):
        assert len(item.body) == len(item.body_kind) == distance
        assert not item.body or data_of("test").tokenizer.decode(item.body).endswith("\n")


@each_split
def test_probes_are_about_facts_of_the_prompt(split):
    """Different facts, in the split's words; the answer is the value with the words of the instructions around it."""
    for item in many(split):
        assert len({p.fact for p in item.probes}) == 3
        for probe in item.probes:
            assert probe.fact in item.facts
            assert probe.question in questions(probe.fact.slot, None, split)
            assert probe.answer == full_answer(probe.fact.value, item.instructions)
            assert judge(probe.answer, probe.fact.value, item.instructions) == Verdict(True, 1.0)


@each_split
def test_competing_questions_have_the_right_answer(split):
    """Every question in the body is about a fact stated before it and not overwritten since, with the right answer."""
    facts = [Fact(s, v) for s, spec in SLOTS.items() for v in spec["values"]]
    stated = {line: (who, f) for who in WORDS["others"] for f in facts for line in statements(f, who, split)}
    about = {line: (who, slot) for who in WORDS["others"] for slot in SLOTS for line in questions(slot, who, split)}
    assert len(about) == len(WORDS["others"]) * len(SLOTS) * len(questions("home", "Tom", split))
    answered = 0
    for item in many(split, 8, distance=400, prose=0.0):
        known, question = {}, None
        # The last line may be prose that fills up the distance.
        for line in data_of(split).tokenizer.decode(item.body).split("\n")[:-2]:
            if line.startswith("Q: "):
                question = about[line.removeprefix("Q: ")]
            elif line.startswith("A: "):
                assert line == f"A: {known[question]}."
                answered += 1
            else:
                who, fact = stated[line]
                assert fact.slot != "name"
                known[who, fact.slot] = fact.value
    assert answered > 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data.item(0, Shape(0, 10, 0)), r"no item is Shape\(facts=0, .* the distance is at least 0"),
        (lambda data: data.item(0, Shape(3, -1, 1)), "the distance is at least 0"),
        (lambda data: data.item(0, Shape(3, 10, 4)), "probes are 1 to facts"),
        (lambda data: data.item(0, Shape(3, 10, 0)), "probes are 1 to facts"),
        (lambda data: data.item(0, Shape(25, 10, 1)), "a prompt cannot hold 25 facts; choose 1 to 24"),
        (lambda data: replace(data, split="dev"), "unknown split 'dev'; there are train, validation, test"),
        (lambda data: replace(data, split="validation", rich=True), "the validation split has no rich form"),
        (lambda data: replace(data, split="test", rich=True), "the test split has no rich form"),
    ],
)
def test_impossible_items_are_refused(make, message):
    """Among them rich test prompts: a generator is never measured on the wording that it was trained with."""
    with pytest.raises(UserError, match=message):
        make(data_of("train"))


# Everything follows from the seed


def test_every_item_can_be_made_alone():
    """By its number, by another object, in any order, whatever the global random states."""
    shape = Shape(facts=6, distance=50, probes=2, instructions=1)
    items = data_of("train").items(6, shape, start=10)
    fresh = Dialogues(load_tokenizer(), data_of("train").prose, "train", 0)
    random.seed(3)
    torch.manual_seed(3)
    assert [fresh.item(n, shape) for n in (15, 12, 10)] == [items[5], items[2], items[0]]


def test_numbers_and_seeds_differ():
    """No two of 200 items are equal, nor those of two seeds."""
    shape = Shape(facts=6, distance=0, probes=1)
    first = [item.prompt for item in data_of("train").items(200, shape)]
    second = [item.prompt for item in data_of("train", 1).items(200, shape)]
    assert len({*first, *second}) == 400


# Splits


def frames_of(split: str) -> set[str]:
    frames = [f for kind in ("statements", "questions") for f in WORDS["frames"][kind][split]]
    frames += [f for spec in INSTRUCTIONS.values() for f in spec[split]]
    if split == "train":
        more = wording.asides()
        frames += more["statements"] + more["questions"] + [f for kind in more["instructions"].values() for f in kind]
    return set(frames)


def test_no_wording_is_in_two_splits():
    """Neither frames (including those of rich training), nor instructions, nor the verbs of any slot."""
    for a, b in itertools.combinations(SPLITS, 2):
        assert not frames_of(a) & frames_of(b)
        for slot, spec in SLOTS.items():
            fact = Fact(slot, spec["values"][0])
            for who in (None, "Tom"):
                assert not set(statements(fact, who, a)) & set(statements(fact, who, b))


def test_values_fall_into_three_classes():
    """8 of a slot's 16 values are common, 4 each belong to validation and test; each is in one class."""
    for slot, spec in SLOTS.items():
        classes = [wording.values_of(slot, kind) for kind in ("common", "validation", "test")]
        assert [len(c) for c in classes] == [8, 4, 4]
        assert sorted(v for c in classes for v in c) == sorted(spec["values"])


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12, 24])
def test_held_out_values_do_not_meet_in_training(count):
    """A held-out prompt has three values of its own class; a training prompt never more than two of either.

    So with three facts or more no set of facts is in two splits, over a thousand prompts of each.
    """
    sets = {}
    for split in SPLITS:
        rng = random.Random(f"{split}/{count}")
        prompts = [wording.draw_facts(count, split, rng) for _ in range(1000)]
        sets[split] = {frozenset(facts) for facts in prompts}
        for facts in prompts:
            held = {
                kind: sum(f.value in wording.values_of(f.slot, kind) for f in facts) for kind in ("validation", "test")
            }
            if split == "train":
                assert max(held.values()) <= 2
            else:
                assert held == dict.fromkeys(held, 0) | {split: min(count, 3)}
    assert not sets["validation"] & sets["test"]
    if count >= 3:
        assert not sets["train"] & (sets["validation"] | sets["test"])


def test_training_contains_every_value():
    """Held-out values are unseen together, not unseen."""
    rng = random.Random(0)
    seen = {fact for _ in range(1500) for fact in wording.draw_facts(6, "train", rng)}
    assert len(seen) == sum(len(spec["values"]) for spec in SLOTS.values())


# Rich training


def test_rich_training_words_the_same_dialogues_differently():
    """Every value and instruction is still stated and asked about; the prompts differ, and are in no other split."""
    data, items = data_of("train", rich=True), many("train", 200, rich=True, distance=30)
    for item in items:
        stated = [f.value for f in item.facts] + list(item.instructions.values())
        assert all(word in item.prompt for word in stated)
        assert len(item.body) == 30
        assert data.encode_prompt(item) == data.tokenizer.encode(item.prompt)
        for probe in item.probes:
            assert SLOTS[probe.fact.slot]["noun"] in probe.question
            assert judge(probe.answer, probe.fact.value, item.instructions) == Verdict(True, 1.0)
    prompts = {item.prompt for item in items}
    for split in SPLITS:
        assert not prompts & {item.prompt for item in many(split, 200)}


def test_rich_training_uses_verbs_of_other_slots():
    """About a fifth of the statements have a verb of any slot, so the verb does not determine the slot."""
    stray = total = 0
    for item in many("train", 150, rich=True, distance=0, probes=1, instructions=0):
        for fact in item.facts:
            total += 1
            others = [v[0] for slot, spec in SLOTS.items() if slot != fact.slot for v in spec["verbs"]]
            stray += any(f"I {verb} {fact.value}" in item.prompt for verb in others)
    assert total == 900
    assert 0.13 < stray / total < 0.27


# What an answer is worth

ALL = {"opener": "Well", "address": "captain", "closer": "over"}


@pytest.mark.parametrize(
    ("generated", "instructions", "recalled", "followed"),
    [
        ("Well, Oslo, captain, over.", ALL, True, 1.0),
        (" Well, Oslo, captain, over.\n", ALL, True, 1.0),
        ("Oslo.", {}, True, None),
        ("Oslo", {}, True, None),
        ("Rome.", {}, False, None),
        ("Oslo, Rome.", {}, False, None),
        ("Oslo Oslo.", {}, False, None),
        ("oslo.", {}, False, None),
        ("", {}, False, None),
        ("I live in Oslo.", {}, False, None),
        ("Oslo.", ALL, True, 0.0),
        ("Sure, Oslo, captain, over.", ALL, True, 2 / 3),
        ("Well, Rome, captain, over.", ALL, False, 1.0),
        ("Well, captain, over.", ALL, False, 1.0),
        ("Well, Oslo, over, captain.", {"closer": "over"}, False, 0.0),
        ("captain, Oslo.", {"address": "captain"}, False, 0.0),
        ("Oslo, Well.", {"opener": "Well"}, False, 0.0),
        ("over, Oslo.", {"closer": "over"}, False, 0.0),
        ("Oslo, captain, captain.", {"address": "captain"}, False, 1.0),
        ("Well, Oslo.", {}, True, None),
        ("Arr, Oslo.", {"opener": "Arr"}, True, 1.0),
    ],
)
def test_judge(generated, instructions, recalled, followed):
    """The value and nothing else but instruction words; every word of an instruction in its own place."""
    verdict = judge(generated, "Oslo", instructions)
    assert verdict.recalled is recalled
    assert verdict.followed == (followed if followed is None else pytest.approx(followed))


def test_judge_accepts_a_value_of_several_words():
    assert judge("Oslo, Norway, captain.", "Oslo, Norway", {"address": "captain"}) == Verdict(True, 1.0)
    assert not judge("Oslo, captain.", "Oslo, Norway", {"address": "captain"}).recalled


def test_no_value_is_an_instruction_word():
    """Otherwise a right answer could not be distinguished from a followed instruction."""
    groups = [[v for spec in SLOTS.values() for v in spec["values"]], WORDS["others"]]
    groups += [spec["words"] for spec in INSTRUCTIONS.values()]
    assert len({w for group in groups for w in group}) == sum(map(len, groups))


# Tokens and tensors


@each_split
def test_kinds_mark_exactly_the_words_of_answers(split):
    """ANSWER: value and words of instructions; COMPETING: the answers after `A:`; everything else is TEXT."""
    data = data_of(split)
    for item in many(split, distance=200):
        ids, kinds = data.probes_of(item)
        marked = [data.tokenizer.decode([i]).strip() for i, k in zip(ids, kinds, strict=True) if k == ANSWER]
        assert marked == [w for p in item.probes for w in p.answer.removesuffix(".").split(", ")]
        assert set(kinds) == {TEXT, ANSWER}
        lines = data.tokenizer.decode(item.body).split("\n")
        marked = [t for t, k in zip(item.body, item.body_kind, strict=True) if k == COMPETING]
        answers = [line[3:-1] for line in lines if line.startswith("A: ")]
        assert [data.tokenizer.decode([t]).strip() for t in marked] == answers
        assert set(item.body_kind) <= {TEXT, COMPETING}


@pytest.mark.parametrize(("rich", "kind_of_marks"), [(False, TEXT), (True, ANSWER)])
def test_punctuation_of_answers(rich, kind_of_marks):
    """Comma, full stop and end of line are text; in rich data they count as parts of the answer."""
    data = data_of("train", rich=rich)
    item = data.item(0, Shape(facts=3, distance=0, probes=2, instructions=2))
    expected = []
    for probe in item.probes:
        question, answer = data.encode_probe(probe)
        texts = [data.tokenizer.decode([t]) for t in answer]
        assert {",", ".", "\n"} <= set(texts)
        expected += [TEXT] * len(question) + [kind_of_marks if t in (",", ".", "\n") else ANSWER for t in texts]
    assert data.probes_of(item)[1] == expected


def test_pieces_are_encoded_like_the_whole():
    """Prompt and probes are encoded in pieces; the ids are those of the whole text."""
    data = data_of("test")
    for item in many("test"):
        assert data.encode_prompt(item) == data.tokenizer.encode(item.prompt)
        text = "".join(f"User: {p.question}\nBot: {p.answer}\n" for p in item.probes)
        assert tuple(data.probes_of(item)[0]) == data.tokenizer.encode(text)


def test_prompts_are_padded_on_the_left_and_the_rest_on_the_right():
    """Nothing is lost or moved: without the padding the items are unchanged."""
    data = data_of("train")
    items = [*many("train", 3), *many("train", 2, facts=24, distance=7)]
    items += many("train", 1, facts=1, probes=1, distance=0)
    batch = dialogue_batch(data, items)
    assert batch.prompt.dtype == batch.rest.dtype == batch.kind.dtype == torch.int64
    for row, item in enumerate(items):
        valid = batch.prompt_valid[row]
        assert tuple(batch.prompt[row][valid].tolist()) == data.encode_prompt(item)
        assert torch.equal(valid, valid.sort().values)
        ids, kinds = data.probes_of(item)
        count = len(item.body) + len(ids)
        assert batch.rest[row, :count].tolist() == [*item.body, *ids]
        assert batch.kind[row, :count].tolist() == [*item.body_kind, *kinds]
        assert not batch.kind[row, count:].any()
    assert batch.prompt_valid.any(0).all()
    assert (batch.kind > 0).any(0).all()


def test_data_hash_depends_on_the_words(monkeypatch):
    """With another word, earlier checkpoints do not fit."""
    before = dialogue.data_hash(load_tokenizer())
    monkeypatch.setattr(wording, "words", lambda: WORDS | {"others": ["Zoe"]})
    assert dialogue.data_hash(load_tokenizer()) != before
