"""Sampling and learned detectors: by hand, against peers, and the traps (mean logits, collapse, leaks) with the naive
version failing."""
import time
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, softmax
from scipy.stats import circvar, entropy

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing.bank import FeatureBank, attach_fallback, make_table
from ssl_kit.routing.detectors_features import LogisticStack
from ssl_kit.routing.detectors_learned import (
    MIN_OF_EACH,
    MIN_SPREAD,
    BoostedStack,
    ConfidNet20,
    ConfidNet30,
    ConfidNetSettings,
    DeepSVDD,
    Scaler,
    SVDDSettings,
    _forward,
    train_confidnet,
    train_svdd,
    validation_rooms,
)
from ssl_kit.routing.detectors_physics import ColumnDetector
from ssl_kit.routing.detectors_sampling import dropout_passes, sampled_statistics, temporal_statistics
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.metrics import auroc
from ssl_kit.routing.registry import (
    Detector,
    available_detectors,
    describe,
    detector_classes,
    held_out_scores,
    make_detector,
    pooled_features,
)
from ssl_kit.routing.synthetic import synthetic_study

torch = pytest.importorskip("torch")

SAMPLED = ["mc_entropy", "mc_mutual_information", "mc_variance", "ensemble_entropy", "ensemble_mutual_information",
           "ensemble_disagreement"]
TEMPORAL = ["temporal_consistency", "temporal_jumps"]
LEARNED = ["deep_svdd", "confidnet_20", "confidnet_30", "boosted_stack"]
ALL = SAMPLED + TEMPORAL + LEARNED
COLLAPSES = [{"bias": True}, {"centre": "zero"}, {"centre": "learned"}, {"bias": True, "centre": "learned"}]


@pytest.fixture(scope="module")
def study():
    calibration, calibration_srp, test, test_srp = synthetic_study(n=400, n_frames=3, overlap=0.4)
    return tuple(attach_fallback(bank, srp).with_fallback_maps(None)  # none of these looks at them
                 for bank, srp in ((calibration, calibration_srp), (test, test_srp)))


def bank_of(logits, **changes):
    "A bank with given logits (n, T, C); features are the logits, the head the identity."
    logits = np.asarray(logits, np.float64)
    n, _, n_classes = logits.shape
    fields = {"predicted_angles": np.zeros(n), "gt_angles": np.zeros(n), "abs_errors": np.zeros(n),
              "global_indices": np.arange(n), "filenames": np.arange(n).astype(str),
              "group_ids": (np.arange(n) % 5).astype(str), "penultimate_features": logits, "logits_pre_sig": logits,
              "predictions": softmax(logits, axis=-1).mean(axis=1), "W": np.eye(n_classes), "b": np.zeros(n_classes)}
    return FeatureBank(**fields | changes)


def answers_bank(answers_deg, active=None):
    "Recordings (n, T) whose frames answer whole degrees."
    return bank_of(np.eye(360)[np.asarray(answers_deg)], active_frames=active)


# the register


def test_all_are_registered_and_described():
    assert set(ALL) <= set(detector_classes())
    assert all(row["formula"] and row["source"] for row in describe(ALL))


@pytest.mark.parametrize("name", ALL)
def test_one_finite_score_each_that_the_others_do_not_change(study, name):
    calibration, test = study
    detector = make_detector(name).fit(calibration)
    whole = detector.score(test)
    assert whole.shape == (len(test),) and np.isfinite(whole).all()
    test.forget()
    assert detector.score(test.take(np.arange(7, 60))) == pytest.approx(whole[7:60], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["mc_entropy", "ensemble_entropy", "temporal_consistency", *LEARNED])
def test_these_find_weak_answers(study, name):
    calibration, test = study
    assert auroc(make_detector(name).fit(calibration).score(test), test.abs_errors > 30) > 0.75


def test_banks_without_passes_lack_them(study):
    bare = replace(study[1], mc_predictions=None, ensemble_predictions=None)
    assert not set(SAMPLED) & set(available_detectors(bare)) and set(TEMPORAL) <= set(available_detectors(bare))
    with pytest.raises(DataError, match="mc"):
        held_out_scores(lambda: make_detector("mc_entropy"), bare)


