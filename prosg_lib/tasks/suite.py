"""The suite of established memory tests: its cells, each the settings of a test, which make its problems."""

from __future__ import annotations

from prosg_lib.config.sizes import Forgetting
from prosg_lib.errors import UserError
from prosg_lib.tasks import mqar
from prosg_lib.tasks.copying import Copy
from prosg_lib.tasks.mqar import Mqar
from prosg_lib.tasks.passkey import Passkey
from prosg_lib.tasks.phonebook import Phonebook

Setting = Copy | Mqar | Phonebook | Passkey


def settings(sizes: Forgetting, vocab: int) -> tuple[list[Setting], list[str]]:
    """All cells of the suite for a model with this many tokens, and the reasons why others are left out.

    MQAR's published vocabulary of 8,192 becomes the model's where that is smaller; a length that such a vocabulary
    does not allow is left out.
    """
    found: list[Setting] = [Copy(words) for words in sizes.copy]
    left_out = []
    for length, pairs in sizes.mqar:
        try:
            found.append(Mqar(length, pairs, min(mqar.VOCAB, vocab)))
        except UserError as error:
            left_out.append(str(error))
    found += [Phonebook(lines) for lines in sizes.phonebook]
    found += [Passkey(length, depth) for length in sizes.passkey for depth in sizes.depths]
    return found, left_out
