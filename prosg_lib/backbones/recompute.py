"""Activation checkpointing: in training, blocks keep their inputs only and run again in the backward pass.

It saves memory and costs one more forward pass of the blocks. Source: Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost" (arXiv 1604.06174), by `torch.utils.checkpoint`. The plain forward pass is the reference: a test
compares gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.errors import UserError


@contextmanager
def recomputed(lm: LanguageModel) -> Iterator[None]:
    """Context manager: the model's blocks keep only their inputs, and the backward pass recomputes the rest.

    Forward and backward pass must both run inside. A delta that is applied in the forward pass (`deltas.applying`) is
    applied in the recomputation too, even if it has been removed by then. First derivatives only.

    Raises:
        UserError: the model's blocks have side effects. The recurrent classes of `transformers` write their state while
            they run, so a second run would continue from the end.
    """
    if not isinstance(lm, RWKV):
        from prosg_lib.backbones.hub_transformer import CausalTransformer  # transformers takes seconds to import

        if not isinstance(lm, CausalTransformer):
            raise UserError(f"the blocks of a {type(lm).__name__} cannot be run again; train without recompute")
    blocks = next(module for module in lm.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        block.forward = _checkpointed(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the method of its class is visible again


def _checkpointed(block: nn.Module, forward: Callable) -> Callable:
    def run(*args, **named):
        hooks = {module: module._forward_hooks.copy() for module in block.modules()}
        contexts = lambda: (nullcontext(), _hooked(hooks))  # noqa: E731
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **named)

    return run


@contextmanager
def _hooked(hooks: dict[nn.Module, dict]) -> Iterator[None]:
    """Context manager: modules have these forward hooks and no others."""
    now = {module: module._forward_hooks for module in hooks}
    for module, then in hooks.items():
        module._forward_hooks = then
    try:
        yield
    finally:
        for module, own in now.items():
            module._forward_hooks = own
