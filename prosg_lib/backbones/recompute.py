"""Less memory for training: blocks that keep their inputs alone, and are run again in the backward pass.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); PyTorch's
`torch.utils.checkpoint` does it. It costs one more forward pass of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.errors import UserError


@contextmanager
def recomputed(lm: LanguageModel) -> Iterator[None]:
    """While it lasts, a graph through the model's blocks keeps of each its inputs, and the backward pass runs it again.

    Both passes must lie in it. A delta that the forward pass has (`lowrank.applied`) the second one has, too, though it
    is applied no more by then. First derivatives only.

    Raises:
        UserError: the model's blocks do more than calculate; those of `transformers`' recurrent classes write the state
            while they run, and would go on from the end.
    """
    if not isinstance(lm, RWKV | CausalTransformer):
        raise UserError(f"the blocks of a {type(lm).__name__} cannot be run again; leave out recompute")
    blocks = next(module for module in lm.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        block.forward = _run_again_later(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # that of its class is there again


def _run_again_later(block: nn.Module, forward: Callable) -> Callable:
    def run(*args, **named):
        hooks = {module: module._forward_hooks.copy() for module in block.modules()}
        contexts = lambda: (nullcontext(), _hooked(hooks))  # noqa: E731
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **named)

    return run


@contextmanager
def _hooked(hooks: dict[nn.Module, dict]) -> Iterator[None]:
    """While it lasts, modules have these hooks and no others."""
    now = {module: module._forward_hooks for module in hooks}
    for module, then in hooks.items():
        module._forward_hooks = then
    try:
        yield
    finally:
        for module, own in now.items():
            module._forward_hooks = own
