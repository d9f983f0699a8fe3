"""The ways to install the project agree with each other."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from prosg_lib import paths

ROOT = paths.repo_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["site"]]


def locked():
    """Name -> version of every line of the lock file."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), "a lock line is name==version and nothing else"
    return dict(pairs)


def test_conda_environment_equals_the_packages_dependencies():
    """environment.yml's pip part and pyproject.toml's dependencies are the same list, and the Python fits."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip == PROJECT["dependencies"]
    (python,) = [entry for entry in dependencies if isinstance(entry, str) and entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_lock_satisfies_every_requirement(requirement):
    """Each dependency, for using and for developing, is pinned to a version that the project allows."""
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_lock_pins_plain_versions_once():
    """No local builds, which only one machine has; no name twice; in order, so that a change shows as one line."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert not [line for line in lines if "+" in line or "@" in line]
    assert locked()["torch"] == "2.13.0"


def test_lock_is_whole():
    """What the locked packages need is locked too, so that an installation from the lock file resolves nothing."""
    from importlib import metadata

    pinned = locked()
    missing = set()
    for name in pinned:
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not needed on this system
        for requirement in map(Requirement, requires):
            # Markers may ask for another system's packages; what all systems need has none.
            if requirement.marker is None and canonicalize_name(requirement.name) not in pinned:
                missing.add(f"{name} needs {requirement}")
    assert not missing


def test_the_workflow_takes_the_route_that_the_readme_shows_first():
    """Its first block, one command a line (Windows PowerShell has no &&), in this order; and the doctor."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("```bash\n")[2].partition("```")[0]
    shown = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert not [line for line in shown if "&&" in line]
    shown = [line for line in shown if line.startswith(("python", "pip"))]
    assert len(shown) == 3
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["windows"]["steps"]
    assert [step["run"] for step in steps if step.get("run") in shown] == shown
    assert "prosg doctor" in [step.get("run") for step in steps]
    assert not [step for step in steps if "make" in step.get("run", "").split()]


def test_make_offers_what_it_says(monkeypatch):
    """Every target that `make help` names exists, and the choices arrive in the command."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)  # of the `make test` that runs this
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = {line.split()[1] for line in helped.splitlines() if line.startswith("make ")}
    assert targets == {"reproduce", "test", "lint", "benchmarks"}
    for target in sorted(targets):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
    for choices, options in (
        ([], "--profile cpu"),
        (["PROFILE=smoke"], "--profile smoke"),
        (["PROFILE=gpu", "RETRAIN=1"], "--profile gpu --retrain"),
        (["RETRAIN=0"], "--profile cpu"),
    ):
        command = ["make", "-n", "reproduce", *choices]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert shown.splitlines()[-1].strip().endswith(f"prosg reproduce {options}")


def test_make_says_when_there_is_no_python(tmp_path):
    """Without a Python that fits, the message names the versions, and nothing is made."""
    command = ["make", "PYTHON=", f"VENV={tmp_path / 'venv'}", "test"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 was not found" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_citation_names_both_papers():
    """CITATION.cff is valid YAML with what the format asks for, and cites what the project builds on."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    cited = {identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]}
    assert cited == {"arXiv:2311.01981", "arXiv:2506.20989"}
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


OWN = """
import torch
import prosg_lib as prosg
from prosg_lib.backbones.rwkv4 import RWKV4, RWKV4Config
from prosg_lib.deltas.low_rank import Factors

for layout, path in (("author", "own.pth"), ("transformers", "own"), ("prosg", "own.safetensors")):
    prosg.save_model(RWKV4(RWKV4Config(64, 16, 2, 64)), path, layout)
    lm = prosg.load_model(path)
    name, module = next(iter(lm.editable().items()))
    out, into = module.weight.shape
    delta = prosg.LowRankDelta({name: Factors(torch.ones(1, out, 1), torch.ones(1, into, 1))}, lm.fingerprint())
    delta.save("delta.safetensors")
    delta = prosg.LowRankDelta.load("delta.safetensors")
    assert lm(torch.tensor([[1, 2]]), delta=delta)[0].isfinite().all()
"""


def test_the_package_without_its_checkout(tmp_path):
    """As a wheel installs it: a user's own models and changes work; what the repository has is said to be there."""
    shutil.copytree(ROOT / "prosg_lib", tmp_path / "prosg_lib", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run("-c", OWN)
    assert done.returncode == 0, done.stderr
    for command in ("chat", "check", "train --list", "train rwkv4-dialogue", "reproduce --profile smoke"):
        done = run("-m", "prosg_lib.cli", *command.split())
        assert (done.returncode, done.stdout) == (2, "")
        assert "without its notebooks and data; clone the repository" in done.stderr
        assert done.stderr.count("\n") == 1
