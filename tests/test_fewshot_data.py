"""Annotation tables with their rules, calls and soundscapes of few-shot detection."""

import os
from dataclasses import replace

import numpy as np
import pytest

from ssl_kit.fewshot.annotations import (
    Event,
    Recording,
    classes_of,
    load_split,
    read_events,
    read_recording,
    write_events,
)
from ssl_kit.fewshot.calls import FAMILIES, SPLITS, cut_calls, recorded_backgrounds, recorded_calls, synthetic_calls
from ssl_kit.fewshot.soundscapes import (
    DatasetConfig,
    SoundscapeConfig,
    compose,
    compose_dataset,
    contrast_gain,
    place,
    vary_call,
)
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

needs_data = pytest.mark.skipif(not os.environ.get("SSL_KIT_DATA"), reason="SSL_KIT_DATA names no data")
HEADER = "Audiofilename,Starttime,Endtime,"
SMALL = DatasetConfig("synthetic", 2, 1, 1, 1, 24, SoundscapeConfig(20.0, 10, 8))


@pytest.fixture
def table(tmp_path):
    """Write the rows of a table beside 10 s of noise and give its path."""
    folder = tmp_path / "Validation_Set" / "HB"
    write_audio(folder / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(220500), 22050)

    def write(*rows, columns="Q", name="a.csv"):
        path = folder / name
        path.write_text("\n".join([HEADER + columns, *rows]) + "\n")
        return path

    return write


@pytest.mark.parametrize(("row", "words"), [
    ("a.wav,3,2,POS", "line 2.*reversed"), ("a.wav,3,3,POS", "Starttime < Endtime"),
    ("a.wav,nan,2,POS", "Starttime"), ("a.wav,1,NaN,POS", "Endtime"), ("a.wav,,2,POS", "Starttime"),
    ("a.wav,1,inf,POS", "Endtime"), ("a.wav,one,2,POS", "'one'"), ("a.wav,-1,2,POS", "'-1'"),
    ("a.wav,9,10.2,POS", "ends at 10.2 s, the recording at 10"), ("a.wav,12,13,POS", "another recording"),
    ("a.wav,1,2,YES", "expected POS, NEG, UNK"), ("a.wav,1,2,", "found ''"), ("a.wav,1,2", "expected 4 values"),
    ("a.wav,1,2,POS,POS", "expected 4 values"), ("b.wav,1,2,POS", "Audiofilename"),
])
def test_a_wrong_row_is_refused_with_its_file_and_line(table, row, words):
    path = table("a.wav,1,2,POS", row) if "line 2" not in words else table(row)
    with pytest.raises(DataError, match=words) as caught:
        read_recording(path)
    assert str(path) in str(caught.value) and "line" in str(caught.value)


@pytest.mark.parametrize("columns", ["Q,Q", "Starttime"])
def test_wrong_columns(table, columns):
    with pytest.raises(DataError, match="expected the columns"):
        read_recording(table(columns=columns))


def test_a_table_without_classes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Audiofilename,Starttime,Endtime\n")
    with pytest.raises(DataError, match="one for each class"):
        read_events(path)


def test_what_is_no_table(table, tmp_path):
    path = table()
    path.write_bytes(b"\xff\xfe\x00bad\x00")
    with pytest.raises(DataError, match="a.csv"):
        read_recording(path)
    with pytest.raises(MissingDataError, match="found none"):
        read_events(tmp_path / "none.csv")
    with pytest.raises(MissingDataError, match="recording beside it"):
        read_recording(table(name="c.csv"))


def test_rules_unsorted_overlapping_and_rounded(table):
    recording = read_recording(table("a.wav,5,6,POS", "a.wav,1.5,2.5,POS", "a.wav,1,2,POS", "a.wav,9.5,10.05,UNK"))
    assert [(event.start_s, event.end_s) for event in recording.events] == [(1, 2), (1.5, 2.5), (5, 6), (9.5, 10)]
    assert len(recording.with_value("Q", "POS")) == 3  # the two that overlap are two calls


def test_rule_two_classes_at_once(table):
    recording = read_recording(table("a.wav,1,2,POS,POS", "a.wav,3,4,POS,UNK", "a.wav,5,6,NEG,POS", columns="X,Y"))
    assert [e.start_s for e in recording.with_value("X", "POS")] == [1, 3]
    assert [e.start_s for e in recording.examples("X")] == [3] and [e.start_s for e in recording.examples("Y")] == [5]


