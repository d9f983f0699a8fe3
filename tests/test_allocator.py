"""Freed memory stays with the process, and the peak of what is taken is counted."""

import platform
import subprocess
import sys

import pytest
import torch

from prosg_lib.allocator import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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


def test_peak_is_that_of_what_is_alive_at_once():
    """Three tensors of 4 MB, of which two at a time; what was there before does not count."""
    before = torch.zeros(10**6, device=DEVICE)

    def run():
        first = before + 1
        second = first * 2
        del first
        return second - 1

    assert 8e6 <= peak_bytes(run) < 8.1e6


def test_a_backward_pass_keeps_what_it_needs():
    """Ten layers keep their inputs for the backward pass; without gradients they do not."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(10))).to(DEVICE)
    x = torch.randn(1024, 64, device=DEVICE)  # 256 KB

    def forward():
        with torch.no_grad():
            layers(x)

    assert peak_bytes(lambda: layers(x).sum().backward()) > 10 * 1024 * 64 * 4 > 2 * peak_bytes(forward)
