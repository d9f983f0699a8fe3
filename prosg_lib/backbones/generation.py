"""Text out of a language model: greedy or drawn, in batches, as it comes, in memory that does not grow with the text.

`LanguageModel.generate`, `stream` and `stream_text` are what users call; they are thin, and the work is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import TextPieces, Tokenizer

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel

Prompts = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when a text ends.

    Attributes:
        max_new_tokens: a text has at most so many tokens.
        stop: a string, or several; a text ends before the one that is complete first, whether or not it begins or ends
            with a token. None, alone or among several: before none.
        temperature: 0 takes the likeliest token, whatever the rest says; else the logits are divided by it, and the
            token is drawn.
        top_k: draw among the k likeliest tokens; None: among all.
        top_p: draw among the fewest likeliest tokens that have this probability together (nucleus sampling, Holtzman
            et al. 2020, section 3.1); 1: among all.
        seeds: one a prompt, which alone decides what is drawn for it; None: from torch's own generator.
        ignore_eos: go on where the model says that the text ends (`LanguageModel.end_tokens`), instead of ending there.
    Raises:
        UserError: a value that cannot be meant.
    """

    max_new_tokens: int = 32
    stop: str | Sequence[str | None] | None = "\n"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seeds: Sequence[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1 token")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a number above it")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; at least 1 token must be left to draw from, or None for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability above 0 and at most 1")
        if "" in self.stops():
            raise UserError("a stop string is empty, so no text could begin; give a text, or None to never stop")

    def stops(self) -> tuple[str, ...]:
        """The stop strings; none of them where nothing stops a text."""
        several = (self.stop,) if self.stop is None or isinstance(self.stop, str) else tuple(self.stop)
        return () if None in several else several


def generate(
    lm: LanguageModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, how: Decoding
) -> list[str] | list[list[int]]:
    """The whole continuations, one a prompt: see `LanguageModel.generate`."""
    if lm.tokenizer is None and not how.stops():
        steps = [step.tolist() for step in stream(lm, prompts, state, delta, how)] or [[-1] * len(prompts)]
        return [[token for token in row if token >= 0] for row in zip(*steps, strict=True)]
    return ["".join(row) for row in zip(*stream_text(lm, prompts, state, delta, how), strict=True)]


def stream(
    lm: LanguageModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, how: Decoding
) -> Iterator[Tensor]:
    """The tokens as they come: see `LanguageModel.stream`."""
    texts = _texts(lm.needed_tokenizer(), len(prompts), how) if how.stops() else []
    steps = _steps(lm, prompts, state, delta, how, texts)
    return (tokens for tokens, _ in steps if (tokens >= 0).any())


def stream_text(
    lm: LanguageModel, prompts: Prompts, state: RecurrentState | None, delta: LowRankDelta | None, how: Decoding
) -> Iterator[list[str]]:
    """The texts as they come: see `LanguageModel.stream_text`."""
    texts = _texts(lm.needed_tokenizer(), len(prompts), how)
    steps = _steps(lm, prompts, state, delta, how, texts)

    def pieces() -> Iterator[list[str]]:
        for _, new in steps:
            yield new
        rest = [text.rest() for text in texts]
        if any(rest):
            yield rest

    return pieces()


def _texts(tokenizer: Tokenizer, count: int, how: Decoding) -> list[_Text]:
    return [_Text(tokenizer, how.stops()) for _ in range(count)]


