"""Reading and writing files: whole or not at all, every failure one UserError, a checksum in every safetensors file.

Every write goes to a temporary file beside the target, is flushed to the disk, and replaces the target in one step. A
crash, a kill or a full disk at any moment leaves the previous file as it was. docs/files.md has what is promised.
"""

import contextlib
import errno
import gzip
import io
import json
import os
import secrets
import shutil
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosg_lib import checksums
from prosg_lib.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and JSON does not need it
    from torch import Tensor

META_KEY = "prosg"
"""The entry of a safetensors header that holds our description; other projects' files lack it."""

LARGEST_EXPANDED = 2**29
"""Bytes that a gzipped file may expand to: the largest that this project writes has 2 % of that."""

_DEAD_AFTER_S = 24 * 3600  # no write takes a day; process ids say nothing about other machines and containers


# Errors


@contextlib.contextmanager
def errors_of(path: str | Path, doing: str) -> Iterator[None]:
    """What goes wrong with a file inside becomes one UserError that names it.

    Args:
        doing: "read", which includes errors of decoding and parsing, or "written", which only includes the disk's:
            others are about what is being written, and pass.
    """
    try:
        yield
    except Exception as error:
        what = _read_error(error) if doing == "read" else _write_error(error)
        if what is None:
            raise
        raise UserError(f"{path}{what}") from error


def _read_error(error: Exception) -> str | None:
    match error:
        case FileNotFoundError():
            return " does not exist."
        case IsADirectoryError():
            return " is a folder; give a file."
        case OSError():
            return f" could not be read ({error.strerror or error})."
        case UnicodeDecodeError():
            return f" is not UTF-8 text (byte {error.start}); convert it to UTF-8."
        case json.JSONDecodeError():
            return f", line {error.lineno}: not JSON ({error.msg}); restore it or write it again."
        case RecursionError():
            return " is nested too deeply; restore it or write it again."
        case EOFError() | zlib.error():
            return f" is cut short or damaged ({error}); copy it again."
        case ValueError() if "integer string conversion" in str(error):
            return " has a number with thousands of digits; restore it or write it again."
        case ValueError():
            return f" cannot be used ({error}); restore it or write it again."


def _write_error(error: Exception) -> str | None:
    # safetensors has the number in its message only
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "StorageFull" in str(error):
        return (
            " could not be written: the disk is full. What was there before is unchanged. "
            "Free some space, or name a folder on another disk (PROSG_RUNS, --out), and run it again."
        )
    if isinstance(error, OSError) or "embedded null" in str(error):  # the latter is a ValueError of Python's
        why = getattr(error, "strerror", None) or error
        return f" could not be written ({why}); what was there before is unchanged."


