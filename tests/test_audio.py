"Reading, streaming, checking and writing audio, against soundfile and librosa, and with broken files."

import errno
import warnings

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_kit.lab import audio, files
from ssl_kit.lab.audio import AudioWarning, audio_info, check_audio, read_audio, stream_audio, write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError


def noise(channels=2, seconds=1.0, sample_rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((channels, round(seconds * sample_rate)))).astype(np.float32)


@pytest.mark.parametrize("suffix, subtype, tolerance", [("wav", "FLOAT", 0), ("wav", "PCM_16", 2**-15),
                                                        ("flac", "PCM_16", 2**-15), ("flac", "PCM_24", 2**-23)])
def test_round_trip(tmp_path, suffix, subtype, tolerance):
    samples = noise(channels=7)
    path = write_audio(tmp_path / f"x.{suffix}", samples, subtype=subtype)
    again = read_audio(path, channels=7)
    assert again.dtype == np.float32 and again.flags["C_CONTIGUOUS"] and again.shape == samples.shape
    assert np.abs(again - samples).max() <= tolerance
    assert audio_info(path).duration_s == 1.0 and audio_info(path).subtype == subtype


def test_ogg_keeps_length_and_channels(tmp_path):
    path = write_audio(tmp_path / "x.ogg", noise(seconds=0.73))
    assert read_audio(path).shape == (2, round(0.73 * 16000))


def test_one_dimensional_samples_are_one_channel(tmp_path):
    assert read_audio(write_audio(tmp_path / "x.wav", noise()[0])).shape == (1, 16000)


@pytest.mark.parametrize("rate", [8000, 22050, 32000, 44100, 48000])
def test_resampling_agrees_with_librosa(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1, 0.7, rate)[0], rate, subtype="FLOAT")
    peer, _ = librosa.load(path, sr=16000, mono=False, res_type="soxr_hq")
    ours = read_audio(path)[0]
    assert abs(len(peer) - len(ours)) <= 1
    n = min(len(peer), len(ours))
    assert np.abs(peer[:n] - ours[:n]).max() < 1e-5


def test_resampled_tone_keeps_frequency_and_level(tmp_path):
    time_s = np.arange(44100) / 44100
    soundfile.write(tmp_path / "x.wav", 0.5 * np.sin(2 * np.pi * 1000 * time_s), 44100, subtype="FLOAT")
    samples = read_audio(tmp_path / "x.wav")[0]
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(samples - expected)[200:-200].max() < 1e-4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate_in=st.sampled_from([16000, 22050, 44100, 48000]), rate_out=st.sampled_from([8000, 16000, 44100]),
       start=st.floats(0, 0.6), length=st.floats(0.05, 0.35))
def test_a_piece_is_the_piece_of_the_whole(tmp_path, rate_in, rate_out, start, length):
    path = tmp_path / f"{rate_in}.wav"
    if not path.exists():
        soundfile.write(path, noise(2, 1.0, rate_in).T, rate_in, subtype="FLOAT")
    whole = read_audio(path, rate_out)
    piece = read_audio(path, rate_out, start_s=start, duration_s=length)
    first, count = round(start * rate_out), round(length * rate_out)
    assert piece.shape == (2, count)
    assert np.abs(whole[:, first:first + count] - piece).max() < 2e-4  # the level is 0.1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate_out=st.sampled_from([8000, 16000, 44100]), block=st.floats(0.03, 1.5))
def test_blocks_put_together_are_the_whole(tmp_path, rate_out, block):
    path = tmp_path / "x.wav"
    if not path.exists():
        soundfile.write(path, noise(2, 1.0, 16000).T, 16000, subtype="FLOAT")
    blocks = list(stream_audio(path, block, rate_out))
    assert all(part.shape == (2, round(block * rate_out)) for part in blocks[:-1])
    joined, whole = np.concatenate(blocks, axis=1), read_audio(path, rate_out)
    assert abs(joined.shape[1] - whole.shape[1]) <= 1
    n = min(joined.shape[1], whole.shape[1])
    assert np.abs(joined[:, :n] - whole[:, :n]).max() < 1e-4


