"""The gradient step: what it is, its outer gradient against finite differences, and the adapter as a generator."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from prosg_lib.backbones.rwkv4 import RWKV4, RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.gradient_step import AdapterStep, context_nll, gradient_step
from prosg_lib.lowrank import applied

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


def test_outer_gradient_is_that_of_finite_differences(lm):
    """Relative error at most 1e-6 in float64, along random directions through U and V of all maps at once."""
    context, query = ids_of(3, 9), ids_of(3, 7, seed=5)
    generator = adapter(lm)
    parameters = list(generator.parameters())
    grads = torch.autograd.grad(outer_loss(lm, generator, context, query), parameters)
    for seed in range(3):
        torch.manual_seed(seed)
        along = [torch.randn_like(p) for p in parameters]
        slope = sum((g * a).sum() for g, a in zip(grads, along, strict=True)).item()

        @torch.no_grad()
        def at(step, along=along):
            for p, a in zip(parameters, along, strict=True):
                p.add_(a, alpha=step)
            loss = outer_loss(lm, generator, context, query).item()
            for p, a in zip(parameters, along, strict=True):
                p.add_(a, alpha=-step)
            return loss

        h = 1e-4
        measured = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        assert math.isclose(slope, measured, rel_tol=1e-6)


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
