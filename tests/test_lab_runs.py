"""Runs: identity, reuse, kill -9 and resumption, two writers, failures, full disks, the index."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from stage_notebooks import toy_total, write_stage, write_toy

from ssl_kit.lab import runs as runs_module
from ssl_kit.lab.errors import DataError, MissingDataError, ParameterError, StorageError
from ssl_kit.lab.execute import StageFailure, StagePaused, kernel_environment
from ssl_kit.lab.files import read_json, write_json
from ssl_kit.lab.index import indexed_runs
from ssl_kit.lab.runs import Run, all_runs, carry_out, find_run, plan
from ssl_kit.lab.seal import SEAL, seal_run
from ssl_kit.lab.stages import list_stages


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder of stages with the toy in it, and an empty folder of runs."""
    write_toy(tmp_path / "stages")
    monkeypatch.setenv("SSL_KIT_STAGES", str(tmp_path / "stages"))
    monkeypatch.setenv("SSL_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("SSL_KIT_RUN_DIR", raising=False)
    monkeypatch.delenv("SSL_KIT_DATA", raising=False)
    return tmp_path


def planned_toy(*pairs, profile="quick"):
    return plan(list_stages(), profile, pairs, "toy")["toy"]


def start_command(*arguments, **environment):
    """`ssl-kit` in a process of its own."""
    # a shell that starts the tests in the background has them, and what they start, ignore Ctrl-C
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from ssl_kit.lab.cli import main; sys.exit(main())")
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, **environment})


def wait_for(condition, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def no_execution(monkeypatch):
    """From here on, executing a notebook is an error."""
    def refuse(*args, **kwargs):
        raise AssertionError("a notebook was executed")

    return lambda: monkeypatch.setattr(runs_module, "execute_notebook", refuse)


@pytest.fixture
def executed(monkeypatch):
    """Executions without a kernel: what a stage would leave, and a list of the parameters it got."""
    calls = []

    def execute(notebook, run_dir, values, environment, kill=None):
        calls.append(dict(values))
        write_json(run_dir / "metrics.json", {"headline": [{"label": "n", "value": len(calls)}]})
        return 2**20

    monkeypatch.setattr(runs_module, "execute_notebook", execute)
    return calls


def test_a_run_leaves_everything_and_is_reused(lab, no_execution):
    planned = planned_toy("seed=3")
    run, reused = carry_out(planned)
    assert not reused and run.state == "finished"
    assert run.metrics["total"] == pytest.approx(toy_total(2, 3), abs=1e-12)
    assert run.parameters == {"seed": 3, "n_steps": 2, "step_s": 0.0, "fail": False}
    made = run.provenance
    assert made["seed"] == 3 and made["peak_memory_mb"] > 10 and made["wall_s"] > 0 and made["profile"] == "quick"
    assert made["environment"]["packages"]["numpy"] and made["code"]["version"] and "stage" in made["code"]["digests"]
    cells = read_json(run.folder / "notebook.ipynb")["cells"]
    assert any("injected-parameters" in cell["metadata"].get("tags", []) for cell in cells)
    no_execution()
    assert carry_out(planned_toy("seed=3"))[1]
    with pytest.raises(AssertionError, match="executed"):
        carry_out(planned_toy("seed=4"))


def test_kill_minus_9_and_run_again_gives_the_same_numbers(lab):
    pairs = ["n_steps=12", "seed=5"]
    planned = planned_toy(*pairs)
    state = planned.folder / "artifacts" / "state.json"
    process = start_command("run", "toy", *(f"-p{pair}" for pair in pairs), TOY_HANGS_AT="3")
    wait_for(lambda: state.exists() and read_json(state)["step"] == 3)
    process.kill()
    process.communicate()
    assert planned.run.state == "interrupted"
    run, reused = carry_out(planned)
    assert not reused and run.state == "finished"
    assert run.metrics["total"] == toy_total(12, 5)
    assert run.metrics["starts"] == [0, 3]  # it went on where it was killed


def chain(lab):
    """The toy, with an artifact, and a stage above it that needs it; planned."""
    write_stage(lab / "stages", "above", "dict(title='Above', needs=['toy'])")
    return plan(list_stages(), "quick", [], "above")


ALTERATIONS = {"altered": lambda data: data.replace(b"1", b"2", 1), "cut short": lambda data: data[:-2], "gone": None}


def alter(path, how):
    data = path.read_bytes()
    path.unlink()
    if ALTERATIONS[how] is not None:
        path.write_bytes(ALTERATIONS[how](data))
        assert path.read_bytes() != data
    return data


@pytest.mark.parametrize("how", ALTERATIONS)
def test_a_number_that_the_run_did_not_write_is_not_read(lab, executed, how):
    """Still JSON, still a number, only another one."""
    planned = planned_toy("seed=1")
    run, _ = carry_out(planned)
    path = run.folder / "metrics.json"
    data = alter(path, how)
    with pytest.raises(DataError, match="metrics.json"):
        print(run.metrics, run.headline)
    with pytest.raises(DataError, match=r"metrics.json .*not what the run wrote; .*ssl-kit run toy --force"):
        carry_out(planned_toy("seed=1"))
    assert [row["state"] for row in indexed_runs()] == ["unreadable"]
    path.write_bytes(data)
    assert carry_out(planned_toy("seed=1"))[1] and run.metrics["headline"][0]["value"] == 1
    alter(path, how)
    run, reused = carry_out(planned_toy("seed=1"), force=True)
    assert not reused and run.metrics["headline"][0]["value"] == 2 and len(executed) == 2


@pytest.mark.parametrize("how", ALTERATIONS)
def test_nothing_is_made_of_an_altered_artifact(lab, executed, how):
    planned = chain(lab)
    below, _ = carry_out(planned["toy"])
    (below.folder / "artifacts").mkdir(exist_ok=True)
    (below.folder / "artifacts" / "state.json").write_text('{"total": 1.5}')
    seal_run(below.folder, but=("status.json", "notebook.ipynb", "kernel.log"))  # as if the stage had left it
    assert carry_out(planned["toy"])[1]
    data = alter(below.folder / "artifacts" / "state.json", how)
    with pytest.raises(DataError, match="artifacts/state.json .*not what the run wrote"):
        carry_out(planned["above"])
    assert len(executed) == 1 and planned["above"].run.state != "finished"
    (below.folder / "artifacts" / "state.json").write_bytes(data)
    assert not carry_out(planned["above"])[1]


def test_people_may_open_the_notebook_of_a_run_and_save_it(lab, executed):
    run, _ = carry_out(planned_toy())
    for name in ("notebook.ipynb", "kernel.log"):
        (run.folder / name).write_text("saved by hand")
    assert carry_out(planned_toy())[1] and run.metrics


def test_runs_of_an_earlier_version_have_no_seal_and_are_reused(lab, executed):
    run, _ = carry_out(planned_toy())
    (run.folder / SEAL).unlink()
    assert carry_out(planned_toy())[1] and run.metrics["headline"][0]["value"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": [1]}', '{"files": {"metrics.json": 3}}',
                                  '{"files": {"../../secret": [1, "a"]}}', '{"files": {"/etc/passwd": [1, "a"]}}'])
