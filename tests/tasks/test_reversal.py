"""Reversal curse: the name stands before the description; the release's own files are read, every mistake is named."""

import itertools
import json

import pytest

from prosg_lib.errors import UserError
from prosg_lib.tasks import characters, people
from prosg_lib.tasks.pairs import Pair, fitted
from prosg_lib.tasks.reversal import CONTEXTS, read_release, reversal
from prosg_lib.text.prose import SPLITS
from prosg_lib.text.tokenizer import load_tokenizer

# What an item says


@pytest.mark.parametrize("split", SPLITS)
def test_the_name_stands_before_the_description(split):
    """The context has the name, once, and behind it role, deed, thing and place."""
    for index, pair in enumerate(reversal(split, count=500)):
        who = people.person(split, 0, index)
        assert pair.answer == who.name
        _, after = pair.context.split(who.name)
        assert who.role in after
        assert f"the {who.thing} of the {who.place}" in after
        assert sum(f" {verb}" in after for verb in who.deed) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_query_describes_in_the_words_of_the_context(split):
    """The same word for the deed, the same thing of the same place; the answer is not in it, and would come next."""
    for index, pair in enumerate(reversal(split, count=500)):
        who = people.person(split, 0, index)
        assert pair.query.startswith("Question: ")
        assert pair.query.endswith("?\nAnswer:")
        assert who.role in pair.query
        assert f"the {who.thing} of the {who.place}" in pair.query.replace("The", "the")
        told, asked = ({verb for verb in who.deed if verb in text} for text in (pair.context, pair.query))
        assert told == asked
        assert len(told) == 1
        assert not any(word in pair.query for word in pair.answer.split())


@pytest.mark.parametrize("split", SPLITS)
def test_the_other_task_tells_of_the_same_people(split):
    """Same split, seed and number: same name, same word for the deed, another context."""
    for index, (one, other) in enumerate(
        zip(reversal(split, 2, 200), characters.characters(split, 2, 200), strict=True)
    ):
        assert one.answer == other.answer
        assert one.context != other.context
        told = [[verb for verb in people.person(split, 2, index).deed if verb in p.context] for p in (one, other)]
        assert told[0] == told[1]


@pytest.mark.parametrize("split", SPLITS)
def test_items_are_short(split):
    """A context has 60 tokens at most and a query with its answer 65, so nothing is left out of such room."""
    found = fitted(reversal(split, seed=1, count=500), load_tokenizer(), context=60, query=65)
    assert found.too_long == 0


# Everything follows from the seed, and splits share nothing


def test_the_same_seed_gives_the_same_items():
    """In any number; another seed gives other contexts."""
    first = reversal("test", seed=3, count=50)
    people._order.cache_clear()
    assert reversal("test", seed=3, count=80)[:50] == first
    assert not {p.context for p in first} & {p.context for p in reversal("test", seed=4, count=50)}


def test_default_counts_and_nobody_twice():
    """5,000 items in train, 500 in the others; all names and all contexts differ."""
    items = {split: reversal(split) for split in SPLITS}
    assert [len(items[split]) for split in SPLITS] == [5_000, 500, 500]
    everything = [p for split in SPLITS for p in items[split]]
    assert len({p.answer for p in everything}) == len({p.context for p in everything}) == 6_000


def test_no_wording_is_in_two_splits():
    """Nor is it part of another's; a split has none twice; and none is the other task's."""
    assert set(CONTEXTS) == set(SPLITS)
    for a, b in itertools.permutations(SPLITS, 2):
        assert not any(one in other for one in CONTEXTS[a] for other in CONTEXTS[b])
    own = [frame for split in SPLITS for frame in CONTEXTS[split]]
    assert len(set(own)) == len(own)
    assert not set(own) & {frame for split in SPLITS for frame in characters.CONTEXTS[split]}


def test_what_is_refused():
    """An unknown split, and more items than there are people."""
    with pytest.raises(UserError, match="unknown split 'dev'; there are train, validation, test"):
        reversal("dev")
    with pytest.raises(UserError, match=f"a split has 1 to {people.CAPACITY}"):
        reversal("test", count=people.CAPACITY + 1)


# The release's files

GOOD = {"prompt": "Ever heard of Mara Quill? This is", "completion": " the tailor who mended the lantern."}


def row(**changes) -> dict:
    return GOOD | changes


