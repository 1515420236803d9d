"""Pruning: a smaller model cut out of a trained one, layers first, then width.

    python prune.py --checkpoint out12 --target nano-9m --out pruned

The 12B became the 9B this way: 62 layers to 56, hidden 5120 to 4480, MLP 20480 to 15680. Nothing is trained here. The
cut model has forgotten much; it is where distillation starts.

A preset's name in place of a folder is that shape in noise, read with random tokens: what the measurement takes in time
and memory, and nothing else. The minutes that 1,024 samples would take are printed before it begins:

    python prune.py --checkpoint nano-12b --target nano-9b --samples 1 --dry-run

What is cut, and which tensors that touches (importance.py says how each is scored):

    layer               the whole module; the pattern string gets shorter, what stays keeps its order
    embedding channel   one set for the model: columns of the embedding, of the head and of all that reads the stream;
                        norms; rows of all that writes into it
    MLP neuron          a set for each layer: up_proj's rows, down_proj's columns
    Mamba head          a set for each layer, as many from every group: in_proj's rows of z, x and dt; the
                        convolution's x channels; A_log, D, dt_bias; the gated norm's weight; out_proj's columns
    Mamba head channel  a set for each layer, the same in all its heads: as heads, but dt, A_log, D and dt_bias stay

B and C belong to groups, and groups stay. A head reads the B and C of its group, so it is ranked inside it: heads of
one group can change places, and nothing changes; moved across groups, a head reads another's keys. The gated norm
divides by the RMS of a group's channels, and with fewer heads a group is narrower: there even a head that writes
nothing matters.

Attention keeps its heads: it can only go as a layer. A target's pattern says how many layers of each kind stay; which
ones, the measurement says, so the pattern found may be another than the target's.

Counts are checked after every cut, because mistakes of bookkeeping are silent: a public rebuild of this method ended
with "pruned" models whose Mamba layers had their old size. This file must not know training. Source: report section 4.
"""

import argparse
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from device import choose_device, choose_impl, memory_gib  # isort: skip  (before torch)
import torch
import torch.nn as nn

import calibration
from calibration import batches
from checkpoint import save_pretrained
from evaluate import refuse
from importance import AGGREGATES, METHODS, RANKS, TAPS, Importance, choose, depth_order, importance
from model import LETTERS, PRESETS, ModelConfig, NemotronH
from pair import open_model
from quantize import Int8Linear
from safefile import write_json, writing
from sizes import count_parameters, memory_bytes

CUT = ("hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim")
AT_ONCE = {"cpu": 4096, "cuda": 16384}  # tokens in a forward

