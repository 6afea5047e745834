"""Enhancement data: what is mixed is what the label says, sets rebuild bit for bit, nothing leaks, pairs are pairs."""

import os
import re
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.enhance.device_mixtures import DeviceMixtures
from ssl_kit.enhance.mixtures import (
    LEFT_OUT_CLASSES,
    EnhanceMixtures,
    MixConfig,
    Pools,
    active_loop,
    change_speed,
    filter_gains,
    load_pools,
    looped,
    noise_gain,
    pool_clips,
    room_response,
    speech_crop,
)
from ssl_kit.enhance.pairs import PairConfig, PairStream, find_pairs, read_pair, unpack_pairs
from ssl_kit.enhance.test_sets import (
    SNRS_DB,
    TEST_SETS,
    TestMixture,
    draw_test_set,
    load_test_set,
    manifest_path,
    mix_int16,
    mixture_digest,
    read_test_set,
    write_test_set,
)
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

needs_data = pytest.mark.skipif(not os.environ.get("SSL_KIT_DATA"), reason="real data: set SSL_KIT_DATA")


def tones(n=5, length=60000, seed=0):
    rng = np.random.default_rng(seed)
    return tuple((8000 * rng.standard_normal(length - 1000 * k)).clip(-32000, 32000).astype(np.int16) for k in range(n))


@pytest.fixture(scope="module")
def pools():
    return Pools(tones(5), tones(4, 9000, 1), tuple("abcde"), tuple("wxyz"))


# --- noise that counts ------------------------------------------------------------------------------------------------

def test_a_sparse_noise_is_cut_to_its_bursts():
    rng = np.random.default_rng(0)
    clip = np.zeros(80000)
    clip[16000:19200] = rng.standard_normal(3200)
    naive_db = 10 * np.log10(np.mean(clip ** 2))
    loop = active_loop(clip)
    assert len(loop) == 3120  # one burst of 3200 whose end fades into its start
    assert 10 * np.log10(np.mean(loop ** 2)) - naive_db > 10  # over the whole clip it looks 14 dB weaker than it is


@pytest.mark.parametrize("below_db, kept", [(24.0, True), (26.0, False)])
def test_the_activity_rule_is_25_db_below_the_loudest_frame(below_db, kept):
    rng = np.random.default_rng(1)
    loud, soft = rng.choice([-1.0, 1.0], 3200), 10 ** (-below_db / 20) * rng.choice([-1.0, 1.0], 3200)
    assert len(active_loop(np.concatenate([loud, soft]))) == (6320 if kept else 3120)


def test_a_loop_has_no_seam():
    time_s = np.arange(16000) / 16000
    loop = active_loop(np.sin(2 * np.pi * 200 * time_s))
    endless = looped(loop, 0, 3 * len(loop))
    assert np.abs(np.diff(endless)).max() < 1.1 * 2 * np.pi * 200 / 16000


def test_joined_bursts_do_not_click():
    samples = np.zeros(32000)
    time_s = np.arange(3200) / 16000
    for start in (3200, 12800, 22400):
        samples[start:start + 3200] = np.cos(2 * np.pi * 100 * time_s)  # begins at its crest: a hard cut jumps by 1
    endless = looped(active_loop(samples), 0, 30000)
    assert np.abs(np.diff(endless)).max() < 0.1


@pytest.mark.parametrize("samples", [np.zeros(16000), np.zeros(0), np.ones(100)])
def test_noise_without_a_frame_or_without_sound_is_refused(samples):
    with pytest.raises(DataError, match="expected at least 320 samples"):
        active_loop(samples)


@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 300))
def test_looped_is_an_endless_repetition(length, offset, n):
    assert looped(np.arange(length), offset, n).tolist() == [(offset + k) % length for k in range(n)]


# --- one clip ---------------------------------------------------------------------------------------------------------

@given(st.floats(-30, 40), st.floats(1e-3, 1e3))
def test_gain_gives_the_asked_ratio(snr_db, scale):
    rng = np.random.default_rng(0)
    speech, noise = rng.standard_normal(500), scale * rng.standard_normal(500)
    rest = noise_gain(speech, noise, snr_db) * noise
    assert 10 * np.log10((speech @ speech) / (rest @ rest)) == pytest.approx(snr_db, abs=1e-6)


