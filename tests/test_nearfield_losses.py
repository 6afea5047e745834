"""Losses and guardrail: order does not matter, gradients are finite, and every way a refiner fails is noticed."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.covariance import effective_covariance
from ssl_kit.nearfield.guardrail import Guardrail, guarded_estimate, objection
from ssl_kit.nearfield.losses import (
    PHASES,
    aux_costs,
    aux_loss,
    blobs,
    chamfer_angles,
    covariance_nmse,
    focal_heatmap,
    orthogonality,
    peak_contrast,
    phase_weights,
    subspace_loss,
)
from ssl_kit.nearfield.search import SearchConfig
from ssl_kit.nearfield.spectra import PlaneGrid


def drawn(seed, n=3):
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([-1.0, -0.5, 0.5]), torch.tensor([1.0, 0.5, 10.0])
    return low + (high - low) * torch.rand(n, 5, 3, generator=g)


@given(st.integers(0, 1000), st.permutations(range(5)), st.integers(1, 5))
def test_trap_aux_loss_does_not_depend_on_the_order_of_predictions(seed, order, k):
    predicted, true, n = drawn(seed), drawn(seed + 1), torch.tensor([k, k, k])
    assert aux_loss(predicted[:, order], true, n) == pytest.approx(float(aux_loss(predicted, true, n)), rel=1e-5)
    assert aux_loss(true[:, order], true, n) == pytest.approx(0, abs=1e-6)


def test_trap_compared_by_index_a_perfect_prediction_in_another_order_is_punished():
    true, order = drawn(0), [1, 2, 0, 3, 4]
    by_index = sum(part[:, range(3), range(3)].sum() for part in aux_costs(true[:, order], true))
    assert by_index > 1 and aux_loss(true[:, order], true, torch.tensor([3, 3, 3])) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 300), st.integers(1, 5))
def test_aux_loss_is_the_best_of_all_assignments(seed, k):
    predicted, true = drawn(seed, 1), drawn(seed + 7, 1)
    angles, ranges = aux_costs(predicted, true)
    cost = (0.7 * angles + 0.3 * ranges)[0]
    best = min(sum(cost[i, p[i]] for i in range(k)) for p in permutations(range(5), k)) / k
    assert aux_loss(predicted, true, torch.tensor([k]), 0.7, 0.3) == pytest.approx(float(best), rel=1e-5)


def test_angles_are_wrapped_and_ranges_compared_by_ratio():
    true = torch.zeros(1, 5, 3) + torch.tensor([3.1, 0.0, 2.0])
    other = torch.zeros(1, 5, 3) + torch.tensor([-3.1, 0.0, 2.0])
    angles, _ = aux_costs(other, true)
    assert angles.max() < 0.1
    def at(r):
        return torch.tensor([0.0, 0, r]).expand(1, 5, 3)

    near, far = (aux_costs(at(1.1 * r), at(r))[1] for r in (1.0, 8.0))
    assert torch.allclose(near, far, rtol=1e-4)


@given(st.integers(0, 200), st.integers(1, 5))
def test_gradients_are_finite(seed, k):
    predicted, true, n = drawn(seed).requires_grad_(), drawn(seed + 1), torch.tensor([k, k, k])
    (aux_loss(predicted, true, n) + chamfer_angles(predicted, true, n)).backward()
    assert torch.isfinite(predicted.grad).all()


def test_covariance_losses_have_their_minimum_where_they_should():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(2, 24, 5, dtype=torch.complex128, generator=g)
    k = torch.tensor([2, 5])
    f[0, :, 2:] = 0
    r = f @ f.mH
    assert covariance_nmse(r, r) == 0 and covariance_nmse(0 * r, r) == pytest.approx(1)
    assert subspace_loss(r, f, k) == pytest.approx(0, abs=1e-9)
    white = torch.eye(24, dtype=torch.complex128).expand(2, -1, -1)
    assert subspace_loss(white, f, k) == pytest.approx(1 - (2 + 5) / 48)
    q = torch.linalg.qr(torch.randn(2, 24, 5, dtype=torch.complex128, generator=g))[0]
    assert orthogonality(q) == pytest.approx(0, abs=1e-12) and orthogonality(q[..., :1]) == 0
    assert orthogonality(q[..., :1].expand(-1, -1, 3)) == pytest.approx(1)


def test_peak_contrast_is_lower_when_the_sources_are_in_the_covariance():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1, 5, 24, dtype=torch.complex128, generator=g)
    k = torch.tensor([5])
    with_sources = effective_covariance((a.mT @ a.conj()), shrink=False, diag_load=0.05)
    without = torch.eye(24, dtype=torch.complex128)[None]
    assert peak_contrast(with_sources, a, k) < peak_contrast(without, a, k)


def test_blobs_and_focal_loss():
    phi, theta = torch.linspace(-1, 1, 61), torch.linspace(-0.5, 0.5, 41)
    true = torch.zeros(1, 5, 3)
    true[0, 0] = torch.tensor([phi[40], theta[10], 2.0])
    target = blobs(true, torch.tensor([1]), phi, theta)
    assert target.shape == (1, 61, 41) and target.max() == 1
    assert np.unravel_index(int(target[0].argmax()), (61, 41)) == (40, 10)
    assert focal_heatmap(30 * (target - 0.5), target) < focal_heatmap(torch.zeros_like(target), target)


def test_phases_are_known_and_contrast_is_off():
    assert all(weights.peak_contrast == 0 for weights in PHASES.values()) and phase_weights("joint").blended > 0
    with pytest.raises(ParameterError, match="warm-up"):
        phase_weights("finetune")
    with pytest.raises(DataError, match="5, 3"):
        aux_costs(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))


GRID = PlaneGrid(61, 31)
BUMP = np.exp(-((GRID.phi_deg[:, None] - 20) ** 2 + GRID.theta_deg**2) / 50)
MANY = np.where((np.arange(61)[:, None] % 6 == 3) & (np.arange(31) % 6 == 3), 1.0, 0.0)


@pytest.mark.parametrize(("refined", "reason"), [
    (np.full_like(BUMP, np.nan), "not finite"), (np.full_like(BUMP, 0.3), "flat"), (MANY, "too many peaks"),
    (np.where(BUMP > 1e-3, 1.0, 0.0), "saturated"), (None, "no refiner")])
def test_the_guardrail_falls_back_to_the_plain_spectrum_and_says_why(refined, reason):
    plain = guarded_estimate(10 * np.log10(BUMP + 0.01), np.full(BUMP.shape, 2.0), refined, SearchConfig(grid=GRID))
    assert plain.path == f"plain: {reason}" and np.degrees(plain.sources[0, 0]) == pytest.approx(20, abs=2.1)


def test_a_good_map_is_used():
    assert objection(BUMP) is None
    elsewhere = np.roll(BUMP, -20, axis=0)
    found = guarded_estimate(10 * np.log10(BUMP + 0.01), np.full(BUMP.shape, 3.0), elsewhere, SearchConfig(grid=GRID))
    assert found.path == "refined" and np.degrees(found.sources[0, 0]) == pytest.approx(-20, abs=2.1)
    assert found.sources[0, 2] == 3.0
    with pytest.raises(ParameterError, match="shares"):
        Guardrail(most_peaks=0)


@pytest.mark.parametrize("shape", [(361, 181), (61, 41), (9, 8)])
def test_refiner_keeps_odd_sizes_and_ignores_scale_and_offset(shape):
    from ssl_kit.nearfield.refiner import SpectrumRefiner, refined_map

    torch.manual_seed(0)
    model = SpectrumRefiner((8, 8, 8))
    spectrum = np.random.default_rng(0).standard_normal(shape)
    refined = refined_map(model, spectrum)
    assert refined.shape == shape and (0 < refined).all() and (refined < 1).all()
    assert np.allclose(refined, refined_map(model, 3 * spectrum - 40), atol=1e-4)
    assert np.isfinite(refined_map(model, np.zeros(shape))).all()


def test_refiner_refuses_what_is_no_batch_of_spectra():
    from ssl_kit.nearfield.refiner import SpectrumRefiner

    with pytest.raises(DataError, match="scene"):
        SpectrumRefiner((8, 8, 8))(torch.zeros(4, 61))
