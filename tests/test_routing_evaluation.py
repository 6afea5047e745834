"""Thresholds, policies, the whole evaluation, figures: closed forms, brute force, guarantees, leaks, faults."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ssl_kit.lab.errors import DataError, ParameterError, StorageError
from ssl_kit.lab.statistics import cluster_bootstrap, paired_difference
from ssl_kit.routing import figures
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.metrics import Ranking, evaluate
from ssl_kit.routing.policies import (
    captured_gain,
    cascade,
    error_oracle,
    mean_random_error,
    random_routing,
    routing_curve,
    switch,
    system_errors,
    true_oracle,
)
from ssl_kit.routing.synthetic import synthetic_study
from ssl_kit.routing.thresholds import (
    DEFAULT_THRESHOLDS,
    CalibrationOutcomes,
    CostAware,
    F1Best,
    RiskControl,
    TargetRate,
    candidate_thresholds,
)

DETECTORS = ["max_prob", "entropy", "knn", "vim", "physics", "stack"]


def outcomes(seed=0, n=150, levels=None, n_rooms=15, strength=1.5):
    rng = np.random.default_rng(seed)
    bad = rng.random(n) < 0.3
    scores = rng.normal(size=n) + strength * bad
    if levels:
        scores = np.round(scores * levels) / levels
    return CalibrationOutcomes(scores, np.where(bad, rng.uniform(31, 180, n), rng.uniform(0, 10, n)),
                               rng.exponential(12, n).clip(0, 180), rng.integers(0, n_rooms, n))


@pytest.fixture(scope="module")
def banks():
    return synthetic_study(n=260, n_frames=4, n_rooms=25, overlap=0.7)


@pytest.fixture(scope="module")
def result(banks):
    return evaluate_study(*banks, detectors=DETECTORS, n_draws=200)


# thresholds


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1, 4]))
def test_rules_equal_brute_force_over_all_thresholds(seed, levels):
    c = outcomes(seed, 60, levels)
    every = candidate_thresholds(c.scores)
    assert len(every) == len(np.unique(c.scores)) + 1
    routes = [c.scores > t for t in every]
    f1 = [f1_score(c.failures, r, zero_division=0) for r in routes]
    assert f1_score(c.failures, c.scores > F1Best().fit(c)) == pytest.approx(max(f1))
    share = max(r.mean() for r in routes if r.mean() <= 0.3)
    assert (c.scores > TargetRate(0.3).fit(c)).mean() == pytest.approx(share)
    cost = [system_errors(r, c.network_errors, c.fallback_errors).mean() + 2 * r.mean() for r in routes]
    best = c.scores > CostAware(2).fit(c)
    assert system_errors(best, c.network_errors, c.fallback_errors).mean() + 2 * best.mean() == pytest.approx(min(cost))


def test_adjacent_floats_are_still_told_apart():
    scores = np.array([1.0, np.nextafter(1.0, 2), np.nextafter(np.nextafter(1.0, 2), 2)])
    assert [(scores > t).sum() for t in candidate_thresholds(scores)] == [0, 1, 2, 3]


def test_extremes_route_nothing_or_everything():
    c = outcomes()
    assert (c.scores > TargetRate(0).fit(c)).sum() == 0 and (c.scores > TargetRate(1).fit(c)).all()
    assert (c.scores > CostAware(1e6).fit(c)).sum() == 0
    assert (c.scores > RiskControl(0.01).fit(c)).all()  # out of reach for 15 rooms: route all
    tied = CalibrationOutcomes(np.zeros(4), np.array([50.0, 1, 1, 1]), np.ones(4), np.arange(4))
    assert (tied.scores > TargetRate(0.5).fit(tied)).sum() == 0  # ties go together, and the budget holds


@pytest.mark.parametrize("unit", ["group", "recording"])
def test_risk_control_keeps_its_promise_on_exchangeable_data(unit):
    alpha, kept = 0.12, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        hard = rng.beta(2, 5, 41)  # rooms differ
        rooms = np.repeat(np.arange(41), 6) if unit == "group" else np.arange(246)
        bad = rng.random(246) < (hard[rooms] if unit == "group" else 0.3)
        scores = rng.normal(size=246) + bad
        calibration = rooms < (40 if unit == "group" else 240)
        c = CalibrationOutcomes(scores[calibration], np.where(bad, 90.0, 1.0)[calibration],
                                np.ones(calibration.sum()), rooms[calibration])
        threshold = RiskControl(alpha, unit).fit(c)
        kept.append((bad & (scores <= threshold))[~calibration].mean())
    assert np.mean(kept) <= alpha + 2 * np.std(kept) / np.sqrt(300)
    assert np.mean(kept) > 0.5 * alpha  # and does not simply route everything


@pytest.mark.parametrize(("make", "words"), [
    (lambda: TargetRate(30), "rate"), (lambda: CostAware(-1), "cost_deg"), (lambda: RiskControl(0), "alpha"),
    (lambda: RiskControl(0.1, "speaker"), "unit"),
])
def test_threshold_parameters(make, words):
    with pytest.raises(ParameterError, match=words):
        make()


def test_threshold_data_faults():
    good = CalibrationOutcomes(np.arange(3.0), np.ones(3), np.ones(3), np.arange(3))
    with pytest.raises(DataError, match="no failures"):
        F1Best().fit(good)
    with pytest.raises(DataError, match="scores"):
        CalibrationOutcomes(np.array([1, np.nan]), np.ones(2), np.ones(2), np.arange(2))
    with pytest.raises(DataError, match="group_ids"):
        CalibrationOutcomes(np.ones(2), np.ones(2), np.ones(2), np.arange(3))


# policies


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_no_policy_beats_the_true_oracle(seed, rate):
    rng = np.random.default_rng(seed)
    network, fallback = rng.exponential(15, 80), rng.exponential(15, 80)
    best = system_errors(true_oracle(rate, network, fallback), network, fallback).mean()
    for routed in (random_routing(rate, 80, seed), error_oracle(rate, network)):
        assert best <= system_errors(routed, network, fallback).mean() + 1e-12
    assert true_oracle(rate, network, fallback).sum() <= np.floor(rate * 80 + 0.5)
    assert best >= np.minimum(network, fallback).mean() - 1e-12


def test_error_oracle_is_no_upper_bound():
    network, fallback = np.array([90.0, 40, 30, 1]), np.array([120.0, 1, 1, 1])
    hindsight = system_errors(error_oracle(0.25, network), network, fallback).mean()
    assert hindsight > network.mean()  # it routes the largest error to an even larger one
    assert system_errors(true_oracle(0.25, network, fallback), network, fallback).mean() < network.mean()


def test_random_routing_matches_its_expectation():
    rng = np.random.default_rng(0)
    network, fallback = rng.exponential(20, 500), rng.exponential(10, 500)
    drawn = [system_errors(random_routing(0.3, 500, s), network, fallback).mean() for s in range(400)]
    assert np.mean(drawn) == pytest.approx(mean_random_error(0.3, network, fallback), abs=0.06)
    assert random_routing(0.3, 500, 1).sum() == 150
    assert (random_routing(0.3, 500, 1) == random_routing(0.3, 500, 1)).all()


def test_switch_and_cascade():
    assert switch([1.0, 2.0], 1.0).tolist() == [False, True]
    assert cascade([0, 1, 1], 0.5, [1, 1, 0], 0.5).tolist() == [False, True, False]
    with pytest.raises(DataError, match="NaN"):
        switch([np.nan, 1], 0)
    with pytest.raises(ParameterError, match="rate"):
        error_oracle(30, np.ones(3))
    assert captured_gain(10, 20, 0) == 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_curve_passes_through_every_switch(seed):
    rng = np.random.default_rng(seed)
    network, fallback, scores = rng.exponential(15, 40), rng.exponential(15, 40), rng.integers(0, 15, 40).astype(float)
    for threshold in candidate_thresholds(scores):
        routed = scores > threshold
        curve = routing_curve(scores, network, fallback, [routed.mean()])
        assert curve.mae[0] == pytest.approx(system_errors(routed, network, fallback).mean())
    weights = rng.integers(0, 3, (3, 40))
    drawn = routing_curve(scores, network, fallback, [0, 0.31, 1], weights).draws
    for got, w in zip(drawn, weights, strict=True):
        rows = np.repeat(np.arange(40), w)
        assert got == pytest.approx(routing_curve(scores[rows], network[rows], fallback[rows], [0, 0.31, 1]).mae)


def test_ranking_sums_are_whole():
    weights = np.random.default_rng(0).integers(0, 3, (4, 10))
    ranking = Ranking(np.arange(10) // 2, weights)
    assert ranking.steps().sum(0) == pytest.approx(weights.sum(1)) and len(ranking.steps()) == 5


# the evaluation


def test_every_row_equals_the_plain_computation(result):
    table = result.hybrid.set_index(["method", "threshold"])
    statistics = result.statistics.set_index(["method", "threshold"])
    detection = result.detection.set_index("method")
    network, fallback = result.test.abs_errors, result.test.column("fallback_error")
    for name, method in result.methods.items():
        for threshold, value in method.thresholds.items():
            routed = method.test > value
            plain = evaluate(method.test, network, routed, fallback)
            row = table.loc[name, threshold]
            for key in ("mae", "median", "acc5", "rate"):
                assert row[key] == pytest.approx(plain[key]), (name, threshold, key)
            for key in ("precision", "recall", "f1", "fpr"):
                assert statistics.loc[name, threshold][key] == pytest.approx(plain[key], nan_ok=True)
            assert detection.loc[name]["auroc"] == pytest.approx(plain["auroc"])
            assert row["random_mae"] == pytest.approx(mean_random_error(routed.mean(), network, fallback))


def test_intervals_equal_the_generic_bootstrap(result):
    table = result.hybrid.set_index(["method", "threshold"])
    test, method = result.test, result.methods["physics"]
    errors = system_errors(method.test > method.thresholds["rate_30"], test.abs_errors, test.column("fallback_error"))
    for statistic, name in (("mean", "mae"), ("median", "median")):
        generic = cluster_bootstrap(errors, test.group_ids, statistic, 200)
        row = table.loc["physics", "rate_30"]
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((generic.low, generic.high))
    gain = paired_difference(test.abs_errors, errors, test.group_ids, n_draws=200)
    assert (row["gain_network"], row["gain_network_low"]) == pytest.approx((gain.estimate, gain.low))


def test_all_baselines_are_in_the_table(result):
    rows = set(zip(result.hybrid["method"], result.hybrid["threshold"], strict=True))
    assert {("always_network", "none"), ("always_srp", "none"), ("true_oracle", "unlimited")} <= rows
    for rate in ("rate_20", "rate_30"):
        assert {("random", rate), ("error_oracle", rate), ("true_oracle", rate)} <= rows
    oracle = result.hybrid.set_index(["method", "threshold"])
    assert oracle.loc["true_oracle", "unlimited"]["mae"] == oracle["mae"].min()
    assert oracle.loc["always_network", "none"]["gain_network"] == 0
    assert oracle.loc["true_oracle", "unlimited"]["captured"] == pytest.approx(1)
    methods = oracle[oracle["kind"] == "method"]
    assert (methods["true_oracle_mae"] <= methods["mae"] + 1e-9).all()
    assert (oracle.loc["max_prob"]["gain_max_prob"] == 0).all()


def test_thresholds_see_calibration_alone(banks, result):
    calibration, calibration_srp, test, test_srp = banks
    other = test.take(np.arange(100))
    again = evaluate_study(calibration, calibration_srp, other, test_srp, DETECTORS, n_draws=5)
    for name in DETECTORS:
        ours, theirs = (dict(r.methods[name].thresholds) for r in (again, result))
        # the one rule that may see the test's scores, never its labels, and is marked for it
        assert ours.pop("stream_rate_30") and theirs.pop("stream_rate_30") and ours == theirs
        assert again.methods[name].test == pytest.approx(result.methods[name].test[:100], rel=1e-4, abs=1e-5)


def test_calibrated_rate_is_kept_on_like_data():
    rates = []
    for seed in (0, 1, 2):  # two sets of 150 rooms differ in hardness by some per cent: the mean of three is judged
        study = evaluate_study(*synthetic_study(n=1200, n_frames=2, n_rooms=150, overlap=0.7, seed=seed),
                               detectors=["entropy", "knn", "vim", "mahalanobis"], n_draws=5)
        rows = study.hybrid[(study.hybrid["threshold"] == "rate_30") & (study.hybrid["kind"] == "method")]
        rates.append(rows["rate"].to_numpy())
    assert np.mean(rates, axis=0) == pytest.approx(np.full(4, 0.3), abs=0.04)


def test_leaky_protocol_is_labelled_and_flatters(banks):
    calibration, calibration_srp, test, test_srp = banks
    leaky = evaluate_study(calibration, calibration_srp, test, test_srp, DETECTORS, protocol="leaky", n_draws=5)
    assert all((table["protocol"] == "leaky").all()
               for table in (leaky.hybrid, leaky.statistics, leaky.decisions, leaky.detection))
    rows = leaky.hybrid[(leaky.hybrid["threshold"] == "rate_30") & (leaky.hybrid["kind"] == "method")]
    assert rows["rate"].to_numpy() == pytest.approx(np.full(len(DETECTORS), 0.3))  # the test's own quantile
    honest = evaluate_study(calibration, calibration_srp, test, test_srp, ["knn"], n_draws=5, seed=0)
    f1 = [study.statistics.set_index(["method", "threshold"]).loc["knn", "f1"]["f1"] for study in (leaky, honest)]
    assert f1[0] >= f1[1]


def test_same_seed_same_tables(banks, result):
    again = evaluate_study(*banks, detectors=DETECTORS, n_draws=200)
    pd.testing.assert_frame_equal(again.hybrid, result.hybrid)
    pd.testing.assert_frame_equal(again.detection, result.detection)


def test_files_have_one_row_a_recording_and_read_back(result, tmp_path):
    paths = result.save(tmp_path)
    assert {path.name for path in paths.values()} == {"routing_statistics.csv", "hybrid_results.csv",
                                                      "routing_decisions.csv", "detection_metrics.csv",
                                                      "frame_results.csv"}
    decisions = pd.read_csv(paths["routing_decisions"])
    assert len(decisions) == len(result.test) and decisions["global_index"].is_unique
    routed = decisions["routed_physics_rate_30"].astype(bool)
    errors = np.where(routed, decisions["fallback_error"], decisions["network_error"])
    row = pd.read_csv(paths["hybrid_results"]).set_index(["method", "threshold"]).loc["physics", "rate_30"]
    assert errors.mean() == pytest.approx(row["mae"], rel=1e-6) and row["protocol"] == "in_distribution"
    assert {"precision", "recall", "f1", "fpr", "rate"} <= set(pd.read_csv(paths["routing_statistics"]))


def test_full_disk_is_a_storage_error(result, tmp_path, monkeypatch):
    import os

    result.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="csv"):
        result.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cost_counts_what_was_run(result):
    table = result.hybrid.set_index(["method", "threshold"])
    assert table.loc["always_network", "none"]["cost_ms"] == 0
    row = table.loc["entropy", "rate_30"]
    assert row["cost_ms"] == pytest.approx(row["rate"] * 5, rel=0.1)
    assert table.loc["stack", "rate_30"]["cost_ms"] == pytest.approx(5, rel=0.1)  # it asks the fallback every time


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"protocol": "honest"}, ParameterError, "protocol"),
    ({"detectors": ["max_prb"]}, ParameterError, "max_prob"),
    ({"detectors": ["knn", "knn"]}, ParameterError, "each once"),
    ({"detectors": []}, ParameterError, "at least one"),
    ({"failure_deg": 180}, DataError, "0 of 260"),
])
def test_study_faults(banks, change, error, words):
    with pytest.raises(error, match=words):
        evaluate_study(*banks, **({"detectors": ["max_prob"], "n_draws": 5} | change))


def test_shared_recordings_are_refused(banks):
    calibration, calibration_srp, test, test_srp = banks
    with pytest.raises(DataError, match="overlap.*recording.*room.*speaker"):
        evaluate_study(test, test_srp, test, test_srp, ["max_prob"])


def test_missing_fallback_answer_is_named(banks):
    calibration, calibration_srp, test, _ = banks
    with pytest.raises(DataError, match="no answer for 260 of 260"):
        evaluate_study(calibration, calibration_srp, test, calibration_srp, ["max_prob"])


def test_default_thresholds_have_distinct_names():
    assert len({rule.name for rule in DEFAULT_THRESHOLDS}) == len(DEFAULT_THRESHOLDS)


# figures


@pytest.mark.parametrize(("draw", "columns"), [
    (figures.mae_vs_rate_figure, {"curve", "rate", "mae", "mae_low", "mae_high"}),
    (figures.risk_coverage_figure, {"curve", "coverage", "risk"}),
    (figures.method_comparison_figure, {"method", "auroc", "mae"}),
    (figures.decision_breakdown_figure, {"method", "tp", "fp", "fn", "tn"}),
    (figures.score_histograms_figure, {"method", "class", "score", "share"}),
    (lambda r: figures.rescued_figure(r, "knn"), {"error_deg", "before", "after"}),
])
def test_figures_return_their_data_and_keep_text_inside(result, draw, columns):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, frame = draw(result)
    assert columns <= set(frame) and len(frame)
    fig.draw_without_rendering()
    box, (width, height) = fig.get_tightbbox(), fig.get_size_inches()  # everything that is seen, in inches
    assert box.x0 > -0.02 and box.x1 < width + 0.02 and box.y0 > -0.02 and box.y1 < height + 0.02
    plt.close(fig)


def test_curve_of_the_figure_ends_at_both_systems(result):
    _, frame = figures.mae_vs_rate_figure(result, ["entropy"])
    curve = frame[frame["curve"] == "Entropy"]
    assert curve["mae"].iloc[0] == pytest.approx(result.test.abs_errors.mean())
    assert curve["mae"].iloc[-1] == pytest.approx(result.test.column("fallback_error").mean())
    assert set(frame["curve"]) >= {"true oracle", "error oracle", "random", "Entropy, rate_30", "Entropy, f1"}


def test_figure_faults(result):
    with pytest.raises(ParameterError, match="nonsense"):
        figures.risk_coverage_figure(result, ["nonsense"])
    with pytest.raises(ParameterError, match="threshold"):
        figures.method_comparison_figure(result, "rate_77")
    with pytest.raises(DataError, match="geometry"):
        figures.error_vs_geometry_figure(pd.DataFrame({"mae": [1.0]}))


def test_a_stack_learns_the_failures_of_the_study_not_its_own_default():
    calibration, calibration_fallback, test, test_fallback = synthetic_study(n=120, n_frames=2)
    result = evaluate_study(calibration, calibration_fallback, test, test_fallback, ["stack"], failure_deg=12.0,
                            n_draws=20)
    assert result.methods["stack"].detector.failure_deg == 12.0


def test_draws_in_pieces_are_the_same_draws(monkeypatch):
    from pandas.testing import assert_frame_equal

    from ssl_kit.routing import evaluation

    banks = synthetic_study(n=60, n_frames=2, n_rooms=12)
    whole = evaluate_study(*banks, ["max_prob", "entropy"], n_draws=50).detection
    monkeypatch.setattr(evaluation, "_DRAWN_AT_ONCE", 60 * 7)  # seven draws at a time
    assert_frame_equal(evaluate_study(*banks, ["max_prob", "entropy"], n_draws=50).detection, whole)
