"""Folders that say what they hold, and arrays that are read or refused by name."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.arrays.rooms import SceneConfig
from ssl_kit.lab.claims import claim_folder, map_array
from ssl_kit.lab.errors import DataError, MissingDataError
from ssl_kit.localize.array_bank import ArrayBank, ArrayBankConfig, build_array_bank
from ssl_kit.localize.comparison import ComparisonPlan, compare_localizers

VALUES = st.one_of(st.integers(), st.text(max_size=4), st.booleans(), st.none(), st.floats(allow_nan=False),
                   st.lists(st.integers(), max_size=3))


@given(contents=st.dictionaries(st.text(min_size=1, max_size=4), VALUES, min_size=1), data=st.data())
def test_the_same_is_let_in_and_nothing_else(tmp_path_factory, contents, data):
    folder = tmp_path_factory.mktemp("claimed")
    claim_folder(folder, contents)
    before = (folder / "plan.json").stat()
    claim_folder(folder, dict(reversed(contents.items())))  # the order of the names is none of it
    key = data.draw(st.sampled_from(sorted(contents)))
    for other in ({**contents, key: "another value"}, {**contents, key + "more": 1}):
        with pytest.raises(DataError, match="another"):
            claim_folder(folder, other)
    after = (folder / "plan.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"n": 2}'])
def test_a_plan_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(DataError, match="another n; "):
        claim_folder(tmp_path, {"n": 1})
    assert (tmp_path / "plan.json").read_text() == text


def test_parts_that_nobody_answers_for_are_refused(tmp_path):
    (tmp_path / "part_1.npz").write_bytes(b"")
    with pytest.raises(DataError, match="no plan.json"):
        claim_folder(tmp_path, {"n": 1})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match="plan.json"):
        claim_folder(tmp_path, {"n": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part_1.npz", "plan.json"]


def saved(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_an_array_cut_off_anywhere_is_named(tmp_path):
    whole, path = saved(np.arange(24, dtype="f4").reshape(4, 6)), tmp_path / "a.npy"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(DataError, match="a.npy"):
            map_array(path)
    path.write_bytes(whole)
    assert map_array(path, (None, 6))[3, 5] == 23 and not map_array(path).flags.writeable


@given(data=st.binary(max_size=60))
def test_nothing_but_an_array_is_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("a") / "a.npy"
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.npy"):
        map_array(path)


@pytest.mark.parametrize("shape, said", [
    ((4,), r"\(4\)"), ((None, 7), r"\(any, 7\)"), ((3, 6), r"\(3, 6\), found \(4, 6\)"), ((4, 6, None), "any")])
def test_another_shape_is_said(tmp_path, shape, said):
    np.save(tmp_path / "a.npy", np.zeros((4, 6)))
    with pytest.raises(DataError, match=said):
        map_array(tmp_path / "a.npy", shape)


def test_no_file_and_objects(tmp_path):
    with pytest.raises(MissingDataError, match="a.npy"):
        map_array(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="a.npy"):
        map_array(tmp_path / "a.npy")


# where folders are claimed

SCENES = SceneConfig(duration_s=0.5, snr_db=(15, 20), t60_s=(0.2, 0.25), recordings_per_room=1)
PLAN = ComparisonPlan(SCENES, "test", 3, ("6cm",), ("srp",))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return folder, compare_localizers(PLAN, folder, workers=1, part_size=2)


@pytest.mark.parametrize("changes, named", [
    ({"seed": 1}, "seed"), ({"methods": ("mvdr",)}, "methods"), ({"n": 2}, "n")])
def test_rows_of_another_plan_are_not_taken_for_ones_own(compared, changes, named):
    """They were: a second seed, or another method, in the same folder gave the first one's answers."""
    folder, answers = compared
    with pytest.raises(DataError, match=f"another {named};"):
        compare_localizers(ComparisonPlan(**{**vars(PLAN), **changes}), folder, workers=1)
    assert compare_localizers(PLAN, folder, workers=1, part_size=2).equals(answers)


@pytest.mark.parametrize("harm", ["half", "empty", "other"])
def test_a_damaged_part_is_made_again(compared, harm):
    folder, answers = compared
    part = folder / "part_00000.csv"
    text = part.read_text()
    lines = text.splitlines(keepends=True)
    part.write_text({"half": lines[0] + lines[1], "empty": "", "other": "a,b\n1,2\n"}[harm])
    again = compare_localizers(PLAN, folder, workers=1, part_size=2)
    times = ["ms_per_s"]
    assert again.drop(columns=times).equals(answers.drop(columns=times))
    part.write_text(text)


def test_a_damaged_bank_of_arrays_is_named(tmp_path):
    config = ArrayBankConfig(groups=2, rooms=1, walks=0, noises=1, n_taps=512, noise_s=0.5)
    folder = build_array_bank(tmp_path / "bank", config, workers=1)
    for path in (folder / "responses.npy", folder / "azimuth_deg.npy"):
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(DataError, match=path.name):
            ArrayBank(folder)
        path.write_bytes(saved(np.zeros((3, 1), "f4")))
        with pytest.raises(DataError, match="expected 2 groups, found 3"):
            ArrayBank(folder)
        path.write_bytes(data)
    assert ArrayBank(folder).n_groups == len(json.loads((folder / "bank.json").read_text())["done"])
