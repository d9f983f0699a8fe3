"""Profiles: the sizes of everything that is trained and measured, as plain data. Nothing here imports torch."""

from prosg_lib.config.profiles import PROFILES, get_profile
from prosg_lib.config.sizes import (
    TASKS,
    VOCAB,
    AdapterSize,
    Evaluation,
    Forgetting,
    GeneratorSize,
    PairSizes,
    PairTraining,
    PretrainedSizes,
    Profile,
    RWKV4Config,
    Study,
    SuiteSizes,
    SupervisedSize,
    Training,
    TransformedSize,
    TransformerConfig,
)

__all__ = [
    "PROFILES",
    "TASKS",
    "VOCAB",
    "AdapterSize",
    "Evaluation",
    "Forgetting",
    "GeneratorSize",
    "PairSizes",
    "PairTraining",
    "PretrainedSizes",
    "Profile",
    "RWKV4Config",
    "Study",
    "SuiteSizes",
    "SupervisedSize",
    "Training",
    "TransformedSize",
    "TransformerConfig",
    "get_profile",
]
