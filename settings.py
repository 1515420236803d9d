"""What a run is asked for: the flags of train.py, what suits each preset, what makes no sense, and how a script ends.

A dataclass whose fields become flags: the comment beside a field is its help, so what a flag does stands in one place.
Fields without a default of their own take what suits the preset (`RUNS`); `fill_in` puts it there and refuses, in a
sentence, what cannot work, before anything is made. This file must not know models' insides, data or training.
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import curriculum
import evaluate
import schedule
from model import PRESETS


@dataclass
class TrainConfig:
    """Every field is a flag. None means: what suits the preset (see RUNS) or the machine."""

    preset: str = "auto"  # nano-1m on a CPU, nano-12m on a GPU, or any name in model.py's PRESETS
    out: str = "out"  # the folder for log, plot, checkpoint and data; a run found there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: what the matrix products run in; weights stay float32
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    compile: str = "auto"  # auto, on or off: torch.compile; auto means on a GPU
    fp8: str = "off"  # off, emulate or real: inner matmuls in eight bits; emulate runs anywhere, real needs Hopper
    steps: int | None = None  # optimizer steps
    batch_rows: int | None = None  # rows in an optimizer step, all processes together; the first to lower for speed
    length: int | None = None  # tokens in a row; lower it when memory runs out
    accumulate: int = 1  # split a step's rows into this many parts; raise it when memory runs out
    parallel: str = "ddp"  # ddp or fsdp: under torchrun each process holds the model whole, or one part of it
    recompute: str = "off"  # off or layers: layers forget what the backward needs and compute it again, to save memory
    lr: float | None = None  # peak learning rate
    warmup: float = 0.02  # share of the steps in which the rate rises
    decay: float | None = None  # share of the steps, at the end, in which it falls to a hundredth
    decay_shape: str = "linear"  # how it falls: linear, cosine, exponential or minus_sqrt
    branch: str = ""  # folder of a run: go on from where its rate began to fall, with other --steps or --decay-shape
    weight_decay: float = 0.1
    clip: float = 1.0  # the gradient's norm is cut to this
    vocab: int | None = None  # entries of the tokenizer, trained on the machine's own text
    text: str | None = None  # a text file, or a folder of them, in place of the installed text
    text_share: float | None = None  # share of text in the tokens; the rest is tasks
    phases: str = ""  # shares of the run at which the data blend changes: 0.6,0.9 as in the report; empty: one blend
    data_rows: int | None = None  # packed rows to prepare; read again from the start when used up
    seed: int = 0
    log_every: int | None = None  # steps between lines
    sample_every: int | None = None  # steps between the questions it answers as it trains; 0 for never
    save_every: int | None = None  # steps between saves
    phase_eval: int = 4  # with --phases: held-out questions for each family and level where a phase or the fall begins
    eval_count: int | None = None  # held-out questions for each family and level at the end; 0 for none


RUNS = {  # what suits a preset; any other preset starts from the last
    "nano-1m": dict(steps=1700, batch_rows=8, length=256, lr=2e-3, decay=0.4, vocab=512, text_share=0.05,
                    data_rows=13_600, log_every=25, sample_every=170, save_every=100, eval_count=20),
    "nano-12m": dict(steps=2500, batch_rows=128, length=512, lr=1.5e-3, decay=0.3, vocab=4096, text_share=0.1,
                     data_rows=160_000, log_every=50, sample_every=500, save_every=500, eval_count=64),
}  # fmt: skip

NOT_THE_RUN = {  # flags that may change when a run is resumed
    "out",
    "device",
    "dtype",
    "impl",
    "compile",
    "log_every",
    "sample_every",
    "save_every",
    "eval_count",
    "phase_eval",
    "accumulate",
    "parallel",
    "recompute",
}


def fill_in(config, device):
    """The config with every None replaced by what suits the preset; ValueError for what makes no sense."""
    if config.preset == "auto":
        config = replace(config, preset="nano-12m" if device.type == "cuda" else "nano-1m")
    if config.preset not in PRESETS:
        raise ValueError(f"--preset {config.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    run = RUNS.get(config.preset, list(RUNS.values())[-1])
    config = replace(config, **{k: v for k, v in run.items() if getattr(config, k) is None})
    at_least = dict(steps=1, batch_rows=1, length=64, accumulate=1, log_every=1, sample_every=0, save_every=1,
                    eval_count=0, phase_eval=0, data_rows=1, seed=0, weight_decay=0, warmup=0, decay=0)  # fmt: skip
    for name, low in at_least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(config, name)}")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0; got {getattr(config, name)}")
    for name, limit in (("weight_decay", math.inf), ("seed", 2**63)):
        if getattr(config, name) >= limit:
            raise ValueError(f"--{name.replace('_', '-')} must be below {limit}; got {getattr(config, name)}")
    for name in ("out", "text"):
        if getattr(config, name) == "":
            raise ValueError(f"--{name} is empty: give a path, or leave the flag out")
    if config.warmup + config.decay > 1:
        raise ValueError(
            f"--warmup {config.warmup} and --decay {config.decay} are shares of the run: together at most 1"
        )
    if config.decay_shape not in schedule.SHAPES:
        raise ValueError(f"--decay-shape {config.decay_shape!r} is not one of {', '.join(schedule.SHAPES)}")
    if not 0 <= config.text_share <= 1:
        raise ValueError(f"--text-share is a share between 0 and 1; got {config.text_share}")
    if config.phases:
        curriculum.starts(config.steps, curriculum.boundaries(config.phases))
        curriculum.blends(config.text_share, {})
    if config.batch_rows % config.accumulate:
        raise ValueError(
            f"--batch-rows {config.batch_rows} cannot be split into --accumulate {config.accumulate} parts"
        )
    if config.compile not in ("auto", "on", "off"):
        raise ValueError(f"--compile {config.compile!r} is not one of auto, on, off")
    return replace(config, data_rows=max(config.data_rows, config.batch_rows))


def parse(argv=None, kind=TrainConfig, file=__file__, description=__doc__):
    """A `kind`, a dataclass written in `file`, from the command line: each field is a flag, its comment the help."""
    comments = {}
    for line in Path(file).read_text("utf-8").splitlines():
        name, _, comment = line.strip().partition("  # ")
        if ": " in name and " = " in name:
            comments.setdefault(name.split(":")[0], comment)
    parser = argparse.ArgumentParser(description=description.split("\n")[0], allow_abbrev=False)
    parser.error = evaluate.refuse
    for f in fields(kind):
        of = next((t for t in (int, float) if t.__name__ in str(f.type)), str)
        default = "suits the preset" if f.default is None else f.default
        text = (comments.get(f.name) or f.name.replace("_", " ")).replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=of, default=f.default, help=f"{text} ({default})")
    return kind(**vars(parser.parse_args(argv)))


def finish(script, run, advice):
    """The exit code of a script: run() and 0; or, after one sentence on stderr, 2 for what its user can mend; 130 after
    Ctrl-C. advice: what to lower when memory runs out."""
    import torch  # here: device.py must have come first

    try:
        run()
    except (ValueError, OSError) as e:
        print(f"{script}.py: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:  # a CPU's allocator has no error of its own
        if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
            raise
        print(f"{script}.py: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
