"""One real gradient step on a context, instead of the context: from a start that was trained for it.

After "Can Gradient Descent Simulate Prompting?" (Zhang, Choshen, Andreas 2025, arXiv 2506.20989):

    phi' = phi - eta grad_phi NLL(context; phi),        one plain SGD step,

and phi is trained so that the model with phi' answers a query as the model does that was given the context. The outer
gradient goes through the step, d phi'^T v = v - eta H v, H being the Hessian of the context's NLL: one Hessian-vector
product, taken when the outer gradient arrives. So the inner loss's graph is never kept beside the outer one's.

Glossary of shapes: B batch, T tokens of the context, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import RecurrentLM
from prosg_lib.errors import UserError
from prosg_lib.generator import SCALE, Generator, _key
from prosg_lib.lowrank import Factors, LowRankDelta, applied

Params = Mapping[str, Tensor]
LossOf = Callable[[dict[str, Tensor]], Tensor]


def gradient_step(parts: Sequence[LossOf], start: Params, lr: float, second_order: bool = True) -> dict[str, Tensor]:
    """One plain SGD step, start - lr grad loss(start), that can be differentiated through (equation 1 there).

    Args:
        parts: the loss as a sum of parts, each tensors by name, as in `start`, -> scalar. One is enough; more, over a
            few contexts each, need the memory of the largest of them. Each is run here, and once more for the outer
            gradient, so all that it does must be twice differentiable (attention: eager). Nothing else that it uses
            gets a gradient through the step.
        start: what is changed. With one copy an example, (B, ...), and the sum of the examples' losses, each example
            takes a step of its own.
        second_order: the exact outer gradient; False: as if the inner gradient were a constant (first-order MAML).
    Raises:
        UserError: the loss at the start, or its gradient, is not finite.
    """
    names = list(start)
    positional = [lambda *tensors, part=part: part(dict(zip(names, tensors, strict=True))) for part in parts]
    stepped = _Step.apply(positional, lr, second_order, *start.values())
    return dict(zip(names, stepped, strict=True))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, lr, second_order, *start):
        ctx.parts, ctx.lr, ctx.second_order = parts, lr, second_order
        ctx.save_for_backward(*start)
        slopes = [torch.zeros_like(t) for t in start]
        for part in parts:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in start]
                loss = part(*leaves)
                if not torch.isfinite(loss):
                    raise UserError(f"the loss of the context is {loss.item()} before the step; look at both of them")
                _add(slopes, torch.autograd.grad(loss, leaves, allow_unused=True))
        if not all(torch.isfinite(g).all() for g in slopes):
            raise UserError("the gradient of the context's loss is not finite; look at the start, and at the context")
        return tuple(t - lr * g for t, g in zip(start, slopes, strict=True))

    @staticmethod
    def backward(ctx, *outer):
        changes = [v.clone() for v in outer]
        for part in ctx.parts if ctx.second_order else ():
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                slopes = torch.autograd.grad(part(*leaves), leaves, create_graph=True, materialize_grads=True)
                bent = [(g, v) for g, v in zip(slopes, outer, strict=True) if g.requires_grad]
                if not bent:
                    continue  # a linear part has no curvature
                curved = torch.autograd.grad(
                    [g for g, _ in bent], leaves, [v for _, v in bent], allow_unused=True
                )  # H v
            _add(changes, curved, -ctx.lr)
        return None, None, None, *changes


def _add(sums: list[Tensor], terms: Sequence[Tensor | None], factor: float = 1.0) -> None:
    for total, term in zip(sums, terms, strict=True):
        if term is not None:
            total.add_(term, alpha=factor)


def context_nll(lm: RecurrentLM, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean next-token NLL of each context, (B,), nats; the first token has none.

    Args:
        ids: (B, T), left-padded where `valid` (B, T) is False.
    """
    hidden, _ = lm.step_through(ids[:, :-1], None, None if valid is None else valid[:, :-1])
    losses = F.cross_entropy(lm.read_out(hidden).transpose(1, 2), ids[:, 1:], reduction="none")
    counted = torch.ones_like(losses) if valid is None else (valid[:, 1:] & valid[:, :-1]).to(losses.dtype)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


class AdapterStep(Generator):
    """A LoRA adapter from which one gradient step on the prompt is taken: inner and outer loop in the same adapter.

    The step that is taken is a LowRankDelta like any other generator's, so whatever takes those takes this one.

    Attributes:
        U, V: the adapter before the step, of every map; U starts at zero, so that the step moves U alone at first.
    """

    def __init__(self, lm: RecurrentLM, rank: int, endings: tuple[str, ...], lr: float, second_order: bool = True):
        super().__init__(lm, rank, endings)
        self.U = nn.ParameterDict({_key(n): nn.Parameter(torch.zeros(out, rank)) for n, out in self.outs.items()})
        self.lr, self.second_order = lr, second_order

    def forward(self, lm, ids, valid=None):
        batch = len(ids)

        def delta_of(params: dict[str, Tensor]) -> LowRankDelta:
            pairs = {n: Factors(params[f"{n}.U"], params[f"{n}.V"]) for n in self.names}
            return LowRankDelta(pairs, self.fingerprint, SCALE)

        def loss_of(params: dict[str, Tensor]) -> Tensor:
            with applied(lm, delta_of(params)):
                return context_nll(lm, ids, valid).sum()

        start = {}
        for name in self.names:
            for kind, matrix in (("U", self.U[_key(name)]), ("V", self.V[_key(name)])):
                start[f"{name}.{kind}"] = matrix.expand(batch, -1, -1)
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
        return delta_of(gradient_step([loss_of], start, self.lr, self.second_order)), state
