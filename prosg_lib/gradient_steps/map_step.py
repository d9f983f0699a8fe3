"""One gradient step on every linear map of a model and on its readout, kept as the tokens' factors.

The gradient of a map's weight is sum_t g_t x_t^T over the context's tokens, with x_t the map's input and g_t the loss's
gradient at its output. So after one SGD step the map computes

    W' x = W x - eta sum_t g_t (x_t . x),

which is linear attention from the query to the context: the inputs x_t are keys, and -eta g_t are values (Irie,
Csordas, Schmidhuber 2022, arXiv 2202.05798). No changed weight is ever formed, a step costs what its tokens cost, and
long contexts can be trained on in minutes. Two things go beyond the paper's plain step (`WeightStep`): every map has
its own learning rate, trained with the start (as in Meta-SGD, Li et al. 2017, arXiv 1707.09835); and the inner loss is
a sum over tokens, so that the rates do not depend on a context's length. Norms, biases and the input embedding take no
step.

Glossary of shapes: B batch, n contexts per example, T context tokens, all of an example's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.second_order import LeanSecondDerivatives
from prosg_lib.deltas.applying import as_written
from prosg_lib.deltas.gradient_factors import captured_passes
from prosg_lib.generators.base import check_model, parameter_key, step_size_group
from prosg_lib.gradient_steps.one_step import check_finite, contexts_of_steps
from prosg_lib.text.padding import Rows


class KeysValues(NamedTuple):
    """One map's step: keys x_t (B, T, in), values -eta g_t (B, T, out)."""

    keys: Tensor
    values: Tensor

    def attend(self, x: Tensor) -> Tensor:
        """What the step adds to the map's output, (B, T', out) for inputs x (B, T', in)."""
        return (x @ self.keys.transpose(1, 2)) @ self.values


Step = Mapping[str, KeysValues]
"""By map what the steps taken so far add to it; empty before the first."""

_READOUT = "readout"


class MapStep(nn.Module):
    """One gradient step on all linear maps and the readout; start and learning rates are trained.

    Args:
        lr: every map's rate before training, for a loss summed over tokens.

    Attributes:
        moved: the start's difference from the model, by name of the weight.
        log_rates: logarithms of the maps' rates over `lr`, (maps + 1,), the readout's last.
    """

    def __init__(self, lm: LanguageModel, lr: float):
        super().__init__()
        self.fingerprint, self.lr = lm.fingerprint(), lr
        self.moved = nn.ParameterDict(
            {parameter_key(n): nn.Parameter(torch.zeros_like(w)) for n, w in lm.named_parameters()}
        )
        self.log_rates = nn.Parameter(torch.zeros(len(lm.editable()) + 1))

    def rates(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The inner learning rate of every map, and of the readout."""
        return dict(zip([*lm.editable(), _READOUT], self.lr * torch.exp(self.log_rates), strict=True))

    def optimiser_groups(self) -> list[dict]:
        """See `training.loop.groups_of`."""
        return [{"params": [*self.moved.parameters()], "weight_decay": 0.0}, step_size_group(self.log_rates)]

    def adapt(self, lm: LanguageModel, contexts: Rows, successive: bool):
        """The model after a step on its contexts, (B, n, C); see `one_step.adapted`.

        Raises:
            UserError: the start was trained for another model, or this model has no second derivatives as it runs here.
            NotFinite: a context's loss is not finite.
        """
        check_model(self.fingerprint, lm)
        start = {f"lm.{n}": w.detach() + self.moved[parameter_key(n)] for n, w in lm.named_parameters()}
        model, step, training = _HiddenAndLogits(lm), {}, torch.is_grad_enabled()
        if training:
            lm.check_second_order()
        for each in contexts_of_steps(contexts, successive):
            with torch.enable_grad():
                step = self._taken(model, start, step, each, create_graph=training)

        def logits_of(ids, valid, last=None):
            with _applied(lm, step):
                hidden, logits = torch.func.functional_call(model, start, (ids, valid, last))
            return logits + step[_READOUT].attend(hidden)

        return logits_of

    def _taken(
        self, model: _HiddenAndLogits, start: dict[str, Tensor], step: Step, contexts: Rows, create_graph: bool
    ) -> Step:
        """The steps so far and one more, on the mean loss of contexts (B, n, C)."""
        batch, n, _ = contexts.ids.shape
        ids, valid = (t.flatten(0, 1) for t in contexts)
        with LeanSecondDerivatives() if create_graph else nullcontext():
            with _applied(model.lm, step), captured_passes(model.lm, model.lm.editable()) as passes:
                hidden, logits = torch.func.functional_call(model, start, (ids[:, :-1], valid[:, :-1]))
            if step:
                logits = logits + step[_READOUT].attend(hidden)
            logits = logits if logits.requires_grad else logits.detach().requires_grad_()
            passes[_READOUT] = [(hidden, logits)]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = (losses * (valid[:, 1:] & valid[:, :-1])).sum() / n
        check_finite(loss)
        outputs = [out for each in passes.values() for _, out in each]
        gradients = iter(torch.autograd.grad(loss, outputs, create_graph=create_graph))
        rates, result = self.rates(model.lm), {}
        for name, each in passes.items():
            x, g = _concatenated([x for x, _ in each]), _concatenated([next(gradients) for _ in each])
            new = KeysValues(*(t.reshape(batch, -1, t.shape[-1]) for t in (x, -rates[name] * g)))
            result[name] = KeysValues(*(torch.cat(p, 1) for p in zip(step[name], new, strict=True))) if step else new
        return result


def _concatenated(pieces: list[Tensor]) -> Tensor:
    """Pieces of time (B, T, ...) as one, copied only where there are several."""
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


class _HiddenAndLogits(nn.Module):
    """The model as one module call: final hidden states and logits, of all positions or the last ones."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, valid: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
        hidden, _ = self.lm.step_through(ids, None, valid)
        hidden = hidden if last is None else hidden[:, -last:]
        return hidden, self.lm.read_out(hidden)


@contextmanager
def _applied(lm: LanguageModel, step: Step) -> Iterator[None]:
    """A context in which every map, but not the readout, adds its step to its output."""
    with as_written(), ExitStack() as hooks:
        for name, module in (lm.editable() if step else {}).items():
            hooks.enter_context(
                module.register_forward_hook(lambda module, args, out, own=step[name]: out + own.attend(args[0]))
            )
        yield
