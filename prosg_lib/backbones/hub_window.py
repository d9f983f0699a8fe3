"""A memory of fixed size for transformers: each token sees the first few tokens of its text and the latest ones.

Source: StreamingLLM (Xiao et al. 2024, arXiv 2309.17453, section 3.2), whose cache holds a few first tokens, the
"attention sinks", and the latest ones, with positions counted inside the cache. Token t of a text sees, with itself, at
most W tokens: all of them while t < W, then the first S and the last W - S. It stands at position min(t, W - 1): its
distance to a recent token is the true one, and the sinks stay just in front of the window. What has left the window is
gone, except for what the upper layers of the tokens in it took over while they saw it, as in any recurrent model.

Here the definition is exact for each token, however a text is cut: a block of tokens is read at once under a mask that
gives every token its own window, and the state is the keys and values that the next token may see. Keys are kept as
they are before the rotary embedding (Su et al. 2021, arXiv 2104.09864), and turned when they are used, so positions
never exceed two windows. This differs from StreamingLLM's code in nothing but the blocks: there, a block sees whatever
the cache holds, so that results depend on where a text is cut.

Glossary of shapes: B batch, T tokens of a block, H heads, K heads of keys and values, C columns (slots, then the
block), N size of a head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prosg_lib.backbones.hub import HubModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.errors import UserError, reason

SINKS = 4
"""First tokens that stay; with four, perplexity no longer falls (Xiao et al. 2024, table 2)."""

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary embedding, (B, T, N) each."""


