"""Spectra and their search: against the dense definition, closed forms, and the traps of earlier code."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.covariance import effective_covariance, effective_factor
from ssl_kit.nearfield.geometry import FieldOfView, Surface
from ssl_kit.nearfield.metrics import evaluate
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes, true_factor
from ssl_kit.nearfield.search import (
    SearchConfig,
    best_over_ranges,
    estimate_from_map,
    level_to_pass,
    local_maxima,
    localize_capon,
    refine_peaks,
    suppress,
)
from ssl_kit.nearfield.spectra import (
    PlaneGrid,
    bartlett,
    capon,
    capon_dense,
    estimate_order,
    matched_field,
    music,
    projected_power,
)
from ssl_kit.nearfield.steering import steering

SURFACE, GRID = Surface(), PlaneGrid(41, 21)
SOURCES = np.array([[np.radians(12.0), np.radians(-6.0), 2.0], [np.radians(-30.0), 0.0, 5.0]])
FACTOR = steering(SOURCES, SURFACE).T


def peak(plane):
    i, j = np.unravel_index(plane.argmax(), plane.shape)
    return GRID.phi_deg[i], GRID.theta_deg[j]


@given(st.integers(0, 500), st.integers(1, 6), st.floats(0.5, 10))
def test_quarter_of_the_steering_gives_the_whole_plane(seed, rank, range_m):
    rng, grid = np.random.default_rng(seed), PlaneGrid(7, 5)
    u = rng.standard_normal((144, rank)) + 1j * rng.standard_normal((144, rank))
    direct = np.abs(steering(grid.sources(range_m), SURFACE).conj() @ u) ** 2
    weights = rng.uniform(size=(2, rank))
    assert np.allclose(projected_power(u, weights, SURFACE, grid, range_m), np.einsum("ptk,jk->jpt", direct, weights))


@pytest.mark.parametrize("load", [1e-1, 1e-2, 1e-4, 1e-6])
def test_low_rank_capon_is_the_dense_one_where_woodbury_cancels(load):
    f, delta = effective_factor(FACTOR, shrink=False, diag_load=load)
    dense = capon_dense(f @ f.conj().T + delta * np.eye(144), SURFACE, GRID, 2.0)
    double, single = (capon(f.astype(t), delta, SURFACE, GRID, 2.0) for t in (np.complex128, np.complex64))
    assert np.abs(double / dense - 1).max() < max(1e-10, 1e-14 / load)  # the dense one loses digits first
    assert np.abs(single / dense - 1).max() < 1e-4 and peak(single) == peak(dense) == (12.0, -6.0)


def test_plain_woodbury_in_single_precision_fails_where_ours_does_not():
    f, delta = effective_factor(FACTOR, shrink=False, diag_load=1e-6)
    small, d = f.astype(np.complex64), np.float32(delta)
    a = steering(GRID.sources(2.0), SURFACE, dtype=np.complex64)
    inner = np.linalg.inv(d * np.eye(2, dtype=np.complex64) + small.conj().T @ small)
    seen = a @ small.conj()
    left = np.float32(144) - np.einsum("ptk,kj,ptj->pt", seen.conj(), inner.T, seen).real
    dense = capon_dense(f @ f.conj().T + delta * np.eye(144), SURFACE, GRID, 2.0)
    with np.errstate(divide="ignore"):
        assert np.abs(d / left / dense - 1).max() > 1e-3


def test_trap_the_capon_denominator_is_not_a_r_inverse_a_with_a_as_a_row():
    """a R⁻¹ aᴴ is the spectrum of the conjugate wave: its peak is not where the source is."""
    r = effective_covariance(FACTOR[:, :1] @ FACTOR[:, :1].conj().T, shrink=False, diag_load=1e-2)
    a = steering(GRID.sources(2.0), SURFACE)
    wrong = 1 / np.einsum("pti,ij,ptj->pt", a, np.linalg.inv(r), a.conj()).real
    assert peak(capon_dense(r, SURFACE, GRID, 2.0)) == (12.0, -6.0)
    assert np.hypot(*np.subtract(peak(wrong), (12.0, -6.0))) > 5


def test_trap_snapshots_are_not_centred():
    """Static symbols make a constant wave: without its mean nothing is left of it."""
    wave = np.repeat(FACTOR[:, :1], 16, axis=1) + 1e-3 * np.random.default_rng(0).standard_normal((144, 16))
    centred = wave - wave.mean(axis=1, keepdims=True)
    assert peak(bartlett(wave, SURFACE, GRID, 2.0)) == (12.0, -6.0)
    assert bartlett(centred, SURFACE, GRID, 2.0).max() < 1e-4 * bartlett(wave, SURFACE, GRID, 2.0).max()


def test_capon_of_white_noise_is_flat_and_of_one_source_the_closed_form():
    white = capon(1e-12 * FACTOR, 0.5, SURFACE, GRID, 2.0)
    assert np.allclose(white, 0.5 / 144)
    p, delta = 3.0, 0.1
    one = capon(np.sqrt(p) * FACTOR[:, :1], delta, SURFACE, GRID, 2.0)
    assert one.max() == pytest.approx(p + delta / 144)  # the power of the source, and the noise in its beam


def test_what_is_not_positive_definite_is_refused():
    with pytest.raises(DataError, match="effective_covariance"):
        capon_dense(FACTOR @ FACTOR.conj().T - 1e-3 * np.eye(144), SURFACE, GRID, 2.0)
    with pytest.raises(ParameterError, match="delta"):
        capon(FACTOR, 0.0, SURFACE, GRID, 2.0)
    with pytest.raises(ParameterError, match="n_sources"):
        music(FACTOR, 3, SURFACE, GRID, 2.0)
    with pytest.raises(ParameterError, match="odd"):
        PlaneGrid(40, 21)


def test_music_peaks_at_the_sources_of_its_plane():
    assert peak(music(FACTOR, 2, SURFACE, GRID, 2.0)) == (12.0, -6.0)
    assert peak(music(FACTOR, 2, SURFACE, GRID, 5.0)) == (-30.0, 0.0)


@given(st.integers(0, 300), st.integers(0, 4))
def test_mdl_counts_sources_of_a_large_sample(seed, k):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 3000)) + 1j * rng.standard_normal((12, 3000))
    x[:k] *= 4
    assert estimate_order(np.linalg.eigvalsh(x @ x.conj().T / 3000), 3000) == k


def test_matched_field_is_its_formula_and_finds_one_source():
    batch = draw_scenes(SceneConfig(n_sources=(1,), snr_db=(20.0, 20.0)), 0, [1])
    there = batch.truth(0)[0]
    plane = matched_field(batch, 0, GRID, there[2])
    a = steering(GRID.sources(there[2])[5, 7], SURFACE)
    b = (batch.channel[0] @ (batch.codes[0] * a).T).T
    assert plane[5, 7] == pytest.approx((np.abs((b.conj() * batch.y[0]).sum(1)) ** 2 / (np.abs(b) ** 2).sum(1)).sum(),
                                        rel=1e-4)
    assert np.abs(np.subtract(peak(plane), np.degrees(there[:2]))).max() < 3.1


def test_mvdr_on_the_true_covariance_meets_its_target():
    batch = draw_scenes(SceneConfig(n_sources=(1, 2, 3), snr_db=(10.0, 20.0)), 4, range(40))
    factors, deltas = effective_factor(true_factor(batch), snr_db=batch.snr_db)
    found = [localize_capon(f, d, SURFACE) for f, d in zip(factors, deltas, strict=True)]
    result = evaluate([batch.truth(i) for i in range(40)], [e.sources for e in found])
    assert result["f1"] >= 0.98 and result["rmse_phi_deg"] <= 0.3
    assert result["rmse_theta_deg"] <= 0.5 and result["rmse_range_m"] <= 0.25
    assert all(e.path == "capon" and (e.confidence > 0).all() for e in found)


def test_refinement_climbs_from_a_cell_to_the_source():
    f, delta = effective_factor(FACTOR, shrink=0.05)
    start = SOURCES * [1, 1, 1.1] + [0.02, -0.02, 0]
    assert np.abs(refine_peaks(f, delta, start, SURFACE, SearchConfig()) - SOURCES).max() < 2e-3


def test_suppression_knows_angle_and_range():
    near = np.array([[0.0, 0.0, 2.0], [0.03, 0.0, 2.1], [0.03, 0.0, 0.6], [0.4, 0.0, 2.0]])
    assert suppress(near, 5.0, 0.35).tolist() == [0, 2, 3]
    assert suppress(near, 1.0, 0.35).tolist() == [0, 1, 2, 3]
    assert suppress(np.zeros((0, 3)), 5.0, 0.35).tolist() == []


def test_thresholds():
    flat = np.zeros((41, 21))
    flat[::2] = 1.0
    flat[20, 10] = 30.0
    config = SearchConfig(grid=GRID)
    median = np.median(flat)
    assert level_to_pass(flat, config) == pytest.approx(median + 5 * np.median(np.abs(flat - median)), abs=3)
    assert level_to_pass(flat, replace(config, threshold="max_db", max_db=12.0)) == 18.0
    assert len(estimate_from_map(flat, np.full(flat.shape, 2.0), config)) == 1
    assert local_maxima(flat)[0].tolist() == [20, 10]
    with pytest.raises(ParameterError, match="mad"):
        SearchConfig(threshold="otsu")


def test_the_best_range_is_kept_and_bad_spectra_are_refused():
    config = SearchConfig(grid=GRID, n_ranges=4)
    map_db, range_m = best_over_ranges(lambda r: capon(FACTOR, 0.1, SURFACE, GRID, r), config)
    assert map_db.shape == GRID.sources(1.0).shape[:2] and set(np.unique(range_m)) <= set(config.ranges_m)
    assert config.ranges_m[0] == pytest.approx(0.5) and config.ranges_m[-1] == pytest.approx(10)
    for bad in (np.nan, 0.0):
        with pytest.raises(DataError, match="finite"):
            best_over_ranges(lambda r, bad=bad: np.full((41, 21), bad), config)
    assert SearchConfig().grid.field_of_view == FieldOfView()
