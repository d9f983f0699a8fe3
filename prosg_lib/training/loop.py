"""The one training loop: progress, checkpoints, resume; in one process or several. On what: `work.py`.

Under `accelerate launch` each process takes its part of a step's batch, and the gradients of all are added up once a
step; so every process has the same weights, and the step is the one that a single process would take.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from prosg_lib import files
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.config.sizes import Training
from prosg_lib.errors import Diverged, NotFinite, UserError
from prosg_lib.strict import read_as
from prosg_lib.tasks.examples import Examples
from prosg_lib.training import distributed

_LINES = 100  # of a log, at most
_GROUP = {"factor": 1.0, "clip": 1.0}


@dataclass(frozen=True)
class Loss:
    """What some examples add to the loss of a step's whole batch, (), and what the log should say of it."""

    total: Tensor
    parts: dict[str, Tensor]


def fit(
    name: str,
    module: nn.Module,
    batch_of: Callable[[int], Examples],
    loss_of: Callable[[int, Examples], Loss],
    sizes: Training,
    folder: Path,
    record: dict,
    save_every_s: float = 60.0,
    at_once: int | None = None,
    peak_until: int = 0,
) -> None:
    """Train `module` in place; safe to kill at any moment and to call again, with as many processes or others.

    On Ctrl-C or SIGTERM it finishes the current step and saves it; a second signal stops it at once.

    The step number alone determines a step's data, so a run continued from a checkpoint (weights, optimiser, random
    state, step) ends with the weights of an uninterrupted one, bit for bit on the same machine with the same number of
    threads and processes. A different number of processes adds up in a different order and draws different dropout.

    Args:
        batch_of: step -> the step's data, on the CPU; when training on a GPU, worker processes draw it ahead.
        loss_of: (step, its data or a part of it) -> Loss; the parts' losses must add up to the whole's.
        folder: `<name>.checkpoint.safetensors` is kept here while training, `<name>.jsonl` logs every line.
        record: what was trained on which data; a checkpoint with another record is not continued.
        at_once: number of examples in memory at a time, whose gradients are summed; None: all of this process's share.
        peak_until: number of first steps at the peak learning rate, after warm-up.
    Raises:
        Diverged: the loss is not finite, in whichever process; the last good checkpoint stays.
        UserError: the checkpoint in `folder` belongs to another configuration, or is damaged; a batch has fewer
            examples than there are processes.
        KeyboardInterrupt: a signal asked it to stop.
    """
    keep_freed_memory()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(groups_of(module), lr=sizes.lr, betas=(0.9, 0.99), weight_decay=0.01)
    path = folder / f"{name}.checkpoint.safetensors"
    start = _resume(path, module, optimiser, record, sizes.steps) if path.exists() else 0
    start = distributed.agreed(start, f"the step that {path} is at")
    log_file = folder / f"{name}.jsonl"
    opened = closing(_Log(log_file, name, sizes.steps, start)) if distributed.first() else nullcontext()
    saved, device = time.monotonic(), parameters[0].device
    with opened as log, _stop_signals() as stop:
        for step, batch in enumerate(_drawn_ahead(batch_of, start, sizes.steps, device), start):
            for group in optimiser.param_groups:
                group["lr"] = group["factor"] * (sizes.lr * schedule(step, sizes, peak_until))
            optimiser.zero_grad(set_to_none=True)
            if not distributed.first():  # the first one's random numbers are those of a single process
                torch.manual_seed(random.Random(f"{name}/{step}/{distributed.index()}").getrandbits(63))
            try:
                loss = _backward(step, _own(batch), at_once, loss_of, parameters)
                _clip(optimiser)
            except NotFinite as error:
                raise Diverged(
                    f"training {name}: {error} at step {step}; the last good checkpoint "
                    f"is {path if path.exists() else 'none (it happened before the first was written)'}; "
                    f"a smaller learning rate than {sizes.lr} usually helps"
                ) from error
            optimiser.step()
            if log:
                log.step(step, loss)
                if stop or time.monotonic() - saved > save_every_s:
                    _save(path, module, optimiser, step + 1, record)
                    saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Stop signals received so far, for the loop to act on after a step; a second one gets the earlier handler."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread receives signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hear(number, _):
        stop.append(number)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, hear)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def groups_of(module: nn.Module) -> list[dict]:
    """AdamW's groups of parameters: those that the module names in `optimiser_groups()`, else all as one.

    Beside AdamW's own settings a group may have a `factor` on the stage's learning rate, and the norm at which to
    `clip` its gradient.
    """
    if not hasattr(module, "optimiser_groups"):
        return [_GROUP | {"params": [p for p in module.parameters() if p.requires_grad]}]
    return [_GROUP | group for group in module.optimiser_groups()]