# passes and members


def test_two_members_by_hand():
    sure, flat = np.zeros((1, 2, 4)), np.zeros((1, 2, 4))
    sure[0, 0, 0] = sure[0, 1, 1] = 1  # each sure, a quarter turn apart
    flat[0, :, :2] = 0.5  # both unsure, of the same
    one, other = sampled_statistics(sure), sampled_statistics(flat)
    assert one["entropy"][0] == pytest.approx(np.log(2)) == one["mutual_information"][0]
    assert one["variance"][0] == pytest.approx((0.25 + 0.25) / 4)
    assert one["disagreement"][0] == pytest.approx(1 - np.cos(np.pi / 4))
    assert other["entropy"][0] == pytest.approx(np.log(2))
    assert [other[key][0] for key in ("mutual_information", "variance", "disagreement")] == pytest.approx([0, 0, 0])


def test_equal_to_scipy():
    p = np.random.default_rng(0).dirichlet(np.full(36, 0.3), (300, 5))
    ours = sampled_statistics(p)
    total = entropy(p.mean(1), axis=-1)
    assert ours["entropy"] == pytest.approx(total, rel=1e-5)
    assert ours["mutual_information"] == pytest.approx(total - entropy(p, axis=-1).mean(1), abs=1e-5)
    assert ours["variance"] == pytest.approx(p.var(1).mean(1), rel=1e-4)
    assert ours["disagreement"] == pytest.approx(circvar(np.radians(10 * p.argmax(2)), axis=1), abs=1e-6)


@given(seed=st.integers(0, 10**6), n_members=st.integers(2, 6), sharpness=st.sampled_from([0.01, 0.3, 3.0, 50.0]))
def test_information_is_never_negative_and_entropy_bounded(seed, n_members, sharpness):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(24, sharpness), (6, n_members)).astype(np.float16)
    values = sampled_statistics(p)
    assert values["mutual_information"].min() > -1e-6
    assert (values["mutual_information"] <= np.log(n_members) + 1e-6).all()
    assert (values["entropy"] <= np.log(24) + 1e-6).all()
    assert ((values["disagreement"] > -1e-12) & (values["disagreement"] <= 1)).all()
    shuffled = sampled_statistics(p[:, rng.permutation(n_members)])
    assert all(shuffled[key] == pytest.approx(values[key], abs=1e-6) for key in values)


@given(seed=st.integers(0, 10**6), n_members=st.integers(2, 6))
def test_identical_members_do_not_disagree(seed, n_members):
    p = np.random.default_rng(seed).dirichlet(np.full(24, 0.2), (5, 1)).repeat(n_members, axis=1)
    values = sampled_statistics(p.astype(np.float16))
    for key in ("mutual_information", "variance", "disagreement"):
        assert values[key] == pytest.approx(np.zeros(5), abs=1e-6), key


def test_trap_softmax_of_mean_logits_hides_the_disagreement():
    z = np.zeros((1, 2, 360))
    z[0, 0, 0], z[0, 1, 90] = 30, 60
    naive = entropy(softmax(z.mean(axis=1), axis=-1), axis=-1)
    assert naive[0] < 0.01  # sure of 90°
    ours = sampled_statistics(softmax(z, axis=-1))
    assert ours["entropy"][0] == pytest.approx(np.log(2), abs=1e-4) == ours["mutual_information"][0]
    # the same inside a pass: frames are pooled as posteriors
    bank = bank_of(z)
    for posterior in dropout_passes(bank, 3, rate=1e-9)[0]:
        assert posterior[[0, 90]] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_trap_answers_on_both_sides_of_zero():
    p = np.zeros((1, 2, 360))
    p[0, 0, 359] = p[0, 1, 1] = 1
    assert np.std([359, 1]) > 170 and sampled_statistics(p)["disagreement"][0] < 1e-3
    assert temporal_statistics(answers_bank([[359, 1, 359, 1]]))["jumps"][0] == 0


