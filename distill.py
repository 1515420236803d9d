"""Distillation: a small model learns to predict what a large one predicts. `python distill.py --student pruned`.

Pruning cuts a model and leaves it talking nonsense. What is left knows nearly all it needs, and the shortest way back
is not the text again but the parent itself: for every token of the text the student is shown the parent's whole
distribution (distill_loss.py), and the distance between the two is all of the loss. Teacher and student live on one
device; the teacher only reads.

Length comes in stages, as in the report (8,192 tokens, then 49,152, then 262,144): what long rows need is learned last,
because a long row is no better than a short one for all the rest, and dearer. `--length 256:300,1024:60` is 300 steps
of rows of 256 tokens and 60 of 1,024; the tokens of a step stay the same, and one schedule spans all stages.

What a student reads is one blend: `--text-share` is the share of plain text, the rest is tasks (data.py). The report
tried 50, 30 and 10 % of pretraining data beside data of its second tuning stage; all came out within 1.3 points.

The controls: `--loss ce` is training on the same tokens without a teacher; `reverse` and `topk` see distill_loss.py.
`--cache on` with topk writes down the teacher's answers once (teacher_cache.py) and sends the teacher away.

Memory. AdamW and float32 weights take 16 bytes a parameter, like pretraining. `--optimizer lean` takes 2, with which
the 12B teaches the 9B on one GPU of 80 GB (lean.py has the sum). A preset's name in place of a folder is that shape in
noise: two such models and random tokens measure a step's memory and speed, and nothing else:

    python distill.py --teacher nano-12b --student nano-9b --optimizer lean --length 8192 --step-tokens 8192 --steps 5

On one H200 a step of this kind takes 1.73 s and 49.5 GiB (RESULTS.md; the student there was cut from the teacher).

To follow one step: `Run.train`, `distill_step` (here), `distill_loss` (distill_loss.py), `_Slices` (loss.py). The run's
files, log and resume are those of train.py.

Source: report section 4 (logit distillation, stages of length, blends). Rates, lengths and steps are ours.
"""

import math
import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

from device import choose_device, choose_dtype, choose_impl, memory_gib  # isort: skip
import numpy as np
import torch

import data
import parallel
import recovery
import schedule
import sizes
import teacher_cache
import train
from distill_loss import KINDS, distill_loss
from lean import Lean
from pair import needed_bytes, one_language, open_model
from settings import finish


@dataclass
class DistillConfig:
    """Every field is a flag. None means: what suits the models or the machine."""

    teacher: str = "out"  # a checkpoint folder, or a preset's name for noise of that shape
    student: str = ""  # the same; a folder that prune.py wrote, usually
    out: str = "out/distilled"  # the folder for log, plot, data and the student; a run found there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16: what the matrix products run in
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    compile: str = "auto"  # auto, on or off: torch.compile; auto means with AdamW on a GPU
    loss: str = "kl"  # kl, reverse, topk or ce
    temperature: float = 1.0  # both models' logits are divided by it
    topk: int = 16  # the teacher's likeliest tokens that --loss topk sees
    cache: str = "off"  # off or on: with --loss topk, write down the teacher's answers before the first step
    length: str = "256"  # tokens in a row; or stages, length:steps with commas between: 256:300,1024:60
    steps: int | None = None  # optimizer steps, if --length does not say; 400
    step_tokens: int = 2048  # tokens in a step, in rows of the stage's length; the first to lower when memory runs out
    optimizer: str = "adamw"  # adamw: 16 bytes a parameter, float32 weights; lean: 2 bytes, bfloat16 weights (lean.py)
    recompute: str = "auto"  # auto, off or layers: compute layers again in the backward; auto means with lean
    lr: float | None = None  # peak learning rate; 1e-3 for adamw, 5e-4 for lean; less for large models
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 0.95  # share of the steps, at the end, in which it falls to a hundredth
    decay_shape: str = "linear"  # how it falls: linear, cosine, exponential or minus_sqrt
    weight_decay: float = 0.1
    clip: float = 1.0  # the gradient's norm is cut to this (adamw only)
    text: str | None = None  # a text file, or a folder of them, in place of the installed text
    text_share: float = 0.1  # share of text in the tokens; the rest is tasks
    data_rows: int | None = None  # packed rows to prepare for each stage; by default as many as its steps read
    seed: int = 0
    log_every: int = 20  # steps between lines
    save_every: int | None = None  # steps between saves; 0 for never, as with noise
    eval_count: int = 10  # held-out questions for each family and level, before and after; 0 for none


