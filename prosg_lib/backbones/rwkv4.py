"""RWKV-4 in plain PyTorch, written to be read.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3. Module names are those of the
author's checkpoints (`blocks.0.att.time_decay`, ...); `from_hf` and `to_hf` translate to and from the layout of
`transformers.RwkvForCausalLM`.

Glossary of shapes: B batch, T time, D width, F feed-forward width, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prosg_lib.backbones.rwkv import (
    RWKV,
    BlockState,
    ResidualBlock,
    lerps,
    shifted,
    squared_relu,
    sum_dtype,
)
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.backbones.wkv import BLANK, WKVState, wkv_chunked, wkv_recurrent
from prosg_lib.config.sizes import RWKV4Config

STATE_NAMES = ("att_shift", "ffn_shift", "num", "den", "m")


class TimeMix(nn.Module):
    """Attention's place: mixes over time by the WKV recurrence (RWKV-4 paper, eqs. 11-15)."""

    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__()
        width, depth = config.width, layer / max(config.layers - 1, 1)
        channel = torch.arange(width) / max(width - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * channel ** (0.7 + 1.3 * depth))
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
        previous, x = shifted(x, last, valid)
        inputs = lerps(previous, x, self.time_mix_k, self.time_mix_v, self.time_mix_r)
        k, v, r = self.key(next(inputs)), self.value(next(inputs)), torch.sigmoid(self.receptance(next(inputs)))
        wkv = wkv_recurrent if x.shape[1] == 1 else wkv_chunked
        with torch.autocast(x.device.type, enabled=False):  # sums over many tokens need the digits
            decay, first = torch.exp(self.time_decay.to(sum_dtype(k))), self.time_first.to(sum_dtype(k))
            mixed, state = wkv(decay, first, k.to(decay.dtype), v.to(decay.dtype), state, valid)
        return self.output(r * mixed.to(r.dtype)), x[:, -1], state


class ChannelMix(nn.Module):
    """The feed-forward part: W_v relu(W_k x)^2, gated (RWKV-4 paper, eqs. 16-18)."""

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
        previous, x = shifted(x, last, valid)
        inputs = lerps(previous, x, self.time_mix_k, self.time_mix_r)
        k, r = squared_relu(self.key(next(inputs))), torch.sigmoid(self.receptance(next(inputs)))
        return r * self.value(k), x[:, -1]


class Block(ResidualBlock):
    mixes = (TimeMix, ChannelMix)

    def forward(self, x: Tensor, state: BlockState | None, valid: Tensor | None) -> tuple[Tensor, BlockState]:
        if state is None:
            att_shift = ffn_shift = x.new_zeros(x.shape[0], x.shape[2])
            wkv = None
        else:
            att_shift, ffn_shift, *wkv = (state[name] for name in STATE_NAMES)
            wkv = WKVState(*wkv)
        out, att_shift, wkv = self.att(self.ln1(x), att_shift, wkv, valid)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), ffn_shift, valid)
        return x + out, dict(zip(STATE_NAMES, (att_shift, ffn_shift, *wkv), strict=True))


class RWKV4(RWKV):
    """The language model. `forward`, `derive_state`, `generate`: see `LanguageModel`."""

    state_feature_names = ("att_shift", "ffn_shift", "ratio", "weight")

    def __init__(self, config: RWKV4Config):
        super().__init__(config, Block)

    def blank_state(self, batch):
        shape = (batch, self.config.layers, self.config.width)
        zeros = torch.zeros(shape, dtype=sum_dtype(self.emb.weight), device=self.emb.weight.device)
        return RecurrentState({n: torch.full_like(zeros, BLANK) if n == "m" else zeros for n in STATE_NAMES})

    def through_blocks(self, x, before, valid):
        after = []
        for block, state in zip(self.blocks, before, strict=True):
            x, state = block(x, state, valid)
            after.append(state)
        return x, after

    def hf_module_name(self, name):
        return f"rwkv.{name}".replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")

    def combine_states(self, states, weights):
        """Of the sums num e^m and den e^m that the state stands for, in the gauge of the largest one that counts."""
        counted = [(s.tensors, w) for s, w in zip(states, weights, strict=True) if w]
        m = torch.stack([s["m"] for s, _ in counted] or [torch.full_like(states[0].tensors["m"], BLANK)]).amax(0)
        zero = torch.zeros_like(m)
        sums = {n: sum((w * s[n] * torch.exp(s["m"] - m) for s, w in counted), zero) for n in ("num", "den")}
        return RecurrentState(states[0].tensors | sums | {"m": m})

    def state_decay(self, state):
        """The sums decay by e^{-w} a token, w = e^{time_decay}: 1 - e^{-w} of them."""
        decay = torch.stack([block.att.time_decay for block in self.blocks]).exp()  # (L, D)
        share = -torch.expm1(-decay.to(state.tensors["num"]))
        return RecurrentState(state.tensors | {n: share * state.tensors[n] for n in ("num", "den")})

    def tunable_state(self, state):
        """With den = 1, which stays so: num is what WKV would read then, and m the logarithm of its weight."""
        s = state.tensors
        size = torch.where(s["den"] > 0, s["den"], 1.0)
        m = torch.where(s["den"] > 0, s["m"] + torch.log(size), BLANK)
        same = s | {"num": s["num"] / size, "den": s["den"] / size, "m": m}
        return RecurrentState(same), tuple(name for name in STATE_NAMES if name != "den")

    def state_features(self, state):
        """Of the five vectors a block: both shifts, the ratio num / den (what WKV would read), and log den + m."""
        s = state.tensors
        den = s["den"].clamp(min=1e-30)
        seen = s["den"] > 0
        features = (
            s["att_shift"],
            s["ffn_shift"],
            torch.where(seen, s["num"] / den, 0.0),
            torch.where(seen, torch.log(den) + s["m"], 0.0),
        )
        return torch.cat(features, -1).flatten(1)  # (B, layers * 4 D)


def training_flops(config: RWKV4Config) -> float:
    """Floating point operations of training per token: 6 per weight of the linear maps (forward 2, backward 4)."""
    block = 5 * config.width**2 + 2 * config.width * config.ffn
    return 6.0 * (config.layers * block + config.width * config.vocab)
