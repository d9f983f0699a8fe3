"""Items of every task, pinned by a hash: a seed gives the same items whatever the names of classes and fields."""

import hashlib
import json
from functools import cache

import pytest

from prosg_lib.tasks.copying import Copy
from prosg_lib.tasks.dialogue import Dialogues, Shape, data_hash
from prosg_lib.tasks.mqar import Mqar
from prosg_lib.tasks.pair_batches import PairDraw
from prosg_lib.tasks.passkey import Passkey
from prosg_lib.tasks.people import characters, reversal
from prosg_lib.tasks.phonebook import Phonebook
from prosg_lib.tasks.problems import Material
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def prose(split: str) -> ProseTokens:
    return ProseTokens.of(Prose("own", {split: own_sentences(split)[:200]}), split, load_tokenizer())


def dialogues(split: str, *shapes: Shape, seed: int = 0, rich: bool = False):
    data = Dialogues(load_tokenizer(), prose(split), split, seed, rich)
    items = [data.item(number, shape) for shape in shapes for number in (0, 7)]
    return [[data.row(item), [fact.slot for fact in item.facts], item.body_kind] for item in items]


def problems(setting):
    found = [setting.problem(Material(load_tokenizer(), prose(s)), s, 1, n) for s in SPLITS for n in range(3)]
    return [[p.task, p.cell, p.memory, p.rest, p.judged, p.gold] for p in found]


def pairs(task):
    return [[p.context, p.query, p.answer] for split in SPLITS for p in task(split)[:100]]


def batches(*growth):
    tasks = {"characters": characters("train")[:300], "reversal": reversal("train")[:300]}
    draw = PairDraw(tasks, load_tokenizer(), 4, (1, 3), 0, ("characters", "reversal"), *growth)
    found = [draw(step) for step in (-1, 0, 4, 9, 10, 11)]
    return [t.tolist() for b in found for t in (*b.context, *b.query, *b.prompted, b.answer)]


SHAPES = (Shape(6, 96, 3, instructions=1), Shape(3, 64, 2, 2, 0.25), Shape(4, 20, 1, prose=1), Shape(1, 0, 1))

PINNED = {
    "own sentences": (lambda: [own_sentences(split) for split in SPLITS], "2f52c55244964283"),
    "dialogues, train": (lambda: dialogues("train", *SHAPES), "43eb0cad76b9d890"),
    "dialogues, validation": (lambda: dialogues("validation", *SHAPES), "c70f255c8d3621a4"),
    "dialogues, test": (lambda: dialogues("test", *SHAPES), "d9f666bff69ab9c8"),
    "dialogues, rich": (lambda: dialogues("train", *SHAPES, seed=3, rich=True), "f569e7f0c4e51322"),
    "copying": (lambda: [problems(Copy(n)) for n in (1, 9)], "89af72ec7e031572"),
    "mqar": (lambda: [problems(Mqar(64, 4)), problems(Mqar(48, 4, 60))], "c294192cae52e41e"),
    "phonebook": (lambda: [problems(Phonebook(n)) for n in (3, 12)], "a458cbf04e888f11"),
    "passkey": (lambda: [problems(Passkey(40, depth)) for depth in (0.0, 0.5, 1)], "6878ea6c988c4df4"),
    "characters": (lambda: pairs(characters), "cae997dff30687f5"),
    "reversal": (lambda: pairs(reversal), "e924860abbb8519b"),
    "pairs, drawn": (lambda: batches(), "6e5f226bf6bb350e"),
    "pairs, drawn after repeated tokens": (lambda: batches(10), "5e881dbf0807b6ea"),
    "pairs, drawn after repeated tokens that grow": (lambda: batches(10, 96, 200), "bbe3325969c00f46"),
}


@pytest.mark.parametrize("name", PINNED)
def test_a_seed_gives_the_same_items_as_ever(name):
    """A change here changes every number in the notebooks, and has to raise the VERSION of the task."""
    make, pinned = PINNED[name]
    assert digest(make()) == pinned


def test_checkpoints_fit_the_data():
    tokenizer = load_tokenizer()
    assert (data_hash(tokenizer), data_hash(tokenizer, rich=True)) == ("4a200ec7a4165939", "58fc535de8f49c3d")
