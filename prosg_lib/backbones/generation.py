"""Generating text from a language model: greedy or sampled, batched, streamed, in memory that does not grow.

Users call `LanguageModel.generate`, `stream` and `stream_text`, which are thin; the work is done here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.text.tokenizer import TextPieces, Tokenizer

Prompts = Sequence[str] | Sequence[Sequence[int]]


class GenerativeModel(Protocol):
    """What generation needs from a model; `LanguageModel` documents each of them."""

    tokenizer: Tokenizer | None

    def encode_prompts(self, prompts: Prompts, state: RecurrentState | None) -> tuple[Tensor, Tensor]: ...
    def step_through(
        self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None
    ) -> tuple[Tensor, RecurrentState]: ...
    def read_out(self, hidden: Tensor) -> Tensor: ...
    def select(self, rows: Sequence[int]) -> Self: ...
    def end_tokens(self) -> tuple[int, ...]: ...
    def needed_tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when a text ends.

    Attributes:
        max_new_tokens: largest number of tokens in a text.
        stop: one stop string or several, which need not align with tokens; a text ends before whichever is complete
            first. None, alone or among several: no stop string.
        temperature: 0 takes the likeliest token, whatever the other settings; otherwise tokens are sampled from the
            logits divided by it.
        top_k: sample among the k likeliest tokens; None: among all.
        top_p: sample among the smallest set of likeliest tokens with at least this probability (nucleus sampling,
            Holtzman et al. 2020, section 3.1); 1: among all.
        seeds: one per prompt, which alone determines its sample; None: drawn from torch's own generator.
        ignore_eos: continue past the model's end-of-text tokens (`LanguageModel.end_tokens`).
    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 32
    stop: str | Sequence[str | None] | None = "\n"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seeds: Sequence[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        allowed = {
            "max_new_tokens": (lambda n: operator.index(n) >= 1, "allow a whole number of tokens, at least 1"),
            "temperature": (lambda t: 0 <= t < float("inf"), "give 0 for the likeliest token, or a number above it"),
            "top_k": (
                lambda k: k is None or operator.index(k) >= 1,
                "give at least 1, or None to sample among all tokens",
            ),
            "top_p": (lambda p: 0 < p <= 1, "it is a probability above 0 and at most 1"),
            "stop": (
                lambda _: all(isinstance(stop, str) and stop for stop in self.stops()),
                "give a text that is not empty, several, or None for no stop string",
            ),
        }
        for name, (holds, remedy) in allowed.items():
            value = getattr(self, name)
            with suppress(TypeError):  # a value of another kind
                if holds(value):
                    continue
            raise UserError(f"{name} is {value!r}; {remedy}")

    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty if there is none."""
        stops = (self.stop,) if self.stop is None or isinstance(self.stop, str) else tuple(self.stop)
        return () if None in stops else stops


def generate(
    lm: GenerativeModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, decoding: Decoding
) -> list[str] | list[list[int]]:
    """One continuation per prompt: see `LanguageModel.generate`."""
    if lm.tokenizer is None and not decoding.stops():
        steps = [step.tolist() for step in stream(lm, prompts, state, delta, decoding)] or [[-1] * len(prompts)]
        return [[token for token in row if token >= 0] for row in zip(*steps, strict=True)]
    return ["".join(row) for row in zip(*stream_text(lm, prompts, state, delta, decoding), strict=True)]


def stream(
    lm: GenerativeModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, decoding: Decoding
) -> Iterator[Tensor]:
    """The tokens step by step: see `LanguageModel.stream`."""
    texts = _texts(lm, prompts, decoding) if decoding.stops() else []
    steps = _steps(lm, prompts, state, delta, decoding, texts)
    return (tokens for tokens, _ in steps if (tokens >= 0).any())


def stream_text(
    lm: GenerativeModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, decoding: Decoding
) -> Iterator[list[str]]:
    """The texts piece by piece: see `LanguageModel.stream_text`."""
    texts = _texts(lm, prompts, decoding)
    steps = _steps(lm, prompts, state, delta, decoding, texts)

    def pieces() -> Iterator[list[str]]:
        for _, new in steps:
            yield new
        rest = [text.rest() for text in texts]
        if any(rest):
            yield rest

    return pieces()


def _texts(lm: GenerativeModel, prompts: Prompts, decoding: Decoding) -> list[_Text]:
    count = len(prompts) if hasattr(prompts, "__len__") else 0  # anything else is refused when it is encoded
    return [_Text(lm.needed_tokenizer(), decoding.stops()) for _ in range(count)]


