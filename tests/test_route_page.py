"""The live page: its policy was fitted and says on what, its answers are the study's, and wrong files are named."""

import argparse
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from browser import open_browser, page_command, page_server

from ssl_kit.apps import route_page
from ssl_kit.apps.explain import (
    EXAMPLE_SEED,
    FRAME_STEP,
    bank_of_one,
    example_recording,
    explain_recording,
    polar_figure,
)
from ssl_kit.apps.page_policy import (
    DETECTORS,
    NETWORKS,
    array_kind,
    checkpoint_hash,
    fit_policy,
    load_page_policies,
    policy_for,
)
from ssl_kit.apps.route_page import (
    MAX_SECONDS,
    add_page_arguments,
    answer_upload,
    example_file,
    explanation_html,
    geometry_of,
    picture_of,
    read_upload,
    run_page,
    truth_of,
)
from ssl_kit.arrays.geometry import named_array
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, SslKitError
from ssl_kit.localize.bank_frames import ask_srp
from ssl_kit.localize.bank_rows import Question, ask
from ssl_kit.localize.probes import probe_of
from ssl_kit.localize.srp import SRPConfig
from ssl_kit.routing.bank import FallbackTable, FeatureBank, attach_fallback
from ssl_kit.routing.registry import lacks, make_detector
from ssl_kit.routing.synthetic import synthetic_study
from ssl_kit.routing.thresholds import CalibrationOutcomes, CostAware


@pytest.fixture(scope="module")
def recording():
    return example_recording(3, "6cm", duration_s=2.0)


@pytest.fixture(scope="module")
def explanation(recording):
    truth = float(np.atleast_1d(recording.azimuth_deg)[0])
    return explain_recording(recording.samples, recording.geometry, network="crnn", truth_deg=truth)


# the policy

def test_the_shipped_policy_says_what_it_was_fitted_on():
    about, policies = load_page_policies()
    assert {(p.network, p.arrays) for p in policies} == {("geonet", "any"), ("crnn", "own"), ("crnn", "other"),
                                                         ("ipdnet", "own"), ("ipdnet", "other")}
    assert about["rooms"] == "simulated" and about["made_by"].startswith("ssl_kit.apps.page_policy.")
    assert about["calibration"]["split"] != about["test"]["split"]
    assert EXAMPLE_SEED != about["test"]["seed"]  # the page's examples are not the rooms that it reports
    for p in policies:
        assert p.detector in DETECTORS and set(p.quantiles) == set(DETECTORS)
        assert math.isfinite(p.threshold) or (p.threshold > 0 and p.calibration["routed"] == 0)
        assert p.calibration["hybrid_mae"] <= p.calibration["network_mae"] + 1e-9
        low, high = p.test["hybrid_mae_interval"]
        assert low <= p.test["hybrid_mae"] <= high and p.test["rooms"] >= 20


def test_the_policy_belongs_to_the_networks_that_come_with_the_kit():
    assert load_page_policies()[0]["networks"] == {name: checkpoint_hash(name) for name in NETWORKS}, \
        "a network was replaced: fit the page's policy again (nbs/apps/page_policy)"


def test_a_policy_is_chosen_without_the_test_rooms():
    calibration, fallback, test, test_fallback = synthetic_study(n=150, n_rooms=8)
    first = fit_policy("crnn", "other", (calibration, fallback), (test, test_fallback))
    rng = np.random.default_rng(0)
    other = replace(test, abs_errors=rng.permutation(test.abs_errors))
    second = fit_policy("crnn", "other", (calibration, fallback), (other, test_fallback))
    assert (first.detector, first.threshold, first.quantiles) == (second.detector, second.threshold, second.quantiles)
    assert first.test["hybrid_mae"] != second.test["hybrid_mae"]
    with pytest.raises(DataError, match="overlap"):
        fit_policy("crnn", "other", (calibration, fallback), (calibration, fallback))


def test_a_gain_by_luck_routes_nothing():
    calibration, fallback, test, test_fallback = synthetic_study(n=150, n_rooms=8)
    rng = np.random.default_rng(1)
    naive, careful = 0, 0
    for _ in range(5):  # both systems err alike and independently of every score
        banks = [replace(bank, abs_errors=rng.gamma(2, 10, len(bank))) for bank in (calibration, test)]
        answers = [replace(table, abs_errors=rng.gamma(2, 10, len(table))) for table in (fallback, test_fallback)]
        policy = fit_policy("crnn", "other", (banks[0], answers[0]), (banks[1], answers[1]))
        careful += math.isfinite(policy.threshold)
        calibrated = attach_fallback(banks[0], answers[0])
        outcomes = CalibrationOutcomes(make_detector("entropy").score(calibrated), banks[0].abs_errors,
                                       answers[0].abs_errors, banks[0].group_ids)
        naive += (outcomes.scores > CostAware(0.0).fit(outcomes)).any()
    assert naive == 5 and careful <= 1


