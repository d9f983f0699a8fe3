"""Load or train: a checkpoint is used where its record fits, and only there; what was decided is printed."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import causal, talking
from tiny import STEPS, TINY, assert_parts_add_up
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config

from prosg_lib import files, paths
from prosg_lib.backbones.hub_families import new_mamba2
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.loading import load_model, save_model
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import VOCAB, Mamba2Size, RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.generators.base import ALL_MAPS, edited_maps
from prosg_lib.tasks.pairs import Fitted, Pair, form_of
from prosg_lib.text import chitchat
from prosg_lib.text.library_tokenizer import folder_tokenizer
from prosg_lib.text.prose import Prose
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import checkpoints, load_or_train, work
from prosg_lib.training.checkpoints import header_of, kept, load_generator, new_module
from prosg_lib.training.load_or_train import MemoryBudget, record_of
from prosg_lib.training.pair_objectives import pair_objective
from prosg_lib.training.recipes import checkpoint_name, recipe, recipes

LM, TOKEN = "rwkv4-dialogue", "rwkv4-dialogue-token"
TRAINED = [
    name
    for name, found in recipes(TINY).items()
    if "wikitext" not in name and "squad" not in name and "reader" not in name and found.window is None
]


def test_transformers_is_imported_only_for_its_models():
    """It takes as long as all the rest, and few notebooks need it."""
    rooms = "prosg_lib.training.load_or_train, prosg_lib.evaluation.recall, prosg_lib.explorer, prosg_lib.exercises"
    code = f"import sys, {rooms}\nassert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def get(name, profile=TINY, **given):
    return load_or_train.load_or_train(name, profile, **given)


@pytest.fixture(scope="module")
def trained(small_world, tmp_path_factory):
    """A folder with the checkpoints of all recipes of the profile `tiny` that need no other data."""
    folder = tmp_path_factory.mktemp("trained")
    with small_world(TINY, folder):
        for name in TRAINED:
            get(name)
    return folder / "tiny" / "checkpoints"


@pytest.fixture
def place(tmp_path, small_world, trained):
    """This test's own folder of checkpoints, with the trained ones in it."""
    with small_world(TINY, tmp_path):
        folder = tmp_path / "tiny" / "checkpoints"
        folder.mkdir(parents=True)
        for path in trained.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        yield folder


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("it trained")

    monkeypatch.setattr(load_or_train, "fit", refuse)


