"""Evaluation of enhancement: windows, failures kept, intervals over clusters, paired differences, costs, the table."""

import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.enhance.evaluation import (
    costs_of,
    evaluate_systems,
    network_function,
    noisereduce_function,
    oracle_functions,
    paired_differences,
    real_time_factor,
    summarize_systems,
)
from ssl_kit.enhance.models import make_network, n_parameters
from ssl_kit.enhance.review import (
    difference_sentences,
    in_review_order,
    join_tables,
    latex_review,
    review_by_snr,
    review_table,
    shown_review,
    verdict,
    with_interval,
)
from ssl_kit.enhance.test_sets import load_test_set
from ssl_kit.enhance.windows import enhance_windows, window_of, window_starts
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError
from ssl_kit.lab.statistics import cluster_bootstrap


@given(n=st.integers(1, 700), size=st.integers(2, 300), share=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_windows_of_a_network_that_changes_nothing_change_nothing(n, size, share, seed):
    noisy = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
    overlap = int(share * (size - 1))
    seen = []

    def network(part):
        seen.append(part.shape[-1])
        return part

    out = enhance_windows(network, noisy, size / 1000, overlap / 1000, sample_rate=1000)
    torch.testing.assert_close(out, noisy, rtol=1e-5, atol=1e-6)
    assert max(seen) <= size and all(length == size for length in seen if n >= size)


def test_windows_cover_the_clip_and_overlap():
    starts = window_starts(1000, 300, 100)
    assert starts[0] == 0 and starts[-1] == 700
    assert all(b - a <= 200 for a, b in zip(starts[:-1], starts[1:], strict=True))
    for overlap, size in ((300, 300), (-1, 300)):
        with pytest.raises(ParameterError, match="overlap < window"):
            window_starts(1000, size, overlap)
    with pytest.raises(ParameterError, match="expected the shape it was given"):
        enhance_windows(lambda x: x[..., 1:], torch.zeros(1, 1000), 0.1, 0.01, 1000)


def test_a_network_that_knows_three_seconds_hears_no_more():
    """The trap: a clip longer than those of training, through positional codes that were never trained."""
    def knows_three_seconds(x):
        known = x.clone()
        known[..., 48000:] = 0                                  # what lies beyond is anybody's guess
        return known

    noisy = torch.randn(1, 80000, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(knows_three_seconds(noisy), noisy)
    through_windows = enhance_windows(knows_three_seconds, noisy, window_of("dpt"))
    torch.testing.assert_close(through_windows, noisy, rtol=1e-5, atol=1e-6)
    assert [window_of(kind) for kind in ("crn", "final", "mel", "stft", "dpt")] == [None, None, 3.0, 3.0, 3.0]
    assert window_of("stft", {"about": {"clip_s": 1.5}}) == 1.5 and window_of("final", {"about": {"clip_s": 2}}) is None


def test_long_clips_go_through_windows_of_the_trained_length():
    network = make_network("dpt", d_model=8, heads=2, feedforward=8, blocks=1).eval()
    lengths = []
    network.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[-1]))
    noisy = np.random.default_rng(0).standard_normal(40000).astype(np.float32)
    assert network_function(network, 1.0)(noisy).shape == noisy.shape
    assert set(lengths) == {16000} and len(lengths) == 3
    lengths.clear()
    network_function(network)(noisy)
    assert lengths == [40000]


@pytest.fixture(scope="module")
def mixtures():
    return load_test_set("embedded", limit=6)


@pytest.fixture(scope="module")
def table(mixtures):
    def fails(noisy):
        if noisy is mixtures.noisy[0]:
            raise DataError("told to fail")
        if noisy is mixtures.noisy[1]:
            return noisy[1:]
        if noisy is mixtures.noisy[2]:
            return np.zeros_like(noisy)
        if noisy is mixtures.noisy[3]:
            return np.full_like(noisy, np.nan)
        return noisy

    systems = {"noisy": np.asarray, "fails": fails} | oracle_functions(["real mask"], mixtures)
    return evaluate_systems(systems, mixtures, ("pesq", "stoi", "si_sdr"), workers=1)


