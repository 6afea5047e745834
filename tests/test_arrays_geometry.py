"""Angles and array geometries: properties, the tables of the brittleness study, faults in users' files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ssl_kit.arrays.angles import (
    angular_difference_deg,
    angular_error_deg,
    circular_mean_deg,
    resultant_length,
    wrap_deg,
)
from ssl_kit.arrays.geometry import (
    REALMAN_SUBARRAYS,
    ArrayGeometry,
    direction_vector,
    far_field_delays_s,
    list_arrays,
    load_geometry,
    named_array,
)
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError

ANGLE = st.floats(-1e5, 1e5)


@given(ANGLE)
def test_wrapping_stays_in_the_interval_and_keeps_the_direction(angle):
    wrapped = wrap_deg(angle)
    assert 0 <= wrapped < 360
    assert np.allclose(np.exp(1j * np.radians(wrapped)), np.exp(1j * np.radians(angle)), atol=1e-7)


@given(ANGLE, ANGLE, ANGLE)
def test_difference_is_antisymmetric_bounded_and_blind_to_rotation(a, b, turn):
    difference = angular_difference_deg(a, b)
    assert -180 < difference <= 180
    assert np.isclose(angular_error_deg(a, b), angular_error_deg(b, a), atol=1e-7)
    assert np.isclose(angular_error_deg(a + turn, b + turn), abs(difference), atol=1e-6)


@given(ANGLE, ANGLE)
def test_error_agrees_with_the_arc_cosine(a, b):
    cosine = np.cos(np.radians(a - b))
    assert np.isclose(np.cos(np.radians(angular_error_deg(a, b))), cosine, atol=1e-7)


@given(arrays(float, st.integers(1, 20), elements=st.floats(0, 80)), st.floats(0, 360))
def test_circular_mean_turns_with_its_angles(angles, turn):
    mean = circular_mean_deg(angles)
    assert angular_error_deg(circular_mean_deg(angles + turn), mean + turn) < 1e-6
    assert angles.min() - 1e-6 <= mean <= angles.max() + 1e-6 or angular_error_deg(mean, 0) < 1e-6
    assert 0 < resultant_length(angles) <= 1 + 1e-12


def test_mean_and_concentration_agree_with_scipy():
    from scipy.stats import circmean, circvar

    angles = np.random.default_rng(0).uniform(300, 400, 50)
    assert np.isclose(circular_mean_deg(angles), circmean(angles, high=360, low=0))
    assert np.isclose(1 - resultant_length(angles), circvar(np.radians(angles)))


@pytest.mark.parametrize("angles", [[], [0, 180], [0, 90, 180, 270]])
def test_no_mean_without_a_direction(angles):
    with pytest.raises(ParameterError):
        circular_mean_deg(angles)


def test_nan_stays_nan():
    assert np.isnan(wrap_deg([1, np.nan])).tolist() == [False, True]


# --- the arrays of RealMAN ---------------------------------------------------------------------------------------


def test_sub_arrays_match_the_table_of_the_brittleness_study():
    root = os.environ.get("SSL_KIT_DATA")
    table = Path(root or ".") / "realman_results" / "summary_17_configurations.csv"
    if not root or not table.is_file():
        pytest.skip("SSL_KIT_DATA names no folder with realman_results/summary_17_configurations.csv")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17
    for row in rows:
        array = named_array(row["config_name"])
        assert [int(name) for name in array.names] == json.loads(row["mics"]), row["config_name"]
        assert array.names[array.reference] == "0"


@pytest.mark.parametrize("name", ["3x12cm_consecutive", "6cm_3x12cm_consecutive"])
def test_replaced_mics_of_the_array_that_the_study_is_about(name):
    assert [int(n) for n in named_array(name).names] == [9, 10, 11, 4, 5, 6, 7, 8, 0]


def test_realman_positions_follow_the_published_layout():
    p = named_array("realman32").positions_m
    assert p.shape == (32, 3) and not p[0].any()
    for ring, radius in ((range(1, 9), 0.03), (range(9, 17), 0.06), (range(17, 25), 0.09)):
        angle = np.degrees(np.arctan2(p[ring, 1], p[ring, 0])) % 360
        assert np.allclose(angle, np.arange(8) * 45) and np.allclose(np.linalg.norm(p[ring], axis=1), radius)
    assert np.allclose(p[25:28], [[-0.12, 0, 0], [0.12, 0, 0], [0.15, 0, 0]])
    assert np.allclose(p[28:, 2], [0.09, 0.045, -0.045, -0.09]) and not p[28:, :2].any()


@pytest.mark.parametrize("name", [*list_arrays(), "ula:4:0.05", "uca:8:0.1"])
def test_every_name_gives_a_sound_array(name):
    array = named_array(name)
    assert array.n_mics == len(set(array.names)) and array.label == name
    assert array == load_geometry(name) and hash(array) == hash(named_array(name))
    if name in REALMAN_SUBARRAYS:
        assert array.channels_in(32) == REALMAN_SUBARRAYS[name]


@pytest.mark.parametrize("name", ["6 cm", "3x12cm", "ula:1:0.1", "uca:8:-1", "ula:4", "", "4x12cm_haf"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ParameterError):
        named_array(name)


# --- order --------------------------------------------------------------------------------------------------------


def test_orders_move_the_reference_and_nothing_else():
    array = named_array("6cm")
    first = array.order("reference_first")
    assert first.names == ("0", *map(str, range(1, 9))) and first.reference == 0
    assert first.order("reference_last") == array and array.require_order("reference_last") is array
    assert np.array_equal(array.positions_m[array.permutation("reference_first")], first.positions_m)


def test_a_wrong_or_ambiguous_order_is_refused():
    array = named_array("6cm")
    with pytest.raises(ParameterError, match="channel 8 of 9"):
        array.require_order("reference_first")
    with pytest.raises(ParameterError, match="reference_first"):
        array.order("first")
    with pytest.raises(ParameterError, match="no reference"):
        array.subarray([1, 2, 3]).order("reference_first")


def test_what_a_wrong_order_does_to_localization():
    """The channels of 6cm are [1..8, 0]. Taken for [0, 1..8], each mic stands in another's place."""
    import pyroomacoustics as pra

    array, truth = named_array("6cm"), 100.0
    signals = _plane_wave(array, truth)
    wrong = array.order("reference_first")  # positions reordered, samples forgotten
    right_error, wrong_error = (angular_error_deg(_pra_azimuth(pra, signals, g), truth) for g in (array, wrong))
    assert right_error < 1.5 and wrong_error > 20
    with pytest.raises(ParameterError):
        array.require_order("reference_first")
    both = signals[array.permutation("reference_first")]
    assert angular_error_deg(_pra_azimuth(pra, both, wrong), truth) < 1.5