def test_sigmoid_posteriors_are_scaled_and_silent_ones_uniform():
    p = np.random.default_rng(1).random((4, 3, 12)) * 0.02
    assert sampled_statistics(p)["entropy"] == pytest.approx(
        sampled_statistics(p / p.sum(-1, keepdims=True))["entropy"], rel=1e-6)
    p[2] = 0
    assert sampled_statistics(p)["entropy"][2] == pytest.approx(np.log(12))
    with pytest.raises(DataError, match="at least two passes.*found 1"):
        sampled_statistics(p[:, :1])


class Mapped(np.ndarray):
    "Stands for a memory-mapped array: whoever reads more than 256 rows at once is told off."

    def __array__(self, *args, **kwargs):
        assert len(self) <= 256, "read as a whole"
        return super().__array__(*args, **kwargs)

    def __getitem__(self, key):
        part = super().__getitem__(key)
        assert part.ndim < 3 or len(part) <= 256, "read as a whole"
        return np.asarray(part)


def test_blocks_change_nothing_and_large_banks_are_never_whole_in_memory():
    p = np.random.default_rng(2).dirichlet(np.ones(8), (700, 3))
    whole = sampled_statistics(p.view(Mapped))
    for key in whole:
        assert whole[key][650:] == pytest.approx(sampled_statistics(p[650:])[key], rel=1e-6, abs=1e-9)
    bank = bank_of(np.random.default_rng(3).normal(size=(700, 2, 8)))
    mapped = bank.take(slice(None))
    for name in ("penultimate_features", "logits_pre_sig"):
        mapped.__dict__[name] = getattr(bank, name).view(Mapped)
    assert np.array_equal(dropout_passes(mapped, 2), dropout_passes(bank, 2))
    assert np.array_equal(temporal_statistics(mapped)["spread"], temporal_statistics(bank)["spread"])


# dropout on the last layer alone


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_passes_equal_a_loop_over_thinned_features(study, head):
    bank = study[1].take(np.arange(150))
    active = np.random.default_rng(4).random((150, 3)) < 0.6
    active[:, 0] = True
    bank = replace(bank, active_frames=active, head=head)
    passes = dropout_passes(bank, n_passes=4, rate=0.3, seed=7)
    masks = np.random.default_rng(7).random((4, 1, 64)) >= 0.3
    for i in (0, 5, 149):
        for s in range(4):
            h = bank.penultimate_features[i].astype(float) * masks[s] / 0.7
            z = (h @ bank.W.T.astype(float) + bank.b)[active[i]]
            p = softmax(z, axis=-1) if head == "softmax" else expit(z)
            assert passes[i, s] == pytest.approx(p.mean(0), abs=1e-3)


def test_passes_depend_on_the_seed_and_on_nothing_else(study):
    bank = study[1]
    passes = dropout_passes(bank, 3)
    assert passes.dtype == np.float16 and passes.shape == (400, 3, 360)
    assert np.array_equal(passes, dropout_passes(bank, 3))
    assert np.array_equal(passes[130:140], dropout_passes(bank.take(np.arange(130, 140)), 3))
    assert not np.array_equal(passes, dropout_passes(bank, 3, seed=1))
    # next to no dropout: the network itself
    none = dropout_passes(bank, 2, rate=1e-9)
    assert none[:, 0].astype(float) == pytest.approx(bank.predictions, abs=2e-3)
    assert sampled_statistics(none)["mutual_information"] == pytest.approx(np.zeros(400), abs=1e-5)
    filled = replace(bank, mc_predictions=passes)
    assert auroc(make_detector("mc_entropy").score(filled), bank.abs_errors > 30) > 0.75


def test_passes_are_refused(study):
    bank = study[1].take(np.arange(5))
    for change in ({"n_passes": 1}, {"rate": 0.0}, {"rate": 1.0}):
        with pytest.raises(ParameterError, match=next(iter(change))):
            dropout_passes(bank, **change)
    with pytest.raises(DataError, match="no linear head"):
        dropout_passes(replace(bank, W=None, b=None))


# frames


