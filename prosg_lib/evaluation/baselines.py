"""The methods that are compared: ways to make a recurrent model keep its prompt, and the controls.

A method is a start (the state that the text after the prompt begins from, and a delta or none) and what it does later:
reading the prompt again or updating the state as the text goes on (`reading` does it), or reading the prompt once more
immediately before the question.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import ClassVar, Self

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
    "repeated": "reference: as base, and the prompt is read once more immediately before the question",
}
"""The main comparison. What a user would try instead are the subclasses of `Baseline`."""

LORA_RANK, LORA_MAPS = 8, ALL_MAPS
"""Of the LoRA adapters: PEFT's default rank, on every linear map of the blocks."""

_GENERATOR = {"prosg-token": "token", "wrong": "token", "prosg-final": "final", "static-read": "static"}


@dataclass(frozen=True)
class Reread:
    """The prompts, and when they are read again: at the first line end after every so many tokens of text.

    Attributes:
        prompts: token ids, one a sequence.
        line_end: the token that ends a line; None: reread exactly after so many tokens, wherever that is.
        answer: the token that a line of answer begins with; such a line is not separated from its question.
    """

    every: int
    prompts: Sequence[Sequence[int]]
    line_end: int | None = None
    answer: int | None = None

    def places(self, text: Sequence[int]) -> list[int]:
        """After how many tokens of this text the prompt is read again, not counting what is read again."""
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
class Window:
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
class StateUpdate:
    """An update of the state after every so many tokens: own * state + share * other.

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
        repeat: the prompt is read once more immediately before a question.
        reread, update: what is done as the text goes on, at most one of the two; None: nothing.
        window: how little of prompt and text is known; None: all that the state has kept.
    """

    state: RecurrentState | None
    delta: LowRankDelta | None
    repeat: bool = False
    reread: Reread | None = None
    update: StateUpdate | None = None
    window: Window | None = None

    def select(self, rows: Sequence[int]) -> Self:
        """The starts of some prompts; rows may repeat."""
        parts = {name: getattr(self, name) for name in ("state", "delta", "reread", "update", "window")}
        return replace(self, **{name: part and part.select(list(rows)) for name, part in parts.items()})


@dataclass(frozen=True)
class Baseline(ABC):
    """What a user would try instead of ProSG, with its numbers; the subclasses are the baselines there are.

    Default numbers were chosen with the shipped RWKV-4 on 12 prompts of the validation split, by the mean recall at 0
    to 1,024 tokens. Among rereadings, reinjections and offsets within one standard error (0.03) of the best, the one
    with the most right answers about other people was taken: the most frequent readings and the largest shares recall
    a little more, and drown out the text. For tuning and LoRA it is the best recall, which was no more than one
    standard error above the plain model's.
    """

    family: ClassVar[str]
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self):
        for name, (low, high) in self.bounds.items():
            if not low <= getattr(self, name) <= high:
                limits = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
                raise UserError(f"{name} of {self.family!r} is {getattr(self, name)}; it must be {limits}")

    @property
    def name(self) -> str:
        """In tables and claims, e.g. "every-64"."""
        return "-".join([self.family, *(f"{number:g}" for number in astuple(self))])

    @abstractmethod
    def start(self, lm: LanguageModel, prompts: list[list[int]]) -> Start:
        """See `start` below."""


_MANY, _RATE = float("inf"), 1e-6


@dataclass(frozen=True)
class ReadTwice(Baseline):
    """As base, but the prompt is read twice in a row (Just Read Twice, arXiv 2407.05483)."""

    family: ClassVar[str] = "twice"

    def start(self, lm, prompts):
        return _read(lm, [[*p, *p] for p in prompts])


@dataclass(frozen=True)
class ReadAgain(Baseline):
    """As base, and the prompt is read again at the first line end after every `every` tokens of text."""

    family: ClassVar[str] = "every"
    bounds: ClassVar = {"every": (1, _MANY)}
    every: int = 64

    def start(self, lm, prompts):
        marks = () if lm.tokenizer is None else (lm.tokenizer.encode("\n")[-1], lm.tokenizer.encode("A:")[0])
        return replace(_read(lm, prompts), reread=Reread(self.every, prompts, *marks))


@dataclass(frozen=True)
class Reinjection(Baseline):
    """As base, and after every `every` tokens of text the state is (1 - share) of itself and `share` of the
    prompt's."""

    family: ClassVar[str] = "reinject"
    bounds: ClassVar = {"every": (1, _MANY), "share": (0, 1)}
    every: int = 64
    share: float = 0.3

    def start(self, lm, prompts):
        lm.check_fixed_state("mixed with another")
        begin = _read(lm, prompts)
        return replace(begin, update=StateUpdate(self.every, 1 - self.share, self.share, begin.state))


