"""The recurrent and hybrid classes of `transformers` that the project reads, and workarounds for them.

Each adapter is compared with its class, given one sequence and one token at a time (tests/backbones/test_backbones.py;
last with transformers 5.23). Zamba2 and Nemotron-H are missing, although `Recurrent` could read them: for single tokens
these classes ignore the lower limit of the time step that they apply to several, so they disagree with themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from prosg_lib.backbones.hub_recurrent import Recurrent, read_along, recurrent_state, register
from prosg_lib.backbones.linear_scan import linear_scan
from prosg_lib.errors import UserError

CHUNK = 64
"""Tokens whose Mamba states, width x 16 numbers each, are in memory at once (all of them where a graph is kept)."""


@register("mamba", "falcon_mamba", "jamba")
class Mamba(Recurrent):
    """Mamba (Gu & Dao 2023), FalconMamba, and Jamba (Lieber et al. 2024), which has some attention layers and experts.

    Given several tokens, the class silently ignores the recurrent part of the state. It uses the weight of `dt_proj`
    without calling it, so a delta there would have no effect. And its loop over time takes minutes to differentiate.
    Its mixers are replaced by `selective_scan`.
    """

    continues_from_state = handles_padding = True
    kernels = ()

    def apply_workarounds(self):
        for mixer in self.model.modules():
            if hasattr(mixer, "dt_proj"):
                mixer.forward = MethodType(selective_scan, mixer)


def selective_scan(self, hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None, **_) -> Tensor:
    """Mamba's mixer (Gu & Dao 2023, algorithm 2), in place of the class's own forward; with Jamba's norms, too.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = C_t h_t + D x_t, for every channel, with h_t of size N.

    Args:
        hidden_states: (B, T, D).
        cache_params: the library's cache, from which the state is read and into which it is written.
        attention_mask: (B, T), False at left padding before a blank state.
    """
    time, valid = hidden_states.shape[1], None if attention_mask is None else attention_mask[..., None]
    before = None if cache_params is None else recurrent_state(cache_params, self.layer_idx)
    x, gate = self.in_proj(hidden_states).chunk(2, -1)
    x = _without(x, valid).transpose(1, 2)
    if cache_params is not None:  # preceded by what the convolution looks back at
        x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
    x = _without(self.act(self.conv1d(x)[..., x.shape[-1] - time : x.shape[-1]].transpose(1, 2)), valid)

    n = self.ssm_state_size
    dt, b, c = self.x_proj(x).split([self.time_step_rank, n, n], -1)
    if hasattr(self, "dt_layernorm"):
        dt, b, c = self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(self.dt_proj(dt).to(wide))  # (B, T, channels)
    a = -torch.exp(self.A_log.to(wide))  # (channels, N)
    h = a.new_zeros(len(x), *a.shape) if before is None else before.to(wide)
    y = []
    for x_s, dt_s, b_s, c_s in zip(*(t.to(wide).split(CHUNK, 1) for t in (x, dt, b, c)), strict=True):
        states = linear_scan(torch.exp(dt_s[..., None] * a), (dt_s * x_s)[..., None] * b_s[:, :, None], h)
        y.append((states @ c_s[..., None])[..., 0])
        h = states[:, -1]
    if cache_params is not None:
        cache_params.update_recurrent_state(h, self.layer_idx)
    y = (torch.cat(y, 1) + self.D.to(wide) * x).to(gate.dtype)
    return self.out_proj(y * self.act(gate))


def _without(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x * valid.to(x.dtype)


@register("mamba2", "bamba")
class Mamba2(Recurrent):
    """Mamba-2 (Dao & Gu 2024), and Bamba, which has some attention layers."""

    continues_from_state = handles_padding = True

    def apply_workarounds(self):
        limit = tuple(getattr(self.model.config, "time_step_limit", (0.0, float("inf"))))
        if limit != (0.0, float("inf")):
            raise UserError(
                f"this {self.model.config.model_type} limits its time step to {limit}, which its class ignores when it "
                "reads one token at a time; choose a model without time_step_limit"
            )


def new_mamba2(settings: Mapping[str, int]) -> Mamba2:
    """A newly initialised Mamba-2 with tied embeddings, for a tokenizer without tokens for beginning and end.

    Args:
        settings: sizes, by their names in `Mamba2Config`.
    """
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return Mamba2(Mamba2ForCausalLM(Mamba2Config(tie_word_embeddings=True, **nothing, **settings)))


@register("granitemoehybrid")
class GraniteHybrid(Mamba2):
    """Granite 4 hybrid: Mamba-2 layers and attention layers, with scaled embeddings and logits."""

    def embed(self, ids):
        return super().embed(ids) * self.model.config.embedding_multiplier

    def read_out(self, hidden):
        return super().read_out(hidden) / self.model.config.logits_scaling


@register("falcon_h1")
class FalconH1(Mamba2):
    """Falcon-H1: Mamba-2 and attention side by side in every layer, with scaled embeddings and logits."""

    def embed(self, ids):
        return super().embed(ids) * self.model.config.embedding_multiplier

    def read_out(self, hidden):
        return super().read_out(hidden) * self.model.config.lm_head_multiplier


@register("qwen3_next", "qwen3_5_text")
class QwenHybrid(Recurrent):
    """Qwen3-Next and Qwen3.5: gated delta rule (Yang et al. 2024) in three layers of four, attention in the fourth."""

    continues_from_state = handles_padding = True


class Checked(Recurrent):
    """For classes that were wrong about padding, or with themselves, in versions of `transformers` that are allowed:
    what the adapter declares is compared with the class when a model is loaded."""

    continues_from_state = handles_padding = True

    def __init__(self, model):
        super().__init__(model)
        training = model.training
        self.eval().check()
        self.train(training)


@register("olmo_hybrid")
class OlmoHybrid(Checked):
    """OLMo hybrid: gated delta rule in most layers, attention in the others."""


@register("lfm2")
class LFM2(Checked):
    """LFM2: short convolutions, gated by their input, and attention in some layers. The convolutions' state is the last
    tokens: whatever is remembered for longer is in keys and values."""

    def apply_workarounds(self):
        self.handles_padding = not self.model.config.conv_bias  # it masks the input only, so biases let padding in


@register("recurrent_gemma")
class RecurrentGemma(Recurrent):
    """RecurrentGemma (Griffin; De et al. 2024): linear recurrent units, and attention to a window of tokens.

    The class stores the states of recurrent layers in its modules, where they leak into the next text. Given several
    tokens, it ignores the convolution's state, and it lets padding into the convolution. Its recurrent blocks are
    replaced by `recurrent_block`. The state grows no longer than the window.
    """

    continues_from_state = handles_padding = True
    kernels = ()

    def apply_workarounds(self):
        if "linear_attention" not in getattr(self.model.config, "layer_types", ()):  # before 5.23
            raise UserError("RecurrentGemma needs transformers 5.23 or newer; pip install -U transformers")
        for number, layer in enumerate(self.model.model.layers):
            block = layer.temporal_block
            if hasattr(block, "rg_lru"):
                block.layer_idx = number
                block.forward = MethodType(recurrent_block, block)
                block.rg_lru._rnn_scan = MethodType(_scan, block.rg_lru)

    def run_body(self, ids, state, valid):
        for layer in self.model.model.layers:
            layer.temporal_block.valid = valid  # the class passes its mask to attention only
        return super().run_body(ids, state, valid)

    def embed(self, ids):
        embedded = super().embed(ids)
        return embedded * self.model.model.normalizer.to(embedded.dtype)

    def read_out(self, hidden):
        cap = self.model.config.logits_soft_cap
        return torch.tanh(super().read_out(hidden) / cap) * cap


def recurrent_block(
    self, hidden_states: Tensor, position_ids: Tensor, past_key_values=None, **_
) -> tuple[Tensor, None]:
    """Griffin's recurrent block (De et al. 2024, section 2.3), in place of the class's own forward.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t * x_t), with the class's own gates a_t and i_t, by `linear_scan`.
    """
    time, valid = hidden_states.shape[1], None if self.valid is None else self.valid[..., None]
    x = _without(self.linear_x(hidden_states), valid).transpose(1, 2)
    if past_key_values is not None:
        self.rg_lru.recurrent_states = recurrent_state(past_key_values, self.layer_idx)
        x = past_key_values.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv1d_width - 1)
    x = self.conv_1d(x)[..., x.shape[-1] - time : x.shape[-1]].transpose(1, 2)
    x = self.rg_lru(x, position_ids)
    if past_key_values is not None:
        past_key_values.update_recurrent_state(self.rg_lru.recurrent_states, self.layer_idx)
    self.rg_lru.recurrent_states = None
    return self.linear_out(x * self.act_fn(self.linear_y(hidden_states))), None


def _scan(self, hidden_states, recurrent_gate, reset, recurrent_states):
    """Replaces the class's `_rnn_scan`: all states (B, T, W) and the last, from gated inputs and decays (B, T, W)."""
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    x = hidden_states.to(wide)
    start = torch.zeros_like(x[:, 0]) if recurrent_states is None else recurrent_states
    states = linear_scan((recurrent_gate * ~reset).to(wide), x, start)
    return states.to(hidden_states.dtype), states[:, -1]


