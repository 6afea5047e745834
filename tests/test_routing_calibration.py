"""Maps, reliability, calibration errors, failure classes, where the gain goes: peers, closed forms, traps, faults."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing.calibration import (
    calibration_errors,
    equal_mass_bins,
    fit_confidence,
    raw_confidence,
    reliability,
)
from ssl_kit.routing.failure_classes import (
    ERROR_CLASSES,
    class_table,
    confidently_wrong,
    decompose_gain,
    error_class,
    gain_by_class,
)
from ssl_kit.routing.policies import routing_curve, system_errors
from ssl_kit.routing.thresholds import candidate_thresholds

seeds = st.integers(0, 10_000)


def sample(seed=0, n=300, n_rooms=20):
    rng = np.random.default_rng(seed)
    truth = rng.beta(2, 1, n)
    return truth, rng.random(n) < truth, rng.integers(0, n_rooms, n), rng


# maps


@given(seeds)
def test_isotonic_equals_sklearn_and_both_maps_fall(seed):
    truth, right, _, rng = sample(seed, 120)
    scores = -truth + 0.3 * rng.normal(size=120)
    grid = np.linspace(-3, 3, 50)
    peer = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(scores, right)
    assert np.allclose(fit_confidence(scores, right)(grid), peer.predict(grid))
    for kind in ("isotonic", "logistic"):
        values = fit_confidence(scores, right, kind)(grid)
        assert (np.diff(values) <= 1e-12).all() and values.min() >= 0 and values.max() <= 1


def test_logistic_is_platts_sigmoid():
    peer = pytest.importorskip("sklearn.calibration")
    if not hasattr(peer, "_SigmoidCalibration"):
        pytest.skip("this scikit-learn keeps Platt's sigmoid elsewhere")
    truth, right, _, rng = sample(1)
    scores = -5 * truth + rng.normal(size=300) + 100
    theirs = peer._SigmoidCalibration().fit(scores, right)
    assert np.allclose(fit_confidence(scores, right, "logistic")(scores), theirs.predict(scores), atol=2e-4)


def test_separable_classes_do_not_make_the_sigmoid_a_step():
    # the trap: without Platt's targets the slope runs off to infinity, and 1 error costs everything
    scores, right = np.r_[np.zeros(20), np.ones(20)], np.r_[np.ones(20, bool), np.zeros(20, bool)]
    ends = fit_confidence(scores, right, "logistic")(np.array([0.0, 1.0]))
    assert ends == pytest.approx([21 / 22, 1 / 22], abs=1e-3)


@pytest.mark.parametrize("kind", ["isotonic", "logistic"])
def test_a_score_that_is_upside_down_gives_no_confidence(kind):
    right = np.tile([True, False, True], 30)
    values = fit_confidence(right + 0.01 * np.arange(90), right, kind)(np.array([-5.0, 0, 5]))
    assert np.ptp(values) < 0.25
    assert np.ptp(fit_confidence(right.astype(float), right, kind)(np.array([0.0, 1]))) == 0


def test_maps_ignore_the_scale_of_a_score():
    truth, right, _, rng = sample(2)
    scores = -truth + 0.2 * rng.normal(size=300)
    for kind in ("isotonic", "logistic"):
        one = fit_confidence(scores, right, kind)(scores)
        other = fit_confidence(1e4 * scores - 7e5, right, kind)(1e4 * scores - 7e5)
        assert np.allclose(one, other, atol=1e-4)


# reliability


@given(seeds, st.integers(1, 12))
def test_bins_are_of_equal_mass_and_never_split_ties(seed, n_bins):
    rng = np.random.default_rng(seed)
    bins = equal_mass_bins(rng.permutation(12 * n_bins).astype(float), n_bins)
    assert (np.bincount(bins) == 12).all()
    tied = rng.integers(0, 4, 60) / 4
    bins = equal_mass_bins(tied, n_bins)
    assert all(len(set(bins[tied == value])) == 1 for value in np.unique(tied))
    assert set(bins) == set(range(bins.max() + 1))


def test_reliability_equals_sklearn_on_distinct_confidences():
    truth, right, rooms, _ = sample(3)
    ours = reliability(truth, right, rooms, n_bins=10, n_draws=50)
    right_share, mean_confidence = calibration_curve(right, truth, n_bins=10, strategy="quantile")
    assert np.allclose(ours["confidence"], mean_confidence) and np.allclose(ours["right"], right_share)
    assert (ours["right_low"] <= ours["right"]).all() and (ours["right"] <= ours["right_high"]).all()


def test_bands_know_that_rooms_share_their_luck():
    rng = np.random.default_rng(0)
    rooms = np.repeat(np.arange(20), 50)
    right = rng.random(1000) < np.repeat(rng.beta(1, 1, 20), 50)
    band = [reliability(np.full(1000, 0.5), right, groups).iloc[0] for groups in (rooms, np.arange(1000))]
    assert (band[0].right_high - band[0].right_low) > 3 * (band[1].right_high - band[1].right_low)


# calibration errors


def test_brier_equals_sklearn_and_closed_forms():
    truth, right, rooms, _ = sample(4)
    found = calibration_errors(truth, right, rooms, n_draws=20)
    assert found["brier"] == pytest.approx(brier_score_loss(right, truth))
    base = calibration_errors(np.full(300, right.mean()), right, rooms, n_draws=20)
    assert base["brier_skill"] == pytest.approx(0) and base["ece"] == pytest.approx(0)
    sure = calibration_errors(right.astype(float), right, rooms, n_draws=20)
    assert sure["brier"] == sure["ece"] == sure["ce2"] == sure["ece_chance"] == 0 and sure["brier_skill"] == 1


@given(seeds)
def test_debiased_error_equals_all_pairs_of_other_rooms(seed):
    truth, right, rooms, _ = sample(seed, 60, 6)
    bins, residual = equal_mass_bins(truth, 4), right - truth
    expected = 0.0
    for number in range(4):
        inside = np.flatnonzero(bins == number)
        pairs = [residual[i] * residual[j] for i in inside for j in inside if rooms[i] != rooms[j]]
        expected += len(inside) / 60 * np.mean(pairs)
    assert calibration_errors(truth, right, rooms, 4, n_draws=2)["ce2"] == pytest.approx(expected, abs=1e-12)


def test_plain_ece_is_biased_up_and_the_debiased_error_is_not():
    # the trap: a perfect confidence, 100 recordings; a plain ECE would call it 13 % off
    rng = np.random.default_rng(0)
    rows = [calibration_errors(truth, rng.random(100) < truth, n_draws=1) for truth in rng.beta(2, 1, (300, 100))]
    mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
    assert mean["ece"] > 0.10 and mean["ece"] == pytest.approx(mean["ece_chance"], rel=0.05)
    assert abs(mean["ce2"]) < 0.0015 < mean["ece"] ** 2 / 5


def test_debiased_error_is_unbiased_with_rooms_where_one_that_ignores_them_is_not():
    # rooms are easy or hard, and the confidence does not know: calibrated on average, residuals shared within a room
    rng = np.random.default_rng(1)
    rooms, with_rooms, without = np.repeat(np.arange(25), 8), [], []
    for _ in range(200):
        right = rng.random(200) < np.repeat(rng.beta(1, 1, 25), 8)
        confidence = 0.5 + 1e-6 * rng.random(200)
        with_rooms.append(calibration_errors(confidence, right, rooms, 1, n_draws=1)["ce2"])
        without.append(calibration_errors(confidence, right, None, 1, n_draws=1)["ce2"])
    assert abs(np.mean(with_rooms)) < 0.0012 and np.mean(without) > 0.002


def test_a_known_miscalibration_is_measured():
    rng = np.random.default_rng(2)
    truth = rng.uniform(0.2, 0.8, 20_000)
    found = calibration_errors(truth + 0.1, rng.random(20_000) < truth, np.arange(20_000) % 200, n_draws=200)
    assert found["ce"] == pytest.approx(0.1, abs=0.012) and found["ece"] == pytest.approx(0.1, abs=0.012)
    assert found["ce2_low"] < 0.01 < found["ce2_high"] and found["ce2_low"] > 0.006


# classes


def test_every_error_has_one_class_and_edges_belong_below():
    assert error_class(np.array([0, 5, 5.001, 10, 10.001, 25, 30, 30.001, 180])).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert [*ERROR_CLASSES] == ["good", "5–10°", "moderate", "25–30°", "catastrophic"]


def errors_and_rooms(seed=0, n=400, n_rooms=25):
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[0.6, 0.15, 0.25])
    errors = np.choose(kind, [rng.uniform(0, 5, n), rng.uniform(10.1, 25, n), rng.uniform(31, 180, n)])
    return errors, rng.integers(0, n_rooms, n), kind, rng


def test_class_table_by_hand():
    errors, rooms, kind, rng = errors_and_rooms()
    confidence = rng.normal(size=400) - kind
    table = class_table({"a": confidence, "b": -confidence}, errors, rooms, n_draws=100)
    row = table[(table["confidence"] == "a") & (table["class"] == "catastrophic")].iloc[0]
    assert row["n"] == (kind == 2).sum() and row["mean"] == pytest.approx(confidence[kind == 2].mean())
    assert row["q50"] == pytest.approx(np.median(confidence[kind == 2])) and row["mean_low"] < row["mean"]
    pairs = confidence[kind == 2][:, None] < confidence[kind == 0]
    assert row["auroc_good"] == pytest.approx(pairs.mean())
    assert np.isnan(table[table["class"] == "5–10°"]["mean"]).all()
    assert (table.groupby("confidence")["n"].sum() == 400).all()


def test_none_of_nine_is_no_sure_zero():
    # the trap: every draw of rooms shows no confident failure, and a percentile interval would be [0, 0]
    errors = np.r_[np.full(91, 2.0), np.full(9, 90.0)]
    table = confidently_wrong(np.r_[np.linspace(0.5, 1, 91), np.zeros(9)], errors, np.arange(100), n_draws=50)
    row = table.set_index("class").loc["catastrophic"]
    peer = binomtest(0, 9).proportion_ci(method="exact")
    assert (row["share"], row["share_low"], row["share_high"]) == pytest.approx((0, peer.low, peer.high))
    rooms = np.arange(100) % 30  # nine recordings in nine rooms; three bins are right throughout
    table = reliability(np.arange(100) / 100, np.arange(100) >= 25, rooms, n_bins=4, n_draws=50)
    assert (table["right_low"] < 1).all() and table["right_high"].iloc[0] > 0


def test_class_table_bounds_the_chance_to_tell_classes_apart():
    errors, rooms, kind, rng = errors_and_rooms(5)
    table = class_table({"blind": rng.random(400), "sees": -errors}, errors, rooms, n_draws=200)
    rows = table[table["class"] == "catastrophic"].set_index("confidence")
    assert rows["auroc_good_low"]["blind"] < 0.5 < rows["auroc_good_high"]["blind"] and rows["auroc_good"]["sees"] == 1
    assert table[table["class"] == "good"]["auroc_good"].isna().all()


def test_confidently_wrong_counts_a_quarter_and_knows_another_bar():
    errors, rooms, kind, rng = errors_and_rooms(1)
    table = confidently_wrong(rng.random(400), errors, rooms, n_draws=200)
    assert table["confident"].sum() == 100 and table["of_confident"].sum() == pytest.approx(1)
    good = table.iloc[0]
    assert good["share_low"] < 0.25 < good["share_high"] and good["share"] == good["confident"] / (kind == 0).sum()
    sure_and_wrong = confidently_wrong((kind == 1).astype(float), errors, rooms, threshold=0.5, n_draws=50).iloc[2]
    assert sure_and_wrong["share"] == sure_and_wrong["of_confident"] == sure_and_wrong["share_high"] == 1
    nobody = confidently_wrong(np.zeros(400), errors, rooms, threshold=0.5, n_draws=50)
    assert nobody["confident"].sum() == 0 and nobody["of_confident"].isna().all()


# where the gain goes


@given(seeds)
def test_decomposition_equals_brute_force_and_adds_up(seed):
    errors, rooms, _, rng = errors_and_rooms(seed, 80, 8)
    fallback = rng.exponential(15, 80).clip(0, 180)
    scores = np.round(errors / 60 + rng.normal(size=80), 1)  # ties on purpose
    value = decompose_gain(scores, 0.5, errors, fallback, rooms, n_draws=65).set_index("quantity")["value"]
    hybrids = [system_errors(scores > t, errors, fallback).mean() for t in candidate_thresholds(scores)]
    assert value["best_of_ranking"] == pytest.approx(errors.mean() - min(hybrids))
    assert value["ceiling"] == pytest.approx(errors.mean() - np.minimum(errors, fallback).mean())
    assert value["hybrid_mae"] == pytest.approx(system_errors(scores > 0.5, errors, fallback).mean())
    assert value["ceiling"] - value["lost_by_ranking"] - value["lost_by_threshold"] == pytest.approx(value["gain"])
    assert value[["lost_by_ranking", "lost_by_threshold"]].min() >= -1e-9
    curve = routing_curve(scores, errors, fallback, np.arange(81) / 80).mae  # its corners are the thresholds
    assert errors.mean() - value["best_of_ranking"] == pytest.approx(curve.min())


def test_decomposition_names_the_culprit():
    errors, rooms, _, rng = errors_and_rooms(3)
    fallback = rng.exponential(8, 400).clip(0, 180)

    def parts(scores, threshold, answers=fallback):
        return decompose_gain(scores, threshold, errors, answers, rooms, 100).set_index("quantity")["value"]

    oracle = parts(errors - fallback, 0.0)
    assert oracle["lost_by_ranking"] == pytest.approx(0) and oracle["lost_by_threshold"] == pytest.approx(0)
    late = parts(errors - fallback, 1e9)
    assert late["gain"] == 0 and late["lost_by_threshold"] == pytest.approx(late["ceiling"])
    noise = parts(rng.normal(size=400), 1e9, rng.permutation(errors))  # as good a fallback, and a score of nothing
    assert noise["lost_by_ranking"] > 0.8 * noise["ceiling"] and noise["gain_of_luck"] == 0
    same = parts(errors - fallback, 0.0, errors)
    assert same["ceiling"] == same["fallback_better"] == same["gain"] == 0 and np.isnan(same["gain_where_better"])


def test_classes_add_up_to_the_ceiling():
    errors, rooms, kind, rng = errors_and_rooms(4)
    fallback = rng.exponential(20, 400).clip(0, 180)
    table = gain_by_class(errors, fallback, rooms, n_draws=100).set_index("class")
    assert table["ceiling"].iloc[:-1].sum() == pytest.approx(table["ceiling"]["all"])
    assert table["fallback_better"]["moderate"] == pytest.approx((fallback < errors)[kind == 1].mean())
    assert table["gain_if_routed"]["all"] == pytest.approx((errors - fallback).mean())
    assert (table["ceiling_low"].dropna() <= table["ceiling"]).all()


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: fit_confidence(np.zeros(3), np.ones(3, bool)), DataError, "both"),
    (lambda: fit_confidence(np.zeros(3), np.array([1, 0, 1]), "spline"), ParameterError, "isotonic"),
    (lambda: fit_confidence(np.array([0, np.nan, 1]), np.array([1, 0, 1])), DataError, "finite"),
    (lambda: fit_confidence(np.zeros(2), np.array([1, 0]))(np.array([np.nan])), DataError, "scores"),
    (lambda: raw_confidence(np.array([3.0, 4.0])), DataError, "no raw confidence"),
    (lambda: reliability(np.array([0.5, 1.5]), np.array([0, 1]), [0, 1]), DataError, "fit_confidence"),
    (lambda: reliability(np.array([0.5, 0.6]), np.array([0, 1]), [0, 0]), DataError, "two clusters"),
    (lambda: equal_mass_bins(np.zeros(3), 0), ParameterError, "n_bins"),
    (lambda: calibration_errors(np.array([0.1, 0.2, 0.8]), np.array([0, 1, 1]), [0, 1, 2], 3), DataError, "two rooms"),
    (lambda: error_class(np.array([-1.0])), DataError, "errors_deg"),
    (lambda: confidently_wrong(np.zeros(2), np.zeros(2), [0, 1], 75), ParameterError, "quantile"),
    (lambda: decompose_gain(np.array([np.nan, 1]), 0, np.zeros(2), np.zeros(2), [0, 1]), DataError, "scores"),
])
def test_faults_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_raw_confidence_of_max_prob():
    assert raw_confidence(np.array([-0.25, -1.0, 1e-9])).tolist() == [0.25, 1.0, 0.0]
    assert fit_confidence(np.zeros(3), np.ones(3, bool), "raw")(np.array([-0.3]))[0] == pytest.approx(0.3)
