"""Recall against distance: known numbers come out of a model whose knowledge is known."""

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import Evaluation, RWKV4Config
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation import reading, recall
from prosg_lib.evaluation.baselines import METHODS, ReadAgain, ReadTwice, Reinjection, start
from prosg_lib.evaluation.recall import (
    answers,
    judged,
    measure,
    prose_losses,
    recall_alone,
)
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import COMPETING, Dialogues, Shape
from prosg_lib.text.prose import ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer

WINDOW = 100  # tokens that the model of these tests remembers; its prompts have fewer
PAD = -1  # stands where the window holds nothing yet
FACTS, PROMPTS, PROBES = 3, 5, 2


@pytest.fixture(scope="module")
def data():
    """Dialogues of the test split, with a little prose."""
    tokenizer = load_tokenizer()
    lines = [np.array(tokenizer.encode_long(text + "\n"), dtype=np.int32) for text in own_sentences("test")[:60]]
    starts = np.concatenate([[0], np.cumsum([len(line) for line in lines])[:-1]])
    return Dialogues(tokenizer, ProseTokens(np.concatenate(lines), starts), "test", 0)


@dataclass(frozen=True)
class Config:
    vocab: int
    width: int = 1


class Window(LanguageModel):
    """Knows exactly the last WINDOW tokens, and answers a question right if a prompt with its fact is among them, or
    among the tokens that a delta holds. Of the text it knows what once followed a token."""

    def __init__(self, data: Dialogues, items):
        super().__init__()
        self.tokenizer, self.config = data.tokenizer, Config(data.tokenizer.vocab)
        self.only = nn.Linear(1, WINDOW, bias=False)
        self.known = {data.encode_prompt(item): item for item in items}
        self.follows = torch.zeros(self.config.vocab, dtype=torch.long)
        for item in items:
            self.follows[list(item.body[:-1])] = torch.tensor(item.body[1:])

    def blank_state(self, batch):
        return RecurrentState({"window": torch.full((batch, WINDOW), PAD)})

    def step_through(self, ids, state, valid=None):
        if state is None:
            state = self.blank_state(len(ids))
        if valid is not None:
            ids = ids.masked_fill(~valid, PAD)
        window = torch.cat([state.tensors["window"], ids], 1)[:, -WINDOW:]
        return ids[..., None].float(), RecurrentState({"window": window})

    def read_out(self, hidden):
        return nn.functional.one_hot(self.follows[hidden[..., 0].long()], self.config.vocab).float()

    def embed(self, ids):
        return ids[..., None].float()

    def editable(self):
        return {"only": self.only}

    def state_features(self, state):
        return state.tensors["window"].float()

    def generate(self, prompts, state=None, delta=None, max_new_tokens=32, stop="\n"):
        answers = []
        for row, prompt in enumerate(prompts):
            memory = [] if state is None else state.tensors["window"][row].tolist()
            memory = (memory + list(prompt))[-WINDOW - len(prompt) :]
            if delta is not None:
                memory += delta.factors["only"].U[row, :, 0].long().tolist()
            answers.append(self.answer(memory, self.tokenizer.decode(prompt)))
        return answers

    def answer(self, memory, question):
        text = ",".join(map(str, memory)) + ","
        for prompt, item in self.known.items():
            if ",".join(map(str, prompt)) + "," in text:
                for probe in item.probes:
                    if probe.question in question:
                        return " " + probe.answer
        return " I do not know."


class Copy:
    """Its delta holds the tokens of the prompt; `blind`: of nothing."""

    def __init__(self, blind=False):
        self.blind = blind

    def __call__(self, lm, ids, valid=None):
        held = torch.full((len(ids), WINDOW), PAD)
        if not self.blind:
            held[:, -ids.shape[1] :] = ids.masked_fill(~valid, PAD)
        delta = LowRankDelta({"only": Factors(held[..., None].float(), torch.zeros(1, 1, 1))}, lm.fingerprint())
        return delta, lm.step_through(ids, None, valid)[1]


@pytest.fixture(scope="module")
def rows(data):
    shape = Shape(FACTS, 256, PROBES, instructions=2)
    items = data.items(PROMPTS, shape)
    lm = Window(data, items)
    generators = {"token": Copy(), "final": Copy(), "static": Copy(blind=True)}
    return lm, items, measure(lm, generators, METHODS, data, (0, 16, 256), FACTS, PROMPTS, PROBES)


def mean(frame, method, distance, column="recall"):
    return frame[(frame.method == method) & (frame.distance == distance)][column].mean()


