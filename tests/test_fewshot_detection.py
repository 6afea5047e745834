"""Detection, events, comparison and the command of few-shot detection."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.fewshot.annotations import Event, Recording, load_split, write_events
from ssl_kit.fewshot.command import add_fewshot_arguments, run_fewshot
from ssl_kit.fewshot.comparison import Contender, compare_methods, differences
from ssl_kit.fewshot.detection import (
    METHODS,
    NOT_ALLOWED,
    PrototypeScorer,
    ShotFrames,
    adaptive_length,
    covering_windows,
    cross_correlation,
    frame_scores,
    negative_windows,
    score_recording,
    shot_frames,
    template_scores,
)
from ssl_kit.fewshot.encoder import Encoder, EncoderConfig
from ssl_kit.fewshot.episodes import Preprocessing
from ssl_kit.fewshot.evaluation import Counts
from ssl_kit.fewshot.events import (
    EventRule,
    choose_rule,
    find_events,
    plot_detection,
    read_predictions,
    score_runs,
    write_predictions,
    write_raven,
)
from ssl_kit.fewshot.features import compute_features
from ssl_kit.fewshot.soundscapes import DatasetConfig, SoundscapeConfig, compose_dataset
from ssl_kit.fewshot.store import FeatureStore, export_features
from ssl_kit.fewshot.training import save_encoder
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.files import sha256_file

PREP = Preprocessing()
RATE = PREP.feature.frame_rate_hz


def beeps(seconds=20.0, every_s=2.0, length_s=0.15):
    t = np.arange(round(22050 * seconds)) / 22050
    phase = 2 * np.pi * (3000 * t + 300 * np.sin(6 * (t % every_s)))
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(t))
    return (0.5 * np.sin(phase) * (t % every_s < length_s) + noise).astype(np.float32)


def beep_recording(audio=Path("a.wav"), n=10, extra=()):
    events = [Event(2.0 * k, 2 * k + 0.15, ("POS",)) for k in range(n)] + list(extra)
    return Recording(audio, 20.0, ("Q",), tuple(sorted(events)), "HB")


@pytest.fixture(scope="module")
def frames():
    return compute_features(beeps())


@pytest.fixture(scope="module")
def network(frames):
    torch.manual_seed(0)
    network = Encoder(EncoderConfig(channels=(8, 8, 8))).eval()
    network.set_statistics(frames.mean(0), frames.std(0) + 0.1)
    return network


# windows


def test_adaptive_length_at_its_borders():
    assert {n: adaptive_length(n) for n in (7, 8, 29, 30, 60, 61, 499, 500, 900)} == \
        {7: 8, 8: 8, 29: 29, 30: 15, 60: 30, 61: 15, 499: 124, 500: 62, 900: 112}


@given(st.integers(0, 80), st.integers(1, 60), st.integers(8, 30), st.integers(80, 150))
def test_windows_cover_a_span_and_stay_inside(first, n, length, n_frames):
    span = (first, min(first + n, n_frames))
    hop = max(1, length // 3)
    starts = covering_windows(span, length, hop, n_frames)
    assert starts.min() >= 0 and starts.max() + length <= n_frames
    if span[1] - span[0] > length:
        assert starts[0] == span[0] and starts[-1] + length == span[1] and np.diff(starts).max() <= hop


def test_negatives_are_the_gaps_between_the_shots_and_know_no_call():
    shots = [Event(2.0 * k, 2 * k + 0.5, ("POS",)) for k in range(5)]
    found = shot_frames(shots, 2000, PREP, [Event(5.0, 5.2, ("UNK",))])
    assert found.end == found.spans[-1][1] and found.length == 21 and found.hop == 7
    starts = negative_windows(found, 2000)
    covered = np.unique(starts[:, None] + np.arange(found.length)) / RATE
    for event in [*shots, Event(5.0, 5.2)]:
        assert not ((covered > event.start_s) & (covered < event.end_s)).any()
    assert covered.max() < shots[-1].start_s  # nothing beyond the shots is heard


def test_short_gaps_are_used_when_there_are_no_others_and_none_is_said():
    close = [Event(0.3 * k, 0.3 * k + 0.12, ("POS",)) for k in range(5)]
    found = shot_frames(close, 2000, PREP)
    assert max(b - a for a, b in found.gaps) < 17 and len(negative_windows(found, 2000)) >= 4
    touching = [Event(0.3 * k, 0.3 * k + 0.29, ("POS",)) for k in range(5)]
    with pytest.raises(DataError, match="no gap of .* frames between the shots"):
        negative_windows(shot_frames(touching, 2000, PREP), 2000)


def test_shots_that_make_no_sense():
    with pytest.raises(DataError, match="at least one"):
        shot_frames([], 100, PREP)
    with pytest.raises(DataError, match="another recording"):
        shot_frames([Event(5.0, 6.0)], 100, PREP)
    with pytest.raises(DataError, match="too short to search"):
        shot_frames([Event(0.0, 0.05)], 5, PREP)


@given(st.integers(0, 10**6))
def test_a_frame_has_the_mean_of_its_windows(seed):
    rng = np.random.default_rng(seed)
    starts = np.unique(rng.integers(0, 40, 12))
    scores = rng.random(len(starts))
    slow = [np.mean([s for s, a in zip(scores, starts, strict=True) if a <= t < a + 9] or [0]) for t in range(45)]
    np.testing.assert_allclose(frame_scores(scores, starts, 9, 45), slow, atol=1e-9)


# scores


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_calls_above_what_lies_between(frames, network, method):
    score = score_recording(beep_recording(), frames, PREP, network, [method])[method]
    assert score.shape == (len(frames),) and score.min() >= 0 and score.max() <= 1
    at = np.arange(len(frames)) / RATE
    assert np.median(score[at % 2 < 0.15]) > np.median(score[(at % 2 > 0.4) & (at % 2 < 1.7)])


def test_nothing_behind_the_shots_changes_a_score_but_that_of_the_transductive_one(frames, network):
    labels = [beep_recording(n=10), beep_recording(n=5), beep_recording(extra=[Event(15, 15.5, ("UNK",))])]
    for method in METHODS:
        scores = [score_recording(recording, frames, PREP, network, [method])[method] for recording in labels]
        np.testing.assert_array_equal(scores[0], scores[1])
        np.testing.assert_array_equal(scores[0], scores[2])
    # other sound behind the shots: prototypes stay, refined ones move
    other = frames.copy()
    other[1200:1600] = other[1200:1600][::-1] + 2
    near = slice(0, 700)
    for method in METHODS:
        same = method not in NOT_ALLOWED
        a, b = (score_recording(beep_recording(), x, PREP, network, [method])[method][near] for x in (frames, other))
        assert np.allclose(a, b, atol=1e-5) == same, method


def test_a_posterior_is_the_softmax_over_both_prototypes(frames, network):
    from ssl_kit.fewshot.encoder import embed_windows, recording_maps

    shots = shot_frames(beep_recording().shots(), len(frames), PREP)
    maps = recording_maps(network, frames)
    at = [covering_windows(span, shots.length, shots.hop, len(frames)) for span in shots.spans]
    positive = torch.stack([embed_windows(network, maps, a, shots.length).mean(0) for a in at]).mean(0)
    negative = embed_windows(network, maps, negative_windows(shots, len(frames)), shots.length).mean(0)
    starts = np.unique(np.append(np.arange(0, len(frames) - shots.length + 1, shots.hop), len(frames) - shots.length))
    rows = embed_windows(network, maps, starts, shots.length)
    logits = -torch.stack([((rows - p) ** 2).sum(1) for p in (positive, negative)], 1)
    slow = frame_scores(torch.softmax(logits, 1)[:, 0].numpy(), starts, shots.length, len(frames))
    np.testing.assert_allclose(PrototypeScorer(network, PREP, frames).scores(shots), slow, atol=1e-4)


def test_correlation_is_that_of_numpy_and_blind_to_gain():
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((120, 9)) - 5
    frames[70:80] = 3 * frames[20:30] + 4
    found = cross_correlation(frames[20:30], frames)
    slow = [np.corrcoef(frames[20:30].ravel(), frames[t:t + 10].ravel())[0, 1] for t in range(111)]
    np.testing.assert_allclose(found, slow, atol=1e-6)
    assert found[70] > 0.9999
    frames[70:80] = frames[20:30] + 4  # louder: an offset of the logarithm
    score = template_scores(frames, ShotFrames(((20, 30),), (), 10, 3, 30))
    assert (score[70:80] > 0.999).all() and (score[20:30] > 0.999).all() and max(score[69], score[80]) < 0.99
    assert np.isfinite(cross_correlation(np.zeros((4, 3)), np.zeros((20, 3)))).all()


def test_unknown_methods_and_missing_networks(frames):
    with pytest.raises(ParameterError, match="did you mean 'template'"):
        score_recording(beep_recording(), frames, PREP, None, ["templates"])
    with pytest.raises(ParameterError, match="needs a network"):
        score_recording(beep_recording(), frames, PREP, None, ["prototypes"])
    with pytest.raises(DataError, match="at least 5"):
        score_recording(beep_recording(n=4), frames, PREP, None, ["template"])


# events


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 3), st.integers(1, 4))
def test_runs_are_those_of_a_slow_loop(above, bridge, shortest):
    runs, t = [], 0
    while t < len(above):
        if above[t]:
            end = t
            while end < len(above) and above[end]:
                end += 1
            if runs and t - runs[-1][1] <= bridge:
                runs[-1][1] = end
            else:
                runs.append([t, end])
            t = end
        t += 1
    expected = [run for run in runs if run[1] - run[0] >= shortest]
    assert score_runs(np.array(above, float), 0.5, bridge, shortest).tolist() == expected


def test_events_begin_behind_the_shots():
    score = np.zeros(2000)
    for start in (100, 810, 1000):
        score[start:start + 20] = 0.9
    shots = [Event(2.0 * k, 2 * k + 0.15) for k in range(5)]
    events = find_events(score, shots, RATE)
    assert 100 / RATE < 8.15 < 809.5 / RATE  # the first of the three lies among the shots
    np.testing.assert_allclose(events, [[809.5 / RATE, 829.5 / RATE], [999.5 / RATE, 1019.5 / RATE]])
    assert len(find_events(np.zeros(100), shots, RATE)) == 0
    with pytest.raises(DataError, match="NaN"):
        find_events(np.full(10, np.nan), shots, RATE)
    with pytest.raises(ParameterError, match="threshold"):
        EventRule(threshold=2)


def test_the_rule_is_the_best_of_the_grid_and_knows_validation_alone():
    recording = beep_recording()
    score = np.full(round(20 * RATE), 0.15)
    for event in recording.events:
        score[round(event.start_s * RATE):round(event.end_s * RATE)] = 0.65
    score[round(11 * RATE):round(11.15 * RATE)] = 0.45
    rule, f = choose_rule([recording], [score], RATE)
    assert 0.45 <= rule.threshold < 0.65 and f == 1
    with pytest.raises(ParameterError, match="as many scores"):
        choose_rule([recording], [], RATE)


def test_tables_of_predictions_and_of_raven(tmp_path):
    events = {"b.wav": np.array([[1.0, 2.0]]), "a.wav": np.array([[3.0, 4.5], [5.0, 5.25]]), "c.wav": np.zeros((0, 2))}
    table = write_predictions(tmp_path / "p.csv", events)
    assert table.read_text().splitlines()[:2] == ["Audiofilename,Starttime,Endtime", "a.wav,3.0000,4.5000"]
    again = read_predictions(table)
    assert sorted(again) == ["a.wav", "b.wav"] and np.array_equal(again["a.wav"], events["a.wav"])
    raven = write_raven(tmp_path / "r.txt", events["a.wav"], label="robin").read_text().splitlines()
    assert raven[0].split("\t")[:4] == ["Selection", "View", "Channel", "Begin Time (s)"]
    assert raven[2].split("\t")[:5] == ["2", "Spectrogram 1", "1", "5.0000", "5.2500"] and raven[2].endswith("robin")
    for row, words in ((None, "columns"), ("a,2,1", "line 2"), ("a,x,1", "line 2"), ("a,nan,1", "line 2")):
        table.write_text("Audiofilename,Starttime\n" if row is None else f"Audiofilename,Starttime,Endtime\n{row}\n")
        with pytest.raises(DataError, match=words):
            read_predictions(table)
    with pytest.raises(MissingDataError):
        read_predictions(tmp_path / "none.csv")


def test_a_picture_has_what_it_is_given(frames):
    fig = plot_detection(frames, np.linspace(0, 1, len(frames)), [(10, 10.2)], PREP, beep_recording().shots(),
                         beep_recording().events, 0.5, 8, 14)
    top, middle, bottom = fig.axes
    assert [label.get_text() for label in middle.get_yticklabels()] == ["found", "truth", "shots"]
    assert bottom.get_xlim() == (8, 14)


# comparison and command


@pytest.fixture(scope="module")
def scapes(tmp_path_factory):
    config = DatasetConfig("synthetic", 2, 1, 1, 2, 36, SoundscapeConfig(20.0, 8, 4))
    root = compose_dataset(tmp_path_factory.mktemp("scapes"), config)
    splits = {split: load_split(root, split) for split in ("val", "test")}
    export_features([recording.audio for part in splits.values() for recording in part], top=root)
    return root, splits


def test_methods_are_compared_on_the_same_recordings(scapes, network):
    root, splits = scapes
    store = FeatureStore(top=root)
    ways = {name: [Contender(name, store, PREP, network)] for name in ("prototypes", "template", "transductive")}
    found = compare_methods(splits["val"], splits["test"], ways, n_draws=50)
    table = found["table"]
    assert {row["allowed"] for row in table if row["method"] == "transductive"} == {False}
    for row in table:
        assert 0 <= row["low"] <= row["high"] <= 100 and row["tp"] + row["fn"] > 0
    for method, counts in found["counts"].items():
        total = sum((c for _, c in counts), Counts(0, 0, 0))
        [line] = [row for row in table if row["method"] == method and row["subset"] == "all"]
        assert (line["tp"], line["fp"], line["fn"]) == (total.tp, total.fp, total.fn)
    rows = differences(found["counts"], n_draws=50)
    assert [row["other"] for row in rows] == ["template", "transductive"] and rows[0]["low"] <= rows[0]["high"]
    with pytest.raises(ParameterError, match="both splits"):
        compare_methods(splits["val"], splits["val"], ways)
    with pytest.raises(ParameterError, match="template has none"):
        compare_methods(splits["val"], splits["test"], {"template": []})


def test_the_way_that_is_best_on_validation_stands_for_a_method(scapes, network, monkeypatch):
    """Never the one that is best on test: scores are made up so that the two splits disagree."""
    root, splits = scapes
    store, val = FeatureStore(top=root), {recording.audio for recording in splits["val"]}

    def made_up(recording, frames, preprocessing, network, methods, n_shots, precision=None):
        right = np.zeros(len(frames))
        for event in recording.with_value("Q", "POS"):
            first, last = (round(t * preprocessing.feature.frame_rate_hz) for t in (event.start_s, event.end_s))
            right[first:last] = 1.0
        good = {"plain": recording.audio in val, "cosine": recording.audio not in val}
        return {method: right if good[method] else np.zeros(len(frames)) for method in methods}

    monkeypatch.setattr("ssl_kit.fewshot.comparison.score_recording", made_up)
    ways = [Contender("cosine", store, PREP, network, "good on test"), Contender("plain", store, PREP, network, "val")]
    found = compare_methods(splits["val"], splits["test"], {"no negatives": ways}, n_draws=20)
    tried = {row["way"]: row["f_validation"] for row in found["tried"]}
    assert tried["good on test"] == 0 and tried["val"] > 50
    assert found["table"][-1]["f"] == 0


def command(*words):
    parser = argparse.ArgumentParser()
    add_fewshot_arguments(parser)
    return run_fewshot(parser.parse_args([str(word) for word in words]))


def test_export_and_check_by_command(tmp_path, capsys):
    folder = tmp_path / "set" / "Validation_Set" / "HB"
    audio = write_audio(folder / "a.wav", beeps(5.0), 22050)
    before = sha256_file(audio)
    assert command("export", tmp_path / "set", "--split", "val", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"written": 1, "kept": 0, "failed": {}}
    assert command("check-features", tmp_path / "set") == 0
    (folder / "a_logmel.npy").write_bytes(b"")
    assert command("check-features", tmp_path / "set") == 1 and "a.wav" in capsys.readouterr().out
    assert command("export", tmp_path / "set") == 0 and sha256_file(audio) == before
    assert command("export", tmp_path / "set", "--kind", "pcen", "--features", tmp_path / "f") == 0
    assert (tmp_path / "f" / "Validation_Set" / "HB" / "a_pcen.npy").is_file()
    write_audio(folder / "silent.wav", np.zeros(22050), 22050)
    assert command("export", tmp_path / "set") == 1 and "silent" in capsys.readouterr().out
    with pytest.raises(ParameterError, match="--workers"):
        command("export", tmp_path / "set", "--workers", 0)


def test_train_detect_evaluate_by_command(scapes, tmp_path, capsys, monkeypatch):
    from ssl_kit.fewshot import training

    monkeypatch.setitem(training.RECIPES, "quick", training.FewshotRecipe(
        EncoderConfig(channels=(4, 4, 4)), episode=training.EpisodeConfig(6, 1, 1), steps=4, epoch_steps=2,
        valid_episodes=1, stop_epochs=0))
    root, splits = scapes
    words = ["train", root, tmp_path / "m", "--json", "--device", "cpu"]
    assert command(*words, "--time-limit", "0") == 3
    assert not json.loads(capsys.readouterr().out)["complete"]
    assert command(*words) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["complete"] and [row["step"] for row in done["history"]] == [2, 4]
    recording = splits["test"][0]
    shots = write_events(tmp_path / f"{recording.audio.stem}.csv",
                         Recording(recording.audio, recording.duration_s, ("Q",), tuple(recording.shots())))
    assert command("detect", recording.audio, "--shots", shots, "--model", tmp_path / "m", "--output",
                   tmp_path / "p.csv", "--raven", "--plot", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == done["about"]["method"] and set(done["about"]["rules"]) == {"prototypes", "combined"}
    assert found["threshold"] == done["about"]["rules"][found["method"]]["threshold"]
    assert (tmp_path / "p.txt").is_file() and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert command("evaluate", root, tmp_path / "p.csv", "--split", "test", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["f_measure"] == 0 and len(scores["without_hits"]) >= 7
    assert command("evaluate", root, tmp_path / "p.csv", "--split", "test") == 0
    assert "no hit in" in capsys.readouterr().out


def test_what_detect_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_audio(tmp_path / "a.wav", beeps(12.0), 22050)
    header = "Audiofilename,Starttime,Endtime,Q\n"
    good = header + "".join(f"a.wav,{2 * k},{2 * k + 0.15},POS\n" for k in range(5))
    silent = write_audio(tmp_path / "silent.wav", np.zeros(22050 * 12), 22050)
    cases = [("a.wav", header + "a.wav,1,2,POS\n", [], "at least 5"),
             ("a.wav", good, ["--method", "prototypes", "--model", "nowhere"], "checkpoint 'nowhere'"),
             ("a.wav", good, ["--n-shots", "0"], "--n-shots"),
             ("a.wav", good.replace("Q\n", "X,Y\n").replace("POS", "POS,POS"), [], "one column"),
             ("a.wav", good.replace("8,8.15", "80,80.15"), [], "another recording"),
             (silent.name, good.replace("a.wav", "silent.wav"), [], "silent"), ("b.wav", good, [], "b.wav")]
    for audio, table, options, words in cases:
        (tmp_path / "shots.csv").write_text(table)
        with pytest.raises(Exception, match=words):
            command("detect", audio, "--shots", "shots.csv", "--method", "template", *options)
    assert not list(tmp_path.glob("*_events.csv"))


def test_a_checkpoint_of_other_preprocessing_brings_its_own(tmp_path, network, capsys):
    audio = write_audio(tmp_path / "a.wav", beeps(12.0), 22050)
    (tmp_path / "a.csv").write_text("Audiofilename,Starttime,Endtime,Q\n"
                                    + "".join(f"a.wav,{2 * k},{2 * k + 0.15},POS\n" for k in range(5)))
    from ssl_kit.fewshot.features import FeatureConfig

    save_encoder(tmp_path / "m", network, Preprocessing(FeatureConfig("pcen")), {"rules": {}})
    assert command("detect", audio, "--shots", tmp_path / "a.csv", "--model", tmp_path / "m", "--output",
                   tmp_path / "e.csv", "--json") == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0.5


def test_combined_is_the_mean_of_prototypes_and_template(frames, network):
    scores = score_recording(beep_recording(), frames, PREP, network, ["template", "combined", "prototypes"])
    assert list(scores) == ["template", "combined", "prototypes"]
    np.testing.assert_allclose(scores["combined"], (scores["prototypes"] + scores["template"]) / 2, atol=1e-12)