def test_shares_below_are_those_of_calibration():
    calibration, fallback, test, test_fallback = synthetic_study(n=150, n_rooms=8)
    policy = fit_policy("crnn", "other", (calibration, fallback), (test, test_fallback))
    scores = make_detector("entropy").score(calibration)
    for score in np.quantile(scores, [0.1, 0.5, 0.93]):
        assert policy.share_below("entropy", score) == pytest.approx((scores < score).mean(), abs=0.02)


def test_a_likelihood_ratio_grows_with_the_recording_so_no_threshold_of_it_is_kept(recording):
    assert "likelihood_ratio" not in DETECTORS
    once, twice = (ask_srp(np.tile(recording.samples, times), recording.geometry).physics(0.0) for times in (1, 2))
    gap = [p["log_likelihood_fallback"] - p["log_likelihood_network"] for p in (once, twice)]
    assert gap[1] / gap[0] == pytest.approx(2, rel=0.1)
    assert twice["srp_ratio"] == pytest.approx(once["srp_ratio"], rel=0.1)


@pytest.mark.parametrize("content, words", [("{}", "policies"), ("[1]", "expected"),
                                            ('{"about": {}, "policies": [{"network": "crnn"}]}', "expected"),
                                            ("{", "JSON")])
def test_a_foreign_policy_file_is_named(tmp_path, content, words):
    path = tmp_path / "policy.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        load_page_policies(path)
    assert "policy.json" in str(error.value)


def test_which_policy_a_recording_falls_under():
    own = named_array("6cm")
    assert array_kind("crnn", own) == array_kind("crnn", own.order("reference_first")) == "own"
    assert array_kind("crnn", own.rotated(45)) == "other"  # the same circle, but the channels stand elsewhere
    assert array_kind("crnn", named_array("6cm-5")) == "other" and array_kind("geonet", own) == "any"
    with pytest.raises(MissingDataError, match="geonet"):
        policy_for("geonet", own, [policy_for("crnn", own)])


# the explanation

def test_scores_are_those_of_the_banks(recording, explanation):
    probe = probe_of("crnn")
    of = ask(Question("6cm", SRPConfig(), FRAME_STEP), {"crnn": probe}, [recording], [0])["crnn"]
    one = np.array([0])
    bank = FeatureBank(of["predicted_angles"], of["gt_angles"], of["abs_errors"], one, np.array(["r"]),
                       np.array(["g"]), penultimate_features=of["penultimate_features"],
                       logits_pre_sig=of["logits_pre_sig"], predictions=of["predictions"], W=probe.head[0],
                       b=probe.head[1])
    bank = attach_fallback(bank, FallbackTable(of["srp_angle"], of["srp_error"], of["srp_confidence"], of["srp_ms"],
                                               one, {"srp_ratio": of["srp_ratio"]}))
    for line in explanation.scores:
        assert line.value == pytest.approx(make_detector(line.name).score(bank)[0], rel=1e-4, abs=1e-6), line.name
    assert explanation.answers.network_deg == of["predicted_angles"][0]
    assert explanation.answers.fallback_deg == of["srp_angle"][0]


def test_every_detector_of_the_page_can_be_fed_by_every_network(recording):
    for network in NETWORKS:
        probe = probe_of(network)
        bank = bank_of_one(probe.answer(recording.samples, recording.geometry, 16000),
                           ask_srp(recording.samples, recording.geometry), probe.head)
        assert not [name for name in DETECTORS if lacks(make_detector(name), bank)]


def test_the_truth_changes_nothing_but_the_picture(recording, explanation):
    blind = explain_recording(recording.samples, recording.geometry, network="crnn")
    assert blind.scores == explanation.scores and blind.answers.trusted == explanation.answers.trusted
    assert blind.answers.truth_deg is None and "truth" not in blind.answers.labels()


