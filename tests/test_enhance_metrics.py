"""Measures of enhancement against closed forms, peers and slow loops; failures are rows, never gaps."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import freqz, lfilter

from ssl_kit.enhance import composite as parts
from ssl_kit.enhance.composite import (
    composite,
    composite_scores,
    log_likelihood_ratio,
    prediction_coefficients,
    segmental_snr,
    weighted_spectral_slope,
)
from ssl_kit.enhance.metrics import METRICS, estoi, evaluate_pair, evaluate_pairs, pesq_wb, si_sdr, stoi, summarize
from ssl_kit.enhance.oracles import ORACLES, apply_oracle, complex_mask, mel_clean_phase, mel_griffin_lim, real_mask
from ssl_kit.enhance.test_sets import load_test_set
from ssl_kit.lab.audio import write_audio
from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.statistics import cluster_bootstrap


@pytest.fixture(scope="module")
def mixtures():
    return load_test_set("embedded", limit=3)


@pytest.fixture(scope="module")
def pair(mixtures):
    return mixtures.noisy[2], mixtures.clean[2]  # +5 dB


# --- SI-SDR -----------------------------------------------------------------------------------------------------------

@given(st.floats(-40, 60), st.floats(1e-3, 1e3), st.sampled_from([-1, 1]), st.floats(-1, 1))
def test_si_sdr_is_the_ratio_of_orthogonal_parts_at_any_scale_and_offset(ratio_db, scale, sign, offset):
    phase = 2 * np.pi * np.arange(1600) / 1600
    target, error = np.sin(5 * phase), np.cos(9 * phase)
    estimate = sign * scale * (target + 10 ** (-ratio_db / 20) * error) + offset
    assert si_sdr(target, estimate) == pytest.approx(ratio_db, abs=1e-5)


def test_si_sdr_agrees_with_torchmetrics(pair):
    torch, audio = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.functional.audio")
    noisy, clean = pair
    peer = audio.scale_invariant_signal_distortion_ratio(torch.from_numpy(noisy).double(),
                                                         torch.from_numpy(clean).double(), zero_mean=True)
    assert si_sdr(clean, noisy) == pytest.approx(float(peer), abs=1e-6)


def test_si_sdr_has_no_patience_with_a_delay():
    clean = np.random.default_rng(0).standard_normal(16000)
    assert si_sdr(clean, 3 * clean) > 100 and si_sdr(clean, np.roll(clean, 1)) < 0


@pytest.mark.parametrize("clean, enhanced, message", [
    (np.zeros(9), np.ones(9), "reference is silent"), (np.arange(9.0), np.zeros(9), "enhanced signal is silent"),
    (np.ones(9), np.arange(9.0), "reference is constant"), (np.arange(9.0), np.arange(8.0), "one shape"),
    (np.arange(9.0), np.full(9, np.nan), "NaN"), (np.ones((2, 9)), np.ones((2, 9)), "one shape"),
    (np.zeros(0), np.zeros(0), "one shape")])
def test_si_sdr_says_why_there_is_none(clean, enhanced, message):
    with pytest.raises(DataError, match=message):
        si_sdr(clean, enhanced)


# --- PESQ and STOI ----------------------------------------------------------------------------------------------------

def test_measures_are_those_of_their_packages(pair):
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    noisy, clean = pair
    assert pesq_wb(clean, noisy) == pytest.approx(pesq.pesq(16000, clean, noisy, "wb"), abs=1e-6)
    assert pesq_wb(clean, noisy) != pytest.approx(pesq.pesq(16000, noisy, clean, "wb"), abs=1e-3)  # order matters
    assert stoi(clean, noisy) == pytest.approx(pystoi.stoi(clean, noisy, 16000), abs=1e-9)
    assert estoi(clean, noisy) == pytest.approx(pystoi.stoi(clean, noisy, 16000, extended=True), abs=1e-9)


def test_perfect_speech_reaches_the_ends_of_the_scales(pair):
    _, clean = pair
    assert pesq_wb(clean, clean) == pytest.approx(4.644, abs=0.001)
    assert stoi(clean, clean) == pytest.approx(1, abs=1e-6) and estoi(clean, clean) == pytest.approx(1, abs=1e-6)


def test_nobody_elses_random_numbers_are_touched(pair):
    np.random.seed(7)
    expected = np.random.standard_normal(3)
    np.random.seed(7)
    first = estoi(pair[1], pair[0])
    assert np.array_equal(np.random.standard_normal(3), expected)
    assert estoi(pair[1], pair[0]) == first


@pytest.mark.parametrize("measure", [pesq_wb, stoi, estoi])
def test_silence_short_files_and_other_rates_are_refused_not_scored(measure, pair):
    noisy, clean = pair
    with pytest.raises(DataError, match="enhanced signal is silent"):
        measure(clean, np.zeros_like(clean))
    with pytest.raises(DataError, match="reference is silent"):
        measure(np.zeros_like(clean), noisy)
    with pytest.raises(DataError, match="short|fewer than 30 frames"):  # pystoi alone would answer 1e-5
        measure(clean[8000:11200], noisy[8000:11200])
    with pytest.raises(ParameterError, match="16000"):
        measure(clean, noisy, 8000)


def test_a_reference_without_an_utterance_is_reported_by_pesq():
    hiss = 1e-6 * np.random.default_rng(0).standard_normal(32000)
    try:
        score = pesq_wb(hiss, hiss)
    except DataError as error:
        assert "PESQ" in str(error)
    else:
        assert 1 <= score <= 4.65


# --- composite --------------------------------------------------------------------------------------------------------

def test_regression_has_the_published_coefficients():
    base = np.array(composite_scores(2.0, 0.5, 40.0, 5.0))
    np.testing.assert_allclose(base, [3.093 - 0.5145 + 1.206 - 0.36, 1.634 + 0.956 - 0.28 + 0.315,
                                      1.594 + 1.61 - 0.256 - 0.28], atol=1e-12)
    steps = {"pesq": (2.1, 0.5, 40.0, 5.0), "llr": (2.0, 0.6, 40.0, 5.0), "wss": (2.0, 0.5, 41.0, 5.0),
             "snr": (2.0, 0.5, 40.0, 6.0)}
    slopes = {name: np.array(composite_scores(*given)) - base for name, given in steps.items()}
    np.testing.assert_allclose(slopes["pesq"], [0.0603, 0.0478, 0.0805], atol=1e-12)
    np.testing.assert_allclose(slopes["llr"], [-0.1029, 0, -0.0512], atol=1e-12)
    np.testing.assert_allclose(slopes["wss"], [-0.009, -0.007, -0.007], atol=1e-12)
    np.testing.assert_allclose(slopes["snr"], [0, 0.063, 0], atol=1e-12)


@given(st.floats(1, 5), st.floats(0, 20), st.floats(0, 500), st.floats(-10, 35))
def test_scores_stay_between_1_and_5(pesq, llr, wss, snr_db):
    assert all(1 <= score <= 5 for score in composite_scores(pesq, llr, wss, snr_db))


def test_segmental_snr_limits_each_frame_not_the_mean():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal(48000)
    enhanced = clean.copy()
    enhanced[24000:] *= 1.1
    value = segmental_snr(clean, enhanced)  # half of the frames perfect (35, not infinite), half at 20 dB
    assert value == pytest.approx((35 + 20) / 2, abs=0.3)
    assert segmental_snr(clean, np.zeros_like(clean)) == pytest.approx(0, abs=1e-9)
    assert segmental_snr(np.zeros(4800), np.zeros(4800)) == 0


def test_levinson_solves_the_normal_equations():
    from scipy.linalg import solve_toeplitz

    frames = np.random.default_rng(1).standard_normal((7, 480))
    lags = parts._autocorrelation(lfilter([1], [1, -1.2, 0.7], frames), 16)
    for row, a in zip(lags, prediction_coefficients(lags), strict=True):
        np.testing.assert_allclose(a, np.r_[1, solve_toeplitz(row[:-1], -row[1:])], atol=1e-8)


def test_llr_of_white_against_one_pole_is_its_closed_form():
    rng = np.random.default_rng(2)
    white, rho = rng.standard_normal(320000), 0.8
    longer = log_likelihood_ratio(white, lfilter([1], [1, -rho], white), 16000)
    # a = (1, −ρ): a'Ra = 1 + ρ² for white noise, and 1 is the least; frames of 480 samples add some variance
    assert longer == pytest.approx(np.log(1 + rho ** 2), abs=0.05)


def test_llr_ignores_gain_is_never_negative_and_is_not_symmetric(pair):
    noisy, clean = pair
    assert log_likelihood_ratio(clean, 0.3 * clean) == pytest.approx(0, abs=1e-4)
    assert 0 < log_likelihood_ratio(clean, noisy) != pytest.approx(log_likelihood_ratio(noisy, clean), abs=0.01)


def slow_wss(clean, enhanced, rate=16000):
    """Frame by frame and band by band, as the measure is described."""
    length, step, n_fft = 480, 120, 1024
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1, length + 1) / (length + 1)))
    found = []
    for start in range(0, len(clean) - length + 1, step):
        slopes, weights = [], []
        for signal in (clean, enhanced):
            power = np.abs(np.fft.fft(signal[start:start + length] * window, n_fft)) ** 2
            energy = []
            for centre_hz, width_hz in zip(parts._CENTRE_HZ, parts._WIDTH_HZ, strict=True):
                middle, width = np.floor(centre_hz / 8000 * 512), width_hz / 8000 * 512
                total = 0.0
                for j in range(512):
                    gain = np.exp(-11 * ((j - middle) / width) ** 2 + np.log(70) - np.log(width_hz))
                    total += power[j] * gain * (gain > np.exp(-30 / (2 * 2.303)))
                energy.append(10 * np.log10(max(total, 1e-10)))
            slope = [energy[k + 1] - energy[k] for k in range(24)]
            weight = []
            for k in range(24):
                n = k
                if slope[k] > 0:
                    while n < 24 and slope[n] > 0:
                        n += 1
                    peak = energy[n - 1]
                else:
                    while n >= 0 and slope[n] <= 0:
                        n -= 1
                    peak = energy[n + 1]
                weight.append(20 / (20 + max(energy) - energy[k]) / (1 + peak - energy[k]))
            slopes.append(np.array(slope))
            weights.append(np.array(weight))
        weight = (weights[0] + weights[1]) / 2
        found.append((weight * (slopes[0] - slopes[1]) ** 2).sum() / weight.sum())
    found = sorted(found)
    return np.mean(found[:round(0.95 * len(found))])


def test_wss_equals_its_slow_form(pair):
    noisy, clean = (part[10000:13000].astype(float) for part in pair)
    assert weighted_spectral_slope(clean, noisy) == pytest.approx(slow_wss(clean, noisy), rel=1e-9)


def test_wss_knows_no_level_and_sees_the_slopes_of_a_filter():
    white = np.random.default_rng(4).standard_normal(64000)
    assert weighted_spectral_slope(white, 0.5 * white) < 1e-9
    _, response = freqz([1, -0.95], [1], worN=2 * np.pi * parts._CENTRE_HZ / 16000)
    slopes_db = np.diff(20 * np.log10(np.abs(response)))  # what the filter adds from band to band
    tilted = weighted_spectral_slope(white, lfilter([1, -0.95], [1], white))
    assert np.square(slopes_db).min() < tilted < np.square(slopes_db).max()
    assert tilted == pytest.approx(np.square(slopes_db).mean(), rel=0.5)  # the mean but for its weights


def test_the_worst_five_percent_of_frames_do_not_count():
    clean = np.random.default_rng(0).standard_normal(48000)
    hit = clean.copy()
    hit[:960] = 0  # eleven of 397 frames
    assert log_likelihood_ratio(clean, hit) < 0.01 and weighted_spectral_slope(clean, hit) < 0.01


def test_digital_silence_and_short_files_have_an_answer_or_a_reason():
    voice = np.random.default_rng(0).standard_normal(4800)
    voice[:2400] = 0
    assert all(np.isfinite(value) for value in vars(composite(voice, voice, 4.64)).values())
    assert all(np.isfinite(value) for value in vars(composite(voice, np.zeros(4800), 1.0)).values())
    for measure in (segmental_snr, log_likelihood_ratio, weighted_spectral_slope):
        with pytest.raises(DataError, match="too short"):
            measure(voice[:479], voice[:479])
        with pytest.raises(DataError, match="one shape"):
            measure(voice, voice[:-1])


def test_more_noise_never_scores_better(pair):
    noisy, clean = pair
    worse = clean + 3 * (noisy - clean)
    first, second = (composite(clean, signal, pesq_wb(clean, signal)) for signal in (noisy, worse))
    assert first.csig >= second.csig and first.cbak > second.cbak and first.covl >= second.covl
    assert first.segmental_snr_db > second.segmental_snr_db


# --- tables -----------------------------------------------------------------------------------------------------------

def test_failures_are_rows_with_a_reason(mixtures):
    clean = [*mixtures.clean, mixtures.clean[0]]
    broken = [mixtures.noisy[0], np.zeros_like(mixtures.clean[1]), mixtures.noisy[2][:-7], mixtures.noisy[0] * np.nan]
    facts = pd.DataFrame({"speech": list("abcd")})
    table = evaluate_pairs(clean, broken, facts, workers=1)
    assert list(table.columns) == ["speech", *METRICS, "reason"] and table.speech.tolist() == list("abcd")
    assert table.loc[0, list(METRICS)].notna().all() and table.reason[0] == ""
    assert table.loc[1:, list(METRICS)].isna().all(axis=None)
    assert [word in reason for word, reason in zip(("silent", "one shape", "NaN"), table.reason[1:], strict=True)] \
        == [True] * 3


def test_one_measure_may_fail_alone(mixtures):
    clean, noisy = mixtures.clean[0][8000:13000], mixtures.noisy[0][8000:13000]  # 0.31 s: too short for STOI alone
    row = evaluate_pair(clean, noisy)
    assert np.isnan(row["stoi"]) and np.isfinite(row["si_sdr"]) and "fewer than 30 frames" in row["reason"]


def test_workers_change_nothing_and_files_are_read(mixtures, tmp_path):
    groups = {"clean": mixtures.clean[:2], "noisy": mixtures.noisy[:2]}
    files = [[str(write_audio(tmp_path / f"{kind}{k}.wav", samples, subtype="FLOAT"))
              for k, samples in enumerate(group)] for kind, group in groups.items()]
    files[1].append(str(tmp_path / "absent.wav"))
    files[0].append(files[0][0])
    names = ("stoi", "si_sdr")
    alone, together = (evaluate_pairs(*files, metrics=names, workers=workers) for workers in (1, 2))
    pd.testing.assert_frame_equal(alone, together)
    assert alone.speech.tolist() == ["clean0", "clean1", "clean0"] and "absent.wav" in alone.reason[2]
    from_memory = evaluate_pairs(mixtures.clean[:2], mixtures.noisy[:2], metrics=names, workers=1)
    np.testing.assert_allclose(alone.stoi[:2], from_memory.stoi, atol=1e-12)


def test_wrong_arguments_are_refused(mixtures):
    with pytest.raises(ParameterError, match="expected some of pesq"):
        evaluate_pairs([], [], metrics=("mos",))
    with pytest.raises(ParameterError, match="as many enhanced"):
        evaluate_pairs(mixtures.clean, mixtures.noisy[:1])


def test_summary_counts_failures_and_resamples_sentences():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"speech": np.repeat(list("abcdef"), 4), "snr_db": np.tile([0, 5], 12),
                          "pesq": rng.random(24), "si_sdr": rng.random(24)})
    table.loc[3, "pesq"], table.loc[5, "si_sdr"] = np.nan, np.inf
    summary = summarize(table).set_index("metric")
    assert summary.n_failed.tolist() == [1, 1] and summary.n.tolist() == [23, 23]
    good = table[table.pesq.notna()]
    expected = cluster_bootstrap(good.pesq.to_numpy(), good.speech.to_numpy())
    assert tuple(summary.loc["pesq", ["mean", "low", "high"]]) == pytest.approx(
        (expected.estimate, expected.low, expected.high))
    by_snr = summarize(table, by=["snr_db"], metrics=["pesq"])
    assert by_snr.snr_db.tolist() == [0, 5] and by_snr.n.sum() == 23
    single = summarize(table[table.speech == "a"], metrics=["si_sdr"])
    assert np.isnan(single.low[0]) and np.isfinite(single["mean"][0])
    with pytest.raises(ParameterError, match="columns room"):
        summarize(table, by=["room"])


# --- oracles ----------------------------------------------------------------------------------------------------------

def test_oracles_lose_what_they_are_said_to_lose(pair):
    noisy, clean = pair
    floor = si_sdr(clean, noisy)
    assert si_sdr(clean, real_mask(noisy, clean)) > floor + 4
    assert si_sdr(clean, complex_mask(noisy, clean)) > si_sdr(clean, real_mask(noisy, clean)) + 4
    assert si_sdr(clean, complex_mask(noisy, clean, limit=1e5)) > 50  # without its bound nothing is lost
    kept, invented = mel_clean_phase(noisy, clean), mel_griffin_lim(noisy, clean)
    assert si_sdr(clean, kept) > 15 and si_sdr(clean, invented) < -5
    assert pesq_wb(clean, kept) > pesq_wb(clean, invented) > pesq_wb(clean, noisy) + 1  # quality is there, phase is not


@pytest.mark.parametrize("name", ORACLES)
def test_every_oracle_returns_the_length_it_was_given(name, pair):
    noisy, clean = (part[:16001] for part in pair)
    assert apply_oracle(name, noisy, clean).shape == (16001,)
    with pytest.raises(DataError, match="one shape"):
        apply_oracle(name, noisy, clean[:-1])


def test_unknown_oracles_and_impossible_bounds_are_refused(pair):
    with pytest.raises(ParameterError, match="complex mask"):
        apply_oracle("perfect", *pair)
    with pytest.raises(ParameterError, match="limit"):
        complex_mask(*pair, limit=0)
