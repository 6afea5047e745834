"""Training of enhancement networks: learning, resuming to the same losses, validation, device mixing, command."""

import argparse
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_kit.enhance import training
from ssl_kit.enhance.checkpoints import load_checkpoint
from ssl_kit.enhance.diagnostics import MaskWarning
from ssl_kit.enhance.final_net import FinalConfig
from ssl_kit.enhance.models import make_network
from ssl_kit.enhance.train_command import RECIPES, add_train_enhance_arguments, make_task, run_train_enhance
from ssl_kit.enhance.training import EnhanceTask, Validation, train_network
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.training import TrainingConfig

TINY = FinalConfig(entry=4, channels=8, frequency_hidden=4, time_hidden=8, blocks=1)
PLAN = TrainingConfig(steps=6, epoch_steps=2, warmup_steps=2, precision="32-true", average_decay=0.5)


class Tones:
    """Tones in white noise at about 0 dB."""

    def __init__(self, seed=0, n_samples=2048):
        self.seed, self.n_samples = seed, n_samples

    def draw(self, step):
        rng = np.random.default_rng([self.seed, step])
        t = np.arange(self.n_samples) / 16000
        clean = np.stack([0.1 * np.sin(2 * np.pi * rng.uniform(200, 3000) * t) for _ in range(2)])
        noisy = clean + 0.07 * rng.standard_normal(clean.shape)
        return SimpleNamespace(noisy=torch.from_numpy(noisy).float(), clean=torch.from_numpy(clean).float())

    def identity(self):
        return {"tones": self.seed}


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        return train_network(*args, metrics=(), report=lambda row: None, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_that_was_killed_has_the_same_losses(tmp_path, precision):
    plan = TrainingConfig(**{**vars(PLAN), "precision": precision})
    task = EnhanceTask("final", TINY)
    one, whole = quiet(tmp_path / "a", task, plan, Tones(), Tones(1), 1)
    _, part = quiet(tmp_path / "b", task, plan, Tones(), Tones(1), 1, time_limit_s=0)
    two, rest = quiet(tmp_path / "b", task, plan, Tones(), Tones(1), 1)
    assert len(part) == 1 and [row["step"] for row in rest] == [2, 4, 6]
    for name in ("loss", "valid_loss", "mask_identity"):
        np.testing.assert_allclose([row[name] for row in rest], [row[name] for row in whole], rtol=1e-5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ParameterError, match="model"):
        quiet(tmp_path / "b", EnhanceTask("final", FinalConfig(**{**vars(TINY), "causal": True})), plan, Tones())


def test_dropout_resumes_too(tmp_path):
    model = make_network("dpt", d_model=8, heads=2, feedforward=8, blocks=1, dropout=0.3).config
    whole = quiet(tmp_path / "a", EnhanceTask("dpt", model), PLAN, Tones())[1]
    quiet(tmp_path / "b", EnhanceTask("dpt", model), PLAN, Tones(), time_limit_s=0)
    rest = quiet(tmp_path / "b", EnhanceTask("dpt", model), PLAN, Tones())[1]
    np.testing.assert_allclose([row["loss"] for row in rest], [row["loss"] for row in whole], rtol=1e-5)


@pytest.mark.parametrize("kind, settings", [
    ("final", vars(TINY)), ("final", vars(TINY) | {"causal": True}), ("crn", {"channels": (4, 8), "hidden": 16}),
    ("stft", {"d_model": 16, "feedforward": 16, "layers": 1}), ("dpt", {"d_model": 16, "feedforward": 16, "blocks": 1}),
    ("mel", {"d_model": 16, "feedforward": 16, "layers": 1})])
def test_every_kind_learns(kind, settings, tmp_path):
    task = EnhanceTask(kind, make_network(kind, **settings).config)
    plan = TrainingConfig(steps=12, epoch_steps=4, warmup_steps=2, learning_rate=1e-2, precision="32-true")
    _, history = quiet(tmp_path, task, plan, Tones())
    assert history[-1]["loss"] < history[0]["loss"] and all(np.isfinite(row["loss"]) for row in history)


def test_the_mel_network_learns_from_mels():
    network = make_network("mel", d_model=16, feedforward=16, layers=1)
    batch = Tones().draw(0)
    task = EnhanceTask("mel", network.config)
    loss = task.loss(network, task.prepare(batch), PLAN)
    loss.backward()
    assert network.body.encoder[0].weight.grad.abs().sum() > 0
    assert float(network.loss(network.mels(batch.clean), batch.clean)) < 1e-9 < float(loss.detach())


def test_validation_measures_fixed_clips_and_leaves_the_network_as_it_was():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    task = EnhanceTask("final", TINY)
    torch.manual_seed(0)
    network = task.network().train()
    stream = Tones(n_samples=16000)
    validate = Validation(task, stream, 1)
    with pytest.warns(MaskWarning, match="near the identity"):      # an untrained network passes sound through
        figures = validate(network)
    assert network.training and figures["mask_collapsed"] == 1
    for name in ("valid_loss", "valid_pesq", "valid_stoi", "valid_si_sdr", "mask_spread_frequency"):
        assert np.isfinite(figures[name])
    assert figures["valid_failed"] == 0 and -2 < figures["valid_si_sdr"] < 3
    with pytest.warns(MaskWarning):
        assert validate(network) == figures


def test_a_clip_that_cannot_be_measured_is_counted():
    task = EnhanceTask("final", TINY)

    class Silent(Tones):
        def draw(self, step):
            batch = super().draw(step)
            batch.clean[0] = 0
            return batch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        figures = Validation(task, Silent(n_samples=8000), 1, ("si_sdr",))(task.network())
    assert figures["valid_failed"] == 1 and np.isfinite(figures["valid_si_sdr"])


def test_a_collapsed_mask_is_named_in_every_epoch(tmp_path):
    task = EnhanceTask("stft", make_network("stft", d_model=16, feedforward=16, layers=1).config)
    with pytest.warns(MaskWarning) as caught:
        _, history = train_network(tmp_path, task, PLAN, Tones(), Tones(1), 1, (), report=lambda row: None)
    assert len([w for w in caught if w.category is MaskWarning]) == 3
    assert [row["mask_collapsed"] for row in history] == [1.0] * 3


def test_tasks_refuse_other_configurations():
    with pytest.raises(ParameterError, match="CRNConfig"):
        EnhanceTask("crn", TINY)
    with pytest.raises(ParameterError, match="n_batches"):
        Validation(EnhanceTask("final", TINY), Tones(), 0)


# mixtures on the device


def pools(rng=None):
    from ssl_kit.enhance.mixtures import Pools

    rng = rng or np.random.default_rng(0)
    parts = [np.int16(8000 * rng.standard_normal(n).clip(-3, 3)) for n in (5000, 9000, 30000, 700, 20000)]
    return Pools(tuple(parts[:3]), tuple(parts[3:]), ("a", "b", "c"), ("d", "e"))


def test_clips_of_the_device_have_the_ratio_and_level_that_were_drawn():
    from ssl_kit.enhance.device_mixtures import DeviceMixtures
    from ssl_kit.enhance.mixtures import MixConfig

    stream = DeviceMixtures(pools(), MixConfig(n_samples=8000, batch_size=32), seed=3)
    batch = stream.draw(5)
    rest = batch.noisy - batch.clean
    ratio_db = 10 * torch.log10(batch.clean.square().mean(-1) / rest.square().mean(-1))
    torch.testing.assert_close(ratio_db, batch.snr_db, atol=0.05, rtol=0)
    level_db = 10 * torch.log10(batch.noisy.square().mean(-1))
    assert -25.01 < level_db.min() and level_db.max() < -9.99 and batch.noisy.abs().max() <= 0.991
    again = DeviceMixtures(pools(), MixConfig(n_samples=8000, batch_size=32), seed=3).draw(5)
    assert torch.equal(batch.noisy, again.noisy) and torch.equal(batch.clean, again.clean)
    other = DeviceMixtures(pools(), MixConfig(n_samples=8000, batch_size=32), seed=4)
    assert not torch.equal(other.draw(5).noisy, batch.noisy) and other.identity() != stream.identity()


def test_a_short_utterance_is_whole_and_noise_goes_round():
    from ssl_kit.enhance.device_mixtures import _Recordings

    speech = _Recordings([np.arange(1, 6, dtype=np.int16), np.arange(10, 14, dtype=np.int16)], "cpu")
    cut = speech.cut(np.array([0, 1]), np.array([-2, 1]), 8, loop=False) * 32768
    assert cut.tolist() == [[0, 0, 1, 2, 3, 4, 5, 0], [11, 12, 13, 0, 0, 0, 0, 0]]
    cut = speech.cut(np.array([1, 0]), np.array([2, 4]), 6, loop=True) * 32768
    assert cut.tolist() == [[12, 13, 10, 11, 12, 13], [5, 1, 2, 3, 4, 5]]
    energy = speech.energy_of(np.array([0, 1]), np.array([-2, 1]), np.array([3, 9])) * 32768 ** 2
    np.testing.assert_allclose(energy, [1 + 4 + 9, 121 + 144 + 169])


def test_silent_speech_is_refused():
    from dataclasses import replace

    from ssl_kit.enhance.device_mixtures import DeviceMixtures
    from ssl_kit.enhance.mixtures import MixConfig

    silent = replace(pools(), speech=(np.zeros(9000, np.int16),), speech_names=("s",))
    with pytest.raises(DataError, match="silent"):
        DeviceMixtures(silent, MixConfig(n_samples=800, batch_size=2)).draw(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_and_mixing_on_a_gpu(tmp_path):
    from ssl_kit.enhance.device_mixtures import DeviceMixtures
    from ssl_kit.enhance.mixtures import MixConfig

    config = MixConfig(n_samples=8000, batch_size=4)
    on_gpu, on_cpu = (DeviceMixtures(pools(), config, device=device) for device in ("cuda", "cpu"))
    torch.testing.assert_close(on_gpu.draw(1).noisy.cpu(), on_cpu.draw(1).noisy, atol=1e-4, rtol=1e-3)
    plan = TrainingConfig(**{**vars(PLAN), "precision": "auto"})
    _, history = quiet(tmp_path, EnhanceTask("final", TINY), plan, on_gpu, on_cpu, 1, device="cuda")
    assert len(history) == 3 and all(np.isfinite(row["loss"]) for row in history)


# command


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_train_enhance_arguments(parser)
    return parser.parse_args(list(arguments))


def test_from_a_name_to_a_checkpoint(tmp_path, capsys, monkeypatch):
    from ssl_kit.enhance import mixtures, train_command

    monkeypatch.setattr(mixtures, "load_pools", lambda *args: pools(np.random.default_rng(len(args))))
    monkeypatch.setattr(train_command, "make_task", lambda recipe: EnhanceTask("final", TINY))
    small = ["final-small", str(tmp_path / "m"), "--steps", "2", "--epoch-steps", "1", "--batch-size", "2", "--clip-s",
             "0.2", "--mixers", "0", "--valid-batches", "1", "--no-metrics", "--json", "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        assert run_train_enhance(parsed(*small, "--time-limit", "0")) == 3
        assert not json.loads(capsys.readouterr().out)["complete"]
        assert run_train_enhance(parsed(*small)) == 0
        done = json.loads(capsys.readouterr().out)
        assert done["complete"] and [row["step"] for row in done["history"]] == [1, 2]
        network, about = load_checkpoint(done["checkpoint"])
        assert network.config == TINY and about["about"]["steps"] == 2 and "valid_loss" in about["about"]["validation"]
        longer = [*small[:1], str(tmp_path / "longer"), *small[2:], "--start", done["checkpoint"], "--mix", "device"]
        assert run_train_enhance(parsed(*longer)) == 0


@pytest.mark.parametrize("options, words", [
    (["dpt", "x", "--causal"], "final"), (["crn", "x", "--steps", "0"], "more than 0"),
    (["crn", "x", "--mixers", "-1"], "--mixers"), (["crn", "x", "--speeds", "fast"], "--speeds"),
    (["crn", "x", "--start", "nowhere"], "nowhere"), (["crn", "x", "--speech", "nobody"], "nobody")])
def test_what_it_refuses(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=words):
        run_train_enhance(parsed(*options))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_every_recipe_makes_its_network():
    for name, recipe in RECIPES.items():
        task = make_task(recipe)
        assert task.config.kind == recipe.kind and recipe.steps % recipe.epoch_steps == 0, name
    assert training.VALID_METRICS == ("pesq", "stoi", "si_sdr")
