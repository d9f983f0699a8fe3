"""What a profile is made of: the sizes of models, trainings and evaluations, and what each of them means."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from prosg_lib.errors import UserError


class Sizes:
    """What a user can set. Numbers are above 0 and finite in float32, lists not empty unless that is their default.

    Attributes:
        may_be_zero: the names of the fields where 0 has a meaning.
    """

    may_be_zero = ()

    def __post_init__(self):
        for field in fields(self):
            name, value, zero = field.name, getattr(self, field.name), field.name in self.may_be_zero
            several = value if isinstance(value, tuple) else (value,)
            numbers = [v for v in several if type(v) in (int, float)]
            if not (several or field.default == ()) or not all(0 < v < 3e38 or (zero and v == 0) for v in numbers):
                raise UserError(f"{name}={value} is refused: it takes {'0 or more' if zero else 'numbers above 0'}")


@dataclass(frozen=True)
class RWKV4Config(Sizes):
    """Sizes. ffn: the feed-forward width, 4 D in every published model."""

    vocab: int
    width: int
    layers: int
    ffn: int


@dataclass(frozen=True)
class RWKV7Config(Sizes):
    """Sizes; the defaults are those of the published model of width 768.

    Attributes:
        ffn: the feed-forward width, 4 D in every published model.
        head: N, 64 in every published model.
        decay_rank, rate_rank, value_rank, gate_rank: ranks of the low-rank maps to w, a, v and g. A model of a single
            layer has no map to v, and value_rank 0.
    """

    may_be_zero = ("value_rank",)

    vocab: int
    width: int
    layers: int
    ffn: int
    head: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.head < 1 or self.width % self.head:
            raise UserError(f"{self.width} is not a multiple of the head size {self.head}; choose a width that is")
        if self.layers == 1:
            object.__setattr__(self, "value_rank", 0)


@dataclass(frozen=True)
class TransformerConfig(Sizes):
    """Sizes of a model of `transformers`. kind: its model_type; ffn, heads: 0 where the class does not say.

    rest: what else its configuration sets, as JSON; a model's fingerprint has it.
    """

    may_be_zero = ("ffn", "heads")

    kind: str
    vocab: int
    width: int
    layers: int
    ffn: int = 0
    heads: int = 0
    rest: str = ""


@dataclass(frozen=True)
class Mamba2Size(Sizes):
    """Sizes of a Mamba-2 of `transformers`, input and output embeddings tied. state: per channel."""

    vocab: int
    width: int
    layers: int
    heads: int
    state: int

    @property
    def settings(self) -> dict[str, int]:
        """As `Mamba2Config` names them; chunks as short as a CPU likes them."""
        sizes = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_heads": self.heads}
        sizes |= {"head_dim": 2 * self.width // self.heads, "state_size": self.state, "n_groups": 1, "chunk_size": 32}
        return sizes | {"vocab_size": self.vocab}


VOCAB = 2048
"""Tokens: every name and value is one, and the softmax stays cheap on a CPU."""


@dataclass(frozen=True)
class Training(Sizes):
    """Sizes of one training stage.

    Attributes:
        steps: optimiser steps.
        batch: dialogues a step.
        lr: peak learning rate; rises linearly over `warmup` steps, then falls along a cosine to a twentieth.
        facts: numbers of facts that prompts are drawn with; a step draws one.
        distances: tokens between prompt and probes; a step draws one.
    """

    may_be_zero = ("distances",)

    steps: int
    batch: int
    lr: float
    facts: tuple[int, ...]
    distances: tuple[int, ...]
    warmup: int = 100


@dataclass(frozen=True)
class PairTraining(Sizes):
    """Sizes of one training stage on pairs of context and query.

    Attributes:
        steps, batch, lr, warmup: as in `Training`; a batch counts pairs. No steps: as many as one epoch has.
        contexts: numbers of contexts that a query comes with; a step draws one.
    """

    may_be_zero = ("steps",)

    steps: int
    batch: int
    lr: float
    contexts: tuple[int, ...] = (1,)
    warmup: int = 50


@dataclass(frozen=True)
class SharedPairTraining(PairTraining):
    """A training on pairs in which several queries share a context.

    Attributes:
        queries: about each context, at most.
    """

    queries: int = 4


@dataclass(frozen=True)
class ConversationTraining(Sizes):
    """Sizes of one training stage on conversations.

    Attributes:
        steps, batch, lr, warmup: as in `Training`; a batch counts prompts.
        facts: numbers of facts of an open-world prompt; a step draws one.
        questions: about each prompt, at most.
    """

    steps: int
    batch: int
    lr: float
    facts: tuple[int, ...]
    questions: int
    warmup: int = 100


@dataclass(frozen=True)
class GeneratorSize(Sizes):
    """Sizes of a generator.

    Attributes:
        rank: of the delta.
        width: of the hidden layers; 0: twice the model's.
        maps: endings of the names of the linear maps it changes; "" is the ending of all.
        layers: numbers of the blocks in which it changes them; none: all blocks.
        label: whether a token-wise generator sees the next token.
    """

    may_be_zero = ("width", "layers")

    rank: int
    width: int
    maps: tuple[str, ...]
    layers: tuple[int, ...] = ()
    label: bool = True


@dataclass(frozen=True)
class SupervisedSize(GeneratorSize):
    """Sizes of a token-wise generator that first learns to predict true gradients (`training.supervised`).

    Attributes:
        lessons: share of the steps that teach this; the others are the end-to-end ones of every generator.
        teacher: whose gradient it predicts (`supervised.TEACHERS`).
        strength: norm of a typical delta that it should predict, relative to its weight's.
        directions: whether the reading directions start as those that capture most of the teacher's gradients.
    """

    may_be_zero = (*GeneratorSize.may_be_zero, "lessons")

    lessons: float = 0.1
    teacher: str = "answers"
    strength: float = 0.3
    directions: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.lessons > 1:
            raise UserError(f"lessons={self.lessons}: it takes a share from 0 to 1")
        if self.teacher not in ("answers", "prompt"):
            raise UserError(f"unknown teacher {self.teacher!r}; there are answers and prompt")


@dataclass(frozen=True)
class TransformedSize(GeneratorSize):
    """Sizes of a transformed true gradient (MEND). width: rank of its blocks; step: step size before training."""

    step: float = 0.1


@dataclass(frozen=True)
class StateSize(GeneratorSize):
    """Sizes of a generator that sees states only.

    Attributes:
        terms: outer products that a state becomes; term: numbers that each is made from.
        sentences: whether it sees the state after every sentence of the prompt, or only the last.
    """

    terms: int = 32
    term: int = 64
    sentences: bool = False


@dataclass(frozen=True)
class ProbeSize(Sizes):
    """Width of a probe that reads facts off a state (`training.state_probe`)."""

    width: int


@dataclass(frozen=True)
class StepSize(Sizes):
    """One gradient step on all weights.

    Attributes:
        lr: inner learning rate, before training where it is learned.
        rank: of the change of the model's weights that the step starts from; 0: any change.
    """

    may_be_zero = ("rank",)

    lr: float
    rank: int = 0


@dataclass(frozen=True)
class Curriculum(Sizes):
    """Phases of a generator's training on dialogues.

    With the state always carried over, the model answers from it at short distances and never needs the delta. So a
    generator first trains with the delta alone: blank state, questions immediately after the prompt.

    Attributes:
        alone: share of the steps with the delta alone.
        blank: share of the later steps that also start from a blank state.
        local: share of the steps after which locality counts as well: KL to the model without the delta, on text.
        locality: its weight. With the loss on the text alone, perplexity of prose rose by 17 %.
    """

    may_be_zero = ("alone", "blank", "local", "locality")

    alone: float = 0.4
    blank: float = 0.5
    local: float = 0.6
    locality: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        if max(self.alone, self.blank, self.local) > 1:
            raise UserError(f"{self}: alone, blank and local take shares from 0 to 1")


@dataclass(frozen=True)
class OpenCurriculum(Curriculum):
    """A training on the open world; a language model's has questions immediately after the prompt as long as a
    generator's.

    Attributes:
        slots: number of training's slots that its prompts are about; 0: all.
    """

    may_be_zero = (*Curriculum.may_be_zero, "slots")

    alone: float = 0.7
    local: float = 0.8
    slots: int = 0


@dataclass(frozen=True)
class ConversationCurriculum(Sizes):
    """A generator's training on conversations.

    Attributes:
        easy: share of the steps in which prompts state one fact or two, and nothing else.
        teacher: weight of the KL to the model with the prompt in front of it, beside the loss of the right answers; a
            step then takes half as long again.
        local: share of the steps after which, at every second one, locality counts as well: KL to the model without
            the delta, on prose.
        locality: its weight; passage: tokens of such a prose.
    """

    may_be_zero = ("easy", "teacher", "local", "locality")

    easy: float = 0.1
    teacher: float = 0.0
    local: float = 0.5
    locality: float = 8.0
    passage: int = 32

    def __post_init__(self):
        super().__post_init__()
        if max(self.easy, self.local) > 1:
            raise UserError(f"{self}: easy and local take shares from 0 to 1")


@dataclass(frozen=True)
class PairCourse:
    """What a training on pairs of context and query consists of.

    Attributes:
        tasks: names (`TASKS`) of the tasks; those that this machine has no data for are left out.
        objective: "LM" (next-token loss), "LC" (match the prompted model) or "LG" (gold answers).
        practice: pairs made from any prose, in turn with the tasks: "copied" (complete any sentence of a passage),
            "named" (complete one that breaks off before a name), "" (none).
        repeats: number of first steps with random tokens that are repeated, where copying is learned.
        everywhere: the loss is a mean over all positions of the query, not the answer's alone.
    """

    tasks: tuple[str, ...]
    objective: str
    practice: str = ""
    repeats: int = 0
    everywhere: bool = False


@dataclass(frozen=True)
class AdapterSize(Sizes):
    """Sizes of an adapter in which one gradient step is taken: its rank, its maps, and the step's learning rate."""

    rank: int
    maps: tuple[str, ...]
    lr: float


