"""Evaluation on pairs: one forward pass decides as real generation would, every method gets the right contexts, and the
tables are their formulas."""

import math
from itertools import chain, product

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation import pair_evaluation
from prosg_lib.evaluation.pair_evaluation import (
    answered,
    difference,
    eight_ways,
    gap_recovered,
    hits,
    passages_of,
    share,
)
from prosg_lib.evaluation.statistics import drawn_trainings
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.tasks.pair_batches import encoded
from prosg_lib.tasks.pairs import Form, Pair
from prosg_lib.text.padding import left_padded
from prosg_lib.text.tokenizer import load_tokenizer


def lives(who, where):
    return Pair(f"{who} lives {where}.", f"Question: Where does {who} live?\nAnswer:", where)


PAIRS = (
    lives("Ann", "in a mill"),
    lives("old Bartholomew Quill", "by the wooden bridge"),
    lives("Cy", "here"),
    lives("Dora", "above the baker and his seven children"),
    lives("Edmund the smith", "near the harbour"),
    lives("Fay", "far away"),
)

_LEARNED = {  # what the model of these tests has learned by heart: with the context, and without it
    "Ann": ("in a mill", "in a tent"),
    "old Bartholomew Quill": ("by the wooden bridge", "by the wooden bridge"),
    "Cy": ("there", "here"),
    "Dora": ("above the baker and his seven children today", "above the baker"),  # a word more, and too few
    "Edmund the smith": ("near the old harbour", "far the harbour"),  # one word in between, and another one at first
    "Fay": ("Far away", "far, away"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def lm(tokenizer):
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(tokenizer.vocab, 32, 2, 64))
    lm.tokenizer = tokenizer
    texts = []
    for pair, (with_context, without) in zip(PAIRS, _LEARNED.values(), strict=True):
        texts += [f"{pair.context}\n{pair.query} {with_context}\n", f"{pair.query} {without}\n"]
    ids, valid = left_padded([tokenizer.encode(text) for text in texts])
    optimiser = torch.optim.Adam(lm.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        logits = lm(ids[:, :-1], None, None, valid[:, :-1])[0]
        cross_entropy(logits[valid[:, :-1]], ids[:, 1:][valid[:, :-1]]).backward()
        optimiser.step()
    return lm.eval().requires_grad_(False)


def generates(lm, prompt, answer):
    """Whether the greedy continuation is the answer and the newline after it, and nothing else."""
    text = f" {answer}\n"
    return lm.generate([prompt], max_new_tokens=len(lm.tokenizer.encode(text)), stop=None) == [text]


class Looking:
    """Answers right exactly where one of its contexts is that of the query, and keeps the contexts it was given."""

    def __init__(self, pairs, tokenizer):
        self.rows = {pair.context: [t for part in encoded(pair, tokenizer)[1:] for t in part] for pair in pairs}
        self.tokenizer = tokenizer
        self.calls = []

    def adapt(self, lm, contexts, successive):
        texts = [
            [self.tokenizer.decode(one[where].tolist()).strip() for one, where in zip(*many, strict=True)]
            for many in zip(*contexts, strict=True)
        ]
        self.calls.append((texts, successive))

        def logits_of(ids, valid, last=None):
            logits = torch.zeros(*ids.shape, lm.config.vocab)
            for b, row in product(range(len(ids)), self.rows):
                known = self.rows[row]
                if row in texts[b] and ids[b][valid[b]].tolist() == known[:-1]:
                    logits[b, torch.arange(1 - len(known), 0), known[1:]] = 1.0
            return logits if last is None else logits[:, -last:]

        return logits_of


def by_length(pairs, tokenizer):
    """In the order in which they are measured."""
    return sorted(pairs, key=lambda pair: sum(map(len, encoded(pair, tokenizer))))


# What is answered


def test_prompted_and_none_are_decided_as_by_generation(lm):
    """Greedy generation, from texts and one pair at a time, gives the gold answer and ends it exactly where the table
    says so; with the context and without it some are right and some wrong, and not the same ones."""
    frame = answered(lm, {}, PAIRS, lm.tokenizer)
    assert list(frame) == ["prompted", "none"]
    assert frame.prompted.tolist() == [generates(lm, f"{p.context}\n{p.query}", p.answer) for p in PAIRS]
    assert frame.none.tolist() == [generates(lm, p.query, p.answer) for p in PAIRS]
    assert frame.prompted.tolist() == [True, True, False, False, False, False]
    assert frame.none.tolist() == [False, True, True, False, False, False]


def test_an_opening_is_read_in_front_of_every_prompt_and_query(lm):
    """As by generation; the contexts that a method gets have none."""
    opening, method = "Bea lives in a tent.\n", Looking(PAIRS, lm.tokenizer)
    frame = answered(lm, {"look": method}, PAIRS, lm.tokenizer, form=Form(opening))
    assert frame.prompted.tolist() == [generates(lm, f"{opening}{p.context}\n{p.query}", p.answer) for p in PAIRS]
    assert frame.none.tolist() == [generates(lm, f"{opening}{p.query}", p.answer) for p in PAIRS]
    assert {text for (text,) in method.calls[0][0]} == {pair.context for pair in PAIRS}


def test_an_answer_without_an_end_may_go_on(lm):
    """Dora's answer, after which the model would say one word more, is right then; no other changes."""
    frame = answered(lm, {}, PAIRS, lm.tokenizer, form=Form(ended=False))
    assert frame.prompted.tolist() == [True, True, False, True, False, False]


def test_pairs_about_the_same_context_are_measured_together(lm):
    """In one batch each, whatever the lengths of their queries; and an interval can be over contexts."""
    pairs = [Pair(f"Room {i % 3}.", "Who is in there? " * (i // 3 + 1), f"Guest {i}") for i in range(9)]
    method = Looking(pairs, lm.tokenizer)
    frame = answered(lm, {"look": method}, pairs, lm.tokenizer, batch=3, together=True)
    assert frame.index.tolist() == list(range(9))
    assert [{text for (text,) in texts} for texts, _ in method.calls[::2]] == [{f"Room {i}."} for i in range(3)]
    assert passages_of(pairs).tolist() == [0, 1, 2] * 3
    frame = pd.DataFrame({"look": [True, False, False] * 3, "untrained": False, "prompted": True})
    for of in (share, lambda *given: difference(*given[:2], "untrained", given[2])):
        assert (of(frame, "look", passages_of(pairs)).low, of(frame, "look", None).low > 0) == (0, True)
    assert gap_recovered(frame, "look", groups=passages_of(pairs)).low == 0 < gap_recovered(frame, "look").low


def test_a_method_gets_its_own_contexts_and_then_anothers(lm):
    """One that knows the context is right after it, and wrong after the previous pair's; the first gets the last's."""
    method = Looking(PAIRS, lm.tokenizer)
    frame = answered(lm, {"look": method}, PAIRS, lm.tokenizer)
    assert list(frame) == ["prompted", "none", "look", "wrong look"]
    assert frame.look.tolist() == [True] * 6
    assert frame["wrong look"].tolist() == [False] * 6
    (own, _), (others, _) = method.calls
    control = {mine: other for (mine,), (other,) in zip(own, others, strict=True)}
    assert control == {PAIRS[i].context: PAIRS[i - 1].context for i in range(6)}


@pytest.mark.parametrize("successive", [False, True])
def test_of_several_contexts_one_is_the_pairs_own(lm, successive):
    """The others differ, in an order that depends on the pair alone, whatever the batch; the prompt has the same order,
    and is answered as generation would."""
    method = Looking(PAIRS, lm.tokenizer)
    frame = answered(lm, {"look": method}, PAIRS, lm.tokenizer, contexts=3, seed=2, successive=successive)
    (own, one_by_one), _ = method.calls
    assert one_by_one == successive
    assert frame.look.all()
    for pair, texts in zip(by_length(PAIRS, lm.tokenizer), own, strict=True):
        assert pair.context in texts
        assert len(set(texts)) == 3
        right = generates(lm, "".join(f"{text}\n" for text in texts) + pair.query, pair.answer)
        assert frame.prompted[PAIRS.index(pair)] == right
    assert any(texts[0] != pair.context for pair, texts in zip(by_length(PAIRS, lm.tokenizer), own, strict=True))
    in_pieces = Looking(PAIRS, lm.tokenizer)
    answered(lm, {"look": in_pieces}, PAIRS, lm.tokenizer, contexts=3, seed=2, successive=successive, batch=2)
    assert [*chain(*(texts for texts, _ in in_pieces.calls[::2]))] == own


def test_trainings_of_a_method_are_measured_side_by_side(lm):
    """Each has its own column and gets the same contexts; wrong ones only where they are wanted."""
    methods = {"look": [Looking(PAIRS[:n], lm.tokenizer) for n in (2, 4)], "all": Looking(PAIRS, lm.tokenizer)}
    frame = answered(lm, methods, PAIRS, lm.tokenizer, controls=("look",))
    assert list(frame) == ["prompted", "none", "look #0", "wrong look #0", "look #1", "wrong look #1", "all"]
    assert hits(frame, "look").tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert hits(frame, "wrong look").tolist() == [[0] * 6] * 2
    assert hits(frame, "all").tolist() == [[1] * 6]
    assert methods["look"][0].calls == methods["look"][1].calls
    assert len(methods["all"].calls) == 1
    assert list(answered(lm, {"all": methods["all"]}, PAIRS, lm.tokenizer, controls=())) == ["prompted", "none", "all"]


def test_known_columns_are_not_measured_again(lm):
    """They come first, unchanged, right or not; a method is run only for what is not among them."""
    once = answered(lm, {"look": Looking(PAIRS[:2], lm.tokenizer)}, PAIRS, lm.tokenizer)
    known = once.assign(prompted=~once.prompted)
    again, new = Looking(PAIRS, lm.tokenizer), Looking(PAIRS[:4], lm.tokenizer)
    frame = answered(lm, {"look": again, "new": new}, PAIRS, lm.tokenizer, known=known)
    assert list(frame) == ["prompted", "none", "look", "wrong look", "new", "wrong new"]
    pd.testing.assert_frame_equal(frame[list(known)], known)
    assert not again.calls
    assert frame.new.tolist() == [True] * 4 + [False] * 2
    with pytest.raises(UserError, match="5 pairs, but the known table has 6; pass the table of these pairs"):
        answered(lm, {}, PAIRS[:5], lm.tokenizer, known=known)


def test_the_seed_draws_the_other_contexts(lm):
    """The same with the same seed, different with another."""
    drawn = []
    for seed in (0, 0, 1):
        method = Looking(PAIRS, lm.tokenizer)
        answered(lm, {"look": method}, PAIRS, lm.tokenizer, contexts=2, seed=seed)
        drawn.append([sorted(texts) for texts in method.calls[0][0]])
    assert drawn[0] == drawn[1] != drawn[2]


def test_many_pairs_are_in_their_order(lm):
    """Several batches of different lengths: row i is pair i, and a batch has pairs of about the same length."""
    pairs = [lives(f"Gus {i}", f"in house {i}" + ", on the top floor" * (i % 2)) for i in range(60)]
    method = Looking(pairs[::3], lm.tokenizer)
    frame = answered(lm, {"look": method}, pairs, lm.tokenizer)
    assert frame.index.tolist() == list(range(60))
    assert frame.look.tolist() == [i % 3 == 0 for i in range(60)]
    given = [text for texts, _ in method.calls[::2] for (text,) in texts]
    assert ["top floor" in text for text in given] == [False] * 30 + [True] * 30


@pytest.mark.parametrize(
    ("pairs", "contexts"),
    [
        pytest.param([lives(f"Gus {i}", f"in house {i}") for i in range(26)], 1, id="one pair in the last batch"),
        pytest.param(PAIRS, 3, id="other contexts drawn"),
        pytest.param(
            [
                Pair("Ann and Bo sing.", "Who?\nAnswer:", "Bo"),
                Pair("Ann and Bo sing.", "Who else?\nAnswer:", "Ann"),
                *PAIRS,
            ],
            1,
            id="two pairs of one context",
        ),
    ],
)
def test_wrong_contexts_never_have_the_pairs_own(lm, pairs, contexts):
    """Whatever the number of pairs, of contexts, and of questions about the same context."""
    method = Looking(pairs, lm.tokenizer)
    answered(lm, {"look": method}, pairs, lm.tokenizer, contexts=contexts)
    own, wrong = ([*chain(*(texts for texts, _ in calls))] for calls in (method.calls[::2], method.calls[1::2]))
    for pair, texts, others in zip(by_length(pairs, lm.tokenizer), own, wrong, strict=True):
        assert pair.context in texts
        assert pair.context not in others


def test_padding_changes_nothing(lm, tokenizer, monkeypatch):
    """Pairs of very different lengths, together and two at a time: the same probability of every answer, by every
    method, after a step, too."""

    def nll(column, logits, batch):
        targets, answer = (t[:, -logits.shape[1] :] for t in (batch.query.ids, batch.answer))
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (losses * answer).sum(1)

    news = [Pair(f"Of {p.answer}: {p.context}", p.query, p.answer) for p in PAIRS]  # the model knows those by heart
    step = WeightStep(lm, None, lr=0.1)
    assert len({len(tokenizer.encode(p.context)) for p in news}) > 3
    monkeypatch.setattr(pair_evaluation, "_right", nll)
    together = answered(lm, {"step": step}, news, tokenizer)
    for i in range(1, len(PAIRS)):
        alone = answered(lm, {"step": step}, news[i - 1 : i + 1], tokenizer)
        row, same = (torch.tensor(f.iloc[n].to_numpy()) for f, n in ((together, i), (alone, 1)))
        assert_close(row, same, rtol=1e-3, atol=1e-3)
    assert (together.step - together.none).abs().max() > 0.1
    assert (together.step - together["wrong step"]).abs().max() > 0.1


@pytest.mark.parametrize(("count", "contexts", "needed"), [(1, 1, 2), (0, 1, 2), (3, 4, 4)])
def test_too_few_pairs_are_refused(lm, count, contexts, needed):
    with pytest.raises(UserError, match=f"{count} pairs, but {needed} are needed"):
        answered(lm, {}, PAIRS[:count], lm.tokenizer, contexts)


# Tables


def table(**columns):
    return pd.DataFrame({name: [c == "1" for c in column] for name, column in columns.items()})


def test_a_share_is_the_mean_over_pairs_and_trainings():
    """Trainings that differ make the interval wide, however many pairs there are; such as do not leave it as it is with
    one, to the last bit. All right or all wrong: no doubt; of two pairs one: anything."""
    frame = table(all="11", none="00", half="10")
    for name, expected in (("all", (1, 1, 1)), ("none", (0, 0, 0)), ("half", (0.5, 0, 1))):
        found = share(frame, name)
        assert (found.value, found.low, found.high) == expected
    same, other = "10" * 500, "11" * 500
    assert share(table(**{f"step #{i}": same for i in range(3)}), "step") == share(table(step=same), "step")
    apart = share(table(**{"step #0": same, "step #1": other, "step too": same, "wrong step #0": same}), "step")
    assert apart.value == 0.75
    assert (apart.low, apart.high) == (pytest.approx(0.47, abs=0.02), 1)


def test_the_spread_of_trainings_adds_to_that_of_pairs():
    """Variances add up: of 5 trainings that are right by chance at rates of their own, on 200 pairs, against the two
    formulas. One that is the same for all pairs is only the pairs'."""
    rng = np.random.default_rng(3)
    rates = np.array([0.2, 0.35, 0.5, 0.65, 0.8])
    frame = pd.DataFrame({f"step #{i}": rng.random(200) < rate for i, rate in enumerate(rates)})
    means = hits(frame, "step").mean(1)
    variance = means.var() / drawn_trainings(5) + hits(frame, "step").mean(0).var() / 200
    found = share(frame, "step")
    assert found.high - found.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.1)


def test_what_was_not_measured_has_no_share():
    """A name that only begins like one, or has signs that mean something in patterns, is another method's."""
    frame = table(**{"step #0": "10", "step (2)": "11", "steps": "00"})
    with pytest.raises(UserError, match=r"'ste' was not measured; there are step #0, step \(2\), steps"):
        share(frame, "ste")
    assert share(frame, "step (2)").value == 1
    assert share(frame, "step").value == 0.5


def test_a_difference_is_that_of_the_means_over_trainings():
    """Pairs stay together: where one method is right exactly where the other is, the interval has no width."""
    frame = pd.DataFrame({"a #0": [1, 1, 0, 0], "a #1": [1, 1, 1, 0], "b": [1, 0, 0, 0], "c": [1, 0, 0, 0]})
    assert difference(frame, "a", "b").value == pytest.approx((0.5 + 0.75) / 2 - 0.25)
    assert difference(frame, "b", "a").value == pytest.approx(0.25 - (0.5 + 0.75) / 2)
    same = difference(frame, "b", "c")
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_gap_recovered_is_its_formula():
    """(method - start) / (prompted - start) of the shares, each over all trainings: 0.5, 0.2 and 0.8 give a half. Pairs
    stay together: where one of two is recovered, a resample has none, one or both of them, and the gap is whole."""
    frame = table(step="1111100000", untrained="0000000011", plain="1000000000", prompted="1111111100")
    assert gap_recovered(frame, "step").value == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    assert gap_recovered(frame, "step", "plain").value == pytest.approx((0.5 - 0.1) / (0.8 - 0.1))
    assert gap_recovered(frame, "prompted").value == 1
    start = gap_recovered(frame, "untrained")
    assert (start.value, start.low, start.high) == (0, 0, 0)
    assert gap_recovered(table(step="00", untrained="10", prompted="11"), "step").value == pytest.approx(-1)
    several = frame.rename(columns={"step": "step #0"}).join(table(**{"step #1": "1111111000"}))
    found = gap_recovered(several, "step")
    assert found.value == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))
    assert found.low < found.value < found.high
    found = gap_recovered(table(step="10", untrained="00", prompted="11"), "step")
    assert (found.value, found.low, found.high) == (0.5, 0, 1)


def test_no_gap_no_share_of_it():
    """Prompted as often right as the start: NaN, if other pairs, too; resamples that have a gap still give a range."""
    for columns in ({"untrained": "10", "prompted": "10"}, {"untrained": "00", "prompted": "00"}):
        found = gap_recovered(table(step="11", **columns), "step")
        assert all(math.isnan(v) for v in (found.value, found.low, found.high))
    found = gap_recovered(table(step="11", untrained="10", prompted="01"), "step")
    assert math.isnan(found.value)
    assert (found.low, found.high) == (-1 + 1, 1)


def test_eight_ways_are_counted():
    """Shares by (prompted, after the step, without context); combinations that there are none of have a row, too. Of
    several trainings each one's table counts as much as another's."""
    found = eight_ways(table(prompted="11110000", none="10000001", step="11100110", other="00000000"), "step")
    assert found.to_dict() == {
        (True, True, True): 1 / 8,
        (True, True, False): 2 / 8,
        (True, False, True): 0,
        (True, False, False): 1 / 8,
        (False, True, True): 0,
        (False, True, False): 2 / 8,
        (False, False, True): 1 / 8,
        (False, False, False): 1 / 8,
    }
    assert list(found.index.names) == ["prompted", "step", "none"]
    assert found.sum() == 1
    columns = {"prompted": "1100", "none": "0000", "step #0": "1000", "step #1": "1110"}
    found = eight_ways(table(**columns), "step")
    alone = [eight_ways(table(**columns).rename(columns={f"step #{i}": "one"}), "one") for i in range(2)]
    assert found.to_dict() == ((alone[0] + alone[1]) / 2).to_dict()
    assert found[True, True, False] == (1 / 4 + 2 / 4) / 2


def test_pairs_of_one_context_have_no_wrong_one(lm):
    """Two questions about the same passage cannot be each other's control."""
    pair = PAIRS[0]
    with pytest.raises(UserError, match="all other pairs have pair 0's context"):
        answered(lm, {}, [pair, Pair(pair.context, "Who else?", "Nobody")], lm.tokenizer)


def test_a_step_that_broke_the_model_is_named(lm, tokenizer):
    """A NaN is no wrong answer."""

    class Broken:
        def adapt(self, lm, contexts, successive):
            return lambda ids, valid, last: torch.full((len(ids), last, tokenizer.vocab), float("nan"))

    with pytest.raises(NotFinite, match=r"much too far: the logits are not finite; take a smaller inner"):
        answered(lm, {"much too far": Broken()}, PAIRS, tokenizer)
