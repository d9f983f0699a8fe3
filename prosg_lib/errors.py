"""The one error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: one sentence that names the thing, and one that names the remedy.

    The `prosg` command prints it without a traceback and ends with exit code 2; in a notebook it is the last line.
    """


class NotFinite(UserError):
    """A number that others are computed from became NaN or infinite."""


class Diverged(UserError):
    """A training's loss became NaN or infinite; of several processes every one raises it."""
