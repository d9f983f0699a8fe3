"""Time to take in a prompt: ProSG's two generators, forward only, against one real gradient step.

The same frozen RWKV-4 (4 layers, width 128), the same maps, the same rank; one prompt at a time, measured in turn in
one process, and the most memory that it takes, counted. Both ways end with a LowRankDelta and the state after the
prompt. Prints a table, and one JSON line last: ratios are the gradient step's seconds over the generator's, and its
memory over the generator's, for which there is no goal.

    python benchmarks/absorb.py [--rounds 30] [--keep]
"""

import statistics
import time

import result
import torch

from prosg_lib.backbones.memory import keep_freed_memory, peak_bytes
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.profiles import get_profile
from prosg_lib.generators.base import Generator
from prosg_lib.generators.final_state import FinalStateGenerator
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.gradient_steps.adapter_step import AdapterStep

LENGTHS = (32, 128, 512)
GOALS = {f"{kind}/{length}": 2.5 for kind in ("token", "final") for length in LENGTHS[1:]}
WARM_UP = 3


def ways() -> tuple[RWKV4, dict[str, Generator]]:
    """The model and the three ways, untrained: a trained one takes the same time."""
    torch.manual_seed(0)
    sizes = get_profile("cpu")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = RWKV4(sizes.model).eval().requires_grad_(False).to(device)
    rank, width, maps = sizes.token.rank, sizes.token.width, sizes.token.maps
    found = {
        "token": TokenGenerator(lm, rank, width, maps),
        "final": FinalStateGenerator(lm, sizes.final.rank, sizes.final.width, sizes.final.maps),
        "step": AdapterStep(lm, rank, maps, 1.0),
    }
    return lm, {name: way.to(device).eval() for name, way in found.items()}


def measure(length: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and peak bytes of each way for one prompt of so many tokens."""
    lm, found = ways()
    prompt = torch.randint(0, lm.config.vocab, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    seconds = {name: [] for name in found}
    for number in range(WARM_UP + rounds):
        for name, way in found.items():
            start = time.perf_counter()
            way.memorize(lm, [prompt])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    memory = {name: peak_bytes(lambda way=way: way.memorize(lm, [prompt])) for name, way in found.items()}
    return {name: (statistics.median(taken), memory[name]) for name, taken in seconds.items()}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="measured prompts each (default: 30)")
    arguments = parser.parse_args()
    keep_freed_memory()
    names = ("token", "final", "step")
    print(f"{'tokens':>7} " + " ".join(f"{f'{n} {unit}':>9}" for unit in ("ms", "MB") for n in names), flush=True)
    ratios = {}
    for length in LENGTHS:
        taken = measure(length, arguments.rounds)
        columns = [taken[n][0] * 1e3 for n in names] + [taken[n][1] / 1e6 for n in names]
        print(f"{length:>7} " + " ".join(f"{value:>9.1f}" for value in columns), flush=True)
        for kind in ("token", "final"):
            ratios[f"{kind}/{length}"] = taken["step"][0] / taken[kind][0]
            ratios[f"memory/{kind}/{length}"] = taken["step"][1] / taken[kind][1]
    result.finish(ratios, GOALS, lower_is_better=False, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