def test_a_damaged_seal_is_named(lab, executed, text):
    run, _ = carry_out(planned_toy())
    (run.folder / SEAL).write_text(text)
    with pytest.raises(DataError, match=SEAL):
        carry_out(planned_toy())
    with pytest.raises(DataError, match=SEAL):
        print(run.metrics)


def test_no_turned_bit_of_a_run_gives_another_number(lab, executed):
    run, _ = carry_out(planned_toy())
    rng, headline = random.Random(0), run.headline
    for name in ("metrics.json", SEAL):
        data = (run.folder / name).read_bytes()
        for _ in range(60):
            turned = bytearray(data)
            turned[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (run.folder / name).write_bytes(turned)
            try:
                again, reused = carry_out(planned_toy())
            except DataError as error:
                assert name in str(error)
            else:
                assert reused and again.headline == headline
        (run.folder / name).write_bytes(data)
    assert len(executed) == 1


def test_two_writers_of_one_run(lab):
    """One makes the run, the other waits for it and finds it made."""
    pairs = ["-pn_steps=4", "-pstep_s=0.2"]
    processes = [start_command("run", "toy", *pairs, "--json") for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    outcomes = [json.loads(out)[0] for out, _ in answers]
    assert sorted(outcome["reused"] for outcome in outcomes) == [False, True]
    assert outcomes[0]["metrics"] == outcomes[1]["metrics"] and outcomes[0]["metrics"]["starts"] == [0]
    assert len(all_runs()) == 1


def test_a_failing_cell_and_a_pause_for_time(lab):
    planned = planned_toy("fail=true", "seed=9")
    with pytest.raises(StageFailure, match="ValueError: told to fail at seed 9"):
        carry_out(planned)
    run = planned.run
    assert run.state == "failed" and "told to fail" in run.status["error"] and run.metrics == {}
    assert "told to fail" in (run.folder / "notebook.ipynb").read_text()
    paused = planned_toy("seed=8")
    with pytest.raises(StagePaused, match="time limit at step 0"):
        carry_out(paused, deadline=time.time() + 10)
    assert paused.run.state == "paused" and paused.run.metrics == {}


def test_interrupted_attempts_keep_artifacts_alone(lab, executed):
    planned = planned_toy()
    write_json(planned.folder / "artifacts" / "state.json", {"step": 1})
    write_json(planned.folder / "tables" / "half.csv", [])
    write_json(planned.folder / "status.json", {"state": "running", "pid": 1})
    assert planned.run.state == "interrupted"
    carry_out(planned)
    assert (planned.folder / "artifacts" / "state.json").exists()
    assert not (planned.folder / "tables" / "half.csv").exists()
    carry_out(planned, force=True)
    assert len(executed) == 2 and not (planned.folder / "artifacts" / "state.json").exists()


def test_identity(lab, executed, monkeypatch):
    write_stage(lab / "stages", "above", "dict(title='Above', needs=['toy'])", "seed: int = 0\nrate: float = 0.5")

    def ids(profile="quick", pairs=()):
        return {name: p.run_id for name, p in plan(list_stages(), profile, pairs, "above").items()}

    plain = ids()
    assert ids(pairs=["rate=0.5"]) == plain  # a default that is given is the default
    assert ids(pairs=["rate=1"])["toy"] == plain["toy"] and ids(pairs=["rate=1"])["above"] != plain["above"]
    assert all(ids(pairs=["toy.n_steps=9"])[name] != plain[name] for name in plain)
    assert all(ids(pairs=["seed=1"])[name] != plain[name] for name in plain)  # shared by name
    assert ids("ci")["toy"] != plain["toy"]
    monkeypatch.setenv("SSL_KIT_DATA", str(lab))
    assert ids() == plain  # data that the stages don't use don't count
    write_toy(lab / "stages")
    assert ids() == plain
    path = lab / "stages" / "toy.ipynb"
    path.write_text(path.read_text().replace("told to fail", "was told to fail"))
    assert all(ids()[name] != plain[name] for name in plain)


def test_data_count_where_declared(lab, monkeypatch):
    write_stage(lab / "stages", "toy", "dict(title='T', data={'corpus=real': ['speech']})", "corpus: str = 'embedded'")
    embedded = planned_toy().run_id
    with pytest.raises(MissingDataError):
        planned_toy("corpus=real")
    (lab / "data" / "speech").mkdir(parents=True)
    monkeypatch.setenv("SSL_KIT_DATA", str(lab / "data"))
    real = planned_toy("corpus=real")
    assert real.data["speech"]["files"] == 0 and planned_toy().run_id == embedded
    (lab / "data" / "speech" / "a.flac").write_bytes(b"1")
    assert planned_toy("corpus=real").run_id != real.run_id


@pytest.mark.parametrize(("pairs", "complaint"), [
    (["n_step=3"], "did you mean 'n_steps'"), (["n_steps=three"], "expects int"),
    (["other.seed=1"], "no stage 'other'"), (["toy.sed=1"], "did you mean 'seed'"), (["n_steps"], "key=value"),
])
def test_wrong_parameters_are_refused_before_anything_is_made(lab, pairs, complaint):
    with pytest.raises(ParameterError, match=complaint):
        planned_toy(*pairs)
    assert not (lab / "runs").exists()


def test_a_stage_waits_for_what_it_needs(lab, executed):
    write_stage(lab / "stages", "above", "dict(title='Above', needs=['toy'])")
    planned = plan(list_stages(), "quick", (), "above")
    with pytest.raises(ValueError, match="needs this run of toy finished"):
        carry_out(planned["above"])
    carry_out(planned["toy"])
    assert carry_out(planned["above"])[0].provenance["upstream"] == {"toy": planned["toy"].run_id}


def test_full_disk(lab, executed, monkeypatch):
    """Nothing half-written, a clear error, and the same command works once there is room."""
    folder = lab / "runs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        filler = folder / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(StorageError, match="free some space"):
            carry_out(planned_toy())
        assert not list(folder.rglob("*.tmp")) and not executed and indexed_runs() == []
        filler.unlink()
        assert carry_out(planned_toy())[0].state == "finished"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_finding_runs(lab, executed):
    one, two = (carry_out(planned_toy(f"seed={seed}"))[0] for seed in (1, 2))
    assert find_run(one.run_id[:6]) == one and find_run(f"toy/{two.run_id}") == two and find_run("toy").stage == "toy"
    with pytest.raises(MissingDataError, match="zzz"):
        find_run("zzz")
    os.rename(two.folder, two.folder.with_name(one.run_id[:6] + "zz"))
    with pytest.raises(ParameterError, match="more of the id"):
        find_run(one.run_id[:6])


def test_the_index_is_made_from_the_folders(lab, executed):
    assert indexed_runs() == []
    runs = [carry_out(planned_toy(f"seed={seed}"))[0] for seed in (1, 2, 3)]
    rows = indexed_runs()
    assert [row["parameters"]["seed"] for row in rows] == [1, 2, 3] and rows[0]["headline"][0]["value"] == 1
    (lab / "runs" / "index.sqlite").write_bytes(b"not a database, whatever it is")
    assert indexed_runs() == rows
    (lab / "runs" / "index.sqlite").unlink()
    assert indexed_runs(rebuild=True) == rows
    write_json(runs[0].folder / "status.json", {"state": "running", "started": "2000-01-01"})
    (runs[1].folder / "status.json").write_text("{half")
    states = {row["run_id"]: row["state"] for row in indexed_runs()}
    assert [states[run.run_id] for run in runs] == ["interrupted", "unreadable", "finished"]
    for path in sorted(runs[2].folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert len(indexed_runs()) == 2


@pytest.mark.parametrize("name", [None, 7, b"toy"])
def test_rows_without_names_are_no_runs(lab, executed, name):
    """A damaged table may hold values of any type."""
    for seed in (1, 2):
        carry_out(planned_toy(f"seed={seed}"))
    before = indexed_runs()
    with contextlib.closing(sqlite3.connect(lab / "runs" / "index.sqlite")) as connection, connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(runs)")]
        rows = connection.execute("SELECT * FROM runs").fetchall()
        connection.execute("DROP TABLE runs")
        connection.execute(f"CREATE TABLE runs ({', '.join(columns)}, PRIMARY KEY (stage, run_id))")
        connection.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(columns))})",
                               [(first, *row[1:]) for row in rows for first in (name, "gone", row[0])])
    assert indexed_runs() == before and len(before) == 2


