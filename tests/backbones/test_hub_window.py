"""A window of fixed size: each token sees what its definition says; the rest is in `test_backbones.py`."""

import pytest
import torch
from checks import random_delta
from families import CLOSE, FAMILIES, HEADS, library, rows_of
from torch.testing import assert_close

from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.hub_window import WindowTransformer
from prosg_lib.errors import UserError

KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Phi": {"partial_rotary_factor": 0.5},  # which turns half of each head
    "Glm": {"head_dim": 16, "partial_rotary_factor": 0.5},  # and which turns neighbouring numbers
    "GPTNeoX": {"rotary_pct": 0.25},
    "SmolLM3": {"no_rope_layers": [1, 1]},
}


def one_layer(kind, window, sinks, **sizes):
    model = library(kind, **HEADS | KINDS[kind] | {"num_hidden_layers": 1} | sizes)
    return WindowTransformer(model.eval().requires_grad_(False), window, sinks)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_sees_the_first_tokens_and_the_latest(kind, sinks):
    """Of a single layer, every token's logits are the class's own for a text of only those tokens, and so at the
    positions that they have in it. Read in pieces of any length."""
    lm = one_layer(kind, 8, sinks)
    (row,) = rows_of((40,))
    logits, state = [], None
    for piece in torch.tensor([row]).split([1, 9, 5, 20, 5], 1):
        out, state = lm(piece, state)
        logits.append(out[0])
    for place, ours in enumerate(torch.cat(logits)):
        text = row[: place + 1]
        seen = text if len(text) <= 8 else text[:sinks] + text[sinks - 8 :]
        assert_close(ours, lm.model(torch.tensor([seen])).logits[0, -1], **CLOSE)


@torch.no_grad()
def test_layers_are_cached_as_they_were():
    """Of several layers, keys and values stay as they were computed: an implementation token by token, with lists."""
    lm, window, sinks = FAMILIES["short_window"]().eval(), 8, 2
    (row,) = rows_of((30,))
    body, held = lm.model.model, [[] for _ in lm.model.model.layers]

    def turn(x, place):
        cos, sin = (t[0, 0] for t in body.rotary_emb(x[None], torch.tensor([[place]])))
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    expected = []
    for token in row:
        x = body.embed_tokens.weight[token]
        for layer, kept in zip(body.layers, held, strict=True):
            attention, inner = layer.self_attn, layer.input_layernorm(x)
            query = attention.q_norm(attention.q_proj(inner).view(2, 16))
            kept.append((attention.k_norm(attention.k_proj(inner).view(1, 16)), attention.v_proj(inner).view(1, 16)))
            if len(kept) > window:
                del kept[sinks]
            keys = torch.cat([turn(key, place) for place, (key, _) in enumerate(kept)])
            weights = (turn(query, len(kept) - 1) @ keys.t() / 4).softmax(-1)
            x = x + attention.o_proj((weights @ torch.cat([value for _, value in kept])).flatten())
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        expected.append(lm.model.lm_head(body.norm(x)))
    assert_close(lm(torch.tensor([row]))[0][0], torch.stack(expected), **CLOSE)


@torch.no_grad()
def test_memory_is_constant_over_100000_tokens():
    """In bytes; and the last of them is read as precisely as a short text."""
    lm = one_layer("Llama", 512, 4)
    (row,) = rows_of((100_000,))
    size, state = lm.blank_state(1).nbytes(), None
    for piece in torch.tensor([row]).split(20_000, 1):
        hidden, state = lm.step_through(piece, state)
        assert state.nbytes() == size
    assert state.tensors["seen"].item() == 100_000
    expected = lm.model(torch.tensor([row[:4] + row[-508:]])).logits[0, -1]
    assert_close(lm.read_out(hidden[0, -1]), expected, **CLOSE)


def test_window_and_sinks_are_part_of_the_model():
    """Others than a generator's, a delta's or a state's are another model's; the plain model's fingerprint stays."""
    plain = CausalTransformer(library("Llama", **HEADS)).eval()
    before = plain.fingerprint()
    models = [plain.with_window(*sizes) for sizes in ((16, 4), (16, 2), (12, 4), (16, 4))]
    prints = [lm.fingerprint() for lm in models]
    assert prints[0] == prints[3]
    assert len({before, *prints}) == 4
    assert plain.fingerprint() == before
    assert plain.config.rest == CausalTransformer(library("Llama", **HEADS)).config.rest
    ids = torch.tensor(rows_of((5,)))
    state, delta = models[0].derive_state(ids.tolist()), random_delta(models[0], 1)
    models[3](ids, state, delta)
    for other in models[1:3]:
        with pytest.raises(UserError, match="this state was derived with another model"):
            other(ids, state)
        with pytest.raises(UserError, match=r"made for model"):
            other(ids, delta=delta)


@torch.no_grad()
def test_hidden_states_without_a_state():
    """The same, whatever the length, from a state and with padding."""
    lm = one_layer("Llama", 8, 3)
    ids, valid = lm.encode_prompts(rows_of((20, 13)))
    hidden, state = lm.step_through(ids, None, valid)
    assert torch.equal(lm.hidden_states(ids, None, valid), hidden)
    assert torch.equal(lm.hidden_states(ids[:, :3], state), lm.step_through(ids[:, :3], state)[0])


@torch.no_grad()
def test_the_plain_model_is_left_as_it_was():
    """It shares its weights with the one that has a window, and reads everything, before and after."""
    plain = CausalTransformer(library("Llama", **HEADS)).eval()
    plain.ends = (5,)
    ids = torch.tensor(rows_of((30,)))
    before = plain(ids)[0]
    lm = plain.with_window(8)
    assert lm.ends == (5,)
    assert (lm(ids)[0] - before)[:, 10:].abs().max() > 0.1
    assert_close(lm(ids)[0][:, :8], before[:, :8], **CLOSE)
    assert torch.equal(plain(ids)[0], before)


@pytest.mark.parametrize(
    ("kind", "sizes", "window", "message"),
    [
        ("Llama", {}, {"window": 1}, "window is 1; this model takes 2 to 2048 tokens"),
        ("Llama", {"max_position_embeddings": 64}, {"window": 65}, "takes 2 to 64 tokens"),
        ("Mistral", {"sliding_window": 32}, {"window": 33}, "takes 2 to 32 tokens"),
        ("Llama", {}, {"window": 8, "sinks": 8}, "sinks is 8; give 0 to 7, fewer than the window's 8 tokens"),
        ("Llama", {}, {"window": 8, "sinks": -1}, "sinks is -1"),
        ("GPT2", {}, {"window": 8}, "the positions of a GPT2LMHeadModel are not rotary"),
        ("Cohere", {}, {"window": 8}, "cannot be given a window .its logits differ"),
        ("Gemma2", {"head_dim": 16}, {"window": 8}, "a Gemma2ForCausalLM cannot be given a window .*caps its scores"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, {"window": 8}, "cannot be given a window .its logits differ"),
    ],
)
def test_what_cannot_be_is_said(kind, sizes, window, message):
    heads = {"num_attention_heads": 2} if kind == "GPT2" else HEADS
    plain = CausalTransformer(library(kind, **heads | sizes))
    with pytest.raises(UserError, match=message):
        plain.with_window(**window)


def test_a_state_of_tokens_cannot_be_added_up():
    lm = FAMILIES["short_window"]()
    state = lm.derive_state(rows_of((5,)))
    with pytest.raises(UserError, match="is a list of tokens, which cannot be added"):
        lm.combine_states([state, state], [1.0, 1.0])
