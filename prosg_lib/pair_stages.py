"""Load or train, for pairs of context and query: two small language models, and the ways to take a context in.

`pairs_of` knows the four tasks; `load_or_train` of `stages` is what `pair_model` and `pair_way` do for dialogues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from torch import nn

from prosg_lib import stages
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.transformer import new_llama
from prosg_lib.conditioning import pair_lm_objective, pair_objective
from prosg_lib.errors import UserError
from prosg_lib.generator import FinalStateGenerator, TokenGenerator
from prosg_lib.gradient_step import AdapterStep, Way, WeightStep
from prosg_lib.profiles import PairTraining, get_profile
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
BACKBONES = ("recurrent", "transformer")

_WORDS = 50  # of a passage of the cloze: a sentence or three
_CONTEXT, _QUERY = 360, 120  # tokens that a pair may have


def available(task: str) -> bool:
    """Whether this machine has a task's data; the two about made-up people are always there.

    Raises:
        UserError: unknown task.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    return task in ("characters", "reversal") or bool(_sources(task))


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


def _digest(tasks: dict[str, tuple[Pair, ...]]) -> str:
    digest = hashlib.sha256()
    for task in sorted(tasks):
        for pair in tasks[task]:
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
    record = {"data": _digest(tasks)}
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
        draw = PairDraw(tasks, load_tokenizer(), training.batch, training.contexts, seed)
        return draw, pair_lm_objective(model)

    return stages.obtain(
        _plan(f"{backbone} model", name, "lm", profile, record, new, work, training, seed), profile, retrain
    )
