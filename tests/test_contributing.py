"""What CONTRIBUTING.md, CHANGELOG.md and the hooks say is true of the code as it is."""

import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

from prosg_lib import paths
from prosg_lib.config import get_profile
from prosg_lib.tasks.problems import Material
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training.recipes import recipe

ROOT = paths.repo_root()
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_of_a_task():
    """Made again it is the same; the words come back in reverse order."""
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    scope = {"__name__": "guide"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
    tokenizer = load_tokenizer()
    problem = scope["Reversed"](4).problem(Material(tokenizer, None), "test", 0, 0)
    assert problem == scope["Reversed"](4).problem(Material(tokenizer, None), "test", 0, 0)
    _, *words = tokenizer.decode(problem.memory).split()
    assert len(words) == 4
    assert tokenizer.decode(problem.gold).split() == words[::-1]


def test_everything_named_exists():
    """Files and folders, and the names that are said to stand in them."""
    prose = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    named = set(re.findall(r"`((?:prosg_lib|tests|data|expected)/[\w./]*)`", prose))
    assert len(named) > 10
    assert [place for place in sorted(named) if not (ROOT / place).exists()] == []
    placed = re.findall(r"`(\w+)`[^`.]{0,30}\(`((?:prosg_lib|tests)/[\w./]+\.py)`\)", prose)
    placed += [(name, "prosg_lib/backbones/base.py") for name in ("step_through", "read_out", "embed", "editable")]
    placed += [(name, "prosg_lib/training/recipes.py") for name in ("_dialogues", "_open_world", "_pairs", "_problems")]
    placed += [("FAMILIES", "tests/families.py"), ("apply_workarounds", "prosg_lib/backbones/hub_recurrent.py")]
    assert len(placed) > 15
    assert [(n, place) for n, place in placed if not re.search(rf"\b{n}\b", (ROOT / place).read_text())] == []


def test_the_variant_of_a_recipe():
    """The command's settings exist."""
    (line,) = [line for line in GUIDE.splitlines() if line.strip().startswith("prosg train rwkv4")]
    words = shlex.split(line)
    changes = dict(word.split("=") for word in words if "=" in word)
    assert recipe(words[2], get_profile("smoke"), changes).size.rank == 4


def test_the_changelog_begins_with_this_version():
    """The version of pyproject.toml."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.startswith(f"## {version} ")


@pytest.mark.parametrize("name", ["ruff check", "ruff format", "lint-imports", "prosg check"])
def test_the_hooks_are_what_make_lint_runs(name):
    """From the environment, so that there is one version of each tool."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    assert sum(hook["entry"].startswith(name) for hook in repository["hooks"]) == 1
    lint = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"/bin/{name}" in lint
