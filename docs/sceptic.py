"""Writes sceptic.md: the text of sceptic.md.jinja with numbers from data/measured/open_*.jsonl.gz.

python docs/sceptic.py                      # write the page
python docs/sceptic.py check                # exit code 1 if the page is not what would be written
python docs/sceptic.py measure              # ask the shipped models everything again (about an hour on two cores)
python docs/sceptic.py measure levels uses  # only some of it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd

from prosg_lib import files, paths
from prosg_lib.config import get_profile
from prosg_lib.evaluation import memory_uses, open_recall, predictions, statistics
from prosg_lib.tasks.open_wording import LEVELS
from prosg_lib.tasks.open_world import OpenWorld, Shape, load_open_world
from prosg_lib.training.load_or_train import load_or_train

PAGE = Path(__file__).with_name("sceptic.md")
TEMPLATE = PAGE.with_suffix(".md.jinja")

MODELS = ("rwkv7-open",)
DISTANCES = (0, 64, 256, 1024, 4096)
FAR = 16384
METHODS = ("base", "repeated", "prosg-token", "alone", "prosg-final", "wrong", "static", "none")
PROMPTS = 40
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


@cache
def trained(name: str):
    """The language model of a name, and its generators."""
    profile = get_profile("cpu")
    lm = load_or_train(name, profile)
    kinds = {"token": "token", "final": "states", "static": "static"}
    return lm, {kind: load_or_train(f"{name}-{recipe}", profile, lm=lm) for kind, recipe in kinds.items()}


def asked(name: str, data: OpenWorld, items: list, methods, distances, generators=None) -> pd.DataFrame:
    lm, own = trained(name)
    rows = open_recall.answers(lm, generators or own, methods, data, items, distances)
    return rows.assign(model=name)


def levels(split: str) -> Iterator[pd.DataFrame]:
    """Six facts of the user's, one of somebody else's, one updated, one asked that was never said."""
    shape = Shape(6, max(DISTANCES), 7, others=1, unknown=1, updates=1, instructions=1)
    for name in MODELS:
        for level in LEVELS:
            data = load_open_world(level, split, 0)
            yield asked(name, data, data.items(PROMPTS, shape), METHODS, DISTANCES).assign(level=level)


def far(split: str) -> Iterator[pd.DataFrame]:
    """Six facts, new values, very far away."""
    for name in MODELS:
        data = load_open_world("values", split, 6)
        items = data.items(PROMPTS // 2, Shape(6, FAR, 6))
        yield asked(name, data, items, ("base", "prosg-token", "alone", "none"), (FAR,))


def facts(split: str) -> Iterator[pd.DataFrame]:
    """More facts in the prompt, at 256 tokens."""
    for name in MODELS:
        for count, level in [(6, "values"), (24, "values"), (64, "values")]:
            data = load_open_world(level, split, 1)
            items = data.items(PROMPTS // 2, Shape(count, 256, min(count, 24)))
            yield asked(name, data, items, ("base", "repeated", "prosg-token", "alone"), (256,)).assign(level=level)


def natural(split: str) -> Iterator[pd.DataFrame]:
    """The hand-written prompts."""
    for name in MODELS:
        data = load_open_world("all", split, 0)
        yield asked(name, data, data.natural(1024), METHODS, (0, 256, 1024)).assign(level="natural")


def query(split: str) -> Iterator[pd.DataFrame]:
    """The question in the weights, what it asks for in the text."""
    for name in MODELS:
        data = load_open_world("values", split, 2)
        items = data.items(PROMPTS, Shape(2, 128, 1, query=True))
        yield asked(name, data, items, ("base", "repeated", "prosg-token", "alone", "none"), (128,))


class Scaled:
    """A generator whose changes are multiplied by a factor."""

    def __init__(self, generator, scale: float):
        self.generator, self.scale = generator, scale

    def __call__(self, lm, ids, valid=None):
        delta, state = self.generator(lm, ids, valid)
        return delta.scaled(self.scale), state


def scale(split: str) -> Iterator[pd.DataFrame]:
    """Recall, and answers about others, by the change's size."""
    for name in MODELS:
        _, own = trained(name)
        data = load_open_world("values", split, 3)
        items = data.items(PROMPTS, Shape(6, 512, 6))
        given = {f"scale-{s:g}": Scaled(own["token"], s) for s in SCALES}
        yield asked(name, data, items, list(given), (512,), given)


