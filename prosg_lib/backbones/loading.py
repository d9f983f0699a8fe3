"""Language models in and out: the project's own files, folders of `transformers`, the RWKV author's .pth, the hub.

Only weights and sizes are read, never code: safetensors and JSON; .pth and .bin files go through `torch.load` with
`weights_only=True`, which refuses every pickle that holds more than tensors.
"""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prosg_lib import files, paths
from prosg_lib.backbones.base import LanguageModel, as_tuple
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv7 import RWKV7
from prosg_lib.backbones.rwkv_layouts import from_author, from_hf, to_author, to_hf
from prosg_lib.config.sizes import Mamba2Size, TransformerConfig
from prosg_lib.errors import UserError, reason
from prosg_lib.strict import read_as
from prosg_lib.text.library_tokenizer import folder_tokenizer
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.text.world_tokenizer import WorldTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUTS = ("prosg", "transformers", "author")

_SAFE = (".safetensors", ".st")

_GGUF = ".gguf"

_CONVERT = (
    'save its weights alone by safetensors.torch.save_file(weights, "weights.safetensors") in the program that wrote '
    "it, and load that file"
)

_TOKENIZERS = {kind.kind: kind for kind in (Tokenizer, WorldTokenizer)}

_MOST_LAYERS = 10_000

# What is fetched from a repository on the hub, besides weights: sizes and tokenizers, never code.
_SMALL_FILES = ["config.json", "generation_config.json", "*.index.json", "tokenizer*.json", "special_tokens_map.json"]
_SMALL_FILES += ["added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]


def load_model(source: str | Path, window: int | None = None) -> LanguageModel:
    """A language model in evaluation mode, in float32 on the CPU, whatever the precision of its file.

    Shipped are `rwkv4-dialogue`, `mamba2-dialogue` and, for other tasks, the transformer `llama-pairs`; the error for
    an unknown name lists them.

    Args:
        source: an existing path, else the name of a shipped checkpoint or of a model that a Python package ships
            (`smollm2`), else a hub id ("owner/name"). Where the hub cannot be reached, the package's file is taken for
            the same id: a quantised one, with a fingerprint of its own. A path is one of

            - a folder in the layout of transformers: config.json, and model*.safetensors or pytorch_model*.bin.
              Recurrent and hybrid classes are read by their adapters (`hub_families`), any other causal language model
              as a `CausalTransformer`;
            - a .gguf file, or a folder with one, for which the package `gguf` has to be installed;
            - weights of RWKV-4 or RWKV-7 under their author's names: a .pth file, also as a trainer wrapped it
              (`module.` in front, within "state_dict"), or a .safetensors or .st file;
            - a .safetensors file of this project.
        window: for a transformer: a memory of fixed size, in which each token sees so many (`hub_window`); None: all.
    Returns:
        The model, with its tokenizer where there is one: the folder's or GGUF file's, or the project's for its own
        checkpoints. A .pth file has none, and `lm.tokenizer` is None; for a World model, set it by
        `lm.tokenizer = load_world_tokenizer("rwkv_vocab_v20230424.txt")` (`prosg_lib.text.world_tokenizer`).
    Raises:
        UserError: there is nothing of that name; the hub cannot be reached; the file is damaged, or holds pickled
            objects, weights that are not finite, or the weights of another architecture; it would take more memory than
            its size allows; the folder's class is unknown, or its tokenizer has more tokens than the model; there can
            be no window.
    """
    keep_freed_memory()
    path = paths.expanded(source)
    with files.errors_of(path, "read"):
        exists = path.exists()
    if not exists:
        if path.suffix in (".pth", _GGUF, *_SAFE) or path.is_absolute():
            raise UserError(f"{path} does not exist; give the path of a model's file or folder")
        path = _named(str(source))
    try:
        model = _from_folder(path) if path.is_dir() else _from_file(path)
        _check_finite(model)
        _check_tokenizer(model)
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    return _with_window(model, window).eval()


def _with_window(model: LanguageModel, window: int | None) -> LanguageModel:
    if window is None:
        return model
    if not hasattr(model, "with_window"):
        raise UserError(f"a {type(model).__name__} is no plain transformer; load it without a window")
    return model.with_window(window)


def _check_finite(model: LanguageModel) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{name} has numbers that are NaN or infinite; copy the file again, or take another one")


def _check_tokenizer(model: LanguageModel) -> None:
    if model.tokenizer is not None and model.tokenizer.vocab > model.config.vocab:
        raise UserError(
            f"the tokenizer has {model.tokenizer.vocab} tokens, but the model only {model.config.vocab}; "
            "replace it by the tokenizer that the model was trained with"
        )


def save_model(model: LanguageModel, path: str | Path, layout: str) -> None:
    """Write a model, atomically file by file.

    Args:
        path: a folder for "transformers", else a file.
        layout: "transformers" (a folder that `AutoModelForCausalLM.from_pretrained` loads; not for RWKV-7, and without
            a World tokenizer, since transformers has neither) or, for RWKV, "prosg" (safetensors with the tokenizer in
            its header) or "author" (.pth, a state dict of tensors and nothing else: the one place where the project
            writes a pickle, because that format is one).
    Raises:
        UserError: unknown layout, or one that this model does not have.
    """
    path, tokenizer = Path(path), model.tokenizer
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if layout == "transformers" and isinstance(model, RWKV7):
        raise UserError("transformers has no class for RWKV-7; save it in layout 'prosg' or 'author'")
    if layout != "transformers" and not isinstance(model, RWKV):
        raise UserError(f"a {type(model).__name__} has no layout {layout!r}; save it in layout 'transformers'")
    if layout == "prosg":
        meta = {} if tokenizer is None else {"tokenizer": tokenizer.to_json(), "tokenizer_kind": tokenizer.kind}
        files.save_tensors(path, model.state_dict(), {"kind": "lm", "ends": model.ends, **meta})
    elif layout == "author":
        buffer = io.BytesIO()
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in to_author(model).items()}, buffer)
        files.write_bytes(path, buffer.getvalue())
    elif isinstance(model, RWKV4):
        _rwkv4_to_folder(model, path)
    else:  # one file, like the others, although the library would split it
        files.write_folder(path, lambda place: model.model.save_pretrained(place, max_shard_size="1TB"))
    if layout == "transformers" and isinstance(tokenizer, Tokenizer):
        tokenizer.save(path)


