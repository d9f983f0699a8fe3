"""`prosg doctor`: each thing that may be missing or broken is one line that says what to do, never a traceback."""

import builtins
import os
import subprocess
import sys
import types
from importlib import metadata

import pytest

from prosg_lib import cli, doctor, paths

GB = 10**9


def fixed(question, *words):
    """The finding is `fix`, on one line, and says all of these words."""
    found = doctor.answer(question)
    assert found.state == "fix", found
    assert "\n" not in found.text
    for word in words:
        assert word in found.text


def test_python_of_another_version(monkeypatch):
    """Too old, or too new for the locked packages."""
    for version in ((3, 10, 1), (3, 14, 0)):
        monkeypatch.setattr(sys, "version_info", version)
        fixed(doctor.python, "install Python 3.11, 3.12 or 3.13")


def test_a_checkout_that_is_incomplete_or_missing(tmp_path, monkeypatch):
    """Without its data, and installed without a checkout."""
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path)
    fixed(doctor.checkout, "lacks notebooks, data/checkpoints, expected; clone")
    monkeypatch.undo()
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "prosg_lib" / "paths.py"))
    fixed(doctor.checkout, "without its notebooks and data; clone")
    fixed(doctor.packages, "without its notebooks and data; clone")


def test_packages_that_are_missing_or_old(monkeypatch):
    """By name; the remedy is a command."""
    true = metadata.version

    def version(name):
        if name in lacking:
            raise metadata.PackageNotFoundError(name)
        return "1.9.1+cu118" if name in old else true(name)

    monkeypatch.setattr(metadata, "version", version)
    lacking, old = {"peft"}, set()
    fixed(doctor.packages, "peft not installed", "pip install -r requirements.lock")
    lacking = {"papermill", "jupyterlab"}
    fixed(doctor.packages, "jupyterlab, papermill not installed")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert doctor.packages().state == "ok"
    lacking, old = set(), {"torch", "numpy"}
    fixed(doctor.packages, "too old: numpy 1.9.1+cu118 (from 2.0 on), torch 1.9.1+cu118 (from 2.10 on)", "pip install")


