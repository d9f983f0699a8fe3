"""The static delta: a control that ignores the prompt."""

from __future__ import annotations

import torch
from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.generators.base import Generator, parameter_key


class StaticDelta(Generator):
    """One trained delta for every prompt: what a generator is worth that does not look at its prompt.

    Attributes:
        U: (out, r) of every map, zero before training.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...]):
        super().__init__(lm, rank, endings)
        self.U = nn.ParameterDict(
            {parameter_key(n): nn.Parameter(torch.zeros(out, rank)) for n, out in self.out_sizes.items()}
        )

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
        return self._delta({name: self.U[parameter_key(name)].expand(len(ids), -1, -1) for name in self.names}), state
