"""Models come back from every layout as they went in; whatever is none that is known is refused in one sentence."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, RwkvForCausalLM

from prosg_lib import files, models, paths
from prosg_lib.backbones import rwkv7
from prosg_lib.backbones.rwkv4 import RWKV4, to_hf, to_weights
from prosg_lib.backbones.transformer import TransformerConfig, new_llama
from prosg_lib.errors import UserError
from prosg_lib.models import load_model, save_model
from prosg_lib.world_tokenizer import WorldTokenizer

NAMES = {"prosg": "m.safetensors", "transformers": "folder", "author": "m.pth"}

every_layout = pytest.mark.parametrize(
    ("family", "layout"),
    [*(("rwkv4", layout) for layout in models.LAYOUTS), ("rwkv7", "prosg"), ("rwkv7", "author")],
)


def assert_same_weights(a, b):
    assert a.config == b.config
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


@every_layout
def test_round_trip(lm, tmp_path, layout):
    path = tmp_path / NAMES[layout]
    save_model(lm, path, layout)
    again = load_model(path)
    assert type(again) is type(lm)
    assert_same_weights(again, lm)
    assert again.fingerprint() == lm.fingerprint()
    assert not again.training
    if layout == "author":
        assert again.tokenizer is None
    else:
        assert again.tokenizer.encode("Ada, 7 cats\n") == lm.tokenizer.encode("Ada, 7 cats\n")


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_float32(make_lm, tmp_path, layout, dtype):
    save_model(make_lm(dtype=dtype), tmp_path / NAMES[layout], layout)
    again = load_model(tmp_path / NAMES[layout])
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    assert_same_weights(again, make_lm(dtype=dtype).float())


@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_a_world_tokenizer_goes_with_the_model(lm, tmp_path):
    """In the project's own layout. transformers has no such tokenizer, and an author's file none at all."""
    lm.tokenizer = WorldTokenizer({1 + b: bytes([b]) for b in range(256)} | {257: "東京".encode()})
    save_model(lm, tmp_path / "m.safetensors", "prosg")
    again = load_model(tmp_path / "m.safetensors")
    assert again.tokenizer.encode("東京, 7\n") == lm.tokenizer.encode("東京, 7\n") == (257, 45, 33, 56, 11)
    assert lm.generate(["東京"], max_new_tokens=5, stop=None) == again.generate(["東京"], max_new_tokens=5, stop=None)
    tensors, meta = files.load_tensors(tmp_path / "m.safetensors")
    files.save_tensors(tmp_path / "m.safetensors", tensors, meta | {"tokenizer_kind": "words"})
    with pytest.raises(UserError, match="tokenizer of kind 'words'; there are bpe, world"):
        load_model(tmp_path / "m.safetensors")
    if isinstance(lm, RWKV4):
        save_model(lm, tmp_path / "folder", "transformers")
        assert load_model(tmp_path / "folder").tokenizer is None


@pytest.mark.parametrize("family", ["rwkv7"])
def test_layouts_that_a_model_does_not_have(lm, tmp_path):
    with pytest.raises(UserError, match="no class for a RWKV7; save it as 'prosg' or 'author'"):
        save_model(lm, tmp_path / "folder", "transformers")
    assert not (tmp_path / "folder").exists()
    transformer = new_llama(TransformerConfig("llama", 50, 16, 1, 32, 2))
    with pytest.raises(UserError, match="a CausalTransformer has no author's layout"):
        save_model(transformer, tmp_path / "m.pth", "author")


@torch.no_grad()
def test_transformers_loads_our_folder(lm, tmp_path):
    save_model(lm, tmp_path, "transformers")
    theirs, info = RwkvForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(0, 2000, (2, 40), generator=torch.Generator().manual_seed(0))
    assert_close(theirs.eval()(ids).logits, lm(ids)[0], rtol=1e-4, atol=1e-4)
    text = "Ada lives in Rome.\n"
    assert tuple(AutoTokenizer.from_pretrained(tmp_path)(text).input_ids) == lm.tokenizer.encode(text)


def test_we_load_folders_of_transformers(lm, tmp_path):
    """Their safetensors, their shards, and the older .bin."""
    save_model(lm, tmp_path / "ours", "transformers")
    theirs = RwkvForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_model(tmp_path / "theirs"), lm)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert_same_weights(load_model(tmp_path / "shards"), lm)
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    again = load_model(tmp_path / "theirs")
    assert_same_weights(again, lm)
    assert again.tokenizer is None


@pytest.mark.parametrize(
    ("family", "name", "laid_out"), [("rwkv4", "ffn.time_mix_k", to_weights), ("rwkv7", "ffn.x_k", rwkv7.to_weights)]
)
def test_authors_file_is_a_plain_dict_of_tensors(lm, tmp_path, name, laid_out):
    save_model(lm, tmp_path / "m.pth", "author")
    weights = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(weights) is dict
    assert weights[f"blocks.1.{name}"].shape == (1, 1, 16)
    assert weights.keys() == laid_out(lm).keys()
    assert all(torch.equal(t, weights[n]) for n, t in laid_out(lm).items())


def test_shipped_names(lm, tmp_path, monkeypatch):
    """As `load_or_train` writes them: without a tokenizer of their own; the project's is theirs."""
    monkeypatch.setattr(models.paths, "data_dir", lambda: tmp_path)
    files.save_tensors(tmp_path / "checkpoints" / "rwkv4-tiny.safetensors", lm.state_dict(), {"kind": "lm"})
    files.save_tensors(tmp_path / "checkpoints" / "tiny-token.safetensors", {}, {"kind": "generator"})
    (tmp_path / "tokenizer.json").write_text(lm.tokenizer.to_json())
    again = load_model("rwkv4-tiny")
    assert_same_weights(again, lm)
    assert again.tokenizer.vocab == lm.config.vocab
    with pytest.raises(UserError, match=r"there are: rwkv4-tiny, tiny-token"):
        load_model("rwkv4-huge")
    with pytest.raises(UserError, match="holds a generator, not a language model"):
        load_model("tiny-token")


