"""Figures and tables: stable bytes, exact numbers, nothing half-written, readable without colour."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.lab import figures, tables
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError

CURVE = pd.DataFrame({"routing_rate": np.linspace(0, 1, 7), "mae_deg": np.geomspace(0.1, 33.3, 7)})


@pytest.fixture
def fig():
    import matplotlib.pyplot as plt

    with figures.figure_style():
        figure, (left, right) = figures.new_figure("text", 0.4, ncols=2)
        for k in range(4):
            left.plot(CURVE.routing_rate, CURVE.mae_deg * (k + 1), label=f"detector {k}", **figures.line_style(k, 7))
        left.legend()
        left.set(xlabel="routing rate", ylabel="MAE (degrees)")
        figure.colorbar(right.imshow(np.eye(3)))
    yield figure
    plt.close(figure)


def test_same_figure_same_bytes(fig, tmp_path):
    first = {kind: path.read_bytes() for kind, path in figures.save_figure(fig, "a", CURVE, tmp_path).items()}
    fig.draw_without_rendering()  # as a notebook does when it shows the figure
    again = {kind: path.read_bytes() for kind, path in figures.save_figure(fig, "a", CURVE, tmp_path).items()}
    assert first == again
    assert set(first) == {"pdf", "png", "csv", "origin"}


def test_a_backend_that_comes_with_the_first_figure_stays_switched_on():
    import matplotlib as mpl

    before = mpl.is_interactive()
    try:
        mpl.interactive(False)
        with figures.figure_style():
            mpl.interactive(True)  # what a notebook's backend does as it is loaded
        assert mpl.is_interactive()
        with pytest.raises(ZeroDivisionError), figures.figure_style():
            mpl.interactive(False)
            _ = 1 / 0
        assert not mpl.is_interactive()
    finally:
        mpl.interactive(before)


def test_a_notebook_shows_its_second_figure_too():
    pytest.importorskip("matplotlib_inline")
    script = textwrap.dedent("""
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        for cell in ("from ssl_kit.lab.figures import new_figure", "fig, _ = new_figure(3)", "fig, _ = new_figure(4)"):
            shell.run_cell(cell)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert done.stdout.count("<Figure size") == 2, done.stdout + done.stderr


def test_same_bytes_in_another_process(tmp_path):
    script = textwrap.dedent("""
        import sys, matplotlib
        matplotlib.use("Agg")
        from ssl_kit.lab import figures
        with figures.figure_style():
            fig, axes = figures.new_figure("column")
            axes.bar(["crnn", "srp"], [15.4, 15.7], hatch="//", label="µ ≥ 5°")
            axes.legend()
        figures.save_figure(fig, "bars", {"mae_deg": [15.4, 15.7]}, sys.argv[1])
    """)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed * 9}
        subprocess.run([sys.executable, "-c", script, tmp_path / seed], check=True, env=environment)
    for kind in ("pdf", "png", "csv", "origin.json"):
        assert (tmp_path / "1" / f"bars.{kind}").read_bytes() == (tmp_path / "2" / f"bars.{kind}").read_bytes()


def test_pdf_embeds_its_fonts_and_has_the_text_width(fig, tmp_path):
    pdf = figures.save_figure(fig, "a", CURVE, tmp_path)["pdf"].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
    assert b"CreationDate" not in pdf and b"ModDate" not in pdf
    box = re.search(rb"/MediaBox \[\s*0 0 ([\d.]+) ([\d.]+)", pdf)
    assert float(box[1]) == pytest.approx(figures.WIDTHS_IN["text"] * 72, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_survive_the_csv(values):
    import matplotlib.pyplot as plt

    figure = plt.figure()
    with tempfile.TemporaryDirectory() as folder:
        path = figures.save_figure(figure, "a", {"value": values}, folder, formats=())["csv"]
        back = figures.read_figure_data(path)["value"].to_numpy(dtype=float)
    plt.close(figure)
    np.testing.assert_array_equal(back, np.asarray(values))


def test_origin_names_stage_run_and_hashes(fig, tmp_path):
    from ssl_kit.lab.files import sha256_file

    paths = figures.save_figure(fig, "a", CURVE, tmp_path, origin={
        "stage": "routing_study", "run_id": "ab12", "parameters": {"seed": np.int64(3)}, "thesis": True})
    origin = json.loads(paths["origin"].read_text())
    assert origin["stage"] == "routing_study" and origin["run_id"] == "ab12" and origin["parameters"] == {"seed": 3}
    assert origin["files"] == {f"a.{kind}": sha256_file(paths[kind]) for kind in ("pdf", "png", "csv")}
    by_hand = json.loads(figures.save_figure(fig, "b", CURVE, tmp_path)["origin"].read_text())
    assert by_hand["stage"] == "interactive" and by_hand["run_id"] is None and by_hand["thesis"] is False


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4, 5])
def test_full_disk_leaves_the_earlier_set(tmp_path, monkeypatch, failing_call):
    import matplotlib.pyplot as plt

    def save(mae_deg):
        return figures.save_figure(empty, "a", {"mae_deg": [mae_deg]}, tmp_path, formats=("png",))

    empty = plt.figure(figsize=(1, 1))
    before = {p.name: p.read_bytes() for p in save(1.5).values()}
    calls, sync = iter(range(1, 99)), os.fsync

    def full(descriptor):
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="a\\.(png|csv|origin)"):
        save(0.5)
    plt.close(empty)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()  # no temporary file is left
    if failing_call <= 3:  # while the three files are being written aside
        assert after == before


