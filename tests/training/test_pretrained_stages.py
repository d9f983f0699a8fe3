"""The small model and a generator for any model: trained once, then found, and bound to what they were trained for."""

from dataclasses import replace

import pytest
import torch
from transformers import ByT5Tokenizer

from prosg_lib import paths
from prosg_lib.backbones import loading as models
from prosg_lib.backbones.hub_families import Mamba2
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.config.sizes import Training
from prosg_lib.errors import UserError
from prosg_lib.generators.base import SCALE
from prosg_lib.tasks.dialogue import Shape
from prosg_lib.text.tokenizer import Tokenizer, folder_tokenizer
from prosg_lib.training import stages
from prosg_lib.training.pretrained_stages import dialogues_of, generator_for, new_small, small_model

STEPS = Training(steps=2, batch=2, lr=1e-2, facts=(1,), distances=(0,), warmup=1)
SIZES = replace(PROFILES["smoke"].pretrained, lm=STEPS, rank=2, token_training=STEPS)


@pytest.fixture(autouse=True)
def place(small_world, tmp_path):
    with small_world(replace(PROFILES["smoke"], name="tiny", pretrained=SIZES), tmp_path / "runs"):
        yield


def test_the_small_model_is_trained_once_and_then_found(capsys):
    first = small_model(get_profile("tiny"))
    assert isinstance(first, Mamba2)
    assert "mamba2-dialogue-tiny: training" in capsys.readouterr().out
    again = small_model(get_profile("tiny"))
    assert "loaded mamba2-dialogue-tiny.safetensors" in capsys.readouterr().out
    assert again.fingerprint() == first.fingerprint()
    assert again.checkpoint == paths.runs_dir("tiny") / "checkpoints" / "mamba2-dialogue-tiny.safetensors"
    assert again.checkpoint.with_suffix(".jsonl").is_file()


def test_a_model_from_a_folder_gets_a_generator_of_its_own(tmp_path, capsys):
    """The folder's model has the fingerprint of what was saved, so what was trained for one is found for the other; for
    other weights it is not used."""
    models.save_model(small_model(get_profile("tiny")), tmp_path / "model", "transformers")
    lm = models.load_model(tmp_path / "model").requires_grad_(False)
    generator = generator_for(lm, "some/model", get_profile("tiny"), maps=("in_proj",))
    assert generator.checkpoint.name == "some-model-token-tiny.safetensors"
    assert all(name.endswith("in_proj") for name in generator.names)
    capsys.readouterr()
    same = generator_for(small_model(get_profile("tiny")), "some/model", get_profile("tiny"), maps=("in_proj",))
    assert "some-model-token-tiny: loaded" in capsys.readouterr().out
    delta, other = (g.memorize(lm, ["Call me captain.\n"]) for g in (generator, same))
    assert delta.scale == SCALE
    assert any(f.U.abs().max() > 0 for f in delta.factors.values())
    for name, factors in delta.factors.items():
        assert torch.equal(factors.U, other.factors[name].U)
    next(lm.parameters()).add_(1.0)
    generator_for(lm, "some/model", get_profile("tiny"), maps=("in_proj",))
    assert "some-model-token-tiny.safetensors was trained otherwise (lm); not used" in capsys.readouterr().out


def test_a_model_with_a_tokenizer_of_any_kind_gets_a_generator(tmp_path, capsys):
    """One without a tokenizer.json: the record names it, so that the generator is found again, and not with another."""
    lm = new_small(SIZES)
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
    lm.tokenizer = folder_tokenizer(tmp_path / "tokenizer", lm.config.vocab)
    generator_for(lm, "m", get_profile("tiny"), maps=("in_proj",))
    assert "m-token-tiny: training" in capsys.readouterr().out
    generator_for(lm, "m", get_profile("tiny"), maps=("in_proj",))
    assert "m-token-tiny: loaded" in capsys.readouterr().out
    lm.tokenizer = stages.load_tokenizer()
    generator_for(lm, "m", get_profile("tiny"), maps=("in_proj",))
    assert "was trained otherwise (data); not used" in capsys.readouterr().out


def test_dialogues_are_in_the_models_own_tokens():
    """Of a tokenizer with fewer merges a prompt takes more tokens, and says the same."""
    lm = new_small(SIZES)
    lm.tokenizer = Tokenizer.train(["User: My pet is a parrot."], 300)
    data = dialogues_of(lm, "train", 0)
    item = data.item(0, Shape(1, 0, 1))
    assert lm.tokenizer.decode(data.encode_prompt(item)) == item.prompt
    assert len(data.encode_prompt(item)) > len(stages.dialogues("train", 0).encode_prompt(item))


def test_what_cannot_be_trained_is_refused():
    lm = new_small(SIZES)
    with pytest.raises(UserError, match="no tokenizer"):
        generator_for(lm, "m", get_profile("tiny"))
    lm.tokenizer = stages.load_tokenizer()
    with pytest.raises(UserError, match=r"no linear map \.\.\.attention"):
        generator_for(lm, "m", get_profile("tiny"), maps=("attention",))
