"""The protocol of localizers, their registry, the baselines, and reading files for an array."""

import subprocess
import sys

import numpy as np
import pytest
from test_srp import RATE, peer_case, plane_wave  # noqa: F401 (a fixture)

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import named_array
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.localize.protocol import (
    AzimuthTrack,
    Localizer,
    list_localizers,
    localizer,
    overall_azimuth_deg,
    read_for_array,
    register_localizer,
    track_at,
)

CLASSICAL = ["srp", "music", "mvdr", "gcc-ls"]


@pytest.mark.parametrize("name", CLASSICAL)
def test_every_method_passes_the_peers_scene(peer_case, name):  # noqa: F811
    samples, geometry = peer_case
    method = localizer(name, n_fft=256, band_hz=(312.5, 3750.0))
    track = method(samples, geometry, RATE)
    assert isinstance(method, Localizer) and track.method == name
    assert angular_error_deg(track.azimuth_deg[0], 61.0) < 0.3
    assert 0 <= track.confidence[0] <= 1 and track.score.shape == (1, 360)


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize("azimuth", [0.4, 200.7])
def test_every_method_in_noise_after_silence(name, azimuth):
    geometry = named_array("6cm")
    wave = np.concatenate([np.zeros((9, 4000)), plane_wave(geometry, azimuth, n=8000, noise=0.02)], axis=1)
    assert angular_error_deg(localizer(name)(wave, geometry, RATE).azimuth_deg[0], azimuth) < 1


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize(("bad", "message"), [(np.ones((5, 900)), "9 mics"), (np.full((9, 900), np.inf), "infinite"),
                                              (np.zeros((9, 900)), "silent")])
def test_every_method_refuses_the_same_things(name, bad, message):
    with pytest.raises(DataError, match=message):
        localizer(name)(bad, named_array("6cm"), RATE)


@pytest.mark.parametrize("name", CLASSICAL)
def test_unknown_parameters_are_refused(name):
    with pytest.raises(ParameterError, match="nfft"):
        localizer(name, nfft=512)


def test_plain_music_and_loading():
    geometry = named_array("uca:6:0.05")
    wave = plane_wave(geometry, 90.0, noise=0.02)
    assert angular_error_deg(localizer("music", normalized=False)(wave, geometry, RATE).azimuth_deg[0], 90.0) < 1
    with pytest.raises(ParameterError, match="loading"):
        localizer("mvdr", loading=0.0)


def test_registry():
    assert set(CLASSICAL) <= set(list_localizers())
    with pytest.raises(ParameterError, match="unknown; there are .*srp"):
        localizer("magic")
    with pytest.raises(ParameterError, match="registered already"):
        register_localizer("srp", "somewhere:else")


def test_listing_methods_loads_none_of_them():
    code = "import sys, ssl_kit.localize.protocol as p; p.list_localizers(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_track_refuses_shapes_that_disagree():
    with pytest.raises(DataError, match="frame, direction"):
        AzimuthTrack([0.0], np.ones((2, 4)), np.arange(4), [1.0], "x")
    with pytest.raises(DataError, match="confidence"):
        AzimuthTrack([0.0], np.ones((1, 4)), np.arange(4), [1.0, 0.5], "x")


def test_track_to_one_azimuth_and_to_times():
    grid = np.arange(0.0, 360.0)
    score = np.exp(-0.5 * ((grid - 100) / 5) ** 2)[None].repeat(3, 0)
    score[2] = np.roll(score[2], 150)
    track = AzimuthTrack([99.5, 100.5, 250.0], score, grid, [0.6, 0.6, 0.2], "x", [0.05, 0.15, 0.25])
    assert abs(overall_azimuth_deg(track) - 100.0) < 1e-6
    assert track_at(track, [0.0, 0.16, 9.0]).tolist() == [99.5, 100.5, 250.0]
    clip = AzimuthTrack([12.0], score[:1], grid, [0.6], "x")
    assert track_at(clip, [0.0, 5.0]).tolist() == [12.0, 12.0]


def test_reading_for_an_array(tmp_path):
    geometry = named_array("uca:4:0.05")
    samples = plane_wave(geometry, 30.0, n=2000)
    six = np.concatenate([samples[:1] * 0.5, samples, samples[:1] * 0.5])
    path = write_audio(tmp_path / "six.wav", six)
    assert np.abs(read_for_array(path, geometry, channels=[1, 2, 3, 4]) - samples).max() < 1e-4
    assert len(read_for_array(path, named_array("respeaker"))) == 4  # the usual layout of such files
    with pytest.raises(DataError, match="six.wav.*4 mics.*6 channels"):
        read_for_array(path, geometry)
    with pytest.raises(ParameterError, match="4 mics"):
        read_for_array(path, geometry, channels=[1, 2, 3])
    with pytest.raises(DataError, match="0..5"):
        read_for_array(path, geometry, channels=[1, 2, 3, 6])
    with pytest.raises(MissingDataError, match="nowhere.wav"):
        read_for_array(tmp_path / "nowhere.wav", geometry)
    for mic, channel in zip(geometry.names, samples, strict=True):
        write_audio(tmp_path / f"split_CH{mic}.flac", channel)
    assert np.abs(read_for_array(tmp_path / "split.flac", geometry) - samples).max() < 1e-4
    (tmp_path / "split_CH2.flac").unlink()
    with pytest.raises(MissingDataError, match="split_CH2.flac"):
        read_for_array(tmp_path / "split.flac", geometry)
