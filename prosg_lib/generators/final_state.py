"""The final-state generator: U from the state after the prompt alone; and what generators that see states share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser, RecurrentState
from prosg_lib.generators.base import DROPOUT, Generator, parameter_key


class StateReader(Generator):
    """The base of generators that see states, no tokens: normalised features (..., F) -> residual trunk (..., width).

    Attributes:
        mean, std: statistics of the features, (F,); `fit_normaliser` collects them.
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

    @torch.no_grad()
    def states(self, lm: LanguageModel, ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, RecurrentState]:
        """Features of the states that it sees of each prompt, (B, S, F), which of them there are, (B, S), and the last
        state. Here S is 1, the last state."""
        _, state = lm.step_through(ids, None, valid)
        features = lm.state_features(state)[:, None]
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=ids.device), state

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the features' statistics over a batch of prompts; once, before training."""
        features, there, _ = self.states(lm, ids, valid)
        found = Normaliser.fit(features[there])
        self.mean.copy_(found.mean)
        self.std.copy_(found.std)

    def read(self, features: Tensor) -> Tensor:
        """Features (..., F) -> (..., width)."""
        h = self.inner(F.dropout(Normaliser(self.mean, self.std)(features), DROPOUT, self.training))
        for layer in self.trunk:
            h = h + layer(h)
        return self.norm(h)


class FinalStateGenerator(StateReader):
    """The final state's features -> trunk (B, width) -> one head per map, U (B, out, r).

    Attributes:
        heads: one linear layer per map, zero before training.
    """

    def __init__(self, lm: LanguageModel, rank: int, width: int, endings: tuple[str, ...]):
        super().__init__(lm, rank, width, endings)
        self.heads = nn.ModuleDict(
            {parameter_key(n): nn.Linear(width, out * rank) for n, out in self.out_sizes.items()}
        )
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, lm, ids, valid=None):
        features, _, state = self.states(lm, ids, valid)
        h = self.read(features[:, 0])
        u = {name: self.heads[parameter_key(name)](h).view(-1, out, self.rank) for name, out in self.out_sizes.items()}
        return self._delta(u), state
