"""Figures with a sidecar that says where their numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from prosg_lib import files, paths, provenance
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims

if TYPE_CHECKING:
    pass
from prosg_lib.plots import png


def save_figure(fig: Figure, name: str, alt: str, claims: Sequence[str] = ()) -> Path:
    """Writes runs/<profile>/figures/<name>.png and beside it <name>.json, which says where the figure came from.

    Args:
        name: a file name without folder and suffix.
        alt: what the figure shows, in words, for those who do not see it.
        claims: names of the claims that the figure shows.
    Returns:
        The image's path.
    Raises:
        UserError: `alt` is empty, `name` is no plain file name, or no claims were begun (`claims.begin` says which
            notebook, profile and seed this is).
    """
    context = _context()
    if not name or Path(name).name != name or Path(name).suffix in (".png", ".json"):
        raise UserError(f"{name!r} cannot name a figure: give a plain file name without folder and suffix.")
    if not alt.strip():
        raise UserError(f"Figure {name!r} has no alt text; say in words what it shows.")
    folder = paths.runs_dir(context.profile) / "figures"
    files.write_bytes(folder / f"{name}.png", png(fig))
    files.write_json(
        folder / f"{name}.json",
        {
            "notebook": context.notebook,
            "profile": context.profile,
            "seed": context.seed,
            **provenance.facts(),
            "claims": list(claims),
            "alt": alt,
        },
    )
    return folder / f"{name}.png"


def _context() -> claims.Context:
    return claims.current()  # a function, because `save_figure` has an argument named claims