def test_wrong_arguments_are_named(fig, tmp_path):
    with pytest.raises(ParameterError, match="name='../a'"):
        figures.save_figure(fig, "../a", CURVE, tmp_path)
    with pytest.raises(ParameterError, match="width='page'"):
        figures.new_figure("page")
    with pytest.raises(ParameterError, match="format 'bmp'"):
        figures.save_figure(fig, "a", CURVE, tmp_path, formats=("bmp",))
    with pytest.raises(DataError, match="plotted data"):
        figures.save_figure(fig, "a", pd.DataFrame(), tmp_path)
    with pytest.raises(MissingDataError, match="a.csv"):
        figures.read_figure_data(tmp_path / "a.csv")
    assert list(tmp_path.iterdir()) == []


def test_style_stays_within_its_block():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with figures.figure_style():
        assert mpl.rcParams["pdf.fonttype"] == 42 and mpl.rcParams["font.size"] == 8
    assert dict(mpl.rcParams) == before


def test_lines_differ_without_colour():
    styles = [figures.line_style(k, 40) for k in range(len(figures.PALETTE))]
    for key in ("color", "linestyle", "marker"):
        assert len({style[key] for style in styles}) == len(styles)


def test_latex_table_escapes_and_marks(tmp_path):
    columns = {"method": ["max_prob", "ViM & co", "SRP"], "MAE": [13.9, 13.0, np.nan], "route %": [30, 30, 100]}
    frame = pd.DataFrame(columns)
    path = tables.latex_table(frame, tmp_path / "methods.tex", "30 % routed, $\\alpha_1$", highlight={"MAE": "min"})
    text = path.read_text()
    assert r"max\_prob & 13.90 & 30 \\" in text and r"ViM \& co & \textbf{13.00} & 30 \\" in text
    assert r"SRP & -- & 100 \\" in text and r"route \%" in text
    assert r"\caption{30 \% routed, $\alpha_1$}" in text and r"\label{tab:methods}" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    with pytest.raises(ParameterError, match="mae"):
        tables.latex_table(frame, tmp_path / "x.tex", highlight={"mae": "min"})


def wide_table(path, n_columns, n_rows=3):
    """A table of so many columns with intervals."""
    cells = [f"{row}.46 [{row}.21, {row}.78]" for row in range(n_rows)]
    columns = {f"measure {k} (dB)": cells for k in range(n_columns)}
    return tables.latex_table(pd.DataFrame({"system": ["a network of some length"] * n_rows} | columns), path, "Many.")


def test_latex_tables_fit_the_page_or_break(tmp_path):
    texts = {n: wide_table(tmp_path / f"wide_{n}.tex", n).read_text() for n in (1, 3, 4, 7, 11)}
    assert "tabcolsep" not in texts[1] and r"\scriptsize" in texts[4] and "0.46 [0.21, 0.78]" in texts[4]
    assert r"0.46\\{\tiny [0.21, 0.78]}" in texts[7]
    assert [n for n, text in texts.items() if "landscape" in text] == [7, 11]
    long = wide_table(tmp_path / "long.tex", 1, tables.LONG + 1).read_text()
    assert long.count("longtable") == 2 and r"\begin{table}" not in long
    texts = [*texts.values(), long]
    assert all(text.count("{") == text.count("}") and text.count(r"\begin") == text.count(r"\end{") for text in texts)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_tables_are_not_cut_off(tmp_path):
    names = [wide_table(tmp_path / f"wide_{n}_{rows}.tex", n, rows).stem for n in range(1, 9) for rows in (3, 45)]
    (tmp_path / "all.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,longtable,pdflscape,textcomp}\begin{document}"
        + r"\clearpage".join(rf"\input{{{name}}}" for name in names) + r"\end{document}")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not [line for line in (tmp_path / "all.log").read_text("latin-1").splitlines() if "Overfull \\hbox" in line]


def test_figures_interface_offers_latex_table():
    assert figures.latex_table is tables.latex_table and "latex_table" in figures.__all__


@given(st.text(alphabet="abc_%&#{}~^$\\°≥ ", max_size=30))
def test_escaped_text_has_no_bare_special_character(text):
    escaped = tables.escape_latex(text)
    bare = re.sub(r"\$[^$]+\$|\\[a-zA-Z]+\{[^{}]*\}|\\[&%#_{}$]", "", escaped)
    assert not set(bare) & set("_%&#{}~^$\\°≥")


def test_text_table_aligns_and_refuses_ragged_rows():
    lines = tables.text_table([["network", 15.412], ["SRP", None]], ["system", "MAE"]).splitlines()
    assert lines[2] == "network  15.41" and lines[3] == "SRP          –"
    with pytest.raises(ParameterError, match="row 0: expected 2 cells"):
        tables.text_table([["a"]], ["x", "y"])


def test_import_is_light():
    code = "import sys, ssl_kit.lab.figures; print({'matplotlib', 'pandas', 'torch', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).resolve().parent.parent).stdout
    assert out.strip() == "set()"
