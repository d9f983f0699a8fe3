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
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.generator import SCALE, Generator, key
from prosg_lib.lowrank import Factors, LogitsOf, LowRankDelta, applied, with_delta
from prosg_lib.state import RecurrentState
from prosg_lib.tasks.pair_batches import Rows
from prosg_lib.twice import LeanSecondDerivatives

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


class AdapterStep(Generator):
    """A LoRA adapter from which one gradient step on the prompt is taken: inner and outer loop in the same adapter.

    The step that is taken is a LowRankDelta like any other generator's, so whatever takes those takes this one.

    Attributes:
        U, V: the adapter before the step, of every map; U starts at zero, so that the step moves U alone at first.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...], lr: float, second_order: bool = True):
        super().__init__(lm, rank, endings)
        self.U = nn.ParameterDict({key(n): nn.Parameter(torch.zeros(out, rank)) for n, out in self.outs.items()})
        self.lr, self.second_order = lr, second_order

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        return self.delta(lm, Rows(ids[:, None], valid[:, None])), state

    def after(self, lm, contexts, successive):
        return with_delta(lm, self.delta(lm, contexts, successive))

    def delta(self, lm: LanguageModel, contexts: Rows, successive: bool = False) -> LowRankDelta:
        """The adapter after the step (or steps) on each example's contexts, (B, n, C).

        Raises:
            UserError: the model has no second derivative here, and one is needed (`LanguageModel.check_second_order`).
            NotFinite: see `gradient_step`.
        """
        if self.second_order and torch.is_grad_enabled():
            lm.check_second_order()
        params = {}
        for name in self.names:
            for kind, matrix in (("U", self.U[key(name)]), ("V", self.V[key(name)])):
                params[f"{name}.{kind}"] = matrix.expand(len(contexts.ids), -1, -1)
        losses = [self._loss_of(lm, told) for told in in_turn(contexts, successive)]
        return self._delta_of(gradient_steps(losses, params, self.lr, self.second_order))

    def _delta_of(self, params: Params) -> LowRankDelta:
        pairs = {n: Factors(params[f"{n}.U"], params[f"{n}.V"]) for n in self.names}
        return LowRankDelta(pairs, self.fingerprint, SCALE)

    def _loss_of(self, lm: LanguageModel, contexts: Rows) -> LossOf:
        batch, n, _ = contexts.ids.shape
        owner = torch.arange(batch, device=contexts.ids.device).repeat_interleave(n)

        def loss_of(params: dict[str, Tensor]) -> Tensor:
            delta = self._delta_of(params)
            with applied(lm, delta if n == 1 else delta.select(owner)):
                return context_nll(lm, contexts.ids.flatten(0, 1), contexts.valid.flatten(0, 1)).sum() / n

        return loss_of


class WeightStep(nn.Module):
    """One gradient step on all weights of the model, from a start that is trained: the paper's plain form.

    Every example has weights of its own after the step, as many as the model has; where those of a batch would not fit
    in memory, train on a few examples at a time (`training.fit`, at_once). The examples of a batch are computed at once
    where the model's class lets them (`LanguageModel.vmaps`), else one after the other.

    Attributes:
        moved: the start's difference to the model, by name of the weight: of its shape, or, of a given rank, as two
            factors, and then of matrices alone.
    """

    def __init__(self, lm: LanguageModel, rank: int | None, lr: float, second_order: bool = True):
        super().__init__()
        self.fingerprint, self.rank, self.lr, self.second_order = lm.fingerprint(), rank, lr, second_order
        self.moved = nn.ParameterDict()
        for name, weight in lm.named_parameters():
            if rank is None:
                self.moved[key(name)] = nn.Parameter(torch.zeros_like(weight))
            elif weight.ndim == 2:
                if not 1 <= rank <= min(weight.shape):
                    raise UserError(
                        f"rank {rank} asked for, but {name} is {tuple(weight.shape)}; it has 1 to {min(weight.shape)}"
                    )
                self.moved[key(name) + "_U"] = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
                right = torch.randn(weight.shape[1], rank).to(weight) / weight.shape[1] ** 0.5
                self.moved[key(name) + "_V"] = nn.Parameter(right)

    def start(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The weights before the step.

        Raises:
            UserError: it was made for another model.
        """
        if self.fingerprint != lm.fingerprint():
            raise UserError(f"this start is for model {self.fingerprint}, not for this one ({lm.fingerprint()})")
        start = {}
        for name, weight in lm.named_parameters():
            start[name] = weight.detach()
            if self.rank is None:
                start[name] = start[name] + self.moved[key(name)]
            elif weight.ndim == 2:
                start[name] = start[name] + self.moved[key(name) + "_U"] @ self.moved[key(name) + "_V"].t()
        return start

    def after(self, lm, contexts, successive):
        """See `Way`; raises what `AdapterStep.delta` and `start` do."""
        if self.second_order and torch.is_grad_enabled():
            lm.check_second_order()
        if not lm.vmaps and len(contexts.ids) > 1:
            alone = [self.after(lm, Rows(*(t[[i]] for t in contexts)), successive) for i in range(len(contexts.ids))]
            return lambda ids, valid, last=None: torch.cat(
                [says(ids[[i]], valid[[i]], last) for i, says in enumerate(alone)]
            )
        weights = {n: w.expand(len(contexts.ids), *w.shape) for n, w in self.start(lm).items()}
        losses = [self._loss_of(lm, told) for told in in_turn(contexts, successive)]
        weights = gradient_steps(losses, weights, self.lr, self.second_order)

        def logits_of(ids, valid, last=None):
            return _mapped(lm, _logits(lm, last))(weights, ids[:, None], valid[:, None])[:, 0]

        return logits_of

    def _loss_of(self, lm: LanguageModel, contexts: Rows) -> LossOf:
        def loss_of_one(weights, ids, valid):
            return _nll(_logits(lm)(weights, ids[:, :-1], valid[:, :-1]), ids, valid).mean()

        return lambda weights: _mapped(lm, loss_of_one)(weights, *contexts).sum()


def _mapped(lm: LanguageModel, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of one example's weights and tensors as one of a batch of them, or of a batch of one example."""
    if lm.vmaps:
        return torch.func.vmap(f)
    return lambda weights, *tensors: f({n: w[0] for n, w in weights.items()}, *(t[0] for t in tensors))[None]


def _logits(lm: LanguageModel, last: int | None = None):
    """The model as a function of its weights, of token ids (B, T) and where they are no padding; `last`: see there."""
    return lambda weights, ids, valid: torch.func.functional_call(lm, weights, (ids, None, None, valid, last))[0]
