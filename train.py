"""Pretraining: the main job. `python train.py` needs no flags.

It picks a device and a preset that fits, makes its data from what is on the machine, trains with the report's schedule
(warm-up, stable, decay), answers a few questions as it learns, and ends with a table of accuracies, a plot and a
checkpoint folder. Ctrl-C saves; the same command resumes, on a CPU to the last bit. `torchrun --nproc-per-node N
train.py` does the same job on N processes with PyTorch's DDP.

To follow one training step, read in this order: `Loader.next` (data.py), `Objective.forward` and `train_step` (here),
`NemotronH.features` (model.py), `Mamba2Mixer.forward` (mamba2.py). This file must not know alignment.

Source: report section 2.2-2.4 (warmup-stable-decay, AdamW 0.9/0.95, weight decay 0.1). Learning rates, batch sizes and
step counts are ours: what a model of this size needs.
"""

import argparse
import json
import math
import os
import platform
import resource
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import evaluate
import tasks
from model import PRESETS, NemotronH, build, describe, flops_per_token
from tokenizer import Tokenizer, train_bpe


@dataclass
class TrainConfig:
    """Every field is a flag. None means: what suits the preset (see RUNS) or the machine."""

    preset: str = "auto"  # nano-1m on a CPU, nano-12m on a GPU, or any name in model.py's PRESETS
    out: str = "out"  # the folder for log, plot, checkpoint and data; a run found there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: what the matrix products run in; weights stay float32
    compile: str = "auto"  # auto, on or off: torch.compile; auto means on a GPU
    steps: int | None = None  # optimizer steps
    batch_rows: int | None = None  # rows in an optimizer step, all processes together; the first to lower for speed
    length: int | None = None  # tokens in a row; lower it when memory runs out
    accumulate: int = 1  # split a step's rows into this many parts; raise it when memory runs out
    lr: float | None = None  # peak learning rate
    warmup: float = 0.02  # share of the steps in which the rate rises
    decay: float | None = None  # share of the steps, at the end, in which it falls to a hundredth
    weight_decay: float = 0.1
    clip: float = 1.0  # the gradient's norm is cut to this
    vocab: int | None = None  # entries of the tokenizer, trained on the machine's own text
    text: str | None = None  # a text file, or a folder of them, in place of the installed text
    text_share: float | None = None  # share of text in the tokens; the rest is tasks
    data_rows: int | None = None  # packed rows to prepare; read again from the start when used up
    seed: int = 0
    log_every: int | None = None  # steps between lines
    sample_every: int | None = None  # steps between the questions it answers as it trains; 0 for never
    save_every: int | None = None  # steps between saves
    eval_count: int = 32  # held-out questions for each family and level at the end; 0 for none


RUNS = {  # what suits a preset; any other preset starts from the last
    "nano-1m": dict(steps=2000, batch_rows=8, length=256, lr=2e-3, decay=0.4, vocab=512, text_share=0.1,
                    data_rows=16000, log_every=25, sample_every=200, save_every=100),
    "nano-12m": dict(steps=4000, batch_rows=128, length=512, lr=1e-3, decay=0.3, vocab=4096, text_share=0.2,
                     data_rows=400_000, log_every=50, sample_every=500, save_every=500),
}  # fmt: skip

# bf16 matrix peak in FLOP/s, dense, from the makers' data sheets: what MFU is measured against
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


# ---------------------------------------------------------------------------------------------------------------------
# Decisions, each with its reason
# ---------------------------------------------------------------------------------------------------------------------