@dataclass(frozen=True)
class LaterAdapterSize(AdapterSize):
    """As `AdapterSize`, in some blocks alone.

    Attributes:
        layers: numbers of those blocks; none: all.
    """

    may_be_zero = ("layers",)

    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Sizes of an evaluation: prompts a seed, probes a prompt, seeds, and the two grids.

    Attributes:
        prompts: with the main number of facts; other_prompts: with every other number.
        probes: at most one a fact.
        seeds: of the draws of items.
        trainings: of the token-wise generator: numbers added to the run's seed; 0, the run's own, comes first.
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
        adapter_lr, recurrent_adapter_lr, weights_lr: inner learning rates, chosen on the validation split.
        maps: meta-training of a step on all linear maps at learned rates, which are maps_lr at first.
        repeats: number of its first steps with random tokens that are repeated: it learns to store before it reads.
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
    repeats: int
    maps_after: PairTraining
    questions: PairTraining
    rank_one: PairTraining | None = None
    rank: int = 8
    adapter_lr: float = 100.0
    recurrent_adapter_lr: float = 100.0
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
        model: the small model, made and trained here.
        lm: its training.
        rank: of the generator; its width is twice the model's.
        token_training: of the generator.
        prompts: that it is evaluated with; distances: tokens between them and the questions.
        together: numbers of prompts in one memory.
    """

    model: Mamba2Size
    lm: Training
    rank: int
    token_training: Training
    prompts: int
    distances: tuple[int, ...]
    together: tuple[int, ...] = (1, 2, 4, 8)


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
    """Trainings on the established tests; the defaults are the cpu profile's.

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
class OpenStudy(Sizes):
    """Sizes of what is asked of the models of the open world.

    Attributes:
        prompts: of each level; fewer: of what takes longer; natural: those without templates, at most.
        facts: of a prompt; many: numbers of facts that are compared.
        distances: tokens of text behind the prompt; far: very many.
        scales: factors of the change.
        turns, instructed: of a long dialogue, of one with instructions.
    """

    may_be_zero = ("distances", "scales")

    prompts: int = 40
    fewer: int = 20
    natural: int = 1000
    facts: int = 6
    many: tuple[int, ...] = (6, 24, 64)
    distances: tuple[int, ...] = (0, 256, 1024, 4096)
    far: int = 16384
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    turns: int = 50
    instructed: int = 16


