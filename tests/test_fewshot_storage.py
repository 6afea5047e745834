"""Features in HDF5 beside npy files, and what goes into the package: same numbers, clear errors, an honest card."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from ssl_kit.fewshot.encoder import Encoder, EncoderConfig
from ssl_kit.fewshot.episodes import Preprocessing
from ssl_kit.fewshot.features import FeatureConfig
from ssl_kit.fewshot.hdf5 import COMPRESSIONS, Hdf5Store, NpyFolder, read_segments, reading_rate, write_hdf5
from ssl_kit.fewshot.shipped import results_table, ship_encoder, shipped_encoder, write_card
from ssl_kit.fewshot.training import load_encoder, save_encoder
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.files import write_json


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {f"r{k}": rng.standard_normal((n, 128)).astype(np.float32) for k, n in enumerate((40, 200, 17))}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("chunk_frames", [0, 16, 1000])
def test_hdf5_gives_back_every_frame(arrays, tmp_path, compression, chunk_frames):
    pytest.importorskip("h5py")
    if compression and not chunk_frames:
        with pytest.raises(ParameterError, match="with chunks"):
            write_hdf5(tmp_path / "f.h5", arrays, FeatureConfig(), chunk_frames, compression)
        return
    config = FeatureConfig("pcen", fmin_hz=80.0)
    store = Hdf5Store(write_hdf5(tmp_path / "f.h5", arrays, config, chunk_frames, compression))
    assert store.config == config
    for name, frames in arrays.items():
        assert np.array_equal(store.frames(name)[:], frames) and store.frames(name).dtype == np.float32
        assert np.array_equal(store.frames(name)[5:15], frames[5:15])


def test_an_open_file_is_not_carried_into_another_process(arrays, tmp_path):
    pytest.importorskip("h5py")
    store = Hdf5Store(write_hdf5(tmp_path / "f.h5", arrays, FeatureConfig()))
    store.frames("r0")
    again = pickle.loads(pickle.dumps(store))
    assert again._file is None and np.array_equal(again.frames("r0")[:], arrays["r0"])
    folder = NpyFolder(tmp_path)
    np.save(tmp_path / "r0.npy", arrays["r0"])
    folder.frames("r0")
    assert not pickle.loads(pickle.dumps(folder))._open


def test_several_readers_read_the_same_places(arrays, tmp_path):
    for name, frames in arrays.items():
        np.save(tmp_path / f"{name}.npy", frames)
    rate, cpu_s = reading_rate(NpyFolder(tmp_path), list(arrays), 50, 2)
    assert rate > 0 and cpu_s > 0
    with pytest.raises(ParameterError, match="n_workers"):
        reading_rate(NpyFolder(tmp_path), list(arrays), 50, 0)
    with pytest.raises(DataError, match="r2: has 17 frames, a segment 18"):
        read_segments(NpyFolder(tmp_path), list(arrays), 5, 18)


def test_what_is_wrong_with_a_file_is_said(arrays, tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    path = write_hdf5(tmp_path / "f.h5", arrays, FeatureConfig())
    with pytest.raises(DataError, match="no recording 'none'"):
        Hdf5Store(path).frames("none")
    with pytest.raises(MissingDataError, match="found none"):
        Hdf5Store(tmp_path / "g.h5").frames("r0")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated"):
        Hdf5Store(path).frames("r0")
    with pytest.raises(ParameterError, match="'zip'"):
        write_hdf5(path, arrays, FeatureConfig(), 8, "zip")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(MissingDataError, match=r"ssl-kit\[hdf5\]"):
        write_hdf5(tmp_path / "h.h5", arrays, FeatureConfig())
    assert not (tmp_path / "h.h5").exists()


def test_a_writer_that_fails_leaves_the_file_before(arrays, tmp_path):
    pytest.importorskip("h5py")
    path = write_hdf5(tmp_path / "f.h5", arrays, FeatureConfig())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="could not convert"):
        write_hdf5(path, arrays | {"bad": np.array([["x"]])}, FeatureConfig())
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["f.h5"]


# into the package


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    network = Encoder(EncoderConfig(channels=(4, 8, 4))).eval()
    network.set_statistics(np.linspace(-9, -3, 128), np.full(128, 1 / 3))
    folder = save_encoder(tmp_path / "detector", network, Preprocessing(FeatureConfig("pcen")), {
        "method": "prototypes", "rules": {"prototypes": {"threshold": 0.6, "shortest": 0.4, "bridge": 0.3}},
        "f_validation": 0.5, "steps": 20, "seed": 0})
    write_json(folder / "training" / "history.json", [
        {"step": 10, "loss": 2.0, "seconds": 30.0, "valid_loss": 1.0, "valid_accuracy": 0.5},
        {"step": 20, "loss": 1.0, "seconds": 31.0, "valid_loss": 1.5, "valid_accuracy": 0.6}])
    return network, folder


def test_half_precision_keeps_statistics_and_embeddings(detector, tmp_path):
    network, folder = detector
    shipped = ship_encoder(folder, tmp_path / "shipped", {"hardware": "one core"})
    half, preprocessing, about = load_encoder(shipped)
    assert preprocessing == Preprocessing(FeatureConfig("pcen"))
    assert about["best_step"] == 10 and about["seconds"] == 61 and about["hardware"] == "one core"
    for name, value in network.named_buffers():
        assert torch.equal(value, dict(half.named_buffers())[name]), name
    assert (shipped / "model.safetensors").stat().st_size < 0.85 * (folder / "model.safetensors").stat().st_size
    frames = torch.randn(3, 17, 128) - 6
    with torch.no_grad():
        a, b = network(frames), half(frames)
    assert 0 < (a - b).abs().max() < 0.01 * a.abs().max()


def test_a_card_says_what_was_measured(detector, tmp_path):
    folder = ship_encoder(detector[1], tmp_path / "shipped", {"data": "calls", "command": "ssl-kit fewshot train"})
    with pytest.raises(MissingDataError, match="fewshot_evaluate"):
        write_card(folder, tmp_path)
    head = "method,subset,precision,recall,f,low,high\n"
    (tmp_path / "methods.csv").write_text(head + "prototypes,dog,70,50,58.3,50,66\nprototypes,all,71,51,57,49,65\n")
    (tmp_path / "differences.csv").write_text("method,other,difference,low,high\nprototypes,template,27.6,9.1,36.3\n")
    text = write_card(folder, tmp_path).read_text()
    for words in ("58 [50, 66] | 57 [49, 65] | 71 / 51", "`template` 27.6 [9.1, 36.3]", "20 episodes", "episode 10,",
                  "pcen, 128 mel bands", "F there 50.0 %"):
        assert words in text, words
    with pytest.raises(DataError, match="precision"):
        results_table([{"method": "x", "subset": "all"}])


def test_the_shipped_detector_is_found_or_the_ones_there_are_named(tmp_path, detector):
    assert shipped_encoder(str(detector[1])) == detector[1]
    with pytest.raises(MissingDataError, match="'nowhere'.*a folder"):
        shipped_encoder("nowhere")


def test_the_shipped_detector_is_what_its_card_says():
    try:
        folder = shipped_encoder()
    except MissingDataError as error:
        pytest.skip(str(error))
    network, preprocessing, about = load_encoder(folder)
    card = (folder / "README.md").read_text()
    assert network.config == EncoderConfig("v1", network.config.channels) and about["method"] in about["rules"]
    assert f"channels {', '.join(map(str, network.config.channels))}, {32 * network.config.channels[-1]:,} out" in card
    assert f"{about['steps']:,} episodes" in card and preprocessing.feature.kind in card
    history = json.loads((folder / "history.json").read_text())
    assert about["best_step"] in [row["step"] for row in history]
    assert len((folder / "model.safetensors").read_bytes()) < 2e6
