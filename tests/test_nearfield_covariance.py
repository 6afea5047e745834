"""The covariance builder and the sample covariances: invariants as properties, closed forms, traps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.nearfield.covariance import covariance_audit, effective_covariance, effective_factor, shrinkage
from ssl_kit.nearfield.geometry import FieldOfView, Surface
from ssl_kit.nearfield.sample_covariance import (
    SOLVERS,
    als_lowrank,
    near_field_grid,
    ridge_ls,
    sample_factor,
    sbl,
    sensing,
    subspace_agreement,
)
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes, true_factor
from ssl_kit.nearfield.steering import steering


def factor(seed, n=24, rank=3, scale=1.0, batch=2):
    rng = np.random.default_rng(seed)
    return scale * (rng.standard_normal((batch, n, rank)) + 1j * rng.standard_normal((batch, n, rank)))


def covariance(f):
    return f @ f.conj().swapaxes(-1, -2)


settings = st.fixed_dictionaries({
    "beta": st.floats(0, 1), "snr_db": st.floats(-10, 30), "shrink": st.sampled_from([True, False, 0.1, 0.9]),
    "diag_load": st.floats(0, 0.5)})


@given(st.integers(0, 1000), st.floats(-6, 6), settings, st.sampled_from([np.complex64, np.complex128]))
def test_builder_keeps_its_invariants(seed, log_scale, given_, dtype):
    r = covariance(factor(seed, scale=10**log_scale)).astype(dtype)
    s = covariance(factor(seed + 1, rank=16)).astype(dtype)
    out = effective_covariance(r, s, on_violation="raise", **given_)
    assert out.dtype == dtype and np.isfinite(out).all()
    assert np.allclose(np.trace(out, axis1=1, axis2=2), 24, rtol=1e-5)
    assert np.abs(out - out.conj().swapaxes(1, 2)).max() <= 1e-6 * np.abs(out).max()
    assert np.linalg.eigvalsh(out)[:, 0].min() > -1e-5


@given(st.integers(0, 1000), settings)
def test_factor_form_is_the_same_covariance(seed, given_):
    f, g = factor(seed), factor(seed + 1, rank=5)
    low, delta = effective_factor(f, g, **given_)
    dense = effective_covariance(covariance(f), covariance(g), **given_)
    assert np.allclose(covariance(low) + delta[:, None, None] * np.eye(24), dense, atol=1e-12 * 24)


@given(st.integers(0, 100), st.floats(1e-4, 1e4))
def test_scale_of_the_prediction_does_not_matter(seed, scale):
    r = covariance(factor(seed))
    assert np.allclose(effective_covariance(r, shrink=0.1), effective_covariance(scale * r, shrink=0.1))


def test_two_callers_agree_with_shrinkage_off():
    r = covariance(factor(0, n=144, batch=8))
    ours = effective_covariance(r, shrink=False)
    theirs = effective_covariance(torch.from_numpy(r.astype(np.complex64)), shrink=False).numpy()
    rows = covariance_audit({"a": ours, "b": theirs}, "a")
    assert rows[1]["distance"] < 2.4e-6 and rows[1]["hermitian_error"] < 1e-6
    with pytest.raises(ParameterError, match="reference"):
        covariance_audit({"a": ours}, "c")


def test_trap_the_trace_is_normalised_last():
    """Normalising before the load leaves a trace of N(1 + load): the load is then another one for every caller."""
    r, load = covariance(factor(0)), 0.2
    out = effective_covariance(r, shrink=False, diag_load=load)
    normalised = r * (24 / np.trace(r, axis1=1, axis2=2))[:, None, None]
    wrong = normalised + load * np.eye(24)
    assert np.allclose(np.trace(out, axis1=1, axis2=2), 24)
    assert np.trace(wrong, axis1=1, axis2=2).real == pytest.approx(24 * (1 + load))
    assert np.allclose(out, wrong / (1 + load))


def test_trap_a_load_of_the_whole_mean_eigenvalue_is_refused():
    """At 100 % the ratio of signal to floor is gone: a weak source drops under the noise of the spectrum."""
    strong, weak = factor(0, rank=1), factor(1, rank=1)
    r = covariance(strong) + 0.03 * covariance(weak)
    with pytest.raises(ParameterError, match="mean eigenvalue"):
        effective_covariance(r, shrink=False, diag_load=1.0)
    wrong = r + np.trace(r, axis1=1, axis2=2)[:, None, None] / 24 * np.eye(24)
    right = effective_covariance(r, shrink=False)

    def contrast(values):
        return values[:, -2] / values[:, 0]

    assert (contrast(np.linalg.eigvalsh(right)) > 100).all() and (contrast(np.linalg.eigvalsh(wrong)) < 3).all()


def test_shrinkage_follows_the_table():
    assert shrinkage(np.array([15, 8, 3, -2, -20])).tolist() == [0.02, 0.04, 0.07, 0.10, 0.14]


def test_violations_raise_where_asked_and_warn_elsewhere():
    bad = covariance(factor(0))
    bad[0, 0, 0] = np.nan
    skewed = factor(0) @ factor(0).swapaxes(1, 2)  # a aᵀ instead of a aᴴ
    for r, text in ((bad, "not finite"), (skewed, "not Hermitian"), (np.zeros((1, 4, 4), complex), "trace")):
        with pytest.raises(DataError, match=text):
            effective_covariance(r, shrink=False, on_violation="raise")
        with pytest.warns(RuntimeWarning, match=text):
            effective_covariance(r, shrink=False)
    with pytest.raises(DataError, match="factor"):
        effective_factor(np.zeros((4, 2)), shrink=False)


@pytest.mark.parametrize(("wrong", "text"), [
    ({"beta": 0.3}, "r_samp"), ({"beta": -1}, "beta"), ({"shrink": True, "snr_db": None}, "snr_db"),
    ({"shrink": 2.0}, "shrink"), ({"diag_load": -1}, "diag_load"), ({"on_violation": "ignore"}, "on_violation")])
def test_arguments_out_of_range_are_refused(wrong, text):
    with pytest.raises(ParameterError, match=text):
        effective_covariance(covariance(factor(0)), **({"shrink": False} | wrong))


def test_gradients_pass_through_the_builder():
    f = torch.from_numpy(factor(0)).requires_grad_()
    out = effective_covariance(f @ f.mH, shrink=True, snr_db=torch.tensor([10.0, 0.0]))
    out.abs().square().sum().backward()
    assert torch.isfinite(torch.view_as_real(f.grad)).all() and f.grad.abs().max() > 0


BATCH = draw_scenes(SceneConfig(snr_db=(10.0, 10.0)), 0, range(3))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_batched_and_answer_with_trace_n(solver):
    together = sample_factor(BATCH, solver)
    assert together.dtype == np.complex64 and np.allclose((np.abs(together) ** 2).sum(axis=(1, 2)), 144, rtol=1e-4)
    alone = sample_factor(BATCH[1:2], solver)[0]
    r, s = covariance(together[1]), covariance(alone)
    assert np.linalg.norm(r - s) < 2e-2 * np.linalg.norm(r)


def test_matched_filter_and_ridge_are_their_formulas():
    g, y = sensing(BATCH).numpy()[0], BATCH.y[0]
    x = np.einsum("lmn,lm->nl", g.conj(), y)
    assert np.allclose(sample_factor(BATCH, "matched_filter")[0], x * np.sqrt(144 / (np.abs(x) ** 2).sum()), atol=1e-4)
    f = ridge_ls(BATCH, ridge=1e-3)[0]
    fit = np.einsum("lmn,nl->lm", g, f)
    scale = np.vdot(fit, y) / np.vdot(fit, fit)
    assert np.linalg.norm(y - scale * fit) < 0.05 * np.linalg.norm(y)  # a small ridge explains the data


def test_als_finds_the_wave_of_one_source_exactly_when_its_rank_is_right():
    batch = draw_scenes(SceneConfig(n_sources=(1,), snr_db=(60.0, 60.0), k_factor=(0.5, 0.5)), 0, range(4))
    f = als_lowrank(batch, rank=1, iterations=60)
    assert min(subspace_agreement(f[i], true_factor(batch)[i][:, :1]) for i in range(4)) > 0.99


def test_sbl_beats_the_others_and_puts_power_where_the_source_is():
    grid = near_field_grid(Surface(), FieldOfView())
    config = SceneConfig(n_sources=(2,), snr_db=(10.0, 10.0))
    batch = draw_scenes(config, 1, range(4))
    truth = true_factor(batch)[:, :, :2]
    kept = {name: np.mean([subspace_agreement(f, t) for f, t in zip(sample_factor(batch, name), truth, strict=True)])
            for name in SOLVERS}
    assert kept["sbl"] > max(v for k, v in kept.items() if k != "sbl") + 0.1
    atoms = steering(grid, batch.surface)
    one = draw_scenes(replace(config, n_sources=(1,), snr_db=(30.0, 30.0)), 1, range(2))
    for scene in range(2):
        spectrum = (np.abs(atoms.conj() @ sbl(one[scene:scene + 1], rank=1)[0]) ** 2)[:, 0]
        assert np.abs(grid[spectrum.argmax()][:2] - one.truth(scene)[0, :2]).max() < np.radians(6)


def test_solver_arguments_out_of_range_are_refused():
    with pytest.raises(ParameterError, match="als_lowrank"):
        sample_factor(BATCH, "als")
    with pytest.raises(ParameterError, match="rank"):
        als_lowrank(BATCH, rank=0)
    with pytest.raises(ParameterError, match="ridge"):
        ridge_ls(BATCH, ridge=0.0)
