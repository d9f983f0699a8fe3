"""Generators that are another in one respect: what is changed, and nothing else, is; each has its own checkpoint."""

from dataclasses import replace

import pytest
import torch

from prosg_lib import files
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import GeneratorSize, SupervisedSize, Training, TransformedSize
from prosg_lib.errors import UserError
from prosg_lib.training import ablations, stages
from prosg_lib.training.ablations import Ablation, ablated, checkpoint_name

FEW = Training(steps=2, batch=2, lr=1e-2, facts=(1,), distances=(0,), warmup=1)
MAPS = ("att.output", "ffn.key")
TINY = replace(
    PROFILES["smoke"],
    name="tiny",
    lm=FEW,
    token=GeneratorSize(2, 8, MAPS),
    token_training=FEW,
    final=GeneratorSize(2, 8, MAPS),
    final_training=FEW,
    supervised=SupervisedSize(2, 8, MAPS),
    mend=TransformedSize(2, 3, MAPS, 0.1),
)


@pytest.fixture(scope="module", autouse=True)
def place(small_world, tmp_path_factory):
    """A folder of checkpoints that all tests share."""
    folder = tmp_path_factory.mktemp("ablations")
    with small_world(TINY, folder):
        yield folder / "tiny" / "checkpoints"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (Ablation("token", rank=1), "rwkv4-dialogue-token-rank1"),
        (Ablation("token", maps=("ffn.key",), layers=(1,)), "rwkv4-dialogue-token-mapsffn.key-layers1"),
        (Ablation("token", label=False, blank=1.0), "rwkv4-dialogue-token-labelFalse-blank1.0"),
        (Ablation("final", features=("ratio", "weight")), "rwkv4-dialogue-final-featuresratio+weight"),
        (Ablation("supervised", teacher="prompt", lessons=0.5), "rwkv4-dialogue-supervised-lessons0.5-teacherprompt"),
        (Ablation("mend", width=2, step=0.5), "rwkv4-dialogue-mend-width2-step0.5"),
    ],
)
def test_each_is_trained_kept_and_found_again(place, monkeypatch, capsys, spec, name):
    """Under its own name; loading it by file alone gives the same generator."""
    first = ablated(spec, get_profile("tiny"))
    assert checkpoint_name(spec, get_profile("cpu")) == name
    path = place / f"{name}-tiny.safetensors"
    record = files.load_tensors(path)[1]["record"]
    assert record["ablation"] == stages.plain(spec.changes)
    monkeypatch.setattr(stages, "fit", None)
    capsys.readouterr()
    again = ablated(spec, get_profile("tiny"))
    assert f"{spec.name}: loaded {path.name}" in capsys.readouterr().out
    lm = stages.load_or_train("lm", get_profile("tiny"))
    third = stages.load_generator(str(path), lm)
    one, two, three = (g.memorize(lm, ["My pet is a dog.\n"]) for g in (first, again, third))
    for name in one.factors:
        assert torch.equal(one.factors[name].U, two.factors[name].U)
        assert torch.equal(one.factors[name].U, three.factors[name].U)


def test_what_is_not_changed_is_the_profiles():
    """Rank, maps and layers are as asked for; without a change it is the profile's generator, bit for bit."""
    usual, same = stages.load_or_train("token", get_profile("tiny")), ablated(Ablation("token"), get_profile("tiny"))
    assert all(torch.equal(a, b) for a, b in zip(usual.state_dict().values(), same.state_dict().values(), strict=True))
    made = ablated(Ablation("token", rank=1, maps=("ffn.key",), layers=(1,)), get_profile("tiny"))
    assert (made.rank, made.names) == (1, ["blocks.1.ffn.key"])
    seeded = checkpoint_name(Ablation("token", rank=1), get_profile("smoke"), 3)
    assert seeded == "rwkv4-dialogue-token-rank1-seed3-smoke"


def test_a_generators_trainings(monkeypatch):
    """The profile's own first, then the same with other seeds, for the same model, each with its own checkpoint."""
    monkeypatch.setitem(PROFILES, "tiny", replace(TINY, evaluation=replace(TINY.evaluation, trainings=(0, 2))))
    lm = stages.load_or_train("lm", get_profile("tiny"))
    found = ablations.trainings(get_profile("tiny"))
    assert list(found) == [0, 2]
    assert found[0].checkpoint.name == "rwkv4-dialogue-token-tiny.safetensors"
    assert found[2].checkpoint.name == "rwkv4-dialogue-token-seed2-tiny.safetensors"
    one, two = (generator.state_dict() for generator in found.values())
    assert not all(torch.equal(one[name], two[name]) for name in one)
    assert files.load_tensors(found[2].checkpoint)[1]["record"]["lm"] == lm.fingerprint()
    assert all(p.evaluation.trainings[0] == 0 for p in PROFILES.values())


def test_from_texts():
    """As the command line gives them."""
    texts = ["rank=8", "layers=0,1", "features=ratio,weight", "label=false", "lr=1e-3", "teacher=prompt"]
    expected = Ablation(
        "token", rank=8, layers=(0, 1), features=("ratio", "weight"), label=False, lr=1e-3, teacher="prompt"
    )
    assert Ablation.of("token", texts) == expected
    for text in ("rank", "rank=", "rank=x", "rank=1,2", "label=no", "size=3"):
        with pytest.raises(UserError, match=text):
            Ablation.of("token", [text])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Ablation("static"), "unknown stage 'static'"),
        (Ablation("token", features=("ratio",)), "a token generator has no features to be changed"),
        (Ablation("final", label=False, teacher="prompt"), "a final generator has no label, teacher"),
        (Ablation("token", layers=(7,)), "no such map in layer 7"),
        (Ablation("token", maps=("att.gate",)), "no linear map"),
        (Ablation("token", blank=1.5), "shares are 0 to 1"),
        (Ablation("token", rank=1000), "rank 1000 asked for"),
    ],
)
def test_what_cannot_be_changed_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        ablations.ablated(spec, get_profile("tiny"))


@pytest.mark.parametrize(("steps", "warmup"), [(6, 1), (60, 10), (600, 30)])
def test_a_shorter_training_warms_up_in_a_sixth_of_its_steps(monkeypatch, steps, warmup):
    """And never for longer than the profile's."""
    long = replace(TINY, name="long", token_training=replace(FEW, steps=1200, warmup=30))
    lm = stages.load_or_train("lm", get_profile("tiny"))
    plan = ablations.plan_of(Ablation("token", steps=steps), long, lm)
    assert (plan.training.steps, plan.training.warmup) == (steps, warmup)
    assert plan.record["training"]["warmup"] == warmup
    assert ablations.plan_of(Ablation("token"), long, lm).training.warmup == 30
    assert ablations.plan_of(Ablation("token", steps=steps, warmup=3), long, lm).training.warmup == 3
