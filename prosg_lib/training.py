"""The one training loop, and the objectives: first the language model, then a generator on the frozen model."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.lowrank import applied
from prosg_lib.profiles import Training
from prosg_lib.tasks.dialogue import ANSWER, COMPETING, TEXT, Batch, Dialogues, Shape, collate

RECIPE = 1
"""Goes up when the same sizes, seed and data would train to something else; checkpoints of another recipe do not load."""

SAVE_EVERY_S = 60.0
_CLIP = 1.0


class Diverged(UserError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Loss:
    """A step's loss, (), and what the log should say of it."""

    total: Tensor
    parts: dict[str, Tensor]


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Loss],
    sizes: Training,
    folder: Path,
    record: dict,
    save_every_s: float = SAVE_EVERY_S,
) -> None:
    """Train `module` in place; safe to kill at any moment and to call again.

    The step number alone decides a step's data, so that a run continued from a checkpoint (weights, optimiser, random
    state, step) ends with the weights of one that was never stopped, bit for bit on the same machine and threads.

    Args:
        loss_of: step -> Loss; draws its data from the step number.
        folder: `<name>.checkpoint.safetensors` is kept here while training, `<name>.jsonl` logs every line.
        record: what was trained on which data; a checkpoint with another record is not continued.
    Raises:
        Diverged: the loss is not finite; the last good checkpoint stays.
        UserError: the checkpoint in `folder` belongs to another configuration, or is damaged.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=sizes.lr, betas=(0.9, 0.99), weight_decay=0.01)
    path = folder / f"{name}.checkpoint.safetensors"
    start = _resume(path, module, optimiser, record) if path.exists() else 0
    log, saved = _Log(folder / f"{name}.jsonl", name, sizes.steps, start), time.monotonic()
    for step in range(start, sizes.steps):
        for group in optimiser.param_groups:
            group["lr"] = sizes.lr * schedule(step, sizes)
        loss = loss_of(step)
        if not torch.isfinite(loss.total):
            log.close()
            raise Diverged(
                f"training {name}: the loss is {loss.total.item()} at step {step}; the last good checkpoint "
                f"is {path if path.exists() else 'none (it happened before the first was written)'}; "
                f"a smaller learning rate than {sizes.lr} usually helps"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        log.step(step, loss)
        if time.monotonic() - saved > save_every_s:
            _save(path, module, optimiser, step + 1, record)
            saved = time.monotonic()
    log.close()


def schedule(step: int, sizes: Training) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to a twentieth."""
    progress = step / max(1, sizes.steps)
    return min(1.0, (step + 1) / sizes.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, record: dict) -> None:
    tensors = {f"module.{name}": t.detach().contiguous() for name, t in module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": t for name, t in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    files.save_tensors(path, tensors, {"kind": "training", "step": step, "record": record})


def _resume(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, record: dict) -> int:
    tensors, meta = files.load_tensors(path)
    if meta.get("record") != record:
        raise UserError(
            f"{path} belongs to another configuration ({_difference(meta.get('record', {}), record)}); "
            "delete it to train anew"
        )
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
    return meta["step"]


def _difference(theirs: dict, ours: dict) -> str:
    keys = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
    return "; ".join(f"{k}: {theirs.get(k)} there, {ours.get(k)} here" for k in keys)


class _Log:
    """A progress bar on a terminal, a line every few seconds elsewhere, and every line as JSON in a file."""

    def __init__(self, path: Path, name: str, steps: int, start: int, every_s: float = 10.0):
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
        now = time.monotonic()
        if now - self._said > self._every or step + 1 == self._steps:
            means = {key: round(total / count, 4) for key, (total, count) in self._sums.items()}
            rate = (step + 1 - self._start) / (now - self._began)
            line = {"step": step + 1, "of": self._steps, "steps_per_s": round(rate, 3), **means}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._sums, self._said = {}, now
            if self._bar.disable:
                left = (self._steps - step - 1) / rate
                text = "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                print(
                    f"{self._name} {step + 1}/{self._steps}  {text}  {rate:.2f} steps/s  {left:.0f} s left", flush=True
                )
            else:
                self._bar.set_postfix(means)

    def close(self) -> None:
        self._bar.close()
        self._file.close()


