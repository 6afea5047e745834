"""Detectors: closed forms, peers (torch, scikit-learn, scipy), and each known trap with the naive version failing."""
import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing.bank import FeatureBank, attach_fallback, make_table
from ssl_kit.routing.detectors_features import LogisticStack, Mahalanobis, angle_bins, logit_origin
from ssl_kit.routing.detectors_physics import ColumnDetector
from ssl_kit.routing.detectors_scores import fit_temperature, posterior_statistics, probabilities
from ssl_kit.routing.metrics import auroc
from ssl_kit.routing.registry import (
    Detector,
    available_detectors,
    describe,
    detector_classes,
    group_folds,
    held_out_scores,
    make_detector,
    over_frames,
    pooled_features,
    register,
)
from ssl_kit.routing.synthetic import synthetic_bank, synthetic_study

ALL = ["max_prob", "max_logit", "entropy", "margin", "energy", "variance", "sharpness", "concentration",
       "pooled_max_prob", "pooled_entropy", "temperature", "mahalanobis", "knn", "residual", "vim", "she", "gradnorm",
       "stack", "physics", "likelihood_ratio", "disagreement"]


@pytest.fixture(scope="module")
def study():
    calibration, calibration_srp, test, test_srp = synthetic_study(n=300, overlap=0.4)
    return attach_fallback(calibration, calibration_srp), attach_fallback(test, test_srp)


def bank_of(features, W, b=None, angles=None, head="softmax", **changes):
    "A bank around given features (n, T, D) and head."
    features, n = np.asarray(features), len(features)
    b = np.zeros(len(W)) if b is None else b
    logits = features.astype(np.float64) @ W.T + b
    angles = np.zeros(n) if angles is None else np.asarray(angles, float)
    fields = {"predicted_angles": angles, "gt_angles": angles, "abs_errors": np.zeros(n),
              "global_indices": np.arange(n), "filenames": np.arange(n).astype(str),
              "group_ids": (np.arange(n) % 5).astype(str)} | changes
    return FeatureBank(**fields, penultimate_features=features, logits_pre_sig=logits,
                       predictions=softmax(logits, axis=-1).mean(axis=1), W=W, b=b, head=head)


# the register


def test_all_are_registered_and_described():
    assert set(ALL) <= set(detector_classes())
    rows = {row["name"]: row for row in describe(ALL)}
    assert all(rows[name]["formula"] and rows[name]["source"] for name in ALL)


@pytest.mark.parametrize("name", ALL)
def test_each_finds_failures_and_gives_one_finite_score(study, name):
    calibration, test = study
    scores = make_detector(name).fit(calibration).score(test)
    assert scores.shape == (len(test),) and np.isfinite(scores).all()
    assert auroc(scores, test.abs_errors > 30) > 0.65


@pytest.mark.parametrize("name", ALL)
def test_score_of_a_recording_does_not_depend_on_the_others(study, name):
    calibration, test = study
    detector = make_detector(name).fit(calibration)
    whole = detector.score(test)
    test.forget()
    part = test.take(np.arange(7, 60))
    assert detector.score(part) == pytest.approx(whole[7:60], rel=1e-4, abs=1e-5)


def test_a_new_detector_is_one_small_class(study):
    @register("loudness", "Σ h", "a test", ("features",))
    class Loudness(Detector):
        "Sum of the pooled features."

        def score(self, table):
            return -pooled_features(table).sum(axis=1)

    try:
        assert "loudness" in available_detectors(study[1])
        assert make_detector("loudness").score(study[1]).shape == (300,)
    finally:
        from ssl_kit.routing import registry
        registry._REGISTER.pop("loudness")


def test_needs_are_checked_and_names_corrected(study):
    bank, _ = synthetic_bank(n=20)
    assert "physics" not in available_detectors(bank) and "physics" in available_detectors(study[0])
    with pytest.raises(DataError, match="column:srp_ratio"):
        held_out_scores(lambda: make_detector("physics"), bank)
    with pytest.raises(ParameterError, match="mahalanobis"):
        make_detector("mahalanobi")
    with pytest.raises(ParameterError, match="knn"):
        make_detector("knn", neighbours=3)
    assert available_detectors(make_table([0], [0])) == []


