"""One gradient step on every linear map of a model and on its readout, kept as the tokens' factors.

The gradient of a map's weight is sum_t delta_t x_t^T over the context's tokens, x_t the map's input and delta_t the
loss's gradient at its output. So after one SGD step the map is

    W' x = W x - rate sum_t delta_t (x_t . x),

which is linear attention from the query to the context: inputs are keys, and -delta_t are values. No changed weight is
ever formed; a step costs what its tokens cost, and long contexts are learned in minutes. That the inner step can be
read so: Irie, Csordas, Schmidhuber 2022 (arXiv 2202.05798). Beyond the paper's plain step (`WeightStep`), every map has
a learning rate of its own that is trained with the start (as in Meta-SGD, Li et al. 2017, arXiv 1707.09835), and the
inner loss is a sum over tokens, so that the rates do not depend on a context's length. Norms, biases and the input
embedding do not take part in the step.

Glossary of shapes: B batch, n contexts each, C tokens of a context, T tokens that are remembered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.second_order import LeanSecondDerivatives
from prosg_lib.deltas.gradient_factors import TokenFactors, captured_passes
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.generators.base import key
from prosg_lib.gradient_steps.one_step import in_turn
from prosg_lib.text.padding import Rows

Memory = Mapping[str, TokenFactors]
"""By map: what the step adds to it, delta (B, T, out), the rate and the sign in it, and x (B, T, in)."""

_READOUT = "readout"
_FASTER = 30.0
"""An outer step that moves a weight by 0.001 moves a rate by 3 %."""


class MapStep(nn.Module):
    """One gradient step on all linear maps and the readout, from a start that is trained, at rates that are, too.

    Args:
        lr: every map's rate before the training, for a loss that is a sum over tokens.

    Attributes:
        moved: the start's difference to the model, by name of the weight.
        pace: logarithms of the maps' rates over `lr`, (maps + 1,), the readout's last.
    """

    def __init__(self, lm: LanguageModel, lr: float):
        super().__init__()
        self.fingerprint, self.lr = lm.fingerprint(), lr
        self.moved = nn.ParameterDict({key(n): nn.Parameter(torch.zeros_like(w)) for n, w in lm.named_parameters()})
        self.pace = nn.Parameter(torch.zeros(len(lm.editable()) + 1))

    def rates(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The inner learning rate of every map, and of the readout."""
        return dict(zip([*lm.editable(), _READOUT], self.lr * torch.exp(self.pace), strict=True))

    def optimiser_groups(self) -> list[dict]:
        """See `training.groups_of`. The rates' gradient is not clipped, and does not count where the weights' is."""
        return [
            {"params": [*self.moved.parameters()], "weight_decay": 0.0},
            {"params": [self.pace], "weight_decay": 0.0, "factor": _FASTER, "clip": math.inf},
        ]

    def after(self, lm: LanguageModel, contexts: Rows, successive: bool):
        """The model after a step on its contexts, (B, n, C); see `gradient_step.answering`.

        Raises:
            UserError: it was made for another model, or this one has no second derivative here.
            NotFinite: a context's loss is not finite.
        """
        if self.fingerprint != lm.fingerprint():
            raise UserError(f"this start is for model {self.fingerprint}, not for this one ({lm.fingerprint()})")
        start = {f"lm.{n}": w.detach() + self.moved[key(n)] for n, w in lm.named_parameters()}
        read = _Read(lm)
        memory: Memory = {}
        training = torch.is_grad_enabled()
        if training:
            lm.check_second_order()
        for told in in_turn(contexts, successive):
            with torch.enable_grad():
                learned = self._learned(read, start, memory, told, create_graph=training)
            memory = _both(memory, learned)

        def logits_of(ids, valid, last=None):
            with _remembering(lm, memory):
                return _recalled(*torch.func.functional_call(read, start, (ids, valid, last)), memory)

        return logits_of

    def _learned(self, read: _Read, start: dict, memory: Memory, told: Rows, create_graph: bool) -> Memory:
        """What a step on contexts (B, n, C) adds to each map: one on the mean of their losses."""
        batch, n, _ = told.ids.shape
        ids, valid = (t.flatten(0, 1) for t in told)
        with LeanSecondDerivatives() if create_graph else nullcontext():
            with _remembering(read.lm, memory), captured_passes(read.lm, read.lm.editable()) as seen:
                hidden, logits = torch.func.functional_call(read, start, (ids[:, :-1], valid[:, :-1]))
            logits = _recalled(hidden, logits, memory)
            logits = logits if logits.requires_grad else logits.detach().requires_grad_()
            seen[_READOUT] = [(hidden, logits)]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = (losses * (valid[:, 1:] & valid[:, :-1])).sum() / n
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss of the context is {loss.item()} before the step; look at both of them")
        outs = [out for passes in seen.values() for _, out in passes]
        slopes = iter(torch.autograd.grad(loss, outs, create_graph=create_graph))
        rates, learned = self.rates(read.lm), {}
        for name, passes in seen.items():
            x, slope = _joined([x for x, _ in passes]), _joined([next(slopes) for _ in passes])
            learned[name] = TokenFactors(*(t.reshape(batch, -1, t.shape[-1]) for t in (-rates[name] * slope, x)))
        return learned


def _joined(pieces: list[Tensor]) -> Tensor:
    """Pieces of time (B, T, ...) as one; a copy, which takes memory, only where there are several."""
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


class _Read(nn.Module):
    """A model as a function of its weights: final hidden states and logits, of all positions or of the last ones."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor, valid: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
        hidden, _ = self.lm.step_through(ids, None, valid)
        hidden = hidden if last is None else hidden[:, -last:]
        return hidden, self.lm.read_out(hidden)


def _recalled(hidden: Tensor, logits: Tensor, memory: Memory) -> Tensor:
    return logits + _from(memory[_READOUT], hidden) if memory else logits


def _from(known: TokenFactors, x: Tensor) -> Tensor:
    """sum_t delta_t (x_t . x), (B, T', out) for x (B, T', in)."""
    return (x @ known.x.transpose(1, 2)) @ known.grad_output


def _both(first: Memory, second: Memory) -> Memory:
    return {n: TokenFactors(*(torch.cat(p, 1) for p in zip(first[n], second[n], strict=True))) for n in first} or second


@contextmanager
def _remembering(lm: LanguageModel, memory: Memory) -> Iterator[None]:
    """While it lasts, every map says what it remembers, too."""
    maps = lm.editable() if memory else {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: out + _from(memory[name], args[0]))
        for name, module in maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