def test_crops_of_pauses_are_drawn_again():
    utterance = np.zeros(200000, np.int16)
    utterance[:20000] = 8000  # nine tenths are silent
    rng = np.random.default_rng(0)
    crops = [speech_crop(rng, [utterance], 16000) for _ in range(30)]
    assert min((crop ** 2).mean() for crop in crops) > 0
    with pytest.raises(DataError, match="silent"):
        speech_crop(rng, [np.zeros(30000, np.int16)], 16000)


def test_short_utterances_are_padded_not_stretched():
    crop = speech_crop(np.random.default_rng(3), [np.full(1000, 3277, np.int16)], 4000)
    assert np.count_nonzero(crop) == 1000 and crop.max() == pytest.approx(0.1, rel=1e-3)


def test_speed_moves_pitch_and_length():
    tone = (10000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)).astype(np.int16)
    faster = change_speed(tone, 1.1)
    spectrum = np.abs(np.fft.rfft(faster * np.hanning(len(faster))))
    assert len(faster) == pytest.approx(16000 / 1.1, abs=2)
    assert spectrum.argmax() * 16000 / len(faster) == pytest.approx(1100, abs=2)


def test_filters_stay_smooth_and_near_their_tilt():
    gains_db = 20 * np.log10(filter_gains(np.random.default_rng(0), 512, 6.0, 0.0))
    assert abs(gains_db).max() <= 3.0 + 1e-4 and abs(np.diff(gains_db[4:])).max() < 0.5


# --- the stream -------------------------------------------------------------------------------------------------------

def test_a_batch_depends_on_seed_and_step_alone(pools):
    config = MixConfig(n_samples=16000, batch_size=3)
    one, other = EnhanceMixtures(pools, config, seed=5), EnhanceMixtures(pools, config, seed=5)
    for step in (4, 0):
        other.draw(step)
    a, b = one.draw(4), other.draw(4)
    assert a.noisy.equal(b.noisy) and a.clean.equal(b.clean) and a.snr_db.equal(b.snr_db)
    assert not a.noisy.equal(EnhanceMixtures(pools, config, seed=6).draw(4).noisy)


@pytest.mark.parametrize("filter_share", [0.0, 1.0])
@pytest.mark.parametrize("second", [0.0, 1.0])
def test_what_the_label_says_is_what_was_mixed(pools, filter_share, second):
    config = MixConfig(n_samples=16001, batch_size=8, filter_share=filter_share, second_noise_share=second)
    batch = EnhanceMixtures(pools, config).draw(1)
    noise = (batch.noisy - batch.clean).double()
    measured_db = 10 * ((batch.clean.double() ** 2).sum(1) / (noise ** 2).sum(1)).log10()
    assert (measured_db - batch.snr_db).abs().max() < 0.02  # after the filter, not before
    assert batch.snr_db.min() >= -5 and batch.snr_db.max() <= 20
    level_db = 10 * (batch.noisy.double() ** 2).mean(1).log10()
    assert level_db.max() <= -10 + 1e-3 and level_db.min() > -25 - 1e-3
    assert max(batch.noisy.abs().max(), batch.clean.abs().max()) <= 0.991


def test_loud_peaky_clips_are_scaled_and_keep_their_ratio():
    click = np.zeros(20000, np.int16)
    click[::4000] = 32000
    stream = EnhanceMixtures(Pools((click,), tones(1), ("a",), ("b",)),
                             MixConfig(16000, 4, (20.0, 20.0), (-10.0, -10.0), 0.0, 0.0))
    batch = stream.draw(0)
    assert batch.noisy.abs().max() <= 0.991
    measured_db = 10 * ((batch.clean ** 2).sum(1) / ((batch.noisy - batch.clean) ** 2).sum(1)).log10()
    assert (measured_db - 20).abs().max() < 0.05


