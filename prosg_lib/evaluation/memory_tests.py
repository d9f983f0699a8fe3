"""The established tests of memory: copying, multi-query associative recall (MQAR), phone books and passkeys.

A problem has something to remember (the memory), what is read afterwards (the rest), and positions of the rest at which
the model's next token is judged. Every method gets the same problems and one forward pass over each. A model whose
state is of a fixed size reads the memory, and then the rest from that state; one that looks back at everything it has
read (`state_grows`) reads both in one pass. There, a delta in the weights comes on top of what the model still sees;
the delta alone shows what the weights know.

A score is the share of judged tokens that are right (copying, MQAR), or 1 if all of them are and else 0 (phone book,
passkey).

Glossary of shapes: B problems, M tokens of memory, T tokens of the rest, D model width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from prosg_lib import provenance
from prosg_lib.backbones.base import LanguageModel, fingerprint
from prosg_lib.config import Profile
from prosg_lib.deltas.applying import applied
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation.baselines import Start, start
from prosg_lib.evaluation.statistics import mean
from prosg_lib.generators.base import Generator
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.static import StaticDelta
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.tasks import mqar
from prosg_lib.tasks.problems import Material, Problem, ProblemBatch, problem_batch
from prosg_lib.tasks.suite import settings
from prosg_lib.text.padding import left_padded
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.training.load_or_train import load_or_train

SPLIT = "test"


class Test(NamedTuple):
    """How a test is scored and shown.

    Attributes:
        by_token: whether the score is a share of tokens, or all or nothing.
        size: the setting that says how large a problem is; size_label: the same in words.
    """

    title: str
    score: str
    by_token: bool
    size: str
    size_label: str


TESTS = {
    "copy": Test("Copying random words", "share of tokens right", True, "words", "words to repeat"),
    "mqar": Test(
        "Multi-query associative recall", "share of queries right", True, "length", "length of the sequence (tokens)"
    ),
    "phonebook": Test("Phone book", "share of numbers right", False, "lines", "lines of the phone book"),
    "passkey": Test("Passkey", "share of keys right", False, "length", "length of the text (tokens)"),
}

PLAIN = ("base", "none", "repeated")
"""Methods that need no generator, see `baselines.METHODS`."""

METHODS = {
    "adapter": "a real gradient step on the memory, in an adapter: as base, with its delta in the weights",
    "alone": "the delta alone: the model reads the rest from a blank state, with the memory's delta in the weights",
}
"""Those that `baselines.METHODS` does not have."""

_KINDS = {
    TokenGenerator: ("prosg-token", "token"),
    FinalStateGenerator: ("prosg-final", "final"),
    AdapterStep: ("adapter", "adapter"),
    StaticDelta: ("static-read", "static"),
}

_TOKENS = 16_384  # of a batch, memory and rest together


def methods_of(generator: Generator | None) -> tuple[str, ...]:
    """The methods that can be compared: the plain model's three, and with a generator its own (by its kind), its delta
    alone, and another problem's state and delta ("wrong").

    Raises:
        UserError: a generator of an unknown kind.
    """
    return PLAIN if generator is None else (*PLAIN, _kind(generator)[0], "alone", "wrong")


def _kind(generator: Generator) -> tuple[str, str]:
    for kind, names in _KINDS.items():
        if isinstance(generator, kind):
            return names
    known = ", ".join(kind.__name__ for kind in _KINDS)
    raise UserError(f"a {type(generator).__name__} cannot be evaluated here; take one of {known}")


def answered(
    lm: LanguageModel, generator: Generator | None, problems: Sequence[Problem]
) -> dict[str, list[tuple[int, ...]]]:
    """What the model predicts at the judged positions, by method: one tuple of token ids a problem.

    Args:
        problems: of one cell, at least two, because the control needs another problem's memory.
    Raises:
        UserError: fewer than two problems, or token ids that the model does not have.
        NotFinite: logits that are not finite.
    """
    if len(problems) < 2:
        raise UserError(f"{len(problems)} problem a cell; the control with another problem's memory needs 2")
    found: dict[str, list[tuple[int, ...]]] = {method: [] for method in methods_of(generator)}
    longest = max(len(p.memory) + len(p.rest) for p in problems)
    parts = max(1, min(-(-len(problems) * longest // _TOKENS), len(problems) // 2))  # batches of at least two
    for part in range(parts):
        batch = problems[part * len(problems) // parts : (part + 1) * len(problems) // parts]
        for method, predicted in _predicted(lm, generator, batch):
            found[method] += predicted
    return found


@torch.no_grad()
def _predicted(
    lm: LanguageModel, generator: Generator | None, problems: Sequence[Problem]
) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    batch = problem_batch(problems).to(next(lm.parameters()).device)
    largest = max(int(batch.memory.ids.max()), int(batch.rest.max()))
    if largest >= lm.config.vocab:
        raise UserError(
            f"the problems have token {largest}, but the model's vocabulary is {lm.config.vocab}; make them with the "
            "model's own tokenizer, or with a smaller vocabulary"
        )
    memories = [list(p.memory) for p in problems]
    name, kind = (None, None) if generator is None else _kind(generator)
    written = None if generator is None else start(name, lm, {kind: generator}, memories)
    for method in methods_of(generator):
        logits = lm.read_out(_read(lm, method, batch, memories, written)[batch.judged])
        if not torch.isfinite(logits).all():
            raise NotFinite(f"{method}: the logits are not finite; check the model's weights and the generator's")
        ids = iter(logits.argmax(-1).tolist())
        yield method, [tuple(next(ids) for _ in p.judged) for p in problems]


def _read(
    lm: LanguageModel, method: str, batch: ProblemBatch, memories: list[list[int]], written: Start | None
) -> Tensor:
    """Final hidden states of the rest, (B, T, D).

    Args:
        written: the start with the memories' delta, which is derived once for all methods that need it.
    """
    if lm.state_grows and method in ("base", "repeated"):
        before = left_padded(memories if method == "base" else [2 * memory for memory in memories])
        ids = torch.cat([before.ids.to(batch.rest.device), batch.rest], 1)
        valid = torch.cat([before.valid.to(batch.rest.device), torch.ones_like(batch.judged)], 1)
        return lm.step_through(ids, None, valid)[0][:, -batch.rest.shape[1] :]
    if method in PLAIN:
        begin = start(method, lm, {}, memories)
    elif method == "alone":
        begin = Start(None, written.delta)
    elif method == "wrong":  # another problem's state and delta, whatever the kind of generator
        begin = written.select([(row - 1) % len(memories) for row in range(len(memories))])
    else:
        begin = written
    with applied(lm, begin.delta):
        state = begin.state
        if begin.repeat:
            _, state = lm.step_through(batch.memory.ids, state, batch.memory.valid)
        return lm.step_through(batch.rest, state, None)[0]


def cell_name(cell: Mapping[str, float]) -> str:
    """A cell's settings in words, e.g. "length 64, pairs 4"."""
    return ", ".join(f"{name} {value:g}" for name, value in cell.items())


