"Unpacking archives: whole or not at all, nothing outside the folder, no links, no bombs."

import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import py7zr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab import extract
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.extract import extract_archive, safe_name
from ssl_kit.lab.files import sha256_file

CONTENT = {"set/a.wav": b"RIFF" * 100, "set/deep/b.csv": b"x,y\n1,2\n", "set/empty": b""}


def make_zip(path, content=CONTENT):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def make_tar(path, content=CONTENT, extra=()):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def make_7z(path, content=CONTENT, rename=None):
    """A 7z archive; rename=(old, new) patches a name of the same length in the plain header and mends both CRCs, since
    py7zr itself refuses to write such names (7z format: 7zFormat.txt of the LZMA SDK)."""
    with py7zr.SevenZipFile(path, "w") as archive:
        archive.set_encoded_header_mode(False)
        for name, data in content.items():
            archive.writestr(data, name)
    if rename:
        old, new = (name.encode("utf-16-le") for name in rename)
        data = bytearray(path.read_bytes())
        offset, size, _ = struct.unpack_from("<QQI", data, 12)
        start = 32 + offset
        header = bytes(data[start:start + size])
        assert header.count(old) == 1 and len(old) == len(new)
        data[start:start + size] = header = header.replace(old, new)
        struct.pack_into("<I", data, 28, zlib.crc32(header))
        struct.pack_into("<I", data, 8, zlib.crc32(bytes(data[12:32])))
        path.write_bytes(data)
    return path


MAKERS = {"x.zip": make_zip, "x.tar": make_tar, "x.tar.gz": make_tar, "x.7z": make_7z}


def refused(archive, match, folder=None, **options):
    "The archive is refused with such a message, and nothing but the archives is left beside it."
    before = sorted(path.name for path in archive.parent.iterdir())
    with pytest.raises(DataError, match=match):
        extract_archive(archive, folder or archive.parent / "out", **options)
    assert sorted(path.name for path in archive.parent.iterdir()) == before
    assert not (archive.parent.parent / "evil.txt").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_unpacks_with_sizes_and_hashes(tmp_path, name):
    files = extract_archive(MAKERS[name](tmp_path / name), tmp_path / "out", max_bytes=10_000)
    assert {file.path: file.bytes for file in files} == {name: len(data) for name, data in CONTENT.items()}
    for file in files:
        path = tmp_path / "out" / file.path
        assert path.read_bytes() == CONTENT[file.path] and sha256_file(path) == file.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out"])


@pytest.mark.parametrize("name", MAKERS)
def test_truncated_archives_leave_nothing(tmp_path, name):
    big = {"a.bin": os.urandom(200_000), "b.bin": os.urandom(50_000)}
    path = MAKERS[name](tmp_path / name, big)
    data = path.read_bytes()
    for keep in (0.5, 0.9):
        path.write_bytes(data[:int(len(data) * keep)])
        refused(path, "damaged|truncated")


@pytest.mark.parametrize("name", ["x.zip", "x.7z"])  # a plain tar has no checksums over its contents
def test_altered_archives_leave_nothing(tmp_path, name):
    path = MAKERS[name](tmp_path / name, {"a.bin": os.urandom(100_000)})
    data = bytearray(path.read_bytes())
    data[50_000] ^= 0xFF
    path.write_bytes(data)
    refused(path, "damaged")


