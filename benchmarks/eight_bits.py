"""`python bench.py fp8`: what eight-bit operands save at the widths of the 12B, quantising included.

Two tables. The first is about one linear layer of each shape of the 12B, and its three products (y, dx, dW) at some
number of tokens:

    bf16          the products of matrices that lie there in bfloat16: what the card can do
    as trained    the same with what training adds: the float32 master weight rounded to bfloat16, dW back to float32
    fp8           the layer as fp8.py defines it: x, W and dY become codes, each in both directions; three products
    quantising    the part of it that makes codes

The last line adds up a whole 12B: each shape as often as it stands there, the eight matmuls of its ends left out.

The second table is a whole training step (train.py's own: autocast, clipping, AdamW on float32 weights) of a stack
that has the 12B's widths and rhythm and is nine layers deep, because sixty-two would need 183 GiB. The first matmul of
it stays in bfloat16: 7 % of the weights, as at the 12B's ends. The vocabulary is small, so that head and loss, which
stay in bfloat16 anyway, weigh about as little as they do beside 62 layers.

Contestants take turns, and the product of codes is first compared with the emulated one.
"""

import json
import math
import statistics
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

from device import choose_fp8, choose_impl  # isort: skip  (before torch)
import torch

import fp8
from benchmarks import measure
from benchmarks.tables import rewrite, table
from benchmarks.timing import Bench, cpu_name, relative
from benchmarks.training import TINY, Marks, Unpacked, loss_of, make_batch
from model import PRESETS, ModelConfig, build
from sizes import count_parameters
from train import TrainConfig, make_optimizer, train_step

STACK = replace(PRESETS["nano-12b"], hybrid_override_pattern="M-M-M-M*-", vocab_size=4096)
TINY_STACK = ModelConfig(**TINY)
ENDS = 4  # matmuls at each end of the 12B that stay as they are


def shapes(config):
    """{(k, n): (names, how often)} of the matmuls of a model that train in FP8."""
    with torch.device("meta"):
        linears = [(name, m) for name, m in build(config, "meta").backbone.layers.named_modules()
                   if isinstance(m, torch.nn.Linear)]  # fmt: skip
    inside = linears[ENDS : len(linears) - ENDS]
    count = Counter((m.in_features, m.out_features) for _, m in inside)
    names = {shape: [] for shape in count}
    for name, m in inside:
        known, short = names[m.in_features, m.out_features], name.rpartition(".")[2]
        known += [short] * (short not in known)
    return {shape: (", ".join(names[shape]), n) for shape, n in count.items()}


def layer(bench, k, n, tokens, impl):
    """Milliseconds of one layer's three products, by contestant."""
    x, g = bench.normal(tokens, k, seed=0), bench.normal(tokens, n)
    master = bench.normal(n, k, dtype=torch.float32) * k**-0.5
    w, recipe, ruler = master.to(x.dtype), fp8.Recipe(impl=impl), fp8.Recipe()

    def products(w):
        return x @ w.t(), g @ w, g.t() @ x

    def trained():
        y, dx, dw = products(master.to(x.dtype))
        return y, dx, dw.float()

    def multiply(recipe, copies):
        (x0, x1), (w0, w1), (g0, g1) = copies
        return (recipe.product(x0, w0, x.dtype), recipe.product(g0, w1, x.dtype),
                recipe.product(g1, x1, torch.float32))  # fmt: skip

    def copies(recipe):
        return recipe.activation(x), recipe.weight(master), recipe.gradient(g)

    made = copies(recipe)
    found, expected = multiply(recipe, made), multiply(ruler, copies(ruler))
    offs = [relative(a, b) for a, b in zip(found, expected)]
    off = max(offs, key=lambda off: (math.isnan(off), off))
    if not off < 1e-2:  # also what is no number
        raise ValueError(f"the products of codes ({k} -> {n}) are off by {off:.1e} from the emulated ones: not timed")
    del found, expected
    contestants = {
        "bf16": lambda: products(w), "trained": trained, "fp8": lambda: multiply(recipe, copies(recipe)),
        "products": lambda: multiply(recipe, made), "quantising": lambda: copies(recipe),
    }  # fmt: skip
    race = bench.race(contestants)
    if race["failed"]:
        raise ValueError(f"{k} -> {n}: {race['failed']}")
    return {"in": k, "out": n, "tokens": tokens, "off": off, "ms": race["ms"], "spread": race["spread"]}


