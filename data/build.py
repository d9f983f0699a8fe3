"""Makes what `data/` ships of the data sets: the tokenizer, a small sample, and a manifest of what went in and out.

python data/build.py check      # makes everything again that can be made here, and compares
python data/build.py manifest   # after another file is shipped: writes the hashes again, and needs no books
PROSG_TEST_DATA=/path/to/folder python data/build.py      # the folder holds `books/`; writes the same bytes
"""

from __future__ import annotations

import hashlib
import json
import random
import sys

from prosg_lib import checksums, files
from prosg_lib.config.sizes import VOCAB
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir, extra_data
from prosg_lib.tasks import dialogue, wording
from prosg_lib.text.prose import SPLITS, Prose, ProseTokens, load_prose, own_sentences, split_titles
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

WORDS = ("dialogue_words.json", "dialogue_asides.json", "people.json", "own_sentences.json")
"""Written by hand; everything else is made from them."""

TOKENIZER, SAMPLE, MANIFEST = "tokenizer.json", "dialogue_sample.jsonl", checksums.MANIFEST

TRAINED = ("checkpoints", "measured")
"""Folders of files that trainings and evaluations made."""

SAMPLE_COUNTS = {"train": 40, "validation": 20, "test": 20}
_SAMPLE_SHAPE = dialogue.Shape(facts=6, distance=96, probes=3, instructions=1)
_FACTS = 32_000  # facts stated and asked for in the tokenizer's training text: about as much text as the prose
_REPEATS = 2_000  # of the list of all values and names, so that each of them becomes one token


def build() -> None:
    """Write the tokenizer, the sample and the manifest to `data/`, and print their hashes.

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
    made = {TOKENIZER: _file(tokenizer), SAMPLE: sample(tokenizer)}
    made[MANIFEST] = _manifest(tokenizer, books, made)
    for name, text in made.items():
        files.write_text(data_dir() / name, text)
        print(f"{name}: written, sha256 {_sha(text)}")


def check() -> bool:
    """Make again what can be made here, compare it with `data/`, and print the result for every file.

    The sample and the manifest need nothing else; the tokenizer needs the books. Returns whether everything that was
    compared is equal.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    manifest = files.read_json(data_dir() / MANIFEST)
    tokenizer = load_tokenizer()
    shipped = {name: _shipped(name) for name in (*WORDS, TOKENIZER, SAMPLE, MANIFEST)}
    results = {
        f"{name}: has the hash in {MANIFEST}": _sha(shipped[name]) == manifest["sha256"].get(name)
        for name in (*WORDS, TOKENIZER, SAMPLE)
    }
    results[f"{SAMPLE}: made again, the same"] = sample(tokenizer) == shipped[SAMPLE]
    again = _manifest(tokenizer, manifest["books"], shipped)
    results[f"{MANIFEST}: made again, the same (except for the books)"] = again == shipped[MANIFEST]
    books, skipped = _books(), None
    if books is None:
        skipped = "PROSG_TEST_DATA is not set; data/DATASHEET.md lists the books"
    elif books != manifest["books"]:
        skipped = "the books in PROSG_TEST_DATA are not those that data/DATASHEET.md lists"
    else:
        results["books: those that the manifest names"] = True
        results[f"{TOKENIZER}: trained again, the same"] = _file(_train()) == shipped[TOKENIZER]
    for what, equal in results.items():
        print(f"{'ok ' if equal else 'NOT'} {what}")
    if skipped:
        print(f"--  {TOKENIZER}: not trained again, {skipped}")
    return all(results.values())


def write_manifest() -> None:
    """Write the manifest again for what is in `data/` now; its books stay."""
    shipped = {name: _shipped(name) for name in (TOKENIZER, SAMPLE)}
    text = _manifest(load_tokenizer(), files.read_json(data_dir() / MANIFEST)["books"], shipped)
    files.write_text(data_dir() / MANIFEST, text)


def sample(tokenizer: Tokenizer) -> str:
    """Dialogues of every split, one JSON object a line, with our own sentences as the prose."""
    rows = []
    for split, count in SAMPLE_COUNTS.items():
        own = ProseTokens.of(Prose("own", {split: own_sentences(split)}), split, tokenizer)
        data = dialogue.Dialogues(tokenizer, own, split, seed=0)
        rows += [data.row(item) for item in data.items(count, _SAMPLE_SHAPE)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _shipped(name: str) -> str:
    return files.read_text(data_dir() / name)


def _train() -> Tokenizer:
    return Tokenizer.train([*_every_word(), *_facts_and_questions(), *load_prose().paragraphs["train"]], VOCAB)


def _file(tokenizer: Tokenizer) -> str:
    return tokenizer.to_json() + "\n"


def _manifest(tokenizer: Tokenizer, books: dict, made: dict[str, str]) -> str:
    texts = {name: _shipped(name) for name in WORDS} | {name: made[name] for name in (TOKENIZER, SAMPLE)}
    manifest = {
        "version": dialogue.VERSION,
        "data_hash": dialogue.data_hash(tokenizer),
        "data_hash_rich": dialogue.data_hash(tokenizer, rich=True),
        "sha256": {name: _sha(text) for name, text in texts.items()},
        "shipped": {
            path.relative_to(data_dir()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for folder in TRAINED
            for path in sorted((data_dir() / folder).iterdir())
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
            texts.append(f"{statement}\nUser: {question}\nBot: {wording.full_answer(fact.value, instructions)}")
    return texts


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["check"]:
            return 0 if check() else 1
        if arguments not in ([], ["manifest"]):
            raise UserError(f"unknown arguments {' '.join(arguments)!r}; use none, `check` or `manifest`")
        write_manifest() if arguments else build()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
