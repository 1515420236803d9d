"""Training data: text that is on every machine, generated tasks, a blend of both, packed into rows.

Nothing is downloaded. The text is what Python brought along: docstrings of the installed packages (technical English)
and the standard library's source (code), read where it lies at run time; or a folder of your own (`--text`). The tasks
come from `tasks.py`. From there the road is short:

    documents  --tokenise-->  ids and what is learned  --pack-->  rows of equal length  --shuffle-->  batches

*What is learned*: of a task only the response (trace and answer), of a text everything. Asking a small model to predict
random questions as well wastes most of its gradient.

*Packing*: rows are filled with whole task examples; text, which may be cut anywhere, fills what is left, so no place is
wasted on padding. `doc` says which document a token belongs to, and the model stops convolution, state and attention
at a document's edge, so a packed row behaves exactly as its documents alone.

*Preparing once*: all cores write packed rows into three arrays on disk, shard by shard. A shard depends only on the
seed and its number, so the data do not depend on how many cores made them. Training then only indexes rows: a GPU does
not wait, a position is two integers, and ranks read disjoint rows of the same shuffled order.

This file must not know models. Source of the idea of a blend with weights in tokens: report section 2.2.
"""

import ast
import json
import os
import shutil
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np

import tasks

NOT_LEARNED, TASK, TEXT = 0, 1, 2  # the values of `kind`: what a token counts for as a prediction target
HELD_OUT = 20  # one file in 20 is never trained on: bits per byte are measured there


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _docstrings(path):
    """The docstrings of one Python file, joined; "" if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return ""
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    return "\n\n".join(d for d in map(ast.get_docstring, nodes) if d and len(d) > 80)


def _source(path):
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _read(job):
    kind, path = job
    return (_docstrings if kind == "prose" else _source)(Path(path))


def installed_files(kind):
    """Python files to read for "prose" (docstrings) or "code", in an order that does not depend on the file system:
    the standard library for both, and for prose the packages that this project needs anyway."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    if kind == "prose":
        site = Path(sysconfig.get_path("purelib"))
        roots += [site / name for name in ("torch", "sympy", "networkx", "numpy", "matplotlib")]
    files = []
    for root in roots:
        found = [p for p in root.rglob("*.py") if not {"test", "tests", "site-packages", "idlelib"} & set(p.parts[3:])]
        files += sorted(found, key=lambda p: blake2b(str(p.relative_to(root)).encode(), digest_size=8).digest())
    return files


def read_text(kind, max_bytes, workers=1):
    """Two lists of texts, (training, held out), together about `max_bytes`; the split is by file name."""
    files, texts, size = installed_files(kind), ([], []), 0
    with _pool(workers) as pool:
        for start in range(0, len(files), 256):
            batch = files[start : start + 256]
            for path, text in zip(batch, pool.map(_read, [(kind, str(p)) for p in batch], chunksize=16)):
                if len(text) > 200 and size < max_bytes:
                    digest = blake2b(path.name.encode(), digest_size=4).digest()
                    texts[int.from_bytes(digest, "big") % HELD_OUT == 0].append(text)
                    size += len(text)
            if size >= max_bytes:
                break
    return texts


def read_folder(path):
    """Your own corpus: a text file, or a folder of them, split into (training, held out) by file.

    Raises ValueError with a sentence if there is no text there, or if a file is not UTF-8 text.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--text {path} does not exist: give a text file or a folder of text files")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    texts = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{file} is not UTF-8 text (byte {e.start}): convert it or take it out") from None
        if "\0" in text:
            raise ValueError(f"{file} holds NUL bytes, so it is not text: take it out of the corpus")
        texts.append(text)
    size = sum(len(t.strip()) for t in texts)
    if size < 10_000:
        raise ValueError(f"--text {path} has {size} characters in {len(files)} files: give at least 10,000")
    pieces = [t[i : i + 20_000] for t in texts for i in range(0, len(t), 20_000)]
    held = [p for i, p in enumerate(pieces) if i % HELD_OUT == HELD_OUT - 1] or [pieces[-1][-len(pieces[-1]) // 10 :]]
    train = [p for i, p in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1]
    return train, held


class _serial:
    """Stands in for a process pool where one process is enough."""

    map = staticmethod(lambda fn, jobs, chunksize=1: map(fn, jobs))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def _pool(workers):
    """`spawn`, because a fork of a process that already runs torch's threads can hang."""
    return _serial() if workers <= 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


