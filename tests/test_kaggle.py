"""Kaggle folders: built, run in a simulated Kaggle, resumed, pulled; hostile parameters, broken inputs, no network."""

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kaggle_layout import attach_output, lay_out, read_only, run_notebook, tree
from stage_notebooks import toy_total, write_stage, write_toy

from ssl_kit.lab import kaggle, kaggle_command, kaggle_install, kaggle_runs, kaggle_session, kaggle_wheels
from ssl_kit.lab import runs as runs_module
from ssl_kit.lab.cli import main
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.files import read_json, sha256_file, write_json
from ssl_kit.lab.kaggle import KaggleOptions, build_folder, kaggle_notebook, kernel_metadata, slug_of
from ssl_kit.lab.kaggle_runs import bring_home, copy_run
from ssl_kit.lab.provenance import code_version, package_folder
from ssl_kit.lab.runs import Run, plan
from ssl_kit.lab.seal import run_faults, seal_run
from ssl_kit.lab.stages import list_stages

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = '"; open("/tmp/harm", "w").write("x")  # \'\'\' """ \\ \n import os'
ABOVE = '''
from ssl_kit.lab.files import read_json
from ssl_kit.lab.stages import stage_context

ctx = stage_context("above")
below = read_json(ctx.upstream("toy") / "metrics.json")["total"]
ctx.save_metrics({"name": name, "headline": [{"label": "twice", "value": 2 * below}]})
'''


def wheels_of(versions, folder):
    """Wheels in name alone: the simulated image has what they would bring."""
    folder.mkdir(exist_ok=True)
    for name, version in versions.items():
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"not needed here")
    return folder


def write_chain(folder):
    """Two stages: `above` needs `toy`."""
    write_toy(folder)
    write_stage(folder, "above", "dict(title='Above', needs=['toy'])",
                "seed: int = 0\nname: str = 'x'\nrate: float = 0.5\nmany: list[int] = [1]", cells=(ABOVE,))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Stages, and the folder of `above` built once, with a parameter that would like to be code."""
    folder = tmp_path_factory.mktemp("kaggle")
    write_chain(folder / "stages")
    wheels_of(kaggle_wheels.lacking(), folder / "wheels")
    options = KaggleOptions("someone", "ci", "cpu", wheels=str(folder / "wheels"))
    build_folder("above", options, ["seed=3", "toy.n_steps=2", f"name={HOSTILE}"], folder / "above", folder / "stages")
    return folder


@pytest.fixture(scope="module")
def ran(chain, tmp_path_factory):
    """The built notebook, run in a simulated Kaggle."""
    folder = tmp_path_factory.mktemp("ran")
    root = lay_out(folder / "kaggle", chain / "above")
    before = tree(root / "input")
    look = ("import ssl_kit, urllib.request\nprint('kit at', ssl_kit.__file__)\ntry:\n"
            "    urllib.request.urlopen('http://192.0.2.1/', timeout=3)\nexcept OSError as error:\n    print(error)")
    text = run_notebook(chain / "above", root, folder / "scratch", cells=[look])
    assert tree(root / "input") == before
    return folder, text


def test_the_built_notebook_runs_offline_from_its_own_wheel(chain, ran, monkeypatch):
    folder, text = ran
    at = re.search(r"kit at (.+)", text)[1]
    assert Path(at).is_relative_to(folder / "scratch" / "tmp") and "no network" in text
    runs = folder / "kaggle" / "working" / "runs"
    monkeypatch.setenv("SSL_KIT_STAGES", str(chain / "stages"))
    planned = plan(list_stages(), "ci", ["seed=3", "toy.n_steps=2", f"name={HOSTILE}"], "above", runs)
    for name in ("toy", "above"):  # the very runs that `ssl-kit run` would make
        run = planned[name].run
        assert run.state == "finished" and run_faults(run.folder) == [] and (run.folder / "notebook.ipynb").is_file()
        assert run.provenance["code"]["text"] == code_version()["text"]
        assert run.provenance["upstream"] == {need: path.name for need, path in planned[name].upstream.items()}
    run = planned["above"].run
    assert run.parameters == {"seed": 3, "name": HOSTILE, "rate": 0.5, "many": [1]}
    assert run.metrics["name"] == HOSTILE and not Path("/tmp/harm").exists()
    assert run.headline[0]["value"] == pytest.approx(2 * toy_total(2, 3), abs=1e-12)
    assert run.provenance["kaggle"]["device"] == "cpu" and run.provenance["peak_memory_mb"] > 10


def test_a_finished_previous_version_is_taken_over_and_the_cells_are_skipped(chain, ran, tmp_path):
    folder, _ = ran
    root = tmp_path / "kaggle"
    shutil.copytree(folder / "kaggle", root)
    attach_output(root, "previous-version")
    text = run_notebook(chain / "above", root, tmp_path / "scratch", cells=["1 / 0"])
    assert "finished in a previous version" in text
    taken = next((root / "working" / "runs" / "above").iterdir())
    assert Run(taken).state == "finished" and run_faults(taken) == []
    assert taken.stat().st_mode & 0o200 and (taken / "params.json").stat().st_mode & 0o200


# The session, in this process.


@pytest.fixture
def on_kaggle(tmp_path, monkeypatch):
    """A simulated Kaggle and the kit's stages in it; stages are executed without a kernel."""
    root = tmp_path / "kaggle"
    write_chain(root / "input" / "kit")
    (root / "working").mkdir()
    monkeypatch.setenv("SSL_KIT_KAGGLE", str(root))
    for name in ("SSL_KIT_RUNS", "SSL_KIT_STAGES", "SSL_KIT_MANIFESTS", "SSL_KIT_RUN_DIR", "SSL_KIT_DATA"):
        monkeypatch.setenv(name, "")  # so that what the session sets is taken back
    monkeypatch.chdir(tmp_path)

    def execute(notebook, run_dir, values, environment, kill=None):
        write_json(run_dir / "metrics.json", {"headline": [{"label": "total", "value": values["n_steps"]}]})
        if read_json(run_dir / "context.json")["deadline"] is not None:
            write_json(run_dir / "notes.json", {"unfinished": "time limit"})
        return 2**20

    monkeypatch.setattr(runs_module, "execute_notebook", execute)
    return root


