"""The explorer's numbers are the study's, its lists hold the right recordings, its controls do what they say."""

import json
import time

import numpy as np
import pytest
from browser import lab_server, open_browser, wait_for
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.routing.bank import FallbackTable, make_table
from ssl_kit.routing.decision_picture import TwoAnswers, decision_figure
from ssl_kit.routing.detectors_physics import ColumnDetector
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.explorer_view import (
    BY_HAND,
    KINDS,
    Choice,
    changed,
    curves_of,
    decide,
    list_lines,
    recording_html,
    recordings,
    summary,
    threshold_at_rate,
    two_answers,
    why,
)
from ssl_kit.routing.synthetic import synthetic_study


@pytest.fixture(scope="module")
def study():
    return evaluate_study(*synthetic_study(n=200, n_rooms=10), detectors=["max_prob", "entropy", "physics"],
                          n_draws=100)


def by_hand(network_errors, fallback_errors, scores, names=None, failure_deg=30.0):
    """A study of given errors; truth is 0°, the table's numbers begin at 500."""
    n = len(scores)
    rng = np.random.default_rng(0)

    def tables(first, errors, fallback, score):
        numbers = first + np.arange(len(score))
        table = make_table(errors, np.zeros(len(score)), errors, numbers, names if first == 500 else None,
                           [f"room{first}-{i % 2}" for i in range(len(score))], columns={"doubt": score})
        return table, FallbackTable(fallback, fallback, np.ones(len(score)), np.ones(len(score)), numbers)

    other = rng.uniform(0, 60, (2, n))
    return evaluate_study(*tables(0, other[0], other[1], other[0]),
                          *tables(500, np.asarray(network_errors, float), np.asarray(fallback_errors, float),
                                  np.asarray(scores, float)),
                          detectors=[ColumnDetector("doubt", 1, "max_prob")], n_draws=50, failure_deg=failure_deg)


# numbers

def test_numbers_are_those_of_the_tables(study):
    hybrid = study.hybrid.set_index(["method", "threshold"])
    statistics = study.statistics.set_index(["method", "threshold"])
    names = {"rate": "rate", "mae_hybrid": "mae", "mae_hybrid_low": "mae_low", "mae_hybrid_high": "mae_high",
             "acc5_hybrid": "acc5", "gain": "gain_network", "gain_low": "gain_network_low",
             "gain_high": "gain_network_high", "captured": "captured", "captured_low": "captured_low",
             "captured_high": "captured_high"}
    for detector, scores in study.methods.items():
        for rule in scores.thresholds:
            numbers = summary(study, decide(study, Choice(detector, rule)))
            row = hybrid.loc[(detector, rule)]
            for ours, theirs in names.items():
                assert np.isclose(numbers[ours], row[theirs], equal_nan=True), (detector, rule, ours)
            for name in ("precision", "recall", "f1", "fpr"):
                assert np.isclose(numbers[name], statistics.loc[(detector, rule)][name], equal_nan=True)


def test_ends_of_the_slider_are_the_two_systems(study):
    none, whole = (decide(study, Choice("entropy", rate=rate)) for rate in (0.0, 1.0))
    np.testing.assert_array_equal(none.errors, study.test.abs_errors)
    np.testing.assert_array_equal(whole.errors, study.test.column("fallback_error"))
    curves = curves_of(study, "entropy")
    assert np.isclose(curves.mae[0], none.errors.mean()) and np.isclose(curves.mae[-1], whole.errors.mean())
    assert (curves.low <= curves.mae + 1e-9).all() and (curves.mae <= curves.high + 1e-9).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.floats(0, 1))
def test_a_share_routes_whole_ties_and_never_more(levels, rate):
    scores = np.array(levels, float)
    value = threshold_at_rate(scores, rate)
    allowed = int(np.floor(rate * len(scores) + 0.5))
    routed = (scores > value).sum()
    assert routed <= allowed
    kept = scores[scores <= value]
    if len(kept):  # one level more would be too many
        assert (scores >= kept.max()).sum() > allowed


def test_a_plain_quantile_would_route_too_many_or_too_few():
    scores = np.array([0.0] * 6 + [1.0] * 4)
    naive = (scores >= np.quantile(scores, 0.8)).sum()  # asked for 20 %
    assert naive == 4 and (scores > threshold_at_rate(scores, 0.2)).sum() == 0


# recordings

def test_kinds_of_recordings_on_a_table_small_enough_to_check():
    #                    rescued  harmed  missed  both wrong  both right, routed
    result = by_hand([100, 3, 50, 90, 5], [4, 120, 1, 80, 6], [9, 8, 1, 7, 6])
    decision = decide(result, Choice("max_prob", rate=0.8))
    assert decision.routed.tolist() == [True, True, False, True, True]
    assert [changed(result, decision, kind).nonzero()[0].tolist() for kind in KINDS] == [[0], [1], [2]]
    assert recordings(result, decision, "harmed", "max_prob").iloc[0].gain_deg == -117
    numbers = summary(result, decision)
    assert (numbers["rescued"], numbers["harmed"], numbers["missed"]) == (1, 1, 1)
    assert numbers["precision"] == 0.5 and np.isclose(numbers["recall"], 2 / 3)
    assert np.isclose(numbers["mae_hybrid"], (4 + 120 + 50 + 80 + 6) / 5)
    assert np.isclose(numbers["mae_oracle"], (4 + 3 + 1 + 80 + 5) / 5)


