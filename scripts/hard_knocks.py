"""Faults at random moments of real runs: what was tried, what survived, what was lost, what was left behind.

    python scripts/hard_knocks.py                                     # 20 kills, and the rest, on a small stage
    python scripts/hard_knocks.py --stage routing_study --kills 20    # of a real chain of stages, at profile ci

Faults of a machine are done to `ssl-kit run STAGE` in a folder of its own, and the numbers that come out at the end
are compared with those of a run that nobody disturbed. Files that the kit reads are damaged at a random place and read:
the file must be named, or what is read must be the same. What comes from strangers is tried by the tests of the
package, of which each counts. "lost" counts runs that ended with other numbers, or never, and files that were read as
something else; "left" counts temporary files after the end. Prints a table; ends with 1 when anything was lost or left.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = "skipped"
STARTED: list[subprocess.Popen] = []  # to be ended with this script, however it ends


class Ground:
    """A folder for runs, and the command in it."""

    def __init__(self, stage: str, values: list[str], stages: Path, folder: Path):
        self.stage, self.values, self.stages, self.runs = stage, values, stages, folder
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self, **more) -> dict:
        """Runs and figures here, the stages of the test, one thread."""
        return os.environ | {"SSL_KIT_RUNS": str(self.runs), "SSL_KIT_FIGURES": str(self.runs / "figures"),
                             "SSL_KIT_STAGES": str(self.stages), "OMP_NUM_THREADS": "1",
                             "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | more

    def command(self, *more: str) -> list[str]:
        """The command that runs the stage at profile ci."""
        given = [word for value in self.values for word in ("-p", value)]
        return [sys.executable, "-m", "ssl_kit.lab.cli", "run", self.stage, "--profile", "ci", *given, *more]

    def start(self, **environment) -> subprocess.Popen:
        """The command in a session of its own, so that all of it can be killed."""
        process = subprocess.Popen(self.command("--json"), env=self.environment(**environment), cwd=self.runs.parent,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        STARTED.append(process)
        return process

    def finish(self, **environment) -> tuple[int, list | None, str]:
        """Exit code, the runs with their metrics, and what was said."""
        process = self.start(**environment)
        out, said = process.communicate(timeout=1800)
        with contextlib.suppress(ValueError):
            return process.returncode, [(row["stage"], row["metrics"].get("headline")) for row in json.loads(out)], said
        return process.returncode, None, said

    def left(self) -> int:
        """Temporary files that lie about."""
        return len([path for path in self.runs.rglob(".*.tmp") if path.is_file()])


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the command and, where it lives in a session of its own, to its kernel."""
    children = []
    with contextlib.suppress(Exception):
        import psutil

        children = psutil.Process(process.pid).children(recursive=True)
    for pid in [process.pid, *(child.pid for child in children)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def kills(ground, wanted, seconds, rng, times):
    """kill -9 at random moments, again and again until it was done so often; then to the end."""
    done = lost = 0
    while done < times:
        process = ground.start()
        try:
            process.communicate(timeout=rng.uniform(0.3, 0.9 * seconds))
        except subprocess.TimeoutExpired:
            kill_all(process)
            done += 1
            listed = subprocess.run([sys.executable, "-m", "ssl_kit.lab.cli", "list"], env=ground.environment(),
                                    capture_output=True, cwd=ground.runs.parent)
            lost += listed.returncode != 0
            continue
        if done < times:                                             # it came to its end before the kill: once more
            lost += ground.finish()[1] != wanted
            shutil.rmtree(ground.runs)
            ground.runs.mkdir()
    code, found, said = ground.finish()
    if code or found != wanted:
        print(said[-500:], file=sys.stderr)
        lost += 1
    return done, max(0, done - lost), lost


def two_at_once(ground, wanted, seconds, rng, times):
    """Two of the same command at once: both have the same numbers, and there is one run of each stage."""
    survived = 0
    for _ in range(times):
        shutil.rmtree(ground.runs, ignore_errors=True)
        ground.runs.mkdir()
        processes = [ground.start() for _ in range(2)]
        found = [process.communicate(timeout=1800)[0] for process in processes]
        with contextlib.suppress(ValueError):
            heads = [[(row["stage"], row["metrics"].get("headline")) for row in json.loads(out)] for out in found]
            n_runs = len(list(ground.runs.glob("*/*/status.json")))
            survived += heads == [wanted, wanted] and n_runs == len(wanted)
    return times, survived, times - survived


def _mounted(folder: Path, size: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
                          capture_output=True).returncode == 0


def full_disk(ground, wanted, seconds, rng, times):
    """A disk with less room than the runs take: said in a sentence; with more room the same command ends well."""
    undisturbed = ground.runs.parent.with_name("undisturbed")
    needed = sum(-(-path.stat().st_size // 4096) for path in undisturbed.rglob("*") if path.is_file())
    survived = 0
    for _ in range(times):
        if not _mounted(ground.runs, f"{4 * max(3, round(rng.uniform(0.1, 0.8) * needed))}k"):
            return SKIPPED, "needs the right to mount a small disk", 0
        try:
            code, _, said = ground.finish()
            clear = code != 0 and "Traceback" not in said and ("free some" in said or "No space" in said)
            subprocess.run(["mount", "-o", "remount,size=1g", str(ground.runs)], check=True)
            code, found, _ = ground.finish()
            good = clear and code == 0 and found == wanted and not ground.left()
            if not good:
                print(f"full disk: {said[-300:]}", file=sys.stderr)
            survived += good
        finally:
            subprocess.run(["umount", str(ground.runs)], check=True)
    return times, survived, times - survived


def read_only(ground, wanted, seconds, rng, times):
    """A folder that one may not write to: said in a sentence, with the folder's name."""
    if not _mounted(ground.runs, "1g"):
        return SKIPPED, "needs the right to mount a small disk", 0
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(ground.runs)], check=True)
        code, _, said = ground.finish()
        clear = code == 2 and "Traceback" not in said and str(ground.runs) in said
        subprocess.run(["mount", "-o", "remount,rw", str(ground.runs)], check=True)
        code, found, _ = ground.finish()
        good = clear and code == 0 and found == wanted
    finally:
        subprocess.run(["umount", str(ground.runs)], check=True)
    return 1, int(good), int(not good)


# Python's own clocks, moved: libfaketime also intercepts epoll, and the conversation with a kernel stands still.
MOVED_CLOCK = """import datetime, os, time
real, moved_s = time.time, float(os.environ["MOVED_CLOCK_S"])
time.time = lambda: real() + moved_s
time.time_ns = lambda: int(time.time() * 1e9)

class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)

datetime.datetime = Moved
"""


def clock_jumps(ground, wanted, seconds, rng, times):
    """A kill, and a clock that has jumped by days when the command goes on; a finished run stays finished."""
    folder = ground.runs.parent / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(MOVED_CLOCK, encoding="utf-8")
    survived = 0
    for days in (-400, 400, -1 / 24)[:times]:
        shutil.rmtree(ground.runs, ignore_errors=True)
        ground.runs.mkdir()
        process = ground.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5 * seconds)
        kill_all(process)
        moved = {"MOVED_CLOCK_S": str(86400 * days), "PYTHONPATH": os.pathsep.join(
            [str(folder), ground.environment()["PYTHONPATH"]])}
        first, second = ground.finish(**moved), ground.finish()
        good = first[:2] == (0, wanted) and second[:2] == (0, wanted)
        if not good:
            print(f"clock {days} d: {first} {second}"[-900:], file=sys.stderr)
        survived += good
    return min(times, 3), survived, min(times, 3) - survived


