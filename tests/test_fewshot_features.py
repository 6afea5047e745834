"""Features of few-shot detection: equal to librosa, whole on disk, resumed, never normalised twice."""

import os
import signal
import subprocess
import sys
import time

import librosa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.fewshot import store as store_module
from ssl_kit.fewshot.features import KINDS, FeatureConfig, compute_features, file_features, mel_bank
from ssl_kit.fewshot.store import (
    FeatureStore,
    check_features,
    export_features,
    feature_path,
    open_frames,
    stream_statistics,
)
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

MEL = dict(sr=22050, n_fft=1024, hop_length=256, n_mels=128, fmin=50, fmax=11025)


def sound(seconds=2.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(round(22050 * seconds)) / 22050
    beeps = 0.3 * np.sin(2 * np.pi * 3000 * t) * (t % 0.5 < 0.1)
    return (beeps + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def recordings(folder, n=3, seconds=1.0):
    return [write_audio(folder / f"{k}.wav", sound(seconds, k), 22050) for k in range(n)]


@pytest.mark.parametrize("n_samples", [1100, 22050, 256 * 512 * 2 + 77])
def test_logmel_is_that_of_librosa(n_samples):
    y = sound(n_samples / 22050 + 1)[:n_samples]
    y = y / np.abs(y).max()
    np.testing.assert_allclose(compute_features(y), np.log(librosa.feature.melspectrogram(y=y, **MEL) + 1e-8).T,
                               atol=5e-4)


def test_pcen_has_the_true_hop_and_the_reference_has_not():
    y = sound(15.0)  # more than two blocks
    y = y / np.abs(y).max()
    ours = {kind: compute_features(y, FeatureConfig(kind)) for kind in KINDS}
    peers = {(scale, hop): librosa.pcen(librosa.feature.melspectrogram(y=y * 2.0**scale, **MEL), sr=22050,
                                        hop_length=hop).T for scale in (31, 32) for hop in (256, 512)}
    np.testing.assert_allclose(ours["pcen"], peers[31, 256], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(ours["reference"], peers[32, 512], rtol=2e-3, atol=2e-3)
    assert np.abs(peers[31, 512] - peers[31, 256]).max() > 0.1  # the trap would be seen


def test_the_lowest_frequency_reaches_the_bank():
    bank = mel_bank(FeatureConfig())
    bins_hz = np.arange(513) * 22050 / 1024
    assert bank[:, bins_hz < 50].max() == 0 and bank[:, bins_hz > 11025].sum() == 0
    assert mel_bank(FeatureConfig(fmin_hz=0.0))[0, bins_hz < 50].max() > 0


def test_the_recording_is_scaled_to_its_peak():
    np.testing.assert_allclose(compute_features(sound() * 1e-3), compute_features(sound()), atol=1e-3)


@pytest.mark.parametrize(("settings", "words"), [
    ({"kind": "pcn"}, "did you mean 'pcen'"), ({"fmax_hz": 12000}, "fmax_hz"), ({"hop_length": 0}, "hop_length")])
def test_wrong_configurations(settings, words):
    with pytest.raises(ParameterError, match=words):
        FeatureConfig(**settings)


def test_silence_nan_and_stereo_arrays_are_refused(tmp_path):
    for samples, words in ((np.zeros(5000), "silent"), (np.r_[sound(), np.nan], "NaN")):
        with pytest.raises(DataError, match=words):
            compute_features(samples)
    with pytest.raises(ParameterError, match="mono"):
        compute_features(np.ones((2, 500)))
    silent = write_audio(tmp_path / "silent.wav", np.zeros(22050), 22050)
    with pytest.raises(DataError, match="silent.wav"):
        file_features(silent)
    stereo = write_audio(tmp_path / "stereo.wav", np.stack([sound(), sound(seed=1)]), 22050)
    np.testing.assert_allclose(file_features(stereo), compute_features((sound() + sound(seed=1)) / 2), atol=0.3)


def test_features_lie_beside_the_audio_or_below_a_root(tmp_path):
    config = FeatureConfig()
    audio = tmp_path / "set" / "birds" / "a.wav"
    assert feature_path(audio, config) == tmp_path / "set" / "birds" / "a_logmel.npy"
    assert feature_path(audio, config, tmp_path / "set", tmp_path / "f") == tmp_path / "f" / "birds" / "a_logmel.npy"
    with pytest.raises(ParameterError, match="top"):
        feature_path(audio, config, None, tmp_path)


def test_frames_are_raw_float32_and_mapped(tmp_path):
    files = recordings(tmp_path, 1)
    export_features(files, top=tmp_path)
    frames = FeatureStore(top=tmp_path).frames(files[0])
    assert isinstance(frames, np.memmap) and frames.dtype == np.float32 and frames.shape == (87, 128)
    np.testing.assert_array_equal(frames, file_features(files[0]))
    with pytest.raises(ValueError):
        frames[0, 0] = 1


def test_normalising_is_not_the_business_of_disk_or_store(tmp_path):
    files = recordings(tmp_path)
    export_features(files)
    store = FeatureStore(top=tmp_path)
    before = [np.array(store.frames(file)) for file in files]
    first = store.statistics(files)
    again = FeatureStore(top=tmp_path).statistics(files[::-1])
    np.testing.assert_array_equal(first.mean, again.mean)
    assert first.mean.mean() < -2  # statistics of raw frames; of normalised ones they would be 0 and 1
    for file, raw in zip(files, before, strict=True):
        np.testing.assert_array_equal(FeatureStore(top=tmp_path).frames(file), raw)


def test_statistics_follow_the_features(tmp_path):
    files = recordings(tmp_path)
    export_features(files)
    before = FeatureStore(top=tmp_path).statistics(files)
    write_audio(files[0], sound(1.5, 9), 22050)
    export_features(files)
    after = FeatureStore(top=tmp_path).statistics(files)
    assert after.n_frames > before.n_frames and not np.array_equal(after.mean, before.mean)
    part = FeatureStore(top=tmp_path).statistics(files[1:])
    assert part.n_frames == 2 * 87


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 50), st.floats(-1e4, 1e4))
def test_streamed_statistics_are_those_of_the_whole(lengths, block, offset):
    rng = np.random.default_rng(sum(lengths))
    parts = [offset + rng.standard_normal((n, 2)) for n in lengths]
    found, whole = stream_statistics(parts, block), np.concatenate(parts)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.std, np.maximum(whole.std(0), 1e-5), rtol=1e-6, atol=1e-9)


