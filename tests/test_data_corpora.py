"Corpora: disjoint splits, determinism, layouts, the data root; noise spectra."

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.lab import dataroot, manifests
from ssl_kit.lab.audio import read_audio
from ssl_kit.lab.corpora import SPLITS, assert_disjoint, cut_speakers, noise_corpus, speech_corpus
from ssl_kit.lab.embedded import embedded_folder, embedded_index
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.noises import SYNTHETIC_KINDS, noise_samples

real_data = pytest.mark.skipif(not os.environ.get("SSL_KIT_DATA"), reason="needs real data: set SSL_KIT_DATA")


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    "A machine without any data root, in an empty home and working folder."
    for name in ("SSL_KIT_DATA", "SSL_KIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dataroot, "_KAGGLE_INPUT", tmp_path / "kaggle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flac(path: Path, seconds=0.2):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(round(16000 * seconds)), 16000)


# ---- embedded speech

def test_embedded_clips_are_small_speech_at_16_khz():
    rows, folder = embedded_index(), embedded_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5e6
    assert {path.name for path in folder.glob("*.flac")} == {row["file"] for row in rows}
    for row in rows[::7]:
        samples = read_audio(folder / row["file"], channels=1)[0]
        info = soundfile.info(folder / row["file"])
        assert info.samplerate == 16000 and info.subtype == "PCM_16"
        assert abs(len(samples) / 16000 - row["duration_s"]) < 1e-3 and 1.5 < row["duration_s"] < 8
        assert np.abs(samples).max() < 0.5 and -45 < 10 * np.log10(np.mean(samples**2)) < -38


def test_embedded_splits_share_no_speaker_and_no_sentence_text():
    rows = embedded_index()
    assert_disjoint({split: [row["speaker"] for row in rows if row["split"] == split] for split in SPLITS})
    assert_disjoint({split: [row["sentence"] for row in rows if row["split"] == split] for split in SPLITS}, "sentence")
    assert len({row["speaker"] for row in rows}) >= 24
    assert len({(row["voice"], row["pitch"], row["words_per_minute"]) for row in rows}) == \
        len({row["speaker"] for row in rows})


def test_embedded_corpus_needs_no_data(no_data):
    utterances = speech_corpus("embedded", split=None)
    assert {item.split for item in utterances} == set(SPLITS) and all(item.path.is_file() for item in utterances)
    assert speech_corpus("embedded", "test") == [item for item in utterances if item.split == "test"]


# ---- LibriSpeech

@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 9999), min_size=10, max_size=400), st.randoms())
def test_speaker_split_is_a_partition_that_ignores_order(ids, random):
    names = [str(number) for number in ids]
    once = cut_speakers(names)
    random.shuffle(names)
    assert cut_speakers(names) == once and set(once) == set(names)
    counts = [list(once.values()).count(split) for split in SPLITS]
    assert counts[2] == counts[3] == round(0.12 * len(names)) and counts[1] == round(0.08 * len(names))


@real_data
def test_librispeech_of_the_data_root():
    parts = {split: speech_corpus("librispeech", split) for split in SPLITS}
    assert [len({item.speaker for item in parts[split]}) for split in SPLITS] == [171, 20, 30, 35]
    assert sum(map(len, parts.values())) == 301
    assert_disjoint({split: [item.speaker for item in items] for split, items in parts.items()})
    assert parts == {split: speech_corpus("librispeech", split) for split in SPLITS}
    utterance = parts["calibration"][0]
    assert abs(read_audio(utterance.path).shape[1] / 16000 - utterance.duration_s) < 1e-3


def test_original_openslr_folders_are_found_by_content(no_data, monkeypatch):
    root = no_data / "cache" / "ssl_kit" / "librispeech"
    for part, speakers in (("train-clean-100", range(10, 35)), ("dev-clean", [50]), ("test-other", [60])):
        top = root / part / "LibriSpeech"
        for speaker in speakers:
            flac(top / part / str(speaker) / "7" / f"{speaker}-7-0001.flac")
        (top / "SPEAKERS.TXT").write_text("")
    assert "60" in {item.speaker for item in speech_corpus("librispeech", "test")}
    assert "50" in {item.speaker for item in speech_corpus("librispeech", "valid")}
    assert len(speech_corpus("librispeech", "train")) == 17
    assert len(speech_corpus("librispeech", None, root=root)) == 27


def test_a_fetched_esc50_serves_as_esc10(no_data):
    top = no_data / "cache" / "ssl_kit" / "esc50" / "ESC-50-master" / "ESC-50-master"
    for name in ("1-11-A-0.wav", "4-12-A-10.wav", "5-13-A-3.wav"):
        flac(top / "audio" / name)
    (top / "meta").mkdir()
    (top / "meta" / "esc50.csv").write_text("filename,fold,category,esc10\n1-11-A-0.wav,1,dog,True\n"
                                            "4-12-A-10.wav,4,rain,True\n5-13-A-3.wav,5,cow,False\n")
    assert [clip.category for clip in noise_corpus("esc10", None)] == ["dog", "rain"]
    assert noise_corpus("esc10", "test")[0].path.is_file()


def test_without_data_the_error_says_what_to_do(no_data):
    with pytest.raises(MissingDataError, match="SSL_KIT_DATA.*embedded"):
        speech_corpus("librispeech")
    with pytest.raises(MissingDataError, match="no data root: set SSL_KIT_DATA"):
        noise_corpus("esc10")
    with pytest.raises(MissingDataError, match="has no folder 'noise/esc10'"):
        noise_corpus("esc10", root=no_data)


