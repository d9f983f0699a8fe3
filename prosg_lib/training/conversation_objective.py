"""What is minimised on conversations: a model with a window, whose prompt has left it, answers as if it had not.

The student reads a question from a blank state, with the prompt's delta in the weights. It learns the right answers
(LG) and, if the curriculum says so, to predict what the same model predicts with examples of the form and the prompt in
its window (LC; Zhang, Choshen and Andreas 2025, arXiv 2506.20989, section 2). At every second step other text counts,
too: it stands in front of the questions, and locality is KL(model without the change || with it) on it.

What costs time is kept short: a prompt is read once for all of its questions, below the first changed map nothing is
differentiated, and only answers are read out over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import ConversationCurriculum
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.conversations import ConversationBatch
from prosg_lib.training import distributed
from prosg_lib.training.loop import Loss
from prosg_lib.training.objectives import autocast_on

_EVERY = 4  # of the positions of prose, one in so many is read out


def conversation_objective(
    lm: LanguageModel, generator: Generator, curriculum: ConversationCurriculum, steps: int
) -> Callable[[int, ConversationBatch], Loss]:
    """See above. steps: of the whole training."""
    autocast = distributed.bfloat16()

    def loss_of(step: int, batch: ConversationBatch) -> Loss:
        asked = batch.answer.any(-1)  # (B, Q)
        owner, turns, answer = asked.nonzero()[:, 0], batch.turns[asked], batch.answer[asked]  # rows, (rows, T)
        ids, predicts, gold = turns[:, :-1], answer[:, 1:], turns[answer]
        share = len(gold) / int(batch.whole.answer.sum())  # of the tokens that the batch's mean is over
        parts, begin = {}, None
        with autocast_on(ids.device, autocast):
            delta, _ = generator(lm, batch.prompt, batch.valid)
            if step % 2 and step >= int(curriculum.local * steps):
                loss, read = _locality(lm, delta, batch.prose)
                parts["locality"] = loss * len(batch) / len(batch.whole)
                begin = read.detach().select(owner)
            with applied(lm, delta.select(owner)):
                hidden = lm.hidden_states(ids, begin)
            student = _log_softmax(lm, hidden[predicts])
            parts["answer"] = F.nll_loss(student, gold) * share
            if curriculum.teacher and batch.opening.numel():
                with torch.no_grad():
                    _, state = lm.step_through(batch.opening[:1], None, None)  # the same for all
                    _, state = lm.step_through(batch.prompt, state.select([0] * len(batch)), batch.valid)
                    prompted = lm.hidden_states(ids, state.select(owner))
                    target = _log_softmax(lm, prompted[predicts])
                parts["teacher"] = _divergence(student, target) * share
                parts["prompted"] = F.nll_loss(target, gold) * share  # what the teacher knows itself
        weights = {"answer": 1.0, "teacher": curriculum.teacher, "locality": curriculum.locality}
        total = sum(weight * parts[name] for name, weight in weights.items() if name in parts)
        right = (student.argmax(-1) == gold).float().mean() * share
        return Loss(total, parts | {"right": right})

    return loss_of


def _locality(lm: LanguageModel, delta: LowRankDelta, prose: Tensor) -> tuple[Tensor, RecurrentState]:
    """Mean KL(model without the delta || with it) of the next token, nats; and the state after the prose, with it."""
    with torch.no_grad():
        plain = lm.hidden_states(prose)
        target = _log_softmax(lm, plain[:, ::_EVERY].flatten(0, 1))
    with applied(lm, delta):
        hidden, state = lm.step_through(prose, None, None)
    return _divergence(_log_softmax(lm, hidden[:, ::_EVERY].flatten(0, 1)), target), state


def _divergence(student: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(student, target, log_target=True, reduction="batchmean")


def _log_softmax(lm: LanguageModel, hidden: Tensor) -> Tensor:
    return F.log_softmax(lm.read_out(hidden).float(), -1)
