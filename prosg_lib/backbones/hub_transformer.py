"""Causal transformers of `transformers` (GPT-2, Llama, Qwen3 and other classes) behind the recurrent models' interface.

They look back at all that they have read, so their "state" is all of it, and grows. `CausalTransformer` runs everything
again, which is simple and right, and slow for long texts: it is for the gradient step, whose texts are short. For long
ones `LookingBack` keeps keys and values. Attention is eager, because fused attention cannot be differentiated twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import cached_file

from prosg_lib.backbones.base import LanguageModel, check_batch
from prosg_lib.backbones.hub import HubModel, pretrained
from prosg_lib.backbones.hub_recurrent import Recurrent
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import TransformerConfig
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer


class CausalTransformer(HubModel):
    """A causal language model of `transformers`. `forward`, `generate`: see `LanguageModel`."""

    grows = True

    def step_through(self, ids, state=None, valid=None):
        time = ids.shape[1]
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        check_batch(ids, state)
        if state is not None:
            ids = torch.cat([state.tensors["ids"], ids], 1)
            valid = torch.cat([state.tensors["valid"], valid], 1)
        body = self.model.base_model
        hidden = body(
            input_ids=ids,
            attention_mask=_causal(valid, next(body.parameters()).dtype),
            position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -time:], RecurrentState({"ids": ids, "valid": valid})

    def looking_back(self) -> LookingBack:
        """The same model, its weights shared, with keys and values for a state: for long texts."""
        lm = LookingBack(self.model)
        lm.tokenizer = self.tokenizer
        return lm.train(self.training)


class LookingBack(Recurrent):
    """A causal transformer with all keys and values so far as its state: what a recurrent model is compared with.

    It says what `CausalTransformer` says, has its fingerprint, and reads every token once.
    """

    reads_on = pads = True
    state_features = LanguageModel.state_features  # it has none of a fixed size


def _causal(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), added to the scores: nothing looks ahead or at padding; padding looks at itself, to be finite."""
    time = valid.shape[1]
    see = torch.ones(time, time, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None]
    see = see | torch.eye(time, dtype=torch.bool, device=valid.device)
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill(~see, torch.finfo(dtype).min)


def new_llama(config: TransformerConfig) -> CausalTransformer:
    """A fresh transformer of the Llama class, input and output embeddings tied, queries and keys with a bias.

    Two heads of the first layer start by looking at the token before (`_look_back`), which every block of RWKV does by
    its token shift. To copy, a transformer must find that first: so it needs 200 steps, and else more than 1,000.
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
    _look_back(model.model.layers[0].self_attn, model.model.rotary_emb, heads=min(2, config.heads))
    return CausalTransformer(model)


@torch.no_grad()
def _look_back(attention: nn.Module, rotary: nn.Module, heads: int, strength: float = 4.0) -> None:
    """Biases with which rotary heads attend to the place before: the query is the key, turned back by one place."""
    size = attention.head_dim
    key = torch.zeros(size)
    key[: max(1, 3 * size // 16)] = strength  # the fastest frequencies tell neighbours apart
    cos, sin = (turn[0, 1] for turn in rotary(key[None, None].expand(1, 2, -1), torch.tensor([[0, 1]])))
    query = key * cos - torch.cat([-key[size // 2 :], key[: size // 2]]) * sin
    for bias, value in ((attention.q_proj.bias, query), (attention.k_proj.bias, key)):
        bias[: heads * size] = value.repeat(heads)
    for linear in (attention.v_proj, attention.o_proj):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)


def load_transformer(source: str | Path) -> CausalTransformer:
    """A pretrained causal transformer by hub id or folder, float32, with its tokenizer.json where there is one.

    Raises:
        UserError: the hub cannot be reached, or there is no such model.
    """
    lm = CausalTransformer(pretrained(source)).eval()
    lm.tokenizer = _tokenizer(source)
    return lm


def _tokenizer(source: str | Path) -> Tokenizer | None:
    try:
        path = cached_file(source, "tokenizer.json")
    except OSError:
        return None
    return load_tokenizer(path)
