"""Files are complete or missing, and an error names the file and a remedy."""

import errno
import gzip
import hashlib
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

from prosg_lib import checksums, files
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


MINE, FOREIGN = {"kind": "delta", "text": "naïve"}, None


@pytest.mark.parametrize("meta", [MINE, FOREIGN])
def test_every_flipped_bit_is_found(tmp_path, meta):
    """One of every byte: length, header, the checksum itself and the data; PEFT's and transformers' files as well."""
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"w": torch.randn(3, 2), "v": torch.ones(2, dtype=torch.uint8)}, meta)
    read = files.load_foreign_tensors if meta is FOREIGN else files.load_tensors
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.safetensors"):
            read(path)


def test_files_for_others_are_read_by_others(tmp_path):
    """The checksum is one more entry of the header, which no reader minds."""
    files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, None)
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["x"].eq(1).all()
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_file_without_a_checksum(tmp_path, monkeypatch):
    """A shipped one is compared with the manifest, wherever it is; an own one is read with a warning whose advice
    helps; another project's has none."""
    old, own = tmp_path / "checkpoints" / "old.safetensors", tmp_path / "own.safetensors"
    old.parent.mkdir()
    old.write_bytes(whole())
    files.write_json(tmp_path / checksums.MANIFEST, {"shipped": {"x": hashlib.sha256(old.read_bytes()).hexdigest()}})
    monkeypatch.setattr(checksums.paths, "data_dir", lambda: tmp_path)
    content = old.read_bytes()
    for path in (old, own):
        path.write_bytes(content)
        files.load_tensors(path)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"old\.safetensors is not the file that MANIFEST\.json lists; restore it"):
        files.load_tensors(old)
    with pytest.warns(
        UserWarning, match=r"own\.safetensors has no checksum.*Load it and save it again, and it has one"
    ):
        files.save_tensors(own, *files.load_tensors(own))
    files.load_tensors(own)
    own.write_bytes(safetensors.torch.save({"x": torch.ones(2)}))
    files.load_foreign_tensors(own)
    (tmp_path / checksums.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"MANIFEST\.json cannot be read .*restore it"):
        files.load_tensors(old)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        *(
            (files.load_tensors, lambda n=n: whole()[:n], "cut short.*remove it and train or copy it again")
            for n in (0, 4, 40, -1)
        ),
        (files.load_tensors, None, "does not exist"),
        (files.load_tensors, lambda: b"long enough to have a header, but no tensors", "not a safetensors file"),
        (files.load_tensors, lambda: safetensors.torch.save({"x": torch.ones(2)}), "not one of this project's"),
        (files.load_meta, lambda: safetensors.torch.save({"x": torch.ones(2)}), "not one of this project's"),
        (files.load_foreign_tensors, lambda: whole()[:-1], "cut short.*remove it and train or copy it again"),
        (files.load_meta, lambda: safetensors.torch.save({}, {files.META_KEY: "[]"}), "not a JSON object"),
        (files.load_meta, lambda: safetensors.torch.save({}, {files.META_KEY: "["}), "not JSON"),
        (files.read_json, lambda: b'{"a": 1,\n "b": }', ", line 2: not JSON"),
        (files.read_json, lambda: b"[" * 100_000, "nested too deeply"),
        (files.read_json, lambda: b"1" * 5_000, "a number with thousands of digits"),
        (files.read_json, lambda: b'[{"a": 1, "b": {"c": 1, "c": 2}}]', "'c' stands twice"),
        (files.read_json, None, "does not exist"),
        (files.read_text, lambda: "caf\u00e9".encode("latin-1"), "is not UTF-8 text .byte 3"),
        (files.read_text, lambda: gzip.compress(b"x" * 1000)[:-9], "cut short or damaged"),
        (files.read_text, lambda: gzip.compress(b"x" * 1000)[:-1] + b"x", "could not be read"),
        (files.read_text, lambda: gzip.compress(b"x" * 1001), "expands to more than"),
        (files.read_rows, lambda: b'{"a": 1}\n{"a": }', "row 2, line 1: not JSON"),
        (files.read_rows, lambda: b"{}\n\n[]", "row 3 is not a JSON object"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_unreadable_files_are_named(tmp_path, monkeypatch, read, content, message):
    """Missing, cut short anywhere (in the length, the header, the data), of another format or project, too large."""
    monkeypatch.setattr(files, "LARGEST_EXPANDED", 1000)
    if content is not None:
        (tmp_path / "mine.file").write_bytes(content())
    with pytest.raises(UserError, match=rf"mine\.file.*{message}"):
        read(tmp_path / "mine.file")


def test_a_path_that_cannot_be_read(tmp_path):
    """A folder, a name too long for any file, a link to itself."""
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / "loop"):
        for read in (files.read_text, files.load_tensors):
            with pytest.raises(UserError, match=r"is a folder|could not be read .(File name too long|Too many levels)"):
                read(path)


