"""Generators by file and resumable trainings: bytes that were damaged, and headers with something else in them."""

import functools
import re
from dataclasses import asdict

import pytest
import torch
from fuzzing import changed, damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prosg_lib import files
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import GeneratorSize, RWKV4Config
from prosg_lib.training import loop
from prosg_lib.training.checkpoints import Header, Record, load_generator, new_module

pytestmark = pytest.mark.filterwarnings("ignore:.*checksum:UserWarning")


@functools.cache
def model():
    torch.manual_seed(0)
    return RWKV4(RWKV4Config(64, 16, 2, 32)).eval().requires_grad_(False)


def generator():
    """The tensors and the header of a token-wise generator."""
    size = GeneratorSize(2, 8, ("att.output", "ffn.key"))
    record = Record("x", 1, 0, "x", {"kind": "token", **asdict(size)}, {}, {}, model().fingerprint(), None)
    header = Header("generator", record, {"device": "CPU"})
    return new_module("token", size, model()).state_dict(), asdict(header)


def training():
    """The module, the optimiser and the record of a training."""
    net = nn.Linear(3, 2)
    return net, torch.optim.AdamW(net.parameters()), {"seed": 0, "training": {"steps": 9}}


OTHERS = json_values().filter(lambda value: not re.search("nan|inf", repr(value)))  # which no header can have


def test_a_generator_of_a_damaged_file(tmp_path):
    """Its tensors as they were, or refused."""
    path = tmp_path / "a.safetensors"
    tensors, meta = generator()
    files.save_tensors(path, tensors, meta)
    content = path.read_bytes()

    @fuzz(40)
    @given(st.data())
    def check(data):
        path.write_bytes(data.draw(damaged(content)))
        found = tried(load_generator, str(path), model())
        assert found is None or all(torch.equal(t, tensors[n]) for n, t in found.state_dict().items())

    check()


def test_a_generator_with_another_header(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors, meta = generator()

    @fuzz(150)
    @given(changed(meta, OTHERS))
    def check(header):
        files.save_tensors(path, tensors, header)
        found = tried(load_generator, str(path), model())
        assert found is None or all(torch.equal(t, tensors[n]) for n, t in found.state_dict().items())

    check()


def test_a_training_that_goes_on_from_a_damaged_state(tmp_path):
    """From the step that was kept, or not at all."""
    path = tmp_path / "a.safetensors"
    net, optimiser, record = training()
    net(torch.ones(3)).sum().backward()
    optimiser.step()
    loop._save(path, net, optimiser, 5, record)
    content, (tensors, meta) = path.read_bytes(), files.load_tensors(path)

    @fuzz(80)
    @given(damaged(content) | changed(meta, OTHERS))
    def check(found):
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:
            files.save_tensors(path, tensors, found)
        other, fresh, _ = training()
        step = tried(loop._resume, path, other, fresh, record, 9)
        assert step is None or (0 <= step <= 9 and torch.equal(other.weight, net.weight))

    check()
