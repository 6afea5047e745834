"""Training of near-field networks: scenes by number, guarded gradients, resuming, proposals, commands."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_kit.lab import training as loop
from ssl_kit.lab.errors import ParameterError
from ssl_kit.nearfield.backbone import Backbone, BackboneConfig
from ssl_kit.nearfield.beamspace import beamspace
from ssl_kit.nearfield.cards import model_card
from ssl_kit.nearfield.covariance import covariance_audit
from ssl_kit.nearfield.learned import audited_paths, gap_share
from ssl_kit.nearfield.losses import aux_loss
from ssl_kit.nearfield.proposals import ProposalConfig, detect_both, judge_proposals
from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes
from ssl_kit.nearfield.train_command import (
    RECIPES,
    add_train_nearfield_arguments,
    chosen_nearfield_recipe,
    run_train_nearfield,
    training_command,
)
from ssl_kit.nearfield.training import (
    TEST_SEED,
    VALID_SEED,
    GradientGuard,
    NearfieldStream,
    NearfieldTask,
    NearfieldTaskConfig,
    StreamConfig,
    even_factor,
    objective,
)

TINY = BackboneConfig(width=16, heads=2, layers=1, channels=8, blocks=1, passes=1, dropout=0.1)
CONFIG = StreamConfig(batch_size=2, steps=4, blended_scenes=1)


def task():
    torch.manual_seed(0)
    return NearfieldTask(NearfieldTaskConfig(TINY))


def test_a_batch_is_a_function_of_seed_and_step():
    stream = NearfieldStream(replace(CONFIG, batch_size=6))
    first, again, other = stream.draw(3), NearfieldStream(replace(CONFIG, batch_size=6)).draw(3), stream.draw(2)
    assert (first.scenes.y == again.scenes.y).all() and not (first.scenes.y[0] == other.scenes.y[0]).all()
    numbers = np.concatenate([stream.draw(k).scenes.index for k in range(4)])
    assert len(set(numbers.tolist())) == 24
    assert [stream.draw(k).phase for k in range(4)] == ["warm-up"] * 3 + ["joint"]
    assert np.allclose((np.abs(first.factor) ** 2).sum(axis=(1, 2)), 144, rtol=1e-4)
    columns = (np.abs(even_factor(first.scenes)) ** 2).sum(axis=1)
    for row, k in zip(columns, first.scenes.n_sources, strict=True):
        assert np.allclose(row[:k], 144 / k) and np.allclose(row[k:], 0)


def test_seeds_of_validation_and_test_are_refused_in_training():
    for seed in (VALID_SEED, TEST_SEED):
        with pytest.raises(ParameterError, match="kept for validation"):
            StreamConfig(seed=seed)


def test_guarded_gradients_are_the_gradients():
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    (layer(x) ** 2).sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    guarded = GradientGuard()((layer(x) ** 2).sum(), layer)
    (3 * guarded).backward()
    assert all(torch.allclose(p.grad, 3 * g) for p, g in zip(layer.parameters(), expected, strict=True))


def test_trap_one_nan_does_not_reach_the_weights_and_too_many_name_the_parameter():
    layer, guard = torch.nn.Linear(2, 1), GradientGuard(limit=2)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.1)
    guard((layer(torch.ones(1, 2)) ** 2).sum(), layer).backward()
    optimizer.step()
    weights = [p.detach().clone() for p in layer.parameters()]
    moments = optimizer.state[layer.weight]["exp_avg"].clone()
    bad = torch.tensor([[1.0, float("nan")]])
    for _ in range(2):
        optimizer.zero_grad()
        loss = guard((layer(bad) ** 2).sum(), layer)
        loss.backward()
        optimizer.step()
        assert np.isfinite(float(loss.detach()))
    assert all(torch.equal(p, w) for p, w in zip(layer.parameters(), weights, strict=True))
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], moments) and guard.skipped == ["weight", "weight"]
    with pytest.raises(ParameterError, match="3 steps .* weight"):
        guard((layer(bad) ** 2).sum(), layer)


class Poisoned(NearfieldStream):
    """One step has a true factor that is not finite."""

    def draw(self, step):
        drawn = super().draw(step)
        if step == 1:
            drawn.factor[0, 0, 0] = np.nan
        return drawn


def test_a_poisoned_step_is_left_out_of_a_training(tmp_path):
    one = task()
    config = loop.TrainingConfig(steps=3, epoch_steps=1, warmup_steps=1, precision="32-true")
    network, history = loop.train_network(tmp_path, one, config, Poisoned(replace(CONFIG, steps=3)),
                                          report=lambda line: None)
    assert len(one.guard.skipped) == 1 and all(np.isfinite(row["loss"]) for row in history)
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_a_training_that_was_stopped_goes_on_to_the_same_losses(tmp_path):
    config = loop.TrainingConfig(steps=4, epoch_steps=2, warmup_steps=1, precision="32-true")
    quiet = {"report": lambda line: None}
    _, whole = loop.train_network(tmp_path / "whole", task(), config, NearfieldStream(CONFIG), **quiet)
    loop.train_network(tmp_path / "parts", task(), config, NearfieldStream(CONFIG), time_limit_s=1e-6, **quiet)
    _, parts = loop.train_network(tmp_path / "parts", task(), config, NearfieldStream(CONFIG), **quiet)
    assert [row["step"] for row in parts] == [2, 4]
    assert np.allclose([row["loss"] for row in parts], [row["loss"] for row in whole], rtol=1e-6)


def test_a_few_steps_on_one_batch_lower_its_loss():
    one = task()
    network, prepared = one.network().train(), one.prepare(NearfieldStream(replace(CONFIG, batch_size=4)).draw(0))
    optimizer, losses = torch.optim.AdamW(network.parameters(), 3e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = one.loss(network, prepared, loop.TrainingConfig(precision="32-true"))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]


def test_a_pair_beyond_the_cap_costs_the_cap_and_pulls_nothing():
    true = torch.tensor([[[0.0, 0.0, 2.0]] + [[0.0, 0.0, 1.0]] * 4])
    far = true.clone().requires_grad_()
    loss = aux_loss(far + torch.tensor([0.9, 0.3, 0.0]), true, torch.tensor([1]), cap=0.3)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.3) and far.grad.abs().max() == 0


def test_objective_is_better_for_more_found_and_nearer():
    base = {"rmse_xyz_m": 1.0, "f1": 0.5}
    assert objective(base) == pytest.approx(1.0)
    assert objective(base | {"f1": 0.6}) < objective(base) < objective(base | {"rmse_xyz_m": 1.2})
    assert np.isfinite(objective({"rmse_xyz_m": float("nan"), "f1": 0.0}))


@pytest.fixture(scope="module")
def proposed():
    torch.manual_seed(0)
    network = Backbone(TINY).eval()
    batch = draw_scenes(SceneConfig(n_sources=(2,), snr_db=(15, 15), path_gain=False, k_factor=(0, 0)), 21, range(4))
    with torch.no_grad():
        seen = network(beamspace(batch, network.config.grid))[-1]
    return network, batch, seen


@pytest.mark.parametrize("extra", [0, 2])
def test_proposals_are_refined_and_what_the_data_do_not_need_goes(proposed, extra):
    network, batch, seen = proposed
    grid = network.config.grid
    true = grid.to_units(torch.from_numpy(batch.sources[:, :2]).float()) + 0.2
    false = torch.tensor([[1.0, 1.0, 1.0], [15.0, 7.0, 3.0]])[:extra].expand(4, -1, -1)
    angles = grid.to_angles(torch.cat([true, false], 1))
    given = seen._replace(angles=angles, probability=torch.ones(4, 2 + extra), powers=torch.ones(4, 2 + extra))
    found = judge_proposals(batch, given, grid, ProposalConfig(forward_rounds=0))
    assert [len(e) for e in found] == [2, 2, 2, 2] and all(e.path == "proposals" for e in found)
    for i, e in enumerate(found):
        assert np.degrees(np.abs(e.sources[:, :2] - batch.truth(i)[:, :2])).max() < 1.5


def test_what_was_not_proposed_is_scanned_for_and_the_better_search_wins(proposed):
    network, batch, seen = proposed
    nothing = seen._replace(probability=torch.zeros_like(seen.probability))
    found = judge_proposals(batch, nothing, network.config.grid, ProposalConfig(forward_rounds=3))
    assert [len(e) for e in found] == [2, 2, 2, 2]
    both = detect_both(network, batch)
    assert [len(e) for e in both] == [2, 2, 2, 2] and {e.path for e in both} <= {"proposals", "likelihood"}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shrink", [False, True])
def test_all_paths_build_the_same_blended_covariance(beta, shrink):
    g = torch.Generator().manual_seed(3)
    pred, samp = ((f / f.abs().square().sum((1, 2), keepdim=True).sqrt() * 12).numpy() for f in
                  (torch.randn(2, 144, n, dtype=torch.complex64, generator=g) for n in (8, 5)))
    rows = covariance_audit(audited_paths(pred, samp, beta, np.array([0.0, 12.0]), shrink), "validation")
    assert max(row["distance"] for row in rows) < 2.4e-6
    assert all(row["trace"] == pytest.approx(144, rel=1e-5) for row in rows)


def test_share_of_a_gap():
    assert gap_share(0.2, 0.2, 1.0) == 0 and gap_share(0.2, 1.0, 1.0) == 1 and np.isnan(gap_share(1.0, 1.0, 1.0))


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_train_nearfield_arguments(parser)
    return parser.parse_args(list(words))


def test_recipes_are_changed_by_arguments_and_the_command_says_how():
    args = parsed("backbone", "there", "--scenes", "3200", "--width", "256", "--heads", "8")
    recipe = chosen_nearfield_recipe(args)
    assert (recipe.steps, recipe.steps % recipe.epoch_steps, recipe.width) == (100, 0, 256)
    assert training_command(args, recipe).startswith("ssl-kit train-nearfield backbone FOLDER --scenes 3200")
    assert chosen_nearfield_recipe(parsed("backbone", "there")) == RECIPES["backbone"]
    for words in (("--scenes", "10", "--steps", "10"), ("--steps", "0"), ("--workers", "-1")):
        with pytest.raises(ParameterError, match="--"):
            chosen_nearfield_recipe(parsed("backbone", "there", *words))


def test_the_command_stops_in_time_and_goes_on(tmp_path, capsys):
    words = ["backbone", str(tmp_path), "--steps", "4", "--epoch-steps", "2", "--batch-size", "2", "--valid-scenes",
             "4", "--width", "16", "--heads", "2", "--layers", "1", "--channels", "8", "--blocks", "1", "--passes", "1",
             "--precision", "32-true"]
    assert run_train_nearfield(parsed(*words, "--time-limit", "0.000001")) == 3
    assert "stopped at step 2 of 4" in capsys.readouterr().out
    assert run_train_nearfield(parsed(*words)) == 0
    card = model_card(tmp_path / "checkpoint")
    assert "distinct simulated scenes" in card and "--steps" not in card and "--scenes 8" in card
    folder = tmp_path / "refiner"
    refiner = ["refiner", str(folder), "--backbone", str(tmp_path / "checkpoint"), "--steps", "1", "--batch-size", "2",
               "--valid-scenes", "2", "--precision", "32-true"]
    assert run_train_nearfield(parsed(*refiner)) == 0
    assert (folder / "checkpoint" / "README.md").read_text(encoding="utf-8").startswith("# Spectrum refiner")
