"""`ssl-kit localize`: real recordings, text, JSON, stream, pictures, and what it refuses."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_srp import plane_wave

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import named_array
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.localize.command import add_localize_arguments, run_localize


def localize(*arguments):
    parser = argparse.ArgumentParser()
    add_localize_arguments(parser)
    return run_localize(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def clip(tmp_path):
    return write_audio(tmp_path / "clip.wav", plane_wave(named_array("6cm"), 123.0, n=16000, noise=0.02))


@pytest.fixture
def live_recordings():
    folder = Path(os.environ.get("SSL_KIT_DATA", "")) / "respeaker"
    if "SSL_KIT_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("needs the ReSpeaker recordings: set SSL_KIT_DATA to the folder that holds respeaker/")
    return folder


def test_live_recordings_of_one_source(live_recordings, capsys):
    files = sorted(live_recordings.glob("az180_[15]*cm_*.wav"))
    assert len(files) == 4 and localize(*files, "--array", "respeaker", "--json") == 0
    for row in json.loads(capsys.readouterr().out):
        assert angular_error_deg(row["azimuth_deg"], 180.0) <= 3, row


def test_live_recording_as_a_stream(live_recordings, capsys):
    localize(live_recordings / "az180_150cm_1ba56980.wav", "--array", "respeaker", "--stream", "--json")
    points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(points) == 56
    sure = [p["azimuth_deg"] for p in points if p["confidence"] > 0.05]
    assert len(sure) > 5 and np.median(angular_error_deg(sure, 180.0)) <= 3


def test_text_and_picture(clip, tmp_path, capsys):
    picture = tmp_path / "where.png"
    assert localize(clip, clip, "--array", "6cm", "--plot", picture) == 0
    out = capsys.readouterr().out
    assert out.count("azimuth 123.") + out.count("azimuth 122.9") == 2 and "confidence" in out and "method srp" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("method", ["music", "mvdr", "gcc-ls"])
def test_other_methods(clip, method, capsys):
    localize(clip, "--array", "6cm", "--method", method, "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert angular_error_deg(row["azimuth_deg"], 123.0) < 1 and row["method"] == method


@pytest.mark.parametrize("method", ["srp", "gcc-ls"])
def test_stream_by_any_method(clip, method, tmp_path, capsys):
    localize(clip, "--array", "6cm", "--method", method, "--stream", "--json", "--plot", tmp_path / "s.pdf")
    points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["time_s"] for p in points] == pytest.approx(np.arange(1, 11) * 0.1)
    assert angular_error_deg(points[-1]["azimuth_deg"], 123.0) < 1
    assert (tmp_path / "s.pdf").stat().st_size > 1000


@pytest.mark.parametrize("method", ["srp", "mvdr"])
def test_stream_of_silence_says_nothing(method, tmp_path, capsys):
    silent = write_audio(tmp_path / "silent.wav", np.zeros((9, 8000), np.float32))
    localize(silent, "--array", "6cm", "--method", method, "--stream", "--json")
    assert all(json.loads(line)["azimuth_deg"] is None for line in capsys.readouterr().out.splitlines())


def test_an_answer_every_half_second(clip, capsys):
    localize(clip, "--array", "6cm", "--every", "0.5", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert [p["time_s"] for p in row["track"]] == [0.25, 0.75]


def test_array_from_a_file(clip, tmp_path, capsys):
    table = tmp_path / "mine.csv"
    geometry = named_array("6cm")
    rows = [f"{n},{x},{y},{z}" for n, (x, y, z) in zip(geometry.names, geometry.positions_m.tolist(), strict=True)]
    table.write_text("\n".join(["name,x_m,y_m,z_m", *rows]) + "\n")
    localize(clip, "--array", table, "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert angular_error_deg(row["azimuth_deg"], 123.0) < 1


def test_clear_errors(clip, tmp_path):
    with pytest.raises(DataError, match="clip.wav.*4 mics.*9 channels.*--channels"):
        localize(clip, "--array", "respeaker")
    with pytest.raises(MissingDataError, match="gone.wav"):
        localize(tmp_path / "gone.wav", "--array", "6cm")
    with pytest.raises(ParameterError, match="respeeker"):
        localize(clip, "--array", "respeeker")
    with pytest.raises(ParameterError, match="there are .*srp"):
        localize(clip, "--array", "6cm", "--method", "nope")
    with pytest.raises(ParameterError, match="--plot"):
        localize(clip, "--array", "6cm", "--plot", tmp_path / "x.gif")
    with pytest.raises(ParameterError, match="--every"):
        localize(clip, "--array", "6cm", "--every", "0")
    silent = write_audio(tmp_path / "quiet.wav", np.zeros((9, 800)))
    with pytest.raises(DataError, match="quiet.wav.*silent"):
        localize(silent, "--array", "6cm")


def test_nan_in_a_file(tmp_path):
    import soundfile

    samples = plane_wave(named_array("6cm"), 10.0, n=4000)
    samples[3, 100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples.T, 16000, subtype="FLOAT")
    for extra in ([], ["--stream"]):
        with pytest.raises(DataError, match="nan.wav.*NaN"):
            localize(tmp_path / "nan.wav", "--array", "6cm", *extra)