def choose_device(wish):
    """(torch.device, reason)."""
    if wish not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {wish!r} is not one of auto, cpu, cuda")
    if wish == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for and PyTorch sees no CUDA device: use --device cpu, or check_env.py")
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "asked for" if wish == "cpu" else "PyTorch sees no CUDA device"
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(index)
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def choose_dtype(wish, device):
    """(torch.dtype, reason). bfloat16 needs compute capability 8.0: older cards only emulate it, whatever
    torch.cuda.is_bf16_supported() says."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wish != "auto":
        if wish not in names:
            raise ValueError(f"--dtype {wish!r} is not one of auto, {', '.join(names)}")
        if wish == "float16" and device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU: use bfloat16 or float32 on a CPU")
        return names[wish], "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor}"
        return torch.float16, f"compute capability {major}.{minor} has no bfloat16; losses are scaled, the scan is float32"
    if "amx_bf16" in _cpu_flags():
        return torch.bfloat16, "this CPU has AMX: bfloat16 matrix products are faster"
    return torch.float32, "this CPU has no bfloat16 matrix unit (AMX)"


def _cpu_flags():
    try:
        return next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []


def fill_in(config, device):
    """The config with every None replaced by what suits the preset; ValueError for what makes no sense."""
    if config.preset == "auto":
        config = replace(config, preset="nano-12m" if device.type == "cuda" else "nano-1m")
    if config.preset not in PRESETS:
        raise ValueError(f"--preset {config.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    run = RUNS.get(config.preset, list(RUNS.values())[-1])
    config = replace(config, **{k: v for k, v in run.items() if getattr(config, k) is None})
    at_least = dict(steps=1, batch_rows=1, length=64, accumulate=1, log_every=1, sample_every=0, save_every=1,
                    eval_count=0, data_rows=1, seed=0, weight_decay=0, warmup=0, decay=0)  # fmt: skip
    for name, low in at_least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(config, name)}")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be above 0; got {getattr(config, name)}")
    if config.warmup + config.decay > 1:
        raise ValueError(f"--warmup {config.warmup} and --decay {config.decay} are shares of the run: together at most 1")
    if not 0 <= config.text_share <= 1:
        raise ValueError(f"--text-share is a share between 0 and 1; got {config.text_share}")
    if config.batch_rows % config.accumulate:
        raise ValueError(f"--batch-rows {config.batch_rows} cannot be split into --accumulate {config.accumulate} parts")
    if config.compile not in ("auto", "on", "off"):
        raise ValueError(f"--compile {config.compile!r} is not one of auto, on, off")
    return replace(config, data_rows=max(config.data_rows, config.batch_rows))


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a training step
# ---------------------------------------------------------------------------------------------------------------------


def wsd(step, steps, warmup, decay, floor=0.01):
    """Warmup-stable-decay: the share of the peak learning rate at `step`. Linear up, flat, linear down to `floor`
    (the report: 4.5e-4 down to 4.5e-6 over the last 18 %)."""
    up = (step + 1) / max(1.0, warmup * steps)
    down = (steps - step) / max(1.0, decay * steps)
    return max(floor, min(1.0, up, down))


def make_optimizer(model, lr, weight_decay):
    """AdamW 0.9/0.95. Decay pulls matrices and embeddings only; norms, A_log, D, dt_bias and biases are scales and
    offsets whose natural value is not zero."""
    decayed = [p for p in model.parameters() if p.dim() >= 2 and not getattr(p, "no_decay", False)]
    rest = [p for p in model.parameters() if not any(p is q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Objective(nn.Module):
    """Model and loss in one module, so that torch.compile and DDP see one forward."""

    def __init__(self, model, token_bytes):
        super().__init__()
        self.model = model
        self.register_buffer("token_bytes", token_bytes, persistent=False)  # (vocab,): for bits per byte

    def forward(self, ids, doc, kind):
        """ids, doc (b, l) int64; kind (b, l) uint8. Returns five sums over this batch's targets: the loss of task and
        of text targets in nats, their numbers, and the bytes of the text targets."""
        x = self.model.features(ids, seq_idx=doc)[:, :-1]
        targets, kind = ids[:, 1:], kind[:, 1:]
        if x.device.type == "cpu":  # only what is learned needs the head; a GPU prefers fixed shapes
            learned = kind != data.NOT_LEARNED
            x, targets, kind = x[learned], targets[learned], kind[learned]
        logits = self.model.lm_head(x).float()
        nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
        task, text = kind == data.TASK, kind == data.TEXT
        sums = (nll * task).sum(), (nll * text).sum()
        return torch.stack([*sums, task.sum(), text.sum(), (self.token_bytes[targets] * text).sum()])


def train_step(objective, optimizer, scaler, batch, config, autocast, world):
    """One optimizer step over this rank's rows of the global batch; returns the summed statistics and the norm.

    The loss is the mean over all targets of all parts and processes: each part's sum is divided by the global count,
    so accumulation and DDP give the gradient of one big batch whatever the split.
    """
    ids, doc, kind = batch
    count = (kind[:, 1:] != data.NOT_LEARNED).sum().float()
    if world > 1:
        dist.all_reduce(count)
    total = torch.zeros(5, device=ids.device)
    parts = list(zip(*(t.chunk(config.accumulate) for t in batch)))
    for i, part in enumerate(parts):
        wait = objective.no_sync() if world > 1 and i + 1 < len(parts) else nullcontext()
        with wait:
            with autocast():
                sums = objective(*part)
            loss = (sums[0] + sums[1]) / count * world  # DDP averages gradients over processes: undo that
            scaler.scale(loss).backward()
        total += sums.detach()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
