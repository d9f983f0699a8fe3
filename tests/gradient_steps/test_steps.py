"""Steps in an adapter, on all weights and on linear maps: those of plain SGD, and their exact outer gradients."""

import functools
import math

import pytest
import torch
from checks import assert_same_change, ids_of
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from prosg_lib.backbones.hub_transformer import CausalTransformer, TransformerConfig, new_llama
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.generators.base import SCALE, parameter_key
from prosg_lib.gradient_steps.adapter_step import AdapterStep, RatedAdapterStep
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.gradient_steps.one_step import adapted
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.training.loop import groups_of


def scrambled(lm, dtype=torch.float64):
    lm = lm.to(dtype).eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return lm


def rwkv4(dtype=torch.float64):
    torch.manual_seed(0)
    return scrambled(RWKV4(RWKV4Config(vocab=50, width=16, layers=2, ffn=32)), dtype)


def rwkv7(dtype):
    torch.manual_seed(0)
    return scrambled(RWKV7(RWKV7Config(50, 16, 2, 32, 8, 4, 3, 2, 5)), dtype)


def llama(dtype):
    """Its input and output embeddings are one matrix, which takes one step. It normalises in float32 anyway."""
    torch.manual_seed(0)
    return scrambled(new_llama(TransformerConfig("llama", 50, 16, 2, 32, 2)), dtype)


def untied_llama(dtype):
    """With a readout of its own, for the step on maps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, **sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    return scrambled(CausalTransformer(AutoModelForCausalLM.from_config(config)), dtype)


@pytest.fixture(scope="module")
def lm():
    return rwkv4()


def adapter(lm, lr=0.5, second_order=True, kind=AdapterStep):
    torch.manual_seed(1)
    endings = ("att.output", "ffn.value") if isinstance(lm, RWKV4 | RWKV7) else ("o_proj", "down_proj")
    method = kind(lm, 3, endings, lr, second_order)
    for u in method.U.parameters():
        torch.nn.init.normal_(u, std=0.3)
    return method.to(next(lm.parameters()).dtype)


def rated(lm, lr=0.5, second_order=True):
    method = adapter(lm, lr, second_order, RatedAdapterStep)
    torch.nn.init.normal_(method.log_rates, mean=0.5, std=0.3)
    return method


def weights(lm, lr=0.05, second_order=True, rank=None):
    torch.manual_seed(1)
    method = WeightStep(lm, rank, lr, second_order).to(next(lm.parameters()).dtype)
    for moved in method.moved.parameters():
        torch.nn.init.normal_(moved, std=0.1)
    return method


def rank_two(lm, lr=0.05, second_order=True):
    return weights(lm, lr, second_order, rank=2)


def maps(lm, lr=0.02):
    torch.manual_seed(1)
    method = MapStep(lm, lr).to(next(lm.parameters()).dtype)
    for moved in method.moved.parameters():
        torch.nn.init.normal_(moved, std=0.1)
    torch.nn.init.normal_(method.log_rates, std=0.02)
    return method


METHODS = [adapter, rated, weights, rank_two, maps]


ids_of = functools.partial(ids_of, vocab=50)


def padded(batch, n, seed=0):
    """Contexts of different lengths, (batch, n, C): left-padded, and as lists of tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (batch * n,), generator=g).tolist()
    rows = [torch.randint(50, (length,), generator=g).tolist() for length in lengths]
    return Rows(*(t.view(batch, n, -1) for t in left_padded(rows))), [rows[i * n : i * n + n] for i in range(batch)]


def logits_of(lm, method, contexts, query, successive=False):
    return adapted(method, lm, contexts, successive)(query, torch.ones_like(query).bool())


# --- against plain SGD --------------------------------------------------------------------------------------------


def plain_start(lm, method):
    """The tensors that a method changes; the learning rate of each; and the model's weights, given those tensors."""
    names = {module: name for name, module in lm.named_modules()}
    of_map = {name: f"{names[module]}.weight" for name, module in lm.editable().items()}
    if isinstance(method, WeightStep):
        start = {n: t if t.requires_grad else t.requires_grad_() for n, t in method.start(lm).items()}
        return start, dict.fromkeys(start, method.lr), dict
    if isinstance(method, AdapterStep):
        start = {(n, part): getattr(method, part)[parameter_key(n)] for n in method.names for part in "UV"}
        edited = {n: lm.editable()[n].weight for n in method.names}
        rates = dict.fromkeys(start, method.lr)
        if isinstance(method, RatedAdapterStep):
            rates = {(n, p): method.lr * method.log_rates[method.names.index(n), "UV".index(p)].exp() for n, p in start}
        return (
            start,
            rates,
            lambda now: {of_map[n]: w + SCALE * now[n, "U"] @ now[n, "V"].t() for n, w in edited.items()},
        )
    moved = {n: w + method.moved[parameter_key(n)] for n, w in lm.named_parameters()}
    of_map["readout"] = next(n for n in moved if n.endswith("head.weight"))
    rates = {of_map[n]: rate for n, rate in method.rates(lm).items()}
    return {n: moved[n] for n in rates}, rates, lambda now: moved | now


