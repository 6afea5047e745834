"""Readers of files against bytes that nobody meant; scripts/fuzz_parsers.py does the same for as long as one likes."""

import importlib.util
import sys
from pathlib import Path

import pytest

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
