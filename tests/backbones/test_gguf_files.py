"""GGUF files: read as the model that was written into them, with tokenizer and chat template, and saved again."""

import sys

import pytest
import torch
from families import rows_of
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prosg_lib.backbones import gguf_files, loading
from prosg_lib.backbones.gguf_files import PACKAGED, packaged
from prosg_lib.backbones.hub_transformer import CausalTransformer
from prosg_lib.backbones.hub_window import WindowTransformer
from prosg_lib.backbones.loading import load_model, save_model
from prosg_lib.backbones.precision import has_bfloat16, in_fastest_precision
from prosg_lib.errors import UserError

gguf = pytest.importorskip("gguf")

TEMPLATE = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + ' ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant ' }}{% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def new_model():
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=261, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=128, **SIZES
    )
    model = LlamaForCausalLM(sizes).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model


def write(path, model, architecture="llama"):
    """As llama.cpp's converter does it: rows of queries and keys in another order, one map in eight bits."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(261)
    writer.add_tokenizer_model("gpt2")
    letters = [*bytes_to_unicode().values()]
    writer.add_token_list([*letters, "Ġa", "Ġc", "<|endoftext|>", "<|begin|>", "<|end|>"])
    writer.add_token_types([1] * 258 + [3, 3, 3])
    writer.add_token_merges(["Ġ a", "Ġ c"])
    writer.add_unk_token_id(258)
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.named_parameters():
        array = tensor.detach().numpy()
        heads = {"q_proj": 2, "k_proj": 1}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape)
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", new_model())


@pytest.fixture(scope="module")
def lm(file):
    return load_model(file)


@torch.no_grad()
def test_it_is_the_model_that_was_written(lm):
    """In bfloat16's numbers, whatever the precision that it computes in; eight bits are near enough."""
    model, ids = new_model().bfloat16().float(), torch.tensor(rows_of((20,)))
    assert type(lm) is CausalTransformer
    assert lm.ends == (260,)
    theirs = dict(model.named_parameters())
    for name, weight in lm.model.named_parameters():
        if "down_proj" in name:
            assert (weight - theirs[name]).abs().max() < 0.01
            assert torch.equal(weight, weight.bfloat16().float())
        else:
            assert torch.equal(weight, theirs[name]), name
    expected = model(ids).logits
    assert (lm(ids)[0] - expected).abs().max() < 0.05 * expected.abs().max()


def test_tokenizer_and_template_come_with_it(lm):
    tokenizer = lm.tokenizer
    assert tokenizer.vocab == 261
    assert tokenizer.decode(tokenizer.encode("that a cat, 7\n")) == "that a cat, 7\n"
    assert tokenizer.encode("th a")[2:] == (256,)
    written = tokenizer.template.question("Hello")
    assert written == "<|begin|>user Hello<|end|><|begin|>assistant "
    assert [i for i in tokenizer.encode(written) if i > 257] == [259, 260, 259]


def test_a_folder_with_one(lm, file, tmp_path):
    """Its only GGUF file; of several, one has to be named."""
    folder = tmp_path / "several"
    folder.mkdir()
    (folder / "one.gguf").symlink_to(file)
    again = load_model(folder, window=16)
    assert type(again) is WindowTransformer
    assert again.window == 16
    assert again.tokenizer.template == lm.tokenizer.template
    (folder / "two.gguf").symlink_to(file)
    with pytest.raises(UserError, match=r"has 2 GGUF files and no config\.json; give the path of one"):
        load_model(folder)


def test_it_can_be_saved(lm, tmp_path):
    """As a folder of `transformers`, which loads to the same model, tokenizer and template; in half precision, too."""
    save_model(lm, tmp_path / "folder", "transformers")
    save_model(lm.with_window(16), tmp_path / "window", "transformers")
    for name in ("folder", "window"):
        again = load_model(tmp_path / name)
        assert again.fingerprint() == lm.fingerprint()
        assert again.ends == lm.ends
        assert again.tokenizer.encode("that a cat") == lm.tokenizer.encode("that a cat")
        assert again.tokenizer.template.question("Hello") == lm.tokenizer.template.question("Hello")


def test_half_precision_is_the_same_model(file, monkeypatch):
    """Where the processor has it; a model whose weights rounding would change stays as it is."""
    cpu = torch.device("cpu")
    for flags, has in (("avx2 avx512_bf16", True), ("avx2 avx512f", False)):
        path = file.parent / "cpuinfo"
        path.write_text(f"model name\t: any\nflags\t\t: {flags}\n")
        monkeypatch.setattr("prosg_lib.backbones.precision._CPU", path)
        assert has_bfloat16(cpu) == has
        lm = load_model(file, window=16)
        half = in_fastest_precision(lm)
        assert next(half.parameters()).dtype == (torch.bfloat16 if has else torch.float32)
        assert half.fingerprint() == load_model(file, window=16).fingerprint()
    path.write_text("Features\t: bf16\n")
    assert next(in_fastest_precision(CausalTransformer(new_model())).parameters()).dtype == torch.float32


def test_files_that_cannot_be_read(file, tmp_path, monkeypatch):
    """One sentence each, with what to do."""
    content = file.read_bytes()
    for name, part in (
        ("header", content[:2000]),
        ("half", content[: len(content) // 2]),
        ("text", b"<!DOCTYPE html>"),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises(UserError, match=rf"{name}\.gguf is cut short, or not a GGUF file .*; copy it again"):
            load_model(tmp_path / f"{name}.gguf")
    other = write(tmp_path / "other.gguf", new_model(), architecture="clip")
    with pytest.raises(UserError, match=r"other\.gguf holds a model of architecture 'clip', which could not be loaded"):
        load_model(other)
    with pytest.raises(UserError, match=r"nowhere\.gguf does not exist"):
        load_model(tmp_path / "nowhere.gguf")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tiny\.gguf: reading GGUF needs the package gguf; pip install gguf"):
        load_model(file)


def test_a_window_is_for_transformers(make_lm, tmp_path):
    save_model(make_lm(), tmp_path / "m.safetensors", "prosg")
    with pytest.raises(UserError, match="a RWKV4 is no plain transformer; load it without a window"):
        load_model(tmp_path / "m.safetensors", window=16)


@pytest.fixture
def no_hub(monkeypatch):
    def snapshot_download(name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_a_package_stands_in_for_the_hub(file, tmp_path, monkeypatch, no_hub):
    """By hub id and by its short name; without it, the message says what to install."""
    (entry,) = PACKAGED
    assert packaged(entry.name) is packaged(entry.hub) is entry
    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "find_spec", lambda name: None)
        for name in (entry.name, entry.hub):
            with pytest.raises(UserError, match=r"could not be fetched .*; or install the package that has it: pip"):
                load_model(name)
    package = tmp_path / entry.module
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.gguf").symlink_to(file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, entry.module, raising=False)
    one, other = load_model(entry.name), load_model(entry.hub)
    assert one.fingerprint() == other.fingerprint() == load_model(file).fingerprint()


def test_the_hub_comes_first_for_an_id(file, tmp_path, monkeypatch, lm):
    save_model(lm.with_window(16), tmp_path / "hub", "transformers")
    asked = []
    monkeypatch.setattr(loading, "_from_hub", lambda name: asked.append(name) or tmp_path / "hub")
    load_model(PACKAGED[0].hub)
    assert asked == [PACKAGED[0].hub]
