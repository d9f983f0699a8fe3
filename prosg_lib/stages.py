"""Load or train: the language model, and the generators on it.

A stage is loaded where a checkpoint's record (sizes, seed, recipe, data hash, the model it belongs to) is the one that
training now would write; otherwise it is trained, and kept.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from prosg_lib import files, paths, provenance
from prosg_lib.allocator import keep_freed_memory
from prosg_lib.backbones.rwkv4 import RWKV4, RWKV4Config
from prosg_lib.errors import UserError
from prosg_lib.generator import FinalStateGenerator, Generator, StaticDelta, TokenGenerator
from prosg_lib.objectives import generator_draw, generator_objective, lm_draw, lm_objective
from prosg_lib.profiles import GeneratorSize, Profile, get_profile
from prosg_lib.tasks.dialogue import Dialogues, data_hash
from prosg_lib.tasks.prose import ProseTokens, load_prose
from prosg_lib.tokenizer import load_tokenizer
from prosg_lib.training import RECIPE, fit

STAGES = ("lm", "token", "final", "static")


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checkpoint_name(stage: str, profile: str) -> str:
    """`rwkv4-dialogue` is the cpu profile's language model, `rwkv4-dialogue-token` a generator for it."""
    return "rwkv4-dialogue" + ("" if stage == "lm" else f"-{stage}") + ("" if profile == "cpu" else f"-{profile}")


@lru_cache(maxsize=8)
def dialogues(split: str, seed: int, rich: bool = False) -> Dialogues:
    """The data set of a split and seed, with whatever prose this machine has."""
    return Dialogues(load_tokenizer(), _prose(split), split, seed, rich)


@lru_cache(maxsize=3)
def _prose(split: str) -> ProseTokens:
    return ProseTokens.of(load_prose(), split, load_tokenizer())


def load_or_train(stage: str, profile: str, seed: int = 0, retrain: bool = False) -> nn.Module:
    """The trained module of a stage, in evaluation mode; says in one line what it loaded and why, or trains.

    Args:
        stage: "lm", or a generator: "token", "final", "static" (trains what it builds on first, if need be).
        retrain: do not load what is shipped; what was trained here since (`forget`) is loaded, and what is missing is
            trained, so that several notebooks of one run train each stage once.
    Raises:
        UserError: unknown stage or profile; damaged checkpoint; diverged training.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; there are {', '.join(STAGES)}")
    keep_freed_memory()
    sizes = get_profile(profile)
    lm = None if stage == "lm" else load_or_train("lm", profile, seed, retrain)
    record = _record(stage, sizes, seed, lm)
    name = checkpoint_name(stage, profile)
    kept = _kept(profile) / f"{name}.safetensors"
    shipped = paths.data_dir() / "checkpoints" / f"{name}.safetensors"
    for path in (kept,) if retrain else (shipped, kept):
        if path.exists():
            tensors, meta = files.load_tensors(path)
            if meta.get("record") == record:
                where = meta["provenance"]["device"]
                print(f"{stage}: loaded {path.name}, trained on {where}: same sizes, seed and data")
                return _built(stage, _size(stage, sizes), lm, tensors)
            print(f"{stage}: {path.name} was trained otherwise ({_why(meta.get('record', {}), record)}); not used")
    return _train(stage, sizes, seed, lm, record, kept)


def _kept(profile: str) -> Path:
    return paths.runs_dir(profile) / "checkpoints"


def forget(profile: str, stages: tuple[str, ...] = STAGES) -> None:
    """Remove what was trained here, so that it is trained anew; trainings that were interrupted still go on."""
    get_profile(profile)
    for stage in stages:
        (_kept(profile) / f"{checkpoint_name(stage, profile)}.safetensors").unlink(missing_ok=True)


def _record(stage: str, sizes: Profile, seed: int, lm: RWKV4 | None) -> dict:
    record = {
        "stage": stage,
        "seed": seed,
        "recipe": RECIPE,
        "data": data_hash(load_tokenizer(), rich=lm is not None),
        "model": asdict(sizes.model),
        "training": asdict(getattr(sizes, "lm" if lm is None else f"{stage}_training")),
    }
    if lm is not None:
        record |= {"generator": asdict(_size(stage, sizes))}
        record |= {"lm": lm.fingerprint()}
    return json.loads(json.dumps(record))  # as a checkpoint would give it back: tuples become lists


def _why(theirs: dict, ours: dict) -> str:
    return ", ".join(key for key in ours if theirs.get(key) != ours[key]) or "unknown record"


def _new(stage: str, size: RWKV4Config | GeneratorSize, lm: RWKV4 | None) -> nn.Module:
    if stage == "lm":
        return RWKV4(size)
    if stage == "final":
        return FinalStateGenerator(lm, size.rank, size.width, size.maps)
    if stage == "token":
        return TokenGenerator(lm, size.rank, size.width, size.maps)
    return StaticDelta(lm, size.rank, size.maps)


def _built(stage: str, size: RWKV4Config | GeneratorSize, lm: RWKV4 | None, tensors: dict) -> nn.Module:
    module = _new(stage, size, lm)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if stage == "lm":
        module.tokenizer = load_tokenizer()
    return module.to(device()).eval().requires_grad_(False)


def _size(stage: str, sizes: Profile) -> RWKV4Config | GeneratorSize:
    """A static delta has the size of the token-wise generator's."""
    return {"lm": sizes.model, "final": sizes.final}.get(stage, sizes.token)


