"""Enhancement networks: shapes and counts, causality, streams, losses, masks that collapse."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.enhance.checkpoints import load_checkpoint, save_checkpoint
from ssl_kit.enhance.diagnostics import MaskWarning, mask_statistics, warn_of_collapse
from ssl_kit.enhance.final_net import SCALES, FinalConfig, FinalNet, final_config
from ssl_kit.enhance.losses import compressed_loss, enhancement_loss, multi_resolution_loss, si_snr
from ssl_kit.enhance.models import KINDS, macs_per_second, magnitude_of, make_network, n_parameters
from ssl_kit.enhance.spectra import apply_mask, erb_bands, griffin_lim, mel_bands, samples_of, spectrum_of
from ssl_kit.enhance.streaming import EnhancementStream
from ssl_kit.lab.errors import CheckpointError, MissingDataError, ParameterError

TINY = {"entry": 4, "channels": 8, "frequency_hidden": 4, "time_hidden": 8, "blocks": 1}


def noise(*shape, seed=0, level=0.1):
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voice(n_samples=16000):
    t = torch.arange(n_samples) / 16000
    buzz = sum(torch.sin(2 * torch.pi * 120 * k * t) / k for k in range(1, 30))
    return 0.1 * (buzz * (torch.sin(2 * torch.pi * 2 * t) > 0))[None]


def excited(network):
    """An untrained final network whose taps are far from the identity."""
    with torch.no_grad():
        network.network.last.weight *= 20
    return network.eval()


# spectra


@settings(max_examples=25)
@given(st.integers(1, 5000), st.sampled_from([(512, 128, "hann"), (512, 256, "sqrt_hann"), (256, 64, "hann")]))
def test_reconstruction_is_perfect_for_every_length(n_samples, transform):
    x = noise(2, n_samples, seed=n_samples)
    assert (samples_of(spectrum_of(x, *transform), n_samples, *transform) - x).abs().max() < 1e-6


def test_the_last_samples_survive_a_mask():
    # frames that end inside the signal would leave its end under the foot of one window, and divide by almost nothing
    x = noise(1, 256 * 10 + 200)
    spectrum = spectrum_of(x, 512, 256, "sqrt_hann")
    shaken = spectrum * (1 + 0.3 * torch.randn(spectrum.shape, generator=torch.Generator().manual_seed(1)))
    y = samples_of(shaken, x.shape[1], 512, 256, "sqrt_hann")
    assert y[:, -100:].abs().max() < 3 * y.abs().max(1).values.median() and y.abs().max() < 1


def test_spectra_agree_with_librosa():
    librosa = pytest.importorskip("librosa")
    x = noise(1, 4096)
    theirs = librosa.stft(x[0].numpy(), n_fft=512, hop_length=128, window="hann", pad_mode="constant")
    ours = spectrum_of(x)[0].numpy()
    np.testing.assert_allclose(ours[0] + 1j * ours[1], theirs, atol=2e-5)


def test_a_complex_mask_is_complex_multiplication():
    spectrum, mask = noise(2, 2, 5, 7), noise(2, 2, 5, 7, seed=1, level=1)
    product = torch.complex(*spectrum.unbind(1)) * torch.complex(*mask.unbind(1))
    torch.testing.assert_close(apply_mask(spectrum, mask), torch.stack([product.real, product.imag], 1))


@settings(max_examples=20)
@given(st.integers(5, 100), st.integers(8, 64))
def test_bands_give_constants_back(n_low, n_bands):
    bands = erb_bands(257, n_low, n_bands)
    torch.testing.assert_close(bands.sum(0), torch.ones(257))
    there = bands / bands.sum(1, keepdim=True).clamp_min(1e-9)
    there = there @ torch.ones(257)
    torch.testing.assert_close(bands.T[:n_low] @ there, torch.ones(n_low))


def test_mels_go_back_to_the_mels_they_were():
    bands, inverse = mel_bands()
    mels = bands @ magnitude_of(spectrum_of(noise(1, 8000)))
    error = (bands @ (inverse @ mels) - mels).norm() / mels.norm()
    assert error < 0.05 and (bands.sum(1) > 0).all()


def test_griffin_lim_keeps_magnitudes_and_loses_the_waveform():
    x = voice(8000)
    y = griffin_lim(magnitude_of(spectrum_of(x)), 8000)
    assert torch.equal(y, griffin_lim(magnitude_of(spectrum_of(x)), 8000))
    kept = magnitude_of(spectrum_of(y))
    assert (kept - magnitude_of(spectrum_of(x))).norm() / kept.norm() < 0.2 and float(si_snr(y, x)) < 5


# networks


@pytest.mark.parametrize("kind, settings, millions", [
    ("crn", {}, (2.45, 2.55)), ("mel", {}, (2.4255, 2.4745)), ("stft", {}, (2.4255, 2.4745)),
    ("dpt", {}, (0.89496, 0.91304)), ("final", {}, (0.2, 0.3)), ("final", {"causal": True}, (0.18, 0.3)),
    ("final", SCALES["medium"], (0.45, 0.55)),
    ("final", SCALES["large"], (0.5, 1.0)), ("final", SCALES["large"] | {"causal": True}, (0.5, 1.0))])
def test_parameters_are_those_of_the_specification(kind, settings, millions):
    assert millions[0] <= n_parameters(make_network(kind, **settings)) / 1e6 <= millions[1]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_network_has_the_interface(kind):
    torch.manual_seed(0)
    small = {"final": TINY, "dpt": {"d_model": 16, "feedforward": 16, "blocks": 1},
             "crn": {"channels": (4, 4), "hidden": 8}}.get(kind, {"d_model": 16, "feedforward": 16, "layers": 1})
    network = make_network(kind, **small).eval()
    x = noise(2, 3001)
    with torch.no_grad():
        wave, mask = network.forward_with_mask(x)
        assert torch.equal(network(x), wave) and network.kind == kind
        assert wave.shape == x.shape and wave.dtype == torch.float32 and torch.isfinite(wave).all()
        assert mask.shape[0] == 2 and mask.shape[-2] == (128 if kind == "mel" else 257)
        assert torch.isfinite(network(torch.zeros(1, 2000))).all()  # silence
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    if kind != "mel":
        assert (half - wave).norm() / wave.norm() < 0.05


@pytest.mark.parametrize("kind", ["crn", "stft", "dpt", "final"])
def test_gradients_reach_every_weight(kind):
    torch.manual_seed(0)
    small = {"final": TINY, "dpt": {"d_model": 16, "feedforward": 16, "blocks": 1},
             "crn": {"channels": (4, 4), "hidden": 8}}.get(kind, {"d_model": 16, "feedforward": 16, "layers": 1})
    network = make_network(kind, **small)
    enhancement_loss(network(noise(2, 4000)), noise(2, 4000, seed=1)).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


@pytest.mark.filterwarnings("ignore:The tensor attributes")          # flat weights of GRUs
def test_the_mask_network_exports_with_its_state_and_is_made_of_real_tensors_alone():
    network = FinalNet(FinalConfig(causal=True, **TINY)).eval().network
    with torch.no_grad():
        _, past = network(noise(1, 3, 257, 6))
        program = torch.export.export(network, (noise(1, 3, 257, 6), past))
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(values) > 20 and not any(value.is_complex() for value in values)


def test_attention_maps_can_be_drawn_and_are_those_of_the_network():
    torch.manual_seed(0)
    network = make_network("dpt", d_model=16, feedforward=16, blocks=2).eval()
    maps = network.attention_maps(noise(2, 2000))
    assert [tuple(m.shape) for m in itertools.chain(*maps)] == [(2, 4, 65, 65), (2, 4, 17, 17)] * 2
    for one in itertools.chain(*maps):
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
    spectrum = network.analysis(noise(2, 2000))
    with torch.no_grad():
        torch.testing.assert_close(network.mask_and_maps(spectrum, True)[0], network.mask_of(spectrum))


def test_products_are_counted_as_by_hand():
    cfg = FinalConfig(**TINY, causal=True)
    half, quarter, c = 65, 33, 8
    by_hand = 3 * 129 * 257 + 2 * cfg.filter_frames * 257 * 129                      # bands there and back
    by_hand += half * 4 * 3 * 15 + quarter * c * 4 * 15                              # down
    by_hand += quarter * (2 * 4 * 4 * (c + 4) + 2 * 4 * c) + quarter * (4 * c * 2 * c + c * c)  # both paths
    by_hand += 4 * (c // 2) * (c + c // 2) + (c // 2) * c                            # gate
    by_hand += quarter * c * c + quarter * c * 4 * 5 + half * 4 * 4 + half * 4 * 2 * cfg.filter_frames * 5
    # 64 frames; transposed convolutions are counted for each input
    assert macs_per_second(FinalNet(cfg), 1.0) == pytest.approx(by_hand * 64, rel=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ParameterError, match="kind"):
        make_network("unet")
    with pytest.raises(ParameterError, match="colour"):
        make_network("final", colour=1)
    with pytest.raises(ParameterError, match="groups"):
        FinalConfig(channels=48, groups=5)
    with pytest.raises(ParameterError, match="4 k"):
        FinalNet(FinalConfig(n_bands=63))
    with pytest.raises(ParameterError, match="scale"):
        final_config("huge")
    with pytest.raises(ParameterError, match="sample"):
        spectrum_of(torch.zeros(10))
    with pytest.raises(ParameterError, match="channels"):
        make_network("crn", channels=(4,) * 9)


# causality and streams


@pytest.mark.parametrize("causal", [True, False])
def test_only_the_causal_network_ignores_the_future(causal):
    torch.manual_seed(0)
    network = excited(FinalNet(FinalConfig(causal=causal, **TINY)))
    x = noise(1, 256 * 30)
    later = x.clone()
    later[:, 256 * 20:] = 5 * noise(1, 256 * 10, seed=3)
    with torch.no_grad():
        before, after = network(x), network(later)
    assert torch.equal(before[:, :256 * 19], after[:, :256 * 19]) == causal


@pytest.mark.parametrize("hop_length, window, frames, groups", [(256, "sqrt_hann", 3, 2), (128, "hann", 1, 1)])
def test_a_stream_equals_the_file(hop_length, window, frames, groups):
    torch.manual_seed(0)
    network = excited(FinalNet(FinalConfig(causal=True, hop_length=hop_length, window=window, filter_frames=frames,
                                           groups=groups, level_frames=7, **TINY)))
    x = noise(2, hop_length * 41) * torch.linspace(0.01, 1, hop_length * 41)
    with torch.no_grad():
        whole = network(x)
    stream = EnhancementStream(network, 2)
    for sizes in ([1] * 41, [1, 2, 3, 30, 5]):
        pieces = [stream.process(block) for block in x.split([hop_length * n for n in sizes], 1)]
        assert [p.shape[1] for p in pieces] == [hop_length * n for n in sizes]
        streamed = torch.cat([*pieces, stream.flush()], 1)[:, stream.delay_samples:]
        assert (whole - x).norm() / x.norm() > 0.1
        assert (streamed - whole).abs().max() < 1e-4
    assert stream.latency_s == 0.032


def test_a_stream_says_nothing_before_it_heard_and_refuses_what_it_cannot_do():
    network = FinalNet(FinalConfig(causal=True, **TINY)).eval()
    stream = EnhancementStream(network)
    assert stream.process(torch.zeros(1, 512)).abs().max() == 0
    with pytest.raises(ParameterError, match="256"):
        stream.process(torch.zeros(1, 100))
    with pytest.raises(ParameterError, match="causal"):
        EnhancementStream(FinalNet(FinalConfig(**TINY)))


def test_the_running_level_follows_and_the_plain_one_does_not():
    network = FinalNet(FinalConfig(causal=True, level_frames=3, **TINY))
    loudness = torch.tensor([[1.0, 2, 3, 4, 5]])
    torch.testing.assert_close(network.level_of(loudness), torch.tensor([[1.0, 1.5, 2, 3, 4]]) + 1e-3)
    torch.testing.assert_close(network.level_of(loudness[:, 3:], loudness[:, :3]), torch.tensor([[3.0, 4]]) + 1e-3)
    both_ways = FinalNet(FinalConfig(**TINY))
    torch.testing.assert_close(both_ways.level_of(loudness), torch.full((1, 5), 3.001))


def test_the_filter_reaches_low_bins_of_earlier_frames_alone():
    network = FinalNet(FinalConfig(**TINY))
    spectrum, taps = noise(1, 2, 257, 6), torch.zeros(1, 6, 257, 6)
    taps[:, 2] = 1                                               # nothing of this frame, all of the one before
    enhanced, mask = network.filtered(spectrum, taps)
    torch.testing.assert_close(enhanced[..., :65, 1:], spectrum[..., :65, :-1])
    assert enhanced[..., 65:, :].abs().max() == 0 and enhanced[..., 0].abs().max() == 0 and mask.abs().max() == 0


# losses


def test_losses_are_zero_at_identity_and_only_there():
    x, y = voice(8000), voice(8000) + noise(1, 8000, level=0.02)
    assert compressed_loss(x, x) == 0 == multi_resolution_loss(x, x)
    assert compressed_loss(y, x) > 0 and multi_resolution_loss(y, x) > compressed_loss(y, x)
    assert float(si_snr(x, x)) > 55 and float(si_snr(x, x, ceiling_db=30)) < 30.1


@settings(max_examples=20)
@given(st.floats(0.1, 20))
def test_losses_scale_as_they_should(gain):
    x, y = noise(1, 4000), noise(1, 4000, seed=1)
    assert float(compressed_loss(gain * y, gain * x) / compressed_loss(y, x)) == pytest.approx(gain ** 0.6, rel=0.01)
    assert float(si_snr(gain * y, x) - si_snr(y, x)) == pytest.approx(0, abs=0.01)
    assert float(enhancement_loss(gain * y, gain * x)) == pytest.approx(float(enhancement_loss(y, x)), rel=0.01)


def test_a_sign_is_an_error_of_the_parts_and_not_of_the_magnitude():
    x = voice(4000)
    assert float(compressed_loss(-x, x, magnitude_share=1.0)) < 1e-10 < float(compressed_loss(-x, x))


def test_gradients_are_finite_at_silence():
    x = voice(4000)
    for estimate, clean in ((torch.zeros_like(x), x), (x, torch.zeros_like(x)), (0 * x, 0 * x)):
        estimate = estimate.clone().requires_grad_()
        enhancement_loss(estimate, clean).backward()
        assert torch.isfinite(estimate.grad).all()


def test_si_snr_is_that_of_the_metrics():
    metrics = pytest.importorskip("ssl_kit.enhance.metrics")
    x, y = voice(8000), voice(8000) + noise(1, 8000, level=0.02)
    assert float(si_snr(y, x)) == pytest.approx(metrics.si_sdr(x[0].numpy(), y[0].numpy()), abs=0.01)


def test_losses_refuse_other_shapes():
    with pytest.raises(ParameterError, match="same shape"):
        compressed_loss(torch.zeros(1, 4000), torch.zeros(1, 4001))
    with pytest.raises(ParameterError, match="weights"):
        multi_resolution_loss(torch.zeros(1, 4000), torch.zeros(1, 4000), (512,), (1.0, 2.0))


# diagnostics


def ideal_mask(snr_db=0.0):
    x, n = voice(), noise(1, 16000)
    n = n * x.norm() / n.norm() * 10 ** (-snr_db / 20)
    powers = [magnitude_of(spectrum_of(part)).square() for part in (x, n)]
    return (powers[0] / (powers[0] + powers[1])).sqrt(), x + n


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 5.0, 10.0])
def test_a_real_mask_does_not_fire(snr_db):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaskWarning)
        assert not warn_of_collapse(mask_statistics(ideal_mask(snr_db)[0]))


def test_constant_and_identical_masks_fire_and_say_why():
    mask, _ = ideal_mask()
    with pytest.warns(MaskWarning, match="differs between frequencies"):
        assert warn_of_collapse(mask_statistics(torch.full_like(mask, 0.5)))
    with pytest.warns(MaskWarning, match="differs between frequencies"):
        warn_of_collapse(mask_statistics(mask.mean(1, keepdim=True).expand_as(mask)))
    with pytest.warns(MaskWarning, match="near the identity"):
        warn_of_collapse(mask_statistics(1 - 0.08 * mask))
    with pytest.warns(MaskWarning, match="near the identity"):
        warn_of_collapse(mask_statistics(torch.stack([1 - 0.05 * mask, 0.05 * mask], 1)))
    gain = mask.mean(1, keepdim=True).expand_as(mask).clone()
    gain[:, :3], gain[:, -3:] = 1.0, 0.0                            # zeros around a map let its borders differ
    with pytest.warns(MaskWarning, match="differs between frequencies"):
        assert warn_of_collapse(mask_statistics(gain))
    with pytest.raises(ParameterError, match="mask"):
        mask_statistics(torch.zeros(3, 3))


def fitted_mask(network, noisy, wanted, steps):
    """What a network can make of one clip's ideal mask."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    spectrum = network.analysis(noisy)
    for _ in range(steps):
        loss = (network.mask_of(spectrum) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return network.eval().mask_of(spectrum), float(loss)


def test_the_mean_over_frequency_collapses_what_two_paths_can_tell_apart():
    wanted, noisy = ideal_mask()
    wanted, noisy = wanted[..., :20], noisy[:, :19 * 128]
    small = {"d_model": 16, "feedforward": 32, "heads": 4, "dropout": 0.0}
    torch.manual_seed(0)
    collapsed, stuck = fitted_mask(make_network("stft", layers=1, **small), noisy, wanted, 50)
    telling, fitted = fitted_mask(make_network("dpt", blocks=1, **small), noisy, wanted, 50)
    with pytest.warns(MaskWarning):
        assert warn_of_collapse(mask_statistics(collapsed))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaskWarning)
        assert not warn_of_collapse(mask_statistics(telling))
    assert fitted < 0.8 * stuck


# checkpoints


def test_checkpoints_bring_networks_back_and_name_what_is_wrong(tmp_path):
    torch.manual_seed(0)
    network = make_network("crn", channels=(4, 4), hidden=8).eval()
    folder = save_checkpoint(tmp_path / "a", network, {"speech": "embedded"})
    again, about = load_checkpoint(folder)
    with torch.no_grad():
        assert torch.equal(again(noise(1, 2000)), network(noise(1, 2000)))
    assert again.config == network.config and about["about"]["speech"] == "embedded"
    with pytest.raises(MissingDataError, match="config.json"):
        load_checkpoint(tmp_path / "b")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"crn"', '"unet"'))
    with pytest.raises(CheckpointError, match="unet"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(folder)
