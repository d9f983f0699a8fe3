"""The methods that are compared: ways to make a recurrent model keep its prompt, and the controls.

A method is a start (the state that the text after the prompt begins from, and a delta or none) and what it does later:
reading the prompt again, or changing the state, while the text goes on (`reading` does it), or reading the prompt once
more right before the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.base import ALL_MAPS, Generator
from prosg_lib.gradient_steps.prompt_tuning import fine_tuned, tuned_state

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
"""The main comparison."""

BASELINES = {
    "twice": "as base, but the prompt is read twice in a row (Just Read Twice, arXiv 2407.05483)",
    "every-N": "as base, and the prompt is read again at the first line end after every N tokens of text",
    "reinject-N-A": "as base, and after every N tokens of text the state is (1 - A) of itself and A of the prompt's",
    "offset-C": "as base, and C times what a token fades of the prompt's state is added again after every token "
    "(State-offset Tuning's state, arXiv 2503.03499, with an offset that nothing was trained for)",
    "tuned-N-LR": "state tuning: as base, but the state after the prompt is tuned on it, N steps of Adam at rate LR",
    "lora-N-LR": "as base, with a LoRA adapter in the weights, fine-tuned on the prompt, N steps of Adam at rate LR",
    "last-N": "of prompt and text only the last N tokens are known: for a model that looks back, room for N tokens",
}
"""What a user would try instead. Numbers may be left out from the right (`every`, `lora-40`): see `DEFAULTS`."""

LORA_RANK, LORA_MAPS = 8, ALL_MAPS
"""Of the LoRA adapters: PEFT's own rank, on every linear map of the blocks."""


class _Number(NamedTuple):
    """A number in a method's name: what it is, its default, its bounds, and whether it is a whole number."""

    what: str
    default: float
    lowest: float
    highest: float = float("inf")
    whole: bool = False

    def read(self, method: str, text: str) -> float:
        whole = re.fullmatch(r"\d+", text)
        if not (whole if self.whole else re.fullmatch(r"\d+(\.\d+)?", text)):
            raise UserError(f"{text!r} in method {method!r} is no {'whole ' * self.whole}number for {self.what}")
        if not self.lowest <= float(text) <= self.highest:
            above = "" if self.highest == float("inf") else f" to {self.highest:g}"
            raise UserError(f"{self.what} is {text} in method {method!r}; it is {self.lowest:g}{above or ' or more'}")
        return int(text) if self.whole else float(text)


_RATE = 1e-6
_NUMBERS = {
    "twice": (),
    "every": (_Number("the tokens between two readings", 64, 1, whole=True),),
    "reinject": (_Number("the tokens in between", 64, 1, whole=True), _Number("the prompt's share", 0.3, 0, 1)),
    "offset": (_Number("the strength", 0.03, 0),),
    "tuned": (_Number("the number of steps", 30, 0, whole=True), _Number("the learning rate", 0.03, _RATE)),
    "lora": (_Number("the number of steps", 40, 0, whole=True), _Number("the learning rate", 0.001, _RATE)),
    "last": (_Number("the number of tokens", 128, 1, whole=True),),
}

DEFAULTS = {family: tuple(number.default for number in numbers) for family, numbers in _NUMBERS.items()}
"""Chosen with the shipped RWKV-4 on 12 prompts of the validation split, by the mean recall at 0 to 1,024 tokens.

Of re-readings, re-injections and offsets within one standard error (0.03) of the best, the one that answers most about
other people was taken: the most frequent readings and the largest shares recall a little more, and drown the text. Of
tuning and LoRA it is the best recall, which was no more than one standard error above the plain model's."""

_CHANGED = {"reinject": "mixed with another", "offset": "added to another", "tuned": "tuned"}
"""What these do to a state."""

_GENERATOR = {"prosg-token": "token", "wrong": "token", "prosg-final": "final", "static-read": "static"}


@dataclass(frozen=True)
class Reread:
    """The prompts, and when they are read again: at the first line end after every so many tokens of text.

    Attributes:
        prompts: token ids, one a sequence.
        line_end: the token that ends a line; None: right after so many tokens, wherever that is.
        answer: the token that a line of answer begins with; such a line is not cut off from its question.
    """

    every: int
    prompts: Sequence[Sequence[int]]
    line_end: int | None = None
    answer: int | None = None

    def places(self, text: Sequence[int]) -> list[int]:
        """After how many tokens of this text the prompt is read again; what is read again does not count."""
        found, last = [], 0
        for place, token in enumerate(text, 1):
            ends = self.line_end is None or (token == self.line_end and self.answer not in text[place : place + 1])
            if place - last >= self.every and ends:
                found.append(place)
                last = place
        return found

    def select(self, rows: Sequence[int]) -> Self:
        return replace(self, prompts=[self.prompts[row] for row in rows])


