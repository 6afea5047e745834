"""Methods against a reference, ranks over rooms, figures and tables made of them: closed forms, traps, faults."""
import re
import shutil
import subprocess
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import friedmanchisquare

from ssl_kit.lab.errors import DataError, ParameterError
from ssl_kit.lab.figures import figure_style, save_figure
from ssl_kit.lab.statistics import paired_difference
from ssl_kit.routing import figures_calibration, figures_comparison, figures_decisions, latex
from ssl_kit.routing.calibration import calibration_errors, fit_confidence, reliability
from ssl_kit.routing.comparison import cliques, compare_ranks, compare_with_reference, hybrid_losses, room_means
from ssl_kit.routing.evaluation import evaluate_study
from ssl_kit.routing.failure_classes import decompose_gain
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


# figures: what they show is what the tables say


def assert_laid_out(fig, data):
    "The layout finds room for everything (it only warns when it does not), and the numbers are there."
    with warnings.catch_warnings(), figure_style():
        warnings.simplefilter("error")
        fig.draw_without_rendering()
    assert len(data) and not data.columns.duplicated().any()


def test_figures_keep_their_numbers(result, tmp_path):
    losses = hybrid_losses(result, "rate_30")
    comparison = compare_with_reference(losses, result.test.group_ids)
    ranking = compare_ranks(room_means(losses, result.test.group_ids))
    quantities = {"true azimuth (°)": result.test.gt_angles, "error (°)": result.test.abs_errors}
    drawn = {
        "cd": figures_comparison.critical_difference_figure(ranking),
        "forest": figures_comparison.forest_figure(comparison, width="column"),
        "cost": figures_comparison.cost_accuracy_figure(result),
        "rates": figures_comparison.rate_ablation_figure(result),
        "polar": figures_decisions.polar_error_figure(result, "knn", n_sectors=8),
        "shares": figures_decisions.routed_share_figure(result, "knn", quantities, circular=("true azimuth (°)",))}
    for fig, data in drawn.values():
        assert_laid_out(fig, data)
    assert save_figure(*drawn["cd"][:1], "cd", drawn["cd"][1], tmp_path, formats=("png",))["png"].stat().st_size > 5000
    assert drawn["cd"][1]["mean_rank"].tolist() == ranking.ranks.tolist()
    assert drawn["forest"][1]["gain"].is_monotonic_increasing
    polar = drawn["polar"][1]
    routed = figures_decisions.decisions_of(result, "knn")
    hybrid = np.where(routed, result.test.column("fallback_error"), result.test.abs_errors).mean()
    rows = polar[polar["system"].str.startswith("hybrid")]
    assert np.average(rows["mae"].fillna(0), weights=rows["n"]) == pytest.approx(hybrid)
    shares = drawn["shares"][1]
    for _, part in shares[shares["share"] == "routed"].groupby("quantity"):
        assert np.average(part["value"], weights=part["n"]) == pytest.approx(routed.mean())


def test_a_sector_around_zero_is_one_sector(result):
    # the trap: bins from 0° cut the direction ahead in two, and 359.9° must not fall out of the last one
    turned = replace(result, test=replace_angles(result.test, np.tile([359.9, 0.1, 358.0], 80)))
    _, data = figures_decisions.polar_error_figure(turned, "knn", n_sectors=8)
    first = data[data["system"] == "network"].iloc[0]
    assert (first["azimuth_deg"], first["n"]) == (0, 240)


def replace_angles(table, angles):
    "The same table with other true azimuths."
    other = table.take(np.arange(len(table)))
    other.__dict__["gt_angles"] = angles
    return other


