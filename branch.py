"""Branching: another end for a run whose expensive part is done.

The idea. Until the learning rate begins to fall, a run does not know how it will end: the trunk of warmup-stable-decay
belongs to runs of every length. `train.py` keeps the training state of that moment as `stable.safetensors`, and

    python train.py --branch out --out short --steps 1200 --decay-shape minus_sqrt

goes on from it in a new folder: same weights, moments, random numbers and place in the data, another fall. All that the
trunk was made with is inherited; only --steps, --decay and --decay-shape are the leg's own. With none of them the leg
repeats the trunk's own end, on a CPU to the bit. With --steps alone the rate falls from the branch to there.

What a leg reads. Blends that began before the branch stay where they were. Later ones move with the leg: a blend that
began a quarter of the way from the branch to the trunk's end begins a quarter of the way to the leg's.

This file must not know models; it reads only the numbers beside the tensors.
"""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import curriculum
import resume
import schedule

OWN = ("steps", "decay", "decay_shape", "branch")  # the settings of a leg that need not be the trunk's


def trunk_state(folder):
    """The training file of `folder` at which its rate had not begun to fall; ValueError if there is none."""
    for name in ("stable.safetensors", "training.safetensors"):
        file = Path(folder) / name
        if not file.exists():
            continue
        loop = resume.peek_training(file)
        config, step = loop.get("config", {}), loop.get("step", 0)
        if not {"steps", "warmup", "decay"} <= config.keys():
            raise ValueError(f"{file} does not say how its rate was to go: only a run of train.py can be branched")
        fall = schedule.decay_start(config["steps"], config["decay"])
        if step < config["warmup"] * config["steps"]:
            raise ValueError(f"--branch {folder} is at step {step}, where its rate still rises: let it train on first")
        if fall is None or step <= fall:
            return file
        raise ValueError(
            f"--branch {folder} has only a state of step {step}, and its rate fell from step {fall} on: branch from a "
            "folder with a stable.safetensors, or from a run that was stopped before"
        )
    raise ValueError(f"--branch {folder} holds no run (no stable.safetensors, no training.safetensors): check the path")


def inherit(config, machine):
    """(config of the leg, file to start from, first step of every phase).

    config: as given, None where nothing was. machine: names of settings that do not shape a run. A leg that has begun
    inherits from its own folder, so that the trunk may be gone by then. ValueError for what makes no leg.
    """
    own = Path(config.out) / "training.safetensors"
    if Path(config.branch).absolute() == Path(config.out).absolute():
        raise ValueError(f"--branch {config.branch} is --out itself: a leg needs a folder of its own")
    file = own if own.exists() else trunk_state(config.branch)
    loop, defaults = resume.peek_training(file), {f.name: f.default for f in fields(config)}
    trunk = defaults | loop.get("config", {})
    given = {k: getattr(config, k) for k in trunk if k in defaults and k not in machine and k not in OWN}
    other = [k for k, v in given.items() if v not in (defaults[k], trunk[k])]
    if file == own:  # a leg's warm-up is the trunk's, as a share of other steps
        other = [k for k in other if k != "warmup"]
    if other:
        name = other[0]
        raise ValueError(
            f"--{name.replace('_', '-')} {given[name]} cannot be another than its trunk's ({trunk[name]}): a leg "
            "chooses --steps, --decay and --decay-shape"
        )
    end, decay = trunk["steps"], config.decay
    steps = end if config.steps is None else config.steps
    config = replace(config, steps=steps, **{k: trunk[k] for k in given})
    if file == own:
        return replace(config, decay=trunk["decay"] if decay is None else decay), file, loop.get("starts")
    at = loop["step"]
    starts = loop.get("starts") or curriculum.starts(end, curriculum.boundaries(trunk["phases"]))
    if steps <= at:
        raise ValueError(f"--steps {steps} is not behind the branch at step {at} of {config.branch}: give more")
    if decay is None:
        decay = trunk["decay"] if steps == end and trunk["decay"] else (steps - at) / steps
    fall = schedule.decay_start(steps, decay)
    if fall is not None and fall < at:
        raise ValueError(
            f"--decay {decay} of {steps} steps would begin at step {fall}, before the branch at step {at}: give at "
            f"most {(steps - at) / steps:.4g}, or leave it out"
        )
    config = replace(config, decay=decay, warmup=trunk["warmup"] * end / steps)  # as many steps as in the trunk
    moved = [s if s <= at else at + round((s - at) * (steps - at) / (end - at)) for s in starts]
    return config, file, moved


def bring_data(trunk, out):
    """Copy the trunk's prepared data, unless `out` has data: made anew, they could differ. meta.json is last, so what a
    kill leaves does not count as data."""
    source, target = Path(trunk) / "data", Path(out) / "data"
    if not (source / "meta.json").exists() or (target / "meta.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "meta.json"):
        shutil.copyfile(path, target / path.name)
