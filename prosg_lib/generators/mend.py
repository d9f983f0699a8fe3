"""The true gradient of a prompt, transformed by small networks: a third kind of generator.

After MEND (Mitchell et al. 2021, arXiv 2110.11309). The gradient of a linear map is a sum over tokens, sum_t g_t x_t^T.
The pair (x_t, g_t) of every token, normalised per dimension, passes through two residual blocks of low rank,

    h = z + relu(A_1 B_1 z + b_1),   o = h + relu(A_2 B_2 h + b_2),   z = normalise([x; g]),

which start as the identity (A = 0, b = 0). The delta is the sum over tokens of the transformed outer products, times a
learned step size. x and g are constants, so training needs no second derivatives.

Where we differ from MEND, all our reading:

- W' = W - eta sum_t g~_t (V V^T x~_t)^T: the result is read along r learned directions V, shared by all prompts. MEND's
  edit has as many directions as tokens; ours has rank r however long the prompt is, so it is a LowRankDelta like any
  other, and generators of equal r are compared at equal capacity.
- The gradient is of the prompt's own NLL, summed over tokens; MEND takes that of an edit's target.
- What the blocks add is put back on the gradient's own scale, x~ = x + std (o(z) - z), so that before training the
  delta is a true gradient step; MEND takes the normalised factors for the gradient.
- Statistics come from one batch of prompts before training. The model is frozen, so running statistics would converge
  to the same values, and parallel processes would each have their own.
- Every map has its own blocks; MEND shares them among maps of one shape, with a scale and a shift for each.

Glossary of shapes: B batch, T prompt tokens, r rank, H rank of the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser
from prosg_lib.deltas.gradient_factors import TokenFactors
from prosg_lib.deltas.low_rank import map_shape
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator, parameter_key, step_size_group
from prosg_lib.generators.true_gradient import prompt_gradient


class _Residual(nn.Module):
    """z -> z + relu(A B z + b), (..., n) -> (..., n); starts as the identity, where A's gradient is not zero."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.B = nn.Linear(size, width, bias=False)
        self.A = nn.Linear(width, size)
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.A.bias)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.A(self.B(z)).clamp(min=0)  # clamp, unlike relu, has a slope of 1 at 0


class TransformedGradient(Generator):
    """One backward pass over the prompt, its factors transformed token by token: U = -eta sum_t g~_t (V^T x~_t)^T.

    Args:
        rank: of the delta; width: of the blocks, H.
        lr: every map's step size before training, for a loss summed over tokens.

    Attributes:
        blocks: by map, on [x; g], (in + out).
        log_step_sizes: logarithms of the maps' step sizes over `lr`, (maps,).
    """

    def __init__(self, lm: LanguageModel, rank: int, width: int, endings: tuple[str, ...], lr: float):
        super().__init__(lm, rank, endings)
        if width < 1 or lr <= 0:
            raise UserError(f"blocks of rank {width} and a step size of {lr} asked for; both must be above 0")
        maps, self.lr = lm.editable(), lr
        self.blocks = nn.ModuleDict()
        for name in self.names:
            size = sum(map_shape(maps[name]))
            self.blocks[parameter_key(name)] = nn.Sequential(_Residual(size, width), _Residual(size, width))
            self.register_buffer(f"{parameter_key(name)}_mean", torch.zeros(size))
            self.register_buffer(f"{parameter_key(name)}_std", torch.ones(size))
        self.log_step_sizes = nn.Parameter(torch.zeros(len(self.names)))

    def optimiser_groups(self) -> list[dict]:
        """See `training.loop.groups_of`."""
        return [{"params": [*self.V.parameters(), *self.blocks.parameters()]}, step_size_group(self.log_step_sizes)]

    def _normaliser(self, name: str) -> Normaliser:
        return Normaliser(*(self.get_buffer(f"{parameter_key(name)}_{part}") for part in ("mean", "std")))

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the factors' statistics over the tokens of a batch of prompts; once, before training."""
        counted = valid[:, :-1]
        for name, (g, x) in prompt_gradient(lm, self.names, ids, valid)[0].items():
            found, own = Normaliser.fit(torch.cat([x[counted], g[counted]], -1)), self._normaliser(name)
            own.mean.copy_(found.mean)
            own.std.copy_(found.std)

    def forward(self, lm, ids, valid=None):
        gradients, state = prompt_gradient(lm, self.names, ids, valid)
        u = {}
        for (name, factors), log_step in zip(gradients.items(), self.log_step_sizes, strict=True):
            g, x = self.transformed(name, factors)
            if valid is not None:
                g = g * valid[:, :-1, None]
            u[name] = -self.lr * log_step.exp() * g.mT @ (x @ self.V[parameter_key(name)])
        return self._delta(u), state

    def transformed(self, name: str, factors: TokenFactors) -> TokenFactors:
        """A map's factors after its blocks, (B, T, out) and (B, T, in); unchanged before training."""
        g, x = factors
        raw = torch.cat([x, g], -1).to(self.log_step_sizes.dtype)
        normaliser = self._normaliser(name)
        z = normaliser(raw)
        changed = raw + normaliser.std * (self.blocks[parameter_key(name)](z) - z)
        x, g = changed.split([x.shape[-1], g.shape[-1]], -1)
        return TokenFactors(g, x)
