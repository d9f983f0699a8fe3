"""Load or train: a checkpoint is used where its record fits, and only there; what was decided is said."""

import json
from dataclasses import replace

import pytest
import torch

from prosg_lib import files, paths
from prosg_lib.config import PROFILES, get_profile, profiles
from prosg_lib.config.sizes import (
    VOCAB,
    AdapterSize,
    Evaluation,
    GeneratorSize,
    Profile,
    RWKV4Config,
    SupervisedSize,
    Training,
    TransformedSize,
)
from prosg_lib.errors import UserError
from prosg_lib.text.prose import SPLITS, Prose, own_sentences
from prosg_lib.training import loop as training
from prosg_lib.training import stages
from prosg_lib.training.stages import Thrift, load_generator, load_or_train

STEPS = Training(steps=2, batch=2, lr=1e-2, facts=(1,), distances=(0,), warmup=1)
SIZE = GeneratorSize(rank=2, width=8, maps=("att.output",))
TINY = Profile(
    "tiny",
    RWKV4Config(VOCAB, 8, 1, 16),
    STEPS,
    SIZE,
    STEPS,
    SIZE,
    STEPS,
    STEPS,
    AdapterSize(rank=2, maps=("att.output",), lr=1.0),
    STEPS,
    Evaluation(1, 1, 1, (0,), (0,), (1,)),
    PROFILES["smoke"].pairs,
    PROFILES["smoke"].pretrained,
    STEPS,
    SupervisedSize(rank=2, width=8, maps=("att.output",), lessons=0.5, foresight=0.1),
    TransformedSize(rank=2, width=3, maps=("att.output",), step=0.1),
)
LM = "rwkv4-dialogue-tiny.safetensors"