@pytest.mark.parametrize("bad", ["../evil.txt", "set/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_names_that_leave_the_folder(tmp_path, name, bad):
    inner = tmp_path / "inner"
    inner.mkdir()
    refused(MAKERS[name](inner / name, {"fine.txt": b"fine", bad: b"evil"}), "refusing")


@pytest.mark.parametrize("bad", ["../evil.txt", "/aa/evil.txt"])
def test_7z_names_that_leave_the_folder(tmp_path, bad):
    inner = tmp_path / "inner"
    inner.mkdir()
    good = "x" * (len(bad) - 8) + "evil.txt"
    path = make_7z(inner / "x.7z", {"fine.txt": b"fine", good: b"evil"}, rename=(good, bad))
    assert bad in py7zr.SevenZipFile(path).getnames()
    refused(path, "refusing")


@pytest.mark.parametrize("kind, word", [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"),
                                        (tarfile.FIFOTYPE, "device or pipe"), (tarfile.CHRTYPE, "device or pipe")])
def test_links_and_devices_in_tar(tmp_path, kind, word):
    info = tarfile.TarInfo("set/link")
    info.type, info.linkname = kind, "../../evil.txt"
    refused(make_tar(tmp_path / "x.tar.gz", extra=[info]), word)


def test_write_through_a_link_to_a_folder(tmp_path):
    link = tarfile.TarInfo("set/door")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    through = tarfile.TarInfo("set/door/evil.txt")
    refused(make_tar(tmp_path / "x.tar", extra=[link, through]), "symbolic link")
    assert not (tmp_path / "evil.txt").exists()


def test_links_in_zip_and_7z(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    refused(tmp_path / "x.zip", "link or device")
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to("target")
    (source / "target").write_text("x")
    with py7zr.SevenZipFile(tmp_path / "x.7z", "w") as archive:
        archive.writeall(source, "set")
    refused(tmp_path / "x.7z", "link or special")


@pytest.mark.parametrize("name", MAKERS)
def test_declared_bombs_are_not_unpacked(tmp_path, name, monkeypatch):
    path = MAKERS[name](tmp_path / name, {"zeros.bin": bytes(5_000_000)})
    monkeypatch.setattr(extract._Sink, "open", lambda self, name: pytest.fail("a byte was unpacked"))
    refused(path, "declares 5000000 bytes, at most 1000000", max_bytes=1_000_000)
    if name in ("x.zip", "x.7z"):
        refused(path, "declares 5000000 bytes, at most")  # 200 times the archive


@pytest.mark.parametrize("name", MAKERS)
def test_bombs_that_lie_are_stopped(tmp_path, name, monkeypatch):
    "As if the list of members had declared less than comes out."
    path = MAKERS[name](tmp_path / name, {"zeros.bin": bytes(5_000_000)})
    monkeypatch.setattr(extract, "check_members", lambda members, archive, max_bytes: None)
    refused(path, "stopped unpacking", max_bytes=1_000_000)


def test_zip_with_a_forged_size(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"zeros.bin": bytes(5_000_000)})
    data = path.read_bytes().replace(struct.pack("<I", 5_000_000), struct.pack("<I", 1_000))
    path.write_bytes(data)
    refused(path, "damaged|stopped", max_bytes=100_000)


def test_doubled_names_and_files_as_folders(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "1")
        archive.writestr("a", "2")
    refused(tmp_path / "x.zip", "two members of the name 'a'")
    refused(make_zip(tmp_path / "y.zip", {"a": b"1", "a/b": b"2"}), "'a' is a file in the same archive")


def test_what_is_no_archive(tmp_path):
    page = tmp_path / "x.zip"
    page.write_text("<html>404</html>")
    refused(page, "no zip, tar or 7z.*error page")
    refused(make_tar(tmp_path / "y.zip"), "expected zip, found tar", kind="zip")
    with pytest.raises(MissingDataError, match="nothing.zip does not exist"):
        extract_archive(tmp_path / "nothing.zip", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ParameterError, match="it exists"):
        extract_archive(make_zip(tmp_path / "z.zip"), tmp_path / "out")


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "x.zip")

    class FullFile:
        closed = True

        def __init__(self, *arguments):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(extract, "open", lambda path, mode: FullFile() if mode == "xb" else open(path, mode),
                        raising=False)
    with pytest.raises(StorageError, match="No space left"):
        extract_archive(path, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["x.zip"]


@given(st.text(alphabet="ab./\\:C\0 ", max_size=12))
def test_safe_names_stay_inside(name):
    try:
        safe = safe_name(name, "x.zip")
    except DataError:
        return
    top = Path("/top")
    assert os.path.normpath(top / safe).startswith("/top/") and "\\" not in safe and "\0" not in safe
