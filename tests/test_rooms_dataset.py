"""Data sets on disk: RealMAN's layout, the loader, resuming, worker counts, faults."""

import csv
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from folders import contents

import ssl_kit.arrays.simulate as simulate_module
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.realman import LocatedFile, parse_azimuth, read_locations, read_recording
from ssl_kit.arrays.rooms import SceneConfig, render_scene, sample_scene
from ssl_kit.arrays.simulate import simulate_dataset
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.files import file_lock

ARRAY = named_array("realman32").subarray([0, 1, 10])
CONFIG = SceneConfig(duration_s=0.5, t60_s=(0.2, 0.3), room_max_m=(6, 5, 3), moving_share=0.4, recordings_per_room=2)
N = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("rooms")
    simulate_dataset(CONFIG, root, N, seed=4, geometry=ARRAY, split="test")
    return root


def test_layout_is_realmans(made):
    items = read_locations(made, "test")
    assert len(items) == N and {i.moving for i in items} == {True, False}
    for item in items:
        letter, kind = ("M", "moving") if item.moving else ("S", "static")
        assert item.name.startswith(f"TEST_{letter}_ROOM") and item.path.parts[-3] == kind
        assert item.path.parts[-5] == "ma_noisy_speech" and item.path.parts[-2] == item.meta["speaker"]
        assert all(item.path.with_name(f"{item.name}_CH{mic}.flac").is_file() for mic in (0, 1, 10))
    for kind in ("static", "moving"):
        with open(made / "test" / f"test_{kind}_source_location.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {"filename", "angle(°)", "distance"} <= set(rows[0])
        assert all(len(row["angle(°)"].split(",")) == (5 if kind == "moving" else 1) for row in rows)


def test_reading_gives_back_what_was_rendered(made):
    for item in read_locations(made, "test"):
        read = read_recording(item, ARRAY)
        truth = render_scene(sample_scene(CONFIG, 4, int(item.meta["index"]), "test"), ARRAY, CONFIG)
        assert np.abs(read.samples - truth.samples).max() <= 2**-15
        assert np.allclose(read.azimuth_deg, truth.azimuth_deg, atol=1e-3)
        assert np.array_equal(read.voice_activity, truth.voice_activity)
        assert np.isclose(float(read.meta["snr_db"]), truth.meta["snr_db"])
        assert read.meta["room"] == truth.meta["room"]


def test_rooms_group_recordings_and_splits_share_none(made, tmp_path):
    rooms = [i.meta["room"] for i in read_locations(made, "test")]
    assert sorted(rooms.count(r) for r in set(rooms)) == [2] * (N // 2)
    simulate_dataset(CONFIG, tmp_path, 2, seed=4, geometry=ARRAY, split="calibration")
    others = read_locations(tmp_path, "calibration")
    assert not {i.meta["room"] for i in others} & set(rooms)
    assert not {i.meta["speaker"] for i in others} & {i.meta["speaker"] for i in read_locations(made, "test")}


def test_a_killed_run_with_two_workers_ends_in_the_same_files(made, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        from ssl_kit.arrays.geometry import named_array
        from ssl_kit.arrays.rooms import SceneConfig
        from ssl_kit.arrays.simulate import simulate_dataset
        if __name__ == "__main__":
            simulate_dataset({CONFIG!r}, {str(tmp_path / 'set')!r}, {N}, 4,
                             named_array("realman32").subarray([0, 1, 10]), 2, "test")
        """))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True)
    records = tmp_path / "set" / "test" / "records"
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(records.glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(records.glob("*.json"))) >= 2
    simulate_dataset(CONFIG, tmp_path / "set", N, seed=4, geometry=ARRAY, split="test")
    finished = {k: v for k, v in contents(tmp_path / "set").items() if not k.endswith(".tmp")}
    assert finished == contents(made)


def test_whole_recordings_are_kept_and_broken_ones_made_again(made, tmp_path):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(made, root)
    before = contents(root)
    files = sorted(root.rglob("*_CH1.flac"))
    files[0].write_bytes(files[0].read_bytes()[:900])
    files[1].unlink()
    (root / "test" / "records" / "000003.json").write_text("{not json")
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*_CH0.flac")}
    simulate_dataset(CONFIG, root, N, seed=4, geometry=ARRAY, split="test")
    assert contents(root) == before
    redone = [p for p, t in times.items() if p.stat().st_mtime_ns != t]
    assert 2 <= len(redone) <= 3
    simulate_dataset(CONFIG, root, N + 1, seed=4, geometry=ARRAY, split="test")
    assert len(read_locations(root, "test")) == N + 1


def test_a_folder_holds_one_data_set(made):
    with pytest.raises(DataError, match="seed"):
        simulate_dataset(CONFIG, made, N, seed=5, geometry=ARRAY, split="test")
    with pytest.raises(DataError, match="config"):
        simulate_dataset(SceneConfig(duration_s=0.6), made, N, seed=4, geometry=ARRAY, split="test")
    with pytest.raises(ParameterError, match="split"):
        simulate_dataset(CONFIG, made, N, split="exam")


def test_two_writers_exclude_each_other(made, monkeypatch):
    monkeypatch.setattr(simulate_module, "_LOCK_WAIT_S", 0.1)
    with file_lock(made / "test" / ".lock"), pytest.raises(StorageError, match=str(os.getpid())):
        simulate_dataset(CONFIG, made, N, seed=4, geometry=ARRAY, split="test")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_written(tmp_path):
    """A limit on file size stands for the full disk: writes fail with EFBIG in the middle of a channel file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(StorageError, match="nothing was left half-written"):
            simulate_dataset(CONFIG, tmp_path, 2, seed=4, geometry=ARRAY, split="test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in (".lock", "dataset.json")]
    assert left == []
    simulate_dataset(CONFIG, tmp_path, 2, seed=4, geometry=ARRAY, split="test")
    assert len(read_locations(tmp_path, "test")) == 2


# --- the loader on tables as RealMAN has them ---------------------------------------------------------------------


def _real_like(root: Path, table: str, kind="moving", mics=(0, 1), rate=48000, n=48000) -> Path:
    stem = f"TEST_{kind[0].upper()}_CAFE_0001_0001"
    folder = root / "test" / "ma_noisy_speech" / "Cafe" / kind / "0001"
    rng = np.random.default_rng(0)
    for mic in mics:
        write_audio(folder / f"{stem}_CH{mic}.flac", 0.1 * rng.standard_normal(n), rate)
    name = f"test/ma_noisy_speech/Cafe/{kind}/0001/{stem}.flac"
    path = root / "test" / f"test_{kind}_source_location.csv"
    path.write_text(table.format(name=name), encoding="utf-8")
    return path


REAL_TABLE = ',filename,real_st,real_ed,angle(°),distance,ele\n0,{name},1,2,"350,355,-1000,5,10,15,20,25",-10000,0\n'


def test_moving_labels_unknown_frames_and_48_khz(tmp_path):
    _real_like(tmp_path, REAL_TABLE)
    [item] = read_locations(tmp_path)
    pair = named_array("realman32").subarray([1, 0])
    recording = read_recording(item, pair)
    assert recording.samples.shape == (2, 16000) and recording.sample_rate == 16000
    nan = np.nan
    assert np.array_equal(recording.azimuth_deg, [350, 355, nan, 5, 10, 15, 20, 25, nan, nan], equal_nan=True)
    piece = read_recording(item, pair, start_s=0.3, duration_s=0.4)
    assert piece.samples.shape == (2, 6400) and piece.azimuth_deg.tolist() == [5, 10, 15, 20]
    assert np.allclose(piece.samples[:, 500:-500], recording.samples[:, 4800:11200][:, 500:-500], atol=2e-3)
    assert np.isnan(item.distance_m) and item.scene == "Cafe"


def test_filter_by_t60_needs_to_know_it(tmp_path, made):
    _real_like(tmp_path, 'filename,angle(°)\n{name},123.4\n', kind="static")
    with pytest.raises(DataError, match="T60 of scene 'Cafe' is unknown"):
        read_locations(tmp_path, max_t60_s=0.8)
    assert len(read_locations(tmp_path, max_t60_s=0.8, t60_s={"Cafe": 0.79})) == 1
    assert len(read_locations(tmp_path, max_t60_s=0.8, t60_s={"Cafe": 0.8})) == 0
    limit = 0.25
    kept = read_locations(made, "test", max_t60_s=limit)
    assert 0 < len(kept) < N and all(float(i.meta["t60_s"]) < limit for i in kept)


def test_broken_sets_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="test_static_source_location.csv"):
        read_locations(tmp_path)
    table = _real_like(tmp_path, 'filename,angle(°)\n{name},"12,thirteen"\n')
    with pytest.raises(DataError, match="row 2.*thirteen"):
        read_locations(tmp_path)
    table.write_text("file,angle\nx,1\n")
    with pytest.raises(DataError, match="expected the columns"):
        read_locations(tmp_path)
    table.unlink()
    _real_like(tmp_path, 'filename,angle(°)\n{name},"1,2"\n', kind="static")
    with pytest.raises(DataError, match="one angle, found 2"):
        read_locations(tmp_path)
    with pytest.raises(DataError, match="finite"):
        parse_azimuth("inf")


def test_missing_unequal_and_truncated_channels(tmp_path):
    _real_like(tmp_path, 'filename,angle(°)\n{name},90\n', kind="static")
    [item] = read_locations(tmp_path)
    assert isinstance(item, LocatedFile)
    with pytest.raises(MissingDataError, match="_CH3.flac"):
        read_recording(item, named_array("realman32").subarray([0, 3]))
    pair = named_array("realman32").subarray([0, 1])
    second = item.path.with_name(f"{item.name}_CH1.flac")
    write_audio(second, np.zeros(1000), 48000)
    with pytest.raises(DataError, match="differ in length"):
        read_recording(item, pair)
    first = item.path.with_name(f"{item.name}_CH0.flac")
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(DataError, match="_CH0.flac"):
        read_recording(item, pair)
