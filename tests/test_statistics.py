"""Cluster bootstrap, many methods, ranks: closed forms, brute force, scipy, published values, properties, faults."""
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, false_discovery_control, friedmanchisquare

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.statistics import (
    Interval,
    adjust_p_values,
    bootstrap_p_value,
    cluster_bootstrap,
    cluster_weights,
    critical_difference,
    draws_needed,
    friedman_test,
    mean_ranks,
    paired_difference,
    percentile_interval,
    simultaneous_interval,
    weighted_mean,
    weighted_median,
    weighted_ratio,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_weights_equal_brute_force(n_clusters, per_cluster, seed):
    rng = np.random.default_rng(seed)
    index = np.concatenate([np.arange(n_clusters), rng.integers(0, n_clusters, n_clusters * per_cluster)])
    values = rng.integers(0, 5, size=(len(index), 2)).astype(float)  # ties on purpose
    weights = cluster_weights(n_clusters, 7, seed)
    repeated = [np.repeat(values, draw[index], axis=0) for draw in weights]
    assert np.allclose(weighted_mean(values, index, weights), [r.mean(axis=0) for r in repeated])
    assert np.array_equal(weighted_median(values, index, weights), [np.median(r, axis=0) for r in repeated])


def test_ratio_is_ratio_of_sums_and_nan_for_nothing():
    index = np.array([0, 0, 1, 1])
    top, bottom = np.array([[1.0], [0], [1], [1]]), np.array([[1.0], [1], [1], [1]])
    weights = np.array([[1, 1], [2, 0]])
    assert np.allclose(weighted_ratio(top, bottom, index, weights)[:, 0], [0.75, 0.5])
    assert np.isnan(weighted_ratio(top * 0, bottom * 0, index, weights)).all()


def test_singleton_clusters_agree_with_scipy_percentile_bootstrap():
    values = np.random.default_rng(3).exponential(size=300)
    ours = cluster_bootstrap(values, np.arange(300), n_draws=4000, seed=1)
    peer = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", vectorized=True,
                     rng=np.random.default_rng(2)).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((peer.low, peer.high), abs=0.012)


def test_interval_width_follows_cluster_variance():
    # with m clusters of equal size and offsets of variance s², the standard error of the mean is s/sqrt(m)
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(400), 3)
    values = rng.normal(size=400)[groups]
    interval = cluster_bootstrap(values, groups, n_draws=2000)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(1 / 20, rel=0.12)


def test_coverage_is_near_the_level():
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 5)
        values = rng.normal(size=40)[groups] + rng.normal(size=200)
        interval = cluster_bootstrap(values, groups, n_draws=300, seed=seed)
        inside += interval.low <= 0 <= interval.high
    assert 0.88 <= inside / 200 <= 0.99


def test_callable_equals_builtin_and_columns_share_draws():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(60, 2)), np.repeat(np.arange(12), 5)
    named = cluster_bootstrap(values, groups, "mean", 100)
    called = cluster_bootstrap(values, groups, lambda rows: rows.mean(axis=0), 100)
    for part in ("estimate", "low", "high"):
        assert np.allclose(getattr(named, part), getattr(called, part))
    single = cluster_bootstrap(values[:, 1], groups, "mean", 100)
    assert single.low == pytest.approx(named.low[1])


def test_paired_difference_is_antisymmetric_and_tighter_than_unpaired():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 10)
    shared = 5 * rng.normal(size=30)[groups]
    a, b = shared + rng.normal(size=300) * 0.1, shared + rng.normal(size=300) * 0.1 - 0.5
    forth, back = paired_difference(a, b, groups), paired_difference(b, a, groups)
    assert forth.estimate == pytest.approx(-back.estimate)
    assert forth.low == pytest.approx(-back.high)
    alone = cluster_bootstrap(a, groups)
    assert (forth.high - forth.low) < 0.1 * (alone.high - alone.low)
    assert forth.excludes_zero and not paired_difference(a, a, groups).excludes_zero


def test_same_seed_same_interval():
    values, groups = np.arange(50.0), np.repeat(np.arange(10), 5)
    assert cluster_bootstrap(values, groups, seed=4) == cluster_bootstrap(values, groups, seed=4)


