"""Before and after: what is heard is what the enhancer gives, measures are of this strength, other mixtures follow."""

import base64
import io
import re
import sys

import numpy as np
import pytest
import soundfile

from ssl_kit.enhance.enhancer import load_enhancer
from ssl_kit.enhance.explorer import MEASURES, Mixture, example_mixtures, measures_html, read_mixture
from ssl_kit.enhance.metrics import evaluate_pair
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError


@pytest.fixture(scope="module")
def mixtures():
    first, second = example_mixtures(2).values()
    return {"first": first, "second": second, "no reference": Mixture(second.noisy[:24000])}


@pytest.fixture
def explorer(mixtures):
    pytest.importorskip("ipywidgets")
    from ssl_kit.enhance.explorer import EnhancementExplorer

    return EnhancementExplorer(mixtures, ("final_causal", "crn"))


def sounds(html):
    "Samples of the players by name."
    found = {}
    for name, data in re.findall(r"(\w[\w ]*)<br>.*?base64,([A-Za-z0-9+/=]+)", html, re.S):
        found[name], rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert rate == 16000
    return found


def test_examples_are_of_speech_and_noise_that_no_network_knows(mixtures):
    assert all(mixture.noisy.dtype == np.float32 for mixture in mixtures.values())
    assert len(example_mixtures(3)) == 3 and all("dB" in name for name in example_mixtures(3))


@pytest.mark.parametrize("strength", [0.0, 0.35, 1.0])
def test_what_is_shown_is_what_the_enhancer_gives_at_that_strength(explorer, mixtures, strength):
    explorer.strength.value = strength
    expected = load_enhancer("final_causal").enhance(mixtures["first"].noisy[None], 16000, explorer.strength.value)[0]
    np.testing.assert_allclose(explorer.enhanced, expected, atol=1e-6)


def test_measures_are_of_this_strength_and_stand_in_the_table(explorer, mixtures):
    explorer.strength.value = 0.5
    clean, noisy = mixtures["first"].clean, mixtures["first"].noisy
    for when, signal in (("before", noisy), ("after", explorer.enhanced)):
        assert explorer.measures[when] == evaluate_pair(clean, signal, tuple(MEASURES))
    gain_db = explorer.measures["after"]["si_sdr"] - explorer.measures["before"]["si_sdr"]
    assert f"{gain_db:+.1f}" in explorer.numbers.value and gain_db > 1
    explorer.strength.value = 0
    assert explorer.measures["before"] == explorer.measures["after"]


def test_players_share_a_scale_and_add_up(explorer, mixtures):
    heard = sounds(explorer.players.value)
    assert set(heard) == {"before", "after", "clean", "taken away"}
    mixture = mixtures["first"]
    peak = max(np.abs(part).max() for part in (mixture.noisy, mixture.clean, explorer.enhanced))
    for name, samples in (("before", mixture.noisy), ("after", explorer.enhanced), ("clean", mixture.clean)):
        np.testing.assert_allclose(heard[name], samples / peak, atol=1e-4)
    removed = mixture.noisy - explorer.enhanced
    np.testing.assert_allclose(heard["taken away"], removed / np.abs(removed).max(), atol=1e-4)


def test_every_control_changes_what_is_seen_and_a_network_runs_once(explorer, monkeypatch):
    seen = {bytes(explorer.picture.value)}
    for change in (lambda: setattr(explorer.model, "value", "crn"), lambda: setattr(explorer.strength, "value", 0.5),
                   lambda: setattr(explorer.mixture, "value", "second")):
        change()
        assert bytes(explorer.picture.value).startswith(b"\x89PNG")
        seen.add(bytes(explorer.picture.value))
    assert len(seen) == 4
    monkeypatch.setattr("ssl_kit.enhance.enhancer.Enhancer.enhance", lambda *_: pytest.fail("ran again"))
    explorer.mixture.value = "first"
    explorer.strength.value = 0.2


def test_without_a_reference_there_is_all_but_measures(explorer):
    explorer.mixture.value = "no reference"
    assert explorer.measures is None and "no measures" in explorer.numbers.value
    assert set(sounds(explorer.players.value)) == {"before", "after", "taken away"}
    assert explorer.start.layout.display == "none" and explorer.mixture.layout.display is None


def test_a_long_one_can_be_leafed_through(mixtures):
    pytest.importorskip("ipywidgets")
    from ssl_kit.enhance.explorer import EnhancementExplorer

    long = Mixture(np.concatenate([mixtures["first"].noisy, mixtures["second"].noisy]))
    explorer = EnhancementExplorer(long, ("final_causal",))
    assert explorer.start.layout.display is None and explorer.start.max == pytest.approx(len(long.noisy) / 16000 - 4)
    before = bytes(explorer.picture.value)
    explorer.start.value = 2.0
    assert bytes(explorer.picture.value) != before


def test_a_network_that_cannot_be_had_is_said_and_the_others_still_work(mixtures, tmp_path):
    pytest.importorskip("ipywidgets")
    from ssl_kit.enhance.explorer import EnhancementExplorer

    explorer = EnhancementExplorer(mixtures["no reference"], (f"{tmp_path}/<none>", "final_causal"))
    assert "&lt;none&gt;" in explorer.numbers.value and explorer.players.value == ""
    explorer.model.value = "final_causal"
    assert "no measures" in explorer.numbers.value and "<audio" in explorer.players.value


def test_silence_and_files_work_too(tmp_path):
    pytest.importorskip("ipywidgets")
    from ssl_kit.enhance.explorer import EnhancementExplorer

    assert "level" in EnhancementExplorer(Mixture(np.zeros(16000)), ("final_causal",)).numbers.value
    rng = np.random.default_rng(0)
    for name in ("noisy", "clean"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(48000), 48000)
    mixture = read_mixture(tmp_path / "noisy.wav", tmp_path / "clean.wav")
    assert mixture.noisy.shape == mixture.clean.shape == (16000,) and read_mixture(tmp_path / "noisy.wav").clean is None


def test_what_does_not_fit_is_named(mixtures, monkeypatch):
    from ssl_kit.enhance.explorer import EnhancementExplorer

    with pytest.raises(DataError, match=r"same length, found \(10,\) and \(9,\)"):
        Mixture(np.ones(10), np.ones(9))
    with pytest.raises(ParameterError, match="at least one"):
        EnhancementExplorer({})
    text = measures_html(*[{"pesq": np.nan, "stoi": 0.5, "si_sdr": 1.0, "reason": "no <speech>"}] * 2)
    assert "–" in text and "no &lt;speech&gt;" in text
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingDataError, match="ipywidgets"):
        EnhancementExplorer(mixtures)
