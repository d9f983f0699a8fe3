"""The established tests of memory, every method on the same problems: `prosg evaluate --suite forgetting`.

Copying, multi-query associative recall, phone books and passkeys (`tasks`), in the sizes of a profile. What is kept is
what every method said to every problem; all numbers and figures are computed from that file alone (`suites`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from prosg_lib import provenance
from prosg_lib.backbones.base import LanguageModel, fingerprint
from prosg_lib.config.sizes import Profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation.predictions import Prediction
from prosg_lib.evaluation.problem_evaluation import answered, methods_of
from prosg_lib.generators.base import Generator
from prosg_lib.reproduction.suites import output_folder, recompute
from prosg_lib.tasks import mqar
from prosg_lib.tasks.problems import Problem
from prosg_lib.tasks.suite import SPLIT, Material, Setting, problem_of, settings
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.training import stages
from prosg_lib.training.model_choice import choose_generator, choose_model

SUITE = "forgetting"


FILE = "predictions.jsonl.gz"


def predicted(
    lm: LanguageModel,
    generator: Generator | None,
    cells: Sequence[Setting],
    material: Material,
    seeds: Sequence[int],
    items: int,
) -> Iterator[Prediction]:
    """What every method says to every problem, cell by cell; shows its progress in a terminal.

    Args:
        items: problems a cell and seed, at least 2.
    Raises:
        UserError: a problem that cannot be made, or that the model cannot read.
    """
    numbers = [(seed, number) for seed in seeds for number in range(items)]
    methods = methods_of(generator)
    for setting in cells:  # what cannot be made or read is said before hours of measuring
        _check_room(lm, [problem_of(setting, material, seeds[0], 0)])
    pause = 0.1 if sys.stderr.isatty() else 30.0  # a log gets a line now and then
    with tqdm(total=len(cells) * len(methods), desc=SUITE, unit="pass", mininterval=pause) as bar:
        for setting in cells:
            problems = [problem_of(setting, material, seed, number) for seed, number in numbers]
            _check_room(lm, problems)
            bar.set_postfix_str(f"{problems[0].task} {_short(problems[0].cell)}", refresh=False)
            for method, says in answered(lm, generator, problems):
                for (seed, number), problem, said in zip(numbers, problems, says, strict=True):
                    yield Prediction(problem.task, problem.cell, seed, number, method, problem.gold, said)
                bar.update()


def _short(cell) -> str:
    return " ".join(f"{name}={value:g}" for name, value in cell.items())


def _check_room(lm: LanguageModel, problems: Sequence[Problem]) -> None:
    """A model that looks back at all it has read may have places for so many tokens and no more."""
    room = getattr(getattr(lm, "model", None), "config", None)
    room = getattr(room, "max_position_embeddings", None) if lm.state_grows else None
    need = max(2 * len(p.memory) + len(p.rest) for p in problems)
    if room and need > room:
        raise UserError(
            f"{problems[0].task} ({_short(problems[0].cell)}) needs {need} tokens with the memory repeated, but this "
            f"model reads {room}; take a profile with shorter texts (--profile smoke)"
        )


def evaluate(
    model: str,
    generator: str | None,
    profile: Profile,
    seeds: Sequence[int],
    items: int | None,
    out: str | Path,
    command: str,
) -> None:
    """The whole command: predictions of all methods into a folder, and what follows from them.

    Args:
        model: as `model_choice.choose_model` takes it; generator: as `choose_generator` does; None: the model's own,
            where one is shipped.
        items: problems a cell and seed; None: the profile's.
        command: what was typed, for the record.
    Raises:
        UserError: something is not there, is damaged or does not fit; nothing is written then.
    """
    items = profile.forgetting.items if items is None else items
    folder = output_folder(out)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"a seed is there twice ({', '.join(map(str, seeds))}); name each once")
    if items < 2:
        raise UserError(f"{items} item a cell was asked for; two are needed, because one is the other's wrong memory")
    lm = choose_model(model)
    generator = generator or stages.own_generator(model)
    writer = None if generator is None else choose_generator(generator, lm)
    named = {"model": model, "generator": generator, "command": command}
    predictions.write(folder / FILE, *measured(lm, writer, named, profile, seeds, items))
    recompute(folder / FILE, folder)


def measured(
    lm: LanguageModel,
    generator: Generator | None,
    named: Mapping[str, str | None],
    profile: Profile,
    seeds: Sequence[int],
    items: int,
) -> tuple[dict, list[Prediction]]:
    """What all methods say to all problems of a profile, and the header of a file of it (`predictions.write`).

    Args:
        named: "model", "generator" and "command", as the file is to say it.
        items: problems a cell and seed, at least 2.
    Raises:
        UserError: as `predicted`.
    """
    cells, left_out = settings(profile.forgetting, lm.config.vocab)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    prose = load_prose()
    material = Material(lm.needed_tokenizer(), ProseTokens.of(prose, SPLIT, lm.needed_tokenizer()))
    found = list(predicted(lm, generator, cells, material, seeds, items))
    about = {"left_out": left_out, "prose": {"source": prose.source, "sha256": prose.sha256}}
    return {**described(lm, generator, profile, seeds, items), **about, **named, **provenance.facts()}, found


def described(
    lm: LanguageModel, generator: Generator | None, profile: Profile, seeds: Sequence[int], items: int
) -> dict:
    """The part of a header that says what is asked of what: two files with the same one have the same predictions, but
    for the prose around passkeys, and for rounding."""
    return {
        "suite": SUITE,
        "fingerprint": lm.fingerprint(),
        "generator_fingerprint": None if generator is None else fingerprint(generator),
        "methods": list(methods_of(generator)),
        "profile": profile.name,
        "cells": stages.plain(profile.forgetting.cells),
        "split": SPLIT,
        "seeds": list(seeds),
        "items": items,
        "vocabulary": {"model": lm.config.vocab, "mqar": min(mqar.VOCAB, lm.config.vocab)},
    }
