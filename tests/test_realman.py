"""RealMAN's layout, whole: tables, scene information, raw editions, labels, mixing, and simulated walks in it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ssl_kit.arrays.realman as realman_module
from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import SPEED_OF_SOUND, named_array
from ssl_kit.arrays.realman import (
    location_file,
    parse_azimuth,
    read_locations,
    read_recording,
    read_t60,
    spread,
    stream_recordings,
)
from ssl_kit.arrays.realman_mix import RealmanMixtures, looped, mix_recording, noise_piece, read_noises
from ssl_kit.arrays.rooms import SceneConfig, sample_scene, scene_responses, speech_image
from ssl_kit.arrays.simulate import simulate_dataset
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

MICS = (0, 1, 3)
TRIO = named_array("realman32").subarray([1, 3, 0])
SCENES = {"OfficeRoom1": 0.4, "Square": None, "Car": 0.1}


def speech_like(n, rng, silent_from=None):
    """Noise with a pause, so that voice activity has something to find."""
    signal = 0.1 * rng.standard_normal(n)
    if silent_from is not None:
        signal[silent_from:] = 0
    return signal


def write_set(root, split="test", folder="ma_noisy_speech", rate=16000, seconds=1.0, named=None, moving=None,
              direct=False, table=True, mics=MICS):
    """A split with a static and a moving recording in each scene; returns {kind: [name]}."""
    rng, names = np.random.default_rng(0), {"static": [], "moving": []}
    base = split.removesuffix("_raw")
    for scene in SCENES:
        for kind in names:
            stem = f"{base.upper()}_{kind[0].upper()}_{scene[:4].upper()}_0007_0001"
            place = f"{scene}/{kind}/0007"
            n = round(seconds * rate)
            dry = speech_like(n, rng, silent_from=n // 2)
            for mic in mics:
                write_audio(root / split / folder / place / f"{stem}_CH{mic}.flac",
                            np.roll(dry, mic) + 1e-4 * rng.standard_normal(n), rate)
            if direct:
                write_audio(root / split / "dp_speech" / place / f"{stem}.flac", dry, rate, "PCM_24")
            names[kind].append(f"{named or f'{split}/{folder}'}/{place}/{stem}.flac")
    moving = moving or ",".join(str(5.0 * k) for k in range(round(10 * seconds)))
    if table:
        for kind, found in names.items():
            angle, distance, ele = (moving, "1.5,-1,2.5", "10,20,-1000") if kind == "moving" else (77.5, 1.25, -3)
            rows = "".join(f'{i},{name},0.1,1.1,"{angle}","{distance}","{ele}"\n' for i, name in enumerate(found))
            (root / split / f"{base}_{kind}_source_location.csv").write_text(
                "\ufeff,filename,real_st,real_ed,angle(°),distance,ele\n" + rows, encoding="utf-8")
    return names


def write_noise(root, split="train", seconds=3.0, rate=48000, scenes=("OfficeRoom1", "Car"), mics=MICS, level=0.1):
    rng = np.random.default_rng(1)
    for scene in scenes:
        for n in range(2):
            for mic in mics:
                write_audio(root / split / "ma_noise" / scene / f"{split.upper()}_{scene}_{n}_CH{mic}.flac",
                            level * rng.standard_normal(round(seconds * rate)), rate)


# --- tables and scenes --------------------------------------------------------------------------------------------


def test_rows_of_both_kinds_with_what_is_known_about_them(tmp_path):
    write_set(tmp_path)
    items = read_locations(tmp_path)
    assert [i.moving for i in items] == [False] * 3 + [True] * 3
    static, moving = items[0], items[3]
    assert static.scene == moving.scene == "OfficeRoom1" and static.meta["speaker"] == "0007"
    assert static.azimuth_deg.tolist() == [77.5] and static.distance_m == 1.25 and static.elevation_deg == -3
    assert len(moving.azimuth_deg) == 10 and moving.distance_m == 2.0 and moving.elevation_deg == 15.0
    assert [i.scene for i in read_locations(tmp_path, kinds=["moving"])] == list(SCENES)


def test_choosing_scenes_and_a_limit_that_covers_all_of_them(tmp_path):
    write_set(tmp_path)
    assert {i.scene for i in read_locations(tmp_path, scenes=["Car", "Square"])} == {"Car", "Square"}
    assert [i.scene for i in read_locations(tmp_path, kinds=["static"], limit=2)] == ["OfficeRoom1", "Square"]
    assert [(i.moving, i.scene) for i in read_locations(tmp_path, limit=2)] == [(False, "OfficeRoom1"),
                                                                               (True, "OfficeRoom1")]
    with pytest.raises(ParameterError, match=r"'Cafe'.*'Car', 'OfficeRoom1', 'Square'"):
        read_locations(tmp_path, scenes=["Cafe", "Car"])
    with pytest.raises(ParameterError, match="limit"):
        read_locations(tmp_path, limit=0)


@given(st.integers(0, 60), st.integers(1, 70))
def test_spread_takes_even_steps(n, limit):
    taken = spread(range(n), limit)
    assert len(taken) == min(n, limit) and sorted(set(taken)) == taken
    steps = np.diff(taken)
    assert not len(steps) or steps.max() - steps.min() <= 1


@pytest.mark.parametrize("content", [
    {"OfficeRoom1": 0.4, "Square": None, "Car": "0.1"},
    {"OfficeRoom1": {"area": 9, "T60": 0.4}, "Square": {"T60": "-"}, "Car": {"t60 (s)": "0.1s"}},
    [{"scene": "OfficeRoom1", "RT60": 0.4}, {"scene": "Square", "RT60": ""}, {"scene": "Car", "RT60": 0.1}],
])
def test_scene_information_in_the_forms_it_may_have(tmp_path, content):
    write_set(tmp_path)
    (tmp_path / "dataset_info").mkdir()
    (tmp_path / "dataset_info" / "scene_info.json").write_text(json.dumps(content))
    assert read_t60(tmp_path / "dataset_info" / "scene_info.json") == {"OfficeRoom1": 0.4, "Car": 0.1}
    indoors = read_locations(tmp_path, scenes=["OfficeRoom1", "Car"], max_t60_s=0.4)
    assert {i.scene for i in indoors} == {"Car"} and all(i.meta["t60_s"] == 0.1 for i in indoors)
    with pytest.raises(DataError, match="T60 of scene 'Square' is unknown"):
        read_locations(tmp_path, max_t60_s=0.8)


def test_scene_information_from_a_csv_or_a_mapping(tmp_path):
    write_set(tmp_path)
    table = tmp_path / "rooms.csv"
    table.write_text("Scene,T60 (s),note\nOfficeRoom1,0.4,x\nCar,0.1,y\nSquare,,outdoors\n")
    kept = read_locations(tmp_path, max_t60_s=0.3, t60_s={**read_t60(table), "Square": 0.0})
    assert {i.scene for i in kept} == {"Car", "Square"}
    known = read_locations(tmp_path, t60_s=table)  # no filter: what is known goes into meta
    assert {i.scene: i.meta.get("t60_s") for i in known} == SCENES


@pytest.mark.parametrize("text, match", [
    ("{", "expected JSON"), ('"x"', "expected scenes"), ('{"A": 400}', "milliseconds"), ('{"A": "long"}', "'long'"),
    ('{"A": {"t60_a": 1, "t60_b": 2}}', "one entry that speaks of T60"), ('[{"T60": 1}]', "expected rows"),
])
def test_scene_information_that_says_something_else(tmp_path, text, match):
    path = tmp_path / "scene_info.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_t60(path)
    assert str(path) in str(caught.value)
    with pytest.raises(MissingDataError, match="nowhere.json"):
        read_t60(tmp_path / "nowhere.json")


def test_raw_edition_whose_table_names_the_mixed_one(tmp_path):
    """Both editions side by side: the split that was asked for is read, whatever folder its table names."""
    write_set(tmp_path, "test")
    write_set(tmp_path, "test_raw", "ma_speech", named="test/ma_noisy_speech")
    for item in read_locations(tmp_path, "test_raw"):
        assert item.path.is_relative_to(tmp_path / "test_raw" / "ma_speech")
        read_recording(item, TRIO)
    mixed = tmp_path / "test" / "ma_noisy_speech"
    assert all(item.path.is_relative_to(mixed) for item in read_locations(tmp_path, "test"))
    [first, *_] = read_locations(tmp_path, "test", audio="ma_speech")
    with pytest.raises(MissingDataError, match="ma_speech"):
        read_recording(first, TRIO)


def test_wrong_trees_are_told_apart(tmp_path):
    with pytest.raises(MissingDataError, match="no such folder"):
        read_locations(tmp_path / "nothing")
    write_set(tmp_path, "val")
    with pytest.raises(MissingDataError, match=r"tables in the splits \['val'\]"):
        read_locations(tmp_path, "test")
    with pytest.raises(MissingDataError, match="give the folder above it"):
        read_locations(tmp_path / "val", "val")
    with pytest.raises(ParameterError, match="audio"):
        read_locations(tmp_path, "val", audio="dp_speech")
    table = tmp_path / "val" / "val_static_source_location.csv"
    lines = table.read_text(encoding="utf-8-sig").splitlines()
    table.write_text("\n".join([*lines, lines[1]]), encoding="utf-8")
    assert len(read_locations(tmp_path, "val", kinds=["static"])) == 3
    table.write_text("\n".join([*lines, lines[1].replace("77.5", "78.5")]), encoding="utf-8")
    with pytest.raises(DataError, match="row 5: .* has other angles in row 2"):
        read_locations(tmp_path, "val")


@given(st.lists(st.one_of(st.just(-1000.0), st.floats(-720, 720).filter(lambda a: a != -1000)), min_size=1))
def test_angles_survive_a_comma_list(angles):
    found = parse_azimuth(",".join(map(repr, angles)))
    for angle, value in zip(angles, found, strict=True):
        assert math.isnan(value) if angle == -1000 else 0 <= value < 360 and angular_error_deg(angle, value) < 1e-9


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize("n_labels, ok", [(10, True), (7, True), (5, True), (4, False), (15, True), (16, False)])
def test_labels_may_differ_from_the_audio_by_half_a_second(tmp_path, rate, n_labels, ok):
    write_set(tmp_path, rate=rate, moving=",".join(str(10 * k) for k in range(n_labels)), mics=(0, 1))
    [item, *_] = read_locations(tmp_path, kinds=["moving"])
    pair = TRIO.subarray([0, 1])
    if not ok:
        with pytest.raises(DataError, match=f"{n_labels} labels at 10 Hz.*the audio has 1.00 s"):
            read_recording(item, pair)
        return
    recording = read_recording(item, pair)
    assert recording.samples.shape == (2, 16000) and len(recording.azimuth_deg) == 10
    expected = [10.0 * k if k < n_labels else np.nan for k in range(10)]
    assert np.array_equal(recording.azimuth_deg, expected, equal_nan=True)
    tail = read_recording(item, pair, start_s=0.8)
    assert np.array_equal(tail.azimuth_deg, expected[8:], equal_nan=True)


def test_channels_follow_the_names_of_the_mics(tmp_path):
    write_set(tmp_path, rate=48000)
    [item, *_] = read_locations(tmp_path)
    whole, pair = read_recording(item, TRIO), read_recording(item, TRIO.subarray([0, 3]))
    assert np.array_equal(whole.samples[[2, 1]], pair.samples)
    # np.roll by the mic's number at 48 kHz: mic 3 hears one 16 kHz sample later than mic 0
    assert np.argmax(np.correlate(whole.samples[1], whole.samples[2], "full")) - (whole.samples.shape[1] - 1) == 1
    item.channel(3).unlink()
    with pytest.raises(MissingDataError, match="missing: 3$"):
        read_recording(item, TRIO)
    with pytest.raises(MissingDataError, match="missing: 2, 3, 4, 5, 6, 7, 8$"):
        read_recording(item, named_array("6cm"))


def test_voice_activity_from_the_direct_path(tmp_path):
    write_set(tmp_path, direct=True)
    for item in read_locations(tmp_path):
        recording = read_recording(item, TRIO)
        assert recording.voice_activity.tolist() == [True] * 5 + [False] * 5
        assert read_recording(item, TRIO, start_s=0.4, duration_s=0.3).voice_activity.tolist() == [True, False, False]
    write_set(tmp_path / "without")
    assert read_recording(read_locations(tmp_path / "without")[0], TRIO).voice_activity is None


# --- many recordings ----------------------------------------------------------------------------------------------


def test_streaming_keeps_order_and_reads_only_a_little_ahead(tmp_path, monkeypatch):
    write_set(tmp_path, mics=(0, 1))
    items, pair, read = read_locations(tmp_path) * 5, TRIO.subarray([0, 1]), []

    def counted(item, *args):
        read.append(item.name)
        return read_recording(item, *args)

    monkeypatch.setattr(realman_module, "read_recording", counted)
    stream = stream_recordings(items, pair, ahead=2)
    assert next(stream).meta["name"] == items[0].name and next(stream).meta["name"] == items[1].name
    assert len(read) <= 4
    stream.close()
    assert len(read) <= 4
    assert [r.meta["name"] for r in stream_recordings(items, pair)] == [i.name for i in items]
    items[3].channel(1).unlink()
    stream = stream_recordings(items, pair)
    for _ in range(3):
        next(stream)
    with pytest.raises(MissingDataError, match=items[3].name):
        next(stream)
    with pytest.raises(ParameterError, match="ahead"):
        next(stream_recordings(items, pair, ahead=0))


# --- speech and noise ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    write_set(root, "train", "ma_speech", rate=16000, seconds=1.0, direct=True)
    write_noise(root, "train", seconds=1.6, rate=48000)
    return root


def parts_of(mixed, clean, noise):
    """Speech and noise in a mixture: gains by least squares over all channels, and what they leave over."""
    n = clean.samples.shape[1]
    n_starts = round(1.6 * 16000) - n + 1
    draw = (mixed.meta["noise_start_s"] * 16000 + 0.5) / n_starts  # the middle of what gives this start
    piece, start_s, _ = noise_piece(noise, mixed.geometry, n, draw)
    assert start_s == mixed.meta["noise_start_s"]
    basis = np.stack([clean.samples.ravel(), piece.ravel()])
    gains = np.linalg.lstsq(basis.T, mixed.samples.ravel(), rcond=None)[0]
    left = np.linalg.norm(mixed.samples.ravel() - gains @ basis) / np.linalg.norm(mixed.samples)
    return gains[0] * clean.samples, gains[1] * piece, left


@pytest.mark.parametrize("snr_db", [-30.0, -10.0, 0.0, 15.0])
def test_the_ratio_holds_at_the_reference_over_active_speech(raw, snr_db):
    [item, *_] = read_locations(raw, "train")
    clean, noise = read_recording(item, TRIO), read_noises(raw)[0]
    mixed = mix_recording(item, noise, TRIO, snr_db, seed=3)
    speech, added, left = parts_of(mixed, clean, noise)
    mask, reference = np.repeat(mixed.voice_activity, 1600), TRIO.reference
    ratio = np.mean(speech[reference][mask] ** 2) / np.mean(added[reference][mask] ** 2)
    assert abs(10 * np.log10(ratio) - snr_db) < 1e-3 and left < 1e-5
    # the level of the speech stays unless the sum would be too loud
    gain = speech.std() / clean.samples.std()
    assert np.isclose(gain, 1, atol=1e-5) if snr_db >= 0 else np.isclose(np.abs(mixed.samples).max(), 0.99)
    assert mixed.meta["snr_db"] == snr_db and mixed.meta["noise"] == noise.name and not mixed.meta["noise_repeated"]
    assert mixed.azimuth_deg == clean.azimuth_deg


def test_a_mixture_is_given_by_seed_and_index(raw):
    a, b = (RealmanMixtures(raw, "train", TRIO, (-5, 5), seed=7) for _ in range(2))
    other = RealmanMixtures(raw, "train", TRIO, (-5, 5), seed=8)
    assert len(a) == 6
    forward, backward = [a[k] for k in range(6)], [b[k] for k in reversed(range(6))][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert np.array_equal(first.samples, second.samples) and first.meta == second.meta
    assert np.array_equal(a[-1].samples, forward[5].samples)
    assert all(-5 <= r.meta["snr_db"] <= 5 for r in forward) and len({r.meta["snr_db"] for r in forward}) == 6
    assert {r.meta["snr_db"] for r in forward}.isdisjoint({other[k].meta["snr_db"] for k in range(6)})
    assert sum(1 for _ in a) == 6  # ends with IndexError, as a sequence must
    with pytest.raises(IndexError):
        a[6]


def test_a_sub_array_hears_the_same_mixture(raw):
    pair = TRIO.subarray([3, 0])
    whole, part = (RealmanMixtures(raw, "train", array, (0, 0), seed=2)[4] for array in (TRIO, pair))
    assert np.allclose(whole.subarray(pair).samples, part.samples, atol=1e-6)


def test_pieces_begin_on_a_label_and_hold_speech(raw):
    mixtures = RealmanMixtures(raw, "train", TRIO, (5, 5), duration_s=0.4, kinds=["moving"])
    for seed in range(5):
        mixtures.seed = seed
        for piece in mixtures:
            assert piece.samples.shape == (3, 6400) and piece.voice_activity.any()
            first = round(piece.meta["start_s"] * 10)
            assert piece.azimuth_deg.tolist() == [5.0 * k for k in range(first, first + 4)]
    whole = RealmanMixtures(raw, "train", TRIO, (5, 5), duration_s=4.0, kinds=["moving"])
    assert whole[0].samples.shape == (3, 16000)


def test_short_noise_is_repeated_without_a_click(tmp_path):
    write_set(tmp_path, "train", "ma_speech", seconds=2.0)
    n = np.arange(round(0.7 * 16000))
    for mic in MICS:
        write_audio(tmp_path / f"train/ma_noise/Car/N_CH{mic}.flac", 0.2 * np.sin(n / 9 + mic), 16000, "PCM_24")
    [noise] = read_noises(tmp_path)
    mixed = mix_recording(read_locations(tmp_path, "train")[0], noise, TRIO, 0.0, seed=5)
    assert mixed.meta["noise_repeated"] and mixed.samples.shape == (3, 32000)
    piece, _, repeated = noise_piece(noise, TRIO, 32000, 0.3)
    assert repeated and np.abs(np.diff(piece)).max() < 2 * 0.2 * np.sqrt(2) / 9 and np.abs(piece).max() < 0.29


@given(st.integers(40, 90), st.integers(1, 10), st.integers(0, 500))
def test_a_loop_repeats_and_starts_where_it_is_told(n, n_fade, start):
    samples = np.random.default_rng(n).standard_normal((2, n))
    period = n - n_fade
    out = looped(samples, 3 * period, start, n_fade)
    assert np.allclose(out[:, :period], out[:, period:2 * period])
    inner = samples[:, n_fade:n - n_fade]  # what no fade touches
    assert np.allclose(np.roll(out[:, :period], start % period, axis=1)[:, :period - n_fade], inner)


def test_what_cannot_be_mixed_says_why(raw, tmp_path):
    [item, *_] = read_locations(raw, "train")
    noise = read_noises(raw)[0]
    with pytest.raises(MissingDataError, match=r"test.ma_noise.*train, val_raw and test_raw"):
        read_noises(raw, "test")
    with pytest.raises(ParameterError, match="'Cafe'.*have no noise"):
        read_noises(raw, scenes=["Cafe"])
    assert {n.scene for n in read_noises(raw, scenes=["Car"])} == {"Car"}
    with pytest.raises(ParameterError, match="no reference mic"):
        mix_recording(item, noise, TRIO.subarray([1, 3]), 0.0)
    with pytest.raises(ParameterError, match="snr_db"):
        RealmanMixtures(raw, "train", TRIO, (5, -5))
    with pytest.raises(ParameterError, match="duration_s"):
        RealmanMixtures(raw, "train", TRIO, duration_s=0.0)
    write_noise(tmp_path, mics=(0, 1))
    [gappy, *_] = read_noises(tmp_path)
    with pytest.raises(MissingDataError, match="missing: 3$"):
        mix_recording(item, gappy, TRIO, 0.0)
    write_audio(gappy.channel(3), np.zeros(100), 48000)
    with pytest.raises(DataError, match="differ in length"):
        mix_recording(item, gappy, TRIO, 0.0)
    write_noise(tmp_path, "val", seconds=0.1)
    with pytest.raises(DataError, match="at least 0.2 s"):
        mix_recording(item, read_noises(tmp_path, "val")[0], TRIO, 0.0)
    write_noise(tmp_path, "test", level=0.0)
    with pytest.raises(DataError, match="powers"):
        mix_recording(item, read_noises(tmp_path, "test")[0], TRIO, 0.0)
    for mic in MICS:
        write_audio(item.channel(mic).with_name(f"quiet_CH{mic}.flac"), np.zeros(16000))
    silent = replace(item, path=item.path.with_name("quiet.flac"))
    with pytest.raises(DataError, match="no active speech"):
        mix_recording(silent, noise, TRIO, 0.0)


# --- simulated walks ----------------------------------------------------------------------------------------------

WALK = SceneConfig(duration_s=1.0, t60_s=(0.2, 0.25), moving_share=1.0, speed_m_s=(1.0, 1.2), distance_m=(0.8, 3.0),
                   recordings_per_room=1)
RING = named_array("18cm")


def true_delays_s(scene):
    """Straight-line delays (place, mic) against the reference, and azimuths (place,) as the turned array sees them."""
    yaw = np.radians(scene.array_yaw_deg)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    mics = np.array(scene.array_m) + RING.positions_m @ turn.T
    places = np.array(scene.source_m)
    away = np.linalg.norm(places[:, None] - mics[None], axis=-1)
    east, north = (places - np.array(scene.array_m))[:, :2].T
    azimuth = np.degrees(np.arctan2(north, east)) - scene.array_yaw_deg
    return (away - away[:, [RING.reference]]) / SPEED_OF_SOUND, azimuth


@pytest.mark.parametrize("index", [0, 1, 2])
def test_labels_of_a_walk_say_where_the_sound_comes_from(index):
    """The direct sound of a moving source, frame by frame: its delays between mics are those of straight lines."""
    scene = sample_scene(WALK, 5, index, "train")
    delays, azimuth = true_delays_s(scene)
    assert angular_error_deg(azimuth, scene.azimuth_deg).max() < 1e-9
    early, late = scene_responses(scene, RING, range(RING.n_mics), WALK)
    for place, response in enumerate(early):  # the direct sound alone
        for mic, taps in enumerate(response):
            way = np.linalg.norm(np.array(scene.source_m[place]) - np.array(scene.array_m))
            peak = round(way / SPEED_OF_SOUND * 16000)
            taps[:max(0, peak - 30)] = 0
            taps[peak + 30:] = 0
            assert np.abs(taps).max() > 0, (place, mic)
    dry = np.random.default_rng(index).standard_normal(16000).astype(np.float32)
    image = speech_image(dry, early, np.zeros_like(late), 16000)
    planar = RING.positions_m[:, :2]
    for place in range(1, 9):
        # around the label's moment, at the middle of its frame
        piece = image[:, place * 1600 + 400:place * 1600 + 1200]
        spectrum = np.fft.rfft(piece * np.hanning(piece.shape[1]), 2048)
        cross = spectrum * spectrum[RING.reference].conj()
        correlation = np.fft.irfft(cross * (np.arange(cross.shape[1]) < 900), 16 * 2048)
        lags = correlation.argmax(axis=1)
        lags = np.where(lags > 8 * 2048, lags - 16 * 2048, lags) / 16
        assert np.abs(lags - 16000 * delays[place]).max() < 0.2
        # delay = -(position . direction) / c for a far source
        direction = np.linalg.lstsq(planar, -lags / 16000 * SPEED_OF_SOUND, rcond=None)[0]
        assert angular_error_deg(np.degrees(np.arctan2(*direction[::-1])), scene.azimuth_deg[place]) < 3.0


def test_a_walk_comes_back_from_its_table(tmp_path):
    config = replace(WALK, duration_s=0.75, snr_db=(20, 20))  # 7.5 frames: the last label stands for half a frame
    trio = named_array("realman32").subarray([17, 21, 0])
    simulate_dataset(config, tmp_path, 2, seed=1, geometry=trio, split="valid")
    items = read_locations(tmp_path, "valid", kinds=["moving"])
    assert len(items) == 2 and all(i.moving for i in items)
    for item, recording in zip(items, stream_recordings(items, trio), strict=True):
        truth = sample_scene(config, 1, int(item.meta["index"]), "valid")
        assert len(recording.azimuth_deg) == len(recording.voice_activity) == 8
        assert angular_error_deg(recording.azimuth_deg, truth.azimuth_deg).max() < 1e-4
        assert np.isclose(item.distance_m, truth.distance_m, atol=1e-3)


def test_a_table_that_is_none_is_named(tmp_path):
    """Bytes that are no text, an empty file, a row with more fields than columns."""
    table = location_file(tmp_path, "test", "static")
    table.parent.mkdir()
    for data in (b"", b"filename,angle(\xb0)\n", b"\xff\xfe\x00", b'filename,angle\n"' + b"x" * 200_000):
        table.write_bytes(data)
        with pytest.raises(DataError, match=table.name):
            read_locations(tmp_path, "test")
    reverberation = tmp_path / "t60.csv"
    reverberation.write_text("scene,seconds\na,0.5,0.6\n")
    with pytest.raises(DataError, match="t60.csv"):
        read_t60(reverberation)
