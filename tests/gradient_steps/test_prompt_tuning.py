"""A prompt learned by gradient descent: its loss falls, whatever the batch, and the model is not changed."""

import pytest
import torch
from checks import digest
from torch.testing import assert_close

from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation.baselines import FineTunedLora, TunedState, start
from prosg_lib.generators.base import ALL_MAPS
from prosg_lib.gradient_steps.one_step import context_nll
from prosg_lib.gradient_steps.prompt_tuning import fine_tuned, tuned_state


@pytest.fixture
def batch(lm, prompts):
    """Prompts of at least two tokens: a single one leaves nothing to predict."""
    return lm.encode_prompts([p for p in prompts if len(p) > 1])


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_what_is_learned_makes_its_prompt_likelier(lm, batch):
    """Every prompt's loss falls: from its tuned state, compared with where tuning started, and with its adapter in the
    weights. That state is not changed; nor are the weights, and without the adapter nothing is."""
    ids, valid = batch
    after = lm.derive_state([row[v].tolist() for row, v in zip(*batch, strict=True)])
    kept, weights = {name: tensor.clone() for name, tensor in after.tensors.items()}, digest(lm)
    with torch.no_grad():
        plain, carried = context_nll(lm, ids, valid), context_nll(lm, ids, valid, after)
    tuned = tuned_state(lm, ids, valid, after, 10, 0.03)
    delta = fine_tuned(lm, ids, valid, 10, 0.01, 4, ALL_MAPS)
    with torch.no_grad():
        assert (context_nll(lm, ids, valid, tuned) < carried).all()
        with applied(lm, delta):
            assert (context_nll(lm, ids, valid) < plain).all()
        assert torch.equal(context_nll(lm, ids, valid), plain)
    assert digest(lm) == weights
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in kept.items())
    assert all(not t.requires_grad for t in tuned.tensors.values())
    assert (delta.rank, delta.batch) == (4, len(ids))


def test_no_steps_change_nothing(lm, batch):
    """Without steps the adapter is a change of zero, and the state the same."""
    ids, valid = batch
    assert all(not f.U.any() for f in fine_tuned(lm, ids, valid, 0, 0.1, 2, ALL_MAPS).factors.values())
    state = lm.derive_state([[1, 2, 3]])
    found = tuned_state(lm, ids[:1], valid[:1], state, 0, 0.1)
    assert_close(found.tensors["num"] / found.tensors["den"], state.tensors["num"] / state.tensors["den"])


@pytest.mark.parametrize("method", [TunedState(3, 0.01), FineTunedLora(3, 0.001)])
def test_a_prompt_is_learned_as_if_it_were_alone(lm64, prompts, method):
    """Each of a padded batch gets what it gets alone."""
    prompts = [p for p in prompts if len(p) > 1]
    together = start(method, lm64, {}, prompts)
    for row, prompt in enumerate(prompts):
        alone, ours = start(method, lm64, {}, [prompt]), together.select([row])
        for key, tensor in alone.state.tensors.items():
            assert_close(ours.state.tensors[key], tensor, rtol=1e-4, atol=1e-6)
        for key, factors in (alone.delta.factors if alone.delta else {}).items():
            for a, b in zip(factors, ours.delta.factors[key], strict=True):
                assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_what_gives_no_gradient_is_said(lm, batch):
    """A model without a gradient of its initial state, one whose state grows, and a loss or a gradient that is not a
    number."""
    ids, valid = batch
    state = lm.derive_state([[1]] * len(ids))

    class Cut(torch.nn.Module):
        tunable_state, read_out = staticmethod(lm.tunable_state), staticmethod(lm.read_out)

        def step_through(self, ids, state, valid):
            return lm.step_through(ids, state.detach(), valid)

    class Kinked(Cut):
        def step_through(self, ids, state, valid):
            hidden, after = lm.step_through(ids, state, valid)
            return hidden + state.tensors["num"].mul(0).sqrt().sum(), after

    with pytest.raises(UserError, match="no gradient"):
        tuned_state(Cut(), ids, valid, state, 1, 0.1)
    llama = new_llama(TransformerConfig("llama", 2048, width=16, layers=1, ffn=32, heads=2))
    with pytest.raises(UserError, match="grows with the text"):
        tuned_state(llama, ids, valid, state, 1, 0.1)
    with pytest.raises(UserError, match="one token"):
        start(FineTunedLora(1), lm, {}, [[3]])
    broken = RecurrentState(state.tensors | {"num": state.tensors["num"] * float("nan")})
    with pytest.raises(NotFinite, match="loss of the prompts"):
        tuned_state(lm, ids, valid, broken, 1, 0.1)
    with pytest.raises(NotFinite, match="no longer finite after 1 steps"):
        tuned_state(Kinked(), ids, valid, state, 1, 0.1)