def test_string_groups_and_printing():
    interval = cluster_bootstrap([1.0, 2, 3, 4], ["a", "a", "b", "b"], n_draws=50)
    assert interval.n_groups == 2 and "[" in str(interval)
    assert "," in str(Interval(np.ones(2), np.zeros(2), np.ones(2)))


def test_percentiles_skip_missing_draws():
    draws = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = percentile_interval(draws, 0.5)
    assert (low[0], high[0]) == (1.5, 2.5) and np.isnan(low[1]) and np.isnan(high[1])


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"groups": [0, 0, 0]}, DataError, "two clusters"),
    ({"groups": [0, 1]}, DataError, "groups"),
    ({"values": [1.0, np.nan, 2.0]}, DataError, "values"),
    ({"statistic": "mode"}, ParameterError, "statistic"),
    ({"n_draws": 0}, ParameterError, "n_draws"),
    ({"level": 95}, ParameterError, "level"),
])
def test_faults_name_the_argument(change, error, words):
    arguments = {"values": [1.0, 2.0, 3.0], "groups": [0, 1, 1], "n_draws": 10} | change
    with pytest.raises(error, match=words):
        cluster_bootstrap(**arguments)


def test_paired_shapes_must_agree():
    with pytest.raises(DataError, match="a and b"):
        paired_difference(np.ones(3), np.ones(4), [0, 1, 1])


def test_thousand_draws_of_twenty_methods_take_seconds():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=(2009, 20)), rng.integers(0, 80, 2009)
    start = time.process_time()
    cluster_bootstrap(values, groups, "mean")
    cluster_bootstrap(values, groups, "median")
    assert time.process_time() - start < 8  # about 0.6 s on two idle cores


# many methods


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrections_agree_with_scipy_and_keep_their_order(p_values):
    p = np.array(p_values)
    holm, bh, by = (adjust_p_values(p, method) for method in ("holm", "bh", "by"))
    assert np.allclose(bh, false_discovery_control(p, method="bh"))
    assert np.allclose(by, false_discovery_control(p, method="by"))
    assert (holm >= p).all() and (bh >= p - 1e-15).all() and (bh <= holm + 1e-15).all() and (bh <= by + 1e-15).all()
    assert (holm <= np.minimum(1, p * len(p)) + 1e-15).all()  # Bonferroni


def test_holm_by_hand():
    # sorted 0.005 ·4, 0.01 ·3, 0.03 ·2 = 0.06, 0.04 ·1 = 0.04 → raised to 0.06
    assert np.allclose(adjust_p_values([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    with_gap = adjust_p_values([0.01, np.nan, 0.04, 0.03, 0.005])
    assert np.isnan(with_gap[1]) and np.allclose(np.delete(with_gap, 1), [0.03, 0.06, 0.06, 0.02])


def test_bootstrap_p_value_closed_form_and_identity():
    draws = np.array([-1.0, 1, 2, 3, 4, 5, 6, 7, 8])  # one of nine on the other side: 2 (1 + 1) / (9 + 1)
    assert bootstrap_p_value(draws) == pytest.approx(0.4)
    assert bootstrap_p_value(-draws) == pytest.approx(0.4)
    assert bootstrap_p_value(np.zeros(99)) == 1.0
    assert bootstrap_p_value(np.ones(99)) == pytest.approx(0.02)  # never zero
    gaps = np.stack([np.r_[np.nan, draws], np.full(10, np.nan)], axis=1)
    assert bootstrap_p_value(gaps)[0] == pytest.approx(0.4) and np.isnan(bootstrap_p_value(gaps)[1])


def test_thousand_draws_cannot_tell_forty_methods_apart():
    # the trap: every difference is as clear as can be, and Holm keeps none
    def survivors(n_draws):
        return (adjust_p_values(bootstrap_p_value(np.ones((n_draws, 40)))) <= 0.05).sum()

    assert survivors(1000) == 0 and survivors(draws_needed(40)) == 40 and survivors(draws_needed(40) - 1) == 0


def test_p_values_are_near_uniform_without_a_difference():
    p = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 4)
        values = rng.normal(size=40)[groups] + rng.normal(size=160)
        index, n = np.arange(40).repeat(4), 40
        p.append(bootstrap_p_value(weighted_mean(values[:, None], index, cluster_weights(n, 400, seed)))[0])
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.10 and 0.4 <= np.mean(np.array(p) <= 0.5) <= 0.6


def test_max_t_covers_all_methods_at_once_where_single_intervals_do_not():
    together = one_by_one = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(40, 10))
        draws = weighted_mean(values, np.arange(40), cluster_weights(40, 400, seed))
        both = simultaneous_interval(values.mean(axis=0), draws)
        low, high = percentile_interval(draws)
        together += ((both.low <= 0) & (both.high >= 0)).all()
        one_by_one += ((low <= 0) & (high >= 0)).all()
    assert together / 150 > 0.86 and one_by_one / 150 < 0.72


def test_max_t_of_one_method_is_a_plain_t_and_constants_do_not_count():
    rng = np.random.default_rng(0)
    draws = 3 + 2 * rng.normal(size=(20_000, 1))
    alone = simultaneous_interval([3.0], draws)
    assert alone.critical == pytest.approx(1.96, abs=0.04) and alone.high[0] == pytest.approx(3 + 2 * 1.96, abs=0.1)
    beside = simultaneous_interval([3.0, 0.0, 1.0], np.hstack([draws, np.zeros_like(draws), np.ones_like(draws)]))
    assert beside.critical == pytest.approx(alone.critical)
    assert (beside.low[1], beside.high[1], beside.p_values[1]) == (0, 0, 1)
    assert beside.p_values[2] == pytest.approx(1 / 20_001)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(3, 7), st.integers(0, 10_000))