def test_largest_change_comes_first(study):
    decision = decide(study, Choice("entropy", rate=0.4))
    for kind in KINDS:
        gain = recordings(study, decision, kind, "entropy")["gain_deg"].to_numpy()
        assert (np.diff(gain) >= 0).all() if kind == "harmed" else (np.diff(gain) <= 0).all()
        assert (gain < 0).all() if kind == "harmed" else (gain > 0).all()


def test_why_agrees_with_the_decision(study):
    decision = decide(study, Choice("entropy", "rate_30", policy="cascade"))
    for row in range(0, 200, 17):
        sentence, routed = why(study, decision, row), bool(decision.routed[row])
        assert (sentence.count(">") == 2) == routed and ("SRP-PHAT was trusted" in sentence) == routed
        assert two_answers(study, decision, row).trusted == ("fallback" if routed else "network")


def test_a_cascade_routes_what_both_flag(study):
    flagged = [decide(study, Choice(name, "rate_30")).routed for name in ("entropy", "physics")]
    both = decide(study, Choice("entropy", "rate_30", policy="cascade")).routed
    np.testing.assert_array_equal(both, flagged[0] & flagged[1])


@pytest.mark.parametrize("choice, words", [
    (Choice("entropie"), "entropy"), (Choice("entropy", "rate_31"), "rate_30"), (Choice("entropy", rate=1.5), "0 to 1"),
    (Choice("physics", policy="cascade"), "switch"), (Choice("entropy", policy="fusion"), "cascade")])
def test_a_choice_that_does_not_exist_is_named(study, choice, words):
    with pytest.raises(ParameterError, match=words):
        decide(study, choice)


def test_names_of_files_are_text_not_markup():
    result = by_hand([100, 3, 50], [4, 120, 1], [9, 8, 1], ["<script>alert(1)</script>", "b", "c"])
    decision = decide(result, Choice("max_prob", rate=0.34))
    assert "<script" not in recording_html(result, decision, 0)
    assert list_lines(recordings(result, decision, "rescued", "max_prob"))[0][0].endswith("<script>alert(1)</script>")


# picture

@pytest.mark.parametrize("changes, error", [
    ({"trusted": "both"}, ParameterError), ({"posterior": np.ones((2, 3))}, DataError),
    ({"fallback_map": np.array([1.0, np.nan, 0.0])}, DataError)])
