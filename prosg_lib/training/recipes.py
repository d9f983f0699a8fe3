"""One table of all that can be trained: `recipes(profile)`. Plain data, without torch.

A recipe's name is its checkpoint's name, the argument of `prosg train` and of `load_or_train`. Names say the model
first, then what it was trained on, then what makes a delta or takes a gradient step for it, and how that was trained:
`rwkv4-dialogue-token` is the token-wise generator for the model `rwkv4-dialogue`.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache

from prosg_lib import paths
from prosg_lib.config import Profile
from prosg_lib.config.sizes import (
    TASKS,
    AdapterSize,
    ConversationCurriculum,
    ConversationTraining,
    Curriculum,
    GeneratorSize,
    Mamba2Size,
    OpenCurriculum,
    PairCourse,
    PairTraining,
    ProbeSize,
    RWKV4Config,
    RWKV7Config,
    StepSize,
    Training,
    TransformerConfig,
)
from prosg_lib.errors import UserError

LANGUAGE_MODELS = ("rwkv4", "rwkv7", "llama", "mamba2")
GRADIENT_STEPS = ("adapter", "rated-adapter", "weights", "maps")
"""Kinds of module that take a real gradient step; training goes through it and needs second derivatives."""

REPEATS = 0.15
"""Share of a transformer's training with random tokens that are repeated: it learns to copy there. On dialogues alone
it learned in 700 steps of 32 what answers look like, but not to look them up (1.6 nats per answer token, where the
recurrent model had 0.2). The recurrent model learns to copy from the dialogues."""

_PEOPLE = TASKS[:2]
_ALL_MAPS = ("",)
_SHORTER_WARMUP = 6

Size = RWKV4Config | RWKV7Config | TransformerConfig | Mamba2Size | GeneratorSize | AdapterSize | StepSize | ProbeSize


@dataclass(frozen=True)
class Recipe:
    """One thing that can be trained.

    Attributes:
        name: of the recipe and of its checkpoint; about: what it is, in a few words.
        kind: of the module, a key of `checkpoints.MODULES`.
        size: its sizes.
        data: "dialogues", "open" (dialogues of the open world), "pairs" (of context and query), "problems" (the
            established tests of memory) or "conversations" (with a model that others trained).
        training: steps, batch, learning rate.
        lm: name of the recipe of the language model it is for; None: it is a language model itself.
        window: the language model is one that others trained, of that name for `load_model`, with such a window; 0: it
            sees everything.
        start: name of the recipe whose weights it starts from, trained with the same seed; None: fresh weights.
        curriculum: of a generator on dialogues; pairs: what a training on pairs consists of.
        repeats: number of first steps with repeated random tokens, on dialogues and problems.
        at_once: examples in memory at a time, if the profile limits them.
        time: what training took, with the sizes of the cpu profile.
    """

    name: str
    about: str
    kind: str
    size: Size
    data: str
    training: Training | PairTraining | ConversationTraining
    lm: str | None = None
    start: str | None = None
    curriculum: Curriculum | ConversationCurriculum | None = None
    pairs: PairCourse | None = None
    repeats: int = 0
    at_once: int | None = None
    time: str = ""
    window: int | None = None

    @property
    def is_model(self) -> bool:
        """Whether it is a language model."""
        return self.kind in LANGUAGE_MODELS


def ending(profile: Profile) -> str:
    """Of the checkpoints' names of a profile; those of the cpu profile have none."""
    owner = profile.models_of or profile.name
    return "" if owner == "cpu" else f"-{owner}"


@cache
def recipes(profile: Profile) -> dict[str, Recipe]:
    """All recipes with the sizes of a profile, by name, each model before what is for it."""
    found = [*_dialogues(profile), *_open_world(profile), *_pairs(profile), *_problems(profile)]
    found += [*_conversations(profile), *_others_pairs(profile)]
    return {recipe.name: recipe for recipe in found}


