"""Evaluation: known numbers come out of a model whose knowledge is known, and statistics are what they say."""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
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
from prosg_lib.evaluation import reading
from prosg_lib.evaluation import recall as evaluate
from prosg_lib.evaluation.baselines import METHODS, start
from prosg_lib.evaluation.recall import (
    by_distance,
    by_training,
    differences,
    estimate,
    gap_recovered,
    half_life,
    locality,
    measure,
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
        self.only = nn.Linear(1, 1, bias=False)
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
        held = torch.full_like(ids, PAD) if self.blind else ids.masked_fill(~valid, PAD)
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
    methods never do."""
    _, _, frame = rows
    assert len(frame) == len(METHODS) * 3 * PROMPTS
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


def test_wrong_answers_from_another_prompt(rows):
    """The control has the state and the delta of the prompt before, so it is right only where both say the same."""
    _, items, frame = rows
    for distance in (0, 256):
        found = frame[(frame.method == "wrong") & (frame.distance == distance)].recall.tolist()
        for number, item in enumerate(items):
            other = {p.question: p.fact for p in items[number - 1].probes}
            right = [other.get(p.question) == p.fact for p in item.probes]
            assert found[number] == np.mean(right)
    assert mean(frame, "wrong", 256) < 0.5


def test_wrong_takes_state_and_delta_of_one_other_prompt(data, rows):
    """Both belong to the same other prompt, and one prompt alone has no other."""
    lm, items, _ = rows
    prompts = [list(data.encode_prompt(item)) for item in items]
    begin = start("wrong", lm, {"token": Copy()}, prompts)
    held = begin.delta.factors["only"].U[..., 0].long().tolist()
    for number in range(PROMPTS):
        other = prompts[number - 1]
        assert held[number][-len(other) :] == other
        assert begin.state.tensors["window"][number].tolist()[-len(other) :] == other
    with pytest.raises(UserError, match="at least 2 prompts"):
        start("wrong", lm, {"token": Copy()}, prompts[:1])


def test_competing_answers_are_counted_across_pieces(rows):
    """Every word of a competing answer counts once, in the piece that it stands in, the first token of a piece too."""
    lm, items, frame = rows
    base = frame[frame.method == "base"].set_index(["distance", "prompt"])
    for number, item in enumerate(items):
        for distance, before in ((16, 0), (256, 16)):
            asked = [t for t in range(before, distance) if item.body_kind[t] == COMPETING]
            right = [lm.follows[item.body[t - 1]] == item.body[t] for t in asked]
            assert base.asked[distance, number] == len(asked)
            expected = np.mean(right) if asked else math.nan
            assert base.competing[distance, number] == pytest.approx(expected, nan_ok=True)
    assert base.asked.sum() > 10
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
    for distance, state, _, _ in evaluate._read(lm, begin, items, [0, 33, 70]):
        texts = evaluate._ask(lm, data, items, prompts, begin, state, distance)
        found.append((distance, state, texts))
    for distance, state, texts in found:
        alone = begin.state
        if distance:
            alone = lm(torch.tensor([item.body[:distance] for item in items]), begin.state, begin.delta)[1]
        for name in state.tensors:
            torch.testing.assert_close(state.tensors[name], alone.tensors[name], rtol=1e-4, atol=1e-5)
        assert texts == evaluate._ask(lm, data, items, prompts, begin, alone, distance)


def test_reading_again_keeps_what_a_short_memory_loses(data, rows):
    """A prompt that is read every 32 tokens is always in the window; one that is read twice in a row leaves it all the
    same. Distances, questions and the words of competing answers are those of the plain model."""
    lm, _, frame = rows
    found = measure(lm, {}, ["twice", "every-32", "every-1000"], data, (0, 16, 256), FACTS, PROMPTS, PROBES)
    for method, expected in {"twice": (1, 1, 0), "every-32": (1, 1, 1), "every-1000": (1, 1, 0)}.items():
        assert [mean(found, method, d) for d in (0, 16, 256)] == list(expected), method
    base = frame[frame.method == "base"].set_index(["distance", "prompt"])
    for method in ("twice", "every-1000"):
        other = found[found.method == method].set_index(["distance", "prompt"])
        assert other.asked.equals(base.asked)
        assert other.competing.equals(base.competing)
    again = found[found.method == "every-32"].set_index(["distance", "prompt"])
    assert again.asked.equals(base.asked)


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
    monkeypatch.setattr(evaluate, "_AT_ONCE", 3)
    monkeypatch.setattr(reading, "_PIECE", 16)
    items = data.items(2, Shape(FACTS, 70, PROBES, instructions=1))
    prompts = [list(data.encode_prompt(item)) for item in items]
    newline = data.tokenizer.encode("\n")
    begin = start("base", lm, {}, prompts)
    for distance, state, _, _ in evaluate._read(lm, begin, items, [0, 33, 70]):
        texts = evaluate._ask(lm, data, items, prompts, begin, state, distance)
        for item, prompt, answers in zip(items, prompts, texts, strict=True):
            text = [*prompt, *item.body[:distance]]
            text += newline if text[-1] != newline[-1] else ()
            for probe, answer in zip(item.probes, answers, strict=True):
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
    base = evaluate.prose_nll(lm, {}, "base", data, 2, length=40)
    items = data.items(2, Shape(6, 0, 1, instructions=2))
    state = lm.derive_state([list(data.encode_prompt(item)) for item in items])
    rng = random.Random(f"prose/{data.seed}/{data.split}")
    ids = torch.tensor([data.prose.passage(40, rng) for _ in items])
    losses = nn.functional.cross_entropy(lm(ids[:, :-1], state)[0].transpose(1, 2), ids[:, 1:], reduction="none")
    assert base == pytest.approx(losses.mean(1).numpy(), rel=1e-5)
    assert evaluate.prose_nll(lm, {}, "reinject-50", data, 2, length=40) == pytest.approx(base, rel=1e-6)
    assert evaluate.prose_nll(lm, {}, "reinject-5-1", data, 2, length=40) != pytest.approx(base, rel=1e-4)


def test_measure_asks_from_every_method_the_same(rows):
    """Comparisons are paired: the same prompts, texts and questions for every method."""
    _, _, frame = rows
    counts = frame.groupby("method").asked.sum()
    assert counts.nunique() == 1
    assert (frame.groupby(["distance", "prompt"]).size() == len(METHODS)).all()


def test_recall_alone_is_what_the_delta_knows_by_itself(data, rows):
    """From a blank state, one value a prompt: 1 with its own delta, 0 with none; with the next prompt's, only what
    both say."""
    lm, items, _ = rows
    ids, valid = lm.encode_prompts([list(data.encode_prompt(item)) for item in items])
    delta, _ = Copy()(lm, ids, valid)
    assert evaluate.recall_alone(lm, delta, data, items).tolist() == [1.0] * PROMPTS
    assert evaluate.recall_alone(lm, None, data, items).tolist() == [0.0] * PROMPTS
    swapped = evaluate.recall_alone(lm, delta.select(torch.arange(PROMPTS).roll(1)), data, items)
    for number, item in enumerate(items):
        other = {p.question: p.fact for p in items[number - 1].probes}
        assert swapped[number] == np.mean([other.get(p.question) == p.fact for p in item.probes])


def test_sweep_takes_fewer_prompts_beside_the_main_number_of_facts(data):
    """The main number of facts is 6 where the grid has it, else the largest."""
    sizes = Evaluation(prompts=3, other_prompts=2, probes=1, seeds=(0,), distances=(0, 8), facts=(2, 3))
    assert sizes.main_facts == 3
    assert Evaluation(1, 1, 1, (0,), (0,), (3, 6, 12)).main_facts == 6
    lm = Window(data, [])
    frame = evaluate.sweep(lm, {}, ["base", "none"], "test", sizes, lambda split, seed: data)
    assert frame.groupby("facts").prompt.nunique().to_dict() == {2: 2, 3: 3}


def test_every_training_answers_the_same(data):
    """As the method alone would, with each generator, and each row says which it was."""
    items = data.items(2, Shape(2, 8, 1, instructions=2))
    lm, sizes = Window(data, items), Evaluation(2, 2, 1, (0,), (0, 8), (2,))
    told = ("test", sizes, lambda split, seed: data)
    found = evaluate.answers_by_training(lm, {0: Copy(), 3: Copy(blind=True)}, *told)
    for number, generator in {0: Copy(), 3: Copy(blind=True)}.items():
        alone = evaluate.answers(lm, {"token": generator}, ["prosg-token"], *told)
        assert [row for row in found if row.training == number] == [replace(row, training=number) for row in alone]
    assert evaluate.judged(found).training.tolist() == [0] * 4 + [3] * 4


# Statistics


def made(recall, distances=(0, 64, 256), seeds=(0,), facts=6, **columns):
    """A frame out of {method: one list of prompts' recalls a distance}."""
    return pd.DataFrame(
        [
            {"method": m, "distance": d, "facts": facts, "seed": s, "prompt": i, "recall": r, "followed": r}
            | {name: values[m][j][i] for name, values in columns.items()}
            for m, table in recall.items()
            for j, (d, prompts) in enumerate(zip(distances, table, strict=True))
            for s in seeds
            for i, r in enumerate(prompts)
        ]
    )


def test_gap_recovered_is_its_formula():
    """(R - none) / (repeated - none) of the means, not the mean of the ratios."""
    frame = made({"prosg-token": [[0.9, 0.5]], "none": [[0.1, 0.1]], "repeated": [[1.0, 0.8]]}, distances=(64,))
    found = gap_recovered(frame, "prosg-token", 64)
    assert found.value == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert found.low == pytest.approx((0.5 - 0.1) / (0.8 - 0.1))  # both times the second prompt
    assert found.high == pytest.approx((0.9 - 0.1) / (1.0 - 0.1))
    assert gap_recovered(frame, "none", 64).value == 0
    assert gap_recovered(frame, "repeated", 64).value == 1


def test_no_gap_no_share_of_it():
    """Where even the repeated prompt does not help, nothing is said to be recovered."""
    frame = made({"base": [[0.5, 0.0]], "none": [[0.2, 0.2]], "repeated": [[0.2, 0.2]]}, distances=(64,))
    found = gap_recovered(frame, "base", 64)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_half_life_is_between_the_distances_that_enclose_it():
    """Linear in log(1 + d); infinite where half is never reached; the first crossing counts."""
    frame = made(
        {"base": [[1.0], [0.75], [0.25]], "prosg-token": [[1.0], [1.0], [0.5]], "wrong": [[1.0], [0.0], [1.0]]}
    )
    assert half_life(frame, "base") == pytest.approx(math.expm1((math.log(65) + math.log(257)) / 2))
    assert half_life(frame, "prosg-token") == math.inf
    assert half_life(frame, "wrong") == pytest.approx(math.expm1(math.log(65) / 2))


def test_interval_covers():
    """A 95 % interval encloses the true mean about that often: 60 prompts, 150 times."""
    rng = np.random.default_rng(1)
    found = [evaluate.resampled(rng.binomial(6, 0.7, (1, 60)) / 6, lambda means: means[0]) for _ in range(150)]
    assert 0.88 <= np.mean([e.low <= 0.7 <= e.high for e in found]) <= 0.99


def test_differences_are_paired():
    """Two methods that differ by the same amount in every prompt differ by it for sure, however prompts differ."""
    recalls = np.linspace(0.2, 0.8, 7)
    frame = made({"wrong": [recalls - 0.1], "none": [recalls]}, distances=(64,))
    found = differences(frame, "wrong", "none")[64]
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_the_band_of_differences_covers_a_whole_curve():
    """Of curves that differ nowhere, about one in twenty leaves the band somewhere; single intervals miss far more."""
    rng = np.random.default_rng(3)
    distances, missed, single = (0, 16, 64, 256, 512, 1024, 4096), 0, 0
    for _ in range(200):
        draws = rng.normal(size=(2, len(distances), 40))
        frame = made({"wrong": list(draws[0]), "none": list(draws[1])}, distances=distances)
        band = differences(frame, "wrong", "none")
        missed += any(not e.low <= 0 <= e.high for e in band.values())
        apart = draws[0] - draws[1]
        single += bool((np.abs(apart.mean(1)) > 1.96 * apart.std(1) / 40**0.5).any())
    assert 0.01 <= missed / 200 <= 0.11
    assert single / 200 > 0.2


def test_locality_pools_words_and_not_shares():
    """Prompts with more questions about other people weigh more; pieces without any say nothing."""
    recall = {"base": [[0, 0], [0, 0]], "prosg-token": [[0, 0], [0, 0]]}
    nan = float("nan")
    frame = made(
        recall,
        distances=(0, 64),
        asked={"base": [[0, 0], [10, 2]], "prosg-token": [[0, 0], [10, 2]]},
        competing={"base": [[nan, nan], [0.8, 1.0]], "prosg-token": [[nan, nan], [0.6, 1.0]]},
    )
    assert locality(frame, "prosg-token").value == pytest.approx((6 + 2) / (8 + 2))
    assert locality(frame, "base").value == 1


def test_nobody_asked_nothing_lost():
    """Where no text asks about other people, as at distance 0, there is no ratio."""
    frame = made({"base": [[1.0]], "none": [[0.0]]}, distances=(0,), asked={"base": [[0]], "none": [[0]]})
    assert math.isnan(locality(frame.assign(competing=math.nan), "none").value)


def test_by_distance_is_a_table_of_estimates():
    """One row a method in the order given, one column a distance in rising order."""
    frame = made({"base": [[1.0], [0.5], [0.0]], "none": [[0.0], [0.0], [0.0]]}, distances=(256, 0, 64))
    table = by_distance(estimate, frame, ["none", "base"])
    assert list(table.index) == ["none", "base"]
    assert list(table.columns) == [0, 64, 256]
    assert table.loc["base", 256].value == 1.0
    assert str(table.loc["base", 0]) == "0.50 [0.50, 0.50]"


def trained(recalls, method="prosg-token"):
    """The frame of several trainings: number -> one list of prompts' recalls a distance."""
    return pd.concat([made({method: table}).assign(training=n) for n, table in recalls.items()], ignore_index=True)


def test_numbers_are_means_over_trainings():
    """Recall, gap, differences, half-life, answers about others; a method without trainings is the same in all."""
    several = trained({0: [[1.0, 0.8], [0.9, 0.7], [0.6, 0.4]], 1: [[0.6, 0.4], [0.5, 0.3], [0.0, 0.0]]})
    once = made({"none": [[0.2, 0.0]] * 3, "repeated": [[1.0, 1.0]] * 3}).assign(training=0)
    frame = pd.concat([several, once], ignore_index=True)
    assert [estimate(frame, "prosg-token", d).value for d in (0, 64, 256)] == pytest.approx([0.7, 0.6, 0.25])
    assert gap_recovered(frame, "prosg-token", 0).value == pytest.approx((0.7 - 0.1) / 0.9)
    assert differences(frame, "prosg-token", "none")[256].value == pytest.approx(0.15)
    mean = {"prosg-token": [[0.8, 0.6], [0.7, 0.5], [0.3, 0.2]]}
    assert half_life(frame, "prosg-token") == half_life(made(mean), "prosg-token")
    each = by_training(frame, "prosg-token")
    assert each.index.tolist() == [0, 1]
    assert each[256].map(lambda e: e.value).tolist() == [0.5, 0.0]
    assert by_training(once.drop(columns="training"), "none").index.tolist() == [0]
    about = frame.assign(asked=10, competing=np.where(frame.method == "none", 0.5, 0.25 + 0.5 * frame.training))
    assert locality(about, "prosg-token", "none").value == pytest.approx(1.0)
    assert (locality(about, "prosg-token", "none").low, locality(about, "prosg-token", "none").high) == (0.5, 1.5)


def test_a_band_is_wider_where_trainings_differ():
    """And the same, where they do not."""
    rng = np.random.default_rng(0)
    prompts, none = rng.uniform(0.4, 0.6, (3, 30)), made({"none": [np.zeros(30)] * 3}).assign(training=0)

    def band(apart):
        tables = {n: list(prompts + apart * n) for n in range(-2, 3)}
        return differences(pd.concat([trained(tables), none]), "prosg-token", "none")[64]

    alone = differences(pd.concat([made({"prosg-token": list(prompts)}), none.drop(columns="training")]),
                        "prosg-token", "none")[64]  # fmt: skip
    alike, apart = band(0.0), band(0.05)
    assert (alike.low, alike.high) == pytest.approx((alone.low, alone.high))
    assert apart.low < alone.low - 0.05
    assert apart.high > alone.high + 0.05


def test_other_trainings_each_are_not_compared():
    """Two methods with several trainings need the same ones."""
    frame = pd.concat([trained({n: [[0.5]] * 3 for n in some}, m) for m, some in {"a": (0, 1), "b": (0, 2)}.items()])
    with pytest.raises(UserError, match="a, b have other trainings each"):
        differences(frame, "a", "b")


def test_what_was_not_measured_is_named():
    """An estimate of a method or distance that is not in the frame says so."""
    with pytest.raises(UserError, match="repeated was not measured at 64"):
        gap_recovered(made({"base": [[1.0]], "none": [[0.0]]}, distances=(64,)), "base", 64)
    with pytest.raises(UserError, match="unknown method 'magic'"):
        start("magic", None, {}, [[1]])
    lm = RWKV4(RWKV4Config(10, 4, 1, 8))
    with pytest.raises(UserError, match="needs the 'token' generator"):
        start("prosg-token", lm, {}, [[1]])
