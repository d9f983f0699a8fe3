"""What a method costs: time to take in a prompt, time a token afterwards, bytes kept. Recall is only half of the table.

All methods take turns in every round, in one process, so that a busy machine slows them all alike; medians and
quartiles over the rounds are reported. Times are for one prompt and one token at a time, as a user waits for them.
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
from prosg_lib.evaluation.baselines import Baseline, Start, name_of, start
from prosg_lib.generators.base import Generator

_WARM_UP = 2  # rounds
_STEPS = 8  # tokens a round
_TOKEN_BYTES = 8  # of a token id that is kept to be read again


@torch.no_grad()
def measure(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    others: Mapping[str, tuple[LanguageModel, str | Baseline]] | None = None,
    tokens: int = 128,
    distance: int = 512,
    answer: int = 12,
    rounds: int = 10,
) -> pd.DataFrame:
    """The cost of every method.

    Args:
        methods: as in `baselines.start`, except "wrong", which costs what "prosg-token" does.
        others: name -> another model, e.g. a transformer, and its method, which needs no generator.
        tokens: length of the prompt.
        distance: tokens of text read before tokens are timed.
        answer: tokens of an answer, over which "repeated" spreads its reading.
        rounds: measured rounds, after two that are not.
    Returns:
        One row a method: absorb_ms, until the method is ready for the text that follows the prompt; token_ms, reading
        and predicting one more token, including its share of what the method does less often; each with its quartiles
        (..._low, ..._high). kept_bytes: everything that is kept of one such text to go on from it, besides the models:
        the state, the delta (except what all prompts share), the prompt if it is read again.
    Raises:
        UserError: as `baselines.start`; fewer than 1 round, or a size below 1.
    """
    if min(tokens, distance, answer, rounds) < 1:
        raise UserError("measuring a cost needs at least 1 token of prompt, text and answer, and 1 round")
    keep_freed_memory()
    timed = {name_of(m): _Timed(lm, m, generators, tokens, distance, answer) for m in methods}
    timed |= {name: _Timed(*other, {}, tokens, distance, answer) for name, other in (others or {}).items()}
    for number in range(_WARM_UP + rounds):
        for one in timed.values():
            one.once(keep=number >= _WARM_UP)
    return pd.DataFrame([{"method": name} | one.row() for name, one in timed.items()])


@dataclass
class _Timed:
    """One method with what it is timed on: a prompt of random tokens, and its state `distance` tokens later."""

    lm: LanguageModel
    method: str | Baseline
    generators: Mapping[str, Generator]
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
        self.edited = applied(self.lm, self.begin.delta)
        self.model = reading.answering(self.lm, self.begin)

    def _started(self, prompts: list[list[int]]) -> Start:
        return start(self.method, self.lm, self.generators, prompts)

    def _ids(self, row: list[int]) -> torch.Tensor:
        return torch.tensor([row], device=next(self.lm.parameters()).device)

    def once(self, keep: bool) -> None:
        absorb = seconds(lambda: self._started(self.prompts[:1]))
        step = seconds(lambda: [self._step() for _ in range(_STEPS)]) / _STEPS
        step += self._occasional()
        if keep:
            self.absorb.append(absorb)
            self.token.append(step)

    def _step(self) -> torch.Tensor:
        with self.edited:
            hidden, _ = self.model.step_through(self.ids, self.state)
        return self.lm.read_out(hidden[:, -1]).argmax(-1)

    def _occasional(self) -> float:
        """Seconds a token of what does not happen at every token."""
        reread, update = self.begin.reread, self.begin.update
        each = 0.0
        if reread or self.begin.repeat:
            each += seconds(self._read_prompt) / (reread.every if reread else self.answer)
        if update and update.every > 1:
            each += seconds(lambda: update(self.lm, self.state)) / update.every
        return each

    def _read_prompt(self) -> None:
        with self.edited:
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
        begin: of at least two prompts, so that it is known what they share: that counts as a part of the model.
        state: the state after the text.
    """
    kept = state.nbytes()
    if begin.delta is not None:
        kept += _own_bytes(begin.delta)
    if begin.update is not None:
        kept += begin.update.other.nbytes()
    if begin.reread is not None:
        kept += _TOKEN_BYTES * max(map(len, begin.reread.prompts))
    return kept


def _own_bytes(delta: LowRankDelta) -> int:
    """Of one prompt's delta, without the factors that all prompts share (stored once, or expanded over the batch)."""
    own = [t for factors in delta.factors.values() for t in factors if len(t) == delta.batch and t.stride(0) > 0]
    return sum(t[0].numel() * t.element_size() for t in own) if delta.batch > 1 else delta.nbytes()


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one run, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
