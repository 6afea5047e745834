"""`ssl-kit localize`: real recordings, text, JSON, stream, pictures, and what it refuses."""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_srp import plane_wave

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import ArrayGeometry, named_array
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.cli import main
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.localize.array_picture import MAX_PANELS, draw_answers, draw_array
from ssl_kit.localize.command import add_localize_arguments, localize_file, run_localize
from ssl_kit.localize.inputs import RawAudio, find_recordings, raw_blocks
from ssl_kit.localize.srp import SRP

ROOT = Path(__file__).resolve().parent.parent


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


# --- folders, files per mic, bad ones among good ones ---------------------------------------------------------------


def write_channels(folder, name, samples, mics):
    for mic, row in zip(mics, samples, strict=True):
        write_audio(folder / f"{name}_CH{mic}.flac", row)


def test_a_folder_with_all_below_it(tmp_path, capsys):
    wave = plane_wave(named_array("uca:4:0.05"), 200.0, n=8000, noise=0.02)
    for name in ("b.wav", "deep/er/a.flac", "deep/c.WAV"):
        write_audio(tmp_path / name, wave)
    write_channels(tmp_path / "mics", "talk", wave, range(4))
    (tmp_path / ".hidden.wav").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert localize(tmp_path, "--array", "uca:4:0.05", "--json", "--csv", tmp_path / "out.csv") == 0
    rows = json.loads(capsys.readouterr().out)
    names = ["b.wav", "deep/c.WAV", "deep/er/a.flac", "mics/talk.flac"]
    assert [row["file"] for row in rows] == [str(tmp_path / name) for name in names]
    assert all(angular_error_deg(row["azimuth_deg"], 200.0) < 1 for row in rows)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "time_s", "azimuth_deg", "confidence", "method", "array"] and len(table) == 4
    assert [float(line["azimuth_deg"]) for line in table] == [row["azimuth_deg"] for row in rows]
    assert {line["time_s"] for line in table} == {""} and {line["array"] for line in table} == {"uca:4:0.05"}


def test_a_folder_without_recordings(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(MissingDataError, match=r"expected recordings \(.wav.*found none"):
        find_recordings([tmp_path])


def test_a_church_is_no_channel(tmp_path):
    for name in ("talk_CHURCH.flac", "a_CH0.flac", "a_CH1.flac", "a_CHleft.flac"):
        (tmp_path / name).touch()
    found = [path.name for path in find_recordings([tmp_path], ["left"])]
    assert found == ["a.flac", "talk_CHURCH.flac"]
    assert [path.name for path in find_recordings([tmp_path])] == ["a.flac", "a_CHleft.flac", "talk_CHURCH.flac"]


def test_files_per_mic_as_a_stream_and_with_one_missing(tmp_path, capsys):
    geometry = named_array("uca:4:0.05")
    write_channels(tmp_path, "talk", plane_wave(geometry, 200.0, n=8000, noise=0.02), range(4))
    localize(tmp_path, "--array", "uca:4:0.05", "--stream", "--json")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["time_s"] == 0.5 and angular_error_deg(last["azimuth_deg"], 200.0) < 2
    (tmp_path / "talk_CH2.flac").unlink()
    for extra in ([], ["--stream"]):
        with pytest.raises(MissingDataError, match="talk.flac.*channels 0, 1, 3; there is none for 2"):
            localize(tmp_path, "--array", "uca:4:0.05", *extra)
    write_audio(tmp_path / "talk_CH2.flac", np.full(4000, 0.1))
    with pytest.raises(DataError, match="talk.flac.*differ in length"):
        localize(tmp_path, "--array", "uca:4:0.05", "--stream")


@pytest.mark.parametrize("extra", [[], ["--stream"]])
def test_a_bad_file_among_good_ones(clip, tmp_path, capsys, extra):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"not audio")
    assert localize(bad, clip, tmp_path / "gone.wav", "--array", "6cm", "--csv", tmp_path / "o.csv", *extra) == 1
    shown = capsys.readouterr()
    assert "bad.wav cannot be opened" in shown.err and "gone.wav does not exist" in shown.err
    assert "2 of 3 recordings could not be used" in shown.err and "bad.wav" not in shown.out
    assert {line.split(",")[0] for line in (tmp_path / "o.csv").read_text().splitlines()[1:]} == {str(clip)}


def test_nothing_but_bad_files(tmp_path, capsys):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"no")
    assert localize(tmp_path, "--array", "6cm", "--csv", tmp_path / "o.csv", "--plot", tmp_path / "o.png") == 2
    assert not list(tmp_path.glob("o.*"))
    with pytest.raises(ParameterError, match="crnn|trained for"):  # the command is wrong, not a file
        write_audio(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, (9, 4000)))
        localize(tmp_path / "a.wav", tmp_path / "a.wav", "--array", "12cm", "--method", "crnn")


