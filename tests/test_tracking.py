"""The causal filter on the circle, the exponential average, and the metrics of tracks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.arrays.angles import angular_error_deg, wrap_deg
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.recordings import Recording
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.localize.protocol import AzimuthTrack
from ssl_kit.localize.tracking import (
    CausalSmoother,
    ExponentialSmoother,
    SmootherConfig,
    TrailingWindow,
    belief_peak,
    evaluate_tracks,
    filter_azimuths,
    forward_step,
    log_likelihood,
    score_scale,
    step_spectrum,
    track_frames,
    track_lag_s,
)

N = 72
DIRECTIONS = np.arange(N) * 360.0 / N
PAIR = named_array("realman32").subarray([0, 1])


def track_of(azimuth_deg, width_deg=10.0, confidence=None, times_s=None):
    """A track whose scores are bumps around `azimuth_deg`."""
    azimuth = np.asarray(azimuth_deg, float)
    score = np.exp(-0.5 * (angular_error_deg(DIRECTIONS, azimuth[:, None]) / width_deg) ** 2)
    times = 0.1 * np.arange(len(azimuth)) + 0.05 if times_s is None else times_s
    return AzimuthTrack(azimuth, score, DIRECTIONS, np.ones(len(azimuth)) if confidence is None else confidence,
                        "toy", times)


def noisy_walk(seed, n=80, outliers=0.3, speed=2.0):
    rng = np.random.default_rng(seed)
    truth = wrap_deg(rng.uniform(0, 360) + rng.choice([-1, 1]) * speed * np.arange(n))
    seen = np.where(rng.random(n) < outliers, rng.uniform(0, 360, n), truth + rng.normal(0, 4, n))
    return truth, seen


def recording_of(truth, active=None):
    samples = np.zeros((2, 1600 * len(truth)), np.float32)
    return Recording(samples, 16000, PAIR, np.asarray(truth, float), active, {"name": "walk"})


# --- the filter against a table of all paths ----------------------------------------------------------------------


def test_the_forward_recursion_is_bayes_rule_over_all_paths():
    """Three directions, four frames: sum over all 81 paths by hand."""
    config, dt, rng = SmootherConfig(speed_deg_s=200.0, sharpness=2.0, jump_per_s=1.0), 0.1, np.random.default_rng(0)
    score = rng.random((4, 3))
    kernel = np.fft.irfft(step_spectrum(3, 200.0 * np.sqrt(dt)), 3)
    jump = 1 - np.exp(-dt)
    move = (1 - jump) * np.stack([np.roll(kernel, k) for k in range(3)]) + jump / 3
    likelihood = np.exp(log_likelihood(score, config))
    total = np.zeros(3)
    for path in np.ndindex(3, 3, 3, 3):
        p = 1 / 3 * np.prod([likelihood[t, path[t]] for t in range(4)])
        total[path[3]] += p * np.prod([move[path[t - 1], path[t]] for t in range(1, 4)])
    belief = np.full(3, 1 / 3)
    for observation in log_likelihood(score, config):
        belief = forward_step(belief, observation, config, dt)
    assert np.allclose(belief, total / total.sum(), atol=1e-12)


@given(st.floats(0, 200), st.integers(3, 360))
def test_a_step_is_a_distribution_with_its_variance(sigma, n):
    kernel = np.fft.irfft(step_spectrum(n, sigma), n)
    assert kernel.min() > -1e-12 and np.isclose(kernel.sum(), 1)
    if sigma < 40 and n >= 60:  # nothing comes around the circle
        offset = np.minimum(np.arange(n), n - np.arange(n)) * 360.0 / n
        assert np.isclose(np.sum(kernel * offset**2), sigma**2, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_belief_stays_a_distribution(seed, confidence):
    rng = np.random.default_rng(seed)
    smoother = CausalSmoother(sharpness=float(rng.uniform(0, 200)), speed_deg_s=float(rng.uniform(0, 300)),
                              min_confidence=0.5)
    for _ in range(5):
        azimuth, belief, mass = smoother.process(rng.standard_normal(N), confidence)
        assert belief.min() >= 0 and np.isclose(belief.sum(), 1) and 0 <= azimuth < 360 and 0 <= mass <= 1 + 1e-9


@given(st.integers(0, N - 1), st.integers(0, 10**6))
def test_turning_the_world_turns_the_answers(steps, seed):
    _, seen = noisy_walk(seed, 12)
    turned = track_of(wrap_deg(seen + steps * 360.0 / N))
    a, b = (CausalSmoother(sharpness=5.0).smooth(t).azimuth_deg for t in (track_of(seen), turned))
    assert angular_error_deg(a + steps * 360.0 / N, b).max() < 1e-6


# --- causality and state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoother", [CausalSmoother(sharpness=6.0, min_confidence=0.2),
                                      ExponentialSmoother(0.4, min_confidence=0.2)])
def test_the_future_changes_nothing(smoother):
    truth, seen = noisy_walk(3)
    confidence = np.random.default_rng(4).random(80)
    whole = smoother.smooth(track_of(seen, confidence=confidence))
    for n in (1, 2, 40, 79):
        other = np.r_[seen[:n], wrap_deg(seen[n:] + 100)]
        changed = smoother.smooth(track_of(other, confidence=np.r_[confidence[:n], 1 - confidence[n:]]))
        cut = smoother.smooth(track_of(seen[:n], confidence=confidence[:n]))
        assert np.array_equal(whole.azimuth_deg[:n], changed.azimuth_deg[:n])
        assert np.array_equal(whole.azimuth_deg[:n], cut.azimuth_deg)


def test_streaming_equals_the_whole_track_and_the_batch():
    config = SmootherConfig(sharpness=4.0, min_confidence=0.3)
    tracks = [track_of(noisy_walk(k)[1], confidence=np.random.default_rng(k).random(80)) for k in range(3)]
    batch = filter_azimuths([t.score for t in tracks], [t.confidence for t in tracks], config)
    for track, together in zip(tracks, batch, strict=True):
        live, smoother = CausalSmoother(config), CausalSmoother(config)
        frames = [live.process(s, c) for s, c in zip(track.score, track.confidence, strict=True)]
        smooth = smoother.smooth(track)
        assert np.allclose(smooth.azimuth_deg, [f[0] for f in frames], atol=1e-6)
        assert np.allclose(smooth.score, [f[1] for f in frames]) and smooth.method == "toy + filter"
        assert angular_error_deg(together, smooth.azimuth_deg).max() < 1e-6
        assert np.array_equal(smooth.azimuth_deg, smoother.smooth(track).azimuth_deg)  # starts anew


def test_silence_keeps_the_place_and_loses_certainty():
    smoother = CausalSmoother(sharpness=8.0, min_confidence=0.5)
    track = track_of(np.full(10, 200.0))
    for score in track.score:
        azimuth, _, sure = smoother.process(score)
    masses = []
    for _ in range(20):  # the scores of silent frames say something else and are not believed
        azimuth, _, mass = smoother.process(np.roll(track.score[0], 30), confidence=0.1)
        masses.append(mass)
        assert angular_error_deg(azimuth, 200.0) < 1e-6
    assert sure > masses[0] and np.all(np.diff(masses) < 0)
    assert angular_error_deg(smoother.process(track_of([230.0]).score[0])[0], 230.0) < 15


def test_half_the_frame_rate_needs_no_other_parameter():
    """Without observations the belief after 1 s is the same however the second is cut."""
    config, start = SmootherConfig(speed_deg_s=40.0, jump_per_s=0.5), np.eye(N)[10]
    beliefs = []
    for n in (1, 10, 100):
        belief = start
        for _ in range(n):
            belief = forward_step(belief, None, config, 1.0 / n)
        beliefs.append(belief)
    assert np.allclose(beliefs[0], beliefs[1], atol=1e-9) and np.allclose(beliefs[0], beliefs[2], atol=1e-9)


# --- what it is good for ------------------------------------------------------------------------------------------


def test_outliers_are_overruled_and_the_walk_is_kept():
    errors = {"raw": [], "filter": [], "average": []}
    for seed in range(10):
        truth, seen = noisy_walk(seed)
        track = track_of(seen)
        answers = {"raw": track, "filter": CausalSmoother(sharpness=6.0).smooth(track),
                   "average": ExponentialSmoother(0.3).smooth(track)}
        for name, answer in answers.items():
            errors[name].append(angular_error_deg(answer.azimuth_deg, truth)[5:].mean())
    mean = {name: np.mean(values) for name, values in errors.items()}
    assert 2 * mean["filter"] < mean["average"] < mean["raw"], mean


def test_another_speaker_is_found():
    azimuth = np.r_[np.full(30, 20.0), np.full(30, 200.0)]
    smooth = CausalSmoother(sharpness=6.0, jump_per_s=0.2).smooth(track_of(azimuth))
    late = np.flatnonzero(angular_error_deg(smooth.azimuth_deg[30:], 200.0) < 5)[0]
    assert late <= 5 and (angular_error_deg(smooth.azimuth_deg[30 + late:], 200.0) < 5).all()


def test_the_average_lags_by_its_time_constant_and_zero_changes_nothing():
    truth = wrap_deg(2.0 * np.arange(400))
    track = track_of(truth)
    lag = track_lag_s([recording_of(truth)], [ExponentialSmoother(0.5).smooth(track)])
    # geometric weights: mean delay dt / (exp(dt / tau) - 1) = 0.45 s
    assert abs(lag - 0.1 / (np.exp(0.2) - 1)) <= 0.03
    assert np.allclose(ExponentialSmoother(0.0).smooth(track).azimuth_deg, truth)


@given(st.floats(0, 360), st.floats(0.01, 5))
def test_the_average_of_one_direction_is_that_direction(azimuth, time_s):
    smoother = ExponentialSmoother(time_s)
    for _ in range(4):
        assert angular_error_deg(smoother.process(azimuth, 0.5), azimuth) < 1e-6


# --- trailing windows ---------------------------------------------------------------------------------------------


def delay_method(samples, geometry, sample_rate):
    """Frame-wise, one frame per 50 ms: its azimuth is a thousand times the frame's mean."""
    frames = 1000 * samples[0][:samples.shape[1] // 800 * 800].reshape(-1, 800).mean(axis=1)
    return track_of(frames, times_s=(np.arange(len(frames)) + 0.5) * 0.05)


def test_trailing_windows_hear_the_past_alone_and_keep_the_last_frame():
    ramp = np.tile(np.arange(32000, dtype=np.float32) / 1e5, (2, 1))  # 160 degrees a second
    method = TrailingWindow(delay_method, window_s=0.6)
    track = method(ramp, PAIR)
    # the mean of the last 50 ms before the frame's end
    assert np.allclose(track.azimuth_deg[3:], 16 * np.arange(4, 21) - 4, atol=0.02) and track.n_frames == 20
    assert np.allclose(track.azimuth_deg[:3], track.azimuth_deg[0]) and np.allclose(np.diff(track.times_s), 0.1)
    changed = ramp.copy()
    changed[:, 16000:] += 0.05
    assert np.array_equal(method(changed, PAIR).azimuth_deg[:10], track.azimuth_deg[:10])


def test_silent_windows_know_nothing_and_keep_the_azimuth():
    samples = np.zeros((2, 32000), np.float32)
    samples[:, 8000:12000] = 0.09
    track = TrailingWindow(delay_method, window_s=0.3)(samples, PAIR)
    assert track.confidence[:5].tolist() == [0] * 5 and track.confidence[14] == 0 and track.confidence[6] == 1
    assert not track.score[18].any() and track.azimuth_deg[18] == track.azimuth_deg[13]
    smooth = CausalSmoother(sharpness=6.0, min_confidence=0.5).smooth(track)
    assert np.isfinite(smooth.azimuth_deg).all()


def test_trailing_windows_refuse_what_they_cannot_do():
    with pytest.raises(ParameterError, match="window_s"):
        TrailingWindow(delay_method, window_s=0.1)
    method = TrailingWindow(delay_method, window_s=1.0)
    with pytest.raises(DataError, match="half a window, found 0.250 s"):
        method(np.full((2, 4000), 0.1, np.float32), PAIR)
    with pytest.raises(DataError, match="silent"):
        method(np.zeros((2, 16000), np.float32), PAIR)


# --- scales -------------------------------------------------------------------------------------------------------


def test_probabilities_count_as_their_logarithm():
    p = np.random.default_rng(0).dirichlet(np.ones(N), 4)
    posterior = AzimuthTrack(DIRECTIONS[p.argmax(1)], p, DIRECTIONS, np.ones(4), "net", np.arange(4) * 0.1)
    assert score_scale(posterior) == "log" and score_scale(track_of([1.0, 2.0])) == "linear"
    config = SmootherConfig(sharpness=1.0, scale="log")
    ratio = np.exp(log_likelihood(p, config))
    assert np.allclose(ratio, np.maximum(p / p.max(axis=1, keepdims=True), np.exp(-12.0)))
    with pytest.raises(DataError, match="scale='linear'"):
        log_likelihood(-p, config)


@given(st.lists(st.floats(0, 1), min_size=N, max_size=N).filter(lambda b: sum(b) > 0), st.floats(0, 60))
def test_the_peak_is_near_the_largest_belief(belief, reach):
    belief = np.array(belief) / sum(belief)
    azimuth, mass = belief_peak(belief, reach)
    assert angular_error_deg(azimuth, DIRECTIONS[belief.argmax()]) <= reach + 1e-9
    assert belief.max() - 1e-12 <= mass <= 1 + 1e-9


# --- metrics ------------------------------------------------------------------------------------------------------


def test_unknown_and_silent_frames_stay_out():
    truth = np.array([10, np.nan, 30, 40, -1000.0, 60])
    active = np.array([True, True, True, False, True, True])
    recording = recording_of(truth, active)
    track = track_of([11, 99, 33, 99, 99, 66])
    reference, answer = track_frames(recording, track)
    assert reference.tolist() == [10, 30, 60] and answer.tolist() == [11, 33, 66]
    assert track_frames(recording, track, active_only=False)[0].tolist() == [10, 30, 40, 60]
    found = evaluate_tracks([recording], [track])
    assert found == {"recordings": 1, "n": 3, "mae_deg": pytest.approx(10 / 3), "median_deg": pytest.approx(3),
                     "acc_5deg": pytest.approx(2 / 3), "acc_10deg": 1.0}
    # a static source: one azimuth for every frame
    still = replace(recording, azimuth_deg=11.0)
    assert track_frames(still, track)[0].tolist() == [11.0] * 5


def test_intervals_are_those_of_whole_clusters():
    from ssl_kit.lab.statistics import cluster_bootstrap

    rng = np.random.default_rng(0)
    recordings, tracks, errors, rooms = [], [], [], []
    for k in range(6):
        truth = rng.uniform(0, 360, 10 + k)
        error = rng.normal(0, 1 + 2 * k, len(truth))
        recordings.append(recording_of(truth))
        tracks.append(track_of(wrap_deg(truth + error)))
        errors.append(np.abs(error))
        rooms.append(f"room {k // 2}")
    found = evaluate_tracks(recordings, tracks, clusters=rooms, n_draws=200)
    expected = cluster_bootstrap(np.concatenate(errors), np.repeat(rooms, [len(e) for e in errors]), n_draws=200)
    assert found["recordings"] == 6 and found["n"] == sum(map(len, errors))
    assert np.allclose([found["mae_deg"], found["mae_deg_low"], found["mae_deg_high"]],
                       [expected.estimate, expected.low, expected.high])


@pytest.mark.parametrize("late_s", [-0.2, 0.0, 0.3, 0.74])
def test_lag_is_found_through_gaps_and_gross_errors(late_s):
    times = np.arange(100) * 0.1 + 0.05

    def path(t):
        return wrap_deg(350 + 60 * np.sin(0.9 * t))

    truth, rng = path(times), np.random.default_rng(1)
    seen = np.where(rng.random(100) < 0.2, rng.uniform(0, 360, 100), path(times - late_s))
    truth[40:43] = np.nan
    recording = recording_of(truth, rng.random(100) < 0.9)
    assert abs(track_lag_s([recording], [track_of(seen)]) - late_s) <= 0.021


def test_who_stands_has_no_lag():
    assert np.isnan(track_lag_s([recording_of(np.full(30, 45.0))], [track_of(np.full(30, 45.0))]))
    full_circle = wrap_deg(np.arange(0, 360, 4.0))
    assert track_lag_s([recording_of(full_circle)], [track_of(full_circle)]) == pytest.approx(0, abs=1e-9)


# --- faults -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_smoothed_says_why():
    with pytest.raises(ParameterError, match="whole-clip"):
        CausalSmoother().smooth(AzimuthTrack([1.0], np.zeros((1, N)), DIRECTIONS, [1.0], "srp"))
    track = track_of([1.0, 2.0])
    with pytest.raises(ParameterError, match="equally spaced"):
        CausalSmoother().smooth(replace(track, directions_deg=DIRECTIONS + 1))
    with pytest.raises(DataError, match="times_s must increase"):
        CausalSmoother().smooth(replace(track, times_s=[0.1, 0.1]))
    smoother = CausalSmoother()
    with pytest.raises(DataError, match="NaN"):
        smoother.process(np.full(N, np.nan))
    with pytest.raises(DataError, match="expected \\(direction,\\)"):
        smoother.process(np.zeros((2, N)))
    smoother.process(np.zeros(N))
    with pytest.raises(DataError, match="expected 72 directions as before, found 36"):
        smoother.process(np.zeros(36))
    with pytest.raises(ParameterError, match="dt_s"):
        smoother.process(np.zeros(N), dt_s=-1.0)


@pytest.mark.parametrize("wrong", [{"speed_deg_s": -1}, {"sharpness": np.nan}, {"scale": "dB"},
                                   {"min_confidence": 2.0}, {"jump_per_s": np.inf}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SmootherConfig(**wrong)
    with pytest.raises(ParameterError, match="unknown parameters \\['speed'\\]"):
        CausalSmoother(speed=3)
    with pytest.raises(ParameterError, match="not both"):
        CausalSmoother(SmootherConfig(), speed_deg_s=3.0)
    with pytest.raises(ParameterError, match="time_s"):
        ExponentialSmoother(-1.0)


def test_metrics_refuse_what_does_not_match():
    recording, track = recording_of([1.0, 2.0]), track_of([1.0, 2.0])
    with pytest.raises(DataError, match="a track and a cluster for each"):
        evaluate_tracks([recording], [track, track])
    with pytest.raises(DataError, match="a track and a cluster for each"):
        evaluate_tracks([recording], [track], clusters=["a", "b"])
    with pytest.raises(DataError, match="at least one azimuth"):
        evaluate_tracks([recording_of([np.nan, np.nan])], [track])
    with pytest.raises(DataError, match="walk: expected azimuths"):
        track_frames(replace(recording, azimuth_deg=None), track)
