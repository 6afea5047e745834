"""`ssl-kit route`: from CSV tables to a folder and back to decisions, and everything that can be wrong with them."""
import argparse
import json
import os
import re

import numpy as np
import pandas as pd
import pytest

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.routing import route_command, route_output, route_study
from ssl_kit.routing.route_command import add_route_arguments, run_route
from ssl_kit.routing.route_rules import as_weighted_sum, load_rules, table_detectors
from ssl_kit.routing.route_study import RouteColumns, choose_method, load_predictions, split_sides, study_sides

N = 240


def frames(seed=0, n=N):
    """Predictions of 30 places, a confidence that knows of failures, and a fallback that errs elsewhere."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(n // 8) * 360 / (n // 8), 8)
    lost, other = rng.random((2, n)) < [[0.3], [0.2]]
    scores = pd.DataFrame({"global_idx": 1000 + np.arange(n), "pred_angle": (truth + 90 * lost) % 360,
                           "gt_angle": truth, "max_prob": 0.5 - 0.3 * lost + 0.05 * rng.random(n),
                           "odd": 3.0 * lost + rng.normal(size=n)})
    fallback = pd.DataFrame({"global_idx": 1000 + np.arange(n), "srp_pred": (truth + 5 + 100 * other) % 360})
    return scores, fallback


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with scores.csv and fallback.csv, and no figures: drawing them is tested once."""
    monkeypatch.chdir(tmp_path)
    for name, frame in zip(("scores", "fallback"), frames(), strict=True):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    monkeypatch.setattr(route_output, "_figures", lambda study, folder: folder.mkdir())
    return tmp_path


def parse(*words):
    parser = argparse.ArgumentParser()
    add_route_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def route(*words):
    return run_route(parse(*words, *([] if "--apply" in words else ["--draws", "20"])))


def change(path, edit):
    """Rewrite a CSV through `edit(frame) -> frame`."""
    edit(pd.read_csv(path)).to_csv(path, index=False)


def edited(frame, row, column, value):
    return frame.astype({column: object}).assign(**{column: [value if k == row else old for k, old
                                                            in enumerate(frame[column])]})


# a study


def test_study_with_a_fallback_writes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, frame in zip(("scores", "fallback"), frames(), strict=True):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    assert route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "routing_statistics.csv", "hybrid_results.csv", "routing_decisions.csv", "detection_metrics.csv",
        "thresholds.json", "report.html", "figures"}
    assert {path.suffix for path in (out / "figures").glob("mae_vs_rate.*")} == {".pdf", ".png", ".csv", ".json"}
    page = (out / "report.html").read_text()
    assert "split by true azimuth" in page and "data:image/png;base64" in page and ".tmp" not in page
    assert not re.search(r"<(script|link)|src=\"http", page)
    hybrid = pd.read_csv(out / "hybrid_results.csv").set_index(["method", "threshold"])
    chosen = tuple(said["chosen"][key] for key in ("method", "rule"))
    assert said["mae_deg"]["chosen"][0] == pytest.approx(hybrid.loc[chosen, "mae"])
    assert said["mae_deg"]["true_oracle"][0] <= said["mae_deg"]["chosen"][0] < said["mae_deg"]["network"][0]
    assert said["learned_signs"] == {"odd": 1} and 0 < said["captured"] <= 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_study_without_a_fallback_says_nothing_about_hybrids(here, capsys):
    route("--scores", "scores.csv", "--out", "out")
    assert not (here / "out" / "hybrid_results.csv").exists()
    decisions = pd.read_csv(here / "out" / "routing_decisions.csv")
    assert "fallback_angle" not in decisions and {"score_max_prob", "routed_max_prob_rate_30"} <= set(decisions)
    assert "mean error" not in capsys.readouterr().out
    assert "disagreement" not in load_rules(here / "out" / "thresholds.json").methods


def test_the_same_seed_gives_the_same_files(here):
    for name in ("a", "b"):
        route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", name)
    for name in ("routing_statistics.csv", "hybrid_results.csv", "routing_decisions.csv", "thresholds.json"):
        assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()


