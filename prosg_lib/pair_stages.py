"""Load or train, for pairs of context and query: two small language models, and the ways to take a context in.

`pairs_of` knows the four tasks; `load_or_train` of `stages` is what `pair_model` and `pair_way` do for dialogues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

from torch import nn

from prosg_lib import stages
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.transformer import new_llama
from prosg_lib.conditioning import pair_lm_objective, pair_objective
from prosg_lib.errors import UserError
from prosg_lib.generator import FinalStateGenerator, TokenGenerator
from prosg_lib.gradient_step import AdapterStep, WeightStep
from prosg_lib.profiles import get_profile
from prosg_lib.tasks.characters import characters
from prosg_lib.tasks.pair_batches import PairDraw
from prosg_lib.tasks.pairs import Fitted, Pair, fitted
from prosg_lib.tasks.prose import books_folder
from prosg_lib.tasks.reversal import reversal
from prosg_lib.tasks.squad import squad
from prosg_lib.tasks.wikitext import copied, wikitext
from prosg_lib.tokenizer import load_tokenizer
from prosg_lib.training import RECIPE

TASKS = ("characters", "reversal", "wikitext", "squad")
PEOPLE = TASKS[:2]
"""The tasks about made-up people; their data are always there."""

BACKBONES = ("recurrent", "transformer")

_EASY = 0.2
"""Share of pretraining with the short contexts of made-up people alone: answering from the context is learned there."""

_WORDS = 50  # of a passage of the cloze: a sentence or three
_CONTEXT, _QUERY = 360, 120  # tokens that a pair may have


def available(task: str) -> bool:
    """Whether this machine has a task's data; the two about made-up people are always there.

    Raises:
        UserError: unknown task.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    return task in PEOPLE or bool(_sources(task))


@lru_cache(maxsize=32)
def pairs_of(task: str, split: str) -> Fitted:
    """A task's pairs that fit, and how many did not.

    SQuAD's questions and WikiText's passages are read from $PROSG_TEST_DATA (`xquad/xquad.en.json`, and the texts of
    `wikitext-2` and `books`); `tasks.squad` and `tasks.wikitext` read the hub's.

    Raises:
        UserError: unknown task, or its data are not on this machine.
    """
    if not available(task):
        raise UserError(f"the data of {task} are not here; set PROSG_TEST_DATA to a folder with xquad/ or wikitext-2/")
    return fitted(_pairs(task, split), load_tokenizer(), _CONTEXT, _QUERY)


def _pairs(task: str, split: str) -> tuple[Pair, ...]:
    if task == "characters":
        return characters(split)
    if task == "reversal":
        return reversal(split)
    if task == "squad":
        return squad(split, _sources(task)[0])
    return sum((wikitext(split, source, words=_WORDS) for source in _sources(task)), ())


def _sources(task: str) -> list[Path]:
    root = Path(os.environ.get("PROSG_TEST_DATA", "/nonexistent"))
    if task == "squad":
        return [p for p in (root / "xquad" / "xquad.en.json",) if p.is_file()]
    return [p for p in (root / "wikitext-2", books_folder()) if p and p.is_dir()]


def _training_pairs(tasks: tuple[str, ...]) -> dict[str, tuple[Pair, ...]]:
    return {task: pairs_of(task, "train").pairs for task in tasks if available(task)}


def _practice() -> dict[str, tuple[Pair, ...]]:
    """What the models are pretrained on: the tasks, and any sentence to be completed from its passage."""
    tokenizer = load_tokenizer()
    found = _training_pairs(TASKS)
    for source in _sources("wikitext"):
        pairs = fitted(copied("train", source, _WORDS), tokenizer, _CONTEXT, _QUERY).pairs
        found[f"copied from {source.name}"] = pairs
    return found


def _digest(tasks: Iterable[str]) -> str:
    """Names the training data of tasks, as far as every machine has them; a checkpoint's provenance tells the prose."""
    digest = hashlib.sha256()
    for task in sorted(set(tasks) & set(PEOPLE)):
        for pair in pairs_of(task, "train").pairs:
            digest.update(f"{task}\n{pair.context}\n{pair.query}\n{pair.answer}\n".encode())
    return digest.hexdigest()[:16]


def _plan(label, name, kind, profile, record, new, work, training, seed) -> stages.Plan:
    record = {"stage": label, "seed": seed, "recipe": RECIPE, "training": asdict(training)} | record
    ending = "" if profile == "cpu" else f"-{profile}"
    return stages.Plan(label, name + ending, kind, json.loads(json.dumps(record)), new, work, training, seed)


