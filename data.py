"""Training data: text from `corpus.py` and tasks from `tasks.py`, blended, packed into rows, read in batches.

    documents  --tokenise-->  ids and what is learned  --pack-->  rows of equal length  --shuffle-->  batches

*What is learned*: of a task only the response (trace and answer), of a text everything. Asking a small model to predict
random questions as well wastes most of its gradient.

*Packing*: rows are filled with whole task examples; text, which may be cut anywhere, fills what is left, so no place is
wasted on padding. `doc` says which document a token belongs to, and the model stops convolution, state and attention
at a document's edge, so a packed row behaves exactly as its documents alone.

*Preparing once*: all cores write packed rows into three arrays on disk, shard by shard. A shard depends only on the
seed and its number, so the data do not depend on how many cores made them. Training then only indexes rows: a GPU does
not wait, a position is two integers, and ranks read disjoint rows of the same shuffled order. With a curriculum
(curriculum.py) a shard belongs to one phase, and a step reads rows of its own phase only.

This file must not know models. Source of the idea of a blend with weights in tokens: report section 2.2.
"""

import errno
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random

import numpy as np

import corpus
import curriculum
import tasks
from tokenizer import Tokenizer, train_bpe

NOT_LEARNED, TASK, TEXT = 0, 1, 2  # the values of `kind`: what a token counts for as a prediction target


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
        encoded = tokenizer.encode_examples((s.question, s.trace, s.answer) for s in batch)
        fitting = [(ids, start) for ids, start in encoded if len(ids) <= length]
        if not fitting:
            raise ValueError(
                f"rows of {length} tokens are too short: of {len(batch)} tasks the shortest has "
                f"{min(len(ids) for ids, _ in encoded)}; raise --length, or --vocab for fewer tokens a task"
            )
        yield from fitting


def _id_type(tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 65536 else np.int32


def pack_shard(tokenizer, blend, texts, rows, length, seed):
    """Packed rows: ids uint16 (int32 if the vocabulary is larger), doc int16 and kind uint8, each (rows, length), and
    the tokens placed by source.

    texts: {"prose": (ids, ends), "code": (ids, ends)}. The next document is taken from the source that is furthest
    behind its share. A task that does not fit any more waits for the next row; text fills the rest of this one. With no
    text in the blend the rest is padding: document -1, not learned.
    """
    ids = np.zeros((rows, length), _id_type(tokenizer))
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

ARRAYS = {"ids": None, "doc": np.int16, "kind": np.uint8}  # ids as the vocabulary needs it
SHARD_ROWS = 256


def _write_shard(job):
    folder, phase, first, rows, length, blend, seed = job
    tokenizer = Tokenizer.load(folder)
    texts = {}
    for source in ("prose", "code"):
        if source in blend.sources:
            texts[source] = (np.load(folder / f"{source}.npy", mmap_mode="r"), np.load(folder / f"{source}_ends.npy"))
    arrays, placed = pack_shard(tokenizer, blend, texts, rows, length, seed)
    for name, array in zip(ARRAYS, arrays):
        out = np.load(folder / f"{name}.npy", mmap_mode="r+")
        out[first : first + len(array)] = array
        out.flush()
    return phase, placed


def flatten(tokenizer, texts):
    """Texts as one array of ids and the end of each document in it."""
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.asarray(e, _id_type(tokenizer)) for e in encoded]), np.cumsum([len(e) for e in encoded])


