"""Does the pretraining recipe do what it is for? Runs of nano-12m that differ in one thing each.

    python notebooks/recipe_twins.py --seeds 3 --out assets/recipe_twins.json

The trunk of all arms: warm-up, a constant rate to 82 % of the steps, a linear fall (the report's proportions); rows of
512 tokens, one blend of tasks and text, bfloat16 products. The arms:

    bf16                the trunk itself
    bf16 again          the same once more: a GPU adds in no fixed order, so this is how far apart equal runs end up
    fp8                 the inner matmuls in block-scaled E4M3 (fp8.py, emulated), the first and last four not
    fp8, every layer    the first and last four as well
    fp8, one scale      one scale a tensor instead of blocks and tiles, for gradients, too
    fp8, real           as fp8, but multiplied by the tensor cores of Hopper (left out elsewhere)
    phases              bf16; three blends that begin at 0, 60 and 90 % (curriculum.py) in place of one

Arms with the same seed start from the same weights and, all but the last, read the same rows in the same order. The
bf16 run keeps its state at 82 % and, after its end, goes on from there once more with the rate left where it was: the
control of the decay. All is scored on held-out text and held-out questions.

At its end every fp8 run also tells how far its gradients reach (`ranges`): of the gradient that enters a layer's
backward, the share of numbers that eight bits make zero, and of tokens that lose all of theirs, with one scale and
with tiles along n, as dgrad takes them, on a batch that is read again.

Each run is a process of its own; several share a GPU, because small kernels leave most of it idle.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device import choose_device, choose_dtype, choose_fp8  # isort: skip  (before torch)
import torch

import curriculum
import data
import evaluate
import fp8
from model import PRESETS, build
from schedule import decay_start, wsd
from tokenizer import Tokenizer
from train import RUNS, Objective, TrainConfig, make_optimizer, train_step

FP8 = fp8.Recipe()
ARMS = {  # recipe and how many matmuls at each end stay out of it; None: no FP8
    "bf16": None,
    "phases": None,
    "fp8": (FP8, 4),
    "fp8, every layer": (FP8, 0),
    "fp8, one scale": (fp8.Recipe("tensor"), 4),
    "fp8, real": (fp8.Recipe(impl="real"), 4),
    "bf16 again": None,
}
WARMUP, DECAY, LAST = 0.02, 0.18, 0.1  # shares of the steps; the last is where losses are compared
PHASES = "0.6,0.9"


def settings(preset, steps, rows, out, phases=""):
    """What data.make and train_step want to know."""
    run = RUNS.get(preset, RUNS["nano-12m"])
    config = replace(TrainConfig(), preset=preset, out=str(out), steps=steps, phases=phases)
    config = replace(config, **{k: v for k, v in run.items() if getattr(config, k) is None})
    return replace(config, batch_rows=rows or config.batch_rows, data_rows=steps * (rows or config.batch_rows))


def folder_of(config):
    return Path(config.out) / ("phases" if config.phases else "one")


@torch.enable_grad()
def ranges(objective, batch, autocast):
    """Of the gradient that enters each FP8 layer: {"layer", "zero", "lost"}, the share of its numbers, other than
    zeros, that become zero, and of its tokens that become nothing but zeros; each with one scale ("tensor") and with
    tiles of 1 x 128 ("block")."""
    found, hooks = [], []

    def look(name, module, _, grads):
        g = grads[0].flatten(0, -2).float()
        there, row = {"layer": name}, (g != 0).any(1)
        for scaling in ("tensor", "block"):
            codes = fp8.quantise(g, fp8.TILES[scaling][0]).numbers()
            there[scaling] = {
                "zero": ((codes == 0) & (g != 0)).sum().item() / max(1, (g != 0).sum().item()),
                "lost": (row & (codes == 0).all(1)).sum().item() / max(1, row.sum().item()),
            }
        found.append(there)

    for name, module in objective.model.backbone.layers.named_modules():
        if isinstance(module, fp8.Fp8Linear):
            hooks.append(module.register_full_backward_hook(partial(look, name)))
    with torch.compiler.set_stance("force_eager"), autocast():
        sums = objective(*batch)
        ((sums[0] + sums[1]) / batch[0].numel()).backward()
    for hook in hooks:
        hook.remove()
    return found[::-1]


def train_arm(arm, seed, config, device, dtype, count, say=print):
    """One run and, for bf16, its control; returns a list of records."""
    config = replace(config, seed=seed)
    data_folder = folder_of(config) / "data"
    if config.phases:
        starts = curriculum.starts(config.steps, curriculum.boundaries(config.phases))
        loader = data.PhasedLoader(data_folder, starts, config.batch_rows, seed=seed)
    else:
        loader = data.Loader(data_folder, config.batch_rows, seed=seed)
    tokenizer = Tokenizer.load(data_folder)
    held_out = json.loads((folder_of(config) / "held_out.json").read_text("utf-8"))
    torch.manual_seed(seed)
    model = build(replace(PRESETS[config.preset], vocab_size=config.vocab), device)
    if ARMS[arm]:
        recipe, ends = ARMS[arm]
        fp8.convert_(model.backbone.layers, recipe, first=ends, last=ends)
    objective = Objective(model, evaluate.token_bytes(tokenizer).to(device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        for block in model.backbone.layers:
            block.compile(dynamic=False)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    scaler, start = torch.amp.GradScaler(device.type, enabled=False), time.time()

    def batch():
        return [torch.from_numpy(array).to(device) for array in loader.next()]

    def steps(first, share):
        model.train()
        sums, kept = [], None
        for step in range(first, config.steps):
            if step == fall:
                kept = [deepcopy(model.state_dict()), deepcopy(optimizer.state_dict()), loader.state()]
            for group in optimizer.param_groups:
                group["lr"] = config.lr * share(step)
            sums.append(train_step(objective, optimizer, scaler, batch(), config, autocast, 1)[0])
            if step in (first, first + 9):
                sums[-1].tolist()  # waits for the device
                say(f"{arm}, seed {seed}: step {step + 1} after {time.time() - start:.0f} s", flush=True)
        return torch.stack(sums).double().cpu(), kept

    def scored(name, sums):
        losses = ((sums[:, 0] + sums[:, 1]) / (sums[:, 2] + sums[:, 3])).tolist()
        end = sums[-max(1, round(LAST * config.steps)) :].sum(0)
        window, last = max(1, config.steps // 100), max(1, round(LAST * config.steps))
        record = {
            "arm": name, "seed": seed, "loss": statistics.mean(losses[-last:]),
            "task_loss": (end[0] / end[2]).item(), "text_loss": (end[1] / end[3]).item(),
            "losses": [
                round(statistics.mean(losses[i : i + window]), 5) for i in range(0, len(losses) - window + 1, window)
            ],
        }  # fmt: skip
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            record["bits"] = {
                k: evaluate.bits_per_byte(model, tokenizer, t, config.length, 64) for k, t in held_out.items()
            }
            if count:
                table = evaluate.accuracy(model, tokenizer, levels=(1, 2, 3, 4), count=count)
                record["exact"] = {name: {n: cell["exact"] for n, cell in of.items()} for name, of in table.items()}
        return record

    fall = decay_start(config.steps, DECAY)
    sums, kept = steps(0, lambda step: wsd(step, config.steps, WARMUP, DECAY))
    records = [scored(arm, sums)]
    if ARMS[arm]:
        model.train()
        records[0]["ranges"] = ranges(objective, batch(), autocast)
    if arm == "bf16":
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        loader.restore(kept[2])
        records.append(scored("bf16, no fall", steps(fall, lambda step: 1.0)[0]))
    for record in records:
        record["seconds"] = round(time.time() - start, 1)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def prepare(config, say):
    """The rows of one blend or of three, and the held-out text; the same for every seed."""
    own = replace(config, out=str(folder_of(config)), seed=0)
    _, _, held_out = data.make(own, os.cpu_count() or 1, say)
    (folder_of(config) / "held_out.json").write_text(json.dumps(held_out), "utf-8")


def start_record(args, plan, out, command, dtype):
    """The record to fill: what it is about, and of an earlier one in `out` the runs that are not in the plan."""
    record = {
        "commands": [command], "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__, "dtype": str(dtype)[6:], "date": date.today().isoformat(), "preset": args.preset,
        "steps": args.steps, "rows": args.rows, "length": RUNS.get(args.preset, RUNS["nano-12m"])["length"], "runs": [],
    }  # fmt: skip
    same = ("preset", "steps", "rows", "length", "card", "dtype")
    if out.exists():  # more arms or seeds
        before = read_record(out)
        if [before.get(k) for k in same] != [record[k] for k in same]:
            raise ValueError(f"--out {out} holds runs with other {', '.join(same)}: give another file")
        record["commands"] = before["commands"] + record["commands"]
        record["runs"] = [r for r in before["runs"] if (r["arm"].replace(", no fall", ""), r["seed"]) not in set(plan)]
    return record


def read_record(path):
    """The record in that file; ValueError if it holds none."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        assert isinstance(record["commands"], list) and all({"arm", "seed"} <= run.keys() for run in record["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
        raise ValueError(f"{path} is no record of recipe_twins.py: {type(e).__name__} {e}") from None
    return record


