"""Worker processes end with the process that started them, however that ends."""

import subprocess
import sys
import time

import psutil
import pytest

from ssl_kit.lab.workers import process_pool

PARENT = """
import os, sys, time
from ssl_kit.lab.workers import process_pool
if __name__ == "__main__":
    with process_pool(3, sys.argv[1]) as pool:
        print(*(job.result() for job in [pool.submit(os.getpid) for _ in range(3)]), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_of_a_killed_process_end(tmp_path, method):
    """Busy and idle ones; with the pools of the standard library they wait for ever, and hold forked locks."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().split()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for left in alive:
        left.kill()
    assert not alive


def test_a_pool_gives_its_answers_and_ends():
    started = time.monotonic()
    with process_pool(2, "fork") as pool:
        assert list(pool.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
    assert time.monotonic() - started < 120
