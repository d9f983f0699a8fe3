"""One gradient step on all weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.generators.base import key
from prosg_lib.gradient_steps.one_step import LossOf, _nll, gradient_steps, in_turn
from prosg_lib.text.padding import Rows


class WeightStep(nn.Module):
    """One gradient step on all weights of the model, from a start that is trained: the paper's plain form.

    Every example has weights of its own after the step, as many as the model has; where those of a batch would not fit
    in memory, train on a few examples at a time (`training.fit`, at_once). The examples of a batch are computed at once
    where the model's class lets them (`LanguageModel.supports_vmap`), else one after the other.

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
        if not lm.supports_vmap and len(contexts.ids) > 1:
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
    if lm.supports_vmap:
        return torch.func.vmap(f)
    return lambda weights, *tensors: f({n: w[0] for n, w in weights.items()}, *(t[0] for t in tensors))[None]


def _logits(lm: LanguageModel, last: int | None = None):
    """The model as a function of its weights, of token ids (B, T) and where they are no padding; `last`: see there."""
    return lambda weights, ids, valid: torch.func.functional_call(lm, weights, (ids, None, None, valid, last))[0]
