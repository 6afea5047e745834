"""Metrics in mir_eval's manner: golden values by hand, empty, perfect and invalid input, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.geometry import sources_at
from ssl_kit.nearfield.metrics import (
    Tolerance,
    evaluate,
    gospa,
    hits,
    match_sources,
    over_bound,
    pair_errors,
    peak_to_sidelobe_db,
)

NONE = np.zeros((0, 3))
source = st.tuples(st.floats(-1, 1), st.floats(-0.5, 0.5), st.floats(0.5, 10))
sources = st.lists(source, max_size=5).map(lambda s: np.array(s).reshape(-1, 3))


def at(*positions):
    return sources_at(np.array(positions, float))


def test_golden_scene():
    """Three true sources; one found exactly, one 0.3 m behind itself, one missed; one false alarm."""
    truth = np.array([[0.0, 0.0, 2.0], [0.5, 0.2, 4.0], [-0.5, 0.0, 6.0]])
    found = np.array([[0.5, 0.2, 4.3], [0.0, 0.0, 2.0], [-0.5, 0.4, 9.0]])
    assert hits(truth, found).tolist() == [True, True, False]
    assert pair_errors(truth, found)[1] == pytest.approx([0, 0, 0.3, 0.3], abs=1e-12)
    result = evaluate([truth], [found])
    assert result["recall"] == result["precision"] == result["f1"] == pytest.approx(2 / 3, abs=1e-12)
    assert result["false_per_scene"] == 1 and result["success"] == 0 and result["right_count"] == 1
    assert result["gospa_m"] == pytest.approx(np.sqrt(0.3**2 + 2 + 2), abs=1e-12)
    away = np.sqrt(36 + 81 - 2 * 54 * np.cos(0.4))  # law of cosines
    assert result["rmse_xyz_m"] == pytest.approx(np.sqrt((0.09 + away**2) / 3), abs=1e-12)
    assert result["rmse_theta_deg"] == pytest.approx(np.degrees(0.4) / np.sqrt(3), abs=1e-12)


def test_gospa_golden_values():
    a, b = at([0, 0, 1]), at([0, 0, 2])
    assert gospa(a, b, cutoff_m=2.0)["gospa"] == pytest.approx(1.0, abs=1e-12)
    far = {"gospa": 0.5, "localization": 0, "missed": 0.125, "false": 0.125}
    assert gospa(a, b, cutoff_m=0.5) == pytest.approx(far)
    assert gospa(a, NONE, cutoff_m=2.0)["gospa"] == pytest.approx(np.sqrt(2), abs=1e-12)
    assert gospa(NONE, NONE)["gospa"] == 0
    assert gospa(a, b, p=1.0)["gospa"] == pytest.approx(1.0, abs=1e-12)


@given(sources, sources, st.floats(0.1, 5))
def test_gospa_is_symmetric_bounded_and_adds_up(a, b, cutoff_m):
    one, other = gospa(a, b, cutoff_m), gospa(b, a, cutoff_m)
    assert one["gospa"] == pytest.approx(other["gospa"], abs=1e-9)
    assert one["gospa"] ** 2 == pytest.approx(one["localization"] + one["missed"] + one["false"], abs=1e-9)
    assert one["gospa"] ** 2 <= cutoff_m**2 / 2 * (len(a) + len(b)) + 1e-9
    assert gospa(a, a, cutoff_m)["gospa"] == 0


@given(sources, sources, sources)
def test_gospa_keeps_the_triangle_inequality(a, b, c):
    assert gospa(a, c)["gospa"] <= gospa(a, b)["gospa"] + gospa(b, c)["gospa"] + 1e-9


@given(sources, st.randoms())
def test_order_does_not_matter(a, random):
    order = list(range(len(a)))
    random.shuffle(order)
    assert hits(a, a[order]).all() and evaluate([a], [a[order]])["gospa_m"] == 0
    i, j = match_sources(a, a[order])
    assert np.allclose(a[i], a[order][j])


def test_matching_is_in_metres_not_in_radians():
    """The nearer in angle is 3 m off, the nearer in space 0.4 m."""
    truth = np.array([[0.0, 0.0, 5.0]])
    assert match_sources(truth, np.array([[0.01, 0.0, 2.0], [0.08, 0.0, 5.0]]))[1].tolist() == [1]


def test_each_gate_counts():
    truth = np.array([[0.1, 0.1, 5.0]])
    for off in ([0.1, 0, 0], [0, 0.1, 0], [0, 0, 1.1]):
        assert not hits(truth, truth + off).any()
        assert hits(truth, truth + off, Tolerance(10, 10, 2)).all()


def test_empty_and_perfect():
    a = at([0, 0, 2.0], [1, 0, 3])
    perfect = evaluate([a, a], [a, a[::-1]])
    assert perfect["f1"] == perfect["success"] == 1 and perfect["rmse_xyz_m"] == pytest.approx(0, abs=1e-9)
    missed = evaluate([a], [NONE])
    assert missed["recall"] == 0 and np.isnan(missed["precision"]) and np.isnan(missed["rmse_xyz_m"])
    nothing = evaluate([NONE], [[]])
    assert np.isnan(nothing["recall"]) and nothing["success"] == 1 and nothing["gospa_m"] == 0


def test_invalid_input_is_refused():
    a = at([0, 0, 2.0])
    for bad, text in (([[30.0, 10.0, 2.0]], "radians"), ([[0.1, 0.2]], r"\(\.\.\., 3\)"),
                      ([0.1, 0.2, 1.0], r"\(K, 3\)")):
        with pytest.raises(DataError, match=text):
            hits(a, bad)
    with pytest.raises(DataError, match="scenes"):
        evaluate([a], [])
    with pytest.raises(ParameterError, match="cutoff_m"):
        gospa(a, a, cutoff_m=0)


def test_peak_to_sidelobe():
    phi, theta = np.arange(-60.0, 61), np.arange(-30.0, 31)
    spectrum = np.full((121, 61), 0.01)
    spectrum[70, 30], spectrum[20, 30], spectrum[100, 5] = 1.0, 0.5, 0.05
    two = [[np.radians(10), 0, 1], [np.radians(-40), 0, 2]]
    assert peak_to_sidelobe_db(spectrum, phi, theta, two) == pytest.approx(10, abs=1e-9)
    assert peak_to_sidelobe_db(spectrum, phi, theta, two[:1]) == pytest.approx(10 * np.log10(2), abs=1e-9)
    assert np.isnan(peak_to_sidelobe_db(spectrum, phi, theta, NONE))
    with pytest.raises(DataError, match="spectrum"):
        peak_to_sidelobe_db(spectrum[:5], phi, theta, two)


def test_over_bound_is_one_for_an_efficient_estimate():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.95, 1.05, 50000)
    assert over_bound(np.abs(sigma * rng.standard_normal(50000)), sigma) == pytest.approx(1, abs=0.02)
    with pytest.raises(DataError, match="bound"):
        over_bound(np.ones(2), np.full(2, np.inf))
