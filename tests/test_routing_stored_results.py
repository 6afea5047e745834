"""Results kept in a file: the same tables, figures and scores after reading, and what is refused."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, StorageError
from ssl_kit.routing import figures, figures_comparison, figures_decisions, latex
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.protocols import evaluate_protocols, join_studies
from ssl_kit.routing.registry import Detector, detector_classes
from ssl_kit.routing.stored_results import load_results, save_results
from ssl_kit.routing.synthetic import synthetic_study

DETECTORS = ["max_prob", "entropy", "knn", "physics", "error_regressor"]


@pytest.fixture(scope="module")
def study():
    calibration, calibration_srp, test, test_srp = synthetic_study(n=160, n_frames=3, n_rooms=16, overlap=0.7)
    detectors = [name for name in DETECTORS if name in detector_classes()]
    results = evaluate_protocols({"in_distribution": (calibration, calibration_srp)}, test, test_srp,
                                 detectors=detectors, n_draws=40)
    return results, test, test_srp


@pytest.fixture
def stored(study, tmp_path):
    return save_results(study[0], tmp_path / "results.npz")


def test_what_is_read_is_what_was_written(study, stored):
    results, test, test_srp = study
    again = load_results(stored, test, test_srp)
    assert list(again.studies) == list(results.studies) == ["in_distribution", "leaky"]
    for part in ("hybrid", "statistics", "detection", "left_out"):
        pd.testing.assert_frame_equal(getattr(again, part), getattr(results, part), check_exact=True)
    for protocol, before in results.studies.items():
        after = again[protocol]
        for part in ("hybrid", "statistics", "detection", "decisions"):
            pd.testing.assert_frame_equal(getattr(after, part), getattr(before, part), check_exact=True)
        assert list(after.methods) == list(before.methods)
        for name, method in before.methods.items():
            here = after.methods[name]
            for what in ("calibration", "test", "cost_ms"):
                np.testing.assert_array_equal(getattr(here, what), getattr(method, what))
            assert here.thresholds == method.thresholds and here.detector.formula == method.detector.formula
        np.testing.assert_array_equal(after.row_weights, before.row_weights)
        assert (after.failure_deg, after.fallback_name, after.checked_splits, dict(after.left_out)) == (
            before.failure_deg, before.fallback_name, before.checked_splits, dict(before.left_out))


def test_figures_and_tables_of_read_results_are_the_same(study, stored, tmp_path):
    results, test, test_srp = study
    before, after = (one["in_distribution"] for one in (results, load_results(stored, test, test_srp)))
    shown = ["max_prob", "physics"]
    facts = {"azimuth (°)": test.gt_angles}
    for draw in (lambda r: figures.method_comparison_figure(r), lambda r: figures.risk_coverage_figure(r, shown),
                 lambda r: figures_comparison.rate_ablation_figure(r, shown),
                 lambda r: figures_comparison.cost_accuracy_figure(r),
                 lambda r: figures_decisions.polar_error_figure(r, "physics", "rate_30"),
                 lambda r: figures_decisions.routed_share_figure(r, "physics", facts, "rate_30")):
        pd.testing.assert_frame_equal(pd.DataFrame(draw(before)[1]), pd.DataFrame(draw(after)[1]), check_exact=True)
    first, second = (latex.latex_protocol_table([one], tmp_path / "table.tex", "rate_30").read_text()
                     for one in (before, after))
    assert first == second


def test_a_threshold_that_could_not_be_fitted_stays_absent(study, tmp_path):
    results, test, test_srp = study
    one = results["leaky"]
    first = one.methods["max_prob"]
    without = replace(first, thresholds={k: v for k, v in first.thresholds.items() if k != "f1"})
    path = save_results(join_studies({"leaky": replace(one, methods=one.methods | {"max_prob": without})}),
                        tmp_path / "results.npz")
    again = load_results(path, test, test_srp)["leaky"].methods
    assert again["max_prob"].thresholds == without.thresholds
    assert again["physics"].thresholds == one.methods["physics"].thresholds


def test_other_recordings_are_refused(study, stored):
    _, test, test_srp = study
    other = replace(test, filenames=np.array([f"other_{name}" for name in test.filenames]))
    with pytest.raises(DataError, match=r"results.npz: .*other recordings"):
        load_results(stored, other, test_srp)


def test_a_detector_that_nobody_registered_is_named(tmp_path):
    class Homemade(Detector):
        name, formula, source = "homemade", "1 - max p", "nobody"

        def score(self, table):
            return -np.asarray(table.predictions).max(axis=-1)
    calibration, calibration_srp, test, test_srp = synthetic_study(n=120, n_frames=3, n_rooms=12, overlap=0.7)
    own = evaluate_study(calibration, calibration_srp, test, test_srp, detectors=[Homemade()], n_draws=10, policies=())
    path = save_results(join_studies({"in_distribution": own}), tmp_path / "results.npz")
    with pytest.raises(DataError, match=r"results.npz: .*not registered: \['homemade'\]"):
        load_results(path, test, test_srp)


def test_damaged_and_foreign_files_are_named(study, stored, tmp_path):
    _, test, test_srp = study
    with pytest.raises(MissingDataError, match=r"none.npz: no such file"):
        load_results(tmp_path / "none.npz", test, test_srp)
    whole = stored.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        stored.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"results.npz"):
            load_results(stored, test, test_srp)
    np.savez(tmp_path / "foreign.npz", x=np.arange(3))
    with pytest.raises(DataError, match=r"foreign.npz: not results"):
        load_results(tmp_path / "foreign.npz", test, test_srp)
    np.savez(tmp_path / "pickled.npz", **{"leaky/about": np.array([{"methods": []}], dtype=object)})
    with pytest.raises(DataError, match=r"pickled.npz: holds pickled objects"):
        load_results(tmp_path / "pickled.npz", test, test_srp)


def test_where_nothing_can_be_written_the_error_says_so_and_nothing_is_left(study, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        save_results(study[0], tmp_path / "file" / "results.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
