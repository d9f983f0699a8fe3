"""What a method costs: time to take in a prompt, time a token afterwards, bytes kept. Recall is only half of the table.

All methods take turns in every round, in one process, so that a busy machine slows them all alike; medians and
quartiles over the rounds are reported. Times are for one prompt and one token at a time, as a user waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

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
    sizes = tokens, distance, answer
    timed = {name_of(m): _timed(lm, m, generators, *sizes) for m in methods}
    timed |= {name: _timed(*other, {}, *sizes) for name, other in (others or {}).items()}
    taken = {name: [] for name in timed}
    for number in range(_WARM_UP + rounds):
        for name, (once, _) in timed.items():
            found = once()
            if number >= _WARM_UP:
                taken[name].append(found)
    rows = []
    for name, (_, kept) in timed.items():
        low, middle, high = np.percentile(np.array(taken[name]) * 1e3, [25, 50, 75], axis=0)
        row = {"method": name}
        for number, column in enumerate(("absorb_ms", "token_ms")):
            row |= {column: middle[number], f"{column}_low": low[number], f"{column}_high": high[number]}
        rows.append(row | {"kept_bytes": kept})
    return pd.DataFrame(rows)


def _timed(
    lm: LanguageModel,
    method: str | Baseline,
    generators: Mapping[str, Generator],
    tokens: int,
    distance: int,
    answer: int,
) -> tuple[Callable[[], tuple[float, float]], int]:
    """What times a method once, on a prompt of random tokens and its state `distance` tokens later: seconds to absorb
    the prompt, and seconds a token; and the bytes that it keeps."""
    drawn = torch.Generator().manual_seed(0)
    draw = torch.randint(0, lm.config.vocab, (2 * tokens + distance,), generator=drawn).tolist()
    prompts, text = [draw[:tokens], draw[tokens : 2 * tokens]], draw[2 * tokens :]
    two = start(method, lm, generators, prompts)
    begin = two.select([0])
    *_, end = reading.read(lm, begin, [text], [distance])
    edited, model = applied(lm, begin.delta), reading.answering(lm, begin)
    device = next(lm.parameters()).device
    prompt, last = (torch.tensor([row], device=device) for row in (prompts[0], text[-1:]))

    def read_tokens() -> None:
        for _ in range(_STEPS):
            with edited:
                hidden, _ = model.step_through(last, end.state)
            lm.read_out(hidden[:, -1]).argmax(-1)

    def read_prompt() -> None:
        with edited:
            lm.step_through(prompt, end.state, None)

    def once() -> tuple[float, float]:
        absorb = seconds(lambda: start(method, lm, generators, prompts[:1]))
        token, reread, update = seconds(read_tokens) / _STEPS, begin.reread, begin.update
        if reread or begin.repeat:
            token += seconds(read_prompt) / (reread.every if reread else answer)
        if update and update.every > 1:
            token += seconds(lambda: update(lm, end.state)) / update.every
        return absorb, token

    kept = _kept_bytes(two, end.state) + (_TOKEN_BYTES * tokens if two.repeat else 0)
    return once, kept


def _kept_bytes(begin: Start, state: RecurrentState) -> int:
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