# ---------------------------------------------------------------------------------------------------------------------
# The plan: what stays
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Indices into the larger model, ascending; config is the smaller model's.

    layers: numbers of those that stay. hidden: embedding channels. neurons, heads, channels: {layer's number in the
    larger model: indices}; heads in order are in order of groups, as many in each.
    """

    config: ModelConfig
    layers: list
    hidden: torch.Tensor
    neurons: dict
    heads: dict
    channels: dict


def target_config(config, target):
    """`config` with the sizes of `target` that can be cut, layers apart, and the number of layers to remove by letter.

    The target's vocabulary, chunk size and initialisation are ignored. ValueError if it is larger anywhere, or differs
    in something that is never cut."""
    for name in "n_groups ssm_state_size conv_kernel num_attention_heads num_key_value_heads head_dim".split():
        a, b = getattr(config, name), getattr(target, name)
        if a != b:
            raise ValueError(f"the target's {name} is {b} and the model's {a}, which is never cut: give another target")
    sizes = {name: getattr(target, name) for name in CUT}
    for name, size in sizes.items():
        if size > getattr(config, name):
            raise ValueError(f"the target's {name} {size} is more than the model's {getattr(config, name)}")
    remove = {}
    for letter, kind in LETTERS.items():
        a, b = config.hybrid_override_pattern.count(letter), target.hybrid_override_pattern.count(letter)
        if b > a:
            raise ValueError(f"the target has {b} {kind} layers, more than the model's {a}")
        remove[letter] = a - b
    return replace(config, **sizes), remove


def pick(scores, n, rank="ranked", generator=None):
    """The indices of the n that stay, ascending, of scores (c,): the largest, by `rank` any or the smallest."""
    if rank == "random":
        order = torch.randperm(len(scores), generator=generator)
    else:
        order = scores.argsort(descending=rank == "ranked", stable=True)
    return order[:n].sort().values


def make_plan(config, sizes, removed, scores=None, rank="ranked", seed=0):
    """Which channels stay. Of a Mamba layer's table (h, p) first the channels, by their norm over the heads; then in
    each group the heads, by their norm over the channels that stay.

    config: the larger model's. sizes: a ModelConfig whose CUT fields are wanted. removed: numbers of the layers that
    go. scores: Importance without these layers; may be None if nothing gets narrower or rank (RANKS) is "random".
    Returns Plan; ValueError for sizes that make no model."""
    choose("rank", rank, RANKS)
    c, generator = config, torch.Generator().manual_seed(seed)
    layers = [i for i in range(c.num_hidden_layers) if i not in removed]
    pattern = "".join(c.hybrid_override_pattern[i] for i in layers)
    new = replace(c, **{name: getattr(sizes, name) for name in CUT}, hybrid_override_pattern=pattern)
    by_kind = {letter: [i for i, own in zip(layers, pattern) if own == letter] for letter in LETTERS}
    if scores is None:
        if rank != "random" and any(getattr(new, name) != getattr(c, name) for name in CUT):
            raise ValueError(f"channels are cut by their importance, and none was measured: rank {rank!r} needs scores")
        scores = Importance(
            torch.ones(c.hidden_size),
            {i: torch.ones(c.intermediate_size) for i in by_kind["-"]},
            {i: torch.ones(c.mamba_num_heads, c.mamba_head_dim) for i in by_kind["M"]},
        )
    hidden = pick(scores.hidden, new.hidden_size, rank, generator)
    neurons = {i: pick(scores.neurons[i], new.intermediate_size, rank, generator) for i in by_kind["-"]}
    heads, channels = {}, {}
    r = c.mamba_num_heads // c.n_groups
    for i in by_kind["M"]:
        table = scores.mamba[i]  # (h, p)
        channels[i] = pick(table.norm(dim=0), new.mamba_head_dim, rank, generator)
        groups = table[:, channels[i]].norm(dim=1).view(c.n_groups, r)
        stay = [pick(group, new.mamba_num_heads // c.n_groups, rank, generator) for group in groups]
        heads[i] = torch.cat([g * r + own for g, own in enumerate(stay)])
    return Plan(new, layers, hidden, neurons, heads, channels)


# ---------------------------------------------------------------------------------------------------------------------
# The cut
# ---------------------------------------------------------------------------------------------------------------------


def _slices(config, plan, layer):
    """{module or parameter of the layer: (rows, columns) that stay}; None is all. A bias has its weight's rows."""
    c, d = config, plan.hidden
    found = {"norm": (d, None)}
    if layer in plan.neurons:
        return found | {"mixer.up_proj": (plan.neurons[layer], d), "mixer.down_proj": (d, plan.neurons[layer])}
    if layer not in plan.heads:
        return found | {f"mixer.{x}_proj": (None, d) for x in "qkv"} | {"mixer.o_proj": (d, None)}
    heads, i, gn = plan.heads[layer], c.mamba_inner, c.n_groups * c.ssm_state_size
    inner = (heads[:, None] * c.mamba_head_dim + plan.channels[layer]).flatten()
    BC = torch.arange(2 * gn)
    found |= {f"mixer.{name}": (heads, None) for name in ("A_log", "D", "dt_bias")}
    return found | {
        "mixer.in_proj": (torch.cat([inner, i + inner, 2 * i + BC, 2 * i + 2 * gn + heads]), d),  # z | x | B | C | dt
        "mixer.conv1d": (torch.cat([inner, i + BC]), None),  # x | B | C
        "mixer.norm": (inner, None),
        "mixer.out_proj": (d, inner),
    }


WRITES, READS = ("embeddings", "mixer.out_proj", "mixer.o_proj", "mixer.down_proj"), ("norm", "norm_f")


