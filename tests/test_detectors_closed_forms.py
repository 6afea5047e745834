"""Detectors of scores, features, physics, reshaped features and distances against loops over recordings and frames,
pytorch-ood where it is installed, the known traps with the naive version failing, and properties."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logsumexp, softmax
from scipy.stats import entropy
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing import detectors_distances, detectors_features, detectors_rectified, detectors_scores, registry
from ssl_kit.routing.bank import FeatureBank, load_bank, save_bank
from ssl_kit.routing.detectors_distances import KLMatching, confidence_energy
from ssl_kit.routing.detectors_features import logit_origin
from ssl_kit.routing.detectors_rectified import ash_b, ash_s, negative_share, refuse_negative
from ssl_kit.routing.detectors_scores import (
    ORDERS,
    MaxLogitPNorm,
    centred_statistics,
    generalized_entropy,
    log_partition,
)
from ssl_kit.routing.metrics import auroc
from ssl_kit.routing.registry import available_detectors, detector_classes, make_detector, pooled_features
from ssl_kit.routing.synthetic import synthetic_bank, synthetic_study

N_CLASSES = 72  # 5° each: margin ± 3 bins, near ± 2 bins
HOMES = {f"ssl_kit.routing.detectors_{name}" for name in ("scores", "features", "physics", "rectified", "distances")}


def make_bank(head="softmax", seed=0, n=60, n_frames=4, n_features=12, **changes):
    "A bank of random non-negative features with silent frames, failures, and answers read from its own posterior."
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0, 360, n)
    preferred = np.arange(n_features) * 360 / n_features
    failing = rng.random(n) < 0.3
    heard = np.where(failing, rng.uniform(0, 360, n), truth)
    bump = np.exp(3 * (np.cos(np.radians(heard[:, None] - preferred)) - 1)) * rng.uniform(0.5, 1.5, (n, 1))
    features = np.maximum(bump[:, None] + 0.15 * rng.normal(size=(n, n_frames, n_features)), 0).astype(np.float32)
    classes = np.arange(N_CLASSES) * 360 / N_CLASSES
    W = (3 * np.exp(3 * (np.cos(np.radians(classes[:, None] - preferred)) - 1))
         + 0.1 * np.random.default_rng(99).normal(size=(N_CLASSES, n_features)) - 1).astype(np.float32)
    b = np.linspace(-0.3, 0.2, N_CLASSES).astype(np.float32)
    logits = features @ W.T + b
    active = rng.random((n, n_frames)) < 0.7
    active[:, 0] = True
    p = (softmax if head == "softmax" else lambda z, axis: expit(z))(logits.astype(float), axis=-1)
    posterior = (p * active[..., None]).sum(1) / active.sum(1)[:, None]
    predicted = posterior.argmax(1) * 360 / N_CLASSES + 0.7  # no answer lies on the border of two sectors
    columns = {"srp_ratio": rng.uniform(0.1, 1, n), "log_likelihood_network": rng.normal(size=n),
               "log_likelihood_fallback": rng.normal(size=n), "fallback_angle": rng.uniform(0, 360, n)}
    fields = {"predicted_angles": predicted, "gt_angles": truth, "global_indices": np.arange(n) + 1000 * seed,
              "abs_errors": np.abs((predicted - truth + 180) % 360 - 180), "filenames": np.arange(n).astype(str),
              "group_ids": (np.arange(n) % 5).astype(str), "columns": columns, "penultimate_features": features,
              "logits_pre_sig": logits, "predictions": posterior, "W": W, "b": b, "head": head,
              "active_frames": active} | changes
    return FeatureBank(**fields)


def single_frames(features, W, b=None, head="softmax", angles=None, **changes):
    "A bank of one frame per recording from features (n, D); all answered well."
    features, n = np.asarray(features), len(features)
    b = np.zeros(len(W)) if b is None else b
    logits = features.astype(float) @ W.T + b
    angles = softmax(logits, axis=-1).argmax(-1) * 360.0 / len(W) if angles is None else angles
    fields = {"predicted_angles": angles, "gt_angles": angles, "abs_errors": np.zeros(n), "columns": {},
              "global_indices": np.arange(n), "filenames": np.arange(n).astype(str), "logits_pre_sig": logits[:, None],
              "group_ids": (np.arange(n) % 5).astype(str), "penultimate_features": features[:, None],
              "predictions": softmax(logits, axis=-1), "W": W, "b": b, "head": head} | changes
    return FeatureBank(**fields)


# by hand: loops over recordings and their active frames, float64


def frames_of(bank, i):
    "(features, logits) of each active frame of recording i."
    return [(bank.penultimate_features[i, t].astype(float), bank.logits_pre_sig[i, t].astype(float))
            for t in np.flatnonzero(bank.active_frames[i])]


def each(bank, value):
    "Mean of value(h, z) over the active frames of each recording."
    return np.array([np.mean([value(h, z) for h, z in frames_of(bank, i)]) for i in range(len(bank))])


def prob(bank, z):
    return softmax(z) if bank.head == "softmax" else expit(z)


def energy(bank, z):
    return logsumexp(z) if bank.head == "softmax" else sum(np.log1p(np.exp(-abs(v))) + max(v, 0) for v in z)


def head_energy(bank, h):
    return energy(bank, bank.W.astype(float) @ h + bank.b)


def pooled(bank):
    return np.array([np.mean([h for h, _ in frames_of(bank, i)], axis=0) for i in range(len(bank))])


def good(bank):
    return [i for i in range(len(bank)) if bank.abs_errors[i] <= 30]


def good_frames(bank):
    return np.array([h for i in good(bank) for h, _ in frames_of(bank, i)])


def sector(angle, n_bins):
    "The sector whose centre is nearest on the circle."
    centres = np.arange(n_bins) * 360 / n_bins
    return int(np.argmin(np.abs((angle - centres + 180) % 360 - 180)))


def apart(c, peak):
    "Bins between c and peak on the circle."
    return min((c - peak) % N_CLASSES, (peak - c) % N_CLASSES)


def margin(cal, bank):
    def of(p):
        peak = int(p.argmax())
        return -(p[peak] - max(v for c, v in enumerate(p) if apart(c, peak) > 3))
    return each(bank, lambda h, z: of(prob(bank, z)))


def sharpness(cal, bank):
    def of(p):
        peak = int(p.argmax())
        return (p[(peak + 2) % N_CLASSES] + p[peak - 2]) / 2 / p[peak]
    return each(bank, lambda h, z: of(prob(bank, z)))


def concentration(cal, bank):
    def of(p):
        return -sum(v for c, v in enumerate(p) if apart(c, int(p.argmax())) <= 2) / p.sum()
    return each(bank, lambda h, z: of(prob(bank, z)))


def temperature(cal, bank):
    rows = [(z, round(cal.gt_angles[i] * N_CLASSES / 360) % N_CLASSES) for i in range(len(cal))
            for _, z in frames_of(cal, i)]
    found = minimize_scalar(lambda log_t: -np.mean([log_softmax(z / np.exp(log_t))[label] for z, label in rows]),
                            bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    return each(bank, lambda h, z: -softmax(z / np.exp(found.x)).max())


def mahalanobis(cal, bank, n_bins=36):
    x, labels = pooled(cal)[good(cal)], [sector(cal.gt_angles[i], n_bins) for i in good(cal)]
    means = {k: np.mean([row for row, label in zip(x, labels, strict=True) if label == k], axis=0) for k in set(labels)}
    precision = LedoitWolf(assume_centered=True).fit(
        [row - means[label] for row, label in zip(x, labels, strict=True)]).precision_
    return np.array([min((row - m) @ precision @ (row - m) for m in means.values()) for row in pooled(bank)])


def temperature_mahalanobis(cal, bank):
    parts = [(temperature(cal, b), np.sqrt(mahalanobis(cal, b))) for b in (cal, bank)]
    return sum((t - c.mean()) / c.std() for c, t in zip(*parts, strict=True))


def knn(cal, bank):
    reference = [row / np.linalg.norm(row) for row in pooled(cal)[good(cal)]]
    return np.array([sorted(np.linalg.norm(row / np.linalg.norm(row) - r) for r in reference)[9]
                     for row in pooled(bank)])


def residual(cal, bank):
    u = np.linalg.lstsq(cal.W.astype(float), -cal.b.astype(float), rcond=1e-6)[0]
    principal = np.linalg.svd(good_frames(cal) - u)[2][:6]
    return each(bank, lambda h, z: np.linalg.norm((h - u) - principal.T @ (principal @ (h - u))))


def vim(cal, bank):
    alpha = each(cal, lambda h, z: z.max())[good(cal)].mean() / residual(cal, cal)[good(cal)].mean()
    return alpha * residual(cal, bank) - each(bank, lambda h, z: energy(bank, z))


def she(cal, bank):
    stored = {}
    for i in good(cal):
        stored.setdefault(sector(cal.predicted_angles[i], 36), []).append(pooled(cal)[i])
    x, scores = pooled(bank), []
    for i in range(len(bank)):
        k = sector(bank.predicted_angles[i], 36)
        near = sorted(stored, key=lambda j: (min((j - k) % 36, (k - j) % 36), j))[0]
        scores.append(-np.dot(np.mean(stored[near], axis=0), x[i]))
    return np.array(scores)


def disagreement(cal, bank):
    turn = np.exp(1j * np.radians(bank.predicted_angles - bank.columns["fallback_angle"]))
    return np.abs(np.degrees(np.angle(turn)))


def max_logit_pnorm(cal, bank):
    def confidence(b, p):
        return each(b, lambda h, z: z.max() if p is None else
                    (z - z.mean()).max() / np.linalg.norm(z - z.mean(), ord=p))
    chance = {p: roc_auc_score(cal.abs_errors <= 30, confidence(cal, p)) for p in (None, 2, 3, 4, 5, 6, 7, 8)}
    best = [p for p in chance if chance[p] == max(chance.values())][0]
    c = confidence(cal, best)
    return (c.mean() - confidence(bank, best)) / c.std()


def gen(cal, bank):
    def of(z):
        z = np.sort(z.astype(np.longdouble))[::-1]
        p, not_p = ((np.exp(z - z[0]) / np.exp(z - z[0]).sum(),) * 2 if bank.head == "softmax"
                    else (1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))))
        if bank.head == "softmax":
            not_p = np.array([sum(p[j] for j in range(len(p)) if j != k) for k in range(len(p))])
        return float(sum((p[k] * not_p[k]) ** 0.1 for k in range(40)))
    return each(bank, lambda h, z: of(z))


def kl_matching(cal, bank):
    typical = {}
    for i in good(cal):
        q = cal.predictions[i] / cal.predictions[i].sum()
        typical.setdefault(sector(cal.predicted_angles[i], 360), []).append(q)
    return np.array([min(entropy(q, np.mean(rows, axis=0)) for rows in typical.values()) for q in bank.predictions])


def react(cal, bank):
    clip = np.percentile(good_frames(cal), 90)
    return each(bank, lambda h, z: -head_energy(bank, [min(v, clip) for v in h]))


def dice(cal, bank):
    mean = pooled(cal)[good(cal)].mean(axis=0)
    ranked = sorted(((cal.W[c, d] * mean[d], c, d) for c in range(N_CLASSES) for d in range(len(mean))), reverse=True)
    sparse = np.zeros(cal.W.shape)
    for _, c, d in ranked[:round(0.1 * len(ranked))]:
        sparse[c, d] = cal.W[c, d]
    return each(bank, lambda h, z: -energy(bank, sparse @ h + bank.b))


def ash(kind, percentile):
    def of(h):
        kept = np.argsort(h)[round(len(h) * percentile / 100):]
        kept = [d for d in kept if h[d] > 0]
        out = np.zeros(len(h))
        for d in kept:
            out[d] = h[d] * np.exp(h.sum() / h[kept].sum()) if kind == "s" else h.sum() / len(kept)
        return out
    return lambda cal, bank: each(bank, lambda h, z: -head_energy(bank, of(h)))


def odin(cal, bank):
    epsilon = 0.005 * np.sqrt(np.mean([np.mean([(h**2).mean() for h, _ in frames_of(cal, i)]) for i in good(cal)]))

    def of(h, z):
        p = softmax(z / 1000)
        slope = bank.W[z.argmax()].astype(float) - sum(p[c] * bank.W[c].astype(float) for c in range(N_CLASSES))
        return -softmax((bank.W @ (h + epsilon * np.sign(slope)) + bank.b) / 1000).max()
    return each(bank, of)


def nnguide(cal, bank):
    def sure(b):
        return each(b, lambda h, z: energy(b, z) - (z.mean() if b.head == "softmax" else 0))
    reference = [(row / np.linalg.norm(row), e) for row, e in zip(pooled(cal)[good(cal)], sure(cal)[good(cal)],
                                                                   strict=True)]
    return np.array([-own * np.mean(sorted(e * np.dot(row, r) for r, e in reference)[-10:]) / np.linalg.norm(row)
                     for row, own in zip(pooled(bank), sure(bank), strict=True)])


def sirc(second):
    def score(cal, bank):
        usual = second(cal, cal)[good(cal)]
        mean, deviation = usual.mean(), usual.std()
        alarm = [1 + np.exp(-(s - (mean - 3 * deviation)) / deviation) for s in second(cal, bank)]
        return (1 - each(bank, lambda h, z: prob(bank, z).max())) * np.array(alarm)
    return score


BY_HAND = {
    "max_prob": lambda cal, bank: each(bank, lambda h, z: -max(prob(bank, z))),
    "max_logit": lambda cal, bank: each(bank, lambda h, z: -max(z)),
    "entropy": lambda cal, bank: each(bank, lambda h, z: entropy(prob(bank, z))),
    "margin": margin,
    "energy": lambda cal, bank: each(bank, lambda h, z: -energy(bank, z)),
    "variance": lambda cal, bank: each(bank, lambda h, z: -np.var(prob(bank, z) / prob(bank, z).sum())),
    "sharpness": sharpness,
    "concentration": concentration,
    "pooled_max_prob": lambda cal, bank: np.array([-max(q) for q in bank.predictions]),
    "pooled_entropy": lambda cal, bank: np.array([entropy(q) for q in bank.predictions]),
    "temperature": temperature,
    "max_logit_pnorm": max_logit_pnorm,
    "gen": gen,
    "mahalanobis": mahalanobis,
    "knn": knn,
    "residual": residual,
    "vim": vim,
    "she": she,
    "gradnorm": lambda cal, bank: each(bank, lambda h, z: -np.abs(np.outer(softmax(z) - 1 / N_CLASSES, h)).sum()),
    "physics": lambda cal, bank: np.array([1 - v for v in bank.columns["srp_ratio"]]),
    "likelihood_ratio": lambda cal, bank: np.array([
        other - own for own, other in zip(bank.columns["log_likelihood_network"],
                                          bank.columns["log_likelihood_fallback"], strict=True)]),
    "disagreement": disagreement,
    "react": react,
    "dice": dice,
    "ash_s": ash("s", 90),
    "ash_b": ash("b", 65),
    "odin": odin,
    "relative_mahalanobis": lambda cal, bank: mahalanobis(cal, bank) - mahalanobis(cal, bank, 1),
    "temperature_mahalanobis": temperature_mahalanobis,
    "nnguide": nnguide,
    "sirc": sirc(lambda cal, bank: each(bank, lambda h, z: sum(abs(v) for v in h))),
    "sirc_residual": sirc(lambda cal, bank: -residual(cal, bank)),
    "kl_matching": kl_matching,
}
OPTIONS = {"gen": {"n_top": 40}}


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def banks(request):
    return make_bank(request.param), make_bank(request.param, seed=1, n=25)


def test_no_detector_of_these_modules_is_left_out():
    # the stack of scores has its own closed form in test_routing_detectors.py
    assert {name for name, cls in detector_classes().items() if cls.__module__ in HOMES} - {"stack"} == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_the_sum_by_hand(banks, name):
    calibration, test = banks
    if name not in available_detectors(test):
        assert test.head == "sigmoid" and "softmax" in detector_classes()[name].needs
        pytest.skip("asks for a softmax head")
    scores = make_detector(name, **OPTIONS.get(name, {})).fit(calibration).score(test)
    expected = BY_HAND[name](calibration, test)
    # of the spread, not of the size: at T = 1000 all of ODIN's scores are 1/C but for a hundredth
    assert scores == pytest.approx(expected, rel=0, abs=3e-4 * np.ptp(expected))
    assert np.ptp(scores) > 0


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_an_option_at_its_end_is_a_simpler_detector(head):
    calibration, bank = make_bank(head), make_bank(head, seed=1)
    plain = make_detector("energy").score(bank)
    assert make_detector("dice", keep=1.0).fit(calibration).score(bank) == pytest.approx(plain, rel=1e-5)
    assert make_detector("react", percentile=100, good_deg=180).fit(bank).score(bank) == pytest.approx(plain, rel=1e-5)
    scaled = replace(bank, logits_pre_sig=np.e * (bank.logits_pre_sig - bank.b) + bank.b)  # ASH-S of nothing: e · h
    assert make_detector("ash_s", percentile=0).score(bank) == pytest.approx(make_detector("energy").score(scaled),
                                                                            rel=1e-5)
    assert make_detector("gen", n_top=N_CLASSES).score(bank) == pytest.approx(
        make_detector("gen", n_top=10**6).score(bank))
    assert make_detector("relative_mahalanobis", n_bins=1).fit(calibration).score(bank) == pytest.approx(np.zeros(60))
    if head == "softmax":
        assert make_detector("odin", temperature=1.0, step=0.0).fit(calibration).score(bank) == pytest.approx(
            make_detector("max_prob").score(bank), rel=1e-5)


def test_gen_with_power_one_is_the_gini_impurity_and_one_term_is_the_peak():
    z = np.random.default_rng(0).normal(size=(20, 30)) * 3
    p = softmax(z, axis=1)
    assert generalized_entropy(z, "softmax", gamma=1, n_top=30) == pytest.approx(1 - (p**2).sum(1), rel=1e-4)
    top = p.max(1)
    assert generalized_entropy(z, "softmax", 0.1, n_top=1) == pytest.approx((top * (1 - top)) ** 0.1, rel=1e-4)
    assert generalized_entropy(np.zeros((1, 8)), "sigmoid", 1, 3) == pytest.approx([3 / 4])
    with pytest.raises(ParameterError, match="head"):
        generalized_entropy(z, "tanh")


def test_dice_keeps_what_adds_most_and_not_what_takes_most_away():
    bank = single_frames(np.ones((6, 3)) * [1, 2, 3], np.array([[1.0, -9, 2], [-8, 3, -5]]))
    detector = make_detector("dice", keep=0.5).fit(bank)  # contributions 1, −18, 6 and −8, 6, −15
    assert detector.sparse.tolist() == [[1, 0, 2], [0, 3, 0]]
    assert detector.score(bank) == pytest.approx(np.full(6, -np.logaddexp(1 + 6, 6)))


# a peer: pytorch-ood, where it can be imported


@pytest.fixture(scope="module")
def peer():
    ood = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed", exc_type=ImportError)
    return pytest.importorskip("torch"), ood


@pytest.fixture(scope="module")
def plain_banks():
    "Two banks of single frames, all answered well, and logits of mean zero, which centring does not change."
    bank = make_bank(n=80, n_frames=1)
    W, b = bank.W - bank.W.mean(axis=0), bank.b - bank.b.mean()
    return [single_frames(make_bank(n=n, n_frames=1, seed=seed).penultimate_features[:, 0], W, b)
            for n, seed in ((80, 2), (30, 3))]


@pytest.mark.parametrize("name", ["react", "dice", "ash_s", "ash_b", "gen", "nnguide", "kl_matching", "odin"])
def test_equals_pytorch_ood(peer, plain_banks, name):
    torch, ood = peer
    calibration, bank = plain_banks
    h, x = (torch.tensor(part.penultimate_features[:, 0]) for part in plain_banks)
    W, b, z = torch.tensor(bank.W), torch.tensor(bank.b), torch.tensor(bank.logits_pre_sig[:, 0])
    known = torch.zeros(len(h), dtype=torch.long)

    def head(features):
        return features.flatten(1) @ W.T + b

    def maps(features):
        return features[:, :, None, None]

    options = {}
    if name == "react":
        theirs = ood.ReAct(None, head, percentile=0.9).fit_feature_maps(maps(h), known).predict_feature_maps(maps(x))
    elif name == "dice":
        options = {"keep": 0.125}  # 108 of 864 weights, however the quantile is rounded
        theirs = ood.DICE(None, W, b, p=0.875).fit_features(h, known).predict_features(x)
    elif name in ("ash_s", "ash_b"):
        options = {"percentile": 60}
        theirs = ood.ASH(None, head, variant=name.replace("_", "-"), percentile=0.6).predict_feature_maps(maps(x))
    elif name == "gen":
        options = {"n_top": 20}
        theirs = 20 * ood.GEN(None, M=20).predict_logits(z)
    elif name == "nnguide":
        detector = ood.NNGuide(None, head, k=10)
        theirs = detector.fit_features(h, known).predict_features(x)
    elif name == "kl_matching":
        options = {"n_bins": N_CLASSES}
        theirs = ood.KLMatching(None).fit_logits(torch.tensor(calibration.logits_pre_sig[:, 0])).predict_logits(z)
    else:
        epsilon = float(0.005 * (h**2).mean().sqrt())
        theirs = ood.ODIN(head, eps=epsilon, temperature=1000.0).predict(x.clone())
    ours = make_detector(name, **options).fit(calibration).score(bank)
    assert ours == pytest.approx(theirs.detach().numpy(), rel=2e-3, abs=1e-5)


# the known traps: the naive version fails, ours does not


@pytest.mark.parametrize("name", ["react", "dice", "ash_s", "ash_b"])
def test_trap_features_with_a_sign(name):
    bank = make_bank()
    signed = bank.penultimate_features - np.float32(0.2)
    calibration = replace(bank, penultimate_features=signed)
    if name != "dice":
        # the same network, features and weights both negated: its answers are the same, the naive score is not
        h, W = signed[:, 0], bank.W
        shape = {"react": lambda x: np.minimum(x, np.percentile(x, 90)), "ash_s": lambda x: ash_s(x, 90),
                 "ash_b": lambda x: ash_b(x, 65)}[name]
        naive = [-logsumexp(shape(sign * h) @ (sign * W).T + bank.b, axis=1) for sign in (1, -1)]
        assert np.corrcoef(*naive)[0, 1] < 0.9
    else:
        # a unit of either sign that tells the classes apart has mean zero: DICE drops it, and sees nothing any more
        h, W = np.stack([np.resize([3.0, -3.0], 20), np.ones(20)], 1), np.array([[1.0, 0.5], [-1.0, 0.5]])
        contribution = W * h.mean(axis=0)
        naive = -logsumexp(h @ np.where(contribution > np.median(contribution), W, 0).T, axis=1)
        assert np.ptp(naive) == 0
    share = 100 * negative_share(calibration).mean()
    assert share > 10
    with pytest.raises(DataError, match=rf"{name}: .*after a ReLU.*{share:.2g} % negative"):
        make_detector(name).fit(calibration)
    with pytest.raises(DataError, match="negative"):  # and when only the test bank has them
        make_detector(name).fit(bank).score(calibration)


def test_rounding_below_zero_and_silent_frames_are_no_sign():
    bank = make_bank()
    noise = np.random.default_rng(0).uniform(-1e-4, 0, bank.penultimate_features.shape).astype(np.float32)
    rounded = replace(bank, penultimate_features=bank.penultimate_features + noise)
    for name in ("react", "dice", "ash_s", "ash_b"):
        assert make_detector(name).fit(rounded).score(rounded) == pytest.approx(
            make_detector(name).fit(bank).score(bank), rel=5e-3)
    silent = np.where(bank.active_frames[..., None], bank.penultimate_features, -1)
    refuse_negative(replace(bank, penultimate_features=silent), "react")
    one = bank.penultimate_features.copy()
    one[7, 0, 3] = -0.5  # a single true negative is enough
    with pytest.raises(DataError, match="1 of 60 recordings"):
        refuse_negative(replace(bank, penultimate_features=one), "react")


def test_trap_default_cut_off_of_pinv_in_single_precision():
    rng = np.random.default_rng(6)
    W = (rng.normal(size=(360, 20)) @ rng.normal(size=(20, 32))).astype(np.float32)  # twelve directions are rounding
    b = rng.normal(size=360).astype(np.float32)
    naive, ours = -np.linalg.pinv(W, rcond=1e-15) @ b, logit_origin(W, b)  # numpy's default rcond, written out
    assert np.array_equal(naive, -np.linalg.pinv(W) @ b)
    assert np.linalg.norm(naive) > 1e3 * np.linalg.norm(ours)
    jiggled = W * (1 + np.float32(1e-7) * rng.choice([-1, 1], W.shape)).astype(np.float32)
    assert np.linalg.norm(-np.linalg.pinv(jiggled) @ b - naive) > 0.5 * np.linalg.norm(naive)  # noise, not an answer
    assert logit_origin(jiggled, b) == pytest.approx(ours, abs=1e-3 * np.linalg.norm(ours))


@pytest.mark.parametrize("name", ["kl_matching", "relative_mahalanobis", "temperature_mahalanobis"])
def test_trap_classes_without_samples(name):
    calibration, test = synthetic_bank(n=60)[0], synthetic_bank(n=40, first_room=20)[0]
    labels = np.round(calibration.predicted_angles).astype(int) % 360
    with np.errstate(invalid="ignore", divide="ignore"):
        naive = np.stack([np.bincount(labels, q, 360) for q in calibration.predictions.T], 1) \
            / np.bincount(labels, minlength=360)[:, None]
    assert np.isnan(naive).any() and np.isnan((test.predictions @ np.log(naive).T).min(axis=1)).all()
    scores = make_detector(name, n_bins=360).fit(calibration).score(test)
    assert np.isfinite(scores).all() and scores.std() > 0


def test_trap_typical_posterior_with_a_zero():
    far = np.eye(8)[[0, 4]] * 200.0  # posteriors that underflow to exact zeros elsewhere
    bank = single_frames(np.eye(2), far.T)
    assert (softmax(bank.logits_pre_sig[:, 0].astype(np.float32), axis=1) == 0).any()
    other = replace(bank, predictions=np.roll(bank.predictions, 1, axis=1).astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        q = bank.predictions.astype(np.float32)
        naive = (other.predictions * np.log(other.predictions / q)).sum(1)
    assert not np.isfinite(naive).any()
    scores = KLMatching(8).fit(bank).score(other)
    assert np.isfinite(scores).all() and (scores > 20).all()
    assert KLMatching(8).fit(bank).score(bank) == pytest.approx([0, 0], abs=1e-9)


def test_trap_softmax_over_frames():
    bank = make_bank(n_frames=1)  # one frame: over that axis every probability is 1
    naive = softmax(bank.logits_pre_sig, axis=1)
    assert ((naive * (1 - naive)) ** 0.1).sum() == 0
    assert make_detector("gen").score(bank).std() > 0 and make_detector("odin").fit(bank).score(bank).std() > 0
    z = bank.logits_pre_sig.astype(float)
    assert log_partition(z, "softmax").shape == (60, 1) and log_partition(z, "softmax") == pytest.approx(
        logsumexp(z, axis=-1), rel=1e-5)


def test_trap_one_minus_p_in_single_precision():
    z = np.zeros((3, 12), np.float32)
    z[:, 0] = [21, 26, 31]  # p = 1 − 8e-9, 1 − 6e-11, 1 − 4e-13
    p = softmax(z, axis=1).astype(np.float32)
    naive = (p[:, 0] * (1 - p[:, 0])) ** 0.1
    assert naive.tolist() == [0, 0, 0]  # naive: the peak's own term is lost
    exact = [np.exp(0.1 * (-np.log1p(11 * np.exp(-v)) + np.log(11 * np.exp(-v)) - np.log1p(11 * np.exp(-v))))
             for v in (21.0, 26.0, 31.0)]
    assert generalized_entropy(z, "softmax", 0.1, 1) == pytest.approx(exact, rel=1e-4)
    assert np.isfinite(generalized_entropy(np.array([[0.0, 500, -500]]), "softmax")).all()
    assert np.isfinite(generalized_entropy(np.array([[0.0, 500, -500]]), "sigmoid")).all()


def test_trap_mahalanobis_in_single_precision_without_shrinkage():
    rng = np.random.default_rng(7)
    loud = rng.normal(size=(60, 1, 1)) * 30 + 200  # collinear, far from the origin, and fewer rows than twice D
    features = (np.abs(loud * rng.uniform(0.5, 1, 40)) + 1e-3 * rng.normal(size=(60, 2, 40))).astype(np.float32)
    bank = make_bank(n=60, n_frames=2, n_features=40)
    bank = replace(bank, penultimate_features=features, W=None, b=None, active_frames=None, abs_errors=np.zeros(60))
    x = features.mean(axis=1)
    centred = x - x.mean(axis=0)
    naive = np.einsum("nd,de,ne->n", centred, np.linalg.inv(centred.T @ centred / np.float32(60)), centred)
    assert (naive < 0).any() or np.abs(naive.mean() - 40) > 10  # a squared distance; its mean is D by construction
    detector = make_detector("relative_mahalanobis", n_bins=6).fit(bank)
    assert np.isfinite(detector.score(bank)).all()
    assert detector.background.score(bank).min() >= 0 and detector.background.score(bank).mean() < 45


def test_trap_zero_feature_vectors():
    bank = make_bank()
    features, logits = bank.penultimate_features.copy(), bank.logits_pre_sig.copy()
    features[[3, 20]], logits[[3, 20]] = 0, bank.b
    bank = replace(bank, penultimate_features=features, logits_pre_sig=logits)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = pooled_features(bank)
        assert np.isnan((x / np.linalg.norm(x, axis=1, keepdims=True))[3]).all()
        kept = np.zeros(12)
        assert np.isnan(kept * np.exp(features[3, 0].sum() / kept.sum())).all()  # ASH-S of nothing
    scores = make_detector("nnguide").fit(bank).score(bank)
    assert np.isfinite(scores).all() and scores[3] == scores.max() == 0  # no direction: least confident
    for name in ("ash_s", "ash_b", "react", "dice", "odin", "sirc", "sirc_residual"):
        scores = make_detector(name).fit(bank).score(bank)
        assert np.isfinite(scores).all(), name
    assert make_detector("ash_s").score(bank)[3] == pytest.approx(-logsumexp(bank.b), rel=1e-5)


def test_trap_energy_below_zero_turns_nnguide_round():
    calibration, test = make_bank(n=80), make_bank(seed=1, n=50)
    quiet = [replace(bank, logits_pre_sig=bank.logits_pre_sig - 20) for bank in (calibration, test)]
    raw = logsumexp(quiet[1].logits_pre_sig.astype(float), axis=-1).mean(axis=1)
    assert (raw < 0).all()

    unit = [pooled_features(b) / np.linalg.norm(pooled_features(b), axis=1, keepdims=True) for b in quiet]

    def naive(shift):
        own, theirs = (logsumexp(b.logits_pre_sig.astype(float) + shift, axis=-1).mean(1) for b in (test, calibration))
        return -own * np.sort(unit[1] @ (unit[0] * theirs[:, None]).T, axis=1)[:, -10:].mean(axis=1)

    assert np.corrcoef(naive(0), naive(-20))[0, 1] < 0.5  # naive: a constant that no posterior sees reorders all
    detector = make_detector("nnguide")
    expected = detector.fit(calibration).score(test)
    assert detector.fit(quiet[0]).score(quiet[1]) == pytest.approx(expected, rel=1e-4)
    assert confidence_energy(quiet[1]).min() >= np.log(N_CLASSES)


def test_trap_folds_that_choose_different_norms():
    bank = make_bank(n=120)
    raw = {p: MaxLogitPNorm()._confidence(bank, p) for p in (None, *ORDERS)}
    assert np.median(raw[None]) > 3 * np.median(raw[2])  # naive: pooled over folds, the choice decides the rank
    for p in ORDERS:
        detector = MaxLogitPNorm(p).fit(bank)
        assert detector.score(bank).mean() == pytest.approx(0, abs=1e-9)
        assert detector.score(bank).std() == pytest.approx(1)


def test_trap_a_norm_that_does_harm():
    rng = np.random.default_rng(0)
    angle = np.radians(np.arange(N_CLASSES) * 5)
    fails = np.arange(100) < 40
    # every frame has the same posterior shape in its logits; only their size tells failures
    size = np.where(fails, 1.0, 3.0)[:, None] * rng.uniform(0.9, 1.1, (100, 1))
    logits = (size * np.cos(angle) + 0.01 * rng.normal(size=(100, N_CLASSES)) * size)[:, None]
    bank = single_frames(np.ones((100, 2)), np.ones((N_CLASSES, 2)), abs_errors=np.where(fails, 90.0, 1.0),
                         logits_pre_sig=logits)
    assert auroc(-centred_statistics(bank)["norm_2"], fails) < 0.7  # naive: always normalise
    detector = MaxLogitPNorm().fit(bank)
    assert detector.chosen is None and auroc(detector.score(bank), fails) == 1
    with pytest.raises(DataError, match="failures"):
        MaxLogitPNorm().fit(bank.take(~fails))
    with pytest.raises(ParameterError, match="p: expected"):
        MaxLogitPNorm(p=1)


def test_trap_flat_and_huge_logits_in_norms():
    flat = np.full((4, 1, N_CLASSES), 3.3, np.float32)
    flat[2] = np.linspace(-1, 1, N_CLASSES) * 1e30
    with np.errstate(all="ignore"):
        z = flat - flat.mean(axis=-1, keepdims=True, dtype=np.float32)
        naive = z.max(-1) / (np.abs(z) ** 8).sum(-1) ** np.float32(1 / 8)
        assert naive[2] == 0  # naive: the power overflows
    bank = single_frames(np.ones((4, 2)), np.ones((N_CLASSES, 2)), logits_pre_sig=flat)
    ratios = centred_statistics(bank)["norm_8"]
    assert ratios[[0, 1, 3]].tolist() == [0, 0, 0] and 0.5 < ratios[2] < 1


def test_trap_a_feature_score_far_below_the_usual():
    bank = make_bank()
    features = bank.penultimate_features.copy()
    steady = np.full_like(features, 1.0) + 1e-3 * np.random.default_rng(0).normal(size=features.shape)
    calibration = replace(bank, penultimate_features=steady.astype(np.float32))
    detector = make_detector("sirc").fit(calibration)
    with np.errstate(over="ignore"):
        naive = np.exp(-detector.b * (features.sum(axis=(1, 2)) * 0 - detector.a))
    assert np.isinf(naive).all()
    gone = replace(bank, penultimate_features=features * 0)
    assert np.isfinite(detector.score(gone)).all() and detector.score(gone).min() > detector.score(calibration).max()
    constant = replace(bank, penultimate_features=np.ones_like(features))  # σ = 0
    assert np.isfinite(make_detector("sirc").fit(constant).score(constant)).all()


def test_trap_fewer_units_on_than_are_kept():
    h = np.zeros((2, 10), np.float32)
    h[0, 4], h[1, :6] = 6.0, [5, 4, 3, 3, 3, 1]
    naive = np.zeros(10)
    naive[np.argsort(h[0])[4:]] = h[0].sum() / 6  # binarise a top six: silent units are switched on
    assert (naive > 0).sum() == 6
    assert ash_b(h, 40)[0].tolist() == h[0].tolist()
    for rows in (ash_b(h, 70), ash_s(h, 70)):  # ties of the smallest kept value stay together, whatever their order
        assert (rows[1] > 0).tolist() == (h[1] >= 3).tolist()
    assert ash_b(h, 70).sum(axis=1) == pytest.approx(h.sum(axis=1))
    with np.errstate(over="raise", invalid="raise"):
        wide = np.ones((1, 256), np.float32)
        wide[0, 0] = 1.01
        assert np.isfinite(ash_s(wide, 98)).all()
    for name, option in (("ash_s", {"percentile": 99}), ("ash_b", {"percentile": -1}), ("react", {"percentile": 0}),
                         ("dice", {"keep": 0}), ("odin", {"temperature": 0}), ("gen", {"gamma": 0}),
                         ("nnguide", {"k": 0})):
        with pytest.raises(ParameterError):
            make_detector(name, **option)


def test_trap_sigmoid_heads_say_what_they_mean():
    bank = make_bank("sigmoid")
    have = available_detectors(bank)
    assert not {"odin", "temperature_mahalanobis"} & set(have)
    assert {"gen", "nnguide", "sirc", "kl_matching", "react", "dice", "ash_s", "ash_b", "max_logit_pnorm"} <= set(have)
    naive = gen(None, replace(bank, head="softmax"))
    assert np.abs(naive - make_detector("gen", n_top=40).score(bank)).min() > 1


def test_a_network_without_a_head_lacks_what_reads_it():
    calibration, test = (replace(bank, W=None, b=None) for bank in (make_bank(), make_bank(seed=1)))
    have = set(available_detectors(test)) & set(BY_HAND)
    assert set(BY_HAND) - have == {"react", "dice", "ash_s", "ash_b", "odin", "residual", "vim", "sirc_residual"}
    for name in have:
        assert np.isfinite(make_detector(name).fit(calibration).score(test)).all(), name


# properties


LEARNED_HERE = ("max_logit_pnorm", "gen", "kl_matching", "react", "dice", "ash_s", "ash_b", "odin",
                "relative_mahalanobis", "temperature_mahalanobis", "nnguide", "sirc", "sirc_residual")
SOFTMAX_SCORES = ("max_prob", "entropy", "margin", "variance", "sharpness", "concentration", "temperature", "gradnorm",
                  "gen", "odin", "nnguide", "sirc", "temperature_mahalanobis")


@pytest.fixture(scope="module")
def fitted():
    calibration, test = make_bank(n=80), make_bank(seed=1, n=50)
    detectors = {name: make_detector(name).fit(calibration) for name in {*LEARNED_HERE, *SOFTMAX_SCORES}}
    return detectors, test, {name: detector.score(test) for name, detector in detectors.items()}


def fresh(bank):
    "The same bank with nothing cached."
    return replace(bank)


@settings(max_examples=10)
@given(st.permutations(range(50)), st.integers(1, 50))
def test_order_and_company_of_recordings_do_not_matter(fitted, order, n_kept):
    detectors, test, whole = fitted
    rows = np.array(order[:n_kept])
    part = fresh(test).take(rows)
    for name in LEARNED_HERE:
        assert detectors[name].score(part) == pytest.approx(whole[name][rows], rel=1e-4, abs=1e-5), name


@settings(max_examples=10)
@given(st.floats(-60, 60))
def test_a_constant_on_all_logits_changes_no_score_of_a_softmax(fitted, constant):
    detectors, test, whole = fitted
    shifted = replace(test, logits_pre_sig=test.logits_pre_sig.astype(np.float64) + constant)
    for name in SOFTMAX_SCORES:
        assert detectors[name].score(shifted) == pytest.approx(whole[name], rel=1e-3, abs=2e-4), name
    ratios, same = centred_statistics(test), centred_statistics(shifted)
    for p in ORDERS:
        assert same[f"norm_{p}"] == pytest.approx(ratios[f"norm_{p}"], rel=1e-3)


@settings(max_examples=15)
@given(st.integers(0, 98), st.lists(st.lists(st.floats(0, 50, width=32), min_size=8, max_size=8), min_size=1,
                                    max_size=5))
def test_ash_keeps_signs_order_and_sums(percentile, rows):
    h = np.array(rows, np.float32)
    shaped, flat = ash_s(h, percentile), ash_b(h, percentile)
    assert np.isfinite(shaped).all() and ((shaped > 0) == (flat > 0)).all() and not (shaped[h == 0] > 0).any()
    assert flat.sum(axis=1) == pytest.approx(h.sum(axis=1), rel=1e-4, abs=1e-6)
    for before, after in zip(h, shaped, strict=True):
        dropped, kept = before[after == 0], before[after > 0]
        assert not len(kept) or not len(dropped) or dropped.max() <= kept.min()


@settings(max_examples=15)
@given(st.floats(0.1, 1), st.integers(1, 9), st.integers(0, 5))
def test_gen_is_greatest_for_a_flat_posterior_and_rises_with_its_terms(gamma, n_top, seed):
    z = np.random.default_rng(seed).normal(size=(5, 9)) * 4
    values = generalized_entropy(z, "softmax", gamma, n_top)
    assert (values <= generalized_entropy(np.zeros((1, 9)), "softmax", gamma, 9) + 1e-5).all()
    assert (values <= generalized_entropy(z, "softmax", gamma, 9) + 1e-5).all()


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_do_not_matter(fitted, monkeypatch, block):
    detectors, test, whole = fitted
    original = registry.over_frames

    def in_blocks(bank, frame_score, **_):
        return original(bank, frame_score, block)

    for module in (detectors_scores, detectors_features, detectors_rectified, detectors_distances, registry):
        monkeypatch.setattr(module, "over_frames", in_blocks)
    part = fresh(test)
    for name in LEARNED_HERE:
        assert detectors[name].score(part) == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


def test_mapped_half_precision_banks_score_as_those_in_memory(tmp_path):
    calibration, _, test, _ = synthetic_study(n=60, n_frames=3)
    mapped = load_bank(save_bank(test, tmp_path / "bank.npz"), memory_map=True)
    for name in LEARNED_HERE:
        detector = make_detector(name).fit(calibration)
        assert detector.score(mapped) == pytest.approx(detector.score(test), rel=1e-6), name


def test_scores_are_the_same_every_time():
    for name in LEARNED_HERE:
        one, two = (make_detector(name).fit(make_bank()).score(make_bank(seed=1)) for _ in range(2))
        assert np.array_equal(one, two), name
