"""One gradient step in place of a prompt, on a model that others trained: the second paper's tables, with its controls.

python docs/second_paper.py                                              # the model and an untrained step, on SQuAD
python docs/second_paper.py --trained runs/cpu/checkpoints/smollm2-step-squad-lc.safetensors
python docs/second_paper.py --task wikitext --trained runs/cpu/checkpoints/smollm2-step-wikitext-lc.safetensors

Whether each pair was answered right is kept in runs/second_paper.jsonl.gz (--out). Intervals are over contexts, because
questions about one passage are right or wrong together. The split is the validation one unless you say otherwise: what
is chosen on the test split means nothing there.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch

from prosg_lib import files
from prosg_lib.backbones.loading import load_model
from prosg_lib.config import get_profile
from prosg_lib.config.sizes import TASKS
from prosg_lib.errors import UserError
from prosg_lib.evaluation import predictions
from prosg_lib.evaluation.pair_evaluation import answered, difference, gap_recovered, passages_of, share
from prosg_lib.gradient_steps.adapter_step import RatedAdapterStep
from prosg_lib.tasks.pair_sources import pairs_of
from prosg_lib.tasks.pairs import form_of
from prosg_lib.training import distributed
from prosg_lib.training.checkpoints import load_generator, new_module
from prosg_lib.training.recipes import recipe

PAPER = {  # arXiv 2506.20989: Llama-3.2-1B, LoRA in the inner and the outer loop, 82,031 and 343,586 records
    "squad": {"none": 0.352, "prompted": 0.877, "untrained": 0.451, "trained": 0.720, "wrong trained": 0.297},
    "wikitext": {"untrained": 0.322, "trained": 0.383},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One gradient step on a context, then the query alone.")
    parser.add_argument("--model", default="smollm2", help="as load_model takes it (default: smollm2)")
    parser.add_argument("--trained", nargs="+", default=[], help="trained steps: shipped names or files")
    parser.add_argument("--task", default="squad", choices=TASKS)
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--items", type=int, help="only the first so many (default: all)")
    parser.add_argument("--rate", type=float, help="inner learning rate of the untrained step (default: the recipe's)")
    parser.add_argument("--at-once", type=int, default=10, help="pairs in memory at a time (default: 10)")
    parser.add_argument("--out", default="runs/second_paper.jsonl.gz", help="where answers are kept")
    return parser.parse_args()


def main() -> None:
    chosen, profile = options(), get_profile("cpu")
    files.check_writable(Path(chosen.out).parent, "--out")
    lm = load_model(chosen.model).to(distributed.device()).requires_grad_(False)
    trained = {Path(name).stem: load_generator(name, lm) for name in chosen.trained}
    methods = {"untrained": untrained(lm, list(trained.values()), profile, chosen.rate), **trained}
    pairs = pairs_of(chosen.task, chosen.split, profile, lm.needed_tokenizer()).pairs[: chosen.items]
    changed = {name for method in methods.values() for name in method.names}
    asked = {"batch": chosen.at_once, "form": form_of(chosen.task), "together": True}
    rows = answered(lm.with_later_blocks(changed), methods, pairs, lm.tokenizer, **asked)
    passages = passages_of(pairs)
    kept = rows.assign(passage=passages, query=[pair.query for pair in pairs])
    predictions.write_rows(chosen.out, kept.to_dict("records"))
    print(f"{chosen.task}, {chosen.split}: {len(pairs)} pairs about {passages.max() + 1} contexts")
    print(table(rows, list(trained), passages, PAPER.get(chosen.task, {})).to_markdown(index=False))
    for name in trained:
        print(f"{name}, its own context over a wrong one: {difference(rows, name, f'wrong {name}', passages)}")


def untrained(lm, trained: list, profile, rate: float | None) -> RatedAdapterStep:
    """A step from a fresh adapter, in the same maps as a trained one."""
    torch.manual_seed(0)
    if trained:
        step = RatedAdapterStep(lm, trained[0].rank, tuple(trained[0].names), trained[0].lr)
    else:
        step = new_module("rated-adapter", recipe("smollm2-step-squad-lc", profile).size, lm)
    step.lr = rate or step.lr
    return step.to(distributed.device()).requires_grad_(False)


def table(rows: pd.DataFrame, trained: list[str], passages, paper: dict[str, float]) -> pd.DataFrame:
    """Share of answers that are exactly right, and of the gap from the untrained step to the prompted model."""
    lines = [("no context", "none", "none"), ("the context in front of the query", "prompted", "prompted")]
    for name in ("untrained", *trained):
        kind = "trained" if name in trained else name
        lines += [
            (f"one step, {name}", name, kind),
            (f"one step, {name}, wrong context", f"wrong {name}", f"wrong {kind}"),
        ]
    return pd.DataFrame(
        {
            "method": method,
            "exactly right": share(rows, column, passages),
            "gap recovered": gap_recovered(rows, column, groups=passages) if column in trained else "",
            "the paper": paper.get(kind, ""),
        }
        for method, column, kind in lines
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
