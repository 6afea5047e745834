"""Encoders, episodes, prototypical loss, training and checkpoints of few-shot detection."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.fewshot.annotations import Event, Recording, load_split
from ssl_kit.fewshot.encoder import VERSIONS, Encoder, EncoderConfig, embed_windows, recording_maps
from ssl_kit.fewshot.episodes import SHORT, EpisodeConfig, Episodes, Preprocessing, cut_segment, gaps, lengthen
from ssl_kit.fewshot.features import FeatureConfig
from ssl_kit.fewshot.prototypes import interleaved_prototypes, posterior, prototypical_loss, squared_distances
from ssl_kit.fewshot.soundscapes import DatasetConfig, SoundscapeConfig, compose_dataset
from ssl_kit.fewshot.store import FeatureStore, export_features
from ssl_kit.fewshot.training import (
    FewshotRecipe,
    load_encoder,
    save_encoder,
    split_training,
    train_encoder,
)
from ssl_kit.lab.errors import CheckpointError, DataError, MissingDataError, ParameterError

TINY = EncoderConfig(channels=(4, 4, 4))
RECIPE = FewshotRecipe(TINY, episode=EpisodeConfig(6, 2, 1), steps=6, epoch_steps=2, valid_episodes=2, stop_epochs=0)


def eval_network(version="v1", channels=(4, 8, 4)):
    torch.manual_seed(0)
    network = Encoder(EncoderConfig(version, channels))
    network.train()
    network(torch.randn(8, 32, 128))  # batch norm has statistics of its own
    return network.eval()


# encoder


@pytest.mark.parametrize("version", VERSIONS)
def test_any_length_in_2048_out(version):
    network = Encoder(EncoderConfig(version)).eval()
    with torch.no_grad():
        assert {network(torch.zeros(1, n, 128)).shape[1] for n in (8, 9, 17, 100)} == {2048}
    with pytest.raises(ParameterError, match="at least 8"):
        network(torch.zeros(1, 7, 128))
    assert [n for n, _ in network.named_parameters() if "attention" in n] == [] or version == "v2"


def test_maps_have_the_shapes_of_the_lesson():
    x, shapes = torch.zeros(1, 1, 17, 128), []
    for block in Encoder().eval().blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 8, 64), (128, 4, 32), (64, 2, 16)]
    assert all(len(block.convs) == 3 for block in Encoder().blocks)


def test_normalisation_happens_once_and_inside():
    network, rng = eval_network(), np.random.default_rng(0)
    frames = torch.from_numpy(rng.standard_normal((2, 17, 128)).astype(np.float32))
    with torch.no_grad():
        plain = network(frames)
        network.set_statistics(np.full(128, 3.0), np.full(128, 2.0))
        np.testing.assert_allclose(network(2 * frames + 3), plain, atol=1e-4)
        assert not torch.allclose(network(frames), plain, atol=1e-3)
    maps = recording_maps(network, (2 * frames[0] + 3).numpy())
    with torch.no_grad():
        expected = network.maps(2 * frames[:1] + 3)
    assert maps.averages.shape[0] == 3 and expected.shape[2] == 2
    for bad in ((np.zeros(127), np.ones(127)), (np.zeros(128), np.zeros(128))):
        with pytest.raises(DataError, match="statistics"):
            network.set_statistics(*bad)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_pass_equals_the_network_on_the_whole_and_blocks_leave_no_seam(version):
    network = eval_network(version)
    frames = np.random.default_rng(0).standard_normal((2048 + 808, 128)).astype(np.float32)
    with torch.no_grad():
        whole = network.maps(torch.from_numpy(frames[None]))[0]
    expected = whole.unflatten(-1, (8, 2)).mean(-1).permute(1, 0, 2).flatten(1)
    maps = recording_maps(network, frames)
    np.testing.assert_allclose(maps.averages, expected, atol=2e-5)
    # windows whose borders fall on map frames are plain means
    found = embed_windows(network, maps, [2048 - 64, 800], 32)
    for row, start in zip(found, (2048 - 64, 800), strict=True):
        part = whole[None, :, start // 8:(start + 32) // 8]
        pooled = part.unflatten(-1, (8, 2)).mean(-1)
        with torch.no_grad():
            np.testing.assert_allclose(row, network.weigh(pooled, part.mean((2, 3)), part.amax((2, 3)))[0], atol=2e-4)


def test_windows_between_map_frames_are_weighed():
    network = eval_network()
    maps = recording_maps(network, np.random.default_rng(0).standard_normal((80, 128)).astype(np.float32))
    found = embed_windows(network, maps, [4], 8)[0].reshape(4, 4, 8)
    m = maps.averages.reshape(-1, 4, 8)
    np.testing.assert_allclose(found[:, 0], m[0], atol=1e-5)   # frames 4 and 5 lie in the first map frame
    np.testing.assert_allclose(found[:, 3], m[1], atol=1e-5)
    whole = embed_windows(network, maps, [0], 80)[0].reshape(4, 4, 8)
    np.testing.assert_allclose(whole[:, 0], (m[0] + m[1] + 0.5 * m[2]) / 2.5, atol=1e-5)


def test_half_precision_is_near():
    network = eval_network()
    frames = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    exact, half = (recording_maps(network, frames, p).averages for p in (None, torch.bfloat16))
    assert (exact - half).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("settings", "words"), [
    ({"version": "v3"}, "version"), ({"channels": ()}, "channels"), ({"n_mels": 100}, "n_mels"),
    ({"pool_bands": 5}, "pool_bands")])
def test_wrong_shapes(settings, words):
    with pytest.raises(ParameterError, match=words):
        EncoderConfig(**settings)


# loss


def slow_loss(positive, query, negative):
    prototypes = []
    for c in range(len(positive)):
        prototypes.append(positive[c].mean(0))
        if negative is not None:
            prototypes.append(negative[c].mean(0))
    step, total = (1 if negative is None else 2), []
    for c in range(len(query)):
        for q in query[c]:
            distances = [float(((q - p) ** 2).sum()) for p in prototypes]
            total.append(distances[step * c] + math.log(sum(math.exp(-d) for d in distances)))
    return sum(total) / len(total)


@given(st.integers(0, 10**6), st.booleans())
def test_loss_is_that_of_the_definition(seed, with_negatives):
    rng = np.random.default_rng(seed)
    positive, query, negative = (rng.standard_normal((3, n, 4)) for n in (2, 3, 4))
    negative = negative if with_negatives else None
    parts = [None if part is None else torch.from_numpy(part) for part in (positive, query, negative)]
    assert float(prototypical_loss(*parts)[0]) == pytest.approx(slow_loss(positive, query, negative), abs=1e-6)


def test_queries_are_positives_and_labels_are_even():
    positive, negative = torch.eye(3)[:, None] * 9, -torch.eye(3)[:, None] * 9
    assert interleaved_prototypes(positive, negative)[::2].equal(positive[:, 0])
    loss, accuracy = prototypical_loss(positive, positive, negative)
    assert float(loss) < 1e-6 and float(accuracy) == 1
    # the trap: labels c instead of 2c would call the query of class 1 a negative of class 0
    assert float(prototypical_loss(positive, negative, positive)[1]) == 0
    with pytest.raises(ParameterError, match="negative"):
        interleaved_prototypes(positive, negative[:2])


def test_distances_and_posterior():
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    np.testing.assert_allclose(squared_distances(a, b), torch.cdist(a, b) ** 2, atol=1e-4)
    by_softmax = torch.softmax(-squared_distances(a, b[:2]), 1)[:, 0]
    np.testing.assert_allclose(posterior(a, b[0], b[1]), by_softmax, atol=1e-5)


# segments and episodes


def test_segments_of_short_and_long_events():
    frames = np.arange(100.0, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    rows = {rule: cut_segment(frames, (50, 55), Preprocessing(short=rule))[:, 0].astype(int).tolist() for rule in SHORT}
    assert rows["tile"] == [50 + k % 5 for k in range(17)]
    assert rows["wrap"] == [50 + (k - 6) % 5 for k in range(17)]
    assert rows["pad"] == [50] * 6 + list(range(50, 55)) + [50] * 6
    for at, first in ((0.0, 20), (1.0, 43), (0.5, 32)):
        assert cut_segment(frames, (20, 60), Preprocessing(), at)[:, 0].tolist() == list(range(first, first + 17))
    assert cut_segment(frames, (20, 37), Preprocessing(), 1.0)[0, 0] == 20


@given(st.integers(1, 16), st.integers(17, 40), st.sampled_from(SHORT))
def test_lengthened_frames_hold_the_whole_call(n, length, rule):
    frames = np.random.default_rng(n).standard_normal((n, 3))
    out = lengthen(frames, length, rule)
    assert out.shape == (length, 3)
    if rule == "tile":
        at = 0
    else:
        at = (length - n) // 2
    np.testing.assert_array_equal(out[at:at + n], frames)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=6), st.integers(1, 8))
def test_gaps_are_what_is_left(spans, shortest):
    occupied = [(a, min(50, a + n)) for a, n in spans]
    free = np.ones(50, bool)
    for a, b in occupied:
        free[a:b] = False
    found = np.zeros(50, bool)
    for a, b in gaps(occupied, 50, shortest):
        assert b - a >= shortest and free[a:b].all() and (b == 50 or not free[b]) and (a == 0 or not free[a - 1])
        found[a:b] = True
    runs = np.flatnonzero(np.diff(np.concatenate([[0], free, [0]]).astype(int))).reshape(-1, 2)
    assert found.sum() == sum(b - a for a, b in runs if b - a >= shortest)


@pytest.fixture(scope="module")
def scapes(tmp_path_factory):
    config = DatasetConfig("synthetic", 3, 2, 0, 0, 48, SoundscapeConfig(40.0))
    root = compose_dataset(tmp_path_factory.mktemp("scapes"), config)
    recordings = load_split(root, "train")
    export_features([recording.audio for recording in recordings])
    return root, recordings


def test_episodes_hold_what_they_promise(scapes):
    root, recordings = scapes
    store, train = FeatureStore(top=root), split_training(recordings)[0]
    episodes = Episodes(train, store, config=EpisodeConfig(8, 2, 2), seed=3)
    for step in range(5):
        episode = episodes.draw(step)
        assert len(set(episode.classes)) == 8 and episode.positive.shape == episode.query.shape == (8, 2, 17, 128)
        same = [np.array_equal(p, q) for c in range(8) for p in episode.positive[c] for q in episode.query[c]]
        assert not any(same)  # a query is no shot
    again = Episodes(train, store, config=EpisodeConfig(8, 2, 2), seed=3).draw(4)
    np.testing.assert_array_equal(again.query, episode.query)
    other = Episodes(train, store, config=EpisodeConfig(8, 2, 2), seed=4).draw(4)
    assert other.classes != episode.classes or not np.array_equal(other.query, episode.query)
    assert Episodes(train, store, config=EpisodeConfig(8, 2, 2, negatives=False)).draw(0).negative is None


def test_negatives_come_from_gaps_alone(scapes):
    root, recordings = scapes
    store, train = FeatureStore(top=root), split_training(recordings)[0]
    episodes = Episodes(train, store, config=EpisodeConfig(8, 5, 1))
    episode = episodes.draw(0)
    for label, segments in zip(episode.classes, episode.negative, strict=True):
        for segment in segments:
            places = [(r, t) for r in train for t in
                      np.flatnonzero((store.frames(r.audio)[:-16] == segment[0]).all(axis=1))
                      if np.array_equal(store.frames(r.audio)[t:t + 17], segment)]
            assert places
            for recording, first in places:
                for event in recording.with_value(label, "POS", "UNK"):
                    span = episodes.preprocessing.frame_span(event.start_s, event.end_s, 10**6)
                    assert first + 17 <= span[0] or first >= span[1]


def test_too_few_classes_is_an_error_and_not_a_smaller_episode(scapes):
    root, recordings = scapes
    with pytest.raises(DataError, match="episodes of 40 classes.*found"):
        Episodes(recordings, FeatureStore(top=root), config=EpisodeConfig(k_way=40))
    with pytest.raises(DataError, match="too few: "):
        Episodes(recordings, FeatureStore(top=root), config=EpisodeConfig(k_way=10, n_shot=500))
    with pytest.raises(ParameterError, match="store"):
        Episodes(recordings, FeatureStore(top=root), Preprocessing(FeatureConfig("pcen")))


class OneStore:
    config = FeatureConfig()

    def frames(self, audio):
        return np.zeros((862, 128), np.float32)


def test_no_gap_for_negatives_is_said_with_class_and_file():
    events = [Event(0.5 * k, 0.5 * k + 0.45, ("POS", "NEG")) for k in range(20)]
    events += [Event(0.5 * k + 0.1, 0.5 * k + 0.2, ("NEG", "POS")) for k in range(20)]
    recording = Recording(Path("busy.wav"), 10.0, ("dense", "sparse"), tuple(sorted(events)))
    with pytest.raises(DataError, match="class dense: no gap.*busy.wav"):
        Episodes([recording], OneStore(), config=EpisodeConfig(2, 2, 2))
    assert Episodes([recording], OneStore(), config=EpisodeConfig(2, 2, 2, negatives=False)).draw(0).negative is None


def test_fixed_segments_do_not_move(scapes):
    root, recordings = scapes
    store = FeatureStore(top=root)
    drawn = {}
    for crop in ("fixed", "load"):
        stream = Episodes(recordings, store, config=EpisodeConfig(8, 2, 2, crop=crop))
        drawn[crop] = {row.tobytes() for step in range(40) for row in stream.draw(step).query.reshape(-1, 17 * 128)}
    assert len(drawn["load"]) > 1.3 * len(drawn["fixed"])


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Preprocessing(short="tle"), "did you mean 'tile'"), (lambda: Preprocessing(segment_s=0.01), "segment_s"),
    (lambda: EpisodeConfig(k_way=1), "k_way"), (lambda: EpisodeConfig(crop="late"), "crop")])
def test_wrong_settings(make, words):
    with pytest.raises(ParameterError, match=words):
        make()


# training


def test_training_learns_resumes_and_refuses_other_settings(scapes, tmp_path):
    root, recordings = scapes
    quiet = dict(report=lambda row: None, device="cpu")
    one, whole, task = train_encoder(tmp_path / "a", RECIPE, recordings, FeatureStore(top=root), **quiet)
    _, part, _ = train_encoder(tmp_path / "b", RECIPE, recordings, FeatureStore(top=root), time_limit_s=0, **quiet)
    two, rest, _ = train_encoder(tmp_path / "b", RECIPE, recordings, FeatureStore(top=root), **quiet)
    assert len(part) == 1 and [row["step"] for row in rest] == [2, 4, 6]
    for name in ("loss", "valid_loss", "valid_accuracy"):
        np.testing.assert_allclose([row[name] for row in rest], [row[name] for row in whole], rtol=1e-6)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    statistics = FeatureStore(top=root).statistics([r.audio for r in split_training(recordings)[0]])
    np.testing.assert_allclose(one.mean, statistics.mean, rtol=1e-5)
    other = FewshotRecipe(**{**vars(RECIPE), "preprocessing": Preprocessing(short="pad")})
    with pytest.raises(ParameterError, match="preprocessing"):
        train_encoder(tmp_path / "b", other, recordings, FeatureStore(top=root), **quiet)


def test_the_recipe_is_adam_with_pytorchs_step_schedule(scapes, tmp_path):
    root, recordings = scapes
    train_encoder(tmp_path, RECIPE, recordings, FeatureStore(top=root), time_limit_s=0, report=lambda row: None)
    config = torch.load(tmp_path / "last.ckpt", weights_only=True)["configs"]["training"]
    expected = dict(schedule="step", learning_rate=1e-3, drop_epochs=10, drop_factor=0.65, warmup_steps=0,
                    weight_decay=0.0, watch="valid_loss")
    assert {name: config[name] for name in expected} == expected
    assert FewshotRecipe().stop_epochs > 0 and FewshotRecipe().encoder == EncoderConfig()


def test_which_recordings_hold_out(scapes):
    train, held = split_training(scapes[1])
    assert {r.subset for r in held} == {"held_out"} and {r.subset for r in train} == {"soundscapes"}
    unnamed = [Recording(Path(f"{k}.wav"), 1.0, ("X",), (), "BV") for k in range(50)]
    train, held = split_training(unnamed)
    assert 3 <= len(held) <= 20 and len(train) + len(held) == 50
    with pytest.raises(ParameterError, match="hold out"):
        split_training(unnamed[:1])


def test_checkpoints(tmp_path):
    network, prep = eval_network("v2"), Preprocessing(short="wrap")
    network.set_statistics(np.arange(128.0), 1 + np.arange(128.0))
    folder = save_encoder(tmp_path / "m", network, prep, {"note": 3})
    again, made_for, about = load_encoder(folder)
    assert made_for == prep and about == {"note": 3} and again.config == network.config and not again.training
    for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    load_encoder(folder, prep)
    for other, words in ((Preprocessing(), "short: wrap .asked for tile"),
                         (Preprocessing(FeatureConfig("pcen"), short="wrap"), "feature")):
        with pytest.raises(CheckpointError, match=words):
            load_encoder(folder, other)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load_encoder(folder)
    (folder / "model.safetensors").write_bytes(weights)
    record = json.loads((folder / "config.json").read_text())
    for change, words in (({"kind": "crnn"}, "few-shot"), ({"encoder": {"version": "v9"}}, "few-shot"),
                          ({"encoder": record["encoder"] | {"channels": [4, 4, 4]}}, "does not fit")):
        (folder / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(CheckpointError, match=words):
            load_encoder(folder)
    with pytest.raises(MissingDataError, match="fewshot train"):
        load_encoder(tmp_path / "none")
