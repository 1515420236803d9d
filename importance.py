"""What a trained model could do without: forward passes over a calibration set, and a score for all that can be cut.

Nothing is trained and no gradient is taken. What a channel is worth is read off its activations, what a layer is worth
off the answer without it:

    embedding channel    the norm's output in front of every layer, summed over the layers
    MLP neuron           its pre-activation, up_proj's output; tap "post" takes it after the squared ReLU
    Mamba head, channel  in_proj's x, a table (h, p) a layer; z and dt follow x's choice, B and C are never cut
    layer                how far the logits move when the layer is skipped (its residual path stays)

A channel's activations over all samples and positions become one number by an *aggregate*. The report names two, mean
and L2; "mean" is that of |a|, because signs would cancel; NVIDIA's library takes the mean over positions and then L2
over samples, "mean-l2".

Layers: *iterative* removal, as in the report. Skip every remaining layer once, take the mean square of what changes in
the logits against the *original* model, delete the layer that changes least, start again. Three cheaper measures look
once and delete all at the same time: "one-shot", the same logits; "mse", what changes before the head (Nemotron-H);
"cosine", 1 - cos(layer in, layer out), which needs one forward and none of the layers behind (NVIDIA's library).

Two sums keep this affordable at 131,072 logits a token.

*Logits never appear.* If the features before the head move by e (d,), the logits move by E e, with E (vocab, d) the
head's matrix, and |E e|^2 = e^T (E^T E) e. E^T E is one d x d matrix, made once a sweep: exact, and vocab / d times
cheaper.

*A prefix is shared.* For each batch the stream x before layer i is the same whichever layer from i on is skipped. So
the sweep walks down once and from every layer runs only the rest: L layers cost about L / 2 forwards of the model, and
one more for the original's answer; nothing is kept from batch to batch. 62 -> 56 layers: 62 + 61 + ... + 57 = 357
skipped layers, about 180 forwards of the calibration set; fewer when kinds are prescribed, as then only what may still
go is skipped.

So besides the weights a batch holds three streams (b, l, d) and whatever one layer needs: about what inference holds.
On one H200 a sample of 8,192 tokens takes the 12B's shape 0.8 min and 1.01 times a forward's memory (`python prune.py
--checkpoint nano-12b --target nano-9b --samples 1 --dry-run`). Which tap and measure choose better, RESULTS.md has for
three seeds of nano-12m: of neurons "post" does, against the report.
This file must not know slicing, files or text. Source: report section 4 (importance estimation), Minitron (Muralidharan
et al. 2024, arXiv 2407.14679) for the aggregates.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import LETTERS

AGGREGATES = ("l2", "mean", "mean-l2")
TAPS = ("pre", "post")
METHODS = ("iterative", "one-shot", "mse", "cosine")
RANKS = ("ranked", "random", "reversed")  # what goes first: the least important; anything; the most important
SLICE = 1024  # tokens whose e^T G e is made at a time


def choose(kind, value, known):
    if value not in known:
        raise ValueError(f"{kind} {value!r} is not one of {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------
# Channels
# ---------------------------------------------------------------------------------------------------------------------


class Aggregate:
    """One number a channel, from activations that come batch by batch."""

    def __init__(self, kind):
        self.kind, self.total, self.count = kind, 0.0, 0

    def add(self, a, real=None):
        """a (b, l, c); real (b, l) bool, the positions that count, or None for all. Makes no copy of a's size."""
        wide = torch.promote_types(a.dtype, torch.float32)
        for row, keep in zip(a, [None] * len(a) if real is None else real):
            row = row if keep is None else row[keep]
            if not len(row):
                continue
            norm = torch.linalg.vector_norm(row, 2 if self.kind == "l2" else 1, dim=0, dtype=wide).double()  # (c,)
            if self.kind == "mean-l2":
                self.total, self.count = self.total + (norm / len(row)) ** 2, self.count + 1
            else:
                self.total, self.count = self.total + (norm**2 if self.kind == "l2" else norm), self.count + len(row)

    def score(self):
        """(c,) float64 on the CPU."""
        mean = _finite((self.total / self.count).cpu())
        return mean if self.kind == "mean" else mean.sqrt()


