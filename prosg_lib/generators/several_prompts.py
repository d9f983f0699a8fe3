"""One delta for several prompts, by four methods.

- add: the sum of the prompts' own deltas, each from a blank state. A generator's deltas share their reading directions
  V, so their U are added and the sum is as small as one of them; a prompt can be subtracted again.
- concatenate: the same deltas with their ranks concatenated (`LowRankDelta.concatenated`). It is the same change as the
  sum, and larger by the number of prompts. Where reading directions differ, as those of gradient steps and adapters
  do, it is the only form a sum has.
- rederive: all prompts are read as one line, the state carried on (`append_prompt`), and one delta is derived from it
  (`delta_of_prompts`). Nothing grows with the number of prompts, and none can be taken out.
- ridge: one U that answers the keys of every prompt as that prompt's own U_i would,

      U = (sum_i U_i A_i) (sum_i A_i + e^lambda I)^-1,   A_i = sum_t k_t k_t^T over the keys k_t of prompt i,

  the minimum of sum_i sum_t ||U k_t - U_i k_t||^2 + e^lambda ||U||^2. These are the normal equations of MALMEN
  (Tan, Zhang, Fu 2023, arXiv 2311.04661), S = (sum_i S_i K_i K_i^T) (sum_i K_i K_i^T + e^lambda I)^-1 with
  S_i = U_i V^T. Since all deltas share V, they are solved in r x r instead of in x in. MALMEN learns lambda for each
  map; here e^lambda is one share of the mean eigenvalue of sum_i A_i, chosen on the validation split.

A large part of every delta is the same whatever the prompt says. A sum of n deltas contains it n times, which soon
breaks the answers. `common_part` estimates it, and `joint_delta` subtracts the extra copies from a sum. A line that is
read as one contains it once anyway.
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
from prosg_lib.text.chat_template import format_of

METHODS = ("add", "concatenate", "rederive", "ridge")

RIDGE = 0.01
"""e^lambda, as a share of the keys' mean eigenvalue."""


def append_prompt(lm: LanguageModel, generator: TokenGenerator, text: str, memory: Memory | None = None) -> Memory:
    """The memory of what the user says, in the model's own format: of a dialogue's line that starts with it, or goes on
    with it after `memory`; of a message, where the model's files have a chat template.

    Args:
        text: what the user says, and nothing else; of any length.
    Raises:
        UserError: the text is empty, or the generator was trained for another model.
    """
    text = text.strip()
    if not text:
        raise UserError("there is nothing to remember: the text is empty")
    written = format_of(lm.needed_tokenizer()).remembered(text, more=memory is not None)
    return generator.read_text(lm, written, memory)


def delta_of_prompts(lm: LanguageModel, generator: TokenGenerator, memory: Memory) -> LowRankDelta:
    """The delta of what is in `memory`, as if it ended here."""
    end = format_of(lm.needed_tokenizer()).remembered_end
    return generator.delta_of(generator.read_text(lm, end, memory) if end else memory)


def common_part(lm: LanguageModel, generator: Generator, texts: Sequence[str]) -> LowRankDelta:
    """The part of a generator's deltas that does not depend on the prompt: the mean delta of short prompts.

    Args:
        texts: as in `joint_delta`, of one fact each, e.g. 64 prompts of the training split. With more facts each, the
            mean would also contain what all facts have in common, and a sum would lose that.
    Raises:
        UserError: there are no texts, or one is empty.
    """
    each = generator.memorize(lm, _lines(lm, texts))
    return sum(each.select([i]) for i in range(len(texts))).scaled(1 / len(texts))


def _lines(lm: LanguageModel, texts: Sequence[str]) -> list[str]:
    """What the user says in each prompt, as a dialogue's line or a message."""
    if isinstance(texts, str) or not texts or not all(map(str.strip, texts)):
        raise UserError(f"texts is {texts!r}; give a list of at least one text, none of them empty")
    form = format_of(lm.needed_tokenizer())
    return [form.remembered(text, more=False) + form.remembered_end for text in texts]


def joint_delta(
    method: str, lm: LanguageModel, generator: Generator, texts: Sequence[str], common: LowRankDelta | None = None
) -> LowRankDelta:
    """One delta, of batch 1, for everything that these prompts say.

    Args:
        method: one of `METHODS`.
        texts: what the user says in each prompt, without "User:" and without an end of line.
        common: the `common_part`, of which a sum is to contain one copy; None leaves all copies in.
    Raises:
        UserError: unknown method; no texts, or an empty one; a generator that cannot continue from what it has read.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    lines = _lines(lm, texts)
    if method == "rederive":
        if not isinstance(generator, TokenGenerator):
            raise UserError(
                f"a {type(generator).__name__} cannot continue from what it has read; use a token-wise generator"
            )
        memory = functools.reduce(lambda memory, text: append_prompt(lm, generator, text, memory), texts, None)
        return delta_of_prompts(lm, generator, memory)
    each = generator.memorize(lm, lines)
    if method == "ridge":
        return ridge_delta(each, generator.prompt_keys(lm, *lm.encode_prompts(lines)))
    deltas = [each.select([i]) for i in range(len(texts))]
    if common is not None and len(texts) > 1:
        deltas.append(common.scaled(1 - len(texts)))
    return sum(deltas) if method == "add" else functools.reduce(LowRankDelta.concatenated, deltas)


@torch.no_grad()
def ridge_delta(each: LowRankDelta, keys: Mapping[str, Tensor], ridge: float = RIDGE) -> LowRankDelta:
    """The one delta, of batch 1, that answers each prompt's keys as the prompt's own delta does; see above.

    Args:
        each: the prompts' deltas, which share their reading directions V.
        keys: by map (B, T, r), zero where there is none.
        ridge: e^lambda above 0, as a share of the mean eigenvalue of the sum of k k^T over all keys.
    Raises:
        UserError: the deltas have reading directions of their own.
    """
    factors = {}
    for name, (u, v) in each.factors.items():
        if len(v) > 1:
            raise UserError("these deltas do not share their reading directions; use the method concatenate")
        squares = (keys[name].mT @ keys[name]).double()  # A_i, (B, r, r)
        total = squares.sum(0)
        total += ridge * total.diagonal().mean().clamp(min=1e-30) * torch.eye(*total.shape).to(total)
        right = (u.double() @ squares).sum(0)  # sum_i U_i A_i, (out, r)
        factors[name] = Factors(torch.linalg.solve(total, right.mT).mT.to(u.dtype)[None], v)
    return replace(each, factors=factors)
