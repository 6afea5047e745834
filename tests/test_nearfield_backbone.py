"""The grid's picture of a scene, the backbone on it, and its checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.lab.errors import CheckpointError, DataError, MissingDataError, ParameterError
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.nearfield.backbone import Backbone, BackboneConfig, candidate_cells
from ssl_kit.nearfield.beamspace import POWERS, Grid, beamspace, fit_powers, matched, plane_and_curvature, rises
from ssl_kit.nearfield.checkpoints import load_checkpoint, save_checkpoint, shipped_checkpoint
from ssl_kit.nearfield.geometry import Surface
from ssl_kit.nearfield.losses import (
    cell_targets,
    centre_loss,
    covariance_nmse,
    factor_nmse,
    factor_subspace,
    offset_loss,
    subspace_loss,
)
from ssl_kit.nearfield.refiner import SpectrumRefiner
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes
from ssl_kit.nearfield.steering import steering

GRID = Grid(7, 5, 3)
TINY = BackboneConfig(grid=GRID, width=16, heads=2, layers=1, channels=8, blocks=1, passes=2)
SCENES = draw_scenes(SceneConfig(n_sources=(2,), snr_db=(10, 10), path_gain=False), 11, range(3))
inside = st.tuples(st.floats(-1.0, 1.0), st.floats(-0.5, 0.5), st.floats(0.5, 10.0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Backbone(TINY).eval()


@given(inside)
def test_units_of_the_grid_and_back(source):
    source = torch.tensor([source])
    angles = GRID.to_angles(GRID.to_units(source))
    assert torch.allclose(angles, torch.cat([source[:, :2], 1 / source[:, 2:]], 1), atol=2e-4)


@given(inside)
def test_plane_wave_times_curvature_is_the_exact_wave(source):
    angles = torch.tensor([[source[0], source[1], 1 / source[2]]])
    plane, curvature = plane_and_curvature(angles, Surface())
    assert np.allclose((plane * curvature)[0].numpy(), steering(np.array(source), Surface()), atol=2e-3)


def dense_covariance(waves, powers, noise, n):
    return (waves * powers[:, None, None]) @ waves.mH + noise[:, None, None, None] * torch.eye(n, dtype=waves.dtype)


def dense_log_likelihood(y, covariance):
    solved = torch.linalg.solve(covariance, y[..., None])[..., 0]
    return -(torch.linalg.slogdet(covariance)[1] + (y.conj() * solved).sum(-1).real).sum(1)


def some_waves(space, n=2):
    g = torch.Generator().manual_seed(1)
    units = torch.rand(len(space.y), n, 3, generator=g) * torch.tensor([6.0, 4.0, 2.0])
    return space.waves(GRID.to_angles(units), GRID.surface)


def test_matched_beside_known_sources_is_that_of_the_dense_inverse():
    space = beamspace(SCENES, GRID)
    waves, powers, noise = some_waves(space), torch.full((3, 2), 3.0), torch.full((3,), 0.2)
    q, s = matched(space, (waves, powers, noise))
    inverse = torch.linalg.inv(dense_covariance(waves, powers, noise, 16).to(torch.complex128))
    b, y = space.dictionary.to(torch.complex128), space.y.to(torch.complex128)
    assert torch.allclose(s, (b.conj() * (inverse @ b)).real.sum(2).float(), rtol=1e-3, atol=1e-3)
    assert torch.allclose(q, ((b.mH @ inverse @ y[..., None])[..., 0].abs() ** 2).float(), rtol=1e-3, atol=1e-3)


def test_rise_is_the_rise_of_the_log_likelihood():
    space = beamspace(SCENES, GRID)
    waves, powers, noise = some_waves(space), torch.full((3, 2), 3.0), torch.full((3,), 0.2)
    rise, place = rises(*matched(space, (waves, powers, noise))), 40
    before = dense_covariance(waves, powers, noise, 16).to(torch.complex128)
    b, y = space.dictionary[..., [place]].to(torch.complex128), space.y.to(torch.complex128)
    for k, p in enumerate(POWERS):
        expected = dense_log_likelihood(y, before + p * b @ b.mH) - dense_log_likelihood(y, before)
        assert torch.allclose(rise[:, k, place].double(), expected, rtol=1e-2, atol=2e-2)


def test_powers_never_lower_the_likelihood():
    space = beamspace(SCENES, GRID)
    waves, y = some_waves(space, 4), space.y.to(torch.complex128)
    values = []
    for n in range(6):
        powers, noise = fit_powers(waves, space.y, torch.ones(3, 4), n)
        values.append(dense_log_likelihood(y, dense_covariance(waves, powers, noise, 16).to(torch.complex128)))
    steps = torch.stack(values).diff(dim=0)
    assert (steps > -0.05).all() and (torch.stack(values)[-1] > values[0]).all()


def test_scale_phase_and_order_of_snapshots_do_not_matter(network):
    turned = replace(SCENES, y=(SCENES.y[:, ::-1] * 3e-5 * np.exp(0.7j)).astype(np.complex64),
                     codes=np.ascontiguousarray(SCENES.codes[:, ::-1]))
    with torch.no_grad():
        first, second = network(beamspace(SCENES, GRID))[-1], network(beamspace(turned, GRID))[-1]
    assert torch.allclose(first.logits, second.logits, atol=2e-2)


def test_factors_have_their_trace_and_no_long_column(network):
    seen = network(beamspace(SCENES, GRID))[-1]
    angle, curvature = seen.factors(GRID.surface)
    power = seen.factor(GRID.surface).abs().square()
    assert torch.allclose(power.sum((1, 2)), torch.tensor(144.0), rtol=1e-4) and (power.sum(1) <= 144.01).all()
    assert torch.allclose(curvature.abs(), torch.tensor(1.0)) and angle.shape == curvature.shape == (3, 144, 8)


def test_every_weight_gets_a_finite_gradient(network):
    sightings = network(beamspace(SCENES, GRID))
    true = draw_scenes(SceneConfig(), 5, range(3))
    units = GRID.to_units(torch.from_numpy(true.sources).float())
    target = cell_targets(units, torch.from_numpy(true.n_sources), GRID.shape)
    total = factor_nmse(sightings[-1].factor(GRID.surface), torch.ones(3, 144, 1, dtype=torch.complex64))
    total = total + sum(centre_loss(s.logits, target) + offset_loss(s.offsets, target) for s in sightings)
    gradients = torch.autograd.grad(total, list(network.parameters()), allow_unused=True)
    missing = [n for (n, _), g in zip(network.named_parameters(), gradients, strict=True) if g is None]
    assert not missing and all(torch.isfinite(g).all() for g in gradients)


def test_fewer_passes_are_the_first_ones(network):
    space = beamspace(SCENES, GRID)
    with torch.no_grad():
        whole, one = network(space), network(space, 1)
    assert len(one) == 1 and torch.allclose(one[0].logits, whole[0].logits, atol=1e-4)


@pytest.mark.parametrize("change, words", [({"heads": 6, "width": 448}, "divisor of width=448"),
                                           ({"candidates": 3}, "5 candidates"), ({"channels": 12}, "eights"),
                                           ({"layers": 0}, "at least one layer")])
def test_sizes_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ParameterError, match=words):
        replace(BackboneConfig(), **change)


def test_what_is_wrong_with_scenes_is_said(network):
    broken = SCENES.y.copy()
    broken[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        beamspace(replace(SCENES, y=broken), GRID)
    with pytest.raises(DataError, match="zeros"):
        beamspace(replace(SCENES, y=0 * SCENES.y), GRID)
    with pytest.raises(ParameterError, match="surface"):
        beamspace(SCENES, replace(GRID, surface=Surface(8, 18)))
    with pytest.raises(ParameterError, match="105 places"):
        network(beamspace(SCENES, Grid()))


def test_candidates_are_local_maxima():
    logits = torch.full((1, *GRID.shape), -9.0)
    logits[0, 1, 1, 1], logits[0, 1, 2, 1], logits[0, 5, 3, 0] = 3.0, 2.5, 1.0
    first, second, *_ = candidate_cells(logits.flatten(1), GRID, 5)[0].tolist()
    assert GRID.indices()[[first, second]].tolist() == [[1, 1, 1], [5, 3, 0]]


@given(inside)
def test_the_offset_of_a_cell_leads_to_the_source(source):
    sources = torch.zeros(1, 5, 3) + torch.tensor([0.0, 0.0, 1.0])
    sources[0, 0] = torch.tensor(source)
    target = cell_targets(GRID.to_units(sources), torch.tensor([1]), GRID.shape)
    cell = int(target.hit[0].nonzero())
    back = GRID.to_angles(GRID.indices()[cell] + target.offset[0, cell])
    assert torch.allclose(back[:2], sources[0, 0, :2], atol=1e-3)
    assert abs(1 / back[2] - source[2]) < 2e-3 * source[2] ** 2
    assert target.offset[0, cell].abs().max() <= 0.501


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_losses_of_factors_are_those_of_covariances(seed, k):
    g = torch.Generator().manual_seed(seed)
    pred, true = (torch.randn(2, 20, n, dtype=torch.complex64, generator=g) for n in (3, 5))
    true[..., k:] = 0
    dense = (pred @ pred.mH).to(torch.complex128), (true @ true.mH).to(torch.complex128)
    assert factor_nmse(pred, true) == pytest.approx(float(covariance_nmse(*dense)), rel=1e-3)
    expected = subspace_loss(dense[0], true.to(torch.complex128), torch.tensor([k, k]))
    assert factor_subspace(pred, true) == pytest.approx(float(expected), abs=1e-3)


def test_a_checkpoint_describes_itself(tmp_path, network):
    save_checkpoint(tmp_path, network, {"seed": 4})
    again, config = load_checkpoint(tmp_path)
    assert again.config == TINY and config["about"] == {"seed": 4} and not again.training
    assert all(p.dtype == torch.float32 for p in again.parameters())
    with torch.no_grad():
        space = beamspace(SCENES, GRID)
        assert torch.allclose(again(space, 1)[0].logits, network(space, 1)[0].logits, atol=0.05)
    save_checkpoint(tmp_path / "refiner", SpectrumRefiner((8, 8, 8)))
    assert load_checkpoint(tmp_path / "refiner")[0].widths == (8, 8, 8)


def test_broken_checkpoints_are_refused_by_name(tmp_path, network):
    with pytest.raises(MissingDataError, match="model.safetensors"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, network)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = weights.read_bytes(), read_json(config)
    weights.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(tmp_path)
    weights.write_bytes(whole)
    write_json(config, described | {"kind": "crnn"})
    with pytest.raises(CheckpointError, match="crnn"):
        load_checkpoint(tmp_path)
    write_json(config, described | {"model": described["model"] | {"blocks": 2}})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path)
    write_json(config, described | {"model": described["model"] | {"colour": 2}})
    with pytest.raises(CheckpointError, match="colour"):
        load_checkpoint(tmp_path)
    config.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="config.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(MissingDataError, match="no_such"):
        shipped_checkpoint("no_such")
