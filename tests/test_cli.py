"""The `prosg` command: exit codes, and messages instead of tracebacks."""

import subprocess
import sys

import pytest

from prosg_lib import cli, reproduce
from prosg_lib.errors import UserError


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in ("reproduce", "report", "train"))])
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
    [[], ["reprodcue"], ["reproduce", "--sed", "1"], ["reproduce", "--seed", "one"], ["train", "everything"]],
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
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, said, capsys):
    """No traceback; the thing is named."""
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
        "profile": "gpu",
        "seed": 3,
        "retrain": True,
        "names": ["00_a", "01_b"],
        "parameters": {"x": "1=2"},
        "update_expected": True,
    }


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
