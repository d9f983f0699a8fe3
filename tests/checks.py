"""What the tests of several folders share: random tokens and deltas, whole matrices of a delta, and a token-wise
generator that has an effect."""

import torch
from torch import nn
from torch.testing import assert_close

from prosg_lib.deltas.low_rank import Factors, LowRankDelta, map_shape
from prosg_lib.generators.token_wise import TokenGenerator


def ids_of(batch, time, vocab=2000, seed=0):
    """Random token ids, (batch, time)."""
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def random_delta(lm, batch, rank=2, size=0.3):
    """A change of every editable map, another one for each sequence."""
    g, factors = torch.Generator().manual_seed(5), {}
    for name, module in lm.editable().items():
        out, into = map_shape(module)
        u, v = size * torch.randn(batch, out, rank, generator=g), torch.randn(batch, into, rank, generator=g)
        factors[name] = Factors(u.to(module.weight.device), (v / into**0.5).to(module.weight.device))
    return LowRankDelta(factors, lm.fingerprint())


def full_change(delta, name):
    """scale U V^T of a map, (B, out, in)."""
    u, v = delta.factors[name]
    return delta.scale * u.to(v.dtype) @ v.mT


def assert_same_change(a, b, rtol=1e-4, atol=1e-5):
    assert a.factors.keys() == b.factors.keys()
    for name in a.factors:
        assert_close(full_change(a, name), full_change(b, name), rtol=rtol, atol=atol)


def token_generator(lm, std=0.1):
    """Of rank 3, on two maps a layer, with last layers that are not zero."""
    torch.manual_seed(0)
    generator = TokenGenerator(lm, 3, 24, ("att.output", "ffn.key"))
    for p in nn.ModuleList([generator.heads, generator.keys]).parameters():
        nn.init.normal_(p, std=std)
    return generator.eval()