def steps(config, rows, length, impls, first, device, repeats, compiled, say):
    """Milliseconds of a training step of one stack for each of `impls`, in turns."""
    runs, tokens = {}, rows * length
    mixer, _ = choose_impl("auto", device, config, compiled)
    for name in impls:
        torch.manual_seed(0)
        model = build(config, device).use(mixer)
        if name != "bf16":
            fp8.convert_(model.backbone.layers, fp8.Recipe(impl=name), first=first, last=0)
        if compiled:
            torch.set_float32_matmul_precision("high")
            for block in model.backbone.layers:
                block.compile(dynamic=False)
        model.train()
        objective = Unpacked(model, torch.ones(config.vocab_size, device=device), mixer)
        optimizer = make_optimizer(model, 1e-4, 0.1)
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if device.type == "cuda" else nullcontext
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        runs[name] = partial(train_step, objective, optimizer, scaler, config=replace(TrainConfig(), accumulate=1),
                             autocast=autocast, world=1)  # fmt: skip
    times, losses = {name: [] for name in runs}, {name: [] for name in runs}
    torch.manual_seed(1)
    for i in range(repeats + 3):  # three to compile and to find memory
        batch = make_batch(rows, length, config.vocab_size, False, device)  # new tokens, the same for all
        for name, step in runs.items():
            marks = Marks(device)
            marks.mark()
            sums, _ = step(batch)
            marks.mark()
            losses[name].append(loss_of(sums))
            if i > 2:
                times[name] += marks.seconds()
    found = []
    for name in runs:
        ms = statistics.median(times[name]) * 1e3
        spread = (max(times[name]) - min(times[name])) * 1e3 / ms
        found.append({"fp8": name, "compiled": compiled, "rows": rows, "length": length, "ms": ms, "spread": spread,
                      "losses": losses[name], "parameters": count_parameters(config)["total"]})  # fmt: skip
        how, speed = "compiled" if compiled else "eager", tokens / ms * 1e3
        say(f"step      {name:8} {how:8} {ms:8.1f} ms  {speed:,.0f} tokens/s")
    return found


