"""The CRNN: targets, decoding, symmetry, training that resumes, checkpoints, and the network that ships."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import named_array
from ssl_kit.arrays.rooms import SceneConfig, render_scene, sample_scene
from ssl_kit.lab.errors import CheckpointError, DataError, ParameterError
from ssl_kit.lab.training import learning_rate_factor
from ssl_kit.localize.checkpoints import load_checkpoint, save_checkpoint, shipped_checkpoint
from ssl_kit.localize.crnn import CRNN, CRNNConfig, circular_gaussian, crnn_input, decode_azimuth, localization_loss
from ssl_kit.localize.mixtures import MixtureConfig, MixtureStream, frame_activity
from ssl_kit.localize.network import CRNNLocalizer
from ssl_kit.localize.training import TrainingConfig, train_crnn

EASY = SceneConfig(t60_s=(0.2, 0.3), snr_db=(20, 20), distance_m=(1.0, 1.5), duration_s=2.0, recordings_per_room=1)


@pytest.fixture(scope="module")
def shipped():
    return CRNNLocalizer.load_default()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 360, exclude_max=True), st.floats(2, 15))
def test_decoding_gives_back_the_centre_of_a_target(azimuth_deg, sigma_deg):
    target = circular_gaussian(torch.tensor([azimuth_deg], dtype=torch.float64), sigma_deg=sigma_deg).numpy()
    assert angular_error_deg(decode_azimuth(target)[0], azimuth_deg) < 0.05


def test_cross_entropy_is_least_at_the_target_and_then_its_entropy():
    target = circular_gaussian(torch.tensor([[200.0]]), sigma_deg=5.0)
    best = localization_loss(torch.log(target + 1e-30), torch.tensor([[200.0]]), torch.ones(1, 1), sigma_deg=5.0)
    assert float(best) == pytest.approx(np.log(5.0 * np.sqrt(2 * np.pi * np.e)), abs=1e-3)
    worse = localization_loss(torch.log(target + 1e-30).roll(3, -1), torch.tensor([[200.0]]), torch.ones(1, 1))
    assert worse > best


def test_mean_squared_error_wants_silence_in_silent_frames():
    quiet, loud = torch.full((1, 1, 360), -20.0), torch.full((1, 1, 360), 20.0)
    where, silent = torch.tensor([[10.0]]), torch.zeros(1, 1)
    assert localization_loss(quiet, where, silent, "mse") < 1e-6 < localization_loss(loud, where, silent, "mse")


def test_input_phases_do_not_depend_on_the_speech_but_raw_spectra_do():
    rng = np.random.default_rng(0)
    delays = rng.uniform(-1e-4, 1e-4, 9)
    frequency = np.fft.rfftfreq(16000, 1 / 16000)

    def wave(seed):
        noise = np.fft.rfft(np.random.default_rng(seed).standard_normal(16000))
        heard = np.fft.irfft(noise * np.exp(2j * np.pi * frequency * delays[:, None]))
        return torch.from_numpy(heard.astype(np.float32))[None]

    gaps = {}
    for kind in ("stft", "delay"):
        a, b = (crnn_input(wave(seed), CRNNConfig(input=kind))[0, 8:16, 20:100].median(-1).values for seed in (1, 2))
        gaps[kind] = float((a - b).abs().median() / (a.abs().median() + 1e-9))
    assert gaps["delay"] < 0.05 < gaps["stft"]


def test_learning_rate_does_not_depend_on_the_end_before_the_decay():
    early = [learning_rate_factor(step, 1000, 100) for step in range(600)]
    assert early == [learning_rate_factor(step, 2000, 100) for step in range(600)]
    assert learning_rate_factor(1000, 1000, 100) == 0


def test_activity_marks_loud_frames():
    samples = np.r_[np.zeros(1600), np.ones(1600), 1e-3 * np.ones(1600)]
    np.testing.assert_array_equal(frame_activity(samples, 1600), [0, 1, 0])


def _stream():
    rng = np.random.default_rng(0)
    responses = np.zeros((4, 9, 32), np.float32)
    responses[:, :, 3] = 1
    facts = np.float32([[90 * k, 1, 0.2] for k in range(4)])
    speech = [(8000 * rng.standard_normal(20000)).astype(np.int16)]
    noises = rng.standard_normal((2, 9, 9000)).astype(np.float32)
    return MixtureStream(responses, facts, speech, noises, MixtureConfig(8000, 2, point_noise_share=0.5))


def test_a_training_that_was_stopped_ends_with_the_losses_of_one_that_was_not(tmp_path):
    model, plan = CRNNConfig(channels=4, hidden=16), TrainingConfig(steps=6, epoch_steps=2, precision="32-true")
    quiet = {"report": lambda line: None}
    whole, history = train_crnn(tmp_path / "a", model, plan, _stream(), **quiet)
    for _ in range(3):  # each call stops after one epoch: the time limit is over at once
        resumed, partly = train_crnn(tmp_path / "b", model, plan, _stream(), time_limit_s=0, **quiet)
    np.testing.assert_allclose([row["loss"] for row in partly], [row["loss"] for row in history], rtol=1e-6)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_training_does_not_go_on_with_other_mixtures(tmp_path):
    model, plan = CRNNConfig(channels=4, hidden=16), TrainingConfig(steps=2, epoch_steps=1, precision="32-true")
    train_crnn(tmp_path, model, plan, _stream(), time_limit_s=0, report=lambda line: None)
    other = _stream()
    other.config = MixtureConfig(8000, 2, point_noise_share=0.0)
    with pytest.raises(ParameterError, match="point_noise_share"):
        train_crnn(tmp_path, model, plan, other, report=lambda line: None)


def test_a_diverging_training_stops_and_names_what_to_lower(tmp_path):
    model = CRNNConfig(channels=4, hidden=16)
    plan = TrainingConfig(steps=4, epoch_steps=2, learning_rate=float("inf"), warmup_steps=1, precision="32-true")
    with pytest.raises(ParameterError, match="diverged.*learning_rate"):
        train_crnn(tmp_path, model, plan, _stream(), report=lambda line: None)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    save_checkpoint(tmp_path, CRNN(CRNNConfig(channels=4, hidden=16)))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"channels": 4', '"channels": 6'))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path)


def test_the_shipped_network_is_small_and_has_its_card():
    folder = shipped_checkpoint()
    assert (folder / "model.safetensors").stat().st_size < 6e6
    card = (folder / "README.md").read_text()
    assert "trained on" in card and "within 5°" in card


def test_the_shipped_network_points_at_the_speaker(shipped):
    errors = []
    for index in range(6):
        scene = sample_scene(EASY, 3, index, "test")
        recording = render_scene(scene, named_array("6cm"), EASY)
        track = shipped(recording.samples, recording.geometry, 16000)
        errors.append(np.median(angular_error_deg(track.azimuth_deg, scene.azimuth_deg[0])))
    assert np.median(errors) < 4, errors


def test_turning_the_scene_by_one_microphone_turns_the_answer(shipped):
    scene = sample_scene(EASY, 3, 0, "test")
    samples = render_scene(scene, named_array("6cm"), EASY).samples
    turned = samples[[*np.roll(np.arange(8), -1).tolist(), 8]]
    plain, other = (np.median(shipped(x, named_array("6cm"), 16000).score.mean(0).argmax()) for x in (samples, turned))
    assert angular_error_deg(other, plain - 45) < 5


def test_a_wrong_channel_order_is_wrong_and_the_geometry_tells(shipped):
    array = named_array("6cm")
    first = array.order("reference_first")
    right, wrong = [], []
    for index in range(6):
        scene = sample_scene(EASY, 3, index, "test")
        mixed_up = render_scene(scene, array, EASY).samples[array.permutation("reference_first")]
        for errors, geometry in ((right, first), (wrong, array)):  # samples in the first one's order
            answer = shipped(mixed_up, geometry, 16000).score.mean(0).argmax()
            errors.append(angular_error_deg(answer, scene.azimuth_deg[0]))
    assert np.median(right) < 5 and np.median(wrong) > 20, (right, wrong)
    with pytest.raises(ParameterError):
        first.require_order("reference_last")


@pytest.mark.parametrize("array", ["12cm", "3x12cm_consecutive"])
def test_another_array_is_refused(shipped, array):
    with pytest.raises(ParameterError, match="trained for '6cm'"):
        shipped(np.ones((9, 16000), np.float32) + np.arange(16000) % 7, named_array(array), 16000)


def test_a_clip_too_short_for_one_answer_is_refused(shipped):
    with pytest.raises(DataError, match="at least"):
        shipped(np.random.default_rng(0).standard_normal((9, 900)).astype(np.float32), named_array("6cm"), 16000)


def test_a_training_leaves_denormal_numbers_to_others(tmp_path):
    train_crnn(tmp_path, CRNNConfig(channels=4, hidden=16), TrainingConfig(steps=1, epoch_steps=1, precision="32-true"),
               _stream(), report=lambda line: None)
    assert np.float64(5e-324) / 1 > 0 and torch.tensor(1e-40) * 1 > 0
