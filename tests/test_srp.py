"""SRP-PHAT: the peer's answers and test cases, closed forms, invariances, traps and faults."""

import threading
from types import SimpleNamespace

import numpy as np
import pyroomacoustics as pra
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import SPEED_OF_SOUND, ArrayGeometry, far_field_delays_s, named_array
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.localize.srp import (
    SRP,
    SRPConfig,
    SRPStream,
    cached_srp,
    framing,
    localize_files,
    power_ratio,
    srp_key,
    srp_map,
    srp_power_at,
)
from ssl_kit.localize.srp_bench import PeerSRP, bench_recording

RATE = 16000


def plane_wave(geometry, azimuth_deg, seed=0, n=8000, elevation_deg=0.0, noise=0.0):
    "White noise from a direction, delayed in the frequency domain."
    rng = np.random.default_rng(seed)
    omega = 2 * np.pi * np.fft.rfftfreq(n, 1 / RATE)
    delay_s = np.atleast_2d(far_field_delays_s(geometry.positions_m, azimuth_deg, elevation_deg))[0]
    samples = np.fft.irfft(np.fft.rfft(0.1 * rng.standard_normal(n)) * np.exp(-1j * omega * delay_s[:, None]), n)
    return (samples + noise * rng.standard_normal(samples.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def peer_case():
    "The scene of pyroomacoustics' own DOA tests: 12 mics on 15 cm, white noise from 61 degrees, fractional delays."
    ring = pra.circular_2D_array([0, 0], 12, 0.0, 0.15)
    azimuth = np.radians(61.0)
    delays = ring.T @ -np.array([np.cos(azimuth), np.sin(azimuth)]) / SPEED_OF_SOUND * RATE
    source = np.random.default_rng(0).standard_normal(129 * 256)
    signals = [fftconvolve(source, h, mode="same") for h in pra.fractional_delay_filter_bank(delays)]
    return 0.1 * np.array(signals), ArrayGeometry(np.vstack([ring, np.zeros(12)]).T, label="peer")


@pytest.mark.parametrize("elevations", [(0.0,), (-20.0, 0.0, 20.0)])
def test_peer_scene_within_its_tolerance(peer_case, elevations):
    samples, geometry = peer_case
    method = SRP(n_fft=256, band_hz=(312.5, 3750.0), elevation_deg=elevations)
    assert angular_error_deg(method(samples, geometry, RATE).azimuth_deg[0], 61.0) < 0.3


def test_peer_scene_with_two_mics_has_a_map(peer_case):
    samples, geometry = peer_case
    two = geometry.subarray(["0", "1"])
    config = SRPConfig(n_fft=256, band_hz=(937.5, 1000.0))
    assert srp_map(samples[:2], two, RATE, config).std() > 1e-10


@pytest.mark.parametrize("n_fft", [256, 512, 4096])
@pytest.mark.parametrize("array", ["6cm", "3x12cm_consecutive"])
def test_same_map_as_pyroomacoustics(array, n_fft):
    geometry, config = named_array(array), SRPConfig(n_fft=n_fft)
    samples = bench_recording(geometry, seed=n_fft, duration_s=1.0)
    peer = PeerSRP(geometry, config)
    best = peer(samples)
    ours = srp_map(samples, geometry, RATE, config)[0]
    # theirs is (mics + 2 * sum over pairs) / pairs
    theirs = (np.asarray(peer.method.grid.values) - 9 / 36) / 2
    assert np.abs(ours - theirs).max() < 2e-5
    assert angular_error_deg(ours.argmax(), best) <= 1


def test_same_argmax_as_pyroomacoustics_on_many():
    geometry, config = named_array("3x12cm_consecutive"), SRPConfig(n_fft=512)
    clips = [bench_recording(geometry, seed, 1.0) for seed in range(40)]
    maps = srp_map(np.stack(clips), geometry, RATE, config)[:, 0]
    peer = PeerSRP(geometry, config)
    same = [angular_error_deg(peer(x), m.argmax()) <= 1 for x, m in zip(clips, maps, strict=True)]
    assert np.mean(same) >= 0.995


@pytest.mark.parametrize("array", ["6cm", "18cm", "realman32", "uca:5:0.4"])
def test_map_is_the_direct_sum(array):
    "Against the double sum over pairs and frequencies in double precision, on small and large arrays."
    geometry, config = named_array(array), SRPConfig(n_fft=256, n_azimuth=24)
    samples = plane_wave(geometry, 77.0, n=1500, noise=0.05)
    frame = framing(samples.shape[1], RATE, config)
    padded = np.pad(samples.astype(float), ((0, 0), (frame.before, frame.after)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 256, axis=1)[:, ::128]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    x = np.fft.rfft(frames * window)[..., 5:64]
    x /= np.abs(x)
    omega = 2 * np.pi * np.arange(5, 64) * RATE / 256
    advance_s = -far_field_delays_s(geometry.positions_m, config.grid.azimuth_deg)
    beam = np.einsum("mtf,dmf->dtf", x, np.exp(-1j * omega * advance_s[..., None]))
    m = geometry.n_mics
    direct = ((np.abs(beam) ** 2).mean(axis=(1, 2)) - m) / (m * (m - 1))
    assert np.abs(srp_map(samples, geometry, RATE, config)[0] - direct).max() < 1e-5


def test_leading_silence_changes_nothing():
    geometry = named_array("6cm")
    wave = plane_wave(geometry, 300.4)
    late = np.concatenate([np.zeros((9, RATE // 2), np.float32), wave], axis=1)
    for n_fft in (256, 1024, 4096, 16384):
        assert angular_error_deg(SRP(n_fft=n_fft)(late, geometry, RATE).azimuth_deg[0], 300.4) < 0.5


def test_last_samples_count():
    geometry = named_array("6cm")
    samples = np.zeros((9, 3 * 4096 + 1000), np.float32)
    samples[:, -900:] = plane_wave(geometry, 45.0, n=900)
    assert angular_error_deg(SRP(n_fft=4096)(samples, geometry, RATE).azimuth_deg[0], 45.0) < 1.5


@pytest.mark.parametrize("azimuth", [0.0, 0.3, 123.45, 359.8])
def test_subgrid_peak(azimuth):
    geometry = named_array("6cm")
    wave = plane_wave(geometry, azimuth)
    assert angular_error_deg(SRP(n_azimuth=72)(wave, geometry, RATE).azimuth_deg[0], azimuth) < 0.15
    coarse = SRP(n_azimuth=72, subgrid=False)(wave, geometry, RATE).azimuth_deg[0]
    assert coarse % 5 == 0 and angular_error_deg(coarse, azimuth) <= 2.5


def test_elevation_is_found():
    geometry = named_array("realman32")
    wave, elevations = plane_wave(geometry, 200.0, elevation_deg=20), (-40, -20, 0, 20, 40)
    track = SRP(n_azimuth=90, elevation_deg=elevations, subgrid=False)(wave, geometry, RATE)
    assert track.elevation_deg[0] == 20 and track.azimuth_deg[0] == 200


@settings(max_examples=15, deadline=None)
@given(azimuth=st.floats(0, 359.9), turn=st.floats(-180, 180), seed=st.integers(0, 999))
def test_turning_the_array_turns_the_answer(azimuth, turn, seed):
    geometry = named_array("3x12cm_consecutive")
    wave = plane_wave(geometry, azimuth, seed, n=4000, noise=0.02)
    before = SRP()(wave, geometry, RATE).azimuth_deg[0]
    after = SRP()(wave, geometry.rotated(turn), RATE).azimuth_deg[0]
    assert angular_error_deg(after, before + turn) < 0.1


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(9)), gain=st.floats(1e-2, 1.5), seed=st.integers(0, 999))
def test_order_of_mics_and_gain_do_not_matter(order, gain, seed):
    geometry = named_array("3x12cm_consecutive")
    wave = plane_wave(geometry, 7.0 * seed, seed, n=4000, noise=0.05)
    one = SRP()(wave, geometry, RATE)
    other = SRP()(gain * wave[list(order)], geometry.subarray([geometry.names[i] for i in order]), RATE)
    assert np.abs(one.score - other.score).max() < 1e-4
    assert angular_error_deg(one.azimuth_deg, other.azimuth_deg).max() < 0.05


def test_wrong_order_gives_a_wrong_answer():
    geometry = named_array("6cm")
    wave = plane_wave(geometry, 60.0)
    assert angular_error_deg(SRP()(np.roll(wave, 1, axis=0), geometry, RATE).azimuth_deg[0], 60.0) > 10


@pytest.mark.parametrize("weighting", ["phat", "coherence"])
@pytest.mark.parametrize("block_s", [None, 0.1])
def test_batch_is_single(weighting, block_s, monkeypatch):
    geometry = named_array("6cm")
    clips = [plane_wave(geometry, 40.0 * i, i, n=n, noise=0.03) for i, n in enumerate([4000, 6000, 4000, 6001])]
    method = SRP(n_fft=512, weighting=weighting, block_s=block_s)
    singles = [method(x, geometry, RATE) for x in clips]
    for pieces in (1 << 22, 1 << 13):  # the second cuts each recording into many pieces
        monkeypatch.setattr("ssl_kit.localize.srp._CHUNK_SAMPLES", pieces)
        for one, many in zip(singles, method.batch(clips, geometry, RATE), strict=True):
            assert np.abs(one.score - many.score).max() < 1e-5
            assert angular_error_deg(one.azimuth_deg, many.azimuth_deg).max() < 0.05


def test_bands_average_to_the_whole():
    geometry = named_array("6cm")
    samples = plane_wave(geometry, 10.0, noise=0.1)
    config = SRPConfig(n_fft=1024)  # 237 bins in the band, so three parts of 79
    bands = srp_map(samples, geometry, RATE, config, n_bands=3)
    assert bands.shape == (3, 1, 360)
    assert np.abs(bands.mean(axis=0) - srp_map(samples, geometry, RATE, config)).max() < 1e-5
    with pytest.raises(ParameterError, match="n_bands"):
        srp_map(samples, geometry, RATE, config, n_bands=1000)


def test_blocks_follow_a_source_that_jumps():
    geometry = named_array("6cm")
    samples = np.concatenate([plane_wave(geometry, 80.0, 1), plane_wave(geometry, 250.0, 2)], axis=1)
    track = SRP(n_fft=512, block_s=0.1, context_s=0.1)(samples, geometry, RATE)
    assert track.n_frames == 10 and np.allclose(track.times_s, np.arange(10) * 0.1 + 0.05)
    assert angular_error_deg(track.azimuth_deg[:4], 80.0).max() < 1
    assert angular_error_deg(track.azimuth_deg[6:], 250.0).max() < 1


def test_stream_answers_like_the_clip():
    geometry = named_array("6cm")
    samples = plane_wave(geometry, 33.3, noise=0.05)
    stream = SRPStream(geometry, RATE)
    answers = [stream.process(samples[:, i:i + 1600]) for i in range(0, 8000, 1600)]
    assert angular_error_deg(answers[-1].azimuth_deg[0], 33.3) < 1
    with pytest.raises(DataError, match="NaN"):
        stream.process(np.full((9, 1600), np.nan))
    with pytest.raises(DataError, match="9 mics"):
        stream.process(np.zeros((4, 1600)))


def test_coherence_weighting_helps_against_a_noisy_band():
    geometry, rng = named_array("6cm"), np.random.default_rng(5)
    omega = np.fft.rfftfreq(16000, 1 / RATE)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal((9, 16000))) * (omega > 1500), 16000)
    samples = plane_wave(geometry, 150.0, n=16000) + 0.15 * noise.astype(np.float32)
    plain, weighted = (SRP(n_fft=512, weighting=w)(samples, geometry, RATE) for w in ("phat", "coherence"))
    assert weighted.confidence[0] > plain.confidence[0]
    assert angular_error_deg(weighted.azimuth_deg[0], 150.0) < 3


def test_power_at():
    geometry = named_array("6cm")
    samples = np.stack([plane_wave(geometry, a, n=4000) for a in (20.0, 200.0)])
    ratio = srp_power_at(samples, geometry, [20.0, 20.0])
    assert ratio.shape == (2,) and ratio[0] > 0.99 and ratio[1] < 0.3
    score = np.array([-1 / 8, 0.5, 1.0, 0.5])
    assert np.allclose(power_ratio(score, np.arange(0, 360, 90), 180.0, 9), 1.0)
    assert np.allclose(power_ratio(score, np.arange(0, 360, 90), 135.0, 9), (5 + 9) / 2 / 9)
    assert np.allclose(power_ratio(score, np.arange(0, 360, 90), 360.0, 9), 0.0)
    with pytest.raises(ParameterError, match="block_s"):
        srp_power_at(samples, geometry, [20.0, 20.0], config=SRPConfig(block_s=0.1))


def test_a_damaged_kept_answer_is_named_or_the_same(tmp_path):
    geometry = named_array("6cm")
    clips = [SimpleNamespace(samples=plane_wave(geometry, 10.0, n=4000), geometry=geometry, sample_rate=RATE)]
    (before,) = cached_srp(clips, tmp_path)
    (path,) = (f for f in tmp_path.rglob("*") if f.is_file())
    data, rng, named = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed if rng.random() < 0.8 else data[:rng.integers(len(data))])
        try:
            (after,) = cached_srp(clips, tmp_path)
        except DataError as error:
            assert path.name in str(error)
            named += 1
        else:
            np.testing.assert_array_equal(after.azimuth_deg, before.azimuth_deg)
    assert named > 50


def test_cache_is_by_content_and_safe_with_two_writers(tmp_path):
    geometry = named_array("6cm")
    clips = [SimpleNamespace(samples=plane_wave(geometry, a, n=4000), geometry=geometry, sample_rate=RATE)
             for a in (10.0, 120.0)]
    results = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: cached_srp(clips, tmp_path)})) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(tmp_path.rglob("*"))
    assert len([f for f in files if f.is_file()]) == 2
    for k in range(3):
        assert np.allclose([t.azimuth_deg[0] for t in results[k]], [10.0, 120.0], atol=0.1)
        assert np.array_equal(results[k][0].score, results[0][0].score)
    config = SRPConfig()
    key = srp_key(clips[0].samples, geometry, RATE, config)
    assert key != srp_key(clips[0].samples, geometry.rotated(1), RATE, config)
    assert key != srp_key(clips[0].samples, geometry, RATE, SRPConfig(n_fft=512))
    assert key != srp_key(clips[1].samples, geometry, RATE, config)
    broken = next(f for f in files if f.suffix == ".npz")
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=broken.name):
        cached_srp(clips, tmp_path)


