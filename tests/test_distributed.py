"""Rooms on a Dask scheduler: worker processes on loopback, one of them killed, and what is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from folders import contents

import ssl_kit.arrays.distributed as distributed_module
from ssl_kit.arrays.distributed import dask_client, simulate_distributed
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.rooms import SceneConfig
from ssl_kit.arrays.simulate import simulate_dataset
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

ARRAY = named_array("ula:2:0.06")
CONFIG = SceneConfig(duration_s=0.4, t60_s=(0.2, 0.25), room_max_m=(5, 4, 3), moving_share=0.5, recordings_per_room=2)
N = 12


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    root = tmp_path_factory.mktemp("serial")
    simulate_dataset(CONFIG, root, N, seed=7, geometry=ARRAY, split="valid")
    return contents(root)


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes on this machine, each with two threads, as Dask starts them when nobody says otherwise."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, host="127.0.0.1",
                                  dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        yield cluster


def test_a_killed_worker_costs_nothing(cluster, serial, tmp_path):
    died = tmp_path / "died"

    def die_in_the_middle():
        from ssl_kit.arrays import simulate

        def write_json(path, record):
            died.write_text(path.name)
            os.kill(os.getpid(), signal.SIGKILL)  # the audio files are there, the record is not
        simulate.write_json = write_json
        return os.getpid()

    with dask_client(cluster) as client:
        victim, = client.run(die_in_the_middle, workers=[min(client.scheduler_info()["workers"])]).values()
    simulate_distributed(CONFIG, tmp_path / "set", N, cluster, seed=7, geometry=ARRAY, split="valid")
    assert died.read_text().endswith(".json") and not psutil.pid_exists(victim)
    assert contents(tmp_path / "set") == serial


def test_whole_recordings_are_kept_and_others_made(cluster, serial, tmp_path):
    simulate_dataset(CONFIG, tmp_path, 4, seed=7, geometry=ARRAY, split="valid")
    broken, *kept = sorted(tmp_path.rglob("*_CH0.flac"))
    broken.write_bytes(b"fLaC")
    (broken.parent / f".{broken.name}.1-abc.tmp").write_bytes(b"left by a killed writer")
    times = {path: path.stat().st_mtime_ns for path in kept}
    simulate_distributed(CONFIG, tmp_path, N, cluster.scheduler_address, seed=7, geometry=ARRAY, split="valid")
    assert contents(tmp_path) == serial
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_another_data_set_and_a_worker_error_are_said(cluster, tmp_path):
    simulate_dataset(CONFIG, tmp_path, 1, seed=7, geometry=ARRAY, split="valid")
    with pytest.raises(DataError, match="another seed"):
        simulate_distributed(CONFIG, tmp_path, 2, cluster, seed=8, geometry=ARRAY, split="valid")
    nameless = type(ARRAY)(ARRAY.positions_m, reference=None)
    with pytest.raises(ParameterError, match="no reference mic"):
        simulate_distributed(CONFIG, tmp_path / "new", 3, cluster, geometry=nameless)
    assert not list((tmp_path / "new").rglob("*.flac"))


@pytest.mark.parametrize("change, complaint", [
    ({"digest": "0" * 64}, "does not see this folder"), ({"versions": {"ssl_kit": "0.0.1"}}, "ssl_kit .*here 0.0.1")])
def test_workers_that_differ_are_refused(tmp_path, monkeypatch, change, complaint):
    here = distributed_module._survey

    class Client:
        """Workers as they are, seen from a machine that differs."""

        def run(self, survey, path):
            return {"tcp://10.0.0.9:40000": here(path)}

    monkeypatch.setattr(distributed_module, "_survey", lambda path: {**here(path), **change})
    with pytest.raises((MissingDataError, ParameterError), match=f"10.0.0.9:40000 .*{complaint}"):
        distributed_module._check_workers(Client(), tmp_path / "dataset.json")


def test_nobody_answers(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    with pytest.raises(MissingDataError, match="no Dask scheduler answers"), dask_client("tcp://127.0.0.1:1", 1.0):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDataError, match="pip install distributed"):
        simulate_distributed(CONFIG, tmp_path / "x", 2, "tcp://127.0.0.1:1")
    assert not (tmp_path / "x").exists()


def test_a_scheduler_without_workers_is_said():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, processes=False, protocol="inproc", dashboard_address="127.0.0.1:0",
                                  silence_logs=50) as empty:
        with pytest.raises(MissingDataError, match="no workers; start some with"), dask_client(empty, 0.2):
            pass


def test_the_kit_does_not_load_dask_unasked():
    code = "import sys, ssl_kit.arrays.distributed; assert not {'dask', 'distributed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
