"""Whatever the user names: the model that its generator was trained for, of any family that is shipped or read."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from prosg_lib import files, paths
from prosg_lib.backbones.hub_families import Mamba2
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.errors import UserError
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import stages
from prosg_lib.training.model_choice import choose_generator, choose_model


@pytest.mark.parametrize(
    ("name", "kind", "generator", "way"),
    [
        ("rwkv4-dialogue", RWKV4, "rwkv4-dialogue-token", TokenGenerator),
        ("rwkv4-dialogue", RWKV4, "rwkv4-dialogue-adapter", AdapterStep),
        ("mamba2-dialogue", Mamba2, "mamba2-dialogue-token", TokenGenerator),
        ("llama-pairs", CausalTransformer, "llama-pairs-adapter-characters-lc", AdapterStep),
        ("rwkv4-pairs", RWKV4, "rwkv4-pairs-token-characters-lc", TokenGenerator),
    ],
)
def test_shipped_models_and_their_generators(name, kind, generator, way):
    """Every family: the weights are those that the generator was trained for, and it changes the model's answers."""
    lm = choose_model(name)
    assert isinstance(lm, kind)
    assert not lm.training
    assert not any(p.requires_grad for p in lm.parameters())
    found = choose_generator(generator, lm)
    assert isinstance(found, way)
    delta = found.memorize(lm, ["My home town is Oslo.\n"])
    ids = torch.tensor([load_tokenizer().encode("My home town is")])
    assert not torch.allclose(lm(ids, None, delta)[0], lm(ids)[0], atol=1e-3)


def saved(model, folder):
    model.save_pretrained(folder)
    load_tokenizer().save(folder)
    return folder


def test_a_folder_is_read_by_what_it_holds(tmp_path):
    """A class with a recurrence by its adapter, any other as a transformer; its numbers are the class's own."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "vocab_size": 2048}
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(**ends, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    lm = choose_model(str(saved(gpt, tmp_path / "gpt")))
    assert isinstance(lm, CausalTransformer)
    assert lm.state_grows
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(lm(ids)[0], gpt(ids).logits)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "state_size": 8, "n_groups": 1}
    mamba = Mamba2ForCausalLM(Mamba2Config(**ends, **sizes, chunk_size=8))
    lm = choose_model(str(saved(mamba, tmp_path / "mamba")))
    assert isinstance(lm, Mamba2)
    assert not lm.state_grows


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nowhere/at-all"])
def test_nothing_of_that_name(name):
    with pytest.raises(UserError, match=r"nothing|nowhere"):
        choose_model(name)


def test_generators_that_do_not_do(tmp_path):
    """None of that name; another model's, of either kind; one that changes all weights; a file of something else."""
    lm = choose_model("rwkv4-dialogue")
    for name, said in (
        ("nothing", "does not exist"),
        ("mamba2-dialogue-token", "was trained for model eb73e910bb229db8, not for this one"),
        ("rwkv4-pairs-token-characters-lc", "was trained for model"),
        ("rwkv4-pairs-adapter-characters-lc", "was trained for model"),
        ("rwkv4-dialogue", "not a generator"),
    ):
        with pytest.raises(UserError, match=said):
            choose_generator(name, lm)
    with pytest.raises(UserError, match="changes all weights of the model"):
        choose_generator("llama-pairs-weights-reversal-lc", choose_model("llama-pairs"))
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {"kind": "delta"})
    with pytest.raises(UserError, match="not a generator"):
        choose_generator(str(tmp_path / "a.safetensors"), lm)


def test_a_models_own_generator(tmp_path, monkeypatch):
    """The token-wise one that is shipped with it; none for others, nor for paths."""
    assert stages.own_generator("rwkv4-dialogue") == "rwkv4-dialogue-token"
    assert stages.own_generator("mamba2-dialogue") == "mamba2-dialogue-token"
    assert stages.own_generator("rwkv4-pairs") is None
    assert stages.own_generator(str(paths.data_dir() / "checkpoints" / "rwkv4-dialogue.safetensors")) is None
    assert stages.own_generator("owner/rwkv4-dialogue") is None
