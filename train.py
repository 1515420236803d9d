"""Pretraining: the main job. `python train.py` needs no flags.

It picks a device and a preset that fits, makes its data from what is on the machine, trains with the report's schedule
(warm-up, stable, decay), answers a few questions as it learns, and ends with a table of accuracies, a plot and a
checkpoint folder. Ctrl-C saves; the same command resumes, on a CPU to the last bit. `torchrun --nproc-per-node N
train.py` does the same job on N processes (parallel.py).

To follow one training step, read in this order: `Loader.next` (data.py), `Objective.forward` and `train_step` (here),
`NemotronH.features` (model.py), `Mamba2Mixer.forward` (mamba2.py). This file must not know alignment.

The flags are in settings.py, the lines of the log in progress.py. Source: report section 2.2-2.4 (warmup-stable-decay,
AdamW 0.9/0.95, weight decay 0.1). Learning rates, batch sizes and step counts are ours.
"""

import json
import os
import shlex
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from device import choose_device, choose_dtype, choose_fp8, choose_impl  # isort: skip
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
from progress import Window, entry_of
from schedule import wsd
from settings import NOT_THE_RUN, RUNS, TrainConfig, fill_in, finish, parse  # noqa: F401  (a run and its flags: one import)
from sizes import describe

# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a training step
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(model, lr, weight_decay):
    """AdamW 0.9/0.95."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def parameter_groups(model, weight_decay):
    """Decay pulls matrices and embeddings only; norms, A_log, D, dt_bias and biases are scales and offsets whose
    natural value is not zero."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


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
            self.world, config.parallel, config.recompute, impl, self.fp8 != "off",
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
        self.start_log()
        self.clock = time.time()
        self.say(f"ready after {self.clock - self.started:.0f} s; training (Ctrl-C saves)")

    def start_log(self):
        """Write what is known of the run so far; `record` adds to it."""
        if self.rank == 0:
            temporary = self.out / "log.jsonl.tmp"  # a kill leaves the old log or the new one
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log))
            os.replace(temporary, self.out / "log.jsonl")

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
            unknown = {f.name: f.default for f in fields(self.config)}  # to a folder made before there was such a flag
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
            entries = map(entry_of, log.read_text("utf-8", "replace").splitlines())
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
            signal.signal(name, lambda number, frame: signals.append(number) or insist(signals))
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


def run(config):
    """Train, or go on training; returns the closing record, or None if it was stopped."""
    job = Run(config)
    if not job.train():
        return None
    result = job.finish()
    if job.world > 1:
        dist.barrier()
    return result


def insist(signals):
    if len(signals) > 1:
        raise KeyboardInterrupt  # asked twice: stop at once; the last save stands


def main(argv=None):
    try:
        advice = "raise --accumulate, or lower --batch-rows or --length"
        return finish("train", lambda: run(parse(argv, description=__doc__)), advice)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
