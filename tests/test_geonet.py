"""The geometry-aware network: its maps against physics, its invariances, its training and its localizer."""

import json
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import heard

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import ArrayGeometry, named_array
from ssl_kit.arrays.random_arrays import random_layout, random_subarray
from ssl_kit.lab.errors import CheckpointError, DataError, ParameterError
from ssl_kit.lab.files import file_lock
from ssl_kit.localize.array_bank import ArrayBank, ArrayBankConfig, build_array_bank
from ssl_kit.localize.array_mixtures import ArrayMixtureConfig, ArrayMixtureStream
from ssl_kit.localize.checkpoints import load_checkpoint, save_checkpoint
from ssl_kit.localize.crnn import decode_azimuth
from ssl_kit.localize.geonet import GeoNet, GeoNetConfig, GeoNetTask, geonet_input
from ssl_kit.localize.geonet_localizer import GeoNetLocalizer, check_planar
from ssl_kit.localize.training import TrainingConfig, train_network

SMALL = GeoNetConfig(bins=(8, 104), n_bands=4, channels=8, blocks=2, mask_channels=4)


def plane_wave(positions_m, azimuth_deg: float, seed: int = 0, n_samples: int = 8000, elevation_deg: float = 0.0):
    "White noise from one direction, (mic, sample), with exact fractional delays."
    azimuth, elevation = np.radians(azimuth_deg), np.radians(elevation_deg)
    toward = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n_samples))
    lead = np.asarray(positions_m) @ toward / 343.0
    turned = spectrum * np.exp(2j * np.pi * np.fft.rfftfreq(n_samples, 1 / 16000) * lead[:, None])
    return np.fft.irfft(turned, n_samples)


def inputs(samples, positions_m, config=SMALL):
    positions = torch.tensor(np.asarray(positions_m), dtype=torch.float32)[None]
    x = torch.tensor(np.asarray(samples), dtype=torch.float32)[None]
    return geonet_input(x, positions, torch.ones(x.shape[:2], dtype=torch.bool), config)


@pytest.mark.parametrize("array", ["6cm", "6cm-5", "3x12cm_consecutive", "12cm", "18cm", "respeaker", "uca:16:0.1"])
def test_every_map_points_at_a_plane_wave(array):
    "A trap of banded maps: a table in another order of mics, or another sign of the phase, points elsewhere."
    positions = named_array(array).positions_m
    for azimuth in (3.0, 90.0, 222.5, 359.0):
        maps = inputs(plane_wave(positions, azimuth), positions).maps[0].mean((1, 2)).numpy()
        found = decode_azimuth(np.exp(maps - maps.max(-1, keepdims=True)), reach=1)
        assert angular_error_deg(found[[0, 2]], azimuth).max() < 1.0, (array, azimuth, found)


def test_the_second_map_is_made_for_elevated_sources():
    positions = named_array("12cm").positions_m
    maps = inputs(plane_wave(positions, 77.0, elevation_deg=40.0), positions).maps[0].mean((1, 2))
    assert maps[1].max() > maps[0].max() + 0.5 and int(maps[1].argmax()) == 15


@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_order_of_mics_and_absent_mics_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    layout = random_layout(rng)
    chosen = random_subarray(rng, layout, (4, 8))
    positions, samples = layout.positions_m[chosen], rng.standard_normal((len(chosen), 4800))
    plain = inputs(samples, positions)
    shuffled = np.r_[rng.permutation(len(chosen) - 1), len(chosen) - 1]      # the reference stays last
    other = inputs(samples[shuffled], positions[shuffled])
    assert torch.allclose(plain.maps, other.maps, atol=2e-3)
    assert torch.allclose(plain.features, other.features, atol=2e-3)
    padded = geonet_input(torch.tensor(np.pad(samples, ((2, 0), (0, 0))), dtype=torch.float32)[None],
                          torch.tensor(np.pad(positions, ((2, 0), (0, 0))), dtype=torch.float32)[None],
                          torch.tensor([[False] * 2 + [True] * len(chosen)]), SMALL)
    assert torch.allclose(plain.maps, padded.maps, atol=2e-3)


def test_a_turned_world_turns_the_answer():
    torch.manual_seed(1)
    network, geometry = GeoNet(SMALL).eval(), named_array("12cm")
    samples = np.random.default_rng(2).standard_normal((9, 8000))
    with torch.no_grad():
        here = network(inputs(samples, geometry.positions_m))
        turned = network(inputs(samples, geometry.rotated(35.0).positions_m))
    assert torch.allclose(here.roll(7, -1), turned, atol=1e-3)


