"""One real gradient step on a context, instead of the context: from a start that was trained for it.

After "Can Gradient Descent Simulate Prompting?" (Zhang, Choshen, Andreas 2025, arXiv 2506.20989):

    phi' = phi - eta grad_phi NLL(context; phi),        one plain SGD step,

and phi is trained so that the model with phi' answers a query as the model does that was given the context. The outer
gradient goes through the step, d phi'^T v = v - eta H v, H being the Hessian of the context's NLL: one Hessian-vector
product, taken when the outer gradient arrives. So the inner loss's graph is never kept beside the outer one's.

Glossary of shapes: B batch, T tokens of the context, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import RecurrentLM
from prosg_lib.errors import UserError
from prosg_lib.generator import SCALE, Generator, _key
from prosg_lib.lowrank import Factors, LowRankDelta, applied

Params = Mapping[str, Tensor]
LossOf = Callable[[dict[str, Tensor]], Tensor]


def gradient_step(loss_of: LossOf, start: Params, lr: float, second_order: bool = True) -> dict[str, Tensor]:
    """One plain SGD step, start - lr grad loss_of(start), that can be differentiated through (equation 1 there).

    Args:
        loss_of: tensors by name, as in `start`, -> scalar loss. Run twice: here, and once more for the outer gradient,
            with tangents (forward mode over reverse mode), so its operations must have both; attention: eager.
            Nothing else that it uses gets a gradient through the step.
        start: what is changed. With one copy an example, (B, ...), and the sum of the examples' losses, each example
            takes a step of its own.
        second_order: the exact outer gradient; False: as if the inner gradient were a constant (first-order MAML).
    Raises:
        UserError: the loss at the start, or its gradient, is not finite.
    """
    names = list(start)
    stepped = _Step.apply(
        lambda *tensors: loss_of(dict(zip(names, tensors, strict=True))), lr, second_order, *start.values()
    )
    return dict(zip(names, stepped, strict=True))


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, lr, second_order, *start):
        ctx.loss_of, ctx.lr, ctx.second_order = loss_of, lr, second_order
        ctx.save_for_backward(*start)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in start]
            loss = loss_of(*leaves)
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss of the context is {loss.item()} before the step; look at the start, and at the context"
                )
            slopes = torch.autograd.grad(loss, leaves)
        if not all(torch.isfinite(g).all() for g in slopes):
            raise UserError("the gradient of the context's loss is not finite; a smaller learning rate will not help")
        return tuple(t - lr * g for t, g in zip(start, slopes, strict=True))

    @staticmethod
    def backward(ctx, *outer):
        if not ctx.second_order:
            return None, None, None, *outer
        start = tuple(t.detach().contiguous() for t in ctx.saved_tensors)
        along = tuple(v.contiguous() for v in outer)
        slopes_of = torch.func.grad(ctx.loss_of, argnums=tuple(range(len(start))))
        _, curved = torch.func.jvp(slopes_of, start, along)  # H v
        return None, None, None, *(v - ctx.lr * h for v, h in zip(outer, curved, strict=True))


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
        return delta_of(gradient_step(loss_of, start, self.lr, self.second_order)), state