# Names


def _named(name: str) -> Path:
    """The file or folder of a model on the hub, of one that a package ships, or of a shipped checkpoint."""
    from prosg_lib.backbones.gguf_files import packaged

    entry = packaged(name)
    file = None if entry is None else entry.file()
    if file is not None and name == entry.name:
        return file
    if entry is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _shipped(name)
    try:
        return _from_hub(name if entry is None else entry.hub)
    except UserError as error:
        if file is not None:
            return file
        if entry is None:
            raise
        raise UserError(f"{error}; or install the package that has it: {entry.install}") from error


def _shipped(name: str) -> Path:
    folder = paths.data_dir() / "checkpoints"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        models = [p.stem for p in sorted(folder.glob("*.safetensors")) if files.load_meta(p).get("kind") == "lm"]
        raise UserError(
            f"no model {name!r}: no such path, and no shipped model of that name "
            f"(there are: {', '.join(models) or 'none'}); a model on the hub is named owner/name"
        )
    return path


# Files


def _from_file(path: Path) -> LanguageModel:
    if path.suffix == _GGUF:
        return _from_gguf(path)
    if path.suffix not in _SAFE:
        return from_author(_unpickled_tensors(path))
    tensors, meta = files.load_any_tensors(path)
    if meta is None:
        return from_author(tensors)
    if meta.get("kind") != "lm":
        raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a language model")
    model = _of_transformers(tensors, meta.get("record")) or from_author(tensors)
    if meta.get("tokenizer"):
        kind = str(meta.get("tokenizer_kind", Tokenizer.kind))
        if kind not in _TOKENIZERS:
            raise UserError(f"{path} has a tokenizer of kind {kind!r}; there are {', '.join(_TOKENIZERS)}")
        model.tokenizer = _TOKENIZERS[kind].from_json(meta["tokenizer"], path)
    else:
        with contextlib.suppress(UserError):  # without a checkout there is no tokenizer of the project
            model.tokenizer = load_tokenizer() if load_tokenizer().vocab == model.config.vocab else None
    model.ends = as_tuple(meta.get("ends", model.ends))
    return model


def _of_transformers(weights: dict[str, Tensor], record: object) -> LanguageModel | None:
    """The model of a `transformers` class that this project has trained; None for others.

    Args:
        record: what it was trained as; `module` has its sizes.
    """
    mamba2 = "model.backbone.layers.0.mixer.A_log" in weights
    if not mamba2 and "model.model.layers.0.self_attn.q_proj.weight" not in weights:
        return None
    from prosg_lib.backbones.hub_families import new_mamba2
    from prosg_lib.backbones.hub_transformer import new_llama

    sizes = record.get("module") if isinstance(record, dict) else None
    if mamba2 and isinstance(sizes, dict):
        sizes = {name: value for name, value in sizes.items() if name != "kind"}
    sizes = read_as(Mamba2Size if mamba2 else TransformerConfig, sizes, "its record's module")
    found = {len(weights), *(n for tensor in weights.values() for n in tensor.shape)}
    if max(size for size in asdict(sizes).values() if isinstance(size, int)) > max(found):
        raise UserError(f"its record has sizes that its weights do not have ({sizes}); train it again or copy it again")
    try:
        model = new_mamba2(sizes.settings) if mamba2 else new_llama(sizes)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except Exception as error:  # the class raises whatever does not suit it
        raise UserError(f"its weights are not those of its record ({reason(error)}); copy it again") from error
    return model


# Folders of transformers, and the hub


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Two calls, because most repositories hold the same weights twice, and one copy is enough.
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's, the HTTP client's and the operating system's errors have no common class
        raise UserError(
            f"{name!r} is not a path here, and could not be fetched from the hub ({reason(error)}); "
            "download it where there is a network, and give the local folder's path instead"
        ) from error
    return folder


