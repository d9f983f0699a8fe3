"""What a recipe's training consists of: the batches and the loss of every step.

Each kind of data has a function (recipe, profile, module, language model, seed) -> `Work`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import NamedTuple

from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.config import PROFILES, Profile
from prosg_lib.config.sizes import TASKS, SupervisedSize
from prosg_lib.tasks import conversations, mqar, open_world
from prosg_lib.tasks.dialogue import data_hash, load_dialogues
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.pair_batches import PairDraw, SharedContextDraw, repeated_tokens
from prosg_lib.tasks.pair_sources import PEOPLE, available, missing, pairs_of, prose_pairs
from prosg_lib.tasks.pairs import Pair, form_of
from prosg_lib.tasks.problems import VERSION, Material
from prosg_lib.tasks.wording import draw_facts
from prosg_lib.text import chitchat
from prosg_lib.text.prose import ProseTokens, load_prose
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.training import distributed, open_draws
from prosg_lib.training.conversation_objective import conversation_objective
from prosg_lib.training.loop import Loss
from prosg_lib.training.objectives import generator_draw, generator_objective, lm_draw, lm_objective
from prosg_lib.training.pair_objectives import KeptTeacher, pair_lm_objective, pair_objective
from prosg_lib.training.problem_objectives import (
    ProblemDraw,
    generator_problem_objective,
    lm_problem_objective,
    practice,
)
from prosg_lib.training.recipes import GRADIENT_STEPS, Recipe
from prosg_lib.training.state_probe import probe_draw, probe_objective
from prosg_lib.training.supervised import start_directions, supervised_objective


class Work(NamedTuple):
    """A training's steps: step -> its batch, and (step, batch or a part of it) -> loss."""

    batch_of: Callable[[int], Examples]
    loss_of: Callable[[int, Examples], Loss]


def work(recipe: Recipe, profile: Profile, module: nn.Module, lm: LanguageModel | None, seed: int) -> Work:
    """The work of a recipe; a model is given its tokenizer, and a generator's statistics are collected.

    Args:
        module: untrained; lm: the model it is for, None where it is one itself.
    Raises:
        UserError: this machine lacks the data.
    """
    if recipe.is_model:
        module.tokenizer = load_tokenizer()
        if recipe.kind == "llama" and recipe.data != "pairs":
            # Fused attention has no second derivative, which is not needed here, and takes a third of the time.
            module.model.set_attn_implementation("sdpa")
    return {
        "dialogues": _dialogue_work,
        "open": _open_work,
        "pairs": _pair_work if recipe.window is None else _others_pair_work,
        "problems": _problem_work,
        "conversations": _conversation_work,
    }[recipe.data](recipe, profile, module, lm, seed)


def data_of(recipe: Recipe, profile: Profile, tokenizer: Tokenizer) -> str | dict:
    """Names the data of a recipe, as far as every machine has them; a checkpoint's provenance names the rest."""
    if recipe.data == "dialogues":
        return data_hash(tokenizer, rich=not recipe.is_model)
    if recipe.data == "open":
        return open_world.data_hash(tokenizer)
    if recipe.data == "conversations":
        people = hashlib.sha256(repr(conversations.of_people("train")).encode()).hexdigest()[:16]
        return {"conversations": conversations.VERSION, "people": people, "open": open_world.data_hash(tokenizer)}
    if recipe.data == "problems":
        suite = profile.suite
        return {"problems": VERSION, "mqar": mqar.VOCAB, "cells": suite.practice.cells, "longest": suite.longest}
    digest = hashlib.sha256()
    for task in sorted(set(PEOPLE if recipe.is_model else recipe.pairs.tasks) & set(PEOPLE)):
        for pair in pairs_of(task, "train", PROFILES["cpu"]).pairs:
            digest.update(f"{task}\n{pair.context}\n{pair.query}\n{pair.answer}\n".encode())
    if recipe.window is not None:
        digest.update(repr([form_of(task) for task in recipe.pairs.tasks]).encode())
    return digest.hexdigest()[:16]


def texts_of(recipe: Recipe) -> dict[str, str]:
    """What a recipe's training reads that machines differ in, for a checkpoint's provenance: prose, and conversations
    where it reads some."""
    talk = chitchat.source() if recipe.data == "conversations" else None
    return {"prose": load_prose().source} | ({"conversations": talk} if talk else {})


def course_of(recipe: Recipe) -> dict:
    """How a recipe's steps differ from one another, for its record."""
    course = recipe.curriculum or recipe.pairs
    return {"repeats": recipe.repeats} if course is None else asdict(course)


