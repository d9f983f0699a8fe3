"""Memory of the process while it generates: as much after 10,000 tokens as after 1,000.

The shipped model with a prompt in its weights streams one text, drawn so that it does not go round in circles. Prints
the resident memory as it goes, and one JSON line last: the ratio is the resident memory at the end over that after
1,000 tokens, by when everything that is made once was made.

    python benchmarks/generation_memory.py [--tokens 10000] [--keep]
"""

import psutil
import result
import torch

from prosg_lib.backbones.loading import load_model
from prosg_lib.training.checkpoints import load_generator

GOALS = {"end-over-1000": 1.01}
PROMPT = "User: You should know that my home town is Oslo. My pet is a parrot. Call me captain.\n"
EVERY = 1000


def main() -> None:
    parser = result.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=10_000, help="more than 1,000 (default: 10,000)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = load_model("rwkv4-dialogue").to(device)
    delta = load_generator("rwkv4-dialogue-token", lm).to(device).memorize(lm, [PROMPT])
    process, resident, letters = psutil.Process(), {}, 0
    print(f"{'tokens':>7} {'resident MB':>12} {'letters':>8}", flush=True)
    steps = lm.stream_text([PROMPT], None, delta, arguments.tokens, None, temperature=1.0, seeds=[0])
    for n, pieces in enumerate(steps, 1):
        letters += len(pieces[0])
        if n % EVERY == 0:
            resident[n] = process.memory_info().rss
            print(f"{n:>7} {resident[n] / 1e6:>12.2f} {letters:>8}", flush=True)
    ratios = {"end-over-1000": resident[max(resident)] / resident[EVERY]}
    result.finish(ratios, GOALS, lower_is_better=True, keep=arguments.keep)


if __name__ == "__main__":
    result.run(main)
