"""Time of one decoding step with a change in the weights, over that of the plain model.

RWKV-4 of the sizes of its published 169M model (12 layers x 768, vocabulary 50,277) with random weights; a delta of
rank 8 on two maps a layer, another one for every sequence. Both are streamed by `LanguageModel.stream`, as users do,
and take their tokens in turn in one process. Prints a table, and one JSON line last: ratios are the changed model's
seconds over the plain one's.

    python benchmarks/decode.py [--tokens 60] [--keep]
"""

import statistics
import time

import result
import torch

from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.config.sizes import RWKV4Config
from prosg_lib.deltas.low_rank import Factors, LowRankDelta, map_shape

GOALS = {"batch-1": 1.15, "batch-16": 1.25}
SIZES = RWKV4Config(vocab=50277, width=768, layers=12, ffn=3072)
RANK, MAPS = 8, ("att.output", "ffn.value")
WARM_UP = 5


def model(device: torch.device) -> RWKV4:
    torch.manual_seed(0)
    lm = RWKV4(SIZES)
    for p in lm.parameters():
        if not p.any():  # a fresh model's zero matrices would let nothing through
            torch.nn.init.normal_(p, std=0.02)
    return lm.to(device).eval().requires_grad_(False)


def deltas(lm: RWKV4, batch: int) -> LowRankDelta:
    """One change a sequence, strong enough to change what is said."""
    factors = {
        name: Factors(*(torch.randn(batch, n, RANK, device=module.weight.device) / n**0.5 for n in map_shape(module)))
        for name, module in lm.editable().items()
        if name.endswith(MAPS)
    }
    return LowRankDelta(factors, lm.fingerprint())


def measure(lm: RWKV4, batch: int, tokens: int) -> dict[str, float]:
    """Median seconds of a step, with the change and without."""
    prompts = torch.randint(0, SIZES.vocab, (batch, 8), generator=torch.Generator().manual_seed(1)).tolist()
    ways = {"plain": None, "changed": deltas(lm, batch)}
    streams = {way: lm.stream(prompts, None, delta, WARM_UP + tokens, None) for way, delta in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in streams}
    said = {way: [] for way in streams}
    for _ in range(WARM_UP + tokens):
        for way, stream in streams.items():
            start = time.perf_counter()
            said[way].append(next(stream).tolist())  # which also waits for the device
            seconds[way].append(time.perf_counter() - start)
    assert said["plain"] != said["changed"], "the change changes nothing"
    return {way: statistics.median(taken[WARM_UP:]) for way, taken in seconds.items()}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=60, help="measured steps each (default: 60)")
    arguments = parser.parse_args()
    lm = model(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{'batch':>9} {'plain ms':>9} {'changed ms':>11} {'ratio':>6} {'goal':>5}", flush=True)
    ratios = {}
    for name, goal in GOALS.items():
        taken = measure(lm, int(name.split("-")[1]), arguments.tokens)
        ratios[name] = taken["changed"] / taken["plain"]
        shown = (taken["plain"] * 1e3, taken["changed"] * 1e3, ratios[name], goal)
        print("{:>9} {:>9.1f} {:>11.1f} {:>6.2f} {:>5}".format(name, *shown), flush=True)
    result.finish(ratios, GOALS, lower_is_better=True, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
