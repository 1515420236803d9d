"""Does compression do what it is for? Runs of nano-12m that are cut, and distilled, in one way each.

    python notebooks/compression_twins.py --seeds 3 --out assets/compression_twins.json

Each seed has a parent of its own, trained by the recipe of recipe_twins.py: warm-up, a constant rate, a linear fall,
one blend. All that follows is made of it, and reads the parent's own data in another order. A run is one of these:

    axes       no training: what each axis costs when the least important, any, or the most important goes; with every
               tap and aggregate, every measure of layers, and widths made up for (prune.py's rescale)
    depth      22 layers become 20, 18 and 16, attention kept, and learn from as many tokens each. As in the report's
               Table 9 parameters are *not* equal: fewer layers are also less to compute
    width      at 20 layers, shapes of equal parameters, with and without Mamba heads cut (Table 10)
    recovery   nano-9m, distilled with a tenth of the parent's tokens: four losses; forward KL with one thing changed

Runs of a seed start from the same parent; those of one shape from the same cut, unless cutting is what differs. All
are scored on the same held-out text and questions. "The gap closed" is the share of the way from the cut model to the
parent.

What changes in recovery, beside the loss: the peak rate; half or a quarter of the rows in more steps; a *better cut*,
in which neurons are measured after their activation and narrower norms made up for; layers first, and the widths after
half of the tokens, as in the report.

A worker process does several runs one after another; several workers share a GPU, because small kernels leave most of
it idle. Runs are not compiled: at some hundred steps each, with shapes of their own, that would take longer than it
saves. What is done lies in --work, and a second call does what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device import choose_device, choose_dtype, choose_impl  # isort: skip  (before torch)
import torch
from compression_tables import figure, tables
from recipe_twins import DECAY, WARMUP, folder_of, prepare, settings

import calibration
import data
import evaluate
import importance as imp
from checkpoint import load_pretrained, save_pretrained
from distill import DistillConfig, distill_step
from model import PRESETS, build
from prune import CUT, cut, make_plan
from schedule import wsd
from search import held_bytes
from sizes import count_parameters, memory_bytes
from tokenizer import Tokenizer
from train import RUNS, Objective, make_optimizer, train_step

DRAWS, CONTEXT = 5, 4096  # random cuts of each size; tokens beside the weights


@dataclass(frozen=True)
class Arm:
    part: str  # the table it belongs to
    shape: str = "target"  # a key of SHAPES
    share: float = 0.1  # of the parent's tokens that it reads; 0: it is only cut
    loss: str = "kl"
    lr: float = 1e-3
    rows: float = 1.0  # of the usual rows in a step
    better: bool = False  # neurons by what leaves them, and the norms rescaled
    apart: bool = False  # the layers go first, the widths after half of the tokens


HALF = dict(rows=0.5)
ARMS = {  # the first ones first, should time run out
    "pruned": Arm("recovery", share=0),
    "kl": Arm("recovery"),
    "axes": Arm("axes", share=0),
    "ce": Arm("recovery", loss="ce"),
    "reverse": Arm("recovery", loss="reverse"),
    "topk": Arm("recovery", loss="topk"),
    "kl, half the rows": Arm("recovery", **HALF),
    "kl, better cut, half the rows": Arm("recovery", better=True, **HALF),
    "ce, half the rows": Arm("recovery", loss="ce", **HALF),
    "FFN + embedding": Arm("width", "width 0", 0.05),
    "heads + FFN + embedding": Arm("width", "width 1", 0.05),
    "heads + FFN": Arm("width", "width 2", 0.05),
    "depth 1": Arm("depth", "depth 1", 0.05),
    "depth 2": Arm("depth", "depth 2", 0.05),
    "depth 3": Arm("depth", "depth 3", 0.05),
    "kl, twice the rate": Arm("recovery", lr=2e-3),
    "kl, half the rate": Arm("recovery", lr=5e-4),
    "pruned, better cut": Arm("recovery", share=0, better=True),
    "kl, better cut": Arm("recovery", better=True),
    "kl, layers first": Arm("recovery", apart=True),
    "kl, better cut, a quarter of the rows": Arm("recovery", better=True, rows=0.25),
}
EQUAL = None  # neurons: as many as make the parameters those of "width 0"
SHAPES = {  # (hidden, neurons, Mamba heads) and the layers removed
    "nano-12m": {
        "target": ((224, 784, 16), {"M": 1, "-": 1}),
        "width 0": ((224, 784, 16), {"M": 1, "-": 1}),
        "width 1": ((224, EQUAL, 12), {"M": 1, "-": 1}),
        "width 2": ((256, EQUAL, 12), {"M": 1, "-": 1}),
        "depth 1": (None, {"M": 1, "-": 1}),
        "depth 2": (None, {"M": 2, "-": 2}),
        "depth 3": (None, {"M": 3, "-": 3}),
    },
    "nano-1m": {
        "target": ((112, 384, 4), {"-": 1}),
        "width 0": ((112, 224, 4), {"-": 1}),
        "width 1": ((120, EQUAL, 2), {"-": 1}),
        "width 2": ((128, EQUAL, 2), {"-": 1}),
        "depth 1": (None, {"-": 1}),
        "depth 2": (None, {"M": 1, "-": 1}),
        "depth 3": (None, {"M": 1, "-": 2}),
    },
}
ROWS = {"nano-12m": 16, "nano-1m": 8}  # in a step of distillation
SAMPLES = {"nano-12m": 256, "nano-1m": 64}  # rows of calibration
USUAL = dict(preset="nano-12m", steps=1000, rows=64, length=0, count=32, impl="auto")
AXES = {"hidden_size": "embedding channels", "intermediate_size": "FFN neurons", "mamba_num_heads": "Mamba heads",
        "mamba_head_dim": "head channels"}  # fmt: skip


def sizes_of(config, preset, shape):
    """The ModelConfig with a shape's widths, and the layers it loses by letter; the pattern is still the whole one."""
    widths, remove = SHAPES[preset][shape]
    if widths is None:
        return config, remove
    names = ("hidden_size", "intermediate_size", "mamba_num_heads")
    if EQUAL not in widths:
        return replace(config, **dict(zip(names, widths))), remove
    total = lambda c: count_parameters(shorter(c, remove))["total"]
    one, two = (replace(config, **dict(zip(names, (widths[0], n, widths[2])))) for n in (1, 2))
    wanted = total(sizes_of(config, preset, "width 0")[0])
    return replace(one, intermediate_size=1 + round((wanted - total(one)) / (total(two) - total(one)))), remove


