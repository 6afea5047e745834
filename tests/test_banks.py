"""Feature banks: the same for any number of workers, and for a run that was cut off."""

import numpy as np
import pytest

from ssl_kit.arrays.rooms import SceneConfig
from ssl_kit.lab.errors import ParameterError
from ssl_kit.localize.banks import BankPlan, union_array, write_banks
from ssl_kit.localize.checkpoints import save_checkpoint
from ssl_kit.localize.crnn import CRNN, CRNNConfig
from ssl_kit.routing.bank import head_gap, load_bank, load_fallback
from ssl_kit.routing.splits import assert_disjoint

SCENES = SceneConfig(duration_s=0.5, recordings_per_room=2, t60_s=(0.2, 0.3))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    return str(save_checkpoint(folder, CRNN(CRNNConfig(channels=4, hidden=16)), {"array": "6cm"}))


def test_workers_and_interruptions_do_not_change_a_bank(tmp_path, network):
    plan = BankPlan(SCENES, "test", 22, ("6cm",), checkpoint=network, mc_passes=2)
    one = write_banks(plan, tmp_path / "one", workers=1)["6cm"]
    two = write_banks(plan, tmp_path / "two", workers=2)["6cm"]
    part = tmp_path / "two" / "parts" / "part_000020.npz"
    part.write_bytes(part.read_bytes()[:500])  # what a kill without our atomic writes would have left
    again = write_banks(plan, tmp_path / "two", workers=1)["6cm"]
    for name in ("predicted_angles", "penultimate_features", "logits_pre_sig", "gt_angles", "mc_predictions"):
        expected = getattr(load_bank(one["bank"]), name)
        np.testing.assert_array_equal(getattr(load_bank(two["bank"]), name), expected)
        np.testing.assert_array_equal(getattr(load_bank(again["bank"]), name), expected)
    assert head_gap(load_bank(one["bank"])) < 0.05
    a, b = load_fallback(one["fallback"]), load_fallback(again["fallback"])
    np.testing.assert_array_equal(a.predicted_angles, b.predicted_angles)
    np.testing.assert_array_equal(a.columns["srp_ratio"], b.columns["srp_ratio"])


def test_calibration_and_test_share_no_room_and_no_speaker(tmp_path, network):
    banks = {}
    for split in ("calibration", "test"):
        plan = BankPlan(SCENES, split, 6, ("6cm",), checkpoint=network)
        banks[split] = load_bank(write_banks(plan, tmp_path / split, workers=1)["6cm"]["bank"])
    assert set(assert_disjoint(banks["calibration"], banks["test"])) >= {"group_ids", "speakers"}


def test_the_union_holds_every_mic_once_and_the_reference():
    union = union_array(["6cm", "3x12cm_consecutive", "3x12cm_alternating"])
    assert sorted(map(int, union.names)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert union.names[union.reference] == "0"


def test_an_empty_plan_is_refused():
    with pytest.raises(ParameterError, match="n >= 1"):
        BankPlan(SCENES, "test", 0)
