"""Reading and writing files: atomic writes, JSON, and safetensors with a JSON description.

Every write goes to a temporary file beside the target, is flushed to the disk, and replaces the target in one step. A
crash, a kill or a full disk at any moment leaves the previous file as it was.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prosg_lib.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and JSON does not need it
    from torch import Tensor

META_KEY = "prosg"
"""The one key of a file's header: its bytes depend on no hash map's order, and other projects' files lack it."""


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically; creates the folder if it is missing.

    Raises:
        UserError: the disk (or the quota) is full. The temporary file is removed, and a previous `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _full_disk_named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Move what another library writes into `folder` once all of it is complete, file by file.

    Args:
        folder: created if it is missing; files of other names in it stay.
        write: fills the (temporary) folder that it is given, without subfolders.
    Raises:
        UserError: the disk (or the quota) is full; `folder` is unchanged.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with _full_disk_named(folder):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            for file in temporary.iterdir():
                with open(file, "rb") as complete:
                    os.fsync(complete.fileno())
            folder.mkdir(exist_ok=True)
            # The configuration last: if it is there, everything else is.
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, folder / file.name)
            _sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # safetensors has the number in its message only
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "StorageFull" in str(error):
            raise UserError(
                f"The disk is full: {path} could not be written; what was there before is unchanged. "
                "Free some space (or set PROSG_RUNS to a folder on another disk) and run it again."
            ) from error
        raise


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files for `path` whose writer was killed (the writer's process id is in the name)."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        pid = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if pid.isdigit() and not _alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; some file systems do not allow a folder to be opened or synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON does not have.
        UserError: the disk is full.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; names the file and, where possible, the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); restore it or write it again.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); restore it or write it again."
        ) from error


def save_tensors(path: str | Path, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any]) -> None:
    """Write tensors and a description of them as one safetensors file, atomically.

    Args:
        tensors: by name, any shapes, dtypes and devices; tensors that share memory are stored separately.
        meta: JSON-able; stored in the file's header.
    Raises:
        UserError: the disk is full; a previous file is unchanged.
        ValueError, TypeError: `meta` is not JSON-able.
    """
    from safetensors.torch import save

    header = {META_KEY: json.dumps(meta, sort_keys=True, allow_nan=False)}
    plain = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    write_bytes(path, save(plain, metadata=header))


def load_tensors(path: str | Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read what `save_tensors` wrote: the tensors, on the CPU, and their description.

    Raises:
        UserError: the file is missing, truncated, not a safetensors file, or not written by this project.
    """
    with _opened(path) as file:
        return _tensors(file), _meta(file, path)


def load_meta(path: str | Path) -> dict[str, Any]:
    """The description alone, without loading tensors; raises the same errors as `load_tensors`."""
    with _opened(path) as file:
        return _meta(file, path)


def load_foreign_tensors(path: str | Path) -> "dict[str, Tensor]":
    """Read a safetensors file of another project: its tensors, on the CPU.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    with _opened(path) as file:
        return _tensors(file)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; train it or copy it there.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is cut short or not a safetensors file ({error}); "
            "remove it and train or copy it again."
        ) from error


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
    return json.loads(header[META_KEY])
