"""The `prosg` command: exit codes, and messages instead of tracebacks."""

import subprocess
import sys
from dataclasses import replace

import pytest

from prosg_lib import cli, files
from prosg_lib.config import profiles
from prosg_lib.config.profiles import PROFILES
from prosg_lib.config.sizes import PairTraining
from prosg_lib.errors import Diverged, UserError
from prosg_lib.reproduction import run as reproduce
from prosg_lib.reproduction import suite_report
from prosg_lib.training import ablations, pair_stages, stages
from prosg_lib.training.ablations import Ablation
from prosg_lib.training.pair_stages import WaySpec
from prosg_lib.training.stages import PLENTY, Thrift


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [*name.split(), "--help"]
            for name in ("reproduce", "report", "evaluate", "train", "train way", "train ablation")
        ),
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
    assert "usage: prosg" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reprodcue"],
        ["reproduce", "--sed", "1"],
        ["reproduce", "--seed", "one"],
        ["evaluate", "--model", "rwkv4-dialogue"],
        ["evaluate", "--out", "here"],
        ["evaluate", "--out", "here", "--model", "a", "--from-predictions", "b"],
        ["evaluate", "--out", "here", "--model", "a", "--suite", "riddles"],
        ["evaluate", "--out", "here", "--model", "a", "--items", "none"],
        ["train", "everything"],
        ["train", "lm", "--method", "adapter"],
        ["train", "lm", "--at-once", "0"],
        ["train", "ablation", "--set", "rank=3"],
        ["train", "way", "--task", "characters"],
        ["train", "way", "--method", "adapter", "--task", "characters", "--objective", "LX"],
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
        (["train", "token", "--profile", "smok"], "'smok'"),
        (["train", "adapter", "--recompute"], "adapter needs second derivatives"),
        (["train", "pairs-transformer", "--profile", "smok"], "'smok'"),
        (["train", "ablation", "--stage", "token", "--set", "size=3"], "'size=3' is no NAME=VALUE"),
        (["train", "ablation", "--stage", "lm", "--set", "rank=3"], "unknown stage 'lm'"),
        (["train", "way", "--method", "magic", "--task", "characters"], "unknown method 'magic'"),
        (["train", "way", "--method", "weights-x", "--task", "characters"], "unknown method 'weights-x'"),
        (["train", "way", "--method", "adapter", "--task", "riddles"], "unknown task 'riddles'"),
        (["train", "way", "--method", "adapter", "--task", "squad", "--profile", "smoke"], "squad is no task of smoke"),
        (["train", "way", "--method", "token", "--task", "reversal", "--after", "riddles"], "unknown task 'riddles'"),
        (["train", "way", "--method", "weights", "--task", "reversal", "--recompute"], "weights needs second"),
        (["train", "way", "--method", "adapter", "--task", "reversal", "--backbone", "./nowhere"], "./nowhere could"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, said, capsys, monkeypatch):
    """No traceback; the thing is named, before anything is trained."""
    monkeypatch.setattr(stages, "fit", None)
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
    assert cli.main(["evaluate", "--model", "a", "--out", "my folder"]) == 0
    assert seen == [
        ("a", "c", PROFILES["gpu"], [1, 2], 7, "b", {"command": command}),
        ("a", None, PROFILES["cpu"], [0], None, "my folder", {"command": "prosg evaluate --model a --out 'my folder'"}),
    ]
    assert "written to my folder" in capsys.readouterr().out


@pytest.mark.parametrize(("raised", "code"), [(UserError("No."), 2), (KeyboardInterrupt(), 130)])
def test_errors_become_exit_codes(monkeypatch, capsys, raised, code):
    """A user's mistake and Ctrl-C end without a traceback; anything else is a bug and shows one."""

    def fail(*arguments, **options):
        raise raised

    monkeypatch.setattr(reproduce, "reproduce", fail)
    assert cli.main(["reproduce"]) == code
    assert capsys.readouterr().err.startswith("prosg: ")
    raised = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["reproduce"])


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["README.md, line 3: wrong"], 1)])
def test_check_prints_each_problem(monkeypatch, capsys, problems, code):
    """`prosg check` fails where something is wrong, and says what."""
    monkeypatch.setattr(reproduce, "check", lambda: problems)
    assert cli.main(["check"]) == code
    assert capsys.readouterr().out.splitlines()[:-1] == problems


SPEC = WaySpec("weights-4", ("characters", "reversal"), "LG", 2, ("reversal",))
WAY = "way --method weights-4 --task characters --task reversal --objective LG --contexts 2 --after reversal"


