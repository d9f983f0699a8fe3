"""Sixteen users in one batch, each with a memory of their own: our deltas against PEFT's mixed batch of adapters.

Both run the same RWKV-4 of this project, weights and code, token by token from the same state; `RwkvForCausalLM` of
transformers cannot be used, because its batches of single tokens are wrong. Ours changes it by one LowRankDelta of
batch 16; PEFT wraps a copy of it with the same 16 changes as 16 LoRA adapters, and takes `adapter_names`, one a
sequence. That both compute the same is checked by the logits of every token.

Measured on the shipped model with the deltas that its generator makes of 16 prompts (rank 32, all four kinds of maps),
and, without a goal, at 12 layers x 768 with random weights and rank 8 on two maps a layer: there, on a CPU, both spend
most of their time in the model's own matrix products. Prints a table, and one JSON line last: ratios are our tokens a
second over PEFT's.

    python benchmarks/mixed_deltas.py [--tokens 40] [--keep]
"""

import copy
import statistics
import time

import decode
import peft
import result
import torch

from prosg_lib.backbones.loading import load_model
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.tasks.dialogue import Shape, load_dialogues
from prosg_lib.training.checkpoints import load_generator

GOALS = {"shipped": 3.0}
BATCH, WARM_UP = 16, 5


def shipped(device: torch.device) -> tuple[RWKV4, LowRankDelta]:
    lm = load_model("rwkv4-dialogue").to(device)
    generator = load_generator("rwkv4-dialogue-token", lm).to(device)
    items = load_dialogues("validation", 0).items(BATCH, Shape(6, 0, 1))
    return lm, generator.memorize(lm, [item.prompt for item in items])


def large(device: torch.device) -> tuple[RWKV4, LowRankDelta]:
    lm = decode.model(device)
    return lm, decode.deltas(lm, BATCH)


def with_peft(lm: RWKV4, delta: LowRankDelta) -> peft.PeftModel:
    """A copy of the model with one adapter a sequence, "0" to "15"."""
    base = copy.deepcopy(lm, {id(lm.tokenizer): lm.tokenizer})
    config = peft.LoraConfig(r=delta.rank, lora_alpha=delta.rank, target_modules=list(delta.factors))
    wrapped = peft.PeftModel(base, config, adapter_name="0")
    for i in range(BATCH):
        if i:
            wrapped.add_adapter(str(i), config)
        tensors = {}
        for name, (u, v) in delta.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = v[i % len(v)].t()
            tensors[f"base_model.model.{name}.lora_B.weight"] = delta.scale * u[i]
        peft.set_peft_model_state_dict(wrapped, tensors, adapter_name=str(i))
    return wrapped.eval()


@torch.no_grad()
def measure(lm: RWKV4, delta: LowRankDelta, tokens: int) -> dict[str, float]:
    """Median seconds of one token for each of the 16 sequences."""
    theirs, change, names = with_peft(lm, delta), applied(lm, delta), [str(i) for i in range(BATCH)]

    def ours_step(ids, state):
        with change:
            hidden, state = lm.step_through(ids, state, None)
        return lm.read_out(hidden), state

    def theirs_step(ids, state):
        return theirs(ids, state, adapter_names=names)

    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, lm.config.vocab, (BATCH, 8), generator=g).to(next(lm.parameters()).device)
    logits, state = ours_step(ids, None)
    states, seconds = {ours_step: state, theirs_step: state}, {ours_step: [], theirs_step: []}
    assert (logits - lm(ids)[0]).abs().max() > 0.1, "the deltas change nothing"
    for _ in range(WARM_UP + tokens):
        ids, said = logits[:, -1:].argmax(-1), {}
        for step, taken in seconds.items():
            start = time.perf_counter()
            said[step], states[step] = step(ids, states[step])
            if ids.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        logits = said[ours_step]
        torch.testing.assert_close(said[theirs_step], logits, rtol=1e-3, atol=1e-3)
    return {step.__name__: statistics.median(taken[WARM_UP:]) for step, taken in seconds.items()}


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=40, help="measured tokens each (default: 40)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'model':>8} {'ours tokens/s':>14} {'PEFT tokens/s':>14} {'ratio':>6} {'goal':>5}", flush=True)
    ratios = {}
    for name, setting in (("shipped", shipped), ("12x768", large)):
        taken = measure(*setting(device), arguments.tokens)
        rates = [BATCH / taken[step] for step in ("ours_step", "theirs_step")]
        ratios[name] = rates[0] / rates[1]
        print(
            f"{name:>8} {rates[0]:>14.0f} {rates[1]:>14.0f} {ratios[name]:>6.2f} {GOALS.get(name, ''):>5}", flush=True
        )
    result.finish(ratios, GOALS, lower_is_better=False, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
