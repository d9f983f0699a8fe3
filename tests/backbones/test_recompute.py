"""Blocks that run again in the backward pass: the same gradients, in less memory."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Mamba2Config, Mamba2ForCausalLM

from prosg_lib.backbones.hub_families import Mamba2
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.memory import peak_bytes
from prosg_lib.backbones.recompute import recomputed
from prosg_lib.config.sizes import Training
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import UserError
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import ANSWER, TEXT, DialogueBatch
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training.objectives import generator_objective, lm_objective

MAPS = ("att.output", "ffn.value")


def batch_of(vocab: int, prompt: int = 20, rest: int = 30) -> DialogueBatch:
    """Three dialogues of random tokens; two prompts are padded."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(vocab, (3, prompt + rest), generator=g)
    kind = torch.where(torch.rand(3, rest, generator=g) < 0.3, ANSWER, TEXT)
    valid = torch.arange(prompt) >= torch.tensor([0, 4, 7])[:, None]
    return DialogueBatch(ids[:, :prompt], valid, ids[:, prompt:], kind)


def gradients(module: nn.Module, loss_of) -> list[torch.Tensor]:
    module.zero_grad()
    loss_of().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def llama():
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", load_tokenizer().vocab, 16, 3, 32, 2))
    lm.tokenizer = load_tokenizer()
    return lm


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7", "llama"])
def test_a_language_models_gradients_are_the_same(request, family):
    """To the last bit, because the same is calculated again; in training and in evaluation mode."""
    model = llama() if family == "llama" else request.getfixturevalue("lm")
    batch, loss_of = batch_of(model.config.vocab), lm_objective(model)
    for _ in range(2):
        expected = gradients(model, lambda: loss_of(0, batch).total)
        with recomputed(model):
            found = gradients(model, lambda: loss_of(0, batch).total)
        assert len(found) == len(list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        model.train(not model.training)


def generator_of(lm):
    torch.manual_seed(1)
    generator = TokenGenerator(lm, 4, 16, MAPS)
    for weight in generator.parameters():
        nn.init.normal_(weight, std=0.3)
    return generator.eval()


@pytest.mark.parametrize("step", [0, 5, 8, 9])
@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_a_change_of_the_weights_is_there_when_blocks_run_again(lm, step):
    """A generator's gradients, alone and with a carried state, with and without locality: the model is frozen, and the
    change is applied no more by the time of the backward pass."""
    lm.requires_grad_(False)
    generator = generator_of(lm)
    sizes = Training(10, 3, 1e-3, (1,), (0,))
    batch, loss_of = batch_of(lm.config.vocab), generator_objective(lm, generator, sizes, 0)
    expected = gradients(generator, lambda: loss_of(step, batch).total)
    with recomputed(lm):
        found = gradients(generator, lambda: loss_of(step, batch).total)
    assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert min(g.abs().max() for g in expected) > 1e-4


def test_another_change_that_is_applied_meanwhile_does_no_harm(lm):
    """The backward pass runs while the model has a change of another prompt; its own counts, and the other stays."""
    lm.requires_grad_(False)
    generator = generator_of(lm)
    ids = batch_of(lm.config.vocab).rest
    with torch.no_grad():
        meanwhile = generator(lm, torch.roll(ids, 1, 1))[0]

    def loss():
        with applied(lm, generator(lm, ids)[0]):
            return lm.step_through(ids, None, None)[0].square().mean()

    expected = torch.autograd.grad(loss(), generator.V["blocks_0_att_output"])
    with applied(lm, meanwhile):
        other = lm.step_through(ids, None, None)[0]
    with recomputed(lm):
        total = loss()
        with applied(lm, meanwhile):
            found = torch.autograd.grad(total, generator.V["blocks_0_att_output"])
            after = lm.step_through(ids, None, None)[0]
    assert_close(found, expected, rtol=1e-6, atol=1e-10)
    assert torch.equal(after, other)


def test_memory_does_not_grow_with_what_happens_inside_of_blocks(make_lm):
    """Eight layers: the peak of forward and backward pass is less than a third."""
    lm = make_lm(layers=8, width=32)
    batch, loss_of = batch_of(lm.config.vocab, rest=200), lm_objective(lm)
    gradients(lm, lambda: loss_of(0, batch).total)
    plain = peak_bytes(lambda: gradients(lm, lambda: loss_of(0, batch).total))
    with recomputed(lm):
        thrifty = peak_bytes(lambda: gradients(lm, lambda: loss_of(0, batch).total))
    assert thrifty < plain / 3


def test_the_model_is_as_before_afterwards(lm):
    """Also after an error."""
    with pytest.raises(KeyboardInterrupt), recomputed(lm):
        raise KeyboardInterrupt
    assert not any("forward" in vars(block) for block in lm.blocks)


def test_blocks_that_write_their_state_while_they_run_are_refused():
    """Run again they would go on from the end, and a Mamba-2's gradients would be wrong with nobody told."""
    sizes = Mamba2Config(hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, n_groups=1, vocab_size=50)
    lm = Mamba2(Mamba2ForCausalLM(sizes))
    with (
        pytest.raises(UserError, match="the blocks of a Mamba2 cannot be run again; train without recompute"),
        recomputed(lm),
    ):
        pass
