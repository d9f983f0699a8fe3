"""The lecture of a small run: one file, turned by keys, readable in light and dark, printable."""

import re

import pytest

from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.pages import deck
from prosg_lib.reproduction import notebook_files

bs4 = pytest.importorskip("bs4")
pytest.importorskip("latex2mathml")
pytest.importorskip("mdit_py_plugins")


@pytest.fixture
def lecture(small_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PROSG_RUNS", str(small_runs))
    path = deck.write(get_profile("smoke"), tmp_path)
    with pytest.raises(UserError, match="there already"):
        deck.write(get_profile("smoke"), tmp_path)
    return path


def test_shows_what_is_tagged_and_keeps_prose_for_the_speaker(lecture):
    """Heading, first sentence, formula and pictures are shown, all prose is in the notes; nothing is fetched."""
    soup = bs4.BeautifulSoup(lecture.read_text(encoding="utf-8"), "html.parser")
    title, slide = soup.select("section")
    assert title.h1
    assert slide.h2.text == "A tour of two pages"
    assert slide.pre.text == "12 tokens"
    assert "profile" not in slide.text
    assert "Exercise" not in slide.text
    assert slide.select_one(".lead").text.strip().startswith("Next is the state")
    assert "It keeps 0.99" in slide.aside.text
    assert slide.find("math", display="block")
    assert "Two bars, the second one higher." in [image["alt"] for image in slide.select("img")]
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in slide.select("img"))
    assert not soup.select("script[src], link[href]")
    assert re.search(r"About 90 minutes", slide.text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(lecture, open_page, unreadable, scheme):
    """Keys turn the slides and stop at both ends; N shows the notes; print shows all."""
    page = open_page(lecture.as_uri(), scheme)
    assert page.locator("section:visible h1").count() == 1
    assert unreadable(page) == []
    for key, place in (("ArrowRight", "2 / 2"), ("PageDown", "2 / 2"), ("Home", "1 / 2"), (" ", "2 / 2")):
        page.keyboard.press(key)
        page.wait_for_function("(place) => document.getElementById('place').textContent === place", arg=place)
    assert page.locator("section:visible").count() == 1
    assert not page.get_by_text("It keeps 0.99").is_visible()
    page.keyboard.press("n")
    page.get_by_text("It keeps 0.99").wait_for()
    assert unreadable(page) == []
    page.emulate_media(media="print")
    assert page.locator("section:visible").count() == 2


def test_every_notebook_has_slides():
    """Enough for 90 minutes; the report of a run has none. Cells that are rewritten keep their tag or hand it on."""
    course = notebook_files.course()
    tagged = [sum(deck.TAG in notebook_files.tags(cell) for cell in notebook_files.cells(path)) for path in course]
    assert min(tagged[:-1]) >= 3
    assert sum(tagged) >= 60


def test_nothing_is_tagged(small_runs, tmp_path, monkeypatch):
    """The message says what is missing."""
    monkeypatch.setenv("PROSG_RUNS", str(small_runs))
    monkeypatch.setattr(deck, "TAG", "no such tag")
    with pytest.raises(UserError, match="no such tag"):
        deck.write(get_profile("smoke"), tmp_path)


def test_first_sentence():
    """Bold words before it belong to it; points within a formula or a number do not end it."""
    assert deck._first_sentence("Jaderberg et al. did it. Then more.") == "Jaderberg et al. did it."
    text = "**What did you observe?** With $a.\\; b$ it is 0.57. Then more."
    assert deck._first_sentence(text) == "**What did you observe?** With $a.\\; b$ it is 0.57."
