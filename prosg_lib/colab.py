"""Set-up on Google Colab: what the first cell of every notebook calls, before anything else is installed."""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from prosg_lib import paths

NOT_NEEDED = ("jupyterlab", "papermill")  # by who is in a notebook already


def missing(installed: set[str]) -> list[str]:
    """The project's requirements whose packages are not installed, in whatever version."""
    project = tomllib.loads((paths.repo_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {_normal(name) for name in (*installed, *NOT_NEEDED)}
    return [needed for needed in project["dependencies"] if _normal(re.match(r"[\w.-]+", needed)[0]) not in found]


def install_missing() -> None:
    """Installs what is missing. What is there keeps its version: replacing numpy or torch breaks a running kernel."""
    installed = {d.name: d.version for d in metadata.distributions() if d.name}
    if needed := missing(set(installed)):
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "constraints.txt"
            kept.write_text("".join(f"{name}=={version}\n" for name, version in installed.items()))
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", kept, *needed], check=True)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
