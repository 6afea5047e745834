"""The command `ssl-kit`: start-up, help, errors, and the commands about runs."""

import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from stage_notebooks import write_stage, write_toy

from ssl_kit.lab import doctor
from ssl_kit.lab import runs as runs_module
from ssl_kit.lab.cli import COMMANDS, build_parser, main
from ssl_kit.lab.completion import completion_script
from ssl_kit.lab.errors import ParameterError
from ssl_kit.lab.execute import StageFailure
from ssl_kit.lab.files import write_json
from ssl_kit.lab.runs import all_runs, assign
from ssl_kit.lab.stages import list_stages, with_needs
from ssl_kit.lab.sweep import grid_points

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Two stages; executing one leaves metrics without a kernel, and fails when the parameter `fail` says so."""
    write_toy(tmp_path / "stages")
    write_stage(tmp_path / "stages", "above", "dict(title='Above', needs=['toy'])", "seed: int = 0\nrate: float = 0.5")
    for name in ("stages", "runs", "figures"):
        monkeypatch.setenv(f"SSL_KIT_{name.upper()}", str(tmp_path / name))
    monkeypatch.delenv("SSL_KIT_RUN_DIR", raising=False)
    monkeypatch.delenv("SSL_KIT_DATA", raising=False)

    def execute(notebook, run_dir, values, environment, kill=None):
        if values.get("fail"):
            raise StageFailure("cell 4 failed with ValueError: told to fail")
        value = float(values["seed"] + values.get("n_steps", 0))
        write_json(run_dir / "metrics.json", {"headline": [{"label": "MAE", "value": value, "unit": "°",
                                                            "interval": [value - 1, value + 1]}]})
        return 2**20

    monkeypatch.setattr(runs_module, "execute_notebook", execute)
    return tmp_path


def answer(capsys, *arguments, code=0):
    """stdout of a command, as JSON when it asks for it."""
    assert main(list(arguments)) == code
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in arguments else out


def test_start_up_is_quick_and_light():
    script = """
import resource, sys
import ssl_kit.lab.cli
from ssl_kit.lab.cli import main
main(["list"])
heavy = {"torch", "matplotlib", "pandas", "pyroomacoustics", "librosa", "papermill", "nbclient", "nbdev", "fastcore"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
assert used.ru_utime + used.ru_stime < 1.0, used
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out and f"ssl-kit {command}" in out


def examples():
    """Every `ssl-kit ...` line in the help of the commands."""
    for command in COMMANDS:
        parser = build_parser(command)
        epilogs = [sub.epilog for action in parser._subparsers._group_actions for sub in action.choices.values()]
        for epilog in filter(None, epilogs):
            yield from (match.split(", ")[0].split("   ")[0] for match in re.findall(r"ssl-kit .*", epilog))


@pytest.mark.parametrize("line", sorted({line for line in examples() if "STAGE" not in line}))
def test_examples_of_the_help_are_right(line):
    words = line.split()[1:]
    args = build_parser(words[0]).parse_args(words)
    if args.command in ("run", "sweep"):
        chosen = with_needs(args.stage, list_stages(ROOT / "nbs" / "stages"))
        points = grid_points(args.grid, args.seeds, chosen[args.stage]) if args.command == "sweep" else [[]]
        assert all(assign([*args.parameter, *point], chosen, args.stage) for point in points)


def test_a_full_disk_behind_stdout_is_said(lab):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "ssl_kit.lab.cli", "list"], stdout=full, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("ssl-kit: No space left") and "Trace" not in done.stderr


def test_version_and_help(capsys):
    for option, expected in [("--version", "ssl-kit 0."), ("--help", "sweep")]:
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["stdy"], "did you mean 'study'"),
    (["run", "toyy"], "did you mean 'toy'"),
    (["run", "toy", "-p", "n_step=3"], "did you mean 'n_steps'"),
    (["run", "toy", "-p", "seed=one"], "expects int"),
    (["run", "above", "-p", "n_steps=3"], "-p toy.n_steps"),
    (["study", "-p", "nothing=3"], "unknown parameter 'nothing'"),
    (["show", "zzz"], "found none"),
    (["sweep", "toy"], "--grid"),
    (["sweep", "toy", "--grid", "n_steps"], "key=a,b"),
    (["sweep", "toy", "--grid", "n_steps=1,two"], "expects int"),
    (["sweep", "toy", "--seeds", "0"], "at least 1"),
    (["sweep", "toy", "--seeds", "1", "--jobs", "0"], "--jobs"),
    (["run", "toy", "--device", "mps"], "device 'mps'"),
    (["study", "--device", "mps"], "device 'mps'"),
    (["sweep", "toy", "--seeds", "1", "--device", "mps"], "device 'mps'"),
])
def test_a_wrong_command_is_one_paragraph_and_makes_nothing(lab, capsys, monkeypatch, arguments, complaint):
    if "--device" in arguments:
        import torch

        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert complaint in err and "Traceback" not in err and err.startswith("ssl-kit: ")
    assert not list((lab / "runs").glob("*/*"))


