"""Methods against a reference, ranks over rooms, figures and tables made of them: closed forms, traps, faults."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.statistics import paired_difference
from ssl_kit.routing.comparison import cliques, compare_ranks, compare_with_reference, hybrid_losses, room_means
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.synthetic import synthetic_study

DETECTORS = ["max_prob", "entropy", "she", "knn", "physics"]


@pytest.fixture(scope="module")
def result():
    return evaluate_study(*synthetic_study(n=240, n_frames=3, n_rooms=24, overlap=0.7), detectors=DETECTORS, n_draws=60)


def losses_with(effects, n_rooms=40, per_room=6, seed=0):
    "One loss array per effect: a shared room difficulty, own noise, and the effect as a gain."
    rng = np.random.default_rng(seed)
    rooms = np.repeat(np.arange(n_rooms), per_room)
    base = 20 + 5 * rng.normal(size=n_rooms)[rooms]
    return {name: base - effect + rng.normal(size=len(rooms)) for name, effect in effects.items()}, rooms


# against a reference


def test_hybrid_losses_are_those_of_the_study(result):
    losses = hybrid_losses(result, "rate_30")
    table = result.hybrid[result.hybrid["threshold"] == "rate_30"].set_index("method")["mae"]
    assert {name: loss.mean() for name, loss in losses.items()} == pytest.approx(table[list(losses)].to_dict())
    with pytest.raises(ParameterError, match="rate_30"):
        hybrid_losses(result, "rate_31")


def test_gains_equal_the_paired_difference_and_the_studys_table(result):
    losses = hybrid_losses(result, "rate_30")
    table = compare_with_reference(losses, result.test.group_ids, n_draws=1000, seed=5).set_index("method")
    peer = paired_difference(losses["max_prob"], losses["knn"], result.test.group_ids, n_draws=1000, seed=5)
    assert table.loc["knn", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx(
        [peer.estimate, peer.low, peer.high])
    rows = result.hybrid[result.hybrid["threshold"] == "rate_30"].set_index("method")
    assert table["gain"].to_dict() == pytest.approx(rows.loc[table.index, "gain_max_prob"].to_dict())


def test_identical_methods_have_p_one():
    losses, rooms = losses_with({"max_prob": 0.0, "better": 1.0})
    losses["twin"] = losses["max_prob"].copy()
    row = compare_with_reference(losses, rooms).set_index("method").loc["twin"]
    assert (row[["p", "p_holm", "p_bh", "p_by", "p_max_t"]] == 1).all() and row["wins"] == 0.5
    assert (row[["gain", "gain_low", "gain_high", "gain_all_low", "gain_all_high"]] == 0).all()


def test_corrections_keep_their_order_and_find_what_is_there():
    losses, rooms = losses_with({"max_prob": 0.0, **{f"same_{k}": 0.0 for k in range(18)}, "good": 1.0, "bad": -1.0})
    table = compare_with_reference(losses, rooms).set_index("method")
    assert (table["p_holm"] >= table["p"]).all() and (table["p_bh"] <= table["p_holm"] + 1e-12).all()
    assert (table["p_bh"] <= table["p_by"] + 1e-12).all()
    for name in ("p_holm", "p_max_t"):
        assert set(table.index[table[name] <= 0.05]) == {"good", "bad"}
    assert table["gain_all_low"]["good"] > 0 > table["gain_all_high"]["bad"]
    assert (table["gain_all_high"] - table["gain_all_low"] > table["gain_high"] - table["gain_low"]).all()


def test_best_of_forty_lucky_methods_is_no_finding():
    # the trap: forty methods like MaxProb; the best one's own interval excludes zero far more often than one in twenty
    naive = corrected = 0
    for seed in range(40):
        losses, rooms = losses_with({"max_prob": 0.0, **{f"m{k}": 0.0 for k in range(40)}}, 30, 3, seed)
        table = compare_with_reference(losses, rooms, n_draws=2000, seed=seed)
        naive += (table["p"] <= 0.05).any()
        corrected += (table["p_max_t"] <= 0.05).any()
    assert naive >= 20 and corrected <= 10


def test_rooms_count_not_recordings():
    # one room in which the reference fails, heard a hundred times
    losses, rooms = losses_with({"max_prob": 0.0, "other": 0.0}, 24, 1)
    repeated = {name: np.concatenate([loss, np.full(100, 60.0 if name == "max_prob" else 10.0)])
                for name, loss in losses.items()}
    rooms = np.concatenate([rooms, np.full(100, 99)])
    honest = compare_with_reference(repeated, rooms).iloc[0]
    naive = compare_with_reference(repeated, np.arange(124)).iloc[0]
    assert naive["p"] < 0.001 and honest["p"] > 0.05 and honest["n_rooms"] == 25


def test_too_few_draws_are_refused_and_few_rooms_are_named():
    losses, rooms = losses_with({"max_prob": 0.0, **{f"m{k}": 0.0 for k in range(40)}}, 8)
    with pytest.raises(ParameterError, match="at least 1599"):
        compare_with_reference(losses, rooms, n_draws=1000)
    assert compare_with_reference(losses, rooms, n_draws=1599)["few_rooms"].all()


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"reference": "msp"}, ParameterError, "msp"),
    ({"losses": {"max_prob": np.zeros(4)}}, ParameterError, "max_prob"),
    ({"losses": {"max_prob": np.zeros(4), "b": np.zeros(3)}}, DataError, "'b'"),
    ({"losses": {"max_prob": np.zeros(4), "b": np.array([0, 1, np.nan, 2])}}, DataError, "'b'"),
    ({"groups": [0, 0, 0, 0]}, DataError, "two clusters")])
def test_faults_name_the_argument(change, error, words):
    arguments = {"losses": {"max_prob": np.zeros(4), "b": np.ones(4)}, "groups": [0, 0, 1, 1]} | change
    with pytest.raises(error, match=words):
        compare_with_reference(**arguments)


# ranks


def test_room_means_and_ranks_by_hand():
    losses = {"a": np.array([1.0, 3, 10]), "b": np.array([2.0, 4, 4])}
    means = room_means(losses, np.array(["x", "x", "y"]))
    assert means.loc["x"].tolist() == [2, 3] and means.loc["y"].tolist() == [10, 4]
    ranking = compare_ranks(means)
    assert ranking.ranks.tolist() == [1.5, 1.5] and ranking.test.p_value == 1 and ranking.cliques == ((0, 1),)


def test_ranks_find_the_order_and_agree_with_scipy():
    losses, rooms = losses_with({"c": 0.0, "a": 4.0, "b": 2.0}, 60)
    means = room_means(losses, rooms)
    ranking = compare_ranks(means)
    assert ranking.methods == ("a", "b", "c") and ranking.cliques == () and ranking.caveat == ""
    assert ranking.test.p_value == pytest.approx(friedmanchisquare(*means.to_numpy().T).pvalue, rel=1e-6)


def test_nemenyi_agrees_with_scikit_posthocs():
    peer = pytest.importorskip("scikit_posthocs")
    losses, rooms = losses_with({f"m{k}": 0.15 * k for k in range(6)}, 20, 2, 3)
    means = room_means(losses, rooms)
    ranking = compare_ranks(means)
    p = peer.posthoc_nemenyi_friedman(means.to_numpy())
    for i, first in enumerate(ranking.methods):
        for j in range(i + 1, len(ranking.methods)):
            apart = ranking.ranks[j] - ranking.ranks[i] > ranking.critical_difference
            a, b = (list(means.columns).index(name) for name in (first, ranking.methods[j]))
            assert apart == (p.iloc[a, b] < 0.05)


def test_too_few_rooms_are_said():
    losses, rooms = losses_with({f"m{k}": float(k) for k in range(8)}, 2)
    caveat = compare_ranks(room_means(losses, rooms)).caveat
    assert "2 rooms are too few for 8 methods" in caveat
    needed = int(caveat.split("it takes ")[1].split()[0])
    means = room_means(*losses_with({f"m{k}": float(k) for k in range(8)}, needed))
    assert compare_ranks(means).critical_difference < 7 and "rough" in compare_ranks(means).caveat


@given(st.lists(st.floats(1, 9), min_size=2, max_size=12), st.floats(0.1, 5))
def test_cliques_are_the_largest_runs(ranks, distance):
    ranks = np.sort(ranks)
    found = cliques(ranks, distance)
    together = {(i, j) for first, last in found for i in range(first, last + 1) for j in range(i + 1, last + 1)}
    close = {(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks))
             if ranks[j] - ranks[i] <= distance + 1e-12}
    assert together == close
    assert not any(a != b and a[0] <= b[0] and b[1] <= a[1] for a in found for b in found)


def test_ranks_need_complete_rooms():
    means = pd.DataFrame({"a": [1.0, np.nan], "b": [2.0, 3.0]})
    with pytest.raises(DataError, match="leave out rooms"):
        compare_ranks(means)