def _check_room(lm: LanguageModel, problems: Sequence[Problem]) -> None:
    """An attention model may have position embeddings for so many tokens and no more."""
    room = getattr(getattr(lm, "model", None), "config", None)
    room = getattr(room, "max_position_embeddings", None) if lm.state_grows else None
    need = max(2 * len(p.memory) + len(p.rest) for p in problems)
    if room and need > room:
        raise UserError(
            f"{problems[0].task} ({cell_name(problems[0].cell)}) needs {need} tokens with the memory repeated, but "
            f"this model reads {room}; take a profile with shorter texts (--profile smoke)"
        )


def run(
    lm: LanguageModel,
    generator: Generator | None,
    named: Mapping[str, str | None],
    profile: Profile,
    seeds: Sequence[int],
    items: int,
    file: Path | None = None,
) -> tuple[dict, pd.DataFrame]:
    """Every method's answers to all problems of a profile, cell by cell; shows its progress in a terminal.

    Which model and problems it is about is in the header: with equal ones, two files have equal predictions, apart from
    the prose around passkeys and from rounding.

    Args:
        named: "model", "generator" and "command", as the header is to name them.
        items: problems a cell and seed, at least 2.
        file: where both are written (`predictions.write`). Answers to finished cells are kept beside it until then, so
            that a measurement that was interrupted goes on from there.
    Returns:
        The header of a file of predictions, and one row a problem and method, with the columns shown in `predictions`.
    Raises:
        UserError: a problem that cannot be made, or that the model cannot read; before anything is measured.
    """
    cells, left_out = settings(profile.forgetting, lm.config.vocab)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    prose, tokenizer = load_prose(), lm.needed_tokenizer()
    material = Material(tokenizer, ProseTokens.of(prose, SPLIT, tokenizer))
    numbers = [(seed, number) for seed in seeds for number in range(items)]
    problems = [[setting.problem(material, SPLIT, *number) for number in numbers] for setting in cells]
    for cell in problems:
        _check_room(lm, cell)
    header = {
        **named,
        "suite": "forgetting",
        "fingerprint": lm.fingerprint(),
        "generator_fingerprint": None if generator is None else fingerprint(generator),
        "methods": list(methods_of(generator)),
        "profile": profile.name,
        "cells": json.loads(json.dumps(profile.forgetting.cells)),
        "split": SPLIT,
        "seeds": list(seeds),
        "items": items,
        "vocabulary": {"model": lm.config.vocab, "mqar": min(mqar.VOCAB, lm.config.vocab)},
        "left_out": left_out,
        "prose": {"source": prose.source, "sha256": prose.sha256},
        **provenance.facts(),
    }
    same = {name: value for name, value in header.items() if name != "command"}
    begun = file and file.with_name(f"unfinished-{predictions.digest([same])[:12]}.jsonl.gz")
    rows = predictions.read(begun)[1].to_dict("records") if begun and begun.exists() else []
    done = len(rows) // (len(numbers) * len(header["methods"]))  # cells
    pause = 0.1 if sys.stderr.isatty() else 30.0  # in a log, one line now and then
    with tqdm(total=len(problems), initial=done, desc="memory tests", unit="cell", mininterval=pause) as bar:
        for cell in problems[done:]:
            bar.set_postfix_str(f"{cell[0].task} {cell_name(cell[0].cell)}", refresh=False)
            for method, predicted in answered(lm, generator, cell).items():
                for (seed, item), problem, ids in zip(numbers, cell, predicted, strict=True):
                    row = {"task": problem.task, "cell": dict(problem.cell), "seed": seed, "item": item}
                    rows.append(row | {"method": method, "gold": list(problem.gold), "predicted": list(ids)})
            bar.update()
            if begun:
                predictions.write_rows(begun, rows)
    frame = pd.DataFrame(rows)
    if file:
        predictions.write(file, header, frame)
        begun.unlink(missing_ok=True)
    return header, frame


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of answers.

    Args:
        rows: of `run`.
    Returns:
        One row a problem and method: task, cell (its number, in order of appearance), name (`cell_name`), the cell's
        settings, size (`Test.size`), seed, item, method and score.
    Raises:
        UserError: an unknown test.
    """
    numbers: dict[tuple, int] = {}
    found = []
    for row in rows.to_dict("records"):
        task, cell = row["task"], row["cell"]
        if task not in TESTS:
            raise UserError(f"the predictions are of an unknown test {task!r}; there are {', '.join(TESTS)}")
        right = [a == b for a, b in zip(row["gold"], row["predicted"], strict=True)]
        number = numbers.setdefault((task, *cell.items()), len(numbers))
        size = cell.get(TESTS[task].size, 0)
        if not 1 <= size < 2**31:
            raise UserError(f"a problem of {task} has the cell {cell}; {TESTS[task].size} should be 1 or more")
        own = {**cell, "task": task, "cell": number, "name": cell_name(cell), "size": size}
        score = sum(right) / len(right) if TESTS[task].by_token else float(all(right))
        found.append(own | {name: row[name] for name in ("seed", "item", "method")} | {"score": score})
    return pd.DataFrame(found)


def by_size(scores: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Mean scores on one test with intervals: one row a method, one column a size, cells of one size together.

    Args:
        scores: of `scored`, of one task.
    """
    parts = dict(list(scores.groupby("size", sort=False)))
    cells = [[mean(part, method, "score") for part in parts.values()] for method in methods]
    return pd.DataFrame(cells, index=list(methods), columns=list(parts))


