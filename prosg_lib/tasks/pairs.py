"""What the tasks of the gradient step have in common: a context, a query that depends on it, and the answer."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A context and a query about it (Zhang, Choshen, Andreas 2025, section 2), as texts that a model reads unchanged.

    Attributes:
        context: what is learned, or placed before the query.
        query: ends where the answer begins.
        answer: the right continuation, without the space before it.
    """

    context: str
    query: str
    answer: str

    def __post_init__(self):
        for name in ("context", "query", "answer"):
            if not getattr(self, name).strip():
                raise UserError(f"a pair has an empty {name}; each needs a context, a query and an answer")


_QUESTIONS = (
    "Mr. Brandt opened a bakery in Lund in 1962 and sold it to his niece Klara, who still bakes there.\n"
    "Question: Who bought the bakery?\nAnswer: Klara\nQuestion: When was the bakery opened?\nAnswer: 1962\n\n"
)
_CLOZE = (
    "The ferry to the island leaves from the old pier. It takes forty minutes when the sea is calm.\n"
    "Complete from the passage:\nThe ferry to the island leaves from the old pier\n\n"
)


@dataclass(frozen=True)
class Form:
    """How pairs are shown to a model.

    Attributes:
        opening: examples in front of every query, with and without its context.
        ended: a newline belongs to the answer. Without it, whatever follows a right answer is right.
    """

    opening: str = ""
    ended: bool = True


PLAIN = Form()


def form_of(task: str) -> Form:
    """The form of a task for a model that nobody has trained on it: it needs examples, and it completes a sentence to
    its end where only a name is asked for."""
    return Form(_QUESTIONS) if task in ("characters", "reversal", "squad") else Form(_CLOZE, ended=False)


@dataclass(frozen=True)
class Fitted:
    """The pairs that fit, in their order, and the number of those that do not."""

    pairs: tuple[Pair, ...]
    too_long: int

    def __str__(self) -> str:
        return f"{len(self.pairs):,} pairs; {self.too_long:,} left out as too long"


def fitted(pairs: Iterable[Pair], tokenizer: Tokenizer, context: int, query: int) -> Fitted:
    """Leave out, and count, the pairs that are too long; none is cut.

    Args:
        context: largest number of tokens of a context.
        query: largest number of tokens of a query with its answer.
    Raises:
        UserError: no pair fits.
    """
    kept, too_long = [], 0
    for pair in pairs:
        fits = (
            len(tokenizer.encode(pair.context)) <= context
            and len(tokenizer.encode(f"{pair.query} {pair.answer}")) <= query
        )
        if fits:
            kept.append(pair)
        else:
            too_long += 1
    if not kept:
        raise UserError(
            f"none of {too_long} pairs fits into {context} tokens of context and {query} of query; allow more tokens"
        )
    return Fitted(tuple(kept), too_long)


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces, as SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())