def shorter(config, remove):
    """The config without the last layers of each letter: of equal size, whichever go."""
    pattern = config.hybrid_override_pattern
    for letter, n in remove.items():
        for _ in range(n):
            at = pattern.rindex(letter)
            pattern = pattern[:at] + pattern[at + 1 :]
    return replace(config, hybrid_override_pattern=pattern)


# ---------------------------------------------------------------------------------------------------------------------
# One seed's runs
# ---------------------------------------------------------------------------------------------------------------------


class Lab:
    """What all runs of a seed share: the data, the questions, the parent and the rows it is measured on."""

    def __init__(self, args, seed, say=print):
        self.args, self.seed, self.say, self.removals = args, seed, say, {}
        self.device, _ = choose_device("auto")
        self.dtype, _ = choose_dtype("auto", self.device)
        torch.set_num_threads(1 if self.device.type == "cpu" else 2)  # several workers share the processor
        self.config = replace(settings(args.preset, args.steps, args.rows, args.work), seed=seed)
        if args.length:
            self.config = replace(self.config, length=args.length)
        self.folder, self.parent = folder_of(self.config) / "data", Path(args.work) / f"parent {seed}"
        self.tokenizer = Tokenizer.load(self.folder)
        self.held_out = json.loads((folder_of(self.config) / "held_out.json").read_text("utf-8"))
        self.tokens = args.steps * self.config.batch_rows * self.config.length  # what a parent reads
        self.at_once = max(1, (16384 if self.device.type == "cuda" else 4096) // self.config.length)
        self.autocast = partial(torch.autocast, self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, loader):
        return [torch.from_numpy(array).to(self.device) for array in loader.next()]

    def train_parent(self):
        """The parent into its folder; returns its record."""
        config, start = self.config, time.time()
        loader = data.Loader(self.folder, config.batch_rows, seed=self.seed)
        torch.manual_seed(self.seed)
        model = build(replace(PRESETS[config.preset], vocab_size=self.tokenizer.vocab_size), self.device)
        objective = Objective(model, evaluate.token_bytes(self.tokenizer).to(self.device))
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            for block in model.backbone.layers:
                block.compile(dynamic=False)
        optimizer = make_optimizer(model, config.lr, config.weight_decay)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        model.train()
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * wsd(step, config.steps, WARMUP, DECAY)
            train_step(objective, optimizer, scaler, self.batch(loader), config, self.autocast, 1)
        save_pretrained(self.parent, model, self.tokenizer)
        record = {"tokens": self.tokens, "steps": config.steps} | self.described(model.config)
        del model, objective, optimizer
        return record | self.scores(self.whole()) | {"seconds": round(time.time() - start, 1)}

    def whole(self):
        """The parent from its folder."""
        return self.serve(load_pretrained(self.parent, self.device)[0])

    def serve(self, model):
        """With the fastest layers that need no long compilation."""
        return model.use(choose_impl(self.args.impl, self.device, model.config)[0])

    def described(self, config):
        kept = {n: getattr(config, n) for n in (*CUT, "vocab_size")} | {"pattern": config.hybrid_override_pattern}
        return {"config": kept, "parameters": count_parameters(config)["total"]}

    def rows(self):
        """(rows to measure importance on, other rows to see what a cut costs), the second the same for all seeds."""
        if not hasattr(self, "_rows"):
            length, vocab = self.config.length, self.tokenizer.vocab_size
            samples, text = SAMPLES[self.args.preset], self.config.text
            self._rows = calibration.make(self.tokenizer, vocab, samples, length, self.seed, text)[:2]
        return self._rows

    def loss(self, model):
        """Nats a token on fresh rows."""
        return calibration.loss(model.eval(), self.rows()[1], self.at_once)

    def scores(self, model):
        """Loss on fresh rows, bits a byte of held-out text, and exact answers to held-out questions of levels 1 to 3,
        all by family."""
        with torch.compiler.set_stance("force_eager"):
            found = {"loss": self.loss(model)}
            found["bits"] = {
                kind: evaluate.bits_per_byte(model, self.tokenizer, text, self.config.length, max_tokens=50_000)
                for kind, text in self.held_out.items()
            }
            if self.args.count:
                table = evaluate.accuracy(model, self.tokenizer, levels=(1, 2, 3), count=self.args.count)
                found["exact"] = {name: {n: c["exact"] for n, c in of.items()} for name, of in table.items()}
        return found

    def cut_down(self, model, remove, sizes, better=False):
        """A smaller model by the plan of prune.py: layers by iterative removal, then the widths."""
        known, key = self.removals, str(remove)  # of the parent; later cuts remove nothing
        batch = calibration.batches(self.rows()[0], self.at_once)
        impl = model.impl
        model.eval().use("torch")  # measured in float32, for which no kernel is compiled here
        if key not in known:
            known[key] = [i for i, _ in imp.depth_order(model, batch, remove).removed]
        scores = None
        if any(getattr(sizes, name) != getattr(model.config, name) for name in CUT):
            scores = imp.importance(model, batch, known[key], tap="post" if better else "pre")
        smaller = cut(model, make_plan(model.config, sizes, known[key], scores), rescale=better)
        model.use(impl)
        return self.serve(smaller)

    def run(self, name):
        """One run of ARMS; returns its record."""
        arm, start = ARMS[name], time.time()
        if arm.part == "axes":
            return {"cuts": self.axes(), "seconds": round(time.time() - start, 1)}
        if not hasattr(self, "_teacher"):
            self._teacher = self.whole().requires_grad_(False)
        teacher = self._teacher
        sizes, remove = sizes_of(teacher.config, self.args.preset, arm.shape)
        loader, rows = None, max(1, round(ROWS[self.args.preset] * arm.rows))
        tokens, losses, before = int(arm.share * self.tokens), [], None
        if arm.share:
            loader = data.Loader(self.folder, rows, seed=[self.seed, 1])
        steps = tokens // (rows * self.config.length)
        if arm.apart:
            student = self.cut_down(teacher, remove, teacher.config)
            before = self.loss(student)
            losses = self.distil(teacher, student, arm, loader, steps // 2)
            student = self.cut_down(student, {}, sizes, arm.better)
            losses += self.distil(teacher, student, arm, loader, steps - steps // 2)
        else:
            student = self.cut_down(teacher, remove, sizes, arm.better)
            before = self.loss(student)
            losses = self.distil(teacher, student, arm, loader, steps)
        window = max(1, steps // 50)
        record = {"steps": steps, "tokens": steps * rows * self.config.length, "before": before}
        means = [sum(losses[i : i + window]) / window for i in range(0, len(losses) - window + 1, window)]
        record["losses"] = [round(mean, 5) for mean in means]
        trained = round(time.time() - start, 1)
        record |= self.described(student.config) | self.scores(student) | {"trained": trained}
        return record | {"seconds": round(time.time() - start, 1)}

    def distil(self, teacher, student, arm, loader, steps):
        """Train the student in place; returns the loss of every step."""
        config = replace(DistillConfig(), loss=arm.loss, lr=arm.lr)
        optimizer, sums = make_optimizer(student.train(), config.lr, config.weight_decay), []
        for step in range(steps):
            share = wsd(step, steps, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * share
            told = None if arm.loss == "ce" else teacher
            total, count, _ = distill_step(told, student, optimizer, self.batch(loader), config, self.autocast)
            sums.append(torch.stack([total, count]))
        return [a / max(1, b) for a, b in torch.stack(sums).tolist()] if sums else []

    def axes(self):
        """[{"axis", "size", "of", "ranked", "random": [...], "reversed", ...}]: losses on fresh rows of cut models."""
        model = self.whole().use("torch")
        c, batch, found = model.config, calibration.batches(self.rows()[0], self.at_once), []
        scores = {
            (tap, aggregate): imp.importance(model, batch, (), aggregate, tap)
            for tap in imp.TAPS for aggregate in imp.AGGREGATES
        }  # fmt: skip
        usual = scores["pre", "l2"]

        def width(sizes, of=usual, rank="ranked", seed=0, rescale=False):
            return self.loss(cut(model, make_plan(c, sizes, [], of, rank, seed), rescale))

        for name, axis in AXES.items():
            for share in (7 / 8, 3 / 4) if name == "hidden_size" else (3 / 4, 1 / 2):
                size, step = getattr(c, name), c.n_groups if name == "mamba_num_heads" else 1
                kept = round(size * share / step) * step
                if kept == size or kept in [f["size"] for f in found if f["axis"] == axis]:
                    continue
                sizes = replace(c, **{name: kept})
                found.append({
                    "axis": axis, "size": kept, "of": size, "ranked": width(sizes),
                    "random": [width(sizes, rank="random", seed=draw) for draw in range(DRAWS)],
                    "reversed": width(sizes, rank="reversed"), "rescaled": width(sizes, rescale=True),
                    "by": {f"{tap}, {aggregate}": width(sizes, of) for (tap, aggregate), of in scores.items()},
                })  # fmt: skip
        counts = [sum(SHAPES[self.args.preset][f"depth {n}"][1].values()) for n in (1, 2, 3)]
        without = lambda order, n: self.loss(cut(model, make_plan(c, c, order[:n])))
        order = lambda *a, **k: [i for i, _ in imp.depth_order(model, batch, counts[-1], *a, **k).removed]
        least = {method: order(method) for method in imp.METHODS}
        most = order(rank="reversed")
        any_ = [order(rank="random", seed=draw) for draw in range(DRAWS)]
        for n in counts:
            found.append({
                "axis": "layers", "size": c.num_hidden_layers - n, "of": c.num_hidden_layers,
                "ranked": without(least["iterative"], n), "random": [without(own, n) for own in any_],
                "reversed": without(most, n), "by": {method: without(own, n) for method, own in least.items()},
                "removed": {method: own[:n] for method, own in least.items()},
            })  # fmt: skip
        return found


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def part_of(args, name, seed):
    return Path(args.work) / f"{name} {seed}.json"


def work(args, seed, names):
    """In a worker: these runs of a seed, one after another; each leaves a part as soon as it is done."""
    lab = Lab(args, seed)
    for name in names:
        if time.time() > args.until:
            print(f"seed {seed}: no time left for {name}", flush=True)
            continue
        try:
            record = lab.train_parent() if name == "parent" else lab.run(name)
        except Exception:  # a run that fails must not take the others along
            print(f"{name}, seed {seed} failed: {traceback.format_exc()[-900:]}", flush=True)
            continue
        part = "parent" if name == "parent" else ARMS[name].part
        record = {"arm": name, "part": part, "seed": seed, "commit": args.commit} | record
        file = part_of(args, name, seed)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(record), "utf-8")
        os.replace(temporary, file)
        told = f"loss {record['loss']:.4f}, " if "loss" in record else ""
        print(f"{name}, seed {seed}: {told}{record['seconds']:.0f} s", flush=True)


def launch(args, gpu, seed, names):
    """A worker process; its words go where ours go."""
    words = [sys.executable, __file__, "--one", str(seed), *names, "--preset", args.preset, "--work", args.work]
    for name in ("steps", "rows", "count", "commit", "length", "impl", "until"):
        words += [f"--{name}", str(getattr(args, name))]
    subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)})


def start_record(args, out):
    """What the record is about. ValueError if --work or `out` holds other runs."""
    record = {
        "command": "python notebooks/compression_twins.py" + "".join(
            f" --{name} {getattr(args, name)}" for name, usual in USUAL.items() if getattr(args, name) != usual
        ),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__,
        "date": date.today().isoformat(), "preset": args.preset, "steps": args.steps, "rows": args.rows,
        "length": args.length or RUNS[args.preset]["length"], "count": args.count, "runs": [], "memory": [],
    }  # fmt: skip
    same = ("preset", "steps", "rows", "length", "count", "card")
    file, seeds = Path(args.work) / "settings.json", range(args.first_seed, args.first_seed + args.seeds)
    for place, flag in ((file, "--work"), (out, "--out")):
        if place.exists():
            before = json.loads(place.read_text("utf-8"))
            if [before.get(k) for k in same] != [record[k] for k in same]:
                raise ValueError(f"{flag} {place} holds runs with other {', '.join(same)}: give another")
            record["runs"] = before["runs"]
    remade = [seed for seed in seeds if not (Path(args.work) / f"parent {seed}").is_dir()]
    record["runs"] = [r for r in record["runs"] if r["seed"] not in remade]  # another parent, other runs
    for name in ("parent", *ARMS):
        for seed in remade:
            part_of(args, name, seed).unlink(missing_ok=True)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record | {"runs": []}), "utf-8")
    return record


