"""What is minimised on pairs of context and query: first a language model's loss, then what makes a change of its
weights do what the context does.

After "Can Gradient Descent Simulate Prompting?" (arXiv 2506.20989): LC, learning from conditioning, holds the changed
model without the context to what the model says that is given it; LG holds it to the gold answer.

Glossary of shapes: B pairs, n contexts each, C context tokens, Q tokens of query and answer, P tokens of all together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.errors import UserError
from prosg_lib.gradient_steps.one_step import Method, adapted
from prosg_lib.tasks.pair_batches import PairBatch
from prosg_lib.text.padding import Rows
from prosg_lib.training.loop import Loss

OBJECTIVES = ("LC", "LG")
_TEXT_WEIGHT = 0.3  # of contexts and queries in pretraining; answers have weight 1


def hidden_of(lm: LanguageModel, rows: Rows) -> Tensor:
    """Final hidden states of all tokens but the last, (B, T - 1, D)."""
    return lm.step_through(rows.ids[:, :-1], None, rows.valid[:, :-1])[0]


def pair_lm_objective(lm: LanguageModel) -> Callable[[int, PairBatch], Loss]:
    """Next-token loss over contexts, query and answer; the words of answers count most."""

    def loss_of(step: int, batch: PairBatch) -> Loss:
        hidden, targets = hidden_of(lm, batch.prompted), batch.prompted.ids[:, 1:]
        counts = {name: int(where.sum()) for name, where in _predicted(batch.whole).items()}
        parts = {
            name: F.cross_entropy(lm.read_out(hidden[where]), targets[where], reduction="sum") / counts[name]
            for name, where in _predicted(batch).items()
        }
        return Loss(parts["answer"] + _TEXT_WEIGHT * parts["text"], parts)

    return loss_of


def _predicted(batch: PairBatch) -> dict[str, Tensor]:
    """Which next tokens are words of answers, and which of the text around them, (B, P - 1)."""
    rows = batch.prompted
    answer = F.pad(batch.answer, (rows.ids.shape[1] - batch.answer.shape[1], 0))[:, 1:]
    return {"answer": answer, "text": rows.valid[:, :-1] & ~answer}


def pair_objective(
    lm: LanguageModel,
    method: Method,
    objective: str,
    everywhere: bool = False,
    repeats: int = 0,
    teacher: KeptTeacher | None = None,
) -> Callable[[int, PairBatch], Loss]:
    """The outer loss of a method that takes contexts in; the model itself stays as it is.

    LC: KL(model given the contexts || changed model without them), over the whole vocabulary, in nats. The log has the
    first one's entropy, too: the cross-entropy is their sum, and cannot be below it. LG: cross-entropy of the gold
    answer. Either is a mean over the tokens of an answer, and then over the pairs of the whole batch.

    Args:
        everywhere: over the query's positions as well, not the answer's alone.
        repeats: number of first steps with repeated random tokens (`PairDraw`). They use LG under either objective: a
            language model does not continue with random tokens, even where it has just read them.
        teacher: remembers what the model says that is given the contexts, for the answer's positions alone; None: the
            model reads them anew each time.
    Raises:
        UserError: unknown objective.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")

    def loss_of(step: int, batch: PairBatch) -> Loss:
        where, last = batch.query.valid[:, :-1], batch.query.ids.shape[1] - 1
        if not everywhere:
            where, last = batch.answer[:, -batch.answers :], batch.answers
        targets = batch.query.ids[:, -last:]
        share = (where / where.sum(1, keepdim=True) / len(batch.whole))[where]
        says = adapted(method, lm, batch.context)(batch.query.ids[:, :-1], batch.query.valid[:, :-1], last)
        student = F.log_softmax(says[where].float(), -1)
        gold = (F.nll_loss(student, targets[where], reduction="none") * share).sum()
        if objective == "LG" or step < repeats:
            return Loss(gold, {"gold": gold})
        with torch.no_grad():
            given = teacher(batch) if teacher else hidden_of(lm, batch.prompted)[:, -last:][where]
            target = F.log_softmax(lm.read_out(given).float(), -1)
            entropy = -((target.exp() * target).sum(-1) * share).sum()
        apart = (F.kl_div(student, target, log_target=True, reduction="none").sum(-1) * share).sum()
        return Loss(apart, {"gold": gold, "entropy": entropy})

    return loss_of


class KeptTeacher:
    """What a frozen model makes of pairs with the contexts in front: read once a pair, and kept.

    Contexts are read from the state after what stands in front of all of them, and queries from the state after their
    contexts. Each is read alone, so that no number depends on the batch that a pair first came in.

    Args:
        lm: reads on from a state without reading everything again (`CausalTransformer.with_kv_cache`).
    """

    KEPT = 10_000  # pairs; a few thousand numbers each

    def __init__(self, lm: LanguageModel):
        self._lm = lm
        self._state_after = lru_cache(8)(self._read)
        self._kept = lru_cache(self.KEPT)(self._answer)

    @torch.no_grad()
    def __call__(self, batch: PairBatch) -> Tensor:
        """Final hidden states where the tokens of the answers are predicted, those of all pairs, (tokens, D)."""
        pairs = (
            (ids[here].tolist(), query[there].tolist(), int(answer.sum()))
            for ids, here, query, there, answer in zip(*batch.prompted, *batch.query, batch.answer, strict=True)
        )
        return torch.cat([self._kept(_in_pieces(*pair), pair[-1]) for pair in pairs])

    def _answer(self, pieces: tuple[tuple[int, ...], ...], answer: int) -> Tensor:
        hidden, _ = self._lm.step_through(self._ids(pieces[-1][:-1]), self._state_after(pieces[:-1]), None)
        return hidden[0, -answer:].clone()

    def _read(self, pieces: tuple[tuple[int, ...], ...]) -> RecurrentState | None:
        if not pieces or not pieces[-1]:
            return None
        return self._lm.step_through(self._ids(pieces[-1]), self._state_after(pieces[:-1]), None)[1]

    def _ids(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([tokens], device=next(self._lm.parameters()).device)


def _in_pieces(prompted: list[int], query: list[int], answer: int) -> tuple[tuple[int, ...], ...]:
    """A prompt as three pieces: what prompt and query both begin with; the contexts; the rest of the query."""
    pairs = zip(prompted, query[:-answer], strict=False)
    opening = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
    end = len(prompted) - len(query) + opening
    return tuple(prompted[:opening]), tuple(prompted[opening:end]), tuple(prompted[end:])