def test_frames_by_hand():
    values = temporal_statistics(answers_bank([[0, 0, 90, 90], [10, 10, 10, 10], [0, 120, 240, 0], [0, 19, 40, 60]]))
    angle = np.radians([[0, 0, 90, 90], [10] * 4, [0, 120, 240, 0], [0, 19, 40, 60]])
    assert values["spread"] == pytest.approx(1 - np.abs(np.exp(1j * angle).mean(1)), abs=1e-12)
    assert values["jumps"] == pytest.approx([1 / 3, 0, 1, 1 / 3])  # 21° jumps, 20° and 19° don't


def test_silent_frames_are_skipped():
    active = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]], bool)
    values = temporal_statistics(answers_bank([[5, 5, 180, 5], [5, 90, 7, 180], [90, 5, 90, 95]], active))
    assert values["jumps"].tolist() == [0, 0, 1]
    assert values["spread"] == pytest.approx([0, 0, 1 - np.cos(np.pi / 4)], abs=1e-12)


# deep SVDD


@pytest.fixture(scope="module")
def good(study):
    features = pooled_features(study[0])[study[0].abs_errors <= 30]
    return Scaler.of(features)(features)


@pytest.mark.parametrize("change", COLLAPSES)
def test_trap_deep_svdd_collapses_and_is_refused(study, good, change):
    _, _, spread = train_svdd(good, SVDDSettings(**change))
    assert spread < MIN_SPREAD / 2  # naive: all recordings in one point
    with pytest.raises(DataError, match="deep_svdd: collapsed, the outputs' spread .* centre|bias"):
        make_detector("deep_svdd", **change).fit(study[0])


def test_trap_a_collapsed_score_knows_nothing(study, good):
    scaler = Scaler.of(pooled_features(study[0])[study[0].abs_errors <= 30])
    x, failures = scaler(pooled_features(study[1])), study[1].abs_errors > 30
    layers, centre, _ = train_svdd(good, SVDDSettings(bias=True, centre="learned", n_steps=500))
    naive = ((_forward(layers, x) - centre) ** 2).sum(axis=1)
    assert np.sqrt(naive).std() < 1e-6 and abs(auroc(naive, failures) - 0.5) < 0.15
    sound = make_detector("deep_svdd", n_steps=500).fit(study[0])
    assert sound.spread > 5 * MIN_SPREAD and auroc(sound.score(study[1]), failures) > 0.85


@pytest.mark.parametrize("n_features", [16, 256])
def test_deep_svdd_keeps_its_spread_at_other_sizes(n_features):
    bank, _, _, _ = synthetic_study(n=200, n_frames=1, n_features=n_features, seed=n_features)
    assert make_detector("deep_svdd").fit(bank).spread > 5 * MIN_SPREAD


def test_deep_svdd_has_no_bias_and_a_fixed_centre_away_from_zero(good):
    layers, centre, _ = train_svdd(good, SVDDSettings(n_steps=50))
    assert all((bias == 0).all() for _, bias in layers) and np.abs(centre).min() >= 0.1 - 1e-6
    assert np.array_equal(centre, train_svdd(good, SVDDSettings(n_steps=1))[1])


def test_dead_features_and_wrong_settings_are_refused(study):
    dead = replace(study[0], penultimate_features=np.ones((400, 3, 64)))
    with pytest.raises(DataError, match="do not differ"):
        make_detector("deep_svdd").fit(dead)
    with pytest.raises(ParameterError, match="centre"):
        make_detector("deep_svdd", centre="mean")
    with pytest.raises(ParameterError, match="n_steps"):
        make_detector("deep_svdd", n_steps=0)
    with pytest.raises(ParameterError, match="patience"):
        make_detector("confidnet_20", patience=0)
    with pytest.raises(ParameterError, match="depths"):
        make_detector("deep_svdd", depths=3)


def test_a_unit_that_never_fired_in_calibration_does_not_blow_up(study):
    calibration, test = study
    features = calibration.penultimate_features.copy()
    features[..., :4] = 0
    silent = replace(calibration, penultimate_features=features)
    for name in ("deep_svdd", "confidnet_30"):
        detector = make_detector(name).fit(silent)
        assert np.isfinite(detector.score(test)).all()
        assert np.abs(detector.scaler(pooled_features(test))).max() < 100