def test_identity_tells_other_material_and_other_settings(pools):
    base = EnhanceMixtures(pools).identity()
    assert base == EnhanceMixtures(pools).identity()
    assert base != EnhanceMixtures(pools, MixConfig(snr_db=(0.0, 20.0))).identity()
    fewer = Pools(pools.speech[:4], pools.noise, pools.speech_names[:4], pools.noise_names)
    assert base != EnhanceMixtures(fewer).identity()


def test_mixing_is_many_times_faster_than_real_time(pools):
    import time

    stream = EnhanceMixtures(pools, MixConfig(filter_share=1.0, second_noise_share=1.0))
    stream.draw(0)
    start = time.process_time()
    for step in range(4):
        stream.draw(step)
    assert 4 * 24 / (time.process_time() - start) > 30


@pytest.mark.parametrize("wrong", [dict(snr_db=(5.0, 0.0)), dict(level_db=(0.0, -9.0)), dict(n_samples=0)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ParameterError):
        MixConfig(**wrong)


def test_empty_pools_and_unknown_splits_are_refused():
    with pytest.raises(ParameterError, match="expected speech and noise"):
        EnhanceMixtures(Pools((), (), (), ()))
    with pytest.raises(ParameterError, match="fixed sets"):
        pool_clips("test", "embedded")
    with pytest.raises(ParameterError, match="speeds"):
        load_pools("train", "embedded", speeds=())


# --- nothing leaks ----------------------------------------------------------------------------------------------------

def test_embedded_pools_share_no_speaker_and_no_noise_with_the_test_set():
    rows, _ = read_test_set(manifest_path("embedded"))
    seen = [pool_clips(split, "embedded") for split in ("train", "valid")]
    for utterances, clips in seen:
        assert not {item.speaker for item in utterances} & {row.speaker for row in rows}
        assert not {clip.name for clip in clips} & {row.noise for row in rows}
    assert not {item.speaker for item in seen[0][0]} & {item.speaker for item in seen[1][0]}


@needs_data
def test_real_pools_share_no_speaker_source_or_left_out_kind_with_the_test_sets():
    source = re.compile(r"\d-(\d+)-")
    tested = [row for name in ("matched", "unseen") for row in read_test_set(manifest_path(name))[0]]
    speakers, sources = {row.speaker for row in tested}, {source.match(row.noise)[1] for row in tested
                                                          if source.match(row.noise)}
    pools = {split: pool_clips(split) for split in ("train", "valid")}
    for utterances, clips in pools.values():
        assert not {item.speaker for item in utterances} & speakers
        assert not {clip.category for clip in clips} & set(LEFT_OUT_CLASSES)
        assert all(clip.fold in (None, 1, 2, 3) and not clip.name.startswith("ambience") for clip in clips)
        assert not {source.match(clip.name)[1] for clip in clips if clip.path} & sources
    (train_speech, train_noise), (valid_speech, valid_noise) = pools["train"], pools["valid"]
    assert not {item.speaker for item in train_speech} & {item.speaker for item in valid_speech}
    assert not ({source.match(clip.name)[1] for clip in train_noise if clip.path}
                & {source.match(clip.name)[1] for clip in valid_noise if clip.path})
    matched = {row.kind for row in read_test_set(manifest_path("matched"))[0]}
    unseen = {row.kind for row in read_test_set(manifest_path("unseen"))[0]}
    assert len(matched) == 8 and not matched & unseen and set(LEFT_OUT_CLASSES) < unseen
    assert matched == {clip.category for clip in train_noise if clip.path}  # matched means heard


# --- fixed sets -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEST_SETS)
def test_manifests_have_35_mixtures_at_each_ratio_spread_over_kinds_and_sentences(name):
    rows, made_with = read_test_set(manifest_path(name))
    assert len(rows) == 105 and "libsndfile" in made_with and "soxr" in made_with
    for snr_db in SNRS_DB:
        part = [row for row in rows if row.snr_db == snr_db]
        counts = [sum(row.kind == kind for row in part) for kind in {row.kind for row in rows}]
        assert len(part) == 35 and max(counts) - min(counts) <= 1
    spoken = {row.speech for row in rows}
    assert len(spoken) == (21 if name == "embedded" else 50)
    assert all(row.length <= 80000 and re.fullmatch("[0-9a-f]{64}", row.sha256) for row in rows)


def test_the_embedded_set_rebuilds_bit_for_bit():
    mixtures = load_test_set("embedded", limit=12)  # verified against the manifest's hashes
    for row, noisy, clean in zip(mixtures.rows, mixtures.noisy, mixtures.clean, strict=True):
        assert mixture_digest(np.rint(noisy * 32768)) == row.sha256
        powers = [(part.astype(float) ** 2).sum() for part in (clean, noisy - clean)]
        assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(row.snr_db, abs=0.02)
        assert np.abs(noisy).max() <= 32000 / 32768


@needs_data
@pytest.mark.parametrize("name", ["matched", "unseen"])
def test_real_sets_rebuild_bit_for_bit(name):
    mixtures = load_test_set(name, limit=9)
    assert sorted({row.snr_db for row in mixtures.rows}) == list(SNRS_DB)
    assert all(len(noisy) == row.length for row, noisy in zip(mixtures.rows, mixtures.noisy, strict=True))


def test_the_manifest_is_what_the_drawing_gives():
    drawn, (written, _) = draw_test_set("embedded"), read_test_set(manifest_path("embedded"))
    assert [asdict(row) for row in drawn] == [asdict(row) for row in written]


def test_full_scale_speech_is_scaled_with_its_mixture_and_not_clipped():
    speech = np.where(np.arange(8000) % 2, 32767, -32768).astype(np.int16)
    noise = (3000 * np.random.default_rng(0).standard_normal(8000)).astype(np.int16)
    noisy, clean = mix_int16(speech, noise, -5)
    assert max(np.abs(part.astype(int)).max() for part in (noisy, clean)) <= 32000
    rest = noisy.astype(float) - clean
    assert 10 * np.log10((clean.astype(float) ** 2).sum() / (rest ** 2).sum()) == pytest.approx(-5, abs=0.01)


def test_powers_are_exact_where_16_bit_sums_would_overflow():
    speech, noise = np.full(80000, 20000, np.int16), np.full(80000, 10000, np.int16)
    noisy, clean = mix_int16(speech, noise, 20 * np.log10(2))  # noise already stands 6 dB below: gain 1
    assert (noisy.astype(int) - clean == 10000).all()


def test_other_bits_are_refused_and_the_versions_named(tmp_path):
    rows, _ = read_test_set(manifest_path("embedded"))
    changed = TestMixture(**asdict(rows[3]) | {"offset": rows[3].offset + 1})
    path = write_test_set(tmp_path / "m.csv", [changed], "changed")
    with pytest.raises(DataError, match=r"made with numpy .*libsndfile.*verify=False"):
        load_test_set("embedded", path=path)
    assert len(load_test_set("embedded", path=path, verify=False).noisy) == 1


def test_damaged_manifests_and_absent_files_are_named(tmp_path):
    rows, _ = read_test_set(manifest_path("embedded"))
    gone = write_test_set(tmp_path / "gone.csv", [TestMixture(**asdict(rows[0]) | {"speech": "nobody"})], "gone")
    with pytest.raises(MissingDataError, match="'nobody'"):
        load_test_set("embedded", path=gone)
    with pytest.raises(MissingDataError, match="absent.csv"):
        read_test_set(tmp_path / "absent.csv")
    (tmp_path / "other.csv").write_text("# x\na,b\n1,2\n")
    with pytest.raises(DataError, match="expected the columns speech"):
        read_test_set(tmp_path / "other.csv")
    text = manifest_path("embedded").read_text().replace(",-5,", ",loud,", 1)
    (tmp_path / "loud.csv").write_text(text)
    with pytest.raises(DataError, match="mixture 1: expected whole numbers"):
        read_test_set(tmp_path / "loud.csv")
    with pytest.raises(ParameterError, match="embedded, matched, unseen"):
        load_test_set("easy")


# --- pairs ------------------------------------------------------------------------------------------------------------

def make_pairs(root, names=("a", "b"), split="test", rate=16000, seconds=1.0, inside="", suffix="wav"):
    rng = np.random.default_rng(0)
    for name in names:
        voice = 0.1 * rng.standard_normal(round(rate * seconds))
        noisy = voice + 0.05 * rng.standard_normal(len(voice))
        for folder, samples in ((split, noisy), (f"y_{split}", voice)):
            place = root / folder / inside
            place.mkdir(parents=True, exist_ok=True)
            write_audio(place / f"{name}.{suffix}", samples, rate)
    return root


@pytest.mark.parametrize("inside, suffix", [("", "wav"), ("test/deeper", "flac")])
def test_pairs_are_found_by_content_and_read_at_16_khz(tmp_path, inside, suffix):
    make_pairs(tmp_path / "some" / "where", rate=44100, inside=inside, suffix=suffix)
    pairs = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "b"]
    noisy, clean = read_pair(pairs[1])
    assert noisy.shape == clean.shape == (16000,) and noisy.dtype == np.float32
    assert np.corrcoef(noisy, clean)[0, 1] == pytest.approx(0.894, abs=0.02)
    part, _ = read_pair(pairs[1], 0.25, 0.5)
    np.testing.assert_allclose(part, noisy[4000:12000], atol=1e-4)


