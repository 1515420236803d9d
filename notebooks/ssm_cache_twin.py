"""Why is the SSM state float32? The same long decode with a float32 and with a bfloat16 state, beside the full forward.

    python train.py --preset nano-1m --steps 900 --data-rows 7200
    python notebooks/ssm_cache_twin.py --checkpoint out --out assets/ssm_cache.json

The released models' cards ask serving engines for a float32 SSM cache, although all weights are bfloat16. With a
bfloat16 cache the arithmetic of a step is float32 as before, but what a step leaves behind is rounded, so the history
is rounded once a token. The expectation, before anything is run: beside one forward over the whole text, the error of
the logits grows with the length for the bfloat16 cache and stays flat for the float32 one.

How far it grows is arithmetic, too. A head fades by exp(dt*A) a token, so it remembers for about m = 1 / mean(dt |A|)
tokens, and rounding errors fade as the state does.

    m much below 256    every rounding is forgotten after m tokens: the error stops growing there
    m above 512         the fade of one step, 1/m of the value, is below half a unit in the last place (2^-9 to 2^-8 of
                        the value): rounded to nearest, a number that nothing is written to does not fade at all, and
                        small writes are lost in the same way: the error goes on growing

A model trained on rows of 256 tokens has little use for long memories, one that reads 128k tokens has. So next to the
trained model stand copies whose memories are stretched: every A divided by a factor, and nothing else changed. What
they predict does not matter here, because each is compared with itself.

Measured at every position of held-out tasks, teacher-forced: |step - full| / |full - mean| over the vocabulary, with
the full forward in float64; KL(full || step) in nats; and how often the first choice differs. And at the end for every
head: its memory m and the distance of its two states. The model's matrices and all other caches are float32.

`plot` draws the figure; the notebook on decoding calls it.
"""

import argparse
import copy
import json
import math
import os
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import tasks
from checkpoint import load_pretrained
from model import build

STRETCH = (1, 4, 16, 64)
CACHES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def held_out(tokenizer, rows, length):
    """(rows, length) ids: held-out tasks one after the other, the same at every call."""
    stream, ids = tasks.blend(Random("ssm cache"), split="test"), []
    while len(ids) < rows * length:
        batch = [next(stream) for _ in range(64)]
        for example, _ in tokenizer.encode_examples((s.question, s.trace, s.answer) for s in batch):
            ids += example
    return torch.tensor(ids[: rows * length]).view(rows, length)


def mamba_layers(model):
    return [block.mixer for block in model.backbone.layers if block.letter == "M"]


def stretched(model, factor):
    """A copy whose heads remember `factor` times as long: A divided by it."""
    model = copy.deepcopy(model)
    for mixer in mamba_layers(model):
        mixer.A_log.data -= math.log(factor)
    return model


@torch.inference_mode()
def full_forward(model, ids):
    """Logits (b, l, vocab) of one forward in float64, and the memory of every head in tokens, (layers, h),
    averaged over its rows and positions."""
    model, memories, hooks = copy.deepcopy(model).double(), [], []

    def note(mixer):
        def hook(module, args, zxbcdt):
            dt = F.softplus(zxbcdt[..., -mixer.h :] + mixer.dt_bias)
            memories.append(1 / (dt * mixer.A_log.exp()).mean((0, 1)))

        return hook

    for mixer in mamba_layers(model):
        hooks.append(mixer.in_proj.register_forward_hook(note(mixer)))
    return model(ids).double(), torch.stack(memories)


def window_edges(length):
    """0, 8, 12, 16, 24, 32, 48, ... length: errors are averaged over what lies between two."""
    edges = [0] + sorted({n * 2**k for n in (8, 12) for k in range(length.bit_length()) if n * 2**k < length})
    return edges + [length]


@torch.inference_mode()
def drift(model, ids):
    """Decode ids (b, l) step by step with each kind of cache, beside the full forward. A dict ready for json: for each
    cache "error", "kl" and "changed", averaged over rows and windows (`window_edges`); "heads": [memory in tokens,
    relative distance of the bfloat16 state from the float32 one at the end] for every Mamba head."""
    b, l = ids.shape
    full, memories = full_forward(model, ids)
    spread = (full - full.mean(-1, keepdim=True)).norm(dim=-1)  # (b, l)
    log_p = full.log_softmax(-1)
    caches = {name: model.new_cache(b, l, dtype) for name, dtype in CACHES.items()}
    found = {name: {kind: torch.zeros(b, l) for kind in ("error", "kl", "changed")} for name in CACHES}
    for t in range(l):
        for name, cache in caches.items():
            logits = model(ids[:, t : t + 1], cache)[:, 0]
            found[name]["error"][:, t] = (logits - full[:, t]).norm(dim=-1) / spread[:, t]
            log_q = logits.double().log_softmax(-1)
            found[name]["kl"][:, t] = (log_p[:, t].exp() * (log_p[:, t] - log_q)).sum(-1)
            found[name]["changed"][:, t] = (logits.argmax(-1) != full[:, t].argmax(-1)).float()
    edges, heads = window_edges(l), []
    states = [[layer.ssm for layer in cache.layers if hasattr(layer, "ssm")] for cache in caches.values()]
    for memory, wide, narrow in zip(memories, *states):  # (h,), (b, h, p, n) twice
        off = (narrow.float() - wide).flatten(2).norm(dim=-1) / wide.flatten(2).norm(dim=-1)  # (b, h)
        heads += [[_short(m), _short(e)] for m, e in zip(memory, off.mean(0))]
    result = {"heads": heads}
    for name, kinds in found.items():
        result[name] = {
            kind: [_short(values[:, s:e].mean()) for s, e in zip(edges, edges[1:])] for kind, values in kinds.items()
        }
    return result


