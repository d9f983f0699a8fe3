"""The transformed gradient: before training a true gradient step, then the sum of its transformed terms."""

import pytest
import torch
import torch.nn.functional as F
from checks import full_change
from torch import nn
from torch.testing import assert_close

from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.generators.base import SCALE
from prosg_lib.generators.mend import TransformedGradient, _Residual
from prosg_lib.generators.true_gradient import prompt_gradient
from prosg_lib.training.loop import groups_of

ENDINGS = ("att.output", "ffn.key")

every_family = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


def make(lm, trained=True, lr=0.2, rank=3):
    torch.manual_seed(0)
    generator = TransformedGradient(lm, rank, 5, ENDINGS, lr)
    if trained:
        for block in generator.blocks.parameters():
            nn.init.normal_(block, std=0.1)
        nn.init.normal_(generator.log_step_sizes)
    return generator.to(lm.emb.weight.dtype).eval()


def fitted(generator, lm, prompts):
    ids, valid = lm.encode_prompts(prompts)
    generator.fit_normaliser(lm, ids, valid)
    return generator


def test_a_block_is_the_identity_at_first_and_learns():
    """Bit for bit; but its last layer has a gradient there, which a relu would stop at 0."""
    torch.manual_seed(0)
    block, z = _Residual(7, 3), torch.randn(4, 7)
    assert torch.equal(block(z), z)
    block(z).square().sum().backward()
    assert block.A.weight.grad.abs().max() > 0
    nn.init.normal_(block.A.weight)
    assert (block(z) >= z).all()
    assert not torch.equal(block(z), z)


@every_family
def test_untrained_it_takes_a_true_gradient_step_in_a_lora(lm64, prompts):
    """U = -lr grad_U NLL(prompt) of an adapter U V^T at U = 0: with statistics or without."""
    plain, generator = make(lm64, trained=False), fitted(make(lm64, trained=False), lm64, prompts)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        v = {n: generator.V[n.replace(".", "_")][None].detach() for n in generator.names}
        u = {
            n: torch.zeros(1, size, 3, dtype=torch.float64, requires_grad=True)
            for n, size in generator.out_sizes.items()
        }
        adapter = LowRankDelta({n: Factors(u[n], v[n]) for n in u}, lm64.fingerprint())
        loss = F.cross_entropy(lm64(ids, None, adapter)[0][0, :-1], ids[0, 1:], reduction="sum")
        slopes = torch.autograd.grad(loss, list(u.values()))
        for made in (plain, generator):
            delta = made.memorize(lm64, prompts)
            assert delta.scale == SCALE
            for name, slope in zip(u, slopes, strict=True):
                assert_close(delta.factors[name].U[row], -0.2 * slope[0], rtol=1e-8, atol=1e-10)
                assert torch.equal(delta.factors[name].V, v[name])


def test_it_is_the_sum_of_its_transformed_terms(lm64, prompts):
    """-lr exp(log_step_sizes) sum_t g~_t (V V^T x~_t)^T, token by token; of rank r and no more."""
    generator = fitted(make(lm64), lm64, prompts)
    ids = torch.tensor([prompts[0]])
    gradients, _ = prompt_gradient(lm64, generator.names, ids)
    delta = generator.memorize(lm64, [prompts[0]])
    for number, name in enumerate(generator.names):
        changed, plain = generator.transformed(name, gradients[name]), gradients[name]
        assert (changed.x - plain.x).abs().max() > 1e-3
        assert (changed.grad_output - plain.grad_output).abs().max() > 1e-6
        v = generator.V[name.replace(".", "_")]
        total = sum(
            torch.outer(changed.grad_output[0, t], v @ (v.t() @ changed.x[0, t])) for t in range(len(prompts[0]) - 1)
        )
        step = generator.lr * generator.log_step_sizes[number].exp()
        assert_close(full_change(delta, name)[0], -SCALE * step * total, rtol=1e-8, atol=1e-10)
        assert torch.linalg.matrix_rank(full_change(delta, name)[0]) == 3


def test_statistics_normalise(lm, prompts):
    """What the blocks see has mean 0 and deviation 1 in every dimension, over the tokens that count and no padding."""
    generator = fitted(make(lm), lm, prompts)
    ids, valid = lm.encode_prompts(prompts)
    seen = {}
    for name in generator.names:
        generator.blocks[name.replace(".", "_")].register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0])
        )
    generator(lm, ids, valid)
    for name in generator.names:
        z = seen[name][valid[:, :-1]]
        assert len(z) == sum(len(p) - 1 for p in prompts)
        assert z.mean(0).abs().max() < 0.15  # but for what is cut at 5 deviations
        assert (z.std(0) - 1).abs().max() < 0.3
        assert (z.std(0) - 1).abs().median() < 0.02


def test_step_sizes_are_trained_apart(lm):
    """Every parameter is in one group, the step sizes in their own."""
    generator = make(lm)
    groups = groups_of(generator)
    assert sum(len(group["params"]) for group in groups) == len(list(generator.parameters()))
    assert groups[1]["params"] == [generator.log_step_sizes]


def test_in_half_precision_the_change_is_nearly_the_same(lm, prompts):
    """Under autocast, as on a GPU."""
    generator = fitted(make(lm), lm, prompts)
    exact = generator.memorize(lm, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        rough = generator.memorize(lm, prompts)
    for name in generator.names:
        assert (full_change(rough, name) - full_change(exact, name)).norm() < 0.1 * full_change(exact, name).norm()
