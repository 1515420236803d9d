"""The record of `bench.py kernels` as tables: made from the record alone, also later and elsewhere."""

from benchmarks.floors import floor_ms
from benchmarks.timing import OURS, PEER, PLAIN

ERROR_BAR = 1.5  # our error over mamba_ssm's


def best(row, prefix):
    """(ms, name) of the fastest contestant whose name begins with prefix, or None."""
    return min(((ms, name) for name, ms in row["ms"].items() if name.startswith(prefix)), default=None)


def say_rows(bench, rows):
    for r in rows:
        times = "  ".join(f"{name} {ms * 1e3:,.1f}" for name, ms in r["ms"].items())
        spread = max(r["spread"].values(), default=0)
        bench.say(f"    {r['part']:19} us: {times}  (spread {spread:.1%})")


def cell(row, prefix, unit=1.0, digits=3):
    """A contestant's time; for one that has none, why; "-" if it did not take part."""
    found = best(row, prefix)
    if found:
        chunk = found[1].removeprefix(prefix).strip()
        return f"{found[0] * unit:,.{digits}f}" + (f" ({chunk})" if chunk.isdigit() else "")
    return next((why for name, why in row["failed"].items() if name.startswith(prefix)), "-")


def ratio(row, prefix):
    """How many times longer the contestant takes than we do."""
    mine, other = best(row, OURS), best(row, prefix)
    return f"{other[0] / mine[0]:.2f}" if mine and other else "-"


def spread(row):
    """The larger of our own and the best peer's difference between the two measurements."""
    names = [found[1] for found in (best(row, OURS), best(row, PEER)) if found]
    return f"{max(row['spread'][name] for name in names):.1%}" if names else "-"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, r)) + " |" for r in rows])


def scan_table(rows, top):
    lines = []
    for r in rows:
        floor, which = floor_ms(r["bytes"], r["flops"], top)
        mine = best(r, OURS)
        rate = lambda count, mine=mine: f"{count / mine[0] / 1e9:.2f}" if mine else "-"
        lines.append([
            r["what"], r["part"], cell(r, OURS), cell(r, PEER), ratio(r, PEER), cell(r, PLAIN), ratio(r, PLAIN),
            f"{floor:.3f} ({which})", rate(r["bytes"]), rate(r["flops"]), spread(r),
        ])  # fmt: skip
    head = ["shape", "pass", "nano2, ms", "mamba_ssm, ms (chunk)", "ratio", "PyTorch, ms", "ratio", "floor, ms", "TB/s",
            "TFLOP/s", "spread"]  # fmt: skip
    return table(head, lines)


def share_table(rows, top, peers):
    """Times in microseconds, and our share of the copy bandwidth: what the bytes would take over what we take."""
    lines = []
    for r in rows:
        mine = best(r, OURS)
        share = f"{r['bytes'] / top['copy'] * 1e3 / mine[0]:.0%}" if mine else "-"
        others = [text for name in peers for text in (cell(r, name, 1e3, 1), ratio(r, name))]
        lines.append([r["what"], r["part"], cell(r, OURS, 1e3, 1), share, *others, spread(r)])
    columns = [text for name in peers for text in (f"{name}, us", "ratio")]
    return table(["what", "pass", "nano2, us", "of copy bandwidth", *columns, "spread"], lines)


def decode_table(rows, top):
    lines = []
    for r in rows:
        floor, mine = r["bytes"] / top["copy"] * 1e6, best(r, OURS)
        over = f"{mine[0] * 1e3 / floor:.2f}" if mine else "-"
        outside = {**r, "ms": {k: v for k, v in r["ms"].items() if k == PEER}}
        lines.append([
            r["what"], r["part"], cell(r, OURS, 1e3, 2), f"{floor:.2f}", over,
            cell(outside, PEER, 1e3, 1), cell(r, f"{PEER} in a graph", 1e3, 2), spread(r),
        ])  # fmt: skip
    head = ["what", "in one graph", "nano2, us a layer", "floor, us", "over the floor", "mamba_ssm's state update, us",
            "the same in a graph, us", "spread"]  # fmt: skip
    return table(head, lines)


def errors_table(rows):
    lines, names = [], []
    for r in rows:
        names = next((list(e) for e in r["errors"].values()), names)
        for who in (OURS, PEER, PLAIN):
            e = r["errors"].get(who)
            label = f"{who} ({r['chunk']})" if who == PEER else who
            if e:
                lines.append([r["what"], label, *(f"{e[q]:.1e}" for q in names)])
            elif who in r["failed"]:
                lines.append([r["what"], label, r["failed"][who], *("" for _ in names[1:])])
        if OURS in r["errors"] and PEER in r["errors"]:
            mine, other = r["errors"][OURS], r["errors"][PEER]
            lines.append([r["what"], "ratio", *(f"{mine[q] / other[q]:.2f}" if other[q] else "-" for q in names)])
    return table(["shape", "", *names], lines)


def tables(record):
    """The record as markdown."""
    top, found, peers = record["ceilings"], record["sections"], record["peers"]
    about = ", ".join(f"{name} {what}" for name, what in peers.items())
    parts = [
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, one {record['card']}, torch "
        f"{record['torch']}, triton {record['triton']}. {about}. Copy {top['copy'] / 1e12:.2f} TB/s (read + written), "
        f"8192^3 bf16 matmul {top['matmul'] / 1e12:.0f} TFLOP/s. Medians, contestants in turns, L2 cleared; the spread "
        "is between two measurements."
    ]
    for c in found.get("compile", ()):
        parts.append(
            f"A fresh process with an empty cache: {c['first']:.1f} s for the first scan forward + backward "
            f"({c['kernels']} kernels compiled, none tuned), {c['second'] * 1e3:.1f} ms for the second."
        )
    if "scan" in found:
        parts += ["**Scan.** Ratio: their time over ours.", scan_table(found["scan"], top)]
    if "conv" in found:
        parts += ["**Convolution.**", share_table(found["conv"], top, [PLAIN, "causal_conv1d"])]
    if "norm" in found:
        parts += ["**Norms.**", share_table(found["norm"], top, [PLAIN, PEER])]
    if "decode" in found:
        text = "**Decode.** Convolution, state, gate and norm of one token; mamba_ssm's function is the state and gate."
        parts += [text, decode_table(found["decode"], top)]
    if "errors" in found:
        text = f"**Errors** against float64, relative; the bar is {ERROR_BAR:g} times mamba_ssm's."
        parts += [text, errors_table(found["errors"])]
    parts += [f"{name} was not measured: {why}." for name, why in record["failed"].items()]
    return "\n\n".join(parts)


def rewrite(text, section, name="kernels"):
    """The text with `section` between the two markers of that name. ValueError if they are not there, once each and in
    order."""
    start, end = f"<!-- bench {name} -->", f"<!-- /bench {name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(
            f"RESULTS.md must hold {start} and, after it, {end}, once each: add the two lines, then --write"
        )
    return text[: text.index(start) + len(start)] + f"\n{section}\n" + text[text.index(end) :]