def test_columns_by_other_names(here):
    names = {"pred_angle": "guess", "gt_angle": "truth", "global_idx": "id"}
    change("scores.csv", lambda f: f.rename(columns=names).assign(room=np.arange(N) // 24, note="x"))
    change("fallback.csv", lambda f: f.rename(columns={"global_idx": "id", "srp_pred": "music"}).assign(ms=4.0))
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--predicted", "guess", "--truth", "truth", "--index",
          "id", "--group", "room", "--score", "odd", "--signs", "odd=1", "--fallback-predicted", "music",
          "--fallback-cost", "ms", "--out", "out")
    rules = load_rules("out/thresholds.json")
    assert set(rules.methods) == {"odd", "disagreement", "defer"} and "room" in rules.study["sides"]
    hybrid = pd.read_csv("out/hybrid_results.csv").set_index(["method", "threshold"])
    assert hybrid.loc[("always_fallback", "none"), "cost_ms"] == pytest.approx(4.0)


def test_calibration_of_its_own(here):
    other, other_fallback = frames(seed=1)
    other.assign(global_idx=other.global_idx + 5000).to_csv("other.csv", index=False)
    other_fallback.assign(global_idx=other_fallback.global_idx + 5000).to_csv("other_srp.csv", index=False)
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--calibration", "other.csv",
          "--calibration-fallback", "other_srp.csv", "--out", "out")
    assert len(pd.read_csv("out/routing_decisions.csv")) == N
    assert "could not be checked" in load_rules("out/thresholds.json").study["sides"]
    with pytest.raises(ParameterError, match="expected 1 tables.*found 0"):
        route("--scores", "scores.csv", "--fallback", "fallback.csv", "--calibration", "other.csv")


def test_the_same_recordings_through_another_array_are_split_by_place(here):
    frames(seed=2)[0].to_csv("array2.csv", index=False)
    with pytest.raises(DataError, match="array2.csv: lists the same recordings.*--same-recordings"):
        route("--scores", "scores.csv", "--calibration", "array2.csv")
    route("--scores", "scores.csv", "--calibration", "array2.csv", "--same-recordings", "--out", "out")
    tested = set(pd.read_csv("out/routing_decisions.csv").group_id)
    assert 0 < len(tested) < 30 and "places were split first" in load_rules("out/thresholds.json").study["sides"]