@pytest.mark.parametrize("option", [["--time-limit", "0"], ["--time-limit", "soon"], ["--device", "gpu"],
                                    ["--profile", "huge"]])
def test_a_wrong_option_names_itself(lab, capsys, option):
    with pytest.raises(SystemExit) as caught:
        main(["run", "toy", *option])
    assert caught.value.code == 2 and option[0] in capsys.readouterr().err and not (lab / "runs").exists()


def test_debug_shows_the_traceback(lab, capsys):
    for arguments in (["--debug", "run", "toyy"], ["run", "toyy", "--debug"]):
        assert main(arguments) == 2
        assert "Traceback" in capsys.readouterr().err


def test_run_and_reuse(lab, capsys):
    planned = answer(capsys, "run", "above", "-pseed=2", "--dry-run", "--json")
    assert [row["state"] for row in planned] == ["new", "new"] and planned[0]["parameters"]["seed"] == 2
    first = answer(capsys, "run", "above", "-pseed=2", "--json")
    assert [(row["stage"], row["reused"], row["state"]) for row in first] == \
        [("toy", False, "finished"), ("above", False, "finished")]
    assert [row["run_id"] for row in first] == [row["run_id"] for row in planned]
    again = answer(capsys, "run", "above", "-pseed=2", "--json")
    assert [row["reused"] for row in again] == [True, True]
    forced = answer(capsys, "run", "above", "-pseed=2", "--json", "--force")
    assert [row["reused"] for row in forced] == [True, False]
    assert "2°  [1, 3]" in answer(capsys, "run", "above", "-pseed=2")


def test_a_failing_stage_ends_with_1(lab, capsys):
    assert main(["run", "above", "-p", "toy.fail=true"]) == 1
    err = capsys.readouterr().err
    assert "told to fail" in err and "notebook.ipynb" in err and "Traceback" not in err
    assert not (lab / "runs" / "above").exists()


def test_study_ends_with_table_and_report(lab, capsys):
    out = answer(capsys, "study")
    assert "MAE" in out and "2°  [1, 3]" in out and (lab / "runs" / "report.html").is_file()
    again = answer(capsys, "study", "--json")
    assert all(row["reused"] for row in again["runs"]) and again["report"].endswith("report.html")
    assert "reuse" in answer(capsys, "study", "--dry-run")


def test_list_show_compare(lab, capsys):
    answer(capsys, "run", "toy")
    answer(capsys, "run", "toy", "-pseed=4")
    listed = answer(capsys, "list", "--json")
    assert [stage["name"] for stage in listed["stages"]] == ["toy", "above"] and len(listed["runs"]) == 2
    one, two = (row["run_id"] for row in listed["runs"])
    assert "random seed" in answer(capsys, "list", "toy") and one in answer(capsys, "list", "--rebuild")
    shown = answer(capsys, "show", one[:5], "--json")
    assert shown["provenance"]["peak_memory_mb"] == 1.0 and shown["state"] == "finished"
    assert "peak memory" in answer(capsys, "show", one)
    compared = answer(capsys, "compare", one, two, "--json")
    assert compared["parameters"] == {"seed": [0, 4]} and compared["metrics"] == {"MAE": [2.0, 6.0]}
    assert compared["code"] == {} and "no difference" in answer(capsys, "compare", one, one)
    assert "4" in answer(capsys, "compare", one, two)


def test_the_slowest_cells_are_listed(lab, capsys):
    answer(capsys, "run", "above")
    for run in all_runs():
        cells = [{"cell_type": "code", "source": f"{name} = 1\nx", "metadata": {"papermill": {"duration": seconds}}}
                 for name, seconds in (("slow", 5.25 if run.stage == "toy" else 7.0), ("quick", 0.5))]
        text = {"cell_type": "markdown", "source": "", "metadata": {}}
        write_json(run.folder / "notebook.ipynb", {"cells": [text, *cells]})
    rows = answer(capsys, "list", "--slowest", "3", "--json")
    assert [(row["seconds"], row["stage"], row["cell"]) for row in rows[:2]] == [(7.0, "above", "slow = 1"),
                                                                               (5.25, "toy", "slow = 1")]
    assert len(rows) == 3 and "5.2" in answer(capsys, "list", "toy", "--slowest", "1")
    answer(capsys, "list", "--slowest", "0", code=2)
    answer(capsys, "list", "tooy", "--slowest", "1", code=2)


