"""A user's own dialogues: read from a file, checked row by row, and turned into items that can be evaluated.

JSON Lines, one dialogue a line, with the columns of `data/dialogue_sample.jsonl`::

    {"split": "test", "prompt": "User: I live in Oslo. Call me captain.", "body": "Other text.\\nMore of it.",
     "probes": [{"question": "Where do I live?", "answer": "Oslo, captain.", "value": "Oslo"}],
     "instructions": {"address": "captain"}}

The model reads `User: <question>`, and `dialogue.judge` looks for the value in its answer, with the words of the
instructions around it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.tasks.dialogue import TEXT, Dialogues, Fact, Item, Probe, Verdict, full_answer, judge, words
from prosg_lib.text.prose import SPLITS, check_split
from prosg_lib.text.tokenizer import Tokenizer

COLUMNS = ("split", "prompt", "body", "probes", "instructions")
PROBE_COLUMNS = ("question", "answer", "value")


def read_items(path: str | Path, tokenizer: Tokenizer, split: str | None = None) -> list[Item]:
    """The dialogues of a .jsonl file, in its order.

    Args:
        tokenizer: the model's; an item's distance is the length of its body in this tokenizer's tokens.
        split: keep only the rows of this split. All rows are checked in any case.
    Returns:
        Items whose facts are those of their probes. Every token of the body counts as text, because it is unknown what
        a user's body states about other people.
    Raises:
        UserError: the file is missing, not UTF-8, or has no row (of the split); or a row is malformed, which is named
            by its line and column.
    """
    path = Path(path)
    if split is not None:
        check_split(split)
    rows = []
    # Only "\n" ends a row; splitlines() would also cut at separators that JSON strings may contain.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_row(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows; write one dialogue a line as data/dialogue_sample.jsonl does")
    kept = [_item(row, tokenizer) for row in rows if split in (None, row["split"])]
    if not kept:
        found = ", ".join(sorted({row["split"] for row in rows}))
        raise UserError(f"{path} has no row of the split {split!r}, only of {found}; choose one of these")
    return kept


def to_row(data: Dialogues, item: Item) -> dict:
    """An item as a row of such a file."""
    return {
        "split": data.split,
        "prompt": item.prompt.removesuffix("\n"),
        "body": data.tokenizer.decode(item.body),
        "probes": [{"question": p.question, "answer": p.answer, "value": p.fact.value} for p in item.probes],
        "instructions": item.instructions,
    }


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from error


# Checks. Each raises a ValueError that names the column.


def _row(line: str) -> dict:
    """A line's object; what follows may rely on its types."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at character {error.colno} ({error.msg}); correct it") from None
    _check_columns(row, COLUMNS, "a row")
    if row["split"] not in SPLITS:
        raise ValueError(f"column 'split': unknown split {row['split']!r}; write one of {', '.join(SPLITS)}")
    _check_text(row["prompt"], "prompt")
    _check_text(row["body"], "body", empty=True)
    instructions = row["instructions"]
    if not isinstance(instructions, dict) or not instructions.keys() <= words()["instructions"].keys():
        kinds = ", ".join(sorted(words()["instructions"]))
        raise ValueError(f"column 'instructions': must be an object with one word for each kind, of {kinds}")
    for kind, word in instructions.items():
        _check_text(word, f"instructions.{kind}", one_line=True)
    if not isinstance(row["probes"], list) or not row["probes"]:
        raise ValueError("column 'probes': must be a list of at least one question; write [{...}, ...]")
    for i, probe in enumerate(row["probes"]):
        _check_probe(probe, f"probes[{i}]", _stripped(instructions))
    return row


def _check_columns(value: object, columns: Sequence[str], what: str) -> None:
    if not isinstance(value, dict) or sorted(value) != sorted(columns):
        found = ", ".join(value) if isinstance(value, dict) else f"{value!r:.60}"
        raise ValueError(
            f"{what} must be an object with the columns {', '.join(columns)}, and no others; found {found}"
        )


def _check_text(value: object, column: str, *, empty: bool = False, one_line: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"column {column!r}: must be text, but is {value!r:.60}")
    if one_line and "\n" in value.strip():
        raise ValueError(f"column {column!r}: has a line break, which ends a question or an answer; write one line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"column {column!r}: has half of a surrogate pair, which is not a character") from None


def _check_probe(probe: dict, column: str, instructions: dict[str, str]) -> None:
    _check_columns(probe, PROBE_COLUMNS, f"column {column!r}: a probe")
    for name in PROBE_COLUMNS:
        _check_text(probe[name], f"{column}.{name}", one_line=True)
    right = Verdict(recalled=True, followed=1.0 if instructions else None)
    value = probe["value"].strip()
    best = full_answer(value, instructions)
    if judge(best, value, instructions) != right:
        raise ValueError(
            f"column '{column}.value': the value, or an instruction's word, equals another instruction's word, so no "
            "answer could be judged; choose other words"
        )
    if judge(probe["answer"], value, instructions) != right:
        raise ValueError(
            f"column '{column}.answer': {probe['answer']!r} is not the value with the words of the instructions around "
            f"it; write {best!r}"
        )


def _item(row: dict, tokenizer: Tokenizer) -> Item:
    probes = tuple(
        Probe(Fact("", p["value"].strip()), p["question"].strip(), p["answer"].strip()) for p in row["probes"]
    )
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


def _stripped(instructions: dict[str, str]) -> dict[str, str]:
    return {kind: word.strip() for kind, word in instructions.items()}