# ---------------------------------------------------------------------------------------------------------------------
# The blend and the packer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Blend:
    """What a row is made of. `sources`: share of tokens by source. `families`: weights inside the two task sources, by
    family or by (family, level), None for all alike at their training levels."""

    sources: dict = field(default_factory=lambda: {"reasoning": 0.45, "retrieval": 0.4, "prose": 0.1, "code": 0.05})
    families: dict | None = None

    def __post_init__(self):
        unknown = set(self.sources) - {"reasoning", "retrieval", "prose", "code"}
        if unknown:
            raise ValueError(f"unknown source {sorted(unknown)}: the sources are reasoning, retrieval, prose, code")
        if any(not 0 <= w < float("inf") for w in self.sources.values()) or sum(self.sources.values()) <= 0:
            raise ValueError(f"the weights of a blend must be finite, at least 0 and not all 0; got {self.sources}")
        total = sum(self.sources.values())
        self.sources = {k: v / total for k, v in self.sources.items() if v > 0}

    def family_weights(self, kind):
        """The weights of the families of one kind, for `tasks.blend`."""
        weights = self.families or dict.fromkeys(tasks.FAMILIES, 1.0)
        name = lambda key: key if isinstance(key, str) else key[0]
        return {k: w for k, w in weights.items() if tasks.FAMILIES[name(k)].kind == kind}


class _TextStream:
    """Endless text tokens from a flat array of documents, handed out in pieces that never cross a document's end."""

    def __init__(self, ids, ends, start):
        self.ids, self.ends, self.position = ids, ends, start % len(ids)

    def take(self, n):
        at = self.position
        end = min(int(self.ends[np.searchsorted(self.ends, at, side="right")]), at + n)
        self.position = end % len(self.ids)
        return self.ids[at:end]


def _examples(tokenizer, weights, seed, length):
    """Endless (ids, mask_start) of one kind of task; examples longer than a row are left out."""
    stream = tasks.blend(Random(seed), weights)
    while True:
        batch = [next(stream) for _ in range(256)]
        for ids, start in tokenizer.encode_examples((s.question, s.trace, s.answer) for s in batch):
            if len(ids) <= length:
                yield ids, start


def pack_shard(tokenizer, blend, texts, rows, length, seed):
    """Packed rows: ids uint16, doc int16 and kind uint8, each (rows, length), and the tokens placed by source.

    texts: {"prose": (ids, ends), "code": (ids, ends)}. The next document is taken from the source that is furthest
    behind its share. A task that does not fit any more waits for the next row; text fills the rest of this one. With no
    text in the blend the rest is padding: document -1, not learned.
    """
    ids = np.zeros((rows, length), np.uint16)
    doc = np.full((rows, length), -1, np.int16)
    kind = np.zeros((rows, length), np.uint8)
    rng = Random(seed)
    feeds, waiting = {}, {}
    for source in blend.sources:
        if source in texts:
            array, ends = texts[source]
            feeds[source] = _TextStream(array, ends, rng.randrange(len(array)))
        else:
            feeds[source] = _examples(tokenizer, blend.family_weights(source), rng.random(), length)
            waiting[source] = next(feeds[source])
    placed = dict.fromkeys(blend.sources, 0)
    furthest_behind = lambda names: min(names, key=lambda s: placed[s] / blend.sources[s])
    text_sources = [s for s in feeds if s in texts]
    for row in range(rows):
        at, number = 0, 0
        while at < length:
            source = furthest_behind(feeds)
            if source in waiting and len(waiting[source][0]) > length - at:
                fitting = [s for s in waiting if len(waiting[s][0]) <= length - at and at < length * 0.7]
                source = fitting[0] if fitting else furthest_behind(text_sources) if text_sources else None
                if source is None:
                    break
            if source in waiting:
                piece, start = waiting[source]
                waiting[source] = next(feeds[source])
                kind[row, at + start : at + len(piece)] = TASK
            else:
                piece = feeds[source].take(min(length - at, length // 2))
                kind[row, at + 1 : at + len(piece)] = TEXT  # nothing comes before its first token to predict it from
            ids[row, at : at + len(piece)] = piece
            doc[row, at : at + len(piece)] = number
            placed[source] += len(piece)
            at, number = at + len(piece), number + 1
    return (ids, doc, kind), placed


# ---------------------------------------------------------------------------------------------------------------------
# Preparing a data set on disk, once, with all cores
# ---------------------------------------------------------------------------------------------------------------------

ARRAYS = {"ids": np.uint16, "doc": np.int16, "kind": np.uint8}
SHARD_ROWS = 256


def _write_shard(job):
    folder, shard, rows, length, blend, seed = job
    from tokenizer import Tokenizer  # here, so that a worker process imports only what it needs

    tokenizer = Tokenizer.load(folder)
    texts = {}
    for source in ("prose", "code"):
        if source in blend.sources:
            texts[source] = (np.load(folder / f"{source}.npy", mmap_mode="r"), np.load(folder / f"{source}_ends.npy"))
    first = shard * SHARD_ROWS
    arrays, placed = pack_shard(tokenizer, blend, texts, min(SHARD_ROWS, rows - first), length, f"{seed} {shard}")
    for name, array in zip(ARRAYS, arrays):
        out = np.load(folder / f"{name}.npy", mmap_mode="r+")
        out[first : first + len(array)] = array
        out.flush()
    return placed


def flatten(tokenizer, texts):
    """Texts as one array of ids and the end of each document in it."""
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.asarray(e, np.uint16) for e in encoded]), np.cumsum([len(e) for e in encoded])


