"""Two processes, as `accelerate launch` starts them, do what one does: the same weights, the same measurements."""

import json
import os
import re
import subprocess
import sys

import launched
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from prosg_lib import files, paths

SAME = {"rtol": 0.0, "atol": 1e-5}
"""Sums are taken in another order, and a training of 20 steps makes more of the difference."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes left, their output, and where the first part of the stopped training was done by one."""
    folder = tmp_path_factory.mktemp("both")
    launched.stopped("lm", folder / "stopped", launched.STOPS[0])
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    launch = [f"--{name}={value}" for name, value in (options | {"main_process_port": 0}).items()]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *launch]
    process = subprocess.Popen(
        [*launcher, launched.__file__, str(folder)],
        env=os.environ | {"PYTHONPATH": str(paths.repo_root()), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, error = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends the others
        out, error = process.communicate()
        pytest.fail(f"the processes did not end:\n{out[-2000:]}\n{error[-4000:]}")
    assert all((folder / f"process-{i}" / "done.json").exists() for i in (0, 1)), error[-4000:]
    return folder, out, error, process.returncode


def weights(both, process: int, name: str):
    return files.load_tensors(both[0] / f"process-{process}" / f"{name}.safetensors")[0]


def said(both, process: int):
    return json.loads((both[0] / f"process-{process}" / "done.json").read_text())


@pytest.mark.parametrize("name", launched.trainings())
def test_two_processes_train_as_one(both, tmp_path, name):
    """After 20 steps on batches of five, some of them in pieces: the weights are those of one process that has all of
    the batch at once, and both processes have the same bits. In the log the losses are the whole batch's."""
    found = weights(both, 0, name)
    assert all(torch.equal(t, found[key]) for key, t in weights(both, 1, name).items())
    before = {key: t.clone() for key, t in launched.trainings()[name][0].state_dict().items()}
    expected = launched.trained(name, tmp_path)
    assert_close(found, dict(expected), **SAME)
    assert max((t - before[key]).abs().max() for key, t in expected.items()) > 0.01
    ours, theirs = ([json.loads(line) for line in (f / f"{name}.jsonl").open()] for f in (tmp_path, both[0] / "whole"))
    assert len(ours) == len(theirs) == launched.SIZES.steps
    for mine, other in zip(ours, theirs, strict=True):
        del mine["steps_per_s"], other["steps_per_s"]
        assert mine == pytest.approx(other, abs=2e-4)


def test_processes_draw_other_random_numbers(both, tmp_path):
    """The first one those of a single process, the second one others at each step, so that dropout is not the same."""
    first, second = (said(both, process)["lots"] for process in (0, 1))
    assert first == launched.lots(tmp_path)
    assert len({*first, *second}) == 2 * launched.SIZES.steps


def test_a_training_goes_on_with_another_number_of_processes(both, tmp_path):
    """One process does 7 steps, two go on to 14, one ends it."""
    resumed = files.load_tensors(both[0] / "stopped" / "lm.checkpoint.safetensors")
    assert resumed[1]["step"] == launched.STOPS[1]
    assert_close(launched.trained("lm", both[0] / "stopped"), launched.trained("lm", tmp_path), **SAME)
    steps = [json.loads(line)["step"] for line in (both[0] / "stopped" / "lm.jsonl").open()]
    assert steps == list(range(1, launched.SIZES.steps + 1))


@pytest.mark.parametrize(
    ("kind", "what"), [("returned", "the loss is nan"), ("raised", "the loss of the context is inf before the step")]
)
def test_a_loss_that_diverges_in_one_process_stops_both(both, kind, what):
    """At the same step, with the same words and the checkpoint of the steps before."""
    messages = [said(both, process)["errors"][kind] for process in (0, 1)]
    path = both[0] / kind / "lm.checkpoint.safetensors"
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"training lm: {what} at step 3; the last good checkpoint is {path};")
    assert files.load_tensors(path)[1]["step"] == 3


def test_more_processes_than_examples_are_refused(both):
    """By all of them."""
    for process in (0, 1):
        assert said(both, process)["errors"]["refused"] == (
            "a batch of 1 is not enough for 2 processes; launch at most 1"
        )


def test_both_train_and_then_both_load(both):
    """One file a stage is written; every line is said once; both have the same weights, which one process has, too."""
    out = both[1]
    for stage in ("rwkv4-dialogue-tiny", "rwkv4-dialogue-token-tiny"):
        assert len(re.findall(rf"^{stage}: training, .* 3 steps of 5 on 2 processes, ", out, re.MULTILINE)) == 1
        assert len(re.findall(rf"^{stage}: loaded, ", out, re.MULTILINE)) == 1
    kept = both[0] / "runs" / "tiny" / "checkpoints"
    assert {path.name for path in kept.iterdir() if path.suffix != ".lock"} == {
        f"rwkv4-dialogue{kind}-tiny.{ending}" for kind in ("", "-token") for ending in ("safetensors", "jsonl")
    }
    first = weights(both, 0, "first")
    for process, name in ((0, "again"), (1, "first"), (1, "again")):
        assert all(torch.equal(t, first[key]) for key, t in weights(both, process, name).items())


def test_a_failing_command_says_so_once(both):
    """Exit code 2 in both processes, a failure of the launcher, one message."""
    _, _, error, code = both
    assert [said(both, process)["code"] for process in (0, 1)] == [2, 2]
    assert code != 0
    assert error.count("prosg: training rwkv4-dialogue-broken: ") == 1


def test_two_processes_measure_as_one(both):
    """Every number, in the same order, in both processes."""
    for name, expected in zip(("recall", "pairs"), launched.measured(), strict=True):
        for process in (0, 1):
            found = pd.read_csv(both[0] / f"process-{process}" / f"{name}.csv", index_col=0)
            pd.testing.assert_frame_equal(found, expected)