def _plane_wave(array, azimuth_deg, n=16000, sample_rate=16000, seed=0, elevation_deg=0.0):
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    delay = far_field_delays_s(array.positions_m, azimuth_deg, elevation_deg)
    phase = np.exp(-2j * np.pi * np.fft.rfftfreq(n, 1 / sample_rate)[None] * np.asarray(delay)[:, None])
    return np.fft.irfft(spectrum * phase, n)


def _pra_azimuth(pra, signals, array, n_fft=512, method="SRP", grid_deg=1.0):
    window = pra.hann(n_fft)
    spectra = np.stack([pra.transform.stft.analysis(s, n_fft, n_fft // 2, win=window).T for s in signals])
    grid = np.radians(np.arange(0, 360, grid_deg))
    doa = pra.doa.algorithms[method](array.positions_m.T, 16000, n_fft, c=343.0, num_src=1, azimuth=grid)
    doa.locate_sources(spectra, freq_range=[300, 4000])
    return float(np.degrees(doa.azimuth_recon[0]))


@pytest.mark.parametrize("name", ["6cm", "3x12cm_consecutive", "18cm", "respeaker", "uca:6:0.05"])
@pytest.mark.parametrize("azimuth_deg", [17.3, 200.7, 333.3])
def test_plane_waves_are_found_by_pyroomacoustics(name, azimuth_deg):
    """Sign and handedness of positions and delays: an independent localizer must agree within its 0.25 degree grid."""
    import pyroomacoustics as pra

    array = named_array(name)
    found = _pra_azimuth(pra, _plane_wave(array, azimuth_deg), array, grid_deg=0.25)
    assert angular_error_deg(found, azimuth_deg) < 0.3


def test_delays_of_a_plane_wave():
    towards_x = far_field_delays_s([[0.343, 0, 0], [0, 0.343, 0], [0, 0, 0.343]], 0.0)
    assert np.allclose(towards_x, [-1e-3, 0, 0])
    assert np.allclose(far_field_delays_s([[0, 0, 0.343]], 0.0, 90.0), -1e-3)
    assert np.allclose(np.linalg.norm(direction_vector(np.arange(360), 30), axis=1), 1)


@given(st.floats(0, 360), st.floats(0, 360))
def test_turning_array_and_source_leaves_the_delays(turn, azimuth):
    array = named_array("3x12cm_alternating")
    before = far_field_delays_s(array.positions_m, azimuth)
    assert np.allclose(before, far_field_delays_s(array.rotated(turn).positions_m, azimuth + turn), atol=1e-12)


# --- construction and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "message"), [
    ([[0, 0, 0], [np.nan, 0, 0]], "NaN"), ([[0, 0, 0], [0, 0, 0]], "same place"), ([[0, 0]], "shape"),
    ([[0, 0, 0], [60, 0, 0]], "centimetres"), ([], "shape"), ([["a", 0, 0]], "numbers"), ([[0, 0, np.inf]], "NaN")])
def test_impossible_positions(positions, message):
    with pytest.raises(ParameterError, match=message):
        ArrayGeometry(positions)


def test_names_and_reference_are_checked():
    two = [[0, 0, 0], [0.1, 0, 0]]
    with pytest.raises(ParameterError, match="found twice"):
        ArrayGeometry(two, ("a", "a"))
    with pytest.raises(ParameterError, match="one per mic"):
        ArrayGeometry(two, ("a",))
    with pytest.raises(ParameterError, match="reference"):
        ArrayGeometry(two, ("a", "b"), 2)
    with pytest.raises(ParameterError, match="unknown: \\['c'\\]"):
        ArrayGeometry(two, ("a", "b")).subarray(["a", "c"])
    with pytest.raises(ParameterError):
        ArrayGeometry(two, ("a", "b")).subarray(["a", "a"])


def test_positions_cannot_be_changed():
    with pytest.raises(ValueError):
        named_array("6cm").positions_m[0] = 1


def test_channel_counts_that_do_not_fit_name_both():
    with pytest.raises(DataError, match="9 mics, found 4 channels"):
        named_array("6cm").channels_in(4, "x.wav")
    assert named_array("respeaker").channels_in(6) == [1, 2, 3, 4]


FAULTS_CSV = [
    ("name,x_m,y_m\na,0,0\na,0.1,0\n", "found twice"), ("name,x_m,y_m\na,0,0\nb,nan,0\n", "NaN"),
    ("name,x_m,y_m\na,0,0\nb,70,0\n", "metres"), ("x,y\n0,0\n", "columns"), ("", "columns"),
    ("name,x_m,y_m\na,0,zero\n", "line 2, y_m"), ("name,x_m,y_m\n", "shape"), ("name,x_m,y_m,w\na,0,0,1\n", "columns"),
    ("name,x_m,y_m\na,0\n", "line 2, y_m")]
FAULTS_YAML = [
    ("label: x\n", "microphones"), ("microphones: {a: [0, 0], a: [0.1, 0]}\n", "found twice"),
    ("microphones: {a: [0, 0], b: [.nan, 0]}\n", "NaN"), ("microphones: {a: [0, 0, 0, 0]}\n", "mic 'a'"),
    ("microphones: {a: [0, 0]}\nreference: b\n", "none of the mics"),
    ("microphones: {a: [0, 0]}\nunits: cm\n", "unknown"),
    ("microphones: [[0, 0]]\n", "mapping"), (": : :", "YAML"), ("microphones: {a: [0, far]}\n", "number of metres")]


@pytest.mark.parametrize(("suffix", "text", "message"),
                         [(".csv", *case) for case in FAULTS_CSV] + [(".yaml", *case) for case in FAULTS_YAML])
def test_faulty_geometry_files_are_named_with_the_reason(tmp_path, suffix, text, message):
    path = tmp_path / f"array{suffix}"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_geometry(path)
    assert path.name in str(error.value)


def test_good_geometry_files(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("x_m,y_m,z_m\n0,0,0.1\n0.05,0,0.1\n")
    array = load_geometry(table)
    assert array.names == ("0", "1") and array.reference is None and array.label == "mine"
    page = tmp_path / "mine.yml"
    page.write_text("label: pair\nreference: right\nmicrophones:\n  left: [-0.05, 0]\n  right: [0.05, 0, 0.01]\n")
    array = load_geometry(page)
    assert array.label == "pair" and array.order("reference_first").names == ("right", "left")
    with pytest.raises(MissingDataError, match=r"gone\.csv"):
        load_geometry(tmp_path / "gone.csv")
    binary = tmp_path / "noise.csv"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not a text file"):
        load_geometry(binary)


def test_respeaker_orientation_on_real_recordings():
    """One source at nominal 180 degrees in four files; a second one at 225 degrees in two (rules out the mirror)."""
    import pyroomacoustics as pra

    root = os.environ.get("SSL_KIT_DATA")
    files = sorted((Path(root or ".") / "respeaker").glob("*.wav")) if root else []
    if not files:
        pytest.skip("SSL_KIT_DATA names no folder with respeaker recordings")
    from ssl_kit.lab.audio import read_audio

    array = named_array("respeaker")
    for path in files:
        found = _pra_azimuth(pra, read_audio(path, channels=4), array)
        if "az225" in path.name:
            assert 180 < found < 228, path.name
        else:
            assert angular_error_deg(found, 180) <= 3, (path.name, found)
