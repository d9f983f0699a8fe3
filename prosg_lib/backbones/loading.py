"""Language models in and out: the project's own files, transformers' folders, the RWKV author's .pth, the hub.

Only weights and sizes are read, never code: safetensors and JSON, and .pth and .bin files through `torch.load` with
`weights_only=True`, which refuses every pickle that holds more than tensors.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from prosg_lib import files, paths
from prosg_lib.backbones import rwkv4, rwkv7
from prosg_lib.backbones.base import listed
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.registry import LOADERS, loader
from prosg_lib.backbones.rwkv import RWKV
from prosg_lib.backbones.rwkv4 import RWKV4, from_hf, to_hf
from prosg_lib.backbones.rwkv7 import RWKV7
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer, folder_tokenizer, load_tokenizer
from prosg_lib.text.world_tokenizer import WorldTokenizer

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel

LAYOUTS = ("prosg", "transformers", "author")


class Generation(NamedTuple):
    """A generation of RWKV; `mark` is a tensor that its weights have, and no other generation's."""

    model: type[RWKV]
    mark: str
    from_weights: Callable[[dict[str, Tensor]], RWKV]
    to_weights: Callable[[RWKV], dict[str, Tensor]]


GENERATIONS = (
    Generation(RWKV4, "blocks.0.att.time_first", rwkv4.from_weights, rwkv4.to_weights),
    Generation(RWKV7, "blocks.0.att.r_k", rwkv7.from_weights, rwkv7.to_weights),
)

_TOKENIZERS = {kind.kind: kind for kind in (Tokenizer, WorldTokenizer)}


def load_model(source: str | Path) -> LanguageModel:
    """A recurrent model in evaluation mode, float32 on the CPU, whatever the file's precision.

    Shipped are `rwkv4-dialogue`, `rwkv4-pairs` and `mamba2-dialogue`, and, for comparison, the transformer
    `llama-pairs`; a name that is none of them is answered with the list.

    Args:
        source: an existing path, else a shipped checkpoint's name, else a hub id ("owner/name"). A path is one of
            a folder in transformers' layout (config.json, whose model_type is one of `registry.LOADERS`, and
            model*.safetensors or pytorch_model*.bin), an original author's .pth file, or a file of this project.
    Returns:
        The model, with its tokenizer where there is one (a folder's, of any kind; the project's for its own
        checkpoints). An author's .pth has none, and `lm.tokenizer` is None; for a World model set it by
        `lm.tokenizer = load_world_tokenizer("rwkv_vocab_v20230424.txt")` (`prosg_lib.text.world_tokenizer`).
    Raises:
        UserError: there is nothing of that name; the hub cannot be reached; the file is damaged, holds pickled
            objects, or another architecture's weights; a folder's model_type is unknown, or its tokenizer has more
            tokens than the model.
    """
    keep_freed_memory()
    path = Path(source).expanduser()
    if path.is_dir():
        model = _from_folder(path)
    elif path.is_file():
        model = _from_prosg(path) if path.suffix == ".safetensors" else _from_weights(_unpickled_tensors(path))
    elif path.suffix in (".pth", ".safetensors") or path.is_absolute():
        raise UserError(f"{path} does not exist; give the path of a model's file or folder")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        model = _from_folder(_from_hub(str(source)))
    else:
        model = _from_prosg(_shipped(str(source)))
    return model.eval()


def save_model(model: LanguageModel, path: str | Path, layout: str) -> None:
    """Write a model, atomically file by file.

    Args:
        path: a folder for "transformers", else a file.
        layout: "transformers" (a folder that `AutoModelForCausalLM.from_pretrained` loads; of RWKV, generation 4 alone,
            and without a World tokenizer, which transformers has not) or, for RWKV, "prosg" (safetensors with the
            tokenizer in its header) or "author" (.pth, a state dict of tensors and nothing else: the one place where
            the project writes a pickle, because that format is one).
    Raises:
        UserError: unknown layout, or not one of this model's.
    """
    path, tokenizer = Path(path), model.tokenizer
    if layout != "transformers" and layout in LAYOUTS and not isinstance(model, RWKV):
        raise UserError(f"a {type(model).__name__} has no layout {layout!r}; save it in layout 'transformers'")
    if layout == "prosg":
        meta = {} if tokenizer is None else {"tokenizer": tokenizer.to_json(), "tokenizer_kind": tokenizer.kind}
        files.save_tensors(path, model.state_dict(), {"kind": "lm", "ends": model.ends, **meta})
    elif layout == "author":
        weights = _generation(model).to_weights(model)
        buffer = io.BytesIO()
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, buffer)
        files.write_bytes(path, buffer.getvalue())
    elif layout == "transformers":
        if isinstance(model, RWKV7):
            raise UserError(f"transformers has no class for a {type(model).__name__}; save it as 'prosg' or 'author'")
        _to_folder(model, path)
    else:
        raise UserError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")


def _generation(model: RWKV) -> Generation:
    return next(generation for generation in GENERATIONS if isinstance(model, generation.model))


