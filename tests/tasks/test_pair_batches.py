"""Pairs and batches of pairs: every row has the right text, the answer is known to the token, draws follow the step."""

from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch

from prosg_lib.errors import UserError
from prosg_lib.tasks.pair_batches import PairDraw, SharedContextDraw, encoded, pair_batch
from prosg_lib.tasks.pairs import Form, Pair, fitted, form_of
from prosg_lib.text.padding import Rows, left_padded, right_padded
from prosg_lib.text.tokenizer import load_tokenizer

PAIRS = tuple(
    Pair(f"{who} keeps {what} in the {where}.", f"Question: Where does {who} keep {what}?\nAnswer:", f"the {where}")
    for who, what, where in (
        ("Ann", "a dog", "barn"),
        ("Bartholomew", "three old lanterns", "mill behind the wooden bridge"),
        ("Cy", "tea", "tin"),
        ("Dora", "her letters", "kitchen drawer"),
        ("Edmund", "seven bees", "garden"),
        ("Fay", "a boat", "harbour of the small town"),
    )
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def kept(rows):
    """The rows' token ids without the padding."""
    return [row[valid].tolist() for row, valid in zip(rows.ids, rows.valid, strict=True)]


def contexts_of(batch, number, tokenizer):
    """The contexts of one pair as texts, in their order."""
    return [tokenizer.decode(ids) for ids in kept(Rows(*(t[number] for t in batch.context)))]


def answer_of(batch, number, tokenizer):
    return tokenizer.decode(batch.query.ids[number][batch.answer[number]]).strip()


def lines(pairs):
    return [f"{pair.context}\n" for pair in pairs]


def tensors(batch):
    return [*batch.context, *batch.query, *batch.prompted, batch.answer]


def assert_same(one, other):
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b)


# Pairs


def test_long_pairs_are_counted_and_never_cut(tokenizer):
    short, long_context, long_query = Pair("a b c", "q", "x"), Pair("a " * 50, "q", "x"), Pair("a", "q " * 50, "x")
    found = fitted([long_context, short, long_query], tokenizer, 20, 20)
    assert found.pairs == (short,)
    assert str(found) == "1 pairs; 2 left out as too long"


# Encoding and batches


def test_pieces_have_the_tokens_of_the_whole_text(tokenizer):
    """Context, query and answer together are the tokens of the text with its two newlines."""
    for pair in PAIRS:
        whole = tokenizer.encode(f"{pair.context}\n{pair.query} {pair.answer}\n")
        assert sum(encoded(pair, tokenizer), ()) == whole


def test_padding():
    rows = [[5], [7, 0, 9], [0, 2]]
    ids, valid = left_padded(rows)
    assert ids.tolist() == [[0, 0, 5], [7, 0, 9], [0, 0, 2]]
    assert valid.int().tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert right_padded(rows).tolist() == [[5, 0, 0], [7, 0, 9], [0, 2, 0]]


def test_every_row_has_its_text(tokenizer):
    """Pairs of very different lengths: context, query with the answer, and all together, token for token."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    assert len(batch) == len(PAIRS)
    assert [contexts_of(batch, i, tokenizer) for i in range(len(PAIRS))] == [[line] for line in lines(PAIRS)]
    queries = [f"{pair.query} {pair.answer}\n" for pair in PAIRS]
    assert kept(batch.query) == [list(tokenizer.encode(text)) for text in queries]
    prompted = [line + text for line, text in zip(lines(PAIRS), queries, strict=True)]
    assert kept(batch.prompted) == [list(tokenizer.encode(text)) for text in prompted]
    for rows in (batch.context, batch.query, batch.prompted):
        assert rows.valid[..., -1].all()
        assert (rows.valid[..., 1:] >= rows.valid[..., :-1]).all()  # padding only on the left
        assert rows.valid.flatten(0, -2).all(1).any()  # the longest row has none
        assert not rows.valid.all()


def test_the_answer_is_marked_to_the_token(tokenizer):
    """It ends the row, and covers the answer's tokens and the newline after them, nothing before and no padding."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    for pair, ids, answer in zip(PAIRS, batch.query.ids, batch.answer, strict=True):
        assert tokenizer.decode(ids[answer]) == f" {pair.answer}\n"
        assert answer[-int(answer.sum()) :].all()
    assert not (batch.answer & ~batch.query.valid).any()


