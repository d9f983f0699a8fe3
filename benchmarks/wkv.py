"""One training step of a 4-layer, width-128 RWKV-4: chunk-parallel WKV against transformers' sequential one.

Same weights, same tokens, same float32, same AdamW, in one process, measured in turn so that a slow moment of the
machine meets both. Prints a table, and one JSON line last: ratios are their seconds over ours.

    python benchmarks/wkv.py [--rounds 7] [--keep]
"""

import statistics
import time

import result
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from prosg_lib.backbones.memory import keep_freed_memory
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.rwkv_layouts import to_hf
from prosg_lib.config.sizes import RWKV4Config

GOALS = {"16x256": 3, "4x1024": 8}
WARM_UP = 5  # steps until neither needs new pages of memory; a training has thousands of steps
SIZES = RWKV4Config(vocab=2048, width=128, layers=4, ffn=512)


def models(device: torch.device) -> tuple[RWKV4, RwkvForCausalLM]:
    """Ours and theirs with the same weights; without in-place rescaling, which training does not use anyway."""
    torch.manual_seed(0)
    ours = RWKV4(SIZES)
    for p in ours.parameters():
        if not p.any():  # a fresh model's zero matrices would make the two trivially equal
            nn.init.normal_(p, std=0.02)
    config = RwkvConfig(
        vocab_size=SIZES.vocab,
        hidden_size=SIZES.width,
        num_hidden_layers=SIZES.layers,
        intermediate_size=SIZES.ffn,
        rescale_every=0,
    )
    theirs = RwkvForCausalLM(config)
    theirs.load_state_dict(to_hf(ours))
    return ours.to(device).train(), theirs.to(device).train()


def step(model: nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward, AdamW. Returns the loss, which also waits for the device."""
    out = model(ids[:, :-1])
    logits = out[0] if isinstance(model, RWKV4) else out.logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.item()


def measure(batch: int, length: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of a step, ours and theirs."""
    pair = [(m, torch.optim.AdamW(m.parameters(), lr=1e-4)) for m in models(device)]
    ids = torch.randint(0, SIZES.vocab, (batch, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    losses = [step(model, optimiser, ids) for model, optimiser in pair]
    assert abs(losses[0] - losses[1]) < 1e-4, f"not the same model: losses {losses}"
    for _ in range(WARM_UP - 1):
        for model, optimiser in pair:
            step(model, optimiser, ids)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for times, (model, optimiser) in zip(seconds, pair, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(model, optimiser, ids)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="measured steps each (default: 7)")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training; theirs gains from it, too
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'tokens':>8} {'ours s':>9} {'theirs s':>9} {'ratio':>7} {'goal':>5}", flush=True)
    ratios = {}
    for name, goal in GOALS.items():
        ours, theirs = measure(*map(int, name.split("x")), arguments.rounds, device)
        ratios[name] = theirs / ours
        print(f"{name:>8} {ours:>9.3f} {theirs:>9.3f} {theirs / ours:>7.2f} {goal:>5}", flush=True)
    result.finish(ratios, GOALS, lower_is_better=False, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