# closed forms and peers


def test_posterior_scores_equal_scipy():
    rng = np.random.default_rng(0)
    bank = bank_of(rng.normal(size=(12, 5, 8)), rng.normal(size=(360, 8)))
    z = bank.logits_pre_sig
    p = softmax(z, axis=-1)
    assert make_detector("max_prob").score(bank) == pytest.approx(-p.max(-1).mean(1), rel=1e-5)
    assert make_detector("max_logit").score(bank) == pytest.approx(-z.max(-1).mean(1), rel=1e-5)
    assert make_detector("entropy").score(bank) == pytest.approx(entropy(p, axis=-1).mean(1), rel=1e-5)
    assert make_detector("energy").score(bank) == pytest.approx(-logsumexp(z, axis=-1).mean(1), rel=1e-5)
    assert make_detector("variance").score(bank) == pytest.approx(-p.var(-1).mean(1), rel=1e-3, abs=1e-9)
    assert make_detector("pooled_entropy").score(bank) == pytest.approx(entropy(p.mean(1), axis=-1), rel=1e-5)
    near = sum(np.take_along_axis(p, (p.argmax(-1)[..., None] + k) % 360, -1)[..., 0] for k in range(-10, 11))
    assert make_detector("concentration").score(bank) == pytest.approx(-near.mean(1), rel=1e-4)


def test_huge_logits_do_not_overflow():
    bank = bank_of(np.full((3, 2, 4), 500.0), np.vstack([np.eye(4), -np.eye(4)]) * 10)
    with np.errstate(over="raise", invalid="raise"):
        for name in ("max_prob", "entropy", "energy", "gradnorm"):
            assert np.isfinite(make_detector(name).score(bank)).all()


def test_gradnorm_equals_autograd():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bank = bank_of(np.abs(rng.normal(size=(4, 1, 6))), rng.normal(size=(9, 6)))
    expected = []
    for h in bank.penultimate_features[:, 0]:
        weight = torch.tensor(bank.W, requires_grad=True)
        log_p = torch.log_softmax(torch.tensor(h) @ weight.T, dim=-1)
        (-log_p.mean()).backward()  # cross-entropy with a uniform target
        expected.append(-weight.grad.abs().sum().item())
    assert make_detector("gradnorm").score(bank) == pytest.approx(np.array(expected), rel=1e-4)


def test_temperature_equals_torch_lbfgs_and_a_grid():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    z = rng.normal(size=(1500, 20)) * 2
    labels = (z + rng.gumbel(size=z.shape)).argmax(1)
    z = z * 2.5
    ours = fit_temperature(z, labels)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], line_search_fn="strong_wolfe", max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.tensor(z) / log_t.exp(), torch.tensor(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ours == pytest.approx(log_t.exp().item(), rel=1e-3) and ours == pytest.approx(2.5, rel=0.1)
    grid = np.exp(np.linspace(-2, 3, 400))
    nll = [-log_softmax(z / t, axis=1)[np.arange(1500), labels].mean() for t in grid]
    assert ours == pytest.approx(grid[np.argmin(nll)], rel=0.02)


def test_temperature_stays_positive_at_either_end():
    z = np.eye(4)[np.arange(200) % 4] * 0.5
    labels = np.arange(200) % 4
    assert 0 < fit_temperature(z, labels) < 0.1  # right and unsure: T falls to its bound, never below zero
    assert fit_temperature(z, np.roll(labels, 1)) > 100  # sure and wrong: as flat as can be


def test_mahalanobis_equals_scipy():
    rng = np.random.default_rng(3)
    angles = np.repeat([0.0, 120, 240], 40)
    features = rng.normal(size=(120, 3, 5)) @ rng.normal(size=(5, 5)) + np.repeat(np.eye(5)[:3], 40, 0)[:, None] * 4
    bank = bank_of(features, rng.normal(size=(6, 5)), angles=angles)
    scores = Mahalanobis(n_bins=36).fit(bank).score(bank)
    x = features.astype(np.float32).astype(float).mean(1)
    means = np.stack([x[angles == a].mean(0) for a in (0, 120, 240)])
    inverse = np.linalg.inv(ledoit_wolf(x - means[np.repeat([0, 1, 2], 40)], assume_centered=True)[0])
    expected = [min(mahalanobis(row, mean, inverse) ** 2 for mean in means) for row in x]
    assert scores == pytest.approx(np.array(expected), rel=1e-4)


def test_knn_equals_scikit_learn(study):
    calibration, test = study
    ours = make_detector("knn", k=7).fit(calibration).score(test)
    reference, x = pooled_features(calibration)[calibration.abs_errors <= 30], pooled_features(test)
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (reference, x)]
    distances, _ = NearestNeighbors(n_neighbors=7).fit(unit[0]).kneighbors(unit[1])
    assert ours == pytest.approx(distances[:, -1], abs=1e-6)


