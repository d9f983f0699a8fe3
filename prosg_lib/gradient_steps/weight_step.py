"""One gradient step on all weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.generators.base import check_model, parameter_key
from prosg_lib.gradient_steps.one_step import LossOf, contexts_of_steps, gradient_steps, mean_nll
from prosg_lib.text.padding import Rows


class WeightStep(nn.Module):
    """One gradient step on all weights of the model, from a trained start: the paper's plain form.

    After the step every example has its own weights, as many as the model has. If those of a batch do not fit into
    memory, train on a few examples at a time (`training.loop.fit`, at_once). The examples of a batch are computed in
    parallel where the model allows it (`LanguageModel.supports_vmap`), otherwise one after the other.

    Args:
        rank: of the start's difference from the model; None leaves it free.

    Attributes:
        moved: that difference, by name of the weight. With a rank, only matrices have one, as two factors.
    """

    def __init__(self, lm: LanguageModel, rank: int | None, lr: float, second_order: bool = True):
        super().__init__()
        self.fingerprint, self.rank, self.lr, self.second_order = lm.fingerprint(), rank, lr, second_order
        self.moved = nn.ParameterDict()
        for name, weight in lm.named_parameters():
            key = parameter_key(name)
            if rank is None:
                self.moved[key] = nn.Parameter(torch.zeros_like(weight))
            elif weight.ndim == 2:
                if not 1 <= rank <= min(weight.shape):
                    raise UserError(
                        f"rank {rank} asked for, but {name} is {tuple(weight.shape)}; it has 1 to {min(weight.shape)}"
                    )
                self.moved[f"{key}_U"] = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
                right = torch.randn(weight.shape[1], rank).to(weight) / weight.shape[1] ** 0.5
                self.moved[f"{key}_V"] = nn.Parameter(right)

    def start(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The weights before the step.

        Raises:
            UserError: the start was trained for another model.
        """
        check_model(self.fingerprint, lm)
        start = {}
        for name, weight in lm.named_parameters():
            key = parameter_key(name)
            start[name] = weight.detach()
            if self.rank is None:
                start[name] = start[name] + self.moved[key]
            elif weight.ndim == 2:
                start[name] = start[name] + self.moved[f"{key}_U"] @ self.moved[f"{key}_V"].t()
        return start

    def adapt(self, lm, contexts, successive):
        """See `one_step.adapted`; raises what `AdapterStep.delta` and `start` do."""
        if self.second_order and torch.is_grad_enabled():
            lm.check_second_order()
        if not lm.supports_vmap and len(contexts.ids) > 1:
            alone = [self.adapt(lm, Rows(*(t[[i]] for t in contexts)), successive) for i in range(len(contexts.ids))]
            return lambda ids, valid, last=None: torch.cat(
                [logits_of(ids[[i]], valid[[i]], last) for i, logits_of in enumerate(alone)]
            )
        weights = {n: w.expand(len(contexts.ids), *w.shape) for n, w in self.start(lm).items()}
        losses = [self._loss_of(lm, each) for each in contexts_of_steps(contexts, successive)]
        weights = gradient_steps(losses, weights, self.lr, self.second_order)

        def logits_of(ids, valid, last=None):
            return _per_example(lm, _logits(lm, last))(weights, ids[:, None], valid[:, None])[:, 0]

        return logits_of

    def _loss_of(self, lm: LanguageModel, contexts: Rows) -> LossOf:
        def loss_of_one(weights, ids, valid):
            return mean_nll(_logits(lm)(weights, ids[:, :-1], valid[:, :-1]), ids, valid).mean()

        return lambda weights: _per_example(lm, loss_of_one)(weights, *contexts).sum()


def _per_example(lm: LanguageModel, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of one example's weights and tensors, applied to a batch; without vmap, to a batch of one."""
    if lm.supports_vmap:
        return torch.func.vmap(f)
    return lambda weights, *tensors: f({n: w[0] for n, w in weights.items()}, *(t[0] for t in tensors))[None]


def _logits(lm: LanguageModel, last: int | None = None) -> Callable[..., Tensor]:
    """The model as a function of its weights, token ids (B, T) and where they are valid; `last` as in its forward."""
    return lambda weights, ids, valid: torch.func.functional_call(lm, weights, (ids, None, None, valid, last))[0]
