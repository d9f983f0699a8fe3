"""A step on linear maps that is kept as factors is the step on their whole weights, gradients and all."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.generators.base import parameter_key
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.gradient_steps.one_step import adapted
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.training.loop import groups_of


def scrambled(lm):
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return lm.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return scrambled(RWKV4(RWKV4Config(vocab=50, width=16, layers=2, ffn=32)))


def llama():
    """Its readout is no other than that of the recurrent model: a matrix of its own."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = LlamaConfig(vocab_size=50, **narrow, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    return scrambled(CausalTransformer(AutoModelForCausalLM.from_config(sizes)))


def way_of(lm, lr=0.02):
    torch.manual_seed(1)
    way = MapStep(lm, lr).double()
    for moved in way.moved.parameters():
        torch.nn.init.normal_(moved, std=0.1)
    torch.nn.init.normal_(way.pace, std=0.02)
    return way


def rows_of(batch, n, seed=0):
    """Contexts of different lengths, (batch, n, C): padded, and as lists of tokens."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(50, (4 + i % 5,), generator=g).tolist() for i in range(batch * n)]
    return Rows(*(t.view(batch, n, -1) for t in left_padded(rows))), [rows[i * n : i * n + n] for i in range(batch)]


def head_of(lm):
    return next(name for name, _ in lm.named_parameters() if name.endswith("head.weight"))


def by_hand(lm, way, contexts, successive):
    """One example's weights after SGD on every map's whole weight and the head's, its graph kept; no padding."""
    named = {id(p): name for name, p in lm.named_parameters()}
    rates = {named[id(module.weight)]: way.rates(lm)[name] for name, module in lm.editable().items()}
    rates[head_of(lm)] = way.rates(lm)["readout"]
    weights = {name: w + way.moved[parameter_key(name)] for name, w in lm.named_parameters()}
    for told in [[c] for c in contexts] if successive else [contexts]:
        losses = []
        for ids in torch.tensor(told[0]), *map(torch.tensor, told[1:]):
            says = torch.func.functional_call(lm, weights, (ids[None, :-1],))[0]
            losses.append(cross_entropy(says[0], ids[1:], reduction="sum"))
        slopes = torch.autograd.grad(sum(losses) / len(losses), [weights[n] for n in rates], create_graph=True)
        weights = weights | {n: weights[n] - rates[n] * s for n, s in zip(rates, slopes, strict=True)}
    return weights


@pytest.mark.parametrize(("n", "successive"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", ["rwkv4", "llama"])
def test_factors_do_what_whole_weights_do(lm, kind, n, successive):
    """Logits after the step, all or the last alone, and the outer gradient of the start and of the rates; whatever the
    padding.

    A Llama normalises in float32, whatever the weights' type, so it is held to that.
    """
    lm, close = (lm, {}) if kind == "rwkv4" else (llama(), {"rtol": 1e-4, "atol": 1e-4})
    way = way_of(lm)
    contexts, told = rows_of(3, n)
    (ids, valid), query = (t[:, 0] for t in rows_of(3, 1, seed=3)[0]), rows_of(3, 1, seed=3)[1]
    found = adapted(way, lm, contexts, successive)(ids, valid)
    expected = [
        torch.func.functional_call(lm, by_hand(lm, way, told[i], successive), (torch.tensor(query[i]),))[0][0]
        for i in range(3)
    ]
    before = adapted(way_of(lm, lr=0.0), lm, contexts)(ids, valid)
    assert (found - before)[valid].abs().max() > 0.1
    parameters = list(way.parameters())
    torch.manual_seed(5)
    along = torch.randn(int(valid.sum()), 50, dtype=torch.float64)
    assert_close(found[valid], torch.cat(expected), **close)
    assert_close(adapted(way, lm, contexts, successive)(ids, valid, 2), found[:, -2:], **close)
    grads, same = (torch.autograd.grad((s * along).sum(), parameters) for s in (found[valid], torch.cat(expected)))
    assert_close(grads, same, **close)
    assert min(g.norm() for g in grads) > 1e-3


def test_a_text_that_is_read_in_pieces_is_learned_whole(lm, monkeypatch):
    """As classes read it that know no padding: step and outer gradient are those of one pass."""
    contexts, (ids, valid) = rows_of(2, 1)[0], (t[:, 0] for t in rows_of(2, 1, seed=3)[0])
    way, found = way_of(lm), []
    whole = lm.step_through

    def in_pieces(ids, state, valid):
        first, state = whole(ids[:, :2], state, valid[:, :2])
        rest, state = whole(ids[:, 2:], state, valid[:, 2:])
        return torch.cat([first, rest], 1), state

    for step_through in (whole, in_pieces):
        monkeypatch.setattr(lm, "step_through", step_through)
        says = adapted(way, lm, contexts)(ids, valid)[valid]
        found.append([says, *torch.autograd.grad(says.square().sum(), list(way.parameters()))])
    assert_close(*found)


def test_without_training_it_is_the_models_own_step(lm):
    """The start is the model, and every rate the one that is given."""
    way = MapStep(lm, 0.02).double()
    assert {rate.item() for rate in way.rates(lm).values()} == {0.02}
    assert len(way.rates(lm)) == len(lm.editable()) + 1
    contexts, (ids, valid) = rows_of(2, 1)[0], (t[:, 0] for t in rows_of(2, 1, seed=3)[0])
    with torch.no_grad():
        still = adapted(MapStep(lm, 0.0).double(), lm, contexts)(ids, valid)
        moved = adapted(way.requires_grad_(False), lm, contexts)(ids, valid)
    assert_close(still[valid], adapted(None, lm, contexts)(ids, valid)[valid])
    assert not torch.allclose(still[valid], moved[valid])


def test_rates_are_trained_apart_from_the_start(lm):
    """All that is trained is in a group, once; the rates' gradient is not clipped, and leaves the weights' as it is."""
    way = MapStep(lm, 0.02)
    weights, rates = groups_of(way)
    assert [id(p) for p in weights["params"]] == [id(p) for p in way.moved.parameters()]
    assert [id(p) for p in rates["params"]] == [id(way.pace)]
    assert len(list(way.parameters())) == len(weights["params"]) + 1
    assert (weights["factor"], weights["clip"], rates["factor"], rates["clip"]) == (1.0, 1.0, 30.0, math.inf)
    with torch.no_grad():
        way.pace[-1] += math.log(2)
    assert [rate.item() for rate in way.rates(lm).values()][-2:] == pytest.approx([0.02, 0.04])


def test_another_models_start_is_refused(lm):
    torch.manual_seed(7)
    other = scrambled(RWKV4(RWKV4Config(vocab=50, width=16, layers=2, ffn=32)))
    with pytest.raises(UserError, match="was trained for model"):
        adapted(MapStep(lm, 0.02), other, rows_of(2, 1)[0])
