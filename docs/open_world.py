"""Asks the models of the open world everything of `prosg_lib.evaluation.open_study` and keeps the answers.

python docs/open_world.py                            # validation split; answers in runs/open_world/
python docs/open_world.py levels natural             # only some parts
python docs/open_world.py --split test --out data/measured

A part is kept when it is complete: open_PART.jsonl.gz. All parts take about three quarters of an hour on
one core. What is not shipped is trained first: the final-state generator in two hours, the static delta and the probe
in half an hour.
"""

import argparse
from pathlib import Path

from prosg_lib import files
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.evaluation import open_recall, open_study, predictions


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall and uses of a memory in the open world.")
    parser.add_argument("parts", nargs="*", help=f"default: all, {', '.join(open_study.PARTS)}")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--profile", default="cpu", help="of models and sizes (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/open_world"), help="folder (default: runs/open_world)")
    chosen = parser.parse_args()
    if unknown := sorted({*chosen.parts} - {*open_study.PARTS}):
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(open_study.PARTS)}")
    return chosen


def main() -> None:
    chosen = options()
    files.check_writable(chosen.out, "--out")
    profile = get_profile(chosen.profile)
    lm, generators = open_study.models(profile)
    for name in chosen.parts or open_study.PARTS:
        frame = open_study.PARTS[name](lm, generators, chosen.split, profile.open.study)
        file = chosen.out / f"open_{name}.jsonl.gz"
        rows = [{k: v for k, v in row.items() if v == v} for row in frame.to_dict("records")]  # without NaN
        predictions.write_rows(file, rows)
        scores = open_recall.judged(frame) if "predicted" in frame else frame
        by = [c for c in ("level", "method", "memory", "about", "distance", "facts", "scale", "turn") if c in scores]
        shown = ["recall", "fact", "other", "update", "query", "unknown", "abstained", "followed", "competing", "loss"]
        means = scores.groupby(by, sort=False)[[c for c in shown if c in scores]].mean().dropna(axis=1, how="all")
        print(f"{file}, {chosen.split} split\n{means.round(2).to_string()}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