@dataclass(frozen=True)
class StateOffset(Baseline):
    """As base, and after every token `strength` times what that token's decay takes of the prompt's state is added
    again (the state of State-offset Tuning, arXiv 2503.03499, with an offset that was not trained)."""

    family: ClassVar[str] = "offset"
    bounds: ClassVar = {"strength": (0, _MANY)}
    strength: float = 0.03

    def start(self, lm, prompts):
        lm.check_fixed_state("added to another")
        begin = _read(lm, prompts)
        of_prompt = lm.combine_states([begin.state, lm.blank_state(len(prompts))], [1.0, -1.0])
        return replace(begin, update=StateUpdate(1, 1.0, self.strength, lm.state_decay(of_prompt)))


@dataclass(frozen=True)
class TunedState(Baseline):
    """State tuning: as base, but the state after the prompt is tuned on the prompt, `steps` steps of Adam at rate
    `lr`."""

    family: ClassVar[str] = "tuned"
    bounds: ClassVar = {"steps": (0, _MANY), "lr": (_RATE, _MANY)}
    steps: int = 30
    lr: float = 0.03

    def start(self, lm, prompts):
        lm.check_fixed_state("tuned")
        begin = _read(lm, prompts)
        return replace(begin, state=tuned_state(lm, *lm.encode_prompts(prompts), begin.state, self.steps, self.lr))


@dataclass(frozen=True)
class FineTunedLora(Baseline):
    """As base, with a LoRA adapter in the weights, fine-tuned on the prompt, `steps` steps of Adam at rate `lr`."""

    family: ClassVar[str] = "lora"
    bounds: ClassVar = {"steps": (0, _MANY), "lr": (_RATE, _MANY)}
    steps: int = 40
    lr: float = 0.001

    def start(self, lm, prompts):
        delta = fine_tuned(lm, *lm.encode_prompts(prompts), self.steps, self.lr, LORA_RANK, LORA_MAPS)
        return replace(_read(lm, prompts), delta=delta)


@dataclass(frozen=True)
class LastTokens(Baseline):
    """Of prompt and text only the last `tokens` tokens are known: a model that looks back, with room for so many."""

    family: ClassVar[str] = "last"
    bounds: ClassVar = {"tokens": (1, _MANY)}
    tokens: int = 128

    def start(self, lm, prompts):
        window = Window(self.tokens, prompts)
        return replace(_read(lm, window.known([[]] * len(prompts), 0)), window=window)


def _read(lm: LanguageModel, prompts: list[list[int]]) -> Start:
    """The plain model's start."""
    ids, valid = lm.encode_prompts(prompts)
    return Start(lm.step_through(ids, None, valid)[1], None)


def name_of(method: str | Baseline) -> str:
    """What a method is called in tables, figures and claims."""
    return method if isinstance(method, str) else method.name


@torch.no_grad()
def start(
    method: str | Baseline, lm: LanguageModel, generators: Mapping[str, Generator], prompts: list[list[int]]
) -> Start:
    """The start of a method for a batch of prompts (token ids).

    Args:
        method: one of `METHODS`; a `Baseline`; or the name of any other generator: as base, with its delta in the
            weights.
        generators: "token", "final", "static", as far as the method needs them.
    Raises:
        UserError: unknown method; missing generator; another prompt asked for where there is only one; a method that
            this kind of model cannot do.
    """
    if isinstance(method, Baseline):
        return method.start(lm, prompts)
    if method not in METHODS and method not in generators:
        known = ", ".join((*METHODS, *(kind.__name__ for kind in Baseline.__subclasses__())))
        raise UserError(f"unknown method {method!r}; there are {known}, and generators by their name")
    if method == "none":
        return Start(None, None)
    if method in ("base", "repeated"):
        return replace(_read(lm, prompts), repeat=method == "repeated")
    kind = "static" if method == "static" else _GENERATOR.get(method, method)
    if kind not in generators:
        raise UserError(f"method {method!r} needs the {kind!r} generator; load or train it first")
    delta, state = generators[kind](lm, *lm.encode_prompts(prompts))
    if method == "static":
        return Start(None, delta)
    if method == "wrong":
        if len(prompts) < 2:
            raise UserError("the control 'wrong' needs another prompt; evaluate at least 2 prompts at a time")
        others = torch.arange(len(prompts)).roll(1)
        delta, state = delta.select(others), state.select(others)
    return Start(state, delta)
