"""Posteriors: what is shown is the detector's, events are named as they are counted, the slider is the threshold."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.fewshot.annotations import Event, Recording, read_recording
from ssl_kit.fewshot.detection import score_recording, scoring_precision
from ssl_kit.fewshot.encoder import Encoder, EncoderConfig
from ssl_kit.fewshot.episodes import Preprocessing
from ssl_kit.fewshot.evaluation import evaluate_recording
from ssl_kit.fewshot.events import THRESHOLDS, find_events
from ssl_kit.fewshot.explorer import KINDS, example_recordings, named_events, threshold_figure
from ssl_kit.fewshot.features import file_features
from ssl_kit.fewshot.shipped import shipped_encoder
from ssl_kit.fewshot.training import load_encoder, save_encoder
from ssl_kit.lab.errors import MissingDataError, ParameterError


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return example_recordings(tmp_path_factory.mktemp("calls"), ("trill", "arch"), 24.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A detector that was never trained; templates do not need one."""
    torch.manual_seed(0)
    return save_encoder(tmp_path_factory.mktemp("tiny"), Encoder(EncoderConfig(channels=(4, 4, 4))), Preprocessing(),
                        {"method": "template", "rules": {"prototypes": {"threshold": 0.4}}})


@pytest.fixture
def explorer(recordings, tiny):
    pytest.importorskip("ipywidgets")
    from ssl_kit.fewshot.explorer import PosteriorExplorer

    return PosteriorExplorer(recordings, tiny)


spans = st.lists(st.tuples(st.floats(0, 20), st.floats(0.05, 2), st.sampled_from(["POS", "UNK"])), max_size=10)


@given(spans, st.lists(st.tuples(st.floats(0, 20), st.floats(0.05, 2)), max_size=10))
@settings(max_examples=40, deadline=None)
def test_events_are_named_as_they_are_counted(true, found):
    shots = [Event(k / 10, k / 10 + 0.05) for k in range(5)]
    events = sorted(shots + [Event(a, a + n, (value,)) for a, n, value in true])
    recording = Recording(Path("x.wav"), 25.0, ("Q",), tuple(events))
    found = [(a, a + n) for a, n in found]
    rows, counts = named_events(recording, found), evaluate_recording(recording, found)
    assert [sum(row[2] == kind for row in rows) for kind in KINDS] == [counts.tp, counts.fp, counts.fn, counts.unk]
    assert rows == sorted(rows)


def test_what_is_shown_is_the_shipped_detectors(recordings):
    pytest.importorskip("ipywidgets")
    from ssl_kit.fewshot.explorer import PosteriorExplorer

    explorer = PosteriorExplorer(recordings[:1])
    network, prep, about = load_encoder(shipped_encoder("fewshot_v1"))
    frames = file_features(recordings[0].audio, prep.feature)
    method = about["method"]
    score = score_recording(recordings[0], frames, prep, network, [method], 5, scoring_precision())[method]
    np.testing.assert_array_equal(explorer.score, score)
    assert explorer.rule.as_dict() == about["rules"][method]
    assert explorer.counts.f_measure > 0.6 and "F " in explorer.numbers.value
    explorer.shots.value = 3
    assert not np.array_equal(explorer.score, score)


def test_the_slider_is_the_threshold_and_the_curve_says_the_same(explorer, recordings):
    for number, (value, counts) in enumerate(explorer.threshold_curve):
        if number % 9 == 2:
            explorer.threshold.value = value
            assert explorer.rule == replace(explorer._own_rule(), threshold=explorer.threshold.value)
            expected = find_events(explorer.score, recordings[0].shots(5),
                                   explorer.preprocessing.feature.frame_rate_hz, explorer.rule)
            np.testing.assert_array_equal(explorer.events, expected)
            assert explorer.counts == counts == evaluate_recording(recordings[0], expected)
    assert [value for value, _ in explorer.threshold_curve] == list(THRESHOLDS)
    explorer.own.click()
    assert explorer.threshold.value == explorer._own_rule().threshold