@pytest.fixture
def fits(monkeypatch):
    """What would be trained: the arguments of `fit`, which does nothing."""
    seen = []
    monkeypatch.setattr(load_or_train, "fit", lambda *given, **named: seen.append((given, named)))
    return seen


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def test_training_keeps_checkpoint_log_and_provenance(trained):
    """What is left: one file a recipe that says what it is and came from, its log, and no resume file."""
    stems = {f"{name}-tiny": recipe(name, TINY) for name in TRAINED}
    assert {path.name for path in trained.iterdir()} == {
        f"{s}.{end}" for s in stems for end in ("safetensors", "jsonl")
    } | {f".{s}.lock" for s in stems}
    for stem, made in stems.items():
        _, meta = files.load_tensors(trained / f"{stem}.safetensors")
        assert meta["kind"] == ("lm" if made.is_model else "generator")
        assert meta["record"]["recipe"] == made.name
        assert meta["record"]["module"]["kind"] == made.kind
        assert (meta["record"]["start"] or {}).get("recipe") == made.start
        assert meta["provenance"].keys() >= {"commit", "device", "versions", "prose", "seconds"}
        assert json.loads((trained / f"{stem}.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("name", TRAINED)
def test_a_fitting_checkpoint_is_loaded(place, no_training, capsys, name):
    """Of every recipe; it says so; the module is ready for use, frozen, and was trained."""
    module = get(name)
    assert f"{name}-tiny: loaded, trained on" in capsys.readouterr().out
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert same(module, get(name))
    assert module.checkpoint == place / f"{name}-tiny.safetensors"
    made = recipe(name, TINY)
    torch.manual_seed(0)
    fresh = new_module(made.kind, made.size, None if made.is_model else get(made.lm))
    assert not same(module, fresh.half().float() if not made.is_model else fresh)
    if made.is_model:
        assert module.tokenizer.encode("Oslo")


def test_shipped_checkpoint_comes_first(place, tmp_path, no_training, monkeypatch, capsys):
    """A checkpoint in data/ is taken before one that was trained here; with retrain it is not looked at."""
    shipped = tmp_path / "data" / "checkpoints" / f"{LM}-tiny.safetensors"
    shipped.parent.mkdir(parents=True)
    (place / shipped.name).rename(shipped)
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path / "data")
    assert get(LM).checkpoint == shipped
    monkeypatch.setattr(load_or_train, "data_of", lambda *given: "other data")
    with pytest.raises(AssertionError, match="it trained"):
        get(LM, retrain=True)


@pytest.mark.parametrize(
    ("change", "seed", "why"),
    [({"lm": replace(STEPS, steps=3)}, 0, "training"), ({"model": RWKV4Config(VOCAB, 12, 1, 16)}, 0, "module")],
)
def test_other_sizes_train_anew(place, capsys, change, seed, why):
    """It says what differs, does not use the file, and replaces it in the end."""
    old, other = get(LM), replace(TINY, **change)
    new = get(LM, other)
    said = capsys.readouterr().out
    assert f"{LM}-tiny: {place / f'{LM}-tiny.safetensors'} was trained otherwise ({why}); not used" in said
    assert f"{LM}-tiny: training, " in said
    assert not same(old, new)
    assert same(get(LM, other), new)


@pytest.mark.parametrize(("name", "value"), [("VERSION", 0), ("data_of", lambda *given: "other data")])
def test_another_version_or_data_trains_anew(place, monkeypatch, capsys, name, value):
    """The same sizes with other code or data are another model."""
    monkeypatch.setattr(load_or_train, name, value)
    get(LM)
    assert f"trained otherwise ({'version' if name == 'VERSION' else 'data'})" in capsys.readouterr().out


def test_a_seed_is_of_one_training(place, capsys):
    """A generator's other trainings are for the same model, each with its own checkpoint."""
    one, two = get(TOKEN), get(TOKEN, seed=2)
    assert two.checkpoint.name == f"{TOKEN}-seed2-tiny.safetensors"
    assert not same(one, two)
    assert {files.load_meta(g.checkpoint)["record"]["lm"] for g in (one, two)} == {get(LM).fingerprint()}
    assert all(p.evaluation.trainings[0] == 0 for p in PROFILES.values())


def test_a_generator_belongs_to_its_model(place, capsys):
    """One for another model has a checkpoint of its own, and nobody's is taken for it."""
    other = get(LM, seed=1)
    mine = get(TOKEN, lm=other)
    assert mine.checkpoint.stem == f"{TOKEN}-for-{other.fingerprint()}-tiny"
    capsys.readouterr()
    assert same(get(TOKEN, lm=other), mine)
    assert f"{mine.checkpoint.stem}: loaded" in capsys.readouterr().out
    assert get(TOKEN, lm=get(LM)).checkpoint.stem == f"{TOKEN}-tiny"
    with pytest.raises(UserError, match="is a language model itself"):
        get(LM, lm=other)


@pytest.mark.parametrize("name", ["smollm2-token", "smollm2-static"])
def test_a_generator_for_a_model_that_others_trained(place, monkeypatch, name):
    """Its model is loaded by name, with the recipe's window; its file is its recipe's own, and no other window's."""
    lm, asked = talking(), []
    monkeypatch.setattr(load_or_train, "load_model", lambda *given: asked.append(given) or lm)
    made = get(name)
    assert asked == [("smollm2", 200)]
    assert made.checkpoint.name == f"{name}-tiny.safetensors"
    assert made.names == [f"model.layers.1.{end}" for end in ("self_attn.o_proj", "mlp.down_proj")]
    assert same(load_generator(str(made.checkpoint), lm), made)
    assert same(get(name, lm=lm), made)
    with pytest.raises(UserError, match="load that model, in the same quantisation and with the same window"):
        load_generator(str(made.checkpoint), talking(100))


def test_the_conversations_that_a_training_read(place, monkeypatch):
    """Their source is in the provenance. The record is the same on a machine without them, which takes the file."""
    lm = talking()
    monkeypatch.setattr(load_or_train, "load_model", lambda *given: lm)
    monkeypatch.setattr(chitchat, "source", lambda: "talk 1.0")
    monkeypatch.setattr(chitchat, "load_conversations", lambda: Prose("", {"train": ["A: Hello", "B: Hi"] * 40}))
    path = get("smollm2-token").checkpoint
    header = header_of(files.load_meta(path), path)
    assert header.provenance["conversations"] == "talk 1.0"
    monkeypatch.setattr(chitchat, "source", lambda: None)
    assert record_of("smollm2-token", get_profile("tiny"), lm=lm) == files.load_meta(path)["record"]
    other = get("smollm2-static").checkpoint
    assert "conversations" not in header_of(files.load_meta(other), other).provenance


@pytest.mark.parametrize("objective", ["lc", "lg"])
def test_a_gradient_step_for_a_model_that_others_trained(place, monkeypatch, objective):
    """Its model is loaded by name, sees everything, and is frozen in full precision; training moves the start and the
    rates, in the recipe's blocks alone; and it is loaded by name or file, for its model alone."""
    lm, asked, name = causal(), [], f"smollm2-step-characters-{objective}"
    lm.requires_grad_(True)
    monkeypatch.setattr(load_or_train, "load_model", lambda *given: asked.append(given) or lm)
    made = get(name)
    assert asked == [("smollm2", None)]
    assert made.checkpoint.name == f"{name}-tiny.safetensors"
    assert made.names == [f"model.layers.1.{end}" for end in ("self_attn.o_proj", "mlp.down_proj")]
    assert made.log_rates.abs().min() > 0
    assert all(u.abs().max() > 0 for u in made.U.values())
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())
    assert same(load_generator(str(made.checkpoint), lm), made)
    assert same(get(name, lm=lm), made)
    with pytest.raises(UserError, match="load that model"):
        load_generator(str(made.checkpoint), talking())