@dataclass(frozen=True)
class Last:
    """The prompts, and how many tokens of prompt and text are known at any place.

    Attributes:
        prompts: token ids, one a sequence.
    """

    tokens: int
    prompts: Sequence[Sequence[int]]

    def known(self, texts: Sequence[Sequence[int]], place: int) -> list[list[int]]:
        """The tokens that are known after `place` tokens of each text."""
        return [[*p, *text[:place]][-self.tokens :] for p, text in zip(self.prompts, texts, strict=True)]

    def select(self, rows: Sequence[int]) -> Self:
        return replace(self, prompts=[self.prompts[row] for row in rows])


@dataclass(frozen=True)
class Between:
    """What happens to the state after every so many tokens: own x itself + share x another one.

    Attributes:
        other: one state a sequence.
    """

    every: int
    own: float
    share: float
    other: RecurrentState

    def __call__(self, lm: LanguageModel, state: RecurrentState) -> RecurrentState:
        return lm.combine_states([state, self.other], [self.own, self.share])

    def select(self, rows: Sequence[int]) -> Self:
        return replace(self, other=self.other.select(list(rows)))


@dataclass(frozen=True)
class Start:
    """Where the text after the prompts begins, and what is done later.

    Attributes:
        state: one a prompt; None: blank.
        delta: one a prompt; None: none.
        repeat: the prompt is read once more right before a question.
        reread, between: what is done while the text goes on, one of the two at most; None: nothing.
        last: how little is known of prompt and text; None: all that the state has kept.
    """

    state: RecurrentState | None
    delta: LowRankDelta | None
    repeat: bool = False
    reread: Reread | None = None
    between: Between | None = None
    last: Last | None = None

    def select(self, rows: Sequence[int]) -> Self:
        """The starts of some prompts; rows may repeat."""
        parts = {name: getattr(self, name) for name in ("state", "delta", "reread", "between", "last")}
        return replace(self, **{name: part and part.select(list(rows)) for name, part in parts.items()})


def parsed(method: str) -> tuple[str, tuple[float, ...]]:
    """A baseline's name -> its family and its numbers: "every-64" -> ("every", (64,)), "every" with its default.

    Raises:
        UserError: no method of that name, or a number that cannot be meant.
    """
    family, *texts = method.split("-")
    numbers = _NUMBERS.get(family)
    if numbers is None or len(texts) > len(numbers):
        known = ", ".join((*METHODS, *BASELINES))
        raise UserError(f"unknown method {method!r}; there are {known}, and generators by their name")
    given = [number.read(method, text) for number, text in zip(numbers, texts, strict=False)]
    return family, (*given, *DEFAULTS[family][len(given) :])


@torch.no_grad()
def start(method: str, lm: LanguageModel, generators: dict[str, Generator], prompts: list[list[int]]) -> Start:
    """The start of a method for a batch of prompts (token ids).

    Args:
        method: one of `METHODS`; one of `BASELINES`, with its numbers; or the name of any other generator: as base,
            with its delta in the weights.
        generators: "token", "final", "static", as far as the method needs them.
    Raises:
        UserError: unknown method, a generator that is missing, or another prompt asked for where there is only one; a
            method that this kind of model cannot do.
    """
    if method not in METHODS and method not in generators:
        return _baseline(lm, prompts, *parsed(method))
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


def _baseline(lm: LanguageModel, prompts: list[list[int]], family: str, numbers: tuple[float, ...]) -> Start:
    """The start of one of `BASELINES`."""
    if family in _CHANGED:
        lm.check_fixed_state(_CHANGED[family])
    if family == "last":
        last = Last(*numbers, prompts)
        ids, valid = lm.encode_prompts(last.known([[]] * len(prompts), 0))
        return Start(lm.step_through(ids, None, valid)[1], None, last=last)
    ids, valid = lm.encode_prompts([[*p, *p] for p in prompts] if family == "twice" else prompts)
    _, state = lm.step_through(ids, None, valid)
    base = Start(state, None)
    if family == "every":
        marks = () if lm.tokenizer is None else (lm.tokenizer.encode("\n")[-1], lm.tokenizer.encode("A:")[0])
        return replace(base, reread=Reread(*numbers, prompts, *marks))
    if family == "reinject":
        every, share = numbers
        return replace(base, between=Between(every, 1 - share, share, state))
    if family == "offset":
        (strength,) = numbers
        made = lm.combine_states([state, lm.blank_state(len(prompts))], [1.0, -1.0])
        return replace(base, between=Between(1, 1.0, strength, lm.state_decay(made)))
    if family == "tuned":
        return replace(base, state=tuned_state(lm, ids, valid, state, *numbers))
    if family == "lora":
        return replace(base, delta=fine_tuned(lm, ids, valid, *numbers, LORA_RANK, LORA_MAPS))
    return base
