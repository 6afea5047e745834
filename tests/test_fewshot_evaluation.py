"""Evaluation of few-shot detection against slow definitions and mir_eval."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.fewshot.annotations import Event, Recording
from ssl_kit.fewshot.evaluation import (
    Counts,
    bootstrap_scores,
    count_events,
    evaluate,
    evaluate_recording,
    f_difference,
    f_interval,
    harmonic_mean,
    iou_matrix,
    match_events,
    score_counts,
)
from ssl_kit.lab.errors import DataError, ParameterError


def random_events(rng, n):
    start = rng.uniform(0, 6, n)
    return np.stack([start, start + rng.uniform(0.2, 2.5, n)], axis=1)


def slow_iou(a, b):
    both = min(a[1], b[1]) - max(a[0], b[0])
    return both / (max(a[1], b[1]) - min(a[0], b[0])) if both > 0 else 0.0


def slow_matching(reference, estimated):
    """The largest matchings by trying all orders: {size: sets of estimated events that are used}."""
    slots = list(range(len(estimated))) + [None] * len(reference)
    best = {}
    for chosen in set(permutations(slots, len(reference))):
        if all(k is None or slow_iou(reference[i], estimated[k]) > 0.3 for i, k in enumerate(chosen)):
            used = frozenset(k for k in chosen if k is not None)
            best.setdefault(len(used), set()).add(used)
    size = max(best)
    return size, best[size]


def test_counts_equal_the_definition_on_1000_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        positive, unknown, estimated = (random_events(rng, rng.integers(0, high)) for high in (4, 3, 4))
        counts = count_events(positive, unknown, estimated)
        tp, used = slow_matching(positive, estimated)
        assert (counts.tp, counts.fn) == (tp, len(positive) - tp)
        # which of several largest matchings is taken is left open by the rules; UNK then depends on it
        allowed = {slow_matching(unknown, [e for k, e in enumerate(estimated) if k not in taken])[0] for taken in used}
        assert counts.unk in allowed and counts.fp == len(estimated) - tp - counts.unk


def test_matching_is_as_large_as_that_of_mir_eval():
    util = pytest.importorskip("mir_eval.util")
    rng = np.random.default_rng(1)
    for _ in range(300):
        reference, estimated = random_events(rng, rng.integers(1, 20)), random_events(rng, rng.integers(1, 20))
        graph = {}
        for k, i in zip(*np.nonzero(iou_matrix(reference, estimated).T > 0.3), strict=True):
            graph.setdefault(int(k), []).append(int(i))
        ours = match_events(reference, estimated)
        assert (ours >= 0).sum() == len(util._bipartite_match(graph))
        assert all(slow_iou(reference[i], estimated[k]) > 0.3 for i, k in enumerate(ours) if k >= 0)
        assert len(set(ours[ours >= 0])) == (ours >= 0).sum()


@given(st.integers(0, 10**6))
def test_iou_is_symmetric_and_that_of_two_numbers(seed):
    rng = np.random.default_rng(seed)
    a, b = random_events(rng, 3), random_events(rng, 4)
    matrix = iou_matrix(a, b)
    np.testing.assert_allclose(matrix, iou_matrix(b, a).T)
    np.testing.assert_allclose(matrix, [[slow_iou(x, y) for y in b] for x in a], atol=1e-12)


def test_an_iou_of_exactly_0_3_is_no_match():
    assert count_events([(0, 1.0)], [], [(0, 0.3)]) == Counts(0, 1, 1)
    assert count_events([(0, 1.0)], [], [(0, 0.31)]) == Counts(1, 0, 0)


def test_perfect_empty_and_doubled():
    events = [(0, 1), (2, 3), (4, 4.5)]
    assert count_events(events, [], events) == Counts(3, 0, 0)
    assert count_events(events, [], []) == Counts(0, 0, 3)
    assert count_events([], [], events) == Counts(0, 3, 0)
    assert count_events(events, [], [*events, *events]) == Counts(3, 3, 0)
    assert Counts(0, 0, 0).f_measure == Counts(0, 0, 3).precision == Counts(0, 3, 0).recall == 0


def test_an_unk_event_forgives_one_prediction():
    assert count_events([(0, 1)], [(2, 3)], [(0, 1), (2, 3), (2.1, 3), (5, 6)]) == Counts(1, 2, 0, 1)


@pytest.mark.parametrize("bad", [[(1, 1)], [(2, 1)], [(0, np.nan)], [(np.inf, 1)]])
def test_broken_predictions_are_refused(bad):
    with pytest.raises(DataError, match="estimated"):
        count_events([(0, 1)], [], bad)


def recording(name="a.wav", subset="HB", n=8, unknown=((5.1, 5.4),)):
    events = [Event(k, k + 0.5, ("POS",)) for k in range(n)] + [Event(*times, ("UNK",)) for times in unknown]
    return Recording(Path(name), 60.0, ("Q",), tuple(sorted(events)), subset)


def test_shots_are_neither_found_nor_missed_and_what_begins_before_their_end_is_dropped():
    scape = recording(unknown=((1.6, 1.9), (20, 21)))
    assert evaluate_recording(scape, []) == Counts(0, 0, 3)
    # the fifth shot ends at 4.5 s; the trap is to score what was dropped as a false positive, or to count the shots
    early = [(k, k + 0.5) for k in range(5)] + [(4.49, 6.0), (0.1, 30)]
    assert evaluate_recording(scape, early) == Counts(0, 0, 3)
    assert evaluate_recording(scape, [*early, (5, 5.5), (20, 21), (30, 31)]) == Counts(1, 1, 2, 1)
    assert evaluate_recording(scape, [], n_shots=1) == Counts(0, 0, 7)
    with pytest.raises(DataError, match="at least 9"):
        evaluate_recording(scape, [], n_shots=9)


def test_subsets_are_summed_and_averaged_harmonically():
    recordings = [recording("a.wav"), recording("b.wav"), recording("c.wav", "PB")]
    predictions = {"a.wav": [(5, 5.5)], "c.wav": [(5, 5.5), (6, 6.5), (7, 7.5), (40, 41)]}
    scores, rows = evaluate(recordings, predictions)
    assert scores.counts == {"HB": Counts(1, 0, 5), "PB": Counts(3, 1, 0)} and len(rows) == 3
    f_hb, f_pb = 2 / 7, 6 / 7
    assert scores.f_measure == pytest.approx(2 / (1 / f_hb + 1 / f_pb)) and scores.without_hits == ()
    scores, _ = evaluate(recordings, {"a.wav": [(5, 5.5)]})
    assert scores.f_measure == 0 and scores.without_hits == ("PB",)
    with pytest.raises(ParameterError, match="'d.wav' is none"):
        evaluate(recordings, {"d.wav": []})
    with pytest.raises(ParameterError, match="same name"):
        evaluate([recording(), recording()], {})
    with pytest.raises(DataError, match="at least one"):
        score_counts([])


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_harmonic_mean(values):
    from scipy.stats import hmean

    assert harmonic_mean(values) == pytest.approx(hmean(values))
    assert harmonic_mean([*values, 0.0]) == 0 == harmonic_mean([])


def rows_of(rng, shift=0):
    return [(subset, Counts(int(rng.integers(4, 9)) + shift, int(rng.integers(6)), int(rng.integers(6))))
            for subset in "ab" for _ in range(6)]


def test_bootstrap_is_that_of_a_slow_loop_and_stays_within_subsets():
    rows = rows_of(np.random.default_rng(0))
    draws = bootstrap_scores(rows, 4000, seed=3)
    rng, slow = np.random.default_rng(9), []
    for _ in range(4000):
        chosen = [(s, own[k]) for s in "ab" for own in [[c for name, c in rows if name == s]]
                  for k in rng.integers(6, size=6)]
        slow.append(score_counts(chosen).f_measure)
    np.testing.assert_allclose(np.percentile(draws["all"], [2.5, 50, 97.5]), np.percentile(slow, [2.5, 50, 97.5]),
                               atol=0.01)
    low, high = f_interval(rows)["a"]
    assert low < score_counts(rows).counts["a"].f_measure < high


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    rows = rows_of(rng)
    better = [(subset, Counts(c.tp + 1, c.fp, max(0, c.fn - 1))) for subset, c in rows]
    estimate, low, high = f_difference(better, rows)
    assert 0 < low < estimate < high
    spread = f_interval(rows)["all"]
    assert high - low < spread[1] - spread[0]  # unpaired it would be wider
    with pytest.raises(DataError, match="same recordings"):
        f_difference(rows, rows[::-1])


def test_a_draw_without_hits_makes_the_mean_zero():
    rows = [("a", Counts(5, 0, 0)), ("a", Counts(5, 0, 0)), ("b", Counts(0, 1, 5)), ("b", Counts(3, 0, 2))]
    draws = bootstrap_scores(rows, 200)
    assert (draws["all"] == 0).any() and np.isfinite(draws["all"]).all()
