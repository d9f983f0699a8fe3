"""What a sceptic asks about the open world, part by part; every part is one table of answers or of verdicts.

A part takes the language model, what was trained for it by kind (`KINDS`; as far as there is any), the split and the
sizes. Methods whose generator is missing are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config.profiles import Profile
from prosg_lib.config.sizes import OpenStudy
from prosg_lib.evaluation import memory_uses, open_recall, recall
from prosg_lib.generators.base import Generator
from prosg_lib.generators.several_prompts import common_part
from prosg_lib.tasks.open_wording import LEVELS
from prosg_lib.tasks.open_world import Shape, load_open_world
from prosg_lib.training import state_probe
from prosg_lib.training.load_or_train import load_or_train
from prosg_lib.training.state_probe import StateProbe

METHODS = ("base", "repeated", "prosg-token", "alone", "prosg-final", "final-alone", "wrong", "static", "none")
"""All that are compared; see `baselines.METHODS` and `open_recall.ALONE`."""

_SHORT = ("base", "prosg-token", "alone", "none")
_NEEDS = {
    "prosg-token": "token",
    "alone": "token",
    "wrong": "token",
    "prosg-final": "final",
    "final-alone": "final",
    "static": "static",
}

Trained = Mapping[str, Generator | StateProbe]


def _possible(methods, trained: Trained) -> list[str]:
    return [m for m in methods if m not in _NEEDS or _NEEDS[m] in trained]


def levels(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers level by level (column level: what is new) and distance by distance: six facts of the user's, one of
    somebody else's, one that is corrected, an instruction, and one question about what was never said."""
    shape = Shape(sizes.facts, max(sizes.distances), sizes.facts + 1, others=1, unknown=1, updates=1, instructions=1)
    parts = []
    for level in LEVELS:
        data, methods = load_open_world(level, split, 0), _possible(METHODS, trained)
        items = data.items(sizes.prompts, shape)
        parts.append(open_recall.answers(lm, trained, methods, data, items, sizes.distances).assign(level=level))
    return pd.concat(parts, ignore_index=True)


