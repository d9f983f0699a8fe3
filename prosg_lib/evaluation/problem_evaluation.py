"""What a model says at the judged positions of problems: read on from them, without them, with them in its weights.

One forward pass over the rest of a batch, and all methods get the same problems. A model whose state is of a fixed size
reads the memory, and then the rest from that state; one that looks back at all it has read (`state_grows`) reads both
in one pass. There, what is in its weights comes on top of what it still sees; the delta alone shows what they know.

Glossary of shapes: B problems, M tokens of memory, T tokens of the rest, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation.baselines import Start, start
from prosg_lib.generators.base import Generator
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.tasks.problems import Problem, ProblemBatch, problem_batch
from prosg_lib.text.padding import left_padded

PLAIN = ("base", "none", "repeated")
"""Methods that need no generator, see `baselines.METHODS`."""

METHODS = {
    "adapter": "a real gradient step on the memory, in an adapter: as base, with its delta in the weights",
    "alone": "the delta alone: the model reads the rest from a blank state, with the memory's delta in the weights",
}
"""Those that `baselines.METHODS` does not have."""

_KINDS = {
    TokenGenerator: ("prosg-token", "token"),
    FinalStateGenerator: ("prosg-final", "final"),
    AdapterStep: ("adapter", "adapter"),
    StaticDelta: ("static-read", "static"),
}

_TOKENS = 16_384  # of a batch, memory and rest together


def methods_of(generator: Generator | None) -> tuple[str, ...]:
    """The methods that can be compared: the plain model's three, and with a generator its own (by its kind), its delta
    alone, and another problem's state and delta ("wrong").

    Raises:
        UserError: a generator of an unknown kind.
    """
    return PLAIN if generator is None else (*PLAIN, _kind(generator)[0], "alone", "wrong")


def _kind(generator: Generator) -> tuple[str, str]:
    for kind, names in _KINDS.items():
        if isinstance(generator, kind):
            return names
    raise UserError(
        f"a {type(generator).__name__} is no generator that is known here; there are "
        f"{', '.join(kind.__name__ for kind in _KINDS)}"
    )


def answered(
    lm: LanguageModel, generator: Generator | None, problems: Sequence[Problem]
) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """What the model says at the judged positions, by method; yields (method, one tuple of token ids a problem).

    Args:
        problems: of one cell, at least two, because the control needs another one's memory; in batches of about equal
            length they are read fastest.
    Raises:
        UserError: fewer than two problems, or token ids that the model has not.
        NotFinite: what the model says is no number.
    """
    if len(problems) < 2:
        raise UserError(f"{len(problems)} problem a cell was asked for; the control with another one's memory needs 2")
    found: dict[str, list[tuple[int, ...]]] = {method: [] for method in methods_of(generator)}
    for some in _batches(problems):
        for method, said in _said(lm, generator, some):
            found[method] += said
    yield from found.items()


def _batches(problems: Sequence[Problem]) -> Iterator[Sequence[Problem]]:
    """In parts of at least two."""
    longest = max(len(p.memory) + len(p.rest) for p in problems)
    parts = max(1, min(-(-len(problems) * longest // _TOKENS), len(problems) // 2))
    for part in range(parts):
        yield problems[part * len(problems) // parts : (part + 1) * len(problems) // parts]


@torch.no_grad()
def _said(
    lm: LanguageModel, generator: Generator | None, problems: Sequence[Problem]
) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    batch = problem_batch(problems).to(next(lm.parameters()).device)
    _check_tokens(lm, batch)
    memories = [list(p.memory) for p in problems]
    name, kind = (None, None) if generator is None else _kind(generator)
    written = None if generator is None else start(name, lm, {kind: generator}, memories)
    for method in methods_of(generator):
        hidden = _read(lm, method, batch, memories, written)
        logits = lm.read_out(hidden[batch.judged])
        if not torch.isfinite(logits).all():
            raise NotFinite(f"{method}: what the model says is not finite; look at its weights, and at the generator's")
        says = iter(logits.argmax(-1).tolist())
        yield method, [tuple(next(says) for _ in p.judged) for p in problems]


def _check_tokens(lm: LanguageModel, batch: ProblemBatch) -> None:
    largest = max(int(batch.memory.ids.max()), int(batch.rest.max()))
    if largest >= lm.config.vocab:
        raise UserError(
            f"the problems have token {largest}, but the model's vocabulary is {lm.config.vocab}; make them with the "
            "model's own tokenizer, or with a smaller vocabulary"
        )


def _read(
    lm: LanguageModel, method: str, batch: ProblemBatch, memories: list[list[int]], written: Start | None
) -> Tensor:
    """Final hidden states of the rest, (B, T, D).

    Args:
        written: the start with the memories' delta, which is derived once for all methods that need it.
    """
    if lm.state_grows and method in ("base", "repeated"):
        return _in_one_pass(lm, batch, memories if method == "base" else [2 * memory for memory in memories])
    begin = start(method, lm, {}, memories) if method in PLAIN else _with_delta(method, written)
    with applied(lm, begin.delta):
        state = begin.state
        if begin.repeat:
            _, state = lm.step_through(batch.memory.ids, state, batch.memory.valid)
        return lm.step_through(batch.rest, state, None)[0]


def _in_one_pass(lm: LanguageModel, batch: ProblemBatch, memories: list[list[int]]) -> Tensor:
    told = left_padded(memories)
    ids = torch.cat([told.ids.to(batch.rest.device), batch.rest], 1)
    valid = torch.cat([told.valid.to(batch.rest.device), torch.ones_like(batch.judged)], 1)
    return lm.step_through(ids, None, valid)[0][:, -batch.rest.shape[1] :]


def _with_delta(method: str, written: Start) -> Start:
    if method == "alone":
        return Start(None, written.delta)
    if method == "wrong":  # another one's, of whatever kind the generator is
        rows = written.state.batch
        return written.select([(row - 1) % rows for row in range(rows)])
    return written
