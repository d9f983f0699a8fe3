"""The state generator: U from the states that encode the prompt, and from nothing else.

The literal reading of ProSG's abstract. It sees the state after the prompt, or those after each of its sentences, and
never a token. Each state s becomes a few terms, each a vector and a key a map; their outer products add up:

    h = trunk(normalised s)
    z_j = (A h)_j,   j = 1 ... m
    U = P sum_s sum_j z_j (K z_j)^T

One head that makes U directly would have width * out * rank weights a map. Factored like this it has
out * H + H * rank, and the same form as the token-wise generator's, with states in the place of tokens.

Glossary of shapes: B batch, F state features, H numbers in a term, m terms a state, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser, RecurrentState
from prosg_lib.generators.base import DROPOUT, Generator, parameter_key


class StateGenerator(Generator):
    """U = P sum z_j (K z_j)^T over the terms of one state or several; see above.

    Args:
        rank, width: r, and the trunk's width.
        endings: of the names of the maps that are changed.
        terms, size: m and H.
        ends: tokens that end a sentence: a state is taken after each of them, too; none: only the last state.

    Attributes:
        mean, std: statistics of the features, (F,); `fit_normaliser` collects them.
        heads, keys: P and K, by map; P is zero before training.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rank: int,
        width: int,
        endings: tuple[str, ...],
        terms: int = 32,
        size: int = 64,
        ends: tuple[int, ...] = (),
    ):
        super().__init__(lm, rank, endings)
        features = lm.state_features(lm.blank_state(1)).shape[1]
        self.terms, self.ends = terms, ends
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.inner = nn.Linear(features, width)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, terms * size)
        self.heads = nn.ModuleDict({parameter_key(n): nn.Linear(size, out, False) for n, out in self.out_sizes.items()})
        self.keys = nn.ModuleDict({parameter_key(n): nn.Linear(size, rank, False) for n in self.names})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the features' statistics over a batch of prompts; once, before training."""
        features, there, _ = self._states(lm, ids, valid)
        found = Normaliser.fit(features[there])
        self.mean.copy_(found.mean)
        self.std.copy_(found.std)

    def forward(self, lm, ids, valid=None):
        features, there, state = self._states(lm, ids, valid)
        h = self.inner(F.dropout(Normaliser(self.mean, self.std)(features), DROPOUT, self.training))
        for layer in self.trunk:
            h = h + layer(h)
        z = self.outer(self.norm(h)).unflatten(-1, (self.terms, -1)) * there[..., None, None]  # (B, S, m, H)
        z = z.flatten(1, 2)
        u = {}
        for name in self.names:
            sums = z.transpose(1, 2) @ self.keys[parameter_key(name)](z)  # sum_j z_j (K z_j)^T, (B, H, r)
            u[name] = self.heads[parameter_key(name)].weight @ sums
        return self._delta(u), state

    @torch.no_grad()
    def _states(self, lm: LanguageModel, ids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, RecurrentState]:
        """Features of the states along each prompt, (B, S, F), which of them there are, (B, S), and the last state."""
        if not self.ends:
            _, state = lm.step_through(ids, None, valid)
            features = lm.state_features(state)[:, None]
            return features, torch.ones(features.shape[:2], dtype=torch.bool, device=ids.device), state
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        end = torch.isin(ids, torch.tensor(self.ends, device=ids.device)) & valid
        end[:, -1] = True
        number = end.long().cumsum(1) - end.long()  # of the sentence that each token is in
        state, features, there = None, [], []
        for s in range(int(number.max()) + 1):
            inside = valid & (number == s)
            longest = int(inside.sum(1).max())
            order = inside.long().argsort(dim=1, stable=True)[:, -longest:]  # the sentence's tokens at the right end
            _, state = lm.step_through(ids.gather(1, order), state, inside.gather(1, order))
            features.append(lm.state_features(state))
            there.append(inside.any(1))
        return torch.stack(features, 1), torch.stack(there, 1), state