def test_no_turned_bit_of_the_index_is_believed(lab, executed):
    """A bit inside a text or a number, or in the words of the schema: the database itself does not notice."""
    for seed in (1, 2, 3):
        carry_out(planned_toy(f"seed={seed}"))
    rows, index, rng = indexed_runs(), lab / "runs" / "index.sqlite", random.Random(0)
    whole = index.read_bytes()
    used = [at for at, byte in enumerate(whole) if byte]
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.choice(used)] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged)
        assert indexed_runs() == rows
    assert len(executed) == 3


@pytest.mark.parametrize("status", [[], {"state": ["finished"]}, {"state": "finished", "wall_s": "long"},
                                    {"state": "finished", "wall_s": 10**40}, {"state": "finished", "started": {}}])
def test_a_status_of_another_kind_is_unreadable_alone(lab, executed, status):
    one, two = (carry_out(planned_toy(f"seed={seed}"))[0] for seed in (1, 2))
    write_json(one.folder / "status.json", status)
    assert sorted(row["state"] for row in indexed_runs()) == ["finished", "unreadable"]


def test_a_parameter_brings_no_code(lab):
    """What would be code, a cell's end, a magic or a shell command arrives in the kernel as the text that it is."""
    made = lab / "made"
    payloads = [f"'); open({str(made)!r}, 'w'); ('", f'"""\nopen({str(made)!r}, "w")\n"""', f"!touch {made}",
                f"%sx touch {made}", f"$(touch {made})", f"{{open({str(made)!r}, 'w')}}",
                f"\\'; open({str(made)!r}, 'w') #", f"__import__('os').system('touch {made}')", "\x00\u202e\ud7ff",
                f"\nimport os; os.mkdir({str(made)!r})\n", "{{ 7 * 7 }}", "\r\n%%bash\ntouch " + str(made)]
    names = [f"word_{k}" for k in range(len(payloads))]
    write_stage(lab / "stages", "told", "dict(title='Told')", "".join(f"{name}: str = ''\n" for name in names), cells=[
        "from ssl_kit.lab.stages import stage_context\nctx = stage_context('told')\n"
        f"ctx.save_metrics({{'words': [{', '.join(names)}], 'headline': []}})"])
    for name in ("seed", "n_steps", "step_s", "fail"):
        for payload in payloads:
            with pytest.raises(ParameterError):
                planned_toy(f"{name}={payload}")
    pairs = [f"{name}={payload}" for name, payload in zip(names, payloads, strict=True)]
    run, _ = carry_out(plan(list_stages(), "quick", pairs, "told")["told"])
    assert run.metrics["words"] == payloads and not made.exists()


