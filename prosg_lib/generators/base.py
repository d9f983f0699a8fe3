"""The synthetic gradient: from what a recurrent model makes of a prompt to a low-rank change of its weights.

After the abstract of ProSG (arXiv 2311.01981); its base model, rank, layers and losses are not public, so all of them
here are our reading. Two generators, both forward only, both without effect before training (last layer zero):

- `FinalStateGenerator`: U from the state after the prompt alone. The most literal reading; it cannot know what the
  state has forgotten already.
- `TokenGenerator`: the true gradient is G = sum_t delta_t x_t^T. Predict delta_t from the hidden state at t, token t
  and the next prompt token (the label; conditional DNI, Jaderberg et al. 2016, section 2), read the real inputs x_t
  along r learned directions V shared by all prompts, and add a predicted part: U = sum_t delta_t (V^T x_t + K z_t)^T,
  z_t being what delta_t is predicted from, too. A sum over tokens, so that it streams and adds.

`StaticDelta` is their control: a change of the same size, trained alike, blind to the prompt.

Glossary of shapes: B batch, T prompt tokens, D model width, H hidden width, r rank, F state features.
"""

from __future__ import annotations

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
"""Of the synthetic gradient, as in DNI: sums over a hundred tokens would otherwise break the model at first."""


DROPOUT = 0.1
"""Of what a generator reads, while it trains: without it, the wording of the training prompts is learned by heart."""


EVERY = ("",)
"""Endings that every editable map of a model has, whatever its class calls them."""


def edited_maps(lm: LanguageModel, endings: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The editable maps of every block whose name ends so, e.g. "att.output".

    Raises:
        UserError: no map ends so.
    """
    maps = lm.editable()
    for ending in endings:
        if not any(name.endswith(ending) for name in maps):
            raise UserError(f"this model has no linear map ...{ending}; it has {', '.join(maps)}")
    return {name: module for name, module in maps.items() if name.endswith(endings)}


def _directions(maps: dict[str, nn.Linear], rank: int) -> nn.ParameterDict:
    """Random reading directions V (in, r) of every map."""
    found = nn.ParameterDict()
    for name, module in maps.items():
        shape = map_shape(module)
        if not 1 <= rank <= min(shape):
            raise UserError(f"rank {rank} asked for, but {name} is {shape}; a change of it has rank 1 to {min(shape)}")
        found[key(name)] = nn.Parameter(torch.randn(shape[1], rank) / shape[1] ** 0.5)
    return found


def key(name: str) -> str:
    """A module's name as one of a parameter dictionary, which allows no dots."""
    return name.replace(".", "_")


class Generator(nn.Module, ABC):
    """A prompt, as a recurrent model has read it -> LowRankDelta.

    Attributes:
        names: the maps that are changed.
        V: the reading directions, shared by all prompts.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...]):
        super().__init__()
        maps = edited_maps(lm, endings)
        self.names = list(maps)
        self.V = _directions(maps, rank)
        self.outs = {name: map_shape(m)[0] for name, m in maps.items()}
        self.rank = rank
        self.fingerprint = lm.fingerprint()

    def _delta(self, u: dict[str, Tensor]) -> LowRankDelta:
        return LowRankDelta({n: Factors(u[n], self.V[key(n)][None]) for n in self.names}, self.fingerprint, SCALE)

    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the statistics that it needs over a batch of prompts, once, before training; as a rule none."""

    @abstractmethod
    def forward(
        self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None
    ) -> tuple[LowRankDelta, RecurrentState]:
        """The change for each prompt of a left-padded batch (B, T), and the state after the prompt.

        The model itself is only run forward and gets no gradient; the change has one for the generator's parameters.
        """

    @torch.no_grad()
    def keys_of(self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """By map the keys under which a change of this generator is looked up by a prompt's own tokens, V^T x_t.

        Args:
            ids: (B, T), left-padded where `valid` (B, T) is False.
        Returns:
            map -> (B, T, r), zero at padding.
        """
        with captured_inputs(lm, self.names) as inputs:
            lm.step_through(ids, None, valid)
        told = 1.0 if valid is None else valid[..., None]
        return {name: inputs[name] @ self.V[key(name)] * told for name in self.names}

    def after(self, lm: LanguageModel, contexts: Rows, successive: bool) -> LogitsOf:
        """The model after its contexts, (B, 1, C): see `gradient_step.Way`.

        Raises:
            UserError: more than one context an example.
        """
        if contexts.ids.shape[1] > 1:
            raise UserError("a generator takes one prompt an example; join the contexts to one text")
        return with_delta(lm, self(lm, contexts.ids[:, 0], contexts.valid[:, 0])[0])

    @torch.no_grad()
    def memorize(self, lm: LanguageModel, prompts: list[str] | list[list[int]]) -> LowRankDelta:
        """One change per prompt, forward only.

        Raises:
            UserError: a prompt is empty, or the generator was trained for another model.
        """
        self.check(lm)
        self.eval()  # no dropout
        ids, valid = lm.encode_prompts(prompts)
        return self(lm, ids, None if valid.all() else valid)[0]

    def check(self, lm: LanguageModel) -> None:
        if self.fingerprint != lm.fingerprint():
            raise UserError(
                f"this generator was trained for model {self.fingerprint}, not for this one ({lm.fingerprint()})"
            )
