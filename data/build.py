"""Makes what `data/` ships of the data sets: tokenizer, values, samples, and a manifest of what went in and out.

python data/build.py check      # makes everything again that can be made here, and compares
python data/build.py counts     # what the open world has, as the table in DATASHEET.md
python data/build.py manifest   # after another file is shipped: writes the hashes again, and needs no books
PROSG_TEST_DATA=/path/to/folder python data/build.py      # the folder holds `books/`; writes the same bytes
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice, product, zip_longest

from prosg_lib import checksums, files
from prosg_lib.config.sizes import VOCAB
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir, extra_data
from prosg_lib.tasks import dialogue, open_wording, open_world, wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, load_prose, own_sentences, split_titles
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

WORDS = (
    "dialogue_words.json",
    "dialogue_asides.json",
    "people.json",
    "own_sentences.json",
    "open_world.json",
    "natural_prompts.jsonl",
)
"""Written, not computed; everything else is made from them."""

TOKENIZER, SAMPLE, MANIFEST = "tokenizer.json", "dialogue_sample.jsonl", checksums.MANIFEST
OPEN_VALUES, OPEN_SAMPLE = "open_values.json", "open_sample.jsonl"
MADE = (TOKENIZER, SAMPLE, OPEN_VALUES, OPEN_SAMPLE)
"""In this order: the values are counted in tokens, and the open world's sample holds values."""

TRAINED = ("checkpoints", "measured")
"""Folders of files that trainings and evaluations made."""

SAMPLE_COUNTS = {"train": 40, "validation": 20, "test": 20}
_SAMPLE_SHAPE = dialogue.Shape(facts=6, distance=96, probes=3, instructions=1)

OPEN_SAMPLE_COUNTS = {"train": 10, "validation": 3, "test": 3}
"""Of each level; in training there is nothing new, so there is one level."""
_OPEN_SAMPLE_SHAPE = open_world.Shape(
    facts=5, distance=128, probes=3, others=2, before=32, unknown=1, instructions=1, updates=1, query=True
)

MOST_VALUES = {"train": 1500, "validation": 300, "test": 500}
"""Values of one type in a split, at most."""

LONGEST_VALUE = {"time": 5}
"""Tokens of a value, by type, in which a digit is one; all others have at most 4."""

_FACTS = 32_000  # facts stated and asked for in the tokenizer's training text: about as much text as the prose
_REPEATS = 2_000  # of the list of all values and names, so that each of them becomes one token


def build() -> None:
    """Write tokenizer, values, samples and manifest to `data/`, and print their hashes.

    Raises:
        UserError: the books are missing or are not those of the manifest; another tokenizer would fit none of the
            shipped checkpoints.
    """
    books = _books()
    if books is None:
        raise UserError(
            "the tokenizer is trained on the books that data/DATASHEET.md lists; "
            "set PROSG_TEST_DATA to a folder whose subfolder `books` holds them"
        )
    path = data_dir() / MANIFEST
    if path.exists() and files.read_json(path)["books"] != books:
        raise UserError(
            f"these are not the books of {path}, and another tokenizer would fit none of the shipped checkpoints; "
            "use those books, or remove that file to begin a data set of your own"
        )
    tokenizer = _train()
    _write(TOKENIZER, _file(tokenizer))
    _write(SAMPLE, sample(tokenizer))
    _write(OPEN_VALUES, open_values(tokenizer))
    open_wording.values.cache_clear()
    _write(OPEN_SAMPLE, open_sample(tokenizer))
    _write(MANIFEST, _manifest(tokenizer, books))


def _write(name: str, text: str) -> None:
    files.write_text(data_dir() / name, text)
    print(f"{name}: written, sha256 {_sha(text)}")


