"""Bytes that nobody meant, at every reader of files: only the kit's own errors may come out, and no file may stay.

    python scripts/fuzz_parsers.py                          # all readers, 10 s each, mutations of real files
    python scripts/fuzz_parsers.py --seconds 600 --guided   # guided by coverage (pip install atheris)
    python scripts/fuzz_parsers.py --only manifest --keep crashes

Prints a row for each reader: inputs tried, read, refused, crashes. Ends with 1 when there was a crash; with --keep its
input is left in that folder.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 6 << 30  # a header that promises terabytes must not bring the machine down


@dataclass(frozen=True)
class Target:
    """A reader of files: examples to begin with, and what is called with a changed one."""

    name: str
    file: str                           # what the file is called; readers look at the suffix
    examples: Callable[[], list[bytes]]
    read: Callable[[Path], object]


def _bytes_of(write: Callable[[Path], object], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _manifests() -> list[bytes]:
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data_manifests").glob("*.yaml"))]
    return [re.sub(r"^name: .*$", "name: manifest", text, flags=re.MULTILINE).encode() for text in texts]


def _read_manifest(path: Path):
    from ssl_kit.lab.manifests import read_manifest

    return read_manifest(path)


def _arrays() -> list[bytes]:
    return [b"name,x_m,y_m,z_m\na,0,0,0\nb,0.03,0,0\nc,0,0.03,0\n", b"x_m,y_m\n0.1,0\n-0.1,0\n"]


def _arrays_as_yaml() -> list[bytes]:
    return [b"label: pair\nreference: a\nmicrophones:\n  a: [0.0, 0.0, 0.0]\n  b: [0.1, 0.0, 0.0]\n"]


def _read_array(path: Path):
    from ssl_kit.arrays.geometry import load_geometry

    return load_geometry(path)


def _sounds() -> list[bytes]:
    import numpy as np
    import soundfile

    noise, found = 0.1 * np.random.default_rng(0).standard_normal((800, 2)), []
    kinds = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_24"))
    for kind, subtype in kinds:
        buffer = io.BytesIO()
        soundfile.write(buffer, noise, 16000, format=kind, subtype=subtype)
        found.append(buffer.getvalue())
    return found


def _read_sound(path: Path):
    from ssl_kit.lab.audio import audio_info, read_audio, stream_audio

    info = audio_info(path)
    if info.frames * info.channels < 10_000_000:
        read_audio(path, None)
        for _ in stream_audio(path, 0.01, None):
            pass


def _predictions() -> list[bytes]:
    return [b"global_idx,pred_angle,gt_angle,abs_error,max_prob\n0,10,12,2,0.9\n1,359,1,2,0.5\n2,90,180,90,0.1\n"]


def _read_predictions(path: Path):
    from ssl_kit.routing.route_study import RouteColumns, load_predictions

    return load_predictions(path, RouteColumns())


def _fallbacks() -> list[bytes]:
    import numpy as np

    from ssl_kit.routing.bank import FallbackTable, save_fallback

    n = np.arange(4)
    table = FallbackTable(**{item: (n if item == "global_indices" else n * 10.0)
                             for item in FallbackTable.__dataclass_fields__ if item not in ("columns", "frame_maps")})
    return [_bytes_of(lambda path: save_fallback(table, path), "fallback.csv")]


def _read_fallback(path: Path):
    from ssl_kit.routing.bank import load_fallback

    return load_fallback(path)


def _events() -> list[bytes]:
    return [b"Audiofilename,Starttime,Endtime,DOG,CAT\na.wav,0.5,1.0,POS,NEG\na.wav,2.0,2.5,UNK,POS\n",
            b"Audiofilename,Starttime,Endtime,Q\na.wav,0.5,1.0,POS\n"]


def _read_events(path: Path):
    from ssl_kit.fewshot.annotations import read_events

    return read_events(path, 10.0)


def _detections() -> list[bytes]:
    return [b"Audiofilename,Starttime,Endtime\na.wav,0.5000,1.0000\nb.wav,2.0,2.5\n"]


def _read_detections(path: Path):
    from ssl_kit.fewshot.events import read_predictions

    return read_predictions(path)


def _test_sets() -> list[bytes]:
    return [b"".join(path.read_bytes().splitlines(keepends=True)[:8])
            for path in sorted((ROOT / "data_manifests").glob("enhance_*.csv"))]


def _read_test_set(path: Path):
    from ssl_kit.enhance.test_sets import read_test_set

    return read_test_set(path)


@lru_cache(1)
def _enhancer() -> dict[str, bytes]:
    """The files of a small checkpoint."""
    import torch

    from ssl_kit.enhance.checkpoints import save_checkpoint
    from ssl_kit.enhance.final_net import FinalConfig, FinalNet

    torch.manual_seed(0)
    network = FinalNet(FinalConfig(entry=4, channels=4, time_hidden=4, frequency_hidden=4, blocks=1))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, network, {"steps": 1})
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _read_enhancer(path: Path):
    from ssl_kit.enhance.checkpoints import load_checkpoint

    return _read_checkpoint(path, _enhancer(), load_checkpoint)


def _read_checkpoint(path: Path, files: dict[str, bytes], load: Callable):
    """The other file is whole, and the hash is right, so that the reader goes on to the content."""
    files = files | {path.name: path.read_bytes()}
    if path.suffix == ".safetensors":
        hashed = json.loads(files["config.json"]) | {"sha256": hashlib.sha256(files[path.name]).hexdigest()}
        files["config.json"] = json.dumps(hashed).encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return load(folder)


def _read_localizer(path: Path):
    from ssl_kit.localize.checkpoints import load_checkpoint

    return _read_checkpoint(path, _shipped("crnn_6cm"), load_checkpoint)


@lru_cache(4)
def _shipped(name: str) -> dict[str, bytes]:
    folder = ROOT / "ssl_kit" / "assets" / "checkpoints" / name
    return {file: (folder / file).read_bytes() for file in ("config.json", "model.safetensors")}


def _read_nearfield(path: Path):
    from ssl_kit.nearfield.checkpoints import load_checkpoint

    return _read_checkpoint(path, _shipped("nearfield_refiner"), load_checkpoint)


def _read_encoder(path: Path):
    from ssl_kit.fewshot.training import load_encoder

    return _read_checkpoint(path, _shipped("fewshot_v1"), load_encoder)


def _shards() -> list[bytes]:
    from ssl_kit.nearfield.scenes import SceneConfig, draw_scenes
    from ssl_kit.nearfield.shards import write_earlier_shard, write_shard

    batch = draw_scenes(SceneConfig(), 0, range(1))
    return [_bytes_of(lambda path: write_shard(path, batch), "shard.npz"),
            _bytes_of(lambda path: write_earlier_shard(path, batch), "shard.npz")]


def _read_shard(path: Path):
    from ssl_kit.nearfield.shards import read_shard

    return read_shard(path)


def _banks() -> list[bytes]:
    from ssl_kit.routing.bank import save_bank
    from ssl_kit.routing.synthetic import synthetic_bank

    bank, _ = synthetic_bank(n=20, n_frames=2, n_features=64)
    return [_bytes_of(lambda path: save_bank(bank, path), "bank.npz")]


def _read_bank(path: Path):
    from ssl_kit.routing.bank import load_bank

    load_bank(path, memory_map=True)
    return load_bank(path, memory_map=False)


@lru_cache(maxsize=1)
def _study():
    """A small study, and the test bank that it is of."""
    from ssl_kit.routing.protocols import evaluate_protocols
    from ssl_kit.routing.synthetic import synthetic_study

    calibration, calibration_srp, test, test_srp = synthetic_study(n=40, n_frames=2, n_rooms=8, overlap=0.7)
    return evaluate_protocols({"in_distribution": (calibration, calibration_srp)}, test, test_srp, leaky=False,
                              detectors=["max_prob"], n_draws=4, policies=()), test, test_srp


def _results() -> list[bytes]:
    from ssl_kit.routing.stored_results import save_results

    return [_bytes_of(lambda path: save_results(_study()[0], path), "results.npz")]


def _read_results(path: Path):
    from ssl_kit.routing.stored_results import load_results

    return load_results(path, *_study()[1:])


def _notebooks() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "nbs" / "stages").glob("routing_*.ipynb"))]


def _read_notebook(path: Path):
    from ssl_kit.lab.stages import read_stage

    return read_stage(path)


def _parameter_cells() -> list[bytes]:
    return [b"seed: int = 0  # random seed\nrate: float = 0.5\nnames: list[str] = ['a']\nlimit: int | None = None\n"]


def _read_parameters(path: Path):
    from ssl_kit.lab.errors import ParameterError
    from ssl_kit.lab.parameters import parse_parameters

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError("no text") from error       # a notebook is JSON: its cells are text
    return parse_parameters(text, "cell")


def _features() -> list[bytes]:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.zeros((20, 128), np.float32))
    return [buffer.getvalue()]


def _read_features(path: Path):
    from ssl_kit.fewshot.store import open_frames

    return open_frames(path).sum()


def _rules() -> list[bytes]:
    import numpy as np

    from ssl_kit.routing.route_rules import StoredRules, WeightedSum

    part = WeightedSum(("a", "b"), np.ones(2), np.zeros(2), np.ones(2), 0.5)
    rules = StoredRules({"max": part}, {"max": {"best": 0.5, "never": np.inf}}, ("max", "best"), {"index": None}, {})
    return [_bytes_of(rules.save, "rules.json")]


def _read_rules(path: Path):
    from ssl_kit.routing.route_rules import load_rules

    return load_rules(path)


def _policies() -> list[bytes]:
    found = json.loads((ROOT / "ssl_kit" / "assets" / "page_policy.json").read_text(encoding="utf-8"))
    return [json.dumps(found | {"policies": found["policies"][:1]}).encode()]


def _read_policies(path: Path):
    from ssl_kit.apps.page_policy import load_page_policies

    return load_page_policies(path)


def _locations() -> list[bytes]:
    return [b"filename,angle(\xc2\xb0)\ntest/ma_noisy_speech/OfficeRoom1/static/0010/TEST_S_OFF1_0010_0001.flac,12\n"]


def _read_locations(path: Path):
    from ssl_kit.arrays.realman import location_file, read_locations

    with tempfile.TemporaryDirectory() as folder:
        table = location_file(folder, "test", "static")
        table.parent.mkdir()
        table.write_bytes(path.read_bytes())
        return read_locations(folder, "test")


def _read_reverberation(path: Path):
    from ssl_kit.arrays.realman import read_t60

    return read_t60(path)


def _seals() -> list[bytes]:
    from ssl_kit.lab.seal import SEAL, seal_run

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.json").write_text("{}")
        seal_run(Path(folder))
        return [(Path(folder) / SEAL).read_bytes()]


def _read_seal(path: Path):
    """A number of a sealed run: its own, or an error; never another file than those of the run is read."""
    from ssl_kit.lab.runs import Run, assert_as_written

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.json").write_text("{}")
        (Path(folder) / path.name).write_bytes(path.read_bytes())
        assert_as_written(Path(folder), artifacts=True)
        assert Run(Path(folder)).metrics == {}


def _statuses() -> list[bytes]:
    return [b'{"state": "finished", "profile": "ci", "started": "2026-01-01T00:00:00+00:00", "wall_s": 1.5}']


def _read_status(path: Path):
    """The list of runs: whatever the file holds, there is a row."""
    from ssl_kit.lab.index import indexed_runs

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "toy" / "0123456789ab"
        run.mkdir(parents=True)
        (run / path.name).write_bytes(path.read_bytes())
        assert len(indexed_runs(folder)) == 1


def _indexes() -> list[bytes]:
    from ssl_kit.lab.index import indexed_runs

    with tempfile.TemporaryDirectory() as folder:
        for k, data in enumerate(_statuses() * 3):
            run = Path(folder) / "toy" / f"{k:012x}"
            run.mkdir(parents=True)
            (run / "status.json").write_bytes(data)
        assert len(indexed_runs(folder)) == 3
        return [(Path(folder) / "index.sqlite").read_bytes()]


def _read_index(path: Path):
    from ssl_kit.lab.index import indexed_runs

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "toy" / ("0" * 12)
        run.mkdir(parents=True)
        (run / "status.json").write_bytes(_statuses()[0])
        (Path(folder) / path.name).write_bytes(path.read_bytes())
        assert [row["run_id"] for row in indexed_runs(folder)] == [run.name]


def _states() -> list[bytes]:
    """The state of a training of a layer of one weight."""
    import torch

    layer = torch.nn.Linear(1, 1)
    buffer = io.BytesIO()
    torch.save({"configs": {"training": {}}, "step": 1, "history": [], "model": layer.state_dict()}, buffer)
    return [buffer.getvalue()]


def _read_state(path: Path):
    from ssl_kit.lab.training import _read_state

    return _read_state(path)


TARGETS = (
    Target("manifest", "manifest.yaml", _manifests, _read_manifest),
    Target("array geometry, CSV", "array.csv", _arrays, _read_array),
    Target("array geometry, YAML", "array.yaml", _arrays_as_yaml, _read_array),
    Target("audio header", "sound.wav", _sounds, _read_sound),
    Target("table of predictions", "scores.csv", _predictions, _read_predictions),
    Target("table of fallbacks", "fallback.csv", _fallbacks, _read_fallback),
    Target("table of events", "events.csv", _events, _read_events),
    Target("table of detections", "found.csv", _detections, _read_detections),
    Target("test set", "set.csv", _test_sets, _read_test_set),
    Target("checkpoint, configuration", "config.json", lambda: [_enhancer()["config.json"]], _read_enhancer),
    Target("checkpoint, weights", "model.safetensors", lambda: [_enhancer()["model.safetensors"]], _read_enhancer),
    Target("localizer, configuration", "config.json", lambda: [_shipped("crnn_6cm")["config.json"]], _read_localizer),
    Target("near-field network, configuration", "config.json",
           lambda: [_shipped("nearfield_refiner")["config.json"]], _read_nearfield),
    Target("few-shot encoder, configuration", "config.json",
           lambda: [_shipped("fewshot_v1")["config.json"]], _read_encoder),
    Target("state of a training", "last.ckpt", _states, _read_state),
    Target("stored rules", "rules.json", _rules, _read_rules),
    Target("policies of the page", "policy.json", _policies, _read_policies),
    Target("RealMAN, locations", "table.csv", _locations, _read_locations),
    Target("RealMAN, reverberation as JSON", "t60.json", lambda: [b'{"a": 0.5, "b": {"T60": 0.3}}',
           b'[{"scene": "a", "T60": 0.5}]'], _read_reverberation),
    Target("RealMAN, reverberation as CSV", "t60.csv", lambda: [b"scene,T60\na,0.5\nb,0.3\n"], _read_reverberation),
    Target("run status", "status.json", _statuses, _read_status),
    Target("run seal", "files.json", _seals, _read_seal),
    Target("run index", "index.sqlite", _indexes, _read_index),
    Target("shard", "shard.npz", _shards, _read_shard),
    Target("bank", "bank.npz", _banks, _read_bank),
    Target("stored results", "results.npz", _results, _read_results),
    Target("stage notebook", "stage.ipynb", _notebooks, _read_notebook),
    Target("parameters cell", "cell.txt", _parameter_cells, _read_parameters),
    Target("features", "x_logmel.npy", _features, _read_features),
)


def _allowed() -> tuple[type[BaseException], ...]:
    from ssl_kit.lab.errors import SslKitError

    return (SslKitError,)


_PIECES = (b"", b"0", b"-1", b"1e309", b"NaN", b"inf", b"null", b"[]", b"{}", b"\"\"", b"\xff", b"\x00", b"\n", b",",
           b"../../x", b"9" * 40, b"true", b"\xe2\x80\xae", b"- ", b": ", b"&a [*a]", b"!!python/object:os.system x")


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: a byte, a stretch doubled or gone, a piece that parsers dislike, an end too early."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at:at + rng.choice((1, 2, 8, 64))]
        elif kind == 2:
            changed[at:at] = changed[at:at + rng.choice((1, 4, 16, 64))]
        elif kind == 3:
            changed[at:at + rng.randint(0, 6)] = rng.choice(_PIECES)
        elif kind == 4:
            del changed[at:]
        elif at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


class Tried:
    """Counts of one reader, and inputs that made it crash; in a `with`, for its folder is gone at the end."""

    def __init__(self, target: Target, keep: Path | None = None):
        self.target, self.keep = target, keep
        self.n, self.n_read, self.crashes = 0, 0, []
        self.folder = Path(tempfile.mkdtemp())
        self._before, tempfile.tempdir = tempfile.tempdir, str(self.folder)  # what a reader leaves there is seen too

    def __enter__(self) -> "Tried":
        return self

    def __exit__(self, *_: object) -> None:
        tempfile.tempdir = self._before
        shutil.rmtree(self.folder)

    def once(self, data: bytes) -> None:
        """Read `data` as a file; what is neither read nor refused by one of the kit's errors is noted."""
        path = self.folder / self.target.file
        path.write_bytes(data)
        self.n += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.read(path)
            self.n_read += 1
        except _allowed() as error:
            if not str(error):
                self._note(data, "an error without words")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._note(data, f"{type(error).__name__}: {str(error)[:100]} ({Path(place.filename).name}:{place.lineno})")
        path.unlink(missing_ok=True)
        left = [other for other in self.folder.iterdir() if not other.name.startswith("torchinductor")]  # its cache
        if left:
            self._note(data, f"files left: {[other.name for other in left]}")
            for other in left:
                shutil.rmtree(other) if other.is_dir() else other.unlink()

    def _note(self, data: bytes, what: str) -> None:
        kind = what.split(":")[0] + what[what.rfind("("):]
        if all(kind != known for known, _ in self.crashes):
            self.crashes.append((kind, what))
            if self.keep is not None:
                self.keep.mkdir(parents=True, exist_ok=True)
                (self.keep / f"{self.target.name.replace(' ', '_')}_{len(self.crashes)}").write_bytes(data)

    def row(self) -> dict:
        """What the table shows."""
        return {"reader": self.target.name, "tried": self.n, "read": self.n_read, "refused": self.n - self.n_read -
                len(self.crashes), "crashes": [what for _, what in self.crashes]}


