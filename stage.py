"""A stage of alignment: where it may begin, how it is kept, stopped and gone on with, and what is drawn at its end.

The idea. Alignment is a chain, base -> sft1 -> sft2 -> sft3 -> ifrl -> dpo -> rlhf, and a link in the wrong place gives
a model that runs and is quietly worse. So every checkpoint says which link it is, in `stage.json` beside config.json (a
folder without one is a base model), and a stage refuses any other predecessor with a sentence.

What a folder holds. While a stage runs: `log.jsonl` and `training.safetensors` (resume.py). Only when it has ended:
config.json, weights, tokenizer, `stage.json`, `curve.png`. So a stage cut short cannot be taken for a model, and
stage.json is written before the weights: a kill between the two leaves no folder that opens as a base model.

    start = open_start("sft1", config)                 what the stage begins from, or a sentence why not
    job = Stage("sft1", checkpoint, out, settings)     refuses, and touches nothing
    job.begin(model, optimizer, scaler)                goes on from the state in `out`, if there is one
    for step in job.steps(total, save_every): ...      saves; after Ctrl-C it saves and ends, and job.stopped is true
    job.finish(tokenizer)

This file must not know what is learned: a stage is a name, a model and a dict of settings to it.
"""

import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from device import choose_device, choose_dtype, choose_impl  # isort: skip  (before torch)
import torch

import checkpoint as folders
import resume
from safefile import CheckpointError, fsync_folder, read_json, write_json, writing
from sizes import count_parameters

AFTER = {  # stage: what it may start from
    "sft1": ("base",), "sft2": ("sft1",), "sft3": ("sft2",),  # sft.py
    "ifrl": ("sft3",), "gym": ("sft3",), "rlhf": ("dpo",),  # grpo.py
    "dpo": ("ifrl",),  # dpo.py
    "reward": ("sft3",),  # reward.py: a judge, no link of the chain
}  # fmt: skip
FILE = "stage.json"


def stage_of(folder):
    """The name of the stage whose end a checkpoint folder is; "base" without a stage.json. CheckpointError if that is
    damaged."""
    return _history(folder)[-1]["stage"]


def _history(folder):
    """[{"stage", "settings"}] of all stages that led to a folder, the first being the base model."""
    path = Path(folder) / FILE
    if not path.exists():
        return [{"stage": "base", "settings": {}}]
    history = read_json(path)
    if not (isinstance(history, list) and history and all(isinstance(e, dict) and "stage" in e for e in history)):
        raise CheckpointError(f"{path} does not list the stages of a checkpoint: it is damaged; copy the folder again")
    return history


