"""Shipping: 16 or 8 bits, the generator belongs to the rounded model, and nothing that rounding would spoil."""

import importlib.util
import shutil

import pytest
import torch

from prosg_lib import files, paths
from prosg_lib.backbones.loading import load_model
from prosg_lib.errors import UserError
from prosg_lib.training.checkpoints import load_generator

spec = importlib.util.spec_from_file_location("data_ship", paths.data_dir() / "ship.py")
ship = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ship)

MODEL, STATIC = "rwkv4-dialogue", "rwkv4-dialogue-static"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two trained checkpoints, and an empty folder to ship them to."""
    trained, shipped = tmp_path / "trained", tmp_path / "shipped"
    trained.mkdir(), shipped.mkdir()
    for name in (MODEL, STATIC):
        for ending in ("safetensors", "jsonl"):
            shutil.copy(paths.data_dir() / "checkpoints" / f"{name}.{ending}", trained)
    monkeypatch.setattr(ship, "kept", lambda name, profile: trained / f"{name}.safetensors")
    monkeypatch.setattr(ship, "shipped", lambda name: shipped / f"{name}.safetensors")
    return trained, shipped


def test_a_model_and_its_generator(folders):
    """Half the bytes, nearly the same weights, and the one fits the other, and not the model before it was rounded."""
    trained, shipped = folders
    for name in (MODEL, STATIC):
        ship.ship(name, trained / f"{name}.safetensors")
        assert (shipped / f"{name}.jsonl").is_file()
    before, after = (load_model(folder / f"{MODEL}.safetensors") for folder in folders)
    assert (shipped / f"{MODEL}.safetensors").stat().st_size < 0.55 * (trained / f"{MODEL}.safetensors").stat().st_size
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert 0 <= (one - other).norm() <= ship.FINEST * one.norm()
    file = str(shipped / f"{STATIC}.safetensors")
    assert load_generator(file, after).checkpoint == shipped / f"{STATIC}.safetensors"
    with pytest.raises(UserError, match="was trained for model"):
        load_generator(file, before)
    assert files.load_meta(file)["provenance"]["stored"] == "float16"


def test_matrices_in_eight_bits(folders):
    """A third fewer bytes than in 16 at least; each number is off by half a step at most, and vectors by nothing."""
    trained, shipped = folders
    ship.ship(MODEL, trained / f"{MODEL}.safetensors")
    ship.ship(STATIC, trained / f"{STATIC}.safetensors", eight=True)
    file, lm = shipped / f"{STATIC}.safetensors", load_model(shipped / f"{MODEL}.safetensors")
    assert file.stat().st_size < 0.67 * (trained / f"{STATIC}.safetensors").stat().st_size
    assert files.load_meta(file)["provenance"]["stored"] == "int8"
    kept, _ = files.load_tensors(trained / f"{STATIC}.safetensors")
    generator = load_generator(str(file), lm).state_dict()
    assert generator.keys() == kept.keys()
    for name, tensor in kept.items():
        tall = tensor.ndim == 2 and len(tensor) > tensor.shape[1]
        largest = tensor.float().abs().amax(0 if tall else -1, keepdim=True)
        bound = largest / 127 * 0.501 if tensor.ndim == 2 else 0 * largest
        assert ((generator[name] - tensor.float()).abs() <= bound).all()


def test_another_models_generator_is_refused(folders):
    """Its record names a model that is not the one that was trained."""
    trained, _ = folders
    tensors, meta = files.load_tensors(trained / f"{STATIC}.safetensors")
    meta["record"]["lm"] = "0123456789abcdef"
    files.save_tensors(trained / f"{STATIC}.safetensors", tensors, meta)
    with pytest.raises(UserError, match="was not trained for"):
        ship.ship(STATIC, trained / f"{STATIC}.safetensors")


def test_what_rounding_would_spoil_is_refused(tmp_path):
    """Numbers below 16 bits' smallest."""
    files.save_tensors(tmp_path / "tiny.safetensors", {"small": torch.full((4,), 3e-9)}, {"kind": "lm"})
    with pytest.raises(UserError, match="16 bits would change small by"):
        ship.rounded(tmp_path / "tiny.safetensors")
