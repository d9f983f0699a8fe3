"""The outer gradient through one inner step: exact against first-order, and against TorchOpt's.

An RWKV-4, of 4 layers x 128 on a CPU and 12 x 512 on a GPU, which smaller ones do not keep busy; the inner step changes
all its weights on a batch of contexts, the outer loss is that of as many queries of the same length. First order and
TorchOpt take them all at once. Ours takes them in pieces, and the graphs of the inner gradients wait for the outer
gradient: of all contexts but a first piece, which is run again for it ("exact"), or of all of them ("kept"). Of two
that wait the larger comes first: its second derivative is taken last, when there is room. Each way is timed in turn in
one process. Its peak memory is above what there was before the step: on a GPU that of its tensors, on a CPU of a
process of its own. Prints a table, and one JSON line last.

Goals, with all kept or not: the exact gradient takes at most 2.3 times the first-order one's time and at most twice its
memory, and no more time or memory than TorchOpt's exact one. Needs `pip install torchopt`, which nothing else here
does.

    python benchmarks/second_order.py [--rounds 7] [--keep]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial

import result
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.gradient_steps.one_step import gradient_step

LIMITS = {"first-order": {"time": 2.3, "memory": 2.0}, "torchopt": {"time": 1.0, "memory": 1.0}}
LR = 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, LAYERS, BATCH, TOKENS = {"cpu": (128, 4, 32, 256), "cuda": (512, 12, 32, 512)}[DEVICE.type]
EXACT = {  # contexts in each piece, of how many last ones the graph waits, queries at a time; a GPU's model is deeper
    "cpu": {
        "exact": {"pieces": (2, 18, 12), "kept": 2, "queries": 16},
        "kept": {"pieces": (20, 12), "kept": 2, "queries": 11},
    },
    "cuda": {
        "exact": {"pieces": (6, 26), "kept": 1, "queries": 16},
        "kept": {"pieces": (20, 12), "kept": 2, "queries": 11},
    },
}[DEVICE.type]
GOALS = {f"{kind}/{way}-over-{peer}": most for way in EXACT for peer, of in LIMITS.items() for kind, most in of.items()}


def setting() -> tuple[RWKV4, Tensor, Tensor]:
    """Model, contexts and queries, the same in every process; memory is handled as it is in training."""
    keep_freed_memory()
    torch.manual_seed(0)
    lm = RWKV4(RWKV4Config(vocab=2048, width=WIDTH, layers=LAYERS, ffn=4 * WIDTH))
    for p in lm.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    ids = torch.randint(0, 2048, (2, BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return lm.to(DEVICE).train(), *ids


def nll(model, ids: Tensor) -> Tensor:
    logits, _ = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def call(lm: RWKV4, params: Mapping[str, Tensor]):
    return lambda ids: torch.func.functional_call(lm, params, (ids,))


def first_order(lm: RWKV4, context: Tensor, query: Tensor) -> None:
    parts = [lambda params: nll(call(lm, params), context)]
    stepped = gradient_step(parts, dict(lm.named_parameters()), LR, second_order=False)
    nll(call(lm, stepped), query).backward()


def exact(lm: RWKV4, context: Tensor, query: Tensor, pieces: tuple[int, ...], kept: int, queries: int) -> None:
    def loss_of(params, ids):
        return nll(call(lm, params), ids) * (len(ids) / BATCH)

    parts = [lambda params, ids=ids: loss_of(params, ids) for ids in context.split(pieces)]
    stepped = gradient_step(parts, dict(lm.named_parameters()), LR, kept=kept)
    # The outer gradient at the stepped weights adds up piece by piece, and goes through the step once.
    ends = {name: t.detach().requires_grad_() for name, t in stepped.items()}
    for ids in query.split(queries):
        loss_of(ends, ids).backward()
    torch.autograd.backward(list(stepped.values()), [t.grad for t in ends.values()])


def torchopts(lm: RWKV4, context: Tensor, query: Tensor) -> None:
    import torchopt

    before = torchopt.extract_state_dict(lm, by="reference", detach_buffers=True)
    torchopt.MetaSGD(lm, lr=LR).step(nll(lm, context))
    loss = nll(lm, query)
    torchopt.recover_state_dict(lm, before)
    loss.backward()


WAYS = {
    "first-order": first_order,
    **{way: partial(exact, **how) for way, how in EXACT.items()},
    "torchopt": torchopts,
}


def outer_gradient(way: str, lm: RWKV4, context: Tensor, query: Tensor) -> Tensor:
    """The whole outer gradient as one vector."""
    lm.zero_grad(set_to_none=True)
    WAYS[way](lm, context, query)
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


def peak_bytes(way: str) -> int:
    """Peak memory of one outer gradient, above model and data; on the CPU of the whole process: run it in its own."""
    lm, context, query = setting()
    if context.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outer_gradient(way, lm, context, query)
        return torch.cuda.max_memory_allocated() - before
    outer_gradient(way, lm, context[:, :9], query[:, :9])  # what a first pass leaves behind for good
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outer_gradient(way, lm, context, query)
    unit = 1 if sys.platform == "darwin" else 1024
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def times(rounds: int) -> dict[str, float]:
    """Median seconds of one outer gradient of every way, measured in turn; the exact ones are checked to be equal.

    They may differ by a fiftieth of what tells them from the first-order one.
    """
    lm, context, query = setting()
    found = {way: outer_gradient(way, lm, context, query) for way in WAYS}
    curvature = (found["torchopt"] - found["first-order"]).norm()
    for way in EXACT:
        apart = (found["torchopt"] - found[way]).norm() / curvature
        assert apart < 0.02, f"TorchOpt has another gradient than {way}: they are {apart:.1e} of the curvature apart"
    seconds = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, taken in seconds.items():
            start = time.perf_counter()
            outer_gradient(way, lm, context, query)
            if context.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def main() -> None:
    parser = result.parser(__doc__, needs=["torchopt"])
    parser.add_argument("--rounds", type=int, default=7, help="measured gradients each (default: 7)")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak_bytes(arguments.peak_of))
        return
    memory = {}
    for way in WAYS:
        if DEVICE.type == "cuda":
            peak_bytes(way)  # what a first pass leaves behind for good
            memory[way] = peak_bytes(way)
            continue
        done = subprocess.run([sys.executable, __file__, "--peak-of", way], check=True, capture_output=True, text=True)
        memory[way] = int(done.stdout.split()[-1])
    seconds = times(arguments.rounds)
    print(f"{'':>12} {'seconds':>8} {'MB':>7}")
    for way in WAYS:
        print(f"{way:>12} {seconds[way]:>8.3f} {memory[way] / 1e6:>7.0f}")
    ratios = {
        f"{kind}/{way}-over-{peer}": values[way] / values[peer]
        for kind, values in (("time", seconds), ("memory", memory))
        for way in EXACT
        for peer in LIMITS
    }
    result.finish(ratios, GOALS, lower_is_better=True, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
