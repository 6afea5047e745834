"""`ssl-kit simulate`: the same files as the function, ranges as asked, and what it refuses before it writes."""

import argparse
import json

import pytest
from folders import contents

from ssl_kit.arrays import distributed as distributed_module
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.realman import read_locations, read_recording
from ssl_kit.arrays.rooms import SceneConfig
from ssl_kit.arrays.simulate import simulate_dataset
from ssl_kit.arrays.simulate_command import add_simulate_arguments, run_simulate
from ssl_kit.lab.cli import main
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

SMALL = ["--array", "ula:2:0.05", "--duration", "0.4", "--t60", "0.2", "0.25", "--workers", "1"]


def simulate(*arguments):
    parser = argparse.ArgumentParser()
    add_simulate_arguments(parser)
    return run_simulate(parser.parse_args([str(a) for a in arguments]))


def test_the_same_as_the_function_and_again_nothing_new(tmp_path, capsys):
    asked = [tmp_path / "a", "--n", "3", "--split", "test", "--seed", "5", "--snr", "3", "4", "--moving", "1", *SMALL]
    assert simulate(*asked, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["recordings"], made["mics"], made["split"]) == (3, 2, "test")
    config = SceneConfig(duration_s=0.4, t60_s=(0.2, 0.25), snr_db=(3.0, 4.0), moving_share=1.0)
    simulate_dataset(config, tmp_path / "b", 3, seed=5, geometry=named_array("ula:2:0.05"), split="test")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac")}
    simulate(*asked)
    assert "3 recordings of 0.4 s by 2 mics (ula:2:0.05)" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_what_was_asked_is_in_the_tables(tmp_path):
    simulate(tmp_path, "--n", "4", "--snr", "11", "12", "--distance", "1", "1.2", *SMALL)
    for item in read_locations(tmp_path, "train"):
        assert 11 <= float(item.meta["snr_db"]) <= 12 and 0.2 <= float(item.meta["t60_s"]) <= 0.25
        recording = read_recording(item, named_array("ula:2:0.05"))
        assert recording.samples.shape == (2, 6400) and not item.moving


def test_an_array_of_ones_own(tmp_path):
    table = tmp_path / "mine.yaml"
    table.write_text("reference: top\nmicrophones:\n  top: [0, 0.05, 0]\n  left: [-0.05, 0, 0]\n")
    simulate(tmp_path / "rooms", "--n", "1", "--array", table, *SMALL[2:])
    assert sorted(p.stem.rsplit("_CH")[1] for p in (tmp_path / "rooms").rglob("*.flac")) == ["left", "top"]


def test_refused_before_anything_is_written(tmp_path):
    folder, unnamed, odd = tmp_path / "rooms", tmp_path / "unnamed.csv", tmp_path / "odd.yaml"
    unnamed.write_text("name,x_m,y_m\n1,0,0\n2,0.1,0\n")
    odd.write_text("reference: a/b\nmicrophones:\n  a/b: [0, 0, 0]\n  c: [0.1, 0, 0]\n")
    for wrong, complaint in ((["--n", "0"], "at least 1"), (["--n", "1", "--seed", "-1"], "seed"),
                             (["--n", "1", "--workers", "0"], "--workers"),
                             (["--n", "1", "--t60", "0.5", "0.2"], "t60"),
                             (["--n", "1", "--moving", "2"], "moving_share"),
                             (["--n", "1", "--array", unnamed], "no mic is named as the reference"),
                             (["--n", "1", "--array", odd], "'a/b'"), (["--n", "1", "--array", "6cmm"], "6cm")):
        with pytest.raises(ParameterError, match=complaint):
            simulate(folder, *wrong)
    assert not folder.exists()


def test_another_data_set_in_the_folder(tmp_path):
    simulate(tmp_path, "--n", "1", *SMALL)
    with pytest.raises(DataError, match="another seed"):
        simulate(tmp_path, "--n", "1", "--seed", "1", *SMALL)


def test_a_scheduler_is_handed_all_of_it(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(distributed_module, "simulate_distributed", lambda *a: asked.append(a) or tmp_path)
    assert main(["simulate", str(tmp_path), "--n", "9", "--array", "6cm", "--scheduler", "tcp://10.0.0.5:8786"]) == 0
    config, folder, n, scheduler, seed, geometry, split = asked[0]
    assert (folder, n, scheduler, seed, split) == (str(tmp_path), 9, "tcp://10.0.0.5:8786", 0, "train")
    assert config == SceneConfig() and geometry == named_array("6cm")
    assert "9 recordings" in capsys.readouterr().out


def test_scheduler_without_dask(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDataError, match="pip install"):
        simulate(tmp_path / "x", "--n", "1", "--array", "6cm", "--scheduler", "tcp://127.0.0.1:1")
    assert not (tmp_path / "x").exists()
