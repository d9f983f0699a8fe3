"""Models come back from every layout as they went in; whatever is no model of a known kind is refused in a sentence."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from fnmatch import fnmatch

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer as BPE
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedTokenizerFast,
    RwkvForCausalLM,
)

from prosg_lib import files, paths
from prosg_lib.backbones import loading as models
from prosg_lib.backbones.hub_families import Mamba2
from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama
from prosg_lib.backbones.loading import load_model, save_model
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv_layouts import to_author
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.text.world_tokenizer import WorldTokenizer, load_world_tokenizer
from prosg_lib.training.checkpoints import load_generator

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(make_lm, tmp_path, layout, dtype):
    """Weights of half precision come back as float32."""
    save_model(make_lm(dtype=dtype), tmp_path / NAMES[layout], layout)
    lm, again = make_lm(dtype=dtype).float(), load_model(tmp_path / NAMES[layout])
    assert type(again) is type(lm)
    assert_same_weights(again, lm)
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    assert again.fingerprint() == lm.fingerprint()
    assert not again.training
    if layout == "author":
        assert again.tokenizer is None
    else:
        assert again.tokenizer.encode("Ada, 7 cats\n") == lm.tokenizer.encode("Ada, 7 cats\n")


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


@pytest.mark.parametrize(("family", "name"), [("rwkv4", "ffn.time_mix_k"), ("rwkv7", "ffn.x_k")])
def test_authors_file_is_a_plain_dict_of_tensors(lm, tmp_path, name):
    save_model(lm, tmp_path / "m.pth", "author")
    weights = torch.load(tmp_path / "m.pth", weights_only=True)
    assert type(weights) is dict
    assert weights[f"blocks.1.{name}"].shape == (1, 1, 16)
    assert weights.keys() == to_author(lm).keys()
    assert all(torch.equal(t, weights[n]) for n, t in to_author(lm).items())


def test_shipped_names(lm, tmp_path, monkeypatch):
    """As `load_or_train` writes them: without a tokenizer of their own; the project's is theirs."""
    monkeypatch.setattr(models.paths, "data_dir", lambda: tmp_path)
    files.save_tensors(tmp_path / "checkpoints" / "rwkv4-tiny.safetensors", lm.state_dict(), {"kind": "lm"})
    files.save_tensors(tmp_path / "checkpoints" / "tiny-token.safetensors", {}, {"kind": "generator"})
    (tmp_path / "tokenizer.json").write_text(lm.tokenizer.to_json())
    again = load_model("rwkv4-tiny")
    assert_same_weights(again, lm)
    assert again.tokenizer.vocab == lm.config.vocab
    with pytest.raises(UserError, match=r"\(there are: rwkv4-tiny\)"):  # a generator is no model
        load_model("rwkv4-huge")
    with pytest.raises(UserError, match="holds a generator, not a language model"):
        load_model("tiny-token")


def test_a_package_without_its_checkout_loads_models_of_ones_own(make_lm, tmp_path, monkeypatch):
    lm = make_lm()
    lm.tokenizer = None
    save_model(lm, tmp_path / "m.safetensors", "prosg")
    monkeypatch.setattr(models.paths, "__file__", str(tmp_path / "site-packages" / "prosg_lib" / "paths.py"))
    load_tokenizer.cache_clear()
    assert load_model(tmp_path / "m.safetensors").tokenizer is None
    load_tokenizer.cache_clear()


SHIPPED = {
    "rwkv4-dialogue": "RWKV4",
    "rwkv7-open": "RWKV7",
    "mamba2-dialogue": "Mamba2",
    "llama-pairs": "CausalTransformer",
}


def test_every_shipped_model_loads_by_its_name():
    """With the project's tokenizer, as what it was trained as, and to the very weights that its generators, if it has
    any, were made for; the list of names has no others."""
    folder = paths.data_dir() / "checkpoints"
    made_for = {path.stem: files.load_meta(path)["record"].get("lm") for path in folder.glob("*.safetensors")}
    for name, kind in SHIPPED.items():
        lm = load_model(name)
        assert type(lm).__name__ == kind
        assert not lm.training
        assert lm.tokenizer.vocab == lm.config.vocab == 2048
        own = {who for generator, who in made_for.items() if generator.startswith(f"{name}-")}
        assert own == {lm.fingerprint()}
    with pytest.raises(UserError, match=rf"there are: {', '.join(sorted(SHIPPED))}\)"):
        load_model("rwkv4-dialogue-tokens")


