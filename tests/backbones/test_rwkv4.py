"""RWKV-4 is the RWKV-4 of others: their weights give their logits; ours in their class are in `test_loading.py`."""

import torch
from checks import ids_of
from torch.testing import assert_close
from transformers import RwkvConfig, RwkvForCausalLM

from prosg_lib.backbones.rwkv_layouts import from_hf


@torch.no_grad()
def test_logits_of_transformers_with_their_weights():
    sizes = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 32}
    torch.manual_seed(0)
    theirs = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=0)).eval()
    for p in theirs.parameters():  # theirs starts with blocks that barely matter
        p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    ids = ids_of(3, 75)
    logits = theirs(ids).logits
    assert logits.std() > 0.1
    assert_close(from_hf(theirs.state_dict())(ids)[0], logits, rtol=1e-4, atol=1e-4)
