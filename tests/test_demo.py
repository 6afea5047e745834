"""The enhancement demo: limits before work, wrong files named, before and after alike, and the page in a browser."""

import argparse
import io
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
import torch
from browser import open_browser, page_server, wait_for

from ssl_kit.apps import demo, demo_page
from ssl_kit.apps.demo import (
    DemoLimits,
    DemoService,
    add_demo_arguments,
    check_header,
    offered_models,
    plain_name,
    run_demo,
    write_example,
)
from ssl_kit.apps.demo_page import answer_html, build_demo_page, pooled_power, spectrograms_html
from ssl_kit.enhance.checkpoints import save_checkpoint
from ssl_kit.enhance.enhancer import SHIPPED
from ssl_kit.enhance.final_net import FinalConfig, FinalNet
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, SslKitError
from ssl_kit.lab.stft import stft


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny network that was never trained and yet does something."""
    torch.manual_seed(0)
    network = FinalNet(FinalConfig(blocks=1, channels=16, time_hidden=16, frequency_hidden=8))
    with torch.no_grad():
        network.network.last.weight *= 20
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", network)


@pytest.fixture
def service(checkpoint, tmp_path):
    return DemoService(tmp_path / "page", offered_models(str(checkpoint)))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("example"))


def noise(seconds=1.0, rate=16000, channels=1, level=0.1):
    return level * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))


# which networks

def test_shipped_networks_are_those_that_are_there(monkeypatch):
    def only(name):
        if name not in ("dpt", "final"):
            raise MissingDataError(name)
    monkeypatch.setattr(demo, "shipped_checkpoint", only)
    assert list(offered_models()) == ["final", "dpt"]
    assert set(demo.ABOUT_MODELS) == set(SHIPPED)


def test_without_any_network_the_message_says_what_to_do(monkeypatch):
    def none(name):
        raise MissingDataError(name)
    monkeypatch.setattr(demo, "shipped_checkpoint", none)
    with pytest.raises(MissingDataError, match="train-enhance.*--model FOLDER"):
        offered_models()
    parser = argparse.ArgumentParser()
    add_demo_arguments(parser)
    with pytest.raises(MissingDataError, match="enhance_final"):
        run_demo(parser.parse_args([]))


def test_a_folder_comes_first_and_its_path_is_not_told(checkpoint, tmp_path):
    assert next(iter(offered_models(str(checkpoint)))) == "tiny"
    shutil.copytree(checkpoint, tmp_path / "final")
    assert next(iter(offered_models(str(tmp_path / "final")))) == "final (own)"
    with pytest.raises(MissingDataError, match="checkpoint"):
        offered_models(str(tmp_path))
    with pytest.raises(ParameterError, match="did you mean 'final'"):
        offered_models("finale")


@pytest.mark.parametrize("name", [None, "", "finale", "/etc", "../tiny", "<b>"])
def test_a_model_from_outside_is_a_name_and_never_a_path(service, example, name):
    with pytest.raises(ParameterError, match="model: expected one of tiny"):
        service.enhance(example[0], name)


# what people put in

def spoiled(folder, kind):
    folder.mkdir(exist_ok=True)
    path = folder / "walk<i>.wav"
    if kind == "text":
        path.write_text("not a sound\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "nan":
        soundfile.write(path, np.where(np.arange(16000) == 9000, np.nan, 0.1), 16000, subtype="FLOAT")
    elif kind == "silent":
        soundfile.write(path, np.zeros(16000), 16000)
    elif kind == "short":
        soundfile.write(path, noise(0.05), 16000)
    elif kind == "long":
        soundfile.write(path, np.zeros(61 * 8000, np.int16), 8000)
    elif kind == "slow":
        soundfile.write(path, noise(1, 4000), 4000)
    elif kind == "wide":
        soundfile.write(path, noise(channels=9), 16000)
    elif kind == "fast":
        soundfile.write(path, noise(0.2, 384000), 384000)
    elif kind == "truncated":
        soundfile.write(path, noise(), 16000)
        path.write_bytes(path.read_bytes()[:9000])
    return path


@pytest.mark.parametrize("kind, words", [
    ("text", "cannot be opened as audio"), ("empty", "empty"), ("nan", "NaN"), ("silent", "silent"),
    ("short", "too short: expected at least 0.1 s, found 0.050 s"), ("long", "at most 1 min, found 1.0 min"),
    ("slow", "8000 to 192000 samples per second, found 4000"), ("fast", "found 384000"),
    ("wide", "at most 8 channels, found 9"), ("truncated", "truncated"), ("gone", "does not exist")])
def test_a_wrong_file_is_named_and_leaves_nothing_behind(service, checkpoint, tmp_path, kind, words):
    service = DemoService(tmp_path / "page", service.models, DemoLimits(max_minutes=1))
    with pytest.raises(SslKitError, match=words) as error:
        service.enhance(spoiled(tmp_path / "in", kind), "tiny")
    assert "walk<i>.wav" in str(error.value) and str(tmp_path) not in str(error.value)
    assert not list(service.folder.glob("*"))


def test_a_long_or_large_file_is_refused_by_its_header(service, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "stream_audio", lambda *_: pytest.fail("the file was decoded"))
    service = DemoService(tmp_path / "page", service.models, DemoLimits(max_minutes=1))
    with pytest.raises(DataError, match="at most 1 min"):
        service.enhance(spoiled(tmp_path / "in", "long"), "tiny")
    monkeypatch.setattr(demo, "audio_info", lambda *_: pytest.fail("the file was opened"))
    (tmp_path / "big.wav").touch()
    os.truncate(tmp_path / "big.wav", 257_000_000)
    with pytest.raises(DataError, match="big.wav: expected at most 256 MB, found 257 MB"):
        check_header(tmp_path / "big.wav", DemoLimits())


def test_no_file_is_no_crash(service):
    with pytest.raises(MissingDataError, match="no recording"):
        service.enhance(None, "tiny")


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(service, example, strength):
    with pytest.raises(ParameterError, match="strength"):
        service.enhance(example[0], "tiny", strength)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(minutes):
    with pytest.raises(ParameterError, match="--max-minutes"):
        DemoLimits(max_minutes=minutes)


@pytest.mark.parametrize("name, kept", [
    ("../../etc/passwd", "etcpasswd"), ("<img src=x onerror=alert(1)>", "img srcx onerroralert1"), ("...", "recording"),
    ("a\x00b\n", "ab"), ("день", "день"), ("x" * 300, "x" * 60), ("", "recording"), (" .hidden. ", "hidden")])
def test_names_of_results_are_tame(name, kept):
    assert plain_name(name) == kept


# before and after

@pytest.mark.parametrize("suffix, rate, channels, subtype, kept", [
    (".wav", 44100, 2, "PCM_24", ("WAV", "PCM_24")), (".wav", 8000, 1, "ULAW", ("FLAC", "PCM_16")),
    (".wav", 48000, 1, "FLOAT", ("WAV", "FLOAT")), (".flac", 22050, 3, "PCM_16", ("FLAC", "PCM_16")),
    (".aiff", 16000, 2, "FLOAT", ("FLAC", "PCM_24")), (".ogg", 48000, 2, "VORBIS", ("FLAC", "PCM_16"))])
def test_rate_length_and_channels_stay(service, tmp_path, suffix, rate, channels, subtype, kept):
    path = tmp_path / f"talk{suffix}"
    soundfile.write(path, noise(0.7, rate, channels), rate, subtype=subtype)
    given = soundfile.info(path)
    answer = service.enhance(path, "tiny")
    for made in (answer.before, answer.after):
        info = soundfile.info(made)
        assert (info.samplerate, info.frames, info.channels) == (rate, given.frames, channels)
        assert (info.format, info.subtype) == kept
    before, after = (soundfile.read(made)[0] for made in (answer.before, answer.after))
    assert np.allclose(before, soundfile.read(path)[0], atol=2 ** -14)   # no change of level
    assert np.std(after) > 0.01 and not np.allclose(before, after, atol=1e-3)


def test_strength_nought_gives_the_recording_back_bit_for_bit(service, tmp_path):
    soundfile.write(tmp_path / "talk.wav", noise(channels=2), 16000)
    answer = service.enhance(tmp_path / "talk.wav", "tiny", 0.0)
    given, after = (soundfile.read(path, dtype="int16")[0] for path in (tmp_path / "talk.wav", answer.after))
    assert np.array_equal(given, after) and "Untouched" in answer_html(answer)


def test_the_loudest_channel_is_drawn(service, tmp_path):
    soundfile.write(tmp_path / "talk.wav", noise(channels=2) * [1e-4, 1], 16000)
    answer = service.enhance(tmp_path / "talk.wav", "tiny")
    assert answer.channel == 1 and "Channel 2 has the most power" in answer_html(answer)


def test_progress_runs_to_its_end(service, example):
    shares = []
    service.enhance(example[0], "tiny", progress=shares.append)
    assert shares and shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_stale_results_are_removed_and_fresh_ones_stay(service, example):
    old, fresh = (service.enhance(example[0], "tiny", 0.0) for _ in range(2))
    os.utime(old.after.parent, (0, time.time() - 2 * service.keep_s))
    service.enhance(example[0], "tiny", 0.0)
    assert not old.after.parent.exists() and fresh.after.exists()


# the reference

def test_measures_before_and_after(service, example):
    noisy, clean = example
    answer = service.enhance(noisy, "tiny", 0.0, clean)
    assert answer.measures["before"] == answer.measures["after"]
    assert answer.measures["before"]["si_sdr"] == pytest.approx(3, abs=0.3)
    html = answer_html(service.enhance(noisy, "tiny", 1.0, clean))
    assert all(word in html for word in ("PESQ", "STOI", "SI-SDR", "before", "after"))
    same = service.enhance(clean, "tiny", 0.0, clean)
    assert same.measures["after"]["pesq"] > 4.6 and "∞" in answer_html(same)


@pytest.mark.parametrize("rate, seconds, channels, words", [
    (8000, 1.0, 1, "the rate 16000 samples per second, found 8000"), (16000, 0.9, 1, "the length 16000 samples, found"),
    (16000, 1.0, 3, "one channel or 2")])
def test_a_reference_that_does_not_fit_costs_the_measures_alone(service, tmp_path, rate, seconds, channels, words):
    soundfile.write(tmp_path / "talk.wav", noise(channels=2), 16000)
    soundfile.write(tmp_path / "clean<b>.wav", noise(seconds, rate, channels), rate)
    answer = service.enhance(tmp_path / "talk.wav", "tiny", reference=tmp_path / "clean<b>.wav")
    assert answer.after.exists() and answer.measures is None and words in answer.reference_error
    html = answer_html(answer)
    assert "clean&lt;b&gt;.wav" in html and "<b>" not in html and str(tmp_path) not in html


def test_a_silent_reference_or_too_little_speech_is_said(service, tmp_path):
    soundfile.write(tmp_path / "talk.wav", noise(0.3), 16000)
    soundfile.write(tmp_path / "clean.wav", np.zeros(4800), 16000)
    html = answer_html(service.enhance(tmp_path / "talk.wav", "tiny", reference=tmp_path / "clean.wav"))
    assert "silent" in html and "–" in html


def test_only_the_first_half_minute_is_measured_and_that_is_said(service, example, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MEASURED_S", 2.0)
    monkeypatch.setattr(demo_page, "MEASURED_S", 2.0)
    noisy, rate = soundfile.read(example[0])
    spoilt = noisy.copy()
    spoilt[2 * rate:] = 0.01
    soundfile.write(tmp_path / "noisy.wav", spoilt, rate)
    soundfile.write(tmp_path / "whole.wav", noisy, rate)
    answers = [service.enhance(tmp_path / name, "tiny", 0.0, example[1]) for name in ("noisy.wav", "whole.wav")]
    assert answers[0].measures == answers[1].measures and "first 2 s" in answer_html(answers[0])


# the picture

@pytest.mark.parametrize("seconds", [0.1, 1.0, 7.99, 21.3])
def test_columns_are_means_over_all_frames(tmp_path, seconds):
    samples = noise(seconds)[:, 0].astype(np.float32)
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    pooled = pooled_power(tmp_path / "x.wav", 0, seconds, 40)
    power = np.abs(stft(np.pad(samples, (256, 4 * 128 * 100)), 512, 128, center=False)) ** 2
    per_column = max(1, int(np.ceil(seconds * 125 / 40)))
    assert pooled.shape == (257, int(np.ceil(seconds * 125 / per_column)))
    n = pooled.shape[1]
    expected = power[:, :n * per_column].reshape(257, n, per_column).mean(axis=2)
    assert np.allclose(pooled, expected, rtol=1e-3, atol=1e-6)


def test_a_click_is_seen_in_a_long_recording(tmp_path):
    samples = np.zeros(100 * 8000, np.float32)
    samples[50 * 8000] = 1.0
    soundfile.write(tmp_path / "x.wav", samples, 8000, subtype="FLOAT")
    power = pooled_power(tmp_path / "x.wav", 0, 100.0, 100).sum(axis=0)
    assert abs(int(power.argmax()) - power.size // 2) <= 1 and power.max() > 100 * np.median(power)


def test_the_picture_takes_the_colour_of_the_text(service, example):
    html = spectrograms_html(service.enhance(example[0], "tiny"))
    assert html.count("<image") >= 2 and "currentColor" in html and "#010203" not in html
    assert all(f">{word}</text>" in html for word in ("before", "after", "kHz", "seconds", "dB below the loudest"))
    assert "<svg width" not in html and len(html) < 500_000


# the server

def test_the_demo_listens_on_this_machine_unless_asked():
    parser = argparse.ArgumentParser()
    add_demo_arguments(parser)
    assert parser.parse_args([]).host == "127.0.0.1"


def test_without_gradio_the_message_says_how_to_get_it(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "gradio", None)
    parser = argparse.ArgumentParser()
    add_demo_arguments(parser)
    with pytest.raises(MissingDataError, match="pip install"):
        run_demo(parser.parse_args(["--model", str(checkpoint)]))


def test_the_page_reports_to_nobody_and_works_on_one_thing_at_a_time(service):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'gradio>=6,<7'")
    page = build_demo_page(service)
    assert page.analytics_enabled is False and page.delete_cache == (600, 3600)
    work = [function for function in page.fns.values() if function.concurrency_id == "network"]
    assert work and all(function.concurrency_limit == 1 for function in work)


PAGE = ("ssl_kit.apps.demo", "add_demo_arguments", "run_demo")


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """Port of a page that runs in a process of its own, and where its files lie."""
    temporary = tmp_path_factory.mktemp("served")
    with page_server(PAGE, "--model", checkpoint, "--max-minutes", "0.5", TMPDIR=str(temporary)) as port:
        yield port, temporary
    assert not list(temporary.glob("ssl_kit_page_*"))  # nothing of what was uploaded is left


@pytest.mark.slow
def test_files_of_the_server_cannot_be_asked_for(served, tmp_path, checkpoint):
    requests = pytest.importorskip("requests")
    port, _ = served
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, noise(), 16000)
    api = f"http://127.0.0.1:{port}/gradio_api"
    assert requests.get(f"{api}/file={secret}", timeout=120).status_code in (403, 404)
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    for data in ([file, "tiny", 1.0, None], [None, str(checkpoint), 1.0, None], [None, "tiny", 1.0, file]):
        asked = requests.post(f"{api}/call/enhance", timeout=120, json={"data": data})
        said = requests.get(f"{api}/call/enhance/{asked.json()['event_id']}", timeout=120).text
        assert "event: error" in said and "secret" not in said


HOSTILE = ("../../../etc/passwd.wav", "..\\..\\boot.wav", "/etc/cron.d/x.wav", "%2e%2e%2fx.wav",
           "$(touch x).wav", "-rf.wav", "<img src=x onerror=alert(1)>.wav", "x" * 300 + ".wav", "\u202egnp.wav",
           ".hidden.wav", "a;b&c|d.wav", "con.wav", "two\nlines.wav", "caf\u00e9 \U0001f50a.wav", "no_suffix", " .wav")


@pytest.mark.slow
def test_fifty_uploads_at_once_with_hostile_names(served, tmp_path):
    """Each is enhanced or refused in words, none is taken for another, nothing lands outside of the page's folder."""
    requests = pytest.importorskip("requests")
    port, temporary = served
    api = f"http://127.0.0.1:{port}/gradio_api"
    before = {path for path in tmp_path.parent.rglob("*") if temporary not in path.parents}

    def one(k):
        seconds, name = 0.3 + 0.01 * k, HOSTILE[k % len(HOSTILE)]
        path = tmp_path / f"{k}.wav"
        soundfile.write(path, noise(seconds), 16000)
        sent = requests.post(f"{api}/upload", files={"files": (name, path.read_bytes(), "audio/wav")}, timeout=300)
        if sent.status_code != 200:
            return f"refused: {name!r} {sent.text[:80]}"
        file = {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        for _ in range(300):                                         # few may wait in line; the others hear that
            asked = requests.post(f"{api}/call/enhance", timeout=300, json={"data": [file, "tiny", 1.0, None]})
            if asked.status_code == 200:
                break
            assert "Queue is full" in asked.text
            time.sleep(1)
        said = requests.get(f"{api}/call/enhance/{asked.json()['event_id']}", timeout=300).text
        if "event: error" in said:
            return f"refused: {name!r} {said[:80]}"
        assert "<img src=x" not in said and "../" not in said
        result = re.search(r'"url": ?"[^"]*?(/file=[^"]+)"', said)[1]
        heard, rate = soundfile.read(io.BytesIO(requests.get(api + result, timeout=300).content))
        assert rate == 16000 and len(heard) == round(seconds * 16000)  # its own, not another's
        return "enhanced"

    with ThreadPoolExecutor(50) as pool:
        told = list(pool.map(one, range(50)))
    assert told.count("enhanced") == 50, sorted(set(told))
    made = {path for path in tmp_path.parent.rglob("*") if temporary not in path.parents} - before
    assert {path.name for path in made if path.is_file()} == {f"{k}.wav" for k in range(50)}
    assert requests.get(f"http://127.0.0.1:{port}/", timeout=120).status_code == 200


@pytest.mark.slow
def test_the_demo_enhances_in_a_browser(served, example, tmp_path):
    port, _ = served
    noisy, clean = example
    (tmp_path / "walk.wav").write_text("not a sound")
    with open_browser(1300, 1400, tmp_path) as browser:
        def put(where, path):
            for button in browser.all(f"{where} button[aria-label='Clear']"):
                browser.run("arguments[0].click()", button)
            browser.one(f"{where} input[type=file]").send_keys(str(path))
            browser.one(f"{where} button[aria-label='Clear']")
            time.sleep(1)

        def says(*words):
            return wait_for(lambda: all(word in browser.all("#text")[0].text for word in words), words)

        def downloaded():
            browser.click("#download")
            return wait_for(lambda: list(tmp_path.glob("example_noisy_enhanced.wav")), "download")[0]

        browser.driver.get(f"http://127.0.0.1:{port}/")
        put("#recording", noisy)
        put("#reference", clean)
        browser.click("#ask")
        says("Enhanced by tiny", "PESQ", "STOI", "SI-SDR")
        drawn = browser.one("#picture svg").rect
        assert drawn["width"] > 300 and drawn["height"] > 200
        wait_for(lambda: browser.requests(quote("example_noisy_enhanced.wav")), "request of the result by its player")
        saved = downloaded()
        heard, rate = soundfile.read(saved)
        given, given_rate = soundfile.read(noisy)
        assert rate == given_rate and heard.shape == given.shape
        assert np.sqrt(np.mean(heard ** 2)) > 0.01 and not np.array_equal(heard, given)
        length = wait_for(lambda: browser.all("#after #duration")[0].text, "duration in the player")
        assert length == f"0:{int(len(given) / rate):02d}"

        browser.run("const [field, value] = arguments; field.value = value;"
                    "field.dispatchEvent(new Event('input', {bubbles: true}));"
                    "field.dispatchEvent(new Event('change', {bubbles: true}))",
                    browser.one("#strength input[type=number]"), "0")
        saved.unlink()
        browser.click("#ask")
        says("Untouched", "strength 0.00")
        assert np.array_equal(soundfile.read(downloaded())[0], given)

        put("#recording", tmp_path / "walk.wav")
        browser.click("#ask")
        says("Not possible", "walk.wav", "cannot be opened as audio")
        assert not browser.all("#picture svg")
        browser.assert_stays_at(port)
