"""A probe: how many of the prompt's facts can be read off the state after it, whatever the model itself makes of them?

It is the limit of every generator that sees that state alone. The probe is given the state's features and the words of
the slot that it is asked for, and names the value's tokens, each read out by the model's own head::

    h = A f * B q,    f: features of the state (`LanguageModel.state_features`), q: mean embedding of the slot's words
    logits of token j = read_out(C_j trunk(h))

Glossary of shapes: B facts, F features, D model width, H width of the probe, J tokens of a value, its end included.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import Normaliser
from prosg_lib.config.sizes import Training
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.open_world import Item, OpenWorld, Shape
from prosg_lib.text.padding import left_padded, right_padded
from prosg_lib.training.loop import Loss

LONGEST = 6
"""Tokens of a value and the full stop behind it, at most."""

_FACTS = 6  # of a prompt that are asked for


class StateProbe(nn.Module):
    """Features of states and words of slots -> hidden states of the values' tokens; see above.

    Attributes:
        mean, std: statistics of the features, (F,); `fit_normaliser` collects them.
        fingerprint: of the model that it is for.
    """

    def __init__(self, lm: LanguageModel, width: int):
        super().__init__()
        features = lm.state_features(lm.blank_state(1)).shape[1]
        self.fingerprint = lm.fingerprint()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.of_state, self.of_slot = nn.Linear(features, width), nn.Linear(lm.config.width, width)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, LONGEST * lm.config.width)

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the features' statistics over a batch of prompts; once, before training."""
        found = Normaliser.fit(lm.state_features(lm.step_through(ids, None, valid)[1]))
        self.mean.copy_(found.mean)
        self.std.copy_(found.std)

    def forward(self, features: Tensor, slot: Tensor) -> Tensor:
        """features (B, F), slot (B, D) -> (B, J, D)."""
        h = self.of_state(Normaliser(self.mean, self.std)(features)) * self.of_slot(slot)
        for layer in self.trunk:
            h = h + layer(h)
        return self.out(self.norm(h)).unflatten(-1, (LONGEST, -1))


@dataclass(frozen=True)
class FactBatch(Examples):
    """Prompts, and facts of the user's in them.

    Attributes:
        prompt, prompt_valid: (B, P), left-padded.
        slots: token ids of the slots' words, (B, facts, S), -1 at the padding.
        values: token ids of the values, each with a full stop, (B, facts, J), -1 at the padding.
    """

    prompt: Tensor
    prompt_valid: Tensor
    slots: Tensor
    values: Tensor


def fact_batch(data: OpenWorld, items: list[Item]) -> FactBatch:
    """Items -> one batch, with the first facts of the user's of each; all have as many."""
    encode = data.tokenizer.encode_long
    asked = [[f for f in item.facts if f.who is None][:_FACTS] for item in items]
    slots = [[t + 1 for t in encode(" " + fact.slot)] for facts in asked for fact in facts]
    values = [[t + 1 for t in encode(f" {fact.value}.")] for facts in asked for fact in facts]
    longest = [1] * LONGEST  # a row of the longest length, so that every batch has it

    def rows(tokens: list[list[int]]) -> Tensor:
        return (right_padded(tokens) - 1).unflatten(0, (len(items), -1))

    return FactBatch(
        *left_padded([data.encode_prompt(item) for item in items]),
        rows(slots),
        (right_padded([*values, longest])[:-1] - 1).unflatten(0, (len(items), -1)),
    )


def probe_draw(data: OpenWorld, sizes: Training) -> Callable[[int], FactBatch]:
    """Step -> batch, of prompts as the generators have them."""

    def batch_of(step: int) -> FactBatch:
        rng = random.Random(f"{data.seed}/{step}")
        shape = Shape(rng.choice(sizes.facts), 0, 1, others=rng.choice((0, 1, 2)), instructions=rng.choice((0, 1)))
        return fact_batch(data, data.items(sizes.batch, shape, start=step * sizes.batch))

    return batch_of


def probe_objective(lm: LanguageModel, probe: StateProbe) -> Callable[[int, FactBatch], Loss]:
    """Cross-entropy of the values' tokens, given the state after the prompt; the model itself stays frozen."""

    def loss_of(step: int, batch: FactBatch) -> Loss:
        logits, targets = _read(lm, probe, batch)
        there = targets >= 0
        whole = int((batch.whole.values >= 0).sum())
        loss = F.cross_entropy(logits[there].float(), targets[there], reduction="sum") / whole
        return Loss(loss, {"answer": loss})

    return loss_of


def _read(lm: LanguageModel, probe: StateProbe, batch: FactBatch) -> tuple[Tensor, Tensor]:
    """Logits (B facts, J, vocab), and the right tokens, (B facts, J), -1 at the padding."""
    with torch.no_grad():
        features = lm.state_features(lm.step_through(batch.prompt, None, batch.prompt_valid)[1])
        words = batch.slots >= 0
        embedded = lm.embed(batch.slots.clamp(min=0).flatten(0, 1)).unflatten(0, batch.slots.shape[:2])
        slot = (embedded * words[..., None]).sum(2) / words.sum(2, keepdim=True)
    each = features[:, None].expand(-1, slot.shape[1], -1)
    return lm.read_out(probe(each, slot).flatten(0, 1)), batch.values.flatten(0, 1)


@torch.no_grad()
def held(lm: LanguageModel, probe: StateProbe, data: OpenWorld, items: list[Item]) -> list[float]:
    """The share of each item's facts whose value the probe names exactly, from the state after the prompt."""
    batch = fact_batch(data, items).to(next(lm.parameters()).device)
    logits, targets = _read(lm, probe, batch)
    right = ((logits.argmax(-1) == targets) | (targets < 0)).all(-1)
    return right.float().unflatten(0, batch.values.shape[:2]).mean(1).tolist()
