"""The outer losses, each against a loop over examples and tokens that are not padded."""

from copy import deepcopy
from itertools import chain

import pytest
import torch
from tiny import assert_parts_add_up
from torch import nn
from torch.testing import assert_close

from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.tasks.pair_batches import PairBatch
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.training.pair_objectives import KeptTeacher, hidden_of, pair_lm_objective, pair_objective

VOCAB = 50
QUERIES, ANSWERS = (5, 1, 3, 7, 2), (2, 1, 4, 1, 3)  # tokens of five examples
CONTEXTS = ((6, 4), (3, 8), (9, 9), (2, 5), (4, 7))


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(vocab=VOCAB, width=16, layers=2, ffn=32)).double().eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return lm


def examples(contexts):
    """(contexts, query and answer, tokens of the answer) of each example, as lists of tokens."""
    g = torch.Generator().manual_seed(4)

    def tokens(n):
        return torch.randint(VOCAB, (n,), generator=g).tolist()

    return [
        ([tokens(n) for n in lengths[:contexts]], tokens(query + answer), answer)
        for lengths, query, answer in zip(CONTEXTS, QUERIES, ANSWERS, strict=True)
    ]


def batch_of(found):
    """Hand-made: `answer` is written out, token by token."""
    told = left_padded([ids for contexts, _, _ in found for ids in contexts])
    query = left_padded([ids for _, ids, _ in found])
    longest = query.ids.shape[1]
    return PairBatch(
        Rows(*(t.view(len(found), -1, t.shape[1]) for t in told)),
        query,
        left_padded([[*chain(*contexts), *ids] for contexts, ids, _ in found]),
        torch.tensor([[False] * (longest - n) + [True] * n for _, _, n in found]),
    )


def adapter(lm):
    torch.manual_seed(1)
    way = AdapterStep(lm, 3, ("att.output", "ffn.value"), 0.5).double()
    for u in way.U.parameters():
        nn.init.normal_(u, std=0.5)
    return way


def weights(lm):
    torch.manual_seed(1)
    way = WeightStep(lm, None, 0.05)
    for moved in way.moved.parameters():
        nn.init.normal_(moved, std=0.05)
    return way


