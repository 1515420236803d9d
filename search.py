"""The search for the shape: which smaller model fits a memory budget and loses least. First depth, then width.

    python search.py --preset nano-12b                                   # the report's search space, by formula
    python search.py --checkpoint out --context 4096 --out found         # prune, distil, measure, choose

A budget is bytes, and bytes follow from a shape by multiplication (sizes.py). The report's: of a card of 22.06 GiB
22.06 x 0.95 - 1.3 = 19.66 are left for weights and one row of 131,072 tokens. The 12B takes 26.07. What fits is
enumerated, sorted by memory with the largest first (within a budget more parameters are better), and the first three
are tried (trial.py): pruned, distilled for a while, asked and timed. The fastest is taken among those within
`--tolerance` of the best accuracy.

Why two steps. Layers and widths together are too many to try, and depth decides most: after equal distillation 52, 54
and 56 layers scored 44.9, 47.4 and 51.5 in the report's reasoning average. So the number of layers is fixed first, with
4 of 6 attention layers (fewer keys and values for long contexts), and the widths are searched at that depth.

The grid is ours. The report gives ranges: 6 to 10 layers removed, hidden 4480 to 5120, MLP 13,440 to 20,480, 112 to 128
Mamba heads; not the steps. Ours: 14, 15 and 16 sixteenths of hidden size and heads, an MLP of 3, 3.5 or 4 times hidden.
These 27 shapes reach exactly to the ranges' ends (3 x 4480 = 13,440 and 4 x 5120 = 20,480), and heads are multiples of
the 8 groups. NVIDIA's library steps hidden by 256 and MLP by 512, with which 4480 is never met.

Is the released shape found? By the plain formula it is not among the first three. 13 of the 27 fit, and the released
(hidden, MLP, heads) = (4480, 15680, 128) is the seventh of them with 18.69 GiB; the first are

    4480, 17920, 128   19.62 GiB      4800, 16800, 112   19.42 GiB      4800, 14400, 128   19.30 GiB

and an H200 allocates just that for them (`--device cuda`).

The other two candidates of the report we know at second hand only: (4480, 17920, 112) and (4800, 14400, 120), which
give the parameter counts reported for them, 8.92 and 8.97 B. With the released one they are numbers five to seven here,
next to each other. So it seems that something took between 0.48 and 0.83 GiB that the formula does not count: with
`--extra-gib 0.8` for each row these three are the first three, the released one third. What it was the report does not
say, as far as we know (activations of a prefill would be such a thing); the flag's default is 0.

For another model the same sixteenths, shares and ratios are taken of its own sizes; its budget is by default the same
share of its memory, 75.4 %. Source: report section 4. This file must not know how a candidate is made or trained.
"""

import argparse
import gc
import json
import os
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from device import choose_device  # isort: skip  (before torch)
import torch

import evaluate
from hf_config import config_from_dict
from model import LETTERS, PRESETS, NemotronH
from pair import noise
from safefile import read_json
from settings import finish
from sizes import count_parameters, memory_bytes
from trial import Trial

GIB = 2**30
CONTEXT, BUDGET = 131072, (22.06 * 0.95 - 1.3) * GIB
RELEASED = {"nano-12b": "nano-9b", "nano-12m": "nano-9m"}  # whose published form is known

