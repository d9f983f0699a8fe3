"""Set-up on Colab: the first code cell of every notebook, and what it installs."""

import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from prosg_lib import colab, paths
from prosg_lib.reproduction import notebook_files, run

IMAGE = {line.partition("==")[0] for line in (paths.repo_root() / "requirements.lock").read_text().splitlines()}
IMAGE -= {"papermill", "jupyterlab"}  # which Colab has not


@pytest.mark.parametrize(
    ("installed", "missing"),
    [(IMAGE, []), (IMAGE - {"huggingface-hub", "peft"} | {"huggingface_hub"}, ["peft"])],
)
def test_what_is_there_is_not_installed_again(installed, missing):
    """Whatever its version, and however its name is written."""
    assert [Requirement(needed).name for needed in colab.missing(installed)] == missing


def test_the_set_up_cell_can_be_run_again_after_a_restart(tmp_path):
    """A restart of the session keeps /content. Simulated: a stand-in for google.colab, and for git one that, like git,
    clones into no folder that is there."""
    (cell,) = run._set_up(notebook_files.course()[0])
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\nset -- "$@"; shift 4; ln -sT "{paths.repo_root()}" "$1"\n')
    git.chmod(0o755)
    code = f"import sys, google.colab\n{cell.replace('/content', str(tmp_path))}\nprint(colab.__file__, os.getcwd())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{tmp_path}/prosg-notebooks/prosg_lib/colab.py", str(paths.notebooks_dir())]