def test_vim_equals_the_papers_recipe():
    rng = np.random.default_rng(4)
    W, b = rng.normal(size=(30, 16)), rng.normal(size=30)
    bank = bank_of(np.abs(rng.normal(size=(50, 1, 16))), W, b)
    scores = make_detector("vim").fit(bank).score(bank)
    h = bank.penultimate_features[:, 0]
    z = h @ W.T + b
    centred = h + np.linalg.pinv(W) @ b  # h - u
    values, vectors = np.linalg.eigh(centred.T @ centred)
    minor = vectors[:, np.argsort(values)[::-1][8:]]
    residual = np.linalg.norm(centred @ minor, axis=1)
    alpha = z.max(1).mean() / residual.mean()
    assert scores == pytest.approx(alpha * residual - logsumexp(z, axis=1), rel=1e-3, abs=1e-3)


def test_she_is_an_inner_product_with_the_pattern_of_the_answer():
    features = np.zeros((4, 2, 2))
    features[:2, :, 0], features[2:, :, 1] = 2.0, 3.0
    bank = bank_of(features, np.eye(2), angles=[0, 0, 180, 180])
    assert make_detector("she", n_bins=2).fit(bank).score(bank).tolist() == [-4, -4, -9, -9]


def test_stack_equals_logistic_regression_of_columns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(5)
    errors = np.where(rng.random(400) < 0.3, 60.0, 3.0)
    columns = {"a": errors + 50 * rng.normal(size=400), "b": -errors + 80 * rng.normal(size=400)}
    table = make_table(errors, np.zeros(400), group_ids=np.arange(400) % 20, columns=columns)
    stack = LogisticStack([ColumnDetector("a"), ColumnDetector("b")]).fit(table)
    x = np.stack([columns["a"], columns["b"]], 1)
    x = (x - x.mean(0)) / x.std(0)
    peer = LogisticRegression(max_iter=1000).fit(x, errors > 30).decision_function(x)
    assert stack.score(table) == pytest.approx(peer, abs=1e-8)


# the known traps: the naive version fails, ours does not


def test_trap_softmax_over_the_wrong_axis():
    bank, _ = synthetic_bank(n=40)
    frames = softmax(bank.logits_pre_sig, axis=1).max(-1).mean(1)  # naive: normalised over frames
    assert not np.allclose(frames, -make_detector("max_prob").score(bank), rtol=0.5)
    assert probabilities(bank.logits_pre_sig, "softmax").sum(-1) == pytest.approx(np.ones((40, 8)), rel=1e-5)


