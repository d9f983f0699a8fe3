"""The interface of a model: streams, prompts that are refused, fingerprints. Its numbers are in `test_backbones.py`."""

import pytest
import torch
from checks import random_delta

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
    ],
)
def test_prompts_that_are_refused(lm, prompts, message):
    with pytest.raises(UserError, match=message):
        lm.derive_state(prompts)


def test_fingerprint_names_the_weights(make_lm):
    lm = make_lm()
    first = lm.fingerprint()
    assert first == make_lm().fingerprint()
    assert first != make_lm(seed=1).fingerprint()
    with torch.no_grad():
        lm.head.weight[0, 0] += 1e-3
    assert lm.fingerprint() != first