def check() -> bool:
    """Make again what can be made here, compare it with `data/`, and print the result for every file.

    The tokenizer needs the books; the rest needs nothing else. Returns whether everything that was compared is equal.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    manifest = files.read_json(data_dir() / MANIFEST)
    tokenizer = load_tokenizer()
    results = {
        f"{name}: has the hash in {MANIFEST}": _sha(_shipped(name)) == manifest["sha256"].get(name)
        for name in (*WORDS, *MADE)
    }
    for name, make in {SAMPLE: sample, OPEN_VALUES: open_values, OPEN_SAMPLE: open_sample}.items():
        results[f"{name}: made again, the same"] = make(tokenizer) == _shipped(name)
    again = _manifest(tokenizer, manifest["books"])
    results[f"{MANIFEST}: made again, the same (except for the books)"] = again == _shipped(MANIFEST)
    books, skipped = _books(), None
    if books is None:
        skipped = "PROSG_TEST_DATA is not set; data/DATASHEET.md lists the books"
    elif books != manifest["books"]:
        skipped = "the books in PROSG_TEST_DATA are not those that data/DATASHEET.md lists"
    else:
        results["books: those that the manifest names"] = True
        results[f"{TOKENIZER}: trained again, the same"] = _file(_train()) == _shipped(TOKENIZER)
    for what, equal in results.items():
        print(f"{'ok ' if equal else 'NOT'} {what}")
    if skipped:
        print(f"--  {TOKENIZER}: not trained again, {skipped}")
    return all(results.values())


def write_manifest() -> None:
    """Write the manifest again for what is in `data/` now; its books stay."""
    text = _manifest(load_tokenizer(), files.read_json(data_dir() / MANIFEST)["books"])
    files.write_text(data_dir() / MANIFEST, text)


def sample(tokenizer: Tokenizer) -> str:
    """Dialogues of every split, one JSON object a line, with our own sentences as the prose."""
    rows = []
    for split, count in SAMPLE_COUNTS.items():
        data = dialogue.Dialogues(tokenizer, _own_prose(split, tokenizer), split, seed=0)
        rows += [data.row(item) for item in data.items(count, _SAMPLE_SHAPE)]
    return _lines(rows)


def open_sample(tokenizer: Tokenizer) -> str:
    """Dialogues of the open world, of every split and level, one JSON object a line, with our own sentences."""
    rows = []
    for split, count in OPEN_SAMPLE_COUNTS.items():
        for level in ("known",) if split == "train" else open_wording.LEVELS:
            named = open_wording.Level.named(level, split)
            data = open_world.OpenWorld(tokenizer, _own_prose(split, tokenizer), named, seed=0)
            rows += [data.row(item) for item in data.items(count, _OPEN_SAMPLE_SHAPE)]
    return _lines(rows)


@lru_cache(maxsize=len(SPLITS))
def _own_prose(split: str, tokenizer: Tokenizer) -> ProseTokens:
    return ProseTokens.of(Prose("own", {split: own_sentences(split)}), split, tokenizer)


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def open_values(tokenizer: Tokenizer) -> str:
    """The values of the open world's facts, by type and split, as JSON; none is in two splits."""
    made, instructions = {}, open_wording.words()["instructions"].values()
    taken = {w.casefold() for kind in instructions for words in kind["words"].values() for w in words}
    for kind, candidates in _candidates(open_wording.words()["parts"]).items():
        unique = sorted({v for v in candidates if v.casefold() not in taken})
        random.Random(f"open values, {kind}").shuffle(unique)
        lengths = {v: len(tokenizer.encode_long(" " + v)) for v in unique}
        made[kind] = {}
        for split, most in MOST_VALUES.items():
            here = [v for v in unique if split_of(v) == split]
            by_length = [[v for v in here if lengths[v] == n] for n in range(1, LONGEST_VALUE.get(kind, 4) + 1)]
            turns = (v for values in zip_longest(*by_length) for v in values if v is not None)
            made[kind][split] = sorted(islice(turns, most))  # each length has its share, where there are enough
    return json.dumps(made, indent=2) + "\n"


def split_of(value: str) -> str:
    """The only split that a value is in: 7 in 10 are for training, 1 for validation, 2 for the test."""
    number = int(hashlib.sha256(value.lower().encode()).hexdigest(), 16) % 10
    return "train" if number < 7 else "validation" if number < 8 else "test"


def _candidates(parts: dict[str, list[str]]) -> dict[str, Iterable[str]]:
    """Type of value -> all that there could be."""
    adjectives, nouns = parts["adjectives"], parts["nouns"]
    return {
        "person": (name.capitalize() for name in _made_up(parts, "person_ends")),
        "place": (name.capitalize() for name in _made_up(parts, "place_ends")),
        "thing": [*nouns, *(f"{a} {n}" for a, n in product(adjectives, nouns))],
        "word": _made_up(parts, "word_ends"),
        "number": map(str, range(10, 10_000)),
        "code": (f"{c}{n}" for c in "ABCDEFGHJKLMNPQRSTUVWXYZ" for n in range(1, 100)),
        "date": (f"{d} {m}" for m in parts["months"] for d in range(1, 29)),
        "time": (f"{h}:{m:02d}" for h in range(24) for m in range(60)),
    }


def _made_up(parts: dict[str, list[str]], ends: str) -> Iterator[str]:
    """Made-up words: an onset, a vowel, one consonant or a coda, and an end."""
    short = product(parts["onsets"], "aeiou", parts["middles"], parts[ends])
    long = product(parts["onsets"], parts["vowels"], parts["codas"], parts[ends])
    yield from map("".join, short)
    yield from map("".join, long)


