"""One gradient step in a LoRA adapter, at one learning rate or at learned ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.applying import applied, with_delta
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.generators.base import SCALE, Generator, parameter_key, step_size_group
from prosg_lib.gradient_steps.one_step import LossOf, Params, context_nll, contexts_of_steps, gradient_steps
from prosg_lib.text.padding import Rows


class AdapterStep(Generator):
    """A LoRA adapter and one gradient step in it on the prompt; inner and outer loop train the same adapter.

    The adapter after the step is a LowRankDelta, so it can be used wherever a generator's can.

    Attributes:
        U, V: the adapter before the step, by map. U starts at zero, so that at first the step moves U alone.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...], lr: float, second_order: bool = True):
        super().__init__(lm, rank, endings)
        self.U = nn.ParameterDict(
            {parameter_key(n): nn.Parameter(torch.zeros(out, rank)) for n, out in self.out_sizes.items()}
        )
        self.lr, self.second_order = lr, second_order

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        return self.delta(lm, Rows(ids[:, None], valid[:, None])), state

    def adapt(self, lm, contexts, successive):
        return with_delta(lm, self.delta(lm, contexts, successive))

    def delta(self, lm: LanguageModel, contexts: Rows, successive: bool = False) -> LowRankDelta:
        """The adapter after the step (or steps) on each example's contexts, (B, n, C).

        Raises:
            UserError: second derivatives are needed, and the model has none as it runs here.
            NotFinite: see `gradient_step`.
        """
        if self.second_order and torch.is_grad_enabled():
            lm.check_second_order()
        start = {}
        for name in self.names:
            for part, factors in (("U", self.U), ("V", self.V)):
                start[f"{name}.{part}"] = factors[parameter_key(name)].expand(len(contexts.ids), -1, -1)
        losses = [self._loss_of(lm, each) for each in contexts_of_steps(contexts, successive)]
        return self._delta_of(self._stepped(losses, start))

    def _stepped(self, losses: list[LossOf], start: Params) -> Params:
        return gradient_steps(losses, start, self.lr, self.second_order)

    def _delta_of(self, params: Params) -> LowRankDelta:
        pairs = {n: Factors(params[f"{n}.U"], params[f"{n}.V"]) for n in self.names}
        return LowRankDelta(pairs, self.fingerprint, SCALE)

    def _loss_of(self, lm: LanguageModel, contexts: Rows) -> LossOf:
        batch, n, _ = contexts.ids.shape
        example = torch.arange(batch, device=contexts.ids.device).repeat_interleave(n)

        def loss_of(params: dict[str, Tensor]) -> Tensor:
            delta = self._delta_of(params)
            with applied(lm, delta if n == 1 else delta.select(example)):
                return context_nll(lm, contexts.ids.flatten(0, 1), contexts.valid.flatten(0, 1)).sum() / n

        return loss_of


class RatedAdapterStep(AdapterStep):
    """An adapter step with inner learning rates of its own for the U and the V of every map, trained with the start (as
    in Meta-SGD, Li et al. 2017, arXiv 1707.09835).

    Examples with the same contexts, such as several questions about a passage, share one step.

    Attributes:
        log_rates: logarithms of the rates over `lr`, of U and of V, (maps, 2). Those of V start at a hundredth: a step
            of V is along the context's own inputs, and soon acts on a query's more than V itself does.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...], lr: float, second_order: bool = True):
        super().__init__(lm, rank, endings, lr, second_order)
        self.log_rates = nn.Parameter(torch.tensor([1.0, 0.01]).log().repeat(len(self.names), 1))

    def optimiser_groups(self) -> list[dict]:
        """See `training.loop.groups_of`."""
        factors = [*self.U.parameters(), *self.V.parameters()]
        return [{"params": factors, "weight_decay": 0.0}, step_size_group(self.log_rates)]

    def adapt(self, lm, contexts, successive):
        ids, valid = (t[..., contexts.valid.any((0, 1))] for t in contexts)  # no column that is padding in every row
        rows = torch.where(valid, ids, -1)
        distinct, owner = rows.flatten(1).unique(dim=0, return_inverse=True)
        distinct = distinct.view(-1, *rows.shape[1:])
        delta = self.delta(lm, Rows(distinct.clamp(min=0), distinct >= 0), successive)
        return with_delta(lm, delta.select(owner))

    def _stepped(self, losses, start):
        rates = {
            f"{n}.{part}": rate
            for n, two in zip(self.names, self.log_rates.exp(), strict=True)
            for part, rate in zip("UV", two, strict=True)
        }
        for loss_of in losses:
            after = super()._stepped([loss_of], start)  # at the rate `lr`
            start = {name: torch.lerp(start[name], after[name], rates[name]) for name in start}
        return start
