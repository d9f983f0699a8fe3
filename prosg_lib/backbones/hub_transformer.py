"""Causal transformers of `transformers` (GPT-2, Llama, Qwen3 and others) behind the interface of recurrent models.

A transformer looks back at everything it has read, so its "state" is all of that, and grows. `CausalTransformer` runs
all tokens again, which is simple and slow for long texts: it is for gradient steps, whose texts are short. For long
texts, `CachedTransformer` keeps keys and values, and `hub_window.WindowTransformer` as many as a window has. Where only
later blocks are changed, `LaterBlocks` keeps what the earlier ones make of a text. Attention is eager, since fused
attention has no second derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub import HubModel
from prosg_lib.backbones.hub_recurrent import Recurrent
from prosg_lib.backbones.hub_window import SINKS, WindowTransformer
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.errors import UserError


class CausalTransformer(HubModel):
    """A causal language model of `transformers`. `forward`, `generate`: see `LanguageModel`."""

    state_grows = True

    def step_through(self, ids, state=None, valid=None):
        time = ids.shape[1]
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        self.check_state(ids, state)
        if state is not None:
            ids = torch.cat([state.tensors["ids"], ids], 1)
            valid = torch.cat([state.tensors["valid"], valid], 1)
        return self._read(ids, valid)[:, -time:], self.state_of({"ids": ids, "valid": valid})

    def _read(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Final hidden states of whole texts, (B, T, D)."""
        return _run(self.model.base_model, valid, input_ids=ids)

    def blank_state(self, batch: int) -> RecurrentState:
        """The state before the first token."""
        ids = torch.zeros(batch, 0, dtype=torch.long, device=next(self.parameters()).device)
        return self.state_of({"ids": ids, "valid": ids.bool()})

    @torch.no_grad()
    def check(self) -> None:
        """Compare a padded batch with each text alone, as the wrapped class itself reads it.

        Raises:
            UserError: they differ, or the class does not take padding and positions: it is not a plain transformer; or
                it makes its logits in a way of its own.
        """
        rows = [[1, 2, 3, 4, 5], [3, 1]]
        try:
            ids, valid = self.encode_prompts(rows)
            hidden, _ = self.step_through(ids, None, valid)
            alone = [self.model.base_model(ids[i : i + 1, -len(row) :]).last_hidden_state for i, row in enumerate(rows)]
            gaps = [(many[-one.shape[1] :] - one[0]).abs().max() for many, one in zip(hidden, alone, strict=True)]
            right = max(gaps) < 1e-2 * max(one.abs().max() for one in alone)  # rounding is far below
        except Exception:  # a class of another kind fails in its own way
            right = False
        if not right:
            raise UserError(
                f"{type(self.model).__name__} does not read padded text as a plain transformer does, and has no "
                "adapter here; docs/using.md shows how to write one (Any recurrent model)"
            )
        self.check_read_out()

    def with_kv_cache(self) -> CachedTransformer:
        """The same model, sharing its weights, with keys and values as its state: for long texts."""
        lm = CachedTransformer(self.model)
        return self._shared(lm)

    def with_window(self, window: int, sinks: int = SINKS) -> WindowTransformer:
        """The same model, sharing its weights, with a memory of fixed size: each token sees `window` tokens, the first
        `sinks` of the text and the latest ones.

        Raises:
            UserError: window or sinks are out of range, or the class cannot have a window.
        """
        return self._shared(WindowTransformer(self.model, window, sinks))

    def with_later_blocks(self, names: Collection[str]) -> LaterBlocks:
        """The same model, sharing its weights, for changes of these maps alone: `LaterBlocks`.

        Raises:
            UserError: none of the maps is in a block, or the class's blocks cannot be run by themselves.
        """
        return self._shared(LaterBlocks(self.model, names))

    def _shared(self, lm: HubModel) -> HubModel:
        lm.tokenizer, lm.ends = self.tokenizer, self.ends
        return lm.train(self.training)


class CachedTransformer(Recurrent):
    """A causal transformer whose state is the keys and values of all tokens so far (a KV cache).

    It has the same logits and fingerprint as the `CausalTransformer`, and reads every token once.
    """

    continues_from_state = handles_padding = True
    state_features = LanguageModel.state_features  # there is none of a fixed size