@dataclass
class Importance:
    """Scores of what can be cut inside the layers; all float64, larger is more important.

    hidden (d,), one set for the whole model. neurons {layer: (ffn,)} and mamba {layer: (h, p)}, by the layer's number
    in the whole model.
    """

    hidden: torch.Tensor
    neurons: dict
    mamba: dict


@torch.no_grad()
def importance(model, batches, removed=(), aggregate="l2", tap="pre"):
    """Measure channels: one forward of every batch through the layers that are not in `removed`.

    batches: an iterable of (ids (b, l) int64, doc (b, l) or None); doc names each token's document, -1 is padding and
    does not count. Returns Importance. ValueError for an unknown switch or without a token.
    """
    choose("aggregate", aggregate, AGGREGATES)
    choose("tap", tap, TAPS)
    kept = [(i, block) for i, block in enumerate(model.backbone.layers) if i not in removed]
    streams = {i: Aggregate(aggregate) for i, _ in kept}
    insides = {i: Aggregate(aggregate) for i, block in kept if block.letter != "*"}
    real, hooks = None, []

    def watch(module, found, part=slice(None), inputs=False):
        if inputs:
            hook = module.register_forward_pre_hook(lambda _, args: found.add(args[0], real))
        else:
            hook = module.register_forward_hook(lambda _, args, out: found.add(out[..., part], real))
        hooks.append(hook)

    try:
        for i, block in kept:
            watch(block.norm, streams[i])
            if block.letter == "M":
                inner = block.mixer.inner
                watch(block.mixer.in_proj, insides[i], slice(inner, 2 * inner))  # z | x | B | C | dt
            elif block.letter == "-":
                post = tap == "post"
                watch(block.mixer.down_proj if post else block.mixer.up_proj, insides[i], inputs=post)
        for batch in batches:
            x, doc, mask, real = _begin(model, batch)
            _walk([block for _, block in kept], x, doc, mask)
    finally:
        for hook in hooks:
            hook.remove()
    _some(max(found.count for found in streams.values()))
    inside = {i: found.score() for i, found in insides.items()}
    c = model.config
    return Importance(
        sum(found.score() for found in streams.values()),
        {i: s for i, s in inside.items() if model.backbone.layers[i].letter == "-"},
        {
            i: s.view(c.mamba_num_heads, c.mamba_head_dim)
            for i, s in inside.items()
            if model.backbone.layers[i].letter == "M"
        },
    )


def _begin(model, batch):
    """(x, doc, mask, real): the stream after the embedding, and who may look where, as NemotronH.features has it."""
    device = model.lm_head.weight.device
    ids, doc = (None if t is None else t.to(device) for t in batch)
    mask = None if doc is None else (doc[:, None, :, None] == doc[:, None, None, :]).tril()  # (b, 1, l, l)
    real = None if doc is None or (doc >= 0).all() else doc >= 0
    return model.backbone.embeddings(ids), doc, mask, real


def _some(count):
    if not count:
        raise ValueError("the calibration set holds no token, so nothing can be measured: give at least one row")


def _finite(score):
    if not score.isfinite().all():
        raise ValueError(
            f"{int((~score.isfinite()).sum())} of {score.numel()} scores are not finite, because activations are not: "
            "the checkpoint is damaged, its training diverged, or it needs a wider dtype"
        )
    return score


def _walk(blocks, x, doc, mask):
    for block in blocks:
        x = block(x, seq_idx=doc, mask=mask)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Depth:
    """removed: [(layer, score at that moment)] in the order of removal. scores: {layer: score in the whole model} of
    the layers that could have gone; empty where nothing was measured."""

    removed: list
    scores: dict


