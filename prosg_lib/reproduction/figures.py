"""Figures with a sidecar that says where their numbers come from."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prosg_lib import files, paths, plots, provenance
from prosg_lib.errors import UserError
from prosg_lib.reproduction.claims import current


def save_figure(fig: Figure, name: str, alt: str, claims: Sequence[str] = ()) -> Path:
    """Writes runs/<profile>/figures/<name>.png and beside it <name>.json, which says where the figure came from.

    Where the notebook shows the figure afterwards, it is this image with this alt text (`plots.describe`).

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
    context = current()
    if not name or Path(name).name != name or Path(name).suffix in (".png", ".json"):
        raise UserError(f"{name!r} cannot name a figure: give a plain file name without folder and suffix.")
    if not alt.strip():
        raise UserError(f"Figure {name!r} has no alt text; say in words what it shows.")
    path = paths.runs_dir(context.profile) / "figures" / f"{name}.png"
    origin = {"notebook": context.notebook, "profile": context.profile, "seed": context.seed, **provenance.facts()}
    files.write_bytes(path, plots.describe(fig, alt).content)
    files.write_json(path.with_suffix(".json"), {**origin, "claims": list(claims), "alt": alt})
    return path
