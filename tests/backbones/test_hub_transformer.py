"""Transformers behind the interface, in what recurrent models have not; the rest is in `test_backbones.py`."""

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, rows_of
from torch.testing import assert_close

from prosg_lib.backbones.hub_transformer import CausalTransformer, TransformerConfig, new_llama
from prosg_lib.errors import UserError

SIZES = TransformerConfig("llama", 64, width=16, layers=2, ffn=32, heads=2)


def transformer(kind):
    """Tiny and random, every weight large enough to matter."""
    torch.manual_seed(0)
    lm = new_llama(SIZES) if kind == "new" else FAMILIES[kind]()
    for name, weight in lm.named_parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1 and name.endswith("weight")), std=0.3)
    return lm.eval().requires_grad_(False)


@pytest.fixture(params=["new", "gpt2"])
def lm(request):
    return transformer(request.param)


def test_double_precision(lm):
    """A model in float64 is read in float64: with padding, the wrapped model's logits."""
    lm, rows = lm.double(), rows_of((3, 8))
    ids, valid = lm.encode_prompts(rows)
    for row, many in zip(rows, lm(ids, valid=valid)[0], strict=True):
        expected = lm.model(torch.tensor([row])).logits[0]
        assert_close(many[-len(row) :], expected, rtol=1e-5, atol=1e-6)  # they normalise in float32


def test_a_fresh_transformers_first_two_heads_look_at_the_token_before():
    """At every place but the first, and whatever the tokens; the other two heads look elsewhere."""
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", 2048, 128, 2, 64, 4))
    ids = torch.randint(2048, (5, 60))
    weights = lm.model(ids, output_attentions=True).attentions[0]  # (B, heads, T, T)
    before = weights.diagonal(offset=-1, dim1=2, dim2=3)
    assert before[:, :2].min() > 0.4
    assert before[:, :2].mean() > 0.7
    assert before[:, 2:, 10:].mean() < 0.3


@pytest.mark.parametrize(
    ("kind", "maps"),
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("new", {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}),
    ],
)
def test_the_maps_of_the_blocks_can_be_edited(kind, maps):
    """All of them, under the wrapped model's names, and not the output embedding, which is a linear map as well."""
    lm = transformer(kind)
    assert type(lm.model.get_output_embeddings()) is torch.nn.Linear
    assert {name.split(".", 3)[-1] for name in lm.editable()} == maps
    assert len(lm.editable()) == 2 * len(maps)


def test_sizes_are_read_off():
    """`new_llama` makes what it is asked for, embeddings tied; other classes say what they have."""
    lm = new_llama(SIZES)
    assert replace(lm.config, rest="") == SIZES
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert [tuple(m.weight.shape) for n, m in lm.editable().items() if "mlp.up" in n] == [(32, 16)] * 2
    assert replace(transformer("gpt2").config, rest="") == TransformerConfig("gpt2", 64, 32, 2, 0, 2)


def test_the_fingerprint_names_what_else_decides():
    """The same weights with another base of the rotary positions say something else, and are another model."""
    one, other = transformer("new"), transformer("new")
    assert one.fingerprint() == other.fingerprint()
    config = copy.deepcopy(other.model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10.0}
    assert CausalTransformer(type(other.model)(config)).config != one.config


def test_keys_and_values_say_what_reading_everything_again_says(lm):
    """Hidden states behind a padded batch, a second padded piece and a third, against `CausalTransformer`; weights and
    fingerprint are shared, and there is no state of a fixed size."""
    kept = lm.with_kv_cache()
    assert kept.fingerprint() == lm.fingerprint()
    kept.check()
    states = [None, None]
    for lengths in ((7, 3, 5), (2, 4, 1), (1, 1, 1)):
        ids, valid = lm.encode_prompts(rows_of(lengths))
        (slow, states[0]), (fast, states[1]) = (
            model.step_through(ids, state, valid) for model, state in zip((lm, kept), states, strict=True)
        )
        assert_close(fast[valid], slow[valid], rtol=1e-4, atol=1e-4)
    for model, state in zip((lm, kept), states, strict=True):
        with pytest.raises(UserError, match=f"a {type(model).__name__} has no state of a fixed size"):
            model.state_features(state)