def uses(split: str) -> Iterator[pd.DataFrame]:
    """Removal, rolling and instructions turn by turn, already judged."""
    for name in MODELS:
        lm, own = trained(name)
        data, token = load_open_world("values", split, 4), own["token"]
        for use, frame in {
            "removal": memory_uses.removal(lm, token, data, PROMPTS // 2),
            "rolling": memory_uses.rolling(lm, token, data, PROMPTS // 2),
            "turns": memory_uses.instructions_by_turn(lm, token, data, PROMPTS // 2),
        }.items():
            yield frame.assign(model=name, use=use)


def prose(split: str) -> Iterator[pd.DataFrame]:
    """Loss of prose after each prompt, nats a token, with and without the change."""
    for name in MODELS:
        lm, own = trained(name)
        data = load_open_world("values", split, 5)
        items = data.items(PROMPTS, Shape(6, 0, 1, instructions=1))
        for method in ("base", "prosg-token"):
            losses = open_recall.prose_losses(lm, own, method, data, items)
            yield pd.DataFrame({"model": name, "method": method, "prompt": range(PROMPTS), "loss": losses})


PARTS: dict[str, Callable[[str], Iterator[pd.DataFrame]]] = {
    f.__name__: f for f in (levels, far, facts, natural, query, scale, uses, prose)
}


def measured(part: str) -> Path:
    return paths.data_dir() / "measured" / f"open_{part}.jsonl.gz"


def measure(parts: list[str], split: str = "test") -> None:
    for part in parts or PARTS:
        frame = pd.concat(PARTS[part](split), ignore_index=True)
        records = [{k: v for k, v in row.items() if v == v or isinstance(v, list)} for row in frame.to_dict("records")]
        predictions.write_rows(measured(part), records)
        print(f"{measured(part)}: {len(frame)} rows", flush=True)


# The page

LABELS = {
    "base": "plain model",
    "repeated": "prompt read again right before the question",
    "prosg-token": "**ProSG, token by token**",
    "alone": "its change alone (the state is blank)",
    "prosg-final": "ProSG, final state",
    "wrong": "control: another prompt's change and state",
    "static": "control: one trained change for all prompts",
    "none": "control: no prompt",
}
LEVEL_LABELS = {
    "known": "nothing (other items than in training)",
    "values": "values",
    "slots": "slots",
    "wordings": "wordings, instruction words",
    "all": "all of these",
}


@cache
def kept(part: str) -> pd.DataFrame:
    frame = pd.read_json(measured(part), lines=True)
    return open_recall.judged(frame) if "predicted" in frame else frame


def where(frame: pd.DataFrame, **cells) -> pd.DataFrame:
    for name, value in cells.items():
        frame = frame[frame[name] == value]
    return frame


def cell(frame: pd.DataFrame, method: str, column: str = "recall") -> str:
    if method not in set(frame.method) or frame[frame.method == method][column].isna().all():
        return "–"
    return f"{statistics.mean(frame, method, column).value:.2f}"


def grid(rows: list[list], heads: list[str]) -> str:
    return pd.DataFrame(rows, columns=heads).to_markdown(index=False, disable_numparse=True)


def by_distance(part: str, methods=METHODS, column: str = "recall", **cells) -> str:
    frame = where(kept(part), **cells)
    distances = sorted(frame.distance.unique())
    rows = [[LABELS[m], *(cell(where(frame, distance=d), m, column) for d in distances)] for m in methods]
    return grid(rows, ["", *(f"{d:,}" for d in distances)])


def by_level(model: str, distance: int, methods) -> str:
    frame = where(kept("levels"), model=model, distance=distance)
    rows = [[text, *(cell(where(frame, level=level), m) for m in methods)] for level, text in LEVEL_LABELS.items()]
    return grid(rows, ["new in the test", *(LABELS[m] for m in methods)])


def excess(model: str, level: str, distance: int) -> str:
    """How much more each control recalls than no prompt: the difference and the upper end of its interval."""
    frame = where(kept("levels"), model=model, level=level, distance=distance)
    found = {m: statistics.difference(frame, m, "none") for m in ("wrong", "static")}
    return grid([[LABELS[m], f"{e.value:.3f}", f"{e.high:.3f}"] for m, e in found.items()], ["", "excess", "at most"])


def kinds(model: str, level: str, distance: int, methods=("base", "repeated", "prosg-token", "alone")) -> str:
    frame = where(kept("levels"), model=model, level=level, distance=distance)
    columns = {
        "fact": "a fact of the user's",
        "other": "one of somebody else's",
        "update": "an updated one: the newest value",
        "unknown": "never said: *you did not tell me*",
        "abstained": "said, but *you did not tell me*",
        "followed": "instructions followed",
    }
    rows = [[text, *(cell(frame, m, column) for m in methods)] for column, text in columns.items()]
    return grid(rows, ["", *(LABELS[m] for m in methods)])


def page() -> str:
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    names = {f.__name__: f for f in (by_distance, by_level, excess, kinds, kept, where, cell, grid)}
    return template.render(**names, mean=statistics.mean, prompts=PROMPTS)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["measure"]:
        measure(arguments[1:])
    elif arguments == ["check"]:
        sys.exit(f"{PAGE.name} is not what {__file__} writes; run it") if PAGE.read_text("utf-8") != page() else None
    else:
        files.write_text(PAGE, page())