def test_statistics_refuse_nothing_and_nan():
    with pytest.raises(DataError, match="found none"):
        stream_statistics([])
    with pytest.raises(DataError, match="NaN"):
        stream_statistics([np.full((3, 2), np.nan)])


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"no array at all"),
    "shape": lambda path: np.save(path, np.zeros((3, 4), np.float32)),
    "length": lambda path: np.save(path, np.zeros((3, 128), np.float32)),
    "pickled": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "gone": lambda path: path.unlink(),
    "record torn": lambda path: path.with_name(path.name + ".json").write_text('{"config": {"ki'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_feature_file_costs_that_file_alone(tmp_path, kind):
    files = recordings(tmp_path)
    audio = {file: file.read_bytes() for file in files}
    export_features(files)
    path = feature_path(files[1], FeatureConfig())
    DAMAGE[kind](path)
    assert list(check_features(files)) == [files[1]]
    report = export_features(files)
    assert report.written == [files[1]] and report.kept == [files[0], files[2]] and not report.failed
    assert not check_features(files)
    np.testing.assert_array_equal(open_frames(path), file_features(files[1]))
    assert {file: file.read_bytes() for file in files} == audio


def test_an_altered_number_is_found_by_the_thorough_check_and_force_mends_it(tmp_path):
    files = recordings(tmp_path)
    export_features(files)
    path = feature_path(files[2], FeatureConfig())
    for value, words in ((3.0, "altered"), (np.nan, "NaN")):
        frames = np.load(path)
        frames[5, 5] = value
        np.save(path, frames)
        problems = check_features(files)
        assert list(problems) == [files[2]] and words in problems[files[2]]
    assert len(export_features(files, force=True).written) == 3 and not check_features(files)


def test_another_configuration_is_exported_anew(tmp_path):
    files = recordings(tmp_path)
    export_features(files)
    other = FeatureConfig(fmin_hz=0.0)
    assert set(check_features(files, other).values()) == {"made with another configuration"}
    assert len(export_features(files, other).written) == 3


def test_what_is_wrong_with_one_recording_is_said_and_costs_no_other(tmp_path):
    files = recordings(tmp_path)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(files[0].read_bytes()[:500])
    silent = write_audio(tmp_path / "silent.wav", np.zeros(22050), 22050)
    report = export_features([*files, broken, silent])
    assert report.written == files and "truncated" in report.failed[broken] and "silent" in report.failed[silent]
    assert broken.exists() and silent.exists() and not feature_path(silent, FeatureConfig()).exists()


def test_two_recordings_that_would_share_a_name_are_refused(tmp_path):
    wav, flac = (write_audio(tmp_path / f"a.{kind}", sound(), 22050) for kind in ("wav", "flac"))
    with pytest.raises(DataError, match="share"):
        export_features([wav, flac])


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(MissingDataError, match="nowhere"):
        store_module.audio_files(tmp_path / "nowhere")
    with pytest.raises(MissingDataError, match="recordings"):
        store_module.audio_files(tmp_path)
    with pytest.raises(MissingDataError, match="fewshot export"):
        FeatureStore(top=tmp_path).frames(tmp_path / "a.wav")


def test_killed_and_resumed(tmp_path):
    files = recordings(tmp_path, 60, 0.5)
    code = ("import sys; from pathlib import Path; from ssl_kit.fewshot.store import *; "
            "export_features(sorted(Path(sys.argv[1]).glob('*.wav')), workers=1)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("*_logmel.npy.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    report = export_features(files)
    assert len(report.kept) >= 4 and len(report.kept) + len(report.written) == 60 and not check_features(files)


def test_a_full_disk_is_a_failed_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    import errno

    files = recordings(tmp_path, 2)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.np, "save", full)
    report = export_features(files)
    assert len(report.failed) == 2 and "No space left" in report.failed[files[0]]
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*tmp"))
