"""What the tests of several folders share: random tokens and deltas, whole matrices of a delta, a model's digest, and a
token-wise generator that has an effect."""

import hashlib

import torch
from torch import nn
from torch.testing import assert_close

from prosg_lib.deltas.low_rank import Factors, LowRankDelta, map_shape
from prosg_lib.generators.token_wise import TokenGenerator


def ids_of(batch, time, vocab=2000, seed=0):
    """Random token ids, (batch, time)."""
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def random_delta(lm, batch=1, ranks=(2,), size=0.3, seed=5, names=None):
    """A change of every editable map, or of these, with these ranks in turn; another one for each sequence."""
    g, maps, factors = torch.Generator().manual_seed(seed), lm.editable(), {}
    for i, name in enumerate(names or maps):
        (out, into), rank, weight = map_shape(maps[name]), ranks[i % len(ranks)], maps[name].weight
        u, v = size * torch.randn(batch, out, rank, generator=g), torch.randn(batch, into, rank, generator=g)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factors[name] = Factors(*(t.to(weight.device, dtype) for t in (u, v / into**0.5)))
    return LowRankDelta(factors, lm.fingerprint())


def digest(lm):
    """Of all bits of a model's weights."""
    tensors = (t.cpu().contiguous().view(torch.uint8) for t in lm.state_dict().values())
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


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
