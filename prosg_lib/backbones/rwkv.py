"""What the generations of RWKV have in common: token shift, blocks that hand on a state, the author's weight files.

Module names are those of the author's checkpoints, so that their .pth files load as they are.

Glossary of shapes: B batch, T time, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from prosg_lib.backbones.base import LanguageModel, check_batch
from prosg_lib.backbones.state import RecurrentState

BlockState = dict[str, Tensor]
"""One block's state: name -> (B, ...)."""


def shifted(x: Tensor, last: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The previous token's vector at every position: (B, T, D), `last` (B, D) before the first; and x with padding
    replaced by `last`, so that the first valid token finds there what came before it."""
    if valid is not None:
        x = torch.where(valid[..., None], x, last[:, None])
    return torch.cat([last[:, None], x[:, :-1]], 1), x


def lerps(start: Tensor, end: Tensor, *weights: Tensor) -> Iterator[Tensor]:
    """start + weight (end - start) with each weight (D,) in turn; each is made when it is asked for.

    It and `squared_relu` are functions that a TorchFunctionMode can take over, as those of PyTorch are (see `twice`).
    """
    if has_torch_function((start,)):
        return handle_torch_function(lerps, (start,), start, end, *weights)
    return (torch.lerp(start, end, weight) for weight in weights)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, the activation of every RWKV's feed-forward part."""
    if has_torch_function((x,)):
        return handle_torch_function(squared_relu, (x,), x)
    x = torch.relu(x)  # what came in is not held
    return x.square()


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and of the sums in them: float32 next to half precision."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class ResidualBlock(nn.Module):
    """Two norms, and what they lead to: a mix over time and one over channels. The first has the embedding's norm, too.

    Attributes:
        mixes: (config, layer) -> the time mix, and the same for the channel mix; for subclasses.
    """

    mixes: tuple[Callable[..., nn.Module], Callable[..., nn.Module]]

    def __init__(self, config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att, self.ffn = (mix(config, layer) for mix in self.mixes)


class RWKV(LanguageModel):
    """Embedding, blocks and read-out. A generation says what its blocks are and how they follow each other.

    Args:
        config: has vocab, width and layers.
        block: (config, layer) -> the block.
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
    def through_blocks(
        self, x: Tensor, before: list[BlockState | None], valid: Tensor | None
    ) -> tuple[Tensor, list[BlockState]]:
        """x (B, T, D) behind the last block, and the state of every block after the last token."""

    def step_through(self, ids, state=None, valid=None):
        check_batch(ids, state)
        x, before = self.embed(ids), [None] * self.config.layers
        if state is not None:
            given = {n: t.to(x.dtype if "shift" in n else t.dtype).unbind(1) for n, t in state.tensors.items()}
            before = [dict(zip(given, tensors, strict=True)) for tensors in zip(*given.values(), strict=True)]
        x, after = self.through_blocks(x, before, valid)
        stacked = {n: torch.stack([s[n] for s in after], 1).to(sum_dtype(self.emb.weight)) for n in after[0]}
        return self.ln_out(x), RecurrentState(stacked)

    def read_out(self, hidden):
        return self.head(hidden)

    def embed(self, ids):
        return self.blocks[0].ln0(self.emb(ids))

    def editable(self):
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("blocks.")
        }
