"""The interface of a model: streams, prompts that are refused, fingerprints. Its numbers are in `test_backbones.py`."""

import itertools
import pickle

import pytest
import torch
from checks import random_delta

from prosg_lib.backbones.base import bit_sum
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.errors import UserError

pytestmark = pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])


def test_a_stop_ends_only_its_own_sequence(lm, prompts):
    free = lm.generate(prompts, max_new_tokens=12, stop=None)
    stop = free[0][5:8]
    stopped = lm.generate(prompts, max_new_tokens=12, stop=stop)
    assert stopped == [text.partition(stop)[0] for text in free]
    assert len(stopped[0]) < 6


def test_a_stream_leaves_the_model_alone_between_tokens(lm, prompts):
    """Two streams with different deltas, taken in turn, are what each is on its own; so is the plain model."""
    delta = random_delta(lm, len(prompts))
    ids = torch.randint(2000, (2, 10), generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a prompt", "one string"),
        ([], "is empty"),
        (["a", ""], "prompt 1 is empty"),
        ([[5000]], "token id 5000"),
        ([[3, -1]], "token id -1"),
        ([[2**70]], "token id 1180591620717411303424"),
        ([[3], [1.5]], "prompt 1 is neither a text nor a list of whole numbers"),
        ([None], "prompt 0 is neither"),
        ([b"abc"], "prompt 0 is neither"),
        (None, "prompts is a NoneType; pass a list of prompts"),
    ],
)
def test_prompts_that_are_refused(lm, prompts, message):
    for read in (lm.derive_state, lm.generate):
        with pytest.raises(UserError, match=message):
            read(prompts)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 5000]]), "token id 5000 is outside the model's vocabulary of"),
        (torch.tensor([[-1]]), "token id -1"),
        (torch.tensor([[1.0]]), r"ids is torch.float32 of shape \(1, 1\); give token ids"),
        (torch.tensor([1, 2]), r"ids is torch.int64 of shape \(2,\)"),
        (torch.ones(2, 0, dtype=torch.long), r"of shape \(2, 0\)"),
        ([[1, 2]], "ids is a list; give token ids as a tensor"),
    ],
)
def test_token_ids_that_are_refused(lm, ids, message):
    with pytest.raises(UserError, match=message):
        lm(ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"state": {}}, "state is a dict; give what derive_state returns"),
        ({"state": RecurrentState({})}, "state is a RecurrentState; give what"),
        ({"state": RecurrentState({"m": torch.zeros(1, 3, 16)})}, "derived with another model"),
        ({"delta": "delta.safetensors"}, "delta is a str; give a LowRankDelta"),
        (
            {"valid": torch.ones(1, 1, dtype=torch.bool)},
            r"valid is torch.bool of shape \(1, 1\)",
        ),
        ({"valid": torch.ones(1, 2)}, "valid is torch.float32"),
        ({"last": 0}, "last is 0; give at least 1"),
    ],
)
def test_arguments_that_are_refused(lm, wrong, message):
    with pytest.raises(UserError, match=message):
        lm(torch.tensor([[1, 2]]), **wrong)


def test_a_state_of_another_model_is_refused(lm, make_lm, prompts):
    """Of other weights, another size or family, by every way in; one of equal weights, or sent to another process, is
    none of another model."""
    ids = torch.tensor([[1, 2]] * 4)
    llama = new_llama(TransformerConfig("llama", lm.config.vocab, 16, 2, 32, 2))
    others = [make_lm(seed=1), make_lm(layers=2), llama]
    of_others = [other.derive_state(prompts) for other in others]
    of_others += [RecurrentState(state.tensors) for state in of_others[1:]]  # which nothing but their looks gives away
    for state in (make_lm().derive_state(prompts), *of_others):  # the first one's model is gone
        for use in (
            lambda state: lm(ids, state.select([3, 0, 1, 2])),
            lambda state: lm.derive_state(prompts, state),
            lambda state: lm.generate(prompts, state, max_new_tokens=1),
        ):
            with pytest.raises(UserError, match="derived with another model; derive it again with this one"):
                use(state)
    state = lm.derive_state(prompts)
    expected = lm(ids, state)[0]
    assert torch.equal(make_lm()(ids, state)[0], expected)
    assert torch.equal(make_lm()(ids, pickle.loads(pickle.dumps(state)))[0], expected)


def test_fingerprint_names_the_weights(make_lm):
    """However they are written: what `.data` and shared memory change, PyTorch does not count."""
    lm = make_lm()
    first, weight = lm.fingerprint(), lm.head.weight
    assert first == make_lm().fingerprint()
    assert first != make_lm(seed=1).fingerprint()
    delta, ids = random_delta(lm, 1), torch.ones(1, 1, dtype=torch.long)
    for write in (weight.detach(), weight.data, torch.from_numpy(weight.detach().numpy())):
        before = write[0, 0].item()
        write[0, 0] += 1e-3
        assert lm.fingerprint() != first
        with pytest.raises(UserError, match="this delta was made for model"):
            lm(ids, None, delta)
        write[0, 0] = before
        assert lm.fingerprint() == first


def test_a_sum_of_bits_changes_with_every_bit(family):
    """Of tensors of any size, precision and place in memory."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        for start, size in itertools.product(range(3), range(12)):
            tensor = torch.arange(40).to(dtype)[start : start + size]
            first, bits = int(bit_sum(tensor)), tensor.view(torch.uint8)
            for byte in range(len(bits)):
                bits[byte] ^= 1
                assert int(bit_sum(tensor)) != first
                bits[byte] ^= 1
