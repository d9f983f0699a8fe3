"""Errors that are meant for the user."""


class UserError(Exception):
    """Something that the user can correct; the message names the thing and the remedy.

    The `prosg` command prints it without a traceback and exits with code 2; in a notebook it is the last line.
    """


class NotFinite(UserError):
    """A number that others depend on became NaN or infinite."""


class Diverged(UserError):
    """The loss of a training run became NaN or infinite; with several processes each of them raises it."""