def test_what_a_step_on_passages_is_trained_on(monkeypatch):
    """Several questions about each passage; practice in completing sentences takes turns with them, from every source
    of prose; LC's frozen teacher is the model itself, on the whole, and LG has none."""
    lm, passages = causal(), tuple(Pair(f"Room {i // 2}.", f"Question: Q{i}?\nAnswer:", f"A{i}") for i in range(8))
    practice = {f"named from {name}": (Pair(name, "Complete it:\nSo", "on"),) * 3 for name in ("books", "wiki")}
    monkeypatch.setattr(work, "available", lambda task, profile: True)
    monkeypatch.setattr(work, "pairs_of", lambda *given: Fitted(passages, 0))
    monkeypatch.setattr(work, "prose_pairs", lambda kind, profile: practice)
    for objective in ("lc", "lg"):
        made = recipe(f"smollm2-step-squad-{objective}", TINY)
        torch.manual_seed(0)
        module = new_module(made.kind, made.size, lm)
        batch_of, loss_of = work.work(made, TINY, module, lm, 0)
        first = [lm.tokenizer.decode(batch_of(step).context.ids[0, 0].tolist()) for step in range(4)]
        assert [text.split()[0] for text in first] == ["Room", "books", "Room", "wiki"]
        batch = batch_of(0)
        assert len(batch) == 3
        assert torch.equal(batch.context.ids[0], batch.context.ids[1])
        shown = lm.tokenizer.decode(batch.query.ids[0][batch.query.valid[0]].tolist())
        assert shown.startswith(form_of("squad").opening)
        reference = pair_objective(lm, module, objective.upper())
        for step in (0, 1):
            batch = batch_of(step)
            found, expected = loss_of(step, batch), reference(step, batch)
            assert_close((found.total, found.parts), (expected.total, expected.parts), rtol=1e-4, atol=1e-5)
            assert_parts_add_up(loss_of, step, batch, 2, module.parameters(), rtol=1e-4, atol=1e-6)
        assert found.parts.keys() == ({"gold", "entropy"} if objective == "lc" else {"gold"})


FINAL = "rwkv4-dialogue-final"


def trained_now(capsys, *given, **named):
    """What a call trained, and what it loaded."""
    capsys.readouterr()
    load_or_train._say_once.cache_clear()
    get(*given, **named)
    lines = capsys.readouterr().out.splitlines()
    return [[line.partition("-tiny:")[0] for line in lines if f"-tiny: {verb}" in line] for verb in ("train", "load")]


