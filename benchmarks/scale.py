"""What a training step takes, counted: memory and operations, and so what fits which GPU; and what the count is worth.

Counted for the training of a language model, and of a token-wise generator for it, with an RWKV-4 of any size: bytes
of weights, gradients, optimiser, activations (kept, or blocks run again), the state, the change of the weights; and
floating point operations. The same is measured on this machine at sizes that it can run, with the project's own
objectives: memory from the allocator, operations by PyTorch's counter. Tables show counted over measured; the ratios
in the last line are how far that is from 1, at worst.

What fits is counted and was not run: it holds as far as the ratios do, in float32, with a tenth of the memory free.
Prints three tables, and one JSON line last.

    python benchmarks/scale.py [--keep]
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import result
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prosg_lib.backbones.memory import keep_freed_memory, peak_bytes
from prosg_lib.backbones.recompute import recomputed
from prosg_lib.backbones.rwkv4 import RWKV4
from prosg_lib.backbones.wkv import CHUNK
from prosg_lib.config import get_profile
from prosg_lib.config.sizes import RWKV4Config, Training
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.dialogue import ANSWER, TEXT, DialogueBatch
from prosg_lib.training.objectives import generator_objective, lm_objective

FLOAT = 4  # bytes
READ_OUT = 0.3  # share of the text that the objectives read out
MAPS = ("att.output", "att.value", "ffn.key", "ffn.value")
PUBLISHED = {
    "169M": (12, 768),
    "430M": (24, 1024),
    "1.5B": (24, 2048),
    "3B": (32, 2560),
    "7B": (32, 4096),
}
"""Layers and width of the RWKV-4 models on the Pile; the vocabulary has 50,277 tokens."""
MEASURED = (  # (vocabulary, width, layers), (batch, tokens of prompt, tokens behind it)
    ((512, 64, 2), (8, 256, 512)),
    ((16384, 64, 2), (4, 256, 256)),
    ((2048, 128, 8), (4, 512, 512)),
    ((2048, 256, 4), (4, 256, 256)),
    ((2048, 512, 4), (1, 128, 128)),
)
SMALL = (16, 128)  # rank and width of the generators that are measured
LARGE = (32, 512)  # of those whose needs are counted
GOALS = {"memory/model": 0.15, "memory/generator": 0.15, "operations/model": 0.05, "operations/generator": 0.05}
PROMPT, TEXT_BEHIND = 1024, 1024  # tokens of what is to fit
GPUS = {"16 GB": (16e9, 1), "80 GB": (80e9, 1), "8 x 80 GB": (80e9, 8)}
FREE = 0.1


@dataclass(frozen=True)
class Step:
    """One training step: of the language model, or of a token-wise generator of this rank and width for it."""

    lm: RWKV4Config
    batch: int
    prompt: int = PROMPT
    behind: int = TEXT_BEHIND
    generator: tuple[int, int] | None = None
    recompute: bool = False

    @property
    def block(self) -> int:
        """Weights of a block's linear maps."""
        return 5 * self.lm.width**2 + 2 * self.lm.width * self.lm.ffn

    def lm_weights(self) -> int:
        c = self.lm
        return c.layers * (self.block + 11 * c.width) + 2 * c.vocab * c.width + 4 * c.width

    def inputs(self) -> int:
        """Widths of all inputs of a block's edited maps: three of the width, one of the feed-forward width."""
        return 3 * self.lm.width + self.lm.ffn

    def generator_weights(self) -> int:
        (rank, hidden), c = self.generator, self.lm
        mlp = (3 * c.width + 1) * hidden + (hidden + 1) * hidden
        return mlp + c.layers * (self.inputs() * (rank + hidden) + len(MAPS) * rank * hidden)

    def trained(self) -> int:
        return self.generator_weights() if self.generator else self.lm_weights()

    def standing(self) -> int:
        """Bytes of weights, and of AdamW's two moments of what is trained; the gradients are in `peak`."""
        frozen = self.lm_weights() if self.generator else 0
        return FLOAT * (frozen + 3 * self.trained())

    def state(self) -> int:
        """Bytes of one sequence's state."""
        return FLOAT * 5 * self.lm.layers * self.lm.width

    def delta(self) -> int:
        """Bytes of one prompt's change of the weights; reading directions, which all share, count once."""
        outs = 3 * self.lm.width + self.lm.ffn
        return FLOAT * self.generator[0] * self.lm.layers * (self.inputs() + outs)

    def kept(self) -> float:
        """Numbers that a block keeps of one token for the backward pass.

        In units of the width, with two feed-forward widths (relu, square) beside them: the two norms' inputs and
        outputs' users 2; time mix: shifted and mixed inputs 6, gate 2; WKV 8: keys, weights, values, ratio, and sums in
        and out; channel mix: shifted and mixed inputs 5, gate and value 3. Around frozen weights a mixed input is kept
        only where an edited map reads it, and the reads along the change's directions come in addition.
        """
        c = self.lm
        if self.generator:
            return 16 * c.width + 2 * c.ffn + len(MAPS) * self.generator[0]
        return 26 * c.width + 2 * c.ffn

    def activations(self) -> float:
        """Bytes kept for the backward pass, by all sequences, without what is read out."""
        c, tokens = self.lm, self._tokens()
        blocks = tokens * c.layers * c.width if self.recompute else c.layers * self._of_block() / FLOAT
        own = 0
        if self.generator:
            rank, hidden = self.generator
            own = c.layers * (self.inputs() + len(MAPS) * rank) + 7 * c.width + 4 * hidden
            sums = c.layers * rank * (self.inputs() + len(MAPS) * hidden)
            own = self.batch * (self.prompt * own + sums)
        return FLOAT * (blocks + own + 2 * tokens * c.width)

    def _tokens(self) -> int:
        return self.batch * (self.behind + (0 if self.generator else self.prompt))

    def _of_block(self) -> float:
        decays = (1.0 if self.generator else 1.4) * CHUNK**2 * self.lm.width  # whatever the text
        return FLOAT * (self._tokens() * self.kept() + decays)

    def read_out(self) -> float:
        """Bytes of one table of logits."""
        return FLOAT * READ_OUT * self._tokens() * self.lm.vocab

    def peak(self) -> float:
        """The most bytes at a time above `standing`: when the loss is taken; when the last block runs again; or at the
        end, when AdamW has all gradients, and a number beside each of them.

        Of logits there are three tables (probabilities, gradients before and after the softmax), or six where the text
        is held to the model without the change. A block's gradients of activations take 2 widths and 2 feed-forward
        widths beside what it keeps.
        """
        c, again = self.lm, 0
        early = self.activations() + (6 if self.generator else 3) * self.read_out()
        if self.recompute:
            head = 0 if self.generator else c.vocab * c.width  # it has its gradient by then
            inside = FLOAT * (self._tokens() * 2 * (c.width + c.ffn) + head)
            again = self.activations() + self._of_block() + inside
        return max(early, again, 2 * FLOAT * self.trained())

    def flops(self) -> float:
        """Multiplications and additions of the matrix products of a step; blocks that run again count again."""
        c = self.lm
        wkv = (4 * CHUNK + 8) * c.width  # forward, a token: sums within a chunk, of all before it, and both together
        forward, head = c.layers * (2 * self.block + wkv), 2 * READ_OUT * c.vocab * c.width
        if not self.generator:
            return self.batch * (self.prompt + self.behind) * ((4 if self.recompute else 3) * forward + 3 * head)
        rank, hidden = self.generator
        change = c.layers * 2 * rank * 2 * self.inputs()
        behind = (3 if self.recompute else 2) * forward + 3 * change + 2 * head
        behind += forward + 3 * head  # the model without the change, which the text is held to in the last phase
        own = 4 * 3 * c.width * hidden + 6 * hidden**2
        own += c.layers * (4 * rank * self.inputs() + 12 * len(MAPS) * rank * hidden)
        heads = 6 * c.layers * self.inputs() * hidden * rank
        return self.batch * (self.behind * behind + self.prompt * (forward + own) + heads)