class Bomb:
    """A pickle that would run code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    save = {
        "zip.pth": lambda path, content: torch.save(content, path),
        "raw.pth": lambda path, content: path.write_bytes(pickle.dumps(content, protocol=2)),
    }
    for name, write in save.items():
        write(tmp_path / name, {"emb.weight": Bomb(tmp_path / "exploded")})
        with pytest.raises(UserError, match="never run"):
            load_model(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@every_layout
def test_damaged_files_are_refused(lm, tmp_path, layout):
    source = tmp_path / NAMES[layout]
    save_model(lm, source, layout)
    path = source / "model.safetensors" if source.is_dir() else source
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cut short"):
            load_model(source)


def test_a_damaged_config_is_refused(lm, tmp_path):
    save_model(lm, tmp_path / "folder", "transformers")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json, line 1: not JSON"):
        load_model(tmp_path / "folder")


def test_foreign_files_are_refused(lm, tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="tensors by name"):
        load_model(tmp_path / "list.pth")
    torch.save({"epoch": 3, "model": {"a": torch.zeros(2)}}, tmp_path / "run.pth")
    with pytest.raises(UserError, match="tensors by name"):
        load_model(tmp_path / "run.pth")
    torch.save({"layers.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"these 1 tensors \(layers.0.weight\) are of no model that is known"):
        load_model(tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="of no model that is known"):
        load_model(tmp_path / "empty.pth")
    torch.save(to_weights(lm) | {"blocks.0.att.ln_x.weight": torch.zeros(16)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"not RWKV-4's: .* 1 unknown \(blocks.0.att.ln_x.weight\)"):
        load_model(tmp_path / "more.pth")
    weights = {n.replace("time_first", "time_faaaa"): t for n, t in to_weights(lm).items()}
    torch.save(weights, tmp_path / "rwkv5.pth")
    with pytest.raises(UserError, match=r"neither blocks.0.att.time_first \(RWKV4\) nor blocks.0.att.r_k \(RWKV7\)"):
        load_model(tmp_path / "rwkv5.pth")
    safetensors.torch.save_file(to_hf(lm), tmp_path / "hf.safetensors")
    with pytest.raises(UserError, match="not one of this project's"):
        load_model(tmp_path / "hf.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load_model("no/such/file.pth")


@pytest.mark.parametrize("family", ["rwkv7"])
def test_rwkv7s_that_are_not_whole_are_refused(lm, tmp_path):
    """A tensor lost, one too many, one quantised: the file is recognised, and the fault is named."""
    weights = rwkv7.to_weights(lm)
    for change, message in (
        ({}, r"not RWKV-7's: 1 tensors missing \(blocks.2.att.g2\), 0 unknown"),
        ({"blocks.2.att.g2": weights["blocks.2.att.g2"], "x": torch.zeros(2)}, r"0 tensors missing \(\), 1 unknown"),
        ({"blocks.2.att.g2": torch.zeros(5, 16, dtype=torch.uint8)}, r"blocks.2.att.g2 is torch.uint8; quantised"),
    ):
        torch.save({n: t for n, t in weights.items() if n != "blocks.2.att.g2"} | change, tmp_path / "m.pth")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m.pth")


def test_foreign_folders_are_refused(lm, tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    save_model(lm, tmp_path, "transformers")
    config = json.loads((tmp_path / "config.json").read_text())

    def with_config(change):
        files.write_json(tmp_path / "config.json", config | change)
        return load_model(tmp_path)

    assert_same_weights(with_config({"auto_map": {"AutoModel": "evil.Model"}}), lm)  # names code; nobody reads it
    with pytest.raises(UserError, match="of type 'llama'; only 'rwkv'"):
        with_config({"model_type": "llama"})
    with pytest.raises(UserError, match=r"layer_norm_epsilon = 0\.001"):
        with_config({"layer_norm_epsilon": 1e-3})
    with pytest.raises(UserError, match=r"num_hidden_layers = 4, but .* have 3"):
        with_config({"num_hidden_layers": 4})
    files.write_json(tmp_path / "config.json", config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(tmp_path)


def test_unknown_layout(lm, tmp_path):
    with pytest.raises(UserError, match="unknown layout 'gguf'; there are prosg, transformers, author"):
        save_model(lm, tmp_path / "m", "gguf")


def test_a_hub_that_cannot_be_reached(tmp_path):
    """The real client, pointed at a port where nobody listens."""
    code = (
        "from prosg_lib.models import load_model\n"
        "from prosg_lib.errors import UserError\n"
        "try: load_model('owner/name')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=paths.repo_root(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "could not be fetched from the hub" in done.stdout
    assert "local folder's path" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_hub_gives_a_folder(lm, tmp_path, monkeypatch):
    """What is fetched is read like any folder, and no file with code is asked for."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    save_model(lm, tmp_path, "transformers")
    assert_same_weights(load_model("owner/name"), lm)
    assert asked == [("owner/name", ["config.json", "tokenizer.json", "model*.safetensors"])]
