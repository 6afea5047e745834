"Fetching from a local server that truncates, lies, breaks off, and serves archives that climb out of their folder."

import hashlib
import io
import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ssl_kit.lab import fetch
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.fetch import fetch_dataset, fetch_file
from ssl_kit.lab.manifests import Archive, LayoutRule, Manifest, verify_dataset

BODY = os.urandom(300_000)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        "A client that goes away in the middle is part of these tests."


class Handler(BaseHTTPRequestHandler):
    "Serves `server.pages[path]`: a dict with body and behaviour."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        page = self.server.pages.get(self.path)
        self.server.requests.append((self.path, self.headers.get("Range")))
        if page is None:
            return self.send_error(404)
        if page.get("busy", 0) > 0:
            page["busy"] -= 1
            return self.send_error(503)
        body, start = page["body"], 0
        wanted = self.headers.get("Range")
        if wanted and page.get("ranges", True) and self.headers.get("If-Range", page["etag"]) == page["etag"]:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if page.get("announce_etag", True):
            self.send_header("ETag", page["etag"])
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if page.get("drops", 0) > 0:  # send a part, then cut the line
            page["drops"] -= 1
            self.wfile.write(rest[:page["drop_after"]])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as running:
        running.pages, running.requests = {}, []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join(5)


def serve(server, name, body, **behaviour):
    server.pages[f"/{name}"] = {"body": body, "etag": f'"{hashlib.md5(body).hexdigest()}"', **behaviour}
    return f"{server.url}/{name}"


def archive(url, body=BODY, file="x.bin", checksum=True, size=True, **options):
    return Archive(file, options.pop("kind", "plain"), len(body) if size else None,
                   f"sha256:{hashlib.sha256(body).hexdigest()}" if checksum else None,
                   (url,) if isinstance(url, str) else url, **options)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def quick(item, folder, **options):
    return fetch_file(item, folder, pause_s=0.01, **options)


def test_fetches_checks_and_keeps(server, tmp_path):
    item = archive(serve(server, "x.bin", BODY))
    fetched = quick(item, tmp_path)
    assert fetched.path.read_bytes() == BODY and fetched.verified and visible(tmp_path) == ["x.bin"]
    assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
    quick(item, tmp_path)
    assert len(server.requests) == 1  # a good file is not fetched again
    fetched.path.write_bytes(BODY[:-1])
    assert quick(item, tmp_path).path.read_bytes() == BODY  # a spoilt one is


def test_md5_is_understood(server, tmp_path):
    item = Archive("x.bin", "plain", None, f"md5:{hashlib.md5(BODY).hexdigest()}", (serve(server, "x.bin", BODY),))
    assert quick(item, tmp_path).verified


def test_without_a_checksum_it_is_called_unverified(server, tmp_path):
    assert not quick(archive(serve(server, "x.bin", BODY), checksum=False, size=False), tmp_path).verified


def test_broken_connections_are_resumed(server, tmp_path):
    url = serve(server, "x.bin", BODY, drops=3, drop_after=70_000)
    assert quick(archive(url), tmp_path, retries=1).path.read_bytes() == BODY
    starts = [int(asked.removeprefix("bytes=")[:-1]) if asked else 0 for _, asked in server.requests]
    assert starts[0] == 0 and starts == sorted(starts) and len(starts) == 4 and starts[-1] > 0
    assert visible(tmp_path) == ["x.bin"]


def test_an_interrupted_fetch_goes_on_in_the_next_call(server, tmp_path):
    url = serve(server, "x.bin", BODY, drops=1, drop_after=200_000)
    with pytest.raises(DataError, match="bytes are kept in .*x.bin.part: the same command goes on"):
        quick(archive(url), tmp_path, retries=0)
    assert visible(tmp_path) == ["x.bin.part", "x.bin.part.validator"]
    have = (tmp_path / "x.bin.part").stat().st_size
    assert 0 < have < len(BODY)
    quick(archive(url), tmp_path)
    assert server.requests[-1] == ("/x.bin", f"bytes={have}-") and visible(tmp_path) == ["x.bin"]


def test_a_file_that_changed_meanwhile_is_fetched_whole(server, tmp_path):
    url = serve(server, "x.bin", BODY, drops=1, drop_after=200_000)
    with pytest.raises(DataError):
        quick(archive(url, checksum=False), tmp_path, retries=0)
    newer = os.urandom(len(BODY))
    serve(server, "x.bin", newer)
    assert quick(archive(url, newer, checksum=False), tmp_path).path.read_bytes() == newer


