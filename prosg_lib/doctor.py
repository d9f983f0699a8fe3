"""Does this machine have what the course needs? `prosg doctor` prints one line for each question.

Nothing here is needed to be installed, and nothing that is missing or broken ends in a traceback.
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from prosg_lib import files, paths
from prosg_lib.errors import UserError, reason

MEMORY_GB, DISK_GB = 3.0, 2.0
"""What `prosg reproduce --profile cpu` needs, rounded up; an installation with torch for CPUs needs as much disk."""

_INSTALL = "pip install -r requirements.lock && pip install --no-deps --no-build-isolation -e ."
_AGAIN = f"make a new virtual environment, and in the checkout: {_INSTALL}"
NOT_IN_COLAB = ("jupyterlab", "papermill")
"""Not needed by who is in a notebook already."""
_GB = 1e9
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is none


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        state: "ok"; "fix": the course will not run until it is mended; "note": fine, but good to know.
        text: what was found and, unless it is ok, what to do.
    """

    state: Literal["ok", "fix", "note"]
    text: str


def python() -> Finding:
    """Its version and place."""
    here = f"{platform.python_version()} in {sys.prefix}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("fix", f"{here}; install Python 3.11, 3.12 or 3.13, and make a new virtual environment with it")
    return Finding("ok", here)


def checkout() -> Finding:
    """Whether notebooks and data are there."""
    root = paths.repo_root()
    lacking = [name for name in ("notebooks", "data/checkpoints", "expected") if not (root / name).is_dir()]
    if lacking:
        return Finding("fix", f"{root} lacks {', '.join(lacking)}; clone the repository again")
    return Finding("ok", str(root))


def packages() -> Finding:
    """Whether everything that pyproject.toml requires is installed, and new enough."""
    import tomllib  # new in Python 3.11

    required = tomllib.loads((paths.repo_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing, old = [], []
    for needed in required["dependencies"]:
        name, least = re.fullmatch(r"([\w.-]+)>=([\w.]+)", needed).groups()
        if name in NOT_IN_COLAB and in_colab():
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if _numbers(version) < _numbers(least):
            old.append(f"{name} {version} (from {least} on)")
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return Finding("fix", f"{', '.join(missing[:4])}{more} not installed; in the checkout: {_INSTALL}")
    if old:
        return Finding("fix", f"too old: {', '.join(old)}; {_AGAIN}")
    return Finding("ok", f"all {len(required['dependencies'])} that are needed; torch {metadata.version('torch')}")


def memory() -> Finding:
    """What is free for new programs."""
    import psutil  # comes with accelerate

    free = psutil.virtual_memory().available / _GB
    if _LIMIT.is_file() and (limit := _LIMIT.read_text().strip()).isdigit():
        free = min(free, int(limit) / _GB)
    if free < MEMORY_GB:
        return Finding("fix", f"{free:.1f} GB free, {MEMORY_GB:g} are needed; close other programs and notebooks")
    return Finding("ok", f"{free:.0f} GB free")


def disk() -> Finding:
    """What is free where runs are written."""
    folder = paths.runs_dir("")
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free / _GB
    if free < DISK_GB:
        return Finding("fix", f"{free:.1f} GB free at {place}, {DISK_GB:g} are needed; free some, or set PROSG_RUNS")
    return Finding("ok", f"{free:.0f} GB free at {place}")


def runs() -> Finding:
    """Whether results can be written."""
    folder = paths.runs_dir("")
    files.check_writable(folder, "PROSG_RUNS")
    return Finding("ok", f"can be written to: {folder}")


def accelerator() -> Finding:
    """What models compute on, in which dtype, and why. Everything in the course computes in float32."""
    try:
        import torch
    except ModuleNotFoundError:
        raise
    except Exception as error:  # one of another system, or half installed, raises what it likes
        return Finding("fix", f"torch cannot be imported ({reason(error)}); {_AGAIN}")
    if not torch.cuda.is_available():
        unused = "; it has a GPU that this torch cannot use: install torch for CUDA" if _has_nvidia() else ""
        hint = "; Runtime > Change runtime type offers a GPU" if in_colab() else ""
        text = f"CPU, {os.cpu_count()} cores, float32, enough for the profile cpu{unused}{hint}"
        return Finding("note" if unused else "ok", text)
    gpu = torch.cuda.get_device_properties(0)
    what = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GB"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:
        return Finding("fix", f"{what} does not compute ({reason(error)}); update its driver, or restart the session")
    # Not torch.cuda.is_bf16_supported(), which also counts emulation.
    if (gpu.major, gpu.minor) >= (8, 0):
        half = "it has bfloat16, for large trainings: accelerate launch --mixed_precision bf16"
    else:
        half = "it has no bfloat16, so train without --mixed_precision bf16"
    return Finding("ok", f"{what}, float32, as everywhere in the course (4 bytes a weight of a hub model); {half}")


def kernel() -> Finding:
    """Whether notebooks in Jupyter run with this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    importlib.import_module("ipykernel")
    try:
        theirs = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        theirs = "none"
    if (
        theirs.startswith("python") or Path(theirs).parent == Path(sys.executable).parent
    ):  # a name: Jupyter's own Python
        return Finding("ok", "Jupyter's kernel python3 is this Python")
    why = f"Jupyter's kernel python3 is {theirs}, not {sys.executable}"
    return Finding("fix", f"{why}; run: {sys.executable} -m ipykernel install --sys-prefix")


def network() -> Finding:
    """Whether the hub of pretrained models answers; only models from there need it."""
    import httpx  # which huggingface_hub uses
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("note", "HF_HUB_OFFLINE is set: the course runs; models of the hub only if downloaded before")
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        return Finding("note", f"{why}: the course runs without it; models of the hub need it")
    return Finding("ok", f"{constants.ENDPOINT} answers")


def in_colab() -> bool:
    """Whether this is Google Colab: a notebook there, or a program that one started."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def colab() -> Finding:
    """Whether work will outlive the session."""
    if not in_colab():
        return Finding("ok", "no")
    if os.environ.get("PROSG_RUNS"):
        return Finding("ok", "yes")
    return Finding("note", "yes; what is trained goes with the session unless you tick `drive` in the first cell")


QUESTIONS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "checkout": checkout,
    "packages": packages,
    "memory": memory,
    "disk": disk,
    "runs": runs,
    "device": accelerator,
    "kernel": kernel,
    "network": network,
    "colab": colab,
}


def answer(question: Callable[[], Finding]) -> Finding:
    """Its finding, whatever goes wrong while it is looked for."""
    try:
        return question()
    except UserError as error:
        return Finding("fix", str(error))
    except ModuleNotFoundError as error:
        return Finding("fix", f"{error.name} is not installed; see the line on packages")
    except ImportError as error:
        return Finding("fix", f"{error.name} cannot be imported ({reason(error)}); {_AGAIN}")
    except Exception as error:  # a machine may be broken in ways that nobody foresaw
        return Finding("note", f"could not be found out ({reason(error)})")


def examine() -> bool:
    """Prints every finding; True if nothing has to be fixed."""
    found = {}
    for name, question in QUESTIONS.items():
        found[name] = answer(question)
        print(f"{found[name].state:<5} {name:<9} {found[name].text}", flush=True)
    broken = [name for name, finding in found.items() if finding.state == "fix"]
    print(f"to fix: {', '.join(broken)}" if broken else "ready: prosg reproduce --profile cpu")
    return not broken


def _numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers: (2, 11, 0) of 2.11.0+cu128."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d|", version)[0].split(".") if part)


def _has_nvidia() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).stdout.startswith(b"GPU")
