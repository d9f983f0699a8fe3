"""Copies for a class: the students' without a solution, the instructor's with what a teacher wants to know."""

import subprocess
import sys

import pytest

from prosg_lib import cli, exercises, paths
from prosg_lib.exercises import cells, copies
from prosg_lib.reproduction import notebook_files


@pytest.fixture
def notebook():
    """A title, an exercise, and a solution of the older form."""
    old = "**1.** How many?\n\n<details><summary>Solutions</summary>\n\n1. Five.\n\n</details>"
    badge = "[![Open in Colab](https://a/b.svg)](https://c/d.ipynb)\n\nOne minute."
    texts = [cells.markdown(text, f"text-{i}", "text") for i, text in enumerate(["# Title", badge, old])]
    return {"cells": [*texts, *cells.cells(exercises.find("3.4"))], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def text_of(notebook):
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"])


def test_students_see_no_solution(notebook):
    text = text_of(copies.student(notebook))
    assert "Exercise 3.4" in text
    assert "raise NotImplementedError" in text
    assert "How many?" in text
    assert "One minute." in text
    for hidden in ("Five", "x @ v", "Solution", "Colab"):
        assert hidden not in text


def test_instructors_see_everything(notebook):
    text, exercise = text_of(copies.instructor(notebook)), exercises.find("3.4")
    for part in ("-eta * g.T @ (x @ v)", exercise.misconception, *exercise.discussion, f"| {exercise.minutes} |"):
        assert part in text
    for mistake in exercise.mistakes:
        assert mistake.says in text
    assert "def lora_step(g, x, v, eta):\n    return eta * g.T @ (x @ v)\n" in text  # the sign is missing


def test_both_are_written_and_valid(tmp_path, capsys):
    import nbformat

    for kind in ("student", "instructor"):
        assert cli.main(["course", kind, str(tmp_path / kind)]) == 0
        printed = capsys.readouterr().out.split("\n")
        for path in notebook_files.course():
            nbformat.validate(nbformat.read(tmp_path / kind / path.name, 4))
            assert str(tmp_path / kind / path.name) in printed
            text = (tmp_path / kind / path.name).read_text(encoding="utf-8")
            assert kind == "instructor" or "<summary>Solution" not in text


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    mine = tmp_path / notebook_files.course()[0].name
    mine.write_text("mine")
    assert cli.main(["course", "student", str(tmp_path)]) == cli.USAGE
    assert mine.name in capsys.readouterr().err
    assert [mine] == list(tmp_path.iterdir())
    assert mine.read_text() == "mine"
    assert cli.main(["course", "student", str(tmp_path), "--overwrite"]) == 0
    assert mine.read_text() != "mine"


def test_impossible_folders_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "in", paths.notebooks_dir()):
        assert cli.main(["course", "student", str(out)]) == cli.USAGE
        assert "another" in capsys.readouterr().err


def test_exercises_are_listed_without_torch():
    code = "import sys; from prosg_lib import exercises, cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