def weights_by_hand(lm, method, contexts, successive):
    """One example's weights after plain SGD steps, one per context or one for their mean, with the graph of the steps.
    The contexts are not padded, and an adapter is merged into the weights."""
    now, rates, weights_of = plain_start(lm, method)
    reduction = "sum" if isinstance(method, MapStep) else "mean"
    for step in [[c] for c in contexts] if successive else [contexts]:
        losses = []
        for ids in map(torch.tensor, step):
            logits = torch.func.functional_call(lm, weights_of(now), (ids[None, :-1],))[0]
            losses.append(cross_entropy(logits[0], ids[1:], reduction=reduction))
        gradient = torch.autograd.grad(
            sum(losses) / len(losses), list(now.values()), create_graph=True, materialize_grads=True
        )  # a context of two tokens, one of them predicted, has no state that decays
        if not getattr(method, "second_order", True):
            gradient = [g.detach() for g in gradient]
        now = {n: t - rates[n] * g for (n, t), g in zip(now.items(), gradient, strict=True)}
    return weights_of(now)


def assert_is_plain_sgd(lm, method, n, successive, rtol, atol):
    """Each example's logits after its steps, of all positions or the last ones, and the gradient of all logits with
    respect to what is trained."""
    contexts, rows = padded(3, n)
    ids, valid = (t[:, 0] for t in padded(3, 1, seed=3)[0])
    found = adapted(method, lm, contexts, successive)(ids, valid)
    expected = torch.zeros_like(found)
    for i, own in enumerate(rows):
        after = weights_by_hand(lm, method, own, successive)
        logits = torch.func.functional_call(lm, after, (ids[i : i + 1, valid[i]],))[0]
        expected = expected + torch.nn.functional.pad(logits, (0, 0, len(ids[i]) - logits.shape[1], 0, i, 2 - i))
    assert_close(found[valid], expected[valid], rtol=rtol, atol=atol)
    before = adapted(None, lm, contexts)(ids, valid)
    assert (found - before)[valid].abs().max() > 0.1
    for each, logits in ((method, found), (None, before)):
        assert_close(adapted(each, lm, contexts, successive)(ids, valid, 2), logits[:, -2:], rtol=rtol, atol=atol)

    torch.manual_seed(5)
    along = torch.randn_like(found) * valid[..., None]
    grads, same = (torch.autograd.grad((t * along).sum(), list(method.parameters())) for t in (found, expected))
    assert_close(grads, same, rtol=10 * rtol, atol=10 * atol)
    assert min(g.norm() for g in grads) > 1e-3


