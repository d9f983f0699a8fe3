"""The processes that work on one thing together: one, or as many as `accelerate launch` started.

accelerate does all of it; this is what the project asks it for, by name. Without a launcher every function here does
what there is to do for a single process, which is next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from prosg_lib import files
from prosg_lib.errors import UserError

Work, Result = TypeVar("Work"), TypeVar("Result")

_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@cache
def accelerator() -> Accelerator:
    """What accelerate knows of the launcher and of this machine; a GPU is used where there is one.

    Raises:
        UserError: the launcher was asked for what is not done here, or for what this machine cannot do.
    """
    try:
        found = Accelerator(cpu=not torch.cuda.is_available())
    except Exception as error:  # whatever the libraries behind it raise
        raise UserError(
            f"accelerate could not start: {error} What it was asked for is in the configuration that the launcher was "
            "given, or in environment variables that begin with ACCELERATE_"
        ) from error
    if found.distributed_type not in _DATA_PARALLEL:
        raise UserError(
            f"launched as {found.distributed_type.value}, but the processes here share the batch and nothing else; "
            "launch without sharding or other devices than CPUs and NVIDIA GPUs"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != found.num_processes:
        raise UserError(
            f"{launched} processes were launched, but accelerate was set up before for {found.num_processes}; "
            "let prosg_lib.training.distributed.accelerator() be the first to do so"
        )
    if found.mixed_precision not in ("no", "bf16"):
        raise UserError(f"launched with mixed precision {found.mixed_precision!r}; there are 'no' and 'bf16'")
    return found


def device() -> torch.device:
    """This process's GPU, where there is one."""
    found = accelerator().device
    return found if found.type == "cuda" else torch.device(found.type)


def bfloat16() -> bool:
    """Whether to compute under bfloat16 autocast: where the launcher says so (`--mixed_precision bf16`)."""
    return accelerator().mixed_precision == "bf16"


def count() -> int:
    return accelerator().num_processes


def index() -> int:
    """This process's number, from 0."""
    return accelerator().process_index


def first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return accelerator().is_main_process


def say(text: str) -> None:
    """Print it, once."""
    if first():
        print(text, flush=True)


def wait() -> None:
    """Go on when every process has come here."""
    accelerator().wait_for_everyone()


def added(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, the same bits in each of them."""
    return accelerator().reduce(tensor, "sum") if count() > 1 else tensor


def gathered(value: Result) -> list[Result]:
    """Every process's value, in the order of their numbers."""
    return gather_object([value]) if count() > 1 else [value]


def agreed(value: Result, what: str) -> Result:
    """The value, on which all processes must agree.

    Raises:
        UserError: in every process, if they do not.
    """
    found = gathered(value)
    if any(other != found[0] for other in found):
        raise UserError(
            f"the processes disagree on {what}: {', '.join(map(str, found))}; "
            "put PROSG_RUNS on a disk that all machines share"
        )
    return value


def shared(work: Sequence[Work], do: Callable[[Work], Result]) -> list[Result]:
    """`[do(piece) for piece in work]`, each process doing its share of it, and all having all results."""
    shares = gathered([do(piece) for piece in work[index() :: count()]])
    return [shares[number % count()][number // count()] for number in range(len(work))]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While it is entered, only these processes work on `path`.

    Raises:
        UserError: in every process, if another run is at work on it, or its folder cannot be written to.
    """
    with ExitStack() as held:
        refusal = None
        if first():
            try:
                files.check_writable(path.parent, "PROSG_RUNS")
                held.enter_context(files.lock(path.with_name(f".{path.stem}.lock"), str(path)))
            except UserError as error:
                refusal = str(error)
        if refusal := gathered(refusal)[0]:
            raise UserError(refusal)
        yield


def leave() -> None:
    """Say goodbye to the others, as the last thing that a launched program does."""
    accelerator().end_training()
