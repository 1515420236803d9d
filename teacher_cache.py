"""What the teacher says, written down: its k likeliest tokens for every token of a data set.

A live teacher costs a forward for every step of every student. Written down once, its answers serve any number of
students (a search has three), and the teacher need not be in memory while they learn. Whole distributions would be
too much: 131,072 numbers a token. Its 32 likeliest are 32 x (2 bytes of logit + 2 or 4 of place) = 128 or 192 bytes,
10 M tokens are 1.3 or 1.9 GB; what is lost is in distill_loss.py, under `topk`.

The arrays lie in a data folder beside the packed rows that they belong to (data.py), an entry for each row, and the
loader reads them along. Logits are stored in float16 relative to the largest of their token, which softmax does not
see. topk.json says which teacher and which rows they were made from, and is written last: answers of another teacher,
of other rows, or an unfinished file are made anew. This file must not know losses or training.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch

import data
from distill_loss import top_logits

ARRAYS = ("topk_logits", "topk_places")


def fingerprint(model):
    """A short text that differs when a weight does (by more than the rounding of a sum)."""
    sums = [(name, p.double().sum().item(), p.double().norm().item()) for name, p in model.named_parameters()]
    return data.digest({"weights": [f"{name} {total:.9e} {norm:.9e}" for name, total, norm in sums]})


@torch.no_grad()
def write(folder, teacher, k, rows_at_once=8, say=print):
    """Put the teacher's k likeliest logits for every row of a prepared data folder there, or find them there. Returns
    the names of the arrays, for `data.Loader`'s `extra`. ValueError if the disk is full or k above the vocabulary."""
    folder = Path(folder)
    ids, doc = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "doc"))
    meta = {"k": k, "data": data.fingerprint(folder), "teacher": fingerprint(teacher)}
    try:
        if json.loads((folder / "topk.json").read_text()) == meta:
            return ARRAYS
    except (OSError, ValueError):
        pass
    (folder / "topk.json").unlink(missing_ok=True)
    device, start, last = teacher.lm_head.weight.device, time.time(), 0.0
    types = (np.float16, np.uint16 if teacher.config.vocab_size <= 65536 else np.int32)
    size = ids.size * k * sum(np.dtype(kind).itemsize for kind in types)
    try:
        logits, places = (
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (*ids.shape, k))
            for name, kind in zip(ARRAYS, types)
        )
        if hasattr(os, "posix_fallocate"):  # take the room now: a mapped file on a full disk would kill the writer
            for name in ARRAYS:
                with open(folder / f"{name}.npy", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    except OSError as error:
        raise ValueError(
            f"cannot write {size / 1e6:,.0f} MB of the teacher's answers to {folder} ({error.strerror or error}): free "
            "some space, lower --topk, or distil from the live teacher (--cache off)"
        ) from None
    for first in range(0, len(ids), rows_at_once):
        part = slice(first, first + rows_at_once)
        read = [torch.from_numpy(a[part].astype(np.int64)).to(device) for a in (ids, doc)]
        values, where = top_logits(teacher.features(read[0], seq_idx=read[1]), teacher.lm_head.weight, k)
        logits[part] = (values - values[..., :1]).half().cpu().numpy()
        places[part] = where.cpu().numpy()
        now = time.time()
        if now - last > 5 or first + rows_at_once >= len(ids):
            done = min(len(ids), first + rows_at_once)
            say(f"  teacher: {done}/{len(ids)} rows, {size / 1e6:,.1f} MB in all, {now - start:.0f} s")
            last = now
    logits.flush(), places.flush()
    temporary = folder / "topk.json.tmp"
    temporary.write_text(json.dumps(meta))
    os.replace(temporary, folder / "topk.json")
    return ARRAYS