def random_batch(step: Step) -> DialogueBatch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(step.lm.vocab, (step.batch, step.prompt + step.behind), generator=g)
    kind = torch.full((step.batch, step.behind), TEXT)
    kind[:, -1] = ANSWER
    valid = torch.ones(step.batch, step.prompt, dtype=torch.bool)
    return DialogueBatch(ids[:, : step.prompt], valid, ids[:, step.prompt :], kind)


def run_of(step: Step):
    """-> what is trained, and one step's forward and backward pass, of the last phase."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = RWKV4(step.lm).to(device)
    for weight in lm.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    module, loss_of = lm, lm_objective(lm)
    if step.generator:
        module = TokenGenerator(lm.requires_grad_(False), *step.generator, MAPS).to(device)
        loss_of = generator_objective(lm, module, Training(1, step.batch, 1e-3, (1,), (0,)), 0)
    batch = random_batch(step).to(device)
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, foreach=True)

    def run():
        with recomputed(lm) if step.recompute else nullcontext():
            loss_of(0, batch).total.backward()
        optimiser.step()
        module.zero_grad(set_to_none=True)

    run()  # AdamW has its moments now
    return module, run


def compared(step: Step) -> tuple[float, float]:
    """Counted over measured: the most memory above `standing`, and operations."""
    module, run = run_of(step)
    assert step.trained() == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        run()
    return step.peak() / peak_bytes(run), step.flops() / counter.get_total_flops()


def largest_batch(step: Step, room: float, gpus: int) -> int:
    """Sequences that fit, on all GPUs together: each has all weights. Several need room for one more gradient."""
    kept = step.standing() + (FLOAT * step.lm.vocab * step.lm.width if gpus > 1 else 0)

    def fits(batch: int) -> bool:
        return kept + replace(step, batch=batch).peak() <= (1 - FREE) * room

    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        low, high = ((low + high) // 2, high) if fits((low + high) // 2) else (low, (low + high) // 2)
    return low * gpus


def of_size(lm: RWKV4Config, generator: tuple[int, int]) -> str:
    """A row: what there is of a model, whatever the batch, and operations a token."""
    plain, token = Step(lm, 1), Step(lm, 1, generator=generator)
    numbers = [plain.lm_weights() / 1e6, 4 * plain.trained() * FLOAT / 1e9, plain.state() / 1e6]
    numbers += [token.delta() / 1e6, token.trained() / 1e6]
    numbers += [step.flops() / (step.prompt + step.behind) / 1e9 for step in (plain, token)]
    return " | ".join(f"{number:,.4g}" for number in numbers)


def fitting(lm: RWKV4Config, generator: tuple[int, int]) -> dict[str, int]:
    """The largest batch of the model's and of the generator's training, by GPU, activations kept or blocks run again:
    "model/16GB/kept", "model/16GB/again", ...; 0 where not one sequence fits."""
    return {
        f"{what}/{gpu.replace(' ', '')}/{how}": largest_batch(Step(lm, 1, generator=size, recompute=again), room, gpus)
        for what, size in (("model", None), ("generator", generator))
        for gpu, (room, gpus) in GPUS.items()
        for how, again in (("kept", False), ("again", True))
    }


def main() -> None:
    keep = result.parser(__doc__).parse_args().keep
    keep_freed_memory()
    worst = dict.fromkeys(GOALS, 0.0)
    print("| vocabulary, width, layers | batch, prompt, text | trained | blocks | memory | operations |")
    print("|---|---|---|---|---|---|")
    for sizes, shape in MEASURED:
        for generator in (None, SMALL):
            for again in (False, True):
                found = compared(Step(RWKV4Config(*sizes, ffn=4 * sizes[1]), *shape, generator, again))
                what, how = "generator" if generator else "model", "run again" if again else "kept"
                print(f"| {sizes} | {shape} | {what} | {how} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)
                for name, ratio in zip(("memory", "operations"), found, strict=True):
                    worst[f"{name}/{what}"] = max(worst[f"{name}/{what}"], abs(ratio - 1))

    models = {"cpu": get_profile("cpu").model}
    models |= {name: RWKV4Config(50277, width, layers, 4 * width) for name, (layers, width) in PUBLISHED.items()}
    rank, width = LARGE
    print(f"\nOf a generator of rank {rank} and width {width}; float32.\n")
    print(
        "| RWKV-4 | M weights | GB to train them | MB state | MB change | M weights of the generator | GFLOP a token, ",
        end="",
    )
    print("model | GFLOP a token, generator |\n|---|---|---|---|---|---|---|---|")
    for name, lm in models.items():
        print(f"| {name} | {of_size(lm, LARGE)} |")
    print(f"\nLargest batch of {PROMPT:,} tokens of prompt and {TEXT_BEHIND:,} behind it: kept / run again.\n")
    print("| RWKV-4 | " + " | ".join(f"{what}, {gpu}" for what in ("model", "generator") for gpu in GPUS) + " |")
    print("|---" * (1 + 2 * len(GPUS)) + "|")
    counts = {}
    for name, lm in models.items():
        batches = fitting(lm, LARGE)
        counts |= {f"{name}/{what}": batch for what, batch in batches.items()}
        numbers = list(batches.values())
        cells = (f"{kept} / {again}" for kept, again in zip(numbers[::2], numbers[1::2], strict=True))
        print(f"| {name} | {' | '.join(cells)} |")
    result.finish(worst, GOALS, lower_is_better=True, keep=keep, counts=counts)


if __name__ == "__main__":
    result.run(main)
