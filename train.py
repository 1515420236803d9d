"""Pretraining: the main job. `python train.py` needs no flags.

It picks a device and a preset that fits, makes its data from what is on the machine, trains with the report's schedule
(warm-up, stable, decay), answers a few questions as it learns, and ends with a table of accuracies, a plot and a
checkpoint folder. Ctrl-C saves; the same command resumes, on a CPU to the last bit. `torchrun --nproc-per-node N
train.py` does the same job on N processes (parallel.py).

To follow one training step, read in this order: `Loader.next` (data.py), `Objective.forward` and `train_step` (here),
`NemotronH.features` (model.py), `Mamba2Mixer.forward` (mamba2.py). This file must not know alignment.

Source: report section 2.2-2.4 (warmup-stable-decay, AdamW 0.9/0.95, weight decay 0.1). Learning rates, batch sizes and
step counts are ours: what a model of this size needs.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from device import choose_device, choose_dtype, choose_fp8, choose_impl, memory_gib, peak_flops  # isort: skip
import torch
import torch.distributed as dist
import torch.nn as nn

import branch
import checkpoint
import curriculum
import curve
import data
import evaluate
import fp8
import parallel
import resume
import schedule
import tasks
from generate import answer
from loss import next_token_loss
from model import PRESETS, build
from schedule import wsd
from sizes import describe, flops_per_token


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

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a training step
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """AdamW 0.9/0.95. Decay pulls matrices and embeddings only; norms, A_log, D, dt_bias and biases are scales and
    offsets whose natural value is not zero."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


class Objective(nn.Module):
    """Model and loss in one module, so that torch.compile and DDP see one forward."""

    def __init__(self, model, token_bytes, impl="torch"):
        super().__init__()
        self.model, self.impl = model, impl
        self.register_buffer("token_bytes", token_bytes, persistent=False)  # (vocab,): for bits per byte

    def forward(self, ids, doc, kind):
        """ids, doc (b, l) int64; kind (b, l) uint8. Returns five sums over this batch's targets: the loss of task and
        of text targets in nats, their numbers, and the bytes of the text targets."""
        x = self.model.features(ids, seq_idx=doc)[:, :-1]
        targets, kind = ids[:, 1:], kind[:, 1:]
        task, text = kind == data.TASK, kind == data.TEXT
        # at every position: shapes that change cost more than they save
        total, nll = next_token_loss(x, self.model.lm_head.weight, targets, task | text, self.impl)
        of_text = (nll * text).sum()  # a plain number: the gradient is all in `total`
        sums = total - of_text, of_text
        return torch.stack([*sums, task.sum(), text.sum(), (self.token_bytes[targets] * text).sum()])


