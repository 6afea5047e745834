"""The training loop: plateau and stopping survive a kill, and what an older training lacked has its default."""

import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_kit.lab import training as training_loop
from ssl_kit.lab.errors import CheckpointError, ParameterError
from ssl_kit.lab.training import TrainingConfig, epochs_without_best, plateau_factor, train_network


@dataclass(frozen=True)
class LineConfig:
    slope: float = 3.0


class Line(torch.nn.Linear):
    kind = "line"

    def __init__(self, config):
        super().__init__(1, 1)
        self.config = config


class LineTask:
    config = LineConfig()

    def network(self):
        return Line(self.config)

    def prepare(self, batch):
        return batch, self.config.slope * batch

    def loss(self, network, prepared, training):
        x, y = prepared
        return (torch.nn.functional.dropout(network(x), 0.1) - y).square().mean()


class PlainLineTask(LineTask):
    def loss(self, network, prepared, training):
        x, y = prepared
        return (network(x) - y).square().mean()


class Points:
    def draw(self, step):
        return torch.from_numpy(np.random.default_rng([7, step]).standard_normal((16, 1), np.float32))

    def identity(self):
        return {"points": "normal"}


def plan(**changes):
    usual = dict(steps=40, epoch_steps=5, warmup_steps=5, learning_rate=0.3, precision="32-true", average_decay=0.5,
                 schedule="plateau", watch="valid", plateau_epochs=1)
    return TrainingConfig(**usual | changes)


def zigzag(network):
    """A figure of the weights, so that it is the same however the training was cut."""
    return {"valid": float(torch.round(network.weight * 7).abs() % 3)}


def train(folder, config=None, **options):
    return train_network(folder, LineTask(), config or plan(), Points(), zigzag, device="cpu",
                         report=lambda line: None, **options)


@pytest.mark.parametrize("changes", [{}, {"stop_epochs": 3}])
def test_a_cut_training_ends_as_a_whole_one(tmp_path, changes):
    whole, history = train(tmp_path / "whole", plan(**changes))
    for _ in range(len(history) + 1):  # an epoch at a time
        cut, pieces = train(tmp_path / "cut", plan(**changes), time_limit_s=0)
    assert [row["step"] for row in pieces] == [row["step"] for row in history]
    np.testing.assert_allclose([row["loss"] for row in pieces], [row["loss"] for row in history], rtol=1e-6)
    assert torch.equal(cut.weight, whole.weight)


def test_stopping_returns_the_best_and_does_not_go_on(tmp_path):
    seen = []

    def valid(network):
        seen.append(float(network.weight))
        return {"valid": [2.0, 1.0, 1.5, 1.2, 1.1, 0.1][len(seen) - 1]}

    config = plan(stop_epochs=2)
    network, history = train_network(tmp_path, LineTask(), config, Points(), valid, device="cpu",
                                     report=lambda line: None)
    assert len(history) == 4 and float(network.weight) == seen[1] != seen[-1]
    again, history = train_network(tmp_path, LineTask(), config, Points(), valid, device="cpu",
                                   report=lambda line: None)
    assert len(history) == 4 == len(seen) and torch.equal(again.weight, network.weight)


def test_a_training_from_before_an_option_goes_on_with_its_default(tmp_path):
    config = TrainingConfig(steps=10, epoch_steps=5, precision="32-true")
    train(tmp_path, config, time_limit_s=0)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name in ("schedule", "watch", "plateau_epochs", "stop_epochs", "drop_epochs", "drop_factor", "devices"):
        del saved["configs"]["training"][name]
    del saved["best"]
    torch.save(saved, tmp_path / "last.ckpt")
    assert [row["step"] for row in train(tmp_path, config)[1]] == [5, 10]
    saved["configs"]["training"]["clip_norm"] = 0.5
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(ParameterError, match="clip_norm"):
        train(tmp_path, config)


def test_a_damaged_state_is_named_and_not_trained_on(tmp_path):
    """A bit turned in a weight (PyTorch reads it without a word), an end cut off, what is no state at all."""
    config = TrainingConfig(steps=10, epoch_steps=5, precision="32-true")
    train(tmp_path, config, time_limit_s=0)
    path, rng = tmp_path / "last.ckpt", random.Random(0)
    whole = path.read_bytes()
    expected = [row["loss"] for row in train(tmp_path, config)[1]]
    n_named = 0
    for k in range(40):
        damaged = bytearray(whole)
        if k % 2:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)):]
        path.write_bytes(damaged)
        try:
            assert [row["loss"] for row in train(tmp_path, config)[1]] == expected   # padding, or a date
        except CheckpointError as error:
            assert "last.ckpt" in str(error) and "begins anew" in str(error)
            n_named += 1
    assert n_named > 25
    path.write_bytes(whole)
    saved = torch.load(path, weights_only=True)
    del saved["optimizer"]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        train(tmp_path, config)