@torch.no_grad()
def cut(model, plan, rescale=False):
    """A new model, with copies of what stays, on the same device and in the same dtypes.

    rescale: make the cut exact for embedding channels that are zero everywhere. A norm divides by the RMS over d
    channels, and over the d' that stay that is larger by sqrt(d / d'). With all that writes into the stream times
    sqrt(d' / d) and the norms' weights times sqrt(d / d'), every norm's output is what it was, epsilon included.
    Minitron does not rescale.
    Raises RuntimeError unless every tensor has the shape, and all together the count, that the plan's config asks for;
    ValueError for an int8 model.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("the model's weights are int8, which cannot be cut: load it without int8")
    with torch.device("meta"):
        smaller = NemotronH(plan.config)
    d = plan.hidden
    index = {"backbone.embeddings": ("backbone.embeddings", None, d), "backbone.norm_f": ("backbone.norm_f", d, None),
             "lm_head": ("lm_head", None, d)}  # fmt: skip
    for new, old in enumerate(plan.layers):
        for name, kept in _slices(model.config, plan, old).items():
            index[f"backbone.layers.{new}.{name}"] = f"backbone.layers.{old}.{name}", *kept
    stream = (plan.config.hidden_size / model.config.hidden_size) ** 0.5 if rescale else 1.0
    factors = dict.fromkeys(WRITES, stream) | dict.fromkeys(READS, 1 / stream)
    live = 0
    for name, place in list(smaller.named_parameters()):
        key = re.sub(r"\.(weight|bias)$", "", name)
        source, rows, columns = index[key]
        tensor = model.get_parameter(source + name.removeprefix(key)).detach()
        if rows is not None:
            tensor = tensor.index_select(0, rows.to(tensor.device))
        if columns is not None and tensor.dim() > 1:
            tensor = tensor.index_select(1, columns.to(tensor.device))
        kind = re.sub(r"^backbone\.(layers\.\d+\.)?", "", key)
        tensor = tensor * factors.get(kind, 1.0)  # a copy, also where all stays
        if tensor.shape != place.shape:
            raise RuntimeError(f"{name} came out as {tuple(tensor.shape)}; the config asks for {tuple(place.shape)}")
        live += tensor.numel()
        parent, _, leaf = name.rpartition(".")
        setattr(smaller.get_submodule(parent), leaf, nn.Parameter(tensor))
    formula = count_parameters(plan.config)["total"]
    if live != formula:
        raise RuntimeError(f"the cut model has {live:,} parameters and its config's formula gives {formula:,}")
    return smaller.use(model.impl).train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# What will be cut, in words
# ---------------------------------------------------------------------------------------------------------------------


def describe_plan(config, plan, depth, scores):
    """The plan as a table: every layer, then sizes, parameters and bytes before and after."""

    def share(name, score, kept):
        part = score[kept].sum() / score.sum()
        return f", {name} {len(score)} -> {len(kept)} ({part:.1%} of the score)" if len(kept) < len(score) else ""

    then = lambda score: f" (score {score:.3g} then)" if math.isfinite(score) else ""  # what random removal has not
    gone = {i: f"removed, number {n}{then(score)}" for n, (i, score) in enumerate(depth.removed, 1)}
    lines = [f"{'layer':>5}  {'kind':<9} {'score':>9}  what happens"]
    for i, letter in enumerate(config.hybrid_override_pattern):
        what = "stays"
        if scores and i in plan.neurons:
            what += share("neurons", scores.neurons[i], plan.neurons[i])
        if scores and i in plan.heads:
            what += share("channels a head", scores.mamba[i].norm(dim=0), plan.channels[i])
            what += share("heads", scores.mamba[i][:, plan.channels[i]].norm(dim=1), plan.heads[i])
        score = f"{depth.scores[i]:9.3g}" if i in depth.scores else f"{'-':>9}"
        lines.append(f"{i:>5}  {LETTERS[letter]:<9} {score}  {gone.get(i, what)}")
    if scores and len(plan.hidden) < config.hidden_size:
        lines.append(f"{'':>5}  the stream{share('embedding channels', scores.hidden, plan.hidden)}")
    both = config, plan.config
    rows = [("pattern", *(c.hybrid_override_pattern for c in both)), ("layers", *(c.num_hidden_layers for c in both))]
    rows += [(name, *(getattr(c, name) for c in both)) for name in CUT]
    counts, held = [count_parameters(c) for c in both], [memory_bytes(c, 131072) for c in both]
    rows += [(f"parameters, {kind}", *(f"{n[kind]:,}" for n in counts)) for kind in counts[0]]
    rows += [(f"MiB at 128k, {kind}", *(f"{n[kind] / 2**20:,.1f}" for n in held)) for kind in held[0]]
    width = max(len(str(a)) for _, a, _ in rows)
    lines += ["", f"{'':<23} {'before':>{width}}  after   (128k: one row of 131,072 tokens, 16-bit weights)"]
    return "\n".join(lines + [f"{name:<23} {a:>{width}}  {b}" for name, a, b in rows])


def compare_patterns(config, found, preset):
    """How the pattern that the measurement left relates to that of a preset with as many layers of each kind."""
    pattern, letters = PRESETS[preset].hybrid_override_pattern, iter(config.hybrid_override_pattern)
    if found.hybrid_override_pattern == pattern:
        return f"pattern: {preset}'s own"
    reachable = all(letter in letters for letter in pattern)
    why = "another choice would give it" if reachable else "no removal from this model gives that"
    return (
        f"pattern: as many layers of each kind as {preset}, in another order than its {pattern}, because the "
        f"measurement decides which go ({why})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    flag = parser.add_argument
    flag("--checkpoint", default="out", help="folder of the model to cut (out), or a preset's name for noise")
    flag("--out", help="the folder for the smaller model")
    flag("--target", help=f"cut to the sizes of a preset: {', '.join(PRESETS)}; its vocabulary is ignored")
    flag("--hidden", type=int, help="embedding channels to keep; this and the next four overrule --target")
    flag("--ffn", type=int, help="neurons to keep in each MLP")
    flag("--heads", type=int, help="heads to keep in each Mamba layer, a multiple of the groups")
    flag("--head-dim", type=int, help="channels to keep in each Mamba head")
    flag("--layers-removed", type=int, help="layers to remove, of whatever kind matters least")
    flag("--keep-ends", type=int, default=0, help="layers at either end that are never removed (0)")
    flag("--depth-by", default="iterative", help=f"how layers are measured: {', '.join(METHODS)} (iterative)")
    flag("--aggregate", default="l2", help=f"how activations become one number: {', '.join(AGGREGATES)} (l2)")
    flag("--tap", default="pre", help=f"neurons before or after their activation: {', '.join(TAPS)} (pre)")
    flag("--rank", default="ranked", help=f"what is cut: {', '.join(RANKS)}; the last two are controls (ranked)")
    flag("--rescale", action="store_true", help="make up for the narrower norms, see cut")
    flag("--samples", type=int, default=1024, help="rows of the calibration set; lower it for speed (1024)")
    flag("--length", type=int, help="tokens in a row (512; 8192 for a model 1,024 wide or more)")
    flag("--batch", type=int, help="rows at a time; lower it when memory runs out (some thousand tokens)")
    flag("--text", help="a text file, or a folder of them, in place of the installed text")
    flag("--device", default="auto", help="auto, cpu or cuda")
    flag("--impl", default="auto", help="auto, torch or triton: who computes the Mamba-2 layers")
    flag("--seed", type=int, default=0, help="which rows are drawn, and which channels with --rank random")
    flag("--dry-run", action="store_true", help="measure, print the plan, write nothing")
    return parser.parse_args(argv)


def check(args):
    """What is wrong with the flags before anything is loaded; ValueError."""
    for name, value, known in (("--depth-by", args.depth_by, METHODS), ("--aggregate", args.aggregate, AGGREGATES),
                               ("--tap", args.tap, TAPS), ("--rank", args.rank, RANKS)):  # fmt: skip
        choose(name, value, known)
    low = dict(
        hidden=1, ffn=1, heads=1, head_dim=1, layers_removed=0, keep_ends=0, samples=1, length=64, batch=1, seed=0
    )
    for name, least in low.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(args, name)}")
    if args.seed >= 2**63:
        raise ValueError(f"--seed must be below {2**63}; got {args.seed}")
    if args.target is not None and args.target not in PRESETS:
        raise ValueError(f"--target {args.target!r} is unknown: choose one of {', '.join(PRESETS)}")
    if args.dry_run:
        return
    if not args.out:
        raise ValueError("the smaller model needs a folder: give --out, or --dry-run to see the plan only")
    out = Path(args.out)
    if out.resolve() == Path(args.checkpoint).resolve():
        raise ValueError(f"--out {out} is the checkpoint itself: the smaller model needs a folder of its own")
    if (out / "training.safetensors").exists():
        raise ValueError(f"--out {out} holds a training run: give another folder")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise ValueError(f"--out {out} cannot be used, because {there} {why}: give another folder")


def wanted(args, config):
    """(ModelConfig with the sizes to cut to, layers to remove: a number or by letter) for a model of this config."""
    sizes = dict(zip(CUT, (args.hidden, args.ffn, args.heads, args.head_dim)))
    target = replace(PRESETS[args.target] if args.target else config, **{k: v for k, v in sizes.items() if v})
    target, remove = target_config(config, target)
    remove = remove if args.layers_removed is None else args.layers_removed
    if target == config and not (remove if isinstance(remove, int) else any(remove.values())):
        raise ValueError(
            "nothing would be cut: give --target, --hidden, --ffn, --heads, --head-dim or --layers-removed"
        )
    return target, remove


def forwards(layers, remove, method):
    """About how many forwards of the calibration set the choice of layers takes; see importance.py."""
    if not remove or method == "cosine":
        return bool(remove)
    turns = range(remove if method == "iterative" else 1)
    return sum(1 + (layers - turn) * (layers - turn + 1) / 2 / layers for turn in turns)


def seconds_a_batch(model, batch):
    """Of a forward, the first aside."""
    device = model.lm_head.weight.device
    ids, doc = (None if t is None else t.to(device) for t in batch)
    with torch.no_grad():
        for _ in range(2):
            start = time.time()
            model.features(ids, seq_idx=doc).sum().item()
    return time.time() - start


def run(args):
    check(args)
    device, why_device = choose_device(args.device)
    choose_impl(args.impl, device)  # a wish that cannot be met is said before anything is loaded
    model, tokenizer = open_model(args.checkpoint, device)
    model, config = model.eval(), model.config
    impl, why_impl = choose_impl(args.impl, device, config)
    model.use(impl)
    sizes, remove = wanted(args, config)
    length = args.length or (8192 if config.hidden_size >= 1024 else 512)
    at_once = args.batch or max(1, AT_ONCE[device.type] // length)
    rows, fresh, what = calibration.make(tokenizer, config.vocab_size, args.samples, length, args.seed, args.text)
    calibrating = batches(rows, at_once)

    # What was decided, and why
    total = remove if isinstance(remove, int) else sum(remove.values())
    kinds = "" if isinstance(remove, int) else f" ({', '.join(f'{n} {LETTERS[k]}' for k, n in remove.items() if n)})"
    work = (sizes != config) + (args.rank != "random") * forwards(config.num_hidden_layers, total, args.depth_by)
    count, dtype = count_parameters(config)["total"], str(model.lm_head.weight.dtype)[6:]
    print(f"model     {args.checkpoint}: {count:,} parameters, {config.hybrid_override_pattern}")
    print(f"device    {device} ({why_device}), {dtype} (as saved), impl {impl} ({why_impl})")
    print(f"samples   {args.samples:,} of {length:,} tokens, {at_once} at a time: {what}")
    print(f"layers    {total} to remove{kinds}, by {args.depth_by}, {args.rank}")
    print(f"width     {', '.join(f'{n} {getattr(config, n)} -> {getattr(sizes, n)}' for n in CUT)}; {args.aggregate}")
    minutes = work * len(calibrating) * seconds_a_batch(model, calibrating[0]) / 60
    full = f" (1,024 samples: {minutes * 1024 / args.samples:,.1f})" if args.samples != 1024 else ""
    print(f"work      about {work:.0f} forwards of the samples, {minutes:.1f} min{full}", flush=True)
    forward, start = memory_gib(device), time.time()

    depth = depth_order(
        model, calibrating, remove, args.depth_by, args.rank, args.keep_ends, args.keep_ends, args.seed, print
    )
    removed = [i for i, _ in depth.removed]
    scores = importance(model, calibrating, removed, args.aggregate, args.tap) if sizes != config else None
    peak = memory_gib(device)
    print(
        f"measured  {(time.time() - start) / 60:.1f} min; peak memory {peak:.2f} GiB, {forward:.2f} of a plain forward"
    )
    plan = make_plan(config, sizes, removed, scores, args.rank, args.seed)
    print(f"\n{describe_plan(config, plan, depth, scores)}\n")
    if args.target and args.layers_removed is None:
        print(compare_patterns(config, plan.config, args.target))
    if args.dry_run:
        print("a dry run: nothing was written")
        return
    smaller = cut(model, plan, args.rescale)
    record = vars(args) | {"removed": [(i, None if args.rank == "random" else score) for i, score in depth.removed]}
    if fresh:
        record["loss"] = [calibration.loss(m, fresh, at_once) for m in (model, smaller)]
        told = "{:.4f} -> {:.4f} nats a token".format(*record["loss"])
        print(f"loss on {calibration.FRESH} fresh rows: {told}, before any distillation")
    save_pretrained(args.out, smaller, tokenizer)
    file, temporary = Path(args.out) / "prune.json", Path(args.out) / "prune.json.tmp"
    with writing(args.out):
        write_json(temporary, record)
        os.replace(temporary, file)
    print(f"saved in {args.out}. What it can still do:\n  python evaluate.py --checkpoint {shlex.quote(args.out)}")


def main(argv=None):
    """Run the script; returns the exit code: 0, 2 for bad input (one sentence on stderr), 130 after Ctrl-C."""
    try:
        run(parse(argv))
        return 0
    except (ValueError, OSError) as error:
        print(f"prune.py: {error}", file=sys.stderr)
    except RuntimeError as error:  # a CPU's allocator has no error of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("prune.py: out of memory: lower --batch or --length", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
