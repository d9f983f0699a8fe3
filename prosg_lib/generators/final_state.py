"""The final-state generator: U from the state after the prompt alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser
from prosg_lib.errors import UserError
from prosg_lib.generators.base import DROPOUT, Generator, key


def _chosen(lm: LanguageModel, kinds: tuple[str, ...]) -> Tensor:
    """1 at the state features of these kinds, 0 at the others, (F,)."""
    names = lm.state_feature_names
    unknown = [kind for kind in kinds if kind not in names]
    if unknown or not kinds:
        raise UserError(
            f"no kind of state feature {', '.join(unknown) or 'chosen'}; a {type(lm).__name__} names "
            f"{', '.join(names) or 'none'}"
        )
    of_layer = torch.tensor([float(name in kinds) for name in names]).repeat_interleave(lm.config.width)
    return of_layer.repeat(lm.config.layers)


class FinalStateGenerator(Generator):
    """U from the final state: normalised features -> residual trunk -> one head a map.

    Args:
        features: kinds of state features that it sees (`LanguageModel.state_feature_names`); the others are 0 to it.
            None: all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rank: int,
        width: int,
        endings: tuple[str, ...],
        features: tuple[str, ...] | None = None,
    ):
        super().__init__(lm, rank, endings)
        self.register_buffer("seen", None if features is None else _chosen(lm, features), persistent=False)
        size = lm.state_features(lm.blank_state(1)).shape[1]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.inner = nn.Linear(size, width)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({key(n): nn.Linear(width, out * rank) for n, out in self.outs.items()})
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
            features = features if self.seen is None else features * self.seen
        h = self.inner(F.dropout(features, DROPOUT, self.training))
        for layer in self.trunk:
            h = h + layer(h)
        h = self.norm(h)
        u = {name: self.heads[key(name)](h).view(-1, out, self.rank) for name, out in self.outs.items()}
        return self._delta(u), state
