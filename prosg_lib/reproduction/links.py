"""The repository's address, and everything that has to agree with it: set-up cells, badges and links."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from prosg_lib import files, paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import notebook_files

SET_UP = """\
# @title Set-up on Google Colab; elsewhere this cell does nothing {{ display-mode: "form" }}
drive = False  # @param {{type: "boolean"}}
import sys

if "google.colab" in sys.modules:
    %cd -q /content
    !test -d {name} || git clone -q --depth 1 {address}
    sys.path.insert(0, "/content/{name}")
    from prosg_lib import colab

    colab.setup(drive=drive)"""
"""The first code cell of every notebook."""

_PAGES = ("*.md", "*.cff", "docs/*.md", "data/*.md", "data/checkpoints/*.md")
_URL = re.compile(r"https://[^\s\"'`<>)\]}]+")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def address() -> str:
    """The repository's, from pyproject.toml.

    Raises:
        UserError: it is not there, or not of the form https://github.com/OWNER/NAME.
    """
    path = paths.repo_root() / "pyproject.toml"
    found = tomllib.loads(files.read_text(path))["project"].get("urls", {}).get("Repository", "")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", found):
        raise UserError(f"{path}: project.urls.Repository should be https://github.com/OWNER/NAME, not {found!r}")
    return found


def badge(notebook: Path) -> str:
    """Where a notebook's badge leads to."""
    return f"https://colab.research.google.com/github/{_slug()}/blob/main/notebooks/{notebook.name}"


def set_up_cell() -> str:
    """`SET_UP` for this repository."""
    return SET_UP.format(address=address(), name=address().rpartition("/")[2])


def check_links() -> list[str]:
    """What disagrees with the address, or leads to a file that is not there: one sentence each.

    Looks at every notebook's badge and first code cell, and at the links in Markdown cells, in the pages of the
    repository, its documentation and its data, and in CITATION.cff. Other sites are not asked.
    """
    try:
        own = address()
    except UserError as error:
        return [str(error)]
    found = []
    for path in notebook_files.course():
        first = next((cell["source"] for cell in notebook_files.cells(path) if cell["cell_type"] == "code"), "")
        if first != set_up_cell():
            found.append(f"{path.name}: its first code cell is not the set-up cell (`links.set_up_cell()`)")
        if not any(f"({badge(path)})" in text for _, text in notebook_files.texts(path)):
            found.append(f"{path.name}: no badge leads to {badge(path)}")
    root = paths.repo_root()
    for path in [*notebook_files.course(), *sorted(page for pattern in _PAGES for page in root.glob(pattern))]:
        for place, text in notebook_files.texts(path):
            found += [f"{place}: {problem}" for problem in _problems(text, path.parent, own)]
    return found


def _problems(text: str, folder: Path, own: str) -> Iterator[str]:
    root, slug = paths.repo_root(), _slug()
    owner, _, name = slug.partition("/")
    places = (own, f"https://colab.research.google.com/github/{slug}", f"https://{owner}.github.io/{name}")
    for url in dict.fromkeys(match.rstrip(".,;:") for match in _URL.findall(text)):
        place = next((place for place in places if re.match(rf"{re.escape(place)}(\.git)?(/|$)", url)), None)
        inside = re.match(r"/(?:blob|tree|raw)/main/([^#?]+)", url.removeprefix(place or ""))
        if place is None and (owner in url or name in url or "google.com/github/" in url):
            yield f"{url} does not belong to {own}"
        if place and inside and not (root / inside[1]).exists():
            yield f"{url} leads to a file that is not there"
    for link in (markdown or html for markdown, html in _LINK.findall(notebook_files.FENCE.sub("", text))):
        target = link.partition("#")[0]
        if target and ":" not in target and not (folder / target).exists():
            yield f"the link {link} leads to a file that is not there"


def _slug() -> str:
    return address().removeprefix("https://github.com/")
