"""Transformers behind the interface, in what recurrent models have not; the rest is in `test_backbones.py`."""

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, rows_of
from torch.testing import assert_close

from prosg_lib.backbones.hub_transformer import CausalTransformer, LaterBlocks, TransformerConfig, new_llama
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
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


LAST = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("kind", ["new", "llama", "qwen3"])
def test_later_blocks_say_what_the_whole_model_says(kind):
    """Of padded texts, from a blank state and from one, and under a change of a later map; fingerprint and weights are
    those of the whole model, and only maps of the later blocks may be edited."""
    lm = transformer(kind)
    later = lm.with_later_blocks([LAST])
    assert later.fingerprint() == lm.fingerprint()
    assert list(later.editable()) == [name for name in lm.editable() if ".1." in name]
    torch.manual_seed(0)
    out, size = lm.editable()[LAST].weight.shape
    delta = LowRankDelta({LAST: Factors(torch.randn(3, out, 2), torch.randn(3, size, 2))}, lm.fingerprint())
    states = [None, None]
    for lengths in ((7, 3, 5), (2, 4, 1)):
        ids, valid = lm.encode_prompts(rows_of(lengths))
        found = []
        for number, model in enumerate((lm, later)):
            with applied(model, delta):
                hidden, states[number] = model.step_through(ids, states[number], valid)
            found.append(hidden[valid])
        assert_close(*found, rtol=1e-5, atol=1e-5)


def test_what_is_in_front_of_the_later_blocks_is_computed_once(monkeypatch):
    """Once a text, in whatever batch it comes back, until the weights are moved; bit for bit what it was, and without a
    gradient, which the later blocks have."""
    later, read = transformer("new").with_later_blocks([LAST]), []
    body, before = later._parts[0], type(later._parts[0]).forward

    def counted(self, *given, **named):
        if self is body:
            read.append(len(named["input_ids"]))
        return before(self, *given, **named)

    monkeypatch.setattr(type(body), "forward", counted)
    for parameter in later.parameters():
        parameter.requires_grad_(True)
    rows = rows_of((4, 9, 6))
    first = later._kept(tuple(rows[0]))
    for part in (rows, rows[:2], rows[1:]):
        ids, valid = later.encode_prompts(part)
        hidden = later.hidden_states(ids, valid=valid)
    assert read == [1, 1, 1]
    assert later._kept(tuple(rows[0])) is first
    hidden.sum().backward()
    assert not first.requires_grad
    assert {name.split(".")[3] for name, p in later.named_parameters() if p.grad is not None and "layers" in name} == {
        "1"
    }
    later.float()
    later.hidden_states(ids, valid=valid)
    assert read == [1] * 5


@pytest.mark.parametrize(("kind", "names"), [("gpt2", ["transformer.h.1.mlp.c_fc"]), ("new", ["lm_head"]), ("new", [])])
def test_later_blocks_that_cannot_be(kind, names):
    with pytest.raises(UserError, match=r"is in a block of this \w+ that can be run by itself"):
        LaterBlocks(transformer(kind).model, names)
