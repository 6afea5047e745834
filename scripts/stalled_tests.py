"""pytest while random processes of its own are stopped for seconds, as on a machine that has other work.

    python scripts/stalled_tests.py [--seed N] [--longest SECONDS] [arguments of pytest]

A test that waits for a moment which may pass unseen, or that counts on somebody to be quick, fails sooner or later."""

import argparse
import random
import subprocess
import sys
import time

import psutil


def stall_once(tests: psutil.Process, rng: random.Random, longest_s: float) -> bool:
    """Stop one process for up to `longest_s` and let it go on; False where it ended meanwhile."""
    try:
        started = tests.children(recursive=True)
        # alone the tests would only take longer; beside others they may come too late
        victim = rng.choice(started) if started and rng.random() < 0.7 else tests
        seconds = rng.uniform(0.3, longest_s) if started else rng.choice([0.0, 0.5])
        victim.suspend()
        try:
            time.sleep(seconds)
        finally:
            victim.resume()
        return True
    except psutil.Error:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=8.0, metavar="SECONDS")
    args, rest = parser.parse_known_args()
    tests = subprocess.Popen([sys.executable, "-m", "pytest", *rest])
    rng, stalls = random.Random(args.seed), 0
    while tests.poll() is None:
        time.sleep(rng.uniform(0.2, 1.0))
        stalls += stall_once(psutil.Process(tests.pid), rng, args.longest)
    print(f"{stalls} stalls")
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
