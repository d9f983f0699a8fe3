"""The checksum in every safetensors file that the project writes, and the list of what it ships."""

import hashlib
import json
import warnings
from pathlib import Path

from prosg_lib import paths
from prosg_lib.errors import UserError

KEY = "prosg.sha256"
"""The entry of a file's header; other libraries ignore it."""

MANIFEST = "MANIFEST.json"
"""In `data/`: the sha256 of every shipped file."""

_PREFIX = "prosg-sha256:"
_BLANK = _PREFIX + "0" * 64


def sealed(content: bytes) -> tuple[bytes, memoryview]:
    """A serialised safetensors file, header and data, with a checksum in its header over every other byte of both."""
    data = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    header = json.loads(content[8 : len(content) - len(data)])
    entries = {KEY: _BLANK} | header.pop("__metadata__", {})
    text = json.dumps({"__metadata__": entries} | header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    digest.update(data)
    return head.replace(_BLANK.encode(), (_PREFIX + digest.hexdigest()).encode(), 1), data


def verify(path: Path, own: bool) -> None:
    """Compares a safetensors file, whose format is in order, with the checksum that it states.

    Args:
        own: the project wrote it. Without a checksum, as earlier versions wrote it, it is compared with the manifest if
            it is shipped, and otherwise there is a warning. Files of other projects without one pass.
    Raises:
        UserError: they differ.
    """
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        entries = json.loads(header).get("__metadata__", {})
        # By the entry's name and by its content: no flipped bit hides both.
        stated = entries.get(KEY) or next((v for v in entries.values() if v.startswith(_PREFIX)), None)
        if not (stated or own):
            return
        found = hashlib.sha256(length + (header.replace(stated.encode(), _BLANK.encode(), 1) if stated else header))
        while block := file.read(2**20):
            found.update(block)
    if not stated:
        _compare_with_manifest(path, found.hexdigest())
    elif stated != _PREFIX + found.hexdigest():
        raise UserError(
            f"{path} is damaged: its content does not have its checksum; remove it and train or copy it again."
        )


def _compare_with_manifest(path: Path, digest: str) -> None:
    try:
        data = paths.data_dir()
        shipped = json.loads((data / MANIFEST).read_text(encoding="utf-8"))["shipped"].values()
    except UserError:  # installed without the checkout
        data, shipped = None, ()
    except (OSError, ValueError, KeyError) as error:
        where = data / MANIFEST
        raise UserError(f"{where} cannot be read ({error}); restore it: git checkout -- {where}") from error
    if digest in shipped:
        return
    if data and path.resolve().parent == data / "checkpoints":
        raise UserError(f"{path} is not the file that {MANIFEST} lists; restore it: git checkout -- {path}")
    warnings.warn(
        f"{path} has no checksum, as an earlier version wrote it: damage would go unnoticed. "
        "Load it and save it again, and it has one.",
        stacklevel=2,
    )
