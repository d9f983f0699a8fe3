"""The synthetic gradient: from what a recurrent model makes of a prompt to a low-rank change of its weights.

After the abstract of ProSG (arXiv 2311.01981). Its base model, rank, layers and losses are not public, so all of these
are our reading. Two generators run the model forward only, and have no effect before training (last layer zero):

- `FinalStateGenerator`: U from the state after the prompt alone. This is the most literal reading; it cannot know what
  the state has already forgotten.
- `TokenGenerator`: U as a sum over the prompt's tokens, like the true gradient G = sum_t g_t x_t^T, with g_t predicted.

`TransformedGradient` (MEND) starts from the true gradient and does need a backward pass. `StaticDelta` is the control:
a change of the same size, trained in the same way, that ignores the prompt.

Glossary of shapes: B batch, T prompt tokens, r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import LogitsOf, with_delta
from prosg_lib.deltas.gradient_factors import captured_inputs
from prosg_lib.deltas.low_rank import Factors, LowRankDelta, map_shape
from prosg_lib.errors import UserError
from prosg_lib.text.padding import Rows

SCALE = 0.1
"""Scale of every generated delta, as in DNI: early in training, a sum over a hundred tokens would break the model."""

DROPOUT = 0.1
"""On a generator's inputs during training; without it, it memorizes the wording of the training prompts."""

ALL_MAPS = ("",)
"""Name endings that match every editable map, whatever the model calls them."""


def edited_maps(lm: LanguageModel, endings: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The editable maps of every block whose names end in one of these, e.g. "att.output".

    Raises:
        UserError: an ending matches no map.
    """
    maps = lm.editable()
    for ending in endings:
        if not any(name.endswith(ending) for name in maps):
            raise UserError(f"this model has no linear map ...{ending}; it has {', '.join(maps)}")
    return {name: module for name, module in maps.items() if name.endswith(endings)}


def parameter_key(name: str) -> str:
    """A module's name as a key of a parameter dictionary, which allows no dots."""
    return name.replace(".", "_")


def check_model(fingerprint: str | None, lm: LanguageModel, what: str = "this module") -> None:
    """Raises a UserError if `what` is to be used with this model and was trained for one with another fingerprint."""
    if fingerprint != lm.fingerprint():
        raise UserError(
            f"{what} was trained for model {fingerprint}, not for this one ({lm.fingerprint()}); load that model, "
            "in the same quantisation and with the same window, if it has one"
        )


def step_size_group(log_step_sizes: nn.Parameter) -> dict:
    """Optimiser group of learned step sizes, kept as logarithms; see `training.loop.groups_of`.

    They learn 30 times as fast, so that a training step that moves a weight by 0.001 moves a step size by 3 %. Their
    gradient is not clipped, and does not count towards the norm by which the others are clipped.
    """
    return {"params": [log_step_sizes], "weight_decay": 0.0, "factor": 30.0, "clip": math.inf}


class Generator(nn.Module, ABC):
    """A prompt, as a recurrent model has read it -> LowRankDelta.

    Attributes:
        names: the maps that are changed.
        V: their reading directions (in, r), learned and shared by all prompts.
        out_sizes: their numbers of outputs, by name.
        fingerprint: of the model that the generator is for.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...]):
        super().__init__()
        maps = edited_maps(lm, endings)
        self.names, self.rank, self.fingerprint = list(maps), rank, lm.fingerprint()
        self.out_sizes = {name: map_shape(m)[0] for name, m in maps.items()}
        self.V = nn.ParameterDict()
        for name, module in maps.items():
            shape = map_shape(module)
            if not 1 <= rank <= min(shape):
                raise UserError(
                    f"rank {rank} asked for, but {name} is {shape}; a change of it has rank 1 to {min(shape)}"
                )
            self.V[parameter_key(name)] = nn.Parameter(torch.randn(shape[1], rank) / shape[1] ** 0.5)

    def directions(self, name: str) -> Tensor:
        """V of a map, (in, r)."""
        return self.V[parameter_key(name)]

    def _delta(self, u: dict[str, Tensor]) -> LowRankDelta:
        factors = {name: Factors(u[name], self.directions(name)[None]) for name in self.names}
        return LowRankDelta(factors, self.fingerprint, SCALE)

    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect statistics over a batch of prompts, once, before training. Most generators need none."""

    @abstractmethod
    def forward(
        self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None
    ) -> tuple[LowRankDelta, RecurrentState]:
        """The delta for each prompt, and the state after it.

        The delta has a gradient for the generator's parameters; the model's weights get none.

        Args:
            ids: (B, T), left-padded where `valid` (B, T) is False.
        """

    @torch.no_grad()
    def prompt_keys(self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The keys k_t = V^T x_t under which a prompt's tokens look up a delta: map -> (B, T, r), zero at padding."""
        with captured_inputs(lm, self.names) as inputs:
            lm.step_through(ids, None, valid)
        mask = 1.0 if valid is None else valid[..., None]
        return {name: inputs[name] @ self.directions(name) * mask for name in self.names}

    def adapt(self, lm: LanguageModel, contexts: Rows, successive: bool) -> LogitsOf:
        """The model under the delta of each example's context, (B, 1, C); see `gradient_steps.one_step.Method`.

        Raises:
            UserError: there is more than one context per example.
        """
        if contexts.ids.shape[1] > 1:
            raise UserError("a generator takes one prompt per example; join the contexts into one text")
        return with_delta(lm, self(lm, contexts.ids[:, 0], contexts.valid[:, 0])[0])

    @torch.no_grad()
    def memorize(self, lm: LanguageModel, prompts: list[str] | list[list[int]]) -> LowRankDelta:
        """One delta per prompt.

        Raises:
            UserError: a prompt is empty or longer than the model's window, or the generator was trained for another
                model.
        """
        check_model(self.fingerprint, lm)
        self.eval()  # no dropout
        ids, valid = lm.encode_prompts(prompts)
        lm.check_fits(ids)
        return self(lm, ids, None if valid.all() else valid)[0]
