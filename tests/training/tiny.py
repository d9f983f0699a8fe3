"""The profile `tiny`: everything that can be trained, in seconds; and what every objective promises."""

from dataclasses import replace

import torch
from torch.testing import assert_close

from prosg_lib.config import PROFILES
from prosg_lib.config.sizes import (
    VOCAB,
    AdapterSize,
    ConversationSizes,
    ConversationTraining,
    Evaluation,
    Forgetting,
    GeneratorSize,
    LaterAdapterSize,
    LaterPairSizes,
    Mamba2Size,
    OpenSizes,
    PairTraining,
    ProbeSize,
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

STEPS = Training(steps=2, batch=2, lr=1e-2, facts=(1,), distances=(0,), warmup=1)
PAIRS = PairTraining(steps=2, batch=2, lr=1e-2, warmup=1)
MAPS = ("att.output", "ffn.key")
TALKS = ConversationTraining(steps=2, batch=2, lr=1e-2, facts=(1,), questions=2, warmup=1)
SHARED = SharedPairTraining(steps=2, batch=3, lr=1e-2, warmup=1, queries=2)
LATER = GeneratorSize(2, 8, ("o_proj", "down_proj"), layers=(1,))
SMOKE = PROFILES["smoke"]
STAGES = ("recurrent", "transformer", "reader", "adapter", "recurrent_adapter", "weights", "maps", "maps_after")
TINY = replace(
    SMOKE,
    name="tiny",
    model=RWKV4Config(VOCAB, 8, 2, 16),
    lm=STEPS,
    token=GeneratorSize(2, 8, MAPS),
    token_training=STEPS,
    final=GeneratorSize(2, 8, MAPS),
    final_training=STEPS,
    static_training=STEPS,
    adapter=AdapterSize(2, MAPS, 1.0),
    adapter_training=STEPS,
    supervised=SupervisedSize(2, 8, MAPS, lessons=0.5),
    mend=TransformedSize(2, 3, MAPS),
    transformer_training=STEPS,
    evaluation=Evaluation(1, 1, 1, (0,), (0,), (1,), trainings=(0, 2)),
    pairs=replace(
        SMOKE.pairs,
        transformer_size=TransformerConfig("llama", VOCAB, 16, 1, 32, 2),
        **dict.fromkeys(STAGES, PAIRS),
        questions=PAIRS,
        low_rank=PAIRS,
        generator=PAIRS,
        rank=2,
    ),
    pretrained=replace(SMOKE.pretrained, model=Mamba2Size(VOCAB, 16, 1, 2, 8), lm=STEPS, rank=2, token_training=STEPS),
    forgetting=Forgetting(2, (1, 3), ((64, 4),), (3,), (40,), (0.5,)),
    open=OpenSizes(
        RWKV4Config(VOCAB, 8, 2, 16),
        RWKV7Config(VOCAB, 8, 2, 16, 4, 2, 2, 2, 2),
        STEPS,
        GeneratorSize(2, 8, MAPS),
        StateSize(2, 8, MAPS, terms=2, term=4),
        ProbeSize(8),
        STEPS,
        STEPS,
        STEPS,
    ),
    conversations=ConversationSizes(200, LATER, LATER, TALKS, TALKS),
    later=LaterPairSizes(LaterAdapterSize(2, ("o_proj", "down_proj"), 1.0, (1,)), SHARED, SHARED),
    suite=SuiteSizes(*4 * (PairTraining(2, 2, 1e-3, warmup=1),), longest=150),
)


def assert_parts_add_up(loss_of, step, batch, size, parameters, **tolerance):
    """Losses, what the log says of them, and gradients of parts of `size` add up to the whole batch's."""
    parameters = list(parameters)

    def taken(parts):
        losses = [loss_of(step, part) for part in parts]
        total = sum(loss.total for loss in losses)
        named = {name: sum(loss.parts[name] for loss in losses) for name in losses[0].parts}
        return named, total, torch.autograd.grad(total, parameters, allow_unused=True)

    assert_close(taken(batch.split(size)), taken([batch]), **tolerance)
