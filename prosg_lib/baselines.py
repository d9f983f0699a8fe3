"""The methods that are compared: ways to make a recurrent model keep its prompt, and the controls.

A method is a start (the state that the text after the prompt begins from, and a delta or none) and, for one of them,
what is read again right before the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.generator import Generator
from prosg_lib.lowrank import LowRankDelta
from prosg_lib.state import RecurrentState

METHODS = {
    "base": "the plain model: the prompt is read, and the state carries on",
    "prosg-token": "ProSG, token-wise generator: as base, with the prompt's delta in the weights",
    "prosg-final": "ProSG, final-state generator: as base, with the prompt's delta in the weights",
    "wrong": "control: state and delta (token-wise) of another prompt of the same split",
    "static": "control: a trained delta of the same size that is blind to the prompt, which is not read at all",
    "static-read": "control: the same static delta, and the prompt is read as in base",
    "none": "control: no prompt, no delta",
    "repeated": "upper bound: as base, and the prompt is read once more right before the question",
}


_GENERATOR = {"prosg-token": "token", "wrong": "token", "prosg-final": "final", "static-read": "static"}


@dataclass(frozen=True)
class Start:
    """Where the text after the prompts begins: one state a prompt (None: blank), one delta a prompt (None: none)."""

    state: RecurrentState | None
    delta: LowRankDelta | None
    repeat: bool = False


@torch.no_grad()
def start(method: str, lm: LanguageModel, generators: dict[str, Generator], prompts: list[list[int]]) -> Start:
    """The start of a method for a batch of prompts (token ids).

    Args:
        method: one of `METHODS`, or the name of any other generator: as base, with its delta in the weights.
        generators: "token", "final", "static", as far as the method needs them.
    Raises:
        UserError: unknown method, a generator that is missing, or another prompt asked for where there is only one.
    """
    if method not in METHODS and method not in generators:
        raise UserError(f"unknown method {method!r}; there are {', '.join(METHODS)}, and generators by their name")
    ids, valid = lm.encode_prompts(prompts)

    def run(kind: str) -> tuple[LowRankDelta, RecurrentState]:
        if kind not in generators:
            raise UserError(f"method {method!r} needs the {kind!r} generator; load or train it first")
        return generators[kind](lm, ids, valid)

    if method == "none":
        return Start(None, None)
    if method == "static":
        return Start(None, run("static")[0])
    if method in ("base", "repeated"):
        return Start(lm.step_through(ids, None, valid)[1], None, repeat=method == "repeated")
    delta, state = run(_GENERATOR.get(method, method))
    if method == "wrong":
        if len(prompts) < 2:
            raise UserError("the control 'wrong' needs another prompt; evaluate at least 2 prompts at a time")
        others = torch.arange(len(prompts)).roll(1)
        delta, state = delta.select(others), state.select(others)
    return Start(state, delta)
