"""`ssl-kit train`: rooms, training, checkpoint, going on, and what it refuses."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from waiting import heard

from ssl_kit.arrays.geometry import named_array
from ssl_kit.lab.cli import main
from ssl_kit.lab.files import file_lock
from ssl_kit.localize.protocol import localizer

SMALL = ["--rooms", "8", "--steps", "2", "--epoch-steps", "1", "--batch-size", "2", "--clip-s", "0.3", "--workers", "1",
         "--mixers", "0", "--json"]


def can_only_be_read(folder):
    """Rooms in `folder` as the input of a batch is: nobody can open their locks for writing, root neither."""
    locks = list(folder.rglob("rooms_*/.lock"))
    assert len(locks) == 2
    for lock in locks:
        lock.unlink()
        lock.mkdir()


def test_from_speech_to_a_model_that_localizes(tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["train", "ipdnet-variable", str(folder), *SMALL, "--time-limit", "0"]) == 3
    assert not json.loads(capsys.readouterr().out)["complete"]
    assert main(["train", "ipdnet-variable", str(folder), *SMALL]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["complete"] and [row["step"] for row in done["history"]] == [1, 2]
    method = localizer("ipdnet-variable", name=done["checkpoint"])
    track = method(np.random.default_rng(0).standard_normal((4, 8000)), named_array("respeaker"))
    assert track.n_frames == 5
    # the rooms serve another training, which starts where this one ended
    can_only_be_read(folder)
    code = main(["train", "ipdnet-variable", str(tmp_path / "longer"), *SMALL, "--start", done["checkpoint"],
                 "--rooms-in", str(folder)])
    assert code == 0 and not (tmp_path / "longer" / "rooms_train").exists()


def test_of_two_processes_one_saves_and_tells(tmp_path):
    """A time limit is no failure: the second ended with a 3 as well, for which its launcher may kill the first."""
    command = [sys.executable, "-m", "ssl_kit.lab.cli", "train", "ipdnet-variable", str(tmp_path / "model"), *SMALL,
               "--devices", "2", "--device", "cpu"]
    for options, code, steps in ((["--time-limit", "0"], 3, [1]), ([], 0, [1, 2])):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stderr[-2000:]
        told = json.loads(done.stdout)
        assert [row["step"] for row in told["history"]] == steps and told["complete"] == (not code)
    assert (tmp_path / "model" / "checkpoint").is_dir()


def test_torchrun_may_start_the_processes(tmp_path):
    """Both come to the rooms at the same moment, one makes them; a time limit is nothing that torchrun should mind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "ssl_kit.lab.cli", "train", "ipdnet-variable", str(tmp_path / "model"), *SMALL, "--devices", "2",
               "--device", "cpu"]
    for options, complete in ((["--time-limit", "0"], False), ([], True)):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["complete"] == complete and (tmp_path / "model" / "checkpoint").is_dir()


RING = ["--rooms", "16", "--steps", "1", "--batch-size", "2", "--clip-s", "0.3", "--workers", "1", "--mixers", "0"]


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """Rooms that a ring of nine heard, in a folder of their own."""
    folder = tmp_path_factory.mktemp("ring")
    assert main(["train", "crnn", str(folder / "a"), "--rooms-in", str(folder), *RING]) == 0
    return folder


@pytest.mark.parametrize("options, words", [
    (["--array", "12cm"], "mics, positions_m;"), (["--rooms", "17"], "rooms;"), (["--seed", "1"], "seed;")])
def test_rooms_with_other_settings_are_refused(ring, tmp_path, options, words, capsys):
    """They were taken for those that had been asked for: a network of one array learned in the rooms of another."""
    before = {path: path.stat().st_mtime_ns for path in ring.rglob("*")}
    assert main(["train", "crnn", str(tmp_path / "b"), "--rooms-in", str(ring), *RING, *options]) == 2
    said = capsys.readouterr().err
    assert words in said and str(ring) in said
    assert {path: path.stat().st_mtime_ns for path in ring.rglob("*")} == before


@pytest.mark.parametrize("changed", ["noise", "start", "array, rooms"])
def test_a_training_goes_on_with_what_it_was_begun_with(ring, tmp_path, changed, capsys):
    """Other material was taken up in the middle, and another start had no effect, but stood in the checkpoint."""
    shutil.copytree(ring / "a", tmp_path / "a")
    other = {"noise": ["--noise", "esc10"], "start": ["--start", str(ring / "a" / "checkpoint")],
             "array, rooms": ["--array", "12cm", "--rooms", "17", "--rooms-in", str(tmp_path)]}[changed]
    before = (tmp_path / "a" / "training" / "last.ckpt").read_bytes()
    assert main(["train", "crnn", str(tmp_path / "a"), "--rooms-in", str(ring), *RING, *other]) == 2
    said = capsys.readouterr().err
    assert f"another {changed};" in said and str(tmp_path / "a" / "training") in said
    assert (tmp_path / "a" / "training" / "last.ckpt").read_bytes() == before and not list(tmp_path.rglob("rooms_*"))
    if changed == "start":  # one that had not begun when it ended is held to nothing
        (tmp_path / "a" / "training" / "last.ckpt").unlink()
        assert main(["train", "crnn", str(tmp_path / "a"), "--rooms-in", str(ring), *RING, *other]) == 0


def test_rooms_of_unknown_settings_are_refused_and_unfinished_ones_made(ring, tmp_path, capsys):
    rooms = tmp_path / "rooms_train"
    shutil.copytree(ring / "rooms_train", rooms)
    command = ["train", "crnn", str(tmp_path / "b"), "--rooms-in", str(tmp_path), *RING]
    (rooms / "rooms.json").unlink()
    assert main(command) == 2 and "rooms.json" in capsys.readouterr().err
    (rooms / "facts.npy").unlink()
    assert main(command) == 0
    assert (rooms / "responses.npy").read_bytes() == (ring / "rooms_train" / "responses.npy").read_bytes()
    can_only_be_read(tmp_path)
    command[2] = str(tmp_path / "c")
    assert main(command) == 0
    (rooms / "responses.npy").write_bytes((rooms / "responses.npy").read_bytes()[:-1])
    assert main(command) == 2 and str(rooms / "responses.npy") in capsys.readouterr().err


def test_who_comes_while_rooms_are_made_says_that_he_waits(tmp_path, capsys):
    codes, rooms = [], tmp_path / "rooms_train"
    second = threading.Thread(target=lambda: codes.append(main(["train", "ipdnet", str(tmp_path), *RING])))
    with file_lock(rooms / ".lock"):
        second.start()
        assert str(rooms) in heard(capsys, "is at it; waiting", second)
        assert not list(rooms.glob("*.npy"))
    second.join(240)
    assert codes == [0]


@pytest.mark.parametrize("options, words", [
    (["geonet", "x", "--array", "6cm"], "any array"),
    (["ipdnet", "x", "--steps", "0"], "more than 0"),
    (["geonet", "x", "--devices", "0"], "--devices"),
    (["crnn", "x", "--array", "7cm"], "7cm"),
    (["geonet", "x", "--start", "nowhere"], "nowhere"),
    (["geonet", "x", "--speech", "nobody"], "nobody"),
])
def test_what_it_refuses(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options]) == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npy"))
