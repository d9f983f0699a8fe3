"""The project's interface to recurrent and hybrid classes of `transformers`: what all adapters share.

These classes keep their state in a cache that they write into, and many are right only when used as the library's own
`generate` does: a whole text from a blank cache, then one token at a time. With no more than that, `Recurrent` reads
batches from any states, texts in pieces, and padding. An adapter (`hub_families.py`) declares what else its class gets
right, or works around what it gets wrong.

Glossary of shapes: B batch, T tokens, S columns of keys and values, D width.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prosg_lib.backbones.hub import HubModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.errors import UserError

READS = 4
"""Directions along which `state_features` reads a matrix of the state; a whole one would be millions of numbers."""

ADAPTERS: dict[str, type[Recurrent]] = {}
"""The adapter of each class, by the model_type in its config.json. `hub_families` registers the project's own."""


def register(*kinds: str) -> Callable[[type[Recurrent]], type[Recurrent]]:
    """Class decorator: `load_model` reads these model types with that adapter from now on. For OLMo hybrid, say::

    import prosg_lib as prosg
    from prosg_lib.backbones.hub_recurrent import Recurrent, register

    @register("olmo_hybrid")
    class OlmoHybrid(Recurrent):
        continues_from_state = handles_padding = True  # what the class gets right; without this line slower, not wrong

    lm = prosg.load_model("olmo-hybrid")  # a folder, or a hub id
    lm.check()  # against the class itself, one sequence and one token at a time
    """

    def remember(adapter: type[Recurrent]) -> type[Recurrent]:
        ADAPTERS.update(dict.fromkeys(kinds, adapter))
        return adapter

    return remember


