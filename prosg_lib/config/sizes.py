"""What a profile is made of: the sizes of models, trainings and evaluations, and what each of them means."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class RWKV4Config:
    """Sizes. ffn: the feed-forward width, 4 D in every published model."""

    vocab: int
    width: int
    layers: int
    ffn: int


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a model of `transformers`. kind: its model_type; ffn, heads: 0 where the class does not say.

    rest: what else its configuration sets, as JSON; a model's fingerprint has it.
    """

    kind: str
    vocab: int
    width: int
    layers: int
    ffn: int = 0
    heads: int = 0
    rest: str = ""


VOCAB = 2048
"""Tokens: every name and value is one, and the softmax stays cheap on a CPU."""


@dataclass(frozen=True)
class Training:
    """Sizes of one training stage.

    Attributes:
        steps: optimiser steps.
        batch: dialogues a step.
        lr: peak learning rate; rises linearly over `warmup` steps, then falls along a cosine to a twentieth.
        facts: numbers of facts that prompts are drawn with; a step draws one.
        distances: tokens between prompt and probes; a step draws one.
    """

    steps: int
    batch: int
    lr: float
    facts: tuple[int, ...]
    distances: tuple[int, ...]
    warmup: int = 100


@dataclass(frozen=True)
class PairTraining:
    """Sizes of one training stage on pairs of context and query.

    Attributes:
        steps, batch, lr, warmup: as in `Training`; a batch counts pairs. No steps: as many as one epoch has.
        contexts: numbers of contexts that a query comes with; a step draws one.
    """

    steps: int
    batch: int
    lr: float
    contexts: tuple[int, ...] = (1,)
    warmup: int = 50


@dataclass(frozen=True)
class GeneratorSize:
    """Sizes of a generator: rank of the delta, width of the hidden layers, the maps of every block it changes."""

    rank: int
    width: int
    maps: tuple[str, ...]


@dataclass(frozen=True)
class SupervisedSize(GeneratorSize):
    """Sizes of a token-wise generator that is first taught to predict true gradients (`supervised`).

    Attributes:
        lessons: share of the training's steps; the others are the end-to-end ones of every generator.
        teacher: whose gradient (`true_gradient.TEACHERS`).
        strength: norm of a usual change that it is to predict, over its weight's.
        directions: whether the reading directions start as those that read the most of the teacher's gradients.
        rank_of_teacher: only the best so many directions of it; None: all.
        foresight: weight of the auxiliary task, to predict the next token's synthetic gradient.
    """

    lessons: float = 0.1
    teacher: str = "answers"
    strength: float = 0.3
    directions: bool = True
    rank_of_teacher: int | None = None
    foresight: float = 0.0


@dataclass(frozen=True)
class TransformedSize(GeneratorSize):
    """Sizes of a transformed true gradient (`mend`): width is the blocks' rank, step the step size before training."""

    step: float


@dataclass(frozen=True)
class AdapterSize:
    """Sizes of an adapter in which one gradient step is taken: its rank, its maps, and the step's learning rate."""

    rank: int
    maps: tuple[str, ...]
    lr: float


@dataclass(frozen=True)
class Evaluation:
    """Sizes of an evaluation: prompts a seed, probes a prompt, seeds, and the two grids.

    Attributes:
        prompts: with the main number of facts; other_prompts: with every other number.
        probes: at most one a fact.
        seeds: of the draws of items.
        trainings: of the token-wise generator, each a number to be added to the run's seed; 0, the run's own, is first
            (`ablations.trainings`).
    """

    prompts: int
    other_prompts: int
    probes: int
    seeds: tuple[int, ...]
    distances: tuple[int, ...]
    facts: tuple[int, ...]
    trainings: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def main_facts(self) -> int:
        """The number of facts that results are quoted for: 6, or the grid's largest where it has no 6."""
        return 6 if 6 in self.facts else max(self.facts)


TASKS = ("characters", "reversal", "wikitext", "squad")
"""The four tasks of pairs."""


@dataclass(frozen=True)
class PairSizes:
    """Sizes of all that is trained and measured on pairs.

    Attributes:
        transformer_size: of the transformer; the recurrent model has the dialogues' sizes.
        recurrent, transformer, reader: pretraining of the language models.
        rank: of the adapters, and of the generators that they are compared with.
        adapter, weights, low_rank: meta-training of a step in an adapter, of one on all weights, and of one on all
            weights from a start that is a change of low rank.
        rank_one: as `low_rank`, of rank one, which learns more slowly; None: the same.
        recurrent_adapter: as `adapter`, of the recurrent model, on as many examples as the generators beside it.
        generator: training of the two generators.
        adapter_lr, weights_lr: of the inner step. Chosen on the validation split, see notebook 07.
        maps: meta-training of a step on all linear maps at learned rates, which are maps_lr at first.
        echoes: so many first steps of it are random tokens said twice, so that it learns to store before it reads.
        maps_after: as `maps`, of one that goes on from such a training; questions: the same on SQuAD alone.
        at_once: examples in memory at a time; None: the whole batch.
        items: pairs of a split that are evaluated, at most; fewer: where many starts are asked for many cells.
        seeds: of the trainings that results are a mean over; many: numbers of contexts that starts are asked with, and
            trained on.
        context, query: tokens that a pair may have, the answer being a part of the query.
        words: of a passage of the cloze, a sentence or three; None: whole paragraphs.
        tasks: those that are trained on and measured, where this machine has their data.
        hub: SQuAD and WikiText are the hub's, not what is on this machine.
    """

    transformer_size: TransformerConfig
    recurrent: PairTraining
    transformer: PairTraining
    reader: PairTraining
    adapter: PairTraining
    recurrent_adapter: PairTraining
    weights: PairTraining
    low_rank: PairTraining
    generator: PairTraining
    maps: PairTraining
    echoes: int
    maps_after: PairTraining
    questions: PairTraining
    rank_one: PairTraining | None = None
    rank: int = 8
    adapter_lr: float = 100.0
    weights_lr: float = 0.1
    maps_lr: float = 0.01
    at_once: int | None = None
    items: int = 500
    fewer: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    many: tuple[int, ...] = (4, 16)
    context: int = 360
    query: int = 120
    words: int | None = 50
    tasks: tuple[str, ...] = TASKS
    hub: bool = False