def test_a_running_run_is_seen_as_running(lab):
    from ssl_kit.lab.files import file_lock

    folder = lab / "runs" / "toy" / "abc"
    write_json(folder / "status.json", {"state": "running"})
    with file_lock(folder / ".lock"):
        assert Run(folder).state == "running"
    assert Run(folder).state == "interrupted"


def test_ctrl_c_marks_the_run_and_passes_on(lab, monkeypatch, request):
    # a shell that starts the tests in the background has them ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(runs_module, "execute_notebook", interrupt)
    with pytest.raises(KeyboardInterrupt):
        carry_out(planned_toy())
    assert planned_toy().run.state == "interrupted"


def test_the_bar_goes_by_the_clock_and_shows_the_stages_own_line(lab):
    from io import StringIO

    from tqdm.std import tqdm

    from ssl_kit.lab.progress import PROGRESS_FILE
    from ssl_kit.lab.study import _AtWork, _show

    shown, planned = StringIO(), planned_toy()
    planned.folder.mkdir(parents=True)
    (planned.folder / PROGRESS_FILE).write_text("epoch 3/8")
    with tqdm(total=130, file=shown, ncols=100) as bar:
        _show(bar, [_AtWork(planned, 100, time.monotonic() - 4)], 30, 1, 3)
        assert bar.n == 70
        _show(bar, [_AtWork(planned, 100, time.monotonic() - 60)], 30, 1, 3)
        assert bar.n == 125  # nobody knows that it is done before it is
        _show(bar, [], 130, 3, 3)
        assert bar.n == 130
    assert "epoch 3/8" in shown.getvalue() and "toy (2/3)" in shown.getvalue()


