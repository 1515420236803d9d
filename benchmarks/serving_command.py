"""The command behind `python bench.py decode` and its neighbours: a section of serving.py measured into one record,
kept as JSON; its table and figure are made from the record alone, also later and elsewhere."""

import json
from datetime import date
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.sections import SIZES, ceilings
from benchmarks.serving import CAP, FULL, GIB, SECTIONS, TINY, config_of
from benchmarks.serving_tables import figure, tables
from benchmarks.tables import rewrite
from benchmarks.timing import Bench, cpu_name
from device import peak_flops
from sizes import roofline


def command(
    section, write=False, out="out/bench_serving.json", source=None, commit_name=None, tiny=False, sampled=False,
    device="cuda", preset=None, rows=None, tokens=None,
):  # fmt: skip
    """Measure a section into the record `out` (or take the record `source`) and print its tables; `write` puts them,
    and for throughput the figure, into RESULTS.md. ValueError, in one sentence, for what cannot be done."""
    results, out = measure.ROOT / "RESULTS.md", Path(out)
    if write:
        rewrite(results.read_text("utf-8"), "", section)
    if source is None:
        earlier(out)  # first: nobody wants to hear it after minutes of measuring
        words = [f"--device {device}" * (device != "cuda"), f"--preset {preset}" if preset else "", "--tiny" * tiny]
        words += [f"--rows {' '.join(map(str, rows))}" if rows else "", f"--tokens {tokens}" if tokens else ""]
        words = ["python bench.py", section, *words, "--sampled" * sampled]
        scale = dict(TINY if tiny else FULL)
        wishes = dict(hybrid=preset, decode_rows=rows, tokens=tokens)
        scale |= {name: wish for name, wish in wishes.items() if wish}
        cuda = device == "cuda" and (torch.cuda.is_available() or not tiny)
        record = measured(section, scale, cuda, out, commit_name, " ".join(filter(None, words)), sampled)
    else:
        if not Path(source).exists():
            raise ValueError(f"--source {source} cannot be used: there is no such file")
        record = earlier(source)
    if section not in record:
        raise ValueError(f"--source {source} has no {section}: it holds {', '.join(record) or 'nothing'}")
    try:
        text = tables(section, record[section])
    except (KeyError, TypeError) as e:
        raise ValueError(f"--source {source} cannot be used: {type(e).__name__} {e} in its {section}") from None
    print("\n" + text)
    if write:
        if section == "throughput":
            figure(record[section], measure.ROOT / "assets" / "throughput.png")
        results.write_text(rewrite(results.read_text("utf-8"), text, section), "utf-8")
        print(f"\nwritten to {results.name}")
    return 0


def earlier(path):
    """The record of that name, {} if there is none yet."""
    try:
        record = json.loads(Path(path).read_text("utf-8")) if Path(path).exists() else {}
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be used as a record: {type(e).__name__} {e}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of bench.py: it holds a {type(record).__name__}")
    return record


@torch.inference_mode()
def measured(section, scale, cuda, out, commit_name, command, sampled):
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            f"{section} is measured on a CUDA GPU, and PyTorch sees none: run this on a machine with one; --tiny runs "
            "anywhere"
        )
    dtype = torch.bfloat16 if cuda else torch.float32
    bench = Bench("cuda" if cuda else "cpu", dtype, 6, say=lambda text: print(text, flush=True))
    card = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    header = dict(
        card=card, torch=torch.__version__, date=date.today().isoformat(), commit=commit_name or measure.commit(),
        command=command,
    )  # fmt: skip
    bench.say("; ".join(f"{name} {value}" for name, value in header.items()))
    top = ceilings(bench, SIZES["ceilings"] if cuda else dict(copy_bytes=2**26, matmul=512))
    header |= dict(copy=top["copy"], peak=peak_flops(bench.device))
    del bench.wipe  # a quarter of a GiB that a cap would count
    work = SECTIONS[section](bench, scale, *([not sampled] if section == "throughput" else []))
    rows = list(work)
    if section == "throughput":
        for row in rows:
            for side in ("transformer", "hybrid"):
                n, step, speed = roofline(config_of(scale[side]), CAP * GIB, row["prompt"], row["answer"], top["copy"])
                row[side] |= dict(roofline_rows=n, roofline_tokens_a_second=speed)
    record = earlier(out)
    record[section] = {**header, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1))
    bench.say(f"record: {out}")
    return record