def by_hand(lm, way, found, everywhere=False):
    """(KL, entropy of the model with the contexts, cross-entropy between both, that of the gold token): each a mean
    over the tokens of an example, then over examples; nothing is padded but a context beside a longer one."""
    sums = torch.zeros(4, dtype=torch.float64)
    for contexts, ids, answer in found:
        told = Rows(*(t[None] for t in left_padded(contexts)))
        row = torch.tensor([ids])
        student = way.adapt(lm, told, False)(row[:, :-1], torch.ones_like(row[:, :-1]).bool())[0].log_softmax(-1)
        before = [*chain(*contexts)]
        teacher = lm(torch.tensor([before + ids[:-1]]))[0][0, len(before) :].log_softmax(-1)
        first = 1 if everywhere else len(ids) - answer
        for at in range(first, len(ids)):
            p, log_p, log_q = teacher[at - 1].exp(), teacher[at - 1], student[at - 1]
            terms = p @ (log_p - log_q), -p @ log_p, -p @ log_q, -log_q[ids[at]]
            sums = sums + torch.stack(terms) / (len(ids) - first) / len(found)
    return sums


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", [adapter, weights])
def test_lc_and_lg_are_those_of_a_loop(lm, kind, everywhere):
    """LC is the KL divergence, cross-entropy minus the entropy that is reported; LG, and the part `gold` of either,
    is the gold tokens' cross-entropy; at the answer's tokens alone, or at the query's, too."""
    found, way = examples(1), kind(lm)
    kl, entropy, cross, gold = by_hand(lm, way, found, everywhere)
    lc = pair_objective(lm, way, "LC", everywhere)(0, batch_of(found))
    lg = pair_objective(lm, way, "LG", everywhere)(0, batch_of(found))
    assert kl > 0.05
    assert_close(lc.total.double(), kl, rtol=1e-5, atol=1e-6)
    assert_close(lc.parts["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)
    assert_close((lc.total + lc.parts["entropy"]).double(), cross, rtol=1e-5, atol=1e-6)
    for value in (lg.total, lg.parts["gold"], lc.parts["gold"]):
        assert_close(value.double(), gold, rtol=1e-5, atol=1e-6)


def test_repeated_tokens_are_held_to_their_own_tokens(lm):
    """LC with two steps of repeated tokens is LG in the first two steps, and LC from the third on."""
    found, way = examples(1), adapter(lm)
    kl, _, _, gold = by_hand(lm, way, found)
    assert abs(kl - gold) > 1e-2
    loss_of = pair_objective(lm, way, "LC", repeats=2)
    for step, expected in ((0, gold), (1, gold), (2, kl)):
        assert_close(loss_of(step, batch_of(found)).total.double(), expected, rtol=1e-5, atol=1e-6)


def test_several_contexts(lm):
    """One step on all of them; and the model that is imitated reads them in their order."""
    found, way = examples(2), adapter(lm)
    batch = batch_of(found)
    kl, _, _, gold = by_hand(lm, way, found)
    assert_close(pair_objective(lm, way, "LC")(0, batch).total.double(), kl, rtol=1e-5, atol=0)
    assert_close(pair_objective(lm, way, "LG")(0, batch).total.double(), gold, rtol=1e-5, atol=0)


def test_everywhere_means_the_querys_positions_too(lm):
    """One example alone, of a query of seven tokens and an answer of one: seven predictions instead of one."""
    batch, way = batch_of(examples(1)[3:4]), adapter(lm)
    ids, valid = (t[:, batch.query.valid[0]] for t in batch.query)
    says = way.adapt(lm, batch.context, False)(ids[:, :-1], valid[:, :-1])[0].log_softmax(-1)
    losses = -says[torch.arange(7), ids[0, 1:]]
    assert_close(pair_objective(lm, way, "LG", True)(0, batch).total.double(), losses.mean(), rtol=1e-5, atol=0)
    assert_close(pair_objective(lm, way, "LG")(0, batch).total.double(), losses[6], rtol=1e-5, atol=0)
    assert abs(losses.mean() - losses[6]) > 0.1


class Reading(nn.Module):
    """Takes its one context in by reading it: the state goes on, and a trained vector is added to the logits."""

    def __init__(self):
        super().__init__()
        self.push = nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))

    def adapt(self, lm, contexts, successive):
        _, state = lm.step_through(contexts.ids[:, 0], None, contexts.valid[:, 0])
        return lambda ids, valid, last=None: lm(ids, state, None, valid, last)[0] + self.push


@pytest.mark.parametrize(("everywhere", "positions"), [(False, 4), (True, 7)])
def test_no_more_is_read_out_than_counts(lm, everywhere, positions, monkeypatch):
    """Of a batch whose longest answer has four tokens, and the longest query with its own eight."""
    read_out, read = lm.read_out, []
    monkeypatch.setattr(lm, "read_out", lambda hidden: read.append(hidden.shape[1]) or read_out(hidden))
    pair_objective(lm, Reading(), "LG", everywhere)(0, batch_of(examples(1)))
    assert read == [positions]


@pytest.mark.parametrize("everywhere", [False, True])
def test_lc_is_zero_and_flat_where_nothing_is_lost(lm, everywhere):
    """A way that does exactly what the context does has no LC loss and no gradient; LG has both. A push away costs."""
    batch, way = batch_of(examples(1)), Reading()
    losses = [pair_objective(lm, way, objective, everywhere)(0, batch).total for objective in ("LC", "LG")]
    (lc, lc_grad), (lg, lg_grad) = ((loss, *torch.autograd.grad(loss, way.push)) for loss in losses)
    assert abs(lc) < 1e-6
    assert lc_grad.abs().max() < 1e-6
    assert lg > 1
    assert lg_grad.norm() > 0.1
    with torch.no_grad():
        way.push[7] = 3.0
    assert pair_objective(lm, way, "LC", everywhere)(0, batch).total > 0.01


class Plain:
    """Takes nothing in."""

    def adapt(self, lm, contexts, successive):
        return lambda ids, valid, last=None: lm(ids, None, None, valid, last)[0]