def test_the_decision_is_the_threshold(recording, explanation):
    line = next(line for line in explanation.scores if line.name == explanation.policy.detector)
    for threshold, trusted in ((line.value, "network"), (np.nextafter(line.value, -np.inf), "fallback")):
        policy = replace(explanation.policy, threshold=float(threshold))
        other = explain_recording(recording.samples, recording.geometry, network="crnn", policy=policy)
        assert other.answers.trusted == trusted
        assert other.azimuth_deg == getattr(other.answers, f"{trusted}_deg")
        assert ("so SRP-PHAT is trusted" in other.reason) == (trusted == "fallback")
    assert explain_recording(recording.samples, recording.geometry, network="crnn", policy=None).answers.trusted is None


def test_an_array_that_the_network_does_not_know_is_said(recording, explanation):
    assert any("simulated rooms" in note for note in explanation.notes)
    assert not any("trained for the array" in note for note in explanation.notes)
    array = named_array("6cm").rotated(45)
    assert any("trained for the array 6cm" in note for note in explain_recording(recording.samples, array,
                                                                                 network="crnn").notes)


@pytest.mark.parametrize("spoil, network, words", [
    (lambda x: x[:1], "geonet", "found 1 channels"), (lambda x: x * np.nan, "geonet", "NaN"),
    (lambda x: x * 0, "geonet", "silent"), (lambda x: x[:, :1600], "crnn", "too short"),
    (lambda x: x[0], "geonet", "shape"), (lambda x: x, "srp", "geonet")])
def test_recordings_that_cannot_be_explained_are_refused(recording, spoil, network, words):
    with pytest.raises(SslKitError, match=words):
        explain_recording(spoil(recording.samples), recording.geometry, network=network)


def test_the_picture_is_not_blank_and_shows_the_decision(explanation):
    picture = picture_of(explanation)
    assert picture.dtype == np.uint8 and picture.shape[2] == 4 and picture[..., :3].std() > 5
    turned = replace(explanation.answers, network_deg=explanation.answers.network_deg + 90)
    assert not np.array_equal(picture, picture_of(replace(explanation, answers=turned)))
    widths = [line.get_linewidth() for line in polar_figure(explanation).axes[0].lines]
    assert max(widths) > 3


# what people put in

@pytest.fixture(scope="module")
def wav(tmp_path_factory, recording):
    path = tmp_path_factory.mktemp("upload") / "talk <b>.wav"
    soundfile.write(path, recording.samples.T, 16000)
    return path


def test_an_upload_is_answered(wav):
    picture, text, player = answer_upload(str(wav), "6cm", "crnn", "90")
    assert picture.shape[2] == 4 and "<audio" in player
    assert "says" in text and all(word in text for word in ("Physics check", "Entropy", "simulated rooms"))


def spoiled(tmp_path, kind):
    path = tmp_path / "walk<i>.wav"
    if kind == "mono":
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    elif kind == "long":
        soundfile.write(path, np.zeros((int((MAX_SECONDS + 1) * 8000), 9), np.int16), 8000)
    elif kind == "text":
        path.write_text("not a sound")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (16000, 9)), 16000)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "silent":
        soundfile.write(path, np.zeros((16000, 9), np.int16), 16000)
    return path


@pytest.mark.parametrize("kind, words", [("mono", "9 mics, found 1 channels"), ("long", "at most 30 s"),
                                         ("text", "walk&lt;i&gt;.wav"), ("empty", "walk&lt;i&gt;.wav"),
                                         ("truncated", "truncated"), ("silent", "silent"), ("gone", "does not exist")])
def test_a_wrong_file_is_named_as_its_owner_calls_it(tmp_path, kind, words):
    path = spoiled(tmp_path, kind)
    picture, text, player = answer_upload(str(path), "6cm", "crnn")
    assert picture is None and player == "" and words in text
    assert "walk&lt;i&gt;.wav" in text and "<i>" not in text
    assert str(tmp_path) not in text  # where the server keeps files is nobody's business


def test_a_long_file_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(route_page, "read_for_array", lambda *_: pytest.fail("the file was decoded"))
    with pytest.raises(DataError, match="at most 30 s, found 31.0 s"):
        read_upload(spoiled(tmp_path, "long"), named_array("6cm"))


def test_no_file_is_no_crash():
    picture, text, _ = answer_upload(None, "6cm", "crnn")
    assert picture is None and "no recording" in text


@pytest.mark.parametrize("name", ["", None, "  ", "7cm", "/etc/array.yaml", "../array.csv", "uca:1000000:0.1",
                                  "uca:-4:1", "uca:4:nan", "<script>"])
def test_an_array_from_a_text_field_is_a_name_and_never_a_file(name, wav):
    with pytest.raises(ParameterError, match="array"):
        geometry_of(name)
    picture, text, _ = answer_upload(str(wav), name, "crnn")
    assert picture is None and "<script>" not in text


