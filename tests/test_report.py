"""The HTML report and the thesis set: self-contained, escaped, fits a phone; stale figures are found."""

import argparse
import base64
import gzip
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from stage_notebooks import write_stage

from ssl_kit.lab import figures, figures_command, report, report_command
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.lab.runs import Run
from ssl_kit.lab.seal import seal_run
from ssl_kit.lab.tables import latex_table

NASTY = "<script>alert('1')</script> & \"quoted\""
CURVE = {"rate": [0.0, 0.5, 1.0], "mae_deg": [15.4, 12.1, 15.7]}


def make_run(runs, stage, run_id, figure=None, state="finished", profile="quick", thesis=True, value=15.4):
    """A run folder as the runner leaves it, without running anything."""
    import matplotlib.pyplot as plt

    folder = runs / stage / run_id
    write_json(folder / "params.json", {"seed": 0, "note": NASTY, "t60_s": [0.2, 0.8]})
    write_json(folder / "metrics.json", {"auroc": {"entropy": 0.83}, "headline": [
        {"label": f"MAE {NASTY}", "value": value, "unit": "°", "interval": [14.1, 16.9]},
        {"label": "within 5°", "value": 61.2, "unit": "%"}]})
    write_json(folder / "provenance.json", {"title": f"Stage {stage}", "profile": profile, "seed": 0, "device": "cpu",
                                            "code": {"version": "0.1.0", "digests": {"stage": "ab"}}})
    write_json(folder / "status.json", {"state": state, "profile": profile})
    if figure:
        fig = plt.figure(figsize=(2, 1))
        fig.add_subplot().plot(CURVE["rate"], CURVE["mae_deg"])
        origin = {"stage": stage, "run_id": run_id, "thesis": thesis, "caption": f"Error {NASTY}"}
        figures.save_figure(fig, figure, CURVE, folder / "figures", origin=origin)
        (folder / "tables").mkdir(exist_ok=True)
        wide = {f"column_{k}_with_a_long_name": [0.123456789, 2.5] for k in range(14)}
        pd.DataFrame({"method": ["max_prob", NASTY], **wide}).to_csv(folder / "tables" / "results.csv", index=False)
        (folder / "tables" / f"{figure}_table.tex").write_text("\\toprule")
    return Run(folder)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SSL_KIT_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(figures_command, "_code_reasons", lambda origin: [])
    return tmp_path / "runs"


def call(module, name, *words):
    parser = argparse.ArgumentParser()
    getattr(module, f"add_{name}_arguments")(parser)
    return getattr(module, f"run_{name}")(parser.parse_args(words))


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# -- the report -------------------------------------------------------------------------------------------------


