"""RWKV-7 is the RWKV-7 of its author's package, and only its own weights become one."""

import os
import subprocess
import sys

import pytest
import torch
from checks import ids_of
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.backbones.rwkv_layouts import to_author
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.errors import UserError


@pytest.fixture
def family():
    return "rwkv7"


def random_model(head, vocab=90):
    """Two heads, every low-rank map of a size of its own, and no vector or matrix that is zero or alike everywhere."""
    torch.manual_seed(0)
    lm = RWKV7(RWKV7Config(vocab, 2 * head, 3, 5 * head, head, 12, 10, 8, 14)).eval()
    for name, p in lm.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=1.0 if "emb" in name else 1.5 / p.shape[1] ** 0.5)
        else:
            p.data += 0.2 * torch.randn_like(p)
    return lm


PEER = """
import sys, torch
from safetensors.torch import load_file, save_file
from rwkv.model import RWKV  # its settings are environment variables, read here

torch.set_num_threads(1)
ids = load_file("ids.safetensors")["ids"].tolist()
for name in sys.argv[1:]:
    model = RWKV(name, "cpu fp32")
    logits, state = model.forward(ids, None, full_output=True)
    save_file({"logits": logits, "state": torch.stack(state[1::3])}, name + "-whole.safetensors")
    logits, state = [], None
    for token in ids:
        out, state = model.forward([token], state)
        logits.append(out)
    save_file({"logits": torch.stack(logits), "state": torch.stack(state[1::3])}, name + "-steps.safetensors")
"""


@torch.no_grad()
def test_logits_and_state_of_the_authors_package(tmp_path):
    """Read as a whole and token by token, more than two chunks: the logits everywhere, and the matrices at the end."""
    ids, models = ids_of(1, 70, 90), {f"head{size}": random_model(size) for size in (64, 16)}
    save_file({"ids": ids[0]}, tmp_path / "ids.safetensors")
    for name, lm in models.items():
        torch.save(to_author(lm), tmp_path / f"{name}.pth")
    settings = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEER, *models]
    subprocess.run(command, env=os.environ | settings, cwd=tmp_path, capture_output=True, check=True)
    for name, lm in models.items():
        logits, state = lm(ids)
        assert logits.std() > 0.5
        steps, stepped = [], None
        for t in range(70):
            out, stepped = lm(ids[:, t : t + 1], stepped)
            steps.append(out)
        for way, ours, end in (("whole", logits, state), ("steps", torch.cat(steps, 1), stepped)):
            theirs = load_file(tmp_path / f"{name}-{way}.safetensors")
            assert_close(ours[0], theirs["logits"], rtol=0, atol=1e-4)
            assert_close(end.tensors["wkv"][0], theirs["state"], rtol=0, atol=1e-3)


def test_a_width_that_heads_do_not_fill_is_refused():
    with pytest.raises(UserError, match="96 is not a multiple of the head size 64"):
        RWKV7Config(10, 96, 1, 96)


def test_bytes_of_the_state_by_hand(lm, prompts):
    """2 vectors and 2 matrices of 8 x 8 a layer; and, at 24 layers of width 1,024, 1,622,016 numbers in float32."""
    assert lm.derive_state(prompts).nbytes() == lm.blank_state(7).nbytes() == 3 * (2 * 16 + 2 * 64) * 4
    with torch.device("meta"):
        large = RWKV7(RWKV7Config(65536, 1024, 24, 4096))
    assert large.blank_state(1).nbytes() == 1_622_016 * 4
    assert large.bfloat16().blank_state(1).nbytes() == 1_622_016 * 4


def test_maps_that_may_be_edited(lm):
    maps = ["att.key", "att.output", "att.receptance", "att.value", "ffn.key", "ffn.value"]
    assert sorted(lm.editable()) == sorted(f"blocks.{layer}.{name}" for layer in range(3) for name in maps)


@torch.no_grad()
def test_features_of_a_state(lm, prompts):
    """A matrix made larger changes one feature, the log of its length; a blank one has features, too."""
    state = lm.derive_state(prompts)
    features = lm.state_features(state)
    assert features.shape == (4, 3 * (2 * 16 + 2 * 64 + 2))
    t = state.tensors
    larger = t["wkv"].clone()
    larger[:, 1, 0] *= 7
    change = lm.state_features(RecurrentState(t | {"wkv": larger})) - features
    moved = change.abs() > 1e-4
    assert moved.sum(1).eq(1).all()
    assert_close(change[moved], torch.full((4,), 7.0).log())
    assert torch.equal(lm.state_features(lm.blank_state(2)), torch.zeros(2, features.shape[1]))


def test_autocast(lm):
    """The maps in bfloat16, sums and state in float32, and gradients for every weight."""
    ids = ids_of(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = lm(ids)
    assert logits.dtype == torch.bfloat16
    assert {t.dtype for t in state.tensors.values()} == {torch.float32}
    expected = lm(ids)[0]
    assert (logits.float() - expected).square().mean().sqrt() < 0.1 * expected.std()
    logits.float().logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lm.parameters())


def test_a_fresh_model_learns():
    """To say a line of random tokens again, which needs the state: from the loss of guessing to a fifth of it."""
    torch.manual_seed(0)
    lm = RWKV7(RWKV7Config(12, 32, 2, 64, 16, 8, 8, 8, 8))
    optimiser = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    losses = []
    for step in range(120):
        line = ids_of(32, 6, 12, seed=step)
        ids = torch.cat([line, line], 1)
        logits = lm(ids[:, :-1])[0][:, 5:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 6:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert 2.2 < losses[0] < 2.8
    assert sum(losses[-10:]) / 10 < 0.2 * losses[0]