@register("xlstm")
class XLSTM(Recurrent):
    """The class of xLSTM-7B (Beck et al. 2025): mLSTM in every layer, with a matrix, a vector and a number per head.

    The class does not handle padding and, for long texts, has no gradient. So its blocks are called one by one here,
    and padding shuts the gates: nothing is written and nothing decays, whatever the state.
    """

    continues_from_state = handles_padding = True

    def apply_workarounds(self):
        for block in self.model.backbone.blocks:
            backend = block.mlstm_layer.mlstm_backend
            block.mlstm_layer.mlstm_backend = Gated(backend, self.model.config.chunk_size)

    def run_body(self, ids, state, valid):
        x, after = self.embed(ids), {}
        for number, block in enumerate(self.model.backbone.blocks):
            names = [f"{number}.{part}" for part in ("matrix", "vector", "scale")]
            block.mlstm_layer.mlstm_backend.valid = valid
            x, tensors = block(x, None if state is None else tuple(state.tensors[n] for n in names))
            after |= dict(zip(names, tensors, strict=True))
        return self.model.backbone.out_norm(x), self.state_of(after)

    def read_out(self, hidden):
        cap = self.model.config.output_logit_soft_cap
        return torch.tanh(super().read_out(hidden) / cap) * cap

    def state_features(self, state):
        """For every head, matrix and vector divided by the vector's length, and the logarithm of that length.

        The class stores matrix and vector divided by exp(scale), which is arbitrary; these features are free of it.
        """
        features = []
        for name, matrix in state.tensors.items():
            if name.endswith("matrix"):
                layer = name.removesuffix("matrix")
                vector, scale = state.tensors[f"{layer}vector"], state.tensors[f"{layer}scale"]
                length = vector.norm(dim=-1, keepdim=True)
                seen = length > 0
                by = torch.where(seen, length, 1.0)
                features += [read_along(matrix / by[..., None]), vector / by]
                features.append(torch.where(seen, by.log() + scale, 0.0))
        return torch.cat([f.flatten(1).float() for f in features], 1)