def test_every_control_changes_what_is_seen(explorer):
    seen = {(bytes(explorer.picture.value), bytes(explorer.curve.value), explorer.numbers.value)}
    for change in (lambda: setattr(explorer.threshold, "value", 0.9), lambda: setattr(explorer.shots, "value", 2),
                   lambda: setattr(explorer.method, "value", "prototypes"),
                   lambda: setattr(explorer.start, "value", 8.0), lambda: setattr(explorer.recording, "value", 1)):
        change()
        assert bytes(explorer.picture.value).startswith(b"\x89PNG")
        seen.add((bytes(explorer.picture.value), bytes(explorer.curve.value), explorer.numbers.value))
    assert len(seen) == 6


def test_a_method_brings_its_own_threshold(explorer):
    assert explorer.threshold.value == 0.28
    explorer.method.value = "prototypes"
    assert explorer.threshold.value == 0.4
    explorer.method.value = "plain"
    assert explorer.threshold.value == 0.5


def test_an_event_is_shown_and_played(explorer):
    explorer.threshold.value = 0.1
    row = len(explorer.rows) - 1
    start_s, end_s, kind = explorer.rows[row]
    before = bytes(explorer.picture.value)
    explorer.list.value = row
    assert explorer.start.value <= start_s and end_s <= explorer.start.value + explorer.window_s + 0.5
    assert "<audio" in explorer.player.value and explorer.player.value.startswith(kind)
    assert bytes(explorer.picture.value) != before
    explorer.recording.value = 1
    assert explorer.player.value == "" and explorer.start.value == 0


def test_shots_alone_give_events_and_no_measures(recordings, tiny):
    pytest.importorskip("ipywidgets")
    from ssl_kit.fewshot.explorer import PosteriorExplorer

    mine = replace(recordings[0], events=tuple(recordings[0].shots(5)))
    explorer = PosteriorExplorer([mine], tiny, window_s=24.0)
    assert explorer.start.layout.display == "none" and explorer.recording.layout.display is None
    assert explorer.counts is None and "no measures" in explorer.numbers.value
    assert explorer.curve.layout.display == "none" and {row[2] for row in explorer.rows} <= {"found"}
    assert len(explorer.rows) == len(explorer.events) > 0
    explorer.shots.value = 4
    assert explorer.counts is not None and explorer.curve.layout.display is None


def test_what_cannot_be_done_is_said_and_the_panel_lives_on(explorer, recordings, tiny, tmp_path):
    from ssl_kit.fewshot.explorer import PosteriorExplorer

    few = replace(recordings[0], events=tuple(recordings[0].shots(6)))
    panel = PosteriorExplorer([few], tiny)
    panel.shots.value = 9
    assert "at least 9 POS events" in panel.numbers.value and panel.list.options == ()
    panel.start.value = 3.0
    panel.shots.value = 5
    assert "right" in panel.numbers.value
    gone = replace(recordings[0], audio=tmp_path / "<gone>.flac")
    assert "&lt;gone&gt;" in PosteriorExplorer([gone], tiny).numbers.value


def test_what_does_not_fit_is_named(recordings, tiny, monkeypatch):
    from ssl_kit.fewshot.explorer import PosteriorExplorer

    with pytest.raises(ParameterError, match="at least one recording"):
        PosteriorExplorer([], tiny)
    with pytest.raises(MissingDataError, match="fewshot_v1"):
        PosteriorExplorer(recordings, "fewshot_v9")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingDataError, match="ipywidgets"):
        PosteriorExplorer(recordings, tiny)


def test_examples_are_read_back_and_the_curve_has_its_lines(recordings, explorer):
    again = read_recording(recordings[0].audio.with_suffix(".csv"), "trill")
    assert len(again.events) == len(recordings[0].events) and len(again.with_value("Q", "POS")) >= 8
    axes = threshold_figure(explorer.threshold_curve, 0.3).axes[0]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [c.recall for _, c in explorer.threshold_curve])
    assert axes.lines[3].get_xdata()[0] == 0.3
