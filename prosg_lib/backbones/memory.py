"""Memory: faster allocation on the CPU, and the peak of what tensors take.

By default the C library returns large blocks to the system as soon as they are freed. Every tensor of some MB is then
mapped anew and zeroed page by page, which takes up to a third of a training step of the models here.
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
    """Make the C library keep freed memory for the next tensor, in the whole process. Repeated calls change nothing.

    The process then stays at its peak memory, or at a small multiple of it where small blocks fragment the heap.

    Returns:
        Whether it took effect: it does with the GNU C library (Linux); others are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}  # -1: return none, however much is free
    return sum(mallopt(name, value) == 1 for name, value in settings.items()) == len(settings)


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak memory of tensors while `run` runs, in bytes above what there was before; its result is included.

    On a GPU, if there is one, as its allocator reports it; otherwise from the allocations listed by PyTorch's profiler.
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