@pytest.mark.parametrize(
    ("line", "module", "function", "arguments"),
    [
        ("token", stages, "load_or_train", ("token", PROFILES["cpu"], 0, False, PLENTY)),
        ("lm --profile gpu --seed 3 --retrain", stages, "load_or_train", ("lm", PROFILES["gpu"], 3, True, PLENTY)),
        (
            "final --at-once 4 --recompute",
            stages,
            "load_or_train",
            ("final", PROFILES["cpu"], 0, False, Thrift(4, True)),
        ),
        ("mend", stages, "load_or_train", ("mend", PROFILES["cpu"], 0, False, PLENTY)),
        (
            "ablation --stage token --set rank=8 --set layers=0,1 --seed 2",
            ablations,
            "ablated",
            (Ablation("token", rank=8, layers=(0, 1)), PROFILES["cpu"], 2, False, PLENTY),
        ),
        (
            "pairs-recurrent --profile smoke",
            pair_stages,
            "pair_model",
            ("recurrent", PROFILES["smoke"], 0, False, PLENTY),
        ),
        ("pairs-transformer --seed 2", pair_stages, "pair_model", ("transformer", PROFILES["cpu"], 2, False, PLENTY)),
        (
            f"{WAY} --backbone transformer",
            pair_stages,
            "pair_way",
            (SPEC, "transformer", PROFILES["cpu"], 0, False, PLENTY),
        ),
        (
            "way --method token --task characters",
            pair_stages,
            "pair_way",
            (WaySpec("token", ("characters",)), "recurrent", PROFILES["cpu"], 0, False, PLENTY),
        ),
    ],
)
def test_what_is_to_be_trained_reaches_the_training(monkeypatch, tmp_path, line, module, function, arguments):
    """Each kind by its own function, with every option in its place."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    seen = []
    monkeypatch.setattr(module, function, lambda *given: seen.append(given))
    assert cli.main(["train", *line.split()]) == 0
    assert seen == [arguments]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("lm", "rwkv4-dialogue-smoke"),
        ("final", "rwkv4-dialogue-final-smoke"),
        ("ablation --stage token --set rank=8", "rwkv4-dialogue-token-rank8-smoke"),
        ("pairs-transformer", "llama-pairs-smoke"),
        (WAY, "rwkv4-pairs-weights-4-characters-reversal-after-reversal-lg-2-smoke"),
    ],
)
def test_retraining_forgets_what_is_named_and_nothing_else(monkeypatch, tmp_path, what, name):
    """Nor the checkpoint of a training that was interrupted."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    trained = {"load_or_train": stages, "pair_model": pair_stages, "pair_way": pair_stages, "ablated": ablations}
    for function, module in trained.items():
        monkeypatch.setattr(module, function, lambda *given: None)
    folder = tmp_path / "smoke" / "checkpoints"
    folder.mkdir(parents=True)
    others = {"llama-pairs-adapter-reversal-lc-smoke.safetensors", f"{name}.checkpoint.safetensors", f"{name}.jsonl"}
    for other in (*others, f"{name}.safetensors"):
        (folder / other).touch()
    assert cli.main(["train", *what.split(), "--profile", "smoke", "--retrain"]) == 0
    assert {path.name for path in folder.iterdir()} == others


def test_a_way_is_trained_and_then_loaded(monkeypatch, tmp_path, capsys):
    """The whole of it at tiny size: the dialogues' model, the one of pairs, the way, each in one line."""
    few = PairTraining(steps=2, batch=2, lr=1e-2, warmup=1)
    smoke = PROFILES["smoke"]
    lm = replace(smoke.lm, steps=2, batch=2, facts=(1,), distances=(0,))
    pairs = replace(smoke.pairs, recurrent=few, generator=few, rank=2)
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(smoke, name="tiny", lm=lm, pairs=pairs))
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    line = "way --method token --task characters --profile tiny --at-once 1 --recompute"
    stages._prose.cache_clear()
    stages.dialogues.cache_clear()
    for verb in ("training, ", "loaded "):
        assert cli.main(["train", *line.split()]) == 0
        said = capsys.readouterr().out
        for label in ("lm", "recurrent model", "recurrent token-characters-lc"):
            assert f"{label}: {verb}" in said
    path = tmp_path / "tiny" / "checkpoints" / "rwkv4-pairs-token-characters-lc-tiny.safetensors"
    assert files.load_tensors(path)[1]["record"]["training"]["steps"] == 2


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_says_what_all_found(monkeypatch, capsys, rank, lines):
    """A loss that diverged; all end with the same exit code."""

    def fail(*given):
        raise Diverged("training lm: the loss is nan")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(stages, "load_or_train", fail)
    assert cli.main(["train", "lm"]) == 2
    assert capsys.readouterr().err.count("\n") == lines
