"""Model cards and Croissant metadata: up to date, and what they say of a file is so."""

import hashlib
import importlib.util
import json
import re

import pytest

from prosg_lib import files, paths
from prosg_lib.errors import UserError

SCRIPT = paths.data_dir() / "cards.py"
spec = importlib.util.spec_from_file_location("data_cards", SCRIPT)
cards = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cards)

CHECKPOINTS = sorted((paths.data_dir() / "checkpoints").glob("*.safetensors"))


def test_they_are_what_the_script_writes():
    """Otherwise: python data/cards.py."""
    assert cards.main(["check"]) == 0


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_the_code_on_a_card_loads_the_checkpoint(path, capsys):
    """The very file, with as many weights as the card says; a card's links lead to files."""
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(compile(block, path.name, "exec"), scope)
    module = scope.get("generator", scope.get("step", scope.get("lm")))
    kept = module.state_dict() if module is not scope.get("lm") else files.load_tensors(path)[0]
    said = int(re.search(r"(\d[\d,]*) weights,", text)[1].replace(",", ""))
    assert sum(tensor.numel() for tensor in kept.values()) == said
    if "generator" in scope or "step" in scope:
        assert module.checkpoint == path
    assert all((path.parent / link).exists() for link in re.findall(r"\]\(([^)]+)\)", text))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    """A file under another's name, and a claim that is gone."""
    (tmp_path / "renamed.safetensors").write_bytes(CHECKPOINTS[0].read_bytes())
    with pytest.raises(UserError, match=r"renamed is of the recipe .* has its recipe's name"):
        cards.card(tmp_path / "renamed.safetensors")
    monkeypatch.setitem(cards.MEASURED, CHECKPOINTS[0].stem, [("00_tour", "gone")])
    with pytest.raises(UserError, match="has no claim gone; correct MEASURED"):
        cards.card(CHECKPOINTS[0])


def test_stale_cards_are_found(tmp_path, monkeypatch, capsys):
    """By name."""
    (tmp_path / "a.md").write_text("old")
    monkeypatch.setattr(cards, "pages", lambda: {tmp_path / "a.md": "new", tmp_path / "b.md": "new"})
    assert cards.main(["check"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["a.md", "b.md"]
    assert cards.main([]) == 0
    assert cards.main(["check"]) == 0
    assert cards.main(["chek"]) == 2


def test_croissant_describes_the_files():
    """Hashes, and every column of every row; `mlcroissant validate` has nothing against it."""
    found = json.loads((paths.data_dir() / "croissant.json").read_text(encoding="utf-8"))
    for file in found["distribution"]:
        assert hashlib.sha256((paths.data_dir() / file["contentUrl"]).read_bytes()).hexdigest() == file["sha256"]
    dialogues, natural, values = found["recordSet"]
    for records, name, left_out in (
        (dialogues, "open_sample.jsonl", {"instructions"}),
        (natural, "natural_prompts.jsonl", set()),
    ):
        columns = {field["name"].rpartition("/")[2] for field in records["field"]}
        for line in (paths.data_dir() / name).read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == columns | left_out
    assert len(values["field"]) == 24