def test_step_schedule_is_that_of_pytorch(tmp_path):
    """The rate of each step, of a training that is cut after each epoch, is StepLR's, without a warm-up."""
    config = plan(steps=30, warmup_steps=0, schedule="step", drop_epochs=2, drop_factor=0.65, learning_rate=0.01)
    rates = []

    class Watching(LineTask):
        def loss(self, network, prepared, training):
            rates.append(watched[0]())
            return super().loss(network, prepared, training)

    def states(task, training, train, devices=1, _make=training_loop._State):
        state = _make(task, training, train, devices)
        watched[:] = [lambda: state.optimizer.param_groups[0]["lr"]]
        return state

    watched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "_State", states)
        for _ in range(6):  # an epoch at a time
            train_network(tmp_path, Watching(), config, Points(), time_limit_s=0, report=lambda line: None)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], 0.01)
    peer, expected = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.65), []
    for _ in range(6):
        expected += [peer.get_last_lr()[0]] * 5
        optimizer.step(), peer.step()
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_adamw_without_decay_is_adam(tmp_path):
    """What recipes that ask for Adam rely on."""
    config = plan(steps=10, warmup_steps=0, schedule="step", learning_rate=0.05, weight_decay=0.0, clip_norm=1e9)
    torch.manual_seed(config.seed)
    line = Line(LineConfig())
    optimizer = torch.optim.Adam(line.parameters(), 0.05)
    task, points = PlainLineTask(), Points()
    for step in range(10):
        optimizer.zero_grad()
        task.loss(line, task.prepare(points.draw(step)), config).backward()
        optimizer.step()
    train_network(tmp_path, task, config, points, device="cpu", report=lambda line: None)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["model"]
    torch.testing.assert_close(saved, line.state_dict(), rtol=1e-5, atol=1e-6)


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ParameterError, match="schedule.*'cosine'"):
        plan(schedule="cosine")
    with pytest.raises(ParameterError, match="stop_epochs"):
        plan(stop_epochs=-1)
    with pytest.raises(ParameterError, match="drop_epochs, drop_factor.*0 and 0.65"):
        plan(drop_epochs=0)
    with pytest.raises(ParameterError, match="watch.*loss.*'pesq'"):
        train(tmp_path, plan(watch="pesq"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10) | st.just(float("nan")), min_size=1, max_size=12), st.integers(1, 4))
def test_epochs_without_best(values, patience):
    counts = epochs_without_best(values)
    best = np.inf
    for value, count in zip(values, counts, strict=True):
        assert (count == 0) == (value < best)
        best = value if value < best else best
    factors = [plateau_factor(values[:k], patience) for k in range(len(values) + 1)]
    assert factors[0] == 1 and all(b in (a, a / 2) for a, b in zip(factors, factors[1:], strict=False))


_TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from lightning.fabric import Fabric
from test_training import LineTask, Points, plan, train_network, zigzag
torch.set_num_threads(1)
case, first = sys.argv[3], os.environ.get("LOCAL_RANK", "0") == "0"


class Task(LineTask):
    def loss(self, *args):
        return super().loss(*args) * (float("nan") if case == ("first" if first else "second") else 1)


def broadcast(self, *args, _broadcast=Fabric.broadcast):
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    return _broadcast(self, *args)


if case == "slow":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    Fabric.broadcast = broadcast
train_network(sys.argv[2], Task(), plan(steps=4, epoch_steps=2), Points(), zigzag, device="cpu", devices=2)
"""


def two_processes(folder, case: str, **environment) -> subprocess.CompletedProcess:
    """What came of a training by two processes; returns when both have ended (both write to one pipe)."""
    (folder / "two.py").write_text(_TWO)
    command = [sys.executable, str(folder / "two.py"), os.path.dirname(__file__), str(folder / "run"), case]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          env=os.environ | environment) as process:
        try:
            said, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the second one, too
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="threads can't be made slow on purpose here")
def test_two_processes_part_though_a_thread_of_the_group_is_late(tmp_path):
    """The destructor of a group waited for its thread with the interpreter's lock, the thread for that lock."""
    done = two_processes(tmp_path, "slow")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 4") == 1 and (tmp_path / "run" / "last.ckpt").is_file()


@pytest.mark.parametrize("who", ["first", "second"])
def test_a_process_that_fails_takes_the_other_along(tmp_path, who):
    """And the reason is said."""
    done = two_processes(tmp_path, who)
    assert done.returncode != 0 and "training diverged" in done.stderr, done.stderr[-2000:]


def test_processes_that_can_not_meet_end(tmp_path):
    """The first found the port in use and failed; the second waited half an hour for it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = two_processes(tmp_path, "as usual", MASTER_PORT=str(other.getsockname()[1]))
    assert done.returncode != 0 and "EADDRINUSE" in done.stderr, done.stderr[-2000:]