class Gated(nn.Module):
    """The mLSTM of the class, with gates shut at padding, in whole chunks only, and in float32.

    The class reads an incomplete chunk one token at a time; filled up with padding, it is a whole one.

    Attributes:
        valid: (B, T), False at padding; None: all valid.
    """

    SHUT = 1e9  # input gate -SHUT: exp(-SHUT) = 0 is written; forget gate SHUT: log sigmoid(SHUT) = 0, no decay

    def __init__(self, backend: nn.Module, chunk: int):
        super().__init__()
        self.backend, self.chunk, self.valid = backend, chunk, None

    def forward(self, query, key, value, igate, fgate, c_initial=None, n_initial=None, m_initial=None):
        time = query.shape[2]
        if self.valid is not None:
            padding = ~self.valid[:, None]  # (B, 1, T), of the gates' (B, heads, T)
            igate, fgate = igate.masked_fill(padding, -self.SHUT), fgate.masked_fill(padding, self.SHUT)
        more = 0 if time == 1 else -time % self.chunk
        rows = (F.pad(t.float(), (0, 0, 0, more)) for t in (query, key, value))
        gates = F.pad(igate.float(), (0, more), value=-self.SHUT), F.pad(fgate.float(), (0, more), value=self.SHUT)
        out, state = self.backend(*rows, *gates, c_initial, n_initial, m_initial, mode="inference")
        return out[:, :, :time].to(query.dtype), state
