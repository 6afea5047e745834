"""Metrics of failure detection: scikit-learn as a peer, the AUGRC identity, brute force, properties, faults."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing import metrics

METRICS = [metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr, metrics.aurc, metrics.augrc, metrics.e_aurc]


@st.composite
def samples(draw, low=2, high=60):
    n = draw(st.integers(low, high))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    levels = draw(st.sampled_from([2, 5, 10_000]))  # few levels: many ties
    failures = rng.random(n) < draw(st.floats(0.1, 0.9))
    failures[:2] = [True, False]
    return rng.integers(0, levels, n).astype(float), failures, rng


@settings(max_examples=80, deadline=None)
@given(samples())
def test_agree_with_scikit_learn_ties_included(sample):
    scores, failures, rng = sample
    assert metrics.auroc(scores, failures) == pytest.approx(roc_auc_score(failures, scores), abs=1e-12)
    assert metrics.average_precision(scores, failures) == pytest.approx(
        average_precision_score(failures, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(failures, scores, drop_intermediate=False)
    assert metrics.fpr_at_tpr(scores, failures) == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(samples())
def test_weighted_agree_with_scikit_learn_sample_weight(sample):
    scores, failures, rng = sample
    weights = rng.integers(0, 4, (3, len(scores)))
    weights[:, :2] += 1  # both classes stay
    for got, draw in zip(metrics.auroc(scores, failures, weights), weights, strict=True):
        assert got == pytest.approx(roc_auc_score(failures, scores, sample_weight=draw), abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(samples())
def test_augrc_identity_for_binary_risk(sample):
    scores, failures, _ = sample
    acc = 1 - failures.mean()
    closed = (1 - metrics.auroc(scores, failures)) * acc * (1 - acc) + 0.5 * (1 - acc) ** 2
    assert metrics.augrc(scores, failures) == pytest.approx(closed, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(samples())
def test_weights_mean_repeated_rows(sample):
    scores, failures, rng = sample
    weights = rng.integers(0, 3, (3, len(scores)))
    weights[:, :2] += 1
    for metric in METRICS:
        repeated = [metric(np.repeat(scores, w), np.repeat(failures, w)) for w in weights]
        assert metric(scores, failures, weights) == pytest.approx(np.array(repeated), abs=1e-10)
    got = metrics.risk_at_coverage(scores, failures, 0.37, weights)
    want = [metrics.risk_at_coverage(np.repeat(scores, w), np.repeat(failures, w), 0.37) for w in weights]
    assert got == pytest.approx(np.array(want), abs=1e-10)


def test_aurc_of_distinct_scores_is_the_textbook_sum():
    rng = np.random.default_rng(0)
    scores, losses = rng.random(200), rng.exponential(size=200)
    risks = np.cumsum(losses[np.argsort(scores)]) / np.arange(1, 201)
    assert metrics.aurc(scores, losses) == pytest.approx(risks.mean(), abs=1e-12)
    assert metrics.risk_at_coverage(scores, losses, 0.25) == pytest.approx(risks[49], abs=1e-12)


def test_aurc_of_ties_is_the_mean_over_orders():
    rng = np.random.default_rng(1)
    scores, losses = rng.integers(0, 3, 12).astype(float), rng.random(12)
    shuffled = [metrics.aurc(scores + 1e-6 * rng.random(12), losses) for _ in range(4000)]
    assert metrics.aurc(scores, losses) == pytest.approx(np.mean(shuffled), abs=3e-3)


@settings(max_examples=40, deadline=None)
@given(samples())
def test_invariant_to_order_and_to_monotone_maps(sample):
    scores, failures, rng = sample
    order = rng.permutation(len(scores))
    for metric in METRICS:
        value = metric(scores, failures)
        assert metric(scores[order], failures[order]) == pytest.approx(value, abs=1e-10)
        assert metric(np.exp(scores / 1e4) * 3 - 7, failures) == pytest.approx(value, abs=1e-10)


def test_perfect_and_useless_detector():
    failures = np.array([0, 0, 0, 1, 1], bool)
    assert metrics.auroc(failures, failures) == 1 and metrics.fpr_at_tpr(failures, failures) == 0
    assert metrics.average_precision(failures, failures) == 1 and metrics.e_aurc(failures, failures) == 0
    constant = np.zeros(5)
    assert metrics.auroc(constant, failures) == 0.5 and metrics.fpr_at_tpr(constant, failures) == 1
    assert metrics.average_precision(constant, failures) == pytest.approx(0.4)
    assert metrics.aurc(constant, failures) == pytest.approx(0.4)


def test_one_class_has_no_auroc():
    for failures in (np.zeros(4, bool), np.ones(4, bool)):
        assert np.isnan(metrics.auroc(np.arange(4), failures))
    assert np.isnan(metrics.average_precision(np.arange(4), np.zeros(4, bool)))
    assert metrics.aurc(np.arange(4), np.zeros(4, bool)) == 0


def test_decisions():
    routed, failures = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0], bool)
    counts = metrics.confusion(routed, failures)
    assert counts == {"tp": 2, "fp": 1, "fn": 1, "tn": 2}
    assert metrics.decision_metrics(**counts)["f1"] == pytest.approx(2 / 3)
    nothing = metrics.decision_metrics(tp=0, fp=0, fn=0, tn=4)
    assert nothing["rate"] == 0 and nothing["f1"] == 0 and np.isnan(nothing["precision"])
    assert np.isnan(nothing["recall"])


def test_accuracy_counts_the_tolerance_itself():
    assert metrics.error_metrics([5.0, 5.0001], 5)["acc5"] == 0.5
    assert "acc10" in metrics.error_metrics([1.0], 10)


def test_blocks_of_draws_change_nothing():
    rng = np.random.default_rng(0)
    scores, errors, weights = rng.random(40), rng.exponential(30, 40), rng.integers(0, 3, (7, 40))
    whole, blocks = (metrics.detection_metrics(scores, errors, 30, weights, draws_at_once=k) for k in (100, 2))
    for name in whole:
        assert whole[name] == pytest.approx(blocks[name], rel=1e-12)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: metrics.auroc([], []), DataError, "scores"),
    (lambda: metrics.auroc([1, np.nan], [0, 1]), DataError, "scores"),
    (lambda: metrics.auroc([1, 2, 3], [0, 1]), DataError, "same shape"),
    (lambda: metrics.aurc([1, 2], [0, np.inf]), DataError, "outcome"),
    (lambda: metrics.auroc([1, 2], [0, 1], np.ones((3, 2))), DataError, "weights"),
    (lambda: metrics.risk_at_coverage([1, 2], [0, 1], 0), ParameterError, "coverage"),
    (lambda: metrics.error_metrics([-1.0]), DataError, "errors_deg"),
    (lambda: metrics.error_metrics([]), DataError, "errors_deg"),
    (lambda: metrics.confusion([1], [1, 0]), DataError, "routed"),
])
def test_faults(call, error, words):
    with pytest.raises(error, match=words):
        call()