def prepare(folder, tokenizer, blend, rows, length, texts, seed=0, workers=None, say=print):
    """Write `rows` packed rows of `length` tokens to `folder`, or find them there already.

    blend, rows: one of each, or for a curriculum a list of each, a phase's rows behind those of the phase before.
    texts: {"prose": [str], "code": [str]}, the training texts. What makes the data (sizes, blend, seed, vocabulary,
    text) is kept in meta.json, written last: a folder that does not match, or was left unfinished, is made anew.
    Returns the realised shares of the sources, for a curriculum a list of them.
    """
    folder, phased = Path(folder), isinstance(blend, list)
    phases = list(zip(blend, rows, strict=True)) if phased else [(blend, rows)]
    rows = sum(n for _, n in phases) if all(n >= 1 for _, n in phases) else 0
    if rows < 1 or length < 64:
        raise ValueError(f"a data set needs at least 1 row of at least 64 tokens; got {rows} rows of {length}")
    for part, _ in phases:
        lacking = [s for s in part.sources if s in ("prose", "code") and not texts.get(s)]
        if lacking:
            raise ValueError(f"the blend gives {lacking[0]} {part.sources[lacking[0]]:.0%} but there is no such text")
    workers = workers or min(os.cpu_count() or 1, 64)
    told = [
        {"sources": part.sources, "families": part.families and {str(k): v for k, v in part.families.items()}}
        for part, _ in phases
    ]
    meta = {
        "rows": rows, "length": length, "seed": seed, "vocab_size": tokenizer.vocab_size,
        "blend": told if phased else told[0], "text": digest(texts),
        "tokenizer": digest({"ranks": sorted(tokenizer.ranks.items())}),
    }  # fmt: skip
    if phased:
        meta["phase_rows"] = [n for _, n in phases]
    found = _meta(folder)
    if "shares" in found and {k: found.get(k) for k in meta} == json.loads(json.dumps(meta)):
        return found["shares"]
    ours = [path for path in (folder, *folder.parents) if not path.exists()]
    size = 3 + np.dtype(_id_type(tokenizer)).itemsize  # bytes a token of the three arrays
    try:
        _clear(folder)
        shares = _write(folder, tokenizer, phases, length, texts, seed, workers, say)
        meta["shares"] = shares if phased else shares[0]
        temporary = folder / "meta.json.tmp"
        temporary.write_text(json.dumps(meta, indent=1))
        os.replace(temporary, folder / "meta.json")
    except BaseException as error:
        _clear(folder)
        for path in ours:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError):
            raise ValueError(
                f"cannot write {rows * length * size / 1e6:,.0f} MB of data to {folder} ({error.strerror or error}): "
                "free some space, lower --data-rows, or give another --out"
            ) from None
        raise
    return meta["shares"]


def _meta(folder):
    """What meta.json says of a prepared folder; {} if there is none."""
    try:
        found = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def digest(texts):
    """A fingerprint of {source: [text]}."""
    state = blake2b(digest_size=16)
    for part in (part for source in sorted(texts) for part in texts[source]):
        state.update(f"{part}\0".encode("utf-8", "replace"))
    return state.hexdigest()


def _clear(folder):
    """Remove what `prepare` writes and nothing else, meta.json first: without it nothing counts as prepared."""
    names = ["meta.json", "meta.json.tmp", "tokenizer.json", "tokenizer_config.json"]
    names += [f"{name}.npy" for name in (*ARRAYS, "prose", "prose_ends", "code", "code_ends")]
    for name in names if folder.is_dir() else ():
        (folder / name).unlink(missing_ok=True)


def fingerprint(folder):
    """A short text that differs when other rows were prepared: of what meta.json says makes the data."""
    return digest({k: [json.dumps(v)] for k, v in _meta(folder).items() if k != "shares"})