def _own(batch: Examples) -> Examples:
    """This process's part of a batch."""
    count, index = distributed.count(), distributed.index()
    if len(batch) < count:
        raise UserError(f"a batch of {len(batch)} is not enough for {count} processes; launch at most {len(batch)}")
    return batch if count == 1 else batch.part(index * len(batch) // count, (index + 1) * len(batch) // count)


def _backward(step: int, batch: Examples, at_once: int | None, loss_of: Callable, parameters: list) -> Loss:
    """Adds up the gradients of this process's examples, some at a time, and then of all processes.

    Returns:
        The loss of the whole batch.
    Raises:
        NotFinite: it is not, which all processes find together, whichever it came from.
    """
    total, sums, reason = 0.0, {}, None
    try:
        for piece in batch.split(at_once or len(batch)):
            loss = loss_of(step, piece.to(parameters[0].device))
            loss.total.backward()
            total = total + loss.total.detach()
            for name, value in loss.parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
    except NotFinite as error:
        total, reason = parameters[0].new_tensor(math.nan), str(error)
    total = distributed.added(total)
    if not torch.isfinite(total):
        reasons = [found for found in distributed.gathered(reason) if found]
        raise NotFinite(reasons[0] if reasons else f"the loss is {total.item()}")
    if distributed.count() > 1:
        for parameter in parameters:  # the same ones have a gradient everywhere: the step decides what is calculated
            if parameter.grad is not None:
                parameter.grad = distributed.added(parameter.grad)
    parts = distributed.added(torch.stack(list(sums.values()))) if sums else ()
    return Loss(total, dict(zip(sums, parts, strict=True)))


def _clip(optimiser: torch.optim.Optimizer) -> None:
    """Raises NotFinite rather than let a gradient spoil weights that a checkpoint may keep."""
    for group in optimiser.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], group["clip"])
        if not torch.isfinite(norm):
            raise NotFinite(f"the norm of the gradient is {norm.item()}")


class _Steps(Dataset):
    def __init__(self, batch_of: Callable[[int], Examples]):
        self.batch_of = batch_of

    def __getitem__(self, step: int) -> Examples:
        return self.batch_of(step)


def _drawn_ahead(batch_of: Callable[[int], Examples], start: int, stop: int, device: torch.device) -> DataLoader:
    """The batches in order. A GPU takes them faster than one core draws them; a CPU has no core to spare."""
    own = torch.Generator()  # the loader draws a seed; it must not touch the state that a resumed run restores
    return DataLoader(
        _Steps(batch_of),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=_workers(device),
        generator=own,
        worker_init_fn=_ignore_signals,
    )


def _workers(device: torch.device) -> int:
    cores = (os.cpu_count() or 1) // distributed.count()
    return min(8, max(0, cores - 2)) if device.type == "cuda" else 0


def _ignore_signals(_: int) -> None:
    """A signal to the whole group of processes is for the one that trains; the loader's processes end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def schedule(step: int, sizes: Training, peak_until: int = 0) -> float:
    """Share of the peak learning rate: linear warm-up, then from step `peak_until` on a cosine down to a twentieth."""
    progress = max(0, step - peak_until) / max(1, sizes.steps - peak_until)
    return min(1.0, (step + 1) / sizes.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, record: dict) -> None:
    tensors = {f"module.{name}": t.detach().contiguous() for name, t in module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": t for name, t in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    files.save_tensors(path, tensors, {"kind": "training", "step": step, "record": record})


def _resume(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, record: dict, steps: int) -> int:
    tensors, meta = files.load_tensors(path)
    found = read_as(_Resumable, meta, f"{path} is of another version (remove it to train anew)")
    if found.record != record:
        raise UserError(
            f"{path} belongs to another configuration ({_difference(found.record, record)}); delete it to train anew"
        )
    try:
        state = optimiser.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state["state"].setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict(state)
        module.load_state_dict({n.removeprefix("module."): t for n, t in tensors.items() if n.startswith("module.")})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        if not 0 <= found.step <= steps:
            raise ValueError(found.step)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the state of this training; remove it to train anew") from error
    return found.step


@dataclass(frozen=True)
class _Resumable:
    """A resumable state's header."""

    kind: Literal["training"]
    step: int
    record: dict[str, object]


def _difference(theirs: dict, ours: dict) -> str:
    keys = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    return "; ".join(f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in keys)


class _Log:
    """Lines of JSON in a file, at most a hundred, at steps that do not depend on the machine, so that runs can be
    compared. A terminal gets a progress bar; anything else gets a line of text every few seconds."""

    def __init__(self, path: Path, name: str, steps: int, start: int, every_s: float = 10.0):
        self._path = path
        with files.errors_of(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_after(path, start)
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=not sys.stderr.isatty())
        self._name, self._steps, self._start, self._every = name, steps, start, every_s
        self._began = self._said = time.monotonic()
        self._sums: dict[str, tuple[float, int]] = {}

    def step(self, step: int, loss: Loss) -> None:
        for key, value in {"loss": loss.total, **loss.parts}.items():
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value.detach().item(), count + 1)
        self._bar.update()
        done = step + 1
        if done % -(-self._steps // _LINES) and done != self._steps:
            return
        means = {key: round(total / count, 4) for key, (total, count) in self._sums.items()}
        now = time.monotonic()
        rate = (done - self._start) / (now - self._began)
        line = {"step": done, "of": self._steps, "steps_per_s": round(rate, 3), **means}
        with files.errors_of(self._path, "written"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._sums = {}
        if not self._bar.disable:
            self._bar.set_postfix(means)
        elif now - self._said > self._every or done == self._steps:
            self._said = now
            text = "  ".join(f"{k} {v:.3f}" for k, v in means.items())
            left = (self._steps - done) / rate
            print(f"{self._name} {done}/{self._steps}  {text}  {rate:.2f} steps/s  {left:.0f} s left", flush=True)

    def close(self) -> None:
        self._bar.close()
        self._file.close()


def _cut_after(path: Path, step: int) -> None:
    """Drops the log's lines of steps that a killed run had done after its last checkpoint."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that the kill cut in two
        files.write_text(path, "".join(line + "\n" for line in kept))