# ConfidNet


def test_confidnet_needs_failures_and_good_answers_in_several_rooms(study):
    bank = study[0]
    few = np.flatnonzero(bank.abs_errors > 30)[:MIN_OF_EACH - 1]
    rare = bank.take(np.concatenate([few, np.flatnonzero(bank.abs_errors <= 20)]))
    with pytest.raises(DataError, match=r"confidnet_30: expected at least 10 failures \(> 30°\) and 10 good answers.*"
                                        r"found 9 and \d+$"):
        ConfidNet30().fit(rare)
    with pytest.raises(DataError, match="confidnet_20.*found 400 and 0"):
        ConfidNet20().fit(replace(bank, abs_errors=np.full(400, 90.0)))
    with pytest.raises(DataError, match="two rooms"):
        ConfidNet20().fit(replace(bank, group_ids=np.full(400, "hall")))
    with pytest.raises(DataError, match="too few of the 2 rooms"):
        ConfidNet30().fit(replace(bank, group_ids=np.where(bank.abs_errors > 30, "a", "b")))


def test_confidnet_stops_by_rooms_it_was_not_trained_on(study):
    bank = study[0]
    net = ConfidNet30().fit(bank)
    inside = set(bank.group_ids.tolist()) - set(net.validation_rooms)
    assert len(net.validation_rooms) == 4 and len(inside) == 16
    # what lies in these rooms does not move the training: other labels there, the same losses inside
    failures = bank.abs_errors > 30
    validation = validation_rooms(bank.group_ids, failures, 0)
    x, settings = Scaler.of(pooled_features(bank)[~validation])(pooled_features(bank)), ConfidNetSettings(n_steps=40)
    other = np.where(validation, ~failures, failures)
    ours, theirs = (train_confidnet(x, labels, validation, settings)[1] for labels in (failures, other))
    assert [a for a, _ in ours] == [a for a, _ in theirs] and [b for _, b in ours] != [b for _, b in theirs]


def test_confidnet_balances_the_classes(study):
    bank = study[0]
    rows = np.concatenate([np.flatnonzero(bank.abs_errors > 30)[:25], np.flatnonzero(bank.abs_errors <= 30)])
    rare = bank.take(rows)
    odds = held_out_scores(ConfidNet30, rare)
    flagged = [(odds[side] > 0).mean() for side in (rare.abs_errors > 30, rare.abs_errors <= 30)]
    assert flagged[0] > flagged[1] + 0.15  # unbalanced, "never fails" would be right in 92 % of them


def test_each_confidnet_keeps_its_own_limit_and_the_stack_the_studys(study):
    for name in ("confidnet_20", "confidnet_30"):
        assert "failure_deg" not in signature(detector_classes()[name]).parameters
        with pytest.raises(ParameterError, match="failure_deg"):
            make_detector(name, failure_deg=12.0)
    assert make_detector("boosted_stack", failure_deg=12.0).failure_deg == 12.0
    bank = study[0]
    between = np.where(bank.abs_errors > 30, 25.0, bank.abs_errors)  # failures at 20° that are none at 30°
    ConfidNet20().fit(replace(bank, abs_errors=between))
    with pytest.raises(DataError, match="confidnet_30.*found 0"):
        ConfidNet30().fit(replace(bank, abs_errors=between))


@pytest.mark.slow
def test_full_size_is_learned_within_a_minute():
    bank, _, test, _ = synthetic_study(n=2009, n_frames=2, n_features=256, n_rooms=60)
    for name in ("confidnet_20", "confidnet_30", "deep_svdd"):
        start = time.process_time()
        scores = make_detector(name).fit(bank).score(test)
        assert time.process_time() - start < 60
        assert auroc(scores, test.abs_errors > 30) > 0.85


# leaks