def _short(x):
    return float(f"{float(x):.4g}")


def plot(result, fig=None):
    """The figure for one result of this script: error against position, and every head's state against its memory."""
    import matplotlib.pyplot as plt

    fig = fig or plt.figure(figsize=(11, 4.2))
    left, right = fig.subplots(1, 2)
    edges = result["edges"]
    middle = [(s + e) / 2 for s, e in zip(edges, edges[1:])]
    for i, row in enumerate(result["models"]):
        for name, style in (("float32", ":"), ("bfloat16", "-")):
            label = row["name"] if name == "bfloat16" else None
            left.loglog(middle, row[name]["error"], style, color=f"C{i}", label=label)
        right.loglog(*zip(*row["heads"]), "o", color=f"C{i}", alpha=0.7, label=row["name"])
    left.set(
        xlabel="position",
        ylabel="error of the logits / their spread",
        title="state kept in bfloat16 (solid), float32 (dotted)",
    )
    right.axvspan(256, 512, color="0.85")
    right.set(xlabel="memory of the head, tokens", ylabel="distance of the two states at the end")
    right.set_title("grey: from here on a bfloat16 state stops fading", fontsize=10)
    left.legend(fontsize=8)
    fig.tight_layout()
    return fig


def trained_steps(folder):
    """Steps of the run that left this folder, or None if it has no log."""
    log = folder / "log.jsonl"
    return json.loads(log.read_text("utf-8").splitlines()[-1])["step"] if log.is_file() else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="out", help="a small trained model, as train.py leaves it")
    parser.add_argument("--steps", type=int, default=4096, help="tokens to decode")
    parser.add_argument("--rows", type=int, default=2, help="rows to decode side by side")
    parser.add_argument("--quick", action="store_true", help="256 tokens, one row, two models: seconds")
    parser.add_argument("--out", default="assets/ssm_cache.json", help="where to write the results")
    args = parser.parse_args(argv)
    steps, rows, stretch = (256, 1, (1, 64)) if args.quick else (args.steps, args.rows, STRETCH)
    folder, out = Path(args.checkpoint), Path(args.out)
    try:
        if steps < 2 or rows < 1:
            raise ValueError(f"--steps must be at least 2 and --rows at least 1; got {steps} and {rows}")
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
        trained, tokenizer = load_pretrained(folder, dtype="float32")
        if tokenizer is None:
            raise ValueError(f"--checkpoint {folder} has no tokenizer: give a folder that train.py left")
    except ValueError as e:
        print(f"ssm_cache_twin.py: {e}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    models = {"at initialisation": build(trained.config).eval()}
    for factor in stretch:
        models["trained" if factor == 1 else f"memory x {factor}"] = stretched(trained, factor)
    ids, edges, found = held_out(tokenizer, rows, steps), window_edges(steps), []
    near = max(i for i, edge in enumerate(edges[:-1]) if edge <= 256)
    print(f"{'':20}{'memory, tokens':>16}{'error float32':>22}{'error bfloat16':>22}{'other first choice':>20}")
    for name, model in models.items():
        row = drift(model, ids)
        found.append({"name": name} | row)
        memories = [m for m, _ in row["heads"]]
        line = f"{name:20}{f'{min(memories):.0f} to {max(memories):.0f}':>16}"
        for cache in CACHES:
            error = row[cache]["error"]
            line += f"{f'{error[0]:.1e} {error[near]:.1e} {error[-1]:.1e}':>27}"
        print(line + f"{row['bfloat16']['changed'][-1]:10.1%}", flush=True)
    print(f"errors at positions 0 to {edges[1]}, {edges[near]} to {edges[near + 1]}, {edges[-2]} to {edges[-1]}")
    flags = " --quick" if args.quick else f" --steps {steps} --rows {rows}"
    result = {
        "command": f"python notebooks/ssm_cache_twin.py --checkpoint {folder.name}{flags} --out {out.as_posix()}",
        "torch": torch.__version__, "pattern": trained.config.hybrid_override_pattern,
        "trained_steps": trained_steps(folder), "steps": steps, "rows": rows, "edges": edges, "models": found,
    }  # fmt: skip
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
