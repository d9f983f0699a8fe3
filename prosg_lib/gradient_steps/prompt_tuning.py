"""A prompt learned by gradient descent while its user waits: in the initial state, or in a LoRA adapter.

The loss is the prompt's own next-token loss, so nothing has to be trained beforehand. Adam scales every number by its
own gradients alone, so each prompt of a batch is learned as if it were alone.

Glossary of shapes: B batch, T tokens of the prompt, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import Factors, LowRankDelta, map_shape
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.generators.base import edited_maps
from prosg_lib.gradient_steps.one_step import context_nll


def tuned_state(
    lm: LanguageModel, ids: Tensor, valid: Tensor | None, state: RecurrentState, steps: int, lr: float
) -> RecurrentState:
    """An initial state per prompt from which the prompt is likelier than from `state`: state tuning as users of RWKV
    do it, on the prompt alone.

    Args:
        ids: the prompts, (B, T), left-padded where `valid` (B, T) is False.
        state: where tuning starts, one per prompt; the state after the prompt is a good choice. Never changed.
        steps, lr: of Adam. No steps give the same state.
    Raises:
        UserError: the state grows with the text, the model gives no gradient of its initial state, or no prompt has a
            second token.
        NotFinite: a loss or the tuned state is not finite.
    """
    start, names = lm.tunable_state(state)

    def losses_of(leaves: dict[str, Tensor]) -> Tensor:
        return context_nll(lm, ids, valid, replace(start, tensors=start.tensors | leaves))

    found = _descend(losses_of, {name: start.tensors[name] for name in names}, ids, steps, lr)
    return replace(start, tensors=start.tensors | found)


def fine_tuned(
    lm: LanguageModel, ids: Tensor, valid: Tensor | None, steps: int, lr: float, rank: int, endings: tuple[str, ...]
) -> LowRankDelta:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) per prompt, learned on it by Adam; U starts at zero.

    Args:
        ids: the prompts, (B, T), left-padded where `valid` (B, T) is False.
        steps, lr: of Adam. No steps give a change of zero.
        rank: of the adapter.
        endings: of the names of the maps that it changes.
    Returns:
        One delta per prompt. V is drawn from a fixed seed, so a prompt's delta does not depend on the batch.
    Raises:
        UserError: an ending matches no map, or no prompt has a second token.
        NotFinite: a loss or the adapter is not finite.
    """
    maps, drawn = edited_maps(lm, endings), torch.Generator().manual_seed(0)
    start = {}
    for name, module in maps.items():
        out, size = map_shape(module)
        v = torch.randn(size, rank, generator=drawn).to(module.weight) / size**0.5
        start[f"{name}.U"] = module.weight.new_zeros(len(ids), out, rank)
        start[f"{name}.V"] = v.expand(len(ids), -1, -1).contiguous()

    def delta_of(leaves: dict[str, Tensor]) -> LowRankDelta:
        return LowRankDelta({n: Factors(leaves[f"{n}.U"], leaves[f"{n}.V"]) for n in maps}, lm.fingerprint())

    def losses_of(leaves: dict[str, Tensor]) -> Tensor:
        with applied(lm, delta_of(leaves)):
            return context_nll(lm, ids, valid)

    return delta_of(_descend(losses_of, start, ids, steps, lr))


def _descend(
    losses_of: Callable[[dict[str, Tensor]], Tensor], start: dict[str, Tensor], ids: Tensor, steps: int, lr: float
) -> dict[str, Tensor]:
    """`start` after so many steps of Adam on the sum of the prompts' losses, (B,), detached."""
    if ids.shape[1] < 2:
        raise UserError("a prompt of one token has no next token to learn; give at least 2")
    with torch.enable_grad():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in start.items()}
        optimiser = torch.optim.Adam(leaves.values(), lr=lr)
        for step in range(steps):
            loss = losses_of(leaves).sum()
            if not torch.isfinite(loss):
                raise NotFinite(f"the loss of the prompts is {loss.item()} after {step} steps; lower the learning rate")
            # Of the leaves alone: the model's own weights get no gradient, whether or not they are frozen.
            gradients = [None]
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            if all(g is None for g in gradients):
                raise UserError("this model gives no gradient of what is tuned; use a plain PyTorch model, e.g. RWKV-4")
            for leaf, g in zip(leaves.values(), gradients, strict=True):
                leaf.grad = g
            optimiser.step()
    if not all(leaf.isfinite().all() for leaf in leaves.values()):
        raise NotFinite(f"what is tuned is no longer finite after {steps} steps; lower the learning rate")
    return {name: leaf.detach() for name, leaf in leaves.items()}
