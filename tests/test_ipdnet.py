"""IPDnet: targets against templates, one layout, a proper circle, sizes that follow from the array, and learning."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.diffuse import isotropic_coherence
from ssl_kit.arrays.geometry import far_field_delays_s, named_array
from ssl_kit.lab.errors import CheckpointError, DataError, ParameterError
from ssl_kit.localize.checkpoints import load_checkpoint, save_checkpoint
from ssl_kit.localize.ipd import (
    IPD,
    bin_frequencies_hz,
    check_coherence,
    decode_confidence,
    direction_scores,
    ipd_loss,
    ipd_target,
    peak_azimuth_deg,
    plane_wave_ipd,
    template_directions_deg,
)
from ssl_kit.localize.ipdnet import (
    IPDNet,
    IPDNetConfig,
    IPDTask,
    VariableIPDNet,
    VariableIPDNetConfig,
    VariableIPDTask,
    ipdnet_input,
)
from ssl_kit.localize.ipdnet_localizer import IPDNetLocalizer, VariableIPDNetLocalizer
from ssl_kit.localize.mixtures import MixtureConfig, MixtureStream
from ssl_kit.localize.training import TrainingConfig, train_network

ARRAYS = ["6cm-5", "12cm", "3x12cm_consecutive", "respeaker"]
FREQUENCIES = bin_frequencies_hz(64)


def positions_of(name):
    positions_m = named_array(name).order("reference_last").positions_m
    return torch.tensor(positions_m - positions_m[-1], dtype=torch.float32)[None]


def plane_wave_batch(names, azimuths_deg, n_samples=8000, seed=0, n_mics=None):
    """White noise as plane waves, each clip on its own array, padded to as many mics as the largest has."""
    rng = np.random.default_rng(seed)
    arrays = [positions_of(name)[0].double().numpy() for name in names]
    n_mics = n_mics or max(map(len, arrays))
    frequencies = np.fft.rfftfreq(n_samples, 1 / 16000)
    samples, positions = np.zeros((len(names), n_mics, n_samples), np.float32), np.zeros((len(names), n_mics, 3))
    mask = np.zeros((len(names), n_mics), bool)
    for k, (array, azimuth_deg) in enumerate(zip(arrays, azimuths_deg, strict=True)):
        rows = [*range(len(array) - 1), n_mics - 1]
        source = np.fft.rfft(rng.standard_normal(n_samples))
        delays_s = far_field_delays_s(array, azimuth_deg)
        samples[k, rows] = np.fft.irfft(source * np.exp(-2j * np.pi * frequencies * delays_s[:, None]), n_samples)
        positions[k, rows], mask[k, rows] = array, True
    frames = n_samples // 1600
    return SimpleNamespace(samples=torch.from_numpy(samples), positions_m=torch.from_numpy(positions).float(),
                           mic_mask=torch.from_numpy(mask), activity=torch.ones(len(names), frames),
                           azimuth_deg=torch.tensor(azimuths_deg, dtype=torch.float32)[:, None].repeat(1, frames))


@pytest.mark.parametrize("name", ARRAYS)
def test_ideal_targets_decode_without_error_at_all_directions(name):
    positions_m, azimuth_deg = positions_of(name), torch.arange(360.0)[None]
    target = ipd_target(positions_m, azimuth_deg, torch.ones(1, 360), FREQUENCIES)
    score = direction_scores(target, positions_m, FREQUENCIES)[0].numpy()
    np.testing.assert_array_equal(score.argmax(-1), np.arange(360))
    assert angular_error_deg(peak_azimuth_deg(score), np.arange(360)).max() < 0.02
    np.testing.assert_allclose(score.max(-1), 1, atol=1e-4)
    assert decode_confidence(score, positions_m, FREQUENCIES).min() > 0.999


@settings(max_examples=30)
@given(st.floats(0, 360, exclude_max=True), st.sampled_from(ARRAYS))
def test_directions_between_templates_come_out_too(azimuth_deg, name):
    positions_m = positions_of(name)
    wave = plane_wave_ipd(positions_m, torch.tensor([[azimuth_deg]], dtype=torch.float64), FREQUENCIES)
    score = direction_scores(wave, positions_m, FREQUENCIES)[0].numpy()
    assert angular_error_deg(peak_azimuth_deg(score)[0], azimuth_deg) < 0.05


def test_the_target_is_what_a_plane_wave_leaves_in_the_cross_spectrum():
    from ssl_kit.lab.stft import stft

    batch = plane_wave_batch(["6cm-5"], [25.0])
    spectrum = stft(batch.samples, 512, 320)[0, :, 1:65]
    cross = (spectrum[:-1] * spectrum[-1:].conj())[..., 3:-3].sum(-1)
    target = plane_wave_ipd(batch.positions_m, batch.azimuth_deg[:, :1], FREQUENCIES)
    expected = torch.complex(target.real, target.imag)[0, ..., 0]
    assert (cross / cross.abs() - expected).abs().max() < 0.05


@pytest.mark.parametrize("n", [1, 7, 72, 360])
def test_templates_do_not_count_a_direction_twice(n):
    directions = template_directions_deg(n).numpy()
    assert len(directions) == n and directions[0] == 0 and directions.max() < 360
    gaps = np.diff([*directions, directions[0] + 360])
    np.testing.assert_allclose(gaps, 360 / n)


def test_silent_frames_want_the_diffuse_coherence():
    name, activity = "3x12cm_consecutive", torch.tensor([[0.0, 1.0, 0.5]])
    target = ipd_target(positions_of(name), torch.full((1, 3), 40.0), activity, FREQUENCIES)
    coherence = isotropic_coherence(positions_of(name)[0].numpy(), FREQUENCIES.numpy())[:, :-1, -1].T
    np.testing.assert_allclose(target.real[0, :, :, 0], coherence, atol=1e-5)
    assert (target.imag[..., 0] == 0).all()
    torch.testing.assert_close(target.real[..., 2], target.real[..., :2].mean(-1))
    scores = direction_scores(target, positions_of(name), FREQUENCIES)[0]
    confidence = decode_confidence(scores, positions_of(name), FREQUENCIES)
    assert confidence[0] < 0.2 < confidence[2] < 0.8 < confidence[1]


def interleaved(ipd):
    return torch.stack([ipd.real, ipd.imag], dim=2).flatten(1, 2)


@pytest.mark.parametrize("name", [*ARRAYS, "uca:3:0.1"])
def test_an_interleaved_target_is_refused_and_would_have_been_wrong(name):
    positions_m = positions_of(name) if ":" not in name else torch.tensor(named_array(name).positions_m).float()[None]
    azimuth_deg = torch.arange(0.0, 360, 10)[None]
    target = ipd_target(positions_m, azimuth_deg, torch.ones_like(azimuth_deg), FREQUENCIES)
    naive = IPD.from_channels(interleaved(target))
    if len(positions_m[0]) > 3:  # two pairs: their interleaved channels make two coherences as well
        with pytest.raises(ParameterError, match="interleaved"):
            check_coherence(naive)
        with pytest.raises(ParameterError, match="interleaved"):
            ipd_loss(naive, naive)
    errors = angular_error_deg(peak_azimuth_deg(direction_scores(naive, positions_m, FREQUENCIES)[0]), azimuth_deg[0])
    assert np.mean(errors) > 20


def test_losses_take_no_bare_tensors():
    target = ipd_target(positions_of("6cm-5"), torch.zeros(1, 2), torch.ones(1, 2), FREQUENCIES)
    with pytest.raises(ParameterError, match="target: expected an IPD"):
        ipd_loss(target, target.channels())
    with pytest.raises(ParameterError, match="prediction: expected an IPD"):
        ipd_loss(target.channels(), target)
    with pytest.raises(ParameterError, match="2 \\* pair"):
        IPD.from_channels(torch.zeros(1, 7, 8, 2))


def test_padded_pairs_do_not_count_in_the_loss():
    target = ipd_target(positions_of("6cm-5"), torch.zeros(1, 2), torch.ones(1, 2), FREQUENCIES)
    wrong = IPD(target.real.clone(), target.imag.clone())
    wrong.real[:, 3] = -1
    assert ipd_loss(wrong, target, torch.tensor([[1.0, 1, 1, 0]])) == 0 < ipd_loss(wrong, target)


@pytest.mark.parametrize("n_mics, n_input, n_features, n_output", [(5, 10, 138, 8), (9, 18, 146, 16), (2, 4, 132, 2)])
def test_sizes_follow_from_the_number_of_mics(n_mics, n_input, n_features, n_output):
    network = IPDNet(IPDNetConfig(n_mics=n_mics, n_bins=8))
    assert network.blocks[0].full.input_size == n_input
    assert network.blocks[1].full.input_size == network.head.conv1.in_channels == n_features
    output, features = network.forward_with_intermediates(torch.randn(2, n_input, 8, 26))
    assert output.shape == (2, n_output, 8, 5) and features.shape == (2, 5, 256)
    assert output.abs().max() <= 1 and features.min() >= 0
    with pytest.raises(ParameterError, match=f"{n_mics} mics"):
        network(torch.randn(2, n_input + 2, 8, 26))


def test_a_causal_network_hears_no_later_frame():
    config = IPDNetConfig(hidden=8, n_bins=16, causal=True, normalisation="running")
    network = IPDNet(config).eval()
    samples = torch.randn(1, 5, 16000, generator=torch.Generator().manual_seed(0))
    other = samples.clone()
    other[..., 8000:] *= -3
    with torch.no_grad():
        a, b = (network(ipdnet_input(x, config)) for x in (samples, other))
    torch.testing.assert_close(a[..., :4], b[..., :4])
    assert (a[..., 6:] - b[..., 6:]).abs().max() > 1e-4
    with pytest.raises(ParameterError, match="whole clip"):
        IPDNetConfig(causal=True)


@pytest.mark.parametrize(ids=["fixed", "variable"], argnames="task", argvalues=[
    IPDTask(IPDNetConfig(hidden=8, n_bins=16)), VariableIPDTask(VariableIPDNetConfig(hidden=8, n_bins=16))])
def test_a_gradient_reaches_every_weight(task):
    network = task.network()
    task.loss(network, task.prepare(plane_wave_batch(["6cm-5"] * 2, [10, 200]))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_the_fixed_task_refuses_other_mics():
    task = IPDTask(IPDNetConfig(hidden=8, n_bins=16))
    with pytest.raises(ParameterError, match="5 mics"):
        task.prepare(plane_wave_batch(["6cm"], [0]))
    with pytest.raises(ParameterError, match="padded"):
        task.prepare(plane_wave_batch(["respeaker"], [0], n_mics=5))


@pytest.mark.parametrize("n_mics", range(2, 10))
def test_the_variable_network_takes_any_number_of_mics(n_mics):
    network = VariableIPDNet(VariableIPDNetConfig(hidden=4, n_bins=8))
    output, features = network.forward_with_intermediates(torch.randn(1, 2 * n_mics, 8, 10))
    assert output.shape == (1, 2 * (n_mics - 1), 8, 2) and features.shape == (1, 2, 256) and features.min() >= 0


def test_mics_in_another_order_are_pairs_in_another_order_and_padding_changes_nothing():
    task = VariableIPDTask(VariableIPDNetConfig(hidden=8, n_bins=16))
    network, order = task.network().eval(), [3, 1, 0, 2]
    plain = plane_wave_batch(["6cm-5", "respeaker"], [30, 250])
    padded = plane_wave_batch(["6cm-5", "respeaker"], [30, 250], n_mics=8)
    turned = SimpleNamespace(**vars(plain) | {name: getattr(plain, name)[:, [*order, 4]]
                                              for name in ("samples", "positions_m", "mic_mask")})
    with torch.no_grad():
        prepared = [task.prepare(batch) for batch in (plain, padded, turned)]
        heard = [IPD.from_channels(network(p[0], p[4])) for p in prepared]
    torch.testing.assert_close(heard[2].real, heard[0].real[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard[1].imag[0, :4], heard[0].imag[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard[1].real[1, :3], heard[0].real[1, :3], rtol=1e-4, atol=1e-5)
    assert (heard[1].real[1, 3:] == 0).all() and (heard[0].real[1, 3] == 0).all()
    losses = [float(task.loss(network, p).detach()) for p in prepared]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    np.testing.assert_allclose(task.votes(network, prepared[1]), task.votes(network, prepared[0]), atol=1e-5)


@pytest.mark.parametrize("kind", ["stft", "relative"])
@pytest.mark.parametrize("normalisation", ["frequency", "global", "running"])
def test_inputs_do_not_depend_on_the_level(kind, normalisation):
    config = IPDNetConfig(n_bins=16, input=kind, normalisation=normalisation)
    samples = plane_wave_batch(["6cm-5"], [70]).samples
    torch.testing.assert_close(ipdnet_input(300 * samples, config), ipdnet_input(samples, config), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(ipdnet_input(0 * samples, config)).all()


def overfit(task, batch, steps, learning_rate=0.01):
    torch.manual_seed(0)
    network, prepared = task.network(), task.prepare(batch)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(network, prepared).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return angular_error_deg(task.azimuth_deg(network.eval(), prepared), batch.azimuth_deg[:, 0].numpy())


def test_a_tiny_network_learns_one_batch():
    batch = plane_wave_batch(["6cm-5"] * 6, [5, 80, 130, 200, 270, 340], 3200)
    assert overfit(IPDTask(IPDNetConfig(hidden=12, n_bins=32, blocks=1)), batch, 120).max() < 5


def test_a_tiny_variable_network_learns_one_batch_of_several_arrays():
    batch = plane_wave_batch(["6cm-5", "respeaker", "6cm-5", "respeaker"], [20, 110, 215, 300], 3200)
    assert overfit(VariableIPDTask(VariableIPDNetConfig(hidden=8, n_bins=32, blocks=1)), batch, 150).max() < 5


def test_checkpoints_bring_back_both_kinds(tmp_path):
    for network, localizer in ((IPDNet(IPDNetConfig(hidden=4, n_bins=8)), IPDNetLocalizer),
                               (VariableIPDNet(VariableIPDNetConfig(hidden=4, n_bins=8)), VariableIPDNetLocalizer)):
        folder = save_checkpoint(tmp_path / network.kind, network, {"array": "6cm-5"})
        assert load_checkpoint(folder)[0].config == network.config
        x = torch.randn(1, 10, 8, 10)
        torch.testing.assert_close(localizer.load(folder).model(x), network.eval()(x))
        other = IPDNetLocalizer if localizer is VariableIPDNetLocalizer else VariableIPDNetLocalizer
        with pytest.raises(ParameterError, match="expected a checkpoint of kind"):
            other.load(folder)
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
        with pytest.raises(CheckpointError):
            localizer.load(folder)


@pytest.mark.parametrize("task", [IPDTask(IPDNetConfig(hidden=4, n_bins=8)),
                                  VariableIPDTask(VariableIPDNetConfig(hidden=4, n_bins=8))], ids=["fixed", "any"])
def test_both_train_and_go_on_in_the_loop_of_all_networks(tmp_path, task):
    rng = np.random.default_rng(0)
    responses = np.zeros((4, 5, 16), np.float32)
    responses[:, :, 3] = 1
    stream = MixtureStream(responses, np.float32([[90 * k, 1, 0.2] for k in range(4)]),
                           [(8000 * rng.standard_normal(20000)).astype(np.int16)],
                           rng.standard_normal((2, 5, 5000)).astype(np.float32), MixtureConfig(4800, 2),
                           geometry=named_array("6cm-5"))
    config = TrainingConfig(steps=4, epoch_steps=2, precision="32-true")
    quiet = {"report": lambda line: None, "valid": stream, "valid_batches": 1}
    network, history = train_network(tmp_path / "a", task, config, stream, **quiet)
    for _ in range(2):  # each call stops after one epoch: the time limit is over at once
        resumed, partly = train_network(tmp_path / "b", task, config, stream, time_limit_s=0, **quiet)
    assert network.kind == task.network().kind and len(history) == 2
    np.testing.assert_allclose([row["valid_mae_deg"] for row in partly], [row["valid_mae_deg"] for row in history])
    torch.testing.assert_close(resumed.head.conv3.weight, network.head.conv3.weight)


@pytest.fixture(scope="module")
def localizers():
    return (IPDNetLocalizer(IPDNet(IPDNetConfig(hidden=4, n_bins=8))),
            VariableIPDNetLocalizer(VariableIPDNet(VariableIPDNetConfig(hidden=4, n_bins=8))))


def test_localizers_answer_ten_times_a_second(localizers):
    samples = plane_wave_batch(["6cm-5"], [40], 24000).samples[0].numpy()
    for localizer, method in zip(localizers, ("ipdnet", "ipdnet-variable"), strict=True):
        track = localizer(samples, named_array("6cm-5"), 16000)
        assert track.method == method and track.score.shape == (15, 360)
        np.testing.assert_allclose(track.times_s, 0.05 + 0.1 * np.arange(15))
        assert ((track.confidence >= 0) & (track.confidence <= 1)).all()


def test_localizers_turn_samples_and_geometry_together(localizers):
    samples, array = plane_wave_batch(["6cm-5"], [40]).samples[0].numpy(), named_array("6cm-5").order("reference_last")
    first, order = array.order("reference_first"), array.permutation("reference_first")
    for localizer in localizers:
        np.testing.assert_allclose(localizer(samples[order], first).score, localizer(samples, array).score, atol=1e-6)


def test_localizers_refuse_what_they_cannot_hear(localizers):
    fixed, variable = localizers
    samples = plane_wave_batch(["6cm-5"], [40]).samples[0].numpy()
    with pytest.raises(DataError, match="trained for 5 mics"):
        fixed(np.concatenate([samples, samples[:4]]), named_array("6cm"))
    with pytest.raises(ParameterError, match="trained for '6cm-5'"):
        fixed(samples, named_array("uca:5:0.06"))
    assert IPDNetLocalizer(fixed.model, strict=False)(samples, named_array("uca:5:0.06")).n_frames == 5
    with pytest.raises(ParameterError, match="on one line"):
        variable(samples, named_array("ula:5:0.03"))
    for localizer in localizers:
        with pytest.raises(ParameterError, match="trained at 16000"):
            localizer(samples, named_array("6cm-5"), 48000)
        with pytest.raises(DataError, match="at least"):
            localizer(samples[:, :900], named_array("6cm-5"))
        with pytest.raises(DataError, match="NaN|finite"):
            localizer(samples * np.nan, named_array("6cm-5"))
