"""Localization metrics against a peer, closed forms, and invalid input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, median_absolute_error

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.localize.evaluation import (
    accuracy,
    bin_labels,
    evaluate,
    evaluate_by,
    known,
    mae_deg,
    median_deg,
    validate,
)

angles = st.lists(st.floats(0, 359.99), min_size=1, max_size=30)


@given(angles, st.integers(0, 99))
def test_matches_scikit_learn_away_from_the_seam(reference, seed):
    reference = np.array(reference) / 2 + 60
    estimate = reference + np.random.default_rng(seed).normal(0, 10, len(reference)).clip(-50, 50)
    assert mae_deg(reference, estimate) == pytest.approx(mean_absolute_error(reference, estimate), abs=1e-9)
    assert median_deg(reference, estimate) == pytest.approx(median_absolute_error(reference, estimate), abs=1e-9)


@given(angles, st.floats(-720, 720))
def test_turning_both_changes_nothing(reference, turn):
    reference = np.array(reference)
    estimate = reference[::-1]
    before, after = evaluate(reference, estimate), evaluate(reference + turn, estimate + turn)
    assert before["mae_deg"] == pytest.approx(after["mae_deg"], abs=1e-6)


def test_perfect_and_opposite():
    reference = np.arange(0, 360, 7.0)
    assert evaluate(reference, reference + 360) == {"n": len(reference), "mae_deg": 0, "median_deg": 0, "acc_5deg": 1,
                                                    "acc_10deg": 1}
    assert evaluate(reference, reference + 180)["mae_deg"] == 180


def test_tolerance_is_inclusive():
    assert accuracy([355.0], [0.0], 5) == 1.0 and accuracy([354.9], [0.0], 5) == 0.0
    with pytest.raises(ParameterError, match="tolerance"):
        accuracy([1.0], [1.0], -1)


@pytest.mark.parametrize(("reference", "estimate", "message"), [
    ([], [], "none"), ([1.0], [1.0, 2.0], r"\(1,\) and \(2,\)"), ([[1.0]], [[1.0]], r"\(n,\)"),
    ([np.nan], [1.0], "unknown"), ([-1000.0], [1.0], "known"), ([1.0], [np.nan], "every recording needs an answer"),
])
def test_invalid_input(reference, estimate, message):
    with pytest.raises(DataError, match=message):
        validate(reference, estimate)


def test_known_masks_realman_marks():
    assert known([0.0, -1000.0, np.nan, -5.0]).tolist() == [True, False, False, True]


def test_intervals_are_clustered():
    rng = np.random.default_rng(0)
    rooms = np.repeat(np.arange(20), 10)
    errors = np.abs(rng.normal(0, 1, 200) + 5 * rng.standard_normal(20)[rooms])
    clustered = evaluate(np.zeros(200), errors, clusters=rooms)
    alone = evaluate(np.zeros(200), errors, clusters=np.arange(200))
    assert clustered["mae_deg_low"] < clustered["mae_deg"] < clustered["mae_deg_high"]
    width = [row["mae_deg_high"] - row["mae_deg_low"] for row in (clustered, alone)]
    assert width[0] > 1.5 * width[1]
    assert np.isnan(evaluate([0.0], [1.0], clusters=["one room"])["mae_deg_low"])
    with pytest.raises(DataError, match="clusters"):
        evaluate([0.0, 1.0], [0.0, 1.0], clusters=["a"])


def test_groups_partition_the_recordings():
    rng = np.random.default_rng(1)
    n = 200
    reference = rng.uniform(0, 360, n)
    groups = {"t60_s": rng.uniform(0.2, 0.8, n), "snr_db": rng.uniform(-10, 25, n), "azimuth_deg": reference - 360,
              "array": rng.choice(["6cm", "12cm"], n)}
    table = evaluate_by(reference, reference + rng.normal(0, 5, n), groups, clusters=rng.integers(0, 10, n), n_draws=50)
    for name in groups:
        part = table[table["by"] == name]
        assert part["n"].sum() == n
        assert np.average(part["mae_deg"], weights=part["n"]) == pytest.approx(table["mae_deg"][0])
    assert len(table[table["by"] == "azimuth_deg"]) == 8


def test_bins():
    assert bin_labels([0.0, 0.3], (0, 0.3, 0.5)).tolist() == ["[0, 0.3)", "[0.3, 0.5)"]
    with pytest.raises(DataError, match="outside"):
        bin_labels([0.5], (0, 0.3, 0.5))
    with pytest.raises(ParameterError, match="increasing"):
        bin_labels([0.5], (1, 0))
    with pytest.raises(DataError, match="expected 2 values"):
        evaluate_by([0.0, 1.0], [0.0, 1.0], {"t60_s": [0.2]})