def pair_model(backbone: str, profile: str, seed: int = 0, retrain: bool = False) -> LanguageModel:
    """The language model that knows the tasks when it is given the context.

    Args:
        backbone: "recurrent" goes on from the dialogues' RWKV-4, "transformer" starts from nothing.
    Raises:
        UserError: unknown backbone or profile; damaged checkpoint; diverged training.
    """
    if backbone not in BACKBONES:
        raise UserError(f"unknown backbone {backbone!r}; there are {', '.join(BACKBONES)}")
    sizes = get_profile(profile).pairs
    tasks = _practice()
    record = {"data": _digest(PEOPLE)}
    if backbone == "recurrent":
        before = stages.load_or_train("lm", profile, seed, retrain)
        record |= {"model": asdict(before.config), "lm": before.fingerprint()}
        training, name = sizes.recurrent, "rwkv4-pairs"

        def new():
            model = RWKV4(before.config)
            model.load_state_dict(before.state_dict())
            return model

    else:
        record |= {"model": asdict(sizes.transformer_size)}
        training, name = sizes.transformer, "llama-pairs"

        def new():
            return new_llama(sizes.transformer_size)

    def work(model):
        model.tokenizer = load_tokenizer()
        others = sorted(tasks.keys() - set(PEOPLE))
        turns = tuple(chain(*([*PEOPLE, *PEOPLE, other] for other in others))) or PEOPLE
        easy = int(_EASY * training.steps)
        draw = PairDraw(tasks, load_tokenizer(), training.batch, training.contexts, seed, turns, easy)
        return draw, pair_lm_objective(model)

    return stages.obtain(
        _plan(f"{backbone} model", name, "lm", profile, record, new, work, training, seed), profile, retrain
    )


@dataclass(frozen=True)
class WaySpec:
    """What is trained to take a context in.

    Attributes:
        method: "adapter" (one step in a LoRA adapter), "weights" (on all weights, from any start), "weights-<r>" (from
            a start that a rank-r change of the model is), or a generator, "token" or "final".
        tasks: trained on; several in turn.
        objective: "LC" or "LG".
        contexts: number of contexts a query comes with.
        after: trained on these tasks first.
    """

    method: str
    tasks: tuple[str, ...]
    objective: str = "LC"
    contexts: int = 1
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        many = [str(self.contexts)] if self.contexts > 1 else []
        first = ["after", *self.after] if self.after else []
        return "-".join([self.method, *self.tasks, *first, self.objective.lower(), *many])


_GENERATORS = {"token": TokenGenerator, "final": FinalStateGenerator}
_MAPS = {
    "recurrent": ("att.output", "att.value", "ffn.key", "ffn.value"),
    "transformer": ("v_proj", "o_proj", "up_proj", "down_proj"),
}


def new_way(method: str, lm: LanguageModel, backbone: str, profile: str) -> nn.Module:
    """An untrained way; the step's start is the model itself.

    Raises:
        UserError: unknown method, or a rank that a matrix does not have.
    """
    sizes = get_profile(profile).pairs
    maps = _MAPS.get(backbone) or _MAPS["transformer"]
    if method == "adapter":
        return AdapterStep(lm, sizes.rank, maps, sizes.adapter_lr)
    if method in _GENERATORS:
        return _GENERATORS[method](lm, sizes.rank, 2 * lm.config.width, maps)
    kind, _, rank = method.partition("-")
    if kind != "weights" or not (rank or "1").isdigit():
        raise UserError(f"unknown method {method!r}; there are adapter, weights, weights-<rank>, token, final")
    return WeightStep(lm, int(rank) if rank else None, sizes.weights_lr)


def pair_way(spec: WaySpec, backbone: str, profile: str, seed: int = 0, retrain: bool = False) -> nn.Module:
    """The trained way of a specification, for `pair_model(backbone, ...)`; loaded or trained.

    Raises:
        UserError: unknown method, task, objective, backbone or profile; damaged checkpoint; diverged training.
    """
    sizes = get_profile(profile).pairs
    lm = pair_model(backbone, profile, 0, retrain)
    fresh = new_way(spec.method, lm, backbone, profile)  # first, because it knows which methods there are
    training = getattr(sizes, spec.method.partition("-")[0], sizes.generator)
    training = replace(training, contexts=(spec.contexts,))
    tasks = _training_pairs(spec.tasks)
    before = (
        pair_way(replace(spec, tasks=spec.after, after=()), backbone, profile, seed, retrain) if spec.after else None
    )
    record = {
        "way": asdict(spec),
        "lm": lm.fingerprint(),
        "data": _digest(spec.tasks + spec.after),
        "inner": {"lr": getattr(fresh, "lr", None), "rank": getattr(fresh, "rank", None)},
    }

    def new():
        way = new_way(spec.method, lm, backbone, profile)
        if before is not None:
            way.load_state_dict(before.state_dict())
        return way

    def work(way):
        draw = PairDraw(tasks, load_tokenizer(), training.batch, training.contexts, seed, tuple(sorted(tasks)))
        if spec.method == "final":
            told = draw(-1).to(stages.device()).context
            way.fit_normaliser(lm, told.ids[:, 0], told.valid[:, 0])
        return draw, pair_objective(lm, way, spec.objective)

    name = f"{'rwkv4' if backbone == 'recurrent' else 'llama'}-pairs-{spec.name}" + (f"-seed{seed}" if seed else "")
    plan = _plan(f"{backbone} {spec.name}", name, "generator", profile, record, new, work, training, seed)
    return stages.obtain(replace(plan, at_once=sizes.at_once), profile, retrain)
