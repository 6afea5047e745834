"""Azimuth spectra: the cube adds up to the localizers' own maps, sliders show what they say, truth is where it is."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_kit.arrays.angles import angular_error_deg
from ssl_kit.arrays.geometry import far_field_delays_s, load_geometry, named_array
from ssl_kit.arrays.recordings import Recording
from ssl_kit.lab.dataroot import data_root
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.localize.baselines import MVDR, BaselineConfig
from ssl_kit.localize.explorer import METHODS, azimuth_cube, slices_figure, truth_track_deg
from ssl_kit.localize.protocol import read_for_array
from ssl_kit.localize.srp import SRP

RING = named_array("uca:6:0.05")
CONFIG = BaselineConfig(n_azimuth=90)


def wave(azimuth_deg, band_hz=(0, 8000), seconds=1.0, seed=0):
    n = round(16000 * seconds)
    frequency_hz = np.fft.rfftfreq(n, 1 / 16000)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    spectrum[(frequency_hz < band_hz[0]) | (frequency_hz > band_hz[1])] = 0
    delays_s = far_field_delays_s(RING.positions_m, azimuth_deg)
    return np.fft.irfft(spectrum * np.exp(-2j * np.pi * frequency_hz * delays_s[:, None]), n).astype(np.float32)


def noise(seconds=1.0):
    return 0.01 * np.random.default_rng(9).standard_normal((6, round(16000 * seconds))).astype(np.float32)


@pytest.fixture
def recordings():
    still = Recording(np.concatenate([wave(40), wave(200)], axis=1) + noise(2), 16000, RING,
                      np.repeat([40.0, 200.0], 10))
    both = wave(60, (300, 2000)) + wave(280, (2200, 4000), seed=1) + noise()
    return {"two in turn": still, "two at once": Recording(both, 16000, RING, 60.0, meta={"azimuths_deg": [60, 280]}),
            "nobody knows": Recording(wave(10) + noise(), 16000, RING)}


@pytest.fixture
def explorer(recordings):
    pytest.importorskip("ipywidgets")
    from ssl_kit.localize.explorer import SpectrumExplorer

    return SpectrumExplorer(recordings, config=CONFIG, n_bands=6)


def test_one_block_and_one_band_are_the_localizers_own_maps():
    samples = wave(123) + noise()
    mvdr = azimuth_cube(samples, RING, method="mvdr", block_s=None, n_bands=1, config=CONFIG, loading=1e-3)
    np.testing.assert_allclose(mvdr.power[0, 0], MVDR(n_azimuth=90)(samples, RING).score[0], atol=1e-12)
    srp = azimuth_cube(samples, RING, method="srp", block_s=None, n_bands=1, config=CONFIG)
    score = SRP(n_fft=512, n_azimuth=90)(samples, RING).score[0]
    np.testing.assert_allclose(srp.power[0, 0], np.clip((1 + 5 * score) / 6, 0, 1), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_bands_and_blocks_average_to_the_whole(method):
    samples = wave(123, seconds=1.0) + noise()
    fine = azimuth_cube(samples, RING, method=method, n_bands=118, config=CONFIG)
    coarse = azimuth_cube(samples, RING, method=method, n_bands=1, config=CONFIG)
    np.testing.assert_allclose(fine.power.mean(axis=1), coarse.power[:, 0], atol=1e-5)
    assert fine.power.shape == (4, 118, 90) and coarse.times_s.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert fine.power.min() >= 0 and fine.power.max() <= 1 + 1e-6
    np.testing.assert_allclose(coarse.edges_hz, [9.5 * 31.25, 127.5 * 31.25])


@pytest.mark.parametrize("method", METHODS)
def test_each_slice_has_the_source_of_its_time_and_band(recordings, method):
    turn = azimuth_cube(recordings["two in turn"].samples, RING, method=method, config=CONFIG)
    peaks = 4 * turn.over_time_db().argmax(axis=1)
    assert (angular_error_deg(peaks[:4], 40) <= 4).all() and (angular_error_deg(peaks[4:], 200) <= 4).all()
    once = azimuth_cube(recordings["two at once"].samples, RING, method=method, n_bands=6, config=CONFIG)
    middle_hz = (once.edges_hz[1:] + once.edges_hz[:-1]) / 2
    peaks = 4 * once.over_frequency_db().argmax(axis=1)
    assert (angular_error_deg(peaks[middle_hz < 1900], 60) <= 8).all()
    assert (angular_error_deg(peaks[middle_hz > 2400], 280) <= 8).all()


def test_levels_are_slices_of_the_power(recordings):
    cube = azimuth_cube(recordings["two in turn"].samples, RING, config=CONFIG, n_bands=6)
    np.testing.assert_allclose(cube.level_db(2, 3), 10 * np.log10(cube.power[2, 3]))
    np.testing.assert_allclose(cube.level_db(), 10 * np.log10(cube.power.mean(axis=(0, 1))))
    np.testing.assert_array_equal(cube.over_time_db(3)[2], cube.level_db(2, 3))
    np.testing.assert_array_equal(cube.over_frequency_db(2)[3], cube.level_db(2, 3))


def test_a_silent_second_is_dark_and_breaks_nothing():
    samples = np.concatenate([wave(40), np.zeros((6, 16000), np.float32)], axis=1)
    cube = azimuth_cube(samples, RING, config=CONFIG)
    assert cube.over_time_db()[-1].max() == -60 and cube.over_time_db()[0].max() > -0.5


def test_truth_follows_the_labels(recordings):
    track = truth_track_deg(recordings["two in turn"], [0.0, 0.95, 1.05, 5.0])
    assert track[:, 0].tolist() == [40, 40, 200, 200]
    assert truth_track_deg(recordings["two at once"], [0, 1]).tolist() == [[60, 280], [60, 280]]
    assert truth_track_deg(recordings["nobody knows"], [0, 1]).shape == (2, 0)


def test_every_control_changes_what_is_seen_and_cubes_are_made_once(explorer):
    seen = {bytes(explorer.picture.value)}
    for change in (lambda: setattr(explorer.time, "value", 2), lambda: setattr(explorer.band, "value", 1),
                   lambda: setattr(explorer.span, "value", 30), lambda: setattr(explorer.method, "value", "srp"),
                   lambda: setattr(explorer.recording, "value", "two at once")):
        change()
        assert bytes(explorer.picture.value).startswith(b"\x89PNG")
        seen.add(bytes(explorer.picture.value))
    assert len(seen) == 6 and explorer._cube() is explorer._cube()


def test_numbers_are_those_of_the_slice(explorer):
    assert explorer.numbers.value.count("choose a time") == 1  # the talker is at two places
    explorer.time.value = 6
    np.testing.assert_array_equal(explorer.level_db, explorer.cube.level_db(6, None))
    assert "Highest: <b>200" in explorer.numbers.value.replace("199.9", "200") and "off by 0." in explorer.numbers.value
    explorer.band.value = 4
    np.testing.assert_array_equal(explorer.level_db, explorer.cube.level_db(6, 4))


def test_another_recording_has_its_own_sliders_truth_and_sound(explorer):
    explorer.time.value = 6
    sound = explorer.player.value
    explorer.recording.value = "two at once"
    assert explorer.time.label == "all" and len(explorer.time.options) == 5
    assert explorer.numbers.value.count("truth") == 2 and explorer.player.value != sound
    explorer.recording.value = "nobody knows"
    assert "truth" not in explorer.numbers.value and "<audio" in explorer.player.value


def test_the_picture_has_sliders_truth_and_answer(recordings):
    cube = azimuth_cube(recordings["two in turn"].samples, RING, config=CONFIG, n_bands=6)
    track = truth_track_deg(recordings["two in turn"], cube.times_s)
    figure = slices_figure(cube, 6, 2, track)
    time, frequency, _, polar = figure.axes
    assert [line.get_ydata()[0] for line in time.lines[:2]] == [1.5, 1.75]
    np.testing.assert_array_equal(time.lines[2].get_xdata(), track[:, 0])
    assert frequency.lines[0].get_ydata()[0] == pytest.approx(cube.edges_hz[2] / 1000)
    spokes = [np.degrees(line.get_xdata()[0]) for line in polar.lines[1:]]
    assert angular_error_deg(spokes[0], 200) <= 4 and spokes[1] == pytest.approx(200)
    assert len(slices_figure(cube, None, 2, track).axes[3].lines) == 2  # a source that moves is no spoke


def test_what_does_not_fit_is_named(recordings, monkeypatch):
    samples = wave(40)
    for named, given in (("method: expected one of mvdr, srp", {"method": "music"}),
                         ("block_s: expected at least 0.128 s", {"block_s": 0.1}),
                         (r"n_bands: expected 1\.\.118", {"n_bands": 119})):
        with pytest.raises(ParameterError, match=named):
            azimuth_cube(samples, RING, **given)
    with pytest.raises(DataError, match="one block of 5 s, found 1 s"):
        azimuth_cube(samples, RING, block_s=5)
    with pytest.raises(DataError, match="6 mics, found 4"):
        azimuth_cube(samples[:4], RING)
    cube = azimuth_cube(samples, RING, config=CONFIG)
    with pytest.raises(DataError, match=r"track_deg: expected \(4, source\), found \(3, 1\)"):
        slices_figure(cube, track_deg=np.zeros((3, 1)))
    from ssl_kit.localize.explorer import SpectrumExplorer

    with pytest.raises(ParameterError, match="at least one"):
        SpectrumExplorer({})
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingDataError, match="ipywidgets"):
        SpectrumExplorer(recordings)


def test_two_real_talkers_are_both_in_the_cube():
    root = data_root(required=False)
    folder = Path(root) / "respeaker" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip("needs respeaker/ below SSL_KIT_DATA")
    array = load_geometry("respeaker")
    cube = azimuth_cube(read_for_array(folder / "az180_az225_50cm_1a9b2d80.wav", array), array)
    peaks = 2 * cube.over_time_db().argmax(axis=1)
    near = [(angular_error_deg(peaks, azimuth_deg) <= 12).sum() for azimuth_deg in (180, 225)]
    assert min(near) >= 5 and sum(near) >= 0.75 * len(peaks)