def test_sweep(lab, capsys):
    table = lab / "sweep.csv"
    swept = answer(capsys, "sweep", "toy", "--grid", "n_steps=1,2", "--seeds", "3", "--json", "--output", str(table))
    assert [(row["parameters"], row["headline"]["MAE"]) for row in swept["points"]][:2] == \
        [({"n_steps": "1", "seed": "0"}, 1.0), ({"n_steps": "1", "seed": "1"}, 2.0)]
    assert [row["headline"]["MAE"] for row in swept["over_seeds"]] == [[2.0, 1.0], [3.0, 1.0]]
    assert table.read_text().splitlines()[0] == "n_steps,seed,run_id,state,MAE" and len(table.read_text().split()) == 7
    # in processes of their own: the runs are there, so nothing is executed
    assert "2 ± 1" in answer(capsys, "sweep", "toy", "--grid", "n_steps=1,2", "--seeds", "3", "--jobs", "2")


def test_a_failing_point_is_a_row(lab, capsys):
    swept = answer(capsys, "sweep", "toy", "--grid", "fail=false,true", "--json", code=1)
    assert [row["state"] for row in swept["points"]] == ["finished", "failed"]
    assert "told to fail" in swept["points"][1]["error"]


def test_sweep_on_a_scheduler_that_is_not_there(lab, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["sweep", "toy", "--seeds", "1", "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert "pip install distributed" in capsys.readouterr().err


def test_doctor(lab, capsys, monkeypatch):
    found = {row["name"]: row for row in answer(capsys, "doctor", "--json")}
    assert found["python"]["state"] == "ok" and found["stages"]["found"].startswith("2 in") and "torch" in found
    (lab / "file").write_text("")
    monkeypatch.setenv("SSL_KIT_RUNS", str(lab / "file" / "runs"))
    monkeypatch.setattr(doctor, "check_gpu", lambda: doctor.Finding("gpu", "ok", "none"))
    assert "FAIL  runs" in answer(capsys, "doctor", code=1)


def test_doctor_says_what_is_missing_and_how_to_get_it(lab, capsys, monkeypatch):
    here = importlib.metadata.version

    def hidden(name):
        if name in ("soundfile", "gradio"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "optuna" else here(name)

    monkeypatch.setattr(importlib.metadata, "version", hidden)
    monkeypatch.setitem(sys.modules, "torch", None)                     # installed, and broken
    said = answer(capsys, "doctor", code=1)
    assert "FAIL  soundfile        not installed\n      -> pip install 'soundfile<1,>=0.12'" in said
    assert "ok    gradio           not installed (optional)\n      -> for the live pages" in said
    assert "pip install 'gradio<7,>=6.20'" in said and "WARN  optuna           1.0\n" in said
    assert "FAIL  gpu" in said and "pip install --force-reinstall torch" in said


def test_doctor_knows_every_extra():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    offered = {Requirement(text).name for key, texts in settings["DEFAULT"].items() for text in texts.split()
               if key.endswith("_requirements") and not key.startswith(("dev", "docs"))}
    assert set(doctor.EXTRAS) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_stages(tmp_path):
    script = subprocess.run([sys.executable, "-m", "ssl_kit.lab.cli", "completion", "bash"], capture_output=True,
                            text=True, check=True, cwd=ROOT).stdout
    (tmp_path / "complete.bash").write_text(script)

    def offered(*words):
        asked = " ".join(f"'{word}'" for word in words)
        line = f"""source {tmp_path}/complete.bash; COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}
                   $(complete -p ssl-kit | grep -o '_shtab[a-z_]*'); echo "${{COMPREPLY[@]}}" """
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert offered("ssl-kit", "enh") == ["enhance"]
    assert offered("ssl-kit", "enhance", "--str") == ["--strength", "--stream"]
    assert "routing_study" in offered("ssl-kit", "run", "routing_st")


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "csh"])
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="expected one of bash, zsh, tcsh"):
        completion_script("fish")
