"""A conversation in a terminal with a model that keeps what it was asked to remember: `prosg chat`.

The format is that of the dialogues ("User: …", "Bot: …"). Two states read the same conversation, one with the
remembered text in the weights and one without, so that the plain model can be asked what it would have said. Both
states, the memory and the change have a fixed size, so a conversation may be of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from prosg_lib.backbones import generation
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.generation import Decoding
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.several_prompts import append_prompt, delta_of_prompts
from prosg_lib.generators.token_wise import Memory, TokenGenerator
from prosg_lib.training.stages import load_generator, own_generator

_ANSWER_TOKENS = 200


class Chat:
    """One conversation.

    Attributes:
        scale: of the change in the weights; 0 is the plain model.
    """

    def __init__(
        self, lm: LanguageModel, generator: TokenGenerator | None, temperature: float = 0.0, refresh: int | None = None
    ):
        """A blank conversation; no generator: a plain one.

        Args:
            refresh: refresh the memory (`refresh`) after so many tokens of conversation; None: only when told to.
        Raises:
            UserError: a negative temperature, or less than one token between two refreshes.
        """
        if refresh is not None and refresh < 1:
            raise UserError(f"refresh is {refresh}; the memory is refreshed after at least 1 token")
        self.lm, self.generator, self.scale = lm, generator, 1.0
        self._how = Decoding(_ANSWER_TOKENS, stop="\n", temperature=temperature)
        self._every = refresh
        self.forget()

    def forget(self) -> None:
        """Begin anew: blank states, nothing in the weights."""
        self._memory: Memory | None = None  # what is in the weights
        self._heard: Memory | None = None  # and what the user said since
        self._change: LowRankDelta | None = None
        self._state: RecurrentState | None = None
        self._plain: RecurrentState | None = None
        self._asked: tuple[str, RecurrentState | None] | None = None  # last question, plain state before it
        self._read = 0  # tokens of conversation
        self._fresh = 0  # where the memory was refreshed last
        self._remembered: tuple[int, int] | None = None  # where the first and the last remembered text end

    @property
    def delta(self) -> LowRankDelta | None:
        """What is in the weights now."""
        return None if self._change is None else self._change.scaled(self.scale)

    def remember(self, text: str) -> None:
        """Write a text into the weights, beside what is there, and read it.

        Raises:
            UserError: the text is empty, or there is no generator.
        """
        if self.generator is None:
            raise UserError(f"nothing can be remembered: {_NO_GENERATOR}")
        self._memory = append_prompt(self.lm, self.generator, text, self._memory)
        self._heard = append_prompt(self.lm, self.generator, text, self._heard)
        self._change = delta_of_prompts(self.lm, self.generator, self._memory)
        self._go_on(f"User: {text.strip()}\n")
        self._remembered = (self._remembered or (self._read,))[0], self._read

    def refresh(self) -> None:
        """Derive the change again, of what was remembered and all that the user said since.

        Raises:
            UserError: there is no generator, or nothing was said yet.
        """
        if self.generator is None:
            raise UserError(f"there is no memory to refresh: {_NO_GENERATOR}")
        if self._heard is None:
            raise UserError("there is nothing to refresh the memory with; say something first")
        self._memory, self._fresh = self._heard, self._read
        self._change = delta_of_prompts(self.lm, self.generator, self._memory)

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer, in pieces as they come; the conversation goes on behind it when all of them were taken.

        Raises:
            UserError: the text is empty.
        """
        text = text.strip()
        if not text:
            raise UserError("there is nothing to answer: the text is empty")
        question, said = f"User: {text}\nBot:", ""
        for (piece,) in generation.stream_text(self.lm, [question], self._state, self.delta, self._how):
            said += piece
            yield piece
        self._asked = question, self._plain
        self._go_on(f"{question}{said}\n")
        if self.generator is not None:
            self._heard = append_prompt(self.lm, self.generator, text, self._heard)
            if self._every is not None and self._read - self._fresh >= self._every:
                self.refresh()

    def plain(self) -> str:
        """What the model without the change, which read the same conversation, would have answered last.

        Raises:
            UserError: nothing was asked yet.
        """
        if self._asked is None:
            raise UserError("nothing was asked yet")
        question, state = self._asked
        (said,) = generation.generate(self.lm, [question], state, None, self._how)
        return said

    def far(self) -> tuple[int, int] | None:
        """How many tokens ago the first and the last remembered text ended; None: there is none."""
        return self._remembered and tuple(self._read - end for end in self._remembered)

    def _go_on(self, text: str) -> None:
        self._state = self.lm.derive_state([text], self._state, self.delta)
        self._plain = self.lm.derive_state([text], self._plain)
        self._read += len(self.lm.needed_tokenizer().encode_long(text))


