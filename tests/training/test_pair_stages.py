"""Load or train, for pairs: what is trained is kept and found again, and what is asked for wrongly is said."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from prosg_lib import files
from prosg_lib.backbones.hub_transformer import CausalTransformer, TransformerConfig, new_llama
from prosg_lib.config import PROFILES, get_profile, profiles
from prosg_lib.config.sizes import TASKS, PairTraining
from prosg_lib.errors import UserError
from prosg_lib.generators.base import SCALE
from prosg_lib.tasks.pair_sources import PEOPLE, pairs_of
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import pair_stages, stages
from prosg_lib.training.pair_stages import WaySpec, new_way, pair_model, pair_way, way_name

FEW = PairTraining(steps=2, batch=2, lr=1e-2, warmup=1)
SMOKE = PROFILES["smoke"]
TINY = replace(
    SMOKE,
    name="tiny",
    lm=replace(SMOKE.lm, steps=2, batch=2, facts=(1,), distances=(0,)),
    pairs=replace(
        SMOKE.pairs,
        recurrent=FEW,
        transformer=FEW,
        reader=FEW,
        adapter=FEW,
        recurrent_adapter=FEW,
        weights=FEW,
        maps=FEW,
        maps_after=FEW,
        questions=FEW,
        low_rank=FEW,
        generator=FEW,
        rank=2,
    ),
)
METHODS = ("adapter", "maps", "weights", "weights-1", "token", "final")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder of checkpoints that all tests share, the profile `tiny`, and no data but those about people."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROSG_RUNS", str(folder))
        patch.delenv("PROSG_TEST_DATA", raising=False)
        patch.setitem(profiles.PROFILES, "tiny", TINY)
        stages._prose.cache_clear()
        stages.dialogues.cache_clear()
        yield folder / "tiny" / "checkpoints"
    stages._prose.cache_clear()
    stages.dialogues.cache_clear()


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("it trained")

    monkeypatch.setattr(stages, "fit", refuse)


@pytest.mark.parametrize("backbone", ["recurrent", "transformer"])
def test_a_model_is_trained_once_and_then_found(place, backbone, monkeypatch):
    first = pair_model(backbone, get_profile("tiny"))
    monkeypatch.setattr(stages, "fit", None)  # a second training would fail
    again = pair_model(backbone, get_profile("tiny"))
    assert first.fingerprint() == again.fingerprint()
    assert not any(p.requires_grad for p in again.parameters())
    name = {"recurrent": "rwkv4-pairs-tiny", "transformer": "llama-pairs-tiny"}[backbone]
    _, meta = files.load_tensors(place / f"{name}.safetensors")
    assert meta["kind"] == "lm"
    assert meta["record"]["training"]["steps"] == 2


def test_the_recurrent_model_goes_on_from_the_dialogues(place):
    """It has learned something else, but not from nothing."""
    before, after = stages.load_or_train("lm", get_profile("tiny")), pair_model("recurrent", get_profile("tiny"))
    assert before.fingerprint() != after.fingerprint()
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert (a - b).abs().max() < 0.1, name


def test_the_reader_goes_on_from_the_transformer_with_prose(place, tmp_path, monkeypatch):
    """On the sentences that break off before a name, and on nothing else."""
    for folder in ("wikitext-2", "books"):
        (tmp_path / folder).mkdir()
        for i in range(10):
            text = "".join(f"It was not far from there to Town{10 * i + j}. Nobody had come.\n\n" for j in range(10))
            (tmp_path / folder / f"{i}.txt").write_text(text)
    monkeypatch.setenv("PROSG_TEST_DATA", str(tmp_path))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(TINY, pairs=replace(TINY.pairs, tasks=TASKS)))
    before, seen = pair_model("transformer", get_profile("tiny")), []
    monkeypatch.setattr(stages, "fit", lambda name, module, draw, *rest, **named: seen.append((name, module, draw)))
    after = pair_model("reader", get_profile("tiny"), retrain=True)
    name, module, draw = seen[-1]
    assert name == "llama-reader-pairs-tiny"
    assert module is not before
    assert after.fingerprint() == before.fingerprint()  # nothing was trained
    said = [
        load_tokenizer().decode(ids[valid].tolist()) for i in (0, 1) for ids, valid in zip(*draw(i).query, strict=True)
    ]
    assert all(re.fullmatch(r"Complete from the passage:\nIt was not far from there to Town\d+\n", q) for q in said)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_is_trained_once_and_then_found(method, monkeypatch):
    spec = WaySpec(method, ("characters",))
    first = pair_way(spec, "recurrent", get_profile("tiny"))
    monkeypatch.setattr(stages, "fit", None)
    again = pair_way(spec, "recurrent", get_profile("tiny"))
    fresh = new_way(method, pair_model("recurrent", get_profile("tiny")), "recurrent", get_profile("tiny")).state_dict()
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())
    assert any(not torch.equal(t.half().float(), again.state_dict()[name]) for name, t in fresh.items())


@pytest.mark.parametrize(
    "change", [{"objective": "LG"}, {"contexts": 2}, {"tasks": ("reversal",)}, {"after": ("reversal",)}]
)
def test_another_specification_is_another_way(change, no_training):
    """It is not taken for the one that is there."""
    spec = WaySpec("adapter", ("characters",))
    assert replace(spec, **change).name != spec.name
    with pytest.raises(AssertionError, match="it trained"):
        pair_way(replace(spec, **change), "recurrent", get_profile("tiny"))


@pytest.mark.parametrize("task", PEOPLE)
def test_a_way_of_many_contexts_sees_all_of_them(task, monkeypatch):
    """Sixteen for every query, however long they are; and one step on all of them at once."""
    seen = []
    monkeypatch.setattr(stages, "fit", lambda *given, **named: seen.append(given))
    pair_way(WaySpec("weights", (task,), contexts=16), "recurrent", get_profile("tiny"))
    _, way, draw, objective, *_ = seen[0]
    batches = [draw(step) for step in range(20)]
    assert {batch.context.ids.shape[1] for batch in batches} == {16}
    assert all(batch.context.valid.any(-1).all() for batch in batches)
    told = []
    monkeypatch.setattr(type(way), "_loss_of", lambda self, lm, contexts: told.append(contexts) or _no_step)
    objective(0, batches[0])
    assert [contexts.ids.shape[1] for contexts in told] == [16]


def _no_step(weights):
    return sum(w.sum() for w in weights.values()) * 0


def test_one_task_after_another_starts_where_the_first_ended(monkeypatch):
    seen = []
    pair_way(WaySpec("adapter", ("characters",)), "recurrent", get_profile("tiny"))
    monkeypatch.setattr(stages, "fit", lambda name, module, *rest, **named: seen.append(module.state_dict()))
    spec = WaySpec("adapter", ("reversal",), after=("characters",))
    pair_way(spec, "recurrent", get_profile("tiny"))
    first = pair_way(WaySpec("adapter", ("characters",)), "recurrent", get_profile("tiny")).state_dict()
    assert all(torch.equal(t.cpu(), first[name].cpu()) for name, t in seen[0].items())
    stages.forget(
        get_profile("tiny"), [way_name(WaySpec("adapter", ("characters",)), "recurrent", get_profile("tiny"))]
    )
    again = pair_way(spec, "recurrent", get_profile("tiny")).state_dict()  # what is there needs no first one any more
    assert len(seen) == 1
    assert all(torch.equal(t.half().cpu(), again[name].half().cpu()) for name, t in seen[0].items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A little model of `transformers` as a user would have it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("hub") / "my-model"
    sizes = TransformerConfig("llama", load_tokenizer().vocab, 16, 1, 32, 2)
    torch.manual_seed(0)
    new_llama(sizes).model.save_pretrained(folder)
    return folder


def test_a_model_of_transformers_is_taught_with_its_own_tokenizer(place, saved, no_training):
    """Without one that is said; with one, the model is taken as it is, and a way's checkpoint has the folder's name."""
    with pytest.raises(UserError, match=r"my-model has no tokenizer"):
        pair_model(str(saved), get_profile("tiny"))
    (saved / "tokenizer.json").write_text(load_tokenizer().to_json(), encoding="utf-8")
    lm = pair_model(str(saved), get_profile("tiny"))
    assert lm.config.width == 16
    assert not any(p.requires_grad for p in lm.parameters())
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(stages, "fit", lambda name, *rest, **named: seen.append((name, rest)))
        pair_way(WaySpec("adapter", ("characters",)), str(saved), get_profile("tiny"))
    assert seen[0][0].endswith("my-model-pairs-adapter-characters-lc-tiny")


def test_a_step_on_maps_learns_to_store_first(monkeypatch):
    """Random tokens, more and more of them, come before the task, and a checkpoint's record says how often; till then
    the learning rate stays up."""
    sizes = replace(TINY.pairs, maps=replace(FEW, steps=8), echoes=6, maps_lr=0.7)
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(TINY, pairs=sizes))
    seen = []
    monkeypatch.setattr(stages, "fit", lambda *given, **named: seen.append((given, named)))
    way = pair_way(WaySpec("maps", ("characters",)), "recurrent", get_profile("tiny"))
    (_, _, draw, _, training, _, record), named = seen[0]
    assert (way.lr, training.steps) == (0.7, 8)
    assert (record["inner"]["lr"], record["echoes"], named["held"]) == (0.7, 6, 6)
    lengths = [draw(step).context.ids.shape[-1] for step in range(6)]
    assert lengths[:2] == [8, 8]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 40
    assert ["Question" in load_tokenizer().decode(draw(step).query.ids[0].tolist()) for step in (5, 6)] == [False, True]


def test_a_step_on_maps_practises_most_of_the_time():
    """Two turns of every source for one of a task, however many pairs a source has; without practice, tasks alone."""
    a, b, c = (tuple(Pair(f"{name} {i}", "?", "!") for i in range(3)) for name in "abc")
    turns = pair_stages._lesson_turns({"wikitext": a, "copied from one": b * 9, "copied from two": c})
    assert turns == ("wikitext", *["copied from one", "copied from two"] * 2)
    assert pair_stages._lesson_turns({"reversal": a, "characters": b}) == ("characters", "reversal")


def test_a_step_on_maps_goes_on_from_its_practice(monkeypatch):
    """Practice is LC's, whatever comes after; then there are neither random tokens nor words of the query, and a
    training of its own sizes."""
    sizes = replace(TINY.pairs, maps_after=replace(FEW, steps=5))
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(TINY, pairs=sizes))
    seen = []

    def fit(name, module, draw, loss, training, folder, record, **named):
        seen.append((name, training.steps, record["way"]["objective"], record["echoes"], record["everywhere"]))
        with torch.no_grad():
            module.pace += 1.0

    monkeypatch.setattr(stages, "fit", fit)
    way = pair_way(
        WaySpec("maps", ("reversal",), "LG", after=("characters",)), "recurrent", get_profile("tiny"), seed=5
    )
    assert seen == [
        ("rwkv4-pairs-maps-characters-lc-seed5-tiny", FEW.steps, "LC", TINY.pairs.echoes, True),
        ("rwkv4-pairs-maps-reversal-after-characters-lg-seed5-tiny", 5, "LG", 0, False),
    ]
    assert (way.pace == 2.0).all()


def test_other_steps_do_not(monkeypatch):
    """Records of those that are shipped stay as they are."""
    seen = []
    monkeypatch.setattr(stages, "fit", lambda *given, **named: seen.append((given, named)))
    pair_way(WaySpec("weights", ("characters",), "LG"), "recurrent", get_profile("tiny"))
    (_, _, draw, _, _, _, record), named = seen[0]
    assert "echoes" not in record
    assert named["held"] == 0
    assert "Question" in load_tokenizer().decode(draw(0).query.ids[0].tolist())


def test_without_steps_there_are_those_of_an_epoch(monkeypatch):
    """As many as there are batches in the tasks' pairs, rounded up: 10,000 pairs, 16 a step."""
    epoch = replace(FEW, steps=0, batch=16)
    monkeypatch.setitem(profiles.PROFILES, "tiny", replace(TINY, pairs=replace(TINY.pairs, recurrent_adapter=epoch)))
    seen = []
    monkeypatch.setattr(stages, "fit", lambda name, module, draw, loss, sizes, *rest, **named: seen.append(sizes))
    pair_way(WaySpec("adapter", PEOPLE), "recurrent", get_profile("tiny"))
    assert seen[0].steps == 625


