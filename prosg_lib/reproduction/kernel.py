"""The process in which the cells of a notebook run: of this Python and this checkout, and gone when its parent is."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from ipykernel.iostream import OutStream
from ipykernel.kernelapp import IPKernelApp
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

ROOM = 20_000
"""How many characters of its standard output, and of its errors, are kept of a cell: joining a notebook's outputs takes
time that grows with the square of the longest line."""

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from prosg_lib.reproduction import kernel; kernel.main()"


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this; the first `python3` that Jupyter finds may be another's.

    The checkout is an argument, because PYTHONPATH cannot name a folder with a colon in it.
    """

    kernel_spec = KernelSpec(
        argv=[sys.executable, "-c", _START, str(Path(__file__).resolve().parents[2]), "-f", "{connection_file}"],
        display_name="Python 3",
        language="python",
    )


class CellOutput(OutStream):
    """Standard output or errors of a cell, cut after `ROOM` characters. Lines that are overwritten do not count."""

    room = ROOM

    def set_parent(self, parent: dict) -> None:
        """A new cell has all its room."""
        super().set_parent(parent)
        self.room = ROOM

    def write(self, string: str) -> int:
        """Writes what there is room for; returns the whole text's length, as if all had been written."""
        if "\r" in string:
            return super().write(string)
        if self.room >= 0:
            super().write(string if len(string) <= self.room else f"{string[: self.room]}\n[the rest was left out]\n")
            self.room -= len(string)
        return len(string)


def main() -> None:
    """Runs a kernel until its parent stops it, or ends, however that happens; a busy cell cannot delay it."""
    if sys.platform == "linux":  # elsewhere ipykernel looks once a second, which waits for a cell that holds the GIL
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["JPY_PARENT_PID"]):
            return
    IPKernelApp.launch_instance(outstream_class=f"{__name__}.{CellOutput.__name__}")
