"""The final-state generator: U from the state after the prompt alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser
from prosg_lib.generators.base import DROPOUT, Generator, parameter_key


class FinalStateGenerator(Generator):
    """Normalised features of the final state (B, F) -> residual trunk (B, width) -> one head per map, U (B, out, r).

    Attributes:
        mean, std: statistics of the features, (F,); `fit_normaliser` collects them.
        heads: one linear layer per map, zero before training.
    """

    def __init__(self, lm: LanguageModel, rank: int, width: int, endings: tuple[str, ...]):
        super().__init__(lm, rank, endings)
        size = lm.state_features(lm.blank_state(1)).shape[1]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.inner = nn.Linear(size, width)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {parameter_key(n): nn.Linear(width, out * rank) for n, out in self.out_sizes.items()}
        )
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the features' statistics over a batch of prompts; once, before training."""
        _, state = lm.step_through(ids, None, valid)
        found = Normaliser.fit(lm.state_features(state))
        self.mean.copy_(found.mean)
        self.std.copy_(found.std)

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
            features = Normaliser(self.mean, self.std)(lm.state_features(state))
        h = self.inner(F.dropout(features, DROPOUT, self.training))
        for layer in self.trunk:
            h = h + layer(h)
        h = self.norm(h)
        u = {name: self.heads[parameter_key(name)](h).view(-1, out, self.rank) for name, out in self.out_sizes.items()}
        return self._delta(u), state
