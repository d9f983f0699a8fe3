"""The gradient step: what it is, its outer gradient against finite differences, the adapter as a generator, and steps
on all weights."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.generators.base import SCALE, parameter_key
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.one_step import adapted, context_nll, gradient_step, gradient_steps
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.text.padding import Rows, left_padded

ENDINGS = ("att.output", "ffn.value")


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(vocab=50, width=16, layers=2, ffn=32)).double().eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return lm


def ids_of(batch, time, seed=0):
    return torch.randint(50, (batch, time), generator=torch.Generator().manual_seed(seed))


def adapter(lm, lr=0.5, second_order=True):
    torch.manual_seed(1)
    generator = AdapterStep(lm, 3, ENDINGS, lr, second_order).double()
    for u in generator.U.parameters():
        torch.nn.init.normal_(u, std=0.3)
    return generator


def outer_loss(lm, generator, context, query):
    delta, _ = generator(lm, context)
    with applied(lm, delta):
        return context_nll(lm, query).sum()


def test_quadratic_step_and_its_outer_gradient():
    """loss = w^T A w / 2: the step is (I - lr A) w, and so is its derivative; first order, the derivative is 1."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    w = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.7, 0.2], dtype=torch.float64)
    for second_order, expected in ((True, v - 0.1 * a @ v), (False, v)):
        (stepped,) = gradient_step([lambda p: p["w"] @ a @ p["w"] / 2], {"w": w}, 0.1, second_order).values()
        assert_close(stepped, w - 0.1 * a @ w)
        assert_close(torch.autograd.grad(stepped @ v, w)[0], expected)


