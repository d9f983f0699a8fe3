"""Character description: the description is before the name; no name, description or wording is in two splits."""

import itertools
import random
import re
from collections import Counter

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks import people
from prosg_lib.tasks.characters import CONTEXTS, characters
from prosg_lib.tasks.pairs import fitted
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer


def everybody(seed: int, count: int) -> list[people.Person]:
    return [people.person(split, seed, index) for split in SPLITS for index in range(count)]


# What an item says


@pytest.mark.parametrize("split", SPLITS)
def test_the_description_stands_before_the_name(split):
    """The context tells role, deed, thing and place, then the name, which ends it (but for a sentence of its own)."""
    for index, pair in enumerate(characters(split, count=500)):
        who = people.person(split, 0, index)
        assert pair.answer == who.name
        before, after = pair.context.split(who.name)
        assert after.removesuffix(next((a for a in people.ASIDES["after"] if after.endswith(a)), "")).strip() == "."
        assert who.role in before
        assert f"the {who.thing} of the {who.place}" in before.replace("The", "the")
        assert sum(bool(re.search(rf"\b{verb}\b", before)) for verb in who.deed) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_query_asks_in_other_words(split):
    """Role, thing and place are named, the deed by its other word; the answer is not in it, and would come next."""
    for index, pair in enumerate(characters(split, count=500)):
        who = people.person(split, 0, index)
        assert pair.query.startswith("Question: ")
        assert pair.query.endswith("?\nAnswer:")
        assert who.role in pair.query
        assert f"the {who.place}'s {who.thing}" in pair.query.replace("The", "the")
        assert f"{who.thing} of the {who.place}" not in pair.query
        told, asked = ({verb for verb in who.deed if verb in text} for text in (pair.context, pair.query))
        assert told | asked == set(who.deed)
        assert not told & asked
        assert not any(word in pair.query for word in pair.answer.split())


def test_articles_fit_what_they_stand_before():
    """`an` before the sound of a vowel, `a` before others, in every text; every sentence starts with a capital."""
    texts = [text for split in SPLITS for p in characters(split, count=500) for text in (p.context, p.query)]
    words = [w.strip(",.?") for text in texts for w in text.split()]
    for article, role in itertools.pairwise(words):
        if role in people.ROLES and article.lower() in ("a", "an"):
            assert article.lower() == ("an" if role[0] in "aeiou" else "a")
    assert all(text[0].isupper() and "{" not in text for text in texts)
    assert not any(role.startswith(("eu", "hono", "hour", "u")) for role in people.ROLES if role != "usher")


@pytest.mark.parametrize("split", SPLITS)
def test_items_are_short(split):
    """A context has 60 tokens at most and a query with its answer 65, so nothing is left out of such room."""
    found = fitted(characters(split, seed=1, count=500), load_tokenizer(), context=60, query=65)
    assert found.too_long == 0


def test_all_wordings_are_used():
    """Every frame of a split turns up among its items, those of the contexts and those of the questions."""
    for split in SPLITS:
        items = [(people.person(split, 0, i), p) for i, p in enumerate(characters(split, count=1000))]
        for frames, part, form in (
            (CONTEXTS, "context", "the {0.thing} of the {0.place}"),
            (people.QUESTIONS, "query", "the {0.place}'s {0.thing}"),
        ):
            seen = Counter()
            for who, pair in items:
                for verb, frame in itertools.product(who.deed, frames[split]):
                    said = frame.format(name=who.name, **people._words(who, verb, form.format(who)))
                    seen[frame] += said in getattr(pair, part)
            assert sum(seen.values()) == len(items)
            assert min(seen[frame] for frame in frames[split]) > 5


# Everything follows from the seed


def test_the_same_seed_gives_the_same_items():
    """In any order, in any number, and whatever the global random state; another seed gives other people."""
    first = characters("train", seed=3, count=50)
    random.seed(0)
    people._order.cache_clear()
    assert characters("train", seed=3, count=80)[:50] == first
    other = characters("train", seed=4, count=50)
    assert {p.answer for p in first} != {p.answer for p in other}
    assert not {p.context for p in first} & {p.context for p in other}


def test_an_item_is_fixed():
    """A change that gives other items for the same seed is seen here, and has to raise VERSION."""
    assert people.VERSION == 3
    assert characters("test", count=1)[0].context == (
        "Whoever has met the potter who discovered the desk of the brewery has met Ella Rush."
    )


def test_default_counts():
    """5,000 and 500 as in the paper, and 500 to validate on."""
    assert [len(characters(split)) for split in SPLITS] == [5_000, 500, 500]


# Splits


@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_is_there_twice(seed):
    """Within and across splits no name and no description, at the largest count that there is."""
    crowd = everybody(seed, people.CAPACITY)
    assert len({who.name for who in crowd}) == len(crowd)
    assert len({(who.role, who.deed, who.thing, who.place) for who in crowd}) == len(crowd)


@pytest.mark.parametrize("frames", [CONTEXTS, people.QUESTIONS], ids=["contexts", "questions"])
def test_no_wording_is_in_two_splits(frames):
    """Nor is it part of another's; a split has none twice."""
    assert set(frames) == set(SPLITS)
    for split in SPLITS:
        assert len(set(frames[split])) == len(frames[split])
    for a, b in itertools.permutations(SPLITS, 2):
        assert not any(one in other for one in frames[a] for other in frames[b])


def test_every_word_stands_for_one_thing():
    """No list has a word twice, the two words for a deed are no other's, and no part of a name is another word."""
    lists = (people.FIRST_NAMES, people.LAST_NAMES, people.ROLES, people.THINGS, people.PLACES)
    deeds = [verb for deed in people.DEEDS for verb in deed]
    words = [word.lower() for group in (*lists, deeds) for word in group]
    assert len(set(words)) == len(words)


# What is refused


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match="unknown split 'dev'; there are train, validation, test"):
        characters("dev")


@pytest.mark.parametrize("count", [0, -1, people.CAPACITY + 1, 2.0, "10", True])
def test_a_count_that_cannot_be_had(count):
    """The message says how many there can be."""
    with pytest.raises(UserError, match=f"{count!r} items asked for; a split has 1 to {people.CAPACITY}"):
        characters("train", count=count)
