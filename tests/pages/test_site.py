"""The site of a small run: built without a network, and opened in a browser from its files."""

import json
import re
from itertools import pairwise

import pytest

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.pages import executed
from prosg_lib.reproduction import notebook_files

bs4 = pytest.importorskip("bs4")


@pytest.fixture(scope="module")
def built(tmp_path_factory, small_runs):
    """The site's folder; nothing was fetched."""
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    from prosg_lib.pages import site

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
        patch.setenv("PROSG_RUNS", str(small_runs))
        assert site.write(get_profile("smoke"), folder / "out") == []
        with pytest.raises(UserError, match="is not empty"):
            site.write(get_profile("smoke"), folder / "out")
    return folder / "out"


def parsed(path):
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(folder):
    return sorted(page for page in folder.rglob("*.html") if "_static" not in page.parts)


def test_every_link_leads_somewhere(built):
    """Links within the site lead to a file that is there, and to a place in it; nothing is loaded from elsewhere."""
    soups = {page: parsed(page) for page in pages(built)}
    assert {"index.html", "run.html", "search.html", "00_tour.html", "results.html"} <= {page.name for page in soups}
    for page, soup in soups.items():
        for tag in soup.select("[src], link[href]"):
            assert not re.match("(https?:)?//", tag.get("src") or tag["href"]), tag
        for tag in soup.select("a[href], link[href], [src]"):
            target, _, place = (tag.get("href") or tag["src"]).partition("#")
            target = target.partition("?")[0]
            if re.match("[a-z]+:", target):
                continue
            file = (page.parent / target).resolve() if target else page
            assert file.is_file(), f"{page.name}: {tag}"
            if place and file in soups and place not in ("", "__toc"):
                assert soups[file].find(id=place), f"{page.name}: {tag}"


def test_pages_can_be_read_aloud(built):
    """One title a page, no level of headings left out, and every picture in words."""
    for page in pages(built):
        soup = parsed(page)
        if page.name == "search.html":  # whose heading a script writes
            continue
        levels = [int(tag.name[1]) for tag in soup.select("h1, h2, h3, h4, h5, h6")]
        assert levels[:1] == [1], page
        assert levels.count(1) == 1, page
        assert all(b - a <= 1 for a, b in pairwise(levels)), page
        assert all(image.get("alt") for image in soup.select("img")), page
    tour = parsed(built / "notebooks" / "00_tour.html")
    assert [image["alt"] for image in tour.select("img")] == [
        "curves",
        "Two bars, the second one higher.",
        "A diagonal.",
    ]


def test_what_a_notebook_becomes(built):
    """Set-up, progress bars and live widgets are gone; plumbing and solutions are folded; formulas are MathML."""
    tour = parsed(built / "notebooks" / "00_tour.html")
    article = tour.select_one("article")
    for gone in ("import sys", "progress bar", "VBox", "profile = 'smoke'", "colab-badge", "$"):
        assert gone not in article.decode(), gone
    assert "12 tokens" in article.text
    assert {details.summary.text.strip() for details in article.select("details")} >= {"Solution"}
    assert article.find("details", string=None).find("pre") is not None
    assert [math.get("display") for math in article.select("math")] == ["inline"] * 4 + ["block"]
    links = {a.text: a["href"] for a in article.select("a[href]")}
    assert links["the state"] == "01_state_derivation.html#a-section"
    assert links["forgetting"].endswith("/blob/main/notebooks/02_prompt_forgetting.ipynb")
    assert links["a datasheet"].endswith("/blob/main/data/DATASHEET.md")
    assert tour.select_one(".next-page")["href"] == "01_state_derivation.html"
    front = parsed(built / "index.html").text
    assert re.search(r"\d+ of \d+ promises hold, run on CPU: a small one", front)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(built, open_page, unreadable, scheme):
    """From files, in both schemes: text stands out from its ground, formulas are drawn, sliders move."""
    for name in ("index.html", "run.html", "notebooks/01_state_derivation.html"):
        assert unreadable(open_page((built / name).as_uri(), scheme)) == []
    page = open_page((built / "notebooks" / "00_tour.html").as_uri(), scheme)
    assert unreadable(page) == []
    cases, letter = (page.locator("math").nth(n).bounding_box()["height"] for n in (4, 0))
    assert cases > 1.5 * letter > 0
    page.get_by_label("rank r").press("Home")
    assert "Rank 1 of 4" in page.locator("[role=status]").inner_text()
    code = page.get_by_text("answer = 42")
    assert not code.is_visible()
    page.get_by_text("Solution", exact=True).click()
    code.wait_for()


def test_search_from_a_file(built, open_page):
    """The index is a script, so that it is found without a server."""
    page = open_page(f"{(built / 'search.html').as_uri()}?q=question")
    page.locator("#search-results li a").first.wait_for()
    assert "A tour of two pages" in page.locator("#search-results").inner_text()


def test_nothing_to_show(tmp_path, monkeypatch):
    """A run is needed first, and the message says which command makes one."""
    pytest.importorskip("sphinx")
    from prosg_lib.pages import site

    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="prosg reproduce --profile smoke"):
        site.write(get_profile("smoke"), tmp_path / "out")


def test_without_sphinx(monkeypatch, tmp_path):
    """The message says what to install."""
    from prosg_lib.pages import site

    monkeypatch.setitem(__import__("sys").modules, "sphinx.application", None)
    with pytest.raises(UserError, match="pip install"):
        site.write(get_profile("smoke"), tmp_path / "out")


def test_every_formula_of_the_course_is_known():
    """The converter knows every command that the notebooks and documents use."""
    pytest.importorskip("latex2mathml")
    texts = [cell["source"] for path in notebook_files.course() for cell in notebook_files.cells(path)
             if cell["cell_type"] == "markdown"]  # fmt: skip
    texts += [path.read_text(encoding="utf-8") for path in (paths.repo_root() / "docs").glob("*.md")]
    formulas = []
    for text in texts:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        formulas += re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
        formulas += re.findall(
            r"(?<![\\$\w])\$([^\s$][^$\n]*?)\$(?!\w)", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
        )
    assert len(formulas) > 100
    for formula in formulas:
        assert executed.mathml(formula, block=True).startswith("<math")
    for broken in (r"\nosuchcommand", "a_b_c"):
        with pytest.raises(UserError, match="cannot be set"):
            executed.mathml(broken, block=False)


def test_every_saved_figure_is_shown():
    """A cell that saves a figure also shows it; the page has what the notebook shows."""
    for path in notebook_files.course():
        sources = [cell["source"] for cell in notebook_files.cells(path) if "save_figure(" in cell["source"]]
        assert [source[-80:] for source in sources if not re.search(r"plt\.show\(\)|^fig$", source, re.M)] == [], path


def test_run_files_are_read_as_json(built):
    """The search index names the pages by their titles."""
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    titles = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["titles"]
    assert "The state" in titles