@pytest.mark.parametrize("suffix, subtype",
                         [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS")])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, subtype, keep):
    whole = write_audio(tmp_path / f"whole.{suffix}", noise(seconds=3), subtype=subtype).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[:int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"cut\.{suffix} is truncated"):
        read_audio(cut)
    with pytest.raises(DataError, match="truncated"):
        list(stream_audio(cut, 0.5))


def test_streamed_wav_of_unknown_length_is_not_called_truncated(tmp_path):
    data = bytearray(write_audio(tmp_path / "x.wav", noise(1)).read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # what a program writes that cannot seek back
    (tmp_path / "x.wav").write_bytes(data)
    assert read_audio(tmp_path / "x.wav").shape == (1, 16000)


def test_missing_empty_folder_and_text_files(tmp_path):
    with pytest.raises(MissingDataError, match="nowhere.wav does not exist"):
        read_audio(tmp_path / "nowhere.wav")
    (tmp_path / "empty.wav").touch()
    with pytest.raises(DataError, match="empty.wav is empty"):
        audio_info(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(DataError, match="text.wav cannot be opened as audio"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(DataError, match="is a folder"):
        read_audio(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_located(tmp_path, bad):
    samples = noise()
    samples[1, 8000] = bad
    soundfile.write(tmp_path / "bad.wav", samples.T, 16000, subtype="FLOAT")
    where = r"bad\.wav: 1 sample\(s\) are NaN or infinite, the first in channel 1 at 0\.500 s"
    with pytest.raises(DataError, match=where):
        read_audio(tmp_path / "bad.wav")
    with pytest.raises(DataError, match="bad.wav: NaN"):
        list(stream_audio(tmp_path / "bad.wav", 0.4))
    assert read_audio(tmp_path / "bad.wav", check=False).shape == (2, 16000)
    with pytest.raises(DataError, match="refusing to write"):
        write_audio(tmp_path / "out.wav", samples)
    assert not (tmp_path / "out.wav").exists()


def test_silence_wrong_channels_and_too_short(tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros((1600, 2)), 16000)
    with pytest.raises(DataError, match=r"silent\.wav: silent"):
        read_audio(silent)
    path = write_audio(tmp_path / "x.wav", noise(4, 0.5))
    with pytest.raises(DataError, match=r"x\.wav: expected 9 channel\(s\), found 4"):
        read_audio(path, channels=9)
    with pytest.raises(DataError, match=r"expected 1 or 2 channel\(s\), found 4"):
        list(stream_audio(path, 1.0, channels=(1, 2)))
    assert read_audio(path, channels=(4, 9)).shape == (4, 8000)
    with pytest.raises(DataError, match=r"too short: expected audio beyond 1 s, found 0\.500 s"):
        read_audio(path, start_s=0.25, duration_s=0.75)
    with pytest.raises(DataError, match=r"too short: expected at least 2 s, found 0\.500 s"):
        check_audio(read_audio(path), path, min_duration_s=2)
    with pytest.raises(ParameterError, match="start_s >= 0"):
        read_audio(path, start_s=-1)


def test_clipping_and_dead_channels_warn():
    time_s = np.arange(16000) / 16000
    loud = np.clip(3 * np.sin(2 * np.pi * 100 * time_s), -1, 1)
    with pytest.warns(AudioWarning, match="loud.wav: clipped"):
        check_audio(loud, "loud.wav")
    with pytest.warns(AudioWarning, match=r"channel\(s\) 1 are silent"):
        check_audio(np.stack([0.5 * loud, 0 * loud]), "dead.wav")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_audio(np.sin(2 * np.pi * 100 * time_s), "full-scale.wav")


def test_refuses_what_the_format_would_spoil(tmp_path):
    with pytest.raises(DataError, match="would clip"):
        write_audio(tmp_path / "x.flac", 2 * np.ones(100))
    with pytest.raises(ParameterError, match="expected the suffix"):
        write_audio(tmp_path / "x.mp9", noise())
    with pytest.raises(ParameterError, match="FLAC holds at most 8 channels, found 9"):
        write_audio(tmp_path / "x.flac", noise(9))
    with pytest.raises(ParameterError, match="has no subtype"):
        write_audio(tmp_path / "x.flac", noise(), subtype="FLOAT")
    assert list(tmp_path.iterdir()) == []
    assert np.abs(read_audio(write_audio(tmp_path / "x.wav", 2 * noise(), subtype="FLOAT")) - 2 * noise()).max() == 0


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_audio(tmp_path / "x.wav", noise())
    before = path.read_bytes()

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(StorageError, match="x.wav"):
        write_audio(path, noise(seed=1))
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["x.wav"]


def test_public_names_are_stable():
    assert {"read_audio", "write_audio", "stream_audio", "audio_info", "check_audio"} <= set(audio.__all__)
