"""Memory that PyTorch frees on the CPU stays with the process, ready for the next step.

By default the C library gives large blocks back to the system at once; every tensor of some MB is then mapped anew and
zeroed page by page, which takes up to a third of a training step of the models here. `benchmarks/wkv.py` measures it.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library


def keep_freed_memory() -> bool:
    """Tell the C library so, for the whole process; memory use stays at its peak. Any number of calls is as one.

    Returns:
        Whether this C library can be told: the GNU one (Linux) can, others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
    return sum(mallopt(name, value) == 1 for name, value in settings.items()) == len(settings)
