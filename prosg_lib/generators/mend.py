"""The true gradient of a prompt, transformed by small networks: the third way to make a change of the weights.

After MEND (Mitchell et al. 2021, arXiv 2110.11309): the gradient of a linear map is a sum over tokens of
delta_t x_t^T. Each token's (x_t, delta_t), normalised per dimension, passes through two residual blocks of low rank,

    h = z + relu(A_1 B_1 z + b_1),   g = h + relu(A_2 B_2 h + b_2),   z = normalise([x; delta]),

that are exactly the identity at first (A = 0, b = 0), and the change is the sum over tokens of the transformed outer
products, times a learned step size. x and delta are constants, so that training needs no second derivative.

Where ours is another, all our reading:

- W' = W - eta sum_t delta~_t (V V^T x~_t)^T: what is transformed is read along r learned directions V, shared by all
  prompts. MEND's edit has as many directions as tokens. Ours has rank r however long the prompt is, so that everything
  that takes a LowRankDelta takes it, and two ways with the same r are compared with the same room.
- The gradient is of the prompt's own NLL, a sum over tokens; MEND's, of an edit's target.
- What the blocks add is put back on the gradient's own scale, x~ = x + std (g(z) - z), so that the first step taken is
  a true gradient step; MEND takes the normalised factors for the gradient.
- Statistics are those of a batch of prompts, taken once before training: the model is frozen, so that running ones
  would come to the same, and several processes would each have their own.
- Every map has blocks of its own; MEND shares them among maps of one shape, with a scale and a shift for each.

Glossary of shapes: B batch, T prompt tokens, r rank, H rank of the blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser
from prosg_lib.deltas.gradient_factors import TokenFactors
from prosg_lib.deltas.low_rank import map_shape
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator, key
from prosg_lib.generators.true_gradient import prompt_gradient

_FASTER = 30.0
"""Of the step sizes, as in `map_step`: an outer step that moves a weight by 0.001 moves a step size by 3 %."""


class _Residual(nn.Module):
    """z -> z + relu(A B z + b), (..., n) -> (..., n); the identity at first, and A's gradient is not zero there."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.B = nn.Linear(size, width, bias=False)
        self.A = nn.Linear(width, size)
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.A.bias)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.A(self.B(z)).clamp(min=0)  # clamp, unlike relu, has a slope of 1 at 0


class TransformedGradient(Generator):
    """One backward pass over the prompt, and its tokens' factors transformed: U = -eta sum_t delta~_t (V^T x~_t)^T.

    Args:
        rank: of the change; width: of the blocks, H.
        lr: every map's step size before the training, for a loss that is a sum over tokens.

    Attributes:
        blocks: by map, on [x; delta], (in + out).
        pace: logarithms of the maps' step sizes over `lr`, (maps,).
    """

    def __init__(self, lm: LanguageModel, rank: int, width: int, endings: tuple[str, ...], lr: float):
        super().__init__(lm, rank, endings)
        if width < 1 or lr <= 0:
            raise UserError(f"blocks of rank {width} and a step size of {lr} asked for; both are above 0")
        maps, self.lr = lm.editable(), lr
        self.blocks = nn.ModuleDict()
        for name in self.names:
            size = sum(map_shape(maps[name]))
            self.blocks[key(name)] = nn.Sequential(_Residual(size, width), _Residual(size, width))
            self.register_buffer(f"{key(name)}_mean", torch.zeros(size))
            self.register_buffer(f"{key(name)}_std", torch.ones(size))
        self.pace = nn.Parameter(torch.zeros(len(self.names)))

    def optimiser_groups(self) -> list[dict]:
        """See `training.groups_of`. The step sizes' gradient is not clipped, and does not count where others' is."""
        return [
            {"params": [*self.V.parameters(), *self.blocks.parameters()]},
            {"params": [self.pace], "weight_decay": 0.0, "factor": _FASTER, "clip": math.inf},
        ]

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the factors' statistics over the tokens of a batch of prompts; once, before training."""
        told = valid[:, :-1]
        for name, factors in prompt_gradient(lm, self.names, ids, valid)[0].items():
            found = Normaliser.fit(torch.cat([factors.x[told], factors.grad_output[told]], -1))
            self.get_buffer(f"{key(name)}_mean").copy_(found.mean)
            self.get_buffer(f"{key(name)}_std").copy_(found.std)

    def forward(self, lm, ids, valid=None):
        gradients, state = prompt_gradient(lm, self.names, ids, valid)
        u = {}
        for (name, factors), pace in zip(gradients.items(), self.pace, strict=True):
            delta, x = self.transformed(name, factors)
            if valid is not None:
                delta = delta * valid[:, :-1, None]
            u[name] = -self.lr * pace.exp() * delta.mT @ (x @ self.V[key(name)])
        return self._delta(u), state

    def transformed(self, name: str, factors: TokenFactors) -> TokenFactors:
        """What the blocks make of a map's factors, (B, T, out) and (B, T, in); exactly those, before training."""
        raw = torch.cat([factors.x, factors.grad_output], -1).to(self.pace.dtype)
        mean, std = (self.get_buffer(f"{key(name)}_{part}") for part in ("mean", "std"))
        z = Normaliser(mean, std)(raw)
        changed = raw + std * (self.blocks[key(name)](z) - z)
        x, delta = changed.split([factors.x.shape[-1], factors.grad_output.shape[-1]], -1)
        return TokenFactors(delta, x)