def begin(root, stage="above", **options):
    values = {"above": {"seed": 0, "name": "x", "rate": 0.5, "many": [1]},
              "toy": {"seed": 0, "n_steps": 4, "step_s": 0.0, "fail": False}}[stage]
    options = {"device": "cpu", "profile": "ci", "values": values} | options
    return kaggle_session.begin(stage, kit=root / "input" / "kit", **options)


def test_the_stage_is_paused_by_the_time_limit_and_goes_on_in_the_next_version(on_kaggle, capsys):
    session = begin(on_kaggle, "toy", time_limit_s=900.0)
    from ssl_kit.lab.context import stage_context

    ctx = stage_context("toy")
    assert 0 < ctx.time_left() < 900 and Path.cwd() == session.target.folder
    write_json(ctx.artifacts / "state.json", {"step": 1})
    ctx.unfinished("time limit at step 1")
    assert session.finish().state == "paused" and "--resume" in capsys.readouterr().out
    os.chdir(on_kaggle.parent)
    attach_output(on_kaggle, "previous-version")
    again = begin(on_kaggle, "toy")
    assert "taken up from a previous output, paused" in capsys.readouterr().out
    assert again.target.run_id == session.target.run_id
    assert read_json(again.target.folder / "artifacts" / "state.json") == {"step": 1}
    write_json(again.target.folder / "artifacts" / "state.json", {"step": 2})  # the copy may be written
    assert again.finish().state == "finished"


def test_needs_that_are_not_done_in_time_end_the_notebook_without_an_error(on_kaggle, capsys, monkeypatch):
    skipped = []
    monkeypatch.setattr(kaggle_session, "skip_rest", lambda: skipped.append(True))
    session = begin(on_kaggle, time_limit_s=900.0)
    assert not session.active and skipped and "--resume" in capsys.readouterr().out
    assert session.planned["toy"].run.state == "paused" and run_faults(session.planned["toy"].folder) == []
    assert not session.target.folder.exists()


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda path: path.write_bytes(path.read_bytes()[:4]), "state.json has 4 bytes of"),
    (lambda path: path.unlink(), "state.json is missing"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2")), "state.json is altered"),
])
def test_a_damaged_previous_output_is_refused_by_name(on_kaggle, spoil, complaint):
    session = begin(on_kaggle, "toy")
    write_json(session.target.folder / "artifacts" / "state.json", {"step": 1})
    session.finish()
    os.chdir(on_kaggle.parent)
    attached = attach_output(on_kaggle, "previous-version")
    read_only(attached, writable=True)
    spoil(next(attached.rglob("artifacts")) / "state.json")
    with pytest.raises(DataError, match=complaint):
        begin(on_kaggle, "toy")
    # an intact version beside it is taken instead
    intact = on_kaggle / "input" / "a-version" / "runs" / "toy" / session.target.run_id
    shutil.copytree(next(attached.rglob("artifacts")).parent, intact)
    write_json(intact / "artifacts" / "state.json", {"step": 1})
    seal_run(intact)
    assert begin(on_kaggle, "toy").target.run.state == "finished"