def test_the_papers_profile_has_the_papers_numbers():
    """Batch 16, one epoch, inner learning rate 1e-3, through the adapter's own scale as well."""
    pairs = PROFILES["paper"].pairs
    assert {t.batch for t in (pairs.adapter, pairs.weights, pairs.maps)} == {16}
    assert {t.steps for t in (pairs.adapter, pairs.weights, pairs.maps)} == {0}
    assert pairs.echoes == 0
    assert pairs.weights_lr == pytest.approx(1e-3)
    assert pairs.adapter_lr * SCALE**2 == pytest.approx(1e-3)


def test_an_adapter_is_on_every_map_of_a_transformer_whatever_its_class():
    """GPT-2 calls them otherwise than Llama; the head is none of them."""
    sizes = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    lm = CausalTransformer(AutoModelForCausalLM.from_config(sizes))
    ends = [name.rpartition("h.0.")[2] for name in new_way("adapter", lm, "some/model", get_profile("tiny")).names]
    assert ends == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_smoke_leaves_out_what_it_has_no_time_for():
    with pytest.raises(UserError, match="wikitext is no task of tiny"):
        pairs_of("wikitext", "test", get_profile("tiny"))
    assert pair_stages.available("characters", get_profile("tiny"))
    assert not pair_stages.available("wikitext", get_profile("tiny"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_model("no/such/folder", get_profile("tiny")), "no/such/folder could not be loaded"),
        (lambda: pair_model("reader", get_profile("tiny")), "wikitext is no task of tiny; take cpu or gpu"),
        (lambda: pair_model("reader", get_profile("paper")), "the reader learns from texts on this machine, and paper"),
        (lambda: pair_model("reader", get_profile("cpu")), "the data of wikitext are not here; set PROSG_TEST_DATA"),
        (
            lambda: pairs_of("riddles", "test", PROFILES["cpu"]),
            "unknown task 'riddles'; there are characters, reversal",
        ),
        (lambda: pairs_of("squad", "test", PROFILES["cpu"]), "the data of squad are not here; set PROSG_TEST_DATA"),
        (
            lambda: pair_way(WaySpec("magic", PEOPLE), "recurrent", get_profile("tiny")),
            "unknown method 'magic'; there are adapter, maps",
        ),
        (
            lambda: pair_way(WaySpec("rank", PEOPLE), "recurrent", get_profile("tiny")),
            "unknown method 'rank'; there are adapter",
        ),
        (lambda: pair_way(WaySpec("weights-999", PEOPLE), "recurrent", get_profile("tiny")), "rank 999 asked for"),
        (
            lambda: pair_way(WaySpec("adapter", PEOPLE, "LX"), "recurrent", get_profile("tiny")),
            "unknown objective 'LX'",
        ),
    ],
)
def test_what_is_unknown_is_said(call, message):
    with pytest.raises(UserError, match=message):
        call()
