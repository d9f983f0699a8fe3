"""States: right whatever the padding or the cut, of constant size, and normalised channel by channel."""

import pytest
import torch
from torch.testing import assert_close

from prosg_lib.backbones.state import Normaliser, RecurrentState

every_family = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


def same(lm, a, b, tolerance=1e-5):
    """Equal as states: the shifts, num / den and log den + m; the gauge itself is free."""
    assert_close(lm.state_features(a), lm.state_features(b), rtol=tolerance, atol=tolerance)


@every_family
def test_a_padded_batch_is_one_at_a_time(lm, prompts):
    together = lm.derive_state(prompts)
    for row, prompt in enumerate(prompts):
        same(lm, together.select([row]), lm.derive_state([prompt]))


@every_family
def test_states_tell_prompts_apart(lm, prompts):
    features = lm.state_features(lm.derive_state(prompts))
    assert (features[:, None] - features[None]).norm(dim=-1).add(10 * torch.eye(len(prompts))).min() > 1


@every_family
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1), (2, 1, 64, 3), (4, 1, 5, 32)])
def test_two_pieces_are_the_whole(lm, prompts, cuts):
    """Different lengths in both pieces, so that the second is padded behind a state."""
    prompts = [[*p, 11] for p in prompts]
    first = lm.derive_state([p[:c] for p, c in zip(prompts, cuts, strict=True)])
    both = lm.derive_state([p[c:] for p, c in zip(prompts, cuts, strict=True)], first)
    same(lm, both, lm.derive_state(prompts))


@every_family
def test_a_row_that_is_only_padding_keeps_its_state(lm, prompts):
    state = lm.derive_state(prompts)
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[2] = False
    _, after = lm.step_through(torch.zeros(4, 6, dtype=torch.long), state, valid)
    same(lm, after.select([2]), state.select([2]))
    assert (lm.state_features(after)[0] - lm.state_features(state)[0]).norm() > 1
    _, blank = lm.step_through(torch.zeros(4, 6, dtype=torch.long), None, valid)
    assert torch.equal(lm.state_features(blank)[2], lm.state_features(lm.blank_state(1))[0])


def test_features_are_free_of_the_gauge(lm, prompts):
    """(num, den, m) and (num / c, den / c, m + log c) are the same state, to the features and to what follows."""
    state = lm.derive_state(prompts)
    t = state.tensors
    other = RecurrentState(t | {"num": t["num"] / 7, "den": t["den"] / 7, "m": t["m"] + torch.tensor(7.0).log()})
    same(lm, other, state)
    same(lm, lm.derive_state(prompts, other), lm.derive_state(prompts, state))


def test_bytes_by_hand(lm, prompts):
    """5 vectors x 3 layers x 16 channels x 4 bytes, however many prompts and tokens."""
    assert lm.derive_state(prompts).nbytes() == 5 * 3 * 16 * 4 == 960
    assert lm.derive_state([prompts[1]]).nbytes() == 960
    assert lm.blank_state(7).nbytes() == 960
    assert lm.blank_state(7).to(torch.float64).nbytes() == 1920


def test_select_cat_detach_to(lm, prompts):
    state = lm.derive_state(prompts)
    assert state.batch == 4
    chosen = state.select([3, 0, 0])
    again = RecurrentState.cat([state.select([3]), state.select(slice(0, 1)), state.select(torch.tensor([0]))])
    for name, tensor in state.tensors.items():
        assert torch.equal(chosen.tensors[name], tensor[[3, 0, 0]])
        assert torch.equal(again.tensors[name], tensor[[3, 0, 0]])
    wide = state.to(torch.float64)
    assert all(torch.equal(wide.tensors[n], t.double()) for n, t in state.tensors.items())
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