def _from_folder(folder: Path) -> LanguageModel:
    if not (folder / "config.json").is_file():
        found = sorted(folder.glob(f"*{_GGUF}"))
        if len(found) == 1:
            return _from_gguf(found[0])
        raise UserError(
            f"{folder} has {len(found)} GGUF files and no config.json; give the path of one of them"
            if found
            else f"{folder} is not a model's folder: it has no config.json; give the folder that has one"
        )
    config = files.read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise UserError(
            f"{folder}: config.json does not say what kind of model this is; add the entry model_type to it "
            '("rwkv" for RWKV-4, "mamba2", "llama", ...)'
        )
    for name, value in config.items():
        if re.search(r"(layers?|blocks?)$", name) and isinstance(value, int) and value > _MOST_LAYERS:
            raise UserError(f"{folder}: config.json says {name} = {value}, which no model has; copy it again")
    for path in folder.glob("*.bin"):
        _check_not_compressed(path)
    if kind == "rwkv":
        model = _rwkv4_from_folder(folder, config)
    else:
        from prosg_lib.backbones.hub import pretrained  # here, because transformers takes seconds to import

        model = _adapted(pretrained(folder))
    model.tokenizer = folder_tokenizer(folder)
    return model


def _from_gguf(path: Path) -> LanguageModel:
    from prosg_lib.backbones.gguf_files import from_gguf

    found, tokenizer = from_gguf(path)
    model = _adapted(found)
    model.tokenizer = tokenizer
    return model


def _adapted(found: PreTrainedModel) -> LanguageModel:
    """A model of `transformers` behind this project's interface."""
    from prosg_lib.backbones import hub_families  # noqa: F401, registers the project's adapters
    from prosg_lib.backbones.hub_recurrent import ADAPTERS
    from prosg_lib.backbones.hub_transformer import CausalTransformer

    kind = found.config.model_type
    model = ADAPTERS.get(kind, CausalTransformer)(found)
    if kind not in ADAPTERS:
        _check_finite(model)  # or the comparison would blame the class
        model.check()
    return model


def _rwkv4_from_folder(folder: Path, config: dict) -> RWKV4:
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin; copy the weights there")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= (files.load_foreign_tensors if shard.suffix == ".safetensors" else _unpickled_tensors)(shard)
    if config.get("tie_word_embeddings") is True and "head.weight" not in weights:
        weights["head.weight"] = weights.get("rwkv.embeddings.weight", torch.empty(0))
    model = from_hf(weights)
    for name, ours in _hf_sizes(model).items():
        if config.get(name) not in (None, ours):
            raise UserError(
                f"{folder}: config.json says {name} = {config[name]}, but the weights (or this RWKV-4) have {ours}; "
                "copy both from the same model"
            )
    generation = folder / "generation_config.json"
    says = files.read_json(generation) if generation.is_file() else config
    model.ends = as_tuple(says.get("eos_token_id") if isinstance(says, dict) else says)
    return model


def _rwkv4_to_folder(model: RWKV4, folder: Path) -> None:
    files.save_tensors(folder / "model.safetensors", to_hf(model), None)
    rest = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "dtype": str(model.emb.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": model.ends[0] if len(model.ends) == 1 else list(model.ends) or None,
        "tie_word_embeddings": False,
        "rescale_every": 0,  # otherwise transformers divides weights in place when the mode changes
    }
    files.write_json(folder / "config.json", rest | _hf_sizes(model))


def _hf_sizes(model: RWKV4) -> dict[str, int | float]:
    """The entries of transformers' config.json that decide what is computed."""
    c = model.config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "attention_hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "intermediate_size": c.ffn,
        "layer_norm_epsilon": model.ln_out.eps,
    }


def _unpickled_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a .pth or .bin file, which may be one entry of what a trainer saved."""
    _check_not_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip, decoding and end-of-file errors have no common class
        raise UserError(
            f"{path} cannot be read as a file of tensors ({reason(error)}): it is cut short, not a PyTorch file, or "
            f"holds pickled objects, which are never run; copy it again, or {_CONVERT}"
        ) from error
    entries = content if isinstance(content, dict) else {}
    found = [content] if _are_weights(content) else [entry for entry in entries.values() if _are_weights(entry)]
    if len(found) != 1:
        raise UserError(
            f"{path} does not hold one model's tensors by name ({', '.join(map(str, entries))[:100] or 'no names'}); "
            f"{_CONVERT}"
        )
    (weights,) = found
    size = sum(t.numel() * t.element_size() for t in weights.values())
    if size > 2 * path.stat().st_size:  # a tied head counts twice
        raise UserError(f"{path} holds tensors that are larger than the file; {_CONVERT}")
    return weights


def _are_weights(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _check_not_compressed(path: Path) -> None:
    """Raise a UserError if a file would be larger in memory; PyTorch does not compress its files."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as content:
            size = sum(entry.file_size for entry in content.infolist())
    except Exception as error:  # decoding and other errors, besides zipfile's own
        raise UserError(f"{path} is cut short or damaged ({reason(error)}); copy it again") from error
    if size > path.stat().st_size:
        raise UserError(f"{path} is compressed, as no PyTorch file is; {_CONVERT}")
