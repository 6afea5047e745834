"""Detectors over networks and shifts: closed forms, peers, and the traps of raw scores and unreliable rankings."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata, spearmanr
from sklearn.metrics import cohen_kappa_score, f1_score, jaccard_score, matthews_corrcoef, roc_auc_score

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.routing import figures_generalization as figures
from ssl_kit.routing.bank import attach_fallback, make_table
from ssl_kit.routing.generalization import (
    NetworkScores,
    ShiftLimits,
    compare_networks,
    detector_quality,
    score_network,
    shift_strata,
    shifted_factors,
    strata_table,
)
from ssl_kit.routing.generalization_agreement import (
    agreement_of,
    confidence_table,
    decision_agreement,
    f1_pairs,
    headroom,
    routed_gain,
)
from ssl_kit.routing.generalization_ranks import kendall_tau, pick_regret, rank_correlations, spearman_rho
from ssl_kit.routing.generalization_synthetic import synthetic_networks
from ssl_kit.routing.generalization_transfer import (
    calibration_quantiles,
    leave_one_shift_out,
    shift_masks,
    threshold_transfer,
)
from ssl_kit.routing.policies import switch, system_errors
from ssl_kit.routing.registry import held_out_scores, make_detector
from ssl_kit.routing.thresholds import CalibrationOutcomes, CostAware, F1Best, TargetRate

DETECTORS = ["max_prob", "entropy", "margin", "energy", "sharpness", "knn", "residual"]
LIMITS = ShiftLimits(home="home", failure_deg=30, others="any")


@pytest.fixture(scope="module")
def banks():
    return synthetic_networks(n=200, overlap=0.7)


@pytest.fixture(scope="module")
def scored(banks):
    return [score_network(name, *pair, home="home", detectors=DETECTORS, failure_deg=30)
            for name, pair in banks.items()]


@pytest.fixture(scope="module")
def comparison(scored):
    return compare_networks(scored, LIMITS, n_draws=100, n_splits=20)


@pytest.fixture(scope="module")
def quality(comparison):
    return detector_quality(comparison)


def made_network(name, scores, fails, fallback_error=5.0, seed=0, n_rooms=40, scale=1.0, fallback=None):
    """A network of given scores (n, detector) and failures (n,); calibration and test alike in other rooms."""
    n = len(fails)
    rooms = np.random.default_rng(seed).integers(0, n_rooms, n)
    sets = []
    for split in ("calibration", "test"):
        table = make_table(np.where(fails, 90.0, 2.0), np.zeros(n), group_ids=[f"{split}_{r}" for r in rooms],
                           filenames=[f"{split}_{i}" for i in range(n)])
        sets.append(table.with_columns(fallback_error=np.full(n, fallback_error) if fallback is None else fallback))
    by_name = {f"d{k}": scale * column for k, column in enumerate(np.transpose(scores))}
    arrays = np.repeat("home", n)
    return NetworkScores(name, "home", sets[0], arrays, sets[1], arrays, by_name, dict(by_name))


def drawn_network(name, seed, n=1500, n_detectors=8, strengths=None, **kwargs):
    """Detectors of rising strength; failures and noise from `seed`."""
    rng = np.random.default_rng(seed)
    fails = rng.random(n) < 0.3
    strengths = np.linspace(0.2, 2, n_detectors) if strengths is None else strengths
    scores = rng.normal(size=(n, len(strengths))) + fails[:, None] * strengths
    return made_network(name, scores, fails, **kwargs)


# strata


def test_strata_change_one_factor_and_say_what_they_leave_out(banks):
    bank = banks["worse"][1]["away"][0]
    limits = replace(LIMITS, noise_kinds=(0.0,), others="held")
    arrays = np.where(np.arange(len(bank)) % 2, "home", "away")
    strata = shift_strata(bank, limits, arrays)
    assert list(strata) == ["all", "in_distribution", "low_snr", "reverberant", "point_noise", "other_noise",
                            "array_away"]
    held = np.sum([s.rows for name, s in strata.items() if name != "all"], axis=0)
    assert held.max() == 1
    good = strata["in_distribution"].rows
    assert (bank.column("snr_db")[good] >= 5).all() and (bank.column("t60_s")[good] <= 0.6).all()
    assert (arrays[good] == "home").all() and not bank.column("point_noise")[good].any()
    assert not bank.column("noise_kind")[good].any()
    shifted = strata["other_noise"].rows
    assert (bank.column("noise_kind")[shifted] > 0).all() and (bank.column("snr_db")[shifted] >= 5).all()
    loose = shift_strata(bank, replace(limits, others="any"), arrays)
    np.testing.assert_array_equal(loose["low_snr"].rows, bank.column("snr_db") < 5)
    np.testing.assert_array_equal(loose["in_distribution"].rows, good)
    table = strata_table(strata).set_index("stratum")
    for name, stratum in strata.items():
        fails = bank.abs_errors[stratum.rows] > 30
        assert table.n[name] == len(fails) and table.failures[name] == fails.sum()
        enough = min(fails.sum(), (~fails).sum()) >= 10
        assert (stratum.left_out == "") == enough
        if not enough:
            assert "fewer than 10" in stratum.left_out


def test_a_table_without_facts_has_no_shifts():
    table = make_table(np.zeros(30), np.zeros(30))
    assert shifted_factors(table, ShiftLimits()) == {}
    strata = shift_strata(table)
    assert strata["in_distribution"].rows.all() and "failures" in strata["all"].left_out
    with pytest.raises(DataError, match="arrays"):
        shift_strata(table, arrays=["6cm"])
    with pytest.raises(ParameterError, match="others"):
        ShiftLimits(others="some")


def test_strata_are_disjoint_from_calibration_rooms_and_an_overlap_is_refused(banks, scored):
    for one in scored:
        assert not set(one.calibration.group_ids) & set(one.test.group_ids)
        assert not set(one.calibration.speakers) & set(one.test.speakers)
        for stratum in shift_strata(one.test, LIMITS, one.test_arrays).values():
            assert not set(one.test.group_ids[stratum.rows]) & set(one.calibration.group_ids)
    calibration, test = banks["steady"]
    bank, fallback = test["away"]
    leaked = replace(bank, group_ids=np.where(np.arange(len(bank)) == 3, calibration["home"][0].group_ids[0],
                                              bank.group_ids))
    with pytest.raises(DataError, match="overlap"):
        score_network("steady", calibration, {**test, "away": (leaked, fallback)}, "home", ["max_prob"])


# scores


def test_scores_are_held_out_by_room_and_fitted_at_home(banks, scored):
    calibration, test = banks["steady"]
    home = attach_fallback(*calibration["home"])
    one = scored[0]
    at_home = one.calibration_arrays == "home"
    for name in ("knn", "max_prob"):
        np.testing.assert_allclose(one.calibration_scores[name][at_home],
                                   held_out_scores(lambda name=name: make_detector(name), home))
        fitted = make_detector(name).fit(home)
        expected = np.concatenate([fitted.score(attach_fallback(*pair)) for pair in test.values()])
        np.testing.assert_allclose(one.test_scores[name], expected)
    # the trap: scores of calibration rooms by a detector that saw them are too good
    seen = make_detector("knn").fit(home).score(home)
    assert one.calibration_scores["knn"][at_home].mean() > seen.mean()


def test_a_detector_that_cannot_be_fitted_is_left_out_with_its_reason(scored, banks):
    assert "residual" not in scored[2].detectors and "head" in scored[2].left_out["residual"]
    plain = [{array: (make_table(bank.predicted_angles, bank.gt_angles, global_indices=bank.global_indices,
                                 filenames=bank.filenames, group_ids=bank.group_ids), fallback)
              for array, (bank, fallback) in split.items()} for split in banks["headless"]]
    every = score_network("headless", *plain, home="home", failure_deg=30)  # what tables without features can feed
    assert "physics" in every.detectors and not {"max_prob", "vim"} & {*every.detectors, *every.left_out}
    with pytest.raises(ParameterError, match="home"):
        score_network("steady", *banks["steady"], home="6cm")


def test_rows_must_be_the_same_for_all_networks(scored):
    first, second = scored[:2]
    for change, word in (({"test_arrays": first.test_arrays[::-1]}, "arrays"),
                         ({"test": first.test.take(np.arange(len(first.test))[::-1])}, "global_indices|group_ids"),
                         ({"test": second.test.with_columns(snr_db=second.test.column("snr_db") - 30)}, "stratum")):
        with pytest.raises(DataError, match=word):
            compare_networks([first, replace(second, **change)], LIMITS, n_draws=3)
    with pytest.raises(ParameterError, match="once"):
        compare_networks([first, first], LIMITS, n_draws=3)


def test_quality_equals_brute_force_and_draws_are_shared(comparison, quality):
    network, stratum = "worse", "low_snr"
    one, rows = comparison.networks[network], comparison.strata[network][stratum].rows
    i, j = quality.conditions.index((network, stratum)), quality.detectors.index("margin")
    fails = one.test.abs_errors > 30
    assert quality.point[i, j] == pytest.approx(roc_auc_score(fails[rows], one.test_scores["margin"][rows]))
    for draw in (0, 7):
        chosen = np.repeat(np.arange(len(rows)), comparison.weights[draw][comparison.index] * rows)
        assert quality.draws[draw, i, j] == pytest.approx(roc_auc_score(fails[chosen],
                                                                        one.test_scores["margin"][chosen]))
    half = rows & (comparison.halves[1, 3][comparison.index] > 0)
    assert quality.halves[1, 3, i, j] == pytest.approx(roc_auc_score(fails[half], one.test_scores["margin"][half]))
    np.testing.assert_array_equal(comparison.halves.sum(axis=0), 1)
    mae = detector_quality(comparison, "mae", TargetRate(0.2))
    threshold = TargetRate(0.2).fit(one.outcomes("margin", 30))
    errors = system_errors(switch(one.test_scores["margin"], threshold), one.test.abs_errors,
                           one.test.column("fallback_error"))
    assert mae.point[mae.conditions.index((network, stratum)), mae.detectors.index("margin")] \
        == pytest.approx(errors[rows].mean())
    with pytest.raises(ParameterError, match="measure"):
        detector_quality(comparison, "f1")


# rank correlations


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 8, 20]), st.sampled_from([0, 1, 3]))
def test_correlations_equal_scipy_with_ties(seed, n, digits):
    x, y = np.round(np.random.default_rng(seed).normal(size=(2, 4, n)), digits)
    for a, b, tau, rho in zip(x, y, kendall_tau(x, y), spearman_rho(x, y), strict=True):
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert tau == pytest.approx(kendalltau(a, b).statistic)
            assert rho == pytest.approx(spearmanr(a, b).statistic)
        else:
            assert np.isnan(tau) and np.isnan(rho)


def test_missing_values_make_no_correlation():
    x = np.array([1.0, np.nan, 3, 4])
    assert np.isnan(kendall_tau(x, x)) and np.isnan(spearman_rho(x, np.arange(4.0)))


def test_identical_networks_agree_in_everything():
    first, twin = drawn_network("a", 0), drawn_network("b", 0)
    comparison = compare_networks([first, twin], LIMITS, n_draws=50, n_splits=10)
    ranks = rank_correlations(detector_quality(comparison)).set_index(["network_a", "stratum_a", "network_b",
                                                                       "stratum_b"])
    row = ranks.loc[("a", "all", "b", "all")]
    assert row.tau == 1 and row.rho == pytest.approx(1) and row.tau_low == 1
    assert row.tau_share == pytest.approx(1) and row.tau_halves == pytest.approx(row.tau_ceiling)
    decisions = decision_agreement(comparison, ["d3", "d7"])
    assert np.allclose(decisions[["kappa", "kappa_low", "phi", "jaccard", "phi_within"]], 1)
    for rule in (F1Best(), TargetRate(0.3)):
        moved = threshold_transfer(comparison, ["d3", "d7"], rule)
        assert (moved.regret == 0).all() and (moved.regret_high == 0).all() and (moved.f1_change == 0).all()
    points, pairs = f1_pairs(comparison)
    assert points.inside.all() and pairs.inside[0] == 1 and pairs.inside_low[0] == 1
    room = headroom(comparison).set_index(["network", "stratum"])
    assert room.oracle_gain["a", "all"] == room.oracle_gain["b", "all"]


def test_an_unreliable_ranking_has_a_low_ceiling_and_the_share_accounts_for_it():
    # equally good detectors: only noise ranks them
    alike = [drawn_network(name, seed, strengths=np.full(10, 1.0)) for name, seed in (("a", 0), ("b", 1))]
    # detectors of different strength, few recordings: the order is the same but noisy
    rising = np.linspace(0.3, 1.3, 10)
    apart = [drawn_network(name, seed, n=400, strengths=rising) for name, seed in (("a", 2), ("b", 3))]
    noise, order = (rank_correlations(detector_quality(compare_networks(pair, LIMITS, n_draws=50)))
                    .query("kind == 'networks' and stratum_a == 'all'").iloc[0] for pair in (alike, apart))
    assert np.isnan(noise.tau_share) or noise.tau_ceiling < 0.4
    assert order.tau_halves < 0.9  # a true τ of 1 is not seen in halves
    assert order.tau_share == pytest.approx(1, abs=0.2)


def test_rankings_in_the_same_rooms_share_their_luck():
    """The trap: equal detectors, the same noise in both networks. Same rooms: perfect agreement. Other rooms: none."""
    rng = np.random.default_rng(5)
    fails = rng.random(1500) < 0.3
    scores = rng.normal(size=(1500, 10)) + fails[:, None]
    pair = [made_network(name, scores + 0.05 * rng.normal(size=scores.shape), fails) for name in ("a", "b")]
    row = rank_correlations(detector_quality(compare_networks(pair, LIMITS, n_draws=50))) \
        .query("kind == 'networks' and stratum_a == 'all'").iloc[0]
    assert row.tau > 0.5 and abs(row.tau_halves) < 0.3


def test_too_few_common_detectors_are_no_ranking(comparison, quality):
    assert len(rank_correlations(quality, min_detectors=50)) == 0
    ranks = rank_correlations(quality)
    between = ranks[(ranks.network_a == "steady") & (ranks.network_b == "headless")]
    assert (between.n_detectors == len(DETECTORS) - 1).all()  # residual needs a head


def test_picking_by_oneself_is_never_regretted(quality):
    regret = pick_regret(quality)
    own = (regret.source_network == regret.target_network) & (regret.source_stratum == regret.target_stratum)
    assert (regret.regret[own] == 0).all() and set(regret.picked) <= set(DETECTORS)


# thresholds moved


def test_raw_scores_route_all_or_nothing_and_quantiles_do_not():
    first, louder = drawn_network("a", 0), drawn_network("b", 1, scale=100.0)
    shifted = replace(louder, calibration_scores={k: v + 1000 for k, v in louder.calibration_scores.items()},
                      test_scores={k: v + 1000 for k, v in louder.test_scores.items()})
    comparison = compare_networks([first, shifted], LIMITS, n_draws=20)
    moved = threshold_transfer(comparison, ["d7"], TargetRate(0.3)).query("target_stratum == 'all'") \
        .set_index(["mapping", "source_network", "target_network"])
    assert moved.achieved["raw", "a", "b"] == 1 and moved.achieved["raw", "b", "a"] == 0
    assert moved.achieved["quantile", "a", "b"] == pytest.approx(0.3, abs=0.01)
    assert moved.achieved["quantile", "b", "a"] == pytest.approx(0.3, abs=0.01)
    assert moved.regret["raw", "b", "a"] > 1  # nothing routed costs degrees
    for mapping in ("raw", "quantile"):
        for name in ("a", "b"):
            assert moved.regret[mapping, name, name] == 0


def test_transfer_counts_equal_brute_force(comparison):
    table = threshold_transfer(comparison, ["margin"], F1Best(), mappings=["raw"])
    row = table.query("source_network == 'steady' and source_array == 'away' and target_network == 'worse' and "
                      "target_stratum == 'low_snr'").iloc[0]
    source, target = comparison.networks["steady"], comparison.networks["worse"]
    away = source.calibration_arrays == "away"
    value = F1Best().fit(CalibrationOutcomes(source.calibration_scores["margin"][away],
                                             source.calibration.abs_errors[away], np.zeros(away.sum()),
                                             source.calibration.group_ids[away], 30))
    rows = comparison.strata["worse"]["low_snr"].rows
    routed = target.test_scores["margin"] > value
    errors = np.where(routed, target.test.column("fallback_error"), target.test.abs_errors)[rows]
    assert row.achieved == pytest.approx(routed[rows].mean()) and row.mae == pytest.approx(errors.mean())
    assert row.f1 == pytest.approx(f1_score(target.test.abs_errors[rows] > 30, routed[rows]))
    own = target.routed("margin", F1Best(), 30)
    own_errors = np.where(own, target.test.column("fallback_error"), target.test.abs_errors)[rows]
    assert row.regret == pytest.approx(errors.mean() - own_errors.mean())
    assert row.asked == pytest.approx((source.calibration_scores["margin"][away] > value).mean())
    assert row.drift == pytest.approx(row.achieved - row.asked)


def test_a_source_without_failures_is_named_not_dropped():
    sound = made_network("sound", np.random.default_rng(0).normal(size=(1500, 8)), np.zeros(1500, bool))
    comparison = compare_networks([drawn_network("a", 1), sound], LIMITS, n_draws=5)
    moved = threshold_transfer(comparison, ["d1"], F1Best(), mappings=["raw"]).set_index("source_network")
    assert "no failures" in moved.left_out["sound"].iloc[0] and np.isnan(moved.achieved["sound"].iloc[0])
    points, _ = f1_pairs(comparison)
    assert points.left_out.str.contains("0 failures").all() and len(points) == 8  # not an F1 of zero
    assert decision_agreement(comparison, ["d1"], F1Best()).left_out.str.contains("no failures").all()
    with pytest.raises(ParameterError, match="mappings"):
        threshold_transfer(comparison, ["d1"], mappings=["ranks"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1]), st.floats(0.01, 1000), st.floats(-100, 100))
def test_quantiles_keep_order_and_forget_units(seed, digits, scale, offset):
    rng = np.random.default_rng(seed)
    reference, scores = rng.normal(size=30), rng.normal(0, 3, 50)
    if digits:
        reference, scores = np.round(reference, digits), np.round(scores, digits)
    mapped = calibration_quantiles(scores, reference)
    np.testing.assert_array_equal(rankdata(mapped), rankdata(scores))
    np.testing.assert_allclose(calibration_quantiles(reference, reference),
                               (rankdata(reference) - 1) / (len(reference) - 1), atol=1e-12)
    np.testing.assert_allclose(calibration_quantiles(scale * scores + offset, scale * reference + offset), mapped,
                               atol=1e-6)


def test_constant_scores_have_no_quantiles():
    with pytest.raises(DataError, match="different scores"):
        calibration_quantiles(np.ones(3), np.zeros(5))


# leaving a shift out


@pytest.fixture(scope="module")
def left(banks):
    calibration, test = (attach_fallback(*pair["home"]) for pair in banks["worse"])
    limits = replace(LIMITS, noise_kinds=(0.0,))
    masks = [shift_masks(table, limits, np.repeat("home", len(table))) for table in (calibration, test)]
    return calibration, masks, leave_one_shift_out(calibration, masks[0], test, masks[1], ["max_prob", "knn"],
                                                   limits=limits, n_draws=50)


def test_the_left_out_shift_is_left_out(left):
    calibration, masks, table = left
    place = table.set_index(["shift", "detector"])
    for shift in ("low_snr", "reverberant"):
        assert place.n_calibration[shift, "knn"] == (~masks[0][shift]).sum()
        assert place.auroc_change[shift, "max_prob"] == 0  # learns nothing: only its threshold can change
        assert place.auroc_change[shift, "knn"] != 0
    assert "nothing to leave out" in place.left_out["other_noise", "knn"]  # calibration never heard another kind
    assert "nothing to leave out" in place.left_out["other_array", "knn"]
    assert np.isnan(place.mae["other_noise", "knn"])


def test_a_calibration_that_equals_the_other_changes_nothing(left, banks):
    calibration = left[0]
    test = attach_fallback(*banks["worse"][1]["home"])
    random = np.random.default_rng(0).random(len(calibration)) < 0.3  # a "shift" that is none
    table = leave_one_shift_out(calibration, {"none": random}, test, {"none": np.ones(len(test), bool)}, ["max_prob"],
                                limits=LIMITS, n_draws=50)
    assert table.rate_change_low[0] <= 0 <= table.rate_change_high[0] or abs(table.rate_change[0]) < 0.1


# agreement


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.floats(0, 1))
def test_agreement_equals_scikit_learn(seed, rate, copied):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 80)) < rate
    b = np.where(rng.random(80) < copied, a, b)
    a[:2], b[:2] = [True, False], [True, False]
    ours = agreement_of((a & b).mean(), a.mean(), b.mean())
    assert ours["kappa"] == pytest.approx(cohen_kappa_score(a, b))
    assert ours["phi"] == pytest.approx(matthews_corrcoef(a, b))
    assert ours["jaccard"] == pytest.approx(jaccard_score(a, b))


def test_independent_networks_do_not_agree():
    rows = [decision_agreement(compare_networks([drawn_network("a", seed), drawn_network("b", seed + 100)], LIMITS,
                                                n_draws=100, n_splits=2), ["d7"]).iloc[0] for seed in range(20)]
    assert sum(row.kappa_low < 0 < row.kappa_high for row in rows) >= 16  # of 95 % intervals
    for name in ("kappa", "kappa_explained", "phi", "phi_within"):
        assert abs(np.mean([row[name] for row in rows])) < 0.02
    assert all(np.isnan(row.share_explained) == (not row.kappa_low > 0) for row in rows)
    assert min(row.jaccard for row in rows) > 0.1  # the trap: overlap is not agreement, chance alone gives some


def test_agreement_through_shared_failures_is_told_from_shared_doubt():
    rng = np.random.default_rng(2)
    fails = rng.random(4000) < 0.3
    own, shared = rng.normal(size=(2, 4000, 1)), rng.normal(size=(4000, 1))
    by_failure = [made_network(name, 2 * fails[:, None] + noise, fails) for name, noise in zip("ab", own, strict=True)]
    by_doubt = [made_network(name, shared + 0.3 * noise, fails) for name, noise in zip("ab", own, strict=True)]
    failure, doubt = (decision_agreement(compare_networks(pair, LIMITS, n_draws=50), ["d0"]).iloc[0]
                      for pair in (by_failure, by_doubt))
    assert failure.kappa > 0.3 and failure.share_explained == pytest.approx(1, abs=0.1)
    assert abs(failure.phi_within) < 0.06
    assert doubt.kappa > 0.6 and doubt.share_explained < 0.05 and doubt.phi_within > 0.6
    assert failure.kappa_failures == doubt.kappa_failures == 1


def test_f1_depends_on_how_often_a_network_fails():
    """The trap: equal skill and another failure rate is another F1; the floor of routing everything shows it."""
    rng = np.random.default_rng(0)
    pair = []
    for name, rate in (("good", 0.1), ("poor", 0.5)):
        fails = rng.random(3000) < rate
        pair.append(made_network(name, rng.normal(size=(3000, 5)) + 1.5 * fails[:, None], fails))
    comparison = compare_networks(pair, LIMITS, n_draws=50)
    points, pairs = f1_pairs(comparison)
    quality = detector_quality(comparison)
    good, poor = (quality.point[quality.conditions.index((name, "all"))] for name in ("good", "poor"))
    assert np.abs(good - poor).max() < 0.05
    assert pairs.inside[0] == 0 and pairs.mean_difference_low[0] > 0.1
    for side, one in (("a", pair[0]), ("b", pair[1])):
        fails = one.test.abs_errors > 30
        assert pairs[f"floor_{side}"][0] == pytest.approx(f1_score(fails, np.ones(len(fails))))


def test_headroom_and_confidence(comparison):
    room = headroom(comparison).set_index(["network", "stratum"])
    one = comparison.networks["steady"]
    errors, fallback = one.test.abs_errors, one.test.column("fallback_error")
    row = room.loc[("steady", "all")]
    assert row.oracle_gain == pytest.approx((errors - np.minimum(errors, fallback)).mean())
    assert row.fallback_better == pytest.approx((fallback < errors).mean())
    assert row.fallback_better_by_margin <= row.fallback_better and row.oracle_gain_failures <= row.oracle_gain
    table = confidence_table(comparison, ["entropy", "residual"]).set_index(["network", "detector"])
    assert table.median_failure["steady", "entropy"] > table.median_good["steady", "entropy"]
    assert ("headless", "residual") not in table.index


def test_the_gain_itself_as_a_score_captures_all_of_it_and_is_picked():
    rng = np.random.default_rng(4)
    fails, fallback = rng.random(600) < 0.3, rng.uniform(0, 100, 600)
    gain = np.where(fails, 90.0, 2.0) - fallback
    one = made_network("a", np.stack([rng.normal(size=600), gain, -gain], axis=1), fails, fallback=fallback)
    comparison = compare_networks([one], LIMITS, n_draws=50)
    row = routed_gain(comparison, CostAware(0)).set_index("stratum").loc["all"]
    assert row.detector == "d1" and row.captured == pytest.approx(1) and row.captured_low == pytest.approx(1)
    assert row.rate == pytest.approx((gain > 0).mean())
    assert row.gain == pytest.approx(headroom(comparison).set_index("stratum").oracle_gain["all"])
    forced = routed_gain(comparison, TargetRate(0.3), ["d2"]).set_index("stratum").loc["all"]
    assert forced.gain_high < 0  # the trap: routing by confidence where SRP-PHAT is worse loses, and says so


# figures


def test_figures_hold_the_numbers_they_show(comparison, quality, left):
    import matplotlib.pyplot as plt

    ranks, moved = rank_correlations(quality), threshold_transfer(comparison, ["energy"])
    drawn = [figures.quality_heatmap_figure(quality), figures.rank_matrix_figure(ranks, stratum="all"),
             figures.rank_matrix_figure(ranks, "rho", network="worse", width="text"), figures.rank_shifts_figure(ranks),
             figures.transfer_figure(moved, "energy"), figures.transfer_figure(moved, "energy", "regret"),
             figures.agreement_figure(decision_agreement(comparison, DETECTORS)),
             figures.f1_scatter_figure(*f1_pairs(comparison)), figures.headroom_figure(headroom(comparison)),
             figures.left_out_figure({"worse": left[2]})]
    for fig, data in drawn:
        assert len(fig.axes) and len(data) and not data.isna().all(axis=1).any()
        fig.draw_without_rendering()
        plt.close(fig)
    texts = [text.get_text() for text in drawn[4][0].axes[0].texts]
    shown = {float(text) for text in texts if text.isdigit()}
    assert {"steady", "worse", "headless"} <= set(texts) and len(shown) > 3
    assert shown <= {round(100 * value) for value in moved.achieved.dropna()}
    with pytest.raises(ParameterError, match="exactly one"):
        figures.rank_matrix_figure(ranks)
    with pytest.raises(ParameterError, match="value"):
        figures.transfer_figure(moved, "energy", "f1")
    with pytest.raises(DataError, match="no row"):
        figures.transfer_figure(moved, "knn")