def test_one_is_trained_anew(place, capsys):
    """Its language model, trained here too, is still loaded; the same seed gives the same bits, and what training
    returns is what loading gives, half precision and all."""
    first = get(FINAL)
    assert trained_now(capsys, FINAL, retrain=True, anew=True) == [[FINAL], [LM]]
    assert same(first, get(FINAL))


@pytest.mark.parametrize("end", [KeyboardInterrupt(), UserError("diverged")])
def test_an_interrupted_retraining_goes_on(place, monkeypatch, capsys, end):
    """Each is trained once; what was there before stays until its successor is there, and what is not asked for stays;
    when all is done, the next retraining begins anew."""
    before, fit = {path.name: path.read_bytes() for path in place.iterdir()}, load_or_train.fit

    def stopped(name, *given, **named):
        if name == f"{FINAL}-tiny":
            raise end
        fit(name, *given, **named)

    checkpoints.begin_retraining(TINY)
    monkeypatch.setattr(load_or_train, "fit", stopped)
    with pytest.raises(type(end)):
        get(FINAL, retrain=True)
    after = {path.name: path.read_bytes() for path in place.iterdir() if path.suffix == ".safetensors"}
    assert {name for name, content in after.items() if content != before[name]} == {f"{LM}-tiny.safetensors"}
    monkeypatch.setattr(load_or_train, "fit", fit)
    assert trained_now(capsys, FINAL) == [[], [LM, FINAL]]  # without retrain: as ever
    checkpoints.begin_retraining(TINY)
    assert "resuming the retraining of 20" in capsys.readouterr().out
    assert trained_now(capsys, FINAL, retrain=True) == [[FINAL], [LM]]
    assert trained_now(capsys, FINAL, retrain=True) == [[], [LM, FINAL]]
    checkpoints.end_retraining(TINY)
    checkpoints.begin_retraining(TINY)
    assert trained_now(capsys, FINAL, retrain=True) == [[LM, FINAL], []]


def test_a_retraining_may_be_given_up(place, capsys):
    """By removing the file that the message names."""
    for expected in ("", "resuming", ""):
        checkpoints.begin_retraining(TINY)
        said = capsys.readouterr().out
        assert said.startswith(expected)
        if expected:
            Path(said.split("remove ")[1].strip()).unlink()


def test_two_processes_do_not_train_the_same(place, no_training):
    """The second is told who does; another checkpoint in the same folder is nobody's business."""
    with files.lock(place / f".{LM}-seed9-tiny.lock", "it"):
        with pytest.raises(UserError, match=rf"{LM}-seed9-tiny.safetensors is in use by process {os.getpid()} on"):
            get(LM, seed=9)
        with pytest.raises(AssertionError, match="it trained"):
            get(LM, seed=8)
    with pytest.raises(AssertionError, match="it trained"):
        get(LM, seed=9)


def test_a_folder_that_cannot_be_written_to_is_found_out_before_the_training(place, no_training, monkeypatch):
    monkeypatch.setenv("PROSG_RUNS", str(place / f"{LM}-tiny.safetensors"))
    with pytest.raises(UserError, match=r"cannot be written to \(.*\); choose another with PROSG_RUNS"):
        get(LM, seed=9)


@pytest.mark.parametrize(
    "name", [LM, "rwkv4-dialogue-static", "rwkv4-dialogue-mend", "rwkv4-pairs-token-characters-lc"]
)
def test_less_memory_trains_the_same(place, name):
    """One example at a time, with recomputed blocks: the same weights, up to rounding."""
    whole = get(name).state_dict()
    pieces = get(name, memory=MemoryBudget(at_once=1, recompute=True), anew=True).state_dict()
    tolerance = 1e-5 if name == LM else 1e-3  # generators are kept in half precision
    torch.testing.assert_close(pieces, whole, rtol=tolerance, atol=tolerance)


def test_blocks_are_recomputed_only_while_a_training_asks_for_it(place, monkeypatch):
    """The model underneath is in use afterwards."""
    seen, lm = [], get(LM)

    def fit(*arguments, at_once, **named):
        seen.append((at_once, [block for block in lm.blocks if "forward" in vars(block)]))

    monkeypatch.setattr(load_or_train, "fit", fit)
    get(TOKEN, seed=7, lm=lm, memory=MemoryBudget(3, True))
    assert seen == [(3, list(lm.blocks))]
    assert not any("forward" in vars(block) for block in lm.blocks)


