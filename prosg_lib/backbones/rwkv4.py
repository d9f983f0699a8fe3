"""RWKV-4 in plain PyTorch, written to be read.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3. What it shares with RWKV-7 (token
shift, embedding, output head) is in `rwkv`, its recurrence in `wkv`, its sizes in `config.sizes`, and the conversion of
weights from and to other layouts in `rwkv_layouts`.

Glossary of shapes: B batch, T time, D width, F feed-forward width, L layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from prosg_lib.backbones.rwkv import RWKV, BlockState, interpolate, squared_relu, token_shift
from prosg_lib.backbones.state import state_dtype
from prosg_lib.backbones.wkv import BLANK, WKVState, wkv
from prosg_lib.config.sizes import RWKV4Config

STATE_NAMES = ("att_shift", "ffn_shift", "num", "den", "m")
"""A block's state, (B, D) each: the last token's input of either mix, and the three vectors of `WKVState`."""


class TimeMix(nn.Module):
    """Takes attention's place: mixes over time by the WKV recurrence (eqs. 11-15).

    r_t = W_r (mu_r x_t + (1 - mu_r) x_{t-1}),  and k_t, v_t likewise
    wkv_t = mean of v_1 ... v_t, with weight e^{k_t + u} for the token at hand, e^{k_i - (t-1-i) w} for earlier ones
    o_t = W_o (sigmoid(r_t) * wkv_t)
    """

    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__()
        width, depth = config.width, layer / max(config.layers - 1, 1)
        channel = torch.arange(width) / max(width - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * channel ** (0.7 + 1.3 * depth))  # log w
        self.time_first = nn.Parameter(torch.full((width,), math.log(0.3)) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        mix = (torch.arange(width) / width) ** (1 - layer / config.layers)
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_v = nn.Parameter(mix + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix**0.5)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, last: Tensor, state: WKVState | None, valid: Tensor | None):
        """x (B, T, D) and what came before, `last` (B, D) and `state` -> output (B, T, D), and both after x."""
        previous, x = token_shift(x, last, valid)
        x_k, x_v, x_r = interpolate(previous, x, self.time_mix_k, self.time_mix_v, self.time_mix_r)
        k, v, r = self.key(x_k), self.value(x_v), torch.sigmoid(self.receptance(x_r))
        w = torch.exp(self.time_decay.to(state_dtype(k)))
        mean, state = wkv(w, self.time_first, k, v, state, valid)
        return self.output(r * mean), x[:, -1], state


class ChannelMix(nn.Module):
    """The feed-forward part: sigmoid(r_t) * W_v relu(k_t)^2, with r_t and k_t as in the time mix (eqs. 16-18)."""

    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__()
        mix = (torch.arange(config.width) / config.width) ** (1 - layer / config.layers)
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(config.width, config.ffn, bias=False)
        self.receptance = nn.Linear(config.width, config.width, bias=False)
        self.value = nn.Linear(config.ffn, config.width, bias=False)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.receptance.weight)

    def forward(self, x: Tensor, last: Tensor, valid: Tensor | None):
        """x (B, T, D) and the vector before it, `last` (B, D) -> output (B, T, D), and the last vector of x."""
        previous, x = token_shift(x, last, valid)
        x_k, x_r = interpolate(previous, x, self.time_mix_k, self.time_mix_r)
        k, r = squared_relu(self.key(x_k)), torch.sigmoid(self.receptance(x_r))
        return r * self.value(k), x[:, -1]


class Block(nn.Module):
    """x + TimeMix(norm(x)), then x + ChannelMix(norm(x)). The first block also norms the embedding, by ln0."""

    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)

    def forward(self, x: Tensor, state: BlockState | None, valid: Tensor | None) -> tuple[Tensor, BlockState]:
        """x (B, T, D) and the state before it (None: blank) -> output (B, T, D) and the state after it."""
        if state is None:
            att_shift = ffn_shift = x.new_zeros(x.shape[0], x.shape[2])
            sums = None
        else:
            att_shift, ffn_shift = state["att_shift"], state["ffn_shift"]
            sums = WKVState(state["num"], state["den"], state["m"])
        out, att_shift, sums = self.att(self.ln1(x), att_shift, sums, valid)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), ffn_shift, valid)
        return x + out, {"att_shift": att_shift, "ffn_shift": ffn_shift, **sums._asdict()}


class RWKV4(RWKV):
    """The language model. `forward`, `derive_state`, `generate`: see `LanguageModel`."""

    def __init__(self, config: RWKV4Config):
        super().__init__(config, Block)

    def blank_state(self, batch):
        shape = (batch, self.config.layers, self.config.width)
        zeros = torch.zeros(shape, dtype=state_dtype(self.emb.weight), device=self.emb.weight.device)
        return self.state_of({n: torch.full_like(zeros, BLANK) if n == "m" else zeros for n in STATE_NAMES})

    def run_blocks(self, x, before, valid):
        after = []
        for block, state in zip(self.blocks, before, strict=True):
            x, state = block(x, state, valid)
            after.append(state)
        return x, after

    def state_features(self, state):
        """Four vectors a block, each (D,): both shifts, the mean num / den that WKV would read, and its weight as the
        logarithm log den + m."""
        s = state.tensors
        den = s["den"].clamp(min=1e-30)
        seen = s["den"] > 0
        features = (
            s["att_shift"],
            s["ffn_shift"],
            torch.where(seen, s["num"] / den, 0.0),
            torch.where(seen, torch.log(den) + s["m"], 0.0),
        )
        return torch.cat(features, -1).flatten(1)  # (B, 4 L D)

    def combine_states(self, states, weights):
        """The sums that a state stands for, num e^m and den e^m, are added up; m is then the largest that counts."""
        counted = [(s.tensors, w) for s, w in zip(states, weights, strict=True) if w]
        m = torch.stack([s["m"] for s, _ in counted] or [torch.full_like(states[0].tensors["m"], BLANK)]).amax(0)
        zero = torch.zeros_like(m)
        sums = {n: sum((w * s[n] * torch.exp(s["m"] - m) for s, w in counted), zero) for n in ("num", "den")}
        return replace(states[0], tensors=states[0].tensors | sums | {"m": m})

    def state_decay(self, state):
        """Both sums shrink by e^{-w} a token, w = e^{time_decay}: they lose 1 - e^{-w} of themselves."""
        decay = torch.stack([block.att.time_decay for block in self.blocks]).exp()  # (L, D)
        share = -torch.expm1(-decay.to(state.tensors["num"]))
        return replace(state, tensors=state.tensors | {n: share * state.tensors[n] for n in ("num", "den")})

    def tunable_state(self, state):
        """Scaled to den = 1, which is held fixed: num is then the mean that WKV reads, and m its weight's logarithm."""
        s = state.tensors
        size = torch.where(s["den"] > 0, s["den"], 1.0)
        m = torch.where(s["den"] > 0, s["m"] + torch.log(size), BLANK)
        same = s | {"num": s["num"] / size, "den": s["den"] / size, "m": m}
        return replace(state, tensors=same), tuple(name for name in STATE_NAMES if name != "den")

    def hf_module_name(self, name):
        return f"rwkv.{name}".replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
