"""How good is it: exact match on held-out questions by family and level, and bits per byte on held-out text.

Scored is free generation, greedy, with nothing given away: the model gets the question and must write trace and answer.
(Scoring a model on the next token with the right trace in front of it flatters: an answer that only copies the trace
looks learned at once.) The questions come from the test side of `tasks.py`'s split, so none was ever trained on, and
the levels beyond training measure length generalisation.

Bits per byte divide by bytes, not tokens, so models with different tokenizers compare.

`python evaluate.py --checkpoint out` prints both. This file must not know training. Source: report section 2.3 and
RULER (Hsieh et al. 2024) for the retrieval families; the report's own benchmarks need models a thousand times larger.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from random import Random

from device import choose_device, choose_impl  # isort: skip  (before torch)
import numpy as np
import torch
import torch.nn.functional as F

import corpus
import data
import tasks
from checkpoint import load_pretrained
from generate import chat_prompt, generate


def accuracy(model, tokenizer, families=None, levels=None, count=32, seed=0, batch_size=256, thinking=True):
    """Share of held-out questions with trace and answer both right to the letter.

    families: names, None for all. levels: None for training levels and those beyond. count: questions a family and
    level, drawn with `seed`. Returns {family: {level: {"exact": share, "answer": share, "count": int}}}, where "answer"
    forgives the trace.
    """
    asked = []
    for name in families or tasks.FAMILIES:
        if name not in tasks.FAMILIES:
            raise ValueError(f"unknown task family {name!r}: choose one of {', '.join(tasks.FAMILIES)}")
        family = tasks.FAMILIES[name]
        for level in levels or family.train_levels + family.beyond:
            rng = Random(f"{seed} {name} {level}")
            asked += [tasks.sample(name, level, rng, "test") for _ in range(count)]
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": s.question}], thinking) for s in asked]
    budget = [len(tokenizer.encode(f"{s.trace}\n\n{s.answer}\n")) + 16 for s in asked]
    order = sorted(range(len(asked)), key=lambda i: budget[i])  # rows of one batch should end together
    right = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        completions = generate(model, tokenizer, [prompts[i] for i in rows], max(budget[i] for i in rows), 0.0)
        for i, completion in zip(rows, completions):
            answered = tasks.check(asked[i], completion.answer)
            right[i] = (answered and tasks.check_trace(asked[i], completion.thought), answered)
    table = {}
    for i, s in enumerate(asked):
        cell = table.setdefault(s.family, {}).setdefault(s.level, {"exact": 0.0, "answer": 0.0, "count": count})
        cell["exact"] += right[i][0] / count
        cell["answer"] += right[i][1] / count
    return table


@torch.inference_mode()
def bits_per_byte(model, tokenizer, texts, length=512, batch_size=8, max_tokens=200_000):
    """Bits the model needs for a byte of `texts`, read in rows of `length` tokens, each from an empty state."""
    ids, _ = data.flatten(tokenizer, texts)
    ids = ids[:max_tokens].astype(np.int64)
    length = min(length, len(ids))  # a short text is one row
    if length < 2:
        raise ValueError(f"bits per byte need at least 2 tokens of text; got {length}")
    rows = len(ids) // length
    device = model.lm_head.weight.device
    ids = torch.from_numpy(ids[: rows * length]).view(rows, length)
    sizes = token_bytes(tokenizer)
    nats, size = 0.0, 0
    for part in ids.split(batch_size):
        logits = model(part.to(device))[:, :-1]
        nats += F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten().to(device), reduction="sum").item()
        size += sizes[part[:, 1:]].sum().item()
    return nats / math.log(2) / size


def token_bytes(tokenizer):
    """(vocab,) float32: how many bytes each token stands for; 0 for control tokens, which are no text."""
    return torch.tensor(
        [float(len(tokenizer.decode_bytes([i], skip_specials=True))) for i in range(tokenizer.vocab_size)]
    )


def by_kind(table):
    """{"reasoning": share, "retrieval": share}: the mean exact match over families and levels of a table."""
    cells = {}
    for name, levels in table.items():
        cells.setdefault(tasks.FAMILIES[name].kind, []).extend(cell["exact"] for cell in levels.values())
    return {kind: sum(shares) / len(shares) for kind, shares in cells.items()}


def format_table(table):
    """The accuracies as text: a row a family, a column a level; levels beyond training behind the bar."""
    lines = [f"{'level':<22} {'1':>6}{'2':>6}{'3':>6}  | beyond"]
    for name, by_level in table.items():
        family = tasks.FAMILIES[name]
        cells = {level: f"{by_level[level]['exact']:>6.0%}" for level in by_level}
        trained, beyond = ("".join(cells.get(n, "") for n in ns) for ns in (family.train_levels, family.beyond))
        lines.append(f"{name:<11} {family.kind:<10} {trained}  | {beyond}")
    return "\n".join(lines)


def refuse(message):
    """In place of argparse's own error, which prints all flags: one sentence, as for any other bad input."""
    raise ValueError(f"{message}; see --help")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--checkpoint", default="out", help="a checkpoint folder, by default what train.py left in out")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--impl", default="auto", help="auto, torch or triton: who computes the Mamba-2 layers")
    parser.add_argument("--count", type=int, default=64, help="questions for each family and level; lower it for speed")
    parser.add_argument("--families", nargs="*", help="only these; by default all")
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions are drawn")
    parser.add_argument("--batch", type=int, default=256, help="questions at a time; lower it when memory runs out")
    parser.add_argument("--no-text", action="store_true", help="leave out bits per byte on the installed text")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    try:
        args = parser.parse_args(argv)
        if args.count < 1 or args.batch < 1:
            raise ValueError(f"--count and --batch must be at least 1; got {args.count} and {args.batch}")
        device, _ = choose_device(args.device)
        choose_impl(args.impl, device)  # a wish that cannot be met is said before anything is loaded
        model, tokenizer = load_pretrained(args.checkpoint, device)
        model.use(choose_impl(args.impl, device, model.config)[0])
        if tokenizer is None:
            raise ValueError(f"{args.checkpoint} has no tokenizer.json, so no question can be put to the model")
        start = time.time()
        result = {"accuracy": accuracy(model, tokenizer, args.families, None, args.count, args.seed, args.batch)}
        if not args.no_text:
            result["bits_per_byte"] = {
                kind: bits_per_byte(model, tokenizer, corpus.read_text(kind, 3_000_000)[1])
                for kind in ("prose", "code")
            }
        result["seconds"] = round(time.time() - start, 1)
    except (ValueError, OSError) as e:
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"checkpoint": str(Path(args.checkpoint)), **result}))
        return 0
    print(f"exact match (trace and answer) on {args.count} held-out questions a family and level, greedy:")
    print(format_table(result["accuracy"]))
    for kind, bits in result.get("bits_per_byte", {}).items():
        print(f"held-out {kind}: {bits:.3f} bits per byte")
    print(f"{result['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