def test_trap_second_best_bin_is_the_neighbour():
    angle = np.radians(np.arange(360))
    one, other = (20 * np.exp(8 * (np.cos(angle - at) - 1)) for at in (1.0, 3.0))
    # a sure answer, and one that can't decide between two directions
    bank = bank_of(np.array([[[1.0, 0.0]], [[1.0, 0.999]]]), np.stack([one, other], axis=1))
    p = np.sort(softmax(bank.logits_pre_sig, axis=-1), axis=-1)[:, 0]
    naive = p[:, -1] - p[:, -2]
    assert naive.max() < 0.01 and naive[0] < 3 * naive[1]  # the neighbour on the same peak: both look alike
    sure, torn = posterior_statistics(bank)["margin"]
    assert sure > 20 * torn


def test_trap_wrap_around_of_concentration():
    W = np.zeros((360, 1))
    W[[358, 359, 0, 1, 2]] = 30.0  # a peak across 0°
    bank = bank_of(np.ones((2, 1, 1)), W)
    assert posterior_statistics(bank)["concentration"] == pytest.approx([1, 1], abs=1e-6)
    assert softmax(bank.logits_pre_sig, axis=-1)[0, 0, :11].sum() < 0.7  # naive: without wrapping


def test_trap_sigmoid_head_means_another_probability():
    bank, _ = synthetic_bank(n=300, head="sigmoid", overlap=0.3)
    sigmoid = 1 / (1 + np.exp(-bank.logits_pre_sig.astype(float)))
    assert make_detector("max_prob").score(bank) == pytest.approx(-sigmoid.max(-1).mean(1), rel=1e-4)
    assert make_detector("energy").score(bank) == pytest.approx(
        -np.logaddexp(0, bank.logits_pre_sig.astype(float)).sum(-1).mean(1), rel=1e-4)
    normalised = sigmoid / sigmoid.sum(-1, keepdims=True)
    assert make_detector("entropy").score(bank) == pytest.approx(entropy(normalised, axis=-1).mean(1), rel=1e-4)
    assert not np.allclose(softmax(bank.logits_pre_sig, axis=-1).max(-1), sigmoid.max(-1), rtol=0.5)  # naive
    assert "gradnorm" not in available_detectors(bank) and "temperature" not in available_detectors(bank)
    with pytest.raises(ParameterError, match="head"):
        probabilities(bank.logits_pre_sig, "tanh")


def test_trap_vim_origin_needs_a_cut_off():
    rng = np.random.default_rng(6)
    # a float32 head of which eight units repeat others: rank 24 of 32 but for rounding
    W = rng.normal(size=(360, 24)) @ rng.normal(size=(24, 32))
    W, b = W.astype(np.float32), rng.normal(size=360).astype(np.float32)
    naive = -np.linalg.pinv(W.astype(np.float64)) @ b
    ours = logit_origin(W, b)
    assert np.linalg.norm(naive) > 1e3 * np.linalg.norm(ours)
    exact = W.astype(np.float64) @ ours + b
    best = b - W.astype(np.float64) @ np.linalg.lstsq(W.astype(np.float64), b, rcond=1e-4)[0]
    assert np.linalg.norm(exact) == pytest.approx(np.linalg.norm(best), rel=1e-3)


def test_trap_classes_without_samples():
    bank, _ = synthetic_bank(n=60, failure_rate=0.1)  # 60 recordings can't fill 360 classes
    labels = angle_bins(bank.gt_angles, 360)
    with np.errstate(invalid="ignore", divide="ignore"):
        counts = np.bincount(labels, minlength=360)
        naive = np.stack([np.bincount(labels, x, 360) for x in pooled_features(bank).T], 1) / counts[:, None]
    assert np.isnan(naive).any()
    for name in ("mahalanobis", "she"):
        scores = make_detector(name, n_bins=360).fit(bank).score(synthetic_bank(n=40, seed=9)[0])
        assert np.isfinite(scores).all(), name