@pytest.mark.parametrize("at_once", [0, -1])
def test_no_examples_at_once_are_refused(at_once):
    with pytest.raises(UserError, match=f"at_once={at_once} is refused: it takes numbers above 0"):
        MemoryBudget(at_once)


@pytest.mark.parametrize("name", ["rwkv4-dialogue-adapter", "llama-pairs-weights-characters-lc"])
def test_second_derivatives_are_not_recomputed(name):
    """Said before anything is trained."""
    with pytest.raises(UserError, match=f"{name} needs second derivatives"):
        get(name, memory=MemoryBudget(recompute=True))


def changed(meta, **record):
    return meta | {"record": meta["record"] | record}


def last_to(value):
    """A checkpoint's tensors with another value at the end of one of them."""

    def change(tensors, meta):
        name, tensor = max(tensors.items())
        tensor.view(-1)[-1] = value
        return tensors | {name: tensor}, meta

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "cut short"),
        (lambda tensors, meta: (tensors, changed(meta, stage="lm")), r"record\.stage should be left out"),
        (lambda tensors, meta: (tensors, changed(meta, seed="0")), r"record\.seed should be a whole number"),
        (lambda tensors, meta: (tensors, {k: v for k, v in meta.items() if k != "record"}), "record should be there"),
        (lambda tensors, meta: (tensors, meta | {"provenance": []}), "provenance should be an object"),
        (last_to(math.nan), "something other than finite numbers in"),
        (last_to(math.inf), "something other than finite numbers in"),
        (lambda tensors, meta: ({n: t.long() for n, t in tensors.items()}, meta), "other than finite numbers in"),
        (lambda tensors, meta: ({n: t[:1] for n, t in tensors.items()}, meta), "not hold the tensors of its record"),
        (lambda tensors, meta: ({}, meta), "does not hold the tensors of its record"),
    ],
)
def test_a_damaged_checkpoint_is_no_reason_to_train_silently(place, change, message):
    """It is named, with the remedy, which works."""
    path = place / f"{LM}-tiny.safetensors"
    tensors, meta = files.load_tensors(path)
    if change is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        files.save_tensors(path, *change(tensors, meta))
    with pytest.raises(UserError, match=rf"(?s){re.escape(str(path))}.*{message}") as caught:
        get(LM)
    assert "remove it" in str(caught.value)
    path.unlink()
    assert torch.equal(get(LM).state_dict()[min(tensors)], tensors[min(tensors)])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (TOKEN, {"size.rank": 1, "size.maps": ("ffn.key",), "size.layers": (1,)}),
        (TOKEN, {"size.label": False, "curriculum.blank": 1.0}),
        ("rwkv4-dialogue-supervised", {"size.teacher": "prompt", "size.lessons": 1.0}),
        ("rwkv4-dialogue-mend", {"size.width": 2, "size.step": 0.5}),
    ],
)
def test_a_variant_is_trained_kept_and_found_again(place, monkeypatch, name, changes):
    """Under its own name; loading it by file alone gives the same generator."""
    lm, first = get(LM), get(name, changes=changes)
    assert first.checkpoint == kept(checkpoint_name(name, TINY, 0, changes), TINY)
    monkeypatch.setattr(load_or_train, "fit", None)
    for again in (get(name, changes=changes), load_generator(str(first.checkpoint), lm)):
        assert same(first, again)
        assert first.names == again.names
    if "size.layers" in changes:
        assert (first.rank, first.names) == (1, ["blocks.1.ffn.key"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (TOKEN, {"size.layers": (7,)}, "no map att.output, ffn.key in layer 7"),
        (TOKEN, {"size.maps": ("att.gate",)}, "no linear map"),
        (TOKEN, {"training.facts": (3, 25)}, "a prompt cannot hold 25 facts; choose 1 to 24"),
        (TOKEN, {"size.rank": 1000}, "rank 1000 asked for"),
        ("rwkv4-dialogue-static", {"size.rank": 10**9}, "rank 1000000000 asked for"),
        ("rwkv4-dialogue", {"size.width": 10**8}, "no rwkv4 has these sizes: .*memory"),
        ("mamba2-dialogue", {"size.heads": 7}, "no mamba2 has these sizes"),
        ("llama-reader-pairs", {}, "wikitext is not a task of tiny; take cpu or gpu"),
        ("llama-reader-pairs-maps-squad-lc", {}, "squad is not a task of tiny"),
    ],
)
def test_what_cannot_be_trained_is_refused(small_world, tmp_path, no_training, name, changes, message):
    """Before the model that it is for is trained."""
    with small_world(TINY, tmp_path), pytest.raises(UserError, match=message):
        get(name, changes=changes)