def test_page_is_self_contained_escaped_and_well_formed(runs, tmp_path):
    run = make_run(runs, "routing_study", "ab12", "mae_vs_rate")
    text = report.build_report([run, make_run(runs, "rooms", "cd34")], tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.open == [] and not {"script", "link", "iframe", "object"} & page.tags
    assert all(a.startswith(("data:image/png;base64,", "data:text/csv;base64,", "#", "runs/")) for a in page.addresses)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "<script>" not in text and page.text.count(NASTY) >= 4
    for expected in ("15.4°", "14.1 to 16.9", "61.2\u202f%", "Parameters", "t60_s", "auroc.entropy", "run folder"):
        assert expected in page.text
    data = next(a for a in page.addresses if a.startswith("data:text/csv"))
    assert base64.b64decode(data.partition(",")[2]) == (run.folder / "figures" / "mae_vs_rate.csv").read_bytes()


def test_a_long_table_is_packed_and_the_same(runs, tmp_path):
    run = make_run(runs, "rooms", "cd34", "mae_vs_rate")
    long = run.folder / "tables" / "long.csv"
    long.write_text("a,b\n" + "1,2\n" * 20000)
    page = Page(report.build_report([run], tmp_path / "r.html").read_text("utf-8"))
    packed = [address for address in page.addresses if address.startswith("data:application/gzip;base64,")]
    assert len(packed) == 1 and len(packed[0]) < 2000 and "long.csv.gz" in page.text
    assert gzip.decompress(base64.b64decode(packed[0].partition(",")[2])) == long.read_bytes()


def test_sounds_are_inside_noisy_first_and_clean_last(runs, tmp_path, monkeypatch):
    from ssl_kit.lab.audio import write_audio

    run = make_run(runs, "rooms", "cd34")
    monkeypatch.setattr(report, "SOUND_MB", 0.01)
    listen = run.folder / "artifacts" / "listen"
    samples = {"clean.wav": 1000, "R3_network.flac": 2000, "noisy.wav": 3000, "a<b.wav": 16000}
    for name, n in samples.items():
        write_audio(listen / name, [0.1] * n)
    text = report.build_report([run, make_run(runs, "study", "ef56")], tmp_path / "r.html").read_text("utf-8")
    page = Page(text)
    sounds = [address for address in page.addresses if address.startswith("data:audio/")]
    assert [address.partition(";")[0].partition("/")[2] for address in sounds] == ["wav", "flac", "wav"]
    for address, name in zip(sounds, ("noisy.wav", "R3_network.flac", "clean.wav"), strict=True):
        assert base64.b64decode(address.partition(",")[2]) == (listen / name).read_bytes()
    assert page.open == [] and "R3 network" in page.text and "a<b.wav in the run folder" in page.text
    assert text.count("To listen to") == 1 and "media-src data:;" in text


def test_links_lead_to_the_run_folders(runs, tmp_path):
    page = report.build_report([make_run(runs, "rooms", "cd34")], tmp_path / "pages" / "r.html")
    link = next(a for a in Page(page.read_text("utf-8")).addresses if "cd34" in a and not a.startswith("#"))
    assert (page.parent / link / "params.json").is_file()


def test_a_run_that_failed_says_so(runs, tmp_path):
    run = make_run(runs, "rooms", "cd34", state="failed")
    (run.folder / "metrics.json").unlink()
    (run.folder / "provenance.json").unlink()
    assert "failed" in Page(report.build_report([run.folder], tmp_path / "r.html").read_text("utf-8")).text


def test_report_refuses_nothing_and_no_run(tmp_path):
    with pytest.raises(ParameterError, match="at least one run"):
        report.build_report([], tmp_path / "r.html")
    with pytest.raises(MissingDataError, match="params.json"):
        report.build_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_never_scrolls_sideways(runs, tmp_path):
    text = report.build_report([make_run(runs, "routing_study", "ab12", "mae")], tmp_path / "r.html").read_text("utf-8")
    source = html.escape(text.replace("<details>", "<details open>"))
    style = "height:900px;border:0;width"
    frames = "".join(f'<iframe style="{style}:{w}px" srcdoc="{source}"></iframe>' for w in (360, 1200))
    (tmp_path / "frames.html").write_text(
        f"{frames}<p id='o'></p><script>const width = d => [d.scrollWidth, d.clientWidth]; onload = () => {{"
        " o.textContent = 'widths ' + [0, 1].map(k => width(window[k].document.documentElement)).join(' '); }</script>",
        encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
               "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240).stdout
    for pair in re.search(r"widths ([\d, ]+)", dom)[1].split():
        scroll, client = map(int, pair.split(","))
        assert 300 < client and scroll <= client  # nothing sticks out of the page


def test_report_command_takes_the_newest_of_each_stage(runs, capsys):
    for number, (stage, run_id) in enumerate([("rooms", "a1"), ("study", "b1"), ("rooms", "a2")]):
        run = make_run(runs, stage, run_id)
        os.utime(run.folder / "status.json", (1e9 + number, 1e9 + number))
    make_run(runs, "tiny", "c1", profile="ci")
    make_run(runs, "broken", "d1", state="failed")
    assert call(report_command, "report", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["runs"] == ["study/b1", "rooms/a2"] and os.path.isfile(answer["report"])
    call(report_command, "report", "a1", "-o", str(runs / "x.html"), "--title", "Just one")
    assert "Just one" in (runs / "x.html").read_text("utf-8")


def test_report_command_without_runs_says_what_to_do(runs):
    with pytest.raises(MissingDataError, match="ssl-kit study"):
        call(report_command, "report")


def test_runs_of_several_tracks_stand_in_chapters(runs, tmp_path):
    made = [make_run(runs, stage, f"a{k}") for k, stage in enumerate(("fewshot_train", "mine_own", "routing_study"))]
    page = Page(report.build_report(made, tmp_path / "all.html").read_text("utf-8"))
    titles = ("Detecting failure", "Few-shot", "Mine")  # the order of a thesis, then what it does not know
    assert [page.text.count(title) for title in titles] == [3, 3, 3]  # contents, results, body
    assert sorted(titles, key=page.text.rindex) == list(titles)
    one = report.build_report(made[:1], tmp_path / "one.html").read_text("utf-8")
    assert "Few-shot bioacoustic" not in one and one.count("<section") == 1


# -- the thesis set ---------------------------------------------------------------------------------------------


def test_export_then_check(runs, tmp_path, capsys):
    make_run(runs, "routing_study", "ab12", "mae_vs_rate")
    make_run(runs, "rooms", "cd34", "room_plan", thesis=False)
    assert call(figures_command, "figures", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["mae_vs_rate", "mae_vs_rate_table"]
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"mae_vs_rate.pdf", "mae_vs_rate.png", "mae_vs_rate.csv", "mae_vs_rate.origin.json",
                     "mae_vs_rate_table.tex", "mae_vs_rate_table.origin.json", "chapter_routing.tex", "figures.md"}
    assert read_json(tmp_path / "figures" / "mae_vs_rate.origin.json")["code_digests"] == {"stage": "ab"}
    assert call(figures_command, "figures", "--check") == 0
    assert capsys.readouterr().out.count("fresh") == 2


def test_chapters_tell_of_all_that_the_folder_has(runs, tmp_path, capsys):
    make_run(runs, "fewshot_evaluate", "ab12", "methods")
    figures_command.export_figures()
    make_run(runs, "routing_study", "cd34", "mae_vs_rate")
    figures_command.export_figures([run for run in figures_command.newest_runs() if run.stage == "routing_study"])
    folder = tmp_path / "figures"
    chapter = (folder / "chapter_routing.tex").read_text("utf-8")
    assert chapter.count("\\begin{figure}") == 1 and "\\input{\\sslkitfigures/mae_vs_rate_table.tex}" in chapter
    page = (folder / "figures.md").read_text("utf-8")
    assert page.index("## Detecting failure") < page.index("## Few-shot")  # the order of a thesis, not of the runs
    named = re.findall(r"\]\(([^)]+)\)", page)
    assert named and all((folder / name).is_file() for name in named)
    assert call(figures_command, "figures", "--check") == 0
    capsys.readouterr()
    (folder / "chapter_routing.tex").unlink()
    (folder / "figures.md").write_text("# Mine\n")
    assert stale(capsys) == {"methods": [], "methods_table": [], "mae_vs_rate": [], "mae_vs_rate_table": [],
                             "chapter_routing.tex": ["chapter_routing.tex is missing: ssl-kit figures"],
                             "figures.md": ["figures.md tells of other figures: ssl-kit figures"]}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_a_chapter_compiles(runs, tmp_path):
    run = make_run(runs, "routing_study", "ab12", "mae_vs_rate")
    table = pd.DataFrame({"κ_1": [0.5], "share (%)": [12.0]})
    latex_table(table, run.folder / "tables" / "mae_vs_rate_table.tex", "≤ 5 %")
    figures_command.export_figures()
    (tmp_path / "thesis.tex").write_text(
        "\\documentclass{article}\\usepackage{graphicx,booktabs,longtable,pdflscape,textcomp}"
        "\\begin{document}\\input{figures/chapter_routing}\\end{document}")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "thesis.tex"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def stale(capsys):
    assert call(figures_command, "figures", "--check", "--json") == 1
    return {row["name"]: row["reasons"] for row in json.loads(capsys.readouterr().out)}


def test_check_names_each_reason(runs, tmp_path, capsys, monkeypatch):
    make_run(runs, "routing_study", "ab12", "mae_vs_rate")
    figures_command.export_figures()
    exported = tmp_path / "figures"
    (exported / "mae_vs_rate.csv").write_text("rate\n")
    (exported / "mae_vs_rate.pdf").unlink()
    assert stale(capsys)["mae_vs_rate"] == ["mae_vs_rate.pdf is missing", "mae_vs_rate.csv was altered"]
    figures_command.export_figures()
    newer = make_run(runs, "routing_study", "ef56")
    os.utime(newer.folder / "status.json", (4e9, 4e9))
    assert stale(capsys)["mae_vs_rate"] == ["a newer run has finished: routing_study/ef56"]
    shutil.rmtree(runs)
    assert stale(capsys)["mae_vs_rate"] == ["its run routing_study/ab12 is not here"]
    monkeypatch.setattr(figures_command, "_code_reasons", lambda origin: ["code has changed since (stage)"])
    assert stale(capsys)["mae_vs_rate"][-1] == "code has changed since (stage)"


def test_changed_code_is_noticed(runs, tmp_path, monkeypatch):
    monkeypatch.undo()
    cells = [{"cell_type": "code", "metadata": {"tags": [tag]}, "source": source} for tag, source in [
        ("stage", "STAGE = dict(title='Toy')"), ("parameters", "seed: int = 0"), ("work", "x = 1")]]
    stages = tmp_path / "stages"
    monkeypatch.setenv("SSL_KIT_STAGES", str(stages))
    write_json(stages / "toy.ipynb", {"cells": cells})
    from ssl_kit.lab.provenance import code_digests
    from ssl_kit.lab.stages import find_stage

    origin = {"stage": "toy", "code_digests": code_digests(find_stage("toy").source)}
    assert figures_command._code_reasons(origin) == []
    cells[2]["source"] = "x = 2"
    write_json(stages / "toy.ipynb", {"cells": cells})
    assert figures_command._code_reasons(origin) == ["code has changed since (stage)"]


def test_changed_code_of_a_stage_before_is_noticed(runs, tmp_path, monkeypatch, capsys):
    """Banks made by other code, and the figures that rest on them were called fresh."""
    from ssl_kit.lab.provenance import code_digests
    from ssl_kit.lab.stages import find_stage

    def write(n):
        write_stage(tmp_path / "stages", "rooms", cells=[f"x = {n}"])
        write_stage(tmp_path / "stages", "banks", "dict(title='B', needs=['rooms'])")
        write_stage(tmp_path / "stages", "study", "dict(title='S', needs=['banks'])")

    monkeypatch.setenv("SSL_KIT_STAGES", str(tmp_path / "stages"))
    write(1)
    for stage, upstream in (("rooms", {}), ("banks", {"rooms": "rooms1"}), ("study", {"banks": "banks1"})):
        run = make_run(runs, stage, f"{stage}1", stage)
        found = read_json(run.folder / "provenance.json")
        code = {"digests": code_digests(find_stage(stage).source)}
        write_json(run.folder / "provenance.json", {**found, "upstream": upstream, "code": code})
    figures_command.export_figures()
    assert call(figures_command, "figures", "--check") == 0
    capsys.readouterr()
    write(2)
    said = ["code of what it rests on has changed since (rooms)"]
    assert stale(capsys) == {"rooms": [], "rooms_table": [], "banks": said, "banks_table": said, "study": said,
                             "study_table": said}
    shutil.rmtree(runs)  # a fresh clone has no runs, and knows it as well
    assert stale(capsys)["study"] == ["its run study/study1 is not here", *said]


def test_two_stages_may_not_share_a_name(runs):
    make_run(runs, "one", "a1", "mae")
    make_run(runs, "two", "b1", "mae")
    with pytest.raises(DataError, match="stage two and stage one both make one"):
        figures_command.export_figures()


def test_a_table_of_a_figures_name_stands_beside_it(runs, tmp_path):
    run = make_run(runs, "one", "a1", "mae")
    (run.folder / "tables" / "mae.tex").write_text("\\toprule")
    figures_command.export_figures()
    folder = tmp_path / "figures"
    assert {path.suffix for path in folder.glob("mae.*")} == {".pdf", ".png", ".csv", ".tex", ".json"}
    assert all(state.fresh for state in figures_command.check_figures(folder))
    (folder / "mae.png").unlink()
    assert [state.reasons for state in figures_command.check_figures(folder) if not state.fresh] == [
        ("mae.png is missing",)]


def test_a_figure_altered_in_its_run_is_not_exported(runs, tmp_path):
    run = make_run(runs, "one", "a1", "mae")
    (run.folder / "figures" / "mae.csv").write_text("rate\n")
    with pytest.raises(DataError, match="ssl-kit run one --force"):
        figures_command.export_figures()
    assert not (tmp_path / "figures").exists()


def test_a_table_altered_in_its_run_is_neither_shown_nor_exported(runs, tmp_path):
    folder = make_run(runs, "routing_study", "c0ffee", figure="mae_vs_rate").folder
    (folder / "tables" / "errors.csv").write_text("method,mae\nnetwork,15.4\n")
    (folder / "tables" / "errors.tex").write_text("15.4")
    seal_run(folder, but=("status.json",))
    report.build_report([folder], tmp_path / "report.html")
    for name in ("errors.csv", "errors.tex"):
        text = (folder / "tables" / name).read_text()
        (folder / "tables" / name).write_text(text.replace("15.4", "5.4 "))
        with pytest.raises(DataError, match=f"{name} is altered: not what the run wrote"):
            report.build_report([folder], tmp_path / "report.html")
        with pytest.raises(DataError, match=f"{name} is altered"):
            figures_command.export_figures([Run(folder)], tmp_path / "figures")
        (folder / "tables" / name).write_text(text)
    figures_command.export_figures([Run(folder)], tmp_path / "figures")


def test_export_to_a_full_disk_changes_nothing(runs, tmp_path, monkeypatch):
    import errno

    make_run(runs, "one", "a1", "mae")
    figures_command.export_figures()
    before = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    make_run(runs, "one", "a1", "mae", value=3.0, thesis=True)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError):
        figures_command.export_figures()
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()} == before