@dataclass(frozen=True)
class OpenSizes:
    """All that is trained on the open world; the defaults are the cpu profile's.

    Attributes:
        model, seventh: the language models, RWKV-4 and RWKV-7; training: theirs, a fifth of it without dialogues.
        token, final: the generators; probe: of what a state holds.
        token_training: of all that is trained for a language model, on as many dialogues.
        static_training: of the static delta, which has next to nothing to learn.
        probe_training: of the probe, which is asked for six facts of each of its prompts.
        study: what they are asked.
    """

    model: RWKV4Config = RWKV4Config(VOCAB, 128, 4, 512)
    seventh: RWKV7Config = RWKV7Config(VOCAB, 128, 4, 512, 32, 32, 32, 16, 64)
    training: Training = Training(9000, 16, 2.5e-3, (2, 3, 6, 6, 6, 12, 24), (0, 0, 0, 64, 128, 256, 512))
    token: GeneratorSize = GeneratorSize(32, 256, ("att.output", "att.value", "ffn.key", "ffn.value"))
    final: StateSize = StateSize(32, 256, ("att.output", "att.value", "ffn.key", "ffn.value"))
    probe: ProbeSize = ProbeSize(512)
    token_training: Training = Training(9000, 16, 2e-3, (2, 3, 6, 6, 6, 12, 24), (0, 0, 0, 64, 128, 256, 512))
    static_training: Training = Training(1000, 16, 2e-3, (2, 3, 6, 6, 6, 12, 24), (0, 0, 0, 64, 128, 256, 512))
    probe_training: Training = Training(3000, 16, 2e-3, (2, 3, 6, 6, 6, 12, 24), (0,))
    study: OpenStudy = OpenStudy()


