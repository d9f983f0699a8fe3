"""`load_or_train`: the only way to a trained module by its recipe's name."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from prosg_lib import files, provenance
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.precision import in_fastest_precision
from prosg_lib.backbones.recompute import recomputed
from prosg_lib.config import Profile
from prosg_lib.config.sizes import Sizes
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import distributed
from prosg_lib.training.checkpoints import VERSION, built, header_of, kept, new_module, read, retraining, shipped
from prosg_lib.training.loop import fit
from prosg_lib.training.recipes import GRADIENT_STEPS, Recipe, checkpoint_name, recipe, recipes
from prosg_lib.training.work import check_data, course_of, data_of, steps_of, texts_of, work


@dataclass(frozen=True)
class MemoryBudget(Sizes):
    """How a training uses less memory. It ends with the same weights, up to rounding.

    Attributes:
        at_once: examples in memory at a time, gradients are added up; None: the profile's number, or all of a batch.
        recompute: keep only the inputs of every block, and compute its activations again in the backward pass.
    """

    at_once: int | None = None
    recompute: bool = False


def load_or_train(
    name: str,
    profile: Profile,
    seed: int = 0,
    retrain: bool = False,
    changes: Mapping[str, object] | None = None,
    lm: LanguageModel | None = None,
    memory: MemoryBudget = MemoryBudget(),
    anew: bool = False,
) -> nn.Module:
    """The trained module of a recipe, frozen and in evaluation mode; prints in one line what it loaded, or trains it.

    A checkpoint is loaded if its record (sizes, seed, data, model) is the one that training now would write: a shipped
    one first, then one that was trained here. Otherwise the module is trained, and kept in runs/<profile>/checkpoints.
    Of several processes all load, or all train.

    Args:
        name: of the recipe (`recipes`), e.g. "rwkv4-dialogue-token".
        seed: of this training, and of the one whose weights it starts from. The model it is for has seed 0.
        retrain: load nothing that is shipped and, while a retraining is in progress (`checkpoints.begin_retraining`),
            nothing that was trained here before it; its notebooks then train each module once.
        changes: settings that differ from the recipe's, e.g. {"training.steps": 300, "size.rank": 8}; see
            `recipes.recipe`. They are part of the checkpoint's name.
        lm: the language model that it is for; None: the recipe's own. Any other has a checkpoint of its own.
        memory: of all that is trained.
        anew: train this one even if a checkpoint fits, but not the model it is for; an interrupted training resumes.
    Returns:
        The module; its `checkpoint` is the path of its file, with the training's log (.jsonl) beside it.
    Raises:
        UserError: unknown recipe or setting; data that this machine lacks; a damaged checkpoint; a diverged training;
            a folder that cannot be written to, or in which another process is training the same.
    """
    made = recipe(name, profile, changes)
    if memory.recompute and made.kind in GRADIENT_STEPS:
        raise UserError(f"{name} needs second derivatives, which recomputed blocks do not have; leave out recompute")
    check_data(made, profile)
    if changes:
        _check_sizes(made, profile, lm)
    own = lm is None
    lm = _model_for(made, profile, retrain, lm, memory)
    made, record = _resolved(made, profile, seed, lm)
    keep_freed_memory()
    plain = checkpoint_name(name, profile, seed, changes)
    own = own or (made.window is None and getattr(lm, "checkpoint", Path()).stem == checkpoint_name(made.lm, profile))
    mine = plain if own else checkpoint_name(name, profile, seed, changes, lm.fingerprint())
    path = kept(mine, profile)
    places = [path] if retrain else [shipped(plain), kept(plain, profile), path]
    found = None if anew else _found(places, record, mine, retraining(profile) if retrain else None)
    if distributed.agreed(found is not None, f"whether {mine} is trained"):
        return built(new_module(made.kind, made.size, lm), *found)
    start = None
    if made.start:
        start = load_or_train(made.start, profile, seed, retrain, lm=lm, memory=memory)
    with distributed.alone(path):
        return _train(made, profile, path, record, lm, start, memory)


def record_of(
    name: str,
    profile: Profile,
    seed: int = 0,
    changes: Mapping[str, object] | None = None,
    lm: LanguageModel | None = None,
) -> dict:
    """What a checkpoint of a recipe is trained as; the arguments are those of `load_or_train`.

    A checkpoint is taken for the recipe if its header has an equal record.

    Args:
        lm: needed for every recipe that is for a language model.
    Returns:
        recipe (its name), version (`checkpoints.VERSION`), seed; data (`work.data_of`); module (its kind and sizes);
        training (steps, batch, learning rate); course (how the steps differ from one another, `work.course_of`); lm
        (fingerprint of the language model it is for, None for one); start (record of the checkpoint whose weights it
        started from, or None). As JSON gives it back: tuples are lists.
    """
    return _resolved(recipe(name, profile, changes), profile, seed, lm)[1]


def _resolved(made: Recipe, profile: Profile, seed: int, lm: LanguageModel | None) -> tuple[Recipe, dict]:
    """The recipe with its number of steps, and its record."""
    tokenizer = load_tokenizer() if lm is None else lm.needed_tokenizer()
    made = replace(made, training=replace(made.training, steps=steps_of(made, profile, tokenizer)))
    record = {
        "recipe": made.name,
        "version": VERSION,
        "seed": seed,
        "data": data_of(made, profile, tokenizer),
        "module": {"kind": made.kind, **asdict(made.size)},
        "training": asdict(made.training),
        "course": course_of(made),
        "lm": None if lm is None else lm.fingerprint(),
        "start": _resolved(recipe(made.start, profile), profile, seed, lm)[1] if made.start else None,
    }
    return made, json.loads(json.dumps(record))


def _model_for(
    made: Recipe, profile: Profile, retrain: bool, lm: LanguageModel | None, memory: MemoryBudget
) -> LanguageModel | None:
    """The language model that a recipe is for."""
    if made.is_model:
        if lm is not None:
            raise UserError(f"{made.name} is a language model itself; leave out lm")
        return None
    if lm is None and made.window is not None:
        lm = load_model(made.lm, made.window or None).to(distributed.device()).requires_grad_(False)
        # Gradients of gradients in half precision would be noise.
        return lm if made.kind in GRADIENT_STEPS else in_fastest_precision(lm)
    if lm is None and made.lm not in recipes(profile):
        raise UserError(
            f"the profile {profile.name} has no model {made.lm} of its own; give one of the hub, as "
            "lm=load_model(HUB_ID), or to notebook 07 as --param model=HUB_ID"
        )
    return load_or_train(made.lm, profile, 0, retrain, memory=memory) if lm is None else lm


def _check_sizes(made: Recipe, profile: Profile, lm: LanguageModel | None) -> None:
    """Raises a UserError where sizes do not fit, before the model that they are for is trained."""
    with torch.random.fork_rng():
        if not made.is_model and lm is None and made.lm in recipes(profile):
            lm = new_module(recipes(profile)[made.lm].kind, recipes(profile)[made.lm].size)
        if made.is_model or lm is not None:
            new_module(made.kind, made.size, lm)


def _found(places: list[Path], record: dict, name: str, since: str | None) -> tuple[Path, dict] | None:
    """The first checkpoint that fits, and its tensors; since: only of the retraining that began then."""
    for path in dict.fromkeys(places):
        if not path.exists():
            continue
        tensors, meta = read(path)
        header = header_of(meta, path)
        if since and header.provenance.get("retraining") != since:
            continue
        if meta["record"] == record:
            where, saved = header.provenance.get("device", "an unknown device"), path.stat().st_mtime_ns
            _say_once(f"{path.stem}: loaded, trained on {where}: same sizes, seed and data", saved)
            return path, tensors
        if path.stem == name:
            why = ", ".join(part for part in record if record[part] != meta["record"][part])
            distributed.say(f"{name}: {path} was trained otherwise ({why}); not used")
    return None


@cache
def _say_once(text: str, saved: int) -> None:
    """About a file as it is now: a model is loaded again for everything that is for it."""
    distributed.say(text)


def _train(
    made: Recipe,
    profile: Profile,
    path: Path,
    record: dict,
    lm: LanguageModel | None,
    start: nn.Module | None,
    memory: MemoryBudget,
) -> nn.Module:
    torch.manual_seed(record["seed"])
    module = new_module(made.kind, made.size, lm).to(distributed.device())
    if start is not None:
        module.load_state_dict(start.state_dict())
    began = time.monotonic()
    batch_of, loss_of = work(made, profile, module, lm, record["seed"])
    many = f"{distributed.count()} processes, " if distributed.count() > 1 else ""
    where = f"{made.training.steps} steps of {made.training.batch} on {many}{provenance.device()}"
    weights = sum(p.numel() for p in module.parameters()) / 1e6
    distributed.say(f"{path.stem}: training, {weights:.2f} M parameters, {where}")
    at_once = memory.at_once or made.at_once
    peak = made.pairs.repeats if made.pairs and made.kind == "maps" else 0
    with recomputed(lm or module) if memory.recompute else nullcontext():
        fit(path.stem, module, batch_of, loss_of, made.training, path.parent, record, at_once=at_once, peak_until=peak)
    facts = provenance.facts() | texts_of(made) | {"seconds": round(time.monotonic() - began, 1)}
    if since := retraining(profile):
        facts["retraining"] = since
    # Generators are kept in half precision, and used so: what is loaded later is what was measured now.
    keep = {n: t if made.is_model else t.half() for n, t in module.state_dict().items()}
    if distributed.first():
        kind = "lm" if made.is_model else "generator"
        files.save_tensors(path, keep, {"kind": kind, "record": record, "provenance": facts})
        (path.parent / f"{path.stem}.checkpoint.safetensors").unlink(missing_ok=True)
    distributed.wait()
    return built(new_module(made.kind, made.size, lm), path, keep)