def test_parts_of_a_loss_give_the_step_of_their_sum():
    """Step and outer gradient alike; a part that is linear, or without one of the tensors, has no curvature to add."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    start = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in (("w", [1.0, -3.0]), ("b", [0.5]))}
    parts = [lambda p: p["w"] @ a @ p["w"], lambda p: (p["b"] ** 3).sum() * p["w"][0], lambda p: 2 * p["b"].sum()]
    found = []
    for given in (parts, [lambda p: sum(part(p) for part in parts)]):
        stepped = gradient_step(given, start, 0.1)
        outer = (stepped["w"] ** 2).sum() + stepped["b"].sum()
        found.append([*stepped.values(), *torch.autograd.grad(outer, list(start.values()))])
    assert_close(*found)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_all_parts_but_the_kept_ones_run_again_for_an_exact_outer_gradient_alone(kept):
    """Once for the step; then once more, or, of first order, not again. A second outer gradient is as exact."""
    calls = []
    parts = [lambda p, i=i: calls.append(i) or (p["w"] ** 3).sum() for i in range(3)]
    for second_order, again, once_more in ((True, [2, 1, 0][kept:], [2, 1, 0]), (False, [], [])):
        w = torch.tensor([1.0, -3.0], requires_grad=True)
        calls.clear()
        outer = gradient_step(parts, {"w": w}, 0.1, second_order, kept)["w"].sum()
        (first,) = torch.autograd.grad(outer, w, retain_graph=True)
        assert calls == [0, 1, 2, *again]
        assert_close(first, 1 - 0.1 * 18 * w.detach() if second_order else torch.ones(2))
        assert torch.equal(torch.autograd.grad(outer, w)[0], first)
        assert calls == [0, 1, 2, *again, *once_more]


def test_a_graph_that_is_differentiated_again_has_lean_second_derivatives():
    """That of a kept part, and of another when it is run again; no other has them."""
    w, x = torch.ones(4, requires_grad=True), torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    seen = []

    def loss(params):
        normed = layer_norm(params["w"] * x, (4,), w.detach(), w.detach())
        seen.append("_LayerNormBackward" in normed.grad_fn.name())
        return normed.square().sum()

    for second_order, kept, expected in ((True, 1, [True]), (True, 0, [False, True]), (False, 1, [False])):
        gradient_step([loss], {"w": w}, 0.1, second_order, kept)["w"].sum().backward()
        assert seen == expected
        seen.clear()


def test_nothing_is_kept_for_no_outer_gradient():
    """Without autograd, or from a start that asks for none, a step makes no graph of its gradient."""

    def loss(p):
        return (p["w"] ** 3).sum().mul(_Watched.apply(p["w"]).sum())

    class _Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return torch.ones_like(w)

        @staticmethod
        def backward(ctx, g):
            graphs.append(torch.is_grad_enabled())
            return torch.zeros_like(g)

    graphs = []
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    gradient_step([loss], {"w": w}, 0.1)
    gradient_step([loss], {"w": w}, 0.1, second_order=False)
    gradient_step([loss], {"w": w.detach()}, 0.1)
    with torch.no_grad():
        gradient_step([loss], {"w": w}, 0.1)
    assert graphs == [True, False, False, False]


def test_of_several_steps_all_but_the_last_run_again():
    """The outer gradient of three steps is that of plain autograd through three, and one graph at a time waits."""
    calls = []
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses = [lambda p, i=i: calls.append(i) or (p["w"] ** 3).sum() * (i + 1) for i in range(3)]
    (found,) = torch.autograd.grad(gradient_steps(losses, {"w": w}, 0.01)["w"].pow(2).sum(), w)
    assert calls == [0, 1, 2, 1, 0]
    stepped = w
    for loss in losses:
        (slope,) = torch.autograd.grad(loss({"w": stepped}), stepped, create_graph=True)
        stepped = stepped - 0.01 * slope
    assert_close(found, torch.autograd.grad(stepped.pow(2).sum(), w)[0])
    calls.clear()
    gradient_steps(losses, {"w": w}, 0.01, second_order=False)["w"].sum().backward()
    assert calls == [0, 1, 2]


def assert_slopes_are_measured(parameters, loss_of, h=1e-4):
    """Relative error at most 1e-6, along random directions through all parameters at once."""
    grads = torch.autograd.grad(loss_of(), parameters)
    for seed in range(3):
        torch.manual_seed(seed)
        along = [torch.randn_like(p) for p in parameters]
        slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True)).item()

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


def test_outer_gradient_is_that_of_finite_differences(lm):
    """Through U and V of all maps at once, in float64."""
    context, query = ids_of(3, 9), ids_of(3, 7, seed=5)
    generator = adapter(lm)
    assert_slopes_are_measured(list(generator.parameters()), lambda: outer_loss(lm, generator, context, query))


def transformer(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "attn_implementation": "eager"}
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(**sizes, **ends, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    elif kind == "llama":
        config = LlamaConfig(**sizes, **narrow, **ends)
    else:
        config = Qwen3Config(**sizes, **narrow, **ends, num_key_value_heads=1, head_dim=8)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_outer_gradient_of_a_transformers_step_on_all_weights(kind):
    """Causal transformers of `transformers`, eager attention: the gradient through the unrolled graph of both passes.

    Finite differences would not do: Llama and Qwen3 normalise in float32, whatever the weights' type.
    """
    model, context, query = transformer(kind), ids_of(2, 9), ids_of(2, 7, seed=5)
    weights = dict(model.named_parameters())

    def nll(params, ids):
        out = torch.func.functional_call(model, params, (), {"input_ids": ids, "use_cache": False})
        return cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    slopes = torch.autograd.grad(nll(weights, context), list(weights.values()), create_graph=True)
    unrolled = {name: w - 0.5 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
    stepped = gradient_step([lambda p: nll(p, context)], weights, 0.5)
    expected, found = (torch.autograd.grad(nll(p, query), list(weights.values())) for p in (unrolled, stepped))
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_first_order_differs_and_is_the_gradient_at_the_step(lm):
    """Without the second order the outer gradient is that of the outer loss with respect to the stepped adapter."""
    context, query = ids_of(2, 9), ids_of(2, 7, seed=5)
    exact, first = (
        torch.autograd.grad(outer_loss(lm, g, context, query), list(g.parameters()))
        for g in (adapter(lm), adapter(lm, second_order=False))
    )
    assert any((a - b).norm() > 1e-3 * a.norm() for a, b in zip(exact, first, strict=True))


def test_each_prompt_takes_its_own_step_whatever_the_padding(lm):
    """A padded batch gives every prompt the delta and the state that it gets alone."""
    generator = adapter(lm)
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (4, 9, 6)]
    together = generator.memorize(lm, prompts)
    for number, prompt in enumerate(prompts):
        alone = generator.memorize(lm, [prompt])
        for name in generator.names:
            for one, many in zip(alone.factors[name], together.factors[name], strict=True):
                assert_close(one[0], many[number], rtol=1e-10, atol=1e-12)


def test_a_step_lowers_the_contexts_loss(lm):
    generator = adapter(lm, lr=0.05)
    context = ids_of(4, 12)
    before = outer_loss(lm, adapter(lm, lr=0.0), context, context)
    assert outer_loss(lm, generator, context, context) < before - 1e-3


def test_a_loss_that_is_not_finite_is_one_clear_error():
    with pytest.raises(UserError, match="loss of the context is inf"):
        gradient_step([lambda p: p["w"].sum() / 0.0], {"w": torch.ones(2)}, 0.1)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_gradient_that_is_not_finite_is_one_too(bad):
    """Of any part, any weight, and one number of it: the slope of a root at zero, where the loss is finite."""
    parts = [lambda p: p["w"].square().sum(), lambda p: p["w"].sum() + p["v"].sqrt().sum()]
    start = {"w": torch.ones(2), "v": torch.tensor([4.0, 0.0])}
    with pytest.raises(NotFinite, match="gradient of the context's loss is not finite"):
        gradient_step([parts[1 - bad], parts[bad]], start, 0.1)
    start["v"][1] = 4.0
    assert_close(gradient_step(parts, start, 0.1)["v"], torch.tensor([3.975, 3.975]))


# Steps on all weights, and on several contexts


def padded(batch, n, seed=0):
    """Contexts of different lengths, (batch, n, C): with padding in front, and as lists of tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (batch * n,), generator=g).tolist()
    rows = [torch.randint(50, (length,), generator=g).tolist() for length in lengths]
    return Rows(*(t.view(batch, n, -1) for t in left_padded(rows))), [rows[i * n : i * n + n] for i in range(batch)]