def _from_weights(weights: dict[str, Tensor]) -> RWKV:
    """The model whose weights these are, in its author's layout."""
    for generation in GENERATIONS:
        if generation.mark in weights:
            return generation.from_weights(weights)
    marks = " nor ".join(f"{generation.mark} ({generation.model.__name__})" for generation in GENERATIONS)
    raise UserError(
        f"these {len(weights)} tensors ({', '.join(sorted(weights)[:3])}) are of no model that is known here, with "
        f"neither {marks} among them; give an RWKV's weights"
    )


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


def _from_prosg(path: Path) -> LanguageModel:
    tensors, meta = files.load_tensors(path)
    if meta.get("kind") != "lm":
        raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a language model")
    model = _of_transformers(tensors, meta.get("record", {})) or _from_weights(tensors)
    if meta.get("tokenizer"):
        kind = meta.get("tokenizer_kind", Tokenizer.kind)
        if kind not in _TOKENIZERS:
            raise UserError(f"{path} has a tokenizer of kind {kind!r}; there are {', '.join(_TOKENIZERS)}")
        model.tokenizer = _TOKENIZERS[kind].from_json(meta["tokenizer"])
    elif load_tokenizer().vocab == model.config.vocab:
        model.tokenizer = load_tokenizer()
    model.ends = listed(meta.get("ends", model.ends))
    return model


def _of_transformers(weights: dict[str, Tensor], record: dict) -> LanguageModel | None:
    """The model of a class of `transformers` that this project has trained; None where it is none."""
    if "model.backbone.layers.0.mixer.A_log" in weights:
        from prosg_lib.backbones.hub_families import new_mamba2

        model = new_mamba2(record["model"])
    elif "model.model.layers.0.self_attn.q_proj.weight" in weights:
        from prosg_lib.backbones.hub_transformer import TransformerConfig, new_llama

        model = new_llama(TransformerConfig(**record["model"]))
    else:
        return None
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


_SMALL_FILES = ["config.json", "generation_config.json", "*.index.json", "tokenizer*.json", "special_tokens_map.json"]
_SMALL_FILES += ["added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Two calls, because most repositories hold the same weights twice, and one copy is enough.
        folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's, the HTTP client's and the operating system's errors have no common class
        raise UserError(
            f"{name!r} is no path here, and could not be fetched from the hub ({_first_line(error)}); "
            "download it where there is a network and give the local folder's path instead"
        ) from error
    return folder


def _sizes(model: RWKV4) -> dict[str, int | float]:
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


def _from_folder(folder: Path) -> LanguageModel:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model's folder, config.json does not exist there; give the folder that has it")
    config = files.read_json(folder / "config.json")
    model = loader(config.get("model_type") if isinstance(config, dict) else None)(folder)
    model.tokenizer = folder_tokenizer(folder, model.config.vocab)
    return model


def _rwkv4_from_folder(folder: Path) -> RWKV4:
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise UserError(f"{folder} has no model.safetensors and no pytorch_model.bin; copy the weights there")
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= _safe_tensors(shard) if shard.suffix == ".safetensors" else _unpickled_tensors(shard)
    model = from_hf(weights)
    config = files.read_json(folder / "config.json")
    for name, ours in _sizes(model).items():
        if config.get(name) not in (None, ours):
            raise UserError(
                f"{folder}: config.json says {name} = {config[name]}, but the weights (or this RWKV-4) have {ours}"
            )
    own = folder / "generation_config.json"
    model.ends = listed((files.read_json(own) if own.is_file() else config).get("eos_token_id"))
    return model


LOADERS["rwkv"] = _rwkv4_from_folder


def _to_folder(model: LanguageModel, folder: Path) -> None:
    if isinstance(model, RWKV4):
        _rwkv4_to_folder(model, folder)
    else:  # of `transformers` itself; in one file, as the others, although the library would cut it
        files.write_folder(folder, lambda place: model.model.save_pretrained(place, max_shard_size="1TB"))
    if isinstance(model.tokenizer, Tokenizer):
        model.tokenizer.save(folder)


def _rwkv4_to_folder(model: RWKV4, folder: Path) -> None:
    from safetensors.torch import save

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in to_hf(model).items()}
    files.write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    rest = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "dtype": str(model.emb.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": model.ends[0] if len(model.ends) == 1 else list(model.ends) or None,
        "tie_word_embeddings": False,
        "rescale_every": 0,  # otherwise transformers divides weights in place when the mode changes
    }
    files.write_json(folder / "config.json", rest | _sizes(model))


def _safe_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut short or no safetensors file ({error}); copy it again") from error


def _unpickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip, decoding and end-of-file errors have no common class
        raise UserError(
            f"{path} cannot be read as a file of tensors: it is cut short, no PyTorch file, or holds pickled objects, "
            f"which are never run ({_first_line(error)}); copy it again, or convert it to safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path} holds something else than a model's tensors by name; give the weights' own file")
    return weights


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
