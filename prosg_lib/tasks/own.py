"""A user's own dialogues: read from a file, checked row by row, and turned into items that evaluation can use.

JSON Lines, one dialogue a line, with the columns that `data/dialogue_sample.jsonl` has (`dialogue.to_row`)::

    {"split": "test", "prompt": "User: I live in Oslo. Call me captain.", "body": "Other text.\\nMore of it.",
     "probes": [{"question": "Where do I live?", "answer": "Oslo, captain.", "value": "Oslo"}],
     "instructions": {"address": "captain"}}

or CSV with the same five columns, `probes` and `instructions` holding JSON. The model is asked `User: <question>`, and
`dialogue.judge` looks in what it answers for the value with the instructed words around it. A probe may name its
`slot`; it counts for nothing but the reader.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.files import json_kind
from prosg_lib.tasks.dialogue import TEXT, Fact, Item, Probe, Verdict, full_answer, judge, words
from prosg_lib.tasks.rows import Place, check_columns, check_text, json_rows, read_json, text_of
from prosg_lib.text.prose import SPLITS, check_split
from prosg_lib.text.tokenizer import Tokenizer

COLUMNS = ("split", "prompt", "body", "probes", "instructions")
_PROBE, _PROBE_OPTIONAL = ("question", "answer", "value"), ("slot",)


def read_items(path: str | Path, tokenizer: Tokenizer, split: str | None = None) -> list[Item]:
    """The dialogues of a .jsonl or .csv file, in its order.

    Args:
        tokenizer: the model's; an item's distance is its body's length in this tokenizer's tokens.
        split: keep only the rows of this split. All rows are checked in any case.
    Returns:
        Items whose facts are what their probes ask for. Every body token counts as text: what a user's body says of
        others is not known.
    Raises:
        UserError: the file is missing, not UTF-8, of another kind, or has no row (of the split); or a row is malformed,
            named by its line and column.
    """
    path = Path(path)
    if split is not None:
        check_split(split)
    readers: dict[str, Callable[[Path, str], Iterator[tuple[Place, dict]]]] = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} is neither .jsonl nor .csv; write one dialogue a line as data/dialogue_sample.jsonl does"
        )
    rows = [(place, _row(place, row)) for place, row in readers[path.suffix.lower()](path, text_of(path))]
    if not rows:
        raise UserError(f"{path} has no rows; write one dialogue a line as data/dialogue_sample.jsonl does")
    kept = [_item(row, tokenizer) for _, row in rows if split in (None, row["split"])]
    if not kept:
        there = sorted({row["split"] for _, row in rows})
        raise UserError(f"{path} has no row of the split {split!r}, only of {', '.join(there)}; ask for one of these")
    return kept


def _jsonl(path: Path, text: str) -> Iterator[tuple[Place, dict]]:
    return json_rows(path, text, COLUMNS)


def _csv(path: Path, text: str) -> Iterator[tuple[Place, dict]]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a body may be longer than csv's 131,072 characters
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header = next(reader, [])
        check_columns(Place(path, 1), header, COLUMNS)
        before = reader.line_num
        for cells in reader:
            place, before = Place(path, before + 1), reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise place.error(f"{len(cells)} cells under {len(header)} columns; quote cells that hold commas")
            row = dict(zip(header, cells, strict=True))
            yield place, row | {c: read_json(place, c, row[c]) for c in ("probes", "instructions")}
    except csv.Error as error:
        raise Place(path, reader.line_num).error(f"not CSV ({error}); check the quotes") from error


def _row(place: Place, row: dict) -> dict:
    """The row, checked: what follows may rely on its types."""
    check_columns(place, list(row), COLUMNS)
    if row["split"] not in SPLITS:
        raise place.error(f"unknown split {row['split']!r}; write one of {', '.join(SPLITS)}", "split")
    check_text(place, "prompt", row["prompt"])
    check_text(place, "body", row["body"], empty=True)
    check_instructions(place, row["instructions"])
    if not isinstance(row["probes"], list) or not row["probes"]:
        raise place.error("a list of one question or more was expected; write [{...}, ...]", "probes")
    for i, probe in enumerate(row["probes"]):
        _check_probe(place, f"probes[{i}]", probe, row["instructions"])
    return row


def check_instructions(place: Place, value) -> None:
    """A UserError unless the value is an object of instructions: a word, in one line, by kind."""
    if not isinstance(value, dict):
        raise place.error(
            f"an object was expected, not {json_kind(value)}; write {{}} where nothing is instructed", "instructions"
        )
    kinds = sorted(words()["instructions"])
    for kind, word in value.items():
        if kind not in kinds:
            raise place.error(f"unknown kind of instruction; there are {', '.join(kinds)}", f"instructions.{kind}")
        check_text(place, f"instructions.{kind}", word, one_line=True)


def _check_probe(place: Place, column: str, probe, instructions: dict[str, str]) -> None:
    if not isinstance(probe, dict):
        raise place.error(
            f"an object was expected, not {json_kind(probe)}; write {{...}} with {', '.join(_PROBE)}", column
        )
    for name in _PROBE:
        if name not in probe:
            raise place.error(f"missing; a probe has {', '.join(_PROBE)}", f"{column}.{name}")
    for name, text in probe.items():
        if name not in _PROBE + _PROBE_OPTIONAL:
            raise place.error(f"unknown column; a probe has {', '.join(_PROBE)}", f"{column}.{name}")
        check_text(place, f"{column}.{name}", text, one_line=True)
    right = Verdict(recalled=True, followed=1.0 if instructions else None)
    value = probe["value"].strip()
    best = full_answer(value, _stripped(instructions))
    if judge(best, value, _stripped(instructions)) != right:
        raise place.error(
            "the value, or an instruction's word, reads as another instruction's word, so no answer could be judged; "
            "choose other words",
            f"{column}.value",
        )
    if judge(probe["answer"], value, _stripped(instructions)) != right:
        raise place.error(
            f"{probe['answer']!r} is not the value with the instructed words around it; write {best!r}",
            f"{column}.answer",
        )


def _item(row: dict, tokenizer: Tokenizer) -> Item:
    probes = tuple(_probe(p) for p in row["probes"])
    body = row["body"] if not row["body"] or row["body"].endswith("\n") else row["body"] + "\n"
    ids = tuple(tokenizer.encode_long(body))
    return Item(
        prompt=row["prompt"].strip() + "\n",
        facts=tuple(p.fact for p in probes),
        instructions=_stripped(row["instructions"]),
        body=ids,
        body_kind=(TEXT,) * len(ids),
        probes=probes,
    )


def _probe(probe: dict) -> Probe:
    fact = Fact(probe.get("slot", "").strip(), probe["value"].strip())
    return Probe(fact, probe["question"].strip(), probe["answer"].strip())


def _stripped(instructions: dict[str, str]) -> dict[str, str]:
    return {kind: word.strip() for kind, word in instructions.items()}