_NO_GENERATOR = (
    "this model came without a generator, which is what turns a text into a change of the weights; "
    "name one that was trained for it (--generator), or take --model rwkv4-dialogue, which has one"
)


def _far(chat: Chat, argument: str) -> str:
    far = chat.far()
    if far is None:
        return "Nothing was remembered yet."
    first = f"The prompt ended {far[0]} tokens ago"
    return f"{first}." if far[0] == far[1] else f"{first}, what was remembered last {far[1]}."


def _scale(chat: Chat, argument: str) -> str:
    if argument:
        try:
            scale = float(argument)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise UserError(f"/scale takes a number, as in /scale 0.5, not {argument!r}")
        chat.scale = scale
    return f"The change in the weights counts {chat.scale:g} times."


def _plain(chat: Chat, argument: str) -> str:
    return f"Without the change:{chat.plain()}"


def _remember(chat: Chat, argument: str) -> str:
    chat.remember(argument)
    return "It is in the weights now."


def _refresh(chat: Chat, argument: str) -> str:
    chat.refresh()
    return "What you said since is in the weights, too."


def _forget(chat: Chat, argument: str) -> str:
    chat.forget()
    return "All is forgotten; the weights are the model's own."


def _help(chat: Chat, argument: str) -> str:
    return "\n".join(f"{name:<16} {what}" for name, what in _HELP.items())


_HELP = {
    "/plain": "what the model would have said last, with nothing written into its weights",
    "/far": "how many tokens ago the prompt ended",
    "/remember TEXT": "write a text into the weights, beside what is there",
    "/refresh": "write in what you said since, too",
    "/scale X": "let the change count X times; 0 is the plain model",
    "/forget": "begin anew",
    "/help": "this list",
    "/quit": "end; so do the end of input and Ctrl-C",
}
_COMMANDS: dict[str, Callable[[Chat, str], str]] = {
    "/plain": _plain,
    "/far": _far,
    "/remember": _remember,
    "/refresh": _refresh,
    "/scale": _scale,
    "/forget": _forget,
    "/help": _help,
}


def converse(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Read lines and write answers until /quit, the end of input or Ctrl-C."""
    echo = not source.isatty()  # a transcript of piped input has the questions, too
    try:
        while True:
            out.write("User: ")
            out.flush()
            line = source.readline()
            if echo or not line:
                out.write(line.removesuffix("\n") + "\n")
            command, _, argument = line.strip().partition(" ")
            if not line or command == "/quit":
                break
            try:
                if command in _COMMANDS:
                    out.write(_COMMANDS[command](chat, argument.strip()) + "\n")
                elif command.startswith("/"):
                    raise UserError(f"there is no {command}; /help lists what there is")
                elif command:
                    _write_answer(chat, line, out)
            except UserError as error:
                out.write(f"({error})\n")
    except KeyboardInterrupt:
        out.write("\n")
    out.write("Goodbye.\n")


def _write_answer(chat: Chat, line: str, out: TextIO) -> None:
    out.write("Bot:")
    for piece in chat.answer(line):
        out.write(piece)
        out.flush()
    out.write("\n")


def run(
    model: str,
    generator: str | None,
    remember: Sequence[str],
    temperature: float,
    refresh: int | None,
    source: TextIO,
    out: TextIO,
) -> None:
    """The whole command: load, remember, converse.

    Args:
        model: as `load_model` takes it. generator: as `load_generator` does; None: the shipped one of that model, or
            none, and the chat is a plain one.
    Raises:
        UserError: no such model or generator, a generator for another model, or one that cannot go on from what it
            has read; a text to remember that is empty, or cannot be remembered.
    """
    lm = load_model(model)
    lm.needed_tokenizer()
    generator = generator or own_generator(model)
    writer = None if generator is None else load_generator(generator, lm)
    if writer is not None and not isinstance(writer, TokenGenerator):
        raise UserError(
            f"{generator} is a {type(writer).__name__}, which reads a prompt from the beginning every time; "
            "a chat needs a token-wise generator"
        )
    chat = Chat(lm, writer, temperature, refresh)
    for text in remember:
        chat.remember(text)
    out.write(f"{model}, {'plain' if writer is None else f'with {generator}'}. /help lists the commands.\n")
    if writer is None:
        out.write(f"It talks, and forgets: {_NO_GENERATOR}.\n")
    converse(chat, source, out)
