"""A lecture as one HTML file, made of the cells tagged `slide` in the executed notebooks: `prosg course deck OUT`.

A slide begins at a heading. It shows the first sentence and what there is to look at: pictures and formulas, or, where
there is no picture, lists and tables. What a tagged code cell showed belongs to the slide before it, and so does the
first sentence on what was observed. Each picture and each longer table has a slide of its own, under the same heading,
and a picture takes the room that is left. All prose is in the notes, for whoever speaks.
"""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prosg_lib import files, paths
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.pages import executed
from prosg_lib.reproduction import notebook_files, report

TAG, MINUTES = "slide", 90
FILE = "lecture.html"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #f2f2f2; --link: #0b5cad; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #eee; --paper: #16181a; --soft: #26292c; --link: #8ab8ff; }} }}
body {{ margin: 0; color: var(--ink); background: var(--paper); font: 1.35rem/1.45 system-ui, sans-serif; }}
section {{ box-sizing: border-box; min-height: 100vh; padding: 4vh 5vw 9vh; max-width: 78rem; margin: auto; }}
body.one section:not(.now), body:not(.spoken) aside {{ display: none; }}
@media screen {{ body.one:not(.spoken) section.now {{ display: flex; flex-direction: column; height: 100vh; }}
  body.one:not(.spoken) img {{ min-height: 16rem; object-fit: contain; }} p:has(> img) {{ display: contents; }} }}