def test_outputs_of_other_parameters_are_not_taken(on_kaggle, capsys):
    begin(on_kaggle, "toy").finish()
    os.chdir(on_kaggle.parent)
    attach_output(on_kaggle, "previous-version")
    values = {"seed": 1, "n_steps": 4, "step_s": 0.0, "fail": False}
    session = begin(on_kaggle, "toy", values=values)
    assert "previous outputs hold other runs" in capsys.readouterr().out
    assert list((on_kaggle / "working" / "runs" / "toy").iterdir()) == [session.target.folder]
    session.finish()


def test_a_value_edited_in_the_notebook_counts_for_what_is_needed_too(on_kaggle):
    built = {"seed": 0, "name": "x", "rate": 0.5, "many": [1]}
    session = begin(on_kaggle, values=built | {"seed": 7}, built=built, needs={"toy": {"n_steps": 3}})
    assert session.planned["toy"].values == {"seed": 7, "n_steps": 3, "step_s": 0.0, "fail": False}
    assert session.target.run.parameters["seed"] == 7
    session.finish()
    with pytest.raises(ParameterError, match="did you mean 'rate'"):
        begin(on_kaggle, values={"rat": 1.0})
    with pytest.raises(ParameterError, match="expects int"):
        begin(on_kaggle, values=built | {"seed": "7"})


def test_a_failed_cell_is_recorded(on_kaggle, monkeypatch):
    session = begin(on_kaggle, "toy")

    class Result:
        error_in_exec, error_before_exec = ValueError("no"), None

    session._after_cell(Result())
    assert session.target.run.state == "failed" and "ValueError: no" in session.target.run.status["error"]
    assert "SSL_KIT_RUN_DIR" not in os.environ and run_faults(session.target.folder) == []