def test_evidence_beats_srp_phat_for_a_small_array():
    "Why the maps are whitened: bins in which a 6 cm array hears no difference say little, where PHAT counts them all."
    from ssl_kit.arrays.diffuse import diffuse_field

    config = GeoNetConfig(bins=(4, 128), n_bands=4)
    geometry, errors = named_array("6cm"), {0: [], 2: []}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        azimuth = rng.uniform(0, 360)
        noise = diffuse_field(rng.standard_normal((9, 16000)), geometry.positions_m)
        samples = plane_wave(geometry.positions_m, azimuth, seed, 16000) + 0.5 * noise
        maps = inputs(samples, geometry.positions_m, config).maps[0].mean((1, 2)).numpy()
        for k, found in errors.items():
            found.append(angular_error_deg(decode_azimuth(np.exp(maps[k] - maps[k].max()), reach=1), azimuth))
    assert np.mean(errors[0]) < 0.6 * np.mean(errors[2]), {k: np.mean(v) for k, v in errors.items()}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    config = ArrayBankConfig(groups=2, rooms=3, walks=1, noises=1, n_taps=2048, walk_s=1.0, noise_s=1.2)
    return ArrayBank(build_array_bank(folder / "bank", config, workers=1))


def stream(bank, seed=0, **changes):
    speech = [(8000 * np.random.default_rng(0).standard_normal(40000)).astype(np.int16)]
    config = ArrayMixtureConfig(**({"n_samples": 8000, "batch_size": 3} | changes))
    return ArrayMixtureStream(bank, speech, config, seed)


def test_mixtures_depend_on_seed_and_step_alone(bank):
    first, again, other = stream(bank).draw(4), stream(bank).draw(4), stream(bank).draw(5)
    assert (first.samples == again.samples).all() and not torch.equal(first.azimuth_deg, other.azimuth_deg)
    assert first.mic_mask.sum(1).min() >= 4 and torch.isfinite(first.samples).all()


def test_a_bank_refuses_other_settings_and_unfinished_ones(bank, tmp_path):
    config = ArrayBankConfig(groups=1, rooms=1, walks=0, noises=1, n_taps=1024, noise_s=1.0)
    folder = build_array_bank(tmp_path / "bank", config, workers=1)
    with pytest.raises(DataError, match="other settings"):
        build_array_bank(folder, ArrayBankConfig(groups=2, rooms=1, walks=0, noises=1, n_taps=1024), workers=1)
    state = json.loads((folder / "bank.json").read_text())
    (folder / "bank.json").write_text(json.dumps(state | {"done": []}))
    with pytest.raises(DataError, match="finished groups"):
        ArrayBank(folder)
    with pytest.raises(DataError, match="bank.json"):
        ArrayBank(tmp_path / "nowhere")
    with pytest.raises(ParameterError, match="n_samples"):
        stream(bank, n_samples=32000)


def test_a_killed_bank_ends_in_the_same_files(tmp_path):
    config = "ArrayBankConfig(groups=12, rooms=1, walks=0, noises=1, n_taps=512, noise_s=0.5)"
    code = textwrap.dedent(f"""
        import os, signal, sys
        from ssl_kit.localize import array_bank
        from ssl_kit.localize.array_bank import *

        def finished_groups(jobs, *rest, results=array_bank._results):
            for number, result in enumerate(results(jobs, *rest)):
                if number == 11:
                    os.kill(os.getpid(), signal.SIGKILL)  # one computed since bank.json was written
                yield result

        array_bank._results = finished_groups
        build_array_bank(sys.argv[1], {config}, workers=1)""")
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(json.loads((tmp_path / "killed" / "bank.json").read_text())["done"]) == 10
    config = ArrayBankConfig(groups=12, rooms=1, walks=0, noises=1, n_taps=512, noise_s=0.5)
    killed = ArrayBank(build_array_bank(tmp_path / "killed", config, workers=1))
    whole = ArrayBank(build_array_bank(tmp_path / "whole", config, workers=1))
    for name in config.shapes():
        assert np.array_equal(getattr(killed, name), getattr(whole, name)), name


def test_two_writers_of_a_bank_take_turns(tmp_path, capsys):
    """One that looked before the other began would empty the files that the other has mapped and returned."""
    config = ArrayBankConfig(groups=1, rooms=1, walks=0, noises=1, n_taps=512, noise_s=0.5)
    second = threading.Thread(target=build_array_bank, args=(tmp_path / "bank", config), kwargs={"workers": 1})
    with file_lock(tmp_path / "bank" / ".lock"):
        second.start()
        assert str(tmp_path / "bank") in heard(capsys, "is at it; waiting", second)
        assert not list((tmp_path / "bank").glob("*.npy"))
    second.join(240)
    assert ArrayBank(tmp_path / "bank").responses.any()