def full(lm, lr=0.05, second_order=True, rank=None):
    torch.manual_seed(1)
    way = WeightStep(lm, rank, lr, second_order).to(next(lm.parameters()).dtype)
    for moved in way.moved.parameters():
        torch.nn.init.normal_(moved, std=0.1)
    return way


def rank_two(lm, lr=0.05, second_order=True):
    return full(lm, lr, second_order, rank=2)


def llama(dtype):
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", 50, 16, 2, 32, 2)).to(dtype).eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return lm


def by_hand(lm, way, contexts, successive):
    """One example's weights after plain SGD steps, one a context or one for their mean, with the graph of the steps
    kept. The contexts are not padded, and an adapter is merged into the weights."""
    if isinstance(way, WeightStep):
        start, merged = {n: t if t.requires_grad else t.requires_grad_() for n, t in way.start(lm).items()}, dict
    else:
        start = {(n, kind): getattr(way, kind)[parameter_key(n)] for n in way.names for kind in "UV"}

        def merged(now):
            maps, full_names = lm.editable(), {module: n for n, module in lm.named_modules()}
            return {
                f"{full_names[maps[n]]}.weight": maps[n].weight + SCALE * now[n, "U"] @ now[n, "V"].t()
                for n in way.names
            }

    for told in [[c] for c in contexts] if successive else [contexts]:
        losses = []
        for ids in told:
            ids = torch.tensor([ids])
            says = torch.func.functional_call(lm, merged(start), (ids[:, :-1],))[0]
            losses.append(cross_entropy(says[0], ids[0, 1:]))
        grads = torch.autograd.grad(
            sum(losses) / len(losses), list(start.values()), create_graph=True, materialize_grads=True
        )  # a context of two tokens, one of them predicted, has nothing to decay
        grads = grads if way.second_order else [g.detach() for g in grads]
        start = {n: t - way.lr * g for (n, t), g in zip(start.items(), grads, strict=True)}
    return merged(start)


