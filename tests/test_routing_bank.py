"""Banks on disk, fallback tables, splits: round trips, mapping, and every fault."""
import pickle
import zipfile

import numpy as np
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.routing.bank import (
    FallbackTable,
    FeatureBank,
    attach_fallback,
    head_gap,
    load_bank,
    load_fallback,
    make_table,
    read_npz,
    save_bank,
    save_fallback,
)
from ssl_kit.routing.splits import assert_disjoint, connected_groups, split_by_group
from ssl_kit.routing.synthetic import SyntheticSettings, synthetic_bank, synthetic_study

KEYS = {"penultimate_features", "logits_pre_sig", "predictions", "predicted_angles", "gt_angles", "abs_errors",
        "global_indices", "filenames", "W", "b", "group_ids"}


@pytest.fixture(scope="module")
def pair():
    return synthetic_bank(n=120, n_frames=6, n_features=64)


def parts(bank, **changes):
    names = [*KEYS, "speakers", "active_frames", "head", "columns"]
    return {name: getattr(bank, name) for name in names} | changes


def test_round_trip_has_the_keys_and_values(pair, tmp_path):
    bank, _ = pair
    path = save_bank(bank, tmp_path / "bank.npz")
    with np.load(path, allow_pickle=False) as archive:
        assert KEYS <= set(archive.files) and archive["penultimate_features"].dtype == np.float16
    again = load_bank(path)
    for name in KEYS | {"speakers"}:
        assert np.array_equal(getattr(again, name), getattr(bank, name)), name
    assert again.head == "softmax" and np.array_equal(again.column("failing"), bank.column("failing"))
    assert head_gap(again) < 0.01


def test_mapped_equals_read_and_is_not_in_memory(pair, tmp_path):
    path = save_bank(pair[0], tmp_path / "bank.npz", half=False)
    mapped, read = load_bank(path, memory_map=True), load_bank(path, memory_map=False)
    assert isinstance(mapped.logits_pre_sig, np.memmap) and not isinstance(read.logits_pre_sig, np.memmap)
    assert np.array_equal(mapped.logits_pre_sig, read.logits_pre_sig)
    assert not mapped.logits_pre_sig.flags.writeable
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_compressed_file_of_another_tool_is_read_too(pair, tmp_path):
    save_bank(pair[0], tmp_path / "bank.npz")
    with np.load(tmp_path / "bank.npz") as archive:
        np.savez_compressed(tmp_path / "small.npz", **archive)
    assert len(load_bank(tmp_path / "small.npz", memory_map=True)) == 120


def test_active_frames_are_kept_and_weigh(pair, tmp_path):
    active = np.zeros((120, 6), bool)
    active[:, 2:4] = True
    bank = FeatureBank(**parts(pair[0], active_frames=active))
    again = load_bank(save_bank(bank, tmp_path / "bank.npz"))
    assert np.array_equal(again.active_frames, active) and again.frame_weights[0].tolist() == [0, 0, 0.5, 0.5, 0, 0]


def test_same_bank_same_bytes(pair, tmp_path):
    paths = [save_bank(pair[0], tmp_path / f"{k}.npz") for k in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_take_and_cache():
    bank, _ = synthetic_bank(n=30)
    calls = []
    bank.cached("twice", lambda: calls.append(1) or np.arange(30))
    part = bank.take(bank.abs_errors < 30)
    assert np.array_equal(part.cached("twice", lambda: calls.append(2)), np.flatnonzero(bank.abs_errors < 30))
    assert calls == [1] and len(part) == (bank.abs_errors < 30).sum()
    bank.forget()
    bank.cached("twice", lambda: calls.append(3))
    assert calls == [1, 3]


def test_truncated_foreign_and_missing_files(pair, tmp_path):
    path = save_bank(pair[0], tmp_path / "bank.npz")
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="bank.npz"):
            load_bank(path)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"W": 1}))
    with pytest.raises(DataError, match="model.pkl"):
        load_bank(tmp_path / "model.pkl")
    with pytest.raises(MissingDataError, match="none.npz"):
        load_bank(tmp_path / "none.npz")


