"""A prompt learned by gradient descent while its user waits: into the initial state, or into a LoRA adapter.

The loss is the prompt's own next-token loss and nothing else, so that nothing has to be trained before. Adam changes
every number by its own gradients alone, so each prompt of a batch is learned as if it were alone.

Glossary of shapes: B batch, T tokens of the prompt, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """A state to begin from, one a prompt, from which the prompt is likelier than from `state`.

    State tuning as users of RWKV do it, but on the prompt alone: only the initial state is learned, by Adam.

    Args:
        ids: the prompts, (B, T), left-padded where `valid` (B, T) is False.
        state: where tuning begins, one a prompt; that after the prompt is a good place. Never changed.
        steps: of Adam; 0 gives back the same state.
        lr: Adam's learning rate.
    Raises:
        UserError: the state grows with the text, the model gives no gradient of its initial state, or no prompt has a
            second token.
        NotFinite: a loss or gradient is not finite.
    """
    _check_length(ids)
    start, names = lm.tunable_state(state)

    def losses_of(leaves: dict[str, Tensor]) -> Tensor:
        return context_nll(lm, ids, valid, RecurrentState(start.tensors | leaves))

    found = _descended(losses_of, {name: start.tensors[name] for name in names}, steps, lr)
    return RecurrentState(start.tensors | found)


def fine_tuned(
    lm: LanguageModel, ids: Tensor, valid: Tensor | None, steps: int, lr: float, rank: int, endings: tuple[str, ...]
) -> LowRankDelta:
    """A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) for each prompt, learned on it by Adam; U starts at zero.

    Args:
        ids: the prompts, (B, T), left-padded where `valid` (B, T) is False.
        steps, lr: of Adam; no steps give a change of nothing.
        rank, endings: of the adapter, and of the names of the maps that it changes.
    Returns:
        One change a prompt. V is drawn from a seed of its own, so a prompt's change does not depend on the batch.
    Raises:
        UserError: no map ends so, or no prompt has a second token.
        NotFinite: a loss or gradient is not finite.
    """
    _check_length(ids)
    maps, drawn = edited_maps(lm, endings), torch.Generator().manual_seed(0)
    start = {}
    for name, module in maps.items():
        out, size = map_shape(module)
        v = torch.randn(size, rank, generator=drawn).to(module.weight) / size**0.5
        start[f"{name}.U"] = module.weight.new_zeros(len(ids), out, rank)
        start[f"{name}.V"] = v.expand(len(ids), -1, -1).contiguous()

    def change(leaves: dict[str, Tensor]) -> LowRankDelta:
        return LowRankDelta({n: Factors(leaves[f"{n}.U"], leaves[f"{n}.V"]) for n in maps}, lm.fingerprint())

    def losses_of(leaves: dict[str, Tensor]) -> Tensor:
        with applied(lm, change(leaves)):
            return context_nll(lm, ids, valid)

    return change(_descended(losses_of, start, steps, lr))


def _check_length(ids: Tensor) -> None:
    if ids.shape[1] < 2:
        raise UserError("a prompt of one token has no next token to learn from; give at least 2")


def _descended(
    losses_of: Callable[[dict[str, Tensor]], Tensor], start: dict[str, Tensor], steps: int, lr: float
) -> dict[str, Tensor]:
    """`start` after so many steps of Adam on the sum of the prompts' losses, (B,), detached."""
    with torch.enable_grad():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in start.items()}
        optimiser = torch.optim.Adam(leaves.values(), lr=lr)
        for step in range(steps):
            loss = losses_of(leaves).sum()
            if not torch.isfinite(loss):
                raise NotFinite(f"the loss of the prompts is {loss.item()} after {step} steps; take a smaller rate")
            slopes = _slopes(loss, list(leaves.values()))
            for leaf, slope in zip(leaves.values(), slopes, strict=True):
                leaf.grad = slope
            optimiser.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def _slopes(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """The gradient of the leaves alone: the model's own weights get none, whether or not they are frozen."""
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    if all(slope is None for slope in slopes):
        raise UserError("this model gives no gradient of what is tuned; take one in plain PyTorch, as RWKV-4 here is")
    return list(slopes)