def assert_steps_are_by_hand(lm, way, n, successive, rtol, atol):
    """Each example's logits after its steps, all or the last alone, and the gradient of all of them together with
    respect to the start."""
    contexts, rows = padded(3, n)
    ids, valid = (t[:, 0] for t in padded(3, 1, seed=3)[0])
    found = adapted(way, lm, contexts, successive)(ids, valid)
    expected = torch.zeros_like(found)
    for i, told in enumerate(rows):
        weights = by_hand(lm, way, told, successive)
        says = torch.func.functional_call(lm, weights, (ids[i : i + 1, valid[i]],))[0]
        expected = expected + torch.nn.functional.pad(says, (0, 0, len(ids[i]) - says.shape[1], 0, i, 2 - i))
    assert_close(found[valid], expected[valid], rtol=rtol, atol=atol)
    before = adapted(None, lm, contexts)(ids, valid)
    assert (found - before)[valid].abs().max() > 0.1
    for who, says in ((way, found), (None, before)):
        assert_close(adapted(who, lm, contexts, successive)(ids, valid, 2), says[:, -2:], rtol=rtol, atol=atol)

    torch.manual_seed(5)
    along = torch.randn_like(found) * valid[..., None]
    parameters = list(way.parameters())
    grads, same = (torch.autograd.grad((says * along).sum(), parameters) for says in (found, expected))
    assert_close(grads, same, rtol=10 * rtol, atol=10 * atol)
    assert min(g.norm() for g in grads) > 1e-3