def recipe(name: str, profile: Profile, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of that name, with some of its settings changed.

    Args:
        changes: "size.NAME", "training.NAME" or "curriculum.NAME" -> value, as text or of the field's type. Fewer
            steps come with a shorter warm-up, unless that is changed, too.
    Raises:
        UserError: unknown name or setting (lists what there is), a value of the wrong type, or one that cannot be.
    """
    table = recipes(profile)
    if name not in table:
        raise UserError(f"unknown recipe {name!r}; there are {', '.join(table)}")
    found, changes = table[name], dict(changes or {})
    for key, value in changes.items():
        if key not in _keys(found):
            raise UserError(f"{name} has no setting {key!r}; there are {', '.join(_keys(found))}")
        part, _, field = key.partition(".")
        settings = getattr(found, part)
        new = _value(key, value, typing.get_type_hints(type(settings))[field])
        found = replace(found, **{part: replace(settings, **{field: new})})
    if "training.steps" in changes and "training.warmup" not in changes:
        warmup = min(found.training.warmup, max(1, found.training.steps // _SHORTER_WARMUP))
        found = replace(found, training=replace(found.training, warmup=warmup))
    if not found.training.steps and not found.pairs:
        raise UserError("training.steps=0 is one epoch of the pairs; this data has none")
    return found


_FIXED = ("size.vocab", "size.kind", "size.rest")  # the tokenizer's size, and what only describes others' models


def _keys(found: Recipe) -> list[str]:
    parts = {"size": found.size, "curriculum": found.curriculum, "training": found.training}
    found = [f"{part}.{field.name}" for part, settings in parts.items() if settings for field in fields(settings)]
    return [key for key in found if key not in _FIXED]


def _value(key: str, value: object, kind: type) -> object:
    """A setting's value; from text as a command line has it: 8, 0.5, false, or 0,64,256 for a tuple."""
    several = typing.get_origin(kind) is tuple
    one = typing.get_args(kind)[0] if several else kind
    try:
        if not isinstance(value, str):
            found = tuple(one(v) for v in value) if several else one(value)
            if found != (tuple(value) if several else value):  # 2.5 is no whole number
                raise ValueError
            return found
        read = {bool: lambda text: {"false": False, "true": True}[text.lower()]}.get(one, one)
        return tuple(read(text) for text in value.split(",")) if several else read(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        wanted = f"{one.__name__}, several with commas" if several else one.__name__
        raise UserError(f"{key}={value} is not a value of type {wanted}") from None


def checkpoint_name(
    name: str, profile: Profile, seed: int = 0, changes: Mapping[str, object] | None = None, foreign: str = ""
) -> str:
    """Of a recipe's checkpoint: `rwkv4-dialogue-token`, `rwkv4-dialogue-token-rank8-steps300-seed1-smoke`.

    Args:
        changes: as in `recipe`.
        foreign: fingerprint of the language model it is for, if that is not the recipe's own.
    """
    made = recipe(name, profile, changes)
    words = []
    for key in _keys(made):
        if key in (changes or {}):
            part, _, field = key.partition(".")
            value = getattr(getattr(made, part), field)
            words.append(field + ("+".join(map(str, value)) if isinstance(value, tuple) else str(value)))
    words += [f"seed{seed}"] * bool(seed) + [f"for-{foreign}"] * bool(foreign)
    return "-".join([name, *words]) + ending(profile)


def table(profile: Profile) -> str:
    """All recipes as a table: name, what each is, time, sizes, whether its checkpoint is shipped."""
    rows = [("name", "what it is", "time", "sizes", "shipped")]
    for found in recipes(profile).values():
        path = paths.data_dir() / "checkpoints" / f"{checkpoint_name(found.name, profile)}.safetensors"
        time = found.time if ending(profile) == "" else ""
        rows.append((found.name, found.about, time, _sizes(found), "yes" if path.is_file() else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _sizes(found: Recipe) -> str:
    """The sizes that matter, and the length of the training."""
    shown = [f"{name} {value}" for name in ("layers", "width", "rank") if (value := getattr(found.size, name, 0))]
    length = f"{found.training.steps} steps" if found.training.steps else "1 epoch"
    return ", ".join([*shown, f"{length} of {found.training.batch}"])


def _dialogues(p: Profile) -> list[Recipe]:
    """Models of the dialogues, and what makes deltas for them."""

    def model(name, about, kind, size, training, time, repeats=0):
        return Recipe(name, about, kind, size, "dialogues", training, repeats=repeats, time=time)

    def generator(lm, kind, about, size, training, time):
        return Recipe(f"{lm}-{kind}", about, kind, size, "dialogues", training, lm, curriculum=Curriculum(), time=time)

    rwkv, mamba, llama = "rwkv4-dialogue", "mamba2-dialogue", "llama-dialogue"
    small, llama_training = p.pretrained, p.transformer_training
    every_map = GeneratorSize(small.rank, 0, _ALL_MAPS)
    return [
        model(rwkv, "RWKV-4 language model of the dialogues", "rwkv4", p.model, p.lm, "25 min, CPU"),
        generator(rwkv, "token", "token-wise generator", p.token, p.token_training, "2 min, H100"),
        generator(rwkv, "final", "final-state generator", p.final, p.final_training, "21 min, CPU"),
        generator(rwkv, "static", "control: one delta for all prompts", p.token, p.static_training, "3 min, CPU"),
        generator(rwkv, "adapter", "real gradient step in an adapter", p.adapter, p.adapter_training, "9 min, CPU"),
        generator(
            rwkv, "supervised", "token-wise, first taught true gradients", p.supervised, p.token_training, "3 min, H100"
        ),
        generator(rwkv, "mend", "the prompt's true gradient, transformed", p.mend, p.token_training, "2 min, H100"),
        model(mamba, "Mamba-2 language model of the dialogues", "mamba2", small.model, small.lm, "59 min, CPU"),
        generator(mamba, "token", "token-wise generator for it", every_map, small.token_training, "55 min, CPU"),
        model(
            llama,
            "transformer of the dialogues, to compare with",
            "llama",
            p.pairs.transformer_size,
            llama_training,
            "32 min, CPU",
            int(REPEATS * llama_training.steps),
        ),
    ]


def _open_world(p: Profile) -> list[Recipe]:
    """Models of the open world, and what makes deltas for them."""
    sizes = p.open

    def generator(lm, kind, about, size, time, training=sizes.token_training):
        return Recipe(f"{lm}-{kind}", about, kind, size, "open", training, lm, curriculum=OpenCurriculum(), time=time)

    found = []
    for name, size in {"rwkv4": sizes.model, "rwkv7": sizes.seventh}.items():
        lm, about = f"{name}-open", f"RWKV-{name[-1]} language model of the open world"
        found += [
            Recipe(lm, about, name, size, "open", sizes.training, time="3 h, CPU"),
            generator(lm, "token", "token-wise generator", sizes.token, "3 h, CPU"),
            generator(lm, "states", "generator that sees the final state", sizes.final, "3 h, CPU"),
            Recipe(
                f"{lm}-probe",
                "probe: which facts the state after a prompt holds",
                "probe",
                sizes.probe,
                "open",
                sizes.probe_training,
                lm,
                time="20 min, CPU",
            ),
            generator(
                lm, "static", "control: one delta for all prompts", sizes.token, "10 min, CPU", sizes.static_training
            ),
            generator(lm, "adapter", "real gradient step in an adapter", p.adapter, "60 min, CPU"),
        ]
    about = "transformer of the open world, to compare with"
    model = Recipe("llama-open", about, "llama", p.pairs.transformer_size, "open", sizes.training, time="60 min, CPU")
    return [*found, model]


def _pairs(p: Profile) -> list[Recipe]:
    """Models of the tasks of context and query, and what takes a context in for them."""
    sizes, recurrent = p.pairs, ("att.output", "att.value", "ffn.key", "ffn.value")

    def model(name, about, kind, size, training, course, start=None, time=""):
        return Recipe(name, about, kind, size, "pairs", training, None, start, pairs=course, time=time)

    def step(lm, method, tasks, objective="LC", contexts=1, after="", time=""):
        """A module of `method`, trained on `tasks`; `after`: it goes on from the one trained on that task by LC."""
        kind, _, rank = method.partition("-")
        own = lm == "rwkv4-pairs"
        size: Size
        if kind == "adapter":
            lr = sizes.recurrent_adapter_lr if own else sizes.adapter_lr
            size = AdapterSize(sizes.rank, recurrent if own else _ALL_MAPS, lr)
        elif kind in GRADIENT_STEPS:
            size = StepSize(sizes.maps_lr if kind == "maps" else sizes.weights_lr, int(rank or 0))
        else:
            size = GeneratorSize(sizes.rank, 0, p.final.maps if kind == "final" else recurrent)
        words = [*tasks, *(["after", after] if after else []), objective.lower(), *([str(contexts)] * (contexts > 1))]
        from_prose = "wikitext" in tasks
        practises = kind == "maps" and not after
        course = PairCourse(
            tasks,
            objective,
            practice=("named" if after else "copied") if from_prose else "",
            repeats=sizes.repeats if practises else 0,
            everywhere=practises and objective == "LC",
        )
        about = f"{_METHODS[kind]}{f' of rank {rank}' if rank else ''}; {', '.join(tasks)}, {objective}"
        before = f"{lm}-{method}-{after}-lc" if after else None
        return Recipe(
            f"{lm}-{method}-{'-'.join(words)}",
            about + (f", {contexts} contexts" if contexts > 1 else "") + (f", after {after}" if after else ""),
            kind,
            size,
            "pairs",
            _pair_training(p, lm, kind, int(rank or 0), tasks, contexts, after),
            lm,
            before,
            pairs=course,
            at_once=None if own else sizes.at_once,
            time=time,
        )

    rwkv, llama, reader = "rwkv4-pairs", "llama-pairs", "llama-reader-pairs"
    characters, reversal, wikitext, squad = ((task,) for task in TASKS)
    found = [
        model(
            rwkv,
            "RWKV-4 that knows the tasks about people",
            "rwkv4",
            p.model,
            sizes.recurrent,
            PairCourse(_PEOPLE, "LM", practice="copied"),
            "rwkv4-dialogue",
            "22 min, CPU",
        ),
        step(rwkv, "token", characters, time="3 min, CPU"),
        step(rwkv, "final", characters, time="3 min, CPU"),
        step(rwkv, "adapter", characters, time="7 min, CPU"),
    ]
    if not sizes.hub:  # such a profile's tasks are for a pretrained transformer
        found += [
            model(
                llama,
                "transformer that knows the tasks of context and query",
                "llama",
                sizes.transformer_size,
                sizes.transformer,
                PairCourse(TASKS, "LM", practice="copied", repeats=int(REPEATS * sizes.transformer.steps)),
                time="1 min, H100",
            ),
            model(
                reader,
                "that transformer after more prose, for the cloze and SQuAD",
                "llama",
                sizes.transformer_size,
                sizes.reader,
                PairCourse((), "LM", practice="named"),
                llama,
                "8 min, CPU",
            ),
        ]
    found += [step(llama, "weights", (task,), o, time="1 min, H100") for task in _PEOPLE for o in ("LC", "LG")]
    found += [
        step(llama, "weights-1", characters, time="6 min, CPU"),
        step(llama, "weights-16", characters, time="3 min, CPU"),
        step(llama, "adapter", characters, time="2 min, CPU"),
        step(llama, "weights", _PEOPLE, time="6 min, CPU"),
        step(llama, "weights", reversal, after="characters", time="5 min, CPU"),
        *(step(llama, "weights", characters, contexts=n, after="characters", time="7 min, CPU") for n in sizes.many),
    ]
    for task in (wikitext, squad):
        found += [step(reader, "maps", task, objective, time="21 min, CPU") for objective in ("LC", "LG")]
        minutes = "9 min, CPU" if task == wikitext else "3 min, CPU"
        found += [step(reader, "maps", task, o, after="wikitext", time=minutes) for o in ("LC", "LG")]
    return found


_METHODS = {
    "token": "token-wise generator",
    "final": "final-state generator",
    "adapter": "gradient step in an adapter",
    "weights": "gradient step on all weights",
    "maps": "gradient step on all linear maps at learned rates",
}


def _pair_training(p, lm, kind, rank, tasks, contexts, after) -> PairTraining:
    sizes = p.pairs
    training = {
        "adapter": sizes.recurrent_adapter if lm == "rwkv4-pairs" else sizes.adapter,
        "weights": sizes.weights,
        "maps": (sizes.questions if tasks == ("squad",) else sizes.maps_after) if after else sizes.maps,
    }.get(kind, sizes.generator)
    if rank:  # every pair of factors moves as far, and they add up
        training = (sizes.rank_one if rank == 1 else None) or sizes.low_rank
        training = replace(training, lr=training.lr / rank**0.5)
    # As many contexts a step as where every query comes with one; at least two queries, if there were two.
    queries = min(training.batch, max(2, training.batch // contexts))
    return replace(training, contexts=(contexts,), batch=queries)


def _problems(p: Profile) -> list[Recipe]:
    """Models of the established tests of memory, and what writes a test's memory into the recurrent one's weights."""
    suite, repeats = p.suite, int(REPEATS * p.suite.transformer.steps)
    rwkv, llama = "rwkv4-suite", "llama-suite"

    def made(name, about, kind, size, training, time, lm=None, start=None, repeats=0):
        return Recipe(name, about, kind, size, "problems", training, lm, start, repeats=repeats, time=time)

    return [
        made(
            rwkv,
            "RWKV-4 that knows the memory tests",
            "rwkv4",
            p.model,
            suite.recurrent,
            "15 min, CPU",
            None,
            "rwkv4-dialogue",
        ),
        made(f"{rwkv}-token", "token-wise generator for it", "token", p.token, suite.token, "12 min, CPU", rwkv),
        made(
            f"{rwkv}-adapter", "gradient step in an adapter", "adapter", p.adapter, suite.adapter, "28 min, CPU", rwkv
        ),
        made(
            llama,
            "transformer that knows the memory tests",
            "llama",
            p.pairs.transformer_size,
            suite.transformer,
            "14 min, CPU",
            repeats=repeats,
        ),
    ]


def _conversations(p: Profile) -> list[Recipe]:
    """What makes deltas for a transformer that others trained, whose window has lost the prompt."""
    sizes, lm = p.conversations, "smollm2"

    def generator(name, about, kind, size, training, curriculum, time):
        return Recipe(
            f"{lm}-{name}", about, kind, size, "conversations", training, lm, curriculum=curriculum, time=time,
            window=sizes.window,
        )  # fmt: skip

    return [
        generator(
            "token",
            "token-wise generator for SmolLM2-135M-Instruct",
            "normalised",
            sizes.token,
            sizes.training,
            ConversationCurriculum(),
            "3 h, CPU",
        ),
        generator(
            "static",
            "control: one delta for all prompts",
            "normalised-static",
            sizes.static,
            sizes.static_training,
            ConversationCurriculum(),
            "10 min, CPU",
        ),
    ]


def _others_pairs(p: Profile) -> list[Recipe]:
    """A gradient step in the last blocks of a transformer that others trained, on the tasks of context and query."""
    sizes, lm = p.later, "smollm2"

    def step(task, objective, time):
        people = task in _PEOPLE
        training = sizes.people if people else sizes.passages
        return Recipe(
            f"{lm}-step-{task}-{objective.lower()}",
            f"gradient step in an adapter of SmolLM2's last blocks; {task}, {objective}",
            "rated-adapter",
            sizes.adapter,
            "pairs",
            training,
            lm,
            pairs=PairCourse((task,), objective, practice="" if people else "named"),
            at_once=training.batch if people else training.queries,
            time=time,
            window=0,
        )

    times = {"squad": "2 h, CPU", "wikitext": "2 h, CPU", "characters": "1 h, CPU"}
    return [step(task, objective, time) for task, time in times.items() for objective in ("LC", "LG")]