def test_rule_a_class_that_one_file_has_not(tmp_path):
    folder = tmp_path / "Training_Set" / "BV"
    for name, columns, rows in (("a", "X,Y", ["a.wav,1,2,POS,NEG"]), ("b", "X", ["b.wav,1,2,POS"]), ("c", "Y", [])):
        write_audio(folder / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(66150), 22050)
        (folder / f"{name}.csv").write_text("\n".join([HEADER + columns, *rows]) + "\n")
    recordings = load_split(tmp_path, "train")
    assert classes_of(recordings) == {"X": 2}
    assert recordings[2].with_value("X", "POS", "NEG", "UNK") == []


def test_fewer_than_five_shots(table):
    recording = read_recording(table(*[f"a.wav,{k},{k}.5,POS" for k in range(4)], "a.wav,8,9,UNK"))
    with pytest.raises(DataError, match="at least 5 POS events.*found 4"):
        recording.shots()
    assert len(recording.shots(4)) == 4


def test_validation_tables_have_one_column(table, tmp_path):
    table("a.wav,1,2,POS,POS", columns="X,Y")
    with pytest.raises(DataError, match="the one column Q"):
        load_split(tmp_path, "val")


def test_missing_splits(tmp_path):
    with pytest.raises(MissingDataError, match="Test_Set"):
        load_split(tmp_path, "test")
    with pytest.raises(ParameterError, match="split"):
        load_split(tmp_path, "validation")
    (tmp_path / "Test_Set").mkdir()
    with pytest.raises(MissingDataError, match="NAME.csv"):
        load_split(tmp_path, "test")


def test_the_set_is_found_below_an_archive_folder(table, tmp_path):
    table("a.wav,1,2,POS")
    inner = tmp_path / "unpacked" / "Development_Set"
    inner.mkdir(parents=True)
    (tmp_path / "Validation_Set").rename(inner / "Validation_Set")
    assert load_split(tmp_path, "val")[0].subset == "HB"


def test_write_and_read(tmp_path):
    audio = write_audio(tmp_path / "a.wav", 0.1 * np.ones(22050), 22050)
    events = (Event(0.1, 0.2, ("POS", "NEG")), Event(0.15, 0.9, ("UNK", "POS")))
    recording = Recording(audio, 1.0, ("X", "Y"), events)
    assert read_recording(write_events(tmp_path / "a.csv", recording)) == recording


# calls


def test_calls_are_cut_at_pauses_alone():
    rng = np.random.default_rng(0)
    t = np.arange(3 * 22050) / 22050
    level = ((t > 0.5) & (t < 0.9)) | ((t > 0.93) & (t < 1.2)) | ((t > 2) & (t < 2.1))
    spans = np.array(cut_calls(level * rng.standard_normal(len(t)) + 1e-3 * rng.standard_normal(len(t)))) / 22050
    np.testing.assert_allclose(spans, [[0.5, 1.2], [2.0, 2.1]], atol=0.012)
    assert cut_calls(np.zeros(22050)) == [] and cut_calls(rng.standard_normal(22050)) == []


def test_synthetic_classes_of_splits_differ_and_calls_of_a_class_scatter():
    traits = {}
    for split in SPLITS:
        calls = synthetic_calls(split, 1, 3)
        assert len(calls) == 3 * len(FAMILIES) and len({len(call.samples) for call in calls}) > len(FAMILIES)
        traits[split] = calls[0].samples
    same = np.array_equal(traits["train"], traits["held_out"])
    assert not same and not np.array_equal(traits["val"][:500], traits["test"][:500])


@needs_data
def test_recorded_calls_share_nothing_across_splits():
    sources = {split: {call.source for call in recorded_calls(split)} for split in SPLITS}
    sources |= {f"{split} background": {clip.name for clip in recorded_backgrounds(split)} for split in SPLITS}
    names = list(sources)
    for k, one in enumerate(names):
        for other in names[k + 1:]:
            assert not sources[one] & sources[other], (one, other)
    folds = {split: {source.split("-")[0] for source in sources[split] if "-" in source} for split in SPLITS}
    assert folds == {"train": {"1", "2"}, "held_out": {"1", "2"}, "val": {"3"}, "test": {"4"}}