def places_of(together):
    """Which card each process sits on: `together` times every card that may be used, "" for the CPU."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    cards = allowed[:count] if len(allowed) >= count > 0 and allowed[0] else [str(i) for i in range(count)]
    return (cards or [""]) * together


def collect(args, plan, record, out, say):
    """Run the plan, a process on every place; `out` gets every run as soon as it is there. Returns how many failed."""
    places, order, failed, lock = Queue(), [*ARMS, "bf16, no fall"], [], Lock()
    for place in places_of(args.together):
        places.put(place)

    def one(job):
        arm, seed = job
        place, part = places.get(), Path(args.work) / f"{arm} {seed}.json"
        words = [sys.executable, __file__, "--one", arm, str(seed), "--out", str(part), "--preset", args.preset]
        words += ["--steps", str(args.steps), "--rows", str(args.rows), "--work", args.work, "--count", str(args.count)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": place} if place else {})
        done = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True)
        places.put(place)
        if done.returncode:
            failed.append(job)
            say(f"{arm}, seed {seed} failed: {done.stderr.strip()[-600:]}", flush=True)
            return
        made = json.loads(part.read_text("utf-8"))
        with lock:  # one process after the other
            runs = record["runs"] + [r | {"commit": args.commit} for r in made]
            record["runs"] = sorted(runs, key=lambda r: (order.index(r["arm"]), r["seed"]))
            temporary = out.with_name(out.name + ".tmp")
            temporary.write_text(json.dumps(record), "utf-8")
            os.replace(temporary, out)
        say(f"{arm}, seed {seed}: loss {made[0]['loss']:.4f}, {made[-1]['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(places.qsize()) as pool:
        list(pool.map(one, plan))
    return len(failed)


def gaps(record, arm, value, base="bf16"):
    """How far, relatively, value(run) of an arm's runs is from the base arm's with the same seed."""
    of = {r["seed"]: r for r in record["runs"] if r["arm"] == base}
    return [value(r) / value(of[r["seed"]]) - 1 for r in record["runs"] if r["arm"] == arm and r["seed"] in of]


def exact(run, kind, levels):
    """Mean share of held-out questions right to the letter, over the families of a kind and some levels."""
    table = {name: {n: {"exact": of[n]} for n in map(str, levels)} for name, of in run["exact"].items()}
    return evaluate.by_kind(table)[kind]


def tables(record):
    """The record as text: from the record alone."""
    runs = {
        arm: [r for r in record["runs"] if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in record["runs"])
    }
    about = (
        f"`{'`, `'.join(record['commands'])}`, {record['date']}, {record['card']}, torch {record['torch']}, "
        f"{record['dtype']} beside FP8; {record['preset']}, "
        f"{record['steps']} steps of {record['rows']} x {record['length']} tokens = "
        f"{record['steps'] * record['rows'] * record['length'] / 1e6:.1f} M tokens."
    )

    def told(shares):
        mean = f"{statistics.mean(shares):+.2%}" if shares else "-"
        return mean + (f" ± {statistics.stdev(shares):.2%}" if len(shares) > 1 else "")

    lines = [
        "| arm | seeds | loss, last 10 % | from bf16 | worst seed | held-out prose | held-out code |",
        "|" + "---|" * 7,
    ]
    for arm, of in runs.items():
        if arm == "phases":  # other data: its training loss is another question
            loss, cells = "-", ["-", "-"]
        else:
            apart = gaps(record, arm, lambda r: r["loss"])
            loss = f"{statistics.mean(r['loss'] for r in of):.4f}"
            cells = ["-", "-"] if arm == "bf16" or not apart else [told(apart), f"{max(apart, key=abs):+.2%}"]
        for kind in ("prose", "code"):
            bits = f"{statistics.mean(r['bits'][kind] for r in of):.3f}"
            of_kind = gaps(record, arm, lambda r, kind=kind: r["bits"][kind])
            cells.append(bits if arm == "bf16" else f"{bits} ({told(of_kind)})")
        lines.append(f"| {arm} | {len(of)} | {loss} | " + " | ".join(cells) + " |")
    text = [about, "\n".join(lines)]

    lines = ["| arm | seeds | reasoning 1-3 | reasoning 4 | retrieval 1-3 | retrieval 4 |", "|" + "---|" * 6]
    for arm, of in runs.items():
        of = [r for r in of if "exact" in r]
        if of:
            cells = []
            for kind, levels in (
                ("reasoning", (1, 2, 3)),
                ("reasoning", (4,)),
                ("retrieval", (1, 2, 3)),
                ("retrieval", (4,)),
            ):
                shares = [exact(r, kind, levels) for r in of]
                cells.append(f"{statistics.mean(shares):.1%} ({min(shares):.0%} to {max(shares):.0%})")
            lines.append(f"| {arm} | {len(of)} | " + " | ".join(cells) + " |")
    if len(lines) > 2:
        text.append("Exact answers to held-out questions; levels 1 to 3 are trained (lowest and highest seed):")
        text.append("\n".join(lines))

    lines = ["| arm | zero, one scale | zero, tiles | tokens lost, one scale | tokens lost, tiles |", "|" + "---|" * 5]
    for arm, of in runs.items():
        layers = [layer for r in of for layer in r.get("ranges", [])]
        if layers:
            cells = []
            for what in ("zero", "lost"):
                for scaling in ("tensor", "block"):
                    shares = [layer[scaling][what] for layer in layers]
                    cells.append(f"{statistics.mean(shares):.2%} (at most {max(shares):.2%})")
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    if len(lines) > 2:
        text.append(
            "Gradients that enter the FP8 layers at the end of training, as dgrad takes them, mean over layers and "
            "seeds (worst layer):"
        )
        text.append("\n".join(lines))
    return "\n\n".join(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = evaluate.refuse
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to add seeds to a record that is there (0)")
    parser.add_argument("--out", default="assets/recipe_twins.json", help="where to write the results")
    parser.add_argument("--preset", default="nano-12m", choices=PRESETS, metavar="NAME", help="the model (nano-12m)")
    parser.add_argument("--steps", type=int, default=640, help="optimizer steps of a run (640)")
    parser.add_argument("--rows", type=int, default=64, help="rows in a step (64); lower it when memory runs out")
    parser.add_argument("--count", type=int, default=32, help="held-out questions for each family and level (32)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"only these of: {'; '.join(ARMS)}")
    parser.add_argument("--together", type=int, default=4, help="processes that share a GPU, or the CPU (4)")
    parser.add_argument("--work", default="out/recipe_twins", help="folder for data and parts")
    parser.add_argument("--commit", default="unknown", help="what to call the code's state in the record")
    parser.add_argument("--source", metavar="FILE", help="run nothing: print the tables of this earlier record")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        for name, low in (("seeds", 1), ("steps", 20), ("rows", 1), ("together", 1), ("count", 0), ("first_seed", 0)):
            if getattr(args, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(args, name)}")
        if args.source:
            try:
                print(tables(read_record(args.source)))
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"--source {args.source} cannot be used: {type(e).__name__} {e}") from None
            return 0
        out = Path(args.out)
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
        device, _ = choose_device("auto")
        dtype, _ = choose_dtype("auto", device)
        if dtype == torch.float16:
            raise ValueError("this card has no bfloat16, which the twins compare eight bits with: use a newer one")
        one, three = (settings(args.preset, args.steps, args.rows, args.work, phases) for phases in ("", PHASES))
        if args.one:
            arm, seed = args.one[0], int(args.one[1])
            records = train_arm(arm, seed, three if arm == "phases" else one, device, dtype, args.count)
            out.write_text(json.dumps(records), "utf-8")
            return 0
        arms = args.arms or list(ARMS)
        if "fp8, real" in arms:
            try:
                choose_fp8("real", device, dtype)
            except ValueError as why:
                print(f"without the arm 'fp8, real': {why}")
                arms.remove("fp8, real")
        plan = [(arm, seed) for arm in arms for seed in range(args.first_seed, args.first_seed + args.seeds)]
        words = sys.argv[1:] if argv is None else argv
        record = start_record(args, plan, out, shlex.join(["python", "notebooks/recipe_twins.py", *words]), dtype)
        for config in [one] * any(arm != "phases" for arm in arms) + [three] * ("phases" in arms):
            prepare(config, partial(print, flush=True))
        failed = collect(args, plan, record, out, print)
        if record["runs"]:
            print(f"{out} has {len(record['runs'])} runs\n\n{tables(record)}")
        if failed:
            print(f"recipe_twins.py: {failed} of {len(plan)} runs failed, see above", file=sys.stderr)
            return 1
    except (ValueError, OSError) as e:
        print(f"recipe_twins.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
