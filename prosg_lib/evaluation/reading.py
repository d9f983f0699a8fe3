"""Texts read after a start, with what its method does meanwhile: reading the prompt again, or updating the state.

Glossary of shapes: B batch, T tokens of text, S tokens read (the text's and those read again), D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from prosg_lib.backbones import generation
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.generation import Decoding
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.evaluation.baselines import Reread, Start, StateUpdate
from prosg_lib.text.padding import left_padded

_PIECE = 256  # tokens that a model with attention reads at a time; attention takes memory for every pair of them


class Stretch(NamedTuple):
    """What was read since the previous place.

    Attributes:
        place: tokens of the text read so far.
        state: after them.
        before: for each of them the hidden state that it is predicted from, (B, T, D), zeros for the text's first; None
            where there are none, or where the text is read anew at every place (`baselines.Window`).
    """

    place: int
    state: RecurrentState | None
    before: Tensor | None


def read(lm: LanguageModel, begin: Start, texts: Sequence[Sequence[int]], places: Sequence[int]) -> Iterator[Stretch]:
    """Reads texts from a start, with its delta, and stops at every place.

    Args:
        texts: token ids, one text a prompt of the start.
        places: numbers of tokens, ascending; what a method reads again does not count.
    """
    if begin.window is not None:
        for place in places:
            ids, valid = lm.encode_prompts(begin.window.known(texts, place))
            yield Stretch(place, _through(lm, None, ids, None, valid, 0)[1], None)
        return
    state, last, at = begin.state, None, 0
    for place in places:
        before = None
        if place > at:
            ids, own, valid = _stretch(begin.reread, texts, at, place, next(lm.parameters()).device)
            with applied(lm, begin.delta):
                hidden, state = _through(lm, begin.update, ids, state, valid, at)
            last = torch.zeros_like(hidden[:, :1]) if last is None else last
            before = torch.cat([last, hidden[:, :-1]], 1)
            if own is not None:
                padding = torch.cat([~valid[:, :1], ~valid[:, :-1]], 1)
                before = torch.where(padding[..., None], last, before)[own].view(len(ids), place - at, -1)
            last, at = hidden[:, -1:], place
        yield Stretch(place, state, before)


def _stretch(
    reread: Reread | None, texts: Sequence[Sequence[int]], at: int, place: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens `at` to `place` of each text, with what is read again: ids (B, S), left-padded; which of them are the
    text's own, (B, S); and which are no padding, (B, S). The last two are None where nothing is read again."""
    if reread is None:
        return torch.tensor([list(text[at:place]) for text in texts], device=device), None, None
    rows, marks = [], []
    for text, prompt in zip(texts, reread.prompts, strict=True):
        row, mark = [], []
        again = set(reread.places(text))
        for number in range(at, place):
            row.append(text[number])
            mark.append(True)
            if number + 1 in again:
                row += prompt
                mark += [False] * len(prompt)
        rows.append(row)
        marks.append(mark)
    ids, valid = left_padded(rows)
    return ids.to(device), left_padded(marks).ids.bool().to(device), valid.to(device)


def _through(
    lm: LanguageModel,
    update: StateUpdate | None,
    ids: Tensor,
    state: RecurrentState | None,
    valid: Tensor | None,
    at: int,
) -> tuple[Tensor, RecurrentState]:
    """As `lm.step_through`, with the state updated when due; `at`: tokens read before."""
    every = update.every if update else _PIECE if lm.state_grows else ids.shape[1]
    hidden, done = [], 0
    while done < ids.shape[1]:
        end = min(ids.shape[1], done + every - ((at + done) % every if update else 0))
        out, state = lm.step_through(ids[:, done:end], state, None if valid is None else valid[:, done:end])
        if update and (at + end) % every == 0:
            state = update(lm, state)
        hidden.append(out)
        done = end
    return torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0], state


def answering(lm: LanguageModel, begin: Start) -> LanguageModel | UpdatedModel:
    """The model to put questions to. What a method does at every token, it also does in questions and answers; what it
    does less often, it does not do there, because they are short."""
    return UpdatedModel(lm, begin.update) if begin.update and begin.update.every == 1 else lm


class UpdatedModel:
    """A language model whose state is updated after every token; everything else is the model's own.

    Args:
        update: one state a sequence.
    """

    def __init__(self, lm: LanguageModel, update: StateUpdate):
        self._lm, self._update = lm, update

    def __getattr__(self, name: str):
        return getattr(self._lm, name)

    def step_through(
        self, ids: Tensor, state: RecurrentState | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """See `LanguageModel.step_through`; padding changes nothing."""
        hidden = []
        for number, token in enumerate(ids.split(1, 1)):
            real = None if valid is None else valid[:, [number]]
            out, state = self._lm.step_through(token, state, real)
            updated = self._update(self._lm, state)
            state = updated if real is None else _where(real[:, 0], updated, state)
            hidden.append(out)
        return torch.cat(hidden, 1), state

    def select(self, rows: Sequence[int]) -> Self:
        """See `LanguageModel.select`."""
        return UpdatedModel(self._lm, self._update.select(rows))

    def generate(self, prompts, state=None, delta=None, **how):
        """See `LanguageModel.generate`."""
        return generation.generate(self, prompts, state, delta, Decoding(**how))


def _where(rows: Tensor, new: RecurrentState, old: RecurrentState) -> RecurrentState:
    tensors = {n: torch.where(rows.view(-1, *[1] * (t.ndim - 1)), t, old.tensors[n]) for n, t in new.tensors.items()}
    return replace(new, tensors=tensors)