# soundscapes


def test_contrast_is_that_of_the_calls_own_band():
    rng = np.random.default_rng(0)
    call = np.sin(2 * np.pi * 2500 * np.arange(8820) / 22050)
    noise = rng.standard_normal(8820)
    gain = contrast_gain(call, noise, 12)
    spectrum = np.abs(np.fft.rfft(np.stack([gain * call, noise]))) ** 2
    inside = slice(960, 1041)  # 2,500 Hz is bin 1,000, 100 Hz are 40 bins
    assert 10 * np.log10(spectrum[0, inside].sum() / spectrum[1, inside].sum()) == pytest.approx(12, abs=0.01)
    rumble = noise + 100 * np.sin(2 * np.pi * 60 * np.arange(8820) / 22050)
    assert contrast_gain(call, rumble, 12) < 1.5 * gain
    with pytest.raises(DataError, match="silence"):
        contrast_gain(np.zeros(100), noise[:100], 0)


def test_calls_are_placed_apart_and_fit_or_are_refused():
    rng = np.random.default_rng(1)
    starts = place([1.0] * 20, 40, 0.15, rng)
    assert starts[0] >= 0.15 and starts[-1] + 1 <= 40 - 0.15 + 1e-9 and np.diff(starts).min() >= 1.15 - 1e-9
    with pytest.raises(DataError, match="do not fit"):
        place([1.0] * 20, 20, 0.15, rng)


def test_a_call_is_never_the_same_twice():
    call = synthetic_calls("train", 1, 1)[0].samples
    assert len(vary_call(call, 1.07, 0)) == pytest.approx(len(call) / 1.07, rel=0.01)
    assert np.abs(vary_call(call, 1.0, 4.0) - call).max() > 0.01
    np.testing.assert_allclose(vary_call(call, 1.0, 0.0), call, atol=1e-4)


def test_faint_calls_are_unk_and_the_truth_is_exact():
    rng = np.random.default_rng(0)
    calls = [replace(call, label="Q") for call in synthetic_calls("test", 1, 20, ["stack"])]
    background = 1e-3 * rng.standard_normal(22050 * 60)
    scape = compose(calls, background, ["Q"], SoundscapeConfig(60.0, contrast_db=(20, 25), unk_contrast_db=(0, 5)), rng)
    assert {event.values for event in scape.events} == {("POS",), ("UNK",)}
    quiet = np.median(np.abs(scape.samples))
    covered = np.zeros(len(scape.samples), bool)
    for event in scape.events:
        first, last = (round(22050 * time_s) for time_s in (event.start_s, event.end_s))
        middle = np.abs(scape.samples[first:last]).mean()
        assert (middle > 4 * quiet) == (event.values == ("POS",))
        covered[first:last] = True
    assert np.abs(scape.samples[~covered]).max() < 10 * quiet  # nothing is heard where no event is


def test_a_set_is_reproducible_resumable_and_disjoint(tmp_path):
    root = compose_dataset(tmp_path / "a", SMALL)
    files = sorted(path for path in root.rglob("*") if path.suffix in (".flac", ".csv"))
    contents = {path: path.read_bytes() for path in files}
    files[3].unlink(), files[8].unlink()
    compose_dataset(root, SMALL)
    assert {path: path.read_bytes() for path in files} == contents
    rows = [line.split(",") for line in (root / "sources.csv").read_text().split()[1:]]
    by_split = {split: {source for _, part, source in rows if part == split} for split in SPLITS}
    assert all(not by_split[a] & by_split[b] for a in SPLITS for b in SPLITS if a < b)
    for recording in load_split(root, "test") + load_split(root, "val"):
        assert len(recording.with_value("Q", "POS")) >= 6 and recording.with_value("Q", "NEG") == []
        assert all(b.start_s >= a.end_s for a, b in zip(recording.events, recording.events[1:], strict=False))
    with pytest.raises(ParameterError, match="another configuration"):
        compose_dataset(root, replace(SMALL, seed=1))


def test_wrong_configurations():
    with pytest.raises(ParameterError, match="corpus"):
        DatasetConfig("birds")
    with pytest.raises(ParameterError, match="n_targets"):
        SoundscapeConfig(n_targets=3)
    with pytest.raises(ParameterError, match="unk_contrast_db"):
        SoundscapeConfig(unk_contrast_db=(-10, 6))