def test_failures_stay_with_their_reasons(table):
    rows = table[table.system == "fails"].reset_index(drop=True)
    assert len(rows) == 6 and table.groupby("system").size().eq(6).all()
    assert rows.reason[0] == "told to fail" and "expected an estimate of shape" in rows.reason[1]
    assert "silent" in rows.reason[2] and "NaN" in rows.reason[3] and list(rows.reason[4:]) == ["", ""]
    assert rows.pesq[:4].isna().all() and rows.pesq[4:].notna().all()
    row = summarize_systems(table).set_index(["system", "metric"]).loc[("fails", "pesq")]
    assert (row.n, row.n_failed) == (2, 4)
    assert row["mean"] == pytest.approx(rows.pesq[4:].mean())
    review = review_table(table, {}, ("pesq", "stoi", "si_sdr"))
    assert review.set_index("system").n_failed.to_dict() == {"noisy": 0, "fails": 4, "real mask": 0}
    assert "4 of 6" in shown_review(review).failed.tolist()
    difference = paired_differences(table).set_index(["system", "metric"]).loc[("fails", "pesq")]
    assert (difference.n, difference.n_failed) == (2, 4) and difference.difference == pytest.approx(0)


def test_a_fault_of_the_program_is_no_failure_of_a_file(mixtures):
    def broken(noisy):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        evaluate_systems({"broken": broken}, mixtures, ("si_sdr",), workers=1)


def numbers(pesq, speech, noise=None, system="x", snr_db=0):
    n = len(pesq)
    return pd.DataFrame({"test_set": "set", "system": system, "speech": speech, "speaker": "1",
                         "noise": noise or ["n"] * n, "kind": "k", "snr_db": snr_db, "pesq": pesq, "reason": ""})


def test_intervals_resample_sentences():
    """Ten times the same four sentences are four, not forty, independent answers."""
    rng = np.random.default_rng(0)
    four = rng.normal(2, 0.5, 4)
    repeated = numbers(np.repeat(four, 10), np.repeat(list("abcd"), 10))
    row = summarize_systems(repeated).iloc[0]
    wanted = cluster_bootstrap(four, list("abcd"))
    assert (row.low, row.high) == pytest.approx((wanted.low, wanted.high)) and row.cluster == "speech"
    naive = cluster_bootstrap(np.repeat(four, 10), np.arange(40))
    assert row.high - row.low > 2 * (naive.high - naive.low)


def test_kinds_resample_noise_clips_and_one_clip_has_no_interval():
    two = numbers([1.0, 1.0, 2.0, 2.0], list("abcd"), ["n", "n", "m", "m"])
    row = summarize_systems(two, "kind").iloc[0]
    assert (row.low, row.high, row.cluster) == (1.0, 2.0, "noise")
    one = summarize_systems(numbers([1.0, 2.0], list("ab")), "kind").iloc[0]
    assert one["mean"] == 1.5 and np.isnan(one.low) and np.isnan(one.high)
    with pytest.raises(ParameterError, match="by"):
        summarize_systems(two, "speaker")


def test_a_constant_gain_has_a_paired_difference_without_width():
    rng = np.random.default_rng(1)
    base = rng.normal(1.5, 0.5, 30)
    speech = np.repeat(list("abcdefghij"), 3)
    both = pd.concat([numbers(base, speech, system="noisy"), numbers(base + 0.1, speech, system="x")])
    row = paired_differences(both).iloc[0]
    assert (row.difference, row.low, row.high) == pytest.approx((0.1, 0.1, 0.1))
    single = summarize_systems(both).set_index("system").loc["x"]
    assert single.high - single.low > 0.1
    assert "+0.10 [0.10, 0.10] against noisy: better." in difference_sentences(paired_differences(both), "x")[0]
    shuffled = pd.concat([both[both.system == "noisy"], both[both.system == "x"].iloc[::-1]])
    with pytest.raises(DataError, match="same order"):
        paired_differences(shuffled)
    with pytest.raises(ParameterError, match="reference"):
        paired_differences(both, "nobody")