def open_counts() -> dict[str, list[int]]:
    """What the open world has, for training, validation and test."""
    table, values = open_wording.words(), open_wording.values()
    instructions, frames = table["instructions"].values(), table["frames"]
    prompts = [open_world.natural_prompts(s) for s in SPLITS]

    def count(lists: Iterable[dict]) -> list[int]:
        return [sum(len(names[s]) for names in lists) for s in SPLITS]

    return (
        {"slots": count(table["slots"].values())}
        | {f"slots, {kind}": count([names]) for kind, names in table["slots"].items()}
        | {"values": count(values.values())}
        | {f"values, {kind}": count([by_split]) for kind, by_split in values.items()}
        | {"names of other people": count([table["others"]]), "cues": count([table["cues"]])}
        | {"words of instructions": count([spec["words"] for spec in instructions])}
        | {"sentences of instructions": count(instructions)}
        | {f"sentences, `{kind}`": count([by_split]) for kind, by_split in frames.items()}
        | {"further sentences": [sum(len(t["further"]) for t in (*frames.values(), *instructions)), 0, 0]}
        | {"sample dialogues": [_sampled(s) for s in SPLITS]}
        | {"natural prompts": [len(rows) for rows in prompts]}
        | {"questions about natural prompts": [sum(len(r["questions"]) for r in rows) for rows in prompts]}
    )


def _sampled(split: str) -> int:
    return OPEN_SAMPLE_COUNTS[split] * (1 if split == "train" else len(open_wording.LEVELS))


def _shipped(name: str) -> str:
    return files.read_text(data_dir() / name)


def _train() -> Tokenizer:
    return Tokenizer.train([*_every_word(), *_facts_and_questions(), *load_prose().paragraphs["train"]], VOCAB)


def _file(tokenizer: Tokenizer) -> str:
    return tokenizer.to_json() + "\n"


def _manifest(tokenizer: Tokenizer, books: dict) -> str:
    manifest = {
        "version": dialogue.VERSION,
        "data_hash": dialogue.data_hash(tokenizer),
        "data_hash_rich": dialogue.data_hash(tokenizer, rich=True),
        "open_version": open_world.VERSION,
        "open_data_hash": open_world.data_hash(tokenizer),
        "sha256": {name: _sha(_shipped(name)) for name in (*WORDS, *MADE)},
        "shipped": {
            path.relative_to(data_dir()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in TRAINED
            for path in sorted((data_dir() / folder).iterdir())
            if folder != "checkpoints" or path.suffix != ".md"  # cards, which cards.py compares
        },
        "books": books,
    }
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _books() -> dict | None:
    """The books' files by split, with the size and hash of their paragraphs; None without a folder."""
    folder = extra_data("books")
    if folder is None:
        return None
    prose, titles = load_prose(str(folder)), [p.name for p in folder.glob("*.txt") if p.is_file()]
    books = split_titles(titles) if len(titles) >= 3 else dict.fromkeys(SPLITS, titles)  # as `load_prose` divides them
    return {
        split: {
            "files": sorted(names),
            "characters": sum(map(len, prose.paragraphs[split])),
            "sha256": _sha("\n".join(prose.paragraphs[split])),
        }
        for split, names in books.items()
    }


def _every_word() -> list[str]:
    table = wording.words()
    values = [v for spec in table["slots"].values() for v in spec["values"]]
    values += [v for spec in table["instructions"].values() for v in spec["words"]]
    return [" " + " ".join(values + table["others"])] * _REPEATS


def _facts_and_questions() -> list[str]:
    rng, texts = random.Random("tokenizer"), []
    table = wording.words()["instructions"]
    for _ in range(_FACTS):
        (fact,) = wording.draw_facts(1, "train", rng)
        for who in (None, rng.choice(wording.words()["others"])):
            instructions = {kind: rng.choice(spec["words"]) for kind, spec in table.items() if rng.random() < 0.3}
            statement = wording.statement(fact, who, "train", rng)
            question = wording.question(fact, who, "train", rng)
            texts.append(f"{statement}\nUser: {question}\nBot: {full_answer(fact.value, instructions)}")
    return texts


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["check"]:
            return 0 if check() else 1
        if arguments == ["counts"]:
            for name, counted in open_counts().items():
                print(f"| {name} | {', '.join(f'{n:,}' for n in counted)} |")
            return 0
        if arguments not in ([], ["manifest"]):
            raise UserError(f"unknown arguments {' '.join(arguments)!r}; use none, `check`, `counts` or `manifest`")
        write_manifest() if arguments else build()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
