"""SIGKILL at random moments of a whole run: every resume works, and the weights are those of a run nobody disturbed.

    python tests/test_kill.py --kills 20

starts `train.py`, kills it, starts the same command again, until enough kills were made; then it lets the run finish
and compares `model.safetensors` byte by byte with that of an uninterrupted run in another folder. A SIGKILL cannot be
caught, so nothing can be tidied up. The moments are random, but their phases are chosen, since data are prepared once
and a save takes a few milliseconds: a quarter of the kills fall on the start-up and on the making of the data, the rest
on training, half of these as soon as a save has begun. What phase a kill really hit is seen from what it left behind.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 3
FLAGS = (
    f"--device cpu --preset nano-1m --length 128 --batch-rows 2 --vocab 400 --data-rows 12000 --text-share 0.3 "
    f"--save-every {SAVE_EVERY} --log-every 1 --sample-every 0 --eval-count 0"
).split()
PHASES = ("start-up", "making the data", "between start and training", "training", "inside a save")


class Life:
    """One process from its start to its end; `lines` is what it has printed so far."""

    def __init__(self, out, text, steps):
        command = [sys.executable, "-u", str(ROOT / "train.py"), *FLAGS]
        command += ["--steps", str(steps), "--text", str(text), "--out", str(out)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        self.out, self.lines, self.began = out, [], time.time()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, ready, seconds):
        """Wait until ready() or the process's end or so many seconds have passed."""
        end = time.time() + seconds
        while time.time() < end and self.process.poll() is None and not ready():
            time.sleep(0.001)

    def said(self, words, times=1):
        return lambda: sum(words in line for line in self.lines) >= times

    def saving(self):
        """Whether a save has begun in this life and is not finished; an earlier life may have left such a file too."""
        try:
            return (self.out / ".training.safetensors.tmp").stat().st_mtime > self.began
        except FileNotFoundError:
            return False

    def kill(self):
        """SIGKILL; returns the phase that it hit."""
        self.process.kill()
        self.end()
        if any("ready after" in line for line in self.lines):
            return "inside a save" if self.saving() else "training"
        if (self.out / "data" / "meta.json").exists():
            return "between start and training" if any(" text: " in line for line in self.lines) else "start-up"
        return "making the data" if any(" text: " in line for line in self.lines) else "start-up"

    def end(self):
        code = self.process.wait(timeout=300)
        self.reader.join()
        self.process.stdout.close()
        return code

    def steps(self):
        """(first, last) step of this life, 0 where it did none."""
        done = [int(line.split()[1].split("/")[0]) for line in self.lines if line.startswith("step  ") and "/" in line]
        done = [n for n in done if n] or [0]
        return done[0], done[-1]

    def resumed(self):
        return next((int(line.split()[3]) for line in self.lines if line.startswith("resume ")), None)


def one_life(out, text, steps, plan, chance):
    """Start, wait for a random moment of the phase that is planned, kill."""
    life = Life(out, text, steps)
    if plan == "start-up":
        life.wait_for(lambda: False, chance.uniform(0.05, 4.0))
    elif plan == "data":
        life.wait_for(life.said(" text: "), 60)
        life.wait_for(life.said("ready after"), chance.uniform(0.0, 2.5))
    else:
        life.wait_for(life.said("ready after"), 60)
        life.wait_for(life.said("bits/byte", chance.randint(0, 3 * SAVE_EVERY)), 60)
        if plan == "save":
            life.wait_for(life.saving, 20)
            life.wait_for(lambda: False, chance.uniform(0.0, 0.01))
        else:
            life.wait_for(lambda: False, chance.uniform(0.0, 0.3))
    return life, life.process.poll() is None


def kills(number, steps=None, seed=0, say=print):
    """Run the whole comparison in a temporary folder; returns {phase: kills}. AssertionError if anything differs."""
    chance, counts, began = Random(seed), Counter(), time.time()
    steps = steps or 6 * number  # a life makes some five steps of progress
    early = max(1, number // 8)
    plans = ["start-up"] * early + ["data"] * (number // 4) + ["training", "save"] * number
    with tempfile.TemporaryDirectory() as folder:
        out, text = Path(folder) / "killed", Path(folder) / "text.txt"
        text.write_text("".join(f"line {i} of {i * i}: all that is read is kept until its end\n" for i in range(900)))
        say(f"{'kill':>4}  {'phase':<28}{'after':>8}  {'resumed at':>10}  {'steps':>9}")
        reached = 0  # the last step known to be saved
        for plan in plans[:number]:
            life, alive = one_life(out, text, steps, plan, chance)
            assert alive, f"it ended by itself before kill {sum(counts.values()) + 1}:\n" + "".join(life.lines)
            phase, seconds = life.kill(), time.time() - life.began
            first, last = life.steps()
            if last or life.resumed() is not None:
                assert (life.resumed() or 0) >= reached, "an older save than the last whole one was resumed"
                assert first in (0, (life.resumed() or 0) + 1), "steps were left out or repeated"
                # the save of the last step printed may have been cut, the ones before it may not
                reached = max(reached, life.resumed() or 0, (last - 1) // SAVE_EVERY * SAVE_EVERY)
            counts[phase] += 1
            say(
                f"{sum(counts.values()):4d}  {phase:<28}{seconds:6.1f} s  {life.resumed() or '-':>10}  "
                f"{f'{first}-{last}' if last else '-':>9}"
            )
        last, alone = Life(out, text, steps), Path(folder) / "alone"
        assert last.end() == 0, "".join(last.lines)
        undisturbed = Life(alone, text, steps)
        assert undisturbed.end() == 0, "".join(undisturbed.lines)
        a, b = ((place / "model.safetensors").read_bytes() for place in (out, alone))
        assert a == b, "the weights differ from those of the uninterrupted run"
        assert sorted(os.listdir(out)) == sorted(os.listdir(alone)), "a kill left something behind"
        shutil.rmtree(out)
    say(f"{number} kills: " + ", ".join(f"{counts[phase]} {phase}" for phase in PHASES if counts[phase]))
    say(f"{steps} steps, model.safetensors of {len(a):,} bytes identical to that of an uninterrupted run; "
        f"{time.time() - began:.0f} s")  # fmt: skip
    return counts


@pytest.mark.slow
def test_twenty_kills_change_nothing():
    counts = kills(20)
    assert sum(counts.values()) == 20 and counts["training"] + counts["inside a save"] >= 8
    assert counts["making the data"] >= 1 and counts["inside a save"] >= 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--steps", type=int, help="steps of the run; by default six for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    kills(args.kills, args.steps, args.seed, lambda text: print(text, flush=True))