class Recurrent(HubModel):
    """A recurrent or hybrid language model of `transformers`. `forward`, `generate`: see `LanguageModel`.

    Its state, by layer: "3.conv" (B, channels, kernel), "3.state" (B, ...) and, in attention layers, "3.keys" and
    "3.values" (B, heads, S, size), the latest tokens on the right. With those comes "seen" (B,), the number of tokens
    each sequence has read: of the S columns, the last `seen` are its own, and the others padding. Only these grow.

    Gradients flow through the state, unless compiled kernels prevent it (see `kernels`).

    Attributes:
        continues_from_state: whether the class is right for several tokens from a state. If not, it is given one token
            at a time.
        handles_padding: whether the class, given an attention mask, is right for left padding before a blank state. If
            not, and always from a state, a padded batch is read in as many passes as it has different lengths.
        kernels: packages whose kernels the class uses where they are installed. They have no second derivative, and
            for one token from a state they write the state without a gradient.
    """

    supports_vmap = False  # these classes write into caches, and branch on values
    continues_from_state = False
    handles_padding = False
    kernels: tuple[str, ...] = ("causal_conv1d", "mamba_ssm", "fla")
    short_term = (".conv",)

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._takes = set(inspect.signature(model.base_model.forward).parameters)
        self.apply_workarounds()
        self.check_read_out()
        self._editable = self._called_once()
        self.state_grows = any(name.endswith("keys") for name in self.blank_state(1).tensors)

    def apply_workarounds(self) -> None:
        """Replace what the wrapped model gets wrong; for subclasses."""

    # Reading

    def step_through(self, ids, state=None, valid=None):
        self.check_state(ids, state)
        if valid is None or (state is None and self.handles_padding):
            return self._read(ids, state, valid)
        hidden = []
        for piece, active in _pieces(valid):
            out, after = self._read(ids[:, piece], state, None)
            state = _kept(after, state, active)
            hidden.append(out)
        return torch.cat(hidden, 1), state

    def _read(self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None) -> tuple[Tensor, RecurrentState]:
        """Every row reads every token, except for padding before a blank state."""
        if state is None or self.continues_from_state:
            return self.run_body(ids, state, valid)
        hidden = []
        for token in ids.split(1, 1):
            out, state = self.run_body(token, state, None)
            hidden.append(out)
        return torch.cat(hidden, 1), state

    def run_body(
        self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None
    ) -> tuple[Tensor, RecurrentState]:
        """Final hidden states (B, T, D) and the state, from one run of the wrapped model without its head.

        Args:
            ids: (B, T); one token, or any number if `state` is None or the adapter has `continues_from_state`.
            valid: as in `forward`; given only if `state` is None and the adapter has `handles_padding`.
        """
        cache = self._cache(state)
        where, seen = self._where(ids, state, valid, cache)
        name = "cache_params" if "cache_params" in self._takes else "past_key_values"
        keeping = _saving_copies(_tensors(cache)) if state is not None and torch.is_grad_enabled() else nullcontext()
        with keeping:
            body = self.model.base_model(input_ids=ids, use_cache=True, **{name: cache}, **where)
        if state is not None and ids.shape[1] == 1 and torch.is_grad_enabled():
            self._check_gradient([body.last_hidden_state, *state.tensors.values()])
        return body.last_hidden_state, self.state_of(_tensors(cache) | seen)

    def check_second_order(self):
        if installed := self._installed():  # autograd would silently omit what goes through them
            raise UserError(
                f"a {type(self).__name__} has no second derivative with the kernels of {', '.join(installed)}; "
                "uninstall them, or take the step with second_order=False"
            )

    def _installed(self) -> list[str]:
        return [name for name in self.kernels if find_spec(name)]

    def _check_gradient(self, tensors: list[Tensor]) -> None:
        if any(t.requires_grad for t in tensors) and (installed := self._installed()):
            raise UserError(
                f"one token from a state has no gradient with the kernels of {', '.join(installed)}; "
                "read several tokens at once, or under torch.no_grad()"
            )

    def _cache(self, state: RecurrentState | None) -> DynamicCache:
        """The library's cache, holding the state."""
        cache = DynamicCache(config=self.model.config)
        for name, tensor in ({} if state is None else state.tensors).items():
            match = re.fullmatch(r"(\d+)\.(conv|state|keys)(\d*)", name)
            if match is None:
                continue
            layer, part, which = int(match[1]), match[2], int(match[3] or 0)
            if part == "conv":
                cache.update_conv_state(tensor, layer, which)
            elif part == "state":
                cache.update_recurrent_state(tensor, layer, which)
            else:
                cache.update(tensor, state.tensors[f"{layer}.values"], layer)
        return cache

    def _where(self, ids, state, valid, cache) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Arguments that tell the class about padding and positions, where it has any; and the state's "seen"."""
        if "position_ids" not in self._takes:
            return {"attention_mask": valid}, {}
        new = torch.ones_like(ids) if valid is None else valid.long()
        seen = ids.new_zeros(len(ids)) if state is None else state.tensors["seen"]
        columns = max((t.shape[2] for name, t in _tensors(cache).items() if name.endswith("keys")), default=0)
        held = torch.arange(columns, device=ids.device) >= columns - seen[:, None]
        where = {
            "attention_mask": torch.cat([held.long(), new], 1),
            "position_ids": (seen[:, None] + new.cumsum(1) - 1).clamp(min=0),
        }
        return where, {"seen": seen + new.sum(1)}

    @torch.no_grad()
    def check(self) -> None:
        """Compare what the adapter declares with the class itself, given one sequence and one token at a time.

        The model should be in float32 and in evaluation mode.

        Raises:
            UserError: they differ; the message names the declaration that is wrong.
        """
        rows = torch.randint(self.config.vocab, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [row[-length:] for row, length in zip(rows, (12, 5, 9), strict=True)]
        ids, valid = self.encode_prompts(rows)
        expected = torch.zeros(*ids.shape, self.config.width, device=ids.device)
        for number, row in enumerate(rows):
            state = None
            for place, token in enumerate(row, ids.shape[1] - len(row)):
                hidden, state = self.run_body(ids.new_tensor([[token]]), state, None)
                expected[number, place] = hidden[0, 0]

        def compare(what: str, hidden: Tensor, valid: Tensor) -> None:
            gap = hidden - expected[: len(hidden), -hidden.shape[1] :]
            gap = float(gap[valid].abs().max() / expected.abs().max())
            if not gap < 1e-2:  # rounding is far below, an error far above
                raise UserError(f"{type(self).__name__} is wrong by {gap:.1g} of the largest number for {what}")

        whole, _ = self.step_through(ids[:1])
        compare("whole texts from a blank state; the class needs `apply_workarounds`", whole, valid[:1])
        start, state = self.step_through(ids[:1, :3])
        rest, _ = self.step_through(ids[:1, 3:], state)
        pieces = torch.cat([start, rest], 1)
        compare("several tokens from a state; leave `continues_from_state` False", pieces, valid[:1])
        padded, _ = self.step_through(ids, None, valid)
        compare("padding before a blank state; leave `handles_padding` False", padded, valid)

    # The state

    @torch.no_grad()
    def blank_state(self, batch: int) -> RecurrentState:
        """The state before the first token."""
        weight = next(self.parameters())
        _, state = self.run_body(torch.zeros(batch, 1, dtype=torch.long, device=weight.device), None, None)
        tensors = {n: t[:, :, :0] if n.endswith(("keys", "values")) else t for n, t in state.tensors.items()}
        return self.state_of({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})

    def state_features(self, state):
        """For every layer, the last column of the convolution, and the recurrent state read along `READS` cosines.

        A recurrent state is one number per channel, or a row of them (in Mamba a channel's state, in Qwen3-Next the
        values stored in the direction of a key); the cosines give the row's mean and three coarse differences. Keys
        and values have no fixed size and are left out.
        """
        features = []
        for name, tensor in state.tensors.items():
            if ".conv" in name:
                features.append(tensor[..., -1])
            elif ".state" in name:
                features.append(read_along(tensor) if tensor.ndim > 2 else tensor)
        return torch.cat([f.flatten(1).float() for f in features], 1)

    # Maps

    @property
    def peft_refuses(self):
        """PEFT refuses a map wherever one of the kernels uses its weight without calling it."""
        return ("out_proj",) if self.config.kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1") else ()

    def editable(self):
        """Every linear map that is called exactly once per pass, on all tokens, by its name in the wrapped model.

        That excludes experts, which see only some tokens, maps that several layers share, and maps whose weight the
        class uses without calling them.
        """
        return {name: module for name, module in super().editable().items() if name in self._editable}

    @torch.no_grad()
    def _called_once(self) -> set[str]:
        """The names of those maps, observed in a pass over 2 sequences of 3 tokens."""
        shapes: dict[str, list] = {name: [] for name in super().editable()}
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: shapes[name].append(args[0].shape[:-1]))
            for name, module in super().editable().items()
        ]
        try:
            self.step_through(self._some_ids())
        finally:
            for handle in handles:
                handle.remove()
        return {name for name, seen in shapes.items() if seen == [(2, 3)]}