@pytest.mark.parametrize("text, value", [("", None), (None, None), (" 12,5° ", 12.5), ("-90", 270.0), (370, 10.0)])
def test_a_true_azimuth_from_a_text_field(text, value):
    assert truth_of(text) == value


@pytest.mark.parametrize("text", ["left", "inf", "nan", "1 2"])
def test_a_true_azimuth_that_is_none_is_said(text):
    with pytest.raises(ParameterError, match="true azimuth"):
        truth_of(text)


def test_examples_are_simulated_and_the_same_every_time(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = [example_file(1, "respeaker", tmp_path / folder) for folder in ("a", "b")]
    assert made[0][1] == made[1][1]
    first, second = (open(path, "rb").read() for path, _ in made)
    assert first == second and soundfile.info(made[0][0]).channels == 4


def test_html_marks_the_score_that_decided(explanation):
    for threshold, count in ((0.0, 1), (math.inf, 0)):
        policy = replace(explanation.policy, threshold=threshold)
        assert explanation_html(replace(explanation, policy=policy)).count("ssl-decides") == count
    assert explanation_html(replace(explanation, network="<x>", notes=("<y>",))).count("<y>") == 0


# the server

def test_the_page_listens_on_this_machine_unless_asked():
    parser = argparse.ArgumentParser()
    add_page_arguments(parser)
    assert parser.parse_args([]).host == "127.0.0.1"


def test_without_gradio_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    parser = argparse.ArgumentParser()
    add_page_arguments(parser)
    with pytest.raises(MissingDataError, match="pip install"):
        run_page(parser.parse_args([]))
    with pytest.raises(ParameterError, match="array"):
        run_page(parser.parse_args(["--array", "/etc/array.yaml"]))


PAGE = ("ssl_kit.apps.route_page", "add_page_arguments", "run_page")


@pytest.fixture(scope="module")
def served():
    """Port of a page that runs in a process of its own."""
    with page_server(PAGE, "--array", "6cm", "--network", "crnn") as port:
        yield port


@pytest.mark.slow
def test_a_taken_port_is_named(served):
    done = subprocess.run(page_command(PAGE, "--port", served), capture_output=True, text=True, timeout=240)
    assert done.returncode and f"--port {served}" in done.stderr and "choose another port" in done.stderr


@pytest.mark.slow
def test_files_of_the_server_cannot_be_asked_for(served, tmp_path):
    requests = pytest.importorskip("requests")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    assert requests.get(f"http://127.0.0.1:{served}/gradio_api/file={secret}", timeout=120).status_code in (403, 404)
    asked = requests.post(f"http://127.0.0.1:{served}/gradio_api/call/answer", timeout=120, json={
        "data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "6cm", "crnn", ""]})
    event = asked.json()["event_id"]
    said = requests.get(f"http://127.0.0.1:{served}/gradio_api/call/answer/{event}", timeout=120).text
    assert "event: error" in said and "secret.txt" not in said


@pytest.mark.slow
def test_the_page_answers_in_a_browser(served, wav, tmp_path):
    with open_browser(1500, 1000) as browser:
        def put(path):
            browser.one("#recording input[type=file]").send_keys(str(path))
            browser.one("#recording .file-preview")
            time.sleep(1)
            browser.one("#ask").click()

        browser.driver.get(f"http://127.0.0.1:{served}/")
        browser.one("#ask")
        put(wav)
        browser.one("#picture img")
        drawn = browser.driver.execute_async_script(
            "const done = arguments[0], i = document.querySelector('#picture img');"
            "i.decode().then(() => { const c = document.createElement('canvas'); c.width = i.naturalWidth;"
            "c.height = i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0);"
            "const d = x.getImageData(0, 0, c.width, c.height).data; let n = 0;"
            "for (let k = 0; k < d.length; k += 4) if (d[k] < 128 || d[k + 2] < 128) n++;"
            "done([c.width, c.height, n]); })")
        assert drawn[0] > 300 and drawn[2] > 500  # not blank
        assert "says" in browser.one("#text h2").text and browser.one("#player audio")
        browser.run("document.querySelector('#recording button[aria-label*=\"lear\"], "
                    "#recording button[aria-label*=\"emove\"]').click()")
        put(spoiled(tmp_path, "mono"))
        assert "found 1 channels" in browser.one("#text .ssl-error").text
        assert not browser.all("#picture img")
        browser.assert_stays_at(served)
