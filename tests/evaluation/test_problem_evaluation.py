"""Evaluation of problems: every method says what it says to each problem alone, in one go, whatever the padding."""

import pytest
import torch
from torch import nn

from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation import problem_evaluation
from prosg_lib.evaluation.problem_evaluation import PLAIN, answered, methods_of
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.tasks.problems import Problem

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
def says(lm, problem, ids, delta=None):
    """What the model says at the judged positions of the rest, reading these tokens and then the rest, by itself."""
    logits, _ = lm(torch.tensor([[*ids, *problem.rest]]), None, delta)
    return tuple(logits[0, [len(ids) + place for place in problem.judged]].argmax(-1).tolist())


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("tokens", [16_384, 60])
def test_plain_methods_say_what_one_reading_says(lm, problems, tokens, monkeypatch):
    """Memory and rest, the rest alone, and the memory twice: each problem in one go, without batch, padding or state;
    in one batch and in several."""
    monkeypatch.setattr(problem_evaluation, "_TOKENS", tokens)
    found = dict(answered(lm, None, problems))
    assert list(found) == list(PLAIN)
    assert found["base"] == [says(lm, p, p.memory) for p in problems]
    assert found["none"] == [says(lm, p, ()) for p in problems]
    assert found["repeated"] == [says(lm, p, p.memory * 2) for p in problems]
    assert len({tuple(said) for said in found.values()}) == 3  # the test could tell them apart


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
    found = dict(answered(lm, generator, problems))
    assert list(found) == list(methods_of(generator)) == [*PLAIN, name, "alone", "wrong"]

    @torch.no_grad()
    def read_on(problem, memory, delta):
        state = lm.derive_state([list(memory)])
        logits, _ = lm(torch.tensor([problem.rest]), state, delta)
        return tuple(logits[0, list(problem.judged)].argmax(-1).tolist())

    before = [problems[-1], *problems[:-1]]
    assert found[name] == [read_on(p, p.memory, d) for p, d in zip(problems, deltas, strict=True)]
    assert found["alone"] == [says(lm, p, (), d) for p, d in zip(problems, deltas, strict=True)]
    others = zip(problems, before, [deltas[-1], *deltas[:-1]], strict=True)
    assert found["wrong"] == [read_on(p, b.memory, d) for p, b, d in others]
    assert found["base"] == [says(lm, p, p.memory) for p in problems]
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
    found = dict(answered(lm, generator, problems))
    taken = len(passes)
    passes.clear()
    generator.memorize(lm, [list(p.memory) for p in problems])
    assert taken == len(found) + len(passes)
    assert found["base"] == [says(lm, p, p.memory) for p in problems]
    assert found["repeated"] == [says(lm, p, p.memory * 2) for p in problems]
    assert found["none"] == [says(lm, p, ()) for p in problems]
    deltas = [generator.memorize(lm, [list(p.memory)]) for p in problems]
    assert found["alone"] == [says(lm, p, (), d) for p, d in zip(problems, deltas, strict=True)]
    assert found["adapter"] == [says(lm, p, p.memory, d) for p, d in zip(problems, deltas, strict=True)]


def test_batches_hold_two_at_least(lm, problems, monkeypatch):
    """However little fits: the control needs a neighbour. All problems are in one batch each, in their order."""
    monkeypatch.setattr(problem_evaluation, "_TOKENS", 1)
    for count in (2, 3, 4, 5):
        parts = list(problem_evaluation._batches(problems[:count]))
        assert min(map(len, parts)) >= 2
        assert [p for part in parts for p in part] == problems[:count]


def test_mistakes(lm, problems):
    """One problem, tokens that the model has not, a model that says nothing, and a step that is no generator."""
    with pytest.raises(UserError, match="1 problem a cell"):
        next(answered(lm, None, problems[:1]))
    foreign = [Problem("test", {}, (1,), (lm.config.vocab,), (0,), (1,))] * 2
    with pytest.raises(UserError, match=f"the model's vocabulary is {lm.config.vocab}"):
        next(answered(lm, None, foreign))
    with pytest.raises(UserError, match="WeightStep is no generator"):
        methods_of(WeightStep(lm, None, 0.1))
    with torch.no_grad():
        lm.emb.weight[:] = float("nan")
    with pytest.raises(NotFinite, match="base: what the model says"):
        next(answered(lm, None, problems))