# ---------------------------------------------------------------------------------------------------------------------
# By formula
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What may be tried: layers to remove, attention layers to keep; hidden sizes, MLP widths as multiples of hidden,
    Mamba heads."""

    removed: tuple
    attention: int
    hidden: tuple
    expansion: tuple
    heads: tuple


def report_space(config):
    """The report's space as shares of this config's own sizes: for the 12B exactly the ranges of the report."""
    c, layers = config, config.num_hidden_layers
    least, most = max(1, round(layers * 6 / 62)), max(1, round(layers * 10 / 62))
    whole = lambda width, share, step: max(step, -(-width * share // (16 * step)) * step)  # rounded up to a step

    def widths(width, step):
        found = {whole(width, share, step) for share in (14, 15, 16)}
        found |= {width - step} if len(found) == 1 and width > step else set()  # a choice of one is none
        return tuple(sorted(found))

    full = c.intermediate_size / c.hidden_size
    return Space(
        tuple(range(least, most + 1, max(1, (most - least) // 2))),
        -(-c.hybrid_override_pattern.count("*") * 2 // 3),
        widths(c.hidden_size, 1),
        tuple(full * share for share in (0.75, 0.875, 1.0)),
        widths(c.mamba_num_heads, c.n_groups),
    )


def enumerate_depth(config, space):
    """{layers removed: [{letter: how many go}, ...]}: every split between Mamba and MLP layers that leaves
    space.attention attention layers and at least one of each other kind that there was."""
    have = {letter: config.hybrid_override_pattern.count(letter) for letter in LETTERS}
    gone = have["*"] - space.attention
    found = {}
    for n in space.removed:
        splits = [{"M": m, "*": gone, "-": n - gone - m} for m in range(n - gone + 1)] if gone >= 0 else []
        found[n] = [s for s in splits if all(s[x] < have[x] or not have[x] for x in "M-")]
    return found


def without(config, removed):
    """The config with `removed` layers of each letter fewer, those nearest to the middle: a stand-in for memory's sake.
    Which layers really go is measured, and their bytes do not depend on it."""
    letters = config.hybrid_override_pattern
    order = sorted(range(len(letters)), key=lambda i: abs(2 * i - len(letters) + 1))
    drop = {i for letter, n in removed.items() for i in [j for j in order if letters[j] == letter][:n]}
    return replace(config, hybrid_override_pattern="".join(x for i, x in enumerate(letters) if i not in drop))


def enumerate_width(config, space):
    """Every ModelConfig with this config's layers and a width from the space."""
    return [
        replace(config, hidden_size=d, intermediate_size=round(d * r), mamba_num_heads=h)
        for d, r, h in product(space.hidden, space.expansion, space.heads)
    ]


def fitting(configs, budget, context, batch=1, extra=0):
    """[(bytes, config)] of those within `budget` bytes, largest first: weights and caches of `batch` rows of `context`
    tokens in 16 bits, and `extra` bytes a row."""
    sized = [(memory_bytes(c, context, batch)["total"] + extra * batch, c) for c in configs]
    return sorted((s for s in sized if s[0] <= budget), key=lambda s: -s[0])


def shape(config):
    return config.hidden_size, config.intermediate_size, config.mamba_num_heads


def held_bytes(config, context, batch, device):
    """What such a model and its cache really hold in 16 bits: on a GPU by the allocator's count, else the sizes of all
    tensors, which are made without memory."""
    if device.type != "cuda":
        with torch.device("meta"):
            model = NemotronH(config).to(torch.bfloat16)
        cache = model.new_cache(batch, context)
        return sum(p.numel() * p.element_size() for p in model.parameters()) + cache.bytes()
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    model = noise(config, device, torch.bfloat16)
    cache = model.new_cache(batch, context)
    found = torch.cuda.memory_allocated(device) - before
    del model, cache
    gc.collect()
    torch.cuda.empty_cache()
    return found


def choose(tried, tolerance):
    """The fastest of those within `tolerance` of the best accuracy; tried: [{"accuracy", "tokens_per_second"}]."""
    best = max(t["accuracy"] for t in tried)
    return max((t for t in tried if t["accuracy"] >= best - tolerance), key=lambda t: t["tokens_per_second"])


def nothing_fits(least, budget):
    return (
        f"no shape fits {size_of(budget)}, the smallest takes {size_of(least)}: raise the budget, lower --context, or "
        "remove more layers or width (--removed, --hidden, --expansion, --heads)"
    )


