"""Makes what `data/` ships of the data set: the tokenizer, a small sample, and a manifest of what went in and out."""

from __future__ import annotations

import hashlib
import json
import random

from prosg_lib import files
from prosg_lib.config.sizes import VOCAB
from prosg_lib.errors import UserError
from prosg_lib.paths import data_dir
from prosg_lib.tasks import dialogue
from prosg_lib.text.prose import Prose, ProseTokens, books_by_split, books_folder, load_prose, own_sentences
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

_DIALOGUES = 32_000  # facts told and asked about in the tokenizer's training text, about as much text as the prose


_REPEATS = 2_000  # of the list of all values and names, which makes each of them one token


_SAMPLE = {"train": 40, "validation": 20, "test": 20}


_SAMPLE_SHAPE = dialogue.Shape(facts=6, distance=96, probes=3, instructions=1)


_WRITTEN = ("dialogue_words.json", "dialogue_asides.json")  # by hand; all else is made from them


_TOKENIZER, _SAMPLE_FILE, _MANIFEST = "tokenizer.json", "dialogue_sample.jsonl", "MANIFEST.json"


def build() -> dict[str, str]:
    """Write tokenizer.json, dialogue_sample.jsonl and MANIFEST.json to `data/`; says and returns their hashes.

    Raises:
        UserError: the books are not there, or are not those of the manifest: another tokenizer would fit none of the
            shipped checkpoints.
    """
    books = _books()
    if books is None:
        raise UserError(
            "the tokenizer is trained on the books that data/DATASHEET.md lists; "
            "set PROSG_TEST_DATA to a folder whose subfolder `books` holds them"
        )
    path = data_dir() / _MANIFEST
    if path.exists() and files.read_json(path)["books"] != books:
        raise UserError(
            f"these are not the books of {path}, and another tokenizer would fit none of the shipped checkpoints; "
            "use those books, or remove that file to begin a data set of your own"
        )
    tokenizer = _train()
    made = {_TOKENIZER: _file(tokenizer), _SAMPLE_FILE: _sample(tokenizer)}
    made[_MANIFEST] = _manifest(tokenizer, books, made)
    for name, text in made.items():
        files.write_text(data_dir() / name, text)
    load_tokenizer.cache_clear()
    hashes = {name: _sha(text) for name, text in made.items()}
    for name, digest in hashes.items():
        print(f"{name}: written, sha256 {digest}")
    return hashes


def check() -> bool:
    """Make again what can be made here, and compare it with `data/`; says for every file what was found.

    The sample and the manifest need nothing; the tokenizer needs the books. Returns whether all that was compared is
    equal.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    manifest = files.read_json(data_dir() / _MANIFEST)
    tokenizer = load_tokenizer()
    shipped = {name: _shipped(name) for name in (*_WRITTEN, _TOKENIZER, _SAMPLE_FILE, _MANIFEST)}
    results = {
        f"{name}: is the one that {_MANIFEST} names": _sha(shipped[name]) == manifest["sha256"].get(name)
        for name in (*_WRITTEN, _TOKENIZER, _SAMPLE_FILE)
    }
    results[f"{_SAMPLE_FILE}: made again, the same"] = _sample(tokenizer) == shipped[_SAMPLE_FILE]
    again = _manifest(tokenizer, manifest["books"], shipped)
    results[f"{_MANIFEST}: made again, the same (what it says of the books apart)"] = again == shipped[_MANIFEST]
    books = _books()
    not_checked = None
    if books is None:
        not_checked = "PROSG_TEST_DATA is not set; data/DATASHEET.md lists the books"
    elif books != manifest["books"]:
        not_checked = "the books in PROSG_TEST_DATA are not those that data/DATASHEET.md lists"
    else:
        results["books: those that the manifest names"] = True
        results[f"{_TOKENIZER}: trained again, the same"] = _file(_train()) == shipped[_TOKENIZER]
    for what, equal in results.items():
        print(f"{'ok ' if equal else 'NOT'} {what}")
    if not_checked:
        print(f"--  {_TOKENIZER}: not trained again, {not_checked}")
    return all(results.values())


def _shipped(name: str) -> str:
    try:
        return (data_dir() / name).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{data_dir() / name} is missing; restore it from the repository") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{data_dir() / name} is not UTF-8 text; restore it from the repository") from error


def _train() -> Tokenizer:
    return Tokenizer.train([*_every_word(), *_told_and_asked(), *load_prose().paragraphs["train"]], VOCAB)


def _file(tokenizer: Tokenizer) -> str:
    return tokenizer.to_json() + "\n"


def _manifest(tokenizer: Tokenizer, books: dict, made: dict[str, str]) -> str:
    texts = {name: _shipped(name) for name in _WRITTEN} | {name: made[name] for name in (_TOKENIZER, _SAMPLE_FILE)}
    manifest = {
        "version": dialogue.VERSION,
        "data_hash": dialogue.data_hash(tokenizer),
        "data_hash_rich": dialogue.data_hash(tokenizer, rich=True),
        "sha256": {name: _sha(text) for name, text in texts.items()},
        "books": books,
    }
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _books() -> dict | None:
    """What the prose was: by split the books' files, and size and hash of their paragraphs; None without a folder."""
    folder = books_folder()
    if folder is None:
        return None
    prose = load_prose(str(folder))
    return {
        split: {
            "files": sorted(p.name for p in paths),
            "characters": sum(map(len, prose.paragraphs[split])),
            "sha256": _sha("\n".join(prose.paragraphs[split])),
        }
        for split, paths in books_by_split(folder).items()
    }


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
        for item in data.items(count, _SAMPLE_SHAPE):
            rows.append(json.dumps(dialogue.to_row(data, item), ensure_ascii=False))
    return "\n".join(rows) + "\n"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
