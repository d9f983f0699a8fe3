"""The established memory tests: every method answers each problem as it would alone, whatever the padding; scores are
their formulas; the study is measured once and found again."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TINY as SMALL
from torch import nn

from prosg_lib import paths
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import Forgetting
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation import memory_tests
from prosg_lib.evaluation.memory_tests import (
    PLAIN,
    STUDY,
    answered,
    by_size,
    methods_of,
    most_copied,
    run,
    scored,
    study,
)
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.tasks.problems import Material, Problem
from prosg_lib.tasks.suite import settings
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences

TINY = Forgetting(3, (1, 2), ((16, 2),), (3,), (32,), (0.0, 1.0))
LITTLE = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:20]))

MAPS = ("att.output", "ffn.key")


@pytest.fixture
def problems():
    """Memories and rests of very different lengths, so that there is padding on both sides."""
    g = torch.Generator().manual_seed(3)

    def ids(n):
        return tuple(torch.randint(0, 2000, (n,), generator=g).tolist())

    judged = [(0, 2), (4,), (1, 2, 11), (0,), (3, 5)]
    sizes = [(5, 3), (40, 5), (2, 12), (17, 1), (9, 7)]
    return [
        Problem("test", {}, ids(m), ids(t), where, (0,) * len(where))
        for (m, t), where in zip(sizes, judged, strict=True)
    ]


def trained(kind, lm, endings=MAPS):
    """A generator whose last layer is not zero, so that its change changes the answers."""
    torch.manual_seed(0)
    if kind is AdapterStep:
        made = AdapterStep(lm, 3, endings, lr=5.0)
        last = made.U
    elif kind is StaticDelta:
        made = StaticDelta(lm, 3, endings)
        last = made.U
    else:
        made = kind(lm, 3, 24, endings)
        last = nn.ModuleList([made.heads, *([made.keys] if kind is TokenGenerator else [])])
    for p in last.parameters():
        nn.init.normal_(p, std=1.0)
    return made.eval()


@torch.no_grad()
def predicted_alone(lm, problem, ids, delta=None):
    """What the model predicts at the judged positions of the rest after these tokens, in one pass of its own."""
    logits, _ = lm(torch.tensor([[*ids, *problem.rest]]), None, delta)
    return tuple(logits[0, [len(ids) + place for place in problem.judged]].argmax(-1).tolist())


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("tokens", [16_384, 60])
def test_plain_methods_predict_as_one_forward_pass_does(lm, problems, tokens, monkeypatch):
    """Memory and rest, the rest alone, and the memory twice: each problem in one go, without batch, padding or state;
    in one batch and in several."""
    monkeypatch.setattr(memory_tests, "_TOKENS", tokens)
    found = answered(lm, None, problems)
    assert list(found) == list(PLAIN)
    assert found["base"] == [predicted_alone(lm, p, p.memory) for p in problems]
    assert found["none"] == [predicted_alone(lm, p, ()) for p in problems]
    assert found["repeated"] == [predicted_alone(lm, p, p.memory * 2) for p in problems]
    assert len({tuple(ids) for ids in found.values()}) == 3  # the test could tell them apart


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TokenGenerator, "prosg-token"),
        (FinalStateGenerator, "prosg-final"),
        (AdapterStep, "adapter"),
        (StaticDelta, "static-read"),
    ],
)
def test_a_generators_methods(lm, problems, kind, name):
    """Its change is each problem's own, the memory being read without it; alone, the rest is read from a blank state;
    wrong, state and change are the problem's before."""
    generator = trained(kind, lm)
    deltas = [generator.memorize(lm, [list(p.memory)]) for p in problems]
    found = answered(lm, generator, problems)
    assert list(found) == list(methods_of(generator)) == [*PLAIN, name, "alone", "wrong"]

    @torch.no_grad()
    def read_on(problem, memory, delta):
        state = lm.derive_state([list(memory)])
        logits, _ = lm(torch.tensor([problem.rest]), state, delta)
        return tuple(logits[0, list(problem.judged)].argmax(-1).tolist())

    before = [problems[-1], *problems[:-1]]
    assert found[name] == [read_on(p, p.memory, d) for p, d in zip(problems, deltas, strict=True)]
    assert found["alone"] == [predicted_alone(lm, p, (), d) for p, d in zip(problems, deltas, strict=True)]
    others = zip(problems, before, [deltas[-1], *deltas[:-1]], strict=True)
    assert found["wrong"] == [read_on(p, b.memory, d) for p, b, d in others]
    assert found["base"] == [predicted_alone(lm, p, p.memory) for p in problems]
    assert found[name] != found["base"]
    assert found["alone"] != found["none"]


