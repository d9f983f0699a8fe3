"""The suite as a command: the same numbers from the file alone, and nothing written where something is wrong."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from prosg_lib import cli
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config import PROFILES, get_profile, profiles
from prosg_lib.config.sizes import Forgetting
from prosg_lib.errors import UserError
from prosg_lib.evaluation import forgetting, predictions
from prosg_lib.evaluation.forgetting import FILE, evaluate, predicted
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.reproduction.suites import recompute
from prosg_lib.tasks import mqar
from prosg_lib.tasks.suite import Material, problem_of, settings
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences

TINY = Forgetting(3, (1, 2), ((16, 2),), (3,), (32,), (0.0, 1.0))
METHODS = ["base", "none", "repeated", "prosg-token", "alone", "wrong"]
LITTLE = Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:20]))
FILES = ["copy.png", "mqar.png", "passkey.png", "phonebook.png", FILE, "results.json", "results.md"]


@pytest.fixture(autouse=True)
def small(monkeypatch, make_lm):
    """A random model, a generator for it, little prose and few problems; nothing is read from disk."""
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(PROFILES["smoke"], name="tiny", forgetting=TINY))
    monkeypatch.setattr(forgetting, "load_prose", lambda: LITTLE)
    lm = make_lm(layers=1, width=8)

    def generator(name, lm):
        torch.manual_seed(0)
        made = TokenGenerator(lm, 2, 8, ("att.output",))
        for p in made.heads.parameters():
            nn.init.normal_(p)
        return made.eval()

    monkeypatch.setattr(forgetting, "choose_model", lambda name: lm)
    monkeypatch.setattr(forgetting, "choose_generator", generator)
    return lm


@dataclass(frozen=True)
class Sizes:
    vocab: int


class Copier(LanguageModel):
    """Goes on as the text went on where its longest piece like the end of what was read stands, the first of several.

    Its state is all that it has read, -1 being padding.
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.config = tokenizer, Sizes(tokenizer.vocab)
        self.nothing = nn.Parameter(torch.zeros(1))

    def step_through(self, ids, state, valid):
        ids = ids if valid is None else ids.masked_fill(~valid, -1)
        read = ids if state is None else torch.cat([state.tensors["ids"], ids], 1)
        time = ids.shape[1]
        says = [[self.next(row[:n]) for n in range(len(row) - time + 1, len(row) + 1)]
                for row in read.tolist()]  # fmt: skip
        return nn.functional.one_hot(torch.tensor(says), self.config.vocab).float(), RecurrentState({"ids": read})

    @staticmethod
    def next(row):
        row = [token for token in row if token >= 0]
        best, length = 0, 0
        for end in range(1, len(row)):
            same = 0
            while same < end and row[end - 1 - same] == row[-1 - same]:
                same += 1
            if same > length:
                best, length = row[end], same
        return best

    def read_out(self, hidden):
        return hidden

    def embed(self, *ids):
        pytest.fail("reading and judging need no embedding and no map")

    editable = embed


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_is_computed_again_from_the_file(tmp_path, capsys):
    """The command, and then the file alone, elsewhere: JSON, page and figures are the same byte by byte."""
    line = f"evaluate --model some --generator its --profile tiny --seed 0 3 --out {tmp_path / 'a' / 'b'}"
    assert cli.main(line.split()) == 0
    first = tmp_path / "a" / "b"
    assert names(first) == FILES
    assert "pass" in capsys.readouterr().err  # progress
    (first / FILE).rename(tmp_path / "kept.gz")
    assert cli.main(["evaluate", "--from-predictions", str(tmp_path / "kept.gz"), "--out", str(tmp_path / "c")]) == 0
    for name in FILES:
        if name != FILE:
            assert (tmp_path / "c" / name).read_bytes() == (first / name).read_bytes(), name


def test_who_copies_solves_all_four(small):
    """A model that goes on as the text went on before says everything right, with the memory once or twice, and without
    it nothing but a few tokens of copies and a query by chance. So the gold is what the memory says, and the judged
    positions are where it has to be said."""
    lm = Copier(small.tokenizer)
    cells, _ = settings(replace(TINY, copy=(1, 12), mqar=((64, 4),), phonebook=(3, 8), depths=(0.0, 0.4, 1.0)), 2048)
    material = Material(small.tokenizer, ProseTokens.of(LITTLE, "test", small.tokenizer))
    found = list(predicted(lm, None, cells, material, (0,), 4))
    for method, least, most in (("base", 1, 1), ("repeated", 1, 1), ("none", 0, 0.2)):
        shares = [p.share for p in found if p.method == method]
        assert least <= min(shares)
        assert sum(shares) / len(shares) <= most
    assert not any(p.right for p in found if p.method == "none")