def depth_sizes(config, space, context, batch=1, extra=0):
    """{layers removed: ((least, most) bytes at full width, the same at the least)} over all ways to remove them."""
    found = {}
    for n, splits in enumerate_depth(config, space).items():
        shapes = [without(config, split) for split in splits]
        if shapes:
            sizes = [
                sorted(memory_bytes(c, context, batch)["total"] + extra * batch for c in each)
                for each in (shapes, [enumerate_width(c, space)[0] for c in shapes])
            ]
            found[n] = tuple((s[0], s[-1]) for s in sizes)
    return found


def search(args, config, space, budget, device):
    """Depth by accuracy, then the widths that fit; returns (those tried, the chosen one)."""
    sizes = depth_sizes(config, space, args.context, args.batch, args.extra)
    possible = [n for n, (_, narrow) in sizes.items() if narrow[1] <= budget]  # whichever layers the measurement takes
    if not possible:
        raise ValueError(nothing_fits(min(narrow[1] for _, narrow in sizes.values()), budget))
    trial, gone = Trial(args, device), config.hybrid_override_pattern.count("*") - space.attention
    depths = [trial.run(f"depth-{n}", args.checkpoint, remove=(n, gone)) for n in possible]
    deep = max(depths, key=lambda d: d["accuracy"])
    print(f"\ndepth: {deep['config'].hybrid_override_pattern}, as the most accurate of {len(depths)}")
    shapes, tried = enumerate_width(deep["config"], space), []
    for size, c in fitting(shapes, budget, args.context, args.batch, args.extra)[: args.candidates]:
        found = trial.run("width-{}-{}-{}".format(*shape(c)), deep["folder"], target=c)
        tried.append(found | {"bytes": size})
    return tried, choose(tried, args.tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def size_of(n):
    return f"{n / GIB:.3f} GiB" if n >= GIB else f"{n / 2**20:.3f} MiB"


def depth_table(config, space, args):
    """One line a depth: how the layers can be split, and the memory of the widest and the narrowest shape."""
    lines = [f"{'layers':>7} {'ways':>5}  memory of all ways, full width      and at the least width"]
    splits = enumerate_depth(config, space)
    for n, sizes in depth_sizes(config, space, args.context, args.batch, args.extra).items():
        wide, narrow = (f"{size_of(least)} to {size_of(most)}" for least, most in sizes)
        lines.append(f"{config.num_hidden_layers - n:>7} {len(splits[n]):>5}  {wide:<36}{narrow}")
    return "\n".join(lines)


def width_table(fit, args, device, released=None):
    """The shapes that fit, largest first; the first ones held against what is really allocated."""
    lines = [f"{'':>3} {'hidden':>7} {'MLP':>7} {'heads':>6} {'parameters':>15} {'formula':>12}   held"]
    for i, (size, c) in enumerate(fit, 1):
        mark = ""
        if i <= args.candidates:
            held = held_bytes(c, args.context, args.batch, device) + args.extra * args.batch
            mark = f"{size_of(held)}, {abs(held / size - 1):.2%} off"
        if released is not None and shape(c) == shape(released):
            mark += "   <- the released shape"
        row = "{:>7} {:>7} {:>6}".format(*shape(c))
        lines.append(f"{i:>3} {row} {count_parameters(c)['total']:>15,} {size_of(size):>12}   {mark}".rstrip())
    return "\n".join(lines)


def plot(path, everything, fit, tried, budget, context):
    """Left: parameters over memory of every shape, the budget, the largest that fit. Right, if anything was tried:
    accuracy over speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit, name = (GIB, "GiB") if budget >= GIB else (2**20, "MiB")
    fig, axes = plt.subplots(1, 2 if tried else 1, figsize=(11 if tried else 6.5, 4), squeeze=False)
    left = axes[0][0]
    for hidden in sorted({c.hidden_size for _, c in everything}):
        own = [(size / unit, count_parameters(c)["total"] / 1e6) for size, c in everything if c.hidden_size == hidden]
        left.plot(*zip(*own), "o", label=f"hidden {hidden}")
    left.axvline(budget / unit, color="black", linestyle=":", label="budget")
    top = [(size / unit, count_parameters(c)["total"] / 1e6) for size, c in fit]
    if top:
        left.plot(*zip(*top), "o", markersize=12, fillstyle="none", color="black", label=f"the first {len(top)}")
    left.set(xlabel=f"memory with {context:,} tokens, {name}", ylabel="million parameters", title="what fits")
    left.legend(fontsize=8)
    for t in tried:
        axes[0][1].plot(t["tokens_per_second"], t["accuracy"], "o")
        axes[0][1].annotate("/".join(map(str, shape(t["config"]))), (t["tokens_per_second"], t["accuracy"]))
    if tried:
        axes[0][1].set(xlabel="tokens/s, 8 rows", ylabel="exact answers after distillation", title="what was tried")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = evaluate.refuse
    flag = parser.add_argument
    flag("--checkpoint", help="folder of the model to compress; without it a preset's shapes by formula")
    flag("--preset", default="nano-12b", help="the shape to start from, without a checkpoint (nano-12b)")
    flag("--out", default="out/search", help="folder for the plot, the record and the candidates (out/search)")
    flag("--budget-gib", type=float, help="memory for weights and rows (the report's 75.4 %% of the whole model's)")
    flag("--budget-mib", type=float, help="the same for small models")
    flag("--context", type=int, default=CONTEXT, help="tokens in each row (131072)")
    flag("--batch", type=int, default=1, help="rows (1)")
    flag("--extra-gib", type=float, default=0.0, help="memory that each row takes besides its cache (0)")
    flag("--candidates", type=int, default=3, help="how many of the largest that fit are tried (3)")
    flag("--removed", help="layers to remove, with commas between (the report's share: 6,8,10 of 62)")
    flag("--attention", type=int, help="attention layers to keep (two thirds)")
    flag("--hidden", help="hidden sizes to try, with commas between (14, 15 and 16 sixteenths of the model's)")
    flag("--expansion", help="MLP widths to try, as multiples of hidden (3/4, 7/8 and all of the model's)")
    flag("--heads", help="Mamba heads to try, multiples of the groups (14, 15 and 16 sixteenths of the model's)")
    flag("--dry-run", action="store_true", help="by formula only, also with a checkpoint")
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--steps", type=int, default=150, help="steps of distillation of each candidate (150)")
    flag("--length", default="256", help="tokens in its rows (256)")
    flag("--step-tokens", type=int, default=2048, help="tokens in its steps (2048)")
    flag("--lr", type=float, help="its peak learning rate")
    flag("--samples", type=int, default=64, help="rows of 256 tokens by which importance is measured (64)")
    flag("--eval-count", type=int, default=10, help="held-out questions for each family and level (10)")
    flag("--tolerance", type=float, default=0.015, help="accuracy that may be given up for speed (0.015)")
    flag("--seed", type=int, default=0, help="of the data")
    args = parser.parse_args(argv)
    for name, low in dict(context=1, batch=1, candidates=1, steps=1, step_tokens=64, samples=1, eval_count=1).items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(args, name)}")
    for name in ("budget_gib", "budget_mib", "extra_gib", "tolerance"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number of at least 0; got {value}")
    if args.budget_gib is not None and args.budget_mib is not None:
        raise ValueError("--budget-gib and --budget-mib are the same budget: give one")
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    args.extra = args.extra_gib * GIB
    return args


def given(args):
    """The fields of the Space that the flags name."""
    found = {} if args.attention is None else {"attention": args.attention}
    for name, kind in dict(removed=int, hidden=int, expansion=float, heads=int).items():
        text = getattr(args, name)
        try:
            values = text and tuple(sorted({kind(part) for part in text.split(",")}))
        except ValueError:
            values = (0,)
        if values and not 0 < values[0] <= values[-1] < float("inf"):
            raise ValueError(f"--{name} {text!r} is not numbers above 0 with commas between")
        found |= {name: values} if values else {}
    return found


def run(args):
    device, why = choose_device(args.device)
    config = PRESETS[args.preset]
    if args.checkpoint:
        config = config_from_dict(read_json(Path(args.checkpoint) / "config.json"))
    space = report_space(config)
    space = replace(space, **given(args))
    whole = memory_bytes(config, args.context, args.batch)["total"]
    budget = whole * BUDGET / memory_bytes(PRESETS["nano-12b"], CONTEXT)["total"]
    if args.budget_gib is not None or args.budget_mib is not None:
        budget = args.budget_gib * GIB if args.budget_gib is not None else args.budget_mib * 2**20
    rows = f"{args.batch} row{'s' * (args.batch > 1)} of {args.context:,} tokens"
    print(
        f"model     {args.checkpoint or args.preset}: {config.num_hidden_layers} layers, {size_of(whole)} with {rows}"
    )
    print(f"budget    {size_of(budget)}; {size_of(args.extra)} a row are set aside; device {device} ({why})")
    print(f"depth     remove {', '.join(map(str, space.removed))} layers, keep {space.attention} with attention")
    print(f"width     hidden {space.hidden}, MLP {space.expansion} x hidden, Mamba heads {space.heads}\n")
    if not any(enumerate_depth(config, space).values()):
        raise ValueError(
            f"{config.hybrid_override_pattern} has no way to lose {' or '.join(map(str, space.removed))} layers and "
            f"keep {space.attention} with attention: give other --removed or --attention"
        )
    print(depth_table(config, space, args) + "\n", flush=True)

    out, tried, chosen, released = Path(args.out), [], None, None
    out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint and not args.dry_run:
        tried, chosen = search(args, config, space, budget, device)
        pattern = chosen["config"]
    elif not args.checkpoint and args.preset in RELEASED and args.removed is None and args.attention is None:
        released = PRESETS[RELEASED[args.preset]]
        pattern = replace(config, hybrid_override_pattern=released.hybrid_override_pattern)
        print(f"width at the depth of {RELEASED[args.preset]}: {pattern.hybrid_override_pattern}")
    else:
        splits = next(filter(None, enumerate_depth(config, space).values()))
        pattern = without(config, splits[len(splits) // 2])
        print(f"width at {pattern.num_hidden_layers} layers; which ones stay is measured, this stands for their bytes")
    everything = enumerate_width(pattern, space)
    fit = fitting(everything, budget, args.context, args.batch, args.extra)
    if not fit:
        least = min(memory_bytes(c, args.context, args.batch)["total"] for c in everything)
        raise ValueError(nothing_fits(least + args.extra * args.batch, budget))
    print(f"{len(fit)} of {len(everything)} shapes fit; the first {args.candidates} are candidates\n")
    print(width_table(fit, args, device, released))

    record = {"budget": budget, "context": args.context, "batch": args.batch, "extra": args.extra, "tried": []}
    record["fit"] = [[*shape(c), size] for size, c in fit]
    for t in tried:
        size = size_of(t["bytes"])
        told = f"{t['accuracy']:.1%} exact, {t['tokens_per_second']:,.0f} tokens/s, {size}"
        print(f"{'chosen' if t is chosen else 'tried ':>6}  {shape(t['config'])}: {told}")
        record["tried"].append({k: v for k, v in t.items() if k != "config"} | {"shape": shape(t["config"])})
    if chosen:
        record["chosen"] = chosen["folder"]
    every = [(memory_bytes(c, args.context, args.batch)["total"] + args.extra * args.batch, c) for c in everything]
    plot(out / "frontier.png", every, fit[: args.candidates], tried, budget, args.context)
    temporary = out / "search.json.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, out / "search.json")
    print(f"\nplot and record in {out}" + (f"; the chosen model is {chosen['folder']}" if chosen else ""))
    return record


def main(argv=None):
    return finish("search", lambda: run(parse(argv)), "lower --step-tokens or --context")


if __name__ == "__main__":
    sys.exit(main())