def test_each_method_knows_what_it_should(rows):
    """The plain model knows its prompt until it left the window; a delta and a repeated prompt always do; blind
    methods never do. All have the same prompts, texts and questions."""
    _, _, frame = rows
    assert (frame.groupby(["distance", "prompt"]).method.nunique() == len(METHODS)).all()
    assert len(frame) == len(METHODS) * 3 * PROMPTS
    assert frame.groupby("method").competing_total.sum().nunique() == 1
    for method, expected in {
        "base": (1, 1, 0),
        "prosg-token": (1, 1, 1),
        "prosg-final": (1, 1, 1),
        "static": (0, 0, 0),
        "static-read": (1, 1, 0),
        "none": (0, 0, 0),
        "repeated": (1, 1, 1),
    }.items():
        assert [mean(frame, method, d) for d in (0, 16, 256)] == list(expected), method
        # The right answer keeps its two instructions, "I do not know" keeps none.
        assert [mean(frame, method, d, "followed") for d in (0, 16, 256)] == list(expected), method


def test_wrong_answers_from_another_prompt(data, rows):
    """The control has the state and the delta of the prompt before, so it is right only where both say the same; one
    prompt alone has no other."""
    lm, items, frame = rows
    prompts = [list(data.encode_prompt(item)) for item in items]
    begin = start("wrong", lm, {"token": Copy()}, prompts)
    held = begin.delta.factors["only"].U[..., 0].long().tolist()
    for number in range(PROMPTS):
        other = prompts[number - 1]
        assert held[number][-len(other) :] == other
        assert begin.state.tensors["window"][number].tolist()[-len(other) :] == other
    with pytest.raises(UserError, match="at least 2 prompts"):
        start("wrong", lm, {"token": Copy()}, prompts[:1])
    for distance in (0, 256):
        found = frame[(frame.method == "wrong") & (frame.distance == distance)].recall.tolist()
        for number, item in enumerate(items):
            other = {p.question: p.fact for p in items[number - 1].probes}
            right = [other.get(p.question) == p.fact for p in item.probes]
            assert found[number] == np.mean(right)
    assert mean(frame, "wrong", 256) < 0.5


def test_competing_answers_are_counted_across_pieces(rows):
    """Every word of a competing answer counts once, in the piece that it stands in, the first token of a piece too."""
    lm, items, frame = rows
    base = frame[frame.method == "base"].set_index(["distance", "prompt"])
    for number, item in enumerate(items):
        for distance, before in ((16, 0), (256, 16)):
            stated = [t for t in range(before, distance) if item.body_kind[t] == COMPETING]
            right = [lm.follows[item.body[t - 1]] == item.body[t] for t in stated]
            assert base.competing_total[distance, number] == len(stated)
            expected = np.mean(right) if stated else math.nan
            assert base.competing[distance, number] == pytest.approx(expected, nan_ok=True)
    assert base.competing_total.sum() > 10
    assert 0 < base.competing.mean() < 1


@pytest.mark.parametrize("method", ["base", "prosg-token"])
def test_reading_on_equals_reading_from_scratch(data, method):
    """The state at every distance of one pass is the state of a text read to there at once, with a delta and without,
    and questions asked at one distance do not change what is read after them."""
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(data.tokenizer.vocab, 16, 2, 32)).eval().requires_grad_(False)
    lm.tokenizer = data.tokenizer
    generator = TokenGenerator(lm, 2, 8, ("att.output", "ffn.value")).requires_grad_(False)
    for head in generator.heads.values():
        nn.init.normal_(head.weight)
    items = data.items(2, Shape(FACTS, 70, 1, instructions=1))
    prompts = [list(data.encode_prompt(item)) for item in items]
    begin = start(method, lm, {"token": generator}, prompts)
    found = []
    for distance, state, _, _ in recall.read_texts(lm, begin, items, [0, 33, 70]):
        texts = recall.ask(lm, data, items, prompts, begin, state, distance)
        found.append((distance, state, texts))
    for distance, state, texts in found:
        alone = begin.state
        if distance:
            alone = lm(torch.tensor([item.body[:distance] for item in items]), begin.state, begin.delta)[1]
        for name in state.tensors:
            torch.testing.assert_close(state.tensors[name], alone.tensors[name], rtol=1e-4, atol=1e-5)
        assert texts == recall.ask(lm, data, items, prompts, begin, alone, distance)


def test_reading_again_keeps_what_a_short_memory_loses(data, rows):
    """A prompt that is read every 32 tokens is always in the window; one that is read twice in a row leaves it all the
    same. Distances, questions and the words of competing answers are those of the plain model."""
    lm, _, frame = rows
    found = measure(lm, {}, [ReadTwice(), ReadAgain(32), ReadAgain(1000)], data, (0, 16, 256), FACTS, PROMPTS, PROBES)
    for method, expected in {"twice": (1, 1, 0), "every-32": (1, 1, 1), "every-1000": (1, 1, 0)}.items():
        assert [mean(found, method, d) for d in (0, 16, 256)] == list(expected), method
    base = frame[frame.method == "base"].set_index(["distance", "prompt"])
    for method in ("twice", "every-1000"):
        other = found[found.method == method].set_index(["distance", "prompt"])
        assert other.competing_total.equals(base.competing_total)
        assert other.competing.equals(base.competing)
    again = found[found.method == "every-32"].set_index(["distance", "prompt"])
    assert again.competing_total.equals(base.competing_total)


