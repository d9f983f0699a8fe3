"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from prosg_lib.allocator import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
layer, x = torch.nn.Linear(1024, 1024), torch.randn(4096, 1024)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        layer(x).relu().square().sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(30)
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is told")
def test_training_steps_soon_need_no_new_pages():
    """After thirty steps with tensors of 16 MB, twenty more map few pages; by default each maps thousands."""
    faults = {}
    for kept in (False, True):
        done = subprocess.run([sys.executable, "-c", COUNT.format(kept=kept)], check=True, capture_output=True)
        faults[kept] = int(done.stdout)
    assert faults[True] < faults[False] / 2