def _write(folder, tokenizer, phases, length, texts, seed, workers, say):
    """Everything but meta.json; returns the realised shares of each phase. OSError if the disk is full."""
    rows = sum(n for _, n in phases)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    if shutil.disk_usage(folder).free < rows * length * (3 + np.dtype(_id_type(tokenizer)).itemsize):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for source in {s for blend, _ in phases for s in blend.sources} & {"prose", "code"}:
        ids, ends = flatten(tokenizer, texts[source])
        np.save(folder / f"{source}.npy", ids)
        np.save(folder / f"{source}_ends.npy", ends)
    for name, dtype in ARRAYS.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype or _id_type(tokenizer), (rows, length)).flush()
        if hasattr(os, "posix_fallocate"):  # take the room now: a mapped file on a full disk would kill the writer
            with open(folder / f"{name}.npy", "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
    jobs, first = [], 0
    for phase, (blend, own) in enumerate(phases):
        for shard, at in enumerate(range(0, own, SHARD_ROWS)):
            name = f"{seed} {shard}" if len(phases) == 1 else f"{seed} phase {phase} {shard}"
            jobs.append((folder, phase, first + at, min(SHARD_ROWS, own - at), length, blend, name))
        first += own
    placed, start, last = [dict.fromkeys(blend.sources, 0) for blend, _ in phases], time.time(), 0.0
    with corpus.pool(min(workers, len(jobs))) as processes:
        for done, (phase, part) in enumerate(processes.map(_write_shard, jobs), 1):
            placed[phase] = {k: v + part[k] for k, v in placed[phase].items()}
            now = time.time()
            if now - last > 2 or done == len(jobs):
                tokens = sum(job[3] for job in jobs[:done]) * length
                say(f"  data: {done}/{len(jobs)} shards, {tokens / 1e6:.1f} M tokens, {now - start:.0f} s")
                last = now
    return [{k: v / sum(part.values()) for k, v in part.items()} for part in placed]


def make(config, workers, say, tokenizer=None):
    """(data folder, tokenizer, held-out texts) of a run: reads text, trains a tokenizer if none is given, packs rows,
    or finds them in `out/data`. config has out, text, text_share, data_rows, batch_rows, phases, length, vocab, seed
    (see train.py)."""
    folder = Path(config.out) / "data"
    if config.data_rows * config.length < 20e6:
        workers = 1  # starting processes would take longer than the work
    size = config.data_rows * config.length * config.text_share * 4  # about four bytes a token
    size = int(min(max(size, 1e6), 64e6))
    start = time.time()
    if config.text:
        train, held = corpus.read_folder(config.text)
        texts, held_out, text_parts = {"prose": train}, {"text": held}, {"prose": 1.0}
    else:
        prose, code = (corpus.read_text(kind, share * size, workers) for kind, share in (("prose", 0.6), ("code", 0.4)))
        texts, held_out = {"prose": prose[0], "code": code[0]}, {"prose": prose[1], "code": code[1]}
        text_parts = {"prose": 0.6, "code": 0.4}
    characters = sum(len(t) for part in texts.values() for t in part)
    origin = config.text or "the installed Python packages"
    say(f"  text: {characters / 1e6:.1f} MB from {origin}, {time.time() - start:.0f} s")
    shares, rows = curriculum.boundaries(config.phases), config.data_rows
    if shares:
        blend = [Blend(sources, families) for sources, families in curriculum.blends(config.text_share, text_parts)]
        cuts = [0, *(round(share * rows) for share in shares), rows]
        rows = [max(b - a, config.batch_rows) for a, b in zip(cuts, cuts[1:])]
    else:
        task_share, sources = 1 - config.text_share, {k: config.text_share * v for k, v in text_parts.items()}
        blend = Blend({"reasoning": 0.53 * task_share, "retrieval": 0.47 * task_share, **sources})
    used = {k: v for k, v in texts.items() if any(k in part.sources for part in (blend if shares else [blend]))}
    tokenizer = tokenizer or _own_tokenizer(folder, config.vocab, texts, digest(used), size, say)
    realised = prepare(folder, tokenizer, blend, rows, config.length, used, config.seed, workers, say)
    for i, (part, found) in enumerate(zip(blend, realised) if shares else [(blend, realised)], 1):
        line = ", ".join(f"{k} {v:.1%} / {part.sources[k]:.1%}" for k, v in found.items())
        say(f"  blend{f' {i}' if shares else ''}, realised / intended: {line}")
    return folder, tokenizer, held_out


def _own_tokenizer(folder, vocab, texts, text, size, say):
    """The tokenizer of a data folder that was trained on this text (a digest), or a new one."""
    try:  # the tokenizer that is there, if it was trained on this text
        tokenizer = Tokenizer.load(folder)
        if (tokenizer.vocab_size, _meta(folder).get("text")) != (vocab, text):
            raise ValueError
    except (ValueError, OSError):
        start, stream = time.time(), tasks.blend(Random("tokenizer"))
        examples = [s for s, _ in zip(stream, range(min(30 * vocab, 60_000)))]
        chat = "System\n\nUser\n{}\nAssistant\n{}\n{}\n"
        spoken = [chat.format(s.question, s.trace, s.answer) for s in examples]
        sample = [
            t for part in texts.values() for t in part[:: 1 + size // 8_000_000]
        ]  # counts settle long before the end
        tokenizer = train_bpe(spoken + sample, vocab)
        say(f"  tokenizer: byte-level BPE, {tokenizer.vocab_size} entries, {time.time() - start:.0f} s")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Reading it
# ---------------------------------------------------------------------------------------------------------------------


class Loader:
    """Batches of packed rows in a shuffled order that a state of two integers describes.

    extra: names of further arrays in the folder, with an entry for each row, to be handed out as they are.
    batch_rows: rows in a global batch; rank r of `world` gets rows r, r + world, ... of it, so ranks never share a row
    and the global batch does not depend on their number. An epoch's order is a permutation seeded by the epoch. part:
    (first row, rows) to read of the data set, by default all of it.
    """

    def __init__(self, folder, batch_rows, rank=0, world=1, seed=0, part=None, extra=()):
        self.arrays = [np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in (*ARRAYS, *extra)]
        self.rows, self.length = self.arrays[0].shape
        self.first, self.rows = part or (0, self.rows)
        if batch_rows > self.rows:
            raise ValueError(f"a batch of {batch_rows} rows is larger than the data set of {self.rows} rows")
        if batch_rows % world:
            raise ValueError(f"a batch of {batch_rows} rows cannot be split evenly over {world} processes")
        self.batch_rows, self.rank, self.world = batch_rows, rank, world
        self.seed = seed if isinstance(seed, list) else [seed]
        self._reader, self._order = ThreadPoolExecutor(1), (None, None)
        self.restore({"epoch": 0, "position": 0})

    def state(self):
        """Where the next batch begins: {"epoch", "position"}, two integers."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state):
        self.epoch, self.position = state["epoch"], state["position"]
        self._ahead = self._reader.submit(self._read, self.epoch, self.position)

    def next(self):
        """(ids, doc, kind, *extra): int64, int64 and uint8 arrays of this rank's rows, (batch_rows / world, length),
        and those of `extra`. One batch is read ahead in a thread while the last one is trained on."""
        batch, self.epoch, self.position = self._ahead.result()
        self._ahead = self._reader.submit(self._read, self.epoch, self.position)
        return batch

    def _read(self, epoch, position):
        if position + self.batch_rows > self.rows:
            epoch, position = epoch + 1, 0
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.rows)
        mine = self.first + np.sort(self._order[1][position + self.rank : position + self.batch_rows : self.world])
        ids, doc, *rest = (array[mine] for array in self.arrays)
        return (ids.astype(np.int64), doc.astype(np.int64), *rest), epoch, position + self.batch_rows


class PhasedLoader:
    """Batches of a curriculum: each step from the rows of its own phase, each phase with a position of its own.

    starts: the first step of every phase. The data set must have been prepared with as many phases.
    """

    def __init__(self, folder, starts, batch_rows, rank=0, world=1, seed=0):
        meta = _meta(Path(folder))
        rows = meta.get("phase_rows", [])
        if len(rows) != len(starts):
            raise ValueError(f"{folder} was prepared for {len(rows) or 1} phases, this run has {len(starts)}")
        self.starts, self.step = list(starts), 0
        self.intended, self.realised = [blend["sources"] for blend in meta["blend"]], meta["shares"]
        parts = [(sum(rows[:i]), n) for i, n in enumerate(rows)]
        self.loaders = [Loader(folder, batch_rows, rank, world, [seed, i], part) for i, part in enumerate(parts)]

    def state(self):
        """Where the next batch begins: {"step", "phases": [{"epoch", "position"}, ...]}."""
        return {"step": self.step, "phases": [loader.state() for loader in self.loaders]}

    def restore(self, state):
        self.step = state["step"]
        for loader, own in zip(self.loaders, state["phases"], strict=True):
            loader.restore(own)

    def next(self):
        """As `Loader.next`."""
        batch = self.loaders[curriculum.phase_of(self.step, self.starts)].next()
        self.step += 1
        return batch


if __name__ == "__main__":
    sys.exit("data.py is a library: `python train.py` prepares the data it needs; see its --help for the blend")