def test_rate_ablation_agrees_with_the_oracles_of_the_study(result):
    _, data = figures_comparison.rate_ablation_figure(result, ["knn"], rates=[0.2, 0.3])
    study = result.hybrid.set_index(["method", "threshold"])["mae"]
    oracle = data[(data["curve"] == "true oracle") & (data["rate"] == 0.3)]["mae"].item()
    assert oracle == pytest.approx(study["true_oracle", "rate_30"], abs=0.02)
    assert (data[data["curve"] == "KNN"]["mae"].to_numpy() >= data[data["curve"] == "true oracle"]["mae"]).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_nothing_dominates(points):
    cost, loss = np.array(points, float).T
    front = figures_comparison.pareto_front(cost, loss)
    beaten = [any((c <= cost[i] and m <= loss[i]) and (c < cost[i] or m < loss[i]) for c, m in points)
              for i in range(len(points))]
    assert {points[i] for i in np.flatnonzero(front)} == {points[i] for i in range(len(points)) if not beaten[i]}


def test_figures_of_confidence(result):
    test, score = result.test, result.methods["max_prob"].test
    right = test.abs_errors <= 10
    confidence = fit_confidence(score, right)(score)
    tables = {f"map {k}": reliability(confidence, right, test.group_ids, n_draws=20) for k in range(4)}
    errors = {name: calibration_errors(confidence, right, test.group_ids, n_draws=20) for name in tables}
    parts = {name: decompose_gain(score, value, test.abs_errors, test.column("fallback_error"), test.group_ids, 20)
             for name, value in result.methods["max_prob"].thresholds.items()}
    for fig, data in (
            figures_calibration.reliability_figure(tables, errors),
            figures_calibration.confidence_by_class_figure({"max_prob": -score}, test.abs_errors, test.group_ids,
                                                           n_draws=20, width="column"),
            figures_calibration.gain_waterfall_figure({"30 %": parts["rate_30"]}, width="column")):
        assert_laid_out(fig, data)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda r: figures_comparison.forest_figure(pd.DataFrame(), "p_sidak"), ParameterError, "p_holm"),
    (lambda r: figures_comparison.rate_ablation_figure(r, rates=[0.3, 0.1]), ParameterError, "rates"),
    (lambda r: figures_decisions.polar_error_figure(r, "msp"), ParameterError, "msp"),
    (lambda r: figures_decisions.polar_error_figure(r, "knn", "rate_99"), ParameterError, "rate_99"),
    (lambda r: figures_decisions.routed_share_figure(r, "knn", {}), DataError, "quantities"),
    (lambda r: figures_decisions.routed_share_figure(r, "knn", {"SNR": np.zeros(3)}), DataError, "'SNR'"),
    (lambda r: figures_calibration.reliability_figure({}), DataError, "tables"),
    (lambda r: figures_calibration.gain_waterfall_figure({}), DataError, "decompositions"),
    (lambda r: latex.protocol_table([r], columns=["mse"]), ParameterError, "mse"),
    (lambda r: latex.protocol_table([r, r]), ParameterError, "different protocols"),
    (lambda r: latex.protocol_table([r], "rate_99"), ParameterError, "rate_99"),
    (lambda r: latex.latex_comparison_table(pd.DataFrame(), "x.tex", "p_sidak"), ParameterError, "p_max_t")])
def test_faults_of_figures_and_tables(result, call, error, words):
    with pytest.raises(error, match=words):
        call(result)


# LaTeX


@pytest.fixture(scope="module")
def leaky(result):
    return evaluate_study(*synthetic_study(n=240, n_frames=3, n_rooms=24, overlap=0.7), detectors=DETECTORS, n_draws=60,
                          protocol="leaky")


def test_the_table_of_numbers_is_the_studys(result, leaky):
    numbers = latex.protocol_table([result, leaky], columns=("mae", "auroc", "rate"))
    rows = result.hybrid[result.hybrid["threshold"] == "rate_30"].set_index("method")
    mae = numbers["in_distribution"]["mae"]
    for name in DETECTORS:
        assert mae.loc[("method", name)].tolist() == rows.loc[name, ["mae", "mae_low", "mae_high"]].tolist()
    assert mae["value"]["method"].is_monotonic_increasing
    assert numbers["leaky"]["auroc"]["value"]["baseline"].isna().all()


