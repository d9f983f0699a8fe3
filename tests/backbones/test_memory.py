"""Freed memory stays with the process, and the peak of what is taken is counted."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from prosg_lib.backbones.memory import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HELD = """
import ctypes, torch
from prosg_lib.backbones.memory import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
def held():
    found = mallinfo2()
    return found.arena + found.hblkhd  # what it has of the system: its heap, and blocks mapped one by one
def cycle():
    block = torch.empty(64 * 10**6)
    with_block = held()
    del block
    return [with_block - before, held() - before]
torch.empty(1)
before = held()
for _ in range(30):
    cycle()
print(*(number for _ in range(20) for number in cycle()))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="the GNU C library is told, and tells from 2.33 on",
)
def test_freed_memory_stays_for_the_next_tensor():
    """A freed tensor of 256 MB goes back to the system by default; told to, it stays, and the next is put there.

    Thirty tensors first: small things that lie between freed blocks keep some from being used again, until they settle.
    """
    found = {}
    for kept in (False, True):
        done = subprocess.run([sys.executable, "-c", HELD.format(kept=kept)], check=True, capture_output=True)
        found[kept] = [int(number) for number in done.stdout.split()]
    assert min(found[False][::2]) >= 256e6
    assert max(found[False][1::2]) < 1e6
    assert min(found[True]) >= 256e6
    assert max(found[True]) - min(found[True]) < 1e6  # nothing given back, nothing taken again


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