def test_7z_archives_become_pairs_and_the_second_time_nothing_is_done(tmp_path):
    py7zr = pytest.importorskip("py7zr")
    source = make_pairs(tmp_path / "made")
    packed = tmp_path / "packed" / "archives"
    packed.mkdir(parents=True)
    for name in ("test", "y_test"):
        with py7zr.SevenZipFile(packed / f"{name}.7z", "w") as archive:
            archive.writeall(source / name, name)
    target = tmp_path / "out"
    assert unpack_pairs(tmp_path / "packed", target) == [target / "test", target / "y_test"]
    before = (target / "test").stat().st_mtime_ns
    assert [pair.name for pair in find_pairs(target)] == ["a", "b"]
    unpack_pairs(tmp_path / "packed", target)
    assert (target / "test").stat().st_mtime_ns == before
    (packed / "y_test.7z").unlink()
    with pytest.raises(MissingDataError, match="test.7z has no partner"):
        unpack_pairs(tmp_path / "packed", tmp_path / "other")


def test_a_truncated_archive_leaves_nothing(tmp_path):
    py7zr = pytest.importorskip("py7zr")
    source = make_pairs(tmp_path / "made")
    for name in ("test", "y_test"):
        with py7zr.SevenZipFile(tmp_path / f"{name}.7z", "w") as archive:
            archive.writeall(source / name, name)
    whole = (tmp_path / "test.7z").read_bytes()
    (tmp_path / "test.7z").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match="test.7z"):
        unpack_pairs(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "test").exists()


