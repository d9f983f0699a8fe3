"""One gradient step in a LoRA adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.applying import applied, with_delta
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.generators.base import SCALE, Generator, key
from prosg_lib.gradient_steps.one_step import LossOf, Params, context_nll, gradient_steps, in_turn
from prosg_lib.text.padding import Rows


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
