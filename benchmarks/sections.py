"""The sections of `bench.py kernels`. Each takes a Bench and its sizes and yields rows for the record.

Contestants must agree before any is timed.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mamba2
from benchmarks.floors import Scan, conv_bytes, decode_bytes, norm_bytes, scan_bytes, scan_flops
from benchmarks.tables import best, say_rows
from benchmarks.timing import OURS, PEER, PLAIN, Bench, checked, disagreement, relative
from model import RMSNorm

ROOT = Path(__file__).resolve().parent.parent
PARTS = "forward", "forward + backward"

SIZES = {
    "ceilings": dict(copy_bytes=2**32, matmul=8192),
    "compile": Scan(1, 8192, 128, 80, 8, 128),
    "scan": [Scan(1, 8192, 128, 80, 8, 128), Scan(1, 8192, 128, 64, 8, 128), Scan(8, 2048, 128, 80, 8, 128),
             Scan(8, 2048, 16, 64, 1, 64)],
    "conv": [(1, 8192, 12288, 22656), (8, 2048, 12288, 22656)],  # b, l, channels, numbers in a row of the projection
    "norm": [("rms", 8192, 5120), ("add", 8192, 5120), ("rms", 16384, 4480), ("add", 16384, 4480),
             ("gated", 8192, 10240, 8, 22656)],  # kind, rows, width; groups, numbers in a row that holds z
    "decode": [(1, 128, 80, 8, 128), (8, 128, 80, 8, 128), (32, 128, 80, 8, 128)],  # b, h, p, g, n
    "errors": [Scan(2, 512, 16, 80, 2, 128), Scan(1, 8192, 128, 80, 8, 128), Scan(1, 8192, 128, 64, 8, 128),
               Scan(8, 2048, 16, 64, 1, 64)],
}  # fmt: skip


def ceilings(bench, sizes):
    """{"copy": bytes a second (read + written), "matmul": FLOP/s} of this card."""
    source = torch.empty(sizes["copy_bytes"], dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    m = sizes["matmul"]
    a, b = bench.normal(m, m), bench.normal(m, m)
    found = bench.race({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, clears=0)
    if found["failed"]:
        raise ValueError(f"the ceilings could not be measured: {found['failed']}")
    return {
        "copy": 2 * source.numel() / found["ms"]["copy"] * 1e3,
        "matmul": 2 * m**3 / found["ms"]["matmul"] * 1e3,
        "spread": found["spread"],
    }


def row(what, part, bytes_, flops, found):
    return {"what": str(what), "part": part, "bytes": bytes_, "flops": flops, **found}


def leaves(tensors):
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def with_gradients(run, tensors, gradients):
    """run(tensors) -> outputs, with the gradients of all tensors for the given gradients of the outputs."""
    tensors = leaves(tensors)
    with torch.enable_grad():
        outputs = run(tensors)
        found = torch.autograd.grad(outputs, list(tensors.values()), gradients)
    return outputs, dict(zip(tensors, found))


def both_passes(bench, what, forms, tensors, counts, compare, clears, tolerance):
    """Rows "forward" and "forward + backward" for forms {contestant: tensors -> tuple of outputs}; counts(backward) are
    (bytes, FLOPs). Outputs and the gradients of the tensors named in `compare` must agree to the tolerance; sums over
    all tokens (dA, dweight) cancel too much for that, and are compared under errors or in the tests."""
    failed, gradients = {}, None
    with torch.no_grad():
        for name, form in forms.items():  # whoever runs first shows what the outputs look like
            outputs = bench.attempt(lambda form=form: form(tensors), failed, name)
            if outputs is not None:
                gradients = tuple(bench.normal(*o.shape, dtype=o.dtype) for o in outputs)
                del outputs
                break
    if gradients is None:
        return [row(what, part, *counts(False), {"ms": {}, "spread": {}, "failed": failed}) for part in PARTS]

    def results(form):
        outputs, found = with_gradients(form, tensors, gradients)
        return {f"output {i}": o for i, o in enumerate(outputs)} | {f"d{name}": found[name] for name in compare}

    good = checked(bench, {name: lambda form=form: results(form) for name, form in forms.items() if name not in failed},
                   failed, tolerance)  # fmt: skip
    forward = {name: lambda form=forms[name]: form(tensors) for name in good}
    twice = {name: lambda form=forms[name]: with_gradients(form, tensors, gradients) and None for name in good}
    with torch.no_grad():
        first = row(what, PARTS[0], *counts(False), bench.race(forward, failed, clears))
    return [first, row(what, PARTS[1], *map(sum, zip(counts(False), counts(True))), bench.race(twice, failed, clears))]


def scan_inputs(bench, s, seed=0):
    """x, dt, A, B, C, D, dt_bias as a freshly initialised layer sees them; dt as the projection leaves it."""
    x, B, C = bench.normal(s.b, s.l, s.h, s.p, seed=seed), *(bench.normal(s.b, s.l, s.g, s.n) for _ in "BC")
    dt, D = bench.normal(s.b, s.l, s.h), bench.normal(s.h, dtype=torch.float32)
    A = -(1 + 15 * torch.rand(s.h, device=bench.device))
    step = torch.empty(s.h, device=bench.device).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=step + torch.log(-torch.expm1(-step)))


def plain_scan(t, form=mamba2.ssd_chunked, chunk=128):
    wide = torch.promote_types(t["dt"].dtype, torch.float32)
    dt = F.softplus(t["dt"].to(wide) + t["dt_bias"].to(wide))
    return form(t["x"], dt, t["A"], t["B"], t["C"], t["D"], chunk_size=chunk)


def our_scan(t):
    from kernels import ssd

    return ssd.ssd(t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], dt_bias=t["dt_bias"])


def peer_scan(function, t, chunk, state=False):
    return function(
        t["x"], t["dt"], t["A"], t["B"], t["C"], chunk, D=t["D"], dt_bias=t["dt_bias"], dt_softplus=True,
        return_final_states=state,
    )  # fmt: skip


def scan(bench, sizes):
    for s in sizes:
        bench.say(f"scan {s}")
        forms = {}
        for q in bench.chunks if "scan" in bench.peers else ():
            forms[f"{PEER} {q}"] = lambda t, q=q: (peer_scan(bench.peers["scan"], t, q),)
        forms |= {OURS: lambda t: our_scan(t)[:1], PLAIN: lambda t: plain_scan(t)[:1]}
        counts = lambda back, s=s: (scan_bytes(s, back, bench.dtype.itemsize), scan_flops(s, back))
        rows = both_passes(bench, s, forms, scan_inputs(bench, s), counts, ["x", "B", "C"], 1, 5e-2)
        peer = best(rows[-1], PEER)
        if peer:
            bench.best_chunk[s] = int(peer[1].split()[1])
        say_rows(bench, rows)
        yield from rows


def conv(bench, sizes):
    from kernels import conv1d

    for b, l, channels, wide in sizes:
        what = f"b{b} l{l}, {channels} of {wide} channels"
        bench.say(f"conv {what}")
        start = (wide - channels) // 2 // 16 * 16
        tensors = {
            "x": bench.normal(b, l, wide)[..., start : start + channels],
            "weight": bench.normal(channels, 1, 4, dtype=torch.float32) * 0.5,
            "bias": bench.normal(channels, dtype=torch.float32),
        }
        forms = {
            OURS: lambda t: conv1d.causal_conv1d(t["x"], t["weight"], t["bias"])[:1],
            PLAIN: lambda t: mamba2.causal_conv1d(t["x"], t["weight"], t["bias"])[:1],
        }
        if "conv" in bench.peers:
            forms["causal_conv1d"] = lambda t: (
                bench.peers["conv"](t["x"].transpose(1, 2), t["weight"][:, 0], t["bias"], activation="silu")
                .transpose(1, 2),
            )  # fmt: skip
        counts = lambda back, shape=(b, l, channels): (conv_bytes(*shape, back, bench.dtype.itemsize), 0)
        rows = both_passes(bench, what, forms, tensors, counts, ["x"], 4, 3e-2)
        say_rows(bench, rows)
        yield from rows


def norm(bench, sizes):
    for kind, count, width, *more in sizes:
        what = f"{kind}, {count} x {width}" + (f" in {more[0]} groups" if more else "")
        bench.say(f"norm {what}")
        tensors, forms = norm_forms(bench, kind, count, width, *more)
        counts = lambda back, k=(kind, count, width): (norm_bytes(*k, back, bench.dtype.itemsize), 0)
        rows = both_passes(bench, what, forms, tensors, counts, [name for name in tensors if name != "weight"], 4, 3e-2)
        say_rows(bench, rows)
        yield from rows


def norm_forms(bench, kind, count, width, groups=1, wide=None, eps=1e-5):
    """(tensors, {contestant: form}) of one kind of norm."""
    from kernels import norm as ours

    weight = 1 + 0.3 * bench.normal(width, dtype=torch.float32)
    tensors, peer = {"x": bench.normal(count, width), "weight": weight}, bench.peers.get("norm")
    if kind == "gated":
        tensors["z"] = bench.normal(count, wide)[:, :width]
        module = mamba2.GatedGroupRMSNorm(width, groups, eps)
        forms = {
            OURS: lambda t: (ours.gated_group_rms_norm(t["x"], t["z"], t["weight"], groups, eps),),
            PLAIN: lambda t: (torch.func.functional_call(module, {"weight": t["weight"]}, (t["x"], t["z"])),),
        }
        if peer:
            forms[PEER] = lambda t: (
                peer(t["x"], t["weight"], None, z=t["z"], eps=eps, group_size=width // groups, norm_before_gate=False),
            )
        return tensors, forms
    module = RMSNorm(width, eps)
    plain = lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,))
    if kind == "rms":
        forms = {
            OURS: lambda t: (ours.rms_norm(t["x"], t["weight"], eps),),
            PLAIN: lambda t: (plain(t["x"], t["weight"]),),
        }
        if peer:
            forms[PEER] = lambda t: (peer(t["x"], t["weight"], None, eps=eps),)
        return tensors, forms

    def plain_add(t):
        total = t["residual"] + t["x"]
        return plain(total, t["weight"]), total

    tensors["residual"] = bench.normal(count, width)
    forms = {OURS: lambda t: ours.add_rms_norm(t["x"], t["residual"], t["weight"], eps), PLAIN: plain_add}
    return tensors, forms


def decode(bench, sizes):
    """One token of many layers, one after the other, each with its own state: together several times the L2 cache."""
    from kernels.decode import mixer_step

    for b, h, p, g, n in sizes:
        what, failed = f"batch {b}, h{h} p{p} g{g} n{n}", {}
        bench.say(f"decode {what}")
        count = max(27, math.ceil(bench.large / (4 * b * h * p * n)))  # the 9B has 27 such layers
        layers = [decode_layer(bench, b, h, p, g, n) for _ in range(count)]
        wrong = bench.attempt(lambda layers=layers: decode_check(layers[0], mixer_step), failed, OURS)
        if wrong:
            failed[OURS] = wrong
        contestants = {}
        if OURS not in failed:
            calls = [lambda layer=layer: mixer_step(**layer) for layer in layers]
            contestants[OURS] = bench.attempt(lambda calls=calls: bench.captured(calls), failed, OURS)
        if "step" in bench.peers:
            calls = [peer_step(bench.peers["step"], layer) for layer in layers]
            contestants[PEER] = lambda calls=calls: [call() for call in calls]
            graph = f"{PEER} in a graph"
            contestants[graph] = bench.attempt(lambda calls=calls: bench.captured(calls), failed, graph)
        found = bench.race({k: v for k, v in contestants.items() if v}, failed)
        found["ms"] = {name: ms / count for name, ms in found["ms"].items()}
        made = row(what, f"{count} layers", decode_bytes(b, h, p, g, n, 4, bench.dtype.itemsize), 0, found)
        say_rows(bench, [made])
        yield made


def decode_layer(bench, b, h, p, g, n, k=4):
    """The arguments of mixer_step for one layer in use: state and window full, weights as in a model of this dtype."""
    inner = h * p
    channels = inner + 2 * g * n
    wide = lambda *size: bench.normal(*size, dtype=torch.float32)
    return dict(
        zxbcdt=bench.normal(b, inner + channels + h), window=bench.normal(b, k - 1, channels), ssm=wide(b, h, p, n),
        conv_weight=bench.normal(channels, 1, k) * 0.5, conv_bias=bench.normal(channels),
        dt_bias=(wide(h) - 4).to(bench.dtype), A_log=wide(h).abs().to(bench.dtype), D=bench.normal(h),
        norm_weight=bench.normal(inner), n_groups=g, eps=1e-5,
    )  # fmt: skip


def decode_check(layer, mixer_step, tolerance=2e-2):
    """None, or how mixer_step differs from the layer in float32."""
    ours = {k: t.clone() if torch.is_tensor(t) else t for k, t in layer.items()}
    out = mixer_step(**ours)
    t = {k: v.float().clone() if torch.is_tensor(v) else v for k, v in layer.items()}
    h, p, n = t["ssm"].shape[1:]
    inner, g = h * p, t["n_groups"]
    z, xBC, dt = t["zxbcdt"].split([inner, t["conv_weight"].shape[0], h], dim=-1)
    xBC, window = mamba2.causal_conv1d(xBC[:, None], t["conv_weight"], t["conv_bias"], t["window"])
    x, B, C = xBC[:, 0].split([inner, g * n, g * n], dim=-1)
    y, ssm = mamba2.ssd_step(
        t["ssm"], x.unflatten(-1, (h, p)), F.softplus(dt + t["dt_bias"]), -torch.exp(t["A_log"]),
        B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)), t["D"],
    )  # fmt: skip
    norm = mamba2.GatedGroupRMSNorm(inner, g, t["eps"])
    out_ = torch.func.functional_call(norm, {"weight": t["norm_weight"]}, (y.flatten(-2), z))
    found = {"output": out, "state": ours["ssm"], "window": ours["window"]}
    return disagreement(found, {"output": out_, "state": ssm, "window": window}, tolerance)


def peer_step(function, layer):
    """mamba_ssm's state update on a layer's state: without the convolution and without the norm, which it leaves to
    others. One number a head is given as a view of one a channel, which its kernel knows and reads once."""
    ssm, g = layer["ssm"], layer["n_groups"]
    b, h, p, n = ssm.shape
    z, x, B, C, dt = layer["zxbcdt"].split([h * p, h * p, g * n, g * n, h], dim=-1)
    heads = lambda t: t.unflatten(-1, (h, p))
    A = -torch.exp(layer["A_log"].float())
    arguments = dict(
        x=heads(x).contiguous(), dt=dt[..., None].expand(b, h, p), A=A[:, None, None].expand(h, p, n),
        B=B.unflatten(-1, (g, n)).contiguous(), C=C.unflatten(-1, (g, n)).contiguous(),
        D=layer["D"][:, None].expand(h, p), z=heads(z).contiguous(),
        dt_bias=layer["dt_bias"][:, None].expand(h, p), dt_softplus=True,
    )  # fmt: skip
    return lambda: function(ssm, **arguments)


def errors(bench, sizes, short=512):
    """Relative errors against float64 on the same inputs: the recurrence itself in rows of up to `short` tokens, its
    chunked form (equal to 1e-10, see the tests) in longer ones. Small scans take four sets of inputs and the root of
    the mean square: with random gradients dA is what is left of large sums, and one set says little about 16 heads."""
    for s in sizes:
        form, seeds = mamba2.ssd_recurrent if s.l <= short else mamba2.ssd_chunked, range(1, 5 if s.h <= 16 else 2)
        bench.say(f"errors {s} against {form.__name__} in float64, {len(seeds)} set(s) of inputs")
        chunk, failed, squares = bench.best_chunk.get(s, 128), {}, {}
        contestants = {OURS: our_scan, PLAIN: plain_scan}
        if "scan" in bench.peers:
            contestants[PEER] = lambda t, q=chunk: peer_scan(bench.peers["scan"], t, q, state=True)
        for seed in seeds:
            given = scan_inputs(bench, s, seed=seed)
            dy = bench.normal(s.b, s.l, s.h, s.p)
            exact = {name: t.double() for name, t in given.items()}
            reference = lambda form=form, t=exact, dy=dy.double(): quantities(
                functools.partial(plain_scan, form=form), t, dy
            )
            expected = bench.attempt(reference, failed, "float64")
            if expected is None:
                squares.clear()  # a mean over fewer sets than it says would be too small
                break
            for name, run in contestants.items():
                got = bench.attempt(lambda run=run, given=given, dy=dy: quantities(run, given, dy), failed, name)
                if got is not None:
                    now = {q: relative(got[q], expected[q]) ** 2 / len(seeds) for q in expected}
                    squares[name] = {q: squares.get(name, {}).get(q, 0.0) + now[q] for q in now}
        found = {name: {q: math.sqrt(v) for q, v in of.items()} for name, of in squares.items() if name not in failed}
        made = {
            "what": str(s), "reference": form.__name__, "chunk": chunk, "sets": len(seeds), "errors": found,
            "failed": failed,
        }  # fmt: skip
        for name, e in found.items():
            bench.say(f"    {name:10} " + "  ".join(f"{q} {v:.1e}" for q, v in e.items()))
        yield made


def quantities(run, tensors, dy):
    """{"y", "state", "dx", ...}: outputs and gradients of one scan, for a gradient of y."""
    tensors = leaves(tensors)
    with torch.enable_grad():
        y, state = run(tensors)
        found = torch.autograd.grad(y, list(tensors.values()), dy.to(y.dtype))
    return {"y": y, "state": state} | {f"d{name}": t for name, t in zip(tensors, found)}


def first_call(*shape):
    """Print what a fresh process pays for its first scan, forward and backward, as one line of JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(device, torch.bfloat16 if device == "cuda" else torch.float32, 1)
    s, seconds = Scan(*shape), []
    tensors, dy = scan_inputs(bench, s), bench.normal(s.b, s.l, s.h, s.p)
    bench.sync()
    for _ in range(2):
        start = time.perf_counter()
        with_gradients(lambda t: our_scan(t)[:1], tensors, (dy,))
        bench.sync()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds))


def compile_cost(bench, s):
    """The first scan in a fresh process whose Triton cache is empty."""
    bench.say(f"compile: a fresh process, scan {s}, forward + backward")
    code = "import sys; from benchmarks import sections; sections.first_call(*map(int, sys.argv[1:]))"
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, s)], cwd=ROOT, capture_output=True, text=True, timeout=150,
            env={**os.environ, "TRITON_CACHE_DIR": cache},
        )  # fmt: skip
        kernels = sum(1 for _ in Path(cache).rglob("*.cubin"))
    if done.returncode:
        raise ValueError(f"the fresh process failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    first, second = json.loads(done.stdout.strip().splitlines()[-1])
    bench.say(f"    first call {first:.1f} s, {kernels} kernels compiled; second call {second * 1e3:.1f} ms")
    yield {"what": str(s), "first": first, "second": second, "kernels": kernels}