class WindowTransformer(HubModel):
    """A causal transformer of `transformers` with a memory of fixed size. `forward`, `generate`: see `LanguageModel`.

    It equals the `CausalTransformer` as long as a text has at most `window` tokens. Its state has W - 1 slots: the
    first S tokens on the left, the latest ones on the right; by layer "3.keys" and "3.values" (B, K, W - 1, N), and
    "seen" (B,), the number of tokens read. Gradients flow through it. Window and sinks are part of the fingerprint.

    Args:
        window: W, the most tokens that a token sees, itself and the sinks among them.
        sinks: S, how many of them are the text's first.
    Raises:
        UserError: window or sinks are out of range; the class's positions are not rotary, or it does more in its
            attention than Llama does.
    """

    supports_vmap = False  # its attention is replaced while it runs

    def __init__(self, model: PreTrainedModel, window: int, sinks: int = SINKS):
        super().__init__(model)
        longest = getattr(model.config, "max_position_embeddings", None) or window
        own = getattr(model.config, "sliding_window", None) or longest
        if not 2 <= window <= min(longest, own):
            raise UserError(f"window is {window}; this model takes 2 to {min(longest, own)} tokens")
        if not 0 <= sinks < window:
            raise UserError(f"sinks is {sinks}; give 0 to {window - 1}, fewer than the window's {window} tokens")
        self.window, self.sinks = window, sinks
        self._block = max(1, min(window - sinks, longest - window + 1))  # so that no position is beyond the model's
        rest = json.loads(self.config.rest) | {"prosg_window": window, "prosg_sinks": sinks}
        self.config = replace(self.config, rest=json.dumps(rest, sort_keys=True))
        self.check()

    # Reading

    def step_through(self, ids, state=None, valid=None):
        return self._through(ids, state, valid, keep=True)

    def hidden_states(self, ids, state=None, valid=None):
        """Without the copies that make up the state after the last block."""
        return self._through(ids, state, valid, keep=False)[0]

    def _through(self, ids, state, valid, keep: bool) -> tuple[Tensor, RecurrentState | None]:
        self.check_state(ids, state)
        hidden = []
        for start in range(0, ids.shape[1], self._block):
            block = slice(start, start + self._block)
            part = None if valid is None else valid[:, block]
            out, state = self._read(ids[:, block], state, part, keep or block.stop < ids.shape[1])
            hidden.append(out)
        return torch.cat(hidden, 1), state

    def _read(
        self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None, keep: bool = True
    ) -> tuple[Tensor, RecurrentState | None]:
        """Hidden states and, if it is to be kept, the state after a block of at most W - S tokens.

        A token's place is its number in its text. Because the block is so short, the sinks are in their slots before
        any token is at place W or beyond, so only slots can be nearer than they truly are.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        seen = ids.new_zeros(len(ids)) if state is None else state.tensors["seen"]
        before = seen[:, None]
        place = before + valid.cumsum(1) - 1  # (B, T)
        slots = self._slots(before) if state is not None else ids.new_zeros(len(ids), 0)
        keys = torch.cat([slots, torch.where(valid, place, -1)], 1)[:, None]  # (B, 1, C), -1: empty

        away = place[..., None] - keys
        see = (keys >= 0) & (away >= 0) & ((keys < self.sinks) | (away < self.window - self.sinks))
        see[..., slots.shape[1] :] |= torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # padding: itself

        gone = (before - self.window + 1).clamp(min=0)  # where the recent slots begin, less the sinks
        here, inside = (place - gone).clamp(min=0), place.clamp(0, self.window - 1)
        there = torch.where(slots < self.sinks, slots, slots - gone).clamp(min=0)
        like = self.embed(ids[:1, :1])
        here_turn, inside_turn, there_turn = (self.model.base_model.rotary_emb(like, p) for p in (here, inside, there))

        run = _Run(
            {} if state is None else state.tensors,
            min(self.sinks, slots.shape[1]),
            here_turn,
            inside_turn,
            there_turn,
            see[:, None],
            self._sources(before, valid, slots.shape[1]) if keep else None,
        )
        with self._attending(run):
            body = self.model.base_model(input_ids=ids, attention_mask=see[:, None], position_ids=here, use_cache=False)
        state = self.state_of(run.after | {"seen": seen + valid.sum(1)}) if keep else None
        return body.last_hidden_state, state

    def _slots(self, seen: Tensor) -> Tensor:
        """The places of the tokens in the slots (B, W - 1), given how many were seen (B, 1); -1 where one is empty."""
        number = torch.arange(self.window - 1, device=seen.device)
        latest = seen - (self.window - 1) + number
        return torch.where(
            number < self.sinks,
            torch.where(number < seen, number, -1),
            torch.where(latest >= self.sinks, latest, -1),
        )

    def _sources(self, before: Tensor, valid: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """For every slot after the block: the column that its token is in now, and whether there is one, (B, W - 1)."""
        new = valid.sum(1, keepdim=True)
        place = self._slots(before + new)
        number = torch.arange(self.window - 1, device=place.device)
        old = torch.where(number < self.sinks, place, place - before + self.window - 1)
        in_block = slots + valid.shape[1] - new + place - before
        filled = place >= 0
        return torch.where(filled, torch.where(place < before, old, in_block), 0), filled

    @contextmanager
    def _attending(self, run: _Run) -> Iterator[None]:
        """While it lasts, the wrapped model's attention is `_attention`, and its own rotary embedding does nothing."""
        config, rotary = self.model.config, self.model.base_model.rotary_emb
        as_is = rotary.register_forward_hook(lambda _, args, out: (torch.ones_like(out[0]), torch.zeros_like(out[1])))
        was, token = config._attn_implementation, _RUN.set(run)
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = was
            _RUN.reset(token)
            as_is.remove()

    @torch.no_grad()
    def check(self) -> None:
        """Compare a text that fits the window, with padding and in two pieces, with the wrapped class's own logits.

        Raises:
            UserError: they differ, or the class is no transformer with rotary positions.
        """
        name, training = type(self.model).__name__, self.model.training
        if not isinstance(getattr(self.model.base_model, "rotary_emb", None), nn.Module):
            raise UserError(
                f"the positions of a {name} are not rotary, so they cannot be counted inside a window; "
                "take a model with rotary positions (Llama, Qwen, Mistral, ...), or this one without a window"
            )
        self.model.eval()
        try:
            ids = torch.arange(6, device=next(self.parameters()).device)[None, -self.window :] % self.config.vocab
            padded, valid = F.pad(ids, (1, 0)), F.pad(torch.ones_like(ids), (1, 0)).bool()
            expected = self.model(ids).logits
            first, state = self(padded[:, :-2], valid=valid[:, :-2])
            ours = torch.cat([first[:, 1:], self(ids[:, -2:], state)[0]], 1)
            right = (ours - expected).abs().max() < 2e-2 * expected.abs().max()  # rounding is far below
            what = "its logits differ"
        except Exception as error:  # a class of another kind fails in its own way
            right, what = False, reason(error)
        self.model.train(training)
        if not right:
            raise UserError(
                f"a {name} cannot be given a window ({what}); take a plain transformer with rotary positions "
                "(Llama, Qwen, Mistral, ...), or this one without a window"
            )

    # The state

    def blank_state(self, batch: int) -> RecurrentState:
        """The state before the first token."""
        _, state = self._read(
            torch.zeros(batch, 1, dtype=torch.long, device=next(self.parameters()).device), None, None
        )
        return self.state_of({name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()})

    def state_features(self, state):
        """For every layer, the mean of the values that are held, and the latest token's value."""
        held = (self._slots(state.tensors["seen"][:, None]) >= 0).sum(1).clamp(min=1)[:, None, None]
        features = []
        for name, tensor in state.tensors.items():
            if name.endswith("values"):
                features += [tensor.float().sum(2) / held, tensor[:, :, -1].float()]
        return torch.cat([f.flatten(1) for f in features], 1)

    def combine_states(self, states, weights):
        raise UserError(f"the state of a {type(self).__name__} is a list of tokens, which cannot be added to another")