_LATER_MAPS = GeneratorSize(16, 256, ("self_attn.o_proj", "mlp.down_proj"), tuple(range(8, 28)))


@dataclass(frozen=True)
class ConversationSizes:
    """A generator for a transformer that others trained (SmolLM2-135M), with a memory of fixed size; the defaults are
    the cpu profile's.

    Attributes:
        window: tokens that the model sees.
        token: the generator, small enough to be shipped: 40 maps, 7 M numbers; static: the control's sizes.
        training: of the generator, whose learning rate is low because its head's numbers act through sums over tokens
            (at 3e-3 it diverged); static_training: of the control, whose numbers act alone.
    """

    window: int = 256
    token: GeneratorSize = _LATER_MAPS
    static: GeneratorSize = _LATER_MAPS
    training: ConversationTraining = ConversationTraining(3890, 8, 5e-4, (1, 2, 3, 4, 6), 4)
    static_training: ConversationTraining = ConversationTraining(150, 8, 1e-2, (1, 2, 3, 4, 6), 4, 15)


_WRITTEN_MAPS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class LaterPairSizes:
    """One gradient step in an adapter of the last blocks of a transformer that others trained (SmolLM2-135M); the
    defaults are the cpu profile's.

    Attributes:
        adapter: of the last 8 of 30 blocks: 32 maps, 1.6 M numbers.
        passages: its meta-training on passages with several questions each; people: on characters.
    """

    adapter: LaterAdapterSize = LaterAdapterSize(32, _WRITTEN_MAPS, 300.0, tuple(range(22, 30)))
    passages: SharedPairTraining = SharedPairTraining(800, 16, 5e-4, warmup=40)
    people: SharedPairTraining = SharedPairTraining(300, 16, 5e-4, warmup=30)


@dataclass(frozen=True)
class Profile:
    """All sizes of one profile.

    Attributes:
        transformer_training: of the transformer that the dialogues' model is compared with, of `pairs`' size; as `lm`,
            with distances as long as it is to look back, because it does not look further than it was trained to.
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
    models_of: str | None = None
    forgetting: Forgetting = Forgetting()
    suite: SuiteSizes = SuiteSizes()
    open: OpenSizes = OpenSizes()
    conversations: ConversationSizes = ConversationSizes()
    later: LaterPairSizes = LaterPairSizes()
