"""The repository's address stands in one place, and everything that disagrees with it is found."""

import json

import pytest

from prosg_lib import paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import links

OWN = "https://github.com/someone/course"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """One notebook with badge and set-up cell, a page, and the address."""
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path)
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{OWN}"\n[project]\nname = "x"\n')
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("[tour](notebooks/00_a.ipynb#top) https://github.com/other/library\n")
    notebook(tmp_path)
    return tmp_path


def notebook(
    root, badge="https://colab.research.google.com/github/someone/course/blob/main/notebooks/00_a.ipynb", **kw
):
    code = kw.get("code") or links.set_up_cell()
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": f"# A\n\n[![Open]({badge[:5]}://badge.svg)]({badge})"},
        {"cell_type": "code", "metadata": {}, "source": code, "outputs": [], "execution_count": None},
    ]
    made = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (root / "notebooks" / "00_a.ipynb").write_text(json.dumps(made))


def test_a_checkout_in_order(checkout):
    """Other repositories, and anchors, are nobody's business here."""
    assert links.check_links() == []


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("git clone https://github.com/elsewhere/course", "github.com/elsewhere/course does not belong to"),
        ("https://github.com/someone/old/issues", "github.com/someone/old/issues does not belong to"),
        (f"{OWN}/blob/main/docs/gone.md", "docs/gone.md leads to a file that is not there"),
        ("https://colab.research.google.com/github/a/b/blob/main/c.ipynb", "c.ipynb does not belong to"),
        ("[x](docs/gone.md#part)", "the link docs/gone.md#part leads to"),
        ("![x](gone.png)", "the link gone.png leads to"),
        ('<img src="gone.png">', "the link gone.png leads to"),
    ],
)
def test_what_is_wrong_on_a_page(checkout, page, said):
    """Each with the page's name."""
    (checkout / "README.md").write_text(page)
    (problem,) = links.check_links()
    assert problem.startswith("README.md: ")
    assert said in problem


@pytest.mark.parametrize("page", [f"{OWN}.git", f"{OWN}/issues", f"{OWN}/blob/main/README.md#x", "[x](https://a.b)"])
def test_what_is_right_on_a_page(checkout, page):
    """Its own address in every form."""
    (checkout / "README.md").write_text(page)
    assert links.check_links() == []


def test_a_notebook_without_its_badge_or_set_up_cell(checkout):
    """Both are named."""
    notebook(checkout, badge="https://colab.research.google.com/github/someone/course/blob/main/notebooks/01_b.ipynb")
    assert [problem.partition(": ")[2][:8] for problem in links.check_links()] == ["no badge", "https://"]
    notebook(checkout, code="import torch")
    assert ["set-up cell" in problem for problem in links.check_links()] == [True]


def test_an_address_of_another_form(checkout):
    """Is the only thing that is said."""
    (checkout / "pyproject.toml").write_text('[project]\nname = "x"\n')
    with pytest.raises(UserError, match="OWNER/NAME"):
        links.address()
    assert len(links.check_links()) == 1