# Attention, while a WindowTransformer runs


@dataclass
class _Run:
    """What every layer of one run needs.

    Attributes:
        before, after: the state's keys and values; each layer adds its own to `after`, if it is to be kept.
        sinks: how many columns, on the left, hold sinks.
        here: turns the block's queries and keys; inside: its queries, for the sinks; there: the keys in the slots.
        see: (B, 1, T, C), which column each token sees.
        sources: of every slot afterwards, see `WindowTransformer._sources`; None: nothing is kept.
    """

    before: dict[str, Tensor]
    sinks: int
    here: Turn
    inside: Turn
    there: Turn
    see: Tensor
    sources: tuple[Tensor, Tensor] | None

    def __post_init__(self):
        self.after: dict[str, Tensor] = {}

    def joined(self, name: str, new: Tensor) -> Tensor:
        """A layer's keys or values of all columns (B, K, C, N); what the next token may see of them is kept."""
        columns = torch.cat([self.before[name], new], 2) if name in self.before else new
        if self.sources is not None:
            source, filled = (each[:, None, :, None] for each in self.sources)
            source = source.expand(-1, columns.shape[1], -1, columns.shape[3])
            self.after[name] = columns.gather(2, source).masked_fill(~filled, 0.0)
        return columns


_NAME = "prosg_window"

_RUN: ContextVar[_Run] = ContextVar(_NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Replaces a class's eager attention: query (B, H, T, N), key and value (B, K, T, N), none of them turned yet."""
    if softcap is not None or s_aux is not None:
        raise UserError(f"a {type(module).__name__} caps its scores or has sinks of its own")
    run, layer, size = _RUN.get(), module.layer_idx, query.shape[-1]
    turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
    held = run.joined(f"{layer}.keys", key).split([run.see.shape[-1] - key.shape[2], key.shape[2]], 2)
    values = run.joined(f"{layer}.values", value)
    keys = torch.cat([_turned(turn, held[0], run.there), _turned(turn, held[1], run.here)], 2)

    def scores(positions: Turn, keys: Tensor) -> Tensor:  # (B, K, H / K * T, N) @ (B, K, N, C)
        rows = _turned(turn, query, positions).reshape(len(query), keys.shape[1], -1, size)
        return (rows @ keys.mT).view(*query.shape[:3], -1)

    weights = scores(run.here, keys)
    if run.sinks:
        near = scores(run.inside, keys[:, :, : run.sinks])
        weights = torch.cat([near, weights[..., run.sinks :]], -1)
    weights = weights * (size**-0.5 if scaling is None else scaling)
    weights = weights.masked_fill(~run.see, torch.finfo(weights.dtype).min)
    weights = weights.softmax(-1, dtype=torch.promote_types(weights.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    out = weights.reshape(len(query), values.shape[1], -1, weights.shape[-1]) @ values
    return out.view(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


def _turned(turn, x: Tensor, positions: Turn) -> Tensor:
    """x (B, H, T, N) under the class's own rotary embedding; of N, only as many as it turns."""
    part, rest = x.split([positions[0].shape[-1], x.shape[-1] - positions[0].shape[-1]], -1)
    part = turn(part, part[:, :1], *positions)[0]
    return torch.cat([part, rest], -1) if rest.shape[-1] else part


AttentionInterface.register(_NAME, _attention)
