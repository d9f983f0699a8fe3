"""A conversation in a terminal with a model that keeps what it was asked to remember: `prosg chat`.

The format is the chat template of the model's files, or, where they have none, that of the dialogues ("User: …",
"Bot: …"). Two states read the same conversation, one with the remembered text in the weights and one without, so that
the plain model can be asked what it would have answered. Both states, the memory and the delta have a fixed size, so a
conversation may have any length; a transformer is given a window for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TextIO

import torch

from prosg_lib.backbones import generation
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.generation import Decoding
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.precision import in_fastest_precision
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.several_prompts import append_prompt, delta_of_prompts
from prosg_lib.generators.token_wise import Memory, TokenGenerator
from prosg_lib.text.chat_template import Exchange, Lines, format_of
from prosg_lib.training.checkpoints import load_generator, own_generator

_ANSWER_TOKENS = 200

WINDOW = 256
"""Tokens that a transformer sees in a chat."""

_NO_GENERATOR = (
    "this model has no generator to turn a text into a change of its weights; "
    "name one that was trained for it (--generator), or use --model rwkv4-dialogue, which has one"
)


class Chat:
    """One conversation.

    Attributes:
        format: writes it down, turn by turn: the model's `ChatTemplate`, or `Lines`.
        scale: of the delta in the weights; 0 is the plain model.
    """

    def __init__(self, lm: LanguageModel, generator: TokenGenerator | None, temperature: float = 0.0):
        """A blank conversation. Without a generator nothing can be remembered.

        Raises:
            UserError: the temperature is negative.
        """
        self.lm, self.generator, self.scale = lm, generator, 1.0
        self.format = format_of(lm.needed_tokenizer())
        stop = "\n" if isinstance(self.format, Lines) else None
        self._decoding = Decoding(_ANSWER_TOKENS, stop=stop, temperature=temperature)
        self.forget()

    def forget(self) -> None:
        """Start again: blank states, nothing in the weights."""
        self._memory: Memory | None = None
        self._delta: LowRankDelta | None = None
        self._state: RecurrentState | None = None
        self._plain_state: RecurrentState | None = None
        self._last_question: tuple[list[int], RecurrentState | None] | None = None  # and the plain state before it
        self._last: Exchange | None = None

    @property
    def delta(self) -> LowRankDelta | None:
        """The change in the weights now."""
        return None if self._delta is None else self._delta.scaled(self.scale)

    def remember(self, text: str) -> None:
        """Write a text into the weights, in addition to what is there, and read it.

        Raises:
            UserError: the text is empty or longer than the model's window, or there is no generator.
        """
        if self.generator is None:
            raise UserError(f"nothing can be remembered: {_NO_GENERATOR}")
        text = text.strip()
        piece = self._ids(self.format.statement(text, self._last)) if text else None
        self._memory = append_prompt(self.lm, self.generator, text, self._memory)
        self._delta = delta_of_prompts(self.lm, self.generator, self._memory)
        self._read(piece)
        self._last = text, ""

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer, in pieces as they come. Take them all: the conversation continues after the last one.

        Raises:
            UserError: the text is empty or longer than the model's window, or the model's chat template fails.
        """
        text = text.strip()
        if not text:
            raise UserError("there is nothing to answer: the text is empty")
        written, answer = self.format.question(text, self._last), ""
        question = self._ids(written)
        for (piece,) in generation.stream_text(self.lm, [question], self._state, self.delta, self._decoding):
            answer += piece
            yield piece
        self._last_question = question, self._plain_state
        self._read(self._ids(written + self.format.answered(text, answer, self._last), checked=False))
        self._last = text, answer

    def plain(self) -> str:
        """What the model, having read the same conversation without the delta, would have answered last.

        Raises:
            UserError: there was no question yet.
        """
        if self._last_question is None:
            raise UserError("there was no question yet")
        question, state = self._last_question
        (answer,) = generation.generate(self.lm, [question], state, None, self._decoding)
        return answer

    def _ids(self, text: str, checked: bool = True) -> list[int]:
        """Token ids of a piece of the conversation. A template writes a text's first token itself."""
        tokenizer = self.lm.needed_tokenizer()
        starts = tokenizer.starts if self._state is None and isinstance(self.format, Lines) else ()
        ids = [*starts, *tokenizer.encode(text)]
        if checked:
            self.lm.check_fits(torch.tensor([ids]))
        return ids

    def _read(self, ids: list[int]) -> None:
        self._state = self.lm.derive_state([ids], self._state, self.delta)
        self._plain_state = self.lm.derive_state([ids], self._plain_state)


