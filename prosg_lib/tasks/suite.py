"""The suite of established memory tests: its cells (settings of a test), and the problems of each cell."""

from __future__ import annotations

from dataclasses import dataclass

from prosg_lib.config.sizes import Forgetting
from prosg_lib.errors import UserError
from prosg_lib.tasks import copying, mqar, passkey, phonebook
from prosg_lib.tasks.copying import Copy
from prosg_lib.tasks.mqar import Mqar
from prosg_lib.tasks.passkey import Passkey
from prosg_lib.tasks.phonebook import Phonebook
from prosg_lib.tasks.problems import Problem
from prosg_lib.text.prose import ProseTokens
from prosg_lib.text.tokenizer import Tokenizer

SPLIT = "test"

Setting = Copy | Mqar | Phonebook | Passkey


@dataclass(frozen=True)
class Material:
    """What problems are made from: a model's tokenizer, and prose of the split in its tokens."""

    tokenizer: Tokenizer
    prose: ProseTokens


def settings(sizes: Forgetting, vocab: int) -> tuple[list[Setting], list[str]]:
    """All cells of the suite for a model with this many tokens, and the reasons why others are left out.

    MQAR's published vocabulary of 8,192 becomes the model's where that is smaller (`tasks.mqar.fitting`); a length that
    such a vocabulary does not allow is left out.
    """
    found: list[Setting] = [Copy(words) for words in sizes.copy]
    left_out = []
    for length, pairs in sizes.mqar:
        try:
            found.append(mqar.fitting(length, pairs, vocab))
        except UserError as error:
            left_out.append(str(error))
    found += [Phonebook(lines) for lines in sizes.phonebook]
    found += [Passkey(length, depth) for length in sizes.passkey for depth in sizes.depths]
    return found, left_out


def problem_of(setting: Setting, material: Material, seed: int, number: int, split: str = SPLIT) -> Problem:
    """Problem `number` of a cell, split and seed; the material's prose must be of that split."""
    match setting:
        case Copy():
            return copying.problem(setting, material.tokenizer, split, seed, number)
        case Mqar():
            return mqar.problem(setting, split, seed, number)
        case Phonebook():
            return phonebook.problem(setting, material.tokenizer, split, seed, number)
        case Passkey():
            return passkey.problem(setting, material.tokenizer, material.prose, split, seed, number)
