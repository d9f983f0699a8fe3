"""What is asked of accelerate: alone next to nothing; and what the launcher was asked for in vain is said."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from prosg_lib.errors import UserError
from prosg_lib.training import distributed as processes

PLAIN = {"distributed_type": DistributedType.NO, "mixed_precision": "no", "num_processes": 1}


@pytest.fixture
def launched(monkeypatch):
    """Replaces accelerate by one that found this out."""

    def pretend(**found):
        monkeypatch.setattr(processes, "Accelerator", lambda cpu: SimpleNamespace(**PLAIN | found))
        processes.accelerator.cache_clear()

    processes.accelerator.cache_clear()
    yield pretend
    processes.accelerator.cache_clear()


def test_alone():
    """Every function is what a program without accelerate would do."""
    assert (processes.count(), processes.index(), processes.first()) == (1, 0, True)
    assert processes.device() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    tensor = torch.ones(3)
    assert processes.added(tensor) is tensor
    assert processes.gathered("x") == ["x"]
    assert processes.agreed(7, "a number") == 7
    assert processes.shared(range(5), lambda n: n * n) == [0, 1, 4, 9, 16]
    assert processes.shared([], str) == []
    processes.wait()
    processes.leave()


@pytest.mark.parametrize(("count", "work"), [(2, 5), (3, 5), (4, 2), (5, 5)])
def test_shares_are_put_together_in_order(monkeypatch, count, work):
    """Each piece is done by one process, and the shares differ by one piece at most."""
    shares = []

    def keep(share):
        shares.append(share)
        raise KeyboardInterrupt  # the others are not there yet

    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "gathered", keep)
    for number in range(count):
        monkeypatch.setattr(processes, "index", lambda number=number: number)
        with pytest.raises(KeyboardInterrupt):
            processes.shared(range(work), lambda n: 10 * n)
    assert sorted(chain(*shares)) == [10 * n for n in range(work)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.setattr(processes, "gathered", lambda share: shares)
    assert processes.shared(range(work), lambda n: 10 * n) == [10 * n for n in range(work)]


def test_what_processes_found_differently_is_said(monkeypatch):
    """By all of them, with what each found."""
    monkeypatch.setattr(processes, "gathered", lambda value: [value, 3])
    with pytest.raises(UserError, match="the processes disagree on the step: 7, 3; put PROSG_RUNS on a disk"):
        processes.agreed(7, "the step")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"mixed_precision": "fp16"}, "launched with mixed precision 'fp16'; there are 'no' and 'bf16'"),
        ({"distributed_type": DistributedType.FSDP}, "launched as FSDP"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "launched as DEEPSPEED"),
    ],
)
def test_what_is_not_done_here_is_refused(launched, found, said):
    launched(**found)
    with pytest.raises(UserError, match=said):
        processes.accelerator()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("USE_DEEPSPEED", "true", "DeepSpeed is not installed"),
        ("USE_MEGATRON_LM", "true", "Megatron is not installed"),
        ("MIXED_PRECISION", "fp8", "precision requires"),
        ("GRADIENT_ACCUMULATION_STEPS", "x", "invalid literal"),
    ],
)
def test_what_accelerate_itself_refuses_is_one_error(monkeypatch, name, value, said):
    """With where it was asked for; without it, it starts."""
    processes.accelerator.cache_clear()
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match=rf"accelerate could not start: .*{said}.* begin with ACCELERATE_"):
        processes.accelerator()
    monkeypatch.delenv(f"ACCELERATE_{name}")
    AcceleratorState._reset_state()
    assert processes.count() == 1


def test_processes_that_accelerate_does_not_know_of_are_said(monkeypatch, launched):
    """Otherwise each of them would train on its own, and write the same files."""
    launched()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes were launched, but accelerate was set up before for 1"):
        processes.accelerator()


@pytest.mark.parametrize(("asked", "expected"), [("no", False), ("bf16", True)])
def test_bfloat16_where_the_launcher_says_so(launched, asked, expected):
    launched(mixed_precision=asked)
    assert processes.bfloat16() is expected