def test_flipped_byte_is_noticed(pair, tmp_path):
    path = save_bank(pair[0], tmp_path / "bank.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="bank.npz"):
        load_bank(path, memory_map=False)


class Trap:
    "Would run code when unpickled."

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickled_member_is_refused_without_running_it(pair, tmp_path):
    save_bank(pair[0], tmp_path / "bank.npz")
    with np.load(tmp_path / "bank.npz") as archive:
        members = dict(archive)
    trap = np.empty(200_000, object)
    trap[:] = [Trap()] + [0] * 199_999
    np.savez(tmp_path / "evil.npz", **{**members, "W": trap})
    for memory_map in (False, True):
        with pytest.raises(DataError, match="pickle"):
            load_bank(tmp_path / "evil.npz", memory_map=memory_map)


def test_missing_key_is_named(pair, tmp_path):
    save_bank(pair[0], tmp_path / "bank.npz")
    members = read_npz(tmp_path / "bank.npz")
    del members["logits_pre_sig"]
    np.savez(tmp_path / "less.npz", **members)
    with pytest.raises(DataError, match="logits_pre_sig"):
        load_bank(tmp_path / "less.npz")


def with_nan(array):
    array = np.array(array, np.float32)
    array[3] = np.nan
    return array


@pytest.mark.parametrize(("name", "change", "words"), [
    ("logits_pre_sig", with_nan, "logits_pre_sig.*row 3"),
    ("penultimate_features", with_nan, "penultimate_features.*row 3"),
    ("abs_errors", with_nan, "abs_errors.*row 3"),
    ("abs_errors", lambda a: a + 200, "abs_errors"),
    ("abs_errors", lambda a: a[:-1], "abs_errors.*shape"),
    ("logits_pre_sig", lambda a: a[:, :-1], "logits_pre_sig.*shape"),
    ("W", lambda a: a.T, "W.*shape"),
    ("b", lambda a: a[:-1], "b: expected shape"),
    ("filenames", lambda a: a.astype(object), "filenames.*objects"),
    ("head", lambda a: "relu", "head"),
    ("active_frames", lambda a: np.zeros((120, 6), bool), "no active frame"),
    ("active_frames", lambda a: np.ones((120, 6)), "booleans"),
    ("W", lambda a: None, "W, b: expected both"),
    ("columns", lambda a: {"x": np.ones(3)}, "column 'x'"),
])
def test_invalid_banks_name_the_field(pair, name, change, words):
    with pytest.raises(DataError, match=words):
        FeatureBank(**parts(pair[0], **{name: change(getattr(pair[0], name))}))


def test_wrong_head_is_noticed(pair):
    with pytest.raises(DataError, match="W, b"):
        head_gap(FeatureBank(**parts(pair[0], W=pair[0].W[::-1])))


def test_features_beyond_half_precision(pair, tmp_path):
    big = FeatureBank(**parts(pair[0], penultimate_features=pair[0].penultimate_features.astype(np.float32) * 1e6))
    with pytest.raises(DataError, match="half"):
        save_bank(big, tmp_path / "bank.npz")
    assert not list(tmp_path.iterdir())
    assert len(load_bank(save_bank(big, tmp_path / "bank.npz", half=False))) == 120


def test_full_disk_leaves_the_old_bank(pair, tmp_path, monkeypatch):
    path = save_bank(pair[0], tmp_path / "bank.npz")
    old = path.read_bytes()

    def full(file, **arrays):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StorageError, match="bank.npz"):
        save_bank(pair[0], path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_fallback_round_trip_alignment_and_faults(pair, tmp_path):
    bank, srp = pair
    again = load_fallback(save_fallback(srp, tmp_path / "srp.csv"))
    for name in ("predicted_angles", "abs_errors", "cost_ms", "global_indices"):
        assert np.array_equal(getattr(again, name), getattr(srp, name))
    assert np.array_equal(again.columns["srp_ratio"], srp.columns["srp_ratio"])
    shuffled = np.random.default_rng(0).permutation(120)
    mixed = FallbackTable(*(getattr(srp, name)[shuffled] for name in (
        "predicted_angles", "abs_errors", "confidence", "cost_ms", "global_indices")))
    assert np.array_equal(mixed.aligned(bank).abs_errors, srp.abs_errors)
    assert np.array_equal(attach_fallback(bank, mixed).column("fallback_error"), srp.abs_errors)
    with pytest.raises(DataError, match="no answer for 1 of"):
        FallbackTable([1.0], [1.0], [1.0], [1.0], bank.global_indices[:1]).aligned(bank.take([0, 1]))
    with pytest.raises(DataError, match="repeated"):
        FallbackTable([1.0, 1], [1.0, 1], [1.0, 1], [1.0, 1], [5, 5])
    with pytest.raises(DataError, match="abs_errors"):
        FallbackTable([1.0], [np.nan], [1.0], [1.0], [5])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="other.csv.*cost_ms"):
        load_fallback(tmp_path / "other.csv")
    with pytest.raises(MissingDataError, match="none.csv"):
        load_fallback(tmp_path / "none.csv")


def test_splits_share_nothing():
    calibration, _, test, _ = synthetic_study(n=40)
    assert assert_disjoint(calibration, test) == ("filenames", "group_ids", "speakers")
    with pytest.raises(DataError, match="recording.*room.*speaker"):
        assert_disjoint(test, test)
    one_speaker = make_table([0], [0], filenames=["new"], group_ids=["new"], speakers=[test.speakers[0]])
    with pytest.raises(DataError, match=str(test.speakers[0])):
        assert_disjoint(one_speaker, test)
    with pytest.raises(ParameterError, match="keys"):
        assert_disjoint(calibration, test, ("rooms",))


@pytest.mark.parametrize("seed", range(5))
def test_split_by_group_is_disjoint_and_whole(seed):
    rng = np.random.default_rng(seed)
    table = make_table(np.zeros(60), np.zeros(60), group_ids=rng.integers(0, 25, 60).astype(str),
                       speakers=rng.integers(0, 40, 60).astype(str))
    component = connected_groups(table.group_ids, table.speakers)
    if len(set(component.tolist())) == 1:
        with pytest.raises(DataError, match="component"):
            split_by_group(table, 0.5, seed)
        return
    first, second = split_by_group(table, 0.5, seed)
    assert sorted([*first, *second]) == list(range(60)) and len(first) and len(second)
    assert_disjoint(table.take(first), table.take(second))


def test_one_room_cannot_be_split():
    with pytest.raises(DataError, match="component"):
        split_by_group(make_table([0, 0], [0, 0], group_ids=["a", "a"]))


def test_synthetic_failure_rate_follows_its_setting():
    for rate in (0.1, 0.4):
        bank, _ = synthetic_bank(n=1500, failure_rate=rate, n_rooms=200)
        assert np.mean(bank.abs_errors > 30) == pytest.approx(rate, abs=0.06)
    with pytest.raises(ParameterError, match="failure_rate"):
        SyntheticSettings(failure_rate=1.5)
