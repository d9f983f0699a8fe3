"""Generators by name or file: for the model that they were trained for, and for no other."""

import pytest
import torch

from prosg_lib import files, paths
from prosg_lib.backbones.loading import load_model
from prosg_lib.errors import UserError
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training.checkpoints import load_generator, own_generator, shipped


@pytest.mark.parametrize(
    ("model", "generator", "kind"),
    [
        ("rwkv4-dialogue", "rwkv4-dialogue-token", TokenGenerator),
        ("rwkv4-dialogue", "rwkv4-dialogue-adapter", AdapterStep),
        ("mamba2-dialogue", "mamba2-dialogue-token", TokenGenerator),
        ("llama-pairs", "llama-pairs-adapter-characters-lc", AdapterStep),
    ],
)
def test_shipped_models_and_their_generators(model, generator, kind):
    """Every family: the weights are those that the generator was trained for, and it changes the model's answers."""
    lm = load_model(model)
    found = load_generator(generator, lm)
    assert isinstance(found, kind)
    assert not any(p.requires_grad for p in found.parameters())
    delta = found.memorize(lm, ["My home town is Oslo.\n"])
    ids = torch.tensor([load_tokenizer().encode("My home town is")])
    assert not torch.allclose(lm(ids, None, delta)[0], lm(ids)[0], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("nothing", "rwkv4-dialogue", "does not exist"),
        ("mamba2-dialogue-token", "rwkv4-dialogue", "was trained for model a15832882040b1d9, not for this one"),
        ("llama-pairs-adapter-characters-lc", "rwkv4-dialogue", "was trained for model"),
        ("rwkv4-dialogue", "rwkv4-dialogue", "holds a lm, not a generator"),
        ("llama-pairs-weights-characters-lc", "llama-pairs", "changes all weights of the model"),
    ],
)
def test_generators_that_do_not_fit(name, model, message):
    with pytest.raises(UserError, match=message):
        load_generator(name, load_model(model))


def test_a_file_of_something_else(tmp_path, lm):
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {"kind": "delta"})
    with pytest.raises(UserError, match="not a generator"):
        load_generator(str(tmp_path / "a.safetensors"), lm)


def test_a_generator_that_asks_for_more_than_there_is(tmp_path):
    """A terabyte: found out by the tensors that are there, not by making it."""
    tensors, meta = files.load_tensors(shipped("rwkv4-dialogue-token"))
    meta["record"]["module"]["width"] = 10**9
    files.save_tensors(tmp_path / "a.safetensors", tensors, meta)
    with pytest.raises(UserError, match="does not hold the tensors of its record"):
        load_generator(str(tmp_path / "a.safetensors"), load_model("rwkv4-dialogue"))


def test_a_models_own_generator():
    """The token-wise one that is shipped with it; none for others, nor for paths."""
    assert own_generator("rwkv4-dialogue") == "rwkv4-dialogue-token"
    assert own_generator("mamba2-dialogue") == "mamba2-dialogue-token"
    assert own_generator("rwkv4-suite-adapter") is None
    assert own_generator("smollm2") is None  # a model that others trained; whoever wants its generator names it
    assert own_generator(str(paths.data_dir() / "checkpoints" / "rwkv4-dialogue.safetensors")) is None
    assert own_generator("owner/rwkv4-dialogue") is None
