"""What `test_distributed.py` has done by one process and by two: trainings and measurements at tiny size.

accelerate launch --multi_gpu --num_processes 2 tests/training/launched.py FOLDER
"""

import contextlib
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from prosg_lib import cli, files
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config import PROFILES, get_profile, profiles
from prosg_lib.config.sizes import Evaluation, GeneratorSize, PairTraining, RWKV4Config, Training
from prosg_lib.errors import Diverged, NotFinite, UserError
from prosg_lib.evaluation.pair_evaluation import answered
from prosg_lib.evaluation.recall import answers, judged
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep
from prosg_lib.gradient_steps.map_step import MapStep
from prosg_lib.tasks import dialogue
from prosg_lib.tasks.dialogue import Dialogues
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.pair_batches import PairDraw
from prosg_lib.tasks.people import characters
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, own_sentences
from prosg_lib.text.tokenizer import load_tokenizer
from prosg_lib.training import distributed as processes
from prosg_lib.training import load_or_train, work
from prosg_lib.training.loop import Loss, fit
from prosg_lib.training.objectives import generator_draw, generator_objective, lm_draw, lm_objective
from prosg_lib.training.pair_objectives import pair_lm_objective, pair_objective

SIZES = Training(steps=20, batch=5, lr=3e-3, facts=(1, 3), distances=(0, 40), warmup=5)  # 5: two processes get 2 and 3
PAIRS = PairTraining(steps=20, batch=5, lr=3e-3, contexts=(1, 2), warmup=5)
MAPS = ("att.output", "ffn.value")
AT_ONCE = {"token": 1, "pair-lm": 2}  # of two processes; the others have all their examples in memory
STOPS = (7, 14)  # of a training that is stopped twice, and goes on with another number of processes

few = PairTraining(steps=2, batch=2, lr=1e-2)
TINY = replace(
    PROFILES["smoke"],
    name="tiny",
    model=RWKV4Config(load_tokenizer().vocab, 8, 1, 16),
    lm=replace(SIZES, steps=3),
    token=GeneratorSize(2, 8, MAPS),
    token_training=replace(SIZES, steps=3),
)
BROKEN = replace(TINY, name="broken", lm=replace(SIZES, lr=1e30))


def little_prose() -> Prose:
    """The same for every split, so that tests do not wait for the books."""
    return Prose("a little", dict.fromkeys(SPLITS, own_sentences("test")[:60]))


def dialogues(split: str, seed: int) -> Dialogues:
    tokenizer = load_tokenizer()
    return Dialogues(tokenizer, ProseTokens.of(little_prose(), split, tokenizer), split, seed)


