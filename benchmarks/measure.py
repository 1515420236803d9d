"""`python bench.py kernels`: what the Triton kernels cost on this card, beside other people's, beside the floor.

A time alone says little. Three things are put next to each:

- the floor: the bytes that must move (every input read once, every output written once) at the rate at which this card
  was just seen to copy, or the arithmetic at the rate of a large matrix product, whichever takes longer. How many bytes
  and operations that is stands in the small functions below, so that anybody can redo the sum;
- mamba_ssm's and PyTorch's time for the same function on the same inputs, in turns with ours within one run, because a
  card is some per cent faster on one day than on another and only the ratio survives that;
- the error of both against float64: fast and wrong is easy.

Contestants must agree before any is timed. A contestant that fails or runs out of memory gets that into its cell, and
the rest goes on. mamba_ssm is no dependency: it is used if Python finds it, compiled or not (its Triton files need no
compiler, though its package asks for one).

What comes out is one record, kept as JSON; the tables are made from the record alone, also later and elsewhere.
"""

import importlib
import importlib.util
import json
import subprocess
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from benchmarks.sections import ROOT, SIZES, ceilings, compile_cost, conv, decode, errors, norm, scan
from benchmarks.tables import rewrite, tables
from benchmarks.timing import Bench, load_peers, reason

SECTIONS = ("ceilings", "compile", "scan", "conv", "norm", "decode", "errors")


def commit():
    """The checkout's commit and whether it was changed since, or "unknown" outside of a checkout."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return "unknown" if head.returncode else head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


@contextmanager
def kept(record, name, bench):
    """A section that may fail: then the record says why, and the others go on."""
    start = time.perf_counter()
    try:
        yield
    except Exception as e:
        record["failed"][name] = reason(e)
        bench.say(f"{name}: {reason(e)}")
    bench.say(f"{name} took {time.perf_counter() - start:.0f} s")


def measure(bench, only, sizes, header, out):
    """Run the sections and return the record; `out` gets it after every section."""
    record = {**header, "ceilings": ceilings(bench, sizes["ceilings"]), "sections": {}, "failed": {}}
    top = record["ceilings"]
    bench.say(f"copy {top['copy'] / 1e12:.2f} TB/s, matmul {top['matmul'] / 1e12:.0f} TFLOP/s")
    work = dict(compile=compile_cost, scan=scan, conv=conv, norm=norm, decode=decode, errors=errors)
    for name, run in work.items():
        if name in only:
            with kept(record, name, bench):
                rows = record["sections"].setdefault(name, [])
                for made in run(bench, sizes[name]):  # one by one: what was measured before a failure stays
                    rows.append(made)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1))
    return record


def run(only=SECTIONS, write=False, quick=False, out="out/bench_kernels.json", source=None, commit_name=None):
    """The command. ValueError, in one sentence, for what cannot be done."""
    results = ROOT / "RESULTS.md"
    place = only[0] if len(only) == 1 else "kernels"  # a section measured alone has a place of its own
    if write:
        rewrite(results.read_text("utf-8"), "", place)  # first: nobody wants to hear it after minutes of measuring
    if source is not None:
        try:
            record = json.loads(Path(source).read_text("utf-8"))
            text = tables(record)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--source {source} cannot be used: {type(e).__name__} {e}") from None
    else:
        record = fresh(only, quick, Path(out), commit_name)
        text = tables(record)
        print(f"\nrecord: {out}")
    print("\n" + text)
    if write:
        results.write_text(rewrite(results.read_text("utf-8"), text, place), "utf-8")
        print(f"\nwritten to {results.name}")
    return 0


def fresh(only, quick, out, commit_name):
    """A new record, measured on this machine's GPU."""
    if not torch.cuda.is_available():
        raise ValueError("kernels are measured on a CUDA GPU, and PyTorch sees none: run this on a machine with one")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels need Triton, which is not installed: pip install triton")
    import triton

    say = lambda text: print(text, flush=True)
    words = ["python bench.py kernels", "--quick" * quick, *(["--only", *only] if set(only) != set(SECTIONS) else [])]
    header = dict(
        card=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        date=date.today().isoformat(), commit=commit_name or commit(), command=" ".join(filter(None, words)),
    )  # fmt: skip
    say("; ".join(f"{name} {value}" for name, value in header.items()))
    peers, header["peers"] = load_peers(say)
    bench = Bench("cuda", torch.bfloat16, 6 if quick else 15, peers, say, (128, 256) if quick else (64, 128, 256))
    return measure(bench, only, SIZES, header, out)