def _cut_after(path: Path, step: int) -> None:
    """Drops the log's lines of steps that a killed run had done after its last checkpoint."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line that the kill cut in two
        files.write_text(path, "".join(line + "\n" for line in kept))


# --- objectives ---------------------------------------------------------------------------------------------------


def draw(
    data: Dialogues, sizes: Training, step: int, device, *, distance: int | None = None, at_most: int = 24
) -> Batch:
    """The step's batch: number of facts (`at_most` so many) and distance drawn once for the whole batch."""
    rng = random.Random(f"{data.seed}/{step}")
    facts = min(rng.choice(sizes.facts), at_most)
    far = rng.choice(sizes.distances) if distance is None else distance
    shape = Shape(facts, far, min(facts, 6), instructions=rng.choice((0, 1, 1, 2)))
    return collate(data, data.items(sizes.batch, shape, start=step * sizes.batch)).to(device)


def token_losses(lm, hidden: Tensor, targets: Tensor, kind: Tensor, share: float, seed: int) -> dict[int, Tensor]:
    """Mean cross-entropy by kind of target token, in nats.

    Of the ordinary text only a random share is read out: an unbiased mean for a fraction of the softmax.

    Args:
        hidden: (B, T, D); targets: (B, T), the next tokens; kind: (B, T), of the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    lottery = torch.rand(kind.shape, generator=generator).to(kind.device) < share
    chosen = (kind >= ANSWER) | ((kind == TEXT) & lottery)
    losses = F.cross_entropy(lm.read_out(hidden[chosen]).float(), targets[chosen], reduction="none")
    return {k: losses[kind[chosen] == k].mean() for k in (TEXT, ANSWER, COMPETING) if (kind[chosen] == k).any()}


NAMES = {TEXT: "text", ANSWER: "answer", COMPETING: "competing"}


EASY = 0.35
"""Share of the language model's training with few facts and questions right behind them: recall is learned there."""


def lm_objective(lm, data: Dialogues, sizes: Training, autocast: bool = False) -> Callable[[int], Loss]:
    """Next-token loss over whole dialogues; the words of answers count more than all the text around them."""

    def loss_of(step: int) -> Loss:
        easy = step < EASY * sizes.steps
        device = next(lm.parameters()).device
        batch = draw(data, sizes, step, device, **({"distance": 0, "at_most": 4} if easy else {}))
        ids = torch.cat([batch.prompt, batch.rest], 1)
        kind = torch.cat([batch.prompt_valid.long() * TEXT, batch.kind], 1)
        valid = torch.cat([batch.prompt_valid, torch.ones_like(batch.rest, dtype=torch.bool)], 1)
        with _autocast(ids.device, autocast):
            hidden, _ = lm.step_through(ids[:, :-1], None, valid[:, :-1])
            losses = token_losses(lm, hidden, ids[:, 1:], kind[:, 1:], 0.3, step)
        weights = {TEXT: 0.3, ANSWER: 1.0, COMPETING: 0.5}
        total = sum(weights[k] * v for k, v in losses.items())
        return Loss(total, {NAMES[k]: v for k, v in losses.items()})

    return loss_of


ALONE = 0.4
"""Share of a generator's training in which it works alone: blank state, questions right behind the prompt.

With the state always carried over, the model answers from it at short distances and the change is never needed."""

_BLANK_LATER = 0.3  # share of later steps that still start from a blank state


def generator_objective(
    lm, generator, data: Dialogues, sizes: Training, autocast: bool = False
) -> Callable[[int], Loss]:
    """End to end (V1): loss of the answers, given the change of the weights; the model itself stays frozen.

    First the change alone, then distances and carried states are mixed, with the loss of competing answers and of the
    text as the locality term: what the model could do without the change, it shall still do.
    """

    def loss_of(step: int) -> Loss:
        alone = step < ALONE * sizes.steps
        batch = draw(data, sizes, step, next(lm.parameters()).device, distance=0 if alone else None)
        blank = alone or random.Random(f"blank/{data.seed}/{step}").random() < _BLANK_LATER
        with _autocast(batch.rest.device, autocast):
            delta, state = generator(lm, batch.prompt, batch.prompt_valid)
            with applied(lm, delta):
                hidden, _ = lm.step_through(batch.rest[:, :-1], None if blank else state)
            losses = token_losses(lm, hidden, batch.rest[:, 1:], batch.kind[:, 1:], 0.3, step)
        weights = {ANSWER: 1.0} if alone else {TEXT: 0.5, ANSWER: 1.0, COMPETING: 1.0}
        total = sum(weight * losses[k] for k, weight in weights.items() if k in losses)
        return Loss(total, {NAMES[k]: v for k, v in losses.items()})

    return loss_of


def _autocast(device: torch.device, wanted: bool):
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)
