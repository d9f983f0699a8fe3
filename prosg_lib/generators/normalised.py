"""Generators for models that others trained, whose hidden states, embeddings and maps have sizes of their own.

In the project's own models all of these are of about the same size. In SmolLM2 they differ by factors of ten from map
to map, so that one learning rate would break some maps and leave others as they are. Here features are normalised
channel by channel, and every map is read and written in its own units: V^T x is divided by the size of a typical input,
and what is written is multiplied by that of a typical output. The first token of a text is left out of sums, because
transformers keep enormous numbers there, whatever it is (attention sinks; Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.deltas.gradient_factors import captured_inputs
from prosg_lib.generators.base import Generator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator

_LEAST = 1e-6


class _InUnits(Generator):
    """A generator that reads and writes every map in its own units.

    Attributes:
        reads, writes: typical sizes of the maps' inputs and outputs, (maps,).
    """

    def __init__(self, *sizes, **named):
        super().__init__(*sizes, **named)
        for name in ("reads", "writes"):
            self.register_buffer(name, torch.ones(len(self.names)))

    def directions(self, name):
        return super().directions(name) / self.reads[self.names.index(name)]

    def _delta(self, u):
        return super()._delta({name: write * u[name] for name, write in zip(self.names, self.writes, strict=True)})

    @torch.no_grad()
    def fit_normaliser(self, lm, ids, valid):
        maps = lm.editable()
        with captured_inputs(lm, self.names) as inputs:
            hidden, _ = lm.step_through(ids, None, valid)
        counted = valid & _seen_before(valid)
        for i, name in enumerate(self.names):
            x = inputs[name][counted]
            self.reads[i], self.writes[i] = _size(x), _size(maps[name](x))
        self._fit_features(torch.cat([hidden, lm.embed(ids)], -1)[counted])

    def _fit_features(self, features: Tensor) -> None:
        """Statistics of what a generator sees of tokens, (tokens, 2 D)."""


class NormalisedTokenGenerator(_InUnits, TokenGenerator):
    """The token-wise generator on normalised features, in every map's own units.

    Attributes:
        mean, spread: of hidden state and embedding, by channel, (2 D,).
    """

    def __init__(self, lm, rank, width, endings, label=True):
        super().__init__(lm, rank, width, endings, label)
        self.register_buffer("mean", torch.zeros(2 * lm.config.width))
        self.register_buffer("spread", torch.ones(2 * lm.config.width))

    def _fit_features(self, features):
        features = features.to(self.mean)
        self.mean, self.spread = features.mean(0), features.std(0).clamp(min=_LEAST)

    def _features(self, hidden, embedded):
        return (super()._features(hidden, embedded).to(self.mean) - self.mean) / self.spread

    def _terms(self, lm, ids, memory, valid):
        z, keys, state, last = super()._terms(lm, ids, memory, valid)
        before = _seen_before(torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)
        if memory is None:
            counted, first = before[:, :-1], ~before[:, -1]
        else:
            counted = torch.cat([~memory.last.first[:, None], torch.ones_like(before[:, 1:])], 1)
            first = torch.zeros_like(memory.last.first)
        keys = {name: k * counted[..., None] for name, k in keys.items()}
        return z, keys, state, last._replace(first=first)


class NormalisedStatic(_InUnits, StaticDelta):
    """The static control in every map's own units."""


def _seen_before(valid: Tensor) -> Tensor:
    """Whether the token before is one of the text, (B, T): false at a text's first."""
    return F.pad(valid[:, :-1], (1, 0))


def _size(x: Tensor) -> Tensor:
    """Root mean square of a typical token's numbers."""
    return x.float().pow(2).mean(-1).sqrt().median().clamp(min=_LEAST)
