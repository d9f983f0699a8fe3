"""Pairs as tensors: every row is the text that it should be, the answer is known to the token, and a draw is its
step's alone."""

from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch

from prosg_lib.errors import UserError
from prosg_lib.tasks.pair_batches import PairDraw, encoded, pair_batch
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.padding import Rows, left_padded
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


def told(batch, number, tokenizer):
    """The contexts of one pair as texts, in their order."""
    return [tokenizer.decode(ids) for ids in kept(Rows(*(t[number] for t in batch.context)))]


def lines(pairs):
    return [f"{pair.context}\n" for pair in pairs]


def tensors(batch):
    return [*batch.context, *batch.query, *batch.prompted, batch.answer]


def assert_same(one, other):
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(a, b)


# Encoding


def test_pieces_have_the_tokens_of_the_whole_text(tokenizer):
    """Context, query and answer in a row are what the tokenizer makes of the text with its two newlines."""
    for pair in PAIRS:
        whole = tokenizer.encode(f"{pair.context}\n{pair.query} {pair.answer}\n")
        assert sum(encoded(pair, tokenizer), ()) == whole


@pytest.mark.parametrize(("name", "text"), [("context", "c\n"), ("query", "q"), ("answer", " a\n")])
def test_a_part_without_tokens_is_named(name, text):
    """A tokenizer that makes nothing of one part: the error says which, and quotes it."""

    class Deaf:
        def encode(self, given):
            return () if given == text else (1,)

    with pytest.raises(UserError, match=rf"gives no tokens for this {name}: '{text.strip()}'"):
        encoded(Pair("c", "q", "a"), Deaf())


# Batches


def test_rows_are_padded_on_the_left():
    ids, valid = left_padded([[5], [7, 0, 9], [0, 2]])
    assert ids.tolist() == [[0, 0, 5], [7, 0, 9], [0, 0, 2]]
    assert valid.int().tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]


def test_every_row_is_its_text(tokenizer):
    """Pairs of very different lengths: context, query with the answer, and all together, token for token."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    assert len(batch) == len(PAIRS)
    assert [told(batch, i, tokenizer) for i in range(len(PAIRS))] == [[line] for line in lines(PAIRS)]
    asked = [f"{pair.query} {pair.answer}\n" for pair in PAIRS]
    assert kept(batch.query) == [list(tokenizer.encode(text)) for text in asked]
    prompted = [line + text for line, text in zip(lines(PAIRS), asked, strict=True)]
    assert kept(batch.prompted) == [list(tokenizer.encode(text)) for text in prompted]
    for rows in (batch.context, batch.query, batch.prompted):
        assert rows.valid[..., -1].all()
        assert (rows.valid[..., 1:] >= rows.valid[..., :-1]).all()  # padding nowhere but in front
        assert rows.valid.flatten(0, -2).all(1).any()  # the longest row has none
        assert not rows.valid.all()


def test_the_answer_is_marked_to_the_token(tokenizer):
    """It ends the row, and covers the answer's tokens and the newline after them, nothing before and no padding."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    for pair, ids, answer in zip(PAIRS, batch.query.ids, batch.answer, strict=True):
        assert tokenizer.decode(ids[answer]) == f" {pair.answer}\n"
        assert answer[-int(answer.sum()) :].all()
    assert not (batch.answer & ~batch.query.valid).any()