def test_memory_that_is_short(tmp_path, monkeypatch):
    """On the machine, or in a container."""
    monkeypatch.setattr(doctor, "_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=2 * GB))
    fixed(doctor.memory, "2.0 GB free, 3 are needed; close")
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=8 * GB))
    assert doctor.memory().text == "8 GB free"
    (tmp_path / "memory.max").write_text(f"{GB}\n")
    fixed(doctor.memory, "1.0 GB free")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """Of the folder for runs, which need not be there yet."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=GB))
    fixed(doctor.disk, f"1.0 GB free at {tmp_path}, 2 are needed", "PROSG_RUNS")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """A file has its name."""
    (tmp_path / "runs").touch()
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path / "runs"))
    fixed(doctor.runs, "cannot be written to", "choose another with PROSG_RUNS")


def torch_with(monkeypatch, name="Tesla T4", memory=15.8e9, capability=(7, 5), error=None):
    """A torch that sees this GPU."""

    class Ones:
        def add(self, other):
            if error:
                raise error
            return self

        def item(self):
            return 2.0

    gpu = types.SimpleNamespace(name=name, total_memory=memory, major=capability[0], minor=capability[1])
    cuda = types.SimpleNamespace(
        is_available=lambda: name is not None,
        get_device_properties=lambda number: gpu,
        is_bf16_supported=lambda: True,  # as on a T4, which emulates it
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, ones=lambda *size, device: Ones()))


@pytest.mark.parametrize(
    ("name", "memory", "capability", "said"),
    [
        ("Tesla T4", 15.8e9, (7, 5), "it has no bfloat16, so train without --mixed_precision bf16"),
        ("NVIDIA L4", 23.6e9, (8, 9), "it has bfloat16"),
        ("NVIDIA A100-SXM4-40GB", 42.4e9, (8, 0), "it has bfloat16"),
    ],
)
def test_a_gpu_and_its_dtype(monkeypatch, name, memory, capability, said):
    """What is chosen, and why; a T4 emulates bfloat16, which counts as not having it."""
    torch_with(monkeypatch, name, memory, capability)
    found = doctor.accelerator()
    assert found.state == "ok"
    assert found.text.startswith(f"{name}, {memory / 2**30:.0f} GB, float32, ")
    assert said in found.text


def test_a_gpu_that_does_not_compute(monkeypatch):
    """Its driver is too old, or another program broke it."""
    torch_with(monkeypatch, error=RuntimeError("CUDA error: no kernel image is available\nmore"))
    fixed(doctor.accelerator, "Tesla T4, 15 GB does not compute (RuntimeError: CUDA error", "driver")


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    """It is there, and torch is built for CPUs."""
    torch_with(monkeypatch, name=None)
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    found = doctor.accelerator()
    assert (found.state, "install torch for CUDA" in found.text) == ("note", True)
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: False)
    assert doctor.accelerator().state == "ok"


def test_no_gpu_on_colab(monkeypatch):
    """Colab has one to offer."""
    torch_with(monkeypatch, name=None)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert "Change runtime type" in doctor.accelerator().text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch is not installed; see the line on pack"),
        (OSError("[WinError 126] fbgemm.dll"), "torch cannot be imported (OSError: [WinError 126] fbgemm.dll); make"),
    ],
)
def test_torch_that_is_missing_or_broken(monkeypatch, error, said):
    """A package may raise anything while it is imported."""
    true = builtins.__import__

    def refusing(name, *arguments):
        if name == "torch":
            raise error
        return true(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refusing)
    fixed(doctor.accelerator, said)


def test_a_kernel_of_another_python(monkeypatch):
    """Which the first `python3` that Jupyter finds may be; or there is none."""
    from jupyter_client import kernelspec

    spec = types.SimpleNamespace(argv=["/usr/bin/python3"])
    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    fixed(doctor.kernel, "kernel python3 is /usr/bin/python3, not", "-m ipykernel install --sys-prefix")
    spec.argv[0] = "python"
    assert doctor.kernel().state == "ok"

    def none(self, name):
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", none)
    fixed(doctor.kernel, "is none, not")


def test_without_network(monkeypatch):
    """Worth knowing, and nothing to fix: the course needs none."""
    import httpx
    from huggingface_hub import constants

    def refuse(*arguments, **options):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", refuse)
    found = doctor.network()
    assert (found.state, "does not answer (ConnectError): the course runs without it" in found.text) == ("note", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.network().state == "note"


def test_colab_without_drive(monkeypatch):
    """Work is lost with the session, unless runs are kept elsewhere."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.delenv("PROSG_RUNS", raising=False)
    assert doctor.colab().state == "note"
    monkeypatch.setenv("PROSG_RUNS", "/drive/runs")
    assert doctor.colab().state == "ok"


def test_what_nobody_foresaw_is_a_note():
    """And its first line."""

    def broken():
        raise ZeroDivisionError("surprise\nmore")

    assert doctor.answer(broken) == doctor.Finding("note", "could not be found out (ZeroDivisionError: surprise)")


def test_a_python_without_any_package(tmp_path):
    """One line for each question, no traceback, exit code 1."""
    environment = os.environ | {"PYTHONPATH": str(paths.repo_root()), "PROSG_RUNS": str(tmp_path)}
    command = [sys.executable, "-S", "-m", "prosg_lib.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    *lines, last = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == list(doctor.QUESTIONS)
    assert last == "to fix: packages, memory, device, kernel, network"


def test_the_command(monkeypatch, capsys):
    """Its exit code says whether anything has to be fixed."""
    good, bad = doctor.Finding("ok", "fine"), doctor.Finding("fix", "do this")
    monkeypatch.setattr(doctor, "QUESTIONS", {"a": lambda: good, "b": lambda: good})
    assert cli.main(["doctor"]) == 0
    monkeypatch.setitem(doctor.QUESTIONS, "b", lambda: bad)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == ["ok    a         fine", "fix   b         do this", "to fix: b"]