@pytest.mark.parametrize(("n", "successive"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", METHODS)
def test_steps_are_plain_sgd(lm, kind, n, successive):
    """Several contexts are one step on their mean loss or, one after the other, several steps."""
    assert_is_plain_sgd(lm, kind(lm), n, successive, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n", "successive"), [(1, False), (2, True)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for k in METHODS for d in (torch.float32, torch.float64) if (k, d) != (maps, torch.float32)],
)
def test_a_llamas_steps_are_plain_sgd(kind, n, successive, dtype):
    lm = (untied_llama if kind is maps else llama)(dtype)
    assert_is_plain_sgd(lm, kind(lm), n, successive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "successive", "dtype", "tolerance"),
    [(1, False, torch.float64, 1e-8), (2, True, torch.float64, 1e-8), (1, False, torch.float32, 1e-4)],
)
@pytest.mark.parametrize("kind", [adapter, weights, rank_two])
def test_an_rwkv7s_steps_are_plain_sgd(kind, n, successive, dtype, tolerance):
    """Its delta rule is differentiated twice, under vmap, with each example's own weights, and beside padding, whose
    keys are zero."""
    lm = rwkv7(dtype)
    assert_is_plain_sgd(lm, kind(lm), n, successive, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", METHODS)
def test_the_order_and_number_of_steps_matter(lm, kind):
    """One step on two contexts, two steps, and two in the other order give three different models."""
    contexts, query = padded(2, 2)[0], ids_of(2, 6, seed=8)
    other = Rows(*(t.flip(1) for t in contexts))
    settings = ((contexts, False), (contexts, True), (other, True))
    once, first, second = (logits_of(lm, kind(lm), each, query, successive) for each, successive in settings)
    for a, b in ((once, first), (first, second), (once, second)):
        assert (a - b).abs().max() > 1e-4
    assert_close(logits_of(lm, kind(lm), other, query), once, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [adapter, rated, weights, rank_two])
def test_first_order_is_the_gradient_at_the_step(lm, kind):
    """The step is the same, to rounding; the outer gradient differs from the exact one, and is what it should be."""
    contexts, query = padded(3, 1)[0], ids_of(3, 7, seed=5)
    methods = [kind(lm), kind(lm, second_order=False)]
    logits = [logits_of(lm, method, contexts, query) for method in methods]
    assert_close(*logits, rtol=1e-14, atol=1e-14)
    exact, first = (
        torch.autograd.grad(cross_entropy(t[:, :-1].flatten(0, 1), query[:, 1:].flatten()), list(method.parameters()))
        for t, method in zip(logits, methods, strict=True)
    )
    assert any((a - b).norm() > 1e-3 * a.norm() for a, b in zip(exact, first, strict=True))
    assert_is_plain_sgd(lm, methods[1], 1, False, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("kind", "h"), [(adapter, 1e-4), (rated, 1e-4), (weights, 3e-6), (rank_two, 3e-6)])
def test_outer_gradient_is_that_of_finite_differences(lm, kind, h):
    """Relative error at most 1e-6 in float64, along random directions through all parameters at once. (Steps on all
    weights are short: relu(k)^2 has kinks.)"""
    method, contexts, query = kind(lm), padded(3, 1)[0], ids_of(3, 7, seed=5)
    parameters = list(method.parameters())

    def loss_of():
        logits = logits_of(lm, method, contexts, query[:, :-1])
        return cross_entropy(logits.flatten(0, 1), query[:, 1:].flatten())

    gradient = torch.autograd.grad(loss_of(), parameters)
    for seed in range(3):
        torch.manual_seed(seed)
        along = [torch.randn_like(p) for p in parameters]
        slope = sum((g * a).sum() for g, a in zip(gradient, along, strict=True)).item()

        @torch.no_grad()
        def at(step, along=along):
            for p, a in zip(parameters, along, strict=True):
                p.add_(a, alpha=step)
            loss = loss_of().item()
            for p, a in zip(parameters, along, strict=True):
                p.add_(a, alpha=-step)
            return loss

        measured = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        assert math.isclose(slope, measured, rel_tol=1e-6)


# --- each method --------------------------------------------------------------------------------------------------


def test_an_adapters_step_does_not_depend_on_the_padding(lm):
    """A padded batch gives every prompt the delta that it gets alone."""
    generator = adapter(lm)
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (4, 9, 6)]
    together = generator.memorize(lm, prompts)
    for number, prompt in enumerate(prompts):
        assert_same_change(generator.memorize(lm, [prompt]), together.select([number]), rtol=1e-10, atol=1e-12)


def test_examples_with_the_same_contexts_share_a_step(lm, monkeypatch):
    """Four examples with two different contexts are two steps. Each example answers as it would alone, and the outer
    gradient is the sum of theirs; columns that are padding in every row are not read."""
    method, query, steps = rated(lm), ids_of(4, 6, seed=8), []
    (ids, valid), _ = padded(2, 1)
    which = [1, 0, 1, 1]
    wider = Rows(*(torch.nn.functional.pad(t[which], (3, 0)) for t in (ids, valid)))
    delta = method.delta
    monkeypatch.setattr(method, "delta", lambda lm, *given: steps.append(given[0].ids.shape) or delta(lm, *given))
    found = logits_of(lm, method, wider, query)
    assert steps == [ids.shape]
    alone = [logits_of(lm, method, Rows(*(t[[i]] for t in (ids, valid))), query[[k]]) for k, i in enumerate(which)]
    assert_close(found, torch.cat(alone), rtol=1e-9, atol=1e-9)
    grads, same = (torch.autograd.grad(t.square().sum(), list(method.parameters())) for t in (found, torch.cat(alone)))
    assert_close(grads, same, rtol=1e-8, atol=1e-8)


def test_an_untrained_start_is_the_model(lm):
    """Of every weight, free or with a rank. With a rank, only matrices move, and their difference has that rank."""
    own = dict(lm.named_parameters())
    for rank in (None, 2):
        start = WeightStep(lm, rank, 0.1).double().start(lm)
        assert start.keys() == own.keys()
        assert all(torch.equal(start[name], weight) for name, weight in own.items())
    WeightStep(lm, 2, 0.1).start(lm)  # its factors have the model's dtype as they are made
    for name, moved in rank_two(lm).start(lm).items():
        if own[name].ndim == 2:
            assert torch.linalg.matrix_rank(moved - own[name]) == 2
        else:
            assert torch.equal(moved, own[name])
    assert len(weights(lm).moved) == len(own)


def test_untrained_rates_are_the_given_one(lm):
    method = MapStep(lm, 0.02).double()
    assert {rate.item() for rate in method.rates(lm).values()} == {0.02}
    assert len(method.rates(lm)) == len(lm.editable()) + 1
    contexts, (ids, valid) = padded(2, 1)[0], (t[:, 0] for t in padded(2, 1, seed=3)[0])
    with torch.no_grad():
        still = adapted(MapStep(lm, 0.0).double(), lm, contexts)(ids, valid)
        moved = adapted(method.requires_grad_(False), lm, contexts)(ids, valid)
    assert_close(still[valid], adapted(None, lm, contexts)(ids, valid)[valid])
    assert not torch.allclose(still[valid], moved[valid])


@pytest.mark.parametrize("kind", [maps, rated])
def test_rates_are_trained_apart_from_the_start(lm, kind):
    """Every parameter is in one group; the rates' gradient is not clipped, and no part of the others' norm."""
    method = kind(lm)
    start, rates = groups_of(method)
    assert {id(p) for p in start["params"]} == {id(p) for p in method.parameters()} - {id(method.log_rates)}
    assert [id(p) for p in rates["params"]] == [id(method.log_rates)]
    assert len(list(method.parameters())) == len(start["params"]) + 1
    assert (start["factor"], start["clip"], rates["factor"], rates["clip"]) == (1.0, 1.0, 30.0, math.inf)


def test_a_rate_is_a_factor_on_the_given_one(lm):
    method = MapStep(lm, 0.02)
    with torch.no_grad():
        method.log_rates[-1] += math.log(2)
    assert [rate.item() for rate in method.rates(lm).values()][-2:] == pytest.approx([0.02, 0.04])


def test_a_text_that_is_read_in_pieces_is_learned_whole(lm, monkeypatch):
    """As models read it that know no padding: step and outer gradient are those of one pass."""
    contexts, (ids, valid) = padded(2, 1)[0], (t[:, 0] for t in padded(2, 1, seed=3)[0])
    method, found = maps(lm), []
    whole = lm.step_through

    def in_pieces(ids, state, valid):
        first, state = whole(ids[:, :2], state, valid[:, :2])
        rest, state = whole(ids[:, 2:], state, valid[:, 2:])
        return torch.cat([first, rest], 1), state

    for step_through in (whole, in_pieces):
        monkeypatch.setattr(lm, "step_through", step_through)
        logits = adapted(method, lm, contexts)(ids, valid)[valid]
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(method.parameters()))])
    assert_close(*found)


def one_token(lm, kind):
    adapted(kind(lm), lm, Rows(ids_of(2, 1)[:, None], torch.ones(2, 1, 1, dtype=torch.bool)))


def another_model(lm, kind):
    torch.manual_seed(7)
    other = scrambled(RWKV4(RWKV4Config(vocab=50, width=16, layers=2, ffn=32)))
    adapted(kind(lm), other, padded(2, 1)[0])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        *((lambda lm, kind=kind: one_token(lm, kind), "one token") for kind in METHODS),
        *((lambda lm, kind=kind: another_model(lm, kind), "trained for model") for kind in (weights, rank_two, maps)),
        (lambda lm: WeightStep(lm, 17, 0.1), r"rank 17 asked for, but emb.weight is \(50, 16\); it has 1 to 16"),
        (lambda lm: WeightStep(lm, 0, 0.1), "rank 0 asked for"),
    ],
)
def test_mistakes_are_explained(lm, mistake, message):
    with pytest.raises(UserError, match=message):
        mistake(lm)
