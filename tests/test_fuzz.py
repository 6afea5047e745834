"""Readers of files against bytes that nobody meant; scripts/fuzz_parsers.py does the same for as long as one likes."""

import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from ssl_kit.lab.errors import DataError, SslKitError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz_parsers.py"
spec = importlib.util.spec_from_file_location("fuzz_parsers", SCRIPT)
fuzz = sys.modules["fuzz_parsers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.name)
def test_only_errors_of_the_kit_come_out_and_no_file_stays(target):
    row = fuzz.try_target(target, seconds=20.0, n_max=120)
    assert row["crashes"] == [] and row["tried"] > 5


def test_a_reader_that_crashes_is_caught(tmp_path):
    """The fuzzer itself: an error of Python's own and a file left behind are both noted, once each."""

    def read(path):
        if path.read_bytes() != b"good":
            path.with_suffix(".left").write_bytes(b"")
            raise KeyError("x")

    target = fuzz.Target("bad", "bad.txt", lambda: [b"good"], read)
    row = fuzz.try_target(target, seconds=5.0, n_max=50, keep=tmp_path / "kept")
    assert [what.split(":")[0] for what in row["crashes"]] == ["KeyError", "files left"]
    assert len(list((tmp_path / "kept").iterdir())) == 2


# Inputs that once brought out an error of Python's own.
FOUND = {
    "array geometry, YAML": (b"label: pair\nreference: a\n? \nmicrophones:\n  a: [0.0, 0.0, 0.0]\nx: 1\n",
                             b"microphones:\n  ? [a]\n  : [0, 0, 0]\n",
                             b"? [label]\n: x\nmicrophones: {a: [0, 0, 0]}\n"),
    "RealMAN, locations": (b"", b"\xff\xfe\x00", b"filename,angle\n" + b"x" * 200_000),
    "RealMAN, reverberation as CSV": (b"scene,seconds\na,0.5,0.6\n",),
    "run status": (b"[]", b'{"state": ["finished"]}', b'{"wall_s": 1e400}'),
    "checkpoint, configuration": (b'{"kind": "final", "model": {"groups": 0}, "sha256": "x"}',
                                  b'{"kind": "final", "model": {"n_low": 1.5}, "sha256": "x"}'),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_is_refused_now(name):
    target = next(target for target in fuzz.TARGETS if target.name == name)
    with fuzz.Tried(target) as tried:
        for data in FOUND[name]:
            tried.once(data)
        assert not tried.crashes and tried.n == len(FOUND[name])


def encrypted(data):
    """The first member says that it is encrypted: in the directory, and itself."""
    data = bytearray(data)
    data[data.index(b"PK\x01\x02") + 8] |= 1
    data[data.index(b"PK\x03\x04") + 6] |= 1
    return bytes(data)


def no_array(data):
    """A member holds words."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(out, "w") as changed:
        for k, name in enumerate(whole.namelist()):
            changed.writestr(name, b"words" if k == 1 else whole.read(name))
    return out.getvalue()


def renamed(data, k=1):
    """A member has another name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(out, "w") as changed:
        for number, name in enumerate(whole.namelist()):
            changed.writestr(("x" if number == k else "") + name, whole.read(name))
    return out.getvalue()


@pytest.mark.parametrize("name", ["bank", "shard", "stored results"])
def test_an_archive_without_one_of_its_members_is_named_or_does_without(tmp_path, name):
    target = next(target for target in fuzz.TARGETS if target.name == name)
    data, path, refused = target.examples()[0], tmp_path / target.file, 0
    for k in range(len(zipfile.ZipFile(io.BytesIO(data)).namelist())):
        path.write_bytes(renamed(data, k))
        try:
            target.read(path)
        except DataError as error:
            assert target.file in str(error)
            refused += 1
    assert refused > 4


@pytest.mark.parametrize("change", [encrypted, no_array])
@pytest.mark.parametrize("name", ["bank", "shard", "stored results"])
def test_members_that_are_encrypted_or_no_arrays_are_named(tmp_path, name, change):
    """zipfile's RuntimeError and NumPy's bytes came out of readers of archives."""
    target = next(target for target in fuzz.TARGETS if target.name == name)
    path = tmp_path / target.file
    path.write_bytes(change(target.examples()[0]))
    with pytest.raises(DataError, match=target.file):
        target.read(path)


CHECKPOINTS = SCRIPT.parent.parent / "ssl_kit" / "assets" / "checkpoints"
LOADERS = {"enhance": ("enhance", "checkpoints", "load_checkpoint"), "nearfield": ("nearfield", "checkpoints",
           "load_checkpoint"), "fewshot": ("fewshot", "training", "load_encoder")}
STRANGE = (0, -1, 1.5, "x", None, [])


def numbers(tree, path=()):
    """Paths to all numbers, flags and words of the description of a network."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, (*path, key))
    elif isinstance(tree, int | float | str | None):
        yield path


@pytest.mark.parametrize("name", sorted(
    path.name for path in CHECKPOINTS.iterdir() if path.name not in ("enhance_final_causal", "ipdnet_6cm-5")))
def test_no_value_in_a_configuration_brings_out_another_error(tmp_path, name):
    """Each value of a network's shape in turn replaced by what it can't be: `groups: 0` was a division by zero."""
    import importlib

    track, module, function = LOADERS.get(name.split("_")[0], ("localize", "checkpoints", "load_checkpoint"))
    load = getattr(importlib.import_module(f"ssl_kit.{track}.{module}"), function)
    source, folder = CHECKPOINTS / name, tmp_path / name
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
    shape = {key: whole[key] for key in ("kind", "model", "config", "network", "sha256") if key in whole}
    n_refused = 0
    for path in numbers(shape):
        for value in STRANGE:
            changed = json.loads(json.dumps(whole))
            at = changed
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
            try:
                load(folder)
            except SslKitError as error:
                assert name in str(error)
                n_refused += 1
    assert n_refused > 5