def measured(tiny, commit, say):
    device = torch.device("cpu" if tiny and not torch.cuda.is_available() else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("fp8 is measured on a Hopper GPU, and PyTorch sees no GPU: --tiny tries the command anywhere")
    impl = "emulate" if tiny else choose_fp8("real", device, torch.bfloat16)[0]
    bench = Bench(device, torch.bfloat16, 2 if tiny else 8, say=say)
    config = TINY_STACK if tiny else PRESETS["nano-12b"]
    if tiny:
        config = replace(config, hybrid_override_pattern="M-M-M*-M-")
    record = {
        "card": torch.cuda.get_device_name() if bench.cuda else cpu_name(), "torch": torch.__version__,
        "date": date.today().isoformat(), "commit": commit or measure.commit(),
        "command": "python bench.py fp8" + " --tiny" * tiny, "layers": [], "steps": [],
    }  # fmt: skip
    for tokens in (32,) if tiny else (8192, 16384):
        for (k, n), (names, count) in shapes(config).items():
            row = layer(bench, k, n, tokens, impl) | {"names": names, "count": count}
            record["layers"].append(row)
            ms = row["ms"]
            say(f"{names:24} {k:6} -> {n:6}  {tokens:6} tokens  " + "  ".join(f"{k} {v:.2f}" for k, v in ms.items()))
    if bench.cuda:
        bench.wipe = None
        torch.cuda.empty_cache()
    for compiled in (False,) if tiny else (False, True):
        stack, rows, length = (TINY_STACK, 2, 64) if tiny else (STACK, 2, 8192)
        record["steps"] += steps(stack, rows, length, ("bf16", impl), 1, device, 2 if tiny else 6, compiled, say)
        if bench.cuda:
            torch.cuda.empty_cache()
    return record


def tables(record):
    """The record as text: from the record alone."""
    lines, flops = [], lambda row: 6 * row["in"] * row["out"] * row["tokens"]
    head = ["layer", "in -> out", "tokens", "bf16, ms", "as trained", "fp8", "of it quantising",
            "fp8 products, TFLOP/s", "bf16, TFLOP/s", "fp8 over bf16", "over as trained"]  # fmt: skip
    kinds = ("bf16", "trained", "fp8", "quantising", "products")

    def line(name, sides, tokens, ms, work):
        return [name, sides, f"{tokens:,}", *(f"{ms[kind]:.2f}" for kind in kinds[:4]),
                f"{work / ms['products'] / 1e9:,.0f}", f"{work / ms['bf16'] / 1e9:,.0f}",
                f"{ms['bf16'] / ms['fp8']:.2f}x", f"{ms['trained'] / ms['fp8']:.2f}x"]  # fmt: skip

    for tokens in sorted({row["tokens"] for row in record["layers"]}):
        rows = [row for row in record["layers"] if row["tokens"] == tokens]
        for row in rows:
            lines.append(line(row["names"], f"{row['in']:,} -> {row['out']:,}", tokens, row["ms"], flops(row)))
        total = {kind: sum(row["ms"][kind] * row["count"] for row in rows) for kind in kinds}
        work = sum(flops(row) * row["count"] for row in rows)
        lines.append(line(f"all {sum(row['count'] for row in rows)}", "", tokens, total, work))
    text = [table(head, lines)]
    lines = []
    for row in record["steps"]:
        base = next(r for r in record["steps"] if r["fp8"] == "bf16" and r["compiled"] == row["compiled"])
        apart = max(abs(a / b - 1) for a, b in zip(row["losses"], base["losses"]))
        lines.append([
            "bf16" if row["fp8"] == "bf16" else f"fp8, {row['fp8']}", "on" if row["compiled"] else "off",
            f"{row['ms']:.1f}", f"{row['rows'] * row['length'] / row['ms'] * 1e3:,.0f}",
            f"{base['ms'] / row['ms']:.2f}x",
            f"{apart:.2%}" if row is not base else "-",
        ])  # fmt: skip
    one = record["steps"][0]
    text.append(
        f"A training step of {one['rows']} x {one['length']:,} tokens, {one['parameters'] / 1e9:.2f} B parameters:"
    )
    text.append(table(["matmuls", "torch.compile", "ms a step", "tokens/s", "faster", "loss apart, at most"], lines))
    return "\n\n".join(text)


def command(write=False, out="out/bench_fp8.json", source=None, commit=None, tiny=False):
    """Measure (or take the record `source`) and print the tables; `write` puts them into RESULTS.md."""
    results, out, say = measure.ROOT / "RESULTS.md", Path(out), partial(print, flush=True)
    if write:
        rewrite(results.read_text("utf-8"), "", "fp8")  # first: nobody wants to hear it after minutes of measuring
    if source is None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: give a file for the record")
        out.parent.mkdir(parents=True, exist_ok=True)
        record = measured(tiny, commit, say)
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    else:
        try:
            record = json.loads(Path(source).read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"--source {source} cannot be used: {type(e).__name__} {e}") from None
    try:
        about = (
            f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['card']}, torch "
            f"{record['torch']}."
        )
        text = about + "\n\n" + tables(record)
    except (KeyError, TypeError, IndexError, StopIteration) as e:
        raise ValueError(f"--source {source} is no record of bench.py fp8: {type(e).__name__} {e}") from None
    say("\n" + text)
    if write:
        results.write_text(rewrite(results.read_text("utf-8"), text, "fp8"), "utf-8")
        say(f"\nwritten to {results.name}")
    return 0
