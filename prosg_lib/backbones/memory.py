"""What PyTorch takes of memory, counted; and memory that it frees on the CPU stays with the process, for the next step.

By default the C library gives large blocks back to the system at once; every tensor of some MB is then mapped anew and
zeroed page by page, which takes up to a third of a training step of the models here. `benchmarks/wkv.py` measures it.
"""

import ctypes
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library


def keep_freed_memory() -> bool:
    """Tell the C library so, for the whole process. Any number of calls is as one.

    Memory use stays at its peak, and may settle at some times that: freed blocks with small ones between stay apart.

    Returns:
        Whether this C library can be told: the GNU one (Linux) can, others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}  # -1: however much is free, none is given back
    return sum(mallopt(name, value) == 1 for name, value in settings.items()) == len(settings)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors take at a time while `run` runs, above what they took before; its result included.

    On a GPU, if there is one, its own; else counted from PyTorch's own list of what it took and gave back.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    sizes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    peak = total = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        total += size
        peak = max(peak, total)
    return peak
