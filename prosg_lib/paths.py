"""The project's folders. Each is computed when it is needed; nothing is read at import."""

import os
from pathlib import Path

from prosg_lib.errors import UserError


def repo_root() -> Path:
    """The checkout: the folder that holds `prosg_lib/` and `pyproject.toml`.

    Raises:
        UserError: the package was installed without its checkout, so notebooks, data and ledger are missing.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise UserError(
            f"prosg_lib is installed in {root} without its notebooks and data; "
            "clone the repository and install it with `pip install -e .` from there."
        )
    return root


def data_dir() -> Path:
    """What the repository ships: word lists, tokenizer, samples, checkpoints."""
    return repo_root() / "data"


def expected_dir() -> Path:
    """The claims ledger, one JSON file per notebook and profile."""
    return repo_root() / "expected"


def figures_dir() -> Path:
    """The figures of the reference run, with their sidecars."""
    return repo_root() / "figures"


def notebooks_dir() -> Path:
    """The course."""
    return repo_root() / "notebooks"


EXTRA_DATA = ("books", "wikitext-2", "xquad")
"""What the folder that $PROSG_TEST_DATA names may hold."""


def extra_data(name: str) -> Path | None:
    """One of EXTRA_DATA in the folder that $PROSG_TEST_DATA names; None if it is not there, or the variable not set.

    Raises:
        UserError: there is no such folder, or it holds none of them; that is a mistake, not a request for other data.
    """
    base = os.environ.get("PROSG_TEST_DATA")
    if not base:
        return None
    folders = [expanded(base) / known for known in EXTRA_DATA]
    there = {folder.name: folder for folder in folders if os.path.isdir(folder)}  # which never raises
    if not there:
        raise UserError(
            f"PROSG_TEST_DATA is {base}, which is not a folder with one of {'/, '.join(EXTRA_DATA)}/ in it; "
            "name one, or unset the variable"
        )
    return there.get(name)


def expanded(path: str | Path) -> Path:
    """The path with the home directory in place of `~`.

    Raises:
        UserError: it is not known, because HOME is not set or there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"the home directory in {path} is not known; write the whole path instead of ~") from None


def runs_dir(profile: str) -> Path:
    """The output of runs with `profile`: `$PROSG_RUNS/<profile>`, or `<checkout>/runs/<profile>` by default."""
    base = os.environ.get("PROSG_RUNS")
    return (expanded(base) if base else repo_root() / "runs") / profile
