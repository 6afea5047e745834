"""Geometry, steering, codes and scenes of the near field: closed forms, properties, and traps that cost weeks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.codebooks import CODEBOOKS, codes_of, dft_phases, draw_phases, phase_indices
from ssl_kit.nearfield.geometry import FieldOfView, Surface, positions_of, sources_at
from ssl_kit.nearfield.impairments import Impairments
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes, true_covariance, true_factor
from ssl_kit.nearfield.steering import MODELS, model_correlation, steering, steering_and_derivatives

SURFACE = Surface()
source = st.tuples(st.floats(-1.04, 1.04), st.floats(-0.52, 0.52), st.floats(0.5, 10.0)).map(np.array)


def angles(n, seed=0):
    return np.radians(np.random.default_rng(seed).uniform([-60, -30], [60, 30], (n, 2)))


def test_a_spacing_in_wavelengths_is_refused_and_named():
    with pytest.raises(ParameterError, match=r"in_wavelengths\(0.5, wavelength_m=0.3\)"):
        Surface(spacing_m=0.5)
    assert Surface.in_wavelengths(0.5).spacing_m == pytest.approx(0.15)


def test_trap_spacing_in_metres_is_not_multiplied_by_the_wavelength_again():
    """At endfire of the x axis neighbours half a wavelength apart differ by π; scaled once more it would be 0.3 π."""
    far = steering([np.pi / 2 - 1e-9, 0.0, 1e6], SURFACE).reshape(12, 12)
    step = np.angle(far[1:, 0] / far[:-1, 0])
    assert np.allclose(np.abs(step), np.pi, atol=1e-4)
    scaled = Surface(spacing_m=0.15 * 0.3)
    wrong = steering([np.pi / 2 - 1e-9, 0.0, 1e6], scaled).reshape(12, 12)
    assert not np.allclose(np.abs(np.angle(wrong[1:, 0] / wrong[:-1, 0])), np.pi, atol=0.5)


def test_trap_the_element_grid_is_centred_in_steering_and_codebook_alike():
    """A beam and the plane wave it points at sum in phase to a real N; a grid from −6 to 5 turns that sum."""
    frequency = np.array([1.5, -2.5]) / 8
    phi, theta = np.arcsin(-2 * frequency[0] / np.cos(np.arcsin(-2 * frequency[1]))), np.arcsin(-2 * frequency[1])
    wave = steering([phi, theta, 1e7], SURFACE, "plane")
    beam = np.exp(1j * dft_phases(SURFACE)[int(1.5 + 3.5) * 8 + int(-2.5 + 3.5)])
    assert beam @ wave == pytest.approx(144, abs=1e-6)
    off = np.stack(np.meshgrid(np.arange(-6, 6), np.arange(-6, 6), indexing="ij"), axis=-1).reshape(-1, 2)
    wrong = np.exp(2j * np.pi * (off @ frequency)) @ wave
    assert abs(wrong) == pytest.approx(144, abs=1e-6) and abs(wrong - 144) > 50


def test_trap_frozen_symbols_leave_rank_one_in_the_data():
    config = SceneConfig(n_sources=(3,), snr_db=(200.0, 200.0))
    for static, rank in ((False, 3), (True, 1)):
        scene = draw_scenes(replace(config, static_symbols=static), 1, [0])
        mixtures = np.einsum("mn,ln,kn->lmk", scene.channel[0], scene.codes[0], steering(scene.truth(0), SURFACE))
        symbols = np.stack([np.linalg.lstsq(b, y, rcond=None)[0] for b, y in zip(mixtures, scene.y[0], strict=True)])
        values = np.linalg.svd(symbols, compute_uv=False)
        assert (values > 1e-4 * values[0]).sum() == rank


@pytest.mark.parametrize(("range_m", "expected"), [(1.0, 0.58), (2.0, 0.85), (4.0, 0.97)])
def test_fresnel_steering_is_as_wrong_as_the_specification_says(range_m, expected):
    there = np.column_stack([angles(4000), np.full(4000, range_m)])
    assert np.median(model_correlation(there, SURFACE, "fresnel")) == pytest.approx(expected, abs=0.012)


@given(source)
def test_models_agree_far_away_and_steering_is_the_wave_of_a_point(there):
    distance = np.linalg.norm(positions_of(there) - SURFACE.positions_m, axis=1)
    assert np.allclose(steering(there, SURFACE), np.exp(-2j * np.pi / 0.3 * (distance - there[2])), atol=1e-9)
    far = there * [1, 1, 1e7]
    for model in MODELS:
        assert model_correlation(far, SURFACE, model) == pytest.approx(1, abs=1e-6)


@given(source)
def test_mirrored_sources_see_the_mirrored_surface(there):
    a = steering(there, SURFACE).reshape(12, 12)
    assert np.allclose(steering(there * [-1, 1, 1], SURFACE).reshape(12, 12), a[::-1], atol=1e-9)
    assert np.allclose(steering(there * [1, -1, 1], SURFACE).reshape(12, 12), a[:, ::-1], atol=1e-9)


@given(source)
def test_derivatives_are_those_of_the_steering(there):
    _, d = steering_and_derivatives(there, SURFACE)
    step = 1e-6
    for k, e in enumerate(np.eye(3) * step):
        numeric = (steering(there + e, SURFACE) - steering(there - e, SURFACE)) / (2 * step)
        assert np.abs(numeric - d[k]).max() < 1e-6 * max(1.0, np.abs(d[k]).max())


@given(source)
def test_positions_and_sources_are_inverse(there):
    assert np.allclose(sources_at(positions_of(there)), there)


def test_sources_in_degrees_or_behind_zero_are_refused():
    for wrong in ([30.0, 10.0, 2.0], [0.1, 0.1, 0.0], [0.1, np.nan, 1.0]):
        with pytest.raises(DataError, match="radians"):
            steering(wrong, SURFACE)
    with pytest.raises(DataError, match=r"\(\.\.\., 3\)"):
        steering([0.1, 0.2], SURFACE)
    with pytest.raises(ParameterError, match="field of view"):
        FieldOfView(near_m=0)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_quantised_phases_are_the_nearest(bits, seed):
    phases = np.random.default_rng(seed).uniform(-20, 20, 64)
    error = np.angle(codes_of(phase_indices(phases, bits), bits, np.complex128) * np.exp(-1j * phases))
    assert np.abs(error).max() <= np.pi / 2**bits + 1e-9


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("bits", [None, 1, 3])
def test_codes_have_modulus_one(kind, bits):
    scene = draw_scenes(SceneConfig(codebook=kind, bits=bits), 3, range(3))
    assert np.allclose(np.abs(scene.codes), 1, atol=1e-6)


def test_hadamard_codes_are_orthogonal_also_where_no_kronecker_product_fits():
    codes = np.cos(draw_phases("hadamard", 16, SURFACE, np.random.default_rng(0)))
    assert np.allclose(codes @ codes.T, 144 * np.eye(16))
    assert draw_phases("hadamard", 5, Surface(5, 3), np.random.default_rng(0)).shape == (5, 15)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True), st.sampled_from(["dft", "mixed"]))
def test_a_scene_depends_on_seed_and_index_alone(indices, codebook):
    config = SceneConfig(codebook=codebook)
    together = draw_scenes(config, 7, indices)
    for row, index in enumerate(indices):
        alone = draw_scenes(config, 7, [index])
        for name in ("y", "channel", "codes", "sources", "n_sources", "snr_db"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_scenes_are_what_the_configuration_asks_for():
    config = SceneConfig(snr_db=(3.0, 3.0))
    noisy, clean = draw_scenes(config, 0, range(300)), draw_scenes(replace(config, snr_db=(300., 300.)), 0, range(300))
    noise = noisy.y - clean.y
    ratio = (np.abs(clean.y) ** 2).mean(axis=(1, 2)) / (np.abs(noise) ** 2).mean(axis=(1, 2))
    assert np.median(10 * np.log10(ratio)) == pytest.approx(3, abs=0.1)
    white = (noise / np.sqrt((np.abs(clean.y) ** 2).mean(axis=(1, 2)) / 10**0.3)[:, None, None]).reshape(-1, 16)
    assert np.allclose(white.conj().T @ white / len(white), np.eye(16), atol=0.06)
    assert set(noisy.n_sources) == {1, 2, 3, 4, 5}
    assert (noisy.sources[noisy.n_sources == 2][:, 2:] == 0).all()
    for scene in range(300):
        there = noisy.truth(scene)
        assert (np.diff(there[:, 2]) >= 0).all()
        assert (there >= config.field_of_view.low).all() and (there <= config.field_of_view.high).all()


def test_the_channel_is_rician():
    """The share of the line of sight in the power is K/(K + 1); with K = 0 the entries are independent."""
    los = draw_scenes(SceneConfig(k_factor=(1e9, 1e9)), 0, range(20)).channel
    assert all(np.linalg.matrix_rank(h, tol=0.1) == 1 for h in los) and np.allclose(np.abs(los), 1, atol=1e-3)
    mixed = draw_scenes(SceneConfig(k_factor=(3.0, 3.0)), 0, range(50)).channel
    strongest = np.linalg.svd(mixed, compute_uv=False)[:, 0] ** 2 / (16 * 144)
    assert np.median(strongest) == pytest.approx(0.75, abs=0.03)
    assert (np.abs(mixed) ** 2).mean() == pytest.approx(1, abs=0.03)


def test_impairments_change_the_data_and_not_what_is_true():
    config = SceneConfig(snr_db=(60.0, 60.0))
    ideal = draw_scenes(config, 0, range(4))
    worse = draw_scenes(replace(config, impairments=Impairments(phase_error_deg=20, dropout=0.1)), 0, range(4))
    assert np.array_equal(ideal.sources, worse.sources) and np.array_equal(ideal.channel, worse.channel)
    assert (np.abs(ideal.y - worse.y).max(axis=(1, 2)) > 0.05 * np.abs(ideal.y).max(axis=(1, 2))).all()
    with pytest.raises(ParameterError, match="dropout"):
        Impairments(dropout=1.0)


def test_true_covariance_has_rank_k_trace_n_and_its_factor():
    batch = draw_scenes(SceneConfig(), 2, range(10))
    r, f = true_covariance(batch), true_factor(batch)
    assert np.allclose(np.trace(r, axis1=1, axis2=2).real, 144) and np.allclose(r, r.conj().transpose(0, 2, 1))
    for scene in range(10):
        k = batch.n_sources[scene]
        assert np.allclose(f[scene, :, k:], 0)
        a = steering(batch.truth(scene), SURFACE).T / batch.truth(scene)[:, 2]
        assert np.allclose(r[scene] / r[scene][0, 0], (a @ a.conj().T) / (a @ a.conj().T)[0, 0])


@pytest.mark.parametrize("wrong", [{"n_sources": (6,)}, {"snr_db": (5.0, 0.0)}, {"codebook": "golay"}, {"model": "x"},
                                   {"n_antennas": 0}, {"k_factor": (-1.0, 1.0)}])
def test_impossible_scenes_are_refused(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        SceneConfig(**wrong)