def natural(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers about the prompts without templates."""
    data, methods = load_open_world("all", split, 0), _possible(METHODS, trained)
    distances = sizes.distances[:-1]
    return open_recall.answers(lm, trained, methods, data, data.natural(max(distances), sizes.natural), distances)


def far(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers very far behind the prompt; new values."""
    data = load_open_world("values", split, 1)
    items = data.items(sizes.fewer, Shape(sizes.facts, sizes.far, sizes.facts))
    methods = _possible((*_SHORT, "prosg-final", "final-alone"), trained)
    return open_recall.answers(lm, trained, methods, data, items, (sizes.far,))


def held(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """What the state right behind a prompt holds: level, prompt, method, recall; "probe" is the share of the facts that
    the probe reads off it, "base" the share that the model itself answers."""
    parts = []
    for level in LEVELS:
        data = load_open_world(level, split, 9)
        items = data.items(sizes.prompts, Shape(sizes.facts, 0, sizes.facts))
        said = open_recall.judged(open_recall.answers(lm, {}, ["base"], data, items, (0,)))
        shares = {"probe": state_probe.held(lm, trained["probe"], data, items), "base": said.recall}
        parts += [
            pd.DataFrame({"level": level, "prompt": range(len(items)), "method": method, "recall": share})
            for method, share in shares.items()
        ]
    return pd.concat(parts, ignore_index=True)


def facts(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers by the number of facts in the prompt; new values."""
    data, methods = load_open_world("values", split, 2), _possible(("base", "prosg-token", "alone"), trained)
    near = sizes.distances[1]
    parts = [
        open_recall.answers(lm, trained, methods, data, data.items(sizes.fewer, Shape(n, near, min(n, 12))), (near,))
        for n in sizes.many
    ]
    return pd.concat(parts, ignore_index=True)


def query(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers to a question that stands in the prompt, about what the text behind it says; new values.

    The text states two more facts of the user's, so it takes the prompt to know which is meant. Where it stated one
    alone, a model that had not seen the prompt answered nine of ten.
    """
    data, near = load_open_world("values", split, 3), max(sizes.distances[1], 192)
    items = data.items(sizes.prompts, Shape(2, near, 1, query=True, rivals=2))
    methods = _possible((*_SHORT, "wrong"), trained)
    return open_recall.answers(lm, trained, methods, data, items, (near,))


@dataclass(frozen=True)
class _Scaled:
    """A generator whose changes are multiplied by a factor."""

    generator: Generator
    factor: float

    def __call__(self, lm, ids, valid=None):
        delta, state = self.generator(lm, ids, valid)
        return delta.scaled(self.factor), state


def scale(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Answers by the size of the token-wise change (column scale), with the prompt in the state; new values."""
    data, middle = load_open_world("values", split, 4), sizes.distances[-2]
    items, parts = data.items(sizes.prompts, Shape(sizes.facts, middle, sizes.facts)), []
    for factor in sizes.scales:
        scaled = {"token": _Scaled(trained["token"], factor)}
        found = open_recall.answers(lm, scaled, ["prosg-token"], data, items, (middle,))
        parts.append(found.assign(scale=factor))
    return pd.concat(parts, ignore_index=True)


def prose(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Loss of prose right behind each prompt, nats a token: method, prompt, loss."""
    data = load_open_world("values", split, 5)
    items = data.items(sizes.prompts, Shape(sizes.facts, 0, 1, instructions=1))
    parts = [
        pd.DataFrame({"method": m, "loss": recall.prose_losses(lm, trained, m, data, items)})
        for m in ("base", "prosg-token")
    ]
    return pd.concat([part.rename_axis("prompt").reset_index() for part in parts], ignore_index=True)


def removal(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Of `memory_uses.removal`; new values. What all changes share is the mean over 64 prompts of training."""
    items = load_open_world("known", "train", 0).items(64, Shape(1, 0, 1))
    said = [item.prompt.removeprefix("User: ") for item in items]
    common = common_part(lm, trained["token"], said)
    data = load_open_world("values", split, 6)
    return memory_uses.removal(lm, trained["token"], data, sizes.fewer, sizes.facts, common)


def rolling(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Of `memory_uses.rolling`; new values."""
    return memory_uses.rolling(lm, trained["token"], load_open_world("values", split, 7), sizes.fewer, sizes.turns)


def turns(lm: LanguageModel, trained: Trained, split: str, sizes: OpenStudy) -> pd.DataFrame:
    """Of `memory_uses.instructions_by_turn`; new values, training's words for instructions."""
    return memory_uses.instructions_by_turn(
        lm, trained["token"], load_open_world("values", split, 8), sizes.fewer, sizes.instructed
    )


Part = Callable[[LanguageModel, Trained, str, OpenStudy], pd.DataFrame]
PARTS: dict[str, Part] = {
    f.__name__: f for f in (levels, natural, far, held, facts, query, scale, prose, removal, rolling, turns)
}
"""Name -> what is asked; `data/measured/open_NAME.jsonl.gz` has what the profile `cpu` answered."""

MODEL = "rwkv7-open"
KINDS = {
    "token": "rwkv7-open-token",
    "final": "rwkv7-open-states",
    "static": "rwkv7-open-static",
    "probe": "rwkv7-open-probe",
}
"""What is trained for it: three generators, and a probe of what the state holds."""


def models(
    profile: Profile, seed: int = 0, retrain: bool = False, kinds: Iterable[str] = tuple(KINDS)
) -> tuple[LanguageModel, dict[str, Generator | StateProbe]]:
    """The model of the open world and some of what is trained for it, by kind; see `load_or_train`."""
    lm = load_or_train(MODEL, profile, seed, retrain)
    return lm, {kind: load_or_train(KINDS[kind], profile, seed, retrain, lm=lm) for kind in kinds}
