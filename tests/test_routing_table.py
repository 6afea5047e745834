"""Plain tables: reading, joining, faults, and the one real failure-detection table (skipped where it is absent)."""
import os
from pathlib import Path

import numpy as np
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.routing.bank import make_table
from ssl_kit.routing.detectors_physics import ColumnDetector
from ssl_kit.routing.metrics import auroc
from ssl_kit.routing.real_hybrid import AzimuthPrior, captured_table, cross_fit, hybrid_table_786
from ssl_kit.routing.real_tables import (
    COLUMNS,
    Candidate,
    CrossArray,
    angle_features,
    azimuth_folds,
    boosted_trees,
    check_same_recordings,
    column_features,
    load_real_tables,
    logistic,
    real_candidates,
    stream_features,
    training_rows,
)
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


def test_a_score_that_is_no_number_is_named(tmp_path):
    path = write(tmp_path, HEADER + "0,10,12,2,0.9\n1,10,12,2,\n")
    with pytest.raises(DataError, match="table.csv: column 'max_prob', row 1"):
        load_score_table(path)


def real_like(seed, rng, failing, n_places=24, each=12):
    """A table of `n_places` azimuths; `failing` (row,): the answer is 97.5° off, the confidences say little of it."""
    truth = np.repeat(np.arange(n_places) * 15.0, each)
    columns = {name: rng.uniform(1.1, 1.4, len(truth)) for name in COLUMNS}
    columns["entropy"] = columns["entropy"] + 0.1 * failing
    return make_table((truth + 97.5 * failing) % 360, truth, group_ids=[f"p{t:g}" for t in truth], columns=columns)


def test_leaving_an_array_out_is_not_enough_when_all_arrays_heard_the_same_places():
    """The trap of the real tables: where the network fails is remembered by the predicted azimuth."""
    rng = np.random.default_rng(0)
    bad_places = np.repeat(rng.random(24) < 0.4, 12)
    tables = {name: real_like(k, rng, bad_places & (rng.random(288) < 0.9)) for k, name in enumerate("abc")}
    with_angle = Candidate("angle", "recording", lambda t: np.c_[column_features(t), angle_features(t)], boosted_trees)
    failures = tables["a"].abs_errors > 30
    naive = CrossArray(tables, rng.integers(0, 3, 288), share_positions=True).scores(with_angle)["a"]
    strict = CrossArray(tables, azimuth_folds(tables["a"].gt_angles, 3)).scores(with_angle)["a"]
    assert auroc(naive, failures) > 0.95 and auroc(strict, failures) < 0.8
    with pytest.raises(DataError, match="share positions"):
        CrossArray(tables, rng.integers(0, 3, 288)).scores(with_angle)


def test_tables_of_other_recordings_are_no_arrays_of_one_study():
    rng = np.random.default_rng(0)
    tables = {name: real_like(0, rng, rng.random(288) < 0.3) for name in "ab"}
    with pytest.raises(DataError, match="b: global_indices differ"):
        check_same_recordings({**tables, "b": real_like(0, rng, rng.random(144) < 0.3, 12)})


def test_training_rows_do_not_look_into_held_out_places():
    folds = np.repeat([0, 1, 0, 2], 20)
    for back, ahead in ((0, 0), (10, 0), (10, 10)):
        rows = np.flatnonzero(training_rows(folds, [1], back, ahead))
        seen = {k for row in rows for k in range(row - back, row + ahead + 1) if 0 <= k < 80}
        assert not seen & set(range(20, 40)) and len(rows) == 60 - back - ahead


def test_stream_features_of_the_past_do_not_know_the_future():
    rng = np.random.default_rng(0)
    table = real_like(0, rng, rng.random(288) < 0.3)
    whole, half = stream_features(table), stream_features(table.take(np.arange(150)))
    assert np.array_equal(whole[:150], half)
    assert not np.array_equal(stream_features(table, True)[:150], stream_features(table.take(np.arange(150)), True))
    assert np.isfinite(whole).all()


def test_the_choice_of_a_candidate_does_not_see_the_tested_array():
    """A candidate that is perfect on array `a` alone must not be chosen for it."""
    rng = np.random.default_rng(0)
    tables = {name: real_like(k, rng, rng.random(288) < 0.3) for k, name in enumerate("abc")}
    only_a = {id(table): (table.abs_errors > 30) * (3.0 if name == "a" else 0.0) for name, table in tables.items()}
    noise = 1e-3 * rng.normal(size=(288, 1))
    lucky = Candidate("lucky", "recording", lambda t: only_a[id(t)][:, None] + noise, logistic)
    plain = Candidate("plain", "recording", column_features, logistic)
    study = CrossArray(tables, azimuth_folds(tables["a"].gt_angles, 3))
    inner = {c.name: study.inner_aurocs(c) for c in (lucky, plain)}
    scores = {c.name: study.scores(c) for c in (lucky, plain)}
    found, names = study.chosen(scores, inner)
    assert (names[0] == "plain").all() and np.array_equal(found["a"], scores["plain"]["a"])


def test_cross_fitted_thresholds_and_a_site_prior():
    """A rule that memorises the azimuth looks perfect when folds cut places, and knows nothing of a new place."""
    rng = np.random.default_rng(0)
    table = real_like(0, rng, np.repeat(rng.random(24) < 0.5, 12))
    fallback = np.where(table.abs_errors > 30, 2.0, 60.0)
    table = table.with_columns(fallback_error=fallback, fallback_angle=(table.gt_angles + fallback) % 360,
                               fallback_confidence=np.zeros(288), place=table.predicted_angles)
    fit = cross_fit(table, ColumnDetector("entropy"), azimuth_folds(table.gt_angles, 4))
    assert 0.15 < fit.routed["rate_30"].mean() < 0.45
    row = captured_table(table, [fit], 50).set_index(["system", "rule"]).loc[("entropy", "rate_30")]
    assert row.true_oracle_mae <= row.mae and row.captured_low <= row.captured <= row.captured_high
    with pytest.raises(DataError, match="overlap"):
        cross_fit(table, ColumnDetector("entropy"), np.arange(288) % 4)


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


def test_real_combination_of_the_recordings_before_reaches_the_target(results):
    """New array and new places: 0.86 is reached by looking at the recordings before, not by one recording's scores."""
    tables = load_real_tables(results)
    study = CrossArray(tables, azimuth_folds(tables["baseline"].gt_angles, 4))
    found = {(c.name, c.kind): study.scores(c)["3x12cm_consecutive"] for c in real_candidates()
             if (c.name, c.kind) in {("logistic", "recording"), ("logistic", "past")}}
    aurocs = {key: auroc(score, study.failures["3x12cm_consecutive"]) for key, score in found.items()}
    assert aurocs["logistic", "past"] >= 0.86 > aurocs["logistic", "recording"]


def test_real_hybrid_site_knowledge_without_any_score(results):
    table = hybrid_table_786(load_real_tables(results)["3x12cm_consecutive"],
                             results / "srp_3x12cm_consecutive_low_confidence.csv")
    folds = azimuth_folds(table.gt_angles, 10)
    fits = [cross_fit(table, detector, folds) for detector in (ColumnDetector("entropy"), AzimuthPrior())]
    rows = captured_table(table, fits, 50).set_index(["system", "rule"]).captured
    assert len(table) == 785 and rows["better of the two", ""] == 1
    assert rows["entropy", "cost_0"] < 0.5 < rows["azimuth_prior", "cost_0"]
