"""Cluster bootstrap: closed forms, brute-force peers, scipy, properties, faults."""
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.statistics import (
    Interval,
    cluster_bootstrap,
    cluster_weights,
    paired_difference,
    percentile_interval,
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
    start = time.perf_counter()
    cluster_bootstrap(values, groups, "mean")
    cluster_bootstrap(values, groups, "median")
    assert time.perf_counter() - start < 8  # about 0.6 s on two idle cores
