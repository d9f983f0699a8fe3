"""Forward and backward of RWKV-7's delta rule: chunk-parallel against the recurrence, token by token.

Same inputs, same float32, in one process, measured in turn so that a slow moment of the machine meets both. Prints a
table, and one JSON line last: ratios are the recurrence's seconds over ours.

    python benchmarks/wkv7.py [--rounds 5] [--keep]
"""

import math
import statistics
import time

import result
import torch
from torch import Tensor
from torch.nn.functional import normalize

from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.wkv7 import wkv7_chunked, wkv7_recurrent

GOALS = {"16x256": 8, "4x1024": 8}
WARM_UP = 2
HEADS, SIZE = 2, 64  # a width of 128


def inputs(batch: int, length: int, device: torch.device) -> list[Tensor]:
    """r, w, k, v, kappa and a, (B, T, H, N), as a model makes them."""
    g = torch.Generator().manual_seed(0)
    r, w, k, v, kappa, a = torch.randn(6, batch, length, HEADS, SIZE, generator=g)
    tensors = r, -math.exp(-0.5) * torch.sigmoid(w - 2), k, v, normalize(kappa, dim=-1), torch.sigmoid(a)
    return [t.to(device).requires_grad_() for t in tensors]


def step(form, tensors: list[Tensor]) -> tuple[float, Tensor]:
    """Seconds of one forward and backward pass, and the outputs."""
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out, state = form(*tensors)
    torch.autograd.grad(out.sum() + state.sum(), tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, out.detach()


def measure(batch: int, length: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Median seconds, ours and the recurrence's."""
    tensors, forms = inputs(batch, length, device), (wkv7_chunked, wkv7_recurrent)
    ours, theirs = (step(form, tensors)[1] for form in forms)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), "not the same outputs"
    seconds = [[step(form, tensors)[0] for form in forms] for _ in range(WARM_UP - 1 + rounds)][WARM_UP - 1 :]
    return tuple(statistics.median(times) for times in zip(*seconds, strict=True))


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured passes each (default: 5)")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'tokens':>8} {'ours s':>9} {'by token s':>11} {'ratio':>7} {'goal':>5}", flush=True)
    ratios = {}
    for name, goal in GOALS.items():
        ours, recurrence = measure(*map(int, name.split("x")), arguments.rounds, device)
        ratios[name] = recurrence / ours
        print(f"{name:>8} {ours:>9.3f} {recurrence:>11.3f} {ratios[name]:>7.2f} {goal:>5}", flush=True)
    result.finish(ratios, GOALS, lower_is_better=False, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
