"""Load or train, for pairs of context and query: the language models, and the ways to take a context in.

`pairs_of` knows the four tasks; `load_or_train` of `stages` is what `pair_model` and `pair_way` do for dialogues.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain

from torch import nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.hub_transformer import new_llama
from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config import PROFILES, TASKS, PairTraining, Profile
from prosg_lib.errors import UserError
from prosg_lib.generators.base import ALL_MAPS
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.gradient_steps.weight_step import WeightStep
from prosg_lib.tasks.pair_batches import PairDraw
from prosg_lib.tasks.pair_sources import PEOPLE, _missing, _sources, available, pairs_of
from prosg_lib.tasks.pairs import Pair, fitted
from prosg_lib.tasks.wikitext import copied, named
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer
from prosg_lib.training import stages
from prosg_lib.training.loop import RECIPE
from prosg_lib.training.pair_objectives import pair_lm_objective, pair_objective
from prosg_lib.training.stages import PLENTY, Thrift

BACKBONES = ("recurrent", "transformer", "reader")
"""The project's own models; any other name is a model of `transformers`, by hub id or folder. The reader is the
transformer after more of prose: it completes names that it has never seen from the passage in front of it."""


_NAMES = {"recurrent": "rwkv4", "transformer": "llama", "reader": "llama-reader"}


ECHOES = 0.15
"""Share of the transformer's pretraining with random tokens that are said twice: copying is learned there. The
recurrent model has learned it from the dialogues."""


def _training_pairs(tasks: Iterable[str], profile: Profile, tokenizer: Tokenizer) -> dict[str, tuple[Pair, ...]]:
    return {task: pairs_of(task, "train", profile, tokenizer).pairs for task in tasks if available(task, profile)}


def _practice(backbone: str, profile: Profile) -> dict[str, tuple[Pair, ...]]:
    """What a model is pretrained on: tasks, and any sentence to be completed from its passage.

    The recurrent model has the people's tasks alone; one of this size learns no more. The reader has the sentences that
    break off before a name.
    """
    if backbone == "reader":
        return _from_sources(named, profile)
    found = _training_pairs(TASKS if backbone == "transformer" else PEOPLE, profile, load_tokenizer())
    return found | _from_sources(copied, profile)


def _from_sources(made: Callable[..., tuple[Pair, ...]], profile: Profile) -> dict[str, tuple[Pair, ...]]:
    """Pairs of every source of prose that is on this machine, as `copied` or `named` makes them."""
    sizes = profile.pairs
    sources = _sources("wikitext", sizes) if "wikitext" in sizes.tasks and not sizes.hub else []
    return {
        f"{made.__name__} from {source.name}": fitted(
            made("train", source, sizes.words), load_tokenizer(), sizes.context, sizes.query
        ).pairs
        for source in sources
    }


def _lessons(spec: WaySpec, backbone: str, profile: Profile, tokenizer: Tokenizer) -> dict[str, tuple[Pair, ...]]:
    """What a way is trained on; with the cloze goes practice, because its own pairs are few: any words, and after
    that names."""
    found = _training_pairs(spec.tasks, profile, tokenizer)
    if backbone in BACKBONES and "wikitext" in found:
        found |= _from_sources(named if spec.after else copied, profile)
    return found


def _lesson_turns(lessons: dict[str, tuple[Pair, ...]]) -> tuple[str, ...]:
    """Whose turn it is: a task's once, and its practice's twice, each source's as often as another's. Few pairs, said
    often, are learned by heart; and of all practice as one, books would be nearly all."""
    practice = sorted(name for name in lessons if name not in TASKS)
    return tuple(name for task in sorted(set(lessons) - set(practice)) for name in (task, *practice, *practice))


def _digest(tasks: Iterable[str]) -> str:
    """Names the training data of tasks, as far as every machine has them; a checkpoint's provenance tells the prose."""
    digest = hashlib.sha256()
    for task in sorted(set(tasks) & set(PEOPLE)):
        for pair in pairs_of(task, "train", PROFILES["cpu"]).pairs:
            digest.update(f"{task}\n{pair.context}\n{pair.query}\n{pair.answer}\n".encode())
    return digest.hexdigest()[:16]


def _plan(label, name, kind, record, new, work, training, seed, lm, thrift, held=0) -> stages.Plan:
    record = {"stage": label, "seed": seed, "recipe": RECIPE, "training": asdict(training)} | record
    return stages.Plan(label, name, kind, stages.plain(record), new, work, training, seed, lm, thrift, held)


def model_name(backbone: str, profile: Profile) -> str:
    """Of a checkpoint: `rwkv4-pairs` is the cpu profile's recurrent model."""
    return f"{_NAMES[backbone]}-pairs" + stages.ending(profile)