class _Text:
    """Turns one sequence's tokens into text, piece by piece, up to a stop string.

    Gives out whole characters only, and nothing that may turn out to begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self._pieces, self._stops = TextPieces(tokenizer), stops
        self._pending = ""  # may begin a stop string, so it is shorter than the longest of them
        self.ended = False

    def push(self, token: int) -> str:
        """What can be given out now that this token is known; "" once the text has ended."""
        if self.ended:
            return ""
        return self._until_stop(self._pieces.push(token))

    def rest(self) -> str:
        """What was held back, once no further token comes."""
        rest = "" if self.ended else self._until_stop(self._pieces.rest()) + self._pending
        self.ended = True
        return rest

    def _until_stop(self, piece: str) -> str:
        text = self._pending + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first; of two that end together, the longer
            self.ended, self._pending = True, ""
            return text[: min(found)[1]]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(begun, default=0)
        self._pending = text[cut:]
        return text[:cut]


def _steps(
    lm: GenerativeModel,
    prompts: Prompts,
    state: RecurrentState | None,
    delta: LowRankDelta | None,
    decoding: Decoding,
    texts: list[_Text],
) -> Iterator[tuple[Tensor, list[str]]]:
    """Token by token: (B,), -1 where the text has ended; and the new piece of each text. Checks arguments at once."""
    ids, valid = lm.encode_prompts(prompts, state)
    batch = len(ids)
    choose = _chooser(decoding, batch, ids.device)
    ends = () if decoding.ignore_eos else lm.end_tokens()
    change = applied(lm, delta)  # checks it

    @torch.no_grad()
    def steps(lm, ids, valid, state, change) -> Iterator[tuple[Tensor, list[str]]]:
        rows = list(range(batch))  # the sequences that are computed
        ended = [False] * batch
        for _ in range(decoding.max_new_tokens):
            with change:  # for this step only: the caller may use the model between two tokens
                hidden, state = lm.step_through(ids, state, valid)
            chosen, weight = choose(lm.read_out(hidden[:, -1]), rows)
            ids, valid = chosen[:, None], None
            tokens, pieces = [-1] * batch, [""] * len(texts)
            # One transfer from the device for both: the tokens, and whether they were chosen by a number.
            for row, token in zip(rows, torch.where(weight.isfinite(), chosen, -1).tolist(), strict=True):
                if ended[row]:
                    continue
                if token < 0:
                    raise NotFinite(
                        f"the logits after prompt {row} are not finite, so there is no next token; "
                        "check the weights, the state and the delta for NaN"
                    )
                ended[row] = token in ends
                if texts:
                    pieces[row] = texts[row].rest() if ended[row] else texts[row].push(token)
                    ended[row] = texts[row].ended
                if not ended[row]:
                    tokens[row] = token
            yield torch.tensor(tokens, device=ids.device), pieces
            if all(ended):
                return
            places = [place for place, row in enumerate(rows) if not ended[row]]
            if 2 * len(places) <= len(rows):  # continue without the texts that have ended
                rows = [rows[place] for place in places]
                ids, state, lm = ids[places], state.select(places), lm.select(places)
                if delta is not None and delta.batch > 1:
                    change = applied(lm, delta.select(rows))

    return steps(lm, ids, None if valid.all() else valid, state, change)


def _chooser(
    decoding: Decoding, batch: int, device: torch.device
) -> Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]:
    """A function from logits (B, vocab), and which prompts they belong to, to the next token of each sequence, (B,),
    and the number that it was chosen by, (B,), which is not finite where a logit is NaN or infinite.

    Samples by an exponential race: among independent exponential variables whose rates are the probabilities, each is
    the smallest with just that probability. Every sequence has its own noise for every token, so its sample depends
    neither on the rest of the batch nor on how rounding orders tokens of nearly equal probability.
    """
    if decoding.seeds is not None and (isinstance(decoding.seeds, int) or len(decoding.seeds) != batch):
        raise UserError(
            f"seeds is {decoding.seeds!r}, but there are {batch} prompts; give a list with one seed per prompt"
        )
    if decoding.temperature < 1e-30:  # 0, or a number that float32 cannot divide by
        return lambda logits, rows: _weighed(logits, logits.argmax(-1))
    seeds = torch.randint(2**62, (batch,)).tolist() if decoding.seeds is None else decoding.seeds
    try:
        generators = [torch.Generator(device).manual_seed(operator.index(seed)) for seed in seeds]
    except (TypeError, ValueError, RuntimeError) as error:  # the last two: out of range, by PyTorch's version
        raise UserError(f"seeds is {seeds!r}; a seed is a whole number from -2^63 to 2^64 - 1") from error

    def draw(logits: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        probabilities = _probabilities(logits.float() / decoding.temperature, decoding.top_k, decoding.top_p)
        noise = torch.stack(
            [
                c.new_empty(len(c)).exponential_(generator=generators[row])
                for c, row in zip(probabilities, rows, strict=True)
            ]
        )
        return _weighed(probabilities, (probabilities / noise).argmax(-1))

    return draw


def _weighed(weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What was chosen, (B,), and its weight among the weights (B, vocab)."""
    return chosen, weights.gather(-1, chosen[:, None])[:, 0]


def _probabilities(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities to sample with, (B, vocab), zero for what top_k and then top_p exclude; not normalised again."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.masked_fill(
        torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before >= top_p), 0.0
    )
