"""The transformer of the dialogues: trained once, loaded afterwards, and of the size it is compared at."""

import pytest
import torch
from test_stages import TINY

from prosg_lib import cli
from prosg_lib.backbones.hub_transformer import CachedTransformer, new_llama
from prosg_lib.config import PROFILES, get_profile
from prosg_lib.tasks.dialogue import Shape, dialogue_batch
from prosg_lib.training import stages
from prosg_lib.training.objectives import lm_objective
from prosg_lib.training.transformer_stages import checkpoint_name, dialogue_transformer


@pytest.fixture(autouse=True)
def place(small_world, tmp_path):
    with small_world(TINY, tmp_path):
        yield


def test_trained_once_and_then_loaded(monkeypatch, capsys):
    """`prosg train transformer` trains and keeps it; afterwards it is loaded, with its tokenizer, to look back."""
    assert cli.main(["train", "transformer", "--profile", "tiny"]) == 0
    assert "transformer: training" in capsys.readouterr().out

    def refuse(*arguments, **named):
        raise AssertionError("it trained")

    monkeypatch.setattr(stages, "fit", refuse)
    lm = dialogue_transformer(get_profile("tiny"))
    assert "loaded llama-dialogue-tiny" in capsys.readouterr().out
    assert isinstance(lm, CachedTransformer)
    assert not lm.training
    assert isinstance(lm.generate(["User: My name is Ada.\n"], max_new_tokens=2)[0], str)


def test_training_looks_as_far_back_as_results_are_quoted():
    """Of every profile but smoke some training texts are as long as 1,024 tokens between prompt and question; width and
    layers are those of the recurrent model; and the cpu profile's has no ending to its name."""
    for name in ("smoke", "cpu", "gpu", "paper"):
        profile = PROFILES[name]
        size = profile.pairs.transformer_size
        assert (size.width, size.layers) == (profile.model.width, profile.model.layers)
        assert name == "smoke" or max(profile.transformer_training.distances) >= 1024
    assert checkpoint_name(get_profile("cpu")) == "llama-dialogue"


def test_fused_attention_trains_to_the_same():
    """The loss and its gradient are those of eager attention, padding included."""
    data = stages.dialogues("train", 0)
    batch = dialogue_batch(data, data.items(3, Shape(2, 0, 2, instructions=1)))
    found = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        lm = new_llama(PROFILES["smoke"].pairs.transformer_size)
        lm.model.set_attn_implementation(attention)
        loss = lm_objective(lm)(0, batch).total
        loss.backward()
        found.append((loss, [p.grad for p in lm.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