def test_text_as_other_programs_write_it(tmp_path):
    """A byte order mark, the line ends of other systems, gzip; characters that separate lines in Python alone."""
    path = tmp_path / "a.txt"
    for content in (b"\xef\xbb\xbf[1,\r\n2]\r", gzip.compress(b"[1,\n2]\n")):
        path.write_bytes(content)
        assert files.read_text(path) == "[1,\n2]\n"
        assert files.read_json(path) == [1, 2]
    rows = [{"a": "\u2028\x85"}, {"a": "x"}]
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert files.read_rows(path) == rows
    files.write_json(path, "half a character: \ud83d")
    assert files.read_json(path) == "half a character: \ud83d"


def test_names_as_long_as_the_system_allows(tmp_path):
    """The temporary file's is no longer; a name that no file can have is refused."""
    files.write_json(tmp_path / ("x" * 250 + ".json"), {})
    for name, why in (("x" * 300, "File name too long"), ("a\0b", "embedded null byte")):
        with pytest.raises(UserError, match=rf"could not be written .{why}"):
            files.write_json(tmp_path / name, {})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, number):
    """A full disk gives a clear error, leaves no temporary file, and the previous file is unchanged."""
    path = tmp_path / "a.safetensors"
    files.save_tensors(path, {"x": torch.ones(3)}, {"step": 1})

    def full(descriptor):
        raise OSError(number, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"a\.safetensors could not be written: the disk is full. What was there before is unchanged"
    ):
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
        with pytest.raises(expected, match=r"folder could not be written: the disk is full|no"):
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
    """Any other error of the system is named as well, and leaves no temporary file either."""

    def broken(source, target):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(UserError, match=r"a could not be written \(no\)"):
        files.write_bytes(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def write_for_ever(path):
    number = 0
    while True:
        files.write_json(path, {"number": number, "padding": "x" * 200_000})
        number += 1


def test_killed_writer_leaves_a_whole_file(tmp_path):
    """SIGKILL in the middle of writing leaves a whole file; its leftovers go when nobody can be writing them."""
    path = tmp_path / "a.json"
    for delay in (0.05, 0.11, 0.17):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        files.write_json(path, {"padding": ""})
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert "padding" in json.loads(path.read_text())
    (tmp_path / ".prosg-folder.tmp").mkdir()
    files.write_json(path, {})
    left = leftovers(tmp_path)
    assert ".prosg-folder.tmp" in left
    for name in left:
        os.utime(tmp_path / name, 2 * (time.time() - 25 * 3600,))
    files.write_json(path, {})
    assert leftovers(tmp_path) == []


def test_writers_at_once_do_not_meet(tmp_path):
    """Several processes with the same id, as containers have them: every write succeeds, and the file is whole."""
    path = tmp_path / "a.json"
    code = "import os, sys; os.getpid = lambda: 1\nfrom prosg_lib import files\n"
    code += "for i in range(150): files.write_json(sys.argv[1], {'padding': 'x' * 20_000})"
    writers = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert files.read_json(path)["padding"]
    assert leftovers(tmp_path) == []


HOLD = """
import sys, time
from prosg_lib import files
with files.lock(sys.argv[1], "the kitchen"):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path):
    """While another process is in, nobody enters, and the message says who is in; killed, it is in no longer."""
    path = tmp_path / "new" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"in\n"
    message = f"the kitchen is in use by process {holder.pid} on .*wait until it has ended"
    with pytest.raises(UserError, match=message), files.lock(path, "the kitchen"):
        pass
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with files.lock(path, "the kitchen"):
            pass


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """A file or a broken link in the way; a folder on the way that is none; a full disk."""
    files.check_writable(tmp_path / "new" / "folder", "--out")
    assert leftovers(tmp_path / "new" / "folder") == []
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    for name, reason in (("file", "has its name"), ("link", "has its name"), ("file/x", "Not a directory")):
        with pytest.raises(UserError, match=f"{name} cannot be written to .*{reason}.*choose another with --out"):
            files.check_writable(tmp_path / name, "--out")
    with pytest.raises(UserError, match=r"a b cannot be written to .*embedded null"):
        files.check_writable(tmp_path / "a\0b", "--out")
    monkeypatch.setattr(
        files.Path, "write_bytes", lambda path, content: os.write(os.open("/dev/full", os.O_RDWR), b"x")
    )
    with pytest.raises(UserError, match="No space left"):
        files.check_writable(tmp_path, "--out")


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
        "import sys, prosg_lib.errors, prosg_lib.files, prosg_lib.paths, prosg_lib.provenance, prosg_lib.strict;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