def train_step(objective, optimizer, scaler, batch, config, autocast, world):
    """One optimizer step over this rank's rows of the global batch; returns the summed statistics and the norm.

    The loss is the mean over all targets of all parts and processes: each part's sum is divided by the global count,
    so accumulation and processes give the gradient of one big batch whatever the split.
    """
    ids, doc, kind = batch
    count = (kind[:, 1:] != data.NOT_LEARNED).sum().float()
    if world > 1:
        dist.all_reduce(count)
    total = torch.zeros(5, device=ids.device)
    parts = list(zip(*(t.chunk(config.accumulate) for t in batch)))
    for i, part in enumerate(parts):
        with parallel.between_parts(objective, last=i + 1 == len(parts)):
            with autocast():
                sums = objective(*part)
            loss = (sums[0] + sums[1]) / count * world  # gradients are averaged over processes: undo that
            scaler.scale(loss).backward()
        total += sums.detach()
    scaler.unscale_(optimizer)
    norm = parallel.clip(objective.parameters(), config.clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


NOT_THE_RUN = {
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


class Run:
    """One training run: what was decided, the objects it needs, where it is, and how it is saved and resumed."""

    def __init__(self, config):
        self.started = time.time()
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device, device_reason = choose_device(config.device)
        dtype, dtype_reason = choose_dtype(config.dtype, self.device)
        self.trunk = starts = None
        if config.branch:
            config, self.trunk, starts = branch.inherit(config, NOT_THE_RUN)
        self.config = config = fill_in(config, self.device)
        divided = parallel.check(config.parallel, config.recompute, dtype, self.world)
        compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda")
        impl, impl_reason = choose_impl(config.impl, self.device, PRESETS[config.preset], compiled)
        self.fp8, fp8_reason = choose_fp8(config.fp8, self.device, dtype)
        if config.batch_rows % (self.world * config.accumulate):
            raise ValueError(
                f"--batch-rows {config.batch_rows} cannot be split over {self.world} processes times "
                f"{config.accumulate} parts"
            )
        self.out = Path(config.out)
        self.state_file, self.stable_file = self.out / "training.safetensors", self.out / "stable.safetensors"
        self.settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_THE_RUN}
        self.settings["fp8"] = "off" if self.fp8 == "off" else "on"  # who multiplies is not the run, as with impl
        self.check_out()
        parallel.start(self.device, self.world)

        # What was decided, and why
        self.model_config = replace(
            PRESETS[config.preset], vocab_size=config.vocab or PRESETS[config.preset].vocab_size
        )
        self.tokens = config.batch_rows * config.length
        memory = parallel.training_bytes(
            self.model_config, self.tokens // self.world // config.accumulate, config.length, dtype.itemsize,
            self.world, config.parallel, config.recompute, impl,
        )  # fmt: skip
        parallel.check_room(memory, self.device, self.world, config.preset)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        self.say(
            f"device    {self.device} ({device_reason}{threads}); processes: {self.world}; torch {torch.__version__}"
        )
        self.say(f"dtype     {str(dtype)[6:]} matrix products ({dtype_reason}); weights, optimizer, SSM state float32")
        self.say(f"preset    {config.preset}: " + describe(self.model_config).replace("\n", "\n          "))
        self.say(
            f"step      {config.batch_rows} rows of {config.length} = {self.tokens:,} tokens, in {config.accumulate} "
            f"part(s); {config.steps} steps = {config.steps * self.tokens / 1e6:.1f} M tokens; peak rate {config.lr:g}"
        )
        self.starts = starts or curriculum.starts(config.steps, curriculum.boundaries(config.phases))
        self.marks = {s: f"blend {i} begins" for i, s in enumerate(self.starts[1:], 2)}
        self.fall = schedule.decay_start(config.steps, config.decay)
        if self.fall:
            self.marks[self.fall] = ", ".join([*filter(None, [self.marks.get(self.fall)]), "the rate begins to fall"])
        told = schedule.describe(config.steps, config.warmup, config.decay, config.decay_shape, self.starts)
        self.say(f"schedule  {told}")
        self.say(f"parallel  {divided}")
        self.say(f"memory    {parallel.describe_memory(memory)}")
        self.say(f"impl      {impl} ({impl_reason})")
        self.say(f"fp8       {self.fp8} ({fp8_reason})")
        self.say(f"compile   {'on (the first step takes half a minute)' if compiled else 'off: plain PyTorch'}")

        # Data: rank 0 prepares, the others wait and then find it there
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        if self.trunk and self.rank == 0:
            branch.bring_data(self.trunk.parent, self.out)
        folder, self.tokenizer, self.held_out = data.make(config, os.cpu_count() or 1, self.say)
        if self.world > 1 and self.rank == 0:
            dist.barrier()
        given = config.batch_rows, self.rank, self.world, config.seed
        self.loader = data.PhasedLoader(folder, self.starts, *given) if config.phases else data.Loader(folder, *given)
        self.fingerprint = data.fingerprint(folder)

        torch.manual_seed(config.seed)
        self.model = build(self.model_config, self.device).use(impl)
        if self.fp8 != "off":
            self.use_fp8()
        self.objective = Objective(self.model, evaluate.token_bytes(self.tokenizer).to(self.device), impl)
        if config.recompute == "layers":
            parallel.recompute_layers(self.model)
        if compiled:  # layer by layer: equal layers share one compiled graph, half a minute instead of several
            torch.set_float32_matmul_precision("high")
            for block in self.model.backbone.layers:
                block.compile(dynamic=False)
        self.objective = parallel.divide(self.objective, config.parallel, self.device, dtype, self.world, compiled)
        self.optimizer = make_optimizer(self.model, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.autocast = lambda: torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.step, self.log, self.seconds_before = 0, [], 0.0
        if self.state_file.exists() or self.trunk:
            self.resume(self.state_file if self.state_file.exists() else self.trunk)
        if self.rank == 0:
            temporary = self.out / "log.jsonl.tmp"  # a kill leaves the old log or the new one
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log))
            os.replace(temporary, self.out / "log.jsonl")
        self.clock = time.time()
        self.say(f"ready after {self.clock - self.started:.0f} s; training (Ctrl-C saves)")

    def use_fp8(self):
        """Let the inner matmuls train in eight bits, and say which. Before anything is compiled."""
        stack = self.model.backbone.layers
        fp8.convert_(stack, fp8.Recipe(impl=self.fp8))
        lines = fp8.describe(stack).split("\n")
        part = self.tokens // (self.world * self.config.accumulate)
        if part % fp8.BLOCK:
            lines.append(
                f"a part's {part:,} tokens are no multiple of {fp8.BLOCK}: the products over tokens, of the weights' "
                f"gradients, are filled up to {fp8.padded(part):,}"
            )
        lines.append("at the end the saved weights are judged as they are, without eight bits")
        self.say("fp8       " + "\n          ".join(lines))

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def seconds(self):
        """Seconds of training so far, earlier lives of the run included."""
        return self.seconds_before + time.time() - self.clock

    def check_out(self):
        """The folder must be one that can be written, and a run in it is only resumed with the settings that shape it.
        It is created later, with the data, when nothing can be wrong with the flags any more."""
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "may not be written to" if there.is_dir() else "is a file"
            raise ValueError(f"--out {self.out} cannot be used, because {there} {why}: give another folder")
        if self.state_file.exists():
            before = resume.peek_training(self.state_file).get("config", {})
            unknown = {f.name: f.default for f in fields(TrainConfig)}  # to a folder made before there was such a flag
            before = unknown | before
            changed = [f"{k} {before[k]!r} -> {v!r}" for k, v in self.settings.items() if before[k] != v]
            if changed:
                raise ValueError(
                    f"{self.out} holds a run with other settings ({', '.join(changed[:4])}): use the same flags to "
                    "resume it, or another --out, or delete the folder to start anew"
                )

    def resume(self, file):
        if resume.peek_training(file).get("data", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"the data of {self.out} cannot be made again, because the text on this machine, or this program, has "
                "changed since: give another --out to start anew"
            )
        loop = resume.load_training(file, self.model, self.optimizer)
        self.step, self.seconds_before = loop["step"], loop["seconds"]
        self.loader.restore(loop["loader"])
        self.scaler.load_state_dict(loop["scaler"])
        log = file.parent / "log.jsonl"
        if self.rank == 0 and log.exists():  # forget what was logged after the checkpoint
            entries = map(_entry, log.read_text("utf-8", "replace").splitlines())
            kept = (e for e in entries if e.keys() & {"loss", "boundary"})
            self.log = [e for e in kept if e.get("step", 0) <= self.step]
        what = "resume    " if file == self.state_file else f"branch    from {file} "
        self.say(f"{what}at step {self.step} of {self.config.steps}")
        if "decay_shape" not in loop["config"] and self.config.decay:
            self.say(
                "          begun before --decay-shape: a falling rate was cut off at a hundredth of the peak and now "
                "glides there, which changes it by less than that hundredth"
            )

    def save(self, folder=False, stable=False):
        """The training state, and with `folder` also the checkpoint folder that generate.py opens. stable: the copy
        that a branch starts from."""
        if self.rank > 0:
            parallel.help_save(self.model, self.optimizer, folder)
        else:
            loop = {"step": self.step, "seconds": self.seconds(), "config": self.settings,
                    "loader": self.loader.state(), "data": self.fingerprint, "starts": self.starts,
                    "scaler": self.scaler.state_dict()}  # fmt: skip
            if folder:  # first: a kill in between then repeats some steps, and the folder is written again
                checkpoint.save_pretrained(self.out, self.model, self.tokenizer)
            file = self.stable_file if stable else self.state_file
            resume.save_training(file, self.model, self.optimizer, loop)

    def record(self, entry):
        self.log.append(entry)
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")

    def stop_asked(self, signals):
        """Whether any process was asked to stop: all of them stop after the same step."""
        if self.world == 1:
            return bool(signals)
        asked = torch.tensor(float(bool(signals)), device=self.device)
        dist.all_reduce(asked)
        return asked.item() > 0

    def train(self):
        """Steps until the last one; False if Ctrl-C or SIGTERM came first. Signals only take effect between steps."""
        config, signals = self.config, []
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda number, frame: signals.append(number) or _insist(signals))
        questions = tasks.bench_questions()
        window = Window(self)
        self.model.train()
        while self.step < config.steps:
            before = time.time()
            batch = [torch.from_numpy(array) for array in self.loader.next()]
            window.waited += time.time() - before
            if self.device.type == "cuda":
                batch = [t.pin_memory().to(self.device, non_blocking=True) for t in batch]
            share = wsd(self.step, config.steps, config.warmup, config.decay, shape=config.decay_shape)
            rate = config.lr * share
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            sums, norm = train_step(
                self.objective, self.optimizer, self.scaler, batch, config, self.autocast, self.world
            )
            window.sums += sums
            self.step += 1
            if self.step % config.log_every == 0 or self.step in (1, config.steps):
                self.record(window.close(norm, rate))
            every = config.sample_every
            if every and (self.step % every == 0 or self.step == config.steps // 20):
                before = time.time()
                self.ask([questions[(self.step // every + i) % len(questions)] for i in (0, 3)])
                window.start += time.time() - before
            if self.step in self.marks and config.phases:
                before = time.time()
                self.boundary()
                window.start += time.time() - before
            if self.step == self.fall:
                self.save(stable=True)
            if self.step % config.save_every == 0 or self.step == config.steps:
                self.save(folder=self.step == config.steps)
            if self.step < config.steps and self.stop_asked(signals):
                self.save(folder=True)
                command = "python " + " ".join(map(shlex.quote, sys.argv))
                self.say(f"stopped at step {self.step}; saved in {self.out}. The same command goes on: {command}")
                return False
        return True

    def ask(self, questions):
        """Answer questions and show the thoughts: what people watch while it learns."""
        model = parallel.plain_copy(self.model, self.rank)
        if model is None:
            return
        with torch.compiler.set_stance("force_eager"):  # answers have all lengths: nothing to compile for
            for s in questions:
                done = answer(model, self.tokenizer, s.question, max_new_tokens=len(s.trace + s.answer) + 24)
                right = tasks.check(s, done.answer) and tasks.check_trace(s, done.thought)
                thought = " / ".join(done.thought.split("\n"))[:110]
                self.say(
                    f"    {s.question}  <think> {thought} </think>  {done.answer[:30]!r} {'(right)' if right else ''}"
                )
        self.model.train()

    def exam(self, model, count, levels):
        """Held-out bits a byte and, if `count`, exact answers by family and level: the part of a record with both."""
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            bits = {
                kind: evaluate.bits_per_byte(model, self.tokenizer, texts, self.config.length)
                for kind, texts in self.held_out.items()
                if texts
            }
            table = count and evaluate.accuracy(model, self.tokenizer, levels=levels, count=count)
        self.model.train()
        self.say("held-out text: " + ", ".join(f"{k} {v:.3f} bits/byte" for k, v in bits.items()))
        return {"held_out_bits_per_byte": bits} | ({"accuracy": table} if count else {})

    def boundary(self):
        """Where a blend ends or the rate begins to fall: what the model can do, and what it has been reading."""
        model = parallel.plain_copy(self.model, self.rank)
        if model is None:
            return
        phase = curriculum.phase_of(self.step - 1, self.starts)
        entry = {"step": self.step, "tokens": self.step * self.tokens, "boundary": self.marks[self.step],
                 "phase": phase + 1, "intended": self.loader.intended[phase],
                 "realised": self.loader.realised[phase]}  # fmt: skip
        self.say(f"step {self.step:5d}: {entry['boundary']}; before it:")
        entry |= self.exam(model, self.config.phase_eval, (1, 2, 3))
        if self.config.phase_eval:
            self.say(", ".join(f"{k} {v:.1%} exact" for k, v in evaluate.by_kind(entry["accuracy"]).items()))
        self.record(entry)

    def finish(self):
        """The end of a run: bits per byte on held-out text, accuracy by family, a plot; returns the closing record."""
        config, model = self.config, parallel.plain_copy(self.model, self.rank)
        if model is None:
            return None
        result = {"step": self.step, "seconds": round(self.seconds(), 1)}
        self.say(f"trained {config.steps} steps in {self.seconds():.0f} s")
        levels = (1, 2, 3) if self.device.type == "cpu" else None  # a GPU has time for those beyond
        result |= self.exam(model, config.eval_count, levels)
        if config.eval_count:
            self.say(f"trace and answer exact on {config.eval_count} held-out questions each, free generation:")
            self.say(evaluate.format_table(result["accuracy"]))
        curve.plot(
            self.log, self.out / "curve.png", {step * self.tokens / 1e6: label for step, label in self.marks.items()}
        )
        result["wall_seconds"] = round(time.time() - self.started, 1)
        self.record(result)
        self.say(f"\nall done in {result['wall_seconds']:.0f} s. Next, a new question, or none to chat:")
        self.say(f'  python generate.py --checkpoint {shlex.quote(str(self.out))} "What is 58 + 67?"')
        return result


class Window:
    """What happened since the last line of the log."""

    def __init__(self, run):
        self.run, self.peak = run, peak_flops(run.device)
        self.flops = 3 * flops_per_token(run.model_config, run.config.length)  # forward and backward
        self.open()

    def open(self):
        self.sums = torch.zeros(5, device=self.run.device)
        self.start, self.waited, self.first = time.time(), 0.0, self.run.step

    def close(self, norm, rate):
        """One line for people, one entry for log.jsonl (returned). ValueError if the loss is no longer a number."""
        run, config = self.run, self.run.config
        if run.world > 1:
            dist.all_reduce(self.sums)
        task, text, tasks_n, text_n, text_bytes = self.sums.tolist()  # waits for the device
        elapsed, steps = time.time() - self.start, run.step - self.first
        speed = steps * run.tokens / elapsed
        entry = {
            "step": run.step, "tokens": run.step * run.tokens, "seconds": round(run.seconds(), 2),
            "loss": (task + text) / max(1, tasks_n + text_n), "task_loss": task / max(1, tasks_n),
            "bits_per_byte": text / math.log(2) / text_bytes if text_bytes else None, "norm": norm.item(), "lr": rate,
            "phase": curriculum.phase_of(run.step - 1, run.starts) + 1,
            "tokens_per_second": speed, "mfu": speed * self.flops / self.peak / run.world if self.peak else None,
            "memory_gib": memory_gib(run.device), "waiting": self.waited / elapsed,
        }  # fmt: skip
        if not math.isfinite(entry["loss"]):
            raise ValueError(f"the loss is {entry['loss']} at step {run.step}: lower --lr (now {config.lr:g})")
        bits = f"{entry['bits_per_byte']:.2f} bits/byte  " if text_bytes else ""
        peak = " of the bf16 peak" if run.fp8 == "real" else ""
        mfu = f"MFU {entry['mfu']:.1%}{peak}  " if self.peak else ""
        left = (config.steps - run.step) * elapsed / steps / 60
        run.say(
            f"step {run.step:5d}/{config.steps}  loss {entry['loss']:.3f}  tasks {entry['task_loss']:.3f}  {bits}"
            f"norm {entry['norm']:.2f}  lr {rate:.1e}  {speed:,.0f} tok/s  {mfu}{entry['memory_gib']:.1f} GiB  "
            f"waiting {entry['waiting']:.1%}  {left:.1f} min left"
        )
        self.open()
        return entry


def run(config):
    """Train, or go on training; returns the closing record, or None if it was stopped."""
    job = Run(config)
    if not job.train():
        return None
    result = job.finish()
    if job.world > 1:
        dist.barrier()
    return result


def _entry(line):
    """A line of log.jsonl; {} for one that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _insist(signals):
    if len(signals) > 1:
        raise KeyboardInterrupt  # asked twice: stop at once; the last save stands


def parse(argv=None, kind=TrainConfig, file=__file__, doc=__doc__):
    """A dataclass from the command line: each field is a flag, its comment in `file` the help."""
    comments = {}
    for line in Path(file).read_text("utf-8").splitlines():
        name, _, comment = line.strip().partition("  # ")
        if ": " in name and " = " in name:
            comments.setdefault(name.split(":")[0], comment)
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = evaluate.refuse
    for f in fields(kind):
        of = next((t for t in (int, float) if t.__name__ in str(f.type)), str)
        default = "suits the preset" if f.default is None else f.default
        text = (comments.get(f.name) or f.name.replace("_", " ")).replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=of, default=f.default, help=f"{text} ({default})")
    return kind(**vars(parser.parse_args(argv)))


def main(argv=None):
    try:
        run(parse(argv))
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("train.py: out of memory: raise --accumulate, or lower --batch-rows or --length", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