def test_a_transformer_reads_all_in_one_pass(problems, monkeypatch):
    """Which has no state of a fixed size: once forward a method, and once for the delta that three of them take; the
    numbers are those of each problem alone."""
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", 2048, width=16, layers=2, ffn=32, heads=2)).eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.5)
    generator = trained(AdapterStep, lm, ("",))
    passes = []
    step = type(lm).step_through
    monkeypatch.setattr(type(lm), "step_through", lambda self, *given: passes.append(1) or step(self, *given))
    found = answered(lm, generator, problems)
    taken = len(passes)
    passes.clear()
    generator.memorize(lm, [list(p.memory) for p in problems])
    assert taken == len(found) + len(passes)
    assert found["base"] == [predicted_alone(lm, p, p.memory) for p in problems]
    assert found["repeated"] == [predicted_alone(lm, p, p.memory * 2) for p in problems]
    assert found["none"] == [predicted_alone(lm, p, ()) for p in problems]
    deltas = [generator.memorize(lm, [list(p.memory)]) for p in problems]
    assert found["alone"] == [predicted_alone(lm, p, (), d) for p, d in zip(problems, deltas, strict=True)]
    assert found["adapter"] == [predicted_alone(lm, p, p.memory, d) for p, d in zip(problems, deltas, strict=True)]


def test_batches_hold_two_at_least(lm, problems, monkeypatch):
    """However little fits, because the control needs a neighbour; every problem is in one batch, in its order."""
    monkeypatch.setattr(memory_tests, "_TOKENS", 1)
    batches = []
    monkeypatch.setattr(memory_tests, "_predicted", lambda lm, generator, batch: batches.append(batch) or iter(()))
    for count in (2, 3, 4, 5):
        batches.clear()
        answered(lm, None, problems[:count])
        assert min(map(len, batches)) >= 2
        assert [p for batch in batches for p in batch] == problems[:count]


def test_mistakes(lm, problems):
    """One problem, tokens that the model does not have, logits that are not finite, and a step that is no generator."""
    with pytest.raises(UserError, match="1 problem a cell"):
        answered(lm, None, problems[:1])
    foreign = [Problem("test", {}, (1,), (lm.config.vocab,), (0,), (1,))] * 2
    with pytest.raises(UserError, match=f"the model's vocabulary is {lm.config.vocab}"):
        answered(lm, None, foreign)
    with pytest.raises(UserError, match="a WeightStep cannot be evaluated here; take one of TokenGenerator"):
        methods_of(WeightStep(lm, None, 0.1))
    with torch.no_grad():
        lm.emb.weight[:] = float("nan")
    with pytest.raises(NotFinite, match="base: the logits are not finite"):
        answered(lm, None, problems)


# The tests' problems


@dataclass(frozen=True)
class Sizes:
    vocab: int


