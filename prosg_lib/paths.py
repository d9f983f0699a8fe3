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


def runs_dir(profile: str) -> Path:
    """The output of runs with `profile`: `$PROSG_RUNS/<profile>`, or `<checkout>/runs/<profile>` by default."""
    base = os.environ.get("PROSG_RUNS")
    return (Path(base).expanduser() if base else repo_root() / "runs") / profile