def check_writable(folder: str | Path, option: str) -> None:
    """Makes the folder and writes a byte into it, before work begins whose result is to be kept there.

    Args:
        option: what the user sets to another folder: "--out", "PROSG_RUNS".
    Raises:
        UserError: it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder)
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # the latter for a name with a NUL
        in_the_way = isinstance(error, FileExistsError)
        reason = "a file or a broken link has its name" if in_the_way else getattr(error, "strerror", error)
        raise UserError(
            f"The folder {folder} cannot be written to ({reason}); choose another with {option}."
        ) from error


@contextlib.contextmanager
def lock(path: str | Path, what: str) -> Iterator[None]:
    """Nobody else enters with the same `path` until this ends, or its process dies.

    Where there are no such locks (Windows, some network drives) everyone enters.

    Args:
        path: a file of its own, made if need be; it stays, and says who holds it or held it last.
        what: the subject of the message, e.g. "the folder runs/cpu".
    Raises:
        UserError: another process is in it; or the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = Path(path)
    with errors_of(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{what} is in use by {holder}; wait until it has ended, or stop it.") from None
        except OSError:
            pass
        with errors_of(path, "written"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        yield


# Writing


def write_bytes(path: str | Path, *parts: "bytes | memoryview") -> None:
    """Write `parts`, one behind the other, to `path` atomically; creates the folder if it is missing.

    Raises:
        UserError: the disk (or the quota) is full, or the folder cannot be written to. The temporary file is removed,
            and a previous `path` is unchanged.
    """
    path = Path(path)
    with errors_of(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        temporary = _temporary(path.parent)
        try:
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Move what another library writes into `folder` once all of it is complete; safetensors files get a checksum.

    A failure while it is written, a full disk for example, changes nothing. The files are then moved one by one, the
    configuration last: whoever kills the process between two of them finds some new and some old.

    Args:
        folder: created if it is missing; files of other names in it stay.
        write: fills the (temporary) folder that it is given, without subfolders.
    Raises:
        UserError: the disk (or the quota) is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    with errors_of(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = _temporary(folder)  # inside: the folder above may be somebody else's
        try:
            temporary.mkdir()
            write(temporary)
            for file in temporary.glob("*.safetensors"):
                write_bytes(file, *checksums.sealed(file.read_bytes()))
            for file in temporary.iterdir():
                with open(file, "rb") as complete:
                    os.fsync(complete.fileno())
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
            _sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """A name that no other process, machine or container uses, however long the target's own name is."""
    return folder / f".prosg-{secrets.token_hex(8)}.tmp"


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writer was killed: those that nobody has touched for a day."""
    for leftover in folder.glob(".prosg-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _DEAD_AFTER_S:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; some file systems do not allow a folder to be opened or synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    r"""`write_bytes` for text, in UTF-8; half a character (a lone surrogate) is written as JSON does, \ud83d."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON does not have.
        UserError: as `write_bytes`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# Text


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, gzipped or not, without a byte order mark, lines ending in "\\n".

    Raises:
        UserError: the file is missing, cannot be read, is damaged, expands without end, or is not UTF-8.
    """
    with errors_of(path, "read"):
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST_EXPANDED + 1)
            if len(content) > LARGEST_EXPANDED:
                raise UserError(f"{path} expands to more than {LARGEST_EXPANDED / 2**20:.0f} MB; give a smaller file.")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """JSON that stands somewhere else than in a file of its own; `where` names it in messages.

    Raises:
        UserError: it is not JSON, nested too deeply, or has a key twice or a number of thousands of digits.
    """
    with errors_of(where, "read"):
        return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:99]!r} stands twice in one object")
    return found


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: as `read_text` and `parse_json`; names the file and, where possible, the line.
    """
    return parse_json(read_text(path), path)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON Lines, gzipped or not: one object a line; empty lines are skipped.

    Raises:
        UserError: as `read_text` and `parse_json`, with the line's number; a line is no object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(parse_json(line, f"{path}, row {number}"))
            if not isinstance(rows[-1], dict):
                raise UserError(f"{path}, row {number} is not a JSON object; restore the file or write it again.")
    return rows


# Tensors


def save_tensors(path: str | Path, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any] | None) -> None:
    """Write tensors and a description of them as one safetensors file with a checksum, atomically.

    Args:
        tensors: by name, any shapes, dtypes and devices; tensors that share memory are stored separately.
        meta: JSON-able; stored in the file's header. None: a file for transformers and PEFT, which want another entry.
    Raises:
        UserError: as `write_bytes`; a previous file is unchanged.
        ValueError, TypeError: `meta` is not JSON-able.
    """
    from safetensors.torch import save

    header = {"format": "pt"} if meta is None else {META_KEY: json.dumps(meta, sort_keys=True, allow_nan=False)}
    plain = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    write_bytes(path, *checksums.sealed(save(plain, metadata=header)))


def load_tensors(path: str | Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read what `save_tensors` wrote: the tensors, on the CPU, and their description.

    A file without a checksum, of an earlier version, is compared with `data/MANIFEST.json` if the project ships it, and
    otherwise read with a warning.

    Raises:
        UserError: the file is missing, damaged anywhere, not a safetensors file, or not written by this project.
    """
    with _opened(path) as file:
        return _tensors(file), _meta(file, path)


def load_meta(path: str | Path) -> dict[str, Any]:
    """The description alone, without loading tensors; raises the same errors as `load_tensors`."""
    with _opened(path) as file:
        return _meta(file, path)


def load_foreign_tensors(path: str | Path) -> "dict[str, Tensor]":
    """Read a safetensors file of another project, or one for it: its tensors, on the CPU.

    Raises:
        UserError: the file is missing, truncated, not a safetensors file, or does not have the checksum that it states.
    """
    return load_any_tensors(path)[0]


def load_any_tensors(path: str | Path) -> "tuple[dict[str, Tensor], dict[str, Any] | None]":
    """`load_tensors` of this project's files, `load_foreign_tensors` and None of others."""
    with _opened(path) as file:
        return _tensors(file), _meta(file, path) if META_KEY in (file.metadata() or {}) else None


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with errors_of(path, "read"):
        with open(path, "rb") as file:  # the operating system's errors: safetensors has none of its own for them
            size = os.fstat(file.fileno()).st_size
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                checksums.verify(Path(path), META_KEY in (opened.metadata() or {}))
                yield opened
        except SafetensorError as error:
            raise UserError(
                f"{path} ({size} bytes) is cut short or not a safetensors file ({error}); "
                "remove it and train or copy it again."
            ) from error


def verify(path: str | Path) -> None:
    """What `load_foreign_tensors` checks, for a file that another library is going to read; raises the same errors."""
    with _opened(path):
        pass


def _tensors(file: Any) -> "dict[str, Tensor]":
    # Cloned, because the tensors are views of the mapped file, which the next save may replace.
    return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _meta(file: Any, path: str | Path) -> dict[str, Any]:
    header = file.metadata() or {}
    if META_KEY not in header:
        raise UserError(
            f"{path} is a safetensors file, but not one of this project's (its header has no {META_KEY!r} entry); "
            "give the path of a file that prosg wrote."
        )
    meta = parse_json(header[META_KEY], path)
    if not isinstance(meta, dict):
        raise UserError(f"{path} has a description that is not a JSON object; remove it and train or copy it again.")
    return meta
