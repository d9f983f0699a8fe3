"""What every recurrent model promises: whatever is batched, padded, cut or half as precise gives the same answers."""

import pytest
import torch
from torch.testing import assert_close

from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError

pytestmark = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


def some_ids(batch, time, vocab=2000, seed=0):
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


def random_delta(lm, batch, rank=2, scale=0.3):
    g = torch.Generator().manual_seed(5)
    factors = {
        name: Factors(
            scale * torch.randn(batch, m.out_features, rank, generator=g),
            torch.randn(batch, m.in_features, rank, generator=g) / m.in_features**0.5,
        )
        for name, m in lm.editable().items()
    }
    return LowRankDelta(factors, lm.fingerprint())


@pytest.mark.parametrize("with_delta", [False, True])
def test_batched_generation_is_that_of_one_at_a_time(lm, prompts, with_delta):
    delta = random_delta(lm, len(prompts)) if with_delta else None
    together = lm.generate(prompts, delta=delta, max_new_tokens=20, stop=None)
    for i, prompt in enumerate(prompts):
        alone = lm.generate([prompt], delta=None if delta is None else delta.select([i]), max_new_tokens=20, stop=None)
        assert together[i] == alone[0]
    assert len(set(together)) == len(prompts)


@torch.no_grad()
def test_generation_is_the_argmax_of_the_whole_text(lm, prompts):
    """Greedy tokens from the carried state are those of a forward pass over everything so far."""
    steps = list(lm.stream(prompts, max_new_tokens=8, stop=None))
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in steps:
            assert lm(torch.tensor([ids]))[0][0, -1].argmax() == step[row]
            ids.append(int(step[row]))


def test_generation_goes_on_from_a_state(lm, prompts):
    state = lm.derive_state([p[:1] for p in prompts])
    rest = [p[1:] or [7] for p in prompts]
    whole = [p if len(p) > 1 else [*p, 7] for p in prompts]
    assert lm.generate(rest, state, max_new_tokens=10, stop=None) == lm.generate(whole, max_new_tokens=10, stop=None)


def test_a_stop_ends_only_its_own_sequence(lm, prompts):
    free = lm.generate(prompts, max_new_tokens=12, stop=None)
    stop = free[0][5:8]
    stopped = lm.generate(prompts, max_new_tokens=12, stop=stop)
    assert stopped == [text.partition(stop)[0] for text in free]
    assert len(stopped[0]) < 6


def test_a_stream_leaves_the_model_alone_between_tokens(lm, prompts):
    """Two streams with different deltas, taken in turn, are what each is on its own; so is the plain model."""
    delta = random_delta(lm, len(prompts))
    ids = some_ids(2, 10)
    plain = lm(ids)[0]
    alone = [torch.stack(list(lm.stream(prompts, None, d, 6, None))) for d in (delta, delta.scaled(-1.0))]
    assert not torch.equal(*alone)
    together = []
    for pair in zip(
        lm.stream(prompts, None, delta, 6, None), lm.stream(prompts, None, delta.scaled(-1.0), 6, None), strict=True
    ):
        together.append(pair)
        assert torch.equal(lm(ids)[0], plain)
    for i in range(2):
        assert torch.equal(torch.stack([pair[i] for pair in together]), alone[i])


@torch.no_grad()
def test_zero_delta_is_no_delta(lm):
    ids = some_ids(3, 20)
    delta = random_delta(lm, 3)
    zero = LowRankDelta({n: Factors(torch.zeros_like(f.U), f.V) for n, f in delta.factors.items()}, delta.fingerprint)
    assert torch.equal(lm(ids, delta=zero)[0], lm(ids)[0])
    assert torch.equal(lm(ids, delta=delta.scaled(0.0))[0], lm(ids)[0])
    assert (lm(ids, delta=delta)[0] - lm(ids)[0]).abs().max() > 0.1


def test_a_given_state_is_never_changed(lm, prompts):
    state = lm.derive_state(prompts)
    before = {name: t.clone() for name, t in state.tensors.items()}
    lm(some_ids(4, 1), state)
    lm(some_ids(4, 40), state)
    lm.generate(prompts, state, max_new_tokens=3, stop=None)
    lm.derive_state(prompts, state)
    for name, tensor in state.tensors.items():
        assert torch.equal(tensor, before[name])


@torch.no_grad()
def test_blank_state_is_no_state(lm):
    ids = some_ids(2, 40)
    assert_close(lm(ids, lm.blank_state(2))[0], lm(ids)[0], rtol=1e-6, atol=1e-6)


def test_gradients_of_a_padded_batch_are_those_of_each_alone(lm64, prompts):
    """Also with a row of padding only, which must add nothing and poison nothing."""
    lm, rows = lm64, [*prompts, []]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    valid = torch.arange(longest) >= longest - torch.tensor([len(r) for r in rows])[:, None]
    logits, _ = lm(ids, valid=valid)
    (logits.log_softmax(-1)[..., 0] * valid).sum().backward()
    together = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()
    for prompt in prompts:
        lm(torch.tensor([prompt]))[0].log_softmax(-1)[..., 0].sum().backward()
    for name, p in lm.named_parameters():
        assert torch.isfinite(together[name]).all()
        assert_close(together[name], p.grad, rtol=1e-9, atol=1e-9)


def test_bfloat16(make_lm, prompts):
    """Runs, keeps its state in float32, and stays near the float32 model."""
    exact, lm = make_lm(), make_lm(dtype=torch.bfloat16)
    ids = some_ids(2, 40)
    logits, state = lm(ids)
    assert logits.dtype == torch.bfloat16
    assert {t.dtype for t in state.tensors.values()} == {torch.float32}
    expected = exact(ids)[0]
    assert (logits.float() - expected).square().mean().sqrt() < 0.1 * expected.std()
    logits.float().logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lm.parameters())
    assert all(isinstance(text, str) for text in lm.generate(prompts, max_new_tokens=3, stop=None))


def test_what_cannot_be_meant_is_refused(lm, prompts):
    with pytest.raises(UserError, match="one string"):
        lm.derive_state("a prompt")
    with pytest.raises(UserError, match="is empty"):
        lm.derive_state([])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        lm.derive_state(["a", ""])
    with pytest.raises(UserError, match="token id 5000"):
        lm.derive_state([[5000]])
    with pytest.raises(UserError, match="token id -1"):
        lm.derive_state([[3, -1]])
    with pytest.raises(UserError, match="4 sequences but a state of batch 1"):
        lm.derive_state(prompts, lm.blank_state(1))
    lm.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        lm.generate(["a"])
    assert len(list(lm.stream([[1, 2]], max_new_tokens=2, stop=None))) == 2


def test_fingerprint_names_the_weights(make_lm):
    lm = make_lm()
    first = lm.fingerprint()
    assert first == make_lm().fingerprint()
    assert first != make_lm(seed=1).fingerprint()
    with torch.no_grad():
        lm.head.weight[0, 0] += 1e-3
    assert lm.fingerprint() != first
