"""Merging: two models that began as one, and a third between them, for the price of an average.

    python merge.py out-rlvr out-rlhf --alpha 0.5 --out merged
    python merge.py out-rlvr out-rlhf --sweep 0,0.1,0.3,0.5,0.7,0.9,1 --plot sweep.png

The idea. Two runs that start from the same weights and learn different skills end near each other. On the straight line
between them the loss is often no higher than at its ends, so a point on it keeps most of both skills (linear mode
connectivity, Frankle et al. 2020; model soups, Wortsman et al. 2022). Two models that began differently have no such
line: there the average of two good models is noise.

    w = (1 - alpha) w_a + alpha w_b         every tensor, in float64, rounded once to a's dtype

alpha 0 is the first folder and alpha 1 the second, to the bit. A norm's weight, a decay A_log, a convolution's tap are
averaged like a matrix: A_log is the logarithm of a rate, so rates are averaged geometrically.

Which alpha? Nothing says beforehand: `--sweep` measures every skill (skills.py) at each. The report swept 0.1 to 0.9
and took about 0.5. Its last step merges a checkpoint strong at reasoning with one strong at chatting.

This file must not know training. Source: report section 3 (checkpoint interpolation).
"""

import argparse
import copy
import json
import math
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from device import choose_device, choose_impl  # isort: skip  (before torch)
import torch

import skills
from checkpoint import load_pretrained, save_pretrained
from evaluate import refuse
from safefile import write_json, writing
from settings import finish
from stage import FILE, stage_of

# ---------------------------------------------------------------------------------------------------------------------
# The line between two models
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(a, b, alpha):
    """A new model with (1 - alpha) of a's weights and alpha of b's, in a's dtypes; both must have equal shapes.

    ValueError for an alpha outside of [0, 1], which would be a guess beyond either, and for tensors that do not fit.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 (the first model) and 1 (the second); got {alpha}")
    theirs, merged = dict(b.named_parameters()), copy.deepcopy(a)
    ours = dict(merged.named_parameters())
    for name in ours.keys() ^ theirs.keys():
        raise ValueError(f"only one of the two models has {name}: only models of one shape can be merged")
    for name, w in ours.items():
        other = theirs[name]
        if w.shape != other.shape:
            raise ValueError(f"{name} is {tuple(w.shape)} in one model and {tuple(other.shape)} in the other")
        if alpha == 1:
            w.copy_(other)
        elif alpha > 0:  # in float64 nothing is lost before the one rounding
            w.copy_((1 - alpha) * w.double() + alpha * other.to(w.device).double())
    return merged


def distance(a, b):
    """||b - a|| / ||a|| over all weights: how far the two have gone apart."""
    pairs = list(zip(a.parameters(), b.parameters()))
    apart, size = (
        sum(t.double().square().sum().item() for t in ts) for ts in ((y - x for x, y in pairs), a.parameters())
    )
    return math.sqrt(apart / size)


def check_pair(a, b, tokenizers):
    """ValueError, in a sentence, unless the two are of one shape and speak one language."""
    one, two = asdict(a.config), asdict(b.config)
    differ = [f"{k} {one[k]} and {two[k]}" for k in one if one[k] != two[k]]
    if differ:
        raise ValueError(f"the two models differ in {', '.join(differ[:3])}: only models of one shape can be merged")
    first, second = tokenizers
    if first is not None and second is not None and (first.ranks, first.specials) != (second.ranks, second.specials):
        raise ValueError("the two models have different tokenizers, so their embeddings mean different words")


# ---------------------------------------------------------------------------------------------------------------------
# Which alpha
# ---------------------------------------------------------------------------------------------------------------------


def sweep(a, b, tokenizer, alphas, count, seed=0, say=lambda text: None):
    """[{"alpha", "skills": {name: share}}] of the merged models; see `skills.table`."""
    found = []
    for alpha in alphas:
        line = skills.table(merge(a, b, alpha).eval(), tokenizer, count, seed)
        found.append({"alpha": alpha, "skills": line})
        say(f"alpha {alpha:<5g} {skills.format_line(line)}")
    return found


def kept(lines):
    """{skill: {alpha: share of the gain kept}} for the skills in which the two ends differ: 0 is the worse end, 1 the
    better one. `lines` as `sweep` gives them, its ends included."""
    ends = [next((e["skills"] for e in lines if e["alpha"] == alpha), None) for alpha in (0, 1)]
    if None in ends:
        raise ValueError("how much of a gain is kept needs both ends: sweep alpha 0 and 1 as well")
    found = {}
    for name, first in ends[0].items():
        low, high = sorted((first, ends[1][name]))
        if low < high:
            found[name] = {e["alpha"]: (e["skills"][name] - low) / (high - low) for e in lines}
    return found


def plot(lines, path, names):
    """Every skill over alpha; names: of the two folders, for the axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name in lines[0]["skills"]:
        axis.plot([e["alpha"] for e in lines], [e["skills"][name] for e in lines], "o-", label=name)
    axis.set(xlabel=f"alpha: 0 is {names[0]}, 1 is {names[1]}", ylabel="share of held-out prompts", ylim=(0, 1.03))
    axis.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("a", help="the first checkpoint folder: alpha 0")
    parser.add_argument("b", help="the second: alpha 1")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the second model (0.5)")
    parser.add_argument("--out", default="", help="folder for the merged model")
    parser.add_argument("--sweep", default="", help="measure every skill at these alphas: 0,0.1,0.5,1")
    parser.add_argument("--plot", default="", help="with --sweep: draw the curves to this file")
    parser.add_argument("--count", type=int, default=108, help="with --sweep: held-out prompts of each kind")
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--impl", default="auto", help="auto, torch or triton: who computes the Mamba-2 layers")
    parser.add_argument("--json", action="store_true", help="print the sweep as one JSON object")
    return parser.parse_args(argv)