def test_trap_noise_can_be_learned_by_heart_but_not_held_out():
    bank, _, _, _ = synthetic_study(n=300, n_frames=1)
    columns = {f"c{k}": values for k, values in enumerate(np.random.default_rng(9).normal(size=(8, 300)))}
    stack = BoostedStack([ColumnDetector(name) for name in columns])
    areas = {"own rooms": [], "confidnet": [], "boosted": [], "boosted, seen": []}
    for seed in range(3):
        noise = replace(bank, abs_errors=np.random.default_rng(seed).permutation(bank.abs_errors))
        failures = noise.abs_errors > 30
        x = Scaler.of(pooled_features(noise))(pooled_features(noise))
        twice = np.arange(600) >= 300  # naive: training stops by the recordings it was trained on
        layers, _ = train_confidnet(np.tile(x, (2, 1)), np.tile(failures, 2), twice, ConfidNetSettings())
        areas["own rooms"].append(auroc(_forward(layers, x)[:, 0], failures))
        areas["confidnet"].append(auroc(held_out_scores(ConfidNet30, noise, n_folds=3), failures))
        noise = noise.with_columns(**columns)
        areas["boosted, seen"].append(auroc(stack.fit(noise).score(noise), failures))
        areas["boosted"].append(auroc(held_out_scores(lambda: stack, noise), failures))
    mean = {name: np.mean(values) for name, values in areas.items()}
    assert mean["own rooms"] > 0.95 and mean["boosted, seen"] > 0.8  # naive
    assert [mean["confidnet"], mean["boosted"]] == pytest.approx([0.5, 0.5], abs=0.06)


class ByHeart(Detector):
    "Knows the recordings it was fitted on, and nothing else."
    name, learns = "by_heart", True

    def fit(self, table):
        self.known = dict(zip(table.global_indices.tolist(), table.abs_errors.tolist(), strict=True))
        return self

    def score(self, table):
        return np.array([self.known.get(i, 0.0) for i in table.global_indices.tolist()])


@pytest.mark.parametrize("stack", [BoostedStack, LogisticStack])
def test_trap_stack_must_not_trust_a_base_that_knows_its_recordings(stack):
    rng = np.random.default_rng(5)
    errors = np.where(rng.random(800) < 0.3, 60.0, 3.0)
    table = make_table(errors, np.zeros(800), group_ids=np.arange(800) // 20,
                       columns={"a": errors + 40 * rng.normal(size=800)})
    calibration, test = table.take(np.arange(400)), table.take(np.arange(400, 800))
    naive = stack([ColumnDetector("a"), ByHeart()])
    naive.detectors = [ColumnDetector("a"), ByHeart().fit(calibration)]
    naive.learn(np.stack([d.score(calibration) for d in naive.detectors], axis=1), calibration.abs_errors > 30)
    ours = stack([ColumnDetector("a"), ByHeart()]).fit(calibration)
    failures = test.abs_errors > 30
    alone = auroc(test.column("a"), failures)
    assert (ours.score(test) > 0).any() and not (naive.score(test) > 0).any()  # naive: no unknown recording fails
    assert auroc(ours.score(test), failures) > alone - 0.05


