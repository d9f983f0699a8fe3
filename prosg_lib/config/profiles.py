"""Profiles: sizes only, never another code path.

`smoke` trains everything in minutes, `cpu` is what is shipped, `gpu` evaluates the same models on more items and at
larger distances than two CPU cores have time for. `paper` is `cpu` with the second paper's sizes for pairs of context
and query, where they are public: batch 16, inner learning rate 1e-3, one epoch, all of SQuAD and WikiText, on a model
of the hub (parameter `model` of notebook 07). Their outer optimiser, rank and maps are not public.
"""

from __future__ import annotations

from dataclasses import replace

from prosg_lib.config.sizes import (
    TASKS,
    VOCAB,
    AdapterSize,
    ConversationSizes,
    ConversationTraining,
    Evaluation,
    Forgetting,
    GeneratorSize,
    LaterPairSizes,
    Mamba2Size,
    OpenSizes,
    OpenStudy,
    PairSizes,
    PairTraining,
    PretrainedSizes,
    ProbeSize,
    Profile,
    RWKV4Config,
    RWKV7Config,
    SharedPairTraining,
    StateSize,
    SuiteSizes,
    SupervisedSize,
    Training,
    TransformedSize,
    TransformerConfig,
)
from prosg_lib.errors import UserError

_MAPS = ("att.output", "att.value", "ffn.key", "ffn.value")
_ALL_FACTS = (3, 6, 12, 24)
_EPOCH = PairTraining(0, 16, 1e-4)
_SMALL_TESTS = Forgetting(4, (1, 5), ((64, 4), (128, 8)), (3, 5), (64, 128), (0.0, 0.5, 1.0))
# As long as the project's transformer has places for, which reads the memory twice.
_SWEEP = Forgetting(
    200,
    copy=(1, 2, 5, 10, 20, 30, 40, 50, 75, 100),
    phonebook=(3, 5, 10, 20, 50),
    passkey=(64, 256, 512, 1024, 1536),
)

