"""Waiting for what another thread says, with an end."""

import time


def heard(capsys, words, thread, seconds=240):
    """What is said on stderr until `words` are in it; fails when the thread ends before, or the time is over."""
    said, limit = "", time.monotonic() + seconds
    while words not in said:
        assert thread.is_alive() and time.monotonic() < limit, f"not heard: {words!r}; heard: {said!r}"
        thread.join(0.02)
        said += capsys.readouterr().err
    return said
