"""The site of a small run, and of the course where it was run: built without a network, opened from its files."""

import json
import re
from functools import cache
from itertools import pairwise

import pytest

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.pages import executed
from prosg_lib.reproduction import notebook_files

bs4 = pytest.importorskip("bs4")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the site of a run once, and returns its folder; nothing may be fetched, and no link lead nowhere."""
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    from prosg_lib.pages import site

    @cache
    def of(runs, profile):
        folder = tmp_path_factory.mktemp("site") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
            patch.setenv("PROSG_RUNS", str(runs))
            assert site.write(profile, folder) == []
            with pytest.raises(UserError, match="is not empty"):
                site.write(profile, folder)
        return folder

    return of


@pytest.fixture(scope="module")
def built(build, small_runs):
    """The small run's site."""
    return build(small_runs, get_profile("smoke"))


@pytest.fixture(scope="module")
def some_site(build, some_runs):
    """The small run's site, and the course's."""
    return build(some_runs.folder, some_runs.profile)


def parsed(path):
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(folder):
    return sorted(page for page in folder.rglob("*.html") if "_static" not in page.parts)


def test_every_link_leads_somewhere(some_site):
    """Links within the site lead to a file that is there, and to a place in it; nothing is loaded from elsewhere."""
    soups = {page: parsed(page) for page in pages(some_site)}
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


def test_pages_can_be_read_aloud(some_site):
    """One title a page, no level of headings left out, and every picture in words of its own."""
    for page in pages(some_site):
        soup = parsed(page)
        if page.name == "search.html":  # whose heading a script writes
            continue
        levels = [int(tag.name[1]) for tag in soup.select("h1, h2, h3, h4, h5, h6")]
        assert levels[:1] == [1], page
        assert levels.count(1) == 1, page
        assert all(b - a <= 1 for a, b in pairwise(levels)), page
        assert all(image.get("alt") for image in soup.select("img")), page
        assert executed._NO_WORDS not in [image["alt"] for image in soup.select("img")], page


def test_the_course_is_read_in_order(some_site):
    """From the first page to the last notebook by *next*, and back by *previous*; the verdict stands in front."""
    course = sorted((some_site / "notebooks").glob("*.html"))
    links = [[parsed(page).select_one(f".{way}-page") for way in ("prev", "next")] for page in course]
    assert [next_["href"] for _, next_ in links[:-1]] == [page.name for page in course[1:]]
    assert [previous["href"] for previous, _ in links] == ["../index.html", *(page.name for page in course[:-1])]
    assert parsed(some_site / "index.html").select_one(".next-page")["href"] == f"notebooks/{course[0].name}"
    assert re.search(r"\d+ of \d+ promises hold, run on ", parsed(some_site / "index.html").text)


def test_pictures_keep_their_words_and_width(built):
    """Those of a saved figure, of a figure in the text, and of a picture that brings its own."""
    tour = parsed(built / "notebooks" / "00_tour.html")
    assert [image["alt"] for image in tour.select("img")] == [
        "curves",
        "Two bars, the second one higher.",
        "A diagonal.",
    ]
    assert tour.find("img", alt="A diagonal.")["width"] == "30"


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
    assert "promises hold, run on CPU: a small one" in parsed(built / "index.html").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_in_a_browser(some_site, open_page, unreadable, scheme):
    """In both schemes: text stands out from its ground, solutions are folded, and the console stays empty."""
    for path in pages(some_site):
        page = open_page(path.as_uri(), scheme)
        assert unreadable(page) == [], path
        solutions = page.locator("details", has=page.locator("summary", has_text=re.compile("^Solution"))).all()
        assert all(details.get_attribute("open") is None for details in solutions), path
        page.close()


def test_search_finds_a_notebook(some_site, open_page):
    """By the first words of the second one's title."""
    title = parsed(some_site / "notebooks" / "01_state_derivation.html").h1.find(string=True).strip()
    page = open_page(f"{(some_site / 'search.html').as_uri()}?q={'+'.join(title.split())}")
    page.locator("#search-results li a").first.wait_for()
    assert title in page.locator("#search-results").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(built, open_page, scheme):
    """From files, in both schemes: formulas are drawn, sliders move, and a solution opens."""
    page = open_page((built / "notebooks" / "00_tour.html").as_uri(), scheme)
    cases, letter = (page.locator("math").nth(n).bounding_box()["height"] for n in (4, 0))
    assert cases > 1.5 * letter > 0
    page.get_by_label("rank r").press("Home")
    assert "Rank 1 of 4" in page.locator("[role=status]").inner_text()
    code = page.get_by_text("answer = 42")
    assert not code.is_visible()
    page.get_by_text("Solution", exact=True).click()
    code.wait_for()


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
