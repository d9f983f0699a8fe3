"""A run's executed notebooks, cleaned for pages that open without a kernel and without a network."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prosg_lib import files, paths
from prosg_lib.errors import UserError, reason
from prosg_lib.reproduction import notebook_files

NEEDS = "This needs Sphinx, myst-nb, furo and latex2mathml; `pip install -e '.[site]'` in the checkout brings them."

FOLDED = "hide-input"
"""myst-nb's tag of a cell whose code is folded."""

_NO_WORDS = "A figure; the text beside it says what it shows."
_REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
_KEPT_TYPES = ("text/html", "image/png", "image/svg+xml", "text/markdown", "text/latex", "text/plain")


def notebooks(run_dir: Path) -> list[Path]:
    """A run's executed notebooks, in the course's order.

    Raises:
        UserError: there are none.
    """
    copies = [run_dir / "notebooks" / path.name for path in notebook_files.course()]
    found = [path for path in copies if path.is_file()]
    if not found:
        raise UserError(f"{run_dir} holds no executed notebook; run `prosg reproduce --profile {run_dir.name}` first.")
    return found


def verdict(built: dict[str, Any]) -> str:
    """What holds in a run, and where and when it ran, in a sentence."""
    kept = sum(row["kept"] for row in built["promises"])
    return (
        f"{kept} of {len(built['promises'])} promises hold, run on {built['device']} "
        f"(profile {built['profile']}, commit {built['commit']})."
    )


def alt_texts(figures: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name of a run's figure -> what it shows, in words; of `report.figures`."""
    return {figure["name"]: figure["alt"] for figure in figures}


def alt_of(source: str, alts: Mapping[str, str]) -> str:
    """What the figure of a cell shows: found by the name that the cell saves it under."""
    return next((alt for name, alt in alts.items() if f'"{name}"' in source), _NO_WORDS)


def local(text: str) -> str:
    """Markdown without pictures from elsewhere: a badge becomes a plain link."""
    return _REMOTE_IMAGE.sub(r"\1", text)


def read(path: Path, alts: Mapping[str, str]) -> dict[str, Any]:
    """An executed notebook for a page.

    Set-up and injected cells are left out, code that is collapsed in Jupyter is folded, figures get their alt texts,
    and of outputs only what needs no kernel is kept: a live widget has no place here, its kernel-free form has.
    """
    notebook = files.read_json(path)
    kept = []
    for cell in notebook["cells"]:
        source, tags = "".join(cell["source"]), list(notebook_files.tags(cell))
        if "injected-parameters" in tags or "set-up" in tags or not source.strip():
            continue
        if cell["cell_type"] == "markdown":
            source = local(source)
        else:
            words = alt_of(source, alts)
            outputs = [output for found in cell["outputs"] if (output := _without_kernel(found, words))]
            cell = {**cell, "outputs": outputs}
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            tags.append(FOLDED)
        kept.append({**cell, "source": source, "metadata": {"tags": tags}})
    metadata = {key: value for key, value in notebook["metadata"].items() if key in ("kernelspec", "language_info")}
    return {**notebook, "cells": kept, "metadata": metadata}


def _without_kernel(output: Mapping[str, Any], alt: str) -> dict[str, Any] | None:
    """The output as far as a page can show it; None: nothing of it, as of a live widget or a progress bar.

    Args:
        alt: of its picture, if it has one that brings no words of its own.
    """
    if output["output_type"] == "stream":
        return dict(output) if output["name"] == "stdout" else None
    if "data" not in output:
        return dict(output)  # an error
    live = any("widget-view" in kind for kind in output["data"])
    data = {kind: output["data"][kind] for kind in _KEPT_TYPES if kind in output["data"]}
    if live and list(data) == ["text/plain"]:
        return None
    if "text/markdown" in data:
        data["text/markdown"] = re.sub(r"^#+ +(.+)$", r"**\1**", "".join(data["text/markdown"]), flags=re.MULTILINE)
    picture = {"alt": alt, **output.get("metadata", {}).get("image/png", {})}
    return {**output, "data": data, "metadata": {"image/png": picture}}


def picture(output: Mapping[str, Any], source_of: Callable[[bytes], str]) -> str:
    """An output's picture as HTML, with its words; "" where it has none.

    Args:
        source_of: the PNG's content -> the address it is shown from.
    """
    if "image/png" not in output.get("data", {}):
        return ""
    content, facts = base64.b64decode("".join(output["data"]["image/png"])), output["metadata"]["image/png"]
    width = f' width="{facts["width"]}"' if "width" in facts else ""
    return f'<img src="{source_of(content)}" alt="{html.escape(facts["alt"])}"{width}>'


def mathml(formula: str, block: bool) -> str:
    r"""A formula in TeX as MathML, which browsers draw themselves: no script, no font, no network.

    Raises:
        UserError: it cannot be read, or uses a command that the converter does not know.
    """
    from latex2mathml.converter import convert

    try:
        found = convert(formula.strip(), display="block" if block else "inline")
    except Exception as error:  # it has a dozen of its own, and IndexErrors
        raise UserError(f"the formula {formula!r} cannot be set: {reason(error)}") from error
    if unknown := re.search(r"\\[A-Za-z]+", found):
        raise UserError(f"the formula {formula!r} cannot be set: {unknown[0]} is not known")
    return found.replace(
        "<mi>&#x02032;</mi>", '<mi mathsize="150%">&#x02032;</mi>'
    )  # a prime is small and high as it is


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`change` applied to all of a Markdown text but fenced code."""
    parts: Sequence[str] = re.split(r"(^```.*?^```[^\n]*$|^~~~.*?^~~~[^\n]*$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def linked(text: str, folder: str, on_site: Iterable[str], address: str) -> str:
    """Markdown whose links to files of the checkout that the site does not have lead to the repository.

    Args:
        folder: where the text lies, from the root of the checkout; "" for the root itself.
        on_site: the files that the site has, from the root.
    """
    root, there = paths.repo_root(), set(on_site)

    def moved(match: re.Match[str]) -> str:
        target, hash_, place = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        full = (root / folder / target).resolve()
        if not full.is_relative_to(root.resolve()):
            return match[0]
        name = full.relative_to(root.resolve()).as_posix()
        if name in there or name.startswith("figures/"):
            return f"{match[1]}{target}{hash_}{place.lower()})"  # Jupyter keeps a heading's capitals, the site does not
        kind = "tree" if full.is_dir() else "blob"
        return f"{match[1]}{address}/{kind}/main/{name}{hash_}{place})"

    return outside_code(text, lambda part: re.sub(r"(\]\()([^()\s]+)\)", moved, part))
