"""Several prompts in one memory: four ways to make one delta of them, and how much of them each way still knows.

- add: every prompt's delta on its own, from a blank state, and their sum. A generator's deltas share their reading
  directions V, so U is added, and the sum is as small as one of them; a prompt can be taken out again.
- concatenate: the same deltas with their ranks side by side (`LowRankDelta.concatenated`). The change is the sum's,
  so it knows neither more nor less, and is as many times as large; it is what is left where reading directions differ,
  as those of gradient steps and of adapters do.
- rederive: the user's line goes on (`tell`): it is read where it stood, with the state carried on, and one delta is
  derived of all of it (`written`). Nothing grows with the number of prompts, and none can be taken out.
- ridge: the same deltas, combined so that under every prompt's keys the one change says what that prompt's own would:

      U = (sum_i U_i A_i) (sum_i A_i + e^lambda I)^-1,   A_i = sum_t k_t k_t^T over the keys k_t = V^T x_t of prompt i,

  which minimises sum_i sum_t ||U k_t - U_i k_t||^2 + e^lambda ||U||^2. These are the normal equations of MALMEN
  (Tan, Zhang, Fu 2023, arXiv 2311.04661), S = (sum_i S_i K_i K_i^T) (sum_i K_i K_i^T + e^lambda I)^-1 with
  S_i = U_i V^T, as all changes share V: solved in r x r instead of in x in. There lambda is learned for each map; here
  e^lambda is one share of the mean eigenvalue of sum_i A_i, chosen on the validation split.

Much of a delta is what its generator writes for any prompt, whatever it says. A sum of n deltas has it n times, and the
answers soon are no answers any more. It has to be counted once: `common_part` estimates it, and `together` leaves out
the copies. A line that goes on has it once anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.generators.token_wise import Memory, TokenGenerator

WAYS = ("add", "concatenate", "rederive", "ridge")


RIDGE = 0.01
"""e^lambda, as a share of the keys' mean eigenvalue."""


def tell(lm: LanguageModel, generator: TokenGenerator, text: str, memory: Memory | None = None) -> Memory:
    """Take in what a user says, as the beginning of a line of a dialogue, or as more of the line in `memory`.

    Args:
        text: without "User:" and without an end of line; of any length.
    Raises:
        UserError: the text is empty, or the generator was trained for another model.
    """
    text = text.strip()
    if not text:
        raise UserError("there is nothing to remember: the text is empty")
    return generator.remember(lm, f"User: {text}" if memory is None else f" {text}", memory)


def written(lm: LanguageModel, generator: TokenGenerator, memory: Memory) -> LowRankDelta:
    """The delta of a line that was told so far, as if it ended here."""
    return generator.delta_of(generator.remember(lm, "\n", memory))


def common_part(lm: LanguageModel, generator: Generator, texts: Sequence[str]) -> LowRankDelta:
    """What a generator writes for any prompt: the mean delta of some that say little else.

    Args:
        texts: as in `together`, of one fact each, e.g. of 64 prompts of the training split. A mean of prompts with
            more facts has more of what all facts have in common, and then a sum loses that, too.
    Raises:
        UserError: there are no texts, or one is empty.
    """
    if not texts:
        raise UserError("there are no texts to take a mean of; give some prompts of one fact each")
    each = generator.memorize(lm, [f"User: {text}\n" for text in texts])
    return sum(each.select([i]) for i in range(len(texts))).scaled(1 / len(texts))


def together(
    way: str,
    lm: LanguageModel,
    generator: Generator,
    texts: Sequence[str],
    common: LowRankDelta | None = None,
    ridge: float = RIDGE,
) -> LowRankDelta:
    """One delta, of batch 1, that holds what all of these prompts say.

    Args:
        way: one of `WAYS`.
        texts: what the user says in each, without "User:" and without an end of line.
        common: what any prompt writes (`common_part`), to be left out of a sum but once; None: all copies stay.
        ridge: e^lambda of the way of that name, as a share of the keys' mean eigenvalue; the other ways have none.
    Raises:
        UserError: unknown way; no texts, or an empty one; a generator that cannot go on from what it has read; a ridge
            that is not above 0.
    """
    if way not in WAYS:
        raise UserError(f"unknown way {way!r}; there are {', '.join(WAYS)}")
    if not texts:
        raise UserError("there are no texts; a memory holds at least one")
    if way == "rederive":
        if not isinstance(generator, TokenGenerator):
            raise UserError(
                f"a {type(generator).__name__} reads every prompt from the beginning; to re-derive one delta prompt "
                "after prompt, take a token-wise generator"
            )
        memory = functools.reduce(lambda memory, text: tell(lm, generator, text, memory), texts, None)
        return written(lm, generator, memory)
    lines = [f"User: {text}\n" for text in texts]
    each = generator.memorize(lm, lines)
    if way == "ridge":
        return combined(each, generator.keys_of(lm, *lm.encode_prompts(lines)), ridge)
    deltas = [each.select([i]) for i in range(len(texts))]
    if common is not None and len(texts) > 1:
        deltas.append(common.scaled(1 - len(texts)))
    return sum(deltas) if way == "add" else functools.reduce(LowRankDelta.concatenated, deltas)


@torch.no_grad()
def combined(each: LowRankDelta, keys: Mapping[str, Tensor], ridge: float = RIDGE) -> LowRankDelta:
    """The one change, of batch 1, that under each prompt's keys says what the prompt's own change does; see above.

    Args:
        each: the prompts' changes, which share their reading directions V.
        keys: by map (B, T, r), zero where there is none.
        ridge: e^lambda, as a share of the mean eigenvalue of the sum of k k^T over all keys.
    Raises:
        UserError: the changes have reading directions of their own, or the ridge is not above 0.
    """
    if ridge <= 0:
        raise UserError(f"a ridge of {ridge} was asked for; it has to be above 0")
    factors = {}
    for name, (u, v) in each.factors.items():
        if len(v) > 1:
            raise UserError("these changes do not share their reading directions; concatenate them")
        squares = (keys[name].mT @ keys[name]).double()  # A_i, (B, r, r)
        total = squares.sum(0)
        total += ridge * total.diagonal().mean().clamp(min=1e-30) * torch.eye(*total.shape).to(total)
        right = (u.double() @ squares).sum(0)  # sum_i U_i A_i, (out, r)
        factors[name] = Factors(torch.linalg.solve(total, right.mT).mT.to(u.dtype)[None], v)
    return replace(each, factors=factors)
