"""Makes what `data/` ships of the data set: the tokenizer, a small sample, and a manifest of what went in and came out."""

from __future__ import annotations

import hashlib
import json
import random

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks import dialogue
from prosg_lib.tasks.prose import Prose, ProseTokens, load_prose, own_sentences
from prosg_lib.tokenizer import Tokenizer

VOCAB = 2048
"""Tokens: every name and value is one, and the softmax stays cheap on a CPU."""

_DIALOGUES = 32_000  # facts told and asked about in the tokenizer's training text, about as much text as the prose
_REPEATS = 2_000  # of the list of all values and names, which makes each of them one token
_SAMPLE = {"train": 40, "validation": 20, "test": 20}


def build() -> dict[str, str]:
    """Write tokenizer.json, dialogue_sample.jsonl and MANIFEST.json to `data/`; returns the hashes."""
    made = _make()
    for name, text in made.items():
        files.write_text(data_dir() / name, text)
    return {name: _sha(text) for name, text in made.items()}


def check() -> dict[str, bool]:
    """Make everything again in memory and compare with `data/`: file -> equal?"""
    made = _make()
    return {name: _sha(text) == _sha((data_dir() / name).read_text(encoding="utf-8")) for name, text in made.items()}


def _make() -> dict[str, str]:
    prose = load_prose()
    if prose.source == "own sentences":
        raise UserError(
            "the tokenizer was trained on the books that data/DATASHEET.md lists; "
            "set PROSG_TEST_DATA to a folder whose subfolder `books` holds them"
        )
    tokenizer = Tokenizer.train([*_every_word(), *_told_and_asked(), *prose.paragraphs["train"]], VOCAB)
    out = {"tokenizer.json": tokenizer.to_json() + "\n", "dialogue_sample.jsonl": _sample(tokenizer)}
    manifest = {
        "version": dialogue.VERSION,
        "prose": _describe(prose),
        "sha256": {name: _sha(text) for name, text in out.items()},
    }
    out["MANIFEST.json"] = json.dumps(manifest, indent=2) + "\n"
    return out


def _every_word() -> list[str]:
    table = dialogue.words()
    values = [v for spec in table["slots"].values() for v in spec["values"]]
    values += [v for spec in table["instructions"].values() for v in spec["words"]]
    return [" " + " ".join(values + table["others"])] * _REPEATS


def _told_and_asked() -> list[str]:
    rng, texts = random.Random("tokenizer"), []
    table = dialogue.words()["instructions"]
    for _ in range(_DIALOGUES):
        (fact,) = dialogue.draw_facts(1, "train", rng)
        for who in (None, rng.choice(dialogue.words()["others"])):
            orders = {kind: rng.choice(spec["words"]) for kind, spec in table.items() if rng.random() < 0.3}
            told, asked = dialogue.statement(fact, who, "train", rng), dialogue.question(fact, who, "train", rng)
            texts.append(f"{told}\nUser: {asked}\nBot: {dialogue.full_answer(fact.value, orders)}")
    return texts


def _sample(tokenizer: Tokenizer) -> str:
    """Dialogues of every split, one JSON object a line, with our own sentences as the prose."""
    rows = []
    for split, count in _SAMPLE.items():
        own = ProseTokens.of(Prose("own", {split: own_sentences(split)}), split, tokenizer)
        data = dialogue.Dialogues(tokenizer, own, split, seed=0)
        for item in data.items(count, dialogue.Shape(facts=6, distance=96, probes=3, instructions=1)):
            rows.append(json.dumps(dialogue.to_row(data, item), ensure_ascii=False))
    return "\n".join(rows) + "\n"


def _describe(prose: Prose) -> dict:
    return {
        "source": prose.source,
        "characters": {split: sum(map(len, lines)) for split, lines in prose.paragraphs.items()},
        "sha256": {split: _sha("\n".join(lines)) for split, lines in prose.paragraphs.items()},
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
