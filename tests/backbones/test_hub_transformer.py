"""Transformers behind the interface, in what recurrent models have not; the rest is in `test_backbones.py`."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config

from prosg_lib.backbones.hub_transformer import CausalTransformer, TransformerConfig, new_llama
from prosg_lib.backbones.loading import load_model
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import load_tokenizer

VOCAB = load_tokenizer().vocab
KINDS = ("new", "gpt2")
SIZES = TransformerConfig("llama", VOCAB, width=16, layers=2, ffn=32, heads=2)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def transformer(kind, seed=0):
    """Tiny and random, every weight large enough to matter."""
    torch.manual_seed(seed)

    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCAB}
    if kind == "new":
        lm = new_llama(SIZES)
    else:
        lm = CausalTransformer(
            AutoModelForCausalLM.from_config(GPT2Config(**ends, n_positions=32, n_embd=16, n_layer=2, n_head=2))
        )
    for name, weight in lm.named_parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1 and name.endswith("weight")), std=0.3)
    lm.tokenizer = load_tokenizer()
    return lm.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    return transformer(request.param)


def rows_of(*lengths):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]


def theirs(lm, ids):
    """What the wrapped model itself says, (B, T, vocab)."""
    return lm.model(torch.tensor(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(kind):
    """A model in float64 is read in float64: with padding, the wrapped model's logits."""
    lm, rows = transformer(kind).double(), rows_of(3, 8)
    ids, valid = lm.encode_prompts(rows)
    for row, many in zip(rows, lm(ids, valid=valid)[0], strict=True):
        assert_close(many[-len(row) :], theirs(lm, [row])[0], rtol=1e-5, atol=1e-6)  # they normalise in float32


def test_a_fresh_transformers_first_two_heads_look_at_the_token_before():
    """At every place but the first, and whatever the tokens; the other two heads look elsewhere."""
    torch.manual_seed(0)
    lm = new_llama(TransformerConfig("llama", VOCAB, 128, 2, 64, 4))
    ids = torch.randint(VOCAB, (5, 60))
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
    for name, module in lm.editable().items():
        assert lm.model.get_submodule(name) is module


# Files and names


def test_a_saved_folder_loads_to_the_same_model(tmp_path):
    """Equal logits, eager attention, the tokenizer where the folder has one; GPT-2 as well as Llama."""
    for kind in ("gpt2", "new"):
        lm, folder = transformer(kind), tmp_path / kind
        lm.model.save_pretrained(folder)
        again = load_model(folder)
        ids = torch.tensor(rows_of(9, 9))
        assert torch.equal(again(ids)[0], lm(ids)[0])
        assert asdict(again.config) == asdict(lm.config)
        assert again.fingerprint() == lm.fingerprint()
        assert again.tokenizer is None
        assert again.model.config._attn_implementation == "eager"
        assert not again.training
        (folder / "tokenizer.json").write_text(lm.tokenizer.to_json(), encoding="utf-8")
        again = load_model(str(folder))
        assert again.generate(["The mill by"], max_new_tokens=4) == lm.generate(["The mill by"], max_new_tokens=4)


def test_there_is_no_state_of_a_fixed_size():
    lm = transformer("new")
    with pytest.raises(UserError, match="a CausalTransformer has no state of a fixed size"):
        lm.state_features(lm.derive_state(rows_of(4)))


def test_sizes_are_read_off():
    """`new_llama` makes what it is asked for, embeddings tied; other classes say what they have."""
    lm = new_llama(SIZES)
    assert replace(lm.config, rest="") == SIZES
    assert lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert [tuple(m.weight.shape) for n, m in lm.editable().items() if "mlp.up" in n] == [(32, 16)] * 2
    assert replace(transformer("gpt2").config, rest="") == TransformerConfig("gpt2", VOCAB, 16, 2, 0, 2)


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
        ids, valid = lm.encode_prompts(rows_of(*lengths))
        (slow, states[0]), (fast, states[1]) = (
            way.step_through(ids, state, valid) for way, state in zip((lm, kept), states, strict=True)
        )
        assert_close(fast[valid], slow[valid], **CLOSE)
    with pytest.raises(UserError, match="fixed size"):
        kept.state_features(states[1])