def test_friedman_equals_scipy_with_ties(n_blocks, n_methods, seed):
    losses = np.random.default_rng(seed).integers(0, 6, (n_blocks, n_methods)).astype(float)
    peer = friedmanchisquare(*losses.T)
    ours = friedman_test(losses)
    if np.isfinite(peer.statistic):
        assert (ours.chi2, ours.p_value) == pytest.approx((peer.statistic, peer.pvalue), abs=1e-9)
    assert ours == friedman_test(np.exp(losses) * np.arange(1, n_blocks + 1)[:, None])  # ranks alone count


def test_friedman_example_of_demsar():
    # table 6: ranks on 14 data sets whose means are 3.143, 2.000, 2.893, 1.964; χ² = 9.28 and F = 3.69 in section 3.2.2
    auc = np.array([[0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
                    [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
                    [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
                    [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
                    [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970]])
    assert mean_ranks(-auc) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=0.001)
    # the paper leaves out the correction for ties, which makes χ² a little larger
    ranks = mean_ranks(-auc)
    assert 12 * 14 / 20 * ((ranks**2).sum() - 25) == pytest.approx(9.28, abs=0.01)
    assert friedman_test(-auc).chi2 == pytest.approx(friedmanchisquare(*auc.T).statistic)
    assert friedman_test(-auc).chi2 > 9.28


@pytest.mark.parametrize(("alpha", "published"), [
    (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
    (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920])])
def test_critical_difference_equals_the_published_q(alpha, published):
    for k, q in enumerate(published, start=2):
        assert critical_difference(k, 10, alpha) / np.sqrt(k * (k + 1) / 60) == pytest.approx(q, abs=1.1e-3)


def test_perfect_agreement_and_no_difference():
    assert friedman_test(np.ones((6, 3))).p_value == 1
    same_order = friedman_test(np.tile([1.0, 2, 3], (6, 1)))
    assert same_order.chi2 == pytest.approx(12) and same_order.f == np.inf and same_order.p_value_f == 0


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: adjust_p_values([0.1], "sidak"), ParameterError, "holm"),
    (lambda: adjust_p_values([1.2]), DataError, "p_values"),
    (lambda: draws_needed(0), ParameterError, "n_methods"),
    (lambda: simultaneous_interval(np.zeros(2), np.zeros((5, 3))), DataError, "draws"),
    (lambda: simultaneous_interval(np.zeros(1), np.full((5, 1), np.nan)), DataError, "fewer than two"),
    (lambda: simultaneous_interval(np.zeros(1), np.zeros((5, 1)), 95), ParameterError, "level"),
    (lambda: friedman_test(np.ones((1, 3))), DataError, "losses"),
    (lambda: mean_ranks(np.array([[1.0, np.nan], [1, 2]])), DataError, "leave out rooms"),
    (lambda: critical_difference(1, 5), ParameterError, "n_methods"),
])
def test_faults_of_many_methods_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