_HELP = {
    "/plain": "the last answer without anything written into the weights",
    "/remember TEXT": "write a text into the weights, in addition to what is there",
    "/scale X": "scale the change in the weights by X; 0 is the plain model",
    "/forget": "start again with a blank state and unchanged weights",
    "/help": "this list",
    "/quit": "end the conversation; so do the end of input and Ctrl-C",
}


def _obey(chat: Chat, command: str, argument: str) -> str:
    """Does what a command says, and returns what to show."""
    match command:
        case "/plain":
            return f"Without the change:{chat.format.space}{chat.plain()}"
        case "/remember":
            chat.remember(argument)
            return "It is in the weights now."
        case "/scale":
            if argument:
                try:
                    scale = float(argument)
                except ValueError:
                    scale = math.nan
                if not abs(scale) < 3e38:  # not a number, or infinite in float32
                    raise UserError(f"/scale takes a number, as in /scale 0.5, not {argument!r}")
                chat.scale = scale
            return f"The change in the weights is scaled by {chat.scale:g}."
        case "/forget":
            chat.forget()
            return "Everything is forgotten; the weights are the model's own."
        case "/help":
            return "\n".join(f"{usage:<16} {what}" for usage, what in _HELP.items())
    raise UserError(f"there is no command {command}; /help lists the commands")


def converse(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Read lines and write answers until /quit, the end of input or Ctrl-C."""
    echo = not source.isatty()  # so that a transcript of piped input shows the questions
    try:
        while True:
            out.write("User: ")
            out.flush()
            line = source.readline().removeprefix("\ufeff")  # some editors begin a file with it
            if echo or not line:
                out.write(line.removesuffix("\n") + "\n")
            command, _, argument = line.strip().partition(" ")
            if not line or command == "/quit":
                break
            try:
                if command.startswith("/"):
                    out.write(_obey(chat, command, argument.strip()) + "\n")
                elif command:
                    out.write(f"Bot:{chat.format.space}")
                    for piece in chat.answer(line):
                        out.write(piece)
                        out.flush()
                    out.write("\n")
            except UserError as error:
                out.write(f"({error})\n")
    except KeyboardInterrupt:
        out.write("\n")
    out.write("Goodbye.\n")


def run(
    model: str,
    generator: str | None,
    remember: Sequence[str],
    temperature: float,
    source: TextIO,
    out: TextIO,
    window: int = WINDOW,
) -> None:
    """The whole command: load, remember, converse.

    Args:
        model: as `load_model` takes it.
        generator: as `load_generator` takes it; None for the one shipped with the model, if there is one.
        remember: texts to write into the weights first.
        window: tokens that a transformer sees; 0: all, in a memory that grows.
    Raises:
        UserError: there is no such model or generator; the generator is for another model, or is not token-wise; a text
            to remember is empty, longer than the window, or cannot be remembered; the transformer cannot have it.
    """
    lm = load_model(model)
    if isinstance(lm, CausalTransformer):
        lm = lm.with_window(window) if window else lm.with_kv_cache()
    lm = in_fastest_precision(lm)
    lm.needed_tokenizer()
    name = generator or own_generator(model)
    loaded = None if name is None else load_generator(name, lm)
    if loaded is not None and not isinstance(loaded, TokenGenerator):
        raise UserError(
            f"{name} is a {type(loaded).__name__}, which cannot continue from what it has read; "
            "a chat needs a token-wise generator"
        )
    chat = Chat(lm, loaded, temperature)
    for text in remember:
        chat.remember(text)
    out.write(f"{model}, {'plain' if loaded is None else f'with {name}'}. /help lists the commands.\n")
    if loaded is None:
        out.write(f"It can talk but not remember: {_NO_GENERATOR}.\n")
    if lm.window is not None:
        out.write(f"It sees its first {lm.sinks} tokens and the latest {lm.window - lm.sinks}; the rest is gone.\n")
    converse(chat, source, out)
