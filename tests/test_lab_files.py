"""Writing whole or not at all: full disks, failures in the middle, callbacks that swallow errors, locks."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, MissingDataError, StorageError
from ssl_kit.lab.files import (
    atomic_path,
    atomic_write,
    file_lock,
    read_json,
    remove_leftovers,
    sha256_file,
    sha256_json,
    to_plain,
    write_bytes,
    write_json,
    write_text,
)


@pytest.fixture
def old(tmp_path):
    """A file with content that must survive."""
    path = tmp_path / "result.json"
    path.write_text("old")
    return path


def only_old_is_there(path):
    return path.read_text() == "old" and os.listdir(path.parent) == [path.name]


def test_write_replaces_and_keeps_ordinary_permissions(old):
    write_bytes(old, b"new")
    assert old.read_bytes() == b"new" and os.listdir(old.parent) == [old.name]
    umask = os.umask(0)
    os.umask(umask)
    assert old.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_full_disk_when_flushing_or_renaming(old, monkeypatch, name):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_text(old, "new")
    assert str(old) in str(caught.value)
    assert only_old_is_there(old)


def test_full_disk_inside_the_block_is_reported_as_such(old):
    with pytest.raises(StorageError, match="result.json"), atomic_write(old):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert only_old_is_there(old)


def test_other_errors_of_the_block_are_the_callers(old):
    with pytest.raises(FileNotFoundError), atomic_write(old):
        open("/no/such/file")
    with pytest.raises(ZeroDivisionError), atomic_write(old) as file:
        file.write(b"half")
        _ = 1 / 0
    assert only_old_is_there(old)


def test_a_swallowed_write_error_still_fails(old):
    """Libraries that write through C callbacks lose the exception; the file object remembers it."""
    def write_like_a_callback(file):
        try:
            file.write(b"x" * 100_000)
        except OSError:
            pass

    with pytest.raises(StorageError, match="result.json"), atomic_write(old) as file:
        limit_writes(file)
        write_like_a_callback(file)
    assert only_old_is_there(old)


def limit_writes(file):
    """Put a descriptor that is always full under an open file."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    os.close(full)


def test_file_size_limit_of_the_system(old):
    """A real refusal by the kernel, in a process of its own."""
    script = textwrap.dedent(f"""
        import resource
        from ssl_kit.lab.errors import StorageError
        from ssl_kit.lab.files import write_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            write_bytes({str(old)!r}, bytes(1_000_000))
        except StorageError as error:
            print("refused:", error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: could not write") and str(old) in done.stdout
    assert only_old_is_there(old)


def test_small_disk(small_disk):
    path = small_disk / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(StorageError, match="No space left"):
        write_bytes(path, os.urandom(1_000_000))
    assert path.read_bytes() == b"old" and os.listdir(small_disk) == ["a.bin"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_folder_that_cannot_be_made(old):
    with pytest.raises(StorageError, match="could not write"):
        write_text(old / "below" / "a.txt", "text")


def test_atomic_path_for_libraries_that_want_a_name(tmp_path):
    with atomic_path(tmp_path / "x.npy") as temporary:
        with open(temporary, "wb") as file:
            np.save(file, np.arange(3))
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]
    with pytest.raises(StorageError), atomic_path(tmp_path / "y.npy"):
        pass  # the library wrote nothing: that is an error, not an empty file
    assert os.listdir(tmp_path) == ["x.npy"]


def test_wrong_mode_is_refused(old):
    with pytest.raises(ValueError, match="mode"), atomic_write(old, "ab"):
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10)


@given(json_values)
def test_plain_values_stay_as_they_are(value):
    assert to_plain(value) == value
    assert sha256_json(value) == sha256_json(json.loads(json.dumps(value)))


def test_json_round_trip_of_what_studies_hold(tmp_path):
    given_values = {"mae": np.float32(1.5), "n": np.int64(3), "ok": np.bool_(True), "ci": np.array([1.0, np.nan]),
                    "folder": tmp_path, "inf": float("inf"), "tags": {"b", "a"}, 3: "key"}
    found = read_json(write_json(tmp_path / "m.json", given_values))
    assert found == {"mae": 1.5, "n": 3, "ok": True, "ci": [1.0, None], "folder": str(tmp_path), "inf": None,
                     "tags": ["a", "b"], "3": "key"}
    with pytest.raises(TypeError, match="object"):
        to_plain(object())


def test_reading_what_is_not_there_or_not_json(tmp_path):
    with pytest.raises(MissingDataError, match="none.json"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(DataError, match="half.json"):
        read_json(tmp_path / "half.json")
    with pytest.raises(MissingDataError):
        sha256_file(tmp_path / "none")


def test_hashes_against_known_values(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"b": 1, "a": 2}) == sha256_json({"a": 2, "b": 1})


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "lock"
    script = f"""
import time
from ssl_kit.lab.files import file_lock
with file_lock({str(path)!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {process.pid}"), file_lock(path, timeout_s=0.1):
        pass
    process.kill()
    process.wait()
    waited_for = []
    with file_lock(path, timeout_s=5.0, on_wait=waited_for.append):
        assert path.read_text().strip() == str(os.getpid())


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    script = f"""
import os
from ssl_kit.lab.files import atomic_path
with atomic_path({str(tmp_path / "a.txt")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    (half,) = tmp_path.iterdir()
    other = tmp_path / half.name.replace(half.name.split(".")[3].split("-")[0], "0elsew")  # written on another machine
    other.write_text("theirs")
    (tmp_path / ".mine.tmp").write_text("a user's own")
    with atomic_path(tmp_path / "b.txt") as alive:
        alive.write_text("being written")
        assert remove_leftovers(tmp_path) == [half]
    assert {path.name for path in tmp_path.iterdir()} == {other.name, ".mine.tmp", "b.txt"}