def check_data(recipe: Recipe, profile: Profile) -> None:
    """Raises a UserError if the profile lacks the recipe's tasks, this machine lacks their data, or no prompt can hold
    so many facts."""
    if recipe.pairs:
        _tasks(recipe, profile)
    if recipe.data == "dialogues":
        draw_facts(max(recipe.training.facts), "train", random.Random(0))


def steps_of(recipe: Recipe, profile: Profile, tokenizer: Tokenizer) -> int:
    """Steps of a training; where the recipe names none, as many as an epoch of its tasks has."""
    if recipe.training.steps:
        return recipe.training.steps
    pairs = sum(len(pairs_of(task, "train", profile, tokenizer).pairs) for task in _tasks(recipe, profile))
    return -(-pairs // recipe.training.batch)


def _dialogue_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel | None, seed: int) -> Work:
    data = load_dialogues("train", seed, rich=lm is not None, tokenizer=(lm or module).needed_tokenizer())
    training, autocast = recipe.training, distributed.bfloat16()
    if lm is None:
        return _repeats_first(recipe, module, seed, Work(lm_draw(data, training), lm_objective(module, autocast)))
    batch_of = generator_draw(data, training, recipe.curriculum)
    sample = batch_of(-1).to(distributed.device())
    module.fit_normaliser(lm, sample.prompt, sample.prompt_valid)
    given = lm, module, training, seed
    if not isinstance(recipe.size, SupervisedSize):
        return Work(batch_of, generator_objective(*given, autocast, recipe.curriculum))
    if recipe.size.directions:
        start_directions(lm, module, recipe.size, sample)
    return Work(batch_of, supervised_objective(*given, recipe.size, sample, autocast, recipe.curriculum))


def _open_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel | None, seed: int) -> Work:
    most = recipe.curriculum.slots if recipe.curriculum else 0
    data = open_world.load_open_world("known", "train", seed, (lm or module).needed_tokenizer(), most)
    training, autocast = recipe.training, distributed.bfloat16()
    if lm is None:
        return Work(open_draws.lm_draw(data, training), lm_objective(module, autocast))
    probing = recipe.kind == "probe"
    draw = probe_draw(data, training) if probing else open_draws.generator_draw(data, training, recipe.curriculum)
    sample = draw(-1).to(distributed.device())
    module.fit_normaliser(lm, sample.prompt, sample.prompt_valid)
    if probing:
        return Work(draw, probe_objective(lm, module))
    return Work(draw, generator_objective(lm, module, training, seed, autocast, recipe.curriculum))


def _problem_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel | None, seed: int) -> Work:
    tokenizer, autocast = load_tokenizer(), distributed.bfloat16()
    material = Material(tokenizer, ProseTokens.of(load_prose(), "train", tokenizer))
    draw = ProblemDraw(practice(profile, material), profile.suite.longest, material, recipe.training, seed)
    if lm is None:
        return _repeats_first(recipe, module, seed, Work(draw, lm_problem_objective(module, autocast)))
    return Work(draw, generator_problem_objective(lm, module, seed, autocast))


_KINDS = ("people", "open", "people", "squad", "people", "cloze")  # of conversations, in turn


def _conversation_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel | None, seed: int) -> Work:
    """Prompts as people write them, open-world dialogues, and passages as far as this machine has any: questions of
    SQuAD's form, and sentences to complete. What stands before a question, or is to be left as it was, is prose; half
    of it is real conversation where the package for it is installed."""
    training, curriculum = recipe.training, recipe.curriculum
    tokenizer = lm.needed_tokenizer()
    world = open_world.load_open_world("known", "train", seed, tokenizer)
    sources = {
        "people": conversations.of_people("train"),
        "cloze": [c for pairs in prose_pairs("named", profile).values() for c in conversations.of_pairs(pairs)],
    }
    if available("squad", profile):
        sources["squad"] = conversations.of_pairs(pairs_of("squad", "train", profile).pairs)
    # Each as often as it has questions, of which few are asked at once.
    sources = {name: [said for said in found for _ in said.questions] for name, found in sources.items() if found}
    examples = len(tokenizer.encode(conversations.READING.opening)) if curriculum.teacher else 0
    talk = ProseTokens.of(chitchat.load_conversations(), "train", tokenizer) if chitchat.source() else None
    draw = conversations.ConversationDraw(
        world,
        sources,
        turns=tuple(kind for kind in _KINDS if kind in ("open", *sources)),
        forms=(conversations.READING, conversations.READING, conversations.chat(tokenizer)),
        batch=training.batch,
        facts=training.facts,
        easy=int(curriculum.easy * training.steps),
        questions=training.questions,
        longest=(lm.window or profile.conversations.window) - examples,
        passage=curriculum.passage,
        seed=seed,
        talk=talk,
    )
    sample = draw(training.steps).to(distributed.device())  # as long prompts as in most steps, and none of theirs
    module.fit_normaliser(lm, sample.prompt, sample.valid)
    return Work(draw, conversation_objective(lm, module, curriculum, training.steps))