PROFILES = {
    "smoke": Profile(
        name="smoke",
        model=RWKV4Config(VOCAB, 64, 2, 256),
        lm=Training(240, 16, 6e-3, (2, 3, 4), (0, 16, 32), warmup=20),
        token=GeneratorSize(8, 64, _MAPS),
        token_training=Training(60, 16, 4e-3, (3, 6), (0, 32), warmup=10),
        final=GeneratorSize(8, 64, ("att.output", "ffn.value")),
        final_training=Training(60, 16, 4e-3, (3, 6), (0, 32), warmup=10),
        static_training=Training(20, 16, 4e-3, (3, 6), (0, 32), warmup=10),
        adapter=AdapterSize(8, _MAPS, 100.0),
        adapter_training=Training(10, 8, 3e-3, (3,), (0, 32), warmup=5),
        evaluation=Evaluation(4, 4, 3, (0, 1, 2), (0, 64, 256), (3, 6), trainings=(0, 1)),
        pairs=PairSizes(
            TransformerConfig("llama", VOCAB, 64, 2, 192, 2),
            PairTraining(40, 16, 3e-3),
            PairTraining(40, 16, 3e-3),
            PairTraining(4, 8, 1e-3, warmup=2),
            adapter=PairTraining(20, 8, 3e-3, warmup=5),
            recurrent_adapter=PairTraining(20, 8, 3e-3, warmup=5),
            weights=PairTraining(4, 4, 1e-3, warmup=2),
            low_rank=PairTraining(4, 4, 1e-2, warmup=2),
            generator=PairTraining(20, 8, 3e-3, warmup=5),
            maps=PairTraining(4, 4, 1e-3, warmup=2),
            repeats=2,
            maps_after=PairTraining(4, 4, 1e-3, warmup=2),
            questions=PairTraining(4, 4, 1e-3, warmup=2),
            items=20,
            fewer=8,
            seeds=(0,),
            many=(2,),
            tasks=TASKS[:2],
        ),
        pretrained=PretrainedSizes(
            Mamba2Size(VOCAB, 32, 2, 2, 16),
            Training(20, 8, 6e-3, (2, 3), (0, 16), warmup=5),
            4,
            Training(10, 8, 4e-3, (3,), (0, 32), warmup=5),
            prompts=3,
            distances=(0, 64),
            together=(1, 2),
        ),
        transformer_training=Training(40, 16, 3e-3, (2, 3, 4), (0, 32, 64), warmup=20),
        forgetting=_SMALL_TESTS,
        suite=SuiteSizes(*4 * (PairTraining(20, 8, 3e-3, warmup=5),), longest=150, practice=_SMALL_TESTS),
        supervised=SupervisedSize(8, 64, _MAPS),
        mend=TransformedSize(8, 20, _MAPS),
        open=OpenSizes(
            RWKV4Config(VOCAB, 64, 2, 256),
            RWKV7Config(VOCAB, 64, 2, 256, 16, 8, 8, 4, 16),
            Training(40, 16, 6e-3, (2, 3, 4), (0, 16, 64), warmup=10),
            GeneratorSize(8, 64, _MAPS),
            StateSize(8, 64, _MAPS, terms=8, term=16),
            ProbeSize(64),
            *3 * (Training(20, 16, 4e-3, (3, 6), (0, 64), warmup=5),),
            OpenStudy(
                prompts=2,
                fewer=2,
                natural=4,
                facts=3,
                many=(3, 6),
                distances=(0, 32, 64),
                far=128,
                scales=(0.0, 1.0),
                turns=8,
                instructed=4,
            ),
        ),
        conversations=ConversationSizes(
            training=ConversationTraining(4, 2, 1e-3, (1, 2), 2, warmup=2),
            static_training=ConversationTraining(4, 2, 1e-3, (1, 2), 2, warmup=2),
        ),
        later=LaterPairSizes(
            passages=SharedPairTraining(2, 4, 1e-3, warmup=1), people=SharedPairTraining(2, 4, 1e-3, warmup=1)
        ),
    ),
    "cpu": Profile(
        name="cpu",
        model=RWKV4Config(VOCAB, 128, 4, 512),
        lm=Training(2000, 32, 3e-3, (2, 3, 4, 6, 6, 8), (0, 0, 16, 32, 64, 128)),
        token=GeneratorSize(32, 256, _MAPS),
        token_training=Training(1200, 48, 2e-3, (3, 6, 12, 24, 24), (0, 64, 256, 512), warmup=150),
        final=GeneratorSize(8, 128, ("att.output", "ffn.value")),
        final_training=Training(500, 48, 2e-3, (3, 6, 6, 12, 24), (0, 32, 64, 256), warmup=50),
        static_training=Training(100, 48, 2e-3, (3, 6, 6, 12, 24), (0, 32, 64, 256), warmup=50),
        adapter=AdapterSize(32, _MAPS, 100.0),
        adapter_training=Training(500, 16, 1e-2, (3, 6), (0, 64), warmup=30),
        evaluation=Evaluation(24, 12, 24, (0, 1, 2, 3, 4), (0, 64, 128, 256, 512, 1024, 4096), _ALL_FACTS),
        pairs=PairSizes(
            TransformerConfig("llama", VOCAB, 128, 4, 384, 4),
            PairTraining(2000, 32, 3e-3),
            PairTraining(3500, 32, 3e-3, (1, 1, 4, 16)),
            PairTraining(600, 32, 1e-3, warmup=20),
            adapter=PairTraining(400, 16, 1.5e-2),
            recurrent_adapter=PairTraining(800, 16, 1.5e-2),
            weights=PairTraining(500, 16, 2e-3),
            low_rank=PairTraining(600, 8, 1e-2),
            generator=PairTraining(400, 32, 2e-3),
            maps=PairTraining(700, 32, 1e-3, warmup=20),
            repeats=200,
            maps_after=PairTraining(500, 16, 1e-3, warmup=20),
            questions=PairTraining(0, 8, 1e-3, warmup=10),
            rank_one=PairTraining(1200, 8, 1e-2),
        ),
        pretrained=PretrainedSizes(
            Mamba2Size(VOCAB, 128, 4, 4, 32),
            Training(1200, 32, 3e-3, (2, 3, 4, 6, 6, 8), (0, 0, 16, 32, 64, 128)),
            32,
            Training(1500, 32, 2e-3, (3, 6), (0, 64, 256), warmup=50),
            prompts=24,
            distances=(0, 256, 1024),
        ),
        transformer_training=Training(
            2000, 32, 3e-3, (2, 3, 4, 6, 6, 8), (0, 0, 16, 32, 64, 128, 0, 0, 16, 32, 64, 128, 256, 512, 1024)
        ),
        supervised=SupervisedSize(32, 256, _MAPS),
        mend=TransformedSize(32, 42, _MAPS),
    ),
}

PROFILES["gpu"] = replace(
    PROFILES["cpu"],
    name="gpu",
    models_of="cpu",
    evaluation=replace(
        PROFILES["cpu"].evaluation,
        other_prompts=24,
        distances=(0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    ),
    pairs=replace(PROFILES["cpu"].pairs, fewer=500),
    pretrained=replace(PROFILES["cpu"].pretrained, prompts=64, distances=(0, 256, 1024, 4096)),
    forgetting=_SWEEP,
)

PROFILES["paper"] = replace(
    PROFILES["cpu"],
    name="paper",
    models_of="cpu",
    pairs=replace(
        PROFILES["cpu"].pairs,
        adapter=_EPOCH,
        weights=replace(_EPOCH, lr=1e-5),
        low_rank=_EPOCH,
        rank_one=None,
        maps=replace(_EPOCH, lr=1e-5),
        repeats=0,
        maps_after=replace(_EPOCH, lr=1e-5),
        questions=replace(_EPOCH, lr=1e-5),
        adapter_lr=0.1,  # times the adapter's own scale, twice: 1e-3
        weights_lr=1e-3,
        maps_lr=1e-5,  # for a sum over a hundred tokens, where theirs is a mean
        at_once=1,
        fewer=500,
        context=1024,
        query=256,
        words=None,
        hub=True,
    ),
)


def get_profile(name: str | Profile) -> Profile:
    """The profile of that name; a profile itself is returned as it is, so that a notebook's cell can run twice.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(name, Profile):
        return name
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
