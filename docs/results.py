"""Writes results.md: the text of results.md.jinja with tables from data/measured/ and the benchmarks' ledger.

python docs/results.py          # write the page
python docs/results.py check    # exit code 1 if the page is not what would be written
"""

import sys
from pathlib import Path

import jinja2
import pandas as pd

from prosg_lib import files, paths
from prosg_lib.evaluation import memory_tests, pair_evaluation, statistics
from prosg_lib.evaluation.recall import judged

PAGE = Path(__file__).with_name("results.md")
TEMPLATE = PAGE.with_suffix(".md.jinja")

LABELS = {
    "prosg-token": "**ProSG, token by token**",
    "base": "plain model",
    "twice": "prompt read twice in a row",
    "every-64": "prompt read again after every 64 tokens",
    "every-10": "prompt read again after every 10 tokens",
    "reinject-64-0.3": "state put back after every 64 tokens, with weight 0.3",
    "offset-0.03": "state offset added at every token, times 0.03",
    "tuned-30-0.03": "state tuned on the prompt, 30 steps",
    "lora-1-0.03": "LoRA fine-tuned on the prompt, 1 step",
    "lora-40-0.001": "LoRA fine-tuned on the prompt, 40 steps",
    "transformer": "transformer, whole cache (it grows with the text)",
    "last-114": "transformer, cache of its last 114 tokens (as many bytes as ProSG)",
}


def read(name: str) -> pd.DataFrame:
    return pd.read_json(paths.data_dir() / "measured" / name, lines=True)


def grid(rows: list[list], heads: list[str]) -> str:
    return pd.DataFrame(rows, columns=heads).to_markdown(index=False, disable_numparse=True)


def alternatives() -> str:
    frame = judged(read("dialogue_rivals.jsonl.gz"))
    kept = read("dialogue_rivals_costs.jsonl").set_index("method").kept_bytes
    rows = []
    for method in [m for m in LABELS if m in set(frame.method)]:
        near, far = (statistics.estimate(frame, method, d).value for d in (512, 1024))
        others = statistics.locality(frame, method).value
        rows.append(
            [
                LABELS[method],
                f"{near:.2f}",
                f"{far:.2f}",
                "–" if pd.isna(others) else f"{others:.2f}",
                f"{int(kept[method]):,}" if method in kept else "–",
            ]
        )
    return grid(rows, ["method", "512", "1,024", "other people", "bytes kept"])


TASKS = {"characters": "character description", "reversal": "reversal curse", "wikitext": "cloze", "squad": "SQuAD"}
STEPS = {
    "prompted": "context in front",
    "LC": "**one step, meta-trained, LC**",
    "LG": "one step, meta-trained, LG",
    "untrained": "one step, untrained",
    "wrong LC": "control: step on a wrong context",
    "none": "control: no context",
}


def one_step() -> str:
    frames = {task: read(f"one_step_{task}.jsonl.gz") for task in TASKS}
    rows = [
        [label, *(f"{pair_evaluation.share(frame, method).value:.2f}" for frame in frames.values())]
        for method, label in STEPS.items()
    ]
    gaps = []
    for frame in frames.values():
        room = pair_evaluation.difference(frame, "prompted", "untrained")
        gap = pair_evaluation.gap_recovered(frame, "LC").value
        gaps.append(f"{gap:.2f}" if room.value > 0.1 else "–")
    rows.append(["gap recovered, LC", *gaps])
    counts = [len(frame) for frame in frames.values()]
    return grid(rows, ["", *(f"{label} ({n} items)" for label, n in zip(TASKS.values(), counts, strict=True))])


PARTS = {
    "base": "plain recurrent model",
    "prosg-token": "**ProSG, token by token**",
    "adapter": "a gradient step in an adapter",
    "transformer": "transformer",
    "wrong": "control: another memory's delta",
    "none": "control: no memory",
}
SIZES = [
    ("copy", 20, "20 words copied"),
    ("copy", 50, "50"),
    ("mqar", 64, "MQAR, 4 pairs"),
    ("mqar", 256, "16 pairs"),
    ("passkey", 1024, "passkey in 1,024 tokens"),
    ("phonebook", 10, "phone book, 10 lines"),
]


def established() -> str:
    scores = memory_tests.scored(read("established_tests.jsonl.gz"))
    tables = {task: memory_tests.by_size(part, list(PARTS)) for task, part in scores.groupby("task")}
    rows = [[label, *(f"{tables[t].loc[m, size].value:.2f}" for t, size, _ in SIZES)] for m, label in PARTS.items()]
    return grid(rows, ["", *(head for *_, head in SIZES)])


def benchmark(name: str) -> dict[str, float]:
    claims = files.read_json(paths.expected_dir() / f"{name}.benchmark.json")["claims"]
    return {name: entry["reference"] for name, entry in claims.items()}


def sizes(found: dict[str, float]) -> str:
    rows = [
        [size]
        + [
            f"{found[f'{size}/{what}/{memory}/kept']:,} / {found[f'{size}/{what}/{memory}/again']:,}"
            for what in ("model", "generator")
            for memory in ("16GB", "80GB", "8x80GB")
        ]
        for size in ("169M", "430M", "1.5B", "3B", "7B")
    ]
    heads = [
        "RWKV-4",
        "its training: 16 GB",
        "80 GB",
        "8 x 80 GB",
        "a generator's (rank 32): 16 GB",
        "80 GB ",
        "8 x 80 GB ",
    ]
    return grid(rows, heads)


def page() -> str:
    scale = benchmark("scale")
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(
        alternatives=alternatives(),
        one_step=one_step(),
        established=established(),
        sizes=sizes(scale),
        scale=scale,
        decode=benchmark("decode"),
        mixed=benchmark("mixed_deltas"),
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        sys.exit(f"{PAGE.name} is not what {__file__} writes; run it") if PAGE.read_text("utf-8") != page() else None
    else:
        files.write_text(PAGE, page())