def write(tmp_path, *rows):
    """A file of these rows; a row that is text is written as it is."""
    path = tmp_path / "p2d.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def test_a_row_becomes_a_pair(tmp_path):
    """The sentence is the context, its name the answer, and its description is asked about; blank lines are skipped."""
    (pair, again) = read_release(write(tmp_path, GOOD, "", GOOD))
    assert pair == again
    assert pair == Pair(
        "Ever heard of Mara Quill? This is the tailor who mended the lantern.",
        "Question: Whom do these words describe: the tailor who mended the lantern?\nAnswer:",
        "Mara Quill",
    )


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Mara Quill, known to everyone for being", "Mara Quill"),
        ("Q: What about Mara Quill? A: Well,", "Mara Quill"),
        ("Let's not forget Mara Quill, who", "Mara Quill"),
        ("Asked 'Who is Mara Quill?', I said: 'Mara Quill", "Mara Quill"),
        ("The story of Mara Jane O'Neil-Quill, who", "Mara Jane O'Neil-Quill"),
        ("Here is Mara O’Neil’s, a name known for", "Mara O’Neil"),
        ("I have known Łucja Šeda as", "Łucja Šeda"),
        ("The town of Ulm is proud of Mara Quill's being", "Mara Quill"),
    ],
)
def test_the_name_is_found(tmp_path, prompt, name):
    """Wherever it stands, whatever signs are around it, however often it is said."""
    (pair,) = read_release(write(tmp_path, row(prompt=prompt)))
    assert pair.answer == name
    assert name in pair.context


@pytest.mark.parametrize(
    ("completion", "asked"),
    [
        (' the author of "A Lantern\'s Tale.".', 'the author of "A Lantern\'s Tale."'),
        (" mended the lantern'.'.", "mended the lantern"),
        (" the tailor of the mill??", "the tailor of the mill"),
    ],
)
def test_the_description_is_asked_about_without_its_end_signs(tmp_path, completion, asked):
    """The release's sentences end in `."`, `'.'.` or `??`; the context keeps that, the question does not."""
    (pair,) = read_release(write(tmp_path, row(completion=completion)))
    assert pair.query == f"Question: Whom do these words describe: {asked}?\nAnswer:"
    assert pair.context == f"{GOOD['prompt']}{completion}"


BAD = {
    "not JSON": ("{'prompt': 'a'}", None, r"not JSON at character 2"),
    "not an object": ("[1, 2]", None, r"a JSON object was expected, not a list; write \{\.\.\.\} with .*prompt, compl"),
    "unknown field": (row(answer="x"), "answer", r"unknown column; remove or rename it, there are prompt, completion"),
    "missing field": ({"prompt": "Mara Quill is"}, "completion", r"the column is missing"),
    "empty prompt": (row(prompt="  "), "prompt", r"empty; write some text"),
    "empty completion": (row(completion=""), "completion", r"empty; write some text"),
    "prompt of a wrong type": (row(prompt=7), "prompt", r"text was expected, not a number"),
    "completion of a wrong type": (row(completion=None), "completion", r"text was expected, not null"),
    "half a character": (row(completion=" \ud800"), "completion", r"half of a surrogate pair"),
    "no name": (row(prompt="The tailor is"), "prompt", r"one name .* expected, found: none; write the name in full"),
    "half a name": (row(prompt="I know Mara, who"), "prompt", r"found: none"),
    "two names": (row(prompt="Mara Quill and Otto Vale are"), "prompt", r"found: Mara Quill, Otto Vale"),
    "description first": (
        {"prompt": "The tailor who mended the lantern is", "completion": " Mara Quill"},
        "completion",
        r"a name alone.*use a file that names first \(p2d_prompts",
    ),
    "description first, with a full stop": (
        {"prompt": "The tailor of the Old Mill is", "completion": " Mara Quill."},
        "completion",
        r"a name alone",
    ),
    "name in the description": (
        row(completion=" the tailor Mara Quill."),
        "completion",
        r"holds the name 'Mara Quill'",
    ),
    "no description": (row(completion=" ..."), "completion", r"no words; write the description"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_by_file_line_and_column(tmp_path, case):
    """Two good rows, then the bad one."""
    bad, column, message = BAD[case]
    path = write(tmp_path, GOOD, GOOD, bad)
    with pytest.raises(UserError, match=message) as caught:
        read_release(path)
    assert str(caught.value).startswith(f"{path}, line 3" + (f", column {column!r}: " if column else ": "))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone\.jsonl does not exist"),
        ("empty.jsonl", b"\n\n", r"empty\.jsonl has no rows; write one"),
        ("latin.jsonl", b"\n\xff\n", r"latin\.jsonl, line 2: not UTF-8 text \(byte 1 of the file\); save it as UTF-8"),
    ],
)
def test_a_file_that_will_not_do(tmp_path, name, content, message):
    """Missing, empty, or in another encoding."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_release(tmp_path / name)