def test_a_picture_of_nonsense_is_refused(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        TwoAnswers(1.0, 2.0, **changes)


def test_an_error_in_the_picture_is_measured_around_the_circle():
    assert "3.0° off" in TwoAnswers(359.0, 10.0, truth_deg=2.0).labels()["network"]
    assert "off" not in TwoAnswers(359.0, 10.0).labels()["network"]


def test_the_trusted_answer_has_the_thick_arrow():
    for trusted, widths in (("network", [3.2, 1.1]), ("fallback", [1.1, 3.2])):
        axes = decision_figure(TwoAnswers(30.0, 60.0, trusted=trusted)).axes[0]
        assert [line.get_linewidth() for line in axes.lines] == widths


# the panel

@pytest.fixture
def panel(study):
    pytest.importorskip("ipywidgets")
    from ssl_kit.routing.explorer import RoutingExplorer

    asked = []

    def listen(index):
        asked.append(index)
        return np.ones((3, 800)) * 0.1, 16000
    explorer = RoutingExplorer(study, listen)
    explorer.asked = asked
    return explorer


def test_rule_and_slider_follow_each_other(panel, study):
    assert panel.rule.value == "rate_30" and panel.rate.value == round(200 * panel.decision.routed.mean()) / 2
    panel.rate.value = 55.0
    assert panel.rule.value == BY_HAND and np.isclose(panel.decision.routed.mean(), 0.55)
    panel.rule.value = "f1"
    np.testing.assert_array_equal(panel.decision.routed, study.decisions["routed_max_prob_f1"] == 1)
    assert panel.rule.value == "f1"  # moving the slider along has not changed the rule


def test_every_control_changes_what_is_seen(panel):
    seen = {(panel.numbers.value, bytes(panel.curve.value))}
    for change in (lambda: setattr(panel.detector, "value", "entropy"), lambda: setattr(panel.rule, "value", "f1"),
                   lambda: setattr(panel.policy, "value", "cascade"), lambda: setattr(panel.rate, "value", 10.0)):
        change()
        assert bytes(panel.curve.value).startswith(b"\x89PNG")
        seen.add((panel.numbers.value, bytes(panel.curve.value)))
    assert len(seen) == 5
    panel.detector.value = "physics"
    assert panel.policy.options == ("switch",) and panel.choice.policy == "switch"


def test_a_recording_is_played_by_its_global_index(panel, study):
    assert panel.player.value == "" and not panel.asked
    text, row = panel.recordings.options[0]
    panel.recordings.value = row
    assert panel.asked == [study.test.global_indices[row]] and panel.asked != [row]
    assert "<audio" in panel.player.value and "trusted" in panel.details.value
    assert bytes(panel.picture.value).startswith(b"\x89PNG")
    panel.kind.value = "missed"
    assert panel.player.value == "" and panel.recordings.value is None


def test_a_recording_that_cannot_be_read_is_said_and_others_still_play(study):
    pytest.importorskip("ipywidgets")
    from ssl_kit.routing.explorer import RoutingExplorer

    broken = []

    def listen(index):
        if not broken:
            broken.append(index)
            raise MissingDataError("walk.flac: no such file <here>")
        return np.zeros(800), 16000  # silence must not divide by its peak
    explorer = RoutingExplorer(study, listen)
    explorer.recordings.value = explorer.recordings.options[0][1]
    assert "no such file &lt;here&gt;" in explorer.player.value
    explorer.recordings.value = explorer.recordings.options[1][1]
    assert "<audio" in explorer.player.value


def test_a_study_without_features_has_a_panel_too():
    pytest.importorskip("ipywidgets")
    from ssl_kit.routing.explorer import RoutingExplorer

    explorer = RoutingExplorer(by_hand([100, 3, 50, 90, 5], [4, 120, 1, 80, 6], [9, 8, 1, 7, 6]))
    explorer.rate.value = 80.0
    assert explorer.policy.options == ("switch",)
    explorer.recordings.value = explorer.recordings.options[0][1]
    assert explorer.player.value == "" and bytes(explorer.picture.value).startswith(b"\x89PNG")


def test_leaky_results_are_labelled():
    pytest.importorskip("ipywidgets")
    from ssl_kit.routing.explorer import RoutingExplorer

    calibration, fallback, *_ = synthetic_study(n=80, n_rooms=6)
    leaky = evaluate_study(calibration, fallback, calibration, fallback, ["max_prob"], protocol="leaky", n_draws=20)
    assert "LEAKY" in RoutingExplorer(leaky).numbers.value


# in a kernel and in a browser

CELL = """import numpy as np
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.explorer import RoutingExplorer
from ssl_kit.routing.synthetic import synthetic_study

result = evaluate_study(*synthetic_study(n=80, n_rooms=6), detectors=["max_prob", "physics"], n_draws=20)
explorer = RoutingExplorer(result, lambda index: (0.1 * np.sin(np.arange(16000) / (8 + index % 9)), 16000))
explorer.recordings.value = explorer.recordings.options[0][1]
explorer"""


def panel_notebook():
    nbformat = pytest.importorskip("nbformat")
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    return nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(CELL)])


@pytest.mark.slow
def test_a_saved_notebook_keeps_the_panel():
    pytest.importorskip("ipywidgets")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbclient.NotebookClient(panel_notebook(), timeout=300).execute()
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[-1].data
    states = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    models = {state["model_name"] for state in states}
    assert {"DropdownModel", "FloatSliderModel", "SelectModel", "ImageModel"} <= models
    assert any("<audio" in state["state"].get("value", "") for state in states if state["model_name"] == "HTMLModel")


@pytest.mark.slow
def test_the_panel_works_in_jupyterlab_in_a_browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver_errors = pytest.importorskip("selenium.common.exceptions")
    pytest.importorskip("jupyterlab")
    pytest.importorskip("ipywidgets")
    (tmp_path / "panel.ipynb").write_text(json.dumps(panel_notebook()), encoding="utf-8")
    with open_browser(1400, 1500) as browser, lab_server(tmp_path) as address_of:
        browser.driver.get(address_of("panel.ipynb"))
        keys = webdriver.Keys
        for _ in range(40):  # JupyterLab replaces the cell while the page settles, and its kernel takes a while to come
            try:
                browser.one(".jp-Notebook .cm-content").click()
                webdriver.ActionChains(browser.driver).key_down(keys.CONTROL).send_keys(keys.ENTER).key_up(
                    keys.CONTROL).perform()
                time.sleep(3)
                if browser.one(".jp-InputPrompt").text.strip(" []:"):  # a star or a number: it runs
                    break
            except webdriver_errors.WebDriverException:
                time.sleep(0.5)
        browser.one(".ssl-list select option", 240)
        browser.one("audio")
        first = browser.run("return document.querySelector('audio').parentElement.outerHTML")
        browser.all(".ssl-list select option")[1].click()

        def another_sound():
            length_s, same = browser.run("const a = document.querySelector('audio'); return [a && a.duration, "
                                         "a && a.parentElement.outerHTML === arguments[0]]", first)
            return None if same else length_s

        assert wait_for(another_sound, "sound of the second recording") == pytest.approx(1.0, abs=0.05)
        pictures = browser.run("return [...document.querySelectorAll('.jp-OutputArea img')].map(e => e.naturalWidth)")
        assert len(pictures) == 2 and min(pictures) > 300
