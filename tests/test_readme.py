"""What README and docs/ show, works: the example runs, what is linked is there, tables are those of the data."""

import ast
import inspect
import re
import subprocess
import sys

import pytest

from prosg_lib import checksums, files, paths
from prosg_lib.backbones import hub_recurrent
from prosg_lib.reproduction import notebook_files


@pytest.fixture(scope="module")
def text():
    return (paths.repo_root() / "README.md").read_text(encoding="utf-8")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_example_runs(text, tmp_path, monkeypatch, capsys):
    """The first Python block, as it stands: it still knows the home town, and leaves the file that it saves."""
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(text)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "Oslo" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_a_class_of_ones_own_is_registered_as_the_docstring_says():
    """docs/using.md shows what `register` shows, which tests/backbones/test_backbones.py runs."""
    (block,) = blocks((paths.repo_root() / "docs" / "using.md").read_text(encoding="utf-8"))
    _, _, example = inspect.getdoc(hub_recurrent.register).partition("::\n")
    shown, tested = (ast.dump(ast.parse(code)) for code in (block, inspect.cleandoc(example)))
    assert shown == tested


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("files", "readings", "results", "running", "syllabus", "using")))


@pytest.mark.parametrize("page", PAGES)
def test_everything_linked_is_there(page):
    """Relative links and pictures."""
    page = paths.repo_root() / page
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_about_files_names_what_the_code_does():
    """What it promises is tested in tests/test_files.py; its names and numbers are the code's."""
    text = (paths.repo_root() / "docs" / "files.md").read_text(encoding="utf-8")
    temporary = re.sub("[0-9a-f]{16}", "*", files._temporary(paths.repo_root()).name)
    expanded = f"{files.LARGEST_EXPANDED / 2**20:.0f} MB"
    for name in (checksums.KEY, checksums.MANIFEST, temporary, expanded):
        assert name in text


def test_every_notebook_is_in_the_table(text):
    """In their order."""
    listed = re.findall(r"\(notebooks/(\w+)\.ipynb\) \|", text)
    assert listed == [path.stem for path in notebook_files.course()]


def test_numbers_are_filled_in(text):
    """No place is left where a number should stand."""
    assert "{{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_page_of_results_is_what_the_measured_tables_say():
    """docs/results.md, computed again from data/measured/."""
    script = paths.repo_root() / "docs" / "results.py"
    done = subprocess.run([sys.executable, script, "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