class LaterBlocks(CausalTransformer):
    """A causal transformer of which only the later blocks are changed or differentiated: what the blocks in front of
    them make of a text is computed once, without a gradient, and kept.

    Texts are known by their tokens, and `KEPT` of them are kept, the latest ones. Each is read alone, so that no number
    depends on the batch that it first came in.

    Args:
        names: of the maps that will be changed. The blocks in front of the first of them stay as they are.
    """

    KEPT = 3000
    supports_vmap = False  # texts are looked up by their tokens

    def __init__(self, model: PreTrainedModel, names: Collection[str]):
        super().__init__(model)
        body, maps = model.base_model, super().editable()
        blocks, changed = getattr(body, "layers", ()), {maps[name] for name in names if name in maps}
        numbers = [i for i, block in enumerate(blocks) if not changed.isdisjoint(block.modules())]
        if not numbers or not hasattr(body, "norm"):
            raise UserError(
                f"none of {', '.join(names) or 'no maps'} is in a block of this {type(model).__name__} that can be "
                "run by itself; take the model without later blocks"
            )
        first = numbers[0]
        later = set(blocks[first:].modules())
        self._later = {name for name, module in maps.items() if module in later}
        self._parts = _part(body, blocks[:first], nn.Identity()), _part(body, blocks[first:], body.norm)
        self._kept = lru_cache(self.KEPT)(self._before)
        self._check_parts()

    def _read(self, ids, valid):
        rows = [tuple(row[here].tolist()) for row, here in zip(ids, valid, strict=True)]
        before = torch.cat([self._kept(row) for row in rows if row])
        inputs = before.new_zeros(*ids.shape, before.shape[-1])
        inputs[valid] = before
        return _run(self._parts[1], valid, inputs_embeds=inputs)

    @torch.no_grad()
    def _before(self, row: tuple[int, ...]) -> Tensor:
        """What the later blocks get of a text, (T, D)."""
        ids = torch.tensor([row], device=next(self.parameters()).device)
        return _run(self._parts[0], torch.ones_like(ids, dtype=torch.bool), input_ids=ids)[0]

    @torch.no_grad()
    def _check_parts(self) -> None:
        ids = self._some_ids()
        ours, theirs = self.hidden_states(ids), super()._read(ids, torch.ones_like(ids, dtype=torch.bool))
        if not (ours - theirs).abs().max() < 1e-2 * theirs.abs().max():
            raise UserError(f"the blocks of a {type(self.model).__name__} cannot be run in two parts")

    def editable(self):
        """Those of the later blocks."""
        return {name: module for name, module in super().editable().items() if name in self._later}

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._kept.cache_clear()
        return self


def _part(body: nn.Module, blocks: nn.ModuleList, norm: nn.Module) -> nn.Module:
    """The body with only some of its blocks, which it shares."""
    part = copy.copy(body)
    part._modules = body._modules | {"layers": blocks, "norm": norm}
    return part


def _run(body: nn.Module, valid: Tensor, **inputs: Tensor) -> Tensor:
    """Hidden states (B, T, D) of whole texts, or of their embeddings."""
    return body(
        attention_mask=_causal(valid, next(body.parameters()).dtype),
        position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        **inputs,
    ).last_hidden_state


def _causal(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to the scores, (B, 1, T, T): no position sees later ones or padding; padding sees itself, to be finite."""
    time = valid.shape[1]
    see = torch.ones(time, time, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]
    see = see | torch.eye(time, dtype=torch.bool, device=valid.device)
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill(~see, torch.finfo(dtype).min)


def new_llama(config: TransformerConfig) -> CausalTransformer:
    """A newly initialised Llama, with tied input and output embeddings, and biases on queries and keys.

    Two heads of the first layer are initialised to attend to the previous token, which every block of RWKV does by its
    token shift. Copying builds on that: a transformer learns it in 200 steps with these heads, and in more than 1,000
    without them.
    """
    sizes = LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager")
    for name, bias in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(bias)
    _attend_to_previous(model.model.layers[0].self_attn, model.model.rotary_emb, heads=min(2, config.heads))
    return CausalTransformer(model)


@torch.no_grad()
def _attend_to_previous(attention: nn.Module, rotary: nn.Module, heads: int, strength: float = 4.0) -> None:
    """Set biases so that rotary heads attend to the previous token: the query is the key, rotated back by one place."""
    size = attention.head_dim
    key = torch.zeros(size)
    key[: max(1, 3 * size // 16)] = strength  # the fastest frequencies tell neighbours apart
    cos, sin = (turn[0, 1] for turn in rotary(key[None, None].expand(1, 2, -1), torch.tensor([[0, 1]])))
    query = key * cos - torch.cat([-key[size // 2 :], key[: size // 2]]) * sin
    for bias, value in ((attention.q_proj.bias, query), (attention.k_proj.bias, key)):
        bias[: heads * size] = value.repeat(heads)
    for linear in (attention.v_proj, attention.o_proj):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