class _Text:
    """One sequence's tokens -> its text, piece by piece, which ends before a stop string.

    Given out are whole characters only, and nothing that may turn out to be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self._pieces, self._stops = TextPieces(tokenizer), stops
        self._held = ""  # may be the beginning of a stop string, so it is shorter than the longest
        self.ended = False

    def push(self, token: int) -> str:
        """What can be given out now that the token is known; nothing any more once the text has ended."""
        if self.ended:
            return ""
        return self._until_stop(self._pieces.push(token))

    def rest(self) -> str:
        """What was held back, where no further token comes: the text has ended."""
        rest = "" if self.ended else self._until_stop(self._pieces.rest()) + self._held
        self.ended = True
        return rest

    def _until_stop(self, piece: str) -> str:
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if (
            found
        ):  # the one that is complete first, and of those that end together the longest: its tokens do not matter
            self.ended, self._held = True, ""
            return text[: min(found)[1]]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        cut = len(text) - max(begun, default=0)
        self._held = text[cut:]
        return text[:cut]


def _steps(
    lm: LanguageModel,
    prompts: Prompts,
    state: RecurrentState | None,
    delta: LowRankDelta | None,
    how: Decoding,
    texts: list[_Text],
) -> Iterator[tuple[Tensor, list[str]]]:
    """Token by token: (B,), -1 where the text has ended; and the new piece of each text. Checks everything at once."""
    ids, valid = lm.encode_prompts(prompts)
    choose = _chooser(how, len(ids), ids.device)
    ends = () if how.ignore_eos else lm.end_tokens()
    change = applied(lm, delta)  # checks it
    return _loop(lm, ids, None if valid.all() else valid, state, delta, change, choose, how.max_new_tokens, ends, texts)


@torch.no_grad()
def _loop(
    lm: LanguageModel,
    ids: Tensor,
    valid: Tensor | None,
    state: RecurrentState | None,
    delta: LowRankDelta | None,
    change: AbstractContextManager[None],
    choose: Callable[[Tensor, list[int]], Tensor],
    count: int,
    ends: Sequence[int],
    texts: list[_Text],
) -> Iterator[tuple[Tensor, list[str]]]:
    batch = len(ids)
    rows = list(range(batch))  # the sequences that are computed
    ended = [False] * batch
    for _ in range(count):
        with change:  # for this step only: whoever takes the tokens may use the model in between
            hidden, state = lm.step_through(ids, state, valid)
        ids, valid = choose(lm.read_out(hidden[:, -1]), rows)[:, None], None
        tokens, pieces = [-1] * batch, [""] * len(texts)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if ended[row]:
                continue
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
        if 2 * len(places) <= len(rows):  # the others go on without those that have ended
            rows = [rows[place] for place in places]
            ids, state, lm = ids[places], state.select(places), lm.select(places)
            if delta is not None and delta.batch > 1:
                change = applied(lm, delta.select(rows))


def _chooser(how: Decoding, batch: int, device: torch.device) -> Callable[[Tensor, list[int]], Tensor]:
    """Logits (B, vocab), and which prompts' they are -> the next token of each sequence, (B,).

    Drawn as an exponential race: of independent exponential variables with the probabilities as rates, token i's is the
    smallest with probability i. Every sequence has noise of its own, of every token, and so its choice does not depend
    on what else is in the batch, nor on how rounding orders tokens that are almost as likely.
    """
    if how.seeds is not None and (isinstance(how.seeds, int) or len(how.seeds) != batch):
        raise UserError(f"seeds is {how.seeds!r}, but there are {batch} prompts; give a list of one seed a prompt")
    if how.temperature == 0:
        return lambda logits, rows: logits.argmax(-1)
    seeds = torch.randint(2**62, (batch,)).tolist() if how.seeds is None else how.seeds
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def draw(logits: Tensor, rows: list[int]) -> Tensor:
        chances = _chances(logits.float() / how.temperature, how.top_k, how.top_p)
        noise = torch.stack(
            [c.new_empty(len(c)).exponential_(generator=generators[row]) for c, row in zip(chances, rows, strict=True)]
        )
        return (chances / noise).argmax(-1)

    return draw


def _chances(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities to draw with, (B, vocab), zero for what top_k and then top_p leave out; not normalised again."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    chances = logits.softmax(-1)
    if top_p == 1:
        return chances
    ordered, order = chances.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return chances.masked_fill(torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, before >= top_p), 0.0)
