"""How a conversation is written down for a model: as its files say, by a template in Jinja, turn by turn.

A template writes whole conversations. Here the model has read what came before, and needs what is new: the difference
of two conversations, of which the longer begins with the shorter. Only the last exchange is needed for that, so nothing
grows with the conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prosg_lib.errors import UserError, reason

if TYPE_CHECKING:
    from prosg_lib.text.tokenizer import Tokenizer

Exchange = tuple[str, str]
"""What was asked, and what was answered."""

_REMEDY = (
    "remove its chat template (chat_template in tokenizer_config.json, or chat_template.jinja; in Python, "
    'lm.tokenizer.template = None) to talk in lines of "User: " and "Bot: "'
)


BEGUN: Exchange = ("", "")
"""Of a conversation that has begun, whatever was said: what comes next does not depend on it."""


class Lines:
    """The format of the project's own dialogues, with the methods of a `ChatTemplate`."""

    space = ""  # an answer begins with one
    remembered_end = "\n"

    def question(self, text: str, last: Exchange | None = None) -> str:
        return f"User: {text}\nBot:"

    def statement(self, text: str, last: Exchange | None = None) -> str:
        return f"User: {text}\n"

    def answered(self, text: str, answer: str, last: Exchange | None = None) -> str:
        return f"{answer}\n"

    def remembered(self, text: str, more: bool) -> str:
        return f" {text}" if more else f"User: {text}"


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own format of conversations.

    Attributes:
        source: the template, which runs in Jinja's sandbox.
        special: tokens that it may name, as text: bos_token, eos_token, ...
    """

    space = " "  # shown before an answer, which does not begin with one
    remembered_end = ""  # each text that is remembered is a whole message

    source: str
    special: Mapping[str, str]

    def question(self, text: str, last: Exchange | None = None) -> str:
        """What a question adds to a conversation, up to where the answer begins.

        Args:
            last: the exchange before; None at the beginning.
        Raises:
            UserError: the template fails, or writes something that does not begin with what it wrote before.
        """
        return self._new(_before(last), [*_before(last), _says("user", text)], begun=False, begin=True)

    def statement(self, text: str, last: Exchange | None = None) -> str:
        """What a text of the user's adds that is to be read, not answered."""
        return self._new(_before(last), [*_before(last), _says("user", text)], begun=False, begin=False)

    def answered(self, text: str, answer: str, last: Exchange | None = None) -> str:
        """What an answer adds behind its question."""
        asked = [*_before(last), _says("user", text)]
        return self._new(asked, [*asked, _says("assistant", answer)], begun=True, begin=False)

    def remembered(self, text: str, more: bool) -> str:
        """How a generator reads a text that is to be remembered: as a message of the user's, without what a template
        puts in front of a conversation. What else is remembered (more) is a message of its own."""
        return self.statement(text, BEGUN)

    def _new(self, shorter: list[dict], longer: list[dict], begun: bool, begin: bool) -> str:
        old = self._written(shorter, begun) if shorter else ""
        whole = self._written(longer, begin)
        if not whole.startswith(old):
            raise UserError(f"the model's chat template rewrites what was said before; {_REMEDY}")
        return whole[len(old) :]

    def _written(self, messages: list[dict], begin: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[messages], chat_template=self.source, add_generation_prompt=begin, **self.special
            )
        except Exception as error:  # a template may raise errors of its own
            raise UserError(f"the model's chat template fails ({reason(error)}); {_REMEDY}") from error
        return text


def _says(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _before(last: Exchange | None) -> list[dict]:
    return [] if last is None else [_says("user", last[0]), _says("assistant", last[1])]


Format = Lines | ChatTemplate


def format_of(tokenizer: Tokenizer) -> Format:
    """How conversations are written for a model: as its files say, or in the lines of the project's dialogues."""
    return tokenizer.template or Lines()