def test_what_is_imitated_is_a_constant(lm):
    """Even where the model could be trained: LC's gradient is that of the cross-entropy with fixed probabilities."""
    found, free = examples(1), deepcopy(lm).requires_grad_(True)
    loss = pair_objective(free, Plain(), "LC")(0, batch_of(found)).total
    total = 0.0
    for (context,), ids, answer in found:
        fixed = lm(torch.tensor([context + ids[:-1]]))[0][0, -answer:].softmax(-1)
        says = free(torch.tensor([ids[:-1]]))[0][0, -answer:].log_softmax(-1)
        total = total - (fixed * says).sum() / answer / len(found)
    expected = torch.autograd.grad(total, list(free.parameters()))
    assert_close(torch.autograd.grad(loss, list(free.parameters())), expected, rtol=1e-4, atol=1e-6)
    assert max(g.norm() for g in expected) > 0.01


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("objective", ["LC", "LG"])
def test_a_batch_in_pieces_is_the_batch(lm, objective, size):
    """The pieces' losses and gradients add up to the whole's, as training counts on."""
    batch, way = batch_of(examples(2)), adapter(lm)
    loss_of = pair_objective(lm, way, objective)
    assert_parts_add_up(loss_of, 0, batch, size, way.parameters(), rtol=1e-5, atol=1e-6)


def test_pretraining_on_pieces_is_that_on_the_batch(lm):
    """Its means are over tokens, of which every piece has another number."""
    free, batch = deepcopy(lm).requires_grad_(True), batch_of(examples(2))
    for size in (1, 2):
        assert_parts_add_up(pair_lm_objective(free), 0, batch, size, free.parameters(), rtol=1e-9, atol=1e-12)


def test_an_unknown_objective_is_said(lm):
    with pytest.raises(UserError, match="unknown objective 'KL'; there are LC, LG"):
        pair_objective(lm, adapter(lm), "KL")


def test_pretraining_counts_answers_fully_and_other_text_less(lm):
    """All tokens but a row's first are predicted: the mean over answers' tokens, and 0.3 of that over the others."""
    found = examples(2)
    losses = {"answer": [], "text": []}
    for contexts, ids, answer in found:
        row = torch.tensor([*chain(*contexts), *ids])
        said = lm(row[None, :-1])[0][0].log_softmax(-1)
        each = -said[torch.arange(len(said)), row[1:]]
        losses["answer"] += each[-answer:].tolist()
        losses["text"] += each[:-answer].tolist()
    means = {name: torch.tensor(values, dtype=torch.float64).mean() for name, values in losses.items()}
    loss = pair_lm_objective(lm)(0, batch_of(found))
    assert len(losses["answer"]) == sum(ANSWERS)
    assert_close(loss.parts, means, rtol=1e-10, atol=1e-12)
    assert_close(loss.total, means["answer"] + 0.3 * means["text"], rtol=1e-10, atol=1e-12)


OPENING = [7, 8, 9]


@pytest.mark.parametrize("opening", [[], OPENING])
def test_a_teacher_that_is_kept(monkeypatch, opening):
    """It says what reading the whole batch anew says, and LC with it is LC. Contexts are read once for their queries,
    and a pair once, in whatever batch it comes back, with the same bits. A context may begin as the query does."""
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", VOCAB, 16, 2, 32, 2)).eval().requires_grad_(False)
    found = examples(1)
    found[1:3] = [(found[0][0], *found[k][1:]) for k in (1, 2)]  # three queries about one context
    found[4] = ([[*found[4][1][:1], 3, 5]], *found[4][1:])
    found = [(contexts, [*opening, *ids], answer) for contexts, ids, answer in found]
    batch = batch_of(found)
    for row, (contexts, ids, _) in enumerate(found):  # the opening stands in front of the context
        own = [*opening, *contexts[0], *ids[len(opening) :]]
        batch.prompted.ids[row, -len(own) :] = torch.tensor(own)
    reader = lm.with_kv_cache()
    whole, read = reader.step_through, []
    monkeypatch.setattr(reader, "step_through", lambda *given: read.append(given[1] is None) or whole(*given))
    teacher = KeptTeacher(reader)

    said = teacher(batch)
    where = batch.answer[:, -batch.answers :]
    assert_close(said, hidden_of(lm, batch.prompted)[:, -batch.answers :][where], rtol=1e-4, atol=1e-5)
    # Two contexts and the token that the third has in common with its query; or two openings, and three contexts.
    assert (sum(read), len(read)) == ((2, 2 + 3 + 5) if opening else (3, 3 + 1 + 5))
    again = torch.cat([teacher(part) for part in batch.split(2)])
    assert torch.equal(again, said)
    assert len(read) == 10 - (not opening)
    plain, kept = (pair_objective(lm, Plain(), "LC", teacher=each)(0, batch) for each in (None, teacher))
    assert_close((kept.total, kept.parts), (plain.total, plain.parts), rtol=1e-4, atol=1e-5)
