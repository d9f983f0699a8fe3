"""Load or train: the language model, and the generators on it.

A stage is loaded where a checkpoint's record (sizes, seed, recipe, data hash, the model it belongs to) is the one that
training now would write; otherwise it is trained, and kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import nn

from prosg_lib import files, paths, provenance
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.recompute import recomputed
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import (
    AdapterSize,
    GeneratorSize,
    PairTraining,
    Profile,
    RWKV4Config,
    SupervisedSize,
    Training,
    TransformedSize,
)
from prosg_lib.errors import UserError
from prosg_lib.generators.base import Generator
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.mend import TransformedGradient
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.tasks.dialogue import Dialogues, data_hash
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.training import distributed
from prosg_lib.training.loop import RECIPE, fit
from prosg_lib.training.objectives import USUAL, Curriculum, generator_draw, generator_objective, lm_draw, lm_objective
from prosg_lib.training.supervised import read_as, supervised_objective

STAGES = ("lm", "token", "final", "static", "adapter", "supervised", "mend")


def device() -> torch.device:
    """The GPU where there is one; of several processes each has its own."""
    return distributed.device()


def checkpoint_name(stage: str, profile: Profile) -> str:
    """`rwkv4-dialogue` is the cpu profile's language model, `rwkv4-dialogue-token` a generator for it."""
    return "rwkv4-dialogue" + ("" if stage == "lm" else f"-{stage}") + ending(profile)


def ending(profile: Profile) -> str:
    """Of a checkpoint's name; the cpu profile's have none."""
    owner = profile.models_of or profile.name
    return "" if owner == "cpu" else f"-{owner}"


@lru_cache(maxsize=8)
def dialogues(split: str, seed: int, rich: bool = False, tokenizer: Tokenizer | None = None) -> Dialogues:
    """The data set of a split and seed, with whatever prose this machine has.

    Args:
        tokenizer: None for the project's own.
    """
    tokenizer = tokenizer or load_tokenizer()
    return Dialogues(tokenizer, _prose(split, tokenizer), split, seed, rich)


@lru_cache(maxsize=6)
def _prose(split: str, tokenizer: Tokenizer) -> ProseTokens:
    return ProseTokens.of(load_prose(), split, tokenizer)


@dataclass(frozen=True)
class Thrift:
    """How a training gets by with less memory. It ends with the same weights, but for rounding.

    Attributes:
        at_once: so many examples are in memory at a time; None: a process's whole part of a batch.
        recompute: keep of every block its inputs alone, and run it again in the backward pass.
    """

    at_once: int | None = None
    recompute: bool = False

    def for_gradient_step(self, label: str) -> None:
        """Raises a UserError where it does not do for what takes a gradient step and is trained through it."""
        if self.recompute:
            raise UserError(f"{label} needs second derivatives, which blocks that run again lack; leave out recompute")


PLENTY = Thrift()
"""Memory enough."""


