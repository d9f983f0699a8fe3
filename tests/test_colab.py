"""Set-up on Colab: the first code cell of every notebook, what it installs, and what it keeps."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny import TINY

from prosg_lib import colab, paths
from prosg_lib.errors import UserError
from prosg_lib.reproduction import links
from prosg_lib.training import load_or_train

IMAGE = {line.partition("==")[0] for line in (paths.repo_root() / "requirements.lock").read_text().splitlines()}
IMAGE -= {"papermill", "jupyterlab"}  # which Colab has not


@pytest.mark.parametrize(
    ("installed", "missing"),
    [(IMAGE, []), (IMAGE - {"huggingface-hub", "peft"} | {"huggingface_hub"}, ["peft"])],
)
def test_what_is_there_is_not_installed_again(installed, missing):
    """Whatever its version, and however its name is written."""
    assert [Requirement(needed).name for needed in colab.missing(installed)] == missing


@pytest.fixture
def pip(monkeypatch):
    """A pip that installs nothing and remembers what it was asked for; `pip.fails` is its error, if any."""
    asked = types.SimpleNamespace(names=[], constraints="", fails="")

    def run(command, **options):
        asked.names, asked.constraints = command[7:], Path(command[6]).read_text()
        return types.SimpleNamespace(returncode=bool(asked.fails), stderr=asked.fails)

    monkeypatch.setattr(colab.subprocess, "run", run)
    return asked


def test_installed_packages_are_constraints(pip):
    """So that pip refuses rather than replaces; a version that pip would not read is left out."""
    before = dict.fromkeys(IMAGE, "1.0+cu128") | {"odd": "None"}
    del before["peft"]
    (needed,) = colab.install_missing(before)
    assert pip.names == [needed]
    assert needed.startswith("peft>=")
    assert "torch==1.0+cu128\n" in pip.constraints
    assert "odd" not in pip.constraints
    pip.fails = "noise\nERROR: ResolutionImpossible"
    with pytest.raises(UserError, match=r"could not install peft.*\(ERROR: ResolutionImpossible\); run this cell"):
        colab.install_missing(before)


def test_a_package_that_changed_is_named():
    """Replaced or removed, with what to do; a new one is none."""
    found = colab.changes({"numpy": "2.1", "torch": "2.11", "gone": "1"}, {"numpy": "2.3", "torch": "2.11", "new": "1"})
    assert [sentence.partition(";")[0] for sentence in found] == ["numpy 2.1 became 2.3", "gone 1 became nothing"]
    assert all("Restart session" in sentence for sentence in found)


def drive_of(monkeypatch, folder, mount):
    """A stand-in for google.colab whose Drive is mounted by `mount`."""
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["google.colab"].drive = types.SimpleNamespace(mount=mount)
    monkeypatch.setattr(colab, "DRIVE", folder / "drive")


def test_runs_are_on_drive_if_asked(tmp_path, monkeypatch, capsys):
    """Trainings then read and write there; what a session before left there is found."""
    left = tmp_path / "drive" / "MyDrive" / "prosg-runs" / "cpu" / "checkpoints"
    left.mkdir(parents=True)
    drive_of(monkeypatch, tmp_path, lambda place: None)
    monkeypatch.setenv("PROSG_RUNS", "")
    monkeypatch.chdir(tmp_path)
    colab.setup(drive=True)
    assert paths.runs_dir("cpu") / "checkpoints" == left
    assert Path.cwd() == paths.notebooks_dir()
    said = capsys.readouterr().out
    assert "packages: everything needed was there" in said
    assert f"your runs: {left.parents[1]}\n" in said
    assert "device: " in said


def test_a_training_goes_on_from_drive_alone(tmp_path, monkeypatch, small_world, capsys):
    """A session ends in the middle of a training; the next has a new machine, and Drive. No step is trained twice."""
    drive = tmp_path / "drive" / "MyDrive"
    drive_of(monkeypatch, tmp_path, lambda place: drive.mkdir(parents=True, exist_ok=True))
    monkeypatch.chdir(tmp_path)
    steps, work = [], load_or_train.work

    def watched(*given):
        batch_of, loss_of = work(*given)

        def loss(step, batch):
            steps.append(step)
            if len(steps) == 1:
                os.kill(os.getpid(), signal.SIGINT)  # as a session does that is shut down
            return loss_of(step, batch)

        return batch_of, loss

    monkeypatch.setattr(load_or_train, "work", watched)
    for session in range(2):
        with small_world(TINY, tmp_path / f"machine {session}"):
            colab.setup(drive=True)
            if session == 0:
                with pytest.raises(KeyboardInterrupt):
                    load_or_train.load_or_train("rwkv4-dialogue", TINY)
            else:
                trained = load_or_train.load_or_train("rwkv4-dialogue", TINY)
    assert steps == [0, 1]
    assert trained.checkpoint.is_relative_to(drive)
    assert not (tmp_path / "machine 0").exists()


def test_drive_refused_is_one_sentence(tmp_path, monkeypatch):
    """What was asked for is not silently left out."""

    def refuse(place):
        raise ValueError("mount failed")

    drive_of(monkeypatch, tmp_path, refuse)
    with pytest.raises(UserError, match=r"could not be mounted \(mount failed\); run this cell again, or untick"):
        colab.mount_drive()


def test_without_drive_it_says_that_work_is_lost(tmp_path, monkeypatch, capsys):
    """And leaves the folder that is set."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    colab.setup()
    assert f"your runs: {tmp_path}; they go when Colab disconnects" in capsys.readouterr().out


SESSION = """
import sys, google.colab
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor")
shell.run_cell(sys.argv[1]).raise_error()
print("at", shell.user_ns["colab"].__file__, shell.getoutput("pwd")[0])
"""


def test_the_set_up_cell_can_be_run_again_after_a_restart(tmp_path):
    """A restart of the session keeps /content. Simulated: a stand-in for google.colab, and for git one that, like git,
    clones into no folder that is there."""
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").touch()
    git, name = tmp_path / "git", links.address().rpartition("/")[2]
    git.write_text(f'#!/bin/sh\ntest "$5" = {links.address()} && ln -sT "{paths.repo_root()}" {name}\n')
    git.chmod(0o755)
    cell = links.set_up_cell().replace("/content", str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SESSION, cell], cwd="/", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        *said, at = done.stdout.splitlines()
        assert at == f"at {tmp_path}/{name}/prosg_lib/colab.py {paths.notebooks_dir()}"
        assert [line.partition(":")[0] for line in said] == ["packages", "your runs", "device"]


def test_anywhere_else_the_set_up_cell_does_nothing(tmp_path):
    """No output, no folder, no module, and the shell stays where it is."""
    code = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell\n"
        "InteractiveShell.instance().run_cell(sys.argv[1]).raise_error()\n"
        "assert 'prosg_lib' not in sys.modules"
    )
    environment = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-c", code, links.set_up_cell()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