def require(name, checkpoint):
    """The history of a checkpoint folder that stage `name` may start from; ValueError, in one sentence, for any other.
    What is read is the folder's small files only."""
    if not (Path(checkpoint) / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no finished checkpoint (no config.json): give --checkpoint one that does")
    history = _history(checkpoint)
    found, wanted = history[-1]["stage"], " or ".join(AFTER[name])
    if found not in AFTER[name]:
        raise ValueError(
            f"{checkpoint} is the end of stage {found}, and {name} begins after {wanted}: give --checkpoint a folder "
            "of that stage"
        )
    return history


@dataclass
class Start:
    """What a stage begins from: a model in float32 with its tokenizer, where it is and what multiplies its matrices;
    parameters: how many; why: all of that in a line."""

    model: torch.nn.Module
    tokenizer: object
    device: torch.device
    dtype: torch.dtype
    parameters: int
    why: str

    def autocast(self):
        """The context in which a stage's forwards run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def open_start(name, config):
    """The `Start` of stage `name` from a config with checkpoint, device, dtype and impl; ValueError, in one sentence,
    for a folder of another stage, one without a tokenizer, and wishes that this machine cannot meet."""
    require(name, config.checkpoint)
    device, why_device = choose_device(config.device)
    dtype, why_dtype = choose_dtype(config.dtype, device)
    choose_impl(config.impl, device)  # a wish that cannot be met is said before anything is loaded
    model, tokenizer = folders.load_pretrained(config.checkpoint, device, torch.float32)
    if tokenizer is None:
        raise ValueError(f"{config.checkpoint} has no tokenizer.json, so no conversation can be written")
    impl, why_impl = choose_impl(config.impl, device, model.config)
    why = f"{device} ({why_device}); {str(dtype)[6:]} matrix products ({why_dtype}); impl {impl} ({why_impl})"
    return Start(model.use(impl), tokenizer, device, dtype, count_parameters(model.config)["total"], why)


def take_step(model, optimizer, scaler, clip):
    """The optimizer's step with the gradients that scaled losses left, their norm cut to `clip`; the gradients are then
    forgotten. Returns the norm before the cut, a tensor."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Stage:
    """One stage being run; see the top of the file.

    Attributes: step (steps done), log (entries so far), stopped (True after Ctrl-C), seconds() (of work so far).
    Raises ValueError, in one sentence, for a checkpoint of another stage, an `out` that cannot be used, or one that
    holds another run. Nothing is written before `begin`.
    """

    def __init__(self, name, checkpoint, out, settings, say=print):
        self.name, self.out, self.settings, self.say = name, Path(out), settings, say
        self.state_file = self.out / "training.safetensors"
        self.step, self.log, self.stopped, self.before = 0, [], False, 0.0
        self.history = require(name, checkpoint)
        if not str(out):
            raise ValueError("--out is empty: give a path, or leave the flag out")
        if self.out.resolve() == Path(checkpoint).resolve():
            raise ValueError(f"--out {out} is --checkpoint itself: a stage needs a folder of its own")
        self._check_out()

    def _check_out(self):
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "may not be written to" if there.is_dir() else "is a file"
            raise ValueError(f"--out {self.out} cannot be used, because {there} {why}: give another folder")
        if not self.state_file.exists():
            if (self.out / "config.json").exists():
                raise ValueError(f"--out {self.out} already holds a model: give another folder")
            return
        loop = resume.peek_training(self.state_file)
        if loop.get("stage") != self.name:
            raise ValueError(
                f"--out {self.out} holds a run of {loop.get('stage', 'pretraining')}, this is {self.name}: give "
                "another folder"
            )
        was = loop["settings"]
        changed = [f"{k} {was.get(k)!r} -> {v!r}" for k, v in self.settings.items() if was.get(k) != v]
        if changed:
            raise ValueError(
                f"{self.out} holds a run with other settings ({', '.join(changed[:4])}): use the same flags to resume "
                "it, or another --out, or delete the folder to start anew"
            )

    def begin(self, model, optimizer, scaler):
        """Go on from what is in `out`, or begin there. model: as read from the checkpoint; scaler: torch's, enabled or
        not."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        if self.state_file.exists():
            loop = resume.load_training(self.state_file, model, optimizer)
            self.step, self.before = loop["step"], loop["seconds"]
            scaler.load_state_dict(loop["scaler"])
            self.log = [e for e in read_log(self.out / "log.jsonl") if 0 <= e.get("step", -1) <= self.step]
            self.say(f"resume    at step {self.step}")
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            temporary = self.out / "log.jsonl.tmp"  # a kill leaves the old log or the new one
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.log))
            os.replace(temporary, self.out / "log.jsonl")
        self.clock = time.time()

    def seconds(self):
        """Seconds of work so far, earlier lives included."""
        return self.before + time.time() - self.clock

    def record(self, entry):
        """Add a line to the log; `entry` is a dict of numbers, and its step is the one under way."""
        entry = {"step": self.step + 1, "seconds": round(self.seconds(), 2)} | entry
        self.log.append(entry)
        with writing(self.out), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self):
        loop = {"stage": self.name, "step": self.step, "seconds": self.seconds(), "settings": self.settings,
                "scaler": self.scaler.state_dict()}  # fmt: skip
        resume.save_training(self.state_file, self.model, self.optimizer, loop)

    def steps(self, total, save_every):
        """The steps that are left, from 0. Saves where due and at the end. After SIGINT or SIGTERM the step under way
        is finished and saved, then no more come; asked twice, it stops at once."""
        signals = []
        old = {n: signal.signal(n, lambda number, _: _asked(signals)) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                self.stopped = bool(signals) and self.step < total
                if self.step % save_every == 0 or self.step == total or self.stopped:
                    self.save()
                if self.stopped:
                    command = "python " + " ".join(map(shlex.quote, sys.argv))
                    self.say(f"stopped at step {self.step}; the same command goes on: {command}")
                    return
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def finish(self, tokenizer):
        """Write the checkpoint folder, marked as the end of this stage."""
        with writing(self.out):
            temporary = self.out / f"{FILE}.tmp"
            write_json(temporary, [*self.history, {"stage": self.name, "settings": self.settings}])
            os.replace(temporary, self.out / FILE)
            fsync_folder(self.out)
        folders.save_pretrained(self.out, self.model, tokenizer)


def _asked(signals):
    signals.append(1)
    if len(signals) > 1:
        raise KeyboardInterrupt  # the last save stands


def read_log(path):
    """The entries of a log.jsonl; a line that a kill cut short is left out."""
    entries = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def plot(log, path, left, right, title=""):
    """Draw a log over its steps: the keys `left` (losses, rewards) on the left, the skills `right` (shares of 1) on the
    right. An entry without a key is left out of its line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 3.5))
    for axis, keys in zip(axes, (left, right)):
        for key in keys:
            points = [(e["step"], e[key]) for e in log if e.get(key) is not None]
            if points:
                axis.plot(*zip(*points), "-" if axis is axes[0] else "o-", markersize=3, label=key)
        axis.set(xlabel="step")
        if axis.lines:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0].set(title=title)
    axes[1].set(ylim=(-0.03, 1.03), title="skills on held-out prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