def test_files_in_threads(tmp_path):
    geometry = named_array("6cm")
    for i in range(3):
        for mic, channel in zip(geometry.names, plane_wave(geometry, 100.0 * i, n=4000), strict=True):
            write_audio(tmp_path / f"r{i}_CH{mic}.flac", channel)
    tracks = localize_files([tmp_path / f"r{i}.flac" for i in range(3)], geometry)
    assert angular_error_deg([t.azimuth_deg[0] for t in tracks], [0.0, 100.0, 200.0]).max() < 0.3


@pytest.mark.parametrize(("bad", "message"), [
    (np.ones((4, 1000)), "9 mics, found 4 channels"),
    (np.full((9, 1000), np.nan), "NaN"),
    (np.zeros((9, 1000)), "silent"),
    (np.zeros((9, 0)), "no samples"),
    (np.ones(1000), "expected \\(mic, sample\\)"),
])
def test_unusable_audio_is_refused(bad, message):
    with pytest.raises(DataError, match=message):
        SRP()(bad, named_array("6cm"), RATE)


@pytest.mark.parametrize("parameters", [
    {"n_fft": 511}, {"n_fft": 2}, {"weighting": "rms"}, {"block_s": 0}, {"speed_of_sound": 0.343}, {"n_azimuth": 2},
    {"elevation_deg": (100,)}, {"band_hz": (300, 9000)}, {"band_hz": (4000, 300)}, {"band_hz": (300, 301)},
    {"nfft": 512},
])
def test_wrong_parameters_are_refused(parameters):
    geometry = named_array("6cm")
    with pytest.raises(ParameterError, match=next(iter(parameters)).split("_")[0]):
        SRP(**parameters)(plane_wave(geometry, 0.0, n=1000), geometry, RATE)


def test_one_mic_is_refused():
    geometry = named_array("6cm").subarray(["0"])
    with pytest.raises(ParameterError, match="at least 2 mics"):
        SRP()(np.ones((1, 1000)) * 0.1, geometry, RATE)


def test_gradients_reach_the_spectra_after_inference():
    import torch

    from ssl_kit.localize.srp import cross_spectra, steered_power

    geometry, config = named_array("uca:4:0.05"), SRPConfig(n_fft=256, n_azimuth=36)
    samples = plane_wave(geometry, 50.0, n=2000)
    srp_map(samples, geometry, RATE, config)
    spectra = cross_spectra(torch.from_numpy(samples)[None], RATE, config).requires_grad_()
    steered_power(spectra, geometry, RATE, config)[0, 0, 5].backward()
    assert spectra.grad.abs().max() > 0