@pytest.fixture(scope="module", autouse=True)
def little_prose():
    """Enough text for bodies of no tokens; what `dialogues` remembers of it is forgotten afterwards."""
    lines = own_sentences("test")[:20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "load_prose", lambda: Prose("a little", dict.fromkeys(SPLITS, lines)))
        stages.dialogues.cache_clear()
        stages._prose.cache_clear()
        yield
    stages.dialogues.cache_clear()
    stages._prose.cache_clear()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with checkpoints of every stage of the profile `tiny`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROSG_RUNS", str(folder))
        patch.setitem(profiles.PROFILES, "tiny", TINY)
        for stage in stages.STAGES[1:]:
            load_or_train(stage, get_profile("tiny"))
    return folder / "tiny" / "checkpoints"


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """This test's own folder of checkpoints, with the trained ones in it."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    monkeypatch.setitem(profiles.PROFILES, "tiny", TINY)
    folder = tmp_path / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("it trained")

    monkeypatch.setattr(stages, "fit", refuse)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_keeps_checkpoint_log_and_provenance(trained):
    """What is left: one file a stage that says what it is and came from, its log, and no resume file."""
    names = {path.name for path in trained.iterdir()}
    kinds = ("", *(f"-{stage}" for stage in stages.STAGES[1:]))
    stems = [f"rwkv4-dialogue{kind}-tiny" for kind in kinds]
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("safetensors", "jsonl")}
    for stem, kind in zip(stems, kinds, strict=True):
        _, meta = files.load_tensors(trained / f"{stem}.safetensors")
        assert meta["kind"] == ("generator" if kind else "lm")
        assert meta["record"]["stage"] == (kind[1:] or "lm")
        assert meta["record"].keys() >= {"seed", "recipe", "data", "model", "training"}
        assert meta["provenance"].keys() >= {"commit", "device", "versions", "prose", "seconds"}
        assert json.loads((trained / f"{stem}.jsonl").read_text().splitlines()[-1])["step"] == STEPS.steps


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_fitting_checkpoint_is_loaded(place, no_training, capsys, stage):
    """Every stage; it says what and why; the module is ready for use, and frozen."""
    module = load_or_train(stage, get_profile("tiny"))
    assert (
        f"{stage}: loaded {stages.checkpoint_name(stage, get_profile('tiny'))}.safetensors" in capsys.readouterr().out
    )
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    if stage == "lm":
        assert module.tokenizer.encode("Oslo")


def test_loading_again_gives_the_same(place, no_training):
    """Loading twice gives the same weights."""
    assert same(load_or_train("token", get_profile("tiny")), load_or_train("token", get_profile("tiny")))


def test_shipped_checkpoint_comes_first(place, tmp_path, no_training, monkeypatch, capsys):
    """A checkpoint in data/ is looked at before one that was trained here."""
    shipped = tmp_path / "data" / "checkpoints"
    shipped.mkdir(parents=True)
    (place / LM).rename(shipped / LM)
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path / "data")
    load_or_train("lm", get_profile("tiny"))
    assert "lm: loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "seed", "why"),
    [
        ({}, 1, "seed"),
        ({"lm": replace(STEPS, steps=3)}, 0, "training"),
        ({"model": RWKV4Config(VOCAB, 12, 1, 16)}, 0, "model"),
    ],
)
def test_another_seed_or_size_trains_anew(place, monkeypatch, capsys, change, seed, why):
    """It says what differs, does not use the file, and replaces it in the end."""
    old = load_or_train("lm", get_profile("tiny"))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(TINY, **change))
    new = load_or_train("lm", get_profile("tiny"), seed)
    said = capsys.readouterr().out
    assert f"lm: {LM} was trained otherwise ({why}); not used" in said
    assert "lm: training, " in said
    assert not same(old, new)
    load_or_train("lm", get_profile("tiny"), seed)
    assert f"lm: loaded {LM}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("RECIPE", training.RECIPE + 1), ("data_hash", lambda *args, **named: "other data")]
)
def test_another_recipe_or_data_trains_anew(place, monkeypatch, capsys, name, value):
    """The same sizes with other code or data are another model."""
    monkeypatch.setattr(stages, name, value)
    load_or_train("lm", get_profile("tiny"))
    assert f"trained otherwise ({'recipe' if name == 'RECIPE' else 'data'})" in capsys.readouterr().out


def test_a_generator_belongs_to_its_model(place, monkeypatch, capsys):
    """With another language model the generator is trained anew."""
    load_or_train("lm", get_profile("tiny"), seed=1)
    tensors, meta = files.load_tensors(place / LM)
    files.save_tensors(place / LM, tensors, meta | {"record": meta["record"] | {"seed": 0}})
    load_or_train("token", get_profile("tiny"))
    assert "rwkv4-dialogue-token-tiny.safetensors was trained otherwise (lm); not used" in capsys.readouterr().out


def test_what_was_forgotten_is_trained_anew(place, capsys):
    """Only that: the language model below a generator, trained here too, is still loaded."""
    stages.forget(get_profile("tiny"), ("rwkv4-dialogue-static-tiny",))
    load_or_train("static", get_profile("tiny"), retrain=True)
    said = capsys.readouterr().out
    assert "lm: loaded" in said
    assert "static: training" in said


def test_the_same_seed_trains_the_same(place):
    """Training again gives the same bits, and what training returns is what loading gives, half precision and all."""
    first = load_or_train("final", get_profile("tiny"))
    stages.forget(get_profile("tiny"), ("rwkv4-dialogue-final-tiny",))
    again = load_or_train("final", get_profile("tiny"), retrain=True)
    assert same(first, again)


@pytest.mark.parametrize("stage", ["lm", "static", "mend"])
def test_less_memory_trains_the_same(place, stage):
    """One example at a time, with blocks that run again: the same weights, but for rounding."""
    stages.forget(get_profile("tiny"))
    whole = load_or_train(stage, get_profile("tiny")).state_dict()
    stages.forget(get_profile("tiny"))
    pieces = load_or_train(stage, get_profile("tiny"), thrift=Thrift(at_once=1, recompute=True)).state_dict()
    tolerance = 1e-5 if stage == "lm" else 1e-3  # generators are kept in half precision
    torch.testing.assert_close(pieces, whole, rtol=tolerance, atol=tolerance)


def test_blocks_run_again_only_while_a_training_asks_for_it(place, monkeypatch):
    """The model underneath is in use afterwards."""
    seen = []

    def fit(*arguments, at_once, **named):
        seen.append((at_once, [block for block in models[-1].blocks if "forward" in vars(block)]))

    models, loader = [], stages.load_or_train
    monkeypatch.setattr(stages, "load_or_train", lambda *given: models.append(loader(*given)) or models[-1])
    load_or_train("lm", get_profile("tiny"))
    monkeypatch.setattr(stages, "fit", fit)
    stages.forget(get_profile("tiny"), ("rwkv4-dialogue-token-tiny",))
    loader("token", get_profile("tiny"), thrift=Thrift(3, True))
    assert seen == [(3, list(models[-1].blocks))]
    assert not any("forward" in vars(block) for block in models[-1].blocks)


def test_damaged_checkpoint_is_no_reason_to_train_silently(place):
    """It is named, with its remedy."""
    (place / LM).write_bytes((place / LM).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"rwkv4-dialogue-tiny\.safetensors .*cut short"):
        load_or_train("lm", get_profile("tiny"))


def test_unknown_stage(place):
    """It names what there is."""
    with pytest.raises(UserError, match="unknown stage 'lora'; there are lm, token, final, static"):
        load_or_train("lora", get_profile("tiny"))


@pytest.mark.parametrize("stage", ["lm", "token", "final", "static", "adapter"])
def test_what_is_shipped_still_loads(tmp_path, no_training, monkeypatch, capsys, stage):
    """The cpu profile's checkpoints have the records that training now would write, and the weights of their stage."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    module = load_or_train(stage, get_profile("cpu"))
    name = stages.checkpoint_name(stage, get_profile("cpu"))
    assert f"{stage}: loaded {name}.safetensors" in capsys.readouterr().out
    if stage != "lm":
        assert same(load_generator(name, load_or_train("lm", get_profile("cpu"))), module)


@pytest.mark.parametrize("stage", stages.STAGES[1:])
def test_load_generator_of_a_file(place, stage):
    """A generator is rebuilt from its file alone, for its own model only."""
    lm = load_or_train("lm", get_profile("tiny"))
    path = place / f"rwkv4-dialogue-{stage}-tiny.safetensors"
    assert same(load_generator(str(path), lm), load_or_train(stage, get_profile("tiny")))
    with pytest.raises(UserError, match="a lm, not a generator"):
        load_generator(str(place / LM), lm)
    other = load_or_train("lm", get_profile("tiny"), seed=1)
    with pytest.raises(UserError, match="was trained for model"):
        load_generator(str(path), other)
