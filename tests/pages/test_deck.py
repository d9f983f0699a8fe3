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
    title, formula, curves, bars = soup.select("section")
    assert title.h1
    assert {slide.h2.text for slide in (formula, curves, bars)} == {"A tour of two pages"}
    assert curves.pre.text == "12 tokens"
    shown = "".join(slide.text for slide in (formula, curves, bars))
    assert "profile" not in shown
    assert "Exercise" not in shown
    assert formula.select_one(".lead").text.strip().startswith("Next is the state")
    assert "It keeps 0.99" in formula.aside.text
    assert formula.find("math", display="block")
    assert [[image["alt"] for image in slide.select("img")] for slide in (formula, curves, bars)] == [
        [],
        ["curves"],
        ["Two bars, the second one higher."],
    ]
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in soup.select("img"))
    assert not soup.select("script[src], link[href]")
    assert re.search(r"About 90 minutes", formula.text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(lecture, open_page, unreadable, scheme):
    """Keys turn the slides and stop at both ends; N shows the notes; print shows all."""
    page = open_page(lecture.as_uri(), scheme)
    assert page.locator("section:visible h1").count() == 1
    assert unreadable(page) == []
    for key, place in (
        ("ArrowRight", "2 / 4"),
        ("End", "4 / 4"),
        ("PageDown", "4 / 4"),
        ("Home", "1 / 4"),
        (" ", "2 / 4"),
    ):
        page.keyboard.press(key)
        page.wait_for_function("(place) => document.getElementById('place').textContent === place", arg=place)
    assert page.locator("section:visible").count() == 1
    notes = page.locator("section.now").get_by_text("It keeps 0.99")
    assert not notes.is_visible()
    page.keyboard.press("n")
    notes.wait_for()
    assert unreadable(page) == []
    page.emulate_media(media="print")
    assert page.locator("section:visible").count() == 4
    assert page.get_by_text("It keeps 0.99").first.is_visible()
    assert not page.get_by_text("It keeps 0.99").last.is_visible()  # once is enough on paper


_TALL = """() => [...document.querySelectorAll("section")].flatMap((slide, i) => {
  document.querySelector(".now").classList.remove("now");
  slide.classList.add("now");
  const small = [...slide.querySelectorAll("img")].some((image) => image.getBoundingClientRect().height < 200);
  const fits = slide.scrollHeight <= innerHeight && slide.scrollWidth <= innerWidth;
  return fits && !small ? [] : [`${i + 1}: ${slide.querySelector("h1, h2, h3").textContent} ${slide.scrollHeight}`];
})"""


def test_no_slide_overflows(some_runs, tmp_path, monkeypatch, open_page):
    """On a projector of 1280 by 720 points every slide is seen whole, and no picture has become tiny."""
    monkeypatch.setenv("PROSG_RUNS", str(some_runs.folder))
    page = open_page(deck.write(some_runs.profile, tmp_path).as_uri())
    page.set_viewport_size({"width": 1280, "height": 720})
    assert page.evaluate(_TALL) == []


@pytest.mark.parametrize(
    ("pictures", "slides"),
    [
        (["<pre>1\n2</pre>", "<img>", "<pre>3</pre>"], ["LEAD MORE <pre>1\n2</pre><img><pre>3</pre>SEEN"]),
        (["<img>", "<table>", "<img>"], ["LEAD MORE <img>", "<table>", "<img>SEEN"]),
        (["<img>", "<pre>1\n2\n3</pre>"], ["LEAD MORE <img>", "<pre>1\n2\n3</pre>SEEN"]),
        ([], ["LEAD MORE SEEN"]),
    ],
)
def test_one_thing_to_look_at_on_a_slide(pictures, slides):
    """A line or two that was printed goes with it; the lead comes first, what was observed last."""
    made = deck._Slide("<h3>A</h3>", "LEAD ", [], pictures, [], "SEEN").html("MORE ")
    assert [re.sub("</?section[^>]*>|<h3>A</h3>", "", slide) for slide in made] == slides


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