def test_nothing_is_patched_together_blindly(server, tmp_path):
    "No validator, no checksum: the rest could belong to another version, so the whole is asked for."
    url = serve(server, "x.bin", BODY, drops=1, drop_after=200_000, announce_etag=False)
    assert quick(archive(url, checksum=False), tmp_path).path.read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [None, None]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    url = serve(server, "x.bin", BODY, drops=1, drop_after=100_000, ranges=False)
    assert quick(archive(url), tmp_path).path.read_bytes() == BODY


def test_a_stale_part_longer_than_the_file(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(os.urandom(len(BODY)))
    with pytest.raises(DataError, match="checksum"):
        quick(archive(serve(server, "x.bin", BODY)), tmp_path)
    assert visible(tmp_path) == []
    assert quick(archive(serve(server, "x.bin", BODY)), tmp_path).path.read_bytes() == BODY


def test_a_busy_server_is_asked_again(server, tmp_path):
    assert quick(archive(serve(server, "x.bin", BODY, busy=2)), tmp_path).verified


def test_truncated_by_the_server(server, tmp_path):
    url = serve(server, "x.bin", BODY[:-1000])  # a whole answer, but of a shorter file
    with pytest.raises(DataError, match=f"offers {len(BODY) - 1000} bytes, the manifest says {len(BODY)}"):
        quick(archive(url), tmp_path)
    assert visible(tmp_path) == []


def test_a_lie_about_the_checksum(server, tmp_path):
    url = serve(server, "x.bin", os.urandom(len(BODY)))
    with pytest.raises(DataError, match="does not have the checksum sha256"):
        quick(archive(url), tmp_path)
    assert visible(tmp_path) == []


def test_mirrors_are_tried_in_turn(server, tmp_path):
    urls = (f"{server.url}/gone", serve(server, "lie", os.urandom(len(BODY))),
            serve(server, "half", BODY, drops=99, drop_after=0), serve(server, "good", BODY))
    fetched = quick(archive(urls), tmp_path, retries=1)
    assert fetched.url == urls[-1] and fetched.path.read_bytes() == BODY
    with pytest.raises(DataError, match="404"):
        quick(archive(f"{server.url}/gone"), tmp_path / "other")


def test_no_server_at_all(tmp_path):
    with pytest.raises(DataError, match="failed 2 times in a row"):
        quick(archive("http://127.0.0.1:9/x.bin"), tmp_path, retries=1)


def test_a_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(StorageError, match="300000 bytes are to come, 10000 are free"):
        quick(archive(serve(server, "x.bin", BODY)), tmp_path)
    assert "x.bin" not in visible(tmp_path)


# ---- whole sets

def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return buffer.getvalue()


def toy(tmp_path, *archives, access="open", **options):
    rule = LayoutRule("clips", "*.wav", "clips", 2)
    return Manifest("toy", "a toy", {"name": "CC0"}, "nobody", access, (rule,), {"train": "all"}, tmp_path / "toy.yaml",
                    archives=archives, **options)


CLIPS = {"outer/clips/a.wav": b"a" * 1000, "outer/clips/b.wav": b"b" * 2000}


def test_a_set_is_fetched_unpacked_verified_and_reused(server, tmp_path):
    body = zipped(CLIPS)
    manifest = toy(tmp_path, archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip"))
    [done] = fetch_dataset(manifest, tmp_path / "set", pause_s=0.01)
    assert done.verified and done.files == 2 and not done.already_there and visible(tmp_path / "set") == ["toy"]
    assert verify_dataset(manifest, tmp_path / "set").ok
    assert fetch_dataset(manifest, tmp_path / "set")[0].already_there and len(server.requests) == 1


def test_verify_names_missing_extra_truncated_and_altered(server, tmp_path):
    body = zipped({**CLIPS, "c.txt": b"c", "d.txt": b"dd"})
    manifest = toy(tmp_path, archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip"))
    fetch_dataset(manifest, tmp_path / "set")
    inner = tmp_path / "set" / "toy"
    (inner / "outer/clips/a.wav").write_bytes(b"a" * 999)
    (inner / "outer/clips/b.wav").unlink()
    (inner / "c.txt").write_bytes(b"C")
    (inner / "d.txt").write_bytes(b"ddd")
    (inner / "new.txt").write_bytes(b"new")
    report = verify_dataset(manifest, tmp_path / "set")
    assert report.truncated == ("toy/outer/clips/a.wav",) and report.missing == ("toy/outer/clips/b.wav",)
    assert report.altered == ("toy/c.txt", "toy/d.txt") and report.extra == ("toy/new.txt",) and not report.ok
    assert report.layout == ("clips: expected 2 files *.wav below clips, found 1",)
    assert verify_dataset(manifest, tmp_path / "set", hashes=False).altered == ("toy/d.txt",)


def test_an_archive_that_climbs_out_is_refused(server, tmp_path):
    body = zipped({"fine.txt": b"fine", "../../evil.txt": b"evil"})
    manifest = toy(tmp_path, archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip"))
    with pytest.raises(DataError, match="refusing the member '../../evil.txt'"):
        fetch_dataset(manifest, tmp_path / "set")
    assert visible(tmp_path / "set") == [] and not list(tmp_path.rglob("evil.txt"))
    assert not list(tmp_path.rglob("fine.txt")) and not list(tmp_path.rglob("*.unpack*ing"))


def test_an_archive_past_its_stated_size_is_refused(server, tmp_path):
    body = zipped({"big.bin": bytes(100_000)})
    item = archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip", max_unpacked_bytes=50_000)
    with pytest.raises(DataError, match="declares 100000 bytes, at most 50000"):
        fetch_dataset(toy(tmp_path, item), tmp_path / "set")


def test_a_run_killed_after_unpacking_is_redone(server, tmp_path, monkeypatch):
    body = zipped(CLIPS)
    manifest = toy(tmp_path, archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip"))
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "write_json", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_dataset(manifest, tmp_path / "set")
    assert visible(tmp_path / "set") == []
    assert fetch_dataset(manifest, tmp_path / "set")[0].files == 2 and verify_dataset(manifest, tmp_path / "set").ok
    assert len(server.requests) == 1  # the archive was kept


def test_a_folder_that_is_not_ours_is_left_alone(server, tmp_path):
    body = zipped(CLIPS)
    (tmp_path / "set" / "toy").mkdir(parents=True)
    with pytest.raises(ParameterError, match="exists without a receipt"):
        fetch_dataset(toy(tmp_path, archive(serve(server, "toy.zip", body), body, "toy.zip", kind="zip")),
                      tmp_path / "set")


def test_archives_by_hand(tmp_path):
    "What needs an account: an error that says how, then the archives from a folder, found in nested folders."
    items = (archive((), zipped(CLIPS), "toy.zip", kind="zip", checksum=False),
             archive((), b"", "toy.rar", kind="rar", checksum=False, size=False, default=False))
    manifest = toy(tmp_path, *items, access="account", obtain="Register at the toy shop.")
    with pytest.raises(MissingDataError, match="Register at the toy shop"):
        fetch_dataset(manifest, tmp_path / "set")
    with pytest.raises(MissingDataError, match="toy.zip is nowhere in"):
        fetch_dataset(manifest, tmp_path / "set", source=tmp_path)
    (tmp_path / "downloads" / "deep").mkdir(parents=True)
    (tmp_path / "downloads" / "deep" / "toy.zip").write_bytes(zipped(CLIPS)[:-5])
    with pytest.raises(DataError, match="expected .* bytes, found"):
        fetch_dataset(manifest, tmp_path / "set", source=tmp_path / "downloads")
    (tmp_path / "downloads" / "deep" / "toy.zip").write_bytes(zipped(CLIPS))
    [done] = fetch_dataset(manifest, tmp_path / "set", source=tmp_path / "downloads")
    assert done.files == 2 and "record it with 'checksum: sha256:" in done.advice(manifest)
    assert (tmp_path / "downloads" / "deep" / "toy.zip").exists()
    with pytest.raises(DataError, match="RAR"):
        fetch_dataset(manifest, tmp_path / "set", archives=["toy.rar"], source=tmp_path / "downloads")
    with pytest.raises(ParameterError, match="no archive 'toys.zip'; it has toy.zip, toy.rar"):
        fetch_dataset(manifest, tmp_path / "set", archives=["toys.zip"], source=tmp_path)
