"""How fast a policy speaks to itself: tokens a second of rollout.py, for several numbers of rows at a time.

Prompts are questions of all reasoning families, answers are drawn at temperature 1 as reinforcement learning draws
them, prefill, the end's stragglers and the copying of results included. The first call of each size is not timed: it
compiles kernels and records the step.
"""

import time
from datetime import date

import torch

import skills
from benchmarks.timing import cpu_name
from checkpoint import load_pretrained
from device import choose_device, choose_impl
from generate import chat_prompt
from rollout import Roller


def command(checkpoint, rows=None, group=16, room=128, repeats=5, device="auto"):
    """Measure and print one line for each number of rows; returns {rows: (best, median) tokens/s}."""
    place, _ = choose_device(device)
    cuda = place.type == "cuda"
    model, tokenizer = load_pretrained(checkpoint, place, torch.bfloat16 if cuda else None)
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer, so no question can be asked: give a trained checkpoint")
    impl, _ = choose_impl("auto", place, model.config)
    model.use(impl)
    name = torch.cuda.get_device_name() if cuda else cpu_name()
    print(
        f"{checkpoint} on {name}, torch {torch.__version__}, {date.today().isoformat()}, impl {impl}: groups of {group}"
    )
    found = {}
    for count in rows or ((512, 1024, 2048, 4096) if cuda else (64, 128)):
        roller = Roller(model, tokenizer, rows=count)
        questions = [s.question for s in skills.questions(max(1, count // group))]
        prompts = [chat_prompt(tokenizer, [{"role": "user", "content": q}]) for q in questions]
        rates = []
        for turn in range(repeats + 1):
            before, start = roller.pace.tokens, time.perf_counter()
            roller.say(prompts, group, room, seed=turn)
            rates.append((roller.pace.tokens - before) / (time.perf_counter() - start))
        rates = sorted(rates[1:])
        found[count] = rates[-1], rates[len(rates) // 2]
        mean = roller.pace.tokens / roller.pace.samples
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda else ""
        print(
            f"{count:6,} rows  {found[count][1]:9,.0f} tokens/s (best {found[count][0]:,.0f}), {mean:.0f} tokens an "
            f"answer{memory}",
            flush=True,
        )
    return found