def damage(path: Path, rng: random.Random) -> None:
    """Turn a bit somewhere, or cut off the end."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)):]
    path.write_bytes(data)


def damaged_files(ground, wanted, seconds, rng, times):
    """A bit of a file of a finished run turned, or its end gone: made anew or named, and never other numbers."""
    assert ground.finish()[1] == wanted
    whole = ground.runs.with_name("whole")
    shutil.copytree(ground.runs, whole)
    survived = 0
    for _ in range(times):
        shutil.rmtree(ground.runs)
        shutil.copytree(whole, ground.runs)
        path = rng.choice(sorted(path for path in ground.runs.rglob("*") if path.is_file() and path.stat().st_size))
        damage(path, rng)
        code, found, said = ground.finish()
        named = code == 2 and "Traceback" not in said and path.name in said
        good = named or (code == 0 and found == wanted)
        if not good:
            print(f"{path.relative_to(ground.runs)}: code {code}, numbers {'same' if found == wanted else found}, "
                  f"{said[-300:]}", file=sys.stderr)
        survived += good
    shutil.rmtree(whole)
    return times, survived, times - survived


def _checkpoint(folder: Path) -> tuple[Path, Callable]:
    """A shipped network: its weights are damaged."""
    from ssl_kit.localize.checkpoints import load_checkpoint, shipped_checkpoint

    shutil.copytree(shipped_checkpoint("geonet"), folder / "net")
    return folder / "net" / "model.safetensors", lambda: {
        name: value.numpy().tobytes() for name, value in load_checkpoint(folder / "net")[0].state_dict().items()}


def _bank(folder: Path) -> tuple[Path, Callable]:
    from ssl_kit.routing.bank import load_bank, save_bank
    from ssl_kit.routing.synthetic import synthetic_bank

    bank, _ = synthetic_bank(n=20, n_frames=2, n_features=64)
    save_bank(bank, folder / "bank.npz")
    return folder / "bank.npz", lambda: {name: str(value) if not hasattr(value, "tobytes") else value.tobytes()
                                         for name, value in vars(load_bank(folder / "bank.npz")).items()}


def _shard(folder: Path) -> tuple[Path, Callable]:
    from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes
    from ssl_kit.nearfield.shards import read_shard, write_shard

    write_shard(folder / "shard.npz", draw_scenes(SceneConfig(), 0, range(2)))
    return folder / "shard.npz", lambda: [value.tobytes() if hasattr(value, "tobytes") else str(value)
                                          for value in vars(read_shard(folder / "shard.npz")).values()]


def _index(folder: Path) -> tuple[Path, Callable]:
    """The index of a folder of runs, of which one was made by hand."""
    from ssl_kit.lab.files import write_json
    from ssl_kit.lab.index import indexed_runs

    for k in range(3):
        run = folder / "runs" / "toy" / f"{k:012x}"
        run.mkdir(parents=True)
        write_json(run / "status.json", {"state": "finished"})
        write_json(run / "params.json", {"seed": k})
        write_json(run / "metrics.json", {"headline": [{"label": "n", "value": k}]})

    def read():
        os.environ["SSL_KIT_RUNS"] = str(folder / "runs")
        return indexed_runs()

    read()
    return folder / "runs" / "index.sqlite", read


def damaged(make: Callable) -> Callable:
    """A fault that damages what `make` makes: the error names the file, or what is read is what was written."""

    def fault(ground, wanted, seconds, rng, times):
        from ssl_kit.lab.errors import SslKitError

        folder = ground.runs
        path, read = make(folder)
        whole, expected, survived = path.read_bytes(), read(), 0
        for _ in range(times):
            path.write_bytes(whole)
            damage(path, rng)
            try:
                good = read() == expected
                said = "read as something else"
            except SslKitError as error:
                said = str(error)
                good = path.name in said
            except Exception as error:
                said, good = repr(error), False
            if not good:
                print(f"{path.name}: {said[:300]}", file=sys.stderr)
            survived += good
        return times, survived, times - survived

    return fault


def tested(*arguments: str, tries: int | None = None) -> Callable:
    """A fault that tests of the package try; each counts, or as many as one test tries."""

    def fault(ground, wanted, seconds, rng, times):
        report = ground.runs / "report.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}",
                               f"--basetemp={ground.runs / 'tests'}", *arguments], cwd=ROOT, text=True,
                              env=ground.environment(), capture_output=True)
        suite = ElementTree.parse(report).getroot().find("testsuite")
        n, skipped = int(suite.get("tests")), int(suite.get("skipped"))
        bad = int(suite.get("failures")) + int(suite.get("errors"))
        if bad or n == skipped:
            print(done.stdout[-1500:], file=sys.stderr)
        if n == skipped:
            return SKIPPED, "needs packages that are not here", 0
        n_tries = tries or n - skipped
        return n_tries, n_tries - bad, bad

    return fault


MACHINE = (("kill -9", kills, 20), ("two at once", two_at_once, 3), ("full disk", full_disk, 5),
           ("read-only folder", read_only, 1), ("clock jump", clock_jumps, 3),
           ("damaged files of runs", damaged_files, 20))
FILES = (("damaged checkpoint", damaged(_checkpoint), 100), ("damaged bank", damaged(_bank), 100),
         ("damaged shard", damaged(_shard), 100), ("damaged run index", damaged(_index), 100),
         ("damaged manifest", tested("tests/test_data_manifests.py", "-k", "fit_is_named or broken"), 1))
STRANGERS = (("archives that try to escape",
              tested("tests/test_data_extract.py", "-k", "leave_the_folder or links or bombs or forged or doubled"), 1),
             ("code in a parameter", tested("tests/test_lab_runs.py", "-k", "brings_no_code", tries=60), 1),
             ("pickles with code", tested("tests/test_faults.py", "tests/test_routing_bank.py", "-k", "pickle"), 1),
             ("fifty uploads at once, hostile names",
              tested("--slow", "tests/test_demo.py", "-k", "fifty", tries=50), 1))
FAULTS = (*MACHINE, *FILES, *STRANGERS)


def campaign(stage: str | None, n_kills: int, seed: int, only: list[str] | None, share: float = 1.0) -> Iterator[dict]:
    """All faults in turn; a row for each."""
    with tempfile.TemporaryDirectory() as top:
        stages, values = ROOT / "nbs" / "stages", []
        if stage is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from stage_notebooks import write_stage, write_toy

            stages, stage, values = Path(top) / "stages", "above", ["toy.n_steps=12", "toy.step_s=0.1"]
            write_toy(stages)
            write_stage(stages, "above", "dict(title='Above', needs=['toy'])", cells=[
                "from ssl_kit.lab.files import read_json\nfrom ssl_kit.lab.stages import stage_context\n"
                "ctx = stage_context('above')\n"
                "total = read_json(ctx.upstream('toy') / 'artifacts' / 'state.json')['total']\n"
                "ctx.save_metrics({'headline': [{'label': 'twice', 'value': 2 * total, 'unit': 'm'}]})"])
        chosen = [row for row in FAULTS if not only or row[0] in only]
        wanted, seconds = None, 0.0
        if set(chosen) & set(MACHINE):
            begun = time.monotonic()
            code, wanted, said = Ground(stage, values, stages, Path(top) / "undisturbed" / "runs").finish()
            seconds = time.monotonic() - begun
            if code:
                sys.exit(f"{stage}: does not even run undisturbed: {said[-500:]}")
        for name, fault, times in chosen:
            times = n_kills if fault is kills else max(1, round(times * share))
            ground = Ground(stage, values, stages, Path(top) / name.replace(" ", "_") / "runs")
            tried, survived, lost = fault(ground, wanted, seconds, random.Random(seed), times)
            yield {"fault": name, "tried": tried, "survived": survived, "lost": lost, "left": ground.left()}


def main(arguments: list[str] | None = None) -> int:
    """Carry out the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", help="a stage of the kit instead of a small one")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of the other faults")
    parser.add_argument("--only", action="append", choices=[name for name, _, _ in FAULTS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = []
    if not args.json:
        print("| fault | tried | survived | lost | left |\n| --- | --- | --- | --- | --- |", flush=True)
    try:
        for row in campaign(args.stage, args.kills, args.seed, args.only, args.share):
            rows.append(row)
            if not args.json:
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    finally:
        for process in STARTED:
            if process.poll() is None:
                kill_all(process)
    if args.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["lost"] or row["left"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
