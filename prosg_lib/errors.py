"""Errors that are meant for the user."""

import re

_ADVICE = re.compile(r"trust|weights_only|torch\.load|ignore_mismatched", re.IGNORECASE)
_CONTROL = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # codes for a terminal, halves of characters


class UserError(Exception):
    """Something that the user can correct; the message names the thing and the remedy.

    The `prosg` command prints it without a traceback and exits with code 2; in a notebook it is the last line.
    """

    def __init__(self, message: str):
        # It may quote anything: a file, a name on the command line, another library.
        message = _CONTROL.sub(" ", message)
        super().__init__(message if len(message) <= 2000 else f"{message[:1400]} ... {message[-595:]}")


def reason(error: Exception) -> str:
    """Another library's error in a line, to quote it: its type and the beginning of its message.

    A sentence that advises switching a safety check off is left out.
    """
    line = str(error).strip().partition("\n")[0][:1000]
    said = " ".join(sentence for sentence in re.split(r"(?<=[.!?]) +", line) if not _ADVICE.search(sentence))
    return f"{type(error).__name__}: {said[:300]}".strip(": ")


class NotFinite(UserError):
    """A number that others depend on became NaN or infinite."""


class Diverged(UserError):
    """The loss of a training run became NaN or infinite; with several processes each of them raises it."""
