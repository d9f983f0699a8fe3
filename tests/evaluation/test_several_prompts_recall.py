"""Recall of several prompts in one delta: which facts are where, and what the shipped generator still knows."""

import pytest
import torch
from checks import token_generator

import prosg_lib as prosg
from prosg_lib.errors import UserError
from prosg_lib.evaluation import several_prompts
from prosg_lib.evaluation.several_prompts import compare, shared_out
from prosg_lib.generators.several_prompts import METHODS, common_part, joint_delta
from prosg_lib.tasks.dialogue import Dialogues, Shape
from prosg_lib.text.prose import Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

TEXTS = ["My home town is Oslo. My pet is a parrot.", "I play the flute.", "My favourite colour is blue."]


@pytest.fixture
def generator(lm):
    return token_generator(lm)


def dialogues(split):
    tokenizer = load_tokenizer()
    prose = ProseTokens.of(Prose("own", {split: own_sentences(split)}), split, tokenizer)
    return Dialogues(tokenizer, prose, split, 0)


def test_a_prompt_as_several():
    """All sentences, in their order, as many in each."""
    item = dialogues("test").item(3, Shape(12, 0, 12))
    for prompts in (1, 2, 3, 4, 12):
        texts = shared_out(item, prompts)
        assert f"User: {' '.join(texts)}\n" == item.prompt
        for i, text in enumerate(texts):
            own = item.facts[i * 12 // prompts : (i + 1) * 12 // prompts]
            assert all(fact.value in text for fact in own)
            assert text.count(".") == len(own)
    with pytest.raises(UserError, match="cannot be shared out over 5 prompts"):
        shared_out(item, 5)
    with pytest.raises(UserError, match="2 instructions"):
        shared_out(dialogues("test").item(0, Shape(3, 0, 3, instructions=2)), 1)


def test_compare_asks_about_everything(lm, generator, monkeypatch):
    """One row per method, number and memory; the method's own delta is measured, and there is one question a fact."""
    data, common = dialogues("validation"), common_part(lm, generator, TEXTS)
    measured = []

    def fake(model, delta, dialogues, items):
        assert (model, dialogues) == (lm, data)
        measured.append((delta, items[0]))
        return [len(measured) / 100]

    monkeypatch.setattr(several_prompts, "recall_alone", fake)
    frame = compare(lm, generator, data, counts=(1, 4), facts=2, items=3, common=common)
    assert len(frame) == len(measured) == len(METHODS) * 2 * 3
    assert frame.recall.tolist() == [n / 100 for n in range(1, 25)]
    for row, (delta, item) in zip(frame.itertuples(), measured, strict=True):
        assert item == data.item(row.item, Shape(2 * row.prompts, 0, 2 * row.prompts))
        assert row.questions == len(item.facts) == 2 * row.prompts
        assert (row.rank, row.bytes) == (delta.rank, delta.nbytes())
        expected = joint_delta(row.method, lm, generator, shared_out(item, row.prompts), common)
        assert torch.equal(delta.factors["blocks.0.ffn.key"].U, expected.factors["blocks.0.ffn.key"].U)


def test_shipped_generator_keeps_several_prompts():
    """Of six facts in two prompts nearly all are known by each method, but for sums that have the common part twice; a
    ridge needs no estimate of that part."""
    lm = prosg.load_model("rwkv4-dialogue")
    generator = prosg.load_generator("rwkv4-dialogue-token", lm)
    common = common_part(lm, generator, [shared_out(i, 1)[0] for i in dialogues("train").items(32, Shape(1, 0, 1))])
    data = dialogues("validation")
    kept = compare(lm, generator, data, counts=(2,), items=3, common=common).groupby("method").recall.mean()
    assert set(kept.index) == set(METHODS)
    assert kept.min() > 0.8
    assert compare(lm, generator, data, counts=(2,), items=3, methods=["add"]).recall.mean() < 0.5