@torch.no_grad()
def depth_order(
    model, batches, remove, method="iterative", rank="ranked", keep_first=0, keep_last=0, seed=0, say=lambda text: None
):
    """Choose layers to remove.

    remove: how many, as a number (of any kind) or by letter, {"M": 1, "-": 3, "*": 2}. batches: as in `importance`, but
    read once for every sweep, so a list. The first keep_first and last keep_last layers stay. rank: RANKS; "random"
    measures nothing. Returns Depth. ValueError if there are not as many layers to remove.
    """
    choose("method", method, METHODS)
    choose("rank", rank, RANKS)
    letters, left = model.config.hybrid_override_pattern, remove
    ends = range(keep_first, len(letters) - keep_last)
    if not isinstance(remove, int):
        left = +Counter(remove)
        for letter, n in left.items():
            there = sum(letters[i] == letter for i in ends)
            if n > there:
                raise ValueError(f"cannot remove {n} of the {there} {LETTERS[letter]} layers that may go: {letters}")
    total = remove if isinstance(remove, int) else left.total()
    if total > len(ends) or total >= len(letters):
        raise ValueError(f"cannot remove {total} of {len(letters)} layers where {len(ends)} may go and one must stay")
    generator, kept, removed, first = torch.Generator().manual_seed(seed), list(range(len(letters))), [], {}
    scores, start = {}, time.time()
    for turn in range(total):
        may = [i for i in kept if i in ends and (isinstance(remove, int) or left[letters[i]])]
        if rank == "random":
            worst = may[torch.randint(len(may), (), generator=generator)]
        else:
            if method == "iterative" or not scores:
                scores = cosines(model, batches) if method == "cosine" else sweep(model, batches, kept, may, method)
                first = first or dict(scores)
            worst = (min if rank == "ranked" else max)(may, key=scores.get)
        kept.remove(worst)
        removed.append((worst, scores.get(worst, math.nan)))
        if not isinstance(remove, int):
            left[letters[worst]] -= 1
        say(f"  {turn + 1}/{total}: layer {worst} ({letters[worst]}) goes, {time.time() - start:.0f} s")
    return Depth(removed, first)


def gram(weight):
    """E^T E (d, d) of the head's matrix E (vocab, d), in float32 or wider, from a slice of rows at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=wide, device=weight.device)
    for rows in weight.split(16 * SLICE):
        rows = rows.to(wide)
        total.addmm_(rows.t(), rows)
    return total


def energy(a, b, G=None):
    """The sum over tokens of e^T G e, with e = a - b (t, d); G None is the identity. A float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(SLICE), b.split(SLICE)):
        wide = torch.promote_types(x.dtype, torch.float32)
        e = x.to(wide) - y.to(wide)
        total += ((e if G is None else e @ G) * e).sum()
    return total


@torch.no_grad()
def sweep(model, batches, kept, candidates, method="one-shot"):
    """{i: score} for the layers i of `candidates`: the mean square of what changes between the whole model and the
    layers `kept` without i, in the logits, or with method "mse" before the head."""
    blocks, norm, weight = model.backbone.layers, model.backbone.norm_f, model.lm_head.weight
    G, width = (None, weight.shape[1]) if method == "mse" else (gram(weight), weight.shape[0])
    scores, count = dict.fromkeys(candidates, 0.0), 0
    for batch in batches:
        x, doc, mask, real = _begin(model, batch)
        flat = (lambda t: norm(t).flatten(0, 1)) if real is None else (lambda t, real=real: norm(t)[real])
        whole = flat(_walk(blocks, x, doc, mask))  # (t, d)
        count += len(whole)
        for at, i in enumerate(kept[: kept.index(max(candidates)) + 1]):
            if i in scores:
                rest = _walk([blocks[j] for j in kept[at + 1 :]], x, doc, mask)
                scores[i] = scores[i] + energy(flat(rest), whole, G)
                del rest
            x = blocks[i](x, seq_idx=doc, mask=mask)
    _some(count)
    return {i: _finite(score / count / width).item() for i, score in scores.items()}


@torch.no_grad()
def cosines(model, batches):
    """{i: 1 - cos(layer in, layer out), the mean over tokens} for every layer."""
    scores, count = dict.fromkeys(range(len(model.backbone.layers)), 0.0), 0
    for batch in batches:
        x, doc, mask, real = _begin(model, batch)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        count += real.sum().item()
        for i, block in enumerate(model.backbone.layers):
            y = block(x, seq_idx=doc, mask=mask)
            wide = torch.promote_types(x.dtype, torch.float32)
            scores[i] = scores[i] + (1 - F.cosine_similarity(x.to(wide), y.to(wide), dim=-1))[real].double().sum()
            x = y
    _some(count)
    return {i: _finite(score / count).item() for i, score in scores.items()}