def test_a_shipped_mamba_keeps_its_prompt():
    """Its generator is found by its name, too, and what it wrote into the weights is known without the text."""
    lm = load_model("mamba2-dialogue")
    generator = load_generator("mamba2-dialogue-token", lm)
    delta = generator.memorize(lm, ["User: You should know that my home town is Oslo.\n"])
    question = ["User: What is my home town?\nBot:"]
    assert lm.generate(question, delta=delta) == [" Oslo."] != lm.generate(question)


@every_layout
def test_the_end_of_texts_goes_with_the_model(lm, tmp_path, layout):
    """But into an author's file, which has room for weights alone."""
    for ends in ((), (7,), (7, 0)):
        lm.ends = ends
        save_model(lm, tmp_path / NAMES[layout], layout)
        assert load_model(tmp_path / NAMES[layout]).ends == (() if layout == "author" else ends)


@pytest.mark.parametrize("which", ["rwkv4", "mamba2"])
def test_the_end_of_texts_in_a_folder(lm, mamba2, tmp_path, which):
    """What generation_config.json says counts; where there is none, config.json's word does."""
    save_model(lm if which == "rwkv4" else mamba2, tmp_path, "transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    for said, ends in ((None, ()), (3, (3,)), ([3, 5], (3, 5))):
        files.write_json(tmp_path / "config.json", config | {"eos_token_id": said})
        assert load_model(tmp_path).ends == ends
    files.write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    assert load_model(tmp_path).ends == (9,)


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


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.st"])
@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_what_trainers_leave_is_read(lm, tmp_path, name):
    """Wrapped, within other things, and by either library."""
    weights = {f"module.{n}": t.clone().contiguous() for n, t in to_author(lm).items()}
    if name == "m.pth":
        torch.save({"state_dict": weights, "epoch": 3, "optimizer": {"step": 1}}, tmp_path / name)
    else:
        safetensors.torch.save_file(weights, tmp_path / name)
    assert load_model(tmp_path / name).fingerprint() == lm.fingerprint()


def test_remedies_work(lm, tmp_path):
    """What each message says, done: then the model loads, and is the same."""
    trained, converted = tmp_path / "trained.pth", tmp_path / "weights.safetensors"
    weights = to_author(lm)
    torch.save({"model": weights, "args": argparse.Namespace(layers=3)}, trained)
    with pytest.raises(UserError, match=r"trained\.pth cannot be read .* safetensors\.torch\.save_file\(weights, "):
        load_model(trained)
    content = torch.load(trained, weights_only=False)  # by the program that wrote it
    safetensors.torch.save_file(content["model"], converted)
    assert load_model(converted).fingerprint() == lm.fingerprint()

    del weights["head.weight"]
    torch.save(weights, trained)
    with pytest.raises(UserError, match="if the head is tied, save it, too: ") as tied:
        load_model(trained)
    exec(str(tied.value).rpartition("too: ")[2], {"weights": weights})
    torch.save(weights, trained)
    assert torch.equal(load_model(trained).head.weight, lm.emb.weight)

    save_model(lm, tmp_path / "folder", "transformers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    files.write_json(tmp_path / "folder" / "config.json", {n: v for n, v in config.items() if n != "model_type"})
    with pytest.raises(UserError, match=r'add the entry model_type to it .*"rwkv" for RWKV-4'):
        load_model(tmp_path / "folder")
    files.write_json(tmp_path / "folder" / "config.json", config | {"model_type": "rwkv"})
    assert load_model(tmp_path / "folder").fingerprint() == lm.fingerprint()

    again = load_model(converted)
    with pytest.raises(UserError, match=r"load_world_tokenizer\(PATH\) of prosg_lib\.text\.world_tokenizer"):
        again.generate(["a"])
    (tmp_path / "rwkv_vocab.txt").write_text("1 'a' 1\n")
    again.tokenizer = load_world_tokenizer(tmp_path / "rwkv_vocab.txt")
    assert len(again.generate(["a"], max_new_tokens=1)) == 1


def test_a_tied_head_of_a_folder(lm, tmp_path):
    """Where the configuration says so; `transformers` reads the same."""
    save_model(lm, tmp_path, "transformers")
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["head.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    files.write_json(tmp_path / "config.json", config | {"tie_word_embeddings": True})
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = RwkvForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(load_model(tmp_path)(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)


def not_finite(t):
    t.view(-1)[-1] = torch.nan
    return t


@pytest.mark.parametrize("layout", models.LAYOUTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_finite, "has numbers that are NaN or infinite"),
        (lambda t: t.to(torch.int8), "quantised .*weights cannot be read"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(make_lm, tmp_path, layout, change, message):
    """In RWKV's files and in folders of other classes, which `transformers` would convert without a word."""
    path = tmp_path / NAMES[layout]
    if layout == "transformers":
        new_llama(TransformerConfig("llama", 50, 16, 1, 32, 2)).model.save_pretrained(path)
        path, load, save = path / "model.safetensors", safetensors.torch.load_file, safetensors.torch.save_file
        name = "model.layers.0.mlp.up_proj.weight"
    else:
        save_model(make_lm(), path, layout)
        if layout == "prosg":
            load, save = (
                files.load_foreign_tensors,
                lambda weights, path: files.save_tensors(path, weights, {"kind": "lm"}),
            )
        else:
            load, save = torch.load, torch.save
        name = "blocks.1.ffn.key.weight"
    weights = load(path)
    weights[name] = change(weights[name])
    save(weights, path)
    with pytest.raises(UserError, match=rf"{name}.* {message}"):
        load_model(tmp_path / NAMES[layout])


def test_files_that_would_expand_are_refused(lm, tmp_path):
    """PyTorch reads compressed entries, and would fill the memory."""
    save_model(lm, tmp_path / "m.pth", "author")
    with zipfile.ZipFile(tmp_path / "m.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.namelist():
            bomb.writestr(entry, bytes(10**7) if "/data/" in entry else plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"bomb\.pth is compressed, as no PyTorch file is"):
        load_model(tmp_path / "bomb.pth")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html>"])
def test_advice_of_others_is_not_passed_on(tmp_path, content):
    """torch advises to run the pickle, in bold."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth cannot be read as a file of tensors \(UnpicklingError") as refused:
        load_model(tmp_path / "x.pth")
    assert not [bad for bad in ("weights_only", "trust", "two options", "\x1b") if bad in str(refused.value)]


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.pth", [torch.zeros(2)], r"does not hold one model's tensors by name \(no names\)"),
        (
            "run.pth",
            {"model": {"a": torch.zeros(2)}, "ema": {"a": torch.zeros(2)}},
            r"by name \(model, ema\); save its",
        ),
        ("large.pth", {"emb.weight": torch.zeros(1).expand(10**9, 10**9)}, "larger than the file"),
        ("other.pth", {"layers.0.weight": torch.zeros(2)}, r"other.pth: .*1 tensors \(layers.0.weight\) belong to no"),
        (
            "hf.safetensors",
            {"rwkv.embeddings.weight": torch.zeros(2)},
            "or the whole folder of a model of transformers",
        ),
        ("missing.pth", None, "does not exist"),
        ("a" * 300, None, "could not be read|no such path"),
    ],
)
def test_foreign_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "could not be loaded"),  # whose weights these are not
        ({"model_type": None}, "does not say what kind of model this is; add the entry model_type"),
        ({"num_hidden_layers": 10**9}, r"config\.json says num_hidden_layers = 1000000000, which no model has"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it is one token id"),
        ({"eos_token_id": [1.5]}, r"eos_token_id is \[1\.5\]"),
        ({"layer_norm_epsilon": 1e-3}, r"layer_norm_epsilon = 0\.001"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers = 4, but .* have 3"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(lm, tmp_path, change, message):
    save_model(lm, tmp_path, "transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    files.write_json(tmp_path / "config.json", config | {"auto_map": {"AutoModel": "evil.Model"}})
    assert_same_weights(load_model(tmp_path), lm)  # it names code, which nobody reads
    files.write_json(tmp_path / "config.json", config | change)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_folders_that_are_not_whole_are_refused(lm, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(tmp_path)
    save_model(lm, tmp_path, "transformers")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json, line 1: not JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "kind", "layout", "message"),
    [
        ("rwkv4", "rwkv", "gguf", "unknown layout 'gguf'; there are prosg, transformers, author"),
        ("rwkv7", "rwkv", "transformers", "no class for RWKV-7; save it in layout 'prosg' or 'author'"),
        ("rwkv4", "llama", "author", "a CausalTransformer has no layout 'author'; save it in layout 'transformers'"),
        ("rwkv4", "mamba2", "prosg", "a Mamba2 has no layout 'prosg'; save it in layout 'transformers'"),
    ],
)
def test_layouts_that_a_model_does_not_have(lm, mamba2, tmp_path, kind, layout, message):
    model = {"rwkv": lm, "mamba2": mamba2, "llama": new_llama(TransformerConfig("llama", 50, 16, 1, 32, 2))}[kind]
    with pytest.raises(UserError, match=message):
        save_model(model, tmp_path / "m", layout)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached(tmp_path):
    """The real client, pointed at a port where nobody listens."""
    code = (
        "from prosg_lib.backbones.loading import load_model\n"
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
    ((name, patterns),) = asked
    assert name == "owner/name"
    wanted = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "model-00001-of-00002.safetensors"]
    assert all(
        any(fnmatch(file, pattern) for pattern in patterns) for file in [*wanted, "model.safetensors.index.json"]
    )
    unwanted = ["modeling_x.py", "tokenizer.py", "pytorch_model.bin", "optimizer.pt"]
    assert not any(any(fnmatch(file, pattern) for pattern in patterns) for file in unwanted)


# Folders of other classes of transformers


@pytest.fixture
def mamba2():
    torch.manual_seed(0)
    sizes = Mamba2Config(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=16, n_groups=1, state_size=4
    )
    return Mamba2(Mamba2ForCausalLM(sizes)).eval()


def test_any_tokenizer_of_a_folder(mamba2, lm, tmp_path):
    """tokenizer.json; a class that is Python and has no such file; the files that older ones have. Saved with the
    model, each comes back, and `transformers` finds it, too."""
    text = "Ada, 7 cäts\nand more"
    save_model(mamba2, tmp_path / "none", "transformers")
    assert load_model(tmp_path / "none").tokenizer is None
    ByT5Tokenizer().save_pretrained(tmp_path / "none")
    again = load_model(tmp_path / "none")
    tokenizer = again.tokenizer
    assert tokenizer.vocab == 384
    assert tokenizer.encode(text) == tuple(byte + 3 for byte in text.encode())
    assert tokenizer.encode_long(text) == list(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(again.generate(["Ada"], max_new_tokens=3, stop=None)) == 1
    save_model(again, tmp_path / "again", "transformers")
    assert load_model(tmp_path / "again").tokenizer.encode(text) == tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode(text, add_special_tokens=False) == list(
        tokenizer.encode(text)
    )
    lm.tokenizer = tokenizer
    with pytest.raises(
        UserError, match=r"a ByT5Tokenizer has no tokenizer\.json; save the model in layout 'transformers'"
    ):
        save_model(lm, tmp_path / "m.safetensors", "prosg")

    small = Tokenizer.train([text] * 5, 270)
    mamba2.tokenizer = small
    save_model(mamba2, tmp_path / "fast", "transformers")
    assert load_model(tmp_path / "fast").tokenizer.encode(text) == small.encode(text)
    content = json.loads(small.to_json())["model"]
    save_model(load_model(tmp_path / "none"), tmp_path / "old", "transformers")
    for left in (tmp_path / "old").glob("*token*"):
        left.unlink()
    files.write_json(tmp_path / "old" / "vocab.json", content["vocab"] | {"<|endoftext|>": 270})
    files.write_text(tmp_path / "old" / "merges.txt", "\n".join(map(" ".join, content["merges"])))
    files.write_json(tmp_path / "old" / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    old = load_model(tmp_path / "old").tokenizer
    assert old.encode(text) == small.encode(text)
    assert old.decode(old.encode(text)) == text


@pytest.mark.parametrize("settings", [True, False])
def test_what_a_tokenizer_puts_in_front_of_a_text(mamba2, tmp_path, settings):
    """`<bos>`, as the files say and `transformers` does: once, and not where a text goes on from a state. A piece of a
    text, which is what `encode` gives, has none. Nothing is cut, whatever the texts of the training were."""
    bpe = BPE.from_str(Tokenizer.train(["Ada, 7 cats"] * 5, 270).to_json())
    bpe.add_special_tokens(["<bos>"])
    bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))])
    bpe.enable_truncation(4)
    save_model(mamba2, tmp_path, "transformers")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>").save_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)("Ada, 7 cats and a dog").input_ids
    assert expected[0] == bpe.token_to_id("<bos>")
    if not settings:
        (tmp_path / "tokenizer_config.json").unlink()
    lm = load_model(tmp_path)
    ids, _ = lm.encode_prompts(["Ada, 7 cats and a dog"])
    assert ids.tolist() == [expected]
    assert lm.tokenizer.encode("Ada, 7 cats and a dog") == tuple(expected[1:])
    with torch.no_grad():
        assert_close(lm(ids)[0], mamba2.model(torch.tensor([expected])).logits, rtol=1e-4, atol=1e-4)
    state = lm.derive_state([" and"], lm.derive_state(["Ada"]))
    assert_close(state.tensors, lm.derive_state(["Ada and"]).tensors, rtol=1e-4, atol=1e-5)
    assert lm.generate([" and"], lm.derive_state(["Ada"]), max_new_tokens=3, stop=None) == lm.generate(
        ["Ada and"], max_new_tokens=3, stop=None
    )


def test_tokenizers_that_do_not_fit_are_refused(mamba2, lm, tmp_path):
    """One with more tokens than the model, of either kind of file, and one that is damaged."""
    save_model(mamba2, tmp_path, "transformers")
    lm.tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer has 2048 tokens, but the model only 400"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer \("):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    files.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 500})
    with pytest.raises(UserError, match="tokens, but the model only 400"):
        load_model(tmp_path)
    files.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "NoSuchTokenizer"})
    with pytest.raises(UserError, match=r"the tokenizer in .* could not be loaded \(.*remove tokenizer_config\.json"):
        load_model(tmp_path)


def test_damaged_folders_of_other_classes_are_refused(mamba2, tmp_path):
    """Weights cut short, weights missing (which the library would make up), weights of other sizes, no weights."""
    save_model(mamba2, tmp_path, "transformers")
    path, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cut short or not a safetensors file"):
            load_model(tmp_path)
    path.write_bytes(content)
    files.write_json(tmp_path / "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(
        UserError, match=r"lacks \d+ of the weights that its config\.json describes \(backbone\.layers\.2"
    ):
        load_model(tmp_path)
    files.write_json(tmp_path / "config.json", config | {"state_size": 8})
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(tmp_path)
    files.write_json(tmp_path / "config.json", config | {"state_size": 10**9})
    with pytest.raises(
        UserError, match=r"config\.json describes [\d,]{12,} weights, and the files there have [\d,]{5,7} b"
    ):
        load_model(tmp_path)
    files.write_json(tmp_path / "config.json", config | {"time_step_limit": [0.0, 0.1]})
    with pytest.raises(UserError, match=r"limits its time step to \(0\.0, 0\.1\)"):
        load_model(tmp_path)
    files.write_json(tmp_path / "config.json", config)
    path.unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(tmp_path)
    torch.save({"backbone.embeddings.weight": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_folder_is_never_run(mamba2, tmp_path):
    """The model's and the tokenizer's: a known type is read by the library's class, an unknown one not at all."""
    save_model(mamba2, tmp_path, "transformers")
    evil = (
        f"import pathlib\npathlib.Path({str(tmp_path / 'exploded')!r}).touch()\nclass Model: pass\nclass Config: pass\n"
    )
    (tmp_path / "evil.py").write_text(evil)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    files.write_json(tmp_path / "config.json", config | names)
    assert_same_weights(load_model(tmp_path), mamba2)
    files.write_json(tmp_path / "config.json", config | names | {"model_type": "evil"})
    with pytest.raises(UserError, match="could not be loaded") as refused:
        load_model(tmp_path)
    assert "trust" not in str(refused.value)
    files.write_json(tmp_path / "config.json", config | names)
    files.write_json(
        tmp_path / "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["evil.Model", None]}, "tokenizer_class": "X"},
    )
    with pytest.raises(UserError, match=r"the tokenizer in .* could not be loaded"):
        load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()