def gather(args, record, out):
    """Add all parts that are there, and write the record."""
    order = ["parent", *ARMS]
    runs = {(r["arm"], r["seed"]): r for r in record["runs"]}
    for name in order:
        for file in Path(args.work).glob(f"{name} *.json"):
            part = json.loads(file.read_text("utf-8"))
            runs[part["arm"], part["seed"]] = part
    record["runs"] = sorted(runs.values(), key=lambda r: (order.index(r["arm"]), r["seed"]))
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(record), "utf-8")
    os.replace(temporary, out)


def collect(args, record, out, say, begin=launch):
    """Parents first, then all else that is missing, `args.together` workers a GPU."""
    seeds, places = range(args.first_seed, args.first_seed + args.seeds), Queue()
    gpus = max(1, torch.cuda.device_count())
    for gpu in [*range(gpus)] * args.together:
        places.put(gpu)

    def one(job):
        gpu = places.get()
        begin(args, gpu, *job)
        places.put(gpu)

    def done(name, seed):
        known = any((r["arm"], r["seed"]) == (name, seed) for r in record["runs"])
        return known and (name != "parent" or (Path(args.work) / f"parent {seed}").is_dir())

    gather(args, record, out)  # what a call that was stopped left
    for stage in ("parents", "runs"):
        jobs = []
        for seed in seeds:
            missing = [n for n in (["parent"] if stage == "parents" else args.arms) if not done(n, seed)]
            if stage == "runs" and not done("parent", seed):
                say(f"seed {seed} has no parent: its runs are left out")
                continue
            workers = min(len(missing), max(1, gpus * args.together // len(seeds)))
            jobs += [(seed, missing[i::workers]) for i in range(workers)]
        with ThreadPoolExecutor(places.qsize()) as pool:
            running = [pool.submit(one, job) for job in jobs]
            while not all(job.done() for job in running):
                time.sleep(0.2)
                gather(args, record, out)
        for job in running:
            job.result()
        gather(args, record, out)


def measure_memory(record, device):
    """Of every shape that was tried, the formula's bytes and those really held, with a row of CONTEXT tokens."""
    shapes = {}
    for run in record["runs"]:
        if "config" in run:
            c = replace(PRESETS[record["preset"]], hybrid_override_pattern=run["config"]["pattern"])
            c = replace(c, **{name: run["config"][name] for name in (*CUT, "vocab_size")})
            key = (*(getattr(c, name) for name in CUT), *(c.hybrid_override_pattern.count(x) for x in "M*-"))
            shapes.setdefault(key, (run["arm"], c))
    return [
        {"arm": arm, "shape": list(key), "tokens": CONTEXT, "formula": memory_bytes(c, CONTEXT)["total"],
         "held": held_bytes(c, CONTEXT, 1, device)}
        for key, (arm, c) in shapes.items()
    ]  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = evaluate.refuse
    parser.add_argument("--seeds", type=int, default=3, help="parents, each with all runs (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to add seeds to a record that is there (0)")
    parser.add_argument("--out", default="assets/compression_twins.json", help="where to write the results")
    parser.add_argument("--figure", metavar="FILE", help="also draw accuracy by family into this file")
    parser.add_argument(
        "--preset", default=USUAL["preset"], choices=SHAPES, metavar="NAME", help="the parents (nano-12m)"
    )
    parser.add_argument("--steps", type=int, default=USUAL["steps"], help="optimizer steps of a parent (1000)")
    parser.add_argument("--rows", type=int, default=USUAL["rows"], help="rows in a parent's step (64)")
    parser.add_argument("--length", type=int, default=USUAL["length"], help="tokens in a row (suits the preset)")
    parser.add_argument(
        "--count", type=int, default=USUAL["count"], help="held-out questions for each family and level (32)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                        help=f"only these of: {'; '.join(ARMS)}")  # fmt: skip
    parser.add_argument("--impl", default=USUAL["impl"], help="auto, torch or triton: who computes the Mamba-2 layers")
    parser.add_argument("--together", type=int, help="workers that share a GPU (6), or the CPU (1)")
    parser.add_argument("--seconds", type=float, help="begin no run after so many seconds; a second call goes on")
    parser.add_argument("--work", default="out/compression_twins", help="folder for data, parents and parts")
    parser.add_argument("--commit", default="unknown", help="what to call the code's state in the record")
    parser.add_argument("--source", metavar="FILE", help="run nothing: print the tables of this earlier record")
    parser.add_argument("--one", nargs="+", metavar="SEED ARM", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        least = dict(seeds=1, first_seed=0, steps=20, rows=1, count=0, together=1, seconds=0)
        for name, low in least.items():
            if getattr(args, name) is not None and not getattr(args, name) >= low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(args, name)}")
        if args.source:
            try:
                record = json.loads(Path(args.source).read_text("utf-8"))
                print(tables(record))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"--source {args.source} cannot be used: {type(e).__name__} {e}") from None
            if args.figure:
                figure(record, args.figure)
            return 0
        if args.one:
            work(args, int(args.one[0]), args.one[1:])
            return 0
        out, device = Path(args.out), choose_device("auto")[0]
        choose_impl(args.impl, device)
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
        args.together = args.together or (6 if device.type == "cuda" else 1)
        args.until = time.time() + args.seconds if args.seconds is not None else float("inf")
        record, start = start_record(args, out), time.time()
        config = settings(args.preset, args.steps, args.rows, args.work)
        if args.length:
            config = replace(config, length=args.length)
        prepare(config, partial(print, flush=True))
        print(f"data after {time.time() - start:.0f} s", flush=True)
        collect(args, record, out, partial(print, flush=True))
        record["memory"] = measure_memory(record, device)
        gather(args, record, out)
        print(f"wrote {out}: {len(record['runs'])} runs, {time.time() - start:.0f} s\n")
        print(tables(record))
        if args.figure:
            figure(record, args.figure)
    except (ValueError, OSError) as e:
        print(f"compression_twins.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
