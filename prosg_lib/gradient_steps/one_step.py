"""One real gradient step on a context, in place of the context.

After "Can Gradient Descent Simulate Prompting?" (Zhang, Choshen, Andreas 2025, arXiv 2506.20989), equation (1):

    theta' = theta - eta grad_theta NLL(c; theta),        one plain SGD step on the context c.

The start theta is meta-trained so that the model with theta' answers a query as the unchanged model does with the
context in its prompt. The outer gradient goes through the step. If v is the outer gradient with respect to theta',

    (d theta' / d theta)^T v = v - eta H v,               H the Hessian of NLL(c; theta),

one Hessian-vector product, taken when v arrives. It needs the graph of the inner gradient, which is several times as
large as that of the inner loss. You can keep it while the outer loss is computed (memory) or recompute it (time). It is
built from functions with lean second derivatives (`backbones.second_order`).

Glossary of shapes: B batch, n contexts per example, C tokens of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.second_order import LeanSecondDerivatives
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import LogitsOf, with_delta
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.text.padding import Rows

Params = Mapping[str, Tensor]
LossOf = Callable[[dict[str, Tensor]], Tensor]


def gradient_step(
    losses: Sequence[LossOf], start: Params, lr: float, second_order: bool = True, kept: int = 1
) -> dict[str, Tensor]:
    """theta' = theta - lr grad loss(theta), through which one can differentiate.

    Args:
        losses: the terms of the loss, each a function of tensors by name, as in `start`, that returns a scalar. One is
            enough. Several, over a few contexts each, save memory: the terms that are not kept need only as much as the
            largest of them. In the backward pass the last of the kept terms comes first, while the others still wait,
            so make it the smallest. All operations must be twice differentiable (attention: eager). Other tensors that
            the terms use get no gradient through the step.
        start: theta. It may have one copy per example, (B, ...); with the sum of the examples' losses, each example
            then takes its own step.
        second_order: the exact outer gradient; False treats the inner gradient as a constant (first-order MAML).
        kept: number of terms, counted from the last, whose gradient graph is kept for the outer gradient, in more than
            twice the memory of the loss's own graph. The others are recomputed then.
    Raises:
        NotFinite: the loss at the start, or its gradient, is not finite.
    """
    names = list(start)
    positional = [lambda *tensors, term=term: term(dict(zip(names, tensors, strict=True))) for term in losses]
    if not (second_order and torch.is_grad_enabled() and any(t.requires_grad for t in start.values())):
        kept = 0
    stepped = _Step.apply(positional, lr, second_order, kept, *start.values())
    return dict(zip(names, stepped, strict=True))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, lr, second_order, kept, *start):
        ctx.losses, ctx.lr, ctx.second_order, ctx.graphs = losses, lr, second_order, []
        ctx.save_for_backward(*start)
        stepped = list(start)
        for number, loss_of in enumerate(losses):
            keep = number >= len(losses) - kept
            leaves, gradient = _gradient(loss_of, start, create_graph=keep)
            _add_scaled(stepped, gradient, -lr)
            if keep:
                ctx.graphs.append((leaves, gradient))
        # One number for all tensors: looking at each would make a GPU wait each time.
        if not torch.isfinite(sum(t.sum() for t in stepped)):
            raise NotFinite("the gradient of the context's loss is not finite; check the start and the context")
        return tuple(s.clone() if s is t else s for s, t in zip(stepped, start, strict=True))

    @staticmethod
    def backward(ctx, *outer):
        result = list(outer)
        for loss_of in reversed(ctx.losses) if ctx.second_order else ():  # frees each graph before the next one
            graph = ctx.graphs.pop() if ctx.graphs else _gradient(loss_of, ctx.saved_tensors, create_graph=True)
            _add_scaled(result, _hessian_times(*graph, outer), -ctx.lr)
            del graph
        return None, None, None, None, *result


def _gradient(
    loss_of: Callable[..., Tensor], start: Sequence[Tensor], create_graph: bool
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Fresh leaves at `start`, and the loss's gradient with respect to them."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in start]
        with LeanSecondDerivatives() if create_graph else nullcontext():
            loss = loss_of(*leaves)
        check_finite(loss)
        return leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)


def _hessian_times(
    leaves: list[Tensor], gradient: Sequence[Tensor | None], v: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """H v, as the gradient of <gradient, v>."""
    curved = [(g, each) for g, each in zip(gradient, v, strict=True) if g is not None and g.requires_grad]
    if not curved:
        return [None] * len(leaves)  # the loss is linear
    return torch.autograd.grad([g for g, _ in curved], leaves, [each for _, each in curved], allow_unused=True)


def _add_scaled(sums: list[Tensor], terms: Sequence[Tensor | None], factor: float) -> None:
    """sums[i] + factor terms[i], out of place: the tensors at first belong to others."""
    for i, term in enumerate(terms):
        if term is not None:
            sums[i] = torch.add(sums[i], term, alpha=factor)


def check_finite(loss: Tensor) -> None:
    """Raises NotFinite where a context's loss before the step is not finite."""
    if not torch.isfinite(loss):
        raise NotFinite(f"the loss of the context is {loss.item()} before the step; check the start and the context")


def gradient_steps(losses: Sequence[LossOf], start: Params, lr: float, second_order: bool = True) -> dict[str, Tensor]:
    """One `gradient_step` after another, each on its own loss. Only the last one's graph is kept, so that many steps
    need the memory of one."""
    for number, loss_of in enumerate(losses, 1):
        start = gradient_step([loss_of], start, lr, second_order, kept=int(number == len(losses)))
    return start


def context_nll(
    lm: LanguageModel, ids: Tensor, valid: Tensor | None = None, state: RecurrentState | None = None
) -> Tensor:
    """Mean next-token NLL of each context, (B,), nats. The first token has none.

    Args:
        ids: (B, C), left-padded where `valid` (B, C) is False.
        state: read from this state; None for a blank one.
    """
    hidden, _ = lm.step_through(ids[:, :-1], state, None if valid is None else valid[:, :-1])
    return mean_nll(lm.read_out(hidden), ids, valid)


def mean_nll(logits: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    """As `context_nll`, of the logits (B, C - 1, vocab) at all tokens but the last."""
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = torch.ones_like(losses) if valid is None else (valid[:, 1:] & valid[:, :-1]).to(losses.dtype)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


class Method(Protocol):
    """A method to put contexts into weights: a gradient step, or a generator that needs none."""

    def adapt(self, lm: LanguageModel, contexts: Rows, successive: bool) -> LogitsOf:
        """See `adapted`."""


def adapted(method: Method | None, lm: LanguageModel, contexts: Rows, successive: bool = False) -> LogitsOf:
    """The model after the contexts, each example with its own; with no method, the unchanged model.

    Args:
        contexts: (B, n, C).
        successive: one step per context, in order, instead of one step on the mean of their losses.
    """
    return with_delta(lm, None) if method is None else method.adapt(lm, contexts, successive)


def contexts_of_steps(contexts: Rows, successive: bool) -> list[Rows]:
    """The contexts (B, m, C) of each inner step: all at once, or one step each.

    Raises:
        UserError: the contexts are a single token long, so there is nothing to predict.
    """
    if contexts.ids.shape[-1] < 2:
        raise UserError("a context of one token has no next token to learn; give at least 2")
    return [Rows(*(t[:, [i]] for t in contexts)) for i in range(contexts.ids.shape[1])] if successive else [contexts]
