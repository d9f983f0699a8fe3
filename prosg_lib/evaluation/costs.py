"""What a method costs: time to take a prompt in, time a token afterwards, bytes kept. Recall alone is half a table.

All methods take their turn in every round, in one process, so that a busy machine is unfair to none; medians and
quartiles of the rounds are given. Times are of one prompt and one token at a time, as a user waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation import reading
from prosg_lib.evaluation.baselines import LORA_MAPS, LORA_RANK, Start, start
from prosg_lib.generators.base import Generator
from prosg_lib.gradient_steps.prompt_tuning import fine_tuned

_WARM_UP = 2  # rounds
_STEPS = 8  # tokens a round
_TOKEN_BYTES = 8  # of a token id that is kept to be read again


@torch.no_grad()
def measured(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    others: Mapping[str, tuple[LanguageModel, str]] | None = None,
    tokens: int = 128,
    distance: int = 512,
    answer: int = 12,
    rounds: int = 10,
) -> pd.DataFrame:
    """The cost of every method.

    Args:
        methods: as in `baselines.start`, but for "wrong", which costs what "prosg-token" does.
        others: name -> another model, a transformer say, and its method, which needs no generator.
        tokens: of the prompt.
        distance: tokens of text that were read when tokens are timed.
        answer: tokens of an answer, over which "repeated" spreads its reading.
        rounds: that are measured, after two that are not.
    Returns:
        One row a method: absorb_ms, until the method is ready for the text that follows the prompt; token_ms, reading
        and predicting one more token, with its share of what the method does now and then; each with its quartiles
        (..._low, ..._high). kept_bytes: all that is kept of one such text to go on from it, besides the models: the
        state, the change (but for what all prompts share), the prompt where it is read again.
    Raises:
        UserError: as `baselines.start`; fewer than 1 round, or a size below 1.
    """
    if min(tokens, distance, answer, rounds) < 1:
        raise UserError("a cost is measured with at least 1 token of prompt, text and answer, and 1 round")
    keep_freed_memory()
    ways = {m: _Way(lm, m, generators, tokens, distance, answer) for m in methods}
    ways |= {name: _Way(*other, {}, tokens, distance, answer) for name, other in (others or {}).items()}
    for number in range(_WARM_UP + rounds):
        for way in ways.values():
            way.once(keep=number >= _WARM_UP)
    return pd.DataFrame([{"method": name} | way.row() for name, way in ways.items()])


@dataclass
class _Way:
    lm: LanguageModel
    method: str
    generators: dict[str, Generator]
    tokens: int
    distance: int
    answer: int
    absorb: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def __post_init__(self):
        drawn = torch.Generator().manual_seed(0)
        draw = torch.randint(0, self.lm.config.vocab, (2 * self.tokens + self.distance,), generator=drawn).tolist()
        self.prompts = [draw[: self.tokens], draw[self.tokens : 2 * self.tokens]]
        text = draw[2 * self.tokens :]
        two = self._started(self.prompts)
        self.begin = two.select([0])
        *_, end = reading.read(self.lm, self.begin, [text], [self.distance])
        self.state = end.state
        self.kept = kept_bytes(two, self.state)
        if two.repeat:
            self.kept += _TOKEN_BYTES * self.tokens
        self.ids = self._ids(text[-1:])
        self.change = applied(self.lm, self.begin.delta)
        self.model = reading.answering(self.lm, self.begin)

    def _started(self, prompts: list[list[int]]) -> Start:
        return start(self.method, self.lm, self.generators, prompts)

    def _ids(self, row: list[int]) -> torch.Tensor:
        return torch.tensor([row], device=next(self.lm.parameters()).device)

    def once(self, keep: bool) -> None:
        absorb = seconds(lambda: self._started(self.prompts[:1]))
        step = seconds(lambda: [self._step() for _ in range(_STEPS)]) / _STEPS
        step += self._now_and_then()
        if keep:
            self.absorb.append(absorb)
            self.token.append(step)

    def _step(self) -> torch.Tensor:
        with self.change:
            hidden, _ = self.model.step_through(self.ids, self.state)
        return self.lm.read_out(hidden[:, -1]).argmax(-1)

    def _now_and_then(self) -> float:
        """Seconds a token of what does not happen at every token."""
        reread, between = self.begin.reread, self.begin.between
        each = 0.0
        if reread or self.begin.repeat:
            each += seconds(self._read_prompt) / (reread.every if reread else self.answer)
        if between and between.every > 1:
            each += seconds(lambda: between(self.lm, self.state)) / between.every
        return each

    def _read_prompt(self) -> None:
        with self.change:
            self.lm.step_through(self._ids(self.prompts[0]), self.state, None)

    def row(self) -> dict[str, float]:
        found = {}
        for name, taken in (("absorb_ms", self.absorb), ("token_ms", self.token)):
            low, middle, high = np.percentile(np.array(taken) * 1e3, [25, 50, 75])
            found |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        return found | {"kept_bytes": self.kept}


def kept_bytes(begin: Start, state: RecurrentState) -> int:
    """Bytes kept of one text to go on from `state`, besides the model.

    Args:
        begin: of at least two prompts, so that what they share is known: it counts as a part of the model.
        state: the state by now.
    """
    kept = state.nbytes()
    if begin.delta is not None:
        kept += _own_bytes(begin.delta)
    if begin.between is not None:
        kept += begin.between.other.nbytes()
    if begin.reread is not None:
        kept += _TOKEN_BYTES * max(map(len, begin.reread.prompts))
    return kept


def _own_bytes(delta: LowRankDelta) -> int:
    """Of one prompt's change, without the factors that all prompts share, be they one or the same one shown often."""
    own = [t for factors in delta.factors.values() for t in factors if len(t) == delta.batch and t.stride(0) > 0]
    return sum(t[0].numel() * t.element_size() for t in own) if delta.batch > 1 else delta.nbytes()


def matched_steps(
    lm: LanguageModel, generator: Generator, times: float = 1.0, tokens: int = 128, rounds: int = 10
) -> int:
    """Steps of "lora-N" that take as long as so many times the generator, for one prompt; at least 1.

    Args:
        times: 1 for the same time, 100 for a hundred times as much.
        tokens, rounds: as in `measured`.
    """
    keep_freed_memory()
    row = torch.randint(0, lm.config.vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, valid = lm.encode_prompts([row])
    few, more = 1, 5
    taken = {name: [] for name in ("generator", "reading", few, more)}
    for number in range(_WARM_UP + rounds):
        for name, run in {
            "generator": lambda: generator.memorize(lm, [row]),
            "reading": lambda: lm.derive_state([row]),
            few: lambda: fine_tuned(lm, ids, valid, few, 1e-3, LORA_RANK, LORA_MAPS),
            more: lambda: fine_tuned(lm, ids, valid, more, 1e-3, LORA_RANK, LORA_MAPS),
        }.items():
            spent = seconds(run)
            if number >= _WARM_UP:
                taken[name].append(spent)
    middle = {name: float(np.median(values)) for name, values in taken.items()}
    step = max(1e-9, (middle[more] - middle[few]) / (more - few))
    return max(1, round((times * middle["generator"] - middle["reading"] - (middle[few] - few * step)) / step))


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one run, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