def model(width: int = 16) -> RWKV4:
    """Small, random, and with no zeros in it."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    lm = RWKV4(RWKV4Config(tokenizer.vocab, width, 2, 2 * width))
    for weight in lm.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.5 / weight.shape[1] ** 0.5)
    lm.tokenizer = tokenizer
    return lm.requires_grad_(False).eval()


def trainings() -> dict:
    """By name: the module, step -> batch, its loss, sizes. Every objective; and no dropout, which no two processes have
    alike."""
    data, tokenizer = dialogues("train", 0), load_tokenizer()
    pairs = PairDraw({"characters": characters("test")[:40]}, tokenizer, 5, (1, 2), 0, ("characters",))
    lm, pair_lm, frozen = model().requires_grad_(True), model().requires_grad_(True), model()
    token = TokenGenerator(frozen, 4, 16, MAPS)
    token.mlp[0].p = 0.0
    adapter, maps = AdapterStep(frozen, 2, MAPS, 100.0), MapStep(frozen, 0.1)
    return {
        "lm": (lm, lm_draw(data, SIZES), lm_objective(lm), SIZES),
        "token": (token, generator_draw(data, SIZES), generator_objective(frozen, token, SIZES, 0), SIZES),
        "pair-lm": (pair_lm, pairs, pair_lm_objective(pair_lm), PAIRS),
        "adapter": (adapter, pairs, pair_objective(frozen, adapter, "LC"), PAIRS),
        "maps": (maps, pairs, pair_objective(frozen, maps, "LG"), PAIRS),
    }


def trained(name: str, folder: Path, loss_of=None, at_once: int | None = None) -> dict[str, Tensor]:
    """The weights that one of the trainings ends with, or goes on to where an earlier call had stopped."""
    module, batch_of, own_loss, sizes = trainings()[name]
    loss_of = partial(loss_of, own_loss) if loss_of else own_loss
    fit(name, module, batch_of, loss_of, sizes, folder, {"what": name}, save_every_s=0.0, at_once=at_once)
    return module.state_dict()


def stopped(name: str, folder: Path, at: int) -> None:
    """Train as far as this step, with a checkpoint right before it."""

    def loss_of(own_loss, step: int, batch: Examples) -> Loss:
        if step == at:
            raise KeyboardInterrupt
        return own_loss(step, batch)

    with contextlib.suppress(KeyboardInterrupt):
        trained(name, folder, loss_of)


def lots(folder: Path) -> list[float]:
    """A random number that was drawn in every step of a training."""
    drawn = []

    def loss_of(own_loss, step: int, batch: Examples) -> Loss:
        drawn.append(torch.rand(()).item())
        return own_loss(step, batch)

    trained("lm", folder, loss_of)
    return drawn


def diverged(folder: Path, kind: str) -> str:
    """The error of a training that breaks at step 3 in the last process alone."""

    def loss_of(own_loss, step: int, batch: Examples) -> Loss:
        loss = own_loss(step, batch)
        if step == 3 and processes.index() == processes.count() - 1:
            if kind == "raised":
                raise NotFinite("the loss of the context is inf before the step")
            return Loss(loss.total * torch.nan, loss.parts)
        return loss

    try:
        trained("lm", folder, loss_of)
    except Diverged as error:
        return str(error)
    return "it did not diverge"


def refused(folder: Path) -> str:
    """The error of a training with fewer examples a step than processes."""
    module, batch_of, loss_of, sizes = trainings()["lm"]
    try:
        fit("small", module, lambda step: batch_of(step).part(0, 1), loss_of, sizes, folder, {})
    except UserError as error:
        return str(error)
    return "it trained"


def measured():
    """Recall of dialogues, and answers to pairs."""
    lm = model()
    torch.manual_seed(1)
    token = TokenGenerator(lm, 4, 16, MAPS).eval()
    for weight in token.parameters():
        nn.init.normal_(weight, std=0.3)
    sizes = Evaluation(3, 2, 2, (0, 1), (0, 40), (2, 3))
    recall = judged(answers(lm, {"token": token}, ("base", "wrong", "none"), "test", sizes, dialogues))
    pairs = answered(lm, {"token": token}, characters("test")[:11], lm.tokenizer, batch=3)
    return recall, pairs


def main(folder: Path) -> None:
    """All of it, written by each process into a folder of its own; the last is a command that fails."""
    own = folder / f"process-{os.environ['RANK']}"
    dialogue.load_prose = work.load_prose = little_prose
    profiles.PROFILES |= {"tiny": TINY, "broken": BROKEN}
    os.environ["PROSG_RUNS"] = str(folder / "runs")
    for name in ("first", "again"):
        module = load_or_train.load_or_train("rwkv4-dialogue-token", get_profile("tiny"))
        files.save_tensors(own / f"{name}.safetensors", module.state_dict(), {})
    for name in trainings():
        weights = trained(name, folder / "whole", at_once=AT_ONCE.get(name))
        files.save_tensors(own / f"{name}.safetensors", weights, {})
    stopped("lm", folder / "stopped", STOPS[1])
    errors = {kind: diverged(folder / kind, kind) for kind in ("raised", "returned")} | {"refused": refused(folder)}
    for name, frame in zip(("recall", "pairs"), measured(), strict=True):
        frame.to_csv(own / f"{name}.csv")
    numbers = lots(folder / "lots")
    code = cli.main(["train", "rwkv4-dialogue", "--profile", "broken"])
    files.write_json(own / "done.json", {"errors": errors, "lots": numbers, "code": code})
    sys.exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
