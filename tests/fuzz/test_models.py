"""Models in the layouts that are read, damaged or made up: a model that can be run, or one UserError that names it."""

import functools
import io
import json
import warnings

import pytest
import torch
from families import HEADS, library
from fuzzing import damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from prosg_lib import files
from prosg_lib.backbones.loading import load_model, save_model
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7, RWKV7Config
from prosg_lib.backbones.rwkv_layouts import to_author
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*checksum:UserWarning", "ignore:Casting complex")

CHANGES = {
    "left out": None,
    "whole numbers": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "half": lambda t: t.half(),
    "flat": torch.flatten,
    "turned": lambda t: t.mT if t.ndim > 1 else t[None],
    "narrow": lambda t: t[..., :1],
    "empty": lambda t: t[:0],
    "one number": lambda t: torch.zeros(()),
    "infinite": lambda t: torch.full_like(t, torch.inf),
    "sparse": lambda t: t.to_sparse(),
    "expanded": lambda t: torch.zeros(1).expand(10**6, 10**6),
}
NAMES = ("module.{}", "{}.lora_A", "blocks.99999999.{}", "blocks", "", "blocks.0.att.r_k", "blocks.0.att.time_first")


@functools.cache
def weights(family):
    torch.manual_seed(0)
    sizes = RWKV4Config(64, 16, 2, 32) if family is RWKV4 else RWKV7Config(64, 16, 2, 32, 8, 4, 4, 4, 4)
    return {name: tensor.clone() for name, tensor in to_author(family(sizes)).items()}


@st.composite
def edited(draw):
    """Some tensors changed, left out or renamed."""
    found = dict(weights(draw(st.sampled_from([RWKV4, RWKV7]))))
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=3, unique=True)):
        change, tensor = CHANGES[draw(st.sampled_from(sorted(CHANGES)))], found.pop(name)
        new = draw(st.just("{}") | st.just("{}") | st.sampled_from(NAMES)).format(name)
        if change is not None:
            found[new] = change(tensor)
    return found


@torch.no_grad()
def loaded_or_refused(path):
    """What is loaded can be run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = tried(load_model, path)
    if lm is not None:
        assert lm(torch.tensor([[0, 1]]))[0].isfinite().all()


WHOLE = (lambda w: w, lambda w: {"model": w, "step": 1}, lambda w: {"a": w, "b": w}, lambda w: [w])


@fuzz(60)
@given(edited(), st.sampled_from(WHOLE), st.booleans())
def test_weights_that_torch_saved(tmp_path_factory, content, whole, zipped):
    path = tmp_path_factory.getbasetemp() / "m.pth"
    torch.save(whole(content), path, _use_new_zipfile_serialization=zipped)
    loaded_or_refused(path)


@fuzz(40)
@given(edited(), st.sampled_from(["m.st", "m.safetensors"]), st.booleans())
def test_weights_that_safetensors_saved(tmp_path_factory, content, name, own):
    path = tmp_path_factory.getbasetemp() / name
    content = {n: t.contiguous() for n, t in content.items() if not t.is_sparse and t.numel() < 10**6}
    if own:
        files.save_tensors(path, content, {"kind": "lm"})
    else:
        path.write_bytes(save(content))
    loaded_or_refused(path)


@fuzz(60)
@given(st.sampled_from(["m.pth", "m.st", "old.pth"]), st.data())
def test_damaged_files(tmp_path_factory, name, data):
    buffer = io.BytesIO()
    torch.save(weights(RWKV4), buffer, _use_new_zipfile_serialization=name == "m.pth")
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(damaged(save(weights(RWKV4)) if name == "m.st" else buffer.getvalue())))
    loaded_or_refused(path)


HEADER = {"kind": "lm", "ends": [0], "tokenizer": "", "tokenizer_kind": "bpe", "record": {}}


@fuzz(40)
@given(st.dictionaries(st.sampled_from(sorted(HEADER)), json_values(), min_size=1, max_size=2))
def test_headers(tmp_path_factory, changes):
    path, header = tmp_path_factory.getbasetemp() / "m.safetensors", HEADER | changes
    if json.dumps(header).count("NaN") + json.dumps(header).count("Infinity") == 0:
        files.save_tensors(path, weights(RWKV4), header)
        loaded_or_refused(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each kind of model one, with a tokenizer, and the contents of their JSON files."""
    base = tmp_path_factory.mktemp("folders")
    lm = RWKV4(RWKV4Config(2048, 8, 1, 8))
    lm.tokenizer = load_tokenizer()
    save_model(lm, base / "rwkv4", "transformers")
    library("Llama", **HEADS).save_pretrained(base / "llama")
    return {path: path.read_bytes() for path in sorted(base.glob("*/*.json"))}


@fuzz(60)
@given(data=st.data())
def test_configurations(folders, data):
    path = data.draw(st.sampled_from(sorted(folders)))
    if data.draw(st.booleans()):
        content = data.draw(damaged(folders[path]))
    else:
        plain = json.loads(folders[path])
        values = json_values() | st.sampled_from([10**9, 2**63, [10**9]])
        changes = data.draw(st.dictionaries(st.sampled_from(sorted(plain)), values, min_size=1, max_size=2))
        content = json.dumps(plain | changes).encode()
    try:
        path.write_bytes(content)
        loaded_or_refused(path.parent)
    finally:
        path.write_bytes(folders[path])