def test_the_paper_profiles_models_are_to_be_given(monkeypatch):
    """It says how; and what needs data that is not here says that."""
    monkeypatch.delenv("PROSG_TEST_DATA", raising=False)
    with pytest.raises(UserError, match=r"paper has no model llama-pairs of its own; give one .* --param model=HUB_ID"):
        get("llama-pairs-adapter-characters-lc", get_profile("paper"))
    with pytest.raises(UserError, match="the data of wikitext are not here; set PROSG_TEST_DATA"):
        get("llama-reader-pairs", get_profile("cpu"), retrain=True)


def test_an_interrupted_start_is_trained_first(place, fits):
    """What goes on from another training starts with its weights, of the same seed; once it is there, the other is not
    needed any more."""
    name, first = "llama-pairs-weights-reversal-after-characters-lc", "llama-pairs-weights-characters-lc"
    get(name, anew=True)
    assert same(fits[-1][0][1], get(first))
    kept(f"{first}-tiny", TINY).unlink()
    get(name)
    assert [given[0] for given, _ in fits] == [f"{name}-tiny"]
    get(name, seed=5)
    assert [given[0] for given, _ in fits[1:]] == [f"{first}-seed5-tiny", f"{name}-seed5-tiny"]


def test_a_model_of_another_class_or_tokenizer_gets_what_a_recipe_makes(place, tmp_path, fits):
    """By its fingerprint, wherever it was loaded from; an adapter is on every map, whatever the class calls them."""
    save_model(get("mamba2-dialogue"), tmp_path / "model", "transformers")
    lm = load_model(tmp_path / "model").requires_grad_(False)
    assert get("mamba2-dialogue-token", lm=lm).checkpoint.stem == "mamba2-dialogue-token-tiny"
    lm = new_mamba2(Mamba2Size(VOCAB, 16, 1, 2, 8).settings)
    with pytest.raises(UserError, match="no tokenizer"):
        get("mamba2-dialogue-token", lm=lm)
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    lm.tokenizer = folder_tokenizer(tmp_path / "tokenizer")
    made = get("mamba2-dialogue-token", lm=lm)
    assert made.checkpoint.stem == f"mamba2-dialogue-token-for-{lm.fingerprint()}-tiny"
    data = files.load_meta(made.checkpoint)["record"]["data"]
    lm.tokenizer = load_tokenizer()
    get("mamba2-dialogue-token", lm=lm)
    assert files.load_meta(made.checkpoint)["record"]["data"] != data  # and so it was not taken
    sizes = GPT2Config(
        vocab_size=VOCAB, n_positions=512, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    gpt = CausalTransformer(AutoModelForCausalLM.from_config(sizes)).eval()
    gpt.tokenizer = load_tokenizer()
    ends = [name.rpartition("h.0.")[2] for name in get("llama-pairs-adapter-characters-lc", lm=gpt).names]
    assert (
        ends
        == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        == [name.rpartition("h.0.")[2] for name in edited_maps(gpt, ALL_MAPS)]
    )


SHIPPED = sorted(path.stem for path in (paths.data_dir() / "checkpoints").glob("*.safetensors"))
FINGERPRINTS = {
    "rwkv4-dialogue": "b0b08865b6d7ffb7",
    "mamba2-dialogue": "a15832882040b1d9",
    "llama-pairs": "1a640431588bc718",
}
CPU = get_profile("cpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_still_loads(tmp_path, no_training, monkeypatch, name):
    """The records are those that training now would write, and models have the weights that they were shipped with."""
    monkeypatch.setenv("PROSG_RUNS", str(tmp_path))
    module = get(name, CPU)
    assert module.checkpoint.parent == paths.data_dir() / "checkpoints"
    if name in FINGERPRINTS:
        assert module.fingerprint() == FINGERPRINTS[name]