def pair_model(
    backbone: str, profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> LanguageModel:
    """The language model that knows the tasks when it is given the context.

    Args:
        backbone: "recurrent" goes on from the dialogues' RWKV-4, "transformer" starts from nothing, "reader" goes on
            from it; else a hub id or a folder of a pretrained causal transformer, which is taken as it is.
        retrain, thrift: as in `stages.load_or_train`.
    Raises:
        UserError: unknown backbone or profile, or one without a tokenizer; a reader where there is no prose; damaged
            checkpoint; diverged training.
    """
    sizes = profile.pairs
    if backbone not in BACKBONES:
        return _pretrained(backbone)
    if backbone == "reader" and sizes.hub:
        raise UserError(
            f"the reader learns from texts on this machine, and {profile.name} has the hub's; take transformer"
        )
    if backbone == "reader" and not available("wikitext", profile):
        raise _missing("wikitext", profile)
    before = _before(backbone, profile, seed, retrain, thrift)
    config = before.config if before else sizes.transformer_size
    record = {"data": _digest(PEOPLE), "model": asdict(config)} | ({"lm": before.fingerprint()} if before else {})
    training = getattr(sizes, backbone)

    def new():
        model = RWKV4(config) if backbone == "recurrent" else new_llama(config)
        if before:
            model.load_state_dict(before.state_dict())
        return model

    def work(model):
        model.tokenizer = load_tokenizer()
        tasks = _practice(backbone, profile)
        turns = tuple(chain.from_iterable(_turns(tasks)))
        echoes = int(ECHOES * training.steps) if backbone == "transformer" else 0
        draw = PairDraw(tasks, model.tokenizer, training.batch, training.contexts, seed, turns, echoes)
        return draw, pair_lm_objective(model)

    label, name = f"{backbone} model", model_name(backbone, profile)
    plan = _plan(label, name, "lm", record, new, work, training, seed, None, thrift)
    return stages.obtain(plan, profile, retrain)


def _before(backbone: str, profile: Profile, seed: int, retrain: bool, thrift: Thrift) -> LanguageModel | None:
    """The model that one goes on from."""
    if backbone == "recurrent":
        return stages.load_or_train("lm", profile, seed, retrain, thrift)
    return pair_model("transformer", profile, seed, retrain, thrift) if backbone == "reader" else None


def _turns(tasks: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Whose turn it is: two in five are the people's, two the practice's, one a task with few pairs; where there are
    none of those, the people's come twice."""
    people, practice = [t for t in PEOPLE if t in tasks], [t for t in tasks if t not in TASKS]
    few = [t for t in tasks if t in TASKS and t not in PEOPLE]
    for other in few:
        yield (*people, *practice, other)
    if not few:
        yield (*people, *people, *practice)


@lru_cache(maxsize=1)
def _pretrained(source: str) -> LanguageModel:
    lm = load_model(source)
    if lm.tokenizer is None:
        raise UserError(f"{source} has no tokenizer; pairs are text, so save the model's tokenizer beside it")
    return lm.to(stages.device()).requires_grad_(False)


@dataclass(frozen=True)
class WaySpec:
    """What is trained to take a context in.

    Attributes:
        method: "adapter" (one step in a LoRA adapter), "weights" (on all weights, from any start), "weights-<r>" (from
            a start that a rank-r change of the model is), "maps" (on all linear maps, at learned rates, after practice
            with random tokens), or a generator, "token" or "final".
        tasks: trained on; several in turn.
        objective: "LC" or "LG".
        contexts: number of contexts a query comes with. A step is one on the mean of all their losses, never one after
            the other: a start that keeps them all at once is what is learned, whatever it is asked for afterwards.
        after: trained on these tasks first, with one context. A step on maps has its practice there: by LC, at every
            word of the query. Then it goes on, by whichever objective, with the answers alone.
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

    @property
    def practises(self) -> bool:
        """Whether it is a step on maps that is new to it."""
        return self.method == "maps" and not self.after

    @property
    def before(self) -> WaySpec | None:
        """What it goes on from."""
        if not self.after:
            return None
        objective = "LC" if self.method == "maps" else self.objective
        return WaySpec(self.method, self.after, objective)


_GENERATORS = {"token": TokenGenerator, "final": FinalStateGenerator}


_MAPS = {"recurrent": ("att.output", "att.value", "ffn.key", "ffn.value")}


def new_way(method: str, lm: LanguageModel, backbone: str, profile: Profile) -> nn.Module:
    """An untrained way; the step's start is the model itself.

    Raises:
        UserError: unknown method, or a rank that a matrix does not have.
    """
    sizes, rank = profile.pairs, _rank(method)
    maps = _MAPS.get(backbone, ALL_MAPS)
    if method == "adapter":
        return AdapterStep(lm, sizes.rank, maps, sizes.adapter_lr)
    if method in _GENERATORS:
        maps = profile.final.maps if method == "final" else maps
        return _GENERATORS[method](lm, sizes.rank, 2 * lm.config.width, maps)
    if method == "maps":
        return MapStep(lm, sizes.maps_lr)
    return WeightStep(lm, rank, sizes.weights_lr)


def _rank(method: str) -> int | None:
    """Of the change that the start of a step on all weights is; None: of no rank, or of another method."""
    kind, dash, rank = method.partition("-")
    if method not in ("adapter", "maps", "weights", *_GENERATORS) and not (kind == "weights" and rank.isdigit()):
        raise UserError(f"unknown method {method!r}; there are adapter, maps, weights, weights-<rank>, token, final")
    return int(rank) if dash else None


def way_name(spec: WaySpec, backbone: str, profile: Profile, seed: int = 0) -> str:
    """Of a checkpoint: `llama-pairs-weights-characters-lc` is one of the cpu profile's ways."""
    model = _NAMES.get(backbone) or re.sub(r"\W+", "-", backbone).strip("-")
    return f"{model}-pairs-{spec.name}" + (f"-seed{seed}" if seed else "") + stages.ending(profile)


def _training(spec: WaySpec, backbone: str, profile: Profile, fresh: nn.Module, tokenizer: Tokenizer) -> PairTraining:
    sizes = profile.pairs
    going_on = sizes.questions if spec.tasks == ("squad",) else sizes.maps_after
    training = {
        "adapter": sizes.recurrent_adapter if backbone == "recurrent" else sizes.adapter,
        "weights": sizes.weights,
        "maps": sizes.maps if spec.practises else going_on,
    }.get(spec.method, sizes.generator)
    if spec.method.startswith("weights-"):  # every pair of factors moves as far, and they add up
        training = (sizes.rank_one if fresh.rank == 1 else None) or sizes.low_rank
        training = replace(training, lr=training.lr / fresh.rank**0.5)
    # A step has as many contexts as it has where every query comes with one; of queries two, if it had two.
    queries = min(training.batch, max(2, training.batch // spec.contexts))
    training = replace(training, contexts=(spec.contexts,), batch=queries)
    if not training.steps:
        pairs = sum(map(len, _training_pairs(spec.tasks, profile, tokenizer).values()))
        training = replace(training, steps=-(-pairs // training.batch))
    return training


def pair_way(
    spec: WaySpec, backbone: str, profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> nn.Module:
    """The trained way of a specification, for `pair_model(backbone, ...)`; loaded or trained.

    Args:
        retrain, thrift: as in `stages.load_or_train`; as many examples at once as the profile says, if `thrift` does
            not say.
    Raises:
        UserError: unknown method, task, objective, backbone or profile; damaged checkpoint; diverged training.
    """
    sizes = profile.pairs
    _rank(spec.method)  # what is unknown is said before the model is trained
    there = [task for task in (*spec.tasks, *spec.after) if available(task, profile)]
    if not set(there) & set(spec.tasks):
        raise _missing(spec.tasks[0], profile)
    if spec.method not in _GENERATORS:
        thrift.for_gradient_step(spec.method)
    lm = pair_model(backbone, profile, 0, retrain, thrift)
    fresh = new_way(spec.method, lm, backbone, profile)
    training = _training(spec, backbone, profile, fresh, lm.tokenizer)
    echoes = sizes.echoes if spec.practises else 0
    record = {
        "way": asdict(spec),
        "lm": lm.fingerprint(),
        "data": _digest(spec.tasks + spec.after),
        "inner": {"lr": getattr(fresh, "lr", None), "rank": getattr(fresh, "rank", None)},
    }
    # The cloze's query repeats the passage, so the teacher's every word there says how to find it. LG has the answer.
    everywhere = spec.practises and spec.objective == "LC"
    if spec.method == "maps":
        record |= {"echoes": echoes, "everywhere": everywhere}

    def work(way):
        if spec.before:
            way.load_state_dict(pair_way(spec.before, backbone, profile, seed, retrain, thrift).state_dict())
        tasks = _lessons(spec, backbone, profile, lm.tokenizer)
        turns = _lesson_turns(tasks) if spec.method == "maps" else tuple(sorted(tasks))
        longest = 96 if echoes else 0
        room = spec.contexts * sizes.context  # so that all of them are always there
        draw = PairDraw(tasks, lm.tokenizer, training.batch, training.contexts, seed, turns, echoes, longest, room)
        if spec.method == "final":
            told = draw(-1).to(stages.device()).context
            way.fit_normaliser(lm, told.ids[:, 0], told.valid[:, 0])
        return draw, pair_objective(lm, way, spec.objective, everywhere, echoes=echoes)

    thrift = replace(thrift, at_once=thrift.at_once or sizes.at_once)
    label, name = f"{backbone} {spec.name}", way_name(spec, backbone, profile, seed)
    plan = _plan(
        label,
        name,
        "generator",
        record,
        lambda: new_way(spec.method, lm, backbone, profile),
        work,
        training,
        seed,
        lm,
        thrift,
        held=echoes,
    )
    return stages.obtain(plan, profile, retrain)
