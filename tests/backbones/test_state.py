"""States: free of the gauge, selected row by row, and normalised channel by channel."""

import torch
from torch.testing import assert_close

from prosg_lib.backbones.state import Normaliser, RecurrentState


def same(lm, a, b, tolerance=1e-5):
    """Equal as states: the shifts, num / den and log den + m; the gauge itself is free."""
    assert_close(lm.state_features(a), lm.state_features(b), rtol=tolerance, atol=tolerance)


def test_features_are_free_of_the_gauge(lm, prompts):
    """(num, den, m) and (num / c, den / c, m + log c) are the same state, to the features and to what follows."""
    state = lm.derive_state(prompts)
    t = state.tensors
    other = RecurrentState(t | {"num": t["num"] / 7, "den": t["den"] / 7, "m": t["m"] + torch.tensor(7.0).log()})
    same(lm, other, state)
    same(lm, lm.derive_state(prompts, other), lm.derive_state(prompts, state))


def test_select_and_detach(lm, prompts):
    state = lm.derive_state(prompts)
    assert state.batch == 4
    chosen = state.select([3, 0, 0])
    for name, tensor in state.tensors.items():
        assert torch.equal(chosen.tensors[name], tensor[[3, 0, 0]])
        assert torch.equal(state.select(torch.tensor([0])).tensors[name], tensor[:1])
    _, live = lm(torch.tensor([[1, 2]]))
    assert live.tensors["num"].requires_grad
    assert not any(t.requires_grad for t in live.detach().tensors.values())
    assert torch.equal(live.detach().tensors["num"], live.tensors["num"])


def test_normaliser():
    features = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0, 0.0]) + 4
    normaliser = Normaliser.fit(features)
    out = normaliser(features)
    assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(out.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    assert_close(out[:, 1], ((features[:, 1] - features[:, 1].mean()) / features[:, 1].std()).clamp(-5, 5))
    assert torch.equal(normaliser(torch.full((1, 3), 1e9)), torch.full((1, 3), 5.0))
    assert torch.equal(normaliser(torch.full((1, 3), -1e9)), torch.full((1, 3), -5.0))
    assert Normaliser.fit(features[:1]).std.eq(1).all()
