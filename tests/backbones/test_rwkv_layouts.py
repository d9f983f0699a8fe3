"""RWKV's weights come back from every layout as they went in, and only whole weights of a known generation are read."""

import pytest
import torch
from torch.testing import assert_close

from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.backbones.rwkv_layouts import from_author, from_hf, to_author, to_hf
from prosg_lib.errors import UserError


def test_rwkv4_round_trip(lm):
    weights = to_author(lm)
    assert weights["blocks.0.att.time_mix_k"].shape == (1, 1, lm.config.width)
    for again in (from_author(weights), from_hf(to_hf(lm)), from_author(lm.state_dict())):
        assert again.config == lm.config
        assert again.fingerprint() == lm.fingerprint()


@pytest.mark.parametrize("family", ["rwkv7"])
def test_rwkv7_round_trip(lm):
    """Also in half precision, and from a plain state dict; the model has memory of its own, and the file's low-rank
    sizes."""
    weights = to_author(lm)
    assert weights["blocks.0.att.x_k"].shape == weights["blocks.1.att.v0"].shape == (1, 1, 16)
    assert weights["blocks.0.att.r_k"].shape == (2, 8)
    assert weights["blocks.0.att.ln_x.weight"].shape == weights["ln_out.bias"].shape == (16,)
    assert not [name for name in weights if name.startswith(("blocks.0.att.v0", "blocks.0.att.v1"))]
    again = from_author(weights)
    assert again.config == lm.config == RWKV7Config(lm.config.vocab, 16, 3, 32, 8, 4, 3, 2, 5)
    assert again.fingerprint() == from_author(lm.state_dict()).fingerprint() == lm.fingerprint()
    with torch.no_grad():
        again.emb.weight.zero_()
    assert lm.emb.weight.any()
    half = from_author({name: t.bfloat16() for name, t in weights.items()})
    assert {t.dtype for t in half.state_dict().values()} == {torch.float32}
    assert_close(half.state_dict(), lm.state_dict(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("family", ["rwkv7"])
@torch.no_grad()
def test_values_of_a_first_layer_that_nothing_uses(lm):
    """Some files have v0, v1, v2 in the first layer, some have not: the same model."""
    weights = to_author(lm)
    more = {f"blocks.0.att.{name}": torch.ones_like(weights[f"blocks.1.att.{name}"]) for name in ("v0", "v1", "v2")}
    assert from_author(weights | more).fingerprint() == lm.fingerprint()


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_forward_module.", "model._orig_mod."])
def test_wrappers_of_a_trainer_are_taken_off(lm, wrapper):
    weights = to_author(lm)
    wrapped = {wrapper + name: tensor for name, tensor in weights.items()}
    assert from_author(wrapped).fingerprint() == lm.fingerprint()
    with pytest.raises(UserError, match=r"1 unknown \(ema\.emb\.weight\)"):  # two models in one
        from_author(wrapped | {"ema.emb.weight": weights["emb.weight"]})


def test_a_single_layer_round_trip():
    """It has no map to v, whose size its file therefore cannot tell."""
    lm = RWKV7(RWKV7Config(10, 8, 1, 16, 4, 2, 2, 2, 2))
    assert from_author(to_author(lm)).config == lm.config
    assert lm.config.value_rank == 0


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if not name.endswith(names)}


def changed(name, change):
    return lambda weights: weights | {name: change(weights[name])}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("rwkv4", lambda w: without(w, "ln_out.bias"), r"1 tensors missing \(ln_out.bias\)"),
        (
            "rwkv4",
            lambda w: w | {"blocks.0.att.gate.weight": w["emb.weight"]},
            r"1 unknown \(blocks.0.att.gate.weight\)",
        ),
        ("rwkv4", changed("blocks.1.ffn.key.weight", torch.t), r"has shape \(16, 32\), expected \(32, 16\)"),
        ("rwkv4", changed("head.weight", lambda t: t.to(torch.int8)), "quantised"),
        ("rwkv4", changed("head.weight", lambda t: t.to(torch.complex64)), "head.weight is torch.complex64"),
        (
            "rwkv4",
            lambda w: w | {"blocks.999999999.att.key.weight": w["emb.weight"]},
            "its 4 blocks are not those from",
        ),
        ("rwkv4", lambda w: w | {f"blocks.{'9' * 5000}.x": w["emb.weight"]}, "its 4 blocks are not those from 0 to 3"),
        ("rwkv4", lambda w: w | {"blocks.0.att.ln_x.weight": w["ln_out.weight"]}, "RWKV-5 or RWKV-6.*take an RWKV-4"),
        ("rwkv4", lambda w: w | {"blocks.0.att.key.lora_A": w["emb.weight"]}, r"lora_A\); merge the LoRA"),
        ("rwkv4", lambda w: {"blocks.0.att.key.lora_A": w["emb.weight"]}, "these weights are a LoRA alone; merge"),
        ("rwkv4", lambda w: without(w, "0.ffn.key.weight"), "not a whole RWKV4"),
        ("rwkv4", lambda w: without(w, "time_first"), r"neither .*time_first \(RWKV4\) nor blocks.0.att.r_k \(RWKV7\)"),
        ("rwkv4", lambda w: {}, "these 0 tensors .* belong to no known model"),
        ("rwkv7", lambda w: without(w, "1.att.k_a"), r"1 tensors missing \(blocks.1.att.k_a\), 0 unknown"),
        ("rwkv7", lambda w: w | {"x": w["emb.weight"]}, r"0 tensors missing \(\), 1 unknown \(x\)"),
        ("rwkv7", changed("blocks.1.ffn.key.weight", torch.t), r"has shape \(16, 32\), expected \(32, 16\)"),
        ("rwkv7", changed("blocks.2.att.r_k", torch.t), r"r_k has shape \(8, 2\), expected \(2, 8\)"),
        ("rwkv7", changed("blocks.2.att.g1", lambda t: t[:, :4]), r"g1 has shape \(16, 4\), expected \(16, 5\)"),
        ("rwkv7", changed("head.weight", lambda t: t.to(torch.uint8)), r"head\.weight is torch.uint8; quantised"),
        (
            "rwkv7",
            changed("blocks.0.att.r_k", lambda t: t.flatten()[:15].view(3, 5)),
            "16 is not a multiple of",
        ),
        ("rwkv7", changed("blocks.0.att.r_k", torch.flatten), "not a whole RWKV7"),
        ("rwkv7", lambda w: without(w, "0.att.w1"), "not a whole RWKV7"),
    ],
)
def test_weights_that_are_refused(lm, change, message):
    """The fault is named: what is missing, unknown, of another shape, or quantised."""
    with pytest.raises(UserError, match=message):
        from_author(change(to_author(lm)))


def test_weights_of_another_class_of_transformers_are_refused(lm):
    with pytest.raises(UserError, match="RwkvForCausalLM"):
        from_hf({"model.embed_tokens.weight": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="not a whole RWKV4"):
        from_hf({n: t for n, t in to_hf(lm).items() if "feed_forward.key" not in n})
