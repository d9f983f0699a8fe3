"""The training loop: killed and started again it ends with the same bits; it refuses what it should, and says why."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from prosg_lib import files
from prosg_lib.config.sizes import Training
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.tasks.dialogue import DialogueBatch
from prosg_lib.training import loop as training
from prosg_lib.training.loop import Diverged, Loss, fit, schedule

SIZES = Training(steps=16, batch=4, lr=1e-2, facts=(1,), distances=(0,), warmup=5)
RECORD = {"stage": "test", "seed": 0}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A kill needs no sync, only a power cut does; on a busy disk each costs a tenth of a second."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))


def batch_of(step):
    """A step's data is a function of its number alone, as the data set's is."""
    ids = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(step))
    return DialogueBatch(ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.ones_like(ids))


def loss_of(net):
    """Has dropout in it, so that a lost random state would show."""

    def loss(step, batch):
        scores = net(nn.functional.one_hot(batch.rest, 6).float())
        return Loss(scores.square().mean() + (scores.mean() - 1).square(), {"text": scores.mean()})

    return loss


def train(folder, net=None, loss=None, record=RECORD, sizes=SIZES, save_every_s=0.0):
    """All of it, with a checkpoint every step; returns the final weights."""
    net = module() if net is None else net
    fit("net", net, batch_of, loss or loss_of(net), sizes, folder, record, save_every_s)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def disturbed(folder, at, what, **given):
    """A training in which `what` (loss -> loss) happens to one step's loss, after its random numbers were drawn."""
    net = module()
    inner = loss_of(net)

    def loss(step, batch):
        found = inner(step, batch)
        return what(found) if step == at else found

    return train(folder, net, loss, **given)


def halt(loss):
    raise KeyboardInterrupt


def bits(weights):
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def log_of(folder):
    return [json.loads(line) for line in (folder / "net.jsonl").read_text().splitlines()]


def test_one_process_is_a_plain_loop(tmp_path):
    """To the last bit: AdamW, the learning rate of the step, gradients clipped, and nothing else."""
    net = module()
    optimiser = torch.optim.AdamW(net.parameters(), lr=SIZES.lr, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(SIZES.steps):
        optimiser.param_groups[0]["lr"] = SIZES.lr * schedule(step, SIZES)
        optimiser.zero_grad()
        loss_of(net)(step, batch_of(step)).total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    assert bits(train(tmp_path)) == bits(net.state_dict())


class TwoPaces(nn.Sequential):
    """Biases apart: faster, neither clipped nor decayed."""

    def optimiser_groups(self):
        weights, biases = (list(filter(lambda p: (p.ndim == 1) == flat, self.parameters())) for flat in (False, True))
        return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "factor": 3.0, "clip": math.inf}]


def test_a_module_may_say_how_its_parameters_are_trained(tmp_path):
    """Two optimisers of a plain loop, to the last bit; the gradients are such that clipping matters. Stopped and
    continued it ends the same."""

    def steep(net):
        inner = loss_of(net)
        return lambda step, batch: Loss(100 * inner(step, batch).total, {})

    def stopping(step, batch):
        if step == 9:
            raise KeyboardInterrupt
        return steep(halted)(step, batch)

    halted, net = TwoPaces(*module()), TwoPaces(*module())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halted", halted, stopping)
    found = [train(tmp_path / name, new, steep(new)) for name in ("whole", "halted") for new in [TwoPaces(*module())]]
    weights, biases = net.optimiser_groups()
    torch.manual_seed(0)
    module()
    slow, fast = (
        torch.optim.AdamW(group["params"], betas=(0.9, 0.99), weight_decay=decay)
        for group, decay in ((weights, 0.01), (biases, 0.0))
    )
    for step in range(SIZES.steps):
        steep(net)(step, batch_of(step)).total.backward()
        norm = nn.utils.clip_grad_norm_(weights["params"], 1.0)
        assert norm > 1
        for optimiser, factor in ((slow, 1.0), (fast, 3.0)):
            optimiser.param_groups[0]["lr"] = factor * (SIZES.lr * schedule(step, SIZES))
            optimiser.step()
            optimiser.zero_grad()
    assert bits(found[0]) == bits(found[1]) == bits(net.state_dict())