NOT_THE_RUN = {"out", "device", "dtype", "impl", "compile", "recompute", "log_every", "save_every", "eval_count"}
LR = {"adamw": 1e-3, "lean": 5e-4}

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def stages(length, steps=None):
    """[(length, steps)] of `--length` and `--steps`: "256" and 400, or "256:300,1024:60" and None. ValueError."""
    try:
        parts = [[int(n) for n in part.split(":")] for part in length.split(",")]
    except ValueError:
        parts = []
    if len(parts) == 1 and len(parts[0]) == 1:
        parts = [[parts[0][0], 400 if steps is None else steps]]
    elif steps is not None and parts:
        raise ValueError(f"--length {length} says how many steps each stage has: leave --steps {steps} out")
    if not parts or any(len(part) != 2 for part in parts):
        raise ValueError(f"--length {length!r} is not a length, such as 256, nor length:steps pairs: 256:300,1024:60")
    if any(tokens < 64 or count < 1 for tokens, count in parts):
        raise ValueError(f"rows need at least 64 tokens and a stage at least 1 step; got {length!r}, steps {steps}")
    return [tuple(part) for part in parts]


def check(config):
    """The config with every None replaced; ValueError for what makes no sense."""
    choices = dict(loss=KINDS, cache=("off", "on"), optimizer=tuple(LR), decay_shape=tuple(schedule.SHAPES),
                   recompute=("auto", "off", "layers"), compile=("auto", "on", "off"))  # fmt: skip
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(config, name)!r} is not one of {', '.join(allowed)}")
    for name in ("teacher", "student", "out", "text"):
        if getattr(config, name) == "":
            raise ValueError(f"--{name} is empty: give a folder")
    at_least = dict(step_tokens=64, topk=1, log_every=1, eval_count=0, seed=0, weight_decay=0, warmup=0, decay=0)
    for name, low in at_least.items():
        if not low <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(config, name)}")
    if config.lr is None:
        config = replace(config, lr=LR[config.optimizer])
    for name in ("lr", "clip", "temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0; got {getattr(config, name)}")
    if config.warmup + config.decay > 1:
        raise ValueError(
            f"--warmup {config.warmup} and --decay {config.decay} are shares of the run: together at most 1"
        )
    if not 0 <= config.text_share <= 1:
        raise ValueError(f"--text-share is a share between 0 and 1; got {config.text_share}")
    if config.loss == "ce" and config.temperature != 1:
        raise ValueError(f"--loss ce has no teacher whose --temperature could be {config.temperature}: leave it at 1")
    if config.cache == "on" and config.loss != "topk":
        raise ValueError(f"--cache on writes down k logits a token, which --loss {config.loss} cannot learn from: topk")
    if any(config.step_tokens < length for length, _ in stages(config.length, config.steps)):
        raise ValueError(f"--step-tokens {config.step_tokens} is less than one row of --length {config.length}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def distill_step(teacher, student, optimizer, batch, config, autocast):
    """One optimizer step; returns the summed loss over the tokens that count, how many they are, and the norm.

    teacher: the model, or None for --loss ce and where the batch brings its answers. batch: ids, doc (b, l) int64,
    kind (b, l) uint8, and perhaps the teacher's likeliest logits and their places, (b, l, k).
    """
    ids, doc, kind, *answers = batch
    targets, learned = ids[:, 1:], kind[:, 1:] != data.NOT_LEARNED
    count = learned.sum()
    if answers:
        told = answers[0][:, :-1].float(), answers[1][:, :-1].long()
    elif teacher is not None:
        with torch.no_grad(), autocast():
            told = teacher.features(ids, seq_idx=doc)[:, :-1], teacher.lm_head.weight
    else:
        told = None
    with autocast():
        x = student.features(ids, seq_idx=doc)[:, :-1]
        total, _ = distill_loss(
            x, student.lm_head.weight, learned, config.loss, told, targets, config.temperature, config.topk
        )
    (total / count.clamp_min(1)).backward()  # the lean optimizer has made its update when this returns
    if isinstance(optimizer, Lean):
        norm = optimizer.squares.sqrt()
        optimizer.squares = torch.zeros_like(norm)
    else:
        norm = parallel.clip(student.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total.detach(), count, norm


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class Staged(data.PhasedLoader):
    """Batches of stages, each from a loader of its own. starts: the first step of every stage."""

    def __init__(self, loaders, starts):
        self.loaders, self.starts, self.step = loaders, starts, 0


class Noise:
    """Random tokens in place of a data set, one document a row, all learned: a `data.Loader`'s three methods."""

    def __init__(self, vocab, rows, length, seed):
        self.vocab, self.shape, self.seed, self.position = vocab, (rows, length), seed, 0

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]

    def next(self):
        ids = np.random.default_rng([self.seed, self.position]).integers(0, self.vocab, self.shape)
        self.position += 1
        return ids, np.zeros_like(ids), np.full(self.shape, data.TEXT, np.uint8)


class Run(train.Run):
    """A distillation: saved, stopped and resumed as a run of train.py, on one process."""

    def __init__(self, config):
        self.started, self.world, self.rank = time.time(), 1, 0
        self.config = config = check(config)
        self.stages = stages(config.length, config.steps)
        self.device, why_device = choose_device(config.device)
        dtype, why_dtype = choose_dtype(config.dtype, self.device)
        if dtype == torch.float16:
            raise ValueError("float16 gradients would need scaling, which is not done here: give --dtype float32")
        lean = config.optimizer == "lean"
        self.dtype = torch.bfloat16 if lean else dtype
        weights = torch.bfloat16 if lean else torch.float32  # of both: a copy's distance is zero
        self.out = Path(config.out)
        self.state_file, self.stable_file = self.out / "training.safetensors", self.out / "stable.safetensors"
        self.settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_THE_RUN}
        self.check_out()
        self.steps = sum(n for _, n in self.stages)
        self.config = config = replace(config, steps=self.steps)

        self.teacher, theirs = open_model(config.teacher, self.device, weights)
        self.model, own = open_model(config.student, self.device, weights)
        self.tokenizer = one_language(self.teacher, self.model, (theirs, own))
        self.teacher.requires_grad_(False)
        compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda" and not lean)
        for model in (self.teacher, self.model):
            impl, why_impl = choose_impl(config.impl, self.device, model.config, compiled)
            model.use(impl)
        recompute = config.recompute == "layers" or (config.recompute == "auto" and lean)
        pair = self.teacher.config, self.model.config
        need = needed_bytes(*pair, self.stages[-1][0], config.step_tokens, lean, recompute, self.dtype.itemsize, impl)
        total = sizes.count_parameters
        self.save_every = config.save_every if config.save_every is not None else 100 * (self.tokenizer is not None)
        self.say(f"device    {self.device} ({why_device}); torch {torch.__version__}")
        self.say(f"dtype     {str(self.dtype)[6:]} matrix products ({'lean' if lean else why_dtype})")
        for role, c in zip(("teacher", "student"), pair):
            self.say(f"{role}   {getattr(config, role)}: " + sizes.describe(c).replace("\n", "\n          "))
        self.say(f"          {total(pair[1])['total'] / total(pair[0])['total']:.1%} of the teacher's parameters")
        self.say(f"loss      {config.loss}, temperature {config.temperature:g}")
        told = ", then ".join(f"{n} steps of {config.step_tokens // l} rows of {l}" for l, n in self.stages)
        self.say(f"stages    {told}; peak rate {config.lr:g} ({config.optimizer})")
        unit, of = (2**30, "GiB") if need["total"] >= 2**30 else (2**20, "MiB")
        self.say("memory    about " + ", ".join(f"{k} {v / unit:,.2f}" for k, v in need.items()) + f" {of}")
        self.say(f"impl      {impl} ({why_impl}){'; layers are computed again in the backward' * recompute}")
        held = need["teacher"] + need["weights"] + need["gradients"] + need["optimizer"]
        if held > parallel.room_gib(self.device) * 2**30:
            raise ValueError(
                f"teacher, student, gradients and optimizer need {held / 2**30:.1f} GiB and {self.device} has "
                f"{parallel.room_gib(self.device):.1f}: " + ("smaller models" if lean else "try --optimizer lean")
            )

        if recompute:
            parallel.recompute_layers(self.model)
        if compiled:
            torch.set_float32_matmul_precision("high")
            for block in (*self.teacher.backbone.layers, *self.model.backbone.layers):
                block.compile(dynamic=False)
        if lean:
            groups = train.parameter_groups(self.model, config.weight_decay)
            self.optimizer = Lean(groups, config.lr).in_backward()
        else:
            self.optimizer = train.make_optimizer(self.model, config.lr, config.weight_decay)
        cast = not lean and self.dtype != torch.float32
        self.autocast = lambda: torch.autocast(self.device.type, self.dtype, enabled=cast)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        torch.manual_seed(config.seed)
        self.starts = [sum(n for _, n in self.stages[:i]) for i in range(len(self.stages))]
        self.marks = {s: f"rows of {l}" for s, (l, _) in zip(self.starts, self.stages) if s}
        self.load_data()
        self.step, self.log, self.seconds_before = 0, [], 0.0
        if self.state_file.exists():
            self.resume(self.state_file)
        self.out.mkdir(parents=True, exist_ok=True)
        self.start_log()
        if config.eval_count and self.tokenizer and not any("before" in e for e in self.log):
            exams = {"boundary": "start", "step": 0, "teacher": self.exam(self.teacher, "teacher")}
            self.record(exams | {"before": self.exam(self.model, "student before")})
        if config.loss == "ce" or self.answers:
            self.teacher = None  # its memory is free for the student
        self.clock = time.time()
        self.say(f"ready after {self.clock - self.started:.0f} s; distilling (Ctrl-C saves)")

    def load_data(self):
        """A loader for each stage, with the teacher's answers if they are to be written down first."""
        config, loaders, prints, self.held_out = self.config, [], [], {}
        self.answers = config.cache == "on"
        vocab = self.model.config.vocab_size
        if self.tokenizer is None:
            self.say("data      random tokens, as neither model has a tokenizer: this measures memory and speed only")
        for i, (length, steps) in enumerate(self.stages):
            rows = config.step_tokens // length
            if self.tokenizer is None:
                loaders.append(Noise(vocab, rows, length, config.seed + i))
                continue
            asked = SimpleNamespace(
                out=self.out / f"stage{i + 1}", text=config.text, text_share=config.text_share, batch_rows=rows,
                data_rows=max(rows, config.data_rows or steps * rows), phases="", length=length,
                vocab=self.tokenizer.vocab_size, seed=config.seed,
            )  # fmt: skip
            folder, _, self.held_out = data.make(asked, os.cpu_count() or 1, self.say, self.tokenizer)
            extra = ()
            if self.answers:
                with self.autocast():  # as a live teacher would be asked
                    extra = teacher_cache.write(folder, self.teacher, config.topk, rows, self.say)
            loaders.append(data.Loader(folder, rows, seed=config.seed, extra=extra))
            prints.append(data.fingerprint(folder))
        self.loader, self.fingerprint = Staged(loaders, self.starts), " ".join(prints)

    def train(self):
        """Steps until the last one; False if Ctrl-C or SIGTERM came first. Signals only take effect between steps."""
        config, signals = self.config, []
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: signals.append(number) or train.insist(signals))
        self.model.train()
        sums, tokens, since, first = torch.zeros(2, device=self.device), 0, time.time(), self.step
        while self.step < self.steps:
            batch = [torch.from_numpy(array).to(self.device, non_blocking=True) for array in self.loader.next()]
            share = schedule.wsd(self.step, self.steps, config.warmup, config.decay, shape=config.decay_shape)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * share
            total, count, norm = distill_step(self.teacher, self.model, self.optimizer, batch, config, self.autocast)
            sums += torch.stack([total, count])
            self.step, tokens = self.step + 1, tokens + batch[0].numel()
            if self.step % config.log_every == 0 or self.step in (1, self.steps):
                self.record(self.line(sums.tolist(), norm.item(), tokens, time.time() - since, self.step - first))
                sums, tokens, since, first = torch.zeros_like(sums), 0, time.time(), self.step
            done = self.step == self.steps
            if self.save_every and (self.step % self.save_every == 0 or done):
                self.save(folder=done)
            if not done and signals:
                self.save(folder=True)
                command = "python " + " ".join(map(train.shlex.quote, sys.argv))
                self.say(f"stopped at step {self.step}; saved in {self.out}. The same command goes on: {command}")
                return False
        return True

    def line(self, sums, norm, tokens, elapsed, steps):
        """What happened since the last line: one for people, one for log.jsonl (returned)."""
        stage = sum(s < self.step for s in self.starts)
        rate = self.optimizer.param_groups[0]["lr"]
        done = sum(min(n, max(0, self.step - s)) * (self.config.step_tokens // l) * l
                   for s, (l, n) in zip(self.starts, self.stages))  # fmt: skip
        entry = {
            "step": self.step, "tokens": done, "seconds": round(self.seconds(), 2), "loss": sums[0] / max(1, sums[1]),
            "norm": norm, "lr": rate, "stage": stage, "length": self.stages[stage - 1][0],
            "tokens_per_second": tokens / elapsed, "memory_gib": memory_gib(self.device),
        }  # fmt: skip
        if not math.isfinite(entry["loss"] + norm):
            raise ValueError(
                f"the loss is {entry['loss']} and the gradient's norm {norm} at step {self.step}: lower --lr "
                f"(now {self.config.lr:g})"
            )
        self.say(
            f"step {self.step:5d}/{self.steps}  {self.config.loss} {entry['loss']:.4f} nats  norm {norm:.2f}  "
            f"lr {rate:.1e}  {entry['tokens_per_second']:,.0f} tok/s  {entry['memory_gib']:.1f} GiB  "
            f"{(self.steps - self.step) * elapsed / steps / 60:.1f} min left"
        )
        return entry

    def exam(self, model, name):
        levels = (1, 2, 3) if self.device.type == "cpu" else None  # a GPU has time for those beyond
        found = recovery.exam(model, self.tokenizer, self.held_out, levels, self.config.eval_count)
        told = [f"{k} {v:.1%}" for k, v in found["exact"].items()]
        told += [f"{k} {v:.3f} bits/byte" for k, v in found["bits"].items()]
        self.say(f"{name}: exact " + ", ".join(told))
        return found

    def finish(self):
        """The end: the exam again, which part of the gap to the teacher is closed, a plot; returns the last record."""
        result = {"step": self.step, "seconds": round(self.seconds(), 1)}
        start = next((e for e in self.log if "before" in e), None)
        if start:
            after = self.exam(self.model, "student after")
            result |= {"teacher": start["teacher"], "before": start["before"], "after": after}
            result["recovered"] = recovery.recovered(start["teacher"], start["before"], after)
            told = ", ".join(f"{k} {v:.0%}" for k, v in result["recovered"].items() if v is not None)
            self.say(f"of the gap to the teacher is closed: {told}")
        recovery.plot(self.log, self.out / "distillation.png", self.marks, self.config.loss)
        result["wall_seconds"] = round(time.time() - self.started, 1)
        self.record(result)
        return result


def run(config):
    """Distil, or go on; returns the closing record, or None if it was stopped."""
    job = Run(config)
    return job.finish() if job.train() else None


def main(argv=None):
    advice = "lower --step-tokens, or give --recompute layers"
    return finish("distill", lambda: run(train.parse(argv, DistillConfig, __file__, __doc__)), advice)


if __name__ == "__main__":
    sys.exit(main())