def wave_at(rate, geometry, azimuth_deg, n):
    """`plane_wave` at another rate: what matters are delays in samples."""
    scaled = ArrayGeometry(geometry.positions_m * rate / 16000)
    samples = plane_wave(scaled, azimuth_deg, n=n, noise=0.02)
    return 0.5 * samples / np.abs(samples).max()


# --- long files -----------------------------------------------------------------------------------------------------


def test_pieces_give_what_one_go_gives(tmp_path):
    """A source that moves on every 10 s, for 70 s."""
    geometry = named_array("uca:4:0.05")
    samples = np.concatenate([wave_at(4000, geometry, 50.0 * k, 40000) for k in range(7)], axis=1)
    path = write_audio(tmp_path / "walk.wav", samples, 4000, "FLOAT")
    config = {"block_s": 0.4, "context_s": 0.8, "n_fft": 256, "band_hz": (300, 1900)}
    row, track = localize_file(path, geometry, SRP(**config), None, 4000, every_s=0.4)
    whole = SRP(**config)(samples, geometry, 4000)
    assert track is None and len(row["track"]) == whole.n_frames == 175
    assert np.allclose([p["time_s"] for p in row["track"]], whole.times_s, atol=1e-3)
    assert angular_error_deg([p["azimuth_deg"] for p in row["track"]], whole.azimuth_deg).max() < 0.02
    row, _ = localize_file(path, geometry, SRP(n_fft=256, band_hz=(300, 1900)), None, 4000)
    assert [p["time_s"] for p in row["track"]] == [10.0, 30.0, 50.0, 65.0]


def test_half_an_hour_in_constant_memory(tmp_path):
    import soundfile

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to read the peak of the memory")
    second = plane_wave(named_array("respeaker"), 123.0, n=16000, noise=0.05)
    tenth, silence = np.tile(0.4 * second / np.abs(second).max(), 10).T, np.zeros((16000 * 90, 4))

    def write(path, n_bursts):
        with soundfile.SoundFile(path, "w", 16000, 4, "PCM_16") as file:
            for k in range(n_bursts):  # 10 s in each 100 s; the same memory as 30 minutes of talk, in less time
                file.write(tenth if k % 3 else -tenth)
                file.write(silence)
        return str(path)
    # builds of PyTorch differ in what they take: the peak of half an hour is compared with that of minutes
    script = r"""
import re, sys
from ssl_kit.lab.cli import main
for path in sys.argv[1:]:
    assert main(["localize", path, "--array", "respeaker"]) == 0
    peak_kb = re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]
    print("peak", int(peak_kb) // 1024)
"""
    short, long = write(tmp_path / "short.wav", 2), write(tmp_path / "long.wav", 18)
    command = [sys.executable, "-c", script, short, long]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    Path(long).unlink()
    lines = done.stdout.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("peak"))
    assert "azimuth 12" in lines[at + 1] and len(lines) == at + 1 + 2 + 35  # 17 bursts are heard by two pieces
    assert int(lines[-1].split()[1]) < int(lines[at].split()[1]) + 60, (lines[at], lines[-1])  # the file is 230 MB


def test_a_long_silence(tmp_path):
    path = write_audio(tmp_path / "night.wav", np.zeros((4, 4000 * 31)), 4000)
    with pytest.raises(DataError, match="night.wav: silent"):
        localize(path, "--array", "uca:4:0.05", "--sample-rate", "4000")


# --- a pipe ---------------------------------------------------------------------------------------------------------


def pipe_in(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))


def interleaved(azimuth_deg=123.0, n=16000, kind="<i2"):
    samples = plane_wave(named_array("uca:4:0.05"), azimuth_deg, n=n, noise=0.02)
    samples = 0.5 * samples.T / np.abs(samples).max()
    return (samples * 32768).astype(kind).tobytes() if kind == "<i2" else samples.astype(kind).tobytes()


PIPE = ["-", "--array", "uca:4:0.05", "--raw-channels", "4", "--json"]


@pytest.mark.parametrize("kind, rate, extra", [("<i2", 16000, []), ("<f4", 16000, ["--raw-format", "f32le"]),
                                               ("<i2", 8000, ["--raw-format", "s16le"])])