def write_four(lab):
    """Stages short -> after, long -> last, and one that measures time; a plan of them and the toy."""
    for name, stage in (("short", "needs=[]"), ("after", "needs=['short']"), ("long", "needs=[]"),
                        ("last", "needs=['long']"), ("timed", "needs=[], alone=True")):
        write_stage(lab / "stages", name, f"dict(title='{name}', {stage})")
    return plan(list_stages(), "quick", ())


def test_which_stage_is_next(lab):
    from ssl_kit.lab.study import _ways, next_stage

    planned = write_four(lab)
    weights = {"short": 1, "after": 2, "long": 10, "last": 50, "timed": 900, "toy": 5}
    ways = _ways(planned, weights)
    assert ways == {"short": 3, "after": 2, "long": 60, "last": 50, "timed": 900, "toy": 5}
    assert next_stage(planned, [], [], ways) == "long"  # the longest way, but for the one that wants to be alone
    assert next_stage(planned, [], ["long"], ways) == "toy"
    assert next_stage(planned, ["long"], ["toy"], ways) == "last"
    rest = ["long", "last", "toy", "short"]
    assert next_stage(planned, rest, ["after"], ways) is None  # it waits for the machine
    assert next_stage(planned, [*rest, "after"], [], ways) == "timed"
    assert next_stage(planned, rest, ["timed"], ways) is None  # and nothing starts beside it
    assert next_stage(planned, list(planned), [], ways) is None


