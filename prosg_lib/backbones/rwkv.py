"""What RWKV-4 and RWKV-7 share: the token shift, the activation, and a model around a stack of blocks.

Module names are those of the author's checkpoints (`blocks.0.att.key`, ...), so that their .pth files load as they are.

Glossary of shapes: B batch, T time, D width, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.overridable import overridable
from prosg_lib.backbones.state import RecurrentState, state_dtype

BlockState = dict[str, Tensor]
"""One block's state: name -> (B, ...)."""


def token_shift(x: Tensor, last: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The previous token's vector at every position.

    Args:
        x: (B, T, D).
        last: vector of the token before the first, (B, D).
        valid: (B, T), False at left padding; None: all valid.
    Returns:
        The previous vectors (B, T, D), and x with padding replaced by `last`, so that the first valid token finds there
        what came before it.
    """
    if valid is not None:
        x = torch.where(valid[..., None], x, last[:, None])
    return torch.cat([last[:, None], x[:, :-1]], 1), x


@overridable
def interpolate(start: Tensor, end: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """start + weight (end - start), once for each weight (D,)."""
    return tuple(torch.lerp(start, end, weight) for weight in weights)


@overridable
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, the activation of RWKV's channel mix."""
    return torch.relu(x).square()


class RWKV(LanguageModel):
    """Embedding, blocks and output head. A generation adds its blocks, and how they follow each other.

    Args:
        config: has vocab, width and layers.
        block: (config, layer) -> the block; the first has the embedding's norm, ln0.
    """

    short_term = ("shift",)

    def __init__(self, config, block: Callable[..., nn.Module]):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-2, 1e-2)

    @abstractmethod
    def blank_state(self, batch: int) -> RecurrentState:
        """The state before the first token."""

    @abstractmethod
    def run_blocks(
        self, x: Tensor, before: list[BlockState | None], valid: Tensor | None
    ) -> tuple[Tensor, list[BlockState]]:
        """Output of the last block, (B, T, D), and the state of every block after the last token."""

    def step_through(self, ids, state=None, valid=None):
        self.check_state(ids, state)
        x, before = self.embed(ids), [None] * self.config.layers
        if state is not None:  # (B, L, ...) of every name -> a dict of (B, ...) for every layer
            given = {n: t.to(x.dtype if "shift" in n else t.dtype).unbind(1) for n, t in state.tensors.items()}
            before = [dict(zip(given, tensors, strict=True)) for tensors in zip(*given.values(), strict=True)]
        x, after = self.run_blocks(x, before, valid)
        stacked = {n: torch.stack([s[n] for s in after], 1).to(state_dtype(self.emb.weight)) for n in after[0]}
        return self.ln_out(x), self.state_of(stacked)

    def read_out(self, hidden):
        return self.head(hidden)

    def embed(self, ids):
        return self.blocks[0].ln0(self.emb(ids))

    def editable(self):
        maps = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return {name: module for name, module in maps.items() if name.startswith("blocks.")}
