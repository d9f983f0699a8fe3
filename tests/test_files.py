"""Files are complete or missing, and an error names the file and a remedy."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from prosg_lib import files
from prosg_lib.errors import UserError


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_tensors_and_meta_come_back_bit_for_bit(tmp_path):
    """Dtypes, shapes, bits and the description survive, also of views, transposes and tensors that share memory."""
    base = torch.randn(3, 4)
    tensors = {
        "float": base,
        "transposed": base.T,
        "tied": base,
        "row": base[1],
        "half": base.bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 2),
    }
    meta = {"step": 3, "nested": {"list": [1, 2.5, None]}, "text": "naïve"}
    files.save_tensors(tmp_path / "new" / "folder" / "a.safetensors", tensors, meta)
    loaded, loaded_meta = files.load_tensors(tmp_path / "new" / "folder" / "a.safetensors")
    assert loaded_meta == files.load_meta(tmp_path / "new" / "folder" / "a.safetensors") == meta
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_same_content_gives_the_same_bytes(tmp_path):
    """Two saves of the same tensors and description are equal as files, so that hashes can be compared."""
    for name in ("a", "b"):
        files.save_tensors(tmp_path / name, {"x": torch.ones(3), "y": torch.zeros(2)}, {"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_loaded_tensors_survive_the_file_being_replaced(tmp_path):
    """A checkpoint that was loaded does not change when the next one is saved over it."""
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(1000)}, {})
    loaded, _ = files.load_tensors(path)
    files.save_tensors(path, {"x": torch.zeros(1000)}, {})
    assert loaded["x"].eq(1).all()


def whole() -> bytes:
    return safetensors.torch.save({"x": torch.randn(50)}, metadata={files.META_KEY: "{}"})


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        *((files.load_tensors, lambda n=n: whole()[:n], "cut short.*remove it") for n in (0, 4, 40, -1)),
        (files.load_tensors, None, "does not exist; train it or copy it there"),
        (files.load_tensors, lambda: b"long enough to have a header, but no tensors", "not a safetensors file"),
        (files.load_tensors, lambda: safetensors.torch.save({"x": torch.ones(2)}), "not one of this project's"),
        (files.load_meta, lambda: safetensors.torch.save({"x": torch.ones(2)}), "not one of this project's"),
        (files.load_foreign_tensors, lambda: whole()[:-1], "cut short.*copy it again"),
        (files.read_json, lambda: b'{"a": 1,\n "b": }', "line 2: not JSON"),
        (files.read_json, lambda: b"\xff\xfe", "is not UTF-8"),
        (files.read_json, None, "does not exist"),
    ],
)
def test_unreadable_files_are_named(tmp_path, read, content, message):
    """Missing, cut short anywhere (in the length, the header, the data), of another format or project."""
    if content is not None:
        (tmp_path / "mine.file").write_bytes(content())
    with pytest.raises(UserError, match=rf"mine\.file.*{message}"):
        read(tmp_path / "mine.file")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, number):
    """A full disk gives a clear error, leaves no temporary file, and the previous file is unchanged."""
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)}, {"step": 1})

    def full(descriptor):
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*a\.safetensors.*what was there before is unchanged"):
        files.save_tensors(path, {"x": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    loaded, meta = files.load_tensors(path)
    assert meta == {"step": 1}
    assert loaded["x"].eq(1).all()
    assert leftovers(tmp_path) == []


def test_a_folder_is_filled_at_once(tmp_path):
    """What another library writes replaces files of the same names only once all of it is there; new folders, too."""
    target = tmp_path / "new" / "folder"

    def write(text, then=None):
        def write_into(place):
            (place / "config.json").write_text(text)
            assert not (target / "weights").exists() or (target / "weights").read_text() != text
            if then:
                raise then
            (place / "weights").write_text(text)

        return write_into

    files.write_folder(target, write("one"))
    (target / "notes").write_text("mine")
    failures = [(OSError(errno.ENOSPC, "full"), UserError), (RuntimeError("kind: StorageFull"), UserError)]
    for failure, expected in [*failures, (ValueError("no"), ValueError)]:
        with pytest.raises(expected, match=r"disk is full: .*folder could not be written|no"):
            files.write_folder(target, write("two", failure))
        assert {path.name: path.read_text() for path in target.iterdir()} == {
            "config.json": "one",
            "weights": "one",
            "notes": "mine",
        }
    files.write_folder(target, write("three"))
    assert {path.read_text() for path in target.iterdir()} == {"three", "mine"}
    assert leftovers(target.parent) == []


def test_other_failures_leave_nothing_behind(tmp_path, monkeypatch):
    """Any other error passes through as it is, and leaves no temporary file either."""

    def broken(source, target):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(PermissionError):
        files.write_bytes(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def write_for_ever(path):
    number = 0
    while True:
        files.write_json(path, {"number": number, "padding": "x" * 200_000})
        number += 1


def test_killed_writer_leaves_a_whole_file(tmp_path):
    """SIGKILL in the middle of writing leaves a whole file; the next write takes the killed one's leftovers away."""
    path = tmp_path / "a.json"
    for delay in (0.05, 0.11, 0.17):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        files.write_json(path, {"padding": ""})
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert "padding" in json.loads(path.read_text())
    files.write_json(path, {})
    assert leftovers(tmp_path) == []


def test_leftover_of_a_living_writer_stays(tmp_path):
    """Only dead writers' temporary files are removed: another process may be writing right now."""
    ours = tmp_path / f".a.json.{os.getppid()}.tmp"
    ours.write_text("half")
    files.write_json(tmp_path / "a.json", {})
    assert ours.exists()


def test_json_refuses_what_json_has_not(tmp_path):
    """NaN would be written as a word that other readers of JSON refuse."""
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    """Others may read what the umask lets them read, as with any file that was written in place."""
    files.write_json(tmp_path / "a.json", {})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_ground_floor_loads_no_torch():
    """These modules are imported by everything, also by commands that only read JSON."""
    code = (
        "import sys, prosg_lib.errors, prosg_lib.files, prosg_lib.paths, prosg_lib.provenance;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