@pytest.mark.parametrize("kind", ["keys and values", "everything again"])
def test_a_transformer_reads_prompt_text_and_question_as_one(data, kind, monkeypatch):
    """A model without a state of fixed size answers from all it has read: as one whole forward pass over prompt, text
    and question would, whatever the other lengths in the batch, and however few questions are asked at a time."""
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", data.tokenizer.vocab, 16, 2, 32, 2)).eval().requires_grad_(False)
    for weight in lm.parameters():
        nn.init.normal_(weight, std=0.3)
    lm.tokenizer = data.tokenizer
    whole, lm = lm, lm.with_kv_cache() if kind == "keys and values" else lm
    monkeypatch.setattr(recall, "_AT_ONCE", 3)
    monkeypatch.setattr(reading, "_PIECE", 16)
    items = data.items(2, Shape(FACTS, 70, PROBES, instructions=1))
    prompts = [list(data.encode_prompt(item)) for item in items]
    newline = data.tokenizer.encode("\n")
    begin = start("base", lm, {}, prompts)
    for distance, state, _, _ in recall.read_texts(lm, begin, items, [0, 33, 70]):
        texts = recall.ask(lm, data, items, prompts, begin, state, distance)
        for item, prompt, found in zip(items, prompts, texts, strict=True):
            text = [*prompt, *item.body[:distance]]
            text += newline if text[-1] != newline[-1] else ()
            for probe, answer in zip(item.probes, found, strict=True):
                assert [answer] == whole.generate([text + list(data.encode_probe(probe)[0])], max_new_tokens=12)
    assert set(measure(lm, {}, ["base", "none", "repeated"], data, (0, 8), 1, 2, 1).distance) == {0, 8}


def test_prose_is_read_as_the_method_reads(data):
    """The plain model's numbers are those of its logits; a method that goes on changing the state has others, and one
    that would do so after the passage has the same."""
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(data.tokenizer.vocab, 16, 2, 32)).eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.5)
    lm.tokenizer = data.tokenizer
    items = data.items(2, Shape(6, 0, 1, instructions=2))
    base = prose_losses(lm, {}, "base", data, items, 40)
    state = lm.derive_state([list(data.encode_prompt(item)) for item in items])
    rng = random.Random(f"prose/{data.seed}/{data.split}")
    ids = torch.tensor([data.prose.passage(40, rng) for _ in items])
    losses = nn.functional.cross_entropy(lm(ids[:, :-1], state)[0].transpose(1, 2), ids[:, 1:], reduction="none")
    assert base == pytest.approx(losses.mean(1).numpy(), rel=1e-5)
    assert prose_losses(lm, {}, Reinjection(50), data, items, 40) == pytest.approx(base, rel=1e-6)
    assert prose_losses(lm, {}, Reinjection(5, 1.0), data, items, 40) != pytest.approx(base, rel=1e-4)


def test_recall_alone_is_what_the_delta_knows_by_itself(data, rows):
    """From a blank state, one value a prompt: 1 with its own delta, 0 with none; with the next prompt's, only what
    both say."""
    lm, items, _ = rows
    ids, valid = lm.encode_prompts([list(data.encode_prompt(item)) for item in items])
    delta, _ = Copy()(lm, ids, valid)
    assert recall_alone(lm, delta, data, items).tolist() == [1.0] * PROMPTS
    assert recall_alone(lm, None, data, items).tolist() == [0.0] * PROMPTS
    swapped = recall_alone(lm, delta.select(torch.arange(PROMPTS).roll(1)), data, items)
    for number, item in enumerate(items):
        other = {p.question: p.fact for p in items[number - 1].probes}
        assert swapped[number] == np.mean([other.get(p.question) == p.fact for p in item.probes])


def test_sweep_takes_fewer_prompts_beside_the_main_number_of_facts(data):
    """The main number of facts is 6 where the grid has it, else the largest."""
    sizes = Evaluation(prompts=3, other_prompts=2, probes=1, seeds=(0,), distances=(0, 8), facts=(2, 3))
    assert sizes.main_facts == 3
    assert Evaluation(1, 1, 1, (0,), (0,), (3, 6, 12)).main_facts == 6
    lm = Window(data, [])
    frame = judged(answers(lm, {}, ["base", "none"], "test", sizes, lambda split, seed: data))
    assert frame.groupby("facts").prompt.nunique().to_dict() == {2: 2, 3: 3}