def test_raw_samples_from_a_pipe(monkeypatch, capsys, tmp_path, kind, rate, extra):
    samples = wave_at(rate, named_array("uca:4:0.05"), 123.0, rate).T
    pipe_in(monkeypatch, ((samples * 32768) if kind == "<i2" else samples).astype(kind).tobytes())
    assert localize(*PIPE, "--raw-rate", rate, *extra, "--csv", tmp_path / "o.csv", "--plot", tmp_path / "o.png") == 0
    points = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert points[-1]["time_s"] == pytest.approx(1.0, abs=0.01) and len(points) in (10, 11)
    assert points[-1]["file"] == "-" and angular_error_deg(points[-1]["azimuth_deg"], 123.0) < 2
    assert len((tmp_path / "o.csv").read_text().splitlines()) == len(points) + 1


def test_the_pipe_and_the_file_get_the_same_answers(monkeypatch, capsys, tmp_path):
    import soundfile

    data = interleaved()
    soundfile.write(tmp_path / "a.wav", np.frombuffer(data, "<i2").reshape(-1, 4), 16000, "PCM_16")
    localize(tmp_path / "a.wav", "--array", "uca:4:0.05", "--stream", "--json")
    of_file = [json.loads(line) | {"file": "-"} for line in capsys.readouterr().out.splitlines()]
    pipe_in(monkeypatch, data)
    localize(*PIPE, "--raw-rate", "16000")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == of_file


def test_channels_of_a_pipe_are_chosen(monkeypatch, capsys):
    samples = np.frombuffer(interleaved(), "<i2").reshape(-1, 4)
    six = np.concatenate([np.zeros_like(samples[:, :1]), samples[:, ::-1], np.zeros_like(samples[:, :1])], axis=1)
    pipe_in(monkeypatch, six.tobytes())
    localize("-", "--array", "uca:4:0.05", "--raw-channels", "6", "--raw-rate", "16000", "--channels", "4,3,2,1",
             "--json")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert angular_error_deg(last["azimuth_deg"], 123.0) < 2


def test_a_pipe_that_ends_within_a_sample(monkeypatch, capsys):
    pipe_in(monkeypatch, interleaved(n=2000) + b"abc")
    assert localize(*PIPE, "--raw-rate", "16000") == 0
    shown = capsys.readouterr()
    assert "3 bytes are dropped" in shown.err
    assert [json.loads(line)["time_s"] for line in shown.out.splitlines()] == [0.1, 0.125]


def test_what_a_pipe_must_say(monkeypatch, clip):
    pipe_in(monkeypatch, b"")
    for wrong, complaint in ((PIPE, "--raw-rate"), (["-", "--array", "6cm", "--raw-rate", "16000"], "--raw-channels"),
                             ([*PIPE, "--raw-rate", "0"], "--raw-rate"), ([clip, *PIPE], "stands alone"),
                             ([*PIPE, "--raw-rate", "16000", "--every", "1"], "--every"),
                             ([clip, "--array", "6cm", "--raw-rate", "16000"], "give - as FILE")):
        with pytest.raises(ParameterError, match=complaint):
            localize(*wrong)
    with pytest.raises(DataError, match="-: expected audio, found no samples"):
        localize(*PIPE, "--raw-rate", "16000")
    with pytest.raises(DataError, match="standard input.*4 mics.*6 channels"):
        localize("-", "--array", "uca:4:0.05", "--raw-rate", "16000", "--raw-channels", "6")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ParameterError, match="found a terminal"):
        localize(*PIPE, "--raw-rate", "16000")


def test_a_pipe_of_another_format_is_noticed(monkeypatch):
    for values in ([np.nan, 0.0], [1e20, 0.0]):
        pipe_in(monkeypatch, np.array(values * 400, "<f4").tobytes())
        with pytest.raises(DataError, match="is --raw-format right"):
            localize(*PIPE, "--raw-rate", "16000", "--raw-format", "f32le")


def test_ctrl_c_ends_a_live_stream(monkeypatch, capsys, tmp_path):
    class Pipe(io.BytesIO):
        def read(self, n=-1):
            data = super().read(n)
            if not data:
                raise KeyboardInterrupt
            return data

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Pipe(interleaved(n=8000)), isatty=lambda: False))
    assert localize(*PIPE, "--raw-rate", "16000", "--csv", tmp_path / "o.csv") == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 6


def test_resampling_a_pipe_keeps_its_length():
    for rate in (8000, 44100, 48000):
        blocks = raw_blocks(io.BytesIO(np.zeros((rate, 3), "<i2").tobytes()), RawAudio("s16le", rate, 3), 0.1, 16000)
        assert abs(sum(block.shape[1] for block in blocks) - 16000) <= 1


