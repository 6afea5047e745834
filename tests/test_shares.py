"""Intervals of shares: what nobody missed in a dozen rooms is no certainty, wherever a share is reported."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ssl_kit.fewshot.comparison import headline_row, score_rows
from ssl_kit.fewshot.evaluation import Counts, f_difference, f_interval
from ssl_kit.lab.errors import DataError
from ssl_kit.lab.shares import cluster_share
from ssl_kit.lab.statistics import cluster_bootstrap
from ssl_kit.localize.evaluation import evaluate
from ssl_kit.routing.failure_classes import class_table, gain_by_class


@given(st.integers(2, 60), st.booleans(), st.sampled_from([0.8, 0.95, 0.99]))
def test_unanimous_clusters_get_the_exact_binomial_bound(n, hit, level):
    found = cluster_share(np.full(3 * n, hit), np.repeat(np.arange(n), 3), n_draws=20, level=level)
    exact = binomtest(n if hit else 0, n).proportion_ci(level, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.estimate == float(hit) and found.n_groups == n


def test_a_share_between_is_the_bootstraps():
    rng = np.random.default_rng(0)
    hits, groups = rng.random(200) < 0.8, rng.integers(0, 30, 200)
    assert cluster_share(hits, groups, seed=4) == cluster_bootstrap(hits.astype(float), groups, seed=4)


def test_trap_a_bootstrap_of_agreeing_rooms_is_certain_of_itself():
    """The interval [1, 1] once stood in the headline of the near field's benchmark."""
    hits, groups = np.ones(24), np.arange(24)
    assert cluster_bootstrap(hits, groups).low == 1
    assert cluster_share(hits, groups).low == pytest.approx(0.8575, abs=1e-4)


@pytest.mark.parametrize("hits", [np.array([0.0, 0.5]), np.array([[0, 1], [1, 1]]), np.array([0.0, np.nan])])
def test_what_is_no_share_is_refused(hits):
    with pytest.raises(DataError, match="hits"):
        cluster_share(hits, np.arange(len(hits)))


def test_the_accuracy_of_a_localizer_that_was_always_right_is_not_certain():
    truth = np.linspace(0, 300, 12)
    row = evaluate(truth, truth + 1, clusters=np.arange(12), n_draws=50)
    assert row["acc_5deg"] == 1 and row["acc_5deg_high"] == 1
    assert row["acc_5deg_low"] == pytest.approx(0.025 ** (1 / 12)) and row["mae_deg_low"] == pytest.approx(1)


def test_a_class_of_one_room_has_a_mean_and_no_interval():
    errors = np.array([1.0, 2.0, 3.0, 100.0, 120.0])
    rooms = np.array([0, 1, 2, 3, 3])
    gains = gain_by_class(errors, np.full(5, 10.0), rooms, n_draws=50).set_index("class")
    assert gains.gain_if_routed["catastrophic"] == 100
    assert np.isnan([gains.gain_if_routed_low["catastrophic"], gains.gain_if_routed_high["catastrophic"]]).all()
    assert np.isfinite([gains.gain_if_routed_low["good"], gains.ceiling_low["catastrophic"]]).all()
    assert gains.fallback_better_low["catastrophic"] == pytest.approx(0.025)  # one trial
    table = class_table({"max_prob": np.linspace(0.9, 0.1, 5)}, errors, rooms, n_draws=50).set_index("class")
    assert np.isnan(table.mean_low["catastrophic"]) and np.isfinite(table.mean_low["good"])


def recordings(*numbers):
    return [(subset, Counts(tp, 2, 3)) for subset, tp in numbers]


def test_one_recording_of_a_subset_gives_no_interval():
    alone = recordings(("finch", 5), ("finch", 8), ("owl", 6))
    bounds = f_interval(alone, n_draws=50)
    assert np.isnan(bounds["owl"]).all() and np.isnan(bounds["all"]).all() and np.isfinite(bounds["finch"]).all()
    two = [*alone, ("owl", Counts(9, 1, 1))]
    assert np.isfinite(f_interval(two, n_draws=50)["all"]).all()
    estimate, low, high = f_difference(alone, alone, n_draws=50)
    assert estimate == 0 and np.isnan([low, high]).all()
    rows = pd.DataFrame(score_rows("x", alone, n_draws=50)).set_index("subset")
    assert np.isnan(rows.low["all"]) and np.isfinite(rows.f["all"])
    assert "interval" not in headline_row("F", rows.f["all"], "%", rows.low["all"], rows.high["all"])
    assert headline_row("F", 50, "%", 40, 60)["interval"] == [40, 60]