@pytest.mark.parametrize(("n", "successive"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", [adapter, full, rank_two])
def test_steps_are_those_of_a_loop(lm, kind, n, successive):
    """An example alone, its contexts not padded, plain SGD by autograd: the same logits, and the same outer gradient;
    several contexts are one step on their mean loss or, one after the other, several steps."""
    assert_steps_are_by_hand(lm, kind(lm), n, successive, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [adapter, full, rank_two])
def test_the_order_and_number_of_steps_matter(lm, kind):
    """One step on two contexts, two steps, and two in the other order are three different models."""
    contexts, _ = padded(2, 2)
    other, query = Rows(*(t.flip(1) for t in contexts)), ids_of(2, 6, seed=8)
    says = [
        adapted(kind(lm), lm, told, successive)(query, torch.ones_like(query).bool())
        for told, successive in ((contexts, False), (contexts, True), (other, True))
    ]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (says[a] - says[b]).abs().max() > 1e-4
    at_once = adapted(kind(lm), lm, other, False)(query, torch.ones_like(query).bool())
    assert_close(at_once, says[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
    ],
)
@pytest.mark.parametrize(("n", "successive"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", [adapter, full, rank_two])
def test_a_llamas_steps_are_those_of_a_loop(kind, n, successive, dtype):
    """Its input and output embeddings are one matrix, which takes one step. It normalises in float32 anyway."""
    lm = llama(dtype)
    if kind is adapter:
        torch.manual_seed(1)
        way = AdapterStep(lm, 3, ("o_proj", "down_proj"), 0.5).to(dtype)
        for u in way.U.parameters():
            torch.nn.init.normal_(u, std=0.3)
    else:
        way = kind(lm)
    assert_steps_are_by_hand(lm, way, n, successive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "successive", "dtype", "tolerance"),
    [(1, False, torch.float64, 1e-8), (2, True, torch.float64, 1e-8), (1, False, torch.float32, 1e-4)],
)
@pytest.mark.parametrize("kind", [adapter, full, rank_two])
def test_an_rwkv7s_steps_are_those_of_a_loop(kind, n, successive, dtype, tolerance):
    """Its delta rule is differentiated twice, under vmap, with weights of each example's own, and beside padding, whose
    keys are zero."""
    torch.manual_seed(0)
    lm = RWKV7(RWKV7Config(50, 16, 2, 32, 8, 4, 3, 2, 5)).to(dtype).eval().requires_grad_(False)
    for weight in lm.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    assert_steps_are_by_hand(lm, kind(lm).to(dtype), n, successive, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [None, 2])
def test_outer_gradient_of_a_step_on_all_weights(lm, rank):
    """Against finite differences, relative error at most 1e-6 in float64: a start that is free, and one of rank 2."""
    way = full(lm, rank=rank)
    contexts, query = padded(3, 1)[0], ids_of(3, 7, seed=5)

    def loss_of():
        says = way.adapt(lm, contexts, False)(query[:, :-1], torch.ones_like(query[:, 1:]).bool())
        return cross_entropy(says.flatten(0, 1), query[:, 1:].flatten())

    assert_slopes_are_measured(list(way.parameters()), loss_of, h=3e-6)  # short steps: relu(k)^2 has kinks


@pytest.mark.parametrize("rank", [None, 2])
def test_first_order_of_a_step_on_all_weights(lm, rank):
    """It differs from the exact outer gradient, while the step itself is the same, to rounding."""
    contexts, query = padded(3, 1)[0], ids_of(3, 7, seed=5)
    ways = [full(lm, rank=rank), full(lm, second_order=False, rank=rank)]
    says = [way.adapt(lm, contexts, False)(query, torch.ones_like(query).bool()) for way in ways]
    assert_close(*says, rtol=1e-14, atol=1e-14)
    exact, first = (
        torch.autograd.grad(cross_entropy(s[:, :-1].flatten(0, 1), query[:, 1:].flatten()), list(way.parameters()))
        for s, way in zip(says, ways, strict=True)
    )
    assert any((a - b).norm() > 1e-2 * a.norm() for a, b in zip(exact, first, strict=True))
    assert_steps_are_by_hand(lm, ways[1], 1, False, rtol=1e-8, atol=1e-8)


def test_an_untrained_start_is_the_model(lm):
    """Of every weight, free or of a rank; of a rank, matrices alone can be moved, and their move has that rank."""
    weights = dict(lm.named_parameters())
    for rank in (None, 2):
        start = WeightStep(lm, rank, 0.1).double().start(lm)
        assert start.keys() == weights.keys()
        assert all(torch.equal(start[name], weight) for name, weight in weights.items())
    for name, moved in full(lm, rank=2).start(lm).items():
        if weights[name].ndim == 2:
            assert torch.linalg.matrix_rank(moved - weights[name]) == 2
        else:
            assert torch.equal(moved, weights[name])
    assert len(full(lm).moved) == len(weights)


def test_factors_of_a_start_have_the_models_type(lm):
    """A start of rank 2 for a model in float64, used as it was made."""
    WeightStep(lm, 2, 0.1).start(lm)


@pytest.mark.parametrize("kind", [adapter, full, rank_two])
def test_a_context_of_one_token_is_one_clear_error(lm, kind):
    """There is nothing after it that a step could learn."""
    one = Rows(ids_of(2, 1)[:, None], torch.ones(2, 1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="one token"):
        adapted(kind(lm), lm, one)


@pytest.mark.parametrize("rank", [17, 0])
def test_a_rank_that_a_matrix_does_not_have_is_said(lm, rank):
    with pytest.raises(UserError, match=rf"rank {rank} asked for, but emb.weight is \(50, 16\); it has 1 to 16"):
        WeightStep(lm, rank, 0.1)
