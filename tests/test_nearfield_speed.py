"""What the detector leaves out to be fast must not change what it finds; the benchmark's peers find the same."""

import numpy as np
import pytest
import torch

from ssl_kit.nearfield.bench import BENCH_CONFIG, bench_nearfield, nls_omp_numpy
from ssl_kit.nearfield.detection import (
    DetectorConfig,
    _atoms,
    _rise,
    _whitening,
    add_best,
    detect,
    gains_of_rounds,
    overview,
    scan,
)
from ssl_kit.nearfield.geometry import FieldOfView
from ssl_kit.nearfield.likelihood import (
    evidence,
    log_likelihood,
    power_of,
    refine,
    score_and_information,
    start_fit,
)
from ssl_kit.nearfield.metrics import evaluate
from ssl_kit.nearfield.sample_covariance import near_field_grid, sensing
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes
from ssl_kit.nearfield.steering import steering

KINDS = {"even": dict(path_gain=False, k_factor=(0.0, 0.0)), "line of sight": dict(k_factor=(10.0, 10.0))}


def scans(kind, n=24):
    "Scenes, fits without and with the source of a first round, atoms."
    batch = draw_scenes(SceneConfig(n_sources=(2,), snr_db=(10.0, 10.0), **KINDS[kind]), 77, range(n))
    angles, atoms = _atoms(batch.surface, FieldOfView(), (17, 9, 5))
    fit = start_fit(batch)
    view = overview(fit, atoms)
    best, gain, power = scan(fit, view, atoms)
    more, _ = refine(add_best(fit, angles[best], gain, power), FieldOfView())
    return batch, (fit, more), view, atoms


def scan_dictionary(fit, dictionary, norms):
    "Rise of the log likelihood (scene, grid) by each atom b (scene, L, M, grid), all of them exact."
    noise = fit.log_noise.exp().float()[:, None, None]
    white, whitened = _whitening(fit)
    s = norms if whitened is None else norms - power_of(whitened @ dictionary).sum(2)
    q = power_of(white.conj().to(torch.complex64)[:, :, None] @ dictionary)[:, :, 0] / noise.square()
    return _rise(q, (s / noise).clamp_min(1e-6), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_without_a_dictionary_finds_the_best_atom_of_the_dictionary(kind):
    batch, fits, view, atoms = scans(kind)
    dictionary = sensing(batch) @ atoms
    norms = power_of(dictionary).sum(2)
    for fit in fits:
        whole, _ = scan_dictionary(fit, dictionary, norms)
        best, gain, _ = scan(fit, view, atoms)
        assert torch.allclose(whole.gather(1, best), gain, rtol=1e-2, atol=0.05)  # exact for what it looks at
        there = whole.amax(1) > 14
        share = (gain.amax(1) / whole.amax(1))[there]
        assert there.sum() > 10 and share.quantile(0.1) > 0.99


def test_a_line_of_sight_needs_its_strongest_direction():
    "With ‖b‖² taken as the same everywhere the best atom is often not among the candidates."
    batch, (fit, _), view, atoms = scans("line of sight")
    dictionary = sensing(batch) @ atoms
    whole, _ = scan_dictionary(fit, dictionary, power_of(dictionary).sum(2))
    blind = view.__class__(view.strongest, view.along.mean((1, 2), keepdim=True).expand_as(view.along), view.rest)
    reached = scan(fit, blind, atoms)[1].amax(1) / whole.amax(1)
    assert (reached < 0.9).float().mean() > 0.1


def test_no_source_that_would_be_believed_is_left_unrefined():
    "What the scan says before refinement: sources that are there lie above `least_gain`, and chance mostly below."
    config = DetectorConfig(threshold=0.0, max_sources=3)
    batch = draw_scenes(SceneConfig(n_sources=(1, 2), snr_db=(5.0, 15.0), **KINDS["even"]), 78, range(48))
    loose = gains_of_rounds(batch, DetectorConfig(threshold=0.0, least_gain=0.0, max_sources=3))
    strict = gains_of_rounds(batch, config)
    there = np.arange(3) < batch.n_sources[:, None]
    believed = there & (loose > DetectorConfig().threshold)
    assert believed.sum() > 50 and (strict[believed] > DetectorConfig().threshold).all()
    after = np.take_along_axis(strict, batch.n_sources[:, None], 1)[:, 0]
    assert np.nanquantile(after, 0.95) < DetectorConfig().threshold  # a round may go astray and be mended at the end


def test_single_precision_finds_the_same_slope_and_evidence():
    batch = draw_scenes(SceneConfig(n_sources=(3,), snr_db=(30.0, 30.0), **KINDS["even"]), 6, range(4))
    fits = []
    for dtype in (torch.complex64, torch.complex128):
        fit = start_fit(batch, dtype)
        off = batch.sources[:, :3] * [1, 1, 1.02] + [0.005, -0.005, 0]
        fits.append(fit.changed(angles=torch.from_numpy(np.concatenate([off[..., :2], 1 / off[..., 2:]], -1)),
                                log_power=torch.full((4, 3), -6.0, dtype=torch.float64),
                                log_noise=torch.full((4,), -6.0, dtype=torch.float64)))
    for single, double in zip(score_and_information(fits[0]), score_and_information(fits[1]), strict=True):
        assert ((single - double).reshape(4, -1).norm(dim=1) / double.reshape(4, -1).norm(dim=1)).max() < 1e-3
    loss = torch.stack([log_likelihood(fits[1]) - log_likelihood(fits[1].without(j)) for j in range(3)], 1)
    assert torch.allclose(evidence(fits[1]), loss, rtol=1e-8) and torch.allclose(evidence(fits[0]), loss, rtol=1e-3)


def test_peers_of_the_benchmark_find_what_the_detector_finds():
    batch, view = draw_scenes(BENCH_CONFIG, 3, range(3)), FieldOfView()
    grid = near_field_grid(batch.surface, view, 41, 21, 10)
    atoms = np.ascontiguousarray(steering(grid, batch.surface).T)
    truth = [batch.truth(i) for i in range(3)]
    plain = [nls_omp_numpy(batch, i, int(batch.n_sources[i]), view, grid, atoms) for i in range(3)]
    found = [e.sources for e in detect(batch)]
    assert evaluate(plain, found)["recall"] == 1 and evaluate(truth, plain)["recall"] > 0.85


def test_detection_is_many_times_faster_than_nls_omp_in_plain_numpy():
    rows = {row.name: row for row in bench_nearfield(quick=True)}
    assert rows["nearfield"].detail["cpu_ratio"] > 10  # eight scenes; 20 is asked of the whole benchmark
    assert set(rows) == {"nearfield", "nearfield_nls_omp"}
    for row in rows.values():
        assert row.detail["recall_k1"] >= row.detail["peer_recall_k1"] - 0.26