def _repeats_first(recipe: Recipe, model: LanguageModel, seed: int, then: Work) -> Work:
    """The same work, with random tokens that are repeated in the recipe's first steps."""
    vocab, loss_of_repeat = model.tokenizer.vocab, pair_lm_objective(model)

    def batch_of(step):
        return (
            repeated_tokens(recipe.training.batch, vocab, f"{seed}/{step}")
            if 0 <= step < recipe.repeats
            else then.batch_of(step)
        )

    def loss_of(step, batch):
        return (loss_of_repeat if step < recipe.repeats else then.loss_of)(step, batch)

    return Work(batch_of, loss_of) if recipe.repeats else then


def _pair_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel | None, seed: int) -> Work:
    course, training = recipe.pairs, recipe.training
    tokenizer = (lm or module).needed_tokenizer()
    tasks = {task: pairs_of(task, "train", profile, tokenizer).pairs for task in _tasks(recipe, profile)}
    # A model that others trained is trained on the tasks alone.
    tasks |= prose_pairs(course.practice, profile) if course.practice and tokenizer == load_tokenizer() else {}
    batch, contexts, repeats = training.batch, training.contexts, course.repeats
    if lm is None:
        turns = tuple(chain.from_iterable(_model_turns(tasks)))
        draw = PairDraw(tasks, tokenizer, batch, contexts, seed, turns, repeats)
        return Work(draw, pair_lm_objective(module))
    turns = _practice_turns(tasks) if recipe.kind == "maps" else tuple(sorted(tasks))
    room = contexts[0] * profile.pairs.context  # so that all contexts are always there
    draw = PairDraw(tasks, tokenizer, batch, contexts, seed, turns, repeats, 96 if repeats else 0, room)
    if recipe.kind not in GRADIENT_STEPS:
        context = draw(-1).to(distributed.device()).context
        module.fit_normaliser(lm, context.ids[:, 0], context.valid[:, 0])
    return Work(draw, pair_objective(lm, module, course.objective, course.everywhere, repeats=repeats))


def _others_pair_work(recipe: Recipe, profile: Profile, module, lm: LanguageModel, seed: int) -> Work:
    """Tasks and practice take turns. What is frozen is computed once a text: the blocks below the module's maps, and,
    under LC, what the model says that is given the contexts."""
    course, training, tokenizer = recipe.pairs, recipe.training, lm.needed_tokenizer()
    tasks = {task: pairs_of(task, "train", profile, tokenizer).pairs for task in _tasks(recipe, profile)}
    tasks |= prose_pairs(course.practice, profile) if course.practice else {}
    forms = {task: form_of(task) for task in tasks}
    own, practised = [t for t in tasks if t in TASKS], sorted(t for t in tasks if t not in TASKS)
    turns = tuple(chain.from_iterable((*own, source) for source in practised)) or tuple(own)
    draw = SharedContextDraw(tasks, tokenizer, training.batch, seed, turns, training.queries, forms)
    teacher = KeptTeacher(lm.with_kv_cache()) if course.objective == "LC" else None
    lm = lm.with_later_blocks(module.names)
    return Work(draw, pair_objective(lm, module, course.objective, teacher=teacher))


def _tasks(recipe: Recipe, profile: Profile) -> list[str]:
    """Those of a recipe's tasks that this machine has the data of; a UserError where it has none that are needed."""
    found = [task for task in recipe.pairs.tasks if available(task, profile)]
    needed = recipe.pairs.tasks or ("wikitext",)
    if not found and not available(needed[0], profile):
        raise missing(needed[0], profile)
    return found


def _model_turns(tasks: Iterable[str]) -> Iterable[tuple[str, ...]]:
    """Order of a model's tasks: of five turns the people's tasks have two, the practice two, and a task with few pairs
    one; without such a task the people's have two each."""
    people, practised = [t for t in PEOPLE if t in tasks], [t for t in tasks if t not in TASKS]
    few = [t for t in tasks if t in TASKS and t not in PEOPLE]
    for other in few:
        yield (*people, *practised, other)
    if not few:
        yield (*people, *people, *practised)


def _practice_turns(tasks: Mapping[str, tuple[Pair, ...]]) -> tuple[str, ...]:
    """Order of a step's tasks: each once, and its practice twice, each source of it as often as another. Few pairs,
    repeated often, are learned by heart; and if all practice were one, books would be nearly all of it."""
    practised = sorted(name for name in tasks if name not in TASKS)
    return tuple(name for task in sorted(set(tasks) - set(practised)) for name in (task, *practised, *practised))