def try_target(target: Target, seconds: float = 10.0, n_max: int | None = None, seed: int = 0,
               keep: Path | None = None) -> dict:
    """Mutations of the examples, until the time or the number is up."""
    examples, rng = target.examples(), random.Random(seed)
    deadline = time.monotonic() + seconds
    with Tried(target, keep) as tried:
        for data in examples:
            tried.once(data)
        if tried.n_read != len(examples) or tried.crashes:
            raise SystemExit(f"{target.name}: the examples themselves must be readable; {tried.row()}")
        while time.monotonic() < deadline and (n_max is None or tried.n < n_max):
            tried.once(mutated(rng, rng.choice(examples)))
        return tried.row()


def guided(target: Target, seconds: float, keep: Path | None) -> None:
    """The same guided by coverage of the package; prints a line of JSON at the end. Runs in a process of its own."""
    import atheris

    corpus = Path(tempfile.mkdtemp())                                # in the folder that the caller removes
    with atheris.instrument_imports(include=["ssl_kit", "yaml", "csv"], enable_loader_override=False):
        examples, tried = target.examples(), Tried(target, keep)
        for data in examples:
            tried.once(data)
    for k, data in enumerate(examples):
        (corpus / str(k)).write_bytes(data)
    end = time.monotonic() + seconds

    def one(data: bytes) -> None:
        tried.once(data)
        if time.monotonic() > end:
            print(json.dumps(tried.row()), flush=True)
            os._exit(0)                                              # libFuzzer itself knows no end

    with contextlib.redirect_stdout(sys.stderr):
        atheris.Setup([sys.argv[0], str(corpus), "-rss_limit_mb=0", "-verbosity=0", "-len_control=0",
                       f"-artifact_prefix={keep or corpus}/", f"-max_len={2 * max(map(len, examples))}",
                       "-timeout=60"], one)
    atheris.Fuzz()