def test_a_full_working_folder_is_said(on_kaggle, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    with pytest.raises(StorageError, match="20 GB"):
        begin(on_kaggle, "toy")
    source = on_kaggle / "input" / "v" / "runs" / "toy" / "ab"
    write_json(source / "status.json", {"state": "paused", "pad": "x" * 5000})
    with pytest.raises(StorageError, match="are free"):
        copy_run(source, on_kaggle / "working" / "runs" / "toy" / "ab")
    monkeypatch.undo()

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kaggle_runs.shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left.*20 GB"):
        copy_run(source, on_kaggle / "working" / "runs" / "toy" / "ab")
    assert not list((on_kaggle / "working" / "runs" / "toy").glob("*"))


def test_t4_trains_in_fp16_and_both_gpus_are_recorded(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k=0: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k=0: (7, 5))
    facts = kaggle_session.machine_facts("cuda")
    assert facts["precision"] == "16-mixed" and [gpu["capability"] for gpu in facts["gpus"]] == ["7.5", "7.5"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k=0: (8, 0))
    assert kaggle_session.machine_facts("cuda")["precision"] == "bf16-mixed"


# The build.


def test_what_is_built(chain):
    built = kaggle.read_build(chain / "above")
    kernel = built["kernel"]
    assert kernel["id"] == "someone/ssl-kit-above" == f"someone/{slug_of(kernel['title'])}"
    assert kernel["enable_internet"] is False and re.fullmatch(r".+@sha256:[0-9a-f]{64}", kernel["docker_image"])
    assert kernel["dataset_sources"] == [built["dataset"]["id"]] and kernel["kernel_sources"] == []
    assert (kernel["machine_shape"], kernel["enable_gpu"]) == ("None", False)
    assert {"toy.ipynb", "above.ipynb", "librispeech.yaml", "enhance_matched.csv"} <= {
        path.name for path in (chain / "above" / "dataset").iterdir()}
    assert all(path.is_file() for path in (chain / "above" / "dataset").iterdir())  # flat: nothing is zipped on the way
    notebook = read_json(chain / "above" / "notebook" / kernel["code_file"])
    first = next("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert sha256_file(chain / "above" / "dataset" / kaggle_install.LISTING) in first
    imported = {node.names[0].name.split(".")[0] for node in ast.walk(ast.parse(first)) if isinstance(node, ast.Import)}
    assert imported <= sys.stdlib_module_names
    assert not list(chain.glob(".above*building*"))


def test_the_wheel_holds_the_package_and_nothing_stale(chain):
    with zipfile.ZipFile(next((chain / "above" / "dataset").glob("ssl_kit-*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if name.startswith("ssl_kit/")}
    here = {f"ssl_kit/{path.relative_to(package_folder()).as_posix()}" for path in package_folder().rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.name != "_modidx.py"}
    assert inside == here | {"ssl_kit/_built_from.py"}
    assert "ssl_kit/assets/checkpoints/crnn_6cm/model.safetensors" in inside
    assert not (package_folder() / "_built_from.py").exists() and not (ROOT / "build").exists()


@settings(max_examples=20)
@given(text=st.text(), rate=st.floats(allow_nan=False, allow_infinity=False), many=st.lists(st.integers(), max_size=4))
@example(HOSTILE, 0.1, [])
@example("\udc80\x00\r'''", -0.0, [1])
@example("{setup}{0}%s${HOME}!ls\n%%bash\nls", 1e300, [])
def test_parameters_stay_values(chain, text, rate, many):
    stage = list_stages(chain / "stages")["above"]
    values = stage.resolve("ci", {"seed": 1, "name": text, "rate": rate, "many": many})
    notebook = kaggle_notebook(stage, values, {"toy": {"note": text}}, "0" * 64, KaggleOptions("someone"))
    cells = {tuple(cell["metadata"].get("tags", [])) or cell["id"]: cell["source"] for cell in notebook.cells
             if cell["cell_type"] == "code"}
    found = {node.targets[0].id: ast.literal_eval(node.value)
             for node in ast.parse(cells["injected-parameters",]).body}
    assert found == values
    call = ast.parse(cells["kaggle-begin"]).body[1].value
    given_by = {keyword.arg: keyword.value for keyword in call.keywords}
    assert ast.literal_eval(given_by["built"]) == values
    assert ast.literal_eval(given_by["needs"]) == {"toy": {"note": text}}
    json.dumps(notebook, ensure_ascii=False).encode("utf-8")  # nothing that a file can't hold


OWNED = ("--owner", "someone")


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["abov", *OWNED], "did you mean 'above'"),
    (["above", *OWNED, "-p", "sed=1"], "did you mean 'seed'"),
    (["above", *OWNED, "-p", "seed=one"], "expects int"),
    (["above", *OWNED, "-p", "n_steps=1"], "-p toy.n_steps"),
    (["above", *OWNED, "-p", "to.n_steps=1"], "did you mean 'toy'"),
    (["above", *OWNED, "--profile", "quik"], "did you mean 'quick'"),
    (["above", *OWNED, "--machine", "p100"], "there are: cpu, t4"),
    (["above"], "--owner"),
    (["above", "--owner", "some one"], "--owner"),
    (["above", *OWNED, "--data", "librispeech"], "OWNER/DATASET"),
    (["above", *OWNED, "--time-limit", "50000"], "12 hours"),
    (["above", *OWNED, "--title", "x"], "6 to 50"),
    (["above", *OWNED, "--image", "kaggle:latest"], "sha256"),
    (["above", *OWNED, "--wheels", "/nowhere"], "--wheels"),
])
def test_a_wrong_build_is_refused_and_leaves_nothing(chain, tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.setenv("SSL_KIT_STAGES", str(chain / "stages"))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    monkeypatch.setattr(kaggle, "kit_wheel", lambda folder: Path(shutil.copyfile(__file__, folder / "k.whl")))
    assert main(["kaggle", "build", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]


def test_files_of_this_machine_are_refused(tmp_path):
    write_stage(tmp_path, "reads", "dict(title='R', paths=['weights'])", "weights: str = ''")
    with pytest.raises(ParameterError, match="--data"):
        build_folder("reads", KaggleOptions("someone", "ci"), [f"weights={__file__}"], tmp_path / "out", tmp_path)


@pytest.mark.parametrize("stage", ["a", "a" * 80, "x_" * 30])
def test_titles_fit_and_become_the_id(stage):
    made = kernel_metadata(stage, KaggleOptions("someone"))
    assert 6 <= len(made["title"]) <= 50 and made["id"] == f"someone/{slug_of(made['title'])}"
    assert kernel_metadata(stage, KaggleOptions("someone", resume=True))["kernel_sources"] == [made["id"]]


def quick_build(chain, out, **options):
    return build_folder("above", KaggleOptions("someone", "ci", wheels=str(chain / "wheels"), **options), [], out,
                        chain / "stages")


def test_two_builds_at_once_wait_for_each_other(chain, tmp_path, monkeypatch):
    inside, most = [0], []

    def slow_wheel(folder):
        inside[0] += 1
        most.append(inside[0])
        threading.Event().wait(0.3)
        inside[0] -= 1
        return Path(shutil.copyfile(__file__, folder / "ssl_kit-0.1.0-py3-none-any.whl"))

    monkeypatch.setattr(kaggle, "kit_wheel", slow_wheel)
    (tmp_path / ".above.1-dead.building").mkdir()  # of a build that was killed
    threads = [threading.Thread(target=quick_build, args=(chain, tmp_path / "above")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".above.lock", "above"]
    kaggle_install.check_kit(tmp_path / "above" / "dataset")


def test_a_build_that_fails_keeps_the_one_before_and_a_strange_folder_is_left_alone(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle, "kit_wheel", lambda folder: Path(shutil.copyfile(__file__, folder / "k.whl")))
    quick_build(chain, tmp_path / "above")
    before = tree(tmp_path / "above")
    real = shutil.copyfile

    def full(source, target):
        if str(target).endswith("toy.ipynb"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(kaggle.shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        quick_build(chain, tmp_path / "above")
    monkeypatch.setattr(kaggle.shutil, "copyfile", real)
    assert tree(tmp_path / "above") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ParameterError, match="--out"):
        quick_build(chain, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".*building*"))


def test_a_wheel_that_can_not_be_built_says_what_is_missing(tmp_path, monkeypatch):
    def broken(folder):
        (folder / "setup.py").write_text("raise SystemExit('no compiler of ideas')")

    monkeypatch.setattr(kaggle_wheels, "_copy_of_source", broken)
    with pytest.raises(DataError, match="(?s)setuptools>=70.1.*no compiler of ideas"):
        kaggle_wheels.kit_wheel(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(kaggle_wheels, "package_folder", lambda: tmp_path / "site-packages" / "ssl_kit")
    with pytest.raises(MissingDataError, match="in a clone of the repository"):
        kaggle_wheels.kit_wheel(tmp_path)


def test_wheels_that_are_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_KIT_CACHE", str(tmp_path / "cache"))
    asked = []

    def no_network(interpreter, *arguments):
        asked.append(arguments)
        return subprocess.CompletedProcess([], 1, "", "ERROR: Could not find a version (no network)")

    monkeypatch.setattr(kaggle_wheels, "_pip", no_network)
    with pytest.raises(MissingDataError, match="(?s)pesq==0.0.4.*--wheels"):
        kaggle_wheels.lacking_wheels({"pesq": "0.0.4"}, "3.12")
    with pytest.raises(MissingDataError, match="pesq==0.0.4"):
        kaggle_wheels.lacking_wheels({"pesq": "0.0.4"}, ".".join(map(str, sys.version_info[:2])))
    assert asked[0][0] == "download" and "3.12" in asked[0] and asked[-1][0] == "wheel"
    with pytest.raises(MissingDataError, match="pip wheel --no-deps pesq"):
        kaggle_wheels.lacking_wheels({"pesq": "0.0.4"}, "3.12", wheels_of({}, tmp_path / "empty"))


def test_what_the_image_has_need_not_come_along(monkeypatch):
    found = kaggle_wheels.lacking()
    assert {"pesq", "pystoi", "pyroomacoustics", "py7zr", "texttable", "lightning"} <= set(found)
    assert not {"numpy", "torch", "scipy", "librosa"} & set(found)
    assert "threadpoolctl" in kaggle_wheels.lacking(wanted=["threadpoolctl"])
    with pytest.raises(MissingDataError, match="a_package_nobody_has|a-package-nobody-has"):
        kaggle_wheels.lacking(wanted=["a_package_nobody_has"])


# The set-up cell.


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda folder: next(folder.glob("ssl_kit-*.whl")).write_bytes(b"PK"), "has 2 bytes of"),
    (lambda folder: next(folder.glob("pesq-*.whl")).unlink(), "is missing"),
    (lambda folder: (folder / "toy.ipynb").write_bytes((folder / "toy.ipynb").read_bytes()[::-1]), "altered"),
    (lambda folder: (folder / kaggle_install.LISTING).write_text("{}"), "other builds"),
    (lambda folder: (folder / kaggle_install.LISTING).unlink(), "found none"),
])
def test_an_incomplete_upload_is_refused(chain, tmp_path, spoil, complaint):
    root = lay_out(tmp_path, chain / "above")
    folder = root / "input" / "datasets" / "someone" / "the-kit"
    build = sha256_file(folder / kaggle_install.LISTING)
    read_only(root / "input", writable=True)
    spoil(folder)
    with pytest.raises(RuntimeError, match=complaint):
        kaggle_install.install_kit(build, root / "input")


# Kaggle's command, played by a script.

FAKE = '''#!{python}
import json, pathlib, shutil, sys
state = json.loads(pathlib.Path({state!r}).read_text())
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:3]) + "\\n")
said = state.get(" ".join(sys.argv[1:3]), "done")
if isinstance(said, list):
    said = said.pop(0) if len(said) > 1 else said[0]  # one answer after the other, the last one again and again
    pathlib.Path({state!r}).write_text(json.dumps(state))
if sys.argv[1:3] == ["kernels", "output"]:
    shutil.copytree(state["output"], sys.argv[sys.argv.index("-p") + 1], dirs_exist_ok=True)
print(said)
'''


@pytest.fixture
def fake(tmp_path, monkeypatch, chain):
    """A `kaggle` on the PATH that answers as it is told to, and notes what it was asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    state, log = tmp_path / "state.json", tmp_path / "log"
    (programs / "kaggle").write_text(FAKE.format(python=sys.executable, state=str(state), log=str(log)))
    (programs / "kaggle").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SSL_KIT_STAGES", str(chain / "stages"))
    monkeypatch.setenv("SSL_KIT_RUNS", str(tmp_path / "runs"))

    def play(**answers):
        state.write_text(json.dumps({key.replace("_", " "): value for key, value in answers.items()}))
        return lambda: log.read_text().splitlines()

    return play


def test_a_new_data_set_is_pushed_and_waited_for_before_the_notebook(fake, chain, capsys, monkeypatch):
    monkeypatch.setattr(kaggle_command.time, "sleep", lambda seconds: None)
    asked = fake(datasets_status=["404 - Not Found", "pending", "ready"],
                 kernels_push="Kernel version 1 successfully pushed. Please check progress at https://…")
    assert main(["kaggle", "push", "above", "--out", str(chain / "above")]) == 0
    assert asked() == ["datasets status", "datasets create", "datasets status", "datasets status", "kernels push"]
    assert "successfully pushed" in capsys.readouterr().out


def test_a_known_data_set_gets_a_version(fake, chain):
    asked = fake(datasets_status="ready", kernels_push="Kernel version 2 successfully pushed.")
    assert main(["kaggle", "push", "above", "--out", str(chain / "above")]) == 0
    assert asked()[1] == "datasets version"


def test_an_error_that_ends_with_exit_code_0_is_an_error(fake, chain, capsys):
    said = "Starting upload for file error_vs_geometry.ipynb"  # no error, that is what a stage is called
    fake(datasets_status="ready", datasets_version=said,
         kernels_push="Kernel push error: Maximum weekly GPU quota reached")
    assert main(["kaggle", "push", "above", "--out", str(chain / "above")]) == 1
    assert "Maximum weekly GPU quota" in capsys.readouterr().err


def test_pull_brings_the_runs_home_once(fake, chain, ran, tmp_path, capsys):
    output = ran[0] / "kaggle" / "working"
    fake(kernels_status='someone/ssl-kit-above has status "KernelWorkerStatus.COMPLETE"', output=str(output))
    pull = ["kaggle", "pull", "above", "--out", str(chain / "above")]
    assert main(pull) == 0
    assert capsys.readouterr().out.count("(new)") == 2
    assert main(pull) == 0 and capsys.readouterr().out.count("(was here)") == 2
    assert main(["show", "above"]) == 0 and "twice" in capsys.readouterr().out
    fake(kernels_status='someone/ssl-kit-above has status "KernelWorkerStatus.RUNNING"', output=str(output))
    assert main(pull) == 1 and "RUNNING" in capsys.readouterr().err
    fake(kernels_status='someone/ssl-kit-above has status "KernelWorkerStatus.ERROR"', output=str(output))
    assert main(pull) == 1 and capsys.readouterr().out.count("(was here)") == 2
    fake(kernels_status="403 - Forbidden - Permission 'kernels.get' was denied", output=str(output))
    assert main(pull) == 1 and "was it pushed?" in capsys.readouterr().err


def test_a_truncated_download_is_not_brought_home(ran, tmp_path, monkeypatch, capsys):
    shutil.copytree(ran[0] / "kaggle" / "working", tmp_path / "output")
    path = next((tmp_path / "output").rglob("above/*/metrics.json"))
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError, match="metrics.json has 10 bytes"):
        bring_home(tmp_path / "output", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(MissingDataError, match="found none"):
        bring_home(chain_free(tmp_path), tmp_path / "runs")
    monkeypatch.setenv("SSL_KIT_RUNS", str(tmp_path / "runs"))
    assert main(["kaggle", "pull", "above", "--from", str(tmp_path / "gone")]) == 2


def chain_free(folder):
    """An output without runs."""
    (folder / "no-runs").mkdir()
    return folder / "no-runs"


def test_a_link_in_a_download_is_not_followed(tmp_path):
    run = tmp_path / "output" / "runs" / "toy" / "ab"
    write_json(run / "status.json", {"state": "finished"})
    (tmp_path / "secret").write_text("mine")
    (run / "figures").symlink_to(tmp_path)
    (run / "link").symlink_to(tmp_path / "secret")
    bring_home(tmp_path / "output", tmp_path / "runs")
    assert sorted(path.name for path in (tmp_path / "runs" / "toy" / "ab").iterdir()) == [".lock", "status.json"]


def test_without_kaggles_command_it_is_said_what_to_do(chain, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SSL_KIT_STAGES", str(chain / "stages"))
    assert main(["kaggle", "push", "above", "--out", str(chain / "above")]) == 2
    assert "pip install kaggle" in capsys.readouterr().err
    assert main(["kaggle", "pull", "above", "--out", str(tmp_path / "none")]) == 2
    assert "ssl-kit kaggle build above" in capsys.readouterr().err
    assert main(["kaggle", "push", "abov", "--out", str(tmp_path / "none")]) == 2
    assert "did you mean 'above'" in capsys.readouterr().err


# A real clean environment.


@pytest.mark.slow
def test_enhance_oracles_runs_in_a_clean_environment(tmp_path):
    """A virtual environment with what Kaggle's image has and not what it lacks: the wheels of the folder must do."""
    python = ".".join(map(str, sys.version_info[:2]))
    options = KaggleOptions("someone", "ci", "cpu", python=python)
    built = build_folder("enhance_oracles", options, [], tmp_path / "built", ROOT / "nbs" / "stages")
    lacking = set(kaggle_wheels.lacking(python))
    from packaging.requirements import Requirement

    from ssl_kit.lab.doctor import requirements

    image = [text for text in requirements() if Requirement(text).name not in lacking]
    image += ["brotli", "pycryptodomex", "cython", "pytorch-lightning", "torchmetrics", "lightning-utilities"]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "image")], check=True)
    clean = tmp_path / "image" / "bin" / "python"
    subprocess.run([clean, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                    "-c", str(ROOT / "constraints.txt"), *image], check=True)
    there = subprocess.run([clean, "-c", "import importlib.metadata as m; print([d.name for d in m.distributions()])"],
                           capture_output=True, text=True, check=True).stdout
    assert "pesq" not in there and "ssl-kit" not in there
    root = lay_out(tmp_path / "kaggle", built)
    text = run_notebook(built, root, tmp_path / "scratch", clean, ["import ssl_kit, pesq; print(pesq.__file__)"])
    assert "pesq-0.0.4" in text and str(tmp_path / "scratch" / "tmp") in text.splitlines()[-1]
    run = Run(next((root / "working" / "runs" / "enhance_oracles").iterdir()))
    assert run.state == "finished" and len(run.headline) == 7
    assert (run.folder / "figures" / "oracles_phase.png").is_file()
