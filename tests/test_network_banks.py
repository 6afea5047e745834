"""Banks of several networks: the same rooms, seeded passes, maps of frames, and rows that can be heard again."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.arrays.geometry import far_field_delays_s, named_array
from ssl_kit.arrays.rooms import SceneConfig
from ssl_kit.lab.dataroot import data_root
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.threads import torch_threads
from ssl_kit.localize.bank_frames import ask_srp, frame_maps
from ssl_kit.localize.banks import BankPlan, make_parts, plan_of, render, render_again, write_banks
from ssl_kit.localize.checkpoints import save_checkpoint
from ssl_kit.localize.crnn import CRNN, CRNNConfig
from ssl_kit.localize.geonet import GeoNet, GeoNetConfig
from ssl_kit.localize.ipdnet import IPDNet, IPDNetConfig
from ssl_kit.localize.probes import CRNNProbe, IPDNetProbe, fit_scale, probe_of
from ssl_kit.localize.srp import SRP, SRPConfig, framing, srp_map
from ssl_kit.routing.bank import head_gap, load_bank, load_fallback
from ssl_kit.routing.registry import available_detectors, detector_classes

SCENES = SceneConfig(duration_s=0.5, recordings_per_room=2, t60_s=(0.2, 0.3))
ARRAYS = ("6cm", "3x12cm_alternating")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    models = {"crnn": CRNN(CRNNConfig(channels=4, hidden=16, dropout=0.3)),
              "member": CRNN(CRNNConfig(channels=4, hidden=16)),
              "ipdnet": IPDNet(IPDNetConfig(hidden=8, blocks=1, n_bins=32)),
              "geonet": GeoNet(GeoNetConfig(channels=64, blocks=1, mask_channels=2))}
    return {name: str(save_checkpoint(folder / name, model, {"array": "6cm-5" if name == "ipdnet" else "6cm"}))
            for name, model in models.items()}


@pytest.fixture(scope="module")
def plan(networks):
    return BankPlan(SCENES, "test", 4, ARRAYS, networks["crnn"], networks=("crnn", "ipdnet", "geonet"), mc_passes=3,
                    checkpoints=(("ipdnet", networks["ipdnet"]), ("geonet", networks["geonet"])),
                    ensemble=(networks["member"], networks["crnn"]))


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks")
    write_banks(plan, folder, workers=1)
    return folder


def bank_of(folder, network, array="6cm"):
    return load_bank(folder / network / array / "bank.npz")


def fallback_of(folder, network, array="6cm"):
    return load_fallback(folder / network / array / "fallback.csv")


def contents(paths):
    """Everything in the parts but what was measured with a clock."""
    for path in paths:
        with np.load(path) as part:
            yield {key: part[key].tobytes() for key in part.files if not key.endswith("_ms")}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, plan):
    one = make_parts(plan, tmp_path / "one", workers=1, part_size=2)
    two = make_parts(plan, tmp_path / "two", workers=2, part_size=2)
    assert list(contents(one)) == list(contents(two))


def test_parts_of_another_size_hold_the_same_recordings(tmp_path, plan, folder):
    small = replace(plan, networks=("geonet",), ensemble=(), mc_passes=0)
    parts = make_parts(small, tmp_path, workers=1, part_size=3)
    said = np.concatenate([np.load(part)["geonet/6cm/logits_pre_sig"] for part in parts])
    np.testing.assert_array_equal(said, bank_of(folder, "geonet").logits_pre_sig)


def test_a_killed_run_goes_on_to_the_same_files(tmp_path, plan):
    code = (f"from ssl_kit.localize.banks import *; from ssl_kit.arrays.rooms import SceneConfig; "
            f"from ssl_kit.localize.srp import SRPConfig; plan = {plan!r}; "
            f"make_parts(plan, {str(tmp_path / 'killed')!r}, workers=1, part_size=1)")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    waited = time.monotonic()
    while process.poll() is None and not list((tmp_path / "killed").glob("part_*.npz")):
        assert time.monotonic() - waited < 240
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted((tmp_path / "killed").glob("part_*.npz"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    again = make_parts(plan, tmp_path / "killed", workers=1, part_size=1)
    assert stamps and [path.stat().st_mtime_ns for path in kept] == stamps
    assert list(contents(again)) == list(contents(make_parts(plan, tmp_path / "whole", workers=1, part_size=1)))


def test_networks_share_rooms_and_the_fallback_but_not_its_physics(folder):
    for array in ARRAYS:
        banks = {name: bank_of(folder, name, array) for name in ("crnn", "ipdnet", "geonet")}
        answers = {name: fallback_of(folder, name, array) for name in banks}
        for name in ("ipdnet", "geonet"):
            for of in ("gt_angles", "filenames", "group_ids", "speakers", "global_indices"):
                assert np.array_equal(getattr(banks[name], of), getattr(banks["crnn"], of))
            np.testing.assert_array_equal(answers[name].predicted_angles, answers["crnn"].predicted_angles)
            np.testing.assert_array_equal(answers[name].columns["log_likelihood_fallback"],
                                          answers["crnn"].columns["log_likelihood_fallback"])
            assert not np.array_equal(answers[name].columns["srp_ratio"], answers["crnn"].columns["srp_ratio"])
    assert not np.array_equal(fallback_of(folder, "crnn").predicted_angles,
                              fallback_of(folder, "crnn", ARRAYS[1]).predicted_angles)


def test_features_logits_and_head_fit_where_there_is_a_head(folder):
    assert head_gap(bank_of(folder, "crnn")) < 0.05
    for name in ("ipdnet", "geonet"):
        bank = bank_of(folder, name)
        assert bank.W is None and bank.logits_pre_sig.shape == (4, 3, 360) and bank.penultimate_features.min() >= 0
        with pytest.raises(DataError, match="no linear head"):
            head_gap(bank)


def test_a_bank_without_a_head_lacks_exactly_what_needs_one(folder):
    missing = set(available_detectors(bank_of(folder, "crnn"))) - set(available_detectors(bank_of(folder, "ipdnet")))
    known = detector_classes()
    assert missing == {name for name in missing if {"head", "mc", "ensemble"} & set(known[name].needs)}
    assert {name for name, cls in known.items() if cls.needs and set(cls.needs) == {"features", "head"}} <= missing
    assert "max_prob" not in missing


def test_the_posterior_is_what_the_answer_was_read_from(folder):
    for name in ("crnn", "ipdnet", "geonet"):
        bank = bank_of(folder, name)
        peak = bank.predictions.argmax(1)
        np.testing.assert_allclose(bank.predictions.sum(1), 1, atol=1e-5)
        assert (np.abs((bank.predicted_angles - peak + 180) % 360 - 180) <= 2).all()


def test_columns_say_what_a_recording_was(plan, folder):
    import pandas as pd

    scenes, bank = pd.read_csv(folder / "scenes.csv"), bank_of(folder, "geonet")
    for name in ("snr_db", "t60_s", "distance_m"):
        np.testing.assert_array_equal(bank.column(name), scenes[name])
    assert list(scenes.noise_kind) == ["synthetic"] * 4 and (bank.column("noise_kind") == 0).all()
    np.testing.assert_array_equal(bank.column("point_noise") > 0, scenes.noise_from == "a place")
    assert (bank.column("network_ms") > 0).all()
    assert (bank_of(folder, "crnn").column("mc_ms") > 0).all()
    fallback = fallback_of(folder, "crnn")
    assert all((fallback.columns[name] > 0).all() for name in ("srp_ratio_cost_ms", "frame_maps_ms"))


def test_passes_with_dropout_differ_and_come_again(plan, folder, networks):
    passes = bank_of(folder, "crnn").mc_predictions
    assert passes.shape == (4, 3, 360) and passes.dtype == np.float16
    assert (np.ptp(passes.astype(float), axis=1).max(axis=1) > 0).all()
    samples, probe = render(plan, 0).subarray(named_array("6cm")).samples, CRNNProbe(networks["crnn"])
    told, before = probe.answer(samples, named_array("6cm")), torch.random.get_rng_state()
    first = probe.passes(told, 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers were used"
    np.testing.assert_array_equal(probe.passes(told, 3, seed=1), first)
    assert np.abs(probe.passes(told, 3, seed=2) - first).max() > 0


def test_only_dropout_acts_in_a_pass(networks):
    probe = CRNNProbe(networks["crnn"])
    probe.localizer.model.dropout.p = 0.0
    samples = np.random.default_rng(0).standard_normal((9, 8000)).astype(np.float32)
    told = probe.answer(samples, named_array("6cm"))
    buffers = {name: value.clone() for name, value in probe.localizer.model.named_buffers()}
    # with model.train() batch norm would use this one recording's statistics, and learn them
    np.testing.assert_allclose(probe.passes(told, 2, seed=0), np.stack([told.posterior] * 2), atol=1e-7)
    assert all(torch.equal(value, buffers[name]) for name, value in probe.localizer.model.named_buffers())
    assert not any(module.training for module in probe.localizer.model.modules())


def test_members_of_the_ensemble_are_the_given_networks_alone(tmp_path, plan, folder, networks):
    bank = bank_of(folder, "crnn")
    assert bank.ensemble_predictions.shape == (4, 2, 360)
    np.testing.assert_allclose(bank.ensemble_predictions[:, 1].astype(float), bank.predictions, atol=1e-3)
    alone = replace(plan, checkpoint=networks["member"], networks=("crnn",), checkpoints=(), ensemble=(), mc_passes=0,
                    arrays=("6cm",))
    other = load_bank(write_banks(alone, tmp_path, workers=1)["6cm"]["bank"])
    np.testing.assert_allclose(bank.ensemble_predictions[:, 0].astype(float), other.predictions, atol=1e-3)


@pytest.mark.parametrize("array", ARRAYS)
def test_a_row_rendered_again_is_the_recording_it_came_from(plan, folder, array):
    again = render_again(folder, 3, array)
    expected = render(plan, 3).subarray(named_array(array))
    assert again.samples.tobytes() == expected.samples.tobytes() and again.azimuth_deg == expected.azimuth_deg
    assert render_again(folder, "test-0-000003", array).samples.tobytes() == again.samples.tobytes()
    with torch_threads(1):
        for name in ("crnn", "ipdnet", "geonet"):
            probe = probe_of(name, plan.checkpoint_of(name))
            told = probe.answer(again.samples, again.geometry, again.sample_rate)
            assert told.azimuth_deg == bank_of(folder, name, array).predicted_angles[3]
            np.testing.assert_array_equal(told.logits[::2].astype(np.float32),
                                          bank_of(folder, name, array).logits_pre_sig[3])
        assert SRP()(again.samples, again.geometry, 16000).azimuth_deg[0] == \
            fallback_of(folder, "crnn", array).predicted_angles[3]


def test_what_cannot_be_rendered_again_is_refused(folder, tmp_path):
    for recording, array in ((4, "6cm"), (-1, "6cm"), (0, "12cm"), ("calibration-0-000000", "6cm")):
        with pytest.raises(ParameterError, match="expected a recording of 0 to 3"):
            render_again(folder, recording, array)
    for name in ("scenes.csv", "scenes.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    table = (tmp_path / "scenes.csv").read_text().splitlines()
    speaker = table[1].split(",")[2]
    (tmp_path / "scenes.csv").write_text("\n".join([table[0], table[1].replace(speaker, "somebody")] + table[2:]))
    with pytest.raises(DataError, match="not those that the banks were made with"):
        render_again(tmp_path, 0, "6cm")


def test_the_plan_is_read_back_as_it_was(plan, folder, tmp_path):
    assert plan_of(folder) == plan
    (tmp_path / "scenes.json").write_text('{"plan": {"scenes": {}}}')
    with pytest.raises(DataError, match="expected the plan"):
        plan_of(tmp_path)


def test_parts_of_another_plan_are_not_mixed_in(plan, folder):
    with pytest.raises(DataError, match="another mc_passes, n"):
        write_banks(replace(plan, n=8, mc_passes=0), folder, workers=1)
    with pytest.raises(DataError, match="another scenes"):
        write_banks(replace(plan, scenes=replace(SCENES, snr_db=(0.0, 5.0))), folder, workers=1)


def test_a_plan_that_makes_no_sense_is_refused(plan):
    for changes in ({"networks": ()}, {"mc_passes": -1}, {"arrays": ("6cm", "6cm")}, {"noises": ("thunder",)}):
        with pytest.raises(ParameterError):
            replace(plan, **changes)
    with pytest.raises(ParameterError, match="crystal_ball"):
        probe_of("crystal_ball")


def test_rooms_have_the_kinds_of_noise_in_turn(tmp_path, networks):
    plan = BankPlan(SCENES, "test", 6, ("6cm",), networks["crnn"], noises=("synthetic", "esc10"))
    assert [plan.scenes_of(i).noise for i in range(6)] == ["synthetic"] * 2 + ["esc10"] * 2 + ["synthetic"] * 2
    if data_root(required=False) is None:
        pytest.skip("needs noise/esc10 of the data root (SSL_KIT_DATA)")
    bank = load_bank(write_banks(plan, tmp_path, workers=1)["6cm"]["bank"])
    assert bank.column("noise_kind").tolist() == [0, 0, 1, 1, 0, 0]
    assert render_again(tmp_path, 2, "6cm").meta["noise"] != render_again(tmp_path, 0, "6cm").meta["noise"]


class Compass:
    """A localizer that always says north-east, in a table of scores and nothing else."""

    def __call__(self, samples, geometry, sample_rate):
        from ssl_kit.localize.protocol import AzimuthTrack

        return AzimuthTrack([45.0], np.eye(1, 8, 1), np.arange(8) * 45.0, [0.5], "compass")


def test_a_localizer_without_features_has_a_table_of_scores(tmp_path):
    from ssl_kit.routing.table import TableColumns, load_score_table

    plan = BankPlan(SCENES, "test", 2, ("6cm",), networks=("compass",))
    paths = write_banks(plan, tmp_path, workers=1, probes={"compass": Compass()})["compass/6cm"]
    table = load_score_table(paths["scores"], TableColumns(group="room", filename="filename"))
    assert "bank" not in paths and (table.predicted_angles == 45).all() and (table.column("confidence") == 0.5).all()
    assert load_fallback(paths["fallback"]).aligned(table).frame_maps.shape == (2, 3, 72)


def plane_wave(geometry, azimuth_deg, n, seed=0):
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    delays_s = far_field_delays_s(geometry.positions_m, azimuth_deg)
    return np.fft.irfft(spectrum * np.exp(-2j * np.pi * np.fft.rfftfreq(n, 1 / 16000) * delays_s[:, None]),
                        n).astype(np.float32)


def test_a_frames_map_is_of_the_frames_own_time():
    ring = named_array("6cm")
    samples = np.concatenate([plane_wave(ring, a, 3200, int(a)) for a in (40.0, 130.0, 220.0, 310.0)], axis=1)
    maps = frame_maps(samples, ring, 16000, 0.2)
    np.testing.assert_array_equal(maps.argmax(1) * 5, [40, 130, 220, 310])
    assert maps.max() <= 1 and maps.max(1).min() > 0.6


def test_maps_add_up_as_log_likelihoods():
    ring = named_array("3x12cm_consecutive")
    rng = np.random.default_rng(1)
    samples = plane_wave(ring, 75.0, 16000) + 2 * rng.standard_normal((9, 16000)).astype(np.float32)
    maps = frame_maps(samples, ring, 16000, 0.2).astype(float)
    whole = srp_map(samples, ring, 16000, SRPConfig(n_azimuth=72))[0]
    # of the same phases, in other STFT frames: the mean of the maps is the map of the clip
    assert np.corrcoef(maps.mean(0), whole)[0, 1] > 0.95 and maps.mean(0).argmax() == whole.argmax() == 15
    assert maps.std(1).max() < 0.3


@settings(max_examples=60, deadline=None)
@given(st.integers(1600, 80000), st.integers(1, 5))
def test_there_is_a_map_for_every_kept_frame(n_samples, frame_step):
    windows = framing(n_samples, 16000, SRPConfig(n_azimuth=72, block_s=0.1 * frame_step)).n_blocks
    crnn_frames = (n_samples // 320 + 1) // 5  # its STFT has a frame more than the others'
    for n_frames in (crnn_frames, n_samples // 1600):
        assert windows >= -(-n_frames // frame_step)


def test_an_answer_in_blocks_is_no_fallback():
    with pytest.raises(ParameterError, match="block_s"):
        ask_srp(np.zeros((9, 8000), np.float32), named_array("6cm"), 16000, SRPConfig(block_s=0.1))


def test_the_scale_of_the_ipdnets_scores_is_found_again():
    rng = np.random.default_rng(0)
    directions = np.radians(np.arange(360))
    truth = rng.uniform(0, 360, 400)
    # answers drawn from the posterior that the scale 20 means: no other explains them better
    heard = np.degrees(rng.vonmises(np.radians(truth), 20.0))
    scores = np.cos(directions - np.radians(heard)[:, None])[:, None]
    assert 13 < fit_scale(scores, truth) < 30


def test_the_ipdnet_hears_five_of_nine_and_refuses_other_numbers(networks):
    probe = IPDNetProbe(networks["ipdnet"])
    samples = np.random.default_rng(0).standard_normal((9, 8000)).astype(np.float32)
    five = named_array("6cm-5")
    whole = probe.answer(samples, named_array("6cm"))
    part = probe.answer(samples[named_array("6cm").indices(five.names)], five)
    np.testing.assert_array_equal(whole.logits, part.logits)
    with pytest.raises(ParameterError, match="hears 5 mics"):
        probe.answer(samples[:8], named_array("6cm").subarray(named_array("6cm").names[:8]))
