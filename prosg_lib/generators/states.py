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
from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.generators.base import parameter_key
from prosg_lib.generators.final_state import StateReader


class StateGenerator(StateReader):
    """U = P sum z_j (K z_j)^T over the terms of one state or several; see above.

    Args:
        rank, width: r, and the trunk's width.
        endings: of the names of the maps that are changed.
        terms, size: m and H.
        ends: tokens that end a sentence: a state is taken after each of them, too; none: only the last state.

    Attributes:
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
        super().__init__(lm, rank, width, endings)
        self.terms, self.ends = terms, ends
        self.outer = nn.Linear(width, terms * size)
        self.heads = nn.ModuleDict({parameter_key(n): nn.Linear(size, out, False) for n, out in self.out_sizes.items()})
        self.keys = nn.ModuleDict({parameter_key(n): nn.Linear(size, rank, False) for n in self.names})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)

    def forward(self, lm, ids, valid=None):
        features, there, state = self.states(lm, ids, valid)
        z = self.outer(self.read(features)).unflatten(-1, (self.terms, -1)) * there[..., None, None]  # (B, S, m, H)
        z = z.flatten(1, 2)
        u = {}
        for name in self.names:
            sums = z.transpose(1, 2) @ self.keys[parameter_key(name)](z)  # sum_j z_j (K z_j)^T, (B, H, r)
            u[name] = self.heads[parameter_key(name)].weight @ sums
        return self._delta(u), state

    @torch.no_grad()
    def states(self, lm, ids, valid):
        """Those after each sentence and the last one, where there are tokens that end sentences."""
        if not self.ends:
            return super().states(lm, ids, valid)
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
