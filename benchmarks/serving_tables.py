"""The record of benchmarks/serving.py as tables and a figure: from the record alone."""

from benchmarks.tables import table

REPORTED = {(1024, 8192): 3.3, (8192, 16384): 6.3}  # Figure 1 of the report: 9B over Qwen3-8B, one A10G


def about(found):
    return (
        f"`{found['command']}`, {found['date']}, commit {found['commit']}, one {found['card']}, torch "
        f"{found['torch']}. Copy {found['copy'] / 1e12:.2f} TB/s (read + written)."
    )


def kind(row):
    return "int8" if row["int8"] else {16: "bf16", 32: "float32"}[row.get("bits", 16)]


def decode(found):
    lines = [
        [
            kind(r), r["rows"], f"{r['tokens']:,}", f"{r['ms']:.2f}",
            f"{r['one_by_one_ms']:.1f}" if r["one_by_one_ms"] else "-", f"{r['rows'] / r['ms'] * 1e3:,.0f}",
            f"{r['bytes'] / 1e9:.2f}", f"{r['bytes'] / r['ms'] / 1e6:,.0f}",
            f"{r['bytes'] / found['copy'] / r['ms'] * 1e3:.0%}",
        ]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["weights", "rows", "tokens held", "ms a step", "launched one by one", "tokens/s", "GB a step", "GB/s",
            "of copy bandwidth"]  # fmt: skip
    return table(head, lines)


def prefill(found):
    lines = []
    for r in found["rows"]:
        if "refused" in r:
            continue
        cap = "none" if r["cap"] is None else f"{r['cap']:.2f}"
        share = f"{r['flops'] / r['seconds'] / found['peak']:.0%}" if found["peak"] else "-"
        lines.append([
            kind(r), f"{r['tokens']:,}", f"{r['piece']:,}", cap, f"{r['seconds']:.3f}",
            f"{r['tokens'] / r['seconds']:,.0f}", share, f"{r['step_ms']:.2f}", f"{r['held']:.2f}", f"{r['taken']:.2f}",
        ])  # fmt: skip
    head = ["weights", "prompt", "piece", "cap, GiB", "first token, s", "tokens/s", "of the matrix peak",
            "step after it, ms", "peak held, GiB", "peak taken, GiB"]  # fmt: skip
    said = [f'Under {r["cap"]:.2f} GiB the 12B is refused: "{r["refused"]}".' for r in found["rows"] if "refused" in r]
    return "\n\n".join([table(head, lines), *said])


def memory(found):
    lines = [
        [r["model"], f"{r['tokens']:,}", f"{r['formula']:.2f}", f"{r['held']:.2f}",
         f"{r['held'] / r['formula'] - 1:+.2%}", f"{r['peak']:.2f}"]
        for r in found["rows"]
    ]  # fmt: skip
    return table(["model", "tokens", "formula, GiB", "held, GiB", "off by", "peak while speaking, GiB"], lines)


def loading(found):
    lines = [
        [kind(r), r["shards"], f"{r['largest'] / 1e9:.2f}", f"{r['seconds']:.1f}", f"{r['host'] / 1e9:.2f}",
         f"{r['host'] / r['largest']:.2f}", f"{r['taken'] / 2**30:.2f}"]
        for r in found["rows"]
    ]  # fmt: skip
    head = ["weights", "shards", "largest, GB", "loaded in, s", "host memory grew by, GB", "in shards",
            "peak on the device, GiB"]  # fmt: skip
    return table(head, lines)


def ratio(row, key="tokens_a_second"):
    return row["hybrid"][key] / row["transformer"][key]


def throughput(found):
    lines = []
    for r in found["rows"]:
        a, b = r["transformer"], r["hybrid"]
        roof = ratio(r, "roofline_tokens_a_second")
        reported = REPORTED.get((r["prompt"], r["answer"]))
        lines.append([
            f"{r['prompt']:,} / {r['answer']:,}",
            f"{a['rows']} of {a['roofline_rows']}", f"{a['tokens_a_second']:,.0f}",
            f"{b['rows']} of {b['roofline_rows']}", f"{b['tokens_a_second']:,.0f}",
            f"**{ratio(r):.2f}**", f"{roof:.2f}", f"{ratio(r) / roof - 1:+.0%}", f"{reported:g}" if reported else "-",
            f"{max(a['taken'], b['taken']):.2f}",
        ])  # fmt: skip
    head = ["prompt / answer", "transformer: rows", "tokens/s", "9B: rows", "tokens/s", "ratio", "of the rooflines",
            "off by", "reported (A10G)", "peak taken, GiB"]  # fmt: skip
    return table(head, lines)


def tables(section, found):
    made = dict(decode=decode, prefill=prefill, memory=memory, loading=loading, throughput=throughput)[section](found)
    return f"{about(found)}\n\n{made}"


def figure(found, path):
    """Ratios of throughput: measured, of the rooflines, reported."""
    import matplotlib.pyplot as plt

    rows = found["rows"]
    fig, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    bars = [
        ("measured", [ratio(r) for r in rows]),
        ("of the rooflines", [ratio(r, "roofline_tokens_a_second") for r in rows]),
        ("reported, A10G", [REPORTED.get((r["prompt"], r["answer"]), 0) for r in rows]),
    ]
    for i, (label, heights) in enumerate(bars):
        drawn = axes.bar([x + 0.27 * (i - 1) for x in range(len(rows))], heights, 0.25, label=label)
        axes.bar_label(drawn, [f"{h:.1f}" if h else "" for h in heights], fontsize=8)
    axes.axhline(1, color="grey", lw=0.8)
    axes.set_xticks(range(len(rows)), [f"{r['prompt']:,} in\n{r['answer']:,} out" for r in rows])
    axes.set_ylabel("tokens/s, 9B over the transformer")
    axes.set_title(f"The largest batch in 20.96 GiB, {found['card']}, {found['date']}", fontsize=9)
    axes.legend(fontsize=8)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)
