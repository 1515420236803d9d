"""What happened since the last line: one line for people, one entry for log.jsonl.

This file must not know how a step is made.
"""

import json
import math
import time

from device import memory_gib, peak_flops  # isort: skip  (before torch)
import torch
import torch.distributed as dist

import curriculum
from sizes import flops_per_token


class Window:
    """What happened since the last line of the log."""

    def __init__(self, run):
        self.run, self.peak = run, peak_flops(run.device)
        self.flops = 3 * flops_per_token(run.model_config, run.config.length)  # forward and backward
        self.open()

    def open(self):
        self.sums = torch.zeros(5, device=self.run.device)
        self.start, self.waited, self.first = time.time(), 0.0, self.run.step

    def close(self, norm, rate):
        """One line for people, one entry for log.jsonl (returned). ValueError if the loss is no longer a number."""
        run, config = self.run, self.run.config
        if run.world > 1:
            dist.all_reduce(self.sums)
        task, text, tasks_n, text_n, text_bytes = self.sums.tolist()  # waits for the device
        elapsed, steps = time.time() - self.start, run.step - self.first
        speed = steps * run.tokens / elapsed
        entry = {
            "step": run.step, "tokens": run.step * run.tokens, "seconds": round(run.seconds(), 2),
            "loss": (task + text) / max(1, tasks_n + text_n), "task_loss": task / max(1, tasks_n),
            "bits_per_byte": text / math.log(2) / text_bytes if text_bytes else None, "norm": norm.item(), "lr": rate,
            "phase": curriculum.phase_of(run.step - 1, run.starts) + 1,
            "tokens_per_second": speed, "mfu": speed * self.flops / self.peak / run.world if self.peak else None,
            "memory_gib": memory_gib(run.device), "waiting": self.waited / elapsed,
        }  # fmt: skip
        if not math.isfinite(entry["loss"]):
            raise ValueError(f"the loss is {entry['loss']} at step {run.step}: lower --lr (now {config.lr:g})")
        bits = f"{entry['bits_per_byte']:.2f} bits/byte  " if text_bytes else ""
        peak = " of the bf16 peak" if run.fp8 == "real" else ""
        mfu = f"MFU {entry['mfu']:.1%}{peak}  " if self.peak else ""
        left = (config.steps - run.step) * elapsed / steps / 60
        run.say(
            f"step {run.step:5d}/{config.steps}  loss {entry['loss']:.3f}  tasks {entry['task_loss']:.3f}  {bits}"
            f"norm {entry['norm']:.2f}  lr {rate:.1e}  {speed:,.0f} tok/s  {mfu}{entry['memory_gib']:.1f} GiB  "
            f"waiting {entry['waiting']:.1%}  {left:.1f} min left"
        )
        self.open()
        return entry


def entry_of(line):
    """A line of log.jsonl; {} for one that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