def _train(stage: str, sizes: Profile, seed: int, lm: RWKV4 | None, record: dict, path: Path) -> nn.Module:
    data = dialogues("train", seed, rich=lm is not None)
    torch.manual_seed(seed)
    module = _new(stage, _size(stage, sizes), lm).to(device())
    autocast = sizes.autocast and device().type == "cuda"
    began = time.monotonic()
    if stage == "lm":
        training = sizes.lm
        module.tokenizer = data.tokenizer
        batch_of, loss_of = lm_draw(data, training), lm_objective(module, autocast)
    else:
        training = getattr(sizes, f"{stage}_training")
        batch_of = generator_draw(data, training)
        loss_of = generator_objective(lm, module, training, seed, autocast)
        if stage == "final":
            sample = batch_of(-1).to(device())
            module.fit_normaliser(lm, sample.prompt, sample.prompt_valid)
    where = f"{training.steps} steps of {training.batch} dialogues on {provenance.device()}"
    print(f"{stage}: training, {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, {where}")
    fit(path.stem, module, batch_of, loss_of, training, path.parent, record)
    facts = provenance.facts() | {"prose": load_prose().source, "seconds": round(time.monotonic() - began, 1)}
    # Generators are kept in half precision, and used so too: what is loaded later is what was measured now.
    keep = {n: t if stage == "lm" else t.half() for n, t in module.state_dict().items()}
    files.save_tensors(
        path, keep, {"kind": "lm" if stage == "lm" else "generator", "record": record, "provenance": facts}
    )
    (path.parent / f"{path.stem}.checkpoint.safetensors").unlink(missing_ok=True)
    return _built(stage, _size(stage, sizes), lm, keep)


def load_generator(name: str, lm: RWKV4) -> Generator:
    """A shipped generator (`rwkv4-dialogue-token`), or one in a file, for the model it was trained for.

    Raises:
        UserError: there is none of that name, the file is damaged or no generator, or it was trained for another model.
    """
    path = Path(name) if name.endswith(".safetensors") else paths.data_dir() / "checkpoints" / f"{name}.safetensors"
    tensors, meta = files.load_tensors(path)
    if meta.get("kind") != "generator":
        raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a generator")
    record = meta["record"]
    if record["lm"] != lm.fingerprint():
        raise UserError(f"{path.name} was trained for model {record['lm']}, not for this one ({lm.fingerprint()})")
    size = GeneratorSize(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["generator"].items()})
    return _built(record["stage"], size, lm, tensors)
