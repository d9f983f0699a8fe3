"""The `prosg` command: exit codes, and messages instead of tracebacks."""

import os
import subprocess
import sys

import pytest
from tiny import TINY

from prosg_lib import cli, files
from prosg_lib.config import PROFILES
from prosg_lib.errors import Diverged, UserError
from prosg_lib.reproduction import run as reproduce
from prosg_lib.reproduction import suite_report
from prosg_lib.training import load_or_train
from prosg_lib.training.load_or_train import MemoryBudget


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in ("reproduce", "report", "evaluate", "train", "course", "site")),
        ["train", "--list"],
    ],
)
def test_help_is_there_and_needs_no_torch(arguments):
    """Help comes at once: the command's module imports nothing that is slow."""
    code = (
        "import sys\nfrom prosg_lib import cli\n"
        f"try: cli.main({arguments!r})\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: prosg" in done.stdout or "rwkv4-dialogue-token" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reprodcue"],
        ["reproduce", "--sed", "1"],
        ["reproduce", "--up"],
        ["reproduce", "--seed", "one"],
        ["reproduce", "--seed", "-1"],
        ["train", "rwkv4-dialogue", "--seed", str(2**64)],
        ["evaluate", "--model", "rwkv4-dialogue"],
        ["evaluate", "--out", "here"],
        ["evaluate", "--out", "here", "--model", "a", "--from-predictions", "b"],
        ["evaluate", "--out", "here", "--model", "a", "--items", "0"],
        ["evaluate", "--out", "here", "--model", "a", "--items", "none"],
        ["train"],
        ["train", "rwkv4-dialogue", "--list"],
        ["train", "rwkv4-dialogue", "--method", "adapter"],
        ["train", "rwkv4-dialogue", "--at-once", "0"],
        ["course"],
        ["course", "teacher", "here"],
        ["site"],
    ],
)
def test_unknown_commands_and_options_are_refused(arguments, capsys):
    """A misspelt word is no default."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: prosg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reproduce", "--profile", "smok"], "'smok'"),
        (["report", "--profile", "smok"], "'smok'"),
        (["reproduce", "--param", "steps"], "--param takes NAME=VALUE, not 'steps'"),
        (["train", "rwkv4-dialogue", "--profile", "smok"], "'smok'"),
        (["train", "everything"], "unknown recipe 'everything'; there are rwkv4-dialogue, "),
        (["train", "rwkv4-dialogue-adapter", "--recompute"], "rwkv4-dialogue-adapter needs second derivatives"),
        (["train", "rwkv4-dialogue-token", "--set", "rank=3"], "no setting 'rank'; there are size.rank, size.width"),
        (["train", "rwkv4-dialogue-token", "--set", "size.rank=x"], "size.rank=x is not a value of type int"),
        (["train", "rwkv4-dialogue-token", "--set", "size.rank"], "--set takes NAME=VALUE, not 'size.rank'"),
        (["train", "rwkv4-dialogue", *2 * ("--set", "training.lr=1")], "--set sets training.lr twice"),
        *(
            (
                ["train", "rwkv4-dialogue-token", "--set", f"{part}.{value}"],
                f"{value} is refused: it takes numbers above 0",
            )
            for part, value in [
                ("training", "lr=nan"),
                ("training", "lr=1e+39"),
                ("training", "batch=0"),
                ("training", "steps=0"),
                ("training", "warmup=-1"),
                ("size", "rank=0"),
            ]
        ),
        (["train", "rwkv4-dialogue", "--set", "size.width=0"], "width=0 is refused"),
        (
            ["train", "rwkv4-dialogue-token", "--set", "curriculum.alone=nan"],
            "alone=nan is refused: it takes 0 or more",
        ),
        (["chat", "--model", "x" * 300], "File name too long"),
        (["train", "llama-reader-pairs-maps-squad-lc", "--profile", "smoke"], "squad is not a task of smoke"),
        (["train", "llama-pairs-adapter-characters-lc", "--profile", "paper"], "paper has no model llama-pairs"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, said, capsys, monkeypatch):
    """No traceback; the thing is named, before anything is trained."""
    monkeypatch.setattr(load_or_train, "fit", None)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("prosg: ")
    assert said in error
    assert error.count("\n") == 1


def test_options_reach_the_run(monkeypatch):
    """Every option of `prosg reproduce` arrives where it is meant, and the result is the exit code."""
    seen = {}

    def fake(profile, **options):
        seen.update(options, profile=profile)
        return 1

    monkeypatch.setattr(reproduce, "reproduce", fake)
    line = "reproduce --profile gpu --seed 3 --retrain --notebook 00_a --notebook 01_b --param x=1=2 --update-expected"
    assert cli.main(line.split()) == 1
    assert seen == {
        "profile": PROFILES["gpu"],
        "seed": 3,
        "retrain": True,
        "names": ["00_a", "01_b"],
        "parameters": {"x": "1=2"},
        "update_expected": True,
    }


def test_what_is_to_be_evaluated_reaches_the_suite(monkeypatch, capsys):
    """Every option in its place, the whole command for the record, and where the results are."""
    seen = []
    monkeypatch.setattr(suite_report, "evaluate", lambda *given, **named: seen.append((*given, named)))
    command = "prosg evaluate --model a --out b --generator c --profile gpu --seed 1 2 --items 7"
    assert cli.main(command.split()[1:]) == 0
    assert cli.main(["evaluate", "--model", "a", "--out", "my folder", "--seed", "0", "0"]) == 0
    assert seen == [
        ("a", "c", PROFILES["gpu"], [1, 2], 7, "b", {"command": command}),
        (
            "a",
            None,
            PROFILES["cpu"],
            [0],
            None,
            "my folder",
            {"command": "prosg evaluate --model a --out 'my folder' --seed 0 0"},
        ),
    ]
    assert "written to my folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("No: \x1b[31m\udce9"), 2),
        (OSError(24, "Too many open files"), 2),
        (MemoryError(), 2),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, raised, code):
    """A user's mistake, a machine's limits and Ctrl-C end without a traceback; anything else is a bug and shows one."""

    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr(reproduce, "reproduce", fail)
    assert cli.main(["reproduce"]) == code
    error = capsys.readouterr().err
    assert error.startswith("prosg: ")
    assert "\x1b" not in error
    raised = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["reproduce"])


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["README.md, line 3: wrong"], 1)])
def test_check_prints_each_problem(monkeypatch, capsys, problems, code):
    """`prosg check` fails where something is wrong, and says what."""
    monkeypatch.setattr(reproduce, "check", lambda: problems)
    assert cli.main(["check"]) == code
    assert capsys.readouterr().out.splitlines()[:-1] == problems


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rwkv4-dialogue-token", ("rwkv4-dialogue-token", PROFILES["cpu"], 0, False, {}, MemoryBudget())),
        ("rwkv4-dialogue --profile gpu --seed 3", ("rwkv4-dialogue", PROFILES["gpu"], 3, False, {}, MemoryBudget())),
        (
            "rwkv4-dialogue-final --profile smoke --retrain --set size.rank=8 --set training.steps=3 "
            "--at-once 4 --recompute",
            (
                "rwkv4-dialogue-final",
                PROFILES["smoke"],
                0,
                True,
                {"size.rank": "8", "training.steps": "3"},
                MemoryBudget(4, True),
            ),
        ),
    ],
)
def test_what_is_to_be_trained_reaches_the_training(monkeypatch, line, expected):
    """Every option in its place; --retrain trains anew what is named."""
    seen = []
    monkeypatch.setattr(load_or_train, "load_or_train", lambda *given, **named: seen.append((given, named)))
    assert cli.main(["train", *line.split()]) == 0
    *given, memory = expected
    assert seen == [(tuple(given), {"memory": memory, "anew": "--retrain" in line})]


def test_a_generator_is_trained_and_then_loaded(monkeypatch, tmp_path, capsys, small_world):
    """The whole of it at tiny size: the dialogues' model, the one of pairs, the generator, each in one line."""
    line = "rwkv4-pairs-token-characters-lc --profile tiny --at-once 1 --recompute --set training.steps=1"
    with small_world(TINY, tmp_path):
        for verb in ("training, ", "loaded, "):
            assert cli.main(["train", *line.split()]) == 0
            said = capsys.readouterr().out
            for name in ("rwkv4-pairs-tiny", "rwkv4-pairs-token-characters-lc-steps1-tiny"):
                assert f"{name}: {verb}" in said
    path = tmp_path / "tiny" / "checkpoints" / "rwkv4-pairs-token-characters-lc-steps1-tiny.safetensors"
    assert files.load_tensors(path)[1]["record"]["training"]["steps"] == 1


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_says_what_all_found(monkeypatch, capsys, rank, lines):
    """A loss that diverged; all end with the same exit code."""

    def fail(*given, **named):
        raise Diverged("training rwkv4-dialogue: the loss is nan")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(load_or_train, "load_or_train", fail)
    assert cli.main(["train", "rwkv4-dialogue"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize(
    ("shell", "code", "shown"),
    [
        ("train --list | true", 141, ""),
        ("train --list > /dev/full", 2, "prosg: the output, or a file: No space left on device"),
        ("train --list >&-", 0, ""),
        ("train nothing 2>&-", 2, ""),
        ("chat <&-", 0, "Goodbye."),
        ("train nöthing", 2, "unknown recipe 'n"),
    ],
)
def test_any_terminal(shell, code, shown):
    """Output that nobody reads, that is full, closed or of another alphabet; input that is closed."""
    command = f"set -o pipefail; {sys.executable} -m prosg_lib.cli {shell}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