def test_shared_rooms_between_calibration_and_test_are_refused(here):
    change("scores.csv", lambda f: f.assign(room=np.arange(N) // 24))
    frames(seed=1)[0].assign(room=np.arange(N) // 24).to_csv("other.csv", index=False)
    with pytest.raises(DataError, match="overlap.*room"):
        route("--scores", "scores.csv", "--calibration", "other.csv", "--group", "room")


# traps


def test_places_visited_twice_stay_on_one_side(here):
    """A split by runs of one azimuth would put the second visit of a place on the other side."""
    frame = frames()[0]
    twice = pd.concat([frame, frame.assign(global_idx=frame.global_idx + N)])
    twice.to_csv("scores.csv", index=False)
    sides = split_sides(load_predictions("scores.csv", RouteColumns()), None)
    assert not set(sides.calibration.gt_angles) & set(sides.test.gt_angles)


def test_the_method_is_chosen_on_calibration_not_on_test(here):
    """`lucky` is perfect on the test places and blind on calibration: it must not be chosen."""
    sides = split_sides(load_predictions("scores.csv", RouteColumns()), None)
    lucky = [(part.abs_errors > 30) * 1.0 if part is sides.test else np.random.default_rng(0).normal(size=len(part))
             for part in (sides.calibration, sides.test)]
    sides = route_study.Sides(sides.calibration.with_columns(lucky=lucky[0]), sides.test.with_columns(lucky=lucky[1]),
                              None, "")
    study = study_sides(sides, {"lucky": 1}, n_draws=5)
    assert study.result.detection.set_index("method").auroc["lucky"] == 1 and study.rules.chosen[0] != "lucky"
    assert choose_method(study.result, sides.calibration, None, "rate_30") == study.rules.chosen[0]


def test_weighted_sums_are_the_detectors():
    rng = np.random.default_rng(0)
    from ssl_kit.routing.bank import make_table

    table = make_table(rng.uniform(0, 360, 90), rng.uniform(0, 360, 90), group_ids=np.arange(90) // 9, columns={
        "a": 100 * rng.normal(size=90), "b": rng.normal(size=90), "fallback_angle": rng.uniform(0, 360, 90),
        "fallback_error": rng.uniform(0, 180, 90)})
    for detector in table_detectors({"a": -1, "b": 1}, with_fallback=True):
        detector.fit(table)
        assert np.allclose(as_weighted_sum(detector).score(table), detector.score(table), atol=1e-12)
    with pytest.raises(ParameterError, match="rename"):
        table_detectors({"defer": 1})


# faults


@pytest.mark.parametrize(("edit", "words"), [
    (lambda f: f.drop(columns="pred_angle"), "scores.csv: columns missing.*pred_angle"),
    (lambda f: edited(f, 7, "max_prob", np.nan), "scores.csv: column 'max_prob', row 7"),
    (lambda f: edited(f, 7, "gt_angle", "north"), "scores.csv: column 'gt_angle', row 7.*north"),
    (lambda f: f.assign(global_idx=[5, 5, *range(10, 10 + N - 2)]), "row 1: global_idx 5 is that of row 0 too"),
    (lambda f: f[["global_idx", "pred_angle", "gt_angle"]], "no score column"),
    (lambda f: f.assign(gt_angle=10.0), "one component"),
    (lambda f: f.assign(abs_error=1.0), "row 0: abs_error|abs_error is 1"),
    (lambda f: f.assign(pred_angle=f.gt_angle), "0 of"),
])
def test_bad_scores_are_named_and_nothing_is_written(here, edit, words):
    change("scores.csv", edit)
    with pytest.raises(DataError, match=words):
        route("--scores", "scores.csv", "--out", "out")
    assert sorted(os.listdir(here)) == ["fallback.csv", "scores.csv"]


@pytest.mark.parametrize(("edit", "words"), [
    (lambda f: f.drop(columns="srp_pred"), "fallback.csv: columns missing.*srp_pred"),
    (lambda f: edited(f, 3, "srp_pred", np.nan), "fallback.csv: column 'srp_pred', row 3"),
    (lambda f: f.assign(global_idx=f.global_idx + 10**6), "no answer for 240 of 240"),
    (lambda f: f.iloc[:200], "no answer for 40 of 240.*--answered-only"),
    (lambda f: f.assign(global_idx=5), "global_idx 5 comes 240 times"),
    (lambda f: f.assign(gt_angle=f.srp_pred + 50), "other recordings under the same index"),
])
def test_a_bad_fallback_is_named(here, edit, words):
    change("fallback.csv", edit)
    with pytest.raises(DataError, match=words):
        route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out")
    assert sorted(os.listdir(here)) == ["fallback.csv", "scores.csv"]


def test_answered_only_and_drop_repeated_go_on(here):
    change("fallback.csv", lambda f: pd.concat([f.iloc[:200], f.iloc[:1]]))
    change("scores.csv", lambda f: pd.concat([f, f.iloc[:1].assign(pred_angle=f.gt_angle[0])]))
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out", "--answered-only", "--drop-repeated")
    assert pd.read_csv("out/routing_decisions.csv").global_index.max() < 1200


@pytest.mark.parametrize("words", [("--rate", "1.5"), ("--signs", "a=2"), ("--alpha", "zero"), ("--rule", "best")])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse("--scores", "x.csv", *words)
    assert words[0] in capsys.readouterr().err


def test_unknown_sign_missing_table_and_misplaced_options(here):
    for words, message in [(("--signs", "nothing=1"), "nothing"), (("--method", "odd"), "--apply"),
                           (("--same-recordings",), "--calibration"), (("--rule", "cost"), "rate, f1, risk")]:
        with pytest.raises(ParameterError, match=message):
            route("--scores", "scores.csv", "--out", "out", *words)
    with pytest.raises(MissingDataError, match="none.csv"):
        route("--scores", "none.csv")


def test_a_foreign_folder_is_left_alone_and_an_old_study_replaced(here):
    (here / "out").mkdir()
    (here / "out" / "diary.txt").write_text("dear diary")
    with pytest.raises(ParameterError, match="did not write"):
        route("--scores", "scores.csv", "--out", "out")
    (here / "out" / "diary.txt").unlink()
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out")
    route("--scores", "scores.csv", "--out", "out")
    assert not (here / "out" / "hybrid_results.csv").exists()  # nothing of the earlier study is left
    with pytest.raises(ParameterError, match="is a file"):
        route("--scores", "scores.csv", "--out", "scores.csv")


def test_what_breaks_half_way_leaves_the_old_study(here, monkeypatch):
    route("--scores", "scores.csv", "--out", "out")
    before = {path.name: path.stat().st_mtime_ns for path in (here / "out").iterdir()}

    def broken(study, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(route_output, "_figures", broken)
    with pytest.raises(StorageError, match="nothing was left"):
        route("--scores", "scores.csv", "--out", "out")
    with pytest.raises(StorageError):
        route("--scores", "scores.csv", "--out", "fresh")
    assert {path.name: path.stat().st_mtime_ns for path in (here / "out").iterdir()} == before
    assert sorted(os.listdir(here)) == ["fallback.csv", "out", "scores.csv"]


def test_a_folder_that_may_not_be_written(here, monkeypatch):
    monkeypatch.setattr(route_output.os, "access", lambda *given: False)  # root may write everywhere
    with pytest.raises(StorageError, match="may write"):
        route("--scores", "scores.csv", "--out", "out")


# the stored rule


def test_apply_repeats_the_study_on_its_own_test(here, capsys):
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out")
    study = pd.read_csv("out/routing_decisions.csv").set_index("global_index")
    change("scores.csv", lambda f: f.drop(columns="gt_angle"))  # deployment knows no truth
    for method in ("max_prob", "combination", "defer"):
        route("--scores", "scores.csv", "--fallback", "fallback.csv", "--apply", "out/thresholds.json", "--method",
              method, "--out", method)
        decided = pd.read_csv(f"{method}/routing_decisions.csv").set_index("index").loc[study.index]
        assert (decided.routed == study[f"routed_{method}_rate_30"]).all()
        assert (decided.answer == np.where(decided.routed, decided.fallback_angle, decided.network_angle)).all()


def test_apply_first_says_whom_to_ask_then_answers(here, capsys):
    route("--scores", "scores.csv", "--out", "out")
    apply = ("--scores", "scores.csv", "--apply", "out/thresholds.json", "--out", "today")
    route(*apply)
    first = pd.read_csv("today/routing_decisions.csv")
    assert "answer" not in first and 0 < first.routed.sum() < N
    asked = first.index[first.routed == 1][1:]  # the fallback failed on one
    change("fallback.csv", lambda f: f.iloc[asked])
    capsys.readouterr()
    route(*apply, "--fallback", "fallback.csv", "--json")
    said = json.loads(capsys.readouterr().out)
    second = pd.read_csv("today/routing_decisions.csv")
    assert said["routed_without_answer"] == 1 and said["routed"] == first.routed.sum() == second.routed.sum()
    kept = first.routed == 0
    assert second.answer.notna().all() and (second.answer[kept] == second.network_angle[kept]).all()


def test_apply_refuses_what_it_cannot_do(here):
    route("--scores", "scores.csv", "--fallback", "fallback.csv", "--out", "out")
    apply = ("--scores", "scores.csv", "--apply", "out/thresholds.json", "--out")
    with pytest.raises(ParameterError, match="holds a study"):
        route(*apply, "out")
    with pytest.raises(DataError, match="compares both answers"):
        route(*apply, "today", "--method", "defer")
    with pytest.raises(ParameterError, match="not stored"):
        route(*apply, "today", "--method", "entropy")
    whole = read_json("out/thresholds.json")
    for broken in ({**whole, "kind": "diary"}, {**whole, "methods": {}}, {**whole, "chosen": ["odd", "rate_99"]}, [1]):
        write_json("bad.json", broken)
        with pytest.raises(DataError, match="bad.json"):
            route("--scores", "scores.csv", "--apply", "bad.json", "--out", "today")
    change("scores.csv", lambda f: edited(f, 4, "max_prob", np.nan))
    with pytest.raises(DataError, match="column 'max_prob', row 4"):
        route(*apply, "today", "--method", "max_prob")
    change("scores.csv", lambda f: f.drop(columns="max_prob"))
    with pytest.raises(DataError, match="columns missing.*max_prob"):
        route(*apply, "today", "--method", "max_prob")
    assert not (here / "today").exists()


def test_every_example_of_the_help_parses():
    lines = re.findall(r"ssl-kit route (.*)", route_command._EXAMPLE)
    assert len(lines) >= 5
    for line in lines:
        assert parse(*line.split()).scores.endswith(".csv")


def test_importing_the_command_is_light():
    import subprocess
    import sys

    code = ("import sys, ssl_kit.routing.route_command; "
            "print({'torch', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
