"""Diffuse fields, room responses and scenes: closed forms, full image sources as peer, properties, determinism."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.diffuse import diffuse_field, isotropic_coherence
from ssl_kit.arrays.geometry import ArrayGeometry, named_array
from ssl_kit.arrays.recordings import Recording, SourcePool, source_pool, voice_activity
from ssl_kit.arrays.rirs import eyring_absorption, room_impulse_responses
from ssl_kit.arrays.rooms import (
    SceneConfig,
    diffuse_noise,
    layout_of,
    mix_at_snr,
    render_scene,
    sample_scene,
    scene_responses,
    speech_image,
    stream,
)
from ssl_kit.lab.errors import DataError, ParameterError

LAYOUT = named_array("realman32")
SMALL = SceneConfig(duration_s=1.0, t60_s=(0.2, 0.4), room_max_m=(6, 5, 3))


# --- diffuse fields -----------------------------------------------------------------------------------------------


def _measured_coherence(field, n_fft=512):
    "Real part of the coherence (freq, mic, mic), averaged over frames with half overlap."
    frames = np.lib.stride_tricks.sliding_window_view(field, n_fft, axis=1)[:, ::n_fft // 2]
    spectra = np.fft.rfft(frames * np.hanning(n_fft), axis=-1)
    cross = np.einsum("mtf,ntf->fmn", spectra, spectra.conj()) / spectra.shape[1]
    power = np.real(np.einsum("fmm->fm", cross))
    return np.real(cross) / np.sqrt(power[:, :, None] * power[:, None, :])


def _wide_pairs():
    return LAYOUT.subarray([0, 1, 5, 17, 21, 28])


@pytest.mark.parametrize("maker", ["diffuse_field", "scene noise", "scene noise of a recording"])
def test_coherence_of_diffuse_noise_is_the_sinc(maker):
    """Average over 3 x 4 s: the coherence of N independent frames scatters by about 1/sqrt(N), here 0.04."""
    array, rate, n = _wide_pairs(), 16000, 64000
    rows, fields = LAYOUT.indices(array.names), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        if maker == "diffuse_field":
            fields.append(diffuse_field(rng.standard_normal((6, n)), array.positions_m, rate))
        elif maker == "scene noise":
            fields.append(diffuse_noise(rng.standard_normal(n).astype(np.float32), LAYOUT, rows, rng))
        else:
            pool = source_pool("embedded", "synthetic", "train")
            clip = next(c for c in pool.noise if c.category == "fan")
            piece = SourcePool(pool.speech, [clip]).noise_piece(0, seed, n)[0]
            fields.append(diffuse_noise(piece, LAYOUT, rows, rng))
    measured = np.mean([_measured_coherence(f) for f in fields], axis=0)
    frequencies = np.arange(257) * rate / 512
    band = (frequencies > 150) & (frequencies < 7500)
    expected = isotropic_coherence(array.positions_m, frequencies)
    error = np.abs(measured - expected)[band]
    assert np.sqrt(np.mean(error**2)) < 0.05
    # smooth over frequency, the scatter goes away and a wrong shape would stay
    smooth = np.apply_along_axis(lambda e: np.convolve(e, np.ones(25) / 25, "valid"), 0, (measured - expected)[band])
    assert np.abs(smooth).max() < 0.06


def test_scene_noise_has_the_spectrum_and_loudness_of_its_clip():
    from scipy.signal import welch

    rng = np.random.default_rng(0)
    clip = np.convolve(rng.standard_normal(64000), [1, 0.7, 0.4, 0.1], "same").astype(np.float32)
    noise = diffuse_noise(clip, LAYOUT, [0, 4], np.random.default_rng(1))
    f, wanted = welch(clip, 16000, nperseg=512)
    found = welch(noise, 16000, nperseg=512)[1]
    band = (f > 200) & (f < 7000)
    assert np.abs(10 * np.log10(found[:, band] / wanted[band])).max() < 3
    assert np.allclose(noise.std(axis=1) / clip.std(), 1, atol=0.1)


def test_diffuse_field_of_some_mics_is_a_part_of_the_whole():
    sources = np.random.default_rng(0).standard_normal((32, 4000))
    whole = diffuse_field(sources, LAYOUT.positions_m)
    assert np.allclose(diffuse_field(sources, LAYOUT.positions_m, select=[3, 0]), whole[[3, 0]], atol=1e-5)
    with pytest.raises(ParameterError, match="sources"):
        diffuse_field(sources[:5], LAYOUT.positions_m)


# --- room responses -----------------------------------------------------------------------------------------------

ROOM, SOURCE = (6.1, 4.7, 2.9), (4.2, 3.1, 1.5)
MICS = named_array("6cm").positions_m + np.array([2.3, 1.9, 1.3])


def _schroeder_t60(response, rate=16000, low=-25.0, high=-5.0):
    "T60 by backward integration (Schroeder 1965), a line fit between -5 and -25 dB."
    energy = np.cumsum(np.asarray(response, float)[::-1] ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0] + 1e-12)
    inside = np.flatnonzero((level < high) & (level > low))
    return -60 / np.polyfit(inside / rate, level[inside], 1)[0]


def _scene_full(scene, config, rows=(0,)):
    early, late = scene_responses(scene, LAYOUT, list(rows), config)
    response = np.zeros((len(rows), max(early.shape[2], late.shape[1])), np.float32)
    response[:, :late.shape[1]] += late
    response[:, :early.shape[2]] += early[0]
    return response


@pytest.mark.parametrize("t60_s", [0.25, 0.5, 0.8, 1.3])
def test_responses_of_scenes_decay_as_asked(t60_s):
    config = SceneConfig(t60_s=(t60_s, t60_s))
    measured = [_schroeder_t60(_scene_full(sample_scene(config, 1, 8 * i), config)[0]) for i in range(5)]
    assert abs(np.median(measured) / t60_s - 1) < 0.2


def test_scenes_and_full_images_share_the_direct_path_and_early_part():
    config = SceneConfig(t60_s=(0.4, 0.4))
    scene = sample_scene(config, 4, 0)
    rows = [0, 3, 12]
    mics = np.asarray(scene.array_m) + LAYOUT.rotated(scene.array_yaw_deg).positions_m[rows]
    hybrid = _scene_full(scene, config, rows)
    images = room_impulse_responses(scene.dimensions_m, scene.t60_s, scene.source_m[0], mics)
    early = int(0.055 * 16000)
    # pyroomacoustics high-passes each response without phase, so what is cut off later reaches back a little
    assert np.abs(hybrid[:, :early] - images[:, :early]).max() < 2e-3 * np.abs(images).max()
    direct = np.linalg.norm(mics - np.asarray(scene.source_m[0]), axis=1) / 343 * 16000
    assert np.abs(np.argmax(np.abs(hybrid[:, :early]), axis=1) - direct).max() <= 1


def _late_energy_db(response, start_s=0.1, rate=16000):
    return 10 * np.log10(np.mean(np.sum(response[:, int(start_s * rate):].astype(float) ** 2, axis=1)))


def test_late_energy_agrees_with_full_images():
    """Median over rooms within 2 dB: the diffuse tail continues the level that image sources would have had."""
    config = SceneConfig(t60_s=(0.35, 0.55), room_min_m=(5, 4, 2.8), room_max_m=(8, 7, 4))
    gaps = []
    for index in range(0, 40, 8):
        scene = sample_scene(config, 0, index)
        mics = np.asarray(scene.array_m) + LAYOUT.positions_m[:3]
        args = (scene.dimensions_m, scene.t60_s, scene.source_m[0], mics)
        gaps.append(_late_energy_db(_scene_full(scene, config, (0, 1, 2)))
                    - _late_energy_db(room_impulse_responses(*args)))
    assert abs(np.median(gaps)) < 2 and np.abs(gaps).max() < 4, np.round(gaps, 1)


def test_room_responses_check_their_arguments():
    assert room_impulse_responses(ROOM, 0.3, SOURCE, MICS).dtype == np.float32
    with pytest.raises(ParameterError, match="inside the room"):
        room_impulse_responses(ROOM, 0.3, (7, 1, 1), MICS)
    with pytest.raises(ParameterError):
        eyring_absorption(ROOM, -1)


def test_absorption_is_eyrings():
    volume, surface = np.prod(ROOM), 2 * (ROOM[0] * ROOM[1] + ROOM[0] * ROOM[2] + ROOM[1] * ROOM[2])
    alpha = eyring_absorption(ROOM, 0.5)
    assert np.isclose(24 * np.log(10) / 343 * volume / (-surface * np.log(1 - alpha)), 0.5)


# --- scenes -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 10**6), st.sampled_from(["train", "valid", "calibration", "test"]))
def test_scenes_stay_in_their_ranges(seed, index, split):
    config = SceneConfig(moving_share=0.5)
    scene = sample_scene(config, seed, index, split)
    assert scene == sample_scene(config, seed, index, split)
    room = np.array(scene.dimensions_m)
    assert (room >= config.room_min_m).all() and (room <= config.room_max_m).all()
    places = np.array(scene.source_m)
    margin = config.wall_margin_m - 1e-9
    assert (places[:, :2] >= margin).all() and (places[:, :2] <= room[:2] - margin).all()
    horizontal = np.linalg.norm(places[:, :2] - np.array(scene.array_m)[:2], axis=1)
    assert (horizontal >= config.distance_m[0] - 1e-9).all() and (horizontal <= config.distance_m[1] + 1e-9).all()
    assert config.t60_s[0] <= scene.t60_s <= config.t60_s[1] and config.snr_db[0] <= scene.snr_db <= config.snr_db[1]
    towards = places[:, :2] - np.array(scene.array_m)[:2]
    seen = np.degrees(np.arctan2(towards[:, 1], towards[:, 0])) - scene.array_yaw_deg
    assert np.max(angular_error_deg(seen, scene.azimuth_deg)) < 1e-6
    assert len(scene.azimuth_deg) in (1, 40)


def test_rooms_are_shared_within_a_group_and_differ_between_splits_and_seeds():
    config = SceneConfig(recordings_per_room=4)

    def room(index, split="train", seed=0):
        scene = sample_scene(config, seed, index, split)
        return scene.room, scene.dimensions_m, scene.t60_s, scene.array_m, scene.array_yaw_deg

    assert len({room(i) for i in range(4)}) == 1 and room(3) != room(4)
    splits = ("train", "valid", "calibration", "test")
    everything = {room(i, split, seed)[1:] for i in range(0, 40, 4) for split in splits for seed in (0, 1)}
    assert len(everything) == 80
    assert len({sample_scene(config, 0, i).azimuth_deg for i in range(4)}) == 4


def test_azimuths_are_uniform():
    from scipy.stats import kstest

    azimuth = [sample_scene(SceneConfig(), 0, i).azimuth_deg[0] for i in range(600)]
    assert kstest(np.array(azimuth) / 360, "uniform").pvalue > 0.01


@pytest.mark.parametrize("wrong", [
    {"t60_s": (0.8, 0.2)}, {"snr_db": (0, float("nan"))}, {"room_min_m": (1.0, 3, 3)}, {"source_height_m": (1, 2.6)},
    {"moving_share": 2}, {"distance_m": (0, 1)}, {"room_min_m": (11.0, 9, 5)}, {"recordings_per_room": 0},
    {"reverberation": "ray"}])
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ParameterError):
        SceneConfig(**wrong)


def test_streams_are_told_apart_and_checked():
    values = {stream(s, split, kind, n).random() for s in (0, 1) for split in ("train", "test")
              for kind in ("room", "scene", "tail", "noise") for n in (0, 1)}
    assert len(values) == 32
    with pytest.raises(ParameterError):
        stream(0, "training", "room", 0)
    with pytest.raises(ParameterError):
        stream(-1, "train", "room", 0)


# --- rendering ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", [0.0, 1.0])
@pytest.mark.parametrize("reverberation", ["hybrid", "images"])
def test_a_sub_array_hears_what_the_whole_array_hears(moving, reverberation):
    config = SceneConfig(duration_s=0.5, t60_s=(0.2, 0.25), room_max_m=(6, 5, 3), moving_share=moving,
                         reverberation=reverberation)
    scene = sample_scene(config, 3, 5)
    whole = render_scene(scene, LAYOUT, config)
    for name in ("6cm", "3x12cm_consecutive", "18cm"):
        array = named_array(name)
        part = render_scene(scene, array, config)
        assert np.allclose(part.samples, whole.subarray(array).samples, atol=2e-6), name
    without_reference = LAYOUT.subarray([30, 9, 2])
    part = render_scene(scene, without_reference, config)
    assert np.allclose(part.samples, whole.subarray(without_reference).samples, atol=2e-6)


def test_rendering_is_deterministic_and_independent_of_history():
    scenes = [sample_scene(SMALL, 0, i) for i in range(3)]
    array = named_array("6cm-5")
    forwards = [render_scene(s, array, SMALL).samples for s in scenes]
    backwards = [render_scene(s, array, SMALL).samples for s in reversed(scenes)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 25.0])
def test_the_snr_is_exact_over_active_speech(snr_db):
    rng = np.random.default_rng(0)
    speech, noise = rng.standard_normal((2, 16000)), rng.standard_normal((2, 16000))
    active = np.array([True] * 4 + [False] * 6)
    added = mix_at_snr(speech, noise, snr_db, active) - speech
    power = np.mean(speech[0, :6400] ** 2) / np.mean(added[0, :6400] ** 2)
    assert np.isclose(10 * np.log10(power), snr_db, atol=1e-4)
    with pytest.raises(DataError, match="powers"):
        mix_at_snr(speech, 0 * noise, snr_db, active)


def test_direct_path_comes_from_the_labelled_azimuth():
    """SRP-PHAT of an independent package on dry rooms: yaw, handedness and label agree, for static and moving."""
    import pyroomacoustics as pra

    array = named_array("18cm")
    config = SceneConfig(t60_s=(0.2, 0.2), snr_db=(30, 30), moving_share=0.0, duration_s=1.5, room_min_m=(8, 7, 3.5),
                         distance_m=(0.8, 1.5))
    for index in range(0, 18, 6):
        recording = render_scene(sample_scene(config, 0, index), array, config)
        assert angular_error_deg(_srp(pra, recording.samples, array), recording.azimuth_deg) < 6
    moving = SceneConfig(t60_s=(0.2, 0.2), snr_db=(30, 30), moving_share=1.0, duration_s=3.0, speed_m_s=(1.0, 1.2),
                         room_min_m=(8, 7, 3.5), distance_m=(0.8, 1.2))
    recording = render_scene(sample_scene(moving, 0, 1), array, moving)
    assert angular_error_deg(recording.azimuth_deg[0], recording.azimuth_deg[-1]) > 60
    errors = []
    for frame in range(2, 28, 4):
        piece = recording.samples[:, (frame - 1) * 1600:(frame + 2) * 1600]
        if recording.voice_activity[frame - 1:frame + 2].all():
            errors.append(angular_error_deg(_srp(pra, piece, array), recording.azimuth_deg[frame]))
    assert len(errors) >= 3 and np.median(errors) < 8


def _srp(pra, samples, array):
    spectra = np.stack([pra.transform.stft.analysis(s, 512, 256, win=pra.hann(512)).T for s in samples])
    doa = pra.doa.SRP(array.positions_m.T, 16000, 512, c=343.0, num_src=1, azimuth=np.radians(np.arange(360)))
    doa.locate_sources(spectra, freq_range=[300, 4000])
    return float(np.degrees(doa.azimuth_recon[0]))


def test_moving_in_place_equals_standing_still():
    rng = np.random.default_rng(0)
    dry = rng.standard_normal(8000).astype(np.float32)
    early, late = rng.standard_normal((1, 3, 300)).astype(np.float32), rng.standard_normal((3, 900)).astype(np.float32)
    still = speech_image(dry, early, late, 16000)
    assert np.allclose(speech_image(dry, early.repeat(5, 0), late, 16000), still, atol=2e-3)
    direct = np.array([np.convolve(dry, r)[:8000] for r in late + np.pad(early[0], ((0, 0), (0, 600)))])
    assert np.allclose(still, direct, atol=2e-3)


def test_meta_and_levels_of_a_rendered_recording():
    scene = sample_scene(SMALL, 0, 2, "test")
    recording = render_scene(scene, named_array("6cm"), SMALL)
    assert recording.samples.shape == (9, 16000) and np.abs(recording.samples).max() < 1
    assert np.isclose(np.abs(recording.samples[8]).max(), 0.3, atol=1e-6)  # mic 0, the reference, is last here
    assert recording.meta["room"] == scene.room and recording.meta["noise_kind"]
    speakers = {u.speaker for u in source_pool("embedded", "synthetic", "test").speech}
    assert recording.meta["speaker"] in speakers
    assert not speakers & {u.speaker for u in source_pool("embedded", "synthetic", "train").speech}


def test_arrays_of_ones_own_are_rendered_too_but_need_a_reference():
    array = named_array("uca:4:0.05")
    assert layout_of(array) is array and layout_of(named_array("18cm")) == LAYOUT
    assert render_scene(sample_scene(SMALL, 0, 0), array, SMALL).samples.shape == (4, 16000)
    nameless = ArrayGeometry(array.positions_m, ("a", "b", "c", "d"), None)
    with pytest.raises(ParameterError, match="reference"):
        render_scene(sample_scene(SMALL, 0, 0), nameless, SMALL)


# --- recordings and sources ---------------------------------------------------------------------------------------


def test_recordings_cut_and_reorder_samples_with_their_geometry():
    whole = Recording(np.arange(32, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32), 16000, LAYOUT)
    part = whole.subarray(named_array("4x12cm_half")).order("reference_first")
    assert part.samples[:, 0].tolist() == [int(n) for n in part.geometry.names] and part.geometry.reference == 0
    with pytest.raises(ParameterError, match="elsewhere"):
        whole.subarray(named_array("uca:8:0.1"))
    with pytest.raises(DataError, match="9 mics"):
        Recording(np.zeros((8, 100)), 16000, named_array("6cm"))


def test_voice_activity_follows_the_level_and_ignores_gain():
    rng = np.random.default_rng(0)
    level = np.repeat([1, 0.3, 0.001, 1, 0.0], 1600)
    speech = rng.standard_normal(8000) * level
    wanted = [True, True, False, True, False]
    assert voice_activity(speech).tolist() == wanted == voice_activity(1e-3 * speech).tolist()
    assert len(voice_activity(speech[:7999])) == 5 and len(voice_activity([])) == 0


def test_pieces_of_speech_are_mostly_speech():
    pool = source_pool("embedded", "synthetic", "train")
    rng = np.random.default_rng(0)
    for _ in range(20):
        piece, _ = pool.speech_piece(rng.random(), tuple(rng.random(8)), 16000)
        assert piece.shape == (16000,) and voice_activity(piece).mean() >= 0.3
    with pytest.raises(DataError, match="at least one"):
        SourcePool([], [])


def test_mixing_without_an_active_frame_is_refused():
    "A mean over nothing would make every sample NaN."
    from ssl_kit.arrays.rooms import mix_at_snr

    with pytest.raises(DataError, match="active frame"):
        mix_at_snr(np.ones((2, 3200)), np.ones((2, 3200)), 5.0, np.zeros(2, bool))
