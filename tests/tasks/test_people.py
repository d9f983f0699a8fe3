"""Character description and reversal curse: the order of name and description, the wording, and disjoint splits."""

import itertools
import re
from collections import Counter

import pytest

from prosg_lib.tasks import people
from prosg_lib.tasks.pairs import fitted
from prosg_lib.tasks.people import characters, reversal
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer

TASKS = {"characters": characters, "reversal": reversal}
WORDS = people.words()

each_split = pytest.mark.parametrize("split", SPLITS)
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def described(split: str, task, count: int = 500):
    """The first people of a split with their items."""
    return [(people.person(split, i), pair) for i, pair in enumerate(task(split)[:count])]


# What an item contains


@each_split
def test_the_description_stands_before_the_name(split):
    """The context gives role, deed, thing and place, then the name, which ends it (except for an aside)."""
    for who, pair in described(split, characters):
        assert pair.answer == who.name
        before, after = pair.context.split(who.name)
        assert any(after.removesuffix(aside).strip() == "." for aside in ("", *WORDS["asides"]["after"]))
        assert who.role in before
        assert f"the {who.thing} of the {who.place}" in before.replace("The", "the")
        assert sum(bool(re.search(rf"\b{verb}\b", before)) for verb in who.deed) == 1


@each_split
def test_the_name_stands_before_the_description(split):
    """The context has the name, once, and after it role, deed, thing and place."""
    for who, pair in described(split, reversal):
        assert pair.answer == who.name
        _, after = pair.context.split(who.name)
        assert who.role in after
        assert f"the {who.thing} of the {who.place}" in after
        assert sum(f" {verb}" in after for verb in who.deed) == 1


@each_split
@pytest.mark.parametrize(
    ("task", "thing", "same_verb"),
    [(characters, "the {0.place}'s {0.thing}", False), (reversal, "the {0.thing} of the {0.place}", True)],
    ids=TASKS,
)
def test_the_query_describes_and_asks_for_the_name(split, task, thing, same_verb):
    """Role, thing and place, and the deed by its synonym or the same word; the answer is not in it and comes next."""
    for who, pair in described(split, task):
        assert pair.query.startswith("Question: ")
        assert pair.query.endswith("?\nAnswer:")
        assert who.role in pair.query
        assert thing.format(who) in pair.query.replace("The", "the")
        in_context, in_query = ({v for v in who.deed if v in text} for text in (pair.context, pair.query))
        assert len(in_context) == len(in_query) == 1
        assert (in_context == in_query) is same_verb
        assert not any(word in pair.query for word in pair.answer.split())


@each_split
def test_both_tasks_have_the_same_people(split):
    """Same split and number: same name, same word for the deed, another context."""
    for (who, one), (_, other) in zip(described(split, reversal), described(split, characters), strict=True):
        assert one.answer == other.answer
        assert one.context != other.context
        verbs = [[verb for verb in who.deed if verb in pair.context] for pair in (one, other)]
        assert verbs[0] == verbs[1]


def test_articles_fit_the_following_word():
    """`an` before the sound of a vowel, `a` before others, in every text; every sentence starts with a capital."""
    texts = [text for split in SPLITS for _, p in described(split, characters) for text in (p.context, p.query)]
    found = [w.strip(",.?") for text in texts for w in text.split()]
    for article, role in itertools.pairwise(found):
        if role in WORDS["roles"] and article.lower() in ("a", "an"):
            assert article.lower() == ("an" if role[0] in "aeiou" else "a")
    assert all(text[0].isupper() and "{" not in text for text in texts)
    assert not any(role.startswith(("eu", "hono", "hour", "u")) for role in WORDS["roles"] if role != "usher")


@each_task
@each_split
def test_items_are_short(split, task):
    """A context has at most 60 tokens and a query with its answer 65, so nothing is left out for lack of room."""
    assert fitted(task(split)[:500], load_tokenizer(), context=60, query=65).too_long == 0


@each_split
def test_all_wordings_are_used(split):
    """Every frame of a split occurs among its items, those of the contexts and those of the questions."""
    items = described(split, characters, 1000)
    for frames, part, form in (
        (WORDS["contexts"]["characters"][split], "context", "the {0.thing} of the {0.place}"),
        (WORDS["questions"][split], "query", "the {0.place}'s {0.thing}"),
    ):
        seen = Counter()
        for who, pair in items:
            for verb, frame in itertools.product(who.deed, frames):
                text = frame.format(name=who.name, **people.slots(who, verb, form.format(who)))
                seen[frame] += text in getattr(pair, part)
        assert sum(seen.values()) == len(items)
        assert min(seen[frame] for frame in frames) > 5


# Splits share nothing


@each_task
def test_counts_and_no_repetition(task):
    """5,000 items in train and 500 in the others, as in the paper; all names and all contexts differ."""
    items = {split: task(split) for split in SPLITS}
    assert [len(items[split]) for split in SPLITS] == [5_000, 500, 500]
    everything = [p for split in SPLITS for p in items[split]]
    assert len({p.answer for p in everything}) == len({p.context for p in everything}) == 6_000


def test_names_and_descriptions_are_unique():
    """Within and across splits."""
    crowd = [people.person(split, index) for split in SPLITS for index in range(people.COUNTS[split])]
    assert len({who.name for who in crowd}) == len(crowd)
    assert len({(who.role, who.deed, who.thing, who.place) for who in crowd}) == len(crowd)


@pytest.mark.parametrize("frames", [*WORDS["contexts"].values(), WORDS["questions"]], ids=[*TASKS, "questions"])
def test_no_wording_is_in_two_splits(frames):
    """Nor is it part of a wording of another split; a split has none twice."""
    assert set(frames) == set(SPLITS)
    for split in SPLITS:
        assert len(set(frames[split])) == len(frames[split])
    for a, b in itertools.permutations(SPLITS, 2):
        assert not any(one in other for one in frames[a] for other in frames[b])


def test_no_wording_is_in_both_tasks():
    one, other = ({f for split in SPLITS for f in frames[split]} for frames in WORDS["contexts"].values())
    assert not one & other


def test_every_word_stands_for_one_thing():
    """No list has a word twice, the synonyms for a deed belong to no other deed, and no name is another word."""
    lists = [WORDS[part] for part in ("first_names", "last_names", "roles", "things", "places")]
    deeds = [verb for deed in WORDS["deeds"] for verb in deed]
    words = [word.lower() for group in (*lists, deeds) for word in group]
    assert len(set(words)) == len(words)
