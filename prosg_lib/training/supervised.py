"""The supervised synthetic gradient: a generator is first taught to predict true gradients, then end to end.

After decoupled neural interfaces (DNI, Jaderberg et al. 2016, arXiv 1608.05343, section 2): squared error to the true
gradient, a last layer of zeros, and conditioning on the label. Regression alone shrinks what it predicts towards the
mean, so it is only the beginning of the training: the later steps are those of every generator
(`objectives.generator_objective`), on the same dialogues as without the beginning. Whose gradient is predicted,
`TEACHERS`, and how it is scaled is our reading.

Glossary of shapes: B dialogues, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.sizes import Curriculum, SupervisedSize, Training
from prosg_lib.deltas.gradient_factors import TokenFactors, sequence_factors
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.generators.base import Generator, parameter_key
from prosg_lib.generators.true_gradient import prompt_gradient, reading_directions, squared_error, squared_norm
from prosg_lib.tasks.dialogue import ANSWER, DialogueBatch
from prosg_lib.training.loop import Loss
from prosg_lib.training.objectives import USUAL, autocast_on, generator_objective


def supervised_objective(
    lm: LanguageModel,
    generator: Generator,
    sizes: Training,
    seed: int,
    size: SupervisedSize,
    sample: DialogueBatch,
    autocast: bool = False,
    curriculum: Curriculum = USUAL,
) -> Callable[[int, DialogueBatch], Loss]:
    """First (V2) the error of what the generator predicts, then (V1) the loss of the answers given the change.

    Of each map the change s U V^T is to be -c G, where c makes the change `size.strength` times as large as the weight
    for a usual prompt (`steps_of`). The error is ||s U V^T + c G||^2 / ||c G||^2, a mean over maps and prompts: each
    counts as much, and 1 is what no change at all has.

    Args:
        sizes: of the whole training; `size.lessons` of its steps are lessons.
        sample: dialogues by which c is chosen, once.
        generator: of any kind.
    """
    gradient_of = TEACHERS[size.teacher]
    lessons = int(size.lessons * sizes.steps)
    end_to_end = generator_objective(lm, generator, sizes, seed, autocast, curriculum)
    kind = next(generator.parameters()).dtype  # under autocast, gradients come in another
    steps = steps_of(lm, gradient_of(lm, generator.names, sample), size.strength)

    def loss_of(step: int, batch: DialogueBatch) -> Loss:
        if step >= lessons:
            return end_to_end(step, batch)
        with autocast_on(batch.rest.device, autocast):
            true = gradient_of(lm, generator.names, batch)
            true = {name: TokenFactors(*(t.to(kind) for t in factors)) for name, factors in true.items()}
            delta, _ = generator(lm, batch.prompt, batch.prompt_valid)
        loss = unexplained(delta, true, steps).mean() * (len(batch) / len(batch.whole))
        return Loss(loss, {"gradient": loss})

    return loss_of


@torch.no_grad()
def start_directions(lm: LanguageModel, generator: Generator, size: SupervisedSize, sample: DialogueBatch) -> None:
    """Let the generator's reading directions start as those that read the most of the teacher's gradients.

    Random ones read r of `in` dimensions, and what they do not read can be no lesson.

    Raises:
        UserError: too few dialogues for so many directions.
    """
    for name, factors in TEACHERS[size.teacher](lm, generator.names, sample).items():
        generator.V[parameter_key(name)].copy_(reading_directions(factors, generator.rank))


def steps_of(lm: LanguageModel, gradients: dict[str, TokenFactors], strength: float) -> dict[str, float]:
    """By map the step size c with c ||G||_F = strength ||W||_F, in the root mean square over the prompts given."""
    maps = lm.editable()
    return {
        name: strength * float(maps[name].weight.detach().norm() / squared_norm(factors).mean().clamp(min=1e-30).sqrt())
        for name, factors in gradients.items()
    }


def unexplained(delta: LowRankDelta, true: dict[str, TokenFactors], steps: dict[str, float]) -> Tensor:
    """||s U V^T + c G||_F^2 / ||c G||_F^2 of each map and prompt, (maps, B); no matrix is formed.

    Args:
        delta: one change a prompt; true: by map the gradient's factors; steps: by map c.
    """
    errors = []
    for name, (u, v) in delta.factors.items():
        change = Factors(u.to(v.dtype) * (delta.scale / steps[name]), v)
        factors = TokenFactors(-true[name].grad_output, true[name].x)
        errors.append(squared_error(change, factors) / squared_norm(factors).clamp(min=1e-30))
    return torch.stack(errors)


def answer_gradient(lm: LanguageModel, names: list[str], batch: DialogueBatch) -> dict[str, TokenFactors]:
    """Factors of the gradient of the NLL of each dialogue's answers (a sum over their tokens, nats), asked from a blank
    state, as if the prompt had never been.

    Returns:
        By map Delta and X of the tokens of what follows the prompt, (B, T - 1, ...).
    """
    ids, targets = batch.rest[:, :-1], batch.rest[:, 1:]
    asked = batch.kind[:, 1:] == ANSWER

    def loss() -> Tensor:
        hidden, _ = lm.step_through(ids, None, None)
        return F.cross_entropy(lm.read_out(hidden[asked]), targets[asked], reduction="sum")

    return sequence_factors(lm, names, loss)


TEACHERS = {
    "prompt": lambda lm, names, batch: prompt_gradient(lm, names, batch.prompt, batch.prompt_valid)[0],
    "answers": answer_gradient,
}
"""Whose gradient a generator is to predict: our reading of a memory loss, which ProSG's abstract leaves open.

Each is (lm, names of maps, DialogueBatch) -> by map TokenFactors (B, T, ...).

- prompt: the prompt's own NLL. The literal one: its tokens are those that the generator reads, so that its delta_t is
  to be the true delta_t. A step against it makes this prompt likelier, and no question about it answerable.
- answers: the NLL of the answers to questions about the prompt, from a blank state. The change is asked for that knows
  the prompt: L(W + dW) = L(W) + <G, dW> + ..., so that a step against G is the first one that end-to-end training would
  take. Its tokens are the questions', which the generator does not see; what it can learn is the mean over questions.
"""