def test_bold_is_the_best_honest_value_and_never_an_oracle(result, leaky, tmp_path):
    path = latex.latex_protocol_table([result, leaky], tmp_path / "methods_30.tex", columns=("mae", "acc5"),
                                      caption="50 % of A & B_1")
    text = path.read_text("utf-8")
    bold = [line for line in text.splitlines() if r"\textbf" in line]
    numbers = latex.protocol_table([result, leaky], columns=("mae", "acc5"))["in_distribution"]
    fair = numbers[[kind == "method" or name.startswith("always_") for kind, name in numbers.index]]
    best = f"{fair['mae']['value'].min():.1f}"
    assert any(rf"\textbf{{{best}}}" in line for line in bold)
    assert not any(line.startswith(("True oracle", "Error oracle", "Random")) for line in bold)
    assert all(line.rsplit("&", 2)[-1].count("textbf") + line.rsplit("&", 2)[-2].count("textbf") == 0 for line in bold)
    assert r"\caption{50 \% of A \& B\_1}" in text and r"\label{tab:methods_30}" in text


def structure(text):
    "Cells per row of a LaTeX table, multicolumns counted by their width."
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    spans = [[int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", line)] for line in rows]
    return [len(re.findall(r"(?<!\\)&", line)) + 1 + sum(span) - len(span)
            for line, span in zip(rows, spans, strict=True)]


def test_latex_is_balanced(result, leaky, tmp_path):
    comparison = compare_with_reference(hybrid_losses(result, "rate_30"), result.test.group_ids)
    for siunitx in (False, True):
        texts = [latex.latex_protocol_table([result, leaky], tmp_path / "a.tex", siunitx=siunitx).read_text("utf-8"),
                 latex.latex_comparison_table(comparison, tmp_path / "b.tex", siunitx=siunitx).read_text("utf-8")]
        for text in texts:
            assert text.count("{") == text.count("}") and len(set(structure(text))) == 1
            assert re.search(r"(?<!\\)%|°|−|≥", text) is None and (r"\num{" in text) == siunitx
            assert [text.count(rf"\{rule}rule") for rule in ("top", "bottom")] == [1, 1]
    assert texts[1].count(r"\\") == 1 + len(DETECTORS) - 1
    long = latex.latex_protocol_table([result], tmp_path / "c.tex", longtable=True).read_text("utf-8")
    assert long.count("longtable") >= 2 and r"\begin{table}" not in long
    wide = latex.latex_protocol_table([result, leaky], tmp_path / "d.tex", columns=("auroc", "aupr", "fpr95", "augrc"),
                                      longtable=True).read_text("utf-8")
    assert r"\begin{landscape}" in wide and wide.count("{") == wide.count("}")
    assert "Network alone" not in wide and r"\midrule" in wide  # systems without scores have no row


def test_latex_compiles(result, leaky, tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex on this machine; the structure of the tables is tested without")
    latex.latex_protocol_table([result, leaky], tmp_path / "a.tex")
    comparison = compare_with_reference(hybrid_losses(result, "rate_30"), result.test.group_ids)
    latex.latex_comparison_table(comparison, tmp_path / "b.tex")
    latex.latex_protocol_table([result, leaky], tmp_path / "c.tex", longtable=True)
    (tmp_path / "all.tex").write_text(r"\documentclass{article}\usepackage{booktabs,longtable,pdflscape,textcomp}"
                                      r"\begin{document}\tiny\input{a.tex}\input{b.tex}\input{c.tex}\end{document}")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_cells_on_paper():
    assert latex.format_interval(7.25, 6, 8) == r"7.2 {\scriptsize [6.0, 8.0]}"
    assert latex.format_interval(0, 0, 0, 0) == "0" and latex.format_interval(100, 100, 100, 0) == "100"
    assert latex.format_interval(float("nan")) == "--" and latex.format_interval(-0.04) == "0.0"
    assert latex.format_interval(-1.0, bold=True) == r"\textbf{$-1.0$}"
    assert latex.format_interval(1.5, 1, 2, siunitx=True) == r"\num{1.5} {\scriptsize [\num{1.0}, \num{2.0}]}"
    assert [latex.format_p(p) for p in (0.0002, 0.0201, 0.5, float("nan"))] == ["$<$0.001", "0.020", "0.50", "--"]