def test_it_learns_resumes_and_comes_back_from_its_checkpoint(bank, tmp_path):
    plan = TrainingConfig(steps=4, epoch_steps=2, warmup_steps=1, precision="32-true", learning_rate=3e-3)
    task, quiet = GeoNetTask(SMALL), {"report": lambda line: None, "valid_batches": 1}
    _, whole = train_network(tmp_path / "a", task, plan, stream(bank), stream(bank, 1), **quiet)
    train_network(tmp_path / "b", task, plan, stream(bank), stream(bank, 1), time_limit_s=0, **quiet)
    network, resumed = train_network(tmp_path / "b", task, plan, stream(bank), stream(bank, 1), **quiet)
    np.testing.assert_allclose([r["loss"] for r in resumed], [r["loss"] for r in whole], rtol=1e-5)
    with pytest.raises(ParameterError, match="bank|point_noise_share"):
        train_network(tmp_path / "b", task, plan, stream(bank, point_noise_share=0.0), **quiet)
    loaded, about = load_checkpoint(save_checkpoint(tmp_path / "c", network, {"note": "small"}))
    assert about["kind"] == "geonet" and loaded.config == SMALL
    samples = np.random.default_rng(0).standard_normal((4, 16000)).astype(np.float32)
    one, other = GeoNetLocalizer(network), GeoNetLocalizer.load(tmp_path / "c")
    np.testing.assert_array_equal(one(samples, named_array("respeaker")).score,
                                  other(samples, named_array("respeaker")).score)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"kind": "crnn"}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")


def test_one_array_overfits_to_its_direction():
    "The loss falls to near its floor when four plane waves are all there is: gradients reach masks and trunk."
    torch.manual_seed(0)
    positions, azimuths = named_array("6cm").positions_m, [10.0, 100.0, 190.0, 280.0]
    parts = [inputs(plane_wave(positions, a) + 0.5 * np.random.default_rng(3).standard_normal((9, 8000)), positions)
             for a in azimuths]
    prepared = (torch.cat([p.maps for p in parts]), torch.cat([p.features for p in parts]),
                torch.cat([p.sharpness for p in parts]), torch.tensor(azimuths)[:, None].expand(-1, 5),
                torch.ones(4, 5))
    task, network = GeoNetTask(SMALL), GeoNet(SMALL).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(network, prepared, TrainingConfig()).backward()
        optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    with torch.no_grad():
        assert angular_error_deg(task.azimuth_deg(network.eval(), prepared), np.array(azimuths)[:, None]).mean() < 3


def test_the_localizer_refuses_what_it_cannot_do():
    localizer, samples = GeoNetLocalizer(GeoNet(SMALL)), np.random.default_rng(0).standard_normal((4, 16000))
    with pytest.raises(ParameterError, match="one line"):
        localizer(samples, named_array("ula:4:0.05"))
    with pytest.raises(ParameterError, match="16000 Hz"):
        localizer(samples, named_array("respeaker"), 48000)
    with pytest.raises(DataError, match="at least 1600"):
        localizer(samples[:, :1599], named_array("respeaker"))
    with pytest.raises(DataError, match="4 mics"):
        localizer(samples[:3], named_array("respeaker"))
    with pytest.raises(ParameterError, match="one line"):
        check_planar(ArrayGeometry(np.array([[0, 0, 0], [0, 0, 0.1], [0.0, 0.05, 0]]), label="a mast"))


def test_pieces_do_not_show(monkeypatch):
    "Long recordings are cut; away from the cuts' reach the answers are those of the whole."
    from ssl_kit.localize import geonet_localizer

    torch.manual_seed(0)
    localizer, samples = GeoNetLocalizer(GeoNet(SMALL)), np.random.default_rng(0).standard_normal((1, 4, 32000))
    whole, _ = localizer.intermediates(samples, named_array("respeaker"))
    monkeypatch.setattr(geonet_localizer, "_PIECE_FRAMES", 6)
    cut, _ = localizer.intermediates(samples, named_array("respeaker"))
    assert cut.shape == whole.shape and np.abs(cut - whole).mean() < 0.1 * np.abs(whole).mean() + 0.05


_DDP = """
import sys, torch
from ssl_kit.localize.array_bank import ArrayBank
from ssl_kit.localize.array_mixtures import ArrayMixtureConfig, ArrayMixtureStream
from ssl_kit.localize.geonet import GeoNetConfig, GeoNetTask
from ssl_kit.localize.training import TrainingConfig, train_network
import numpy as np
torch.set_num_threads(1)
speech = [(8000 * np.random.default_rng(0).standard_normal(40000)).astype(np.int16)]
stream = ArrayMixtureStream(ArrayBank(sys.argv[1]), speech, ArrayMixtureConfig(n_samples=8000, batch_size=2))
config = GeoNetConfig(bins=(8, 104), n_bands=4, channels=8, blocks=2, mask_channels=4)
plan = TrainingConfig(steps=2, epoch_steps=1, warmup_steps=1, precision="32-true")
train_network(sys.argv[2], GeoNetTask(config), plan, stream, stream, 1, device="cpu", devices=2)
"""


def test_two_processes_train_one_network(bank, tmp_path):
    "Distributed data parallel on two CPU processes: one history, one checkpoint, batches that differ."
    script = tmp_path / "train.py"
    script.write_text(_DDP)
    done = subprocess.run([sys.executable, str(script), str(bank.folder), str(tmp_path / "run")], capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [row["step"] for row in history] == [1, 2] and (tmp_path / "run" / "last.ckpt").is_file()
