"""Load or train a transformer of the dialogues: what recall a model has that looks back at its prompt, at what cost.

`stages` does the same for the recurrent models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from prosg_lib.backbones.hub_transformer import CachedTransformer, CausalTransformer, new_llama
from prosg_lib.config.sizes import PairTraining, Profile, Training
from prosg_lib.tasks.dialogue import data_hash
from prosg_lib.tasks.pair_batches import echoed
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import distributed, stages
from prosg_lib.training.loop import RECIPE
from prosg_lib.training.objectives import lm_draw, lm_objective
from prosg_lib.training.pair_objectives import pair_lm_objective
from prosg_lib.training.pair_stages import ECHOES
from prosg_lib.training.stages import PLENTY, Thrift


def checkpoint_name(profile: Profile) -> str:
    """`llama-dialogue` is the cpu profile's."""
    return "llama-dialogue" + stages.ending(profile)


def dialogue_transformer(
    profile: Profile, seed: int = 0, retrain: bool = False, thrift: Thrift = PLENTY
) -> CachedTransformer:
    """A transformer of the recurrent model's width and layers, trained on the dialogues as that is.

    The first steps are random tokens said twice instead: on dialogues alone it learned in 700 steps of 32 what answers
    look like, and not to look them up (1.6 nats an answer's token, where the recurrent model had 0.2).

    Args:
        retrain, thrift: as in `stages.load_or_train`.
    Returns:
        The model in evaluation mode, with its tokenizer; keys and values are its state.
    Raises:
        UserError: unknown profile; damaged checkpoint; diverged training.
    """
    sizes = profile
    size, training = sizes.pairs.transformer_size, sizes.transformer_training
    record = {
        "stage": "transformer",
        "seed": seed,
        "recipe": RECIPE,
        "data": data_hash(load_tokenizer()),
        "model": asdict(size),
        "training": asdict(training),
        "echoes": ECHOES,
    }

    def work(model):
        data = stages.dialogues("train", seed)
        model.tokenizer = data.tokenizer
        # Fused: a second derivative is not needed here, and eager attention takes three times as long on long texts.
        model.model.set_attn_implementation("sdpa")
        draw, loss_of = lm_draw(data, training), lm_objective(model, distributed.bfloat16(sizes.autocast))
        return copying_first(model, training, seed, draw, loss_of)

    plan = stages.Plan(
        "transformer",
        checkpoint_name(profile),
        "lm",
        stages.plain(record),
        lambda: new_llama(size),
        work,
        training,
        seed,
        thrift=thrift,
    )
    return stages.obtain(plan, profile, retrain).with_kv_cache()


def copying_first(
    model: CausalTransformer, training: Training | PairTraining, seed: int, draw: Callable, loss_of: Callable
) -> tuple[Callable, Callable]:
    """A transformer's work, step -> batch and (step, batch) -> Loss, with random tokens said twice in its first steps.

    Args:
        draw, loss_of: the work without them.
    """
    echoes, vocab, loss_of_echo = int(ECHOES * training.steps), model.tokenizer.vocab, pair_lm_objective(model)

    def batch_of(step):
        return echoed(training.batch, vocab, f"{seed}/{step}") if 0 <= step < echoes else draw(step)

    return batch_of, lambda step, batch: (loss_of_echo if step < echoes else loss_of)(step, batch)