def test_archives_and_folders_that_are_not_there_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="train.7z and y_train.7z"):
        unpack_pairs(tmp_path, tmp_path / "out")
    with pytest.raises(MissingDataError, match="test and y_test"):
        find_pairs(tmp_path)
    for name in ("test", "y_test"):
        (tmp_path / name).mkdir()
    with pytest.raises(MissingDataError, match="no .wav"):
        find_pairs(tmp_path)
    with pytest.raises(ParameterError, match="train or test"):
        find_pairs(tmp_path, "valid")


def test_a_missing_partner_is_named(tmp_path):
    make_pairs(tmp_path)
    (tmp_path / "y_test" / "b.wav").rename(tmp_path / "y_test" / "b2.wav")
    with pytest.raises(DataError, match=r"test: 'b' without.*y_test: 'b2' without"):
        find_pairs(tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    make_pairs(tmp_path)
    make_pairs(tmp_path, names=("a",), inside="again")
    with pytest.raises(DataError, match="two files of the name 'a'"):
        find_pairs(tmp_path)


def test_lengths_must_agree(tmp_path):
    make_pairs(tmp_path)
    write_audio(tmp_path / "y_test" / "b.wav", 0.1 * np.random.default_rng(0).standard_normal(15900))
    with pytest.raises(DataError, match=r"b.wav lasts 1.0000 s, its partner .*0.9938 s"):
        find_pairs(tmp_path)
    pair = find_pairs(tmp_path, tolerance_s=0.01)[1]
    assert len(read_pair(pair)[0]) == len(read_pair(pair)[1]) == 15900


def test_truncated_audio_is_named(tmp_path):
    make_pairs(tmp_path)
    path = tmp_path / "test" / "b.wav"
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(DataError, match="b.wav is truncated"):
        find_pairs(tmp_path)


def test_the_stream_of_pairs_is_reproducible_and_measures_its_ratio(tmp_path):
    make_pairs(tmp_path, names=("a", "b", "c"), seconds=2.0)
    make_pairs(tmp_path, names=("short",), seconds=0.5)
    stream = PairStream(find_pairs(tmp_path), PairConfig(16000, 6), seed=2)
    batch, again = stream.draw(3), PairStream(find_pairs(tmp_path), PairConfig(16000, 6), seed=2).draw(3)
    assert batch.noisy.shape == (6, 16000) and batch.noisy.equal(again.noisy)
    assert (batch.snr_db - 6.02).abs().max() < 0.3
    assert stream.identity() == PairStream(find_pairs(tmp_path), PairConfig(16000, 6), seed=2).identity()
    with pytest.raises(ParameterError, match="found none"):
        PairStream([])


def test_rooms_keep_what_is_early_and_the_ratio_of_what_is_heard():
    pools = Pools(tones(3), tones(2), ("a", "b", "c"), ("d", "e"))
    dry = EnhanceMixtures(pools, MixConfig(16000, 6, filter_share=0.0), seed=1).draw(0)
    config = MixConfig(16000, 6, filter_share=0.0, room_share=0.0, t60_s=(1.0, 1.0))
    plain = EnhanceMixtures(pools, config, seed=1).draw(0)
    assert dry.noisy.equal(plain.noisy)                               # without a share nothing changes
    stream = EnhanceMixtures(pools, MixConfig(16000, 6, filter_share=0.0, room_share=1.0), seed=1)
    wet = stream.draw(0)
    assert wet.noisy.equal(stream.draw(0).noisy) and not wet.clean.equal(dry.clean) and wet.noisy.abs().max() <= 1


@pytest.mark.parametrize("t60_s, direct_db", [(0.2, 0.0), (0.8, 12.0), (0.001, 3.0)])
def test_a_room_has_the_asked_energy_and_begins_with_the_direct_sound(t60_s, direct_db):
    response = room_response(np.random.default_rng(3), t60_s, direct_db)
    assert response[0] == 1 and not response[1:32].any()
    assert (response[1:] ** 2).sum() == pytest.approx(10 ** (-direct_db / 10))


def test_rooms_are_refused_where_they_cannot_be():
    with pytest.raises(ParameterError, match="t60_s"):
        MixConfig(t60_s=(0.0, 0.5))
    with pytest.raises(ParameterError, match="room_share"):
        DeviceMixtures(Pools(tones(1), tones(1), ("a",), ("b",)), MixConfig(16000, 2, room_share=0.5))


def test_noise_has_speeds_of_its_own_and_runs_backwards():
    pools = load_pools("train", "embedded", speeds=(1,), noise_speeds=(0.5, 2))
    assert {name.split("@")[1] for name in pools.speech_names} == {"1"}
    assert {name.split("@")[1] for name in pools.noise_names} == {"0.5", "2"}
    ramp = np.arange(1, 4001, dtype=np.int16)
    alone = Pools((pools.speech[0],), (ramp,), ("speech",), ("ramp",))
    quiet = dict(n_samples=2000, batch_size=1, second_noise_share=0.0, filter_share=0.0)
    for share, sign in ((0.0, 1), (1.0, -1)):
        noise = EnhanceMixtures(alone, MixConfig(**quiet, reverse_share=share))._noise(np.random.default_rng(0))
        assert np.median(np.diff(noise)) == sign
    with pytest.raises(ParameterError, match="noise_speeds"):
        load_pools("train", "embedded", noise_speeds=(3,))
    with pytest.raises(ParameterError, match="reverse_share"):
        DeviceMixtures(alone, MixConfig(**quiet, reverse_share=0.5))