def test_words_follow_from_intervals():
    assert verdict(0.1, 0.05, 0.2) == "better" and verdict(-1, -2, -0.1) == "worse"
    assert {verdict(0.1, -0.1, 0.2), verdict(0.1, np.nan, np.nan), verdict(np.nan, np.nan, np.nan)} == {
        "no clear difference"}
    assert with_interval(1.234, 1.1, 1.3) == "1.23 [1.10, 1.30]" and with_interval(np.nan, 0, 1) == "–"
    assert with_interval(1.234, np.nan, np.nan, 1) == "1.2"


def test_real_time_factor_is_one_of_seconds_on_one_core():
    threads = torch.get_num_threads()
    seen = []

    def works(noise):
        seen.append((len(noise), torch.get_num_threads()))
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        time.sleep(0.3)  # others' turn: it costs this function nothing

    found = real_time_factor(works, seconds=0.5, repeats=3)
    assert 0.1 <= found < 0.5 and set(seen) == {(8000, 1)} and torch.get_num_threads() == threads
    network = make_network("crn", channels=(4, 8), hidden=16).eval()
    costs = costs_of(network_function(network), network, seconds=0.5, repeats=1)
    assert costs.parameters == n_parameters(network) and costs.macs_per_second > 0


def test_spectral_gating_is_a_row_or_says_what_is_missing(monkeypatch, mixtures):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "noisereduce", None)
        with pytest.raises(MissingDataError, match="pip install"):
            noisereduce_function()
    pytest.importorskip("noisereduce")
    out = noisereduce_function()(mixtures.noisy[0])
    assert out.shape == mixtures.noisy[0].shape and out.dtype == np.float32 and np.isfinite(out).all()


def test_the_table_in_one_order_with_intervals_and_costs(table, tmp_path):
    review = review_table(table, {"real mask": {"parameters": 1000, "real_time_factor": 0.5}}, ("pesq", "si_sdr"))
    assert list(review.system) == ["noisy", "fails", "real mask"]
    good = review[review.n_failed == 0]
    assert ((good.pesq_low <= good.pesq) & (good.pesq <= good.pesq_high) & (good.pesq_low < good.pesq_high)).all()
    shown = shown_review(review).set_index("system")
    assert shown.loc["oracle: real mask", "parameters (k)"] == "1" and shown.loc["noisy", "RTF"] == "–"
    text = latex_review(review, tmp_path / "review.tex", "A caption").read_text()
    assert r"\toprule" in text and "tab:review" in text and "A caption" in text and "4 of 6" in text
    by_snr = review_by_snr(table, ("pesq",))
    assert list(by_snr)[-3:] == ["-5 dB", "0 dB", "5 dB"] and len(by_snr) == 3
    with pytest.raises(ParameterError, match="estoi"):
        review_table(table, {})
    assert in_review_order(["complex mask", "final", "zebra", "crn"]) == ["crn", "final", "zebra", "complex mask"]


def test_tables_of_other_mixtures_are_not_joined(table):
    assert len(join_tables([table, table[table.system == "noisy"]])) == len(table)
    other = table[table.system == "noisy"].assign(system="other")
    with pytest.raises(DataError, match="same numbers"):
        join_tables([table, table[table.system == "noisy"].assign(pesq=9.0)])
    with pytest.raises(DataError, match="expected the mixtures"):
        join_tables([table, other.assign(speech=list(other.speech[::-1]))])
    with pytest.raises(DataError, match="same limit"):
        join_tables([table, other[:3]])