def test_boosted_stack_equals_scikit_learn_and_sees_what_a_sum_cannot():
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 800))
    errors = np.where(a * b > 0.3, 60.0, 3.0)  # failures where both scores are high or both low
    table = make_table(errors, np.zeros(800), group_ids=np.arange(800) // 20, columns={"a": a, "b": b})
    calibration, test = table.take(np.arange(400)), table.take(np.arange(400, 800))
    bases = [ColumnDetector("a"), ColumnDetector("b")]
    peer = HistGradientBoostingClassifier(max_iter=100, max_depth=3, learning_rate=0.05, early_stopping=False)
    peer.fit(np.stack([a, b], 1)[:400], errors[:400] > 30)
    ours = BoostedStack(bases).fit(calibration).score(test)
    assert ours == pytest.approx(peer.decision_function(np.stack([a, b], 1)[400:]), abs=1e-6)
    assert auroc(ours, test.abs_errors > 30) > 0.9
    assert auroc(LogisticStack(bases).fit(calibration).score(test), test.abs_errors > 30) < 0.65
    with pytest.raises(DataError, match="boosted_stack: expected .* 0 failures of 400"):
        BoostedStack(bases).fit(make_table(np.zeros(400), np.zeros(400), columns={"a": a[:400], "b": b[:400]}))


# the same every time


@pytest.mark.parametrize("name", LEARNED)
def test_same_seed_same_scores_whatever_the_threads_and_generators(study, name):
    from threadpoolctl import threadpool_limits

    calibration, test = study
    options = {"n_folds": 2, "n_trees": 30} if name == "boosted_stack" else {"n_steps": 80}
    first = make_detector(name, **options).fit(calibration).score(test)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    again = make_detector(name, **options)
    again.fit(test.take(np.arange(300))).fit(calibration)  # what an earlier fit learned is gone
    assert np.array_equal(first, again.score(test))
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1])
    torch.set_num_threads(3)
    torch.manual_seed(123)
    try:
        with threadpool_limits(3), torch.inference_mode():
            calibration.forget()
            threaded = make_detector(name, **options).fit(calibration).score(test)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(states[2])
        torch.set_rng_state(states[0])
    assert threaded == pytest.approx(first, rel=1e-6, abs=1e-6)


def test_another_seed_is_another_network(study):
    calibration, test = study
    for name in ("deep_svdd", "confidnet_30"):
        scores = [make_detector(name, seed=seed, n_steps=50).fit(calibration).score(test) for seed in (0, 1)]
        assert not np.allclose(*scores, rtol=0.01)


def test_training_equals_torchs_own_layers(study):
    "One step of ours against torch.nn with the same start: forward, loss, AdamW."
    bank = study[0]
    failures = bank.abs_errors > 30
    validation = validation_rooms(bank.group_ids, failures, 0)
    x = Scaler.of(pooled_features(bank)[~validation])(pooled_features(bank))
    settings = ConfidNetSettings(widths=(8,), n_steps=1, batch=10_000)
    layers, _ = train_confidnet(x, failures, validation, settings)
    rng = np.random.default_rng(0)
    with torch.random.fork_rng():
        net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.LeakyReLU(0.1), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for k, (a, b) in ((0, (64, 8)), (2, (8, 1))):
            net[k].weight.copy_(torch.tensor(rng.normal(0, np.sqrt(2 / a), (a, b)).T))
            net[k].bias.zero_()
    inside = torch.tensor(~validation)
    y = torch.tensor(failures)[inside]
    z = net(torch.tensor(x, dtype=torch.float32)[inside])[:, 0]
    log_p = torch.nn.functional.logsigmoid
    loss = -(log_p(z[y]).mean() + log_p(-z[~y]).mean()) / 2  # both classes count the same
    adam = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=settings.decay)
    loss.backward()
    adam.step()
    for k, (weight, bias) in ((0, layers[0]), (2, layers[1])):
        assert net[k].weight.detach().numpy().T == pytest.approx(weight, abs=1e-4)
        assert net[k].bias.detach().numpy() == pytest.approx(bias, abs=1e-4)


# in a study


def test_a_study_takes_them_all():
    banks = synthetic_study(n=160, n_frames=2, n_features=32, n_rooms=12)
    nets = [DeepSVDD(n_steps=50), ConfidNet20(n_steps=20), ConfidNet30(n_steps=20)]
    result = evaluate_study(*banks, detectors=SAMPLED + TEMPORAL + ["boosted_stack"] + nets, n_draws=5,
                            failure_deg=25.0)
    assert set(result.methods) == set(ALL)
    assert result.methods["boosted_stack"].detector.failure_deg == 25.0
    for name in ALL:
        assert np.isfinite(result.methods[name].calibration).all()


def test_half_precision_posteriors_with_zeros_give_finite_entropies():
    p = np.exp(log_softmax(np.random.default_rng(8).normal(size=(3, 4, 360)) * 40, axis=-1)).astype(np.float16)
    assert (p == 0).any() and np.isfinite(list(sampled_statistics(p).values())).all()
