"""Likelihood, detection and NLS-OMP: derivatives, efficiency against the bound, numbers of sources, faults."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.bounds import crb
from ssl_kit.nearfield.detection import DetectorConfig, detect, gains_of_rounds
from ssl_kit.nearfield.geometry import FieldOfView
from ssl_kit.nearfield.likelihood import log_likelihood, refine, score_and_information, seen_waves, start_fit
from ssl_kit.nearfield.metrics import evaluate, over_bound
from ssl_kit.nearfield.nls_omp import joint_nls, nls_omp
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes

# equal powers and a channel without line of sight, as the reference figures have them
EVEN = SceneConfig(path_gain=False, k_factor=(0.0, 0.0), snr_db=(10.0, 10.0))


def at_truth(batch, k, log_power=-1.0):
    fit = start_fit(batch, torch.complex128)
    there = batch.sources[:, :k]
    return fit.changed(angles=torch.from_numpy(np.concatenate([there[..., :2], 1 / there[..., 2:]], -1)),
                       log_power=torch.full((len(batch), k), log_power, dtype=torch.float64))


def dense_log_likelihood(fit):
    b = seen_waves(fit)
    eye = torch.eye(fit.y.shape[2], dtype=b.dtype)
    b = b.mT
    c = (b * fit.log_power.exp()[:, None, None]) @ b.mH + fit.log_noise.exp()[:, None, None, None] * eye
    quadratic = (fit.y[:, :, None].conj() @ torch.linalg.solve(c, fit.y[..., None]))[..., 0, 0].real
    return -(torch.linalg.slogdet(c)[1] + quadratic).sum(1)


def test_likelihood_without_inverses_is_the_dense_one():
    batch = draw_scenes(replace(EVEN, n_sources=(3,)), 0, range(3))
    fit = at_truth(batch, 3, -5.0)
    assert torch.allclose(log_likelihood(fit), dense_log_likelihood(fit), rtol=1e-10)
    assert torch.allclose(score_and_information(fit)[0], log_likelihood(fit), rtol=1e-12)
    single = fit.changed(channel=fit.channel.to(torch.complex64), codes=fit.codes.to(torch.complex64))
    assert torch.allclose(log_likelihood(single), log_likelihood(fit), rtol=1e-5)


def test_score_is_the_gradient():
    batch = draw_scenes(replace(EVEN, n_sources=(2,)), 0, range(2))
    fit = at_truth(batch, 2, -6.0)
    leaves = [part.clone().requires_grad_() for part in (fit.angles, fit.log_power, fit.log_noise)]
    value = dense_log_likelihood(fit.changed(angles=leaves[0], log_power=leaves[1], log_noise=leaves[2]))
    angles, power, noise = torch.autograd.grad(value.sum(), leaves)
    _, slope, _ = score_and_information(fit)
    assert torch.allclose(torch.cat([angles.mT.reshape(2, -1), power, noise[:, None]], 1), slope, rtol=1e-6, atol=1e-5)


def test_information_is_the_covariance_of_the_score():
    """Over y drawn from the model itself; 1,200 draws of one scene with two sources."""
    batch = draw_scenes(replace(EVEN, n_sources=(2,)), 3, [0])
    fit = at_truth(batch, 2, -6.0).changed(log_noise=torch.tensor([-2.0], dtype=torch.float64))
    n = 1200
    b, rng = seen_waves(fit), torch.Generator().manual_seed(0)
    def gauss(*shape):
        return torch.randn(*shape, dtype=torch.complex128, generator=rng)
    y = (b.mT * (-3.0 * torch.ones(2, dtype=torch.float64)).exp()) @ gauss(n, 16, 2, 1)
    y = y[..., 0] + np.exp(-1.0) * gauss(n, 16, 16)
    many = fit.changed(y=y, angles=fit.angles.expand(n, -1, -1), log_power=fit.log_power.expand(n, -1),
                       log_noise=fit.log_noise.expand(n), channel=fit.channel.expand(n, -1, -1),
                       codes=fit.codes.expand(n, -1, -1))
    _, slope, information = score_and_information(many)
    scale = torch.diagonal(information[0]).sqrt()
    whitened = slope / scale
    expected = information[0] / scale / scale[:, None]
    assert whitened.mean(0).abs().max() < 4 / np.sqrt(n)
    assert (whitened.mT @ whitened / n - expected).abs().max() < 0.2


def test_least_squares_reaches_the_bound_at_high_snr():
    """Deterministic maximum likelihood: RMSE over the bound tends to 1."""
    batch = draw_scenes(replace(EVEN, n_sources=(2,), snr_db=(35.0, 35.0)), 5, range(40))
    bounds, errors = crb(batch), np.zeros((40, 2, 3))
    for scene in range(40):
        g = (batch.channel[scene][None] * batch.codes[scene][:, None]).astype(np.complex128)
        found, _ = joint_nls(g, batch.y[scene].astype(np.complex128), batch.truth(scene) * [1, 1, 1.001], batch.surface,
                             FieldOfView(0.1 + 61, 31, 0.4, 12), 20)
        errors[scene] = found - batch.truth(scene)
    for error, bound in ((np.degrees(errors[..., 0]), bounds.phi_deg), (np.degrees(errors[..., 1]), bounds.theta_deg),
                         (errors[..., 2], bounds.range_m)):
        assert np.sqrt(np.mean((error / bound[:, :2]) ** 2)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("k", "least"), [(1, 0.93), (3, 0.88)])
def test_detection_without_knowing_k_is_near_the_bound(k, least):
    batch = draw_scenes(replace(EVEN, n_sources=(k,)), 41, range(24))
    estimates, bounds = detect(batch), crb(batch)
    result = evaluate([batch.truth(i) for i in range(24)], [e.sources for e in estimates])
    assert result["recall"] >= least and result["right_count"] > 0.9
    same = [i for i in range(24) if len(estimates[i]) == k]
    error = np.concatenate([np.abs(np.degrees(estimates[i].sources[:, 0] - batch.truth(i)[:, 0])) for i in same])
    assert over_bound(error, np.concatenate([bounds.phi_deg[i, :k] for i in same])) < 1.5
    assert all((e.confidence > DetectorConfig().threshold / 2).all() for e in estimates)


def test_noise_alone_has_no_sources():
    batch = draw_scenes(replace(EVEN, n_sources=(1,), snr_db=(-60.0, -60.0)), 0, range(24))
    assert all(len(estimate) == 0 for estimate in detect(batch))


def test_the_rise_by_a_source_that_is_not_there_does_not_depend_on_snr():
    """The rule that says how many sources there are is calibrated once for all SNR."""
    worst = []
    for snr_db in (0.0, 20.0):
        batch = draw_scenes(replace(EVEN, n_sources=(1,), snr_db=(snr_db, snr_db)), 900, range(16))
        worst.append(gains_of_rounds(batch, DetectorConfig(threshold=0.0, max_sources=2))[:, 1].max())
    assert max(worst) < DetectorConfig().threshold


def test_detection_is_the_same_in_any_batch_and_takes_k_when_given():
    batch = draw_scenes(EVEN, 2, range(6))
    together, alone = detect(batch), detect(batch[3:4])[0]
    assert len(alone) == len(together[3]) and np.allclose(alone.sources, together[3].sources, atol=1e-3)
    assert [len(e) for e in detect(batch, n_sources=batch.n_sources)] == batch.n_sources.tolist()


def test_refinement_never_makes_it_worse():
    batch = draw_scenes(replace(EVEN, n_sources=(3,)), 8, range(4))
    fit = at_truth(batch, 3, -9.0)
    fit = fit.changed(angles=fit.angles + 0.05)
    assert (refine(fit, FieldOfView(70, 40, 0.3, 15), 5)[1] >= log_likelihood(fit) - 1e-9).all()


def test_nls_omp_finds_what_is_there():
    batch = draw_scenes(replace(EVEN, n_sources=(1, 2), snr_db=(15.0, 15.0)), 6, range(4))
    truth = [batch.truth(i) for i in range(4)]
    assert evaluate(truth, [e.sources for e in nls_omp(batch)])["f1"] > 0.8
    assert [len(e) for e in nls_omp(batch, batch.n_sources)] == batch.n_sources.tolist()


@pytest.mark.parametrize("method", [detect, nls_omp])
def test_data_that_are_not_finite_are_refused(method):
    batch = draw_scenes(EVEN, 0, [0])
    batch.y[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="finite"):
        method(batch)
    with pytest.raises(ParameterError, match="sizes"):
        DetectorConfig(n_phi=0)
