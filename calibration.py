"""The rows that a model is measured on before it is cut, and other rows to see what the cut cost.

Packed rows of tasks and text, as data.py packs them for training, read with the checkpoint's own tokenizer: a model is
measured on what it was made for. They are drawn anew, so they are not the rows of any run. The fresh rows have held-out
text and do not depend on the seed, so that cuts compare. The report's calibration set has 1,024 samples. A folder
without a tokenizer, of random weights at full size say, gets random ids: speed and memory do not depend on them.

This file must not know what is measured.
"""

import math

import numpy as np
import torch

import corpus
import data
from loss import next_token_loss

FRESH = 64  # rows on which the loss before and after is taken


def make(tokenizer, vocab_size, samples, length, seed=0, text=None):
    """(rows to measure on, FRESH other rows or None, what they are in words). Rows are tensors ids, doc and kind,
    (rows, length), as data.py packs them; without a tokenizer random ids, the others None. ValueError for bad text."""
    if tokenizer is None:
        ids = torch.randint(vocab_size, (samples, length), generator=torch.Generator().manual_seed(seed))
        what = "random ids, because the folder has no tokenizer: they measure how fast and how large, not what matters"
        return (ids, None, None), None, what
    blend, size = data.Blend(), min(max(samples * length, 1e6), 16e6)  # bytes of text, not all of them used
    if text:
        parts, blend = {"prose": corpus.read_folder(text)}, data.Blend(blend.sources | {"prose": 0.15, "code": 0})
    else:
        parts = {kind: corpus.read_text(kind, size / 2) for kind in ("prose", "code")}
    rows = []
    for side, n in enumerate((samples, FRESH)):  # fresh rows have the held-out text
        texts = {kind: data.flatten(tokenizer, split[side]) for kind, split in parts.items()}
        arrays, _ = data.pack_shard(tokenizer, blend, texts, n, length, "fresh" if side else f"calibration {seed}")
        rows.append(tuple(torch.from_numpy(array.astype(np.int64)) for array in arrays))
    shares = ", ".join(f"{source} {share:.0%}" for source, share in blend.sources.items())
    return *rows, f"packed rows of {shares}" + (f", text from {text}" if text else "")


def batches(rows, at_once):
    """A list of (ids, doc), `at_once` rows each."""
    ids, doc, _ = rows
    steps = range(0, len(ids), at_once)
    return [(ids[s : s + at_once], None if doc is None else doc[s : s + at_once]) for s in steps]


@torch.no_grad()
def loss(model, rows, at_once):
    """Nats a token of what is learned in `rows`: responses of tasks, and text. ValueError if that is no number."""
    device, weight, total = model.lm_head.weight.device, model.lm_head.weight, 0.0
    learned = rows[2][:, 1:] != data.NOT_LEARNED
    for (ids, doc), counts in zip(batches(rows, at_once), learned.split(at_once)):
        ids, doc, counts = (t.to(device) for t in (ids, doc, counts))
        x = model.features(ids, seq_idx=doc)[:, :-1]
        total += next_token_loss(x, weight, ids[:, 1:], counts)[0].double().item()
    if not math.isfinite(total):
        raise ValueError(f"the loss of {len(learned)} rows is {total}: the model diverged, or needs a wider dtype")
    return total / learned.sum().item()
