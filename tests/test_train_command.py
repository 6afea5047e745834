"""`ssl-kit train`: rooms, training, checkpoint, going on, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ssl_kit.arrays.geometry import named_array
from ssl_kit.lab.cli import main
from ssl_kit.localize.protocol import localizer

SMALL = ["--rooms", "8", "--steps", "2", "--epoch-steps", "1", "--batch-size", "2", "--clip-s", "0.3", "--workers", "1",
         "--mixers", "0", "--json"]


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
    """Both come to the rooms at the same moment, and one of them makes them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "ssl_kit.lab.cli", "train", "ipdnet-variable", str(tmp_path / "model"), *SMALL, "--devices", "2",
               "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["complete"] and (tmp_path / "model" / "checkpoint").is_dir()


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
