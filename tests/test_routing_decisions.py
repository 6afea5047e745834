"""Decisions: thresholds with a guarantee, cascades, fusion, frames with hysteresis, all against closed forms."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing.bank import attach_fallback
from ssl_kit.routing.defer_features import defer_features, peak_where, value_at
from ssl_kit.routing.evaluation import evaluate_study, policy_outcomes, with_thresholds
from ssl_kit.routing.fitting import RowView, fit_and_score, measured_score_ms, score_all, view_rows
from ssl_kit.routing.policies import Cascade, CascadeFit, Policy, fit_cascade, outcome_errors, switch
from ssl_kit.routing.policies_frames import FrameRouting, frame_answers, hysteresis, map_peak_deg, medoid_deg, switches
from ssl_kit.routing.policies_fusion import Fusion, clip_evidence, resample_circle
from ssl_kit.routing.protocols import evaluate_protocols
from ssl_kit.routing.registry import Detector, available_detectors, held_out_scores, make_detector
from ssl_kit.routing.synthetic import synthetic_study
from ssl_kit.routing.thresholds import (
    STUDY_THRESHOLDS,
    CalibrationOutcomes,
    CostAware,
    F1Best,
    RiskControl,
    StreamRate,
    TargetRate,
    candidate_thresholds,
)


@pytest.fixture(scope="module")
def raw():
    return synthetic_study(n=160, n_frames=4, n_features=24, n_classes=72, n_rooms=20, overlap=0.7)


@pytest.fixture(scope="module")
def banks(raw):
    return attach_fallback(*raw[:2]), attach_fallback(*raw[2:])


# thresholds


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.floats(0, 1))
def test_stream_rate_keeps_the_budget_on_the_stream_whatever_calibration_was(stream, rate):
    stream = np.array(stream, float)
    c = CalibrationOutcomes(np.arange(5.0) - 100, np.ones(5), np.ones(5), np.arange(5), stream_scores=stream)
    routed = switch(stream, StreamRate(rate).fit(c))
    assert routed.mean() <= rate + 1e-9
    # and no lower threshold would: the next step of ties does not fit any more
    if not routed.all():
        assert (stream >= stream[~routed].max()).mean() > rate - 1e-9


def test_stream_rate_sees_no_label_and_says_what_it_saw():
    rng = np.random.default_rng(0)
    c = [CalibrationOutcomes(rng.normal(size=40), e, e[::-1], np.arange(40), stream_scores=np.linspace(5, 9, 50))
         for e in (np.linspace(0, 90, 40), np.full(40, 3.0))]
    assert StreamRate(0.3).fit(c[0]) == StreamRate(0.3).fit(c[1])
    assert [rule.name for rule in STUDY_THRESHOLDS if rule.sees_stream] == ["stream_rate_30"]
    with pytest.raises(DataError, match="stream_rate_30.*none"):
        StreamRate().fit(CalibrationOutcomes(np.ones(3), np.ones(3), np.ones(3), np.arange(3)))
    with pytest.raises(ParameterError, match="rate"):
        StreamRate(30)


def test_a_plug_in_threshold_breaks_the_promise_that_risk_control_keeps():
    alpha, n_rooms, kept = 0.2, 8, {"plug in": [], "controlled": []}
    rng = np.random.default_rng(1)
    for _ in range(1500):
        hard = rng.beta(0.6, 1.4, n_rooms + 1)  # few rooms, very unlike
        bad = rng.random((n_rooms + 1, 5)) < hard[:, None]
        scores = rng.normal(size=bad.shape) + bad
        cal, rooms = slice(0, n_rooms), np.repeat(np.arange(n_rooms), 5)
        c = CalibrationOutcomes(scores[cal].ravel(), np.where(bad[cal], 90.0, 1.0).ravel(), np.ones(5 * n_rooms), rooms)
        every = candidate_thresholds(c.scores)
        naive = every[[(c.failures & (c.scores <= t)).mean() <= alpha for t in every].index(True)]
        for name, threshold in (("plug in", naive), ("controlled", RiskControl(alpha).fit(c))):
            kept[name].append((bad[-1] & (scores[-1] <= threshold)).mean())
    slack = 2 * np.std(kept["controlled"]) / np.sqrt(1500)
    assert np.mean(kept["controlled"]) <= alpha + slack
    assert np.mean(kept["plug in"]) > alpha - slack and np.mean(kept["plug in"]) > np.mean(kept["controlled"]) + 0.05


def test_risk_control_equals_mapie():
    control = pytest.importorskip("mapie.risk_control")
    if not hasattr(control, "MultiLabelClassificationController"):
        pytest.skip("this MAPIE has no MultiLabelClassificationController")
    rng = np.random.default_rng(0)
    n, alpha = 200, 0.15
    # failures alone, each with the one label "route me": a missed label is a kept failure, MAPIE's 1 - recall
    scores = np.sort(rng.choice(np.arange(0.005, 1, 0.01), n)).round(3)
    grid = np.arange(0, 1, 0.01)
    mapie = control.MultiLabelClassificationController(lambda x: np.asarray(x)[:, :1], risk="recall", method="crc",
                                                       target_level=1 - alpha, predict_params=grid)
    mapie.calibrate(scores[:, None], np.ones((n, 1), int))
    theirs = float(np.ravel(mapie.best_predict_param)[0])
    ours = RiskControl(alpha, "recording").fit(CalibrationOutcomes(scores, np.full(n, 90.0), np.ones(n), np.arange(n)))
    # the same failures are kept: ours lies in the same gap between scores, or one grid step below where MAPIE asks
    # for a risk strictly below alpha
    assert abs((scores <= ours).sum() - (scores <= theirs).sum()) <= (np.abs(scores - ours) < 0.011).sum()


# cascade


def brute_force_cascade(first, second, network, fallback, rate, cost, asks):
    best = network.mean()
    for t1 in [-np.inf, *candidate_thresholds(first)[:-1]]:
        passed = first > t1
        for t2 in candidate_thresholds(second):
            routed = passed & (second > t2)
            runs = (passed if asks else routed).mean()
            if runs <= rate + 1e-9:
                best = min(best, np.where(routed, fallback, network).mean() + cost * runs)
    return best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 3.0]))
def test_cascade_equals_brute_force_over_all_pairs(seed, asks, rate, cost):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, 25).astype(float), rng.integers(0, 8, 25).astype(float)
    network, fallback = rng.exponential(15, (2, 25))
    fit = fit_cascade(first, second, network, fallback, rate, cost, asks)
    passed = first > fit.first
    routed = passed & (second > fit.second)
    runs = (passed if asks else routed).mean()
    value = np.where(routed, fallback, network).mean()
    assert value == pytest.approx(fit.mae) and runs == pytest.approx(fit.asked) and runs <= rate + 1e-9
    assert value + cost * runs == pytest.approx(brute_force_cascade(first, second, network, fallback, rate, cost, asks))


def test_cascade_without_a_first_stage_is_the_best_switch():
    rng = np.random.default_rng(3)
    second, network, fallback = rng.normal(size=200), *rng.exponential(15, (2, 200))
    fit = fit_cascade(np.zeros(200), second, network, fallback, rate=None, cost_deg=2.0, asks=False)
    c = CalibrationOutcomes(second, network, fallback, np.arange(200))
    assert fit.first == -np.inf and fit.second == CostAware(2.0).fit(c)
    with pytest.raises(ParameterError, match="rate"):
        fit_cascade(second, second, network, fallback, rate=30)


def test_cascade_pays_for_every_run_of_the_fallback(banks):
    calibration, test = banks
    scores = [{name: make_detector(name).score(part) for name in ("physics", "likelihood_ratio")} for part in banks]
    policy = Cascade(rate=0.3).fit(calibration, scores[0])
    assert policy.fitted.asked <= 0.3
    first, second = (np.quantile(part, level) for part, level in zip(scores[1].values(), (0.5, 0.9), strict=True))
    policy.fitted = CascadeFit(first, second, mae=0.0, asked=0.5)
    outcome = policy.apply(test, scores[1])
    assert (outcome.routed <= outcome.asked).all() and outcome.routed.sum() < outcome.asked.sum()
    assert outcome.cost_ms == pytest.approx(outcome.asked * test.column("fallback_cost_ms"))
    errors = outcome_errors(outcome, test)
    assert errors == pytest.approx(np.where(outcome.routed, test.column("fallback_error"), test.abs_errors))


# fusion


def test_fusion_is_the_network_at_zero_and_the_map_at_infinity(banks):
    calibration, test = banks
    nothing = Fusion(betas=(0.0,)).fit(calibration, {}).apply(test, {})
    assert np.array_equal(nothing.angles, test.predicted_angles) and not nothing.routed.any()
    assert outcome_errors(nothing, test) == pytest.approx(test.abs_errors)
    assert nothing.asked.all() and nothing.cost_ms == pytest.approx(test.column("fallback_cost_ms"))
    everything = Fusion(betas=(1e12,)).fit(calibration, {}).apply(test, {})
    evidence = clip_evidence(test)["evidence"]
    chosen = np.round(everything.angles / 5).astype(int) % 72
    assert evidence[np.arange(len(test)), chosen] == pytest.approx(evidence.max(1), abs=1e-6)  # ties in half precision


def test_fused_gaussians_are_the_textbook_product(banks):
    from dataclasses import replace

    calibration, _ = banks
    n, angles = len(calibration), np.arange(72) * 5.0
    # two von Mises densities: the product's mean is the angle of the sum of both vectors kappa·(cos, sin)
    rng = np.random.default_rng(0)
    mu, nu = rng.uniform(0, 360, n), rng.normal(0, 30, n)
    log_p = 4 * np.cos(np.radians(angles - mu[:, None]))
    maps = np.repeat(np.cos(np.radians(angles - (mu + nu)[:, None]))[:, None], 4, axis=1)
    p = np.exp(log_p)
    bank = replace(calibration, predictions=p / p.sum(1, keepdims=True), predicted_angles=map_peak_deg(log_p))
    bank = bank.with_fallback_maps(maps)
    beta = 2.0
    got = Fusion(betas=(beta,)).fit(bank, {}).apply(bank, {}).angles
    kappa = beta * np.sqrt(2)  # a cosine over the circle has standard deviation 1/√2
    vector = 4 * np.exp(1j * np.radians(mu)) + kappa * np.exp(1j * np.radians(mu + nu))
    assert angular_error_deg(got, np.degrees(np.angle(vector)))[np.abs(nu) > 15].max() < 0.1


def test_fusion_fits_on_calibration_and_beats_both(banks):
    calibration, test = banks
    clip, frame = (policy.fit(calibration, {}) for policy in (Fusion(), Fusion("frame")))
    for policy in (clip, frame):
        errors = outcome_errors(policy.apply(test, {}), test)
        assert errors.mean() < min(test.abs_errors.mean(), test.column("fallback_error").mean())
    doubt = clip.apply(test, {}).score
    assert ((doubt >= 0) & (doubt <= 1)).all()
    scores = [{"entropy": make_detector("entropy").score(part)} for part in banks]
    split = Fusion(split="entropy").fit(calibration, scores[0])
    ours, whole = (outcome_errors(policy.apply(calibration, scores[0]), calibration).mean() for policy in (split, clip))
    assert len(split.beta) == 2 and ours <= whole + 1e-9  # two are at least as good as one where they are fitted


@pytest.mark.parametrize("options", [{"level": "word"}, {"objective": "luck"}, {"betas": (-1.0,)}, {"betas": ()},
                                     {"level": "frame", "split": "entropy"}])
def test_fusion_parameters(options):
    with pytest.raises(ParameterError):
        Fusion(**options)


def test_maps_are_interpolated_across_north_as_their_fourier_series():
    fine = np.cos(np.radians(np.arange(360) - 358.3)) + 0.5 * np.sin(3 * np.radians(np.arange(360)))
    assert resample_circle(fine[None, ::5], 360)[0] == pytest.approx(fine, abs=1e-9)
    linear = np.interp(np.arange(360), np.r_[np.arange(0, 360, 5), 360], np.r_[fine[::5], fine[0]])
    assert np.abs(linear - fine).max() > 1e-3  # what the straight line between neighbours would miss


# frames


doubts = st.lists(st.lists(st.floats(0, 1, width=16), min_size=12, max_size=12), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(doubts, st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_hysteresis_never_switches_more_and_stays_its_time(rows, a, b, dwell):
    scores, (off, on) = np.array(rows), sorted((a, b))
    plain, calm, calmer = hysteresis(scores, on), hysteresis(scores, on, off), hysteresis(scores, on, off, dwell)
    assert np.array_equal(plain, scores > on)  # on = off, dwell 1: the switch
    assert (switches(calm) <= switches(plain)).all() and (switches(calmer) <= switches(calm)).all()
    for row in calmer:
        edges = np.flatnonzero(np.diff(np.r_[0, row.astype(int)]))
        assert (np.diff(edges) >= dwell).all()
    assert calm[scores > on].all() and not calm[scores <= off].any()


def test_hysteresis_faults():
    with pytest.raises(ParameterError, match="off <= on"):
        hysteresis(np.zeros((1, 3)), 0.2, 0.4)
    with pytest.raises(ParameterError, match="dwell"):
        hysteresis(np.zeros((1, 3)), 0.2, 0.1, 0)
    with pytest.raises(DataError, match="NaN"):
        hysteresis(np.full((1, 3), np.nan), 0.2)


def test_frames_of_a_policy_are_counted_by_hand(banks):
    calibration, test = banks
    policy = FrameRouting().fit(calibration, {})
    outcome, frames = policy.apply(test, {}), frame_answers(test)
    routed = hysteresis(frames.doubt, policy.on, policy.off, policy.dwell)
    answers = np.where(routed, frames.fallback, frames.network)
    assert outcome.frames["frame_mae"] == pytest.approx(angular_error_deg(answers, test.gt_angles[:, None]).mean())
    assert outcome.frames["switches"] == pytest.approx(np.mean(
        [sum(a != b for a, b in zip([False, *row[:-1]], row, strict=True)) for row in routed]))
    assert outcome.frames["oracle_frame_mae"] <= outcome.frames["frame_mae"] + 1e-9
    assert outcome.cost_ms == pytest.approx(routed.mean(1) * test.column("fallback_cost_ms"))
    own = policy.apply(calibration, {}).frames
    plain = FrameRouting(hysteretic=False).fit(calibration, {}).apply(calibration, {}).frames
    assert own["frame_mae"] <= min(own["network_frame_mae"], plain["frame_mae"]) + 0.02  # the pairs hold on = off


def test_medoid_and_peaks_live_on_the_circle():
    angles = np.array([[359.0, 1.0, 3.0, 180.0]])
    assert medoid_deg(angles, np.full((1, 4), 0.25))[0] == 1.0  # a plain median would say 91°
    assert medoid_deg(angles, np.array([[0.0, 0.0, 0.0, 1.0]]))[0] == 180.0
    directions = np.arange(72) * 5.0
    for truth in (0.0, 1.2, 178.9, 358.7):
        peak = map_peak_deg(np.cos(np.radians(directions - truth))[None])
        assert angular_error_deg(peak, truth)[0] < 0.05


# learning to defer


def test_features_of_both_maps_are_finite_blind_and_known(banks):
    calibration, test = banks
    numbers = defer_features(test)
    assert len(numbers) == 37 and all(np.isfinite(part).all() for part in numbers.values())
    assert numbers["disagreement"] == pytest.approx(angular_error_deg(test.predicted_angles,
                                                                      test.column("fallback_angle")))
    maps = np.asarray(test.fallback_maps, float).mean(1)
    at = [np.interp(a, np.r_[np.arange(72) * 5.0, 360], np.r_[m, m[0]]) for a, m in zip(test.predicted_angles, maps,
                                                                                       strict=True)]
    assert numbers["map_drop_at_network"] == pytest.approx(maps.max(1) - at, abs=1e-6)
    assert value_at(np.array([[0.0, 1, 0, 0]]), np.array([45.0]))[0] == 0.5
    assert peak_where(np.array([[9.0, 1, 5, 2]]), np.array([10.0]), 30, inside=False) == (5.0, 180.0)


def test_rich_deferral_gains_more_than_scores_alone(banks):
    calibration, test = banks
    gain = test.abs_errors - test.column("fallback_error")

    def won(name):
        score = make_detector(name).fit(calibration).score(test)
        return np.where(score > np.quantile(score, 0.7), gain, 0).mean()

    assert won("defer_rich") > 0.5 * np.maximum(gain, 0).mean() and won("defer_rich") > won("max_prob")
    one_sided = calibration.with_columns(fallback_error=calibration.abs_errors + 1e-3)
    with pytest.raises(DataError, match="defer_rich"):
        make_detector("defer_rich").fit(one_sided)


# fitting many at once


def test_shared_folds_give_what_single_fits_give(banks):
    calibration, test = banks
    names = [name for name in available_detectors(calibration)
             if name in ("entropy", "temperature", "mahalanobis", "knn", "vim", "she", "stack", "defer", "defer_rich")]
    together = fit_and_score([make_detector(name) for name in names], calibration, test)
    assert not together.left_out and list(together.test) == names
    for name in names:
        alone = held_out_scores(lambda name=name: make_detector(name), calibration)
        assert together.calibration[name] == pytest.approx(alone, rel=1e-4, abs=1e-5), name
        assert together.test[name] == pytest.approx(make_detector(name).fit(calibration).score(test), rel=1e-6)


def test_blocks_change_no_score(banks, monkeypatch):
    from ssl_kit.routing import fitting

    calibration, test = banks
    detectors = [make_detector(name).fit(calibration) for name in ("entropy", "knn", "vim", "defer_rich")]
    whole = score_all(detectors, test)
    monkeypatch.setattr(fitting, "BLOCK_ABOVE", 50)
    monkeypatch.setattr(fitting, "BLOCK", 32)
    for name, scores in score_all(detectors, test).items():
        assert scores == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    lazy = fit_and_score([make_detector("knn"), make_detector("vim")], calibration, test)
    assert lazy.test["vim"] == pytest.approx(whole["vim"], rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_view_of_rows_is_that_array(seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(9, 4, 3))
    rows = rng.integers(0, 9, 6)
    view, array = RowView(base, rows), base[rows]
    mask, pick = rng.random((6, 4)) > 0.5, rng.integers(0, 6, 3)
    for key in (slice(1, 5), slice(None, None, -1), 3, pick, mask[:, 0], mask, (pick, pick % 4), (slice(None), 2),
                (slice(0, 4), pick % 4), (pick, slice(1, 3)), ...):
        assert np.array_equal(view[key], array[key]), key
    assert view.shape == array.shape and view.size == array.size and np.array_equal(view.max(axis=2), array.max(axis=2))
    assert np.array_equal(np.exp(view) - view, np.exp(array) - array) and np.array_equal(np.asarray(view), array)


def test_large_choices_of_rows_stay_views_and_copy_nothing(banks, monkeypatch):
    from ssl_kit.routing import fitting

    monkeypatch.setattr(fitting, "_LAZY_BYTES", 1)
    calibration, _ = banks
    part = view_rows(view_rows(calibration, np.arange(0, 160, 2)), np.arange(40)).take(np.arange(40) % 2 == 0)
    assert isinstance(part.logits_pre_sig, RowView) and part.logits_pre_sig.base is calibration.logits_pre_sig
    assert np.array_equal(part.logits_pre_sig, calibration.logits_pre_sig[np.arange(0, 160, 2)[:40:2]])
    assert np.array_equal(part.abs_errors, calibration.abs_errors[:80:4])


class Fussy(Detector):
    "Fails as it is told to."
    learns = True

    def __init__(self, error):
        self.name, self.error = "fussy", error

    def fit(self, table):
        raise self.error

    def score(self, table):
        return np.zeros(len(table))


def test_what_cannot_be_fitted_is_named_and_what_is_broken_is_raised(raw):
    result = evaluate_study(*raw, detectors=["max_prob", Fussy(DataError("two failures, expected ten"))], n_draws=5,
                            policies=())
    assert result.left_out == {"fussy": "two failures, expected ten"} and list(result.methods) == ["max_prob"]
    with pytest.raises(ZeroDivisionError):
        evaluate_study(*raw, detectors=["max_prob", Fussy(ZeroDivisionError("a mistake"))], n_draws=5)
    with pytest.raises(DataError, match="none could be fitted"):
        evaluate_study(*raw, detectors=[Fussy(DataError("no"))], n_draws=5)


def test_a_calibration_set_without_failures_loses_f1_and_the_stack_alone(raw, tmp_path):
    calibration, calibration_srp, test, test_srp = raw
    easy = calibration.take(calibration.abs_errors <= 30)
    result = evaluate_study(easy, calibration_srp, test, test_srp, ["max_prob", "stack"], n_draws=5, policies=())
    assert set(result.left_out) == {"stack", "threshold f1"}
    assert set(result.methods["max_prob"].thresholds) == {rule.name for rule in STUDY_THRESHOLDS} - {"f1"}
    assert set(pd.read_csv(result.save(tmp_path)["left_out"])["name"]) == set(result.left_out)
    whole = evaluate_study(*raw, detectors=["max_prob"], n_draws=5, policies=())
    assert "left_out" not in whole.save(tmp_path) and not (tmp_path / "left_out.csv").exists()


# the study


def test_policies_stand_in_the_same_tables(raw):
    result = evaluate_study(*raw, detectors=["entropy", "physics", "likelihood_ratio", "max_prob"], n_draws=50)
    policies = result.hybrid[result.hybrid["kind"] == "policy"].set_index("method")
    assert set(policies.index) == {"cascade_physics_likelihood_ratio", "fusion", "fusion_frame", "fusion_entropy",
                                   "frames", "frames_plain"}
    for name, (policy, outcome) in result.policies.items():
        errors, row = outcome_errors(outcome, result.test), policies.loc[name]
        assert row["mae"] == pytest.approx(errors.mean()) and row["threshold"] == policy.threshold
        assert row["mae_low"] <= row["mae"] <= row["mae_high"]
        assert row["asked"] == outcome.asked.mean() and row["cost_ms"] == pytest.approx(outcome.cost_ms.mean())
        column = f"error_{name}_{policy.threshold}"
        assert result.decisions[column].to_numpy() == pytest.approx(errors)
    assert (policies.loc[["fusion", "fusion_frame"], "asked"] == 1).all()
    assert set(result.frames["policy"]) == {"frames", "frames_plain"}
    marked = result.hybrid.set_index("threshold")["sees_stream"]
    assert marked.loc["stream_rate_30"].all() and not marked.drop("stream_rate_30").any()
    rates = result.hybrid.query("threshold == 'stream_rate_30'")["rate"]
    assert rates.to_numpy() == pytest.approx(np.full(len(rates), 0.3), abs=0.01)
    assert (result.costs()["score_ms"] >= 0).all()


def test_a_chosen_policy_without_its_detectors_is_an_error(raw):
    with pytest.raises(DataError, match="cascade.*likelihood_ratio"):
        evaluate_study(*raw, detectors=["max_prob"], n_draws=5, policies=[Cascade()])


def test_a_policy_that_cannot_be_fitted_is_named(banks):
    class Hopeless(Policy):
        name = "hopeless"

        def fit(self, table, scores):
            raise DataError("nothing to learn from")

    assert policy_outcomes([Hopeless()], {}, *banks) == ({}, {"hopeless": "nothing to learn from"})


def test_protocols_share_one_table_and_refuse_unknown_names(raw):
    calibration, calibration_srp, test, test_srp = raw
    results = evaluate_protocols({"in_distribution": (calibration, calibration_srp)}, test, test_srp,
                                 detectors=["max_prob", "knn"], n_draws=20, policies=())
    assert list(results.studies) == ["in_distribution", "leaky"]
    assert set(results.hybrid["protocol"]) == set(results.detection["protocol"]) == {"in_distribution", "leaky"}
    single = evaluate_study(*raw, detectors=["max_prob", "knn"], n_draws=20, policies=())
    pd.testing.assert_frame_equal(results["in_distribution"].hybrid, single.hybrid)
    with pytest.raises(ParameterError, match="honest"):
        evaluate_protocols({"honest": (calibration, calibration_srp)}, test, test_srp)
    with pytest.raises(DataError, match="overlap"):
        evaluate_protocols({"shifted": (test, test_srp)}, test, test_srp, detectors=["max_prob"], leaky=False)


def test_measured_cost_is_that_of_an_empty_cache(banks):
    _, test = banks
    detector = make_detector("entropy")
    detector.score(test)
    assert measured_score_ms(detector, test, n=32) > 0
    fitted = fit_and_score([detector], *banks)
    methods, left_out = with_thresholds(fitted, [detector], *banks, (F1Best(), TargetRate(0.2)), 30.0)
    assert list(methods["entropy"].thresholds) == ["f1", "rate_20"] and not left_out


def test_pages_of_a_mapped_bank_are_given_back_and_come_back_the_same(raw, tmp_path, monkeypatch):
    from ssl_kit.routing import fitting
    from ssl_kit.routing.bank import load_bank, save_bank

    monkeypatch.setattr(fitting, "BLOCK_ABOVE", 50)
    # members of more than 1 MB are mapped: repeat the frames until they are
    bank = raw[0]
    from dataclasses import replace
    wide = replace(bank, logits_pre_sig=np.tile(bank.logits_pre_sig, (1, 8, 1)),
                   penultimate_features=np.tile(bank.penultimate_features, (1, 8, 1)))
    mapped = load_bank(save_bank(wide, tmp_path / "bank.npz"), memory_map=True)
    assert isinstance(mapped.logits_pre_sig, np.memmap)
    before = np.array(mapped.logits_pre_sig)
    fitting.release_pages(mapped)
    assert np.array_equal(mapped.logits_pre_sig, before)
    fitting.release_pages(view_rows(mapped, np.arange(100)))