def test_the_file_has_every_item_of_every_method(tmp_path, small):
    """All methods answer the same items, with the gold of the problems themselves; the header says what it was."""
    evaluate("some", "its", get_profile("tiny"), (0, 3), 2, tmp_path, "prosg evaluate")
    header, found = predictions.read(tmp_path / FILE)
    assert header["methods"] == METHODS
    assert header["fingerprint"] == small.fingerprint()
    assert (header["model"], header["generator"], header["profile"]) == ("some", "its", "tiny")
    assert (header["seeds"], header["items"], header["command"]) == ([0, 3], 2, "prosg evaluate")
    assert header["prose"]["sha256"] == LITTLE.sha256
    assert {"commit", "device", "versions"} <= header.keys()
    cells, _ = settings(TINY, small.config.vocab)
    assert len(found) == len(cells) * len(METHODS) * 2 * 2
    material = Material(small.tokenizer, ProseTokens.of(LITTLE, "test", small.tokenizer))
    rows = iter(found)
    for cell in cells:
        for method in METHODS:
            for seed in (0, 3):
                for number in range(2):
                    problem, row = problem_of(cell, material, seed, number), next(rows)
                    assert (row.task, row.cell, row.method) == (problem.task, problem.cell, method)
                    assert (row.seed, row.item, row.gold) == (seed, number, problem.gold)


def test_again_is_the_same_and_without_a_generator_the_plain_model(tmp_path):
    """The same command writes the same predictions; the plain methods' do not depend on a generator."""
    for place, generator in (("a", "its"), ("b", "its"), ("c", None)):
        evaluate("some", generator, get_profile("tiny"), (0,), None, tmp_path / place, "")
    a, b, c = (predictions.read(tmp_path / place / FILE) for place in "abc")
    assert a == b
    assert c[0]["methods"] == METHODS[:3]
    assert c[1] == [p for p in a[1] if p.method in METHODS[:3]]


def test_a_small_vocabulary_leaves_out_what_it_does_not_allow(tmp_path, small, monkeypatch):
    """And the rest is measured; which and why stands in the file and on the page."""
    monkeypatch.setattr(mqar, "VOCAB", 100)
    sizes = replace(TINY, mqar=((16, 2), (128, 4)))
    found, left_out = settings(sizes, small.config.vocab)
    assert [s.length for s in found if isinstance(s, mqar.Mqar)] == [16]
    assert [s.vocab for s in found if isinstance(s, mqar.Mqar)] == [100]
    (reason,) = left_out
    assert "needs a vocabulary of more than 128" in reason
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(PROFILES["tiny"], forgetting=sizes))
    evaluate("some", None, get_profile("tiny"), (0,), 2, tmp_path, "")
    assert predictions.read(tmp_path / FILE)[0]["left_out"] == left_out
    assert f"Left out: {reason}." in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_model_with_too_few_places_is_told_so(tmp_path, monkeypatch, small, capsys):
    """Before it would read beyond its last position, and before anything is measured."""
    llama = new_llama(TransformerConfig("llama", 2048, width=8, layers=1, ffn=8, heads=1)).eval().requires_grad_(False)
    llama.tokenizer = small.tokenizer
    llama.model.config.max_position_embeddings = 80
    monkeypatch.setattr(forgetting, "choose_model", lambda name: llama)
    with pytest.raises(UserError, match=r"phonebook \(lines=3\) needs \d+ tokens .* this model reads 80"):
        evaluate("some", None, get_profile("tiny"), (0,), 2, tmp_path / "out", "")
    assert "pass" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model some --profile tin --out OUT", "unknown profile 'tin'"),
        ("--model some --profile tiny --out OUT --seed 1 1", "a seed is there twice (1, 1)"),
        ("--model some --profile tiny --out OUT --items 1", "1 item a cell"),
        ("--model some --profile tiny --out FILE", "is a file; name a folder"),
        ("--model some --profile tiny --out FILE/more", "is a file; name a folder"),
        ("--from-predictions nothing.gz --out OUT", "nothing.gz does not exist"),
        ("--from-predictions FILE --out OUT", "is no gzip file"),
        ("--from-predictions FILE --generator x --out OUT", "--generator goes with --model"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, line, said):
    """Exit code 2, and the folder is not there."""
    (tmp_path / "file").write_text("text")
    words = [w.replace("OUT", str(tmp_path / "out")).replace("FILE", str(tmp_path / "file")) for w in line.split()]
    assert cli.main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prosg: ")
    assert said in error
    assert error.count("\n") == 1
    assert names(tmp_path) == ["file"]


def test_predictions_of_another_suite(tmp_path):
    """Are refused where it is none that is known."""
    evaluate("some", None, get_profile("tiny"), (0,), 2, tmp_path / "out", "")
    header, found = predictions.read(tmp_path / "out" / FILE)
    kept = {k: v for k, v in header.items() if k not in ("kind", "version", "rows")}
    predictions.write(tmp_path / "other.gz", kept | {"suite": "recall"}, found)
    with pytest.raises(UserError, match="line 1: the suite 'recall' is not known; there are forgetting, dialogue"):
        recompute(tmp_path / "other.gz", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_profiles_cells_can_be_made(profile, small):
    """At the shipped models' vocabulary nothing is left out, and at the published one MQAR is the published."""
    sizes = PROFILES[profile].forgetting
    found, left_out = settings(sizes, 2048)
    assert left_out == []
    assert len(found) == sum(map(len, (sizes.copy, sizes.mqar, sizes.phonebook))) + len(sizes.passkey) * len(
        sizes.depths
    )
    published, _ = settings(sizes, 50_000)
    assert {s.vocab for s in published if isinstance(s, mqar.Mqar)} == {8192}
    if profile != "smoke":
        assert tuple((s.length, s.pairs) for s in published if isinstance(s, mqar.Mqar)) == mqar.GRID
