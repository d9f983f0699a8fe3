"""What is minimised on pairs of context and query: first a language model's loss, then what makes a change of its
weights do what the context does.

After "Can Gradient Descent Simulate Prompting?" (arXiv 2506.20989): LC, learning from conditioning, holds the changed
model without the context to what the model says that is given it; LG holds it to the gold answer.

Glossary of shapes: B pairs, n contexts each, C context tokens, Q tokens of query and answer, P tokens of all together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.gradient_step import Way, answering
from prosg_lib.tasks.pair_batches import PairBatch, Rows
from prosg_lib.training import Loss

OBJECTIVES = ("LC", "LG")
_TEXT_WEIGHT = 0.3  # of contexts and queries in pretraining; answers have weight 1


def hidden_of(lm: LanguageModel, rows: Rows) -> Tensor:
    """Final hidden states of all tokens but the last, (B, T - 1, D)."""
    return lm.step_through(rows.ids[:, :-1], None, rows.valid[:, :-1])[0]


def pair_lm_objective(lm: LanguageModel) -> Callable[[int, PairBatch], Loss]:
    """Next-token loss over contexts, query and answer; the words of answers count most."""

    def loss_of(step: int, batch: PairBatch) -> Loss:
        rows = batch.prompted
        answer = F.pad(batch.answer, (rows.ids.shape[1] - batch.answer.shape[1], 0))[:, 1:]
        told = rows.valid[:, :-1] & ~answer
        hidden, targets = hidden_of(lm, rows), rows.ids[:, 1:]
        parts = {
            name: F.cross_entropy(lm.read_out(hidden[where]), targets[where])
            for name, where in (("answer", answer), ("text", told))
        }
        return Loss(parts["answer"] + _TEXT_WEIGHT * parts["text"], parts)

    return loss_of


def prompted_logits(lm: LanguageModel, batch: PairBatch, where: Tensor) -> Tensor:
    """What the model says that is given the contexts, (positions, vocab).

    Args:
        where: (B, Q - 1), the positions asked for, each by the token that comes after it.
    """
    return lm.read_out(hidden_of(lm, batch.prompted)[:, -where.shape[1] :][where])


def pair_objective(
    lm: LanguageModel, way: Way, objective: str, everywhere: bool = False, successive: bool = False
) -> Callable[[int, PairBatch], Loss]:
    """The outer loss of a way to take contexts in; the model stays as it is.

    LC: mean KL(model given the contexts || changed model without them), over the whole vocabulary, in nats; the log
    has the first one's entropy, too: cross-entropy is their sum, and cannot be below it. LG: mean cross-entropy of the
    gold answer.

    Args:
        everywhere: over the query's positions as well, not the answer's alone.
        successive: one step a context instead of one for all.
    Raises:
        UserError: unknown objective.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")

    def loss_of(step: int, batch: PairBatch) -> Loss:
        where = batch.query.valid[:, :-1] & (batch.answer[:, 1:] | everywhere)
        says = answering(way, lm, batch.context, successive)(batch.query.ids[:, :-1], batch.query.valid[:, :-1])
        student = F.log_softmax(says[where].float(), -1)
        gold = F.nll_loss(student, batch.query.ids[:, 1:][where])
        if objective == "LG":
            return Loss(gold, {"gold": gold})
        with torch.no_grad():
            teacher = F.log_softmax(prompted_logits(lm, batch, where).float(), -1)
            entropy = -(teacher.exp() * teacher).sum(-1).mean()
        apart = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return Loss(apart, {"gold": gold, "entropy": entropy})

    return loss_of


@torch.no_grad()
def right(says: Tensor, rows: Rows, answer: Tensor) -> Tensor:
    """Whether a greedy answer is the gold one, token for token, up to the newline that ends it, (B,).

    It is where, given the gold answer so far, its next token is the likeliest everywhere.

    Args:
        says: logits at all positions but the last, (B, T - 1, vocab); rows (B, T) end as answer (B, Q) does.
    """
    answer = answer[:, 1:]
    q = answer.shape[1]
    hit = says[:, -q:].argmax(-1) == rows.ids[:, 1:][:, -q:]
    return (hit | ~answer).all(1)