@pytest.mark.parametrize("at_once", [1, 3, 4, 9])
def test_a_batch_in_pieces_is_one_step(tmp_path, at_once):
    """So many examples at most are in memory; gradients, and the losses in the log, are summed over the pieces."""
    sizes = []

    def loss(net):
        def loss_of(step, batch):
            sizes.append(len(batch))
            scores = net(nn.functional.one_hot(batch.rest, 6).float())
            return Loss(scores.square().sum() / len(batch.whole), {"text": scores.sum() / len(batch.whole)})

        return loss_of

    weights = {}
    for pieces in (None, at_once):
        net = module().eval()
        folder = tmp_path / str(pieces)
        sizes.clear()
        fit("net", net, batch_of, loss(net), SIZES, folder, RECORD, at_once=pieces)
        weights[pieces] = net.state_dict()
    assert sizes[: -(-4 // at_once)] == [min(at_once, 4 - at) for at in range(0, 4, at_once)]
    torch.testing.assert_close(weights[at_once], weights[None], rtol=1e-5, atol=1e-6)
    for one, other in zip(log_of(tmp_path / "None"), log_of(tmp_path / str(at_once)), strict=True):
        assert [one[key] for key in ("loss", "text")] == pytest.approx([other["loss"], other["text"]], abs=2e-4)


# Runs in a process of its own; every step takes a little while, so that the kill comes in the middle of it.
RUN = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_loop as t
from prosg_lib import files
t.torch.set_num_threads(1)
net = t.module()
inner = t.loss_of(net)
def slow(step, batch):
    time.sleep(0.05)
    return inner(step, batch)
folder = Path(sys.argv[1])
files.save_tensors(folder / "end.safetensors", t.train(folder, net, slow), {{}})
"""


def test_killed_and_started_again_ends_with_the_same_bits(tmp_path):
    """SIGKILL at a random moment, then again: weights, log and number of steps are those of a run never stopped."""
    expected = bits(train(tmp_path / "whole"))
    script = RUN.format(tests=str(Path(__file__).parent))
    folder = tmp_path / "killed"
    checkpoint, end = folder / "net.checkpoint.safetensors", folder / "end.safetensors"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not end.exists()
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    assert bits(files.load_tensors(end)[0]) == expected
    steps = [line["step"] for line in log_of(folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] == SIZES.steps


def test_stopped_after_any_step(tmp_path):
    """The step that failed is done again from its start: its random numbers, its data, its learning rate."""
    expected = bits(train(tmp_path / "whole"))
    for stop in (1, 9, SIZES.steps - 1):
        with pytest.raises(KeyboardInterrupt):
            disturbed(tmp_path / str(stop), stop, halt)
        torch.manual_seed(99)  # whatever happens in between
        assert bits(train(tmp_path / str(stop))) == expected


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 2)])
def test_told_to_end_it_ends_its_step_and_keeps_it(tmp_path, monkeypatch, number, workers):
    """However long ago the last checkpoint was; the handlers that were there before are there again. The workers that
    draw ahead do not hear it when the whole group is told, as `timeout` and a terminal do: else they would be gone
    before the step that they drew is kept."""
    monkeypatch.setattr(training, "_workers", lambda device: workers)
    expected, before = bits(train(tmp_path / "whole")), signal.getsignal(number)

    def tell(loss):
        children = psutil.Process().children() if workers else ()
        for child in children:
            child.send_signal(number)
        time.sleep(0.2 if workers else 0)
        os.kill(os.getpid(), number)
        return loss

    with pytest.raises(KeyboardInterrupt):
        disturbed(tmp_path / "told", 9, tell, save_every_s=1e6)
    assert signal.getsignal(number) is before
    assert files.load_tensors(tmp_path / "told" / "net.checkpoint.safetensors")[1]["step"] == 10
    assert bits(train(tmp_path / "told")) == expected


@pytest.fixture
def heard():
    """Ctrl-C as at a terminal, whoever started the tests: a shell's background jobs are born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_told_to_end_twice_it_ends_at_once(tmp_path, heard):
    def stuck(loss):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        disturbed(tmp_path, 0, stuck)


def test_log_of_a_killed_run_goes_on(tmp_path):
    """Lines of steps that are done again, and a line that the kill cut in two, are dropped; the rest stays."""
    with pytest.raises(KeyboardInterrupt):
        disturbed(tmp_path, 9, halt)
    early = log_of(tmp_path)[:5]
    with (tmp_path / "net.jsonl").open("a") as log:
        log.write(json.dumps({"step": 11, "loss": 1.0}) + '\n7\n[]\n{"step": "x"}\n{"step": 12, "lo')
    train(tmp_path)
    lines = log_of(tmp_path)
    assert lines[:5] == early
    assert [line["step"] for line in lines] == list(range(1, SIZES.steps + 1))
    assert {"step", "of", "steps_per_s", "loss", "text"} == lines[-1].keys()


def context_diverges(loss):
    """As the inner loss of a gradient step does."""
    raise NotFinite("the loss of the context is inf before the step")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda loss: Loss(loss.total * math.nan, loss.parts), "the loss is nan"),
        (lambda loss: Loss(loss.total * math.inf, loss.parts), "the loss is inf"),
        (context_diverges, "the loss of the context is inf before the step"),
        (lambda loss: Loss(loss.total + (loss.total * 0).sqrt(), loss.parts), "the norm of the gradient is nan"),
    ],
)
def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path, what, message):
    """The error names the step, the loss and the checkpoint, which holds the weights of the steps before."""
    kept = tmp_path / "net.checkpoint.safetensors"
    with pytest.raises(Diverged, match=rf"training net: {message} at step 7;.*{re.escape(str(kept))}"):
        disturbed(tmp_path, 7, what)
    tensors, meta = files.load_tensors(kept)
    assert meta["step"] == 7
    assert all(torch.isfinite(t).all() for name, t in tensors.items() if name.startswith("module."))
    assert bits(train(tmp_path)) == bits(train(tmp_path / "whole"))  # with the fault gone, it goes on from there


