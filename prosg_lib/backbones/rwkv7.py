"""RWKV-7 in plain PyTorch, written to be read.

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456; x070 in the author's
code. What it shares with RWKV-4 is in `rwkv`, its recurrence in `wkv7`, the conversion of weights in `rwkv_layouts`.

Glossary of shapes: B batch, T time, D width, F feed-forward width, L layers, H heads, N head size; D = H N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prosg_lib.backbones.rwkv import RWKV, BlockState, interpolate, squared_relu, token_shift
from prosg_lib.backbones.state import state_dtype
from prosg_lib.backbones.wkv7 import wkv7
from prosg_lib.config.sizes import RWKV7Config


def _mixing(config: RWKV7Config, layer: int, power: float) -> nn.Parameter:
    """(D,), the previous token's share in a token shift: from 1 to 0 over the channels, and less in later layers."""
    return nn.Parameter(1 - (torch.arange(config.width) / config.width) ** (power * (1 - layer / config.layers)))


def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """(D, rank) and (rank, D), whose product starts at zero."""
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.randn(rank, width) * 0.1 / width**0.5)


def _linear(inner: int, out: int, size: float) -> nn.Linear:
    """Without bias; uniform in ± size / sqrt(inner)."""
    linear = nn.Linear(inner, out, bias=False)
    nn.init.uniform_(linear.weight, -size / inner**0.5, size / inner**0.5)
    return linear


def _unit(x: Tensor) -> Tensor:
    """x (..., N) at length 1; zero stays zero, with finite derivatives."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-24))


class TimeMix(nn.Module):
    """Takes attention's place: mixes over time by the delta rule of `wkv7`, and adds a bonus for the current token.

    Of x_t and x_{t-1}, mixed by a vector of its own for each (x_r, ..., x_g: the share of x_{t-1}; RWKV-4's vectors are
    the share of x_t), it makes

        r = W_r x_r,  k = W_k x_k,  v = W_v x_v     what to read, and the key and value to write
        w = -e^{-1/2} sigmoid(w0 + tanh(x_w W_w1) W_w2)     log of the decay
        a = sigmoid(a0 + x_a W_a1 W_a2)     how much is removed, and of what is written how much
        g = sigmoid(x_g W_g1) W_g2     gate
        kappa = k * k_k, every head at length 1     the key whose value is removed
        k <- k * (1 + (a - 1) * k_a)
        v <- v + (v of the first layer - v) * sigmoid(v0 + x_v W_v1 W_v2)     in all layers but the first

    and o_t = W_o (g * (norm(S_t r_t) + (r * k * r_k summed over each head) v)) with `wkv7`'s S_t.
    """

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        width, depth = config.width, layer / max(config.layers - 1, 1)
        self.size = config.head
        self.x_r = _mixing(config, layer, 0.2)
        self.x_w = _mixing(config, layer, 0.9)
        self.x_k = _mixing(config, layer, 0.7)
        self.x_v = _mixing(config, layer, 0.7)
        self.x_a = _mixing(config, layer, 0.9)
        self.x_g = _mixing(config, layer, 0.2)
        channel = torch.arange(width) / max(width - 1, 1)
        place = 2 * (torch.arange(width) % config.head) / max(config.head - 1, 1) - 1  # -1 to 1 in every head
        self.w0 = nn.Parameter(-5.5 + 6 * channel ** (1 + depth**0.3) + 2.5 * place * place.abs())
        self.w1, self.w2 = _low_rank(width, config.decay_rank)
        self.a0 = nn.Parameter(0.4 * channel - 0.4 + 0.3 * place * place.abs())
        self.a1, self.a2 = _low_rank(width, config.rate_rank)
        if layer > 0:
            self.v0 = nn.Parameter(0.9 - 0.4 * channel)
            self.v1, self.v2 = _low_rank(width, config.value_rank)
        self.g1, self.g2 = _low_rank(width, config.gate_rank)
        self.k_k = nn.Parameter(torch.full((width,), 0.7))
        self.k_a = nn.Parameter(torch.ones(width))
        # Three dimensions, so that it counts as a vector where matrices are changed by low rank.
        self.r_k = nn.Parameter(torch.zeros(1, width // config.head, config.head))
        self.receptance = _linear(width, width, 0.5)
        self.key = _linear(width, width, 0.05)
        self.value = _linear(width, width, 0.5)
        self.output = _linear(width, width, 0.0)
        self.ln_x = nn.GroupNorm(width // config.head, width, eps=64e-5)

    def forward(self, x: Tensor, last: Tensor, state: Tensor | None, valid: Tensor | None, first: Tensor | None):
        """Mix x (B, T, D) over time.

        Args:
            last: the vector before x, (B, D); state: the matrices before x, (B, H, N, N), None for zero.
            valid: (B, T), False at left padding; None: all valid.
            first: the first layer's values, (B, T, D); None in the first layer.
        Returns:
            output (B, T, D); `last` and `state` after x; the first layer's values.
        """
        previous, x = token_shift(x, last, valid)
        x_r, x_k, x_v, x_w, x_a, x_g = interpolate(
            x, previous, self.x_r, self.x_k, self.x_v, self.x_w, self.x_a, self.x_g
        )
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2)
        w = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2
        a = torch.sigmoid(self.a0 + x_a @ self.a1 @ self.a2)
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        kappa = k * self.k_k
        k = k * (1 + (a - 1) * self.k_a)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.size)).to(state_dtype(x))  # (B, T, H, N)

        log_decay = -math.exp(-0.5) * torch.sigmoid(heads(w))
        y, state = wkv7(heads(r), log_decay, heads(k), heads(v), _unit(heads(kappa)), heads(a), state, valid)
        bonus = (heads(r) * heads(k) * self.r_k).sum(-1, keepdim=True) * heads(v)
        y, bonus = (t.flatten(2).to(v.dtype) for t in (y, bonus))
        y = self.ln_x(y.flatten(0, 1)).view_as(y) + bonus
        return self.output(y * g), x[:, -1], state, first


class ChannelMix(nn.Module):
    """The feed-forward part: W_v relu(W_k x)^2, without RWKV-4's gate."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        self.x_k = nn.Parameter(1 - (torch.arange(config.width) / config.width) ** ((1 - layer / config.layers) ** 4))
        self.key = _linear(config.width, config.ffn, 0.5)
        self.value = _linear(config.ffn, config.width, 0.0)

    def forward(self, x: Tensor, last: Tensor, valid: Tensor | None):
        """x (B, T, D) and the vector before it, `last` (B, D) -> output (B, T, D), and the last vector of x."""
        previous, x = token_shift(x, last, valid)
        (x_k,) = interpolate(x, previous, self.x_k)
        return self.value(squared_relu(self.key(x_k))), x[:, -1]