def guided_elsewhere(target: Target, seconds: float, keep: Path | None) -> dict:
    """guided() in a process and a folder of its own; a process that ends without its line is a crash."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--this-process", "--only", target.name, "--seconds", str(seconds)]
        done = subprocess.run(command + (["--keep", str(keep)] if keep else []), capture_output=True, text=True,
                              env=os.environ | {"TMPDIR": folder})
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else {"reader": target.name, "tried": 0, "read": 0, "refused": 0,
                                                "crashes": [f"the process ended: {done.stderr[-300:]}"]}


def main(arguments: list[str] | None = None) -> int:
    """Try the readers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each reader (10)")
    parser.add_argument("--only", action="append", choices=[target.name for target in TARGETS], help="these alone")
    parser.add_argument("--guided", action="store_true", help="guided by coverage; needs atheris")
    parser.add_argument("--this-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that crash a reader")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    chosen = [target for target in TARGETS if not args.only or target.name in args.only]
    if args.this_process:
        guided(chosen[0], args.seconds, args.keep)
    rows = []
    for target in chosen:
        if args.guided:
            rows.append(guided_elsewhere(target, args.seconds, args.keep))
        else:
            rows.append(try_target(target, args.seconds, seed=args.seed, keep=args.keep))
        if not args.json:
            row = rows[-1]
            print(f"{row['reader']:28} tried {row['tried']:7}  read {row['read']:7}  refused {row['refused']:7}  "
                  f"crashes {len(row['crashes'])}", *(f"\n    {what}" for what in row["crashes"]), sep="", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["crashes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