def test_several_contexts_are_shuffled_by_the_seed(tokenizer):
    """Each group has all its contexts, in `prompted` in the same order as in `context`; only the seed and the group's
    number change the order, and every order of three occurs."""
    groups = [PAIRS[:3], PAIRS[2:5], PAIRS[3:6]]
    orders = set()
    for seed in range(40):
        batch = pair_batch(groups, tokenizer, seed)
        for number, group in enumerate(groups):
            found = contexts_of(batch, number, tokenizer)
            assert sorted(found) == sorted(lines(group))
            whole = f"{''.join(found)}{group[0].query} {group[0].answer}\n"
            assert kept(batch.prompted)[number] == list(tokenizer.encode(whole))
        orders.add(tuple(contexts_of(batch, 0, tokenizer)))
        assert_same(batch, pair_batch(groups, tokenizer, seed))
        again = pair_batch(groups[:0:-1], tokenizer, seed, [2, 1])
        assert [contexts_of(again, i, tokenizer) for i in (1, 0)] == [contexts_of(batch, i, tokenizer) for i in (1, 2)]
    assert orders == set(permutations(lines(groups[0])))
    assert kept(batch.query) == kept(pair_batch([[g[0]] for g in groups], tokenizer).query)


class Deaf:
    """A tokenizer that gives no tokens for one text."""

    def __init__(self, text):
        self.text = text

    def encode(self, given):
        return () if given == self.text else (1,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: Pair(" ", "q", "a"), "empty context"),
        (lambda t: Pair("c", "", "a"), "empty query"),
        (lambda t: Pair("c", "q", "\n"), "empty answer"),
        (lambda t: fitted([Pair("a " * 50, "q", "x")], t, 20, 20), "none of 1 pairs fits into 20 tokens"),
        (lambda t: encoded(Pair("c", "q", "a"), Deaf("c\n")), "gives no tokens for this context: 'c'"),
        (lambda t: encoded(Pair("c", "q", "a"), Deaf("q")), "gives no tokens for this query: 'q'"),
        (lambda t: encoded(Pair("c", "q", "a"), Deaf(" a\n")), "gives no tokens for this answer: 'a'"),
        (lambda t: pair_batch([PAIRS[:2], PAIRS[:1]], t), r"2 groups of \[1, 2\] contexts"),
        (lambda t: pair_batch([PAIRS[:n] for n in (3, 3, 2, 1)], t), r"4 groups of \[1, 2, 3\]"),
        (lambda t: pair_batch([], t), "0 groups"),
        (lambda t: PairDraw({"a": PAIRS}, t, 2, (7,), 0, ("a",))(0), "7 contexts cannot be drawn from 6 pairs"),
    ],
)
def test_what_is_refused(make, message, tokenizer):
    with pytest.raises(UserError, match=message):
        make(tokenizer)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_parts_of_a_batch_are_the_batch(size, tokenizer):
    """In their order, none larger than requested, none empty, with the same padding."""
    batch = pair_batch([[a, b] for a, b in zip(PAIRS, reversed(PAIRS), strict=True)], tokenizer)
    parts = batch.split(size)
    assert [(part.whole, part.rows.start) for part in parts] == [(batch, i * size) for i in range(len(parts))]
    assert [len(part) for part in parts] == [size] * (6 // size) + [6 % size] * (6 % size > 0)
    for whole, *pieces in zip(tensors(batch), *map(tensors, parts), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def test_all_tensors_are_moved(tokenizer):
    """`to` moves all of them; the meta device stands for a second one. The batch itself stays where it is."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    for device in ("meta", "cpu"):
        moved = batch.to(torch.device(device))
        assert {field.name for field in fields(moved)} == {"context", "query", "prompted", "answer", "source", "first"}
        assert moved.source is batch
        assert [t.device.type for t in tensors(moved)] == [device] * 7
    assert_same(batch.to(torch.device("cpu")), batch)


# Draws


def numbered(name, count=9):
    return tuple(Pair(f"{name} is {i}.", f"What is {name}?", str(i)) for i in range(count))


TASKS = {name: numbered(name) for name in ("red", "green", "blue")}


@pytest.fixture
def draw(tokenizer):
    return PairDraw(TASKS, tokenizer, batch=4, contexts=(1, 3), seed=0, turns=("red", "green", "red", "blue"))


def task_of(batch, tokenizer):
    """The one task that all contexts of a batch belong to."""
    (name,) = {text.split()[0] for number in range(len(batch)) for text in contexts_of(batch, number, tokenizer)}
    return name


def test_a_step_decides_its_batch(draw):
    """The same step gives the same batch whatever was drawn before; another step or seed gives another."""
    first = draw(3)
    draw(4)
    assert_same(draw(3), first)
    assert_same(replace(draw)(3), first)
    for other in (replace(draw, seed=1)(3), draw(7)):  # of the same task
        assert kept(other.query) != kept(first.query)


def test_tasks_take_turns(draw, tokenizer):
    """In the order of `turns`, again and again; step -1, on which a normaliser is fitted, is the last of them."""
    assert [task_of(draw(step), tokenizer) for step in range(12)] == [*draw.turns] * 3
    for some in (draw, replace(draw, repeats=5)):
        assert task_of(some(-1), tokenizer) == draw.turns[-1]


def test_an_answer_is_in_one_of_the_contexts(draw, tokenizer):
    """No context occurs twice in a group, the query's own is always there, and both numbers of contexts are drawn."""
    for step in range(30):
        batch = draw(step)
        for number in range(len(batch)):
            texts = contexts_of(batch, number, tokenizer)
            assert len(set(texts)) == len(texts)
            assert f"{texts[0].split()[0]} is {answer_of(batch, number, tokenizer)}.\n" in texts
    assert {draw(step).context.ids.shape[1] for step in range(30)} == {1, 3}


def test_first_steps_repeat_random_tokens(draw, tokenizer):
    """Random tokens, repeated, different in each step; the steps after them are as without them."""
    later = replace(draw, repeats=10)
    found = [later(step) for step in range(10)]
    for batch in found:
        for context, query in zip(batch.context.ids[:, 0].tolist(), batch.query.ids.tolist(), strict=True):
            assert query in [context[i : i + len(query)] for i in range(len(context))]
        assert torch.equal(batch.prompted.ids, torch.cat([batch.context.ids[:, 0], batch.query.ids], 1))
        assert batch.answer[:, 1:].all()
        assert not batch.answer[:, 0].any()
        assert batch.prompted.valid.all()
        assert len(batch) == draw.batch
        assert set(batch.query.ids.flatten().tolist()) <= set(range(tokenizer.vocab))
    assert len({tuple(batch.query.ids.flatten().tolist()) for batch in found}) == 10
    assert_same(later(3), found[3])
    for step in range(10, 18):
        assert_same(later(step), draw(step))


def test_repeated_tokens_grow(draw):
    """From 8 tokens to `longest`, of which three quarters but at most 18 are repeated, two of them given; a batch has
    about the same number of tokens throughout, unless it would be more than doubled or halved."""
    growing = replace(draw, repeats=60, longest=96)
    found = [growing(step) for step in range(60)]
    lengths = [batch.context.ids.shape[-1] for batch in found]
    assert lengths[:20] == [8] * 20
    assert lengths[20:] == sorted(lengths[20:])
    assert 85 < lengths[-1] <= 96
    for batch, length in zip(found, lengths, strict=True):
        assert batch.query.ids.shape[1] == min(18, length * 3 // 4)
        assert not batch.answer[:, :2].any()
        assert batch.answer[:, 2:].all()
        assert len(batch) == min(8, max(2, 4 * 48 // length))
    assert {len(batch) for batch in found} >= {2, 4, 8}
    assert_same(growing(60), draw(60))


def test_room_limits_the_contexts(draw, tokenizer):
    """As many of those drawn as fit; at least one, and the query's own is among them. Here all are equally long."""
    (length,) = {len(encoded(pair, tokenizer)[0]) for pair in TASKS["red"]}
    for room, expected in ((5 * length, 5), (5 * length - 1, 4), (3 * length + 1, 3), (2 * length - 1, 1), (1, 1)):
        tight = replace(draw, contexts=(5,), turns=("red",), room=room)
        for step in range(6):
            batch = tight(step)
            assert batch.context.ids.shape[1] == expected
            for number in range(len(batch)):
                assert f"red is {answer_of(batch, number, tokenizer)}.\n" in contexts_of(batch, number, tokenizer)


def test_the_longest_context_decides_for_the_whole_batch(draw, tokenizer):
    """One long context among short ones: if it is drawn, every group gets fewer, and no group exceeds the room."""
    long = Pair("red, which is " + "very, " * 20 + "red is 9.", "What is red?", "9")
    size = len(encoded(long, tokenizer)[0])
    few = replace(draw, tasks={"red": (*numbered("red"), long)}, turns=("red",), contexts=(5,), room=2 * size)
    counts = set()
    for step in range(30):
        unlimited, batch = replace(few, room=10**6)(step), few(step)
        has_long = any("very" in text for i in range(4) for text in contexts_of(unlimited, i, tokenizer))
        assert batch.context.ids.shape[1] == (2 if has_long else 5)
        assert batch.context.valid.sum((1, 2)).max() <= 2 * size
        counts.add(batch.context.ids.shape[1])
    assert counts == {2, 5}


# Queries that share a context


def test_an_opening_stands_in_front_of_query_and_prompt(tokenizer):
    """Contexts, which are learned from, have none; answers are the same tokens."""
    plain = pair_batch([[pair] for pair in PAIRS], tokenizer)
    opened = pair_batch([[pair] for pair in PAIRS], tokenizer, form=Form("Ann keeps tea.\n"))
    opening = list(tokenizer.encode("Ann keeps tea.\n"))
    assert all(torch.equal(a, b) for a, b in zip(opened.context, plain.context, strict=True))
    for part in ("query", "prompted"):
        assert kept(getattr(opened, part)) == [[*opening, *row] for row in kept(getattr(plain, part))]
    assert [answer_of(opened, i, tokenizer) for i in range(len(PAIRS))] == [pair.answer for pair in PAIRS]


def test_an_answer_without_an_end(tokenizer):
    """The same rows, without the newline that ends query and prompt."""
    plain, open_ended = (pair_batch([[pair] for pair in PAIRS], tokenizer, form=Form("", e)) for e in (True, False))
    for part in ("query", "prompted"):
        assert kept(getattr(open_ended, part)) == [row[:-1] for row in kept(getattr(plain, part))]
    assert (plain.answer.sum(1) - open_ended.answer.sum(1)).tolist() == [1] * len(PAIRS)
    assert [answer_of(open_ended, i, tokenizer) for i in range(len(PAIRS))] == [pair.answer for pair in PAIRS]


@pytest.mark.parametrize("task", ["characters", "reversal", "squad", "wikitext", "named from books"])
def test_openings_are_in_the_form_of_their_task(task):
    """They end with an empty line, and every query in them has an answer of its own."""
    opening = form_of(task).opening
    assert opening.endswith("\n\n")
    cloze = task in ("wikitext", "named from books")
    assert ("Question: " in opening, form_of(task).ended) == (not cloze, not cloze)
    for example in opening.split("\n\n")[:-1]:
        context, *rest = example.split("\n")
        assert len(rest) % 2 == 0
        answers = [line.removeprefix("Answer: ") for line in rest[1::2]]
        assert all(answer in context for answer in answers)


@pytest.mark.parametrize("step", range(4))
def test_queries_about_a_context_stand_together(tokenizer, step):
    """At most so many about each, none twice, as many as the batch takes; tasks take turns, with their own openings,
    and a step's batch follows from its number."""
    many = tuple(Pair(f"Room {i // 3}.", f"Q{i}?", f"A{i}") for i in range(12))
    forms = {"many": Form("Rooms:\n"), "one": Form("", ended=False)}
    draw = SharedContextDraw({"many": many, "one": PAIRS}, tokenizer, 5, 0, ("many", "one"), 2, forms)
    batch = draw(step)
    assert_same(batch, draw(step))
    contexts = [contexts_of(batch, i, tokenizer)[0] for i in range(len(batch))]
    answers = [answer_of(batch, i, tokenizer) for i in range(len(batch))]
    assert len(set(answers)) == len(answers) == 5
    if step % 2:
        assert set(contexts) <= set(lines(PAIRS))
        assert len(set(contexts)) == 5
    else:
        assert contexts == [contexts[0]] * 2 + [contexts[2]] * 2 + [contexts[4]]
        assert contexts == [f"Room {int(answer[1:]) // 3}.\n" for answer in answers]
        assert all(tokenizer.decode(row).startswith("Rooms:") for row in kept(batch.query))
