"""Shards of scenes: sizes, both layouts, the same scenes whoever makes them, kills and damage."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.nearfield import shards
from ssl_kit.nearfield.sample_covariance import sample_factor
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes, true_covariance
from ssl_kit.nearfield.shards import build_shards, read_shard, read_shards, write_earlier_shard, write_shard

CONFIG = SceneConfig()
BATCH = draw_scenes(CONFIG, 0, range(6))
FACTOR = sample_factor(BATCH)


def covariance(f):
    return f @ f.conj().swapaxes(-1, -2)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def same_scenes(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name))
               for name in ("y", "channel", "codes", "sources", "n_sources", "snr_db"))


def test_a_scene_takes_at_most_32_kb_and_is_rebuilt(tmp_path):
    path = write_shard(tmp_path / "a.npz", BATCH, FACTOR)
    assert path.stat().st_size / len(BATCH) < 32_000
    shard = read_shard(path)
    assert same_scenes(shard.batch, BATCH) and np.array_equal(shard.batch.index, BATCH.index)
    assert relative(covariance(shard.r_samp_factor), covariance(FACTOR)) < 1e-6
    assert relative(true_covariance(shard.batch), true_covariance(BATCH)) < 1e-6


def test_codes_without_quantisation_are_rebuilt(tmp_path):
    batch = draw_scenes(SceneConfig(bits=None, codebook="random"), 0, range(3))
    shard = read_shard(write_shard(tmp_path / "a.npz", batch))
    assert relative(shard.batch.codes, batch.codes) < 1e-6 and shard.r_samp_factor is None
    assert (tmp_path / "a.npz").stat().st_size / 3 < 32_000


def test_the_earlier_layout_is_read_and_as_large_as_it_was(tmp_path):
    path = write_earlier_shard(tmp_path / "a.npz", BATCH, FACTOR)
    assert path.stat().st_size / len(BATCH) == pytest.approx(373_000, rel=0.01)
    with np.load(path) as file:
        assert set(file.files) == {"y", "H", "H_full", "codes", "ptr", "K", "snr", "R", "R_samp"}
        assert file["ptr"][0, 0] == np.float32(BATCH.sources[0, 0, 0])
        assert file["ptr"][0, 10] == np.float32(BATCH.sources[0, 0, 2])
        r = file["R"][..., 0] + 1j * file["R"][..., 1]
        seen = file["H"][..., 0] + 1j * file["H"][..., 1]
    shard = read_shard(path)
    assert np.array_equal(shard.batch.y, BATCH.y) and np.array_equal(shard.batch.channel, BATCH.channel)
    assert relative(shard.batch.sources, BATCH.sources) < 1e-6
    assert np.array_equal(shard.batch.n_sources, BATCH.n_sources)
    assert relative(r, true_covariance(BATCH)) < 1e-6
    assert relative(covariance(shard.r_samp_factor), covariance(FACTOR)) < 1e-5
    assert relative(seen, np.einsum("smn,sln->slm", BATCH.channel, BATCH.codes)) < 1e-5
    assert len(list(read_shards(tmp_path))) == 1


def test_scenes_do_not_depend_on_shard_size_or_workers(tmp_path):
    build_shards(CONFIG, tmp_path / "a", 7, seed=3, shard_size=7)
    build_shards(CONFIG, tmp_path / "b", 7, seed=3, shard_size=2)
    build_shards(CONFIG, tmp_path / "c", 7, seed=3, shard_size=4, solver=None, workers=2)
    whole, parts = next(read_shards(tmp_path / "a")), list(read_shards(tmp_path / "b"))
    assert [len(part.batch) for part in parts] == [2, 2, 2, 1]
    for number, part in enumerate(read_shards(tmp_path / "c")):
        assert same_scenes(part.batch, whole.batch[4 * number:4 * number + 4])
    for number, part in enumerate(parts):
        rows = slice(2 * number, 2 * number + 2)
        assert same_scenes(part.batch, whole.batch[rows])
        assert relative(covariance(part.r_samp_factor), covariance(whole.r_samp_factor[rows])) < 2e-3


def test_a_folder_with_other_scenes_is_refused(tmp_path):
    build_shards(CONFIG, tmp_path, 2, shard_size=2, solver=None)
    for change in ({"seed": 1}, {"shard_size": 3}, {"solver": "ridge_ls"}):
        with pytest.raises(ParameterError, match=f"{next(iter(change))} differ"):
            build_shards(CONFIG, tmp_path, 2, **({"shard_size": 2, "solver": None} | change))
    build_shards(CONFIG, tmp_path, 5, shard_size=2, solver=None)  # more of the same
    assert sum(len(shard.batch) for shard in read_shards(tmp_path)) == 5
    (tmp_path / "scenes.json").unlink()
    with pytest.raises(ParameterError, match="no scenes.json"):
        build_shards(CONFIG, tmp_path, 2, shard_size=2, solver=None)


def test_a_grown_folder_has_no_short_shard_in_its_middle(tmp_path):
    build_shards(CONFIG, tmp_path / "a", 3, shard_size=2, solver=None)
    build_shards(CONFIG, tmp_path / "a", 4, shard_size=2, solver=None)
    assert [len(shard.batch) for shard in read_shards(tmp_path / "a")] == [2, 2]


def test_a_killed_build_goes_on_to_the_same_files(tmp_path):
    code = ("from ssl_kit.nearfield.scenes import SceneConfig\nfrom ssl_kit.nearfield.shards import build_shards\n"
            f"build_shards(SceneConfig(), {str(tmp_path / 'a')!r}, 400, shard_size=20, solver=None)")
    process = subprocess.Popen([sys.executable, "-c", code])
    begin = time.monotonic()
    while len(list((tmp_path / "a").glob("scenes_*.npz"))) < 2 and time.monotonic() - begin < 240:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list((tmp_path / "a").glob("scenes_*.npz")))
    assert 2 <= left
    for path in (tmp_path / "a").glob("scenes_*.npz"):
        read_shard(path)
    build_shards(CONFIG, tmp_path / "a", 400, shard_size=20, solver=None)
    again = list(read_shards(tmp_path / "a"))
    assert sum(len(shard.batch) for shard in again) == 400 and not list((tmp_path / "a").glob(".*.tmp"))
    assert same_scenes(again[7].batch, draw_scenes(CONFIG, 0, range(140, 160)))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, damage):
    build_shards(CONFIG, tmp_path, 4, shard_size=2, solver=None)
    path = tmp_path / "scenes_00001.npz"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:len(data) // 2]
    else:
        data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="scenes_00001.npz"):
        list(read_shards(tmp_path))
    build_shards(CONFIG, tmp_path, 4, shard_size=2, solver=None)
    assert same_scenes(list(read_shards(tmp_path))[1].batch, draw_scenes(CONFIG, 0, [2, 3]))


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shards.np, "savez", full)
    with pytest.raises(StorageError, match=r"scenes_00000\.npz"):
        build_shards(CONFIG, tmp_path, 2, solver=None)
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*.tmp"))


def test_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(MissingDataError, match=r"a\.npz"):
        read_shard(tmp_path / "a.npz")
    with pytest.raises(MissingDataError, match="build_shards"):
        list(read_shards(tmp_path))
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="expected keys"):
        read_shard(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", ptr=np.zeros((2, 15)), y=np.zeros((2, 3, 3, 2)))
    with pytest.raises(DataError, match="H_full"):
        read_shard(tmp_path / "c.npz")
    write_earlier_shard(tmp_path / "d.npz", BATCH)
    with np.load(tmp_path / "d.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "d.npz", **(arrays | {"ptr": arrays["ptr"][:, :14]}))
    with pytest.raises(DataError, match="ptr"):
        read_shard(tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", **(arrays | {"K": arrays["K"] + 9}))
    with pytest.raises(DataError, match="K: expected"):
        read_shard(tmp_path / "d.npz")