def test_unknown_names_are_refused():
    with pytest.raises(ParameterError, match="unknown speech corpus 'timit'; expected one of embedded, librispeech"):
        speech_corpus("timit")
    with pytest.raises(ParameterError, match="unknown split 'dev'"):
        noise_corpus(split="dev")
    with pytest.raises(ParameterError, match="unknown category of synthetic 'rain'"):
        noise_corpus(categories=["rain"])


def test_a_speaker_in_two_splits_is_an_error(no_data):
    for name in ("train/11-1-0000.flac", "train/12-1-0000.flac", "test/11-2-0000.flac", "test/12-2-0000.flac"):
        flac(no_data / "speech" / name)
    with pytest.raises(DataError, match="is in the splits train and test"):
        speech_corpus("librispeech", root=no_data)


# ---- the data root

def test_data_root_from_environment_config_and_kaggle(no_data, monkeypatch):
    assert dataroot.data_root(required=False) is None
    kaggle = no_data / "kaggle" / "some-set" / "inner"
    (kaggle / "speech" / "train").mkdir(parents=True)
    (kaggle / "noise" / "esc10").mkdir(parents=True)
    assert dataroot.data_root() == kaggle
    (no_data / "mine").mkdir()
    config = no_data / "config" / "ssl_kit" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'data_root = "{no_data / "mine"}"\n')
    assert dataroot.data_root() == no_data / "mine"
    (no_data / "near").mkdir()
    (no_data / "ssl_kit.toml").write_text('data_root = "near"\n')
    assert dataroot.data_root() == no_data / "near"
    monkeypatch.setenv("SSL_KIT_DATA", str(kaggle))
    assert dataroot.data_root() == kaggle


def test_a_named_root_that_is_wrong_is_an_error(no_data, monkeypatch):
    (no_data / "ssl_kit.toml").write_text("data_root = 3\n")
    with pytest.raises(DataError, match="data_root must be a string"):
        dataroot.data_root()
    (no_data / "ssl_kit.toml").write_text("data_root = \n")
    with pytest.raises(DataError, match="not valid TOML"):
        dataroot.data_root()
    monkeypatch.setenv("SSL_KIT_DATA", str(no_data / "typo"))
    with pytest.raises(MissingDataError, match="typo.*SSL_KIT_DATA"):
        dataroot.data_root(required=False)


# ---- noise

@pytest.mark.parametrize("kind", SYNTHETIC_KINDS)
def test_synthetic_noise_is_determined_and_independent(kind):
    clip = noise_corpus("synthetic", "test", categories=[kind])[0]
    first = noise_samples(clip, 2.0, seed=5, channels=3)
    assert first.shape == (3, 32000) and first.dtype == np.float32 and np.isfinite(first).all()
    assert np.array_equal(first, noise_samples(clip, 2.0, seed=5, channels=3))
    assert abs(np.sqrt(np.mean(first.astype(float) ** 2)) - 1) < 1e-4
    assert not np.allclose(first, noise_samples(clip, 2.0, seed=6, channels=3))
    if kind not in ("hum", "fan"):  # tones of the same frequency correlate, whatever their phases
        assert np.abs(np.corrcoef(first) - np.eye(3)).max() < 0.5


def test_babble_of_a_split_has_only_its_own_talkers(monkeypatch):
    from ssl_kit.lab import embedded, noises

    read = []
    monkeypatch.setattr(noises, "read_audio", lambda path, rate: read.append(Path(path).name) or np.ones((1, 800)))
    noises._talk_loop.__wrapped__("calibration", 16000)
    assert read == [row["file"] for row in embedded.embedded_index() if row["split"] == "calibration"]


@real_data
def test_recorded_noise_splits_by_source_and_is_never_silent():
    clips = noise_corpus("esc10", None)
    assert len(clips) == 318
    assert_disjoint({split: [(clip.fold, clip.name.split("-")[1]) for clip in clips if clip.split == split]
                     for split in SPLITS}, "source")
    assert {clip.fold for clip in clips if clip.split == "test"} == {4}
    assert {clip.fold for clip in clips if clip.split == "calibration"} == {3}
    for clip in clips[::40] + noise_corpus("ambience", "valid"):
        samples = noise_samples(clip, 1.0, seed=1, channels=2)
        assert samples.shape == (2, 16000) and np.isfinite(samples).all() and samples.std() > 0.5
    assert len(noise_corpus("ambience", None)) == 8


def test_zero_padding_of_short_clips_is_cut(tmp_path):
    samples = np.zeros(16000 * 5)
    samples[:8000] = 0.1 * np.random.default_rng(0).standard_normal(8000)
    folder = tmp_path / "noise" / "esc10"
    folder.mkdir(parents=True)
    soundfile.write(folder / "4-11-A_rain.ogg", samples, 16000)
    (folder / "clips.csv").write_text("file,category,fold\n4-11-A_rain.ogg,rain,4\n")
    [clip] = noise_corpus("esc10", "test", root=tmp_path)
    blocks = noise_samples(clip, 4.0).reshape(40, 1600)
    assert (blocks.std(axis=1) > 0.5).all()


@real_data
def test_the_data_root_is_as_its_manifest_says():
    report = manifests.verify_dataset(manifests.load_manifest("shared_layout"), hashes=False)
    assert report.ok and report.checked == 663, report