def test_answers_come_while_the_pipe_is_open_and_a_closed_reader_is_no_fault():
    command = [sys.executable, "-m", "ssl_kit.lab.cli", "localize", *PIPE, "--raw-rate", "16000"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(interleaved(n=3200))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["time_s"] == 0.1
    assert json.loads(process.stdout.readline())["time_s"] == 0.2
    process.stdout.close()
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and time.monotonic() < deadline:
            process.stdin.write(interleaved(n=3200))
            process.stdin.flush()
    except BrokenPipeError:
        process.wait(timeout=120)
    assert process.wait(timeout=120) == 0 and process.stderr.read() == b""


# --- elevation, pictures --------------------------------------------------------------------------------------------


def test_elevation(clip, capsys):
    localize(clip, "--array", "6cm", "--elevation", "0:40:20", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["elevation_deg"] == 0.0 and angular_error_deg(row["azimuth_deg"], 123.0) < 1
    for extra in (["--stream"], ["--method", "mvdr"], ["--every", "0.5"]):
        with pytest.raises(ParameterError, match="--elevation"):
            localize(clip, "--array", "6cm", "--elevation", "0:40:20", *extra)
    with pytest.raises(SystemExit):
        localize(clip, "--array", "6cm", "--elevation", "0:200:20")


@pytest.mark.parametrize("name", ["6cm", "realman32", "respeaker", "ula:6:0.04"])
def test_picture_of_an_array(name):
    geometry = named_array(name)
    (panel,) = draw_array(geometry, 55.0, np.cos(np.radians(np.arange(360.0) - 55.0))).axes
    places = {tuple(xy) for xy in np.round(100 * geometry.positions_m[:, :2], 4).tolist()}
    dots = {tuple(line.get_xydata()[0]) for line in panel.lines if len(line.get_xydata()) == 1}
    assert dots == places and panel.get_xlabel() == "x (cm)"
    labels = {text.get_text() for text in panel.texts}
    assert "55.0°" in labels and "90°" in labels and "45°" not in labels  # it would hide the estimate's
    curve = next(line for line in panel.lines if line.get_label() == "score per direction").get_xydata()
    radius = np.hypot(*curve.T)
    assert radius.argmax() == 55 and radius.min() > 100 * np.abs(geometry.positions_m[:, :2]).max()


def test_picture_refuses_what_is_none():
    geometry = named_array("6cm")
    with pytest.raises(ParameterError, match="azimuth_deg"):
        draw_array(geometry, float("nan"))
    with pytest.raises(DataError, match="score"):
        draw_array(geometry, 1.0, np.zeros((2, 360)))
    with pytest.raises(ParameterError, match="1 to 30 recordings, found 0"):
        draw_answers([], [], geometry)


def test_plots_of_one_clip_of_several_and_of_tracks(clip, tmp_path):
    picture = tmp_path / "p.png"
    geometry = named_array("6cm")
    row, track = localize_file(clip, geometry, SRP())
    assert [panel.name for panel in draw_answers([row], [track], geometry).axes] == ["rectilinear", "polar"]
    other = {**row, "track": [{"time_s": 0.1, "azimuth_deg": None, "confidence": 0.0}], "azimuth_deg": None}
    assert [p.name for p in draw_answers([row, other], [track, None], geometry).axes] == ["polar", "rectilinear"]
    assert [p.name for p in draw_answers([other], [None], geometry).axes] == ["rectilinear", "rectilinear"]
    with pytest.raises(ParameterError, match=f"up to {MAX_PANELS} recordings, found 31"):
        localize(*[clip] * 31, "--array", "6cm", "--plot", picture)
    assert not picture.exists()


@pytest.mark.skipif("SSL_KIT_DATA" not in os.environ, reason="SSL_KIT_DATA names no folder with the real recordings")
def test_two_speakers_of_a_real_recording(capsys):
    path = Path(os.environ["SSL_KIT_DATA"]) / "respeaker" / "az180_az225_50cm_1aa9a300.wav"
    assert main(["localize", str(path), "--array", "respeaker", "--sources", "2", "--json"]) == 0
    sources = json.loads(capsys.readouterr().out)[0]["sources"]
    assert sorted(round(s["azimuth_deg"] / 5) * 5 for s in sources) == [180, 225]


def test_options_of_sources_and_checkpoints_that_do_not_go_together(tmp_path, capsys):
    assert main(["localize", "x.wav", "--array", "6cm", "--sources", "2", "--stream"]) == 2
    assert "--sources" in capsys.readouterr().err
    assert main(["localize", "x.wav", "--array", "6cm", "--checkpoint", str(tmp_path)]) == 2
    assert "nothing learned" in capsys.readouterr().err