class Block(nn.Module):
    """x + TimeMix(norm(x)), then x + ChannelMix(norm(x)). The first block also norms the embedding, by ln0."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)

    def forward(
        self, x: Tensor, state: BlockState | None, valid: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, BlockState, Tensor]:
        """x (B, T, D) and the state before it (None: blank) -> output, the state after it, the first layer's values."""
        if state is None:
            zeros = x.new_zeros(x.shape[0], x.shape[2])
            state = {"att_shift": zeros, "ffn_shift": zeros, "wkv": None}
        out, att_shift, wkv, first = self.att(self.ln1(x), state["att_shift"], state["wkv"], valid, first)
        x = x + out
        out, ffn_shift = self.ffn(self.ln2(x), state["ffn_shift"], valid)
        return x + out, {"att_shift": att_shift, "ffn_shift": ffn_shift, "wkv": wkv}, first


class RWKV7(RWKV):
    """The language model. `forward`, `derive_state`, `generate`: see `LanguageModel`."""

    def __init__(self, config: RWKV7Config):
        super().__init__(config, Block)

    def blank_state(self, batch):
        c, weight = self.config, self.emb.weight
        shift = torch.zeros(batch, c.layers, c.width, dtype=state_dtype(weight), device=weight.device)
        wkv = shift.new_zeros(batch, c.layers, c.width // c.head, c.head, c.head)
        return self.state_of({"att_shift": shift, "ffn_shift": shift, "wkv": wkv})

    def run_blocks(self, x, before, valid):
        after, first = [], None
        for block, state in zip(self.blocks, before, strict=True):
            x, state, first = block(x, state, valid, first)
            after.append(state)
        return x, after

    def state_features(self, state):
        """Both shifts, and every head's matrix as a direction and the log of its length. What is read is normalised, so
        it depends on the direction alone; the length says how far the next token will turn it."""
        s = state.tensors
        wkv = s["wkv"].flatten(3)  # (B, L, H, N N)
        length = wkv.norm(dim=-1, keepdim=True)
        seen = length > 0
        length = torch.where(seen, length, 1.0)
        features = (s["att_shift"], s["ffn_shift"], (wkv / length).flatten(2), torch.log(length).flatten(2))
        return torch.cat(features, -1).flatten(1)  # (B, L (2 D + D N + H))
