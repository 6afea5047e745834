"""Benchmarks: what a row says, fair turns, and clean JSON on standard output."""

import argparse
import importlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kit.lab import bench
from ssl_kit.lab.errors import ParameterError

KEYS = ["name", "value", "unit", "peer", "peer_value", "ratio", "target", "met"]


def arguments(*words):
    parser = argparse.ArgumentParser()
    bench.add_bench_arguments(parser)
    return parser.parse_args(words)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(0.1, 100))
def test_ratio_says_how_many_times_better(value, peer_value, target):
    time_row = bench.compare("x", value, "s", "peer", peer_value, target)
    rate_row = bench.compare("x", 1 / value, "1/s", "peer", 1 / peer_value, target, smaller_is_better=False)
    assert time_row.ratio == pytest.approx(peer_value / value) == pytest.approx(rate_row.ratio)
    assert time_row.met == (time_row.ratio >= target)


def test_target_of_a_value():
    assert bench.compare("x", 28.0, "s", None, None, 30, target_of="value").met is True
    assert bench.compare("x", 8.0, "1/s", None, None, 10, target_of="value", smaller_is_better=False).met is False
    assert bench.compare("x", 8.0, "s", None, None).met is None
    with pytest.raises(ParameterError, match="target_of='median'"):
        bench.compare("x", 1.0, "s", None, None, 1, target_of="median")


def test_turns_alternate_and_warmup_is_not_counted():
    calls = []

    def kit():
        calls.append("kit")
        time.sleep(0.05 if len(calls) < 3 else 0.0)

    medians = bench.measure_in_turn(kit, lambda: calls.append("peer"), repeats=4, warmup=1)
    assert calls == ["kit", "peer", "peer", "kit", "kit", "peer", "peer", "kit", "kit", "peer"]
    assert medians.value_s < 0.05
    assert bench.measure_in_turn(lambda: None, repeats=1, warmup=0).peer_value_s is None
    with pytest.raises(ParameterError, match="repeats=0"):
        bench.measure_in_turn(lambda: None, repeats=0)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    (tmp_path / "toy_bench.py").write_text(
        "from ssl_kit.lab.bench import compare\n"
        "def one(quick=False):\n"
        "    print('a library talks')\n"
        "    return compare('one', 1.0 if quick else 2.0, 's', 'peer', 4.0, 3)\n"
        "def two(quick=False):\n"
        "    return [compare('two', 1.0, 's', None, None, detail={'n': 7}),\n"
        "            compare('zwei', 2.0, 's', 'peer', 1.0, 1)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "BENCHES", {"one": "toy_bench:one", "two": "toy_bench:two"})


def test_json_of_one_row_is_exactly_the_row(toy, capsys):
    assert bench.run_bench(arguments("one", "--json")) == 0
    out = capsys.readouterr()
    row = json.loads(out.out)
    assert list(row) == KEYS and row["ratio"] == 2.0 and row["met"] is False
    assert "a library talks" in out.err


def test_json_of_all_is_a_list_and_quick_is_passed_on(toy, capsys):
    bench.run_bench(arguments("--json", "--quick"))
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["one", "two", "zwei"]
    assert rows[0]["value"] == 1.0 and rows[1]["detail"] == {"n": 7} and rows[1]["met"] is None
    assert all(set(row) - {"detail"} == set(KEYS) for row in rows)


def test_table_for_a_person(toy, capsys):
    bench.run_bench(arguments("one", "two"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "2×" in lines[2] and lines[2].endswith("no")


def test_unknown_name_names_the_nearest_before_anything_runs(capsys):
    with pytest.raises(ParameterError, match="'rom'.*did you mean 'rooms'"):
        bench.run_bench(arguments("srp", "rom"))


@pytest.mark.parametrize("name", sorted(bench.BENCHES))
def test_registered_benchmarks_exist(name):
    module, function = bench.BENCHES[name].split(":")
    assert callable(getattr(importlib.import_module(module), function))
