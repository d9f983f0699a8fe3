"""One real gradient step on a context, instead of the context: from a start that was trained for it.

After "Can Gradient Descent Simulate Prompting?" (Zhang, Choshen, Andreas 2025, arXiv 2506.20989):

    phi' = phi - eta grad_phi NLL(context; phi),        one plain SGD step,

and phi is trained so that the model with phi' answers a query as the model does that was given the context. The outer
gradient goes through the step, d phi'^T v = v - eta H v, H being the Hessian of the context's NLL: one Hessian-vector
product, taken when the outer gradient arrives. The graph of the inner gradient, several times as large as that of the
inner loss, is kept beside the outer loss's only as far as memory is to be spent on time (`gradient_step`, kept); it is
made of functions whose second derivatives are lean (`twice`).

Glossary of shapes: B batch, T tokens of the context, r rank.
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
    parts: Sequence[LossOf], start: Params, lr: float, second_order: bool = True, kept: int = 1
) -> dict[str, Tensor]:
    """One plain SGD step, start - lr grad loss(start), that can be differentiated through (equation 1 there).

    Args:
        parts: the loss as a sum of parts, each tensors by name, as in `start`, -> scalar. One is enough; of more, over
            a few contexts each, those that are not kept need the memory of the largest of them, and of the kept ones
            the last comes first, while the others still wait: let it be the smallest. All that they do must be twice
            differentiable (attention: eager). Nothing else that they use gets a gradient through the step.
        start: what is changed. With one copy an example, (B, ...), and the sum of the examples' losses, each example
            takes a step of its own.
        second_order: the exact outer gradient; False: as if the inner gradient were a constant (first-order MAML).
        kept: of so many last parts the graph of the gradient waits for the outer gradient, in more than twice the
            memory of the loss's graph; the others are run once more for it.
    Raises:
        NotFinite: the loss at the start, or its gradient, is not finite.
    """
    names = list(start)
    positional = [lambda *tensors, part=part: part(dict(zip(names, tensors, strict=True))) for part in parts]
    asked = second_order and torch.is_grad_enabled() and any(t.requires_grad for t in start.values())
    stepped = _Step.apply(positional, lr, second_order, kept if asked else 0, *start.values())
    return dict(zip(names, stepped, strict=True))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, lr, second_order, kept, *start):
        ctx.parts, ctx.lr, ctx.second_order, ctx.waiting = parts, lr, second_order, []
        ctx.save_for_backward(*start)
        stepped = list(start)
        for number, part in enumerate(parts):
            waits = number >= len(parts) - kept
            leaves, slopes = _slopes(part, start, create_graph=waits)
            _add(stepped, slopes, -lr)
            if waits:
                ctx.waiting.append((leaves, slopes))
        # One number of all of them: a GPU waits for each that is looked at.
        if not torch.isfinite(sum(t.sum() for t in stepped)):
            raise NotFinite("the gradient of the context's loss is not finite; look at the start and the context")
        return tuple(s.clone() if s is t else s for s, t in zip(stepped, start, strict=True))

    @staticmethod
    def backward(ctx, *outer):
        changes = list(outer)
        for part in reversed(ctx.parts) if ctx.second_order else ():  # a kept graph is gone before the next is run
            graph = ctx.waiting.pop() if ctx.waiting else _slopes(part, ctx.saved_tensors, create_graph=True)
            _add(changes, _bent(*graph, outer), -ctx.lr)
            del graph
        return None, None, None, None, *changes


def gradient_steps(losses: Sequence[LossOf], start: Params, lr: float, second_order: bool = True) -> dict[str, Tensor]:
    """`gradient_step`s one after the other, each on a loss of its own; only the last one's graph waits, so that the
    memory of many is that of one."""
    for number, loss_of in enumerate(losses, 1):
        start = gradient_step([loss_of], start, lr, second_order, kept=int(number == len(losses)))
    return start


def _slopes(
    part: Callable[..., Tensor], start: Sequence[Tensor], create_graph: bool
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """Fresh leaves at `start`, and the loss's gradient there."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in start]
        with LeanSecondDerivatives() if create_graph else nullcontext():
            loss = part(*leaves)
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss of the context is {loss.item()} before the step; look at both of them")
        return leaves, torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)


def _bent(leaves: list[Tensor], slopes: Sequence[Tensor | None], outer: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The Hessian times `outer`: how the slopes, held against it, change with the leaves."""
    bent = [(g, v) for g, v in zip(slopes, outer, strict=True) if g is not None and g.requires_grad]
    if not bent:
        return [None] * len(leaves)  # a linear part has no curvature
    return torch.autograd.grad([g for g, _ in bent], leaves, [v for _, v in bent], allow_unused=True)


def _add(sums: list[Tensor], terms: Sequence[Tensor | None], factor: float) -> None:
    """Each sum by a new one: what came from elsewhere is not changed, and need not be copied first."""
    for i, term in enumerate(terms):
        if term is not None:
            sums[i] = torch.add(sums[i], term, alpha=factor)


def context_nll(
    lm: LanguageModel, ids: Tensor, valid: Tensor | None = None, state: RecurrentState | None = None
) -> Tensor:
    """Mean next-token NLL of each context, (B,), nats; the first token has none.

    Args:
        ids: (B, T), left-padded where `valid` (B, T) is False.
        state: that they are read from; None: a blank one.
    """
    hidden, _ = lm.step_through(ids[:, :-1], state, None if valid is None else valid[:, :-1])
    return _nll(lm.read_out(hidden), ids, valid)


def _nll(logits: Tensor, ids: Tensor, valid: Tensor | None) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = torch.ones_like(losses) if valid is None else (valid[:, 1:] & valid[:, :-1]).to(losses.dtype)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


class Way(Protocol):
    """A way to take contexts in: a step, or a generator that needs none."""

    def after(self, lm: LanguageModel, contexts: Rows, successive: bool) -> LogitsOf:
        """The model as it is after its contexts, (B, n, C), each example with its own."""


def answering(way: Way | None, lm: LanguageModel, contexts: Rows, successive: bool = False) -> LogitsOf:
    """The model after its contexts; None: unchanged.

    Args:
        contexts: (B, n, C), n for each example.
        successive: one step a context, in their order, instead of one on the mean of their losses.
    """
    return with_delta(lm, None) if way is None else way.after(lm, contexts, successive)


def in_turn(contexts: Rows, successive: bool) -> list[Rows]:
    """What each inner step learns, (B, m, C): all contexts at once, or one after the other.

    Raises:
        UserError: the contexts are of a single token, after which there is none to be predicted.
    """
    if contexts.ids.shape[-1] < 2:
        raise UserError("a context of one token has no next token that a step could learn; give a longer one")
    return [Rows(*(t[:, [i]] for t in contexts)) for i in range(contexts.ids.shape[1])] if successive else [contexts]
