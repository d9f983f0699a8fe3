"""Where a number comes from: the code's commit, the device, and the versions of libraries."""

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "prosg-notebooks"
UNKNOWN = "unknown"


def _git(*arguments: str) -> str | None:
    """The output of a git command in this package's folder; None without git or a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit, 12 digits, with `+dirty` if files differ from it; "unknown" outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return UNKNOWN
    return head + ("+dirty" if _git("status", "--porcelain") else "")


@functools.cache
def device() -> str:
    """The GPU's name if torch sees one, otherwise the processor's name and its number of cores."""
    import torch  # here, because it takes seconds to import

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: keep the platform's name for it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU: {name}, {cores} cores"


def version(distribution: str) -> str:
    """The installed version of a distribution, "unknown" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return UNKNOWN


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "prosg_lib": version(DISTRIBUTION),
    }


def peak_mb() -> float | None:
    """The most memory that this process has used, in MB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def facts() -> dict[str, str | dict[str, str]]:
    """Commit, device and versions of this run, JSON-able."""
    return {"commit": commit(), "device": device(), "versions": versions()}