def test_divergence_before_the_first_checkpoint_says_so(tmp_path):
    """No checkpoint is named that is not there."""
    with pytest.raises(Diverged, match="before the first was written"):
        disturbed(tmp_path, 0, context_diverges)
    assert not (tmp_path / "net.checkpoint.safetensors").exists()


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    """What differs is named, and the file is left alone."""
    train(tmp_path)
    before = (tmp_path / "net.checkpoint.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"seed: 0 there, 1 here\); delete it to train anew"):
        train(tmp_path, record=RECORD | {"seed": 1})
    assert (tmp_path / "net.checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, meta: None, "cut short"),
        (lambda tensors, meta: (tensors, meta | {"step": "3"}), "step should be a whole number"),
        (lambda tensors, meta: (tensors, meta | {"record": None}), "record should be an object"),
        (lambda tensors, meta: (tensors, meta | {"step": 99}), "not the state of this training"),
        (lambda tensors, meta: ({n: t for n, t in tensors.items() if "module" in n}, meta), "not the state of this"),
        (lambda tensors, meta: ({n: t.flatten()[:1] for n, t in tensors.items()}, meta), "not the state of this"),
        (lambda tensors, meta: (tensors | {"optimiser.x": tensors["random.cpu"]}, meta), "not the state of this"),
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, change, message):
    """It is named with the remedy, which works; neither it nor the log is touched before."""
    expected, path = bits(train(tmp_path)), tmp_path / "net.checkpoint.safetensors"
    if new := change(*files.load_tensors(path)):
        files.save_tensors(path, *new)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes(), log_of(tmp_path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .*{message}.*remove it|remove it.*{message}"):
        train(tmp_path)
    assert before == (path.read_bytes(), log_of(tmp_path))
    path.unlink()
    assert bits(train(tmp_path)) == expected


def test_schedule_rises_then_falls_to_a_twentieth():
    """A linear warm-up to the peak, then a cosine."""
    rates = [schedule(step, SIZES) for step in range(SIZES.steps + 1)]
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(1 / SIZES.warmup, rel=0.01)
    assert peak == SIZES.warmup - 1
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_first_steps_may_be_held_at_the_peak():
    """After the warm-up, and then the whole cosine in the steps that are left."""
    rates = [schedule(step, SIZES, peak_until=9) for step in range(SIZES.steps + 1)]
    left = replace(SIZES, steps=SIZES.steps - 9, warmup=1)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:9] == [1.0] * 4
    assert rates[9:] == [schedule(step, left) for step in range(left.steps + 1)]


def test_log_has_the_same_lines_on_every_machine(tmp_path):
    """At most a hundred, evenly spread, and one of the last step, whatever time they take; each is the mean since the
    one before."""
    net = module()
    inner, seen = loss_of(net), []

    def keeping(step, batch):
        loss = inner(step, batch)
        seen.append(loss.total.item())
        return loss

    train(tmp_path, net, keeping, sizes=replace(SIZES, steps=250))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [*range(3, 250, 3), 250]
    assert lines[60]["loss"] == pytest.approx(sum(seen[180:183]) / 3, abs=1e-4)


def test_progress_where_there_is_no_terminal(tmp_path, capsys):
    """Lines with the step, the losses, the rate and the time left."""
    train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"net 16/16  loss \d+\.\d{3}  text -?\d+\.\d{3}  \d+\.\d\d steps/s  0 s left", lines[-1])


def test_weights_without_gradient_stay(tmp_path):
    """Only parameters that ask for a gradient are trained."""
    net = module()
    net[0].requires_grad_(False)
    before = bits(net[0].state_dict())
    train(tmp_path, net, loss_of(net))
    assert bits(net[0].state_dict()) == before
