"""Google Colab: what the first cell of every notebook calls, before anything else is installed."""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from prosg_lib import doctor, paths
from prosg_lib.errors import UserError

DRIVE = Path("/content/drive")
_PLAIN_VERSION = re.compile(r"[0-9][\w.!+-]*")  # pip takes no other in a constraint


def setup(drive: bool = False) -> None:
    """Prepares a Colab session for a notebook, and says in a few lines what it did.

    Installs what is missing, leaves every installed package as it is, and moves to the notebooks' folder. Running it
    again, or after a restart, changes nothing.

    Args:
        drive: keep trained models, claims and figures on Google Drive. After a disconnect, trainings resume from there.
    Raises:
        UserError: a package could not be installed, or Drive could not be mounted.
    """
    os.chdir(paths.notebooks_dir())
    before = installed()
    new = install_missing(before)
    print(f"packages: installed {', '.join(new)}" if new else "packages: everything needed was there")
    for sentence in changes(before, installed()):
        print(f"packages: {sentence}")
    if drive:
        os.environ["PROSG_RUNS"] = str(mount_drive())
    kept = "" if drive else "; they go when Colab disconnects, unless you tick `drive` and run this cell again"
    print(f"your runs: {paths.runs_dir('')}{kept}")
    print(f"device: {doctor.accelerator().text}")


def installed() -> dict[str, str]:
    """Name -> version of every installed package, as `pip freeze` lists them."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            found.setdefault(_normal(distribution.metadata["Name"]), str(distribution.version))  # the first is imported
    return found


def missing(names: set[str]) -> list[str]:
    """The project's requirements that are not among these installed packages, whatever their versions."""
    project = tomllib.loads((paths.repo_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {_normal(name) for name in (*names, *doctor.NOT_IN_COLAB)}
    return [needed for needed in project["dependencies"] if _normal(re.match(r"[\w.-]+", needed)[0]) not in found]


def install_missing(before: dict[str, str]) -> list[str]:
    """Installs the missing requirements and returns them; `before`: what is installed, which keeps its versions.

    Raises:
        UserError: pip failed; nothing was changed.
    """
    needed = missing(set(before))
    if needed:
        pins = [f"{name}=={version}\n" for name, version in before.items() if _PLAIN_VERSION.fullmatch(version)]
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("".join(pins))
            command = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(constraints), *needed]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            *_, last = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"pip could not install {', '.join(needed)} ({last}); run this cell again")
    return needed


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What happened to packages that had been there: one sentence each, and what to do. Normally none."""
    return [
        f"{name} {version} became {after.get(name, 'nothing')}; choose Runtime > Restart session, then run all cells"
        for name, version in before.items()
        if after.get(name) != version
    ]


def mount_drive() -> Path:
    """The folder for runs on Google Drive; Colab asks for permission.

    Raises:
        UserError: Drive is not there, or permission was refused.
    """
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
        folder = DRIVE / "MyDrive" / "prosg-runs"
        folder.mkdir(exist_ok=True)
    except Exception as error:  # Colab raises ValueError, its own MessageError, or whatever a refusal becomes
        raise UserError(
            f"Google Drive could not be mounted ({error}); run this cell again, or untick `drive`"
        ) from None
    return folder


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
