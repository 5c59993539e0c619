"""memokern.util.writing.atomic and processes that are ended while they write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from memokern.util.writing import atomic
from tests.apps.cli_calls import settings

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# nohup, under which tests may run too, has its processes ignore SIGHUP: so do we then.
WRITE = """
import signal, sys, time
from memokern.util.writing import atomic
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("up", flush=True)
    time.sleep(60)
"""


def ended(target, number: int) -> int:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | settings(),
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        child.send_signal(number)
        return child.wait(timeout=30)
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
@pytest.mark.one_of(2)
def test_a_signal_leaves_nothing_and_still_ends_the_process(tmp_path, number) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    assert ended(target, number) == -number
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and target.read_text() == "old"


@pytest.mark.long
def test_what_a_killed_process_left_goes_at_the_next_write(tmp_path) -> None:
    target = tmp_path / "a.txt"
    assert ended(target, signal.SIGKILL) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = [
        left.name.replace(".a.", ".b."),  # of another target
        left.name.replace(".a.", ".a.f"),  # of another machine
        f".a.{left.name.split('.')[2].split('-')[0]}-{os.getpid()}-0123.tmp.txt",  # still written
        ".a.0123456789ab.tmp.txt",
        "a.tmp.txt",
    ]
    for name in others:
        (tmp_path / name).write_text("kept")
    with atomic(target) as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.txt", *others])


def test_handlers_of_the_caller_stay(tmp_path) -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with atomic(tmp_path / "a.txt") as temporary:
            os.kill(os.getpid(), signal.SIGTERM)
            temporary.write_text("whole")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1] and (tmp_path / "a.txt").read_text() == "whole"
    handler = signal.getsignal(signal.SIGHUP)
    with atomic(tmp_path / "b.txt") as temporary:
        temporary.write_text("whole")
    assert signal.getsignal(signal.SIGHUP) == handler


def test_other_threads_write_too(tmp_path) -> None:
    def write() -> None:
        with atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("whole")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (tmp_path / "a.txt").read_text() == "whole"