def load_or_train(
    stage: str, profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> nn.Module:
    """The trained module of a stage, in evaluation mode; says in one line what it loaded and why, or trains.

    Args:
        stage: "lm", or a generator: "token", "final", "static"; "adapter", which takes a real gradient step;
            "supervised", a token-wise one that first learned to predict true gradients; "mend", which transforms the
            true one (what it builds on is trained first, if need be).
        retrain: do not load what is shipped; what was trained here since (`forget`) is loaded, and what is missing is
            trained, so that several notebooks of one run train each stage once.
        thrift: of all that is trained.
    Raises:
        UserError: unknown stage or profile; damaged checkpoint; diverged training; an adapter that is to be trained
            with blocks that are run again.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; there are {', '.join(STAGES)}")
    sizes = profile
    if stage == "adapter":
        thrift.for_gradient_step(stage)
    lm = None if stage == "lm" else load_or_train("lm", profile, seed, retrain, thrift)
    plan = Plan(
        stage,
        checkpoint_name(stage, profile),
        "lm" if stage == "lm" else "generator",
        _record(stage, sizes, seed, lm),
        lambda: new_module(stage, size_of(stage, sizes), lm),
        lambda module: _work(stage, sizes, seed, lm, module),
        sizes.lm if stage == "lm" else getattr(sizes, f"{stage}_training"),
        seed,
        lm,
        thrift,
    )
    return obtain(plan, profile, retrain)


@dataclass(frozen=True)
class Plan:
    """How to come by a trained module.

    Attributes:
        label: what to call it; name: of its checkpoint; kind: "lm" or "generator".
        record: what a checkpoint must have been trained as.
        new: -> the module, untrained; its random numbers are the seed's.
        work: the untrained module -> (step -> batch, (step, batch) -> Loss).
        training: steps, batch, learning rate.
        lm: the language model that it is for; None: it is one itself.
        held: as in `training.fit`.
    """

    label: str
    name: str
    kind: str
    record: dict
    new: Callable[[], nn.Module]
    work: Callable[[nn.Module], tuple[Callable, Callable]]
    training: Training | PairTraining
    seed: int
    lm: LanguageModel | None = None
    thrift: Thrift = PLENTY
    held: int = 0


def obtain(plan: Plan, profile: Profile, retrain: bool = False) -> nn.Module:
    """Load or train; see `load_or_train`. Of several processes all load, or all train.

    Returns:
        The module; its `checkpoint` is the file that has it, with its log beside it.
    """
    keep_freed_memory()
    own = kept(profile) / f"{plan.name}.safetensors"
    shipped = paths.data_dir() / "checkpoints" / f"{plan.name}.safetensors"
    found = _found(plan, (own,) if retrain else (shipped, own))
    if distributed.agreed(found is not None, f"whether {plan.label} is trained"):
        return _built(plan.new(), *found)
    return _train(plan, own)


def _found(plan: Plan, places: tuple[Path, ...]) -> tuple[Path, dict] | None:
    """The first checkpoint that fits, and its tensors."""
    for path in places:
        if path.exists():
            tensors, meta = files.load_tensors(path)
            if meta.get("record") == plan.record:
                where, kept_at = meta["provenance"]["device"], path.stat().st_mtime_ns
                _say_once(f"{plan.label}: loaded {path.name}, trained on {where}: same sizes, seed and data", kept_at)
                return path, tensors
            why = _why(meta.get("record", {}), plan.record)
            distributed.say(f"{plan.label}: {path.name} was trained otherwise ({why}); not used")
    return None


@cache
def _say_once(text: str, kept_at: int) -> None:
    """Of a file as it is now: a model is loaded again for everything that builds on it."""
    distributed.say(text)


def kept(profile: Profile) -> Path:
    """Folder of what was trained here."""
    return paths.runs_dir(profile.name) / "checkpoints"


MEASURED, PREDICTED = ".measured.jsonl.gz", ".predictions.jsonl.gz"
"""Endings of files beside a checkpoint that have what was measured of it, or all that it said."""


def forget(profile: Profile, names: Iterable[str] | None = None) -> None:
    """Remove what was trained here, and what was measured of it, so that it is done anew.

    Trainings that were interrupted still go on.

    Args:
        names: of checkpoints; None: of all.
    """
    for path in kept(profile).glob("*.safetensors"):
        if not path.name.endswith(".checkpoint.safetensors") and (names is None or path.stem in names):
            path.unlink(missing_ok=True)
            for suffix in (MEASURED, PREDICTED):
                path.with_suffix(suffix).unlink(missing_ok=True)


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
        record |= {"generator": asdict(size_of(stage, sizes))}
        record |= {"lm": lm.fingerprint()}
    return plain(record)


def plain(record: dict) -> dict:
    """A record as a checkpoint gives it back: tuples become lists."""
    return json.loads(json.dumps(record))


def _why(theirs: dict, ours: dict) -> str:
    return ", ".join(key for key in ours if theirs.get(key) != ours[key]) or "unknown record"


Size = RWKV4Config | GeneratorSize | AdapterSize

_KINDS: dict[str, tuple[type[Size], Callable[..., nn.Module]]] = {
    "lm": (RWKV4Config, lambda size, lm: RWKV4(size)),
    "token": (GeneratorSize, lambda s, lm, **more: TokenGenerator(lm, s.rank, s.width, s.maps, **more)),
    "final": (GeneratorSize, lambda s, lm, **more: FinalStateGenerator(lm, s.rank, s.width, s.maps, **more)),
    "static": (GeneratorSize, lambda s, lm: StaticDelta(lm, s.rank, s.maps)),
    "adapter": (AdapterSize, lambda s, lm: AdapterStep(lm, s.rank, s.maps, s.lr)),
    "supervised": (
        SupervisedSize,
        lambda s, lm, **more: TokenGenerator(lm, s.rank, s.width, s.maps, **more),
    ),
    "mend": (TransformedSize, lambda s, lm: TransformedGradient(lm, s.rank, s.width, s.maps, s.step)),
}
"""Stage -> what its size is, and (size, model that it is for, a generator's own options) -> the untrained module."""


def new_module(stage: str, size: Size, lm: LanguageModel | None, **options) -> nn.Module:
    """The untrained module of a stage; options are those of its generator's class, and as a rule none."""
    return _KINDS[stage][1](size, lm, **options)


def _built(module: nn.Module, path: Path, tensors: dict) -> nn.Module:
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    module.checkpoint = path
    if isinstance(module, LanguageModel):
        module.tokenizer = load_tokenizer()
    return module.to(device()).eval().requires_grad_(False)


def size_of(stage: str, sizes: Profile) -> Size:
    """A static delta has the size of the token-wise generator's."""
    return getattr(sizes, {"lm": "model", "static": "token"}.get(stage, stage))


def _work(stage: str, sizes: Profile, seed: int, lm: RWKV4 | None, module: nn.Module) -> tuple[Callable, Callable]:
    if stage != "lm":
        return generator_work(module, lm, size_of(stage, sizes), getattr(sizes, f"{stage}_training"), sizes, seed)
    data = dialogues("train", seed)
    module.tokenizer = data.tokenizer
    return lm_draw(data, sizes.lm), lm_objective(module, distributed.bfloat16(sizes.autocast))


def generator_work(
    generator: Generator,
    lm: LanguageModel,
    size: Size,
    training: Training,
    sizes: Profile,
    seed: int,
    course: Curriculum = USUAL,
) -> tuple[Callable, Callable]:
    """What a generator is trained on, step -> batch and (step, batch) -> Loss; its statistics are collected here."""
    autocast = distributed.bfloat16(sizes.autocast)
    batch_of = generator_draw(dialogues("train", seed, rich=True), training, course)
    sample = batch_of(-1).to(device())
    generator.fit_normaliser(lm, sample.prompt, sample.prompt_valid)
    if isinstance(size, SupervisedSize):
        if size.directions:
            read_as(lm, generator, size, sample)
        return batch_of, supervised_objective(lm, generator, training, seed, size, sample, autocast, course)
    return batch_of, generator_objective(lm, generator, training, seed, autocast, course)


def _train(plan: Plan, path: Path) -> nn.Module:
    torch.manual_seed(plan.seed)
    module = plan.new().to(device())
    began = time.monotonic()
    batch_of, loss_of = plan.work(module)
    many = f"{distributed.count()} processes, " if distributed.count() > 1 else ""
    where = f"{plan.training.steps} steps of {plan.training.batch} on {many}{provenance.device()}"
    weights = sum(p.numel() for p in module.parameters()) / 1e6
    distributed.say(f"{plan.label}: training, {weights:.2f} M parameters, {where}")
    with recomputed(plan.lm or module) if plan.thrift.recompute else nullcontext():
        how = {"at_once": plan.thrift.at_once, "held": plan.held}
        fit(path.stem, module, batch_of, loss_of, plan.training, path.parent, plan.record, **how)
    facts = provenance.facts() | {"prose": load_prose().source, "seconds": round(time.monotonic() - began, 1)}
    # Generators are kept in half precision, and used so too: what is loaded later is what was measured now.
    keep = {n: t if plan.kind == "lm" else t.half() for n, t in module.state_dict().items()}
    if distributed.first():
        files.save_tensors(path, keep, {"kind": plan.kind, "record": plan.record, "provenance": facts})
        (path.parent / f"{path.stem}.checkpoint.safetensors").unlink(missing_ok=True)
    distributed.wait()
    return _built(plan.new(), path, keep)


def load_generator(name: str, lm: LanguageModel) -> Generator:
    """A shipped generator (`rwkv4-dialogue-token`), or one in a file, for the model it was trained for.

    Raises:
        UserError: there is none of that name, the file is damaged or no generator, or it was trained for another model.
    """
    path = generator_file(name)
    tensors, meta = files.load_tensors(path)
    if meta.get("kind") != "generator":
        raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a generator")
    record = meta["record"]
    if record["lm"] != lm.fingerprint():
        raise UserError(f"{path.name} was trained for model {record['lm']}, not for this one ({lm.fingerprint()})")
    if record["stage"] not in STAGES:
        raise UserError(f"{path.name} was trained on pairs ({record['stage']}); `pair_stages.pair_way` loads those")
    kind = _KINDS[record["stage"]][0]
    size, options = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in record.get(part, {}).items()}
        for part in ("generator", "options")
    )
    return _built(new_module(record["stage"], kind(**size), lm, **options), path, tensors)


def generator_file(name: str) -> Path:
    """Where a shipped generator of that name is, or would be; a name that ends in .safetensors is a path itself."""
    return Path(name) if name.endswith(".safetensors") else paths.data_dir() / "checkpoints" / f"{name}.safetensors"


def own_generator(model: str) -> str | None:
    """The name of the token-wise generator that is shipped with a shipped model; None where there is none."""
    own = f"{model}-token"
    named = Path(model).name == model and not Path(model).exists()
    return own if named and generator_file(own).is_file() else None
