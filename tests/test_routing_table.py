"""Plain tables: reading, joining, faults, and the one real failure-detection table (skipped where it is absent)."""
import os
from pathlib import Path

import numpy as np
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.routing.bank import make_table
from ssl_kit.routing.metrics import auroc
from ssl_kit.routing.table import (
    TableColumns,
    column_detectors,
    combined_auroc,
    failure_aurocs,
    join_fallback,
    learn_signs,
    load_score_table,
)

HEADER = "global_idx,pred_angle,gt_angle,abs_error,max_prob\n"


@pytest.fixture
def results():
    root = os.environ.get("SSL_KIT_DATA")
    folder = Path(root) / "realman_results" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip("SSL_KIT_DATA names no folder with realman_results: the real tables are not here")
    return folder


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_reads_columns_and_groups(tmp_path):
    table = load_score_table(write(tmp_path, HEADER + "0,10,12,2,0.9\n1,350,12,22,0.2\n2,5,355,10,0.5\n"))
    assert table.abs_errors.tolist() == [2, 22, 10] and list(table.columns) == ["max_prob"]
    assert table.group_ids.tolist() == ["position_0", "position_0", "position_1"]


def test_other_names_and_a_room_column(tmp_path):
    path = write(tmp_path, "guess,true,room,conf,file\n10,20,a,0.5,x.flac\n30,30,b,0.9,y.flac\n")
    names = TableColumns(predicted="guess", truth="true", error=None, index=None, group="room", filename="file")
    table = load_score_table(path, names)
    assert table.abs_errors.tolist() == [10, 0] and table.group_ids.tolist() == ["a", "b"]
    assert table.filenames.tolist() == ["x.flac", "y.flac"] and table.column("conf").tolist() == [0.5, 0.9]


@pytest.mark.parametrize(("text", "words"), [
    (HEADER + "0,10,12,7,0.9\n", "row 0.*abs_error"),
    (HEADER + "0,10,12,2,0.9\n1,ten,12,2,0.9\n", "pred_angle.*row 1.*ten"),
    (HEADER + "0,10,,2,0.9\n", "gt_angle.*row 0"),
    (HEADER, "no rows"),
    ("a,b\n1,2\n", "columns missing.*pred_angle"),
    ("", "CSV"),
])
def test_bad_tables_name_file_and_row(tmp_path, text, words):
    with pytest.raises(DataError, match=f"(?s)table.csv.*{words}"):
        load_score_table(write(tmp_path, text))


def test_missing_table(tmp_path):
    with pytest.raises(MissingDataError, match="none.csv"):
        load_score_table(tmp_path / "none.csv")


def test_signs_are_known_learned_or_refused():
    rng = np.random.default_rng(0)
    errors = np.where(rng.random(300) < 0.3, 80.0, 2.0)
    table = make_table(errors, np.zeros(300), columns={"odd": -errors + rng.normal(size=300)})
    with pytest.raises(ParameterError, match="odd"):
        column_detectors(table)
    assert learn_signs(table) == {"odd": -1}
    assert failure_aurocs(table, signs=learn_signs(table))["odd"] == 1
    with pytest.raises(DataError, match="sign"):
        learn_signs(table.take(errors < 30))


def test_join_refuses_a_wrapped_index(tmp_path):
    table = make_table([48.0, 0.0], [36.0, 31.0], global_indices=[502, 502])
    path = write(tmp_path, "global_idx,gt_angle,crnn_pred,srp_pred\n502,36.2,48,34\n502,36.2,0,34\n")
    joined = join_fallback(table, path)
    assert joined.rows.tolist() == [0] and joined.refused == 1
    assert joined.hybrid_errors(np.ones(2, bool)) == pytest.approx([2.2, 31])
    with pytest.raises(DataError, match="none of its"):
        join_fallback(make_table([1.0], [1.0], global_indices=[7]), path)
    with pytest.raises(DataError, match="srp_pred"):
        join_fallback(table, write(tmp_path, "global_idx\n502\n"))


def test_combined_tables_must_be_disjoint():
    rng = np.random.default_rng(0)
    table = make_table(np.where(rng.random(60) < 0.4, 90.0, 1.0), np.zeros(60), columns={"a": rng.normal(size=60)})
    with pytest.raises(DataError, match="overlap"):
        combined_auroc(table, table)


# the real tables


def test_real_failure_aurocs_are_reproduced(results):
    table = load_score_table(results / "crnn_6cm_3x12cm_consecutive.csv")
    assert len(table) == 2009 and table.abs_errors.mean() == pytest.approx(17.33, abs=0.01)
    aurocs = failure_aurocs(table)
    assert aurocs["max_prob"] == pytest.approx(0.79, abs=0.01)
    assert aurocs["entropy"] == pytest.approx(0.83, abs=0.01)


def test_real_confidence_fades_with_the_shift(results):
    entropy = {name: failure_aurocs(load_score_table(results / f"crnn_6cm_{name}.csv"))["entropy"]
               for name in ("baseline", "2x12cm_opposite", "3x12cm_consecutive", "4x12cm_half_consecutive")}
    assert list(entropy.values()) == sorted(entropy.values(), reverse=True)
    assert entropy["baseline"] > 0.98 and entropy["4x12cm_half_consecutive"] < 0.7


def test_real_hybrid_of_the_least_confident(results):
    table = load_score_table(results / "crnn_6cm_3x12cm_consecutive.csv")
    joined = join_fallback(table, results / "srp_3x12cm_consecutive_low_confidence.csv")
    assert (len(joined.rows), joined.refused) == (785, 1)  # the last recording carries another's index
    least_sure = table.column("max_prob") < 0.04
    assert least_sure.sum() == 786
    hybrid = joined.hybrid_errors(least_sure)
    network, fallback = table.abs_errors[joined.rows].mean(), joined.fallback.abs_errors.mean()
    assert network == pytest.approx(26.8, abs=0.1) and fallback == pytest.approx(19.7, abs=0.1)
    assert hybrid.mean() == pytest.approx(table.abs_errors.mean() - (network - fallback) * 785 / 2009, abs=1e-9)
    assert auroc(-table.column("max_prob")[joined.rows], table.abs_errors[joined.rows] > 30) < 0.7  # among the unsure


def test_real_columns_combined_on_other_arrays_and_positions(results):
    names = ("1x12cm_pos1", "2x12cm_adjacent", "2x12cm_opposite", "3x12cm_alternating")
    test = load_score_table(results / "crnn_6cm_3x12cm_consecutive.csv")
    half = np.isin(test.group_ids, np.unique(test.group_ids)[::2])
    parts = [load_score_table(results / f"crnn_6cm_{name}.csv") for name in names]
    # other arrays, and other positions than those tested
    calibration = [part.take(~half) for part in parts]
    joined = make_table(*(np.concatenate([getattr(part, field) for part in calibration])
                          for field in ("predicted_angles", "gt_angles", "abs_errors")),
                        filenames=np.concatenate([[f"{name}_{i}" for i in part.global_indices]
                                                  for name, part in zip(names, calibration, strict=True)]),
                        group_ids=np.concatenate([part.group_ids for part in calibration]),
                        columns={c: np.concatenate([part.column(c) for part in calibration]) for c in test.columns})
    combined = combined_auroc(joined, test.take(half))
    alone = failure_aurocs(test.take(half))["max_prob"]
    assert combined > alone
