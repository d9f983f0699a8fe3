"""Whether torch.compile pays for the training steps here: the first call's time, and later ones' against plain PyTorch.

Three steps of the cpu profile's model (4 layers, width 128): the language model's on texts of one length; the same on
batches as training draws them, each of other lengths, with the blocks compiled for any length; and the token-wise
generator's, so compiled. Each is measured in turn with the plain one, on the same weights, and must have its gradient.
Prints a table, and one JSON line last: ratios are plain seconds over compiled ones, after the first calls. Compiling
needs a C++ compiler, and takes most of the half hour that this runs on one core.

It does not pay, so the training has no option for it: on a processor's core the ratios were 1.2, 0.4 and 0.7, after
minutes of compiling each. The WKV sums take one of several ways by a number (`wkv_chunked`), which cuts each block's
graph in two; code for any length is slower than PyTorch's own for this one; and the hooks that read maps' inputs and
add a change to them were other functions at every step, for which blocks were compiled anew until the compiler gave up.
(Since then, blocks run as they are written while there are hooks: `deltas.applying.as_written`.)

    python benchmarks/compile.py [--rounds 5] [--keep]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import result
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config import get_profile
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import load_dialogues
from prosg_lib.training.distributed import device
from prosg_lib.training.objectives import generator_draw, generator_objective, lm_draw, lm_objective

GOALS = {"one length": 1.5, "as drawn": 1.5, "generator": 1.5}
BATCH, TOKENS, BATCHES = 16, 256, 6


def model() -> RWKV4:
    torch.manual_seed(0)
    lm = RWKV4(get_profile("cpu").model)
    for weight in lm.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    return lm.to(device())


def one_length(compiled: bool):
    """The whole loss, compiled as one function."""
    lm = model()
    ids = torch.randint(0, lm.config.vocab, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device())

    def loss_of(number: int) -> Tensor:
        hidden, _ = lm.step_through(ids[:, :-1], None, None)
        return F.cross_entropy(lm.read_out(hidden).flatten(0, 1), ids[:, 1:].flatten())

    return lm, torch.compile(loss_of) if compiled else loss_of


def as_drawn(compiled: bool):
    """The language model's own objective; the blocks are compiled, for any length."""
    lm, sizes = model(), replace(get_profile("cpu").lm, batch=BATCH)
    draw, objective = lm_draw(load_dialogues("train", 0), sizes), lm_objective(lm)
    return _blocks_compiled(lm, lm, draw, objective, sizes.steps // 2, compiled)


def generator(compiled: bool):
    """The token-wise generator's objective, without dropout."""
    lm, profile = model().requires_grad_(False), get_profile("cpu")
    sizes = replace(profile.token_training, batch=BATCH)
    torch.manual_seed(1)
    module = TokenGenerator(lm, profile.token.rank, profile.token.width, profile.token.maps).to(device()).eval()
    draw, objective = (
        generator_draw(load_dialogues("train", 0, True), sizes),
        generator_objective(lm, module, sizes, 0),
    )
    return _blocks_compiled(module, lm, draw, objective, sizes.steps // 2, compiled)


def _blocks_compiled(module, lm: RWKV4, draw: Callable, objective: Callable, first: int, compiled: bool):
    batches = [draw(first + number).to(device()) for number in range(BATCHES)]
    if compiled:
        for block in lm.blocks:
            block.compile(dynamic=True)
    return module, lambda number: objective(first + number, batches[number]).total


def step(module: nn.Module, loss_of: Callable[[int], Tensor], number: int) -> tuple[float, Tensor]:
    """Seconds of forward and backward pass, and the whole gradient."""
    module.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss_of(number).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return taken, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def measure(setting: Callable, rounds: int) -> tuple[float, float, float]:
    """Seconds of the compiled first calls, one a batch, together; and the mean of later ones, plain and compiled.

    Raises:
        AssertionError: the compiled step has another gradient.
    """
    torch.compiler.reset()
    torch.compiler.config.force_disable_caches = True  # or a second run would find the first one's work on the disk
    ways = [setting(False), setting(True)]
    first = 0.0
    for number in range(BATCHES):
        (_, plain), (taken, compiled) = (step(*way, number) for way in ways)
        apart = (plain - compiled).norm() / plain.norm()
        assert apart < 1e-3, f"another gradient: relative difference {apart:.1e}"
        first += taken
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for number in range(BATCHES):
            for taken, way in zip(seconds, ways, strict=True):
                taken.append(step(*way, number)[0])
    return first, *map(statistics.median, seconds)


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help=f"measured rounds of {BATCHES} batches each (default: 5)")
    arguments = parser.parse_args()
    keep_freed_memory()
    print(f"{'':>12} {'first s':>8} {'plain s':>8} {'compiled s':>10} {'ratio':>6}", flush=True)
    ratios = {}
    for name, setting in zip(GOALS, (one_length, as_drawn, generator), strict=True):
        try:
            first, plain, compiled = measure(setting, arguments.rounds)
        except Exception as error:  # what breaks is a result, too; it may be the compiler's or the model's own error
            ratios[name] = 0.0
            print(f"{name:>12} does not work: {type(error).__name__}: {str(error).splitlines()[0]:.100}", flush=True)
        else:
            ratios[name] = plain / compiled
            print(f"{name:>12} {first:>8.1f} {plain:>8.3f} {compiled:>10.3f} {plain / compiled:>6.2f}", flush=True)
    result.finish(ratios, GOALS, lower_is_better=False, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