def run(args):
    try:
        alphas = [float(part) for part in args.sweep.split(",") if part]
    except ValueError:
        raise ValueError(f"--sweep {args.sweep!r} is no list of numbers such as 0,0.5,1") from None
    for alpha in [args.alpha, *alphas]:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 (the first model) and 1 (the second); got {alpha}")
    if not args.out and not alphas:
        raise ValueError("nothing would be done: give --out for a merged model, or --sweep to measure some")
    if args.plot and not alphas:
        raise ValueError("--plot draws a sweep: give --sweep, such as 0,0.25,0.5,0.75,1")
    if args.count < 1:
        raise ValueError(f"--count must be at least 1; got {args.count}")
    out = Path(args.out) if args.out else None
    if out:
        if out.resolve() in (Path(args.a).resolve(), Path(args.b).resolve()):
            raise ValueError(f"--out {out} is one of the two models: the merged one needs a folder of its own")
        if (out / "training.safetensors").exists() or (out / "config.json").exists():
            raise ValueError(f"--out {out} already holds a model or a run: give another folder")
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "may not be written to" if there.is_dir() else "is a file"
            raise ValueError(f"--out {out} cannot be used, because {there} {why}: give another folder")
    device, why = choose_device(args.device)
    (a, first), (b, second) = (load_pretrained(folder, device) for folder in (args.a, args.b))
    check_pair(a, b, (first, second))
    impl, why_impl = choose_impl(args.impl, device, a.config)
    tokenizer = first or second
    quiet = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    quiet(f"device    {device} ({why}), impl {impl} ({why_impl})")
    stages = stage_of(args.a), stage_of(args.b)
    quiet(f"models    {args.a} ({stages[0]}) and {args.b} ({stages[1]}), apart by {distance(a, b):.2%} of the first")
    a.use(impl), b.use(impl)
    if alphas:
        if tokenizer is None:
            raise ValueError(f"neither {args.a} nor {args.b} has a tokenizer.json, so no question can be put to them")
        lines = sweep(a, b, tokenizer, alphas, args.count, args.seed, quiet)
        if args.json:
            print(json.dumps({"a": args.a, "b": args.b, "count": args.count, "sweep": lines}))
        elif {0, 1} <= set(alphas):
            for name, shares in kept(lines).items():
                quiet(f"gain kept {name}: " + ", ".join(f"{alpha:g} {share:.0%}" for alpha, share in shares.items()))
        if args.plot:
            plot(lines, args.plot, (args.a, args.b))
    if out:
        settings = {"a": args.a, "b": args.b, "alpha": args.alpha, "stages": stages}
        history = [{"stage": "merged", "settings": settings}]
        with writing(out):  # before the weights: a folder that opens always says what it is
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / FILE, history)
        save_pretrained(out, merge(a, b, args.alpha), tokenizer)
        quiet(f"saved     alpha {args.alpha:g} in {out}. Next: python skills.py --checkpoint {shlex.quote(str(out))}")


def main(argv=None):
    return finish("merge", lambda: run(parse(argv)), "give --device cpu, or lower --count")


if __name__ == "__main__":
    sys.exit(main())
