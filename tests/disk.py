"""Disks that fill, processes that die: what the tests of saving share."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safefile import CheckpointError


def same(a, b):
    """Equal to the bit, names, dtypes and order of axes included."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def sentence(call, *words):
    """`call` must raise a CheckpointError of one line that contains all the words."""
    with pytest.raises(CheckpointError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) > 20, text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    return text


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes, as if the disk were full.

    A block, not a fixture: pytest's own output may go to a file that is longer already, and it prints before fixtures
    are torn down.
    """
    resource = pytest.importorskip("resource", reason="file size limits are a Unix thing")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Killed(BaseException):
    """As if the power went: nothing after it runs, so `except` and `finally` that tidy up are disabled too."""


class Calls:
    """Counts calls that change the disk and kills at the k-th, before or after it takes effect."""

    WATCHED = [(os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (Path, "unlink")]
    WATCHED += [(Path, "rmdir"), (Path, "mkdir")]

    def __init__(self, monkeypatch, k=None, after=False):
        self.k, self.after, self.count, self.dead = k, after, 0, False
        for where, name in self.WATCHED:
            monkeypatch.setattr(where, name, self.watch(getattr(where, name)))
        monkeypatch.setattr(shutil, "rmtree", self.watch(shutil.rmtree))

    def watch(self, real):
        def call(*args, **kwargs):
            if self.dead:
                raise Killed
            self.count += 1
            hit = self.count == self.k
            self.dead = hit and not self.after
            if self.dead:
                raise Killed
            try:
                return real(*args, **kwargs)
            finally:
                if hit:
                    self.dead = True
                    raise Killed

        return call


def kill_points(save):
    """Run `save(i)` once to count its calls to the disk, then yield a context for a kill before and after each."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        save()
    assert calls.count >= 3
    return [(k, after) for k in range(1, calls.count + 1) for after in (False, True)]


def killed_while_saving(folder, script, kills=2):
    """After each of some SIGKILLs, at random moments of a process that does nothing but save, yields. The script finds
    the folder in sys.argv[1] and prints a line when it has saved once."""
    root, chance = Path(__file__).resolve().parent.parent, random.Random(0)
    start = "import sys; sys.path[:0] = sys.argv[2:]\nimport torch; torch.set_num_threads(1)\n"
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", start + script, str(folder), str(root), str(root / "tests")], stdout=subprocess.PIPE
        )
        assert child.stdout.readline() == b"go\n"
        time.sleep(0.3 * chance.random())
        child.kill()
        child.wait()
        child.stdout.close()
        yield