@dataclass(frozen=True)
class PretrainedSizes:
    """A generator for a model of `transformers`, and the small model that stands in where no hub is reached.

    Attributes:
        settings: the small model's configuration, a Mamba-2's; it is made and trained here.
        lm: its training.
        rank: of the generator; its width is twice the model's.
        token_training: of the generator.
        prompts: that it is evaluated with; distances: tokens between them and the questions.
        together: numbers of prompts in one memory.
    """

    settings: tuple[tuple[str, int], ...]
    lm: Training
    rank: int
    token_training: Training
    prompts: int
    distances: tuple[int, ...]
    together: tuple[int, ...] = (1, 2, 4, 8)


@dataclass(frozen=True)
class Study:
    """Of the generators that are another in one respect (`ablation_study`); the defaults are the cpu profile's.

    Attributes:
        steps, batch, facts, distances: as in `Training`, of every variant.
        others: number of the basis' other trainings, with the seeds that follow.
        prompts: that each is asked about, a seed of the evaluation.
        groups: of the choices that are looked at.
    """

    steps: int = 300
    batch: int = 32
    facts: tuple[int, ...] = (3, 6)
    distances: tuple[int, ...] = (0, 64, 256)
    others: int = 2
    prompts: int = 24
    groups: tuple[str, ...] = ("basis", "seed", "rank", "width", "maps", "layers", "label", "course", "method", "state")


@dataclass(frozen=True)
class Forgetting:
    """Sizes of the established tests of memory; the defaults are the cpu profile's.

    Attributes:
        items: problems a cell and seed.
        copy: numbers of words to repeat; phonebook: lines of the book.
        mqar: (length, pairs), as published.
        passkey: tokens of the text with the key in it; depths: where it stands there, from 0 to 1.
    """

    items: int = 32
    copy: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    mqar: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 64))
    phonebook: tuple[int, ...] = (3, 5, 10, 20, 50)
    passkey: tuple[int, ...] = (64, 256, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def cells(self) -> dict[str, tuple]:
        """The sizes of all tests, by name, without the number of items."""
        return {name: value for name, value in asdict(self).items() if name != "items"}


@dataclass(frozen=True)
class SuiteSizes:
    """Trainings on the established tests (`suite_stages`); the defaults are the cpu profile's.

    Attributes:
        recurrent, transformer: of the two language models; token, adapter: of what writes into the first one's weights.
        practice: the tests that are trained on; longest: tokens of memory and rest that a cell of them has at most.
    """

    recurrent: PairTraining = PairTraining(2000, 32, 2e-3)
    transformer: PairTraining = PairTraining(2000, 32, 3e-3)
    token: PairTraining = PairTraining(1500, 32, 2e-3, warmup=150)
    adapter: PairTraining = PairTraining(1500, 32, 1e-2, warmup=150)
    practice: Forgetting = Forgetting()
    longest: int = 300


@dataclass(frozen=True)
class Profile:
    """All sizes of one profile.

    Attributes:
        transformer_training: of the transformer that the dialogues' model is compared with, of `pairs`' size; as `lm`,
            with distances as long as it is to look back, because it does not look further than it was trained to.
        autocast: train under bfloat16 autocast where the device has it.
        models_of: the profile whose trained models it has, with the same sizes; None: its own.

    The ways to make a delta that are compared with the token-wise generator, supervised and mend, have its training:
    as many steps on as many dialogues, and about as many parameters.
    """

    name: str
    model: RWKV4Config
    lm: Training
    token: GeneratorSize
    token_training: Training
    final: GeneratorSize
    final_training: Training
    static_training: Training
    adapter: AdapterSize
    adapter_training: Training
    evaluation: Evaluation
    pairs: PairSizes
    pretrained: PretrainedSizes
    transformer_training: Training
    supervised: SupervisedSize
    mend: TransformedSize
    autocast: bool = False
    models_of: str | None = None
    forgetting: Forgetting = Forgetting()
    study: Study = Study()
    suite: SuiteSizes = SuiteSizes()

    @property
    def supervised_training(self) -> Training:
        return self.token_training

    @property
    def mend_training(self) -> Training:
        return self.token_training