def most_copied(scores: pd.DataFrame, method: str, share: float) -> int:
    """The largest number of words of which a method copies at least this share; 0: not even of the fewest.

    Args:
        scores: of `scored`.
    """
    means = scores[(scores.task == "copy") & (scores.method == method)].groupby("size").score.mean()
    return int(means[means >= share - 1e-6].index.max()) if (means >= share - 1e-6).any() else 0


STUDY = {
    "rwkv4-suite-token": {m: m for m in ("base", "none", "repeated", "prosg-token", "alone", "wrong")},
    "rwkv4-suite-adapter": {"adapter": "adapter", "alone": "adapter-alone", "wrong": "adapter-wrong"},
    "llama-suite": {"base": "transformer"},
}
"""Recipe -> its methods that are compared, and what they are called there."""


def study(profile: Profile, seed: int = 0, retrain: bool = False) -> pd.DataFrame:
    """Answers of the models that are trained on these tests, as in data/measured/established_tests.jsonl.gz.

    Args:
        seed: of the trainings and of the problems.
        retrain: as in `load_or_train`.
    Returns:
        As the rows of `run`, of all methods in `STUDY`.
    Raises:
        UserError: diverged training.
    """
    recurrent, parts = load_or_train("rwkv4-suite", profile, seed, retrain), []
    for name, shown in STUDY.items():
        of_recurrent = name.startswith("rwkv4-suite")
        module = load_or_train(name, profile, seed, retrain, lm=recurrent if of_recurrent else None)
        models = (recurrent, module) if of_recurrent else (module, None)
        _, rows = run(*models, {}, profile, (seed,), profile.forgetting.items)
        parts.append(rows[rows.method.isin(shown)].assign(method=rows.method.map(shown)))
    return pd.concat(parts, ignore_index=True)