def test_several_contexts_are_the_groups_own_in_an_order_of_the_seed(tokenizer):
    """Each group's contexts are all there, the first pair's among them; `prompted` has them in the order of
    `context`; the seed and the group's number alone change it, and every order of three comes up."""
    groups = [PAIRS[:3], PAIRS[2:5], PAIRS[3:6]]
    orders = set()
    for seed in range(40):
        batch = pair_batch(groups, tokenizer, seed)
        for number, group in enumerate(groups):
            found = told(batch, number, tokenizer)
            assert sorted(found) == sorted(lines(group))
            whole = f"{''.join(found)}{group[0].query} {group[0].answer}\n"
            assert kept(batch.prompted)[number] == list(tokenizer.encode(whole))
        orders.add(tuple(told(batch, 0, tokenizer)))
        assert_same(batch, pair_batch(groups, tokenizer, seed))
        again = pair_batch(groups[:0:-1], tokenizer, seed, [2, 1])
        assert [told(again, i, tokenizer) for i in (1, 0)] == [told(batch, i, tokenizer) for i in (1, 2)]
    assert orders == set(permutations(lines(groups[0])))
    assert kept(batch.query) == kept(pair_batch([[g[0]] for g in groups], tokenizer).query)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 1), r"2 groups of \[1, 2\] contexts"), ((3, 3, 2, 1), r"4 groups of \[1, 2, 3\]"), ((), "0 groups")],
)
def test_groups_of_unequal_size_are_refused(sizes, message, tokenizer):
    with pytest.raises(UserError, match=message):
        pair_batch([PAIRS[:n] for n in sizes], tokenizer)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_pieces_of_a_batch_are_the_batch(size, tokenizer):
    """In their order, none larger than asked for, none empty, nothing padded anew."""
    batch = pair_batch([[a, b] for a, b in zip(PAIRS, reversed(PAIRS), strict=True)], tokenizer)
    pieces = batch.split(size)
    assert [(piece.whole, piece.rows.start) for piece in pieces] == [(batch, i * size) for i in range(len(pieces))]
    assert [len(piece) for piece in pieces] == [size] * (6 // size) + [6 % size] * (6 % size > 0)
    for whole, *parts in zip(tensors(batch), *map(tensors, pieces), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_all_tensors_are_moved(tokenizer):
    """`to` leaves none behind; the meta device stands for another one. The batch itself stays where it is."""
    batch = pair_batch([[pair] for pair in PAIRS], tokenizer)
    for where in ("meta", "cpu"):
        moved = batch.to(torch.device(where))
        assert {field.name for field in fields(moved)} == {"context", "query", "prompted", "answer", "source", "first"}
        assert moved.source is batch
        assert [t.device.type for t in tensors(moved)] == [where] * 7
    assert_same(batch.to(torch.device("cpu")), batch)


# Draws


def numbered(name, count=9):
    return tuple(Pair(f"{name} is {i}.", f"What is {name}?", str(i)) for i in range(count))


TASKS = {name: numbered(name) for name in ("red", "green", "blue")}


@pytest.fixture
def draw(tokenizer):
    return PairDraw(TASKS, tokenizer, batch=4, contexts=(1, 3), seed=0, turns=("red", "green", "red", "blue"))


def task_of(batch, tokenizer):
    """The one task that all contexts of a batch are of."""
    (name,) = {text.split()[0] for number in range(len(batch)) for text in told(batch, number, tokenizer)}
    return name


def test_a_step_decides_its_batch(draw):
    """The same step gives the same batch whatever was drawn before; another step or seed gives another."""
    first = draw(3)
    draw(4)
    assert_same(draw(3), first)
    assert_same(replace(draw)(3), first)
    others = [replace(draw, seed=1)(3), draw(7)]  # of the same task
    for other in others:
        assert kept(other.query) != kept(first.query)


def test_tasks_take_their_turns(draw, tokenizer):
    """In the order of `turns`, again and again; one that is named twice has two turns."""
    assert [task_of(draw(step), tokenizer) for step in range(12)] == [*draw.turns] * 3


def test_an_answer_stands_in_one_of_the_contexts(draw, tokenizer):
    """No context twice in a group, and the one that the query is about is always among them."""
    for step in range(30):
        batch = draw(step)
        for number in range(len(batch)):
            texts = told(batch, number, tokenizer)
            answer = tokenizer.decode(batch.query.ids[number][batch.answer[number]]).strip()
            assert len(set(texts)) == len(texts)
            assert f"{texts[0].split()[0]} is {answer}.\n" in texts


def test_numbers_of_contexts_are_drawn(draw):
    """One number a step, both come up, and no other."""
    assert {draw(step).context.ids.shape[1] for step in range(30)} == {1, 3}


def test_first_steps_are_echoes(draw, tokenizer):
    """Random tokens, said twice, other ones each step; from the next step on as if there had been none."""
    later = replace(draw, echoes=10)
    found = [later(step) for step in range(10)]
    for batch in found:
        for told, asked in zip(batch.context.ids[:, 0].tolist(), batch.query.ids.tolist(), strict=True):
            assert asked in [told[i : i + len(asked)] for i in range(len(told))]
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


def test_echoes_grow(draw):
    """From 8 tokens to `longest`, the last three quarters asked but 18 at most, two tokens given to find the place; a
    batch has about as many tokens all the while, as long as it is neither doubled nor halved."""
    growing = replace(draw, echoes=60, longest=96)
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


def test_a_step_before_the_first_is_no_echo(draw, tokenizer):
    """A generator's normaliser is fitted on it."""
    for some in (draw, replace(draw, echoes=5)):
        assert task_of(some(-1), tokenizer) == draw.turns[-1]


def test_room_limits_the_contexts(draw, tokenizer):
    """As many of those drawn as fit; at least one, and the asked one is among them. Here all are equally long."""
    (long,) = {len(encoded(pair, tokenizer)[0]) for pair in TASKS["red"]}
    for room, expected in ((5 * long, 5), (5 * long - 1, 4), (3 * long + 1, 3), (2 * long - 1, 1), (1, 1)):
        tight = replace(draw, contexts=(5,), turns=("red",), room=room)
        for step in range(6):
            batch = tight(step)
            assert batch.context.ids.shape[1] == expected
            for number in range(len(batch)):
                answer = tokenizer.decode(batch.query.ids[number][batch.answer[number]]).strip()
                assert f"red is {answer}.\n" in told(batch, number, tokenizer)


def test_the_longest_context_decides_for_the_whole_batch(draw, tokenizer):
    """One long context among short ones: where it is drawn, every group gets fewer, and no group is above the room."""
    short = numbered("red")
    long = Pair("red, which is " + "very, " * 20 + "red is 9.", "What is red?", "9")
    size = len(encoded(long, tokenizer)[0])
    few = replace(draw, tasks={"red": (*short, long)}, turns=("red",), contexts=(5,), room=2 * size)
    counts = set()
    for step in range(30):
        unlimited, batch = replace(few, room=10**6)(step), few(step)
        there = any("very" in text for i in range(4) for text in told(unlimited, i, tokenizer))
        assert batch.context.ids.shape[1] == (2 if there else 5)
        assert batch.context.valid.sum((1, 2)).max() <= 2 * size
        counts.add(batch.context.ids.shape[1])
    assert counts == {2, 5}