def prepare(folder, tokenizer, blend, rows, length, texts, seed=0, workers=None, say=print):
    """Write `rows` packed rows of `length` tokens to `folder`, or find them there already.

    texts: {"prose": [str], "code": [str]}, the training texts. What makes the data (sizes, blend, seed, vocabulary,
    text) is kept in meta.json, written last: a folder that does not match, or was left unfinished, is made anew. Returns the realised shares of the sources.
    """
    folder = Path(folder)
    if tokenizer.vocab_size > 65536:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit 16 bits: use at most 65,536 entries")
    if rows < 1 or length < 64:
        raise ValueError(f"a data set needs at least 1 row of at least 64 tokens; got {rows} rows of {length}")
    workers = workers or min(os.cpu_count() or 1, 64)
    fingerprint = blake2b(digest_size=16)
    for part in (tokenizer.encode("the quick brown fox 123"), *(t for s in sorted(texts) for t in texts[s])):
        fingerprint.update(str(part).encode("utf-8", "replace"))
    families = blend.families and {str(k): v for k, v in blend.families.items()}
    meta = {
        "rows": rows, "length": length, "seed": seed, "vocab_size": tokenizer.vocab_size,
        "blend": {"sources": blend.sources, "families": families}, "text": fingerprint.hexdigest(),
    }  # fmt: skip
    try:
        found = json.loads((folder / "meta.json").read_text())
        if {k: found[k] for k in meta} == json.loads(json.dumps(meta)):
            return found["shares"]
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    for source in blend.sources:
        if source in ("prose", "code"):
            if not texts.get(source):
                raise ValueError(f"the blend gives {source} {blend.sources[source]:.0%} but there is no such text")
            ids, ends = flatten(tokenizer, texts[source])
            np.save(folder / f"{source}.npy", ids)
            np.save(folder / f"{source}_ends.npy", ends)
    for name, dtype in ARRAYS.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (rows, length)).flush()
    shards = -(-rows // SHARD_ROWS)
    jobs = [(folder, shard, rows, length, blend, seed) for shard in range(shards)]
    placed, start, last = dict.fromkeys(blend.sources, 0), time.time(), 0.0
    with _pool(min(workers, shards)) as pool:
        for done, part in enumerate(pool.map(_write_shard, jobs), 1):
            placed = {k: placed[k] + part[k] for k in placed}
            now = time.time()
            if now - last > 2 or done == shards:
                tokens = done * min(SHARD_ROWS, rows) * length
                say(f"  data: {done}/{shards} shards, {tokens / 1e6:.1f} M tokens, {now - start:.0f} s")
                last = now
    total = sum(placed.values())
    meta["shares"] = {k: v / total for k, v in placed.items()}
    temporary = folder / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1))
    os.replace(temporary, folder / "meta.json")
    return meta["shares"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading it
# ---------------------------------------------------------------------------------------------------------------------


class Loader:
    """Batches of packed rows in a shuffled order that a state of two integers describes.

    batch_rows: rows in a global batch; rank r of `world` gets rows r, r + world, ... of it, so ranks never share a row
    and the global batch does not depend on their number. An epoch's order is a permutation seeded by the epoch.
    """

    def __init__(self, folder, batch_rows, rank=0, world=1, seed=0):
        self.arrays = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        self.rows, self.length = self.arrays[0].shape
        if batch_rows > self.rows:
            raise ValueError(f"a batch of {batch_rows} rows is larger than the data set of {self.rows} rows")
        if batch_rows % world:
            raise ValueError(f"a batch of {batch_rows} rows cannot be split evenly over {world} processes")
        self.batch_rows, self.rank, self.world, self.seed = batch_rows, rank, world, seed
        self._reader, self._order = ThreadPoolExecutor(1), (None, None)
        self.restore({"epoch": 0, "position": 0})

    def state(self):
        """Where the next batch begins: {"epoch", "position"}, two integers."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
        self._ahead = self._reader.submit(self._read, self.epoch, self.position)

    def next(self):
        """(ids, doc, kind): int64, int64 and uint8 arrays of this rank's rows, (batch_rows / world, length). One batch
        is read ahead in a thread while the last one is trained on."""
        batch, self.epoch, self.position = self._ahead.result()
        self._ahead = self._reader.submit(self._read, self.epoch, self.position)
        return batch

    def _read(self, epoch, position):
        if position + self.batch_rows > self.rows:
            epoch, position = epoch + 1, 0
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        mine = np.sort(self._order[1][position + self.rank : position + self.batch_rows : self.world])
        ids, doc, kind = (array[mine] for array in self.arrays)
        return (ids.astype(np.int64), doc.astype(np.int64), kind), epoch, position + self.batch_rows


if __name__ == "__main__":
    sys.exit("data.py is a library: `python train.py` prepares the data it needs; see its --help for the blend")
