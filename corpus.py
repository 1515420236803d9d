"""Text that is on every machine: nothing is downloaded, nothing is shipped.

Python brought along megabytes of technical English in its docstrings ("prose") and of source ("code"). Both are read
where they lie, at run time, in an order that does not depend on the file system. Or give a folder of your own texts.

One file in 20 is held out, chosen by a hash of its name: bits per byte are measured there, on text never trained on.
This file must not know tokens or models.
"""

import ast
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

HELD_OUT = 20


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


PACKAGES = ("torch", "sympy", "networkx", "numpy", "matplotlib")  # installed with this project's own requirements

NOT_TEXT = {"test", "tests", "testing", "site-packages", "idlelib"}  # folders left out: tests repeat themselves


def installed_files(kind):
    """Python files to read for "prose" (their docstrings) or "code": the standard library, then the packages."""
    site = Path(sysconfig.get_path("purelib"))
    roots = [Path(sysconfig.get_path("stdlib")), *(site / name for name in PACKAGES)]
    files = []
    for root in roots:
        found = {p: p.relative_to(root).as_posix() for p in root.rglob("*.py")}
        found = {p: name for p, name in found.items() if not NOT_TEXT & set(name.split("/"))}
        files += sorted(found, key=lambda p: blake2b(found[p].encode(), digest_size=8).digest())
    return files


def read_text(kind, max_bytes, workers=1):
    """Two lists of texts, (training, held out), together about `max_bytes`; the split is by file name."""
    files, texts, size = installed_files(kind), ([], []), 0
    with pool(workers) as workers_pool:
        for start in range(0, len(files), 256):
            batch = files[start : start + 256]
            for path, text in zip(batch, workers_pool.map(_read, [(kind, str(p)) for p in batch], chunksize=16)):
                if len(text) > 200 and size < max_bytes:
                    digest = blake2b(path.name.encode(), digest_size=4).digest()
                    texts[int.from_bytes(digest, "big") % HELD_OUT == 0].append(text)
                    size += len(text)
            if size >= max_bytes:
                break
    if not texts[1] and len(texts[0]) > 1:
        texts[1].append(texts[0].pop())  # too few files for one in 20
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
    held = [p for i, p in enumerate(pieces) if i % HELD_OUT == HELD_OUT - 1]
    if sum(map(len, held)) < 1000:  # too few or too short: the last tenth of each
        return [p[: -len(p) // 10] for p in pieces if len(p) > 1], [p[-len(p) // 10 :] for p in pieces]
    return [p for i, p in enumerate(pieces) if i % HELD_OUT != HELD_OUT - 1], held


class _Serial:
    """Stands in for a process pool where one process is enough."""

    map = staticmethod(lambda fn, jobs, chunksize=1: map(fn, jobs))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def pool(workers):
    """`spawn`, because a fork of a process that already runs torch's threads can hang."""
    return _Serial() if workers <= 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