def read_along(tensor: Tensor) -> Tensor:
    """(..., N) -> (..., min(N, READS)), the coefficients of the slowest cosines (the first of a DCT-II)."""
    size = tensor.shape[-1]
    place = (torch.arange(size, device=tensor.device) + 0.5) / size
    cosines = torch.cos(math.pi * place[:, None] * torch.arange(min(size, READS), device=tensor.device))
    return tensor.float() @ cosines / size**0.5


def recurrent_state(cache: DynamicCache, layer: int) -> Tensor | None:
    """A layer's recurrent state, None before the first token; `DynamicCache.get_recurrent_state` of newer versions."""
    held = cache.layers[layer]
    return held.recurrent_states[0] if held.has_previous_state[0] else None


def _tensors(cache: DynamicCache) -> dict[str, Tensor]:
    tensors = {}
    for number, layer in enumerate(cache.layers):
        for which in range(getattr(layer, "number_of_states", 0)):
            for part, held in (("conv", layer.conv_states), ("state", layer.recurrent_states)):
                if layer.has_previous_state[which] and held[which] is not None:
                    tensors[f"{number}.{part}{which or ''}"] = held[which]
        if isinstance(layer, DynamicLayer) and layer.keys is not None:
            tensors |= {f"{number}.keys": layer.keys, f"{number}.values": layer.values}
    return tensors


def _pieces(valid: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A left-padded batch as pieces in time, in each of which a row is either all padding or all tokens (True)."""
    starts = sorted({0, *(valid.shape[1] - valid.sum(1)).tolist(), valid.shape[1]})
    for start, end in pairwise(starts):
        yield slice(start, end), valid[:, start]


def _kept(after: RecurrentState, before: RecurrentState | None, active: Tensor) -> RecurrentState:
    """The state after a piece for the rows that were active in it; for other rows the state before, or a blank one."""
    tensors = {}
    for name, new in after.tensors.items():
        old = torch.zeros_like(new) if before is None else before.tensors[name]
        if name.endswith(("keys", "values")):  # an inactive row's own are on the right
            old = F.pad(old, (0, 0, new.shape[2] - old.shape[2], 0))
        tensors[name] = torch.where(active.view(-1, *[1] * (new.ndim - 1)), new, old)
    if "seen" in tensors:
        longest = int(tensors["seen"].max())
        tensors = {
            n: t[:, :, max(0, t.shape[2] - longest) :] if n.endswith(("keys", "values")) else t
            for n, t in tensors.items()
        }
    return replace(after, tensors=tensors)


def _saving_copies(tensors: dict[str, Tensor]) -> saved_tensors_hooks:
    """Context manager: autograd saves copies of these tensors, because the library writes into them afterwards."""
    places = {t.untyped_storage().data_ptr() for t in tensors.values()}
    return saved_tensors_hooks(
        lambda t: t.clone() if t.untyped_storage().data_ptr() in places else t, lambda saved: saved
    )
