"""RWKV-4 is the RWKV-4 of others, and only its own weights become one."""

import torch
from checks import ids_of
from torch.testing import assert_close
from transformers import RwkvConfig, RwkvForCausalLM

from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv_layouts import from_hf, to_hf


def peer(lm: RWKV4) -> RwkvForCausalLM:
    """transformers' model of the same sizes, with weights of its own."""
    c = lm.config
    config = RwkvConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        intermediate_size=c.ffn,
        rescale_every=0,
    )
    return RwkvForCausalLM(config).eval()


@torch.no_grad()
def test_logits_of_transformers_with_our_weights(lm):
    theirs = peer(lm)
    assert theirs.load_state_dict(to_hf(lm), strict=True)
    ids = ids_of(3, 75)
    ours = lm(ids)[0]
    assert ours.std() > 0.1
    assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_of_transformers_with_their_weights(lm):
    theirs = peer(lm)
    for p in theirs.parameters():  # theirs starts with blocks that barely matter
        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ours = from_hf(theirs.state_dict())
    ids = ids_of(3, 75)
    assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_state_of_transformers_goes_on_alike(lm):
    """One token after the other, batch of one (theirs is wrong for more)."""
    theirs = peer(lm)
    theirs.load_state_dict(to_hf(lm))
    ids = ids_of(1, 12)
    out = theirs(ids[:, :6], use_cache=True)
    logits, state = lm(ids[:, :6])
    for t in range(6, 12):
        out = theirs(ids[:, t : t + 1], state=out.state, use_cache=True)
        logits, state = lm(ids[:, t : t + 1], state)
        assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)
