"""Phone book: lines of names and numbers, two of them repeated as examples, and then a third name.

A problem, as text (4 lines)::

    memory:  Mara Quill: 402-118-7735
             Otto Birch: 771-640-0092
             Ruth Hale: 115-903-4418
             Igor Snow: 930-277-5061
    rest:    Igor Snow: 930-277-5061
             Mara Quill: 402-118-7735
             Ruth Hale: 115-903-4418

Only the last number is judged, and all of it must be right. The test of "Repeat After Me" (Jelassi et al. 2024, arXiv
2402.01032, section 4), with names of our own (`tasks.people`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from prosg_lib.errors import UserError
from prosg_lib.tasks.people import full_name, name_count
from prosg_lib.tasks.problems import Material, Problem, check_whole, draw_content, encode_pieces, with_answer

TASK = "phonebook"
_LARGEST = 10_000  # lines; there are more than twice as many names


@dataclass(frozen=True)
class Phonebook:
    """lines: of the book, 3 to 10,000; two are the examples, and a third is the question."""

    lines: int

    def __post_init__(self):
        check_whole("the number of lines of a phone book", self.lines, 3)
        if self.lines > _LARGEST:
            raise UserError(f"a phone book cannot have {self.lines} lines; the largest has {_LARGEST}")

    def problem(self, material: Material, split: str, seed: int, number: int) -> Problem:
        """Problem `number` of a split and seed. Names differ within a book; no book is in two splits, though names are.

        Raises:
            UserError: an unknown split, or a tokenizer that gives no tokens for the text.
        """

        def draw(rng: random.Random) -> tuple[tuple[tuple[str, str], ...], tuple[int, ...]]:
            book = tuple(
                (full_name(who), f"{rng.randrange(100, 1000)}-{rng.randrange(1000):03d}-{rng.randrange(10000):04d}")
                for who in rng.sample(range(name_count()), self.lines)
            )
            return book, tuple(rng.sample(range(self.lines), 3))

        book, (*examples, wanted) = draw_content(draw, split, f"{TASK}/{self.lines}/{seed}/{number}")
        tokenizer = material.tokenizer
        lines = [encode_pieces(tokenizer, f"{name}:", f" {phone}", "\n") for name, phone in book]
        name, phone = book[wanted]
        question = [*(i for n in examples for i in lines[n]), *encode_pieces(tokenizer, f"{name}:")]
        memory = [i for line in lines for i in line]
        return with_answer(TASK, {"lines": self.lines}, memory, question, encode_pieces(tokenizer, f" {phone}"))