class Copier(LanguageModel):
    """Goes on as the text went on where its longest piece like the end of what was read stands, the first of several.

    Its state is all that it has read, -1 being padding.
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.config = tokenizer, Sizes(tokenizer.vocab)
        self.nothing = nn.Parameter(torch.zeros(1))

    def step_through(self, ids, state, valid):
        ids = ids if valid is None else ids.masked_fill(~valid, -1)
        read = ids if state is None else torch.cat([state.tensors["ids"], ids], 1)
        time = ids.shape[1]
        ends = range(read.shape[1] - time + 1, read.shape[1] + 1)
        predicted = [[self.next(row[:end]) for end in ends] for row in read.tolist()]
        return nn.functional.one_hot(torch.tensor(predicted), self.config.vocab).float(), RecurrentState({"ids": read})

    @staticmethod
    def next(row):
        row = [token for token in row if token >= 0]
        best, length = 0, 0
        for end in range(1, len(row)):
            same = 0
            while same < end and row[end - 1 - same] == row[-1 - same]:
                same += 1
            if same > length:
                best, length = row[end], same
        return best

    def read_out(self, hidden):
        return hidden

    def embed(self, *ids):
        pytest.fail("reading and judging need no embedding and no map")

    editable = embed


@pytest.fixture
def little(monkeypatch):
    """Little prose, and profiles with these problems."""
    monkeypatch.setattr(memory_tests, "load_prose", lambda: LITTLE)
    return lambda **sizes: replace(PROFILES["smoke"], name="tiny", forgetting=replace(TINY, **sizes))


def test_a_model_that_copies_solves_all_four(lm, little):
    """One that goes on as the text went on before gets everything right, with the memory once or twice, and without it
    nothing except a few tokens of copies and a query by chance. So the gold tokens are the memory's, and the judged
    positions are where they belong."""
    profile = little(copy=(1, 12), mqar=((64, 4),), phonebook=(3, 8), depths=(0.0, 0.4, 1.0))
    scores = scored(run(Copier(lm.tokenizer), None, {}, profile, (0,), 4)[1])
    for method, least, most in (("base", 1, 1), ("repeated", 1, 1), ("none", 0, 0.2)):
        own = scores[scores.method == method].score
        assert least <= own.min()
        assert own.mean() <= most
    assert not (scores[scores.method == "none"].score == 1).any()


def test_every_method_answers_every_problem(make_lm, little):
    """With the gold of the problems themselves; the header says what was measured."""
    lm = make_lm(layers=1, width=8)
    profile, generator = little(), trained(TokenGenerator, lm)
    material = Material(lm.tokenizer, ProseTokens.of(LITTLE, "test", lm.tokenizer))
    header, rows = run(lm, generator, {"model": "some"}, profile, (0, 3), 2)
    assert header["methods"] == [*PLAIN, "prosg-token", "alone", "wrong"]
    assert (header["model"], header["profile"], header["seeds"], header["items"]) == ("some", "tiny", [0, 3], 2)
    assert (header["fingerprint"], header["prose"]["sha256"]) == (lm.fingerprint(), LITTLE.sha256)
    found = iter(rows.to_dict("records"))
    for cell in settings(TINY, lm.config.vocab)[0]:
        for method in header["methods"]:
            for seed in (0, 3):
                for number in range(2):
                    problem, row = cell.problem(material, "test", seed, number), next(found)
                    assert (row["task"], row["cell"], row["method"]) == (problem.task, problem.cell, method)
                    assert (row["seed"], row["item"], row["gold"]) == (seed, number, list(problem.gold))
    plain = run(lm, None, {"model": "some"}, profile, (0, 3), 2)[1]
    again = rows[rows.method.isin(PLAIN)].reset_index(drop=True)
    pd.testing.assert_frame_equal(plain, again)  # the plain methods do not depend on a generator


def test_too_few_positions_are_reported_first(lm, little):
    """Before the model would read beyond its last position, and before anything is measured."""
    llama = new_llama(TransformerConfig("llama", 2048, width=8, layers=1, ffn=8, heads=1)).eval().requires_grad_(False)
    llama.model.config.max_position_embeddings = 80
    llama.tokenizer = lm.tokenizer
    with pytest.raises(UserError, match=r"phonebook \(lines 3\) needs \d+ tokens .* this model reads 80"):
        run(llama, None, {}, little(), (0,), 2)


# Scores


def row(task, cell, item, method, *hits):
    """An answer that is right at the places where `hits` is 1."""
    gold = list(range(10, 10 + len(hits)))
    predicted = [g if hit else 0 for g, hit in zip(gold, hits, strict=True)]
    return {"task": task, "cell": cell, "seed": 0, "item": item, "method": method, "gold": gold, "predicted": predicted}


def test_scores_are_shares_of_tokens_or_all_or_nothing():
    """Copying and MQAR count tokens, the others whole answers."""
    sizes = {"copy": {"words": 2}, "mqar": {"length": 64, "pairs": 4}, "phonebook": {"lines": 3},
             "passkey": {"length": 64, "depth": 0.5}}  # fmt: skip
    scores = scored(pd.DataFrame(row(task, cell, 0, "base", 1, 1, 1, 0) for task, cell in sizes.items()))
    assert scores.score.tolist() == [0.75, 0.75, 0.0, 0.0]
    assert scores["size"].tolist() == [2, 64, 3, 64]
    assert scores.name.tolist() == ["words 2", "length 64, pairs 4", "lines 3", "length 64, depth 0.5"]
    with pytest.raises(UserError, match="an unknown test 'riddles'; there are copy"):
        scored(pd.DataFrame([row("riddles", {}, 0, "base", 1)]))


def test_cells_of_one_size_count_together():
    """Passkeys of one length at all depths are one mean, in whatever order the rows are."""
    rng = np.random.default_rng(0)
    cells = [{"length": n, "depth": d} for n in (64, 128) for d in (0.0, 1.0)]
    rows = [row("passkey", cell, i, m, *rng.integers(2, size=1)) for cell in cells for m in "ab" for i in range(4)]
    scores = scored(pd.DataFrame(rows))
    table = by_size(scores, ["a", "b"])
    for method in "ab":
        own = scores[scores.method == method].score.to_numpy().reshape(2, 8).mean(1)
        assert [cell.value for cell in table.loc[method]] == pytest.approx(own.tolist())
    assert by_size(scores.iloc[::-1].sort_values("size", kind="stable"), ["a", "b"]).equals(table)


def test_the_most_words_that_are_copied():
    """The largest number of words at which the mean reaches the share; 0 where none does."""
    rows = [row("copy", {"words": n}, i, "base", *([1] * 9 + [n < 5 or i > 0])) for n in (2, 5) for i in (0, 1)]
    scores = scored(pd.DataFrame([*rows, row("copy", {"words": 2}, 0, "none", 0)]))
    assert [most_copied(scores, "base", share) for share in (1.0, 0.95, 0.9)] == [2, 5, 5]
    assert most_copied(scores, "none", 0.9) == 0


# The study


def test_all_methods_of_the_study_answer_the_same_problems(small_world, tmp_path):
    with small_world(SMALL, tmp_path / "runs"):
        rows = study(get_profile("tiny"))
    assert list(rows.method.unique()) == [m for shown in STUDY.values() for m in shown.values()]
    assert list(rows.task.unique()) == ["copy", "mqar", "phonebook", "passkey"]
    assert rows.groupby("method").size().nunique() == 1


def test_the_shipped_answers_are_of_all_methods_to_the_same_problems():
    rows = pd.read_json(paths.data_dir() / "measured" / "established_tests.jsonl.gz", lines=True)
    assert set(rows.method) == {m for shown in STUDY.values() for m in shown.values()}
    assert rows.groupby("method").size().nunique() == 1
    assert set(scored(rows).task) == set(memory_tests.TESTS)