def test_stages_run_side_by_side_and_in_order(lab, monkeypatch):
    """What is needed comes first, two at a time, and the one that measures time alone."""
    import threading

    from ssl_kit.lab.study import run_planned

    planned, lock, now, seen = write_four(lab), threading.Lock(), [], []

    def execute(notebook, run_dir, values, environment, kill):
        with lock:
            now.append(notebook.stem)
            seen.append((tuple(now), environment.get("OMP_NUM_THREADS"), environment.get("SSL_KIT_CORES")))
        time.sleep(0.2)
        with lock:
            now.remove(notebook.stem)
        return 1

    monkeypatch.setattr(runs_module, "execute_notebook", execute)
    monkeypatch.setenv("SSL_KIT_CORES", "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcomes = run_planned(planned, jobs=2)
    assert list(outcomes) == list(planned) and all(one.run.state == "finished" for one in outcomes.values())
    assert max(len(at_once) for at_once, *_ in seen) == 2 and {(t, c) for _, t, c in seen} == {("2", "2")}
    assert [at_once for at_once, *_ in seen if "timed" in at_once] == [("timed",)]
    order = [at_once[-1] for at_once, *_ in seen]
    assert order.index("short") < order.index("after") and order.index("long") < order.index("last")
    with pytest.raises(ParameterError, match="jobs"):
        run_planned(planned, jobs=0)


def test_a_stage_that_fails_does_not_take_its_neighbour_along(lab, monkeypatch):
    from ssl_kit.lab.study import run_planned

    planned = write_four(lab)

    def execute(notebook, run_dir, values, environment, kill):
        if notebook.stem == "long":
            raise StageFailure("a cell failed")
        time.sleep(0.3)
        return 1

    monkeypatch.setattr(runs_module, "execute_notebook", execute)
    with pytest.raises(StageFailure, match="stage long: a cell failed"):
        run_planned(planned, jobs=2)
    states = {name: one.run.state for name, one in planned.items() if one.folder.exists()}
    assert states.pop("long") == "failed" and list(states.values()) == ["finished"]
    assert "last" not in states


def test_ctrl_c_ends_all_kernels_of_a_study(lab):
    """They are in sessions of their own and don't hear it; what they were at is marked and goes on later."""
    import psutil

    toy = lab / "stages" / "toy.ipynb"
    (lab / "stages" / "one.ipynb").write_text(toy.read_text().replace('stage_context(\\"toy', 'stage_context(\\"one'))
    planned = plan(list_stages(), "quick", ["step_s=0.2", "n_steps=1000"])
    process = start_command("study", "--jobs", "2", "-pstep_s=0.2", "-pn_steps=1000")
    wait_for(lambda: all((one.folder / "artifacts" / "state.json").exists() for one in planned.values()))
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert len(kernels) >= 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(kernels, timeout=60)
    assert not alive and [one.run.status["state"] for one in planned.values()] == ["interrupted"] * 2


def test_a_study_says_what_it_did(lab, executed, capsys):
    from ssl_kit.lab.study import results_table, run_planned

    outcomes = run_planned(plan(list_stages()), bar=True)
    assert not outcomes["toy"].reused and run_planned(plan(list_stages()))["toy"].reused
    said = capsys.readouterr().err
    assert "toy: done in" in said and "toy: reused in" in said and "100%" in said
    assert "toy" in results_table([outcomes["toy"].run]) and len(executed) == 1


def test_ctrl_c_ends_a_study_that_waits_for_another_process(lab):
    """The other one holds the lock for hours; what was asked for here ends at once, and the other goes on."""
    from ssl_kit.lab.files import file_lock

    planned = planned_toy()
    with file_lock(planned.folder / ".lock"):
        process = start_command("study", "--jobs", "2")
        said = process.stderr.readline()
        while "is at it; waiting" not in said:
            assert said, "the study ended"
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=240)
    assert process.returncode == 130 and planned.run.status == {}


def test_the_kernel_finds_folders_that_were_named_relative_to_here(lab, monkeypatch):
    for name in ("SSL_KIT_DATA", "SSL_KIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (lab / "data").mkdir()
    (lab / "work").mkdir()
    monkeypatch.chdir(lab / "work")
    monkeypatch.setenv("SSL_KIT_CACHE", "../cache")
    (lab / "work" / "ssl_kit.toml").write_text('data_root = "../data"')
    inside = runs_module._sub_environment()
    assert inside["SSL_KIT_DATA"] == str(lab / "data") and inside["SSL_KIT_CACHE"] == str(lab / "cache")
    (lab / "other").mkdir()
    monkeypatch.setenv("SSL_KIT_DATA", "../other")  # wins over the file
    assert runs_module._sub_environment()["SSL_KIT_DATA"] == str(lab / "other")


def test_a_kernel_keeps_memory_unless_the_user_says_how(tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    found = kernel_environment(tmp_path)
    assert found["MALLOC_TRIM_THRESHOLD_"] == "1000" and int(found["MALLOC_TOP_PAD_"]) == 2 ** 28
    assert found["SSL_KIT_RUN_DIR"] == str(tmp_path)
