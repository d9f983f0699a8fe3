"""The executed course as a site: `prosg site OUT`. This module is also the extension that Sphinx loads.

Formulas are MathML, which browsers draw themselves. MathJax would have to be fetched, or shipped with its megabyte of
scripts and fonts, and pictures of formulas need LaTeX; MathML needs neither, prints well, and is read aloud.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from prosg_lib import files, paths
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.pages import executed
from prosg_lib.reproduction import ledger, links, promises, report

_CSS = """
.content { width: 54em; }
article pre { font-size: .78rem; }
article table.docutils { font-size: .85rem; }
.cell_output img { background: #fff; }
.cell_output table.dataframe { border: none; border-collapse: collapse; color: inherit; font-size: .85rem; }
.cell_output table.dataframe :is(th, td) { color: inherit; border: 1px solid var(--color-background-border); }
.cell_output table.dataframe tr { background: none !important; }
.cell_output { overflow-x: auto; }
.cell_output .output.stream pre { white-space: pre-wrap; }
math[display=block] { margin: 1em 0; overflow-x: auto; overflow-y: hidden; max-width: 100%; }
mtd[columnalign=left] { text-align: left; }
details > summary { cursor: pointer; font-weight: 600; }
body[data-theme=dark] .prosg { --ink: #eee !important; --paper: #1b1b1b !important; --line: #9a9a9a !important; }
body[data-theme=light] .prosg { --ink: #1a1a1a !important; --paper: #fff !important; --line: #767676 !important; }
"""

_CONFIG = {
    "project": "ProSG notebooks",
    "html_title": "ProSG notebooks",
    "extensions": ["myst_nb", "prosg_lib.pages.site"],
    "html_theme": "furo",
    "html_static_path": ["_own"],
    "html_css_files": ["site.css"],
    "html_math_renderer": "mathml",
    "html_show_search_summary": False,  # it fetches pages, which a browser refuses for files
    "html_show_sourcelink": False,
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_copyright": False,
    "pygments_style": "a11y-high-contrast-light",  # and its dark sister: `setup`
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath"],
    "myst_dmath_allow_space": False,  # as in Jupyter; otherwise the text between two formulas may become one
    "myst_heading_anchors": 4,
    "myst_update_mathjax": False,
}


def write(profile: Profile, folder: str | Path, overwrite: bool = False) -> list[str]:
    """Builds the site of what runs/<profile> holds, without a network.

    Args:
        folder: made if need be; index.html in it is the first page.
        overwrite: build over a site that is there.
    Returns:
        Sphinx's warnings, such as links that lead nowhere.
    Raises:
        UserError: nothing was run, Sphinx is not installed, or the folder holds something and may not be overwritten.
    """
    try:
        import latex2mathml  # noqa: F401
        from sphinx.application import Sphinx
        from sphinx.util.docutils import docutils_namespace
    except ImportError as error:
        raise UserError(executed.NEEDS) from error
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty; give another folder, or --overwrite.")
    files.check_writable(folder, "OUT")
    built, run_dir = report.build(profile), paths.runs_dir(profile.name)
    with tempfile.TemporaryDirectory() as made, open(Path(made) / "warnings", "w+", encoding="utf-8") as warnings:
        source = Path(made) / "source"
        _write_source(source, built, run_dir)
        with docutils_namespace():
            app = Sphinx(
                source, None, folder, Path(made) / "trees", "html", dict(_CONFIG), status=None, warning=warnings
            )
            app.build()
        warnings.seek(0)
        plain = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in warnings)
        return [line.replace(f"{source}/", "").strip() for line in plain if line.strip()]


def _write_source(source: Path, built: dict[str, Any], run_dir: Path) -> None:
    """What Sphinx reads: the checkout's folders again, with the executed notebooks, and two pages on the run."""
    root, address = paths.repo_root(), links.address()
    alts = executed.alt_texts(built["figures"])
    course = executed.notebooks(run_dir)
    pages = sorted(path for path in (root / "docs").glob("*.md"))
    names = [f"notebooks/{path.name}" for path in course] + [f"docs/{path.name}" for path in pages]
    shutil.copytree(paths.figures_dir(), source / "figures")
    entries = []
    for path in course:
        notebook = executed.read(path, alts)
        title = re.sub(r"^# (\d\d\w? · )?", "", notebook["cells"][0]["source"].partition("\n")[0])
        entries.append(f"{path.stem.partition('_')[0]} {title} <notebooks/{path.stem}>")
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = executed.linked(cell["source"], "notebooks", names, address)
            for output in cell.get("outputs", []):
                if shown := executed.picture(output, lambda content: _kept(content, source / "_own")):
                    output["data"] = {"text/html": shown}
        files.write_text(source / "notebooks" / path.name, json.dumps(notebook))
    for path in pages:
        text = executed.linked(executed.local(files.read_text(path)), "docs", names, address)
        files.write_text(source / "docs" / path.name, text)
    front = executed.local(files.read_text(root / "README.md").partition("\n## ")[0])
    front = executed.linked(front, "", names, address)
    more = [*(f"docs/{path.stem}" for path in pages), "run"]
    files.write_text(source / "index.md", _index(front, entries, more, built, address))
    files.write_text(source / "run.md", _run_page(built))
    files.write_text(source / "_own" / "site.css", _CSS)


def _kept(content: bytes, folder: Path) -> str:
    """Keeps a notebook's picture among the site's own files; the address for a page about a notebook."""
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    files.write_bytes(folder / name, content)
    return f"../_static/{name}"


def _index(front: str, course: list[str], more: list[str], built: dict[str, Any], address: str) -> str:
    def listed(caption: str, entries: list[str]) -> str:
        return "\n".join(["```{toctree}", f":caption: {caption}", ":maxdepth: 1", "", *entries, "```", ""])

    return (
        f"{front}\n\n**[{executed.verdict(built)}](run.md)** These pages show that run. To run it yourself, or to "
        f"change it, start from the [repository]({address}).\n\n{listed('The course', course)}\n{listed('More', more)}"
    )


def _run_page(built: dict[str, Any]) -> str:
    """Promises, measurements by notebook, and what it was measured with."""
    parts = ["# What holds in this run", report.verdict(built), "## Promises"]
    parts += [promises.table(built["promises"]).to_markdown(index=False), "## Measurements"]
    for notebook in dict.fromkeys(row["notebook"] for row in built["claims"]):
        rows = [row for row in built["claims"] if row["notebook"] == notebook]
        table = ledger.table(rows).to_markdown(index=False, disable_numparse=True)
        parts.append(f"<details><summary>{notebook}: {len(rows)}</summary>\n\n{table}\n\n</details>")
    facts = {key: built[key] for key in ("profile", "seed", "commit", "device", "prose")} | built["versions"]
    parts += ["## Provenance", "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in facts.items())]
    return "\n\n".join(parts) + "\n"


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's extension: formulas as MathML, and code that stands out from a dark ground, too."""
    from docutils import nodes
    from sphinx.util import logging

    def render(translator: Any, node: nodes.Element) -> None:
        block = isinstance(node, nodes.math_block)
        try:
            translator.body.append(executed.mathml(node.astext(), block))
        except UserError as error:
            logging.getLogger(__name__).warning(str(error), location=node)
            translator.body.append(f"<code>{translator.encode(node.astext())}</code>")
        raise nodes.SkipNode

    def dark(app: Any) -> None:
        app.config.pygments_dark_style = "a11y-high-contrast-dark"  # a setting of the theme's, unknown until now

    app.connect("builder-inited", dark, priority=100)
    app.add_html_math_renderer("mathml", (render, None), (render, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
