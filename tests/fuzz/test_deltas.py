"""A delta's own file and a LoRA adapter of PEFT, damaged or made up."""

import functools
import json
import warnings

import pytest
import torch
from checks import ids_of, random_delta
from fuzzing import damaged, fuzz, json_values, tried
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from torch.testing import assert_close

from prosg_lib import files
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.deltas.peft import CONFIG, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:.*checksum:UserWarning")

MAPS = ("blocks.0.att.output", "blocks.1.ffn.key")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


@functools.cache
def model():
    torch.manual_seed(0)
    return RWKV4(RWKV4Config(64, 16, 2, 32)).eval()


@functools.cache
def delta():
    return random_delta(model(), names=MAPS).scaled(0.5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder; what PEFT's two files in it held at first; and their bytes."""
    folder = tmp_path_factory.mktemp("adapter")
    delta().save_peft(folder, model())
    config, tensors = files.read_json(folder / CONFIG), files.load_foreign_tensors(folder / WEIGHTS)
    return folder, config, tensors, {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def edits(value, names):
    """For some of these names another value, or None for none at all."""
    return st.dictionaries(st.sampled_from(names), st.none() | value, max_size=2)


@st.composite
def odd_tensors(draw):
    """Mostly of shapes that fit a factor, and mostly finite."""
    shape = draw(st.sampled_from([(1, 16, 2), (1, 32, 2), (2, 16), (16, 2), (2, 32), (2, 16, 2), (1, 16, 0), (0,), ()]))
    tensor = torch.ones(shape)
    if tensor.numel():
        tensor.view(-1)[-1] = draw(st.sampled_from([1.0, 1e38, 1e-40, float("nan"), float("inf")]))
    return tensor.to(draw(st.sampled_from(DTYPES)))


def edited(values, changes):
    return {name: value for name, value in (values | changes).items() if value is not None}


def applied_or_refused(found):
    """To the model; where it is not refused, nothing is left behind."""
    with torch.no_grad():
        tried(model(), ids_of(1, 3, vocab=64), None, found)
    assert not any(module._forward_hooks for module in model().modules())


@fuzz(60)
@given(st.data())
def test_a_damaged_delta_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    delta().save(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with warnings.catch_warnings(record=True) as warned:
        found = tried(LowRankDelta.load, path)
    if found and not warned:  # or the name of the checksum itself is damaged, and the file passes for an old one
        assert (found.fingerprint, found.scale) == (delta().fingerprint, delta().scale)
        assert all(torch.equal(a, b) for n in MAPS for a, b in zip(found.factors[n], delta().factors[n], strict=True))


@fuzz(80)
@given(
    edits(odd_tensors(), [f"{name}.{part}" for name in (*MAPS, "", "blocks.9.att.key") for part in ("U", "V", "W")]),
    edits(json_values(), ["kind", "fingerprint", "scale", "more"]),
)
def test_a_made_up_delta_is_refused_or_what_it_says(tmp_path_factory, tensors, header):
    path = tmp_path_factory.getbasetemp() / "made-up.safetensors"
    plain = {f"{name}.{part}": t for name, f in delta().factors.items() for part, t in zip("UV", f, strict=True)}
    tensors = edited(plain, tensors)
    header = edited({"kind": "delta", "fingerprint": delta().fingerprint, "scale": 0.5}, header)
    path.write_bytes(save(tensors, metadata={files.META_KEY: json.dumps(header)}))
    found = tried(LowRankDelta.load, path)
    if found:
        held = {f"{name}.{part}": t for name, f in found.factors.items() for part, t in zip("UV", f, strict=True)}
        assert held.keys() == tensors.keys()
        assert all(torch.equal(t, tensors[name]) and t.isfinite().all() for name, t in held.items())
        assert {"kind": "delta", "fingerprint": found.fingerprint, "scale": found.scale} == header
        applied_or_refused(found)


@fuzz(60)
@given(st.data())
def test_a_damaged_adapter_is_refused_or_what_it_says(adapter, data):
    folder, _, tensors, content = adapter
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes(content[name])
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    (folder / name).write_bytes(data.draw(damaged(content[name])))
    found = tried(LowRankDelta.load_peft, folder, model())
    if found:
        assert_is_what_it_says(found, files.read_json(folder / CONFIG), tensors)


def assert_is_what_it_says(found, config, tensors):
    """Factors and scales as PEFT computes them."""
    assert len(found.factors) == len(tensors) / 2
    for name, (u, v) in found.factors.items():
        theirs = model().hf_module_name(name)
        a, b = (tensors[f"base_model.model.{theirs}.lora_{part}.weight"] for part in "AB")
        own = config.get("alpha_pattern") or {}
        alpha = own.get(get_pattern_key(own, theirs), config.get("lora_alpha", 8))
        expected = b.float() * (alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a)))
        assert_close(u[0], expected, rtol=1e-6, atol=0)
        assert torch.equal(v[0], a.float().t())


@fuzz(80)
@given(st.data())
def test_a_made_up_adapter_is_refused_or_what_it_says(adapter, data):
    folder, config, tensors, _ = adapter
    patterns = st.dictionaries(
        st.sampled_from(["key", r"blocks\.\d\..*", "(", "e"]), json_values() | st.just(2), max_size=2
    )
    numbers = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]
    others = [*config, "use_dora", "layers_pattern", "modules_to_save", "later"]
    changes = edits(json_values() | patterns, numbers) | edits(json_values(), others)
    config = edited(config, data.draw(changes))
    tensors = edited(tensors, data.draw(edits(odd_tensors(), [*tensors, "base_model.model.x.lora_A.weight", "x"])))
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))
    found = tried(LowRankDelta.load_peft, folder, model())
    if found:
        assert_is_what_it_says(found, config, tensors)
        applied_or_refused(found)
