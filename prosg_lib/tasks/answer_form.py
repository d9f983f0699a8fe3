"""The form of an answer: a value, surrounded by the words that instructions ask for."""

from __future__ import annotations

from collections.abc import Mapping, Set


def full_answer(value: str, instructions: Mapping[str, str]) -> str:
    """`Well, Oslo, captain, over.`, with the instructions' words (kind -> word) in their places."""
    parts = [instructions.get("opener"), value, instructions.get("address"), instructions.get("closer")]
    return ", ".join(p for p in parts if p) + "."


def taken_apart(
    generated: str, instructions: Mapping[str, str], words: Mapping[str, Set[str]]
) -> tuple[str, float | None]:
    """What an answer says without the words of instructions, and the share of the instructions that it follows.

    An instruction is followed if its word stands in its place: the opener first, the closer last, the address after
    the value.

    Args:
        instructions: of the prompt, kind -> word.
        words: of every kind, all that there are; one in its place is no part of what is said.
    Returns:
        What is said, and the share; None if there are no instructions.
    """
    parts = generated.strip().removesuffix(".").split(", ")
    known = {kind: {*listed, instructions.get(kind)} for kind, listed in words.items()}
    found = {"opener": parts.pop(0) if parts and parts[0] in known["opener"] else None}
    for kind in ("closer", "address"):
        found[kind] = parts.pop() if parts and parts[-1] in known[kind] else None
    followed = [found[kind] == word for kind, word in instructions.items()]
    return ", ".join(parts), sum(followed) / len(followed) if followed else None