def test_trap_mahalanobis_needs_float64_and_shrinkage():
    rng = np.random.default_rng(7)
    # more features than recordings, far from the origin, some units dead: as a small network gives
    features = (rng.normal(size=(40, 2, 64)) * 0.01 + 50).astype(np.float16)
    features[..., :8] = 0
    bank = bank_of(features, rng.normal(size=(12, 64)), angles=rng.uniform(0, 360, 40))
    x = features.astype(np.float32).mean(1)
    naive_covariance = np.cov(x.T).astype(np.float32)
    assert np.linalg.matrix_rank(naive_covariance) < 64  # naive: cannot be inverted
    scores = Mahalanobis(n_bins=4).fit(bank).score(bank)
    assert np.isfinite(scores).all() and (scores >= 0).all() and scores.std() > 0


def test_trap_zero_features_in_knn():
    rng = np.random.default_rng(8)
    features = np.abs(rng.normal(size=(30, 2, 6)))
    features[[3, 20]] = 0
    bank = bank_of(features, rng.normal(size=(10, 6)))
    with np.errstate(invalid="ignore"):
        naive = pooled_features(bank) / np.linalg.norm(pooled_features(bank), axis=1, keepdims=True)
    assert np.isnan(naive[3]).all()
    scores = make_detector("knn", k=3).fit(bank).score(bank)
    assert np.isfinite(scores).all() and scores[3] > np.median(scores)


def test_trap_own_neighbour_makes_calibration_scores_too_good(study):
    calibration, test = study
    detector = make_detector("knn", k=1)
    seen = detector.fit(calibration).score(calibration)
    held_out = held_out_scores(lambda: make_detector("knn", k=1), calibration)
    good = calibration.abs_errors <= 30
    assert seen[good].max() < 1e-6 < held_out[good].min()  # naive: every good recording is its own neighbour
    routed = [(test_scores > np.quantile(scores, 0.7)).mean()
              for scores in (seen, held_out) for test_scores in [detector.score(test)]]
    assert routed[0] > 0.8 and abs(routed[1] - 0.3) < 0.12  # a "30 %" threshold


def test_silent_frames_do_not_count():
    rng = np.random.default_rng(9)
    features = np.abs(rng.normal(size=(10, 4, 6)))
    active = np.ones((10, 4), bool)
    active[:, 2:] = False
    W = rng.normal(size=(12, 6))
    loud = features.copy()
    loud[:, 2:] *= 50
    quiet, changed = (bank_of(part, W, active_frames=active) for part in (features, loud))
    for name in ("max_prob", "entropy", "gradnorm"):
        assert make_detector(name).score(quiet) == pytest.approx(make_detector(name).score(changed))
    for name in ("knn", "residual", "vim", "mahalanobis"):
        assert make_detector(name).fit(quiet).score(quiet) == pytest.approx(
            make_detector(name).fit(changed).score(changed), rel=1e-4, abs=1e-6)


# folds and faults


def test_folds_keep_rooms_whole():
    groups = np.repeat(np.arange(7), 4)
    folds = group_folds(groups, 5)
    assert all(len(set(folds[groups == g])) == 1 for g in range(7)) and set(folds) == set(range(5))
    assert set(group_folds(groups[:8], 5)) == {0, 1}
    with pytest.raises(DataError, match="two rooms"):
        group_folds(np.zeros(4))


def test_blocks_change_nothing(study):
    bank = study[0]
    values = np.random.default_rng(0).random(bank.logits_pre_sig.shape[:2])
    assert over_frames(bank, lambda rows: values[rows], block=7) == pytest.approx(values.mean(1))


def test_lost_network_and_one_sided_calibration(study):
    lost = bank_of(np.ones((6, 2, 3)), np.eye(3), abs_errors=np.full(6, 90.0))
    for name in ("knn", "mahalanobis", "vim", "she"):
        with pytest.raises(DataError, match="at least two recordings"):
            make_detector(name).fit(lost)
    with pytest.raises(DataError, match="stack"):
        make_detector("stack").fit(lost)
    with pytest.raises(ParameterError, match="sign"):
        ColumnDetector("a", 2)