h1, h2 {{ font-size: 2.6rem; line-height: 1.15; margin-top: 22vh; }} h3 {{ font-size: 1.8rem; margin: 0 0 .6em; }}
section:has(img, table, pre, ul, ol) h2 {{ margin-top: 0; }}
img {{ display: block; max-width: 100%; max-height: 60vh; margin: .6em auto; background: #fff; }}
section > p {{ margin: .4em 0; }}
math[display=block] {{ margin: .8em 0; overflow-x: auto; overflow-y: hidden; }}
mtd[columnalign=left] {{ text-align: left; }}
pre {{ font-size: 1rem; line-height: 1.4; background: var(--soft); padding: .8em; white-space: pre-wrap; }}
table {{ border-collapse: collapse; font-size: 1.1rem; }} th, td {{ padding: .25em .8em; text-align: left; }}
tr {{ border-bottom: 1px solid currentColor; }} a {{ color: var(--link); }} .lead {{ font-size: 1.5rem; }}
aside {{ font-size: 1.05rem; border-top: 1px solid currentColor; margin-top: 1.5em; background: var(--soft);
  padding: .2em 1em; }}
footer {{ position: fixed; right: 1.2rem; bottom: .6rem; font-size: 1rem; background: var(--paper); }}
@media print {{ section, body.one section:not(.now) {{ display: block; min-height: 0; break-after: page; padding: 0; }}
  .first aside {{ display: block !important; }} .more aside {{ display: none !important; }} footer {{ display: none; }}
  h1, h2 {{ margin-top: 0; }} }}
</style></head><body>
{slides}
<footer><span id="place"></span> · ← → to turn, N for notes</footer>
<script>
const slides = [...document.querySelectorAll("section")];
const place = () => Math.min(slides.length, Math.max(1, Number(location.hash.slice(1)) || 1));
const show = () => {{
  slides.forEach((slide, i) => slide.classList.toggle("now", i + 1 === place()));
  document.getElementById("place").textContent = `${{place()}} / ${{slides.length}}`;
  scrollTo(0, 0);
}};
const steps = {{ ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -1e6, End: 1e6 }};
addEventListener("hashchange", show);
addEventListener("keydown", (event) => {{
  if (event.target.closest("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.toLowerCase() === "n") document.body.classList.toggle("spoken");
  if (!(event.key in steps)) return;
  event.preventDefault();
  location.hash = Math.min(slides.length, Math.max(1, place() + steps[event.key]));
}});
document.body.classList.add("one");
show();
</script></body></html>
"""


@dataclass
class _Slide:
    """HTML, by what it is; `lists` are left to the notes where there are pictures."""

    heading: str
    lead: str = ""
    formulas: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    observed: str = ""
    notes: list[str] = field(default_factory=list)

    def wanted(self) -> bool:
        """Whether there is something to look at, or it opens a notebook."""
        return bool(self.formulas or self.pictures or self.lists) or self.heading.startswith("<h2")

    def html(self, more: str) -> list[str]:
        """The slide, or several under the same heading, each with one thing to look at and what was printed beside."""
        parts: list[list[str]] = [[]]
        for shown in filter(None, ["".join(self.formulas), *(self.pictures or self.lists)]):
            if _is_large(shown) and any(map(_is_large, parts[-1])):
                parts.append([])
            parts[-1].append(shown)
        parts[0][:0] = [self.lead, more]
        parts[-1].append(self.observed)
        said = [*self.notes, *(self.lists if self.pictures else [])]
        notes = f"<aside>{''.join(said)}</aside>" if said else ""
        kind = ["first", *["more"] * (len(parts) - 1)]
        return [
            f'<section class="{kind[place]}">{self.heading}{"".join(part)}{notes}</section>'
            for place, part in enumerate(parts)
        ]


def _is_large(shown: str) -> bool:
    """A picture, a formula, a list, a table, or more than two printed lines."""
    return not (shown.startswith("<pre>") and shown.count("\n") < 2)


def write(profile: Profile, folder: str | Path, overwrite: bool = False) -> Path:
    """Writes the lecture of what runs/<profile> holds; returns its path.

    Raises:
        UserError: nothing was run, no cell is tagged, a package is missing, or the file is there and may not be
            overwritten.
    """
    path = Path(folder) / FILE
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; give another folder, or --overwrite.")
    files.check_writable(folder, "OUT")
    run_dir, built = paths.runs_dir(profile.name), report.build(profile)
    alts = executed.alt_texts(built["figures"])
    parts = [_slides(executed.read(notebook, alts)) for notebook in executed.notebooks(run_dir)]
    count = sum(map(len, parts))
    if not count:
        raise UserError(f"no cell of the notebooks in {run_dir} is tagged '{TAG}'; run them again from this checkout.")
    title = html.escape(files.read_text(paths.repo_root() / "README.md").partition("\n")[0].removeprefix("# "))
    front = f"<p>A lecture of {MINUTES} minutes.</p><p>{html.escape(executed.verdict(built))}</p>"
    slides = [f"<section><h1>{title}</h1>{front}</section>"]
    for part in filter(None, parts):
        minutes = max(1, round(MINUTES * len(part) / count))
        for place, slide in enumerate(part):
            slides += slide.html("" if place else f"<p>About {minutes} minutes.</p>")
    files.write_text(path, _PAGE.format(title=title, slides="\n".join(slides)))
    return path


def _slides(notebook: dict[str, Any]) -> list[_Slide]:
    slides: list[_Slide] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if TAG not in notebook_files.tags(cell):
            continue
        if cell["cell_type"] == "markdown":
            _add_text(slides, source)
        elif slides:
            shown = list(filter(None, (executed.picture(out, _inline) or _html(out) for out in cell["outputs"])))
            if not shown and executed.FOLDED not in notebook_files.tags(cell):
                shown = [f"<pre><code>{html.escape(source)}</code></pre>"]
            slides[-1].pictures += shown
    return [slide for slide in slides if slide.wanted()]


def _inline(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def _html(output: dict[str, Any]) -> str:
    """A table, a slider, or what was printed."""
    if output["output_type"] == "stream":
        return f"<pre>{html.escape(''.join(output['text']).strip())}</pre>"
    return "".join(output.get("data", {}).get("text/html", ""))


def _add_text(slides: list[_Slide], source: str) -> None:
    """Sorts the blocks of a Markdown cell into what is shown and what is said."""
    parser = _parser()
    source = re.sub(r"<!--.*?-->|^\[Open in Colab\]\([^)]*\)$", "", source, flags=re.DOTALL | re.MULTILINE)
    source = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", executed.local(source))
    block: list[Any] = []
    headed = False
    for token in parser.parse(source):
        block.append(token)
        if token.level or token.nesting == 1:
            continue
        kind, text = block[0].type, parser.renderer.render(block, parser.options, {})
        if kind == "heading_open":
            headed, level = True, 2 if block[0].tag == "h1" else 3
            slides.append(_Slide(re.sub(r"h\d>(\d\d\w? · )?", f"h{level}>", text)))
        elif not slides:
            pass
        elif kind == "paragraph_open" and "<img" in text:
            slides[-1].pictures.append(text)
        elif kind == "paragraph_open":
            slide = slides[-1]
            slide.notes.append(text)
            first = f'<p class="lead">{parser.renderInline(_first_sentence(block[1].content))}</p>'
            if headed:
                slide.lead = slide.lead or first
            elif slide.pictures:
                slide.observed = slide.observed or first
        elif kind == "math_block":
            (slides[-1].formulas if headed else slides[-1].notes).append(text)
        elif kind != "html_block":
            opening = slides[-1].heading.startswith("<h2")  # there it is what the notebook costs to run
            (slides[-1].lists if headed and not opening else slides[-1].notes).append(text)
        block = []


def _first_sentence(text: str) -> str:
    """With the bold words before it, if there are such; `**What did you observe?** The curve falls.`"""
    return re.match(
        r"(?:\*\*[^*]+\*\*)?(?:\$[^$]*\$|[^$])*?(?:(?<! al)(?<!e\.g)(?<!i\.e)[.?!](?=\s)|$)", text, re.DOTALL
    )[0].replace("\n", " ")


def _parser() -> Any:
    try:
        import latex2mathml  # noqa: F401
        from markdown_it import MarkdownIt
        from mdit_py_plugins.dollarmath import dollarmath_plugin
    except ImportError as error:
        raise UserError(executed.NEEDS) from error

    def render(formula: str, options: dict[str, Any]) -> str:
        return executed.mathml(formula, options["display_mode"])

    parser = MarkdownIt("commonmark", {"html": True, "highlight": None}).enable("table")
    parser.use(dollarmath_plugin, allow_space=False, renderer=render)

    def image(self: Any, tokens: list, index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        path = paths.notebooks_dir() / token.attrs["src"]
        return f'<img src="{_inline(path.read_bytes())}" alt="{html.escape(token.content)}">'

    parser.add_render_rule("image", image)
    return parser
