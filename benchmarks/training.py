"""`python bench.py training`: one real training step of a 549 M hybrid, and where its time goes.

The step is the project's own (Objective, train_step and make_optimizer of train.py): bfloat16 autocast around float32
weights, forward, backward, gradient clipping, AdamW. Only the tokens are made up. What matters is tokens a second and,
because that number means nothing without the model's size, MFU: the share of the card's bf16 peak that the model's own
operations (3 x flops_per_token: forward once, backward twice) make up.

    model         M-M-M-M*-M-M-M-M*-M-M-M-M-   hidden 1536, FFN 6144, 48 heads x 64, 8 groups, state 128
    operations    3 x 1.03 GFLOP a token at length 2048, so 989 TFLOP/s would be 319 thousand tokens a second
    bytes         16 a parameter (weight, gradient, two moments) = 8.8 GB; all else is activations

Under torchrun, with --parallel, the same step on several GPUs, each with its own rows; figures are then of all
together, and --recompute layers is what lets the 12B train: `torchrun --nproc-per-node 2 bench.py training --preset
nano-12b --parallel fsdp --recompute layers --rows 1 --length 8192`.

Compiled code is not taken from caches: how long the first step takes on a fresh machine is one of the questions. Some
of our kernels share a name between files; here each is compiled under its file's name too, for the profile's sake.
"""

import os
import statistics
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from device import choose_device, choose_dtype, choose_impl, memory_gib  # isort: skip  (before torch)
import torch
import torch.distributed as dist

import data
import parallel
from model import PRESETS, ModelConfig, build
from sizes import count_parameters, describe, flops_per_token
from train import Objective, TrainConfig, make_optimizer, train_step

HYBRID_549M = dict(
    hidden_size=1536, hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M-", vocab_size=32768, intermediate_size=6144,
    mamba_num_heads=48, mamba_head_dim=64, n_groups=8, ssm_state_size=128, conv_kernel=4, chunk_size=128,
    num_attention_heads=12, num_key_value_heads=4, head_dim=128,
)  # fmt: skip
TINY = dict(
    hidden_size=64, hybrid_override_pattern="M-M*-", vocab_size=128, intermediate_size=128, mamba_num_heads=4,
    mamba_head_dim=16, n_groups=2, ssm_state_size=16, conv_kernel=4, chunk_size=16, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
PEAK_FLOPS = 989e12  # bf16, dense, of an H100 or H200: the denominator of the MFU, on whatever card this runs
WARMUP_STEPS = 3  # the first compiles, the next two find their memory

# What a kernel is for, by its name: the first that matches. Lower case.
GROUPS = [
    ("scan", ("ssd_", "_chunk_scan", "_chunk_state", "_chunk_cumsum", "_state_passing", "_bmm_chunk")),
    ("conv", ("conv1d", "conv2d", "conv_", "convolution", "dgrad", "wgrad")),
    ("norm", ("norm_forward", "norm_backward", "layer_norm", "rms_norm")),
    ("decode", ("decode_",)),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer", ("multi_tensor", "adam", "foreach", "lpnorm")),
    ("loss", ("softmax", "nll_loss", "cross_entropy")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "splitk")),
    ("elementwise", ("elementwise", "triton_poi", "triton_red", "triton_per", "reduce_kernel", "memcpy", "memset",
                     "index", "gather", "embedding", "cat", "fill", "aten::mul", "aten::add", "aten::copy_", "silu",
                     "aten::sum", "sigmoid", "exp", "where", "aten::sub", "aten::div", "relu", "pow")),
]  # fmt: skip


def group_of(kernel):
    """What a kernel is for: one of the groups above, or "other"."""
    name = kernel.lower()
    return next((group for group, marks in GROUPS if any(mark in name for mark in marks)), "other")


def name_kernels():
    """Give each Triton kernel its file's name in front, in what gets compiled from now on: `_forward` of conv1d.py and
    of norm.py could not be told apart in a profile."""
    from triton.runtime.jit import JITFunction

    from kernels import conv1d, cross_entropy, decode, norm, ssd, ssd_backward

    for module in (conv1d, cross_entropy, decode, norm, ssd, ssd_backward):
        for name, kernel in vars(module).items():
            # not so in the interpreter, which compiles nothing; and some files use another's kernels
            if isinstance(kernel, JITFunction) and kernel.fn.__module__ == module.__name__:
                full = f"{module.__name__.rpartition('.')[2]}_{name.lstrip('_')}"
                kernel._repr = lambda _, full=full: full


class Unpacked(Objective):
    """The objective for rows that are one document each: nobody needs to be told where documents end."""

    def forward(self, ids, doc, kind):
        return super().forward(ids, None, kind)


def make_batch(rows, length, vocab, packed, device):
    """ids, doc, kind as the loader gives them: random tokens, all of them targets; with `packed` a new document begins
    at one token in 300, else a row is one."""
    ids = torch.randint(vocab, (rows, length), device=device)
    doc = (torch.rand(rows, length, device=device) < 1 / 300 * packed).long().cumsum(1)
    return ids, doc, torch.full_like(ids, data.TEXT, dtype=torch.uint8)


class Marks:
    """Seconds between moments: CUDA events, so that the CPU may run ahead as it does in training, or the clock."""

    def __init__(self, device):
        self.cuda, self.all = device.type == "cuda", []

    def mark(self):
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            moment.record()
        self.all.append(moment)

    def seconds(self):
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.all, self.all[1:])
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]


def profile_steps(step, device, steps=3):
    """{kernel: milliseconds a step}. On a CPU, its operators."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = Counter()
    for event in profiler.key_averages():
        if device.type == "cuda":  # rows of the GPU's own timeline; ranges that somebody drew around kernels are not
            if "CUDA" not in str(event.device_type) or getattr(event, "is_user_annotation", False):
                continue
            if event.key.startswith(("Optimizer.", "ProfilerStep", "## ", "Torch-Compiled", "CompiledFunction")):
                continue
            spent = event.self_device_time_total
        else:
            spent = event.self_cpu_time_total
        found[event.key] += spent / 1e3 / steps
    return dict(found)


def profile_table(kernels, step_ms, top=15):
    """Two tables as text: by group, and the longest kernels. kernels is {name: milliseconds a step}."""
    total, groups = sum(kernels.values()), Counter()
    for name, ms in kernels.items():
        groups[group_of(name)] += ms
    lines = [f"profile: {total:.1f} ms of kernels a step; an unprofiled step takes {step_ms:.1f} ms"]
    lines += [f"  {group:12} {ms:9.2f} ms  {ms / max(total, 1e-9):6.1%}" for group, ms in groups.most_common()]
    lines += [f"the {min(top, len(kernels))} longest kernels:"]
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
    lines += [f"  {ms:9.2f} ms  {group_of(name):12} {name[:100]}" for name, ms in longest]
    return "\n".join(lines)


def run(
    impl="auto", compile=False, rows=8, length=2048, steps=20, profile=False, packed=False, tiny=False, preset=None,
    engine="ddp", recompute="off", say=None,
):  # fmt: skip
    """Train for a few steps and say what came out; returns it as a dict. ValueError if `impl` cannot be had. preset:
    one of model.PRESETS in the place of the 549 M model. engine, recompute: as in parallel.py; rows are a process's."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    say = say or (partial(print, flush=True) if rank == 0 else lambda text: None)
    device, device_reason = choose_device("auto")
    dtype, dtype_reason = choose_dtype("auto", device)
    if device.type == "cpu" and not tiny:
        raise ValueError("training measures a real model on a CUDA GPU, and PyTorch sees none: --tiny runs anywhere")
    if tiny and preset:
        raise ValueError(f"--tiny and --preset {preset} are two models: give one")
    config = PRESETS[preset] if preset else ModelConfig(**(TINY if tiny else HYBRID_549M))
    divided = parallel.check(engine, recompute, dtype, world)
    parallel.start(device, world)
    impl, impl_reason = choose_impl(impl, device, config, compile)
    say(f"device    {device} ({device_reason}); torch {torch.__version__}")
    say(f"dtype     {str(dtype)[6:]} matrix products ({dtype_reason}); weights and optimizer float32")
    say(f"impl      {impl} ({impl_reason}); torch.compile {'on' if compile else 'off'}")
    say("model     " + describe(config).replace("\n", "\n          "))
    say(f"step      {rows} rows of {length}, {'packed documents' if packed else 'one document each'}")
    memory = parallel.training_bytes(config, rows * length, length, dtype.itemsize, world, engine, recompute, impl)
    say(f"parallel  {divided}\nmemory    {parallel.describe_memory(memory)}")
    parallel.check_room(memory, device, world, preset or "549M")
    shared = engine, recompute, world, rank
    try:
        with fresh_caches():
            if impl == "triton":
                name_kernels()
            return measure(config, device, dtype, impl, compile, rows, length, steps, profile, packed, shared, say)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def fresh_caches():
    """Empty folders for what Triton and torch.compile produce, for the time being."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        new = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        old = {name: os.environ.get(name) for name in new}
        os.environ.update(new)
        try:
            yield
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def measure(config, device, dtype, impl, compile, rows, length, steps, profile, packed, shared, say):
    engine, recompute, world, rank = shared
    start = time.perf_counter()
    torch.manual_seed(0)
    model = build(config, device).use(impl)
    token_bytes = torch.ones(config.vocab_size, device=device)
    objective = (Objective if packed else Unpacked)(model, token_bytes, impl)
    if recompute == "layers":
        parallel.recompute_layers(model)
    if compile:  # as train.py does
        torch.set_float32_matmul_precision("high")
        for block in model.backbone.layers:
            block.compile(dynamic=False)
    objective = parallel.divide(objective, engine, device, dtype, world, compile)
    optimizer = make_optimizer(model, 1e-4, 0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    settings = replace(TrainConfig(), accumulate=1)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    model.train()
    torch.manual_seed(rank)  # every process has tokens of its own

    def step():
        batch = make_batch(rows, length, config.vocab_size, packed, device)
        return train_step(objective, optimizer, scaler, batch, settings, autocast, world)

    ready = time.perf_counter() - start
    sums, _ = step()
    first_loss = loss_of(sums)  # waits for the device
    first = time.perf_counter() - start
    say(f"first     done after {first:.1f} s (model built after {ready:.1f} s); loss {first_loss:.3f}")
    for _ in range(WARMUP_STEPS - 1):
        step()
    marks = Marks(device)
    marks.mark()
    for _ in range(steps):
        sums, _ = step()
        marks.mark()
    seconds = marks.seconds()
    median, tokens = statistics.median(seconds), world * rows * length
    flops = 3 * flops_per_token(config, length)
    result = {
        "parameters": count_parameters(config)["total"], "tokens_per_second": tokens / median,
        "mfu": tokens / median * flops / PEAK_FLOPS / world, "step_ms": median * 1e3, "slowest_ms": max(seconds) * 1e3,
        "memory_gib": memory_gib(device), "first_step_seconds": first, "loss": loss_of(sums),
    }  # fmt: skip
    say(
        f"speed     {result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.1%} of {PEAK_FLOPS / 1e12:.0f} "
        f"TFLOP/s; median step {result['step_ms']:.1f} ms, slowest {result['slowest_ms']:.1f} ms, of {steps}"
    )
    say(f"memory    {result['memory_gib']:.1f} GiB at the peak of a process; loss {result['loss']:.3f}")
    if profile:
        result["kernels"] = profile_steps(step, device)
        say(profile_table(result["kernels"], result["step_ms"]))
    return result


def loss_of(sums):
    """Nats a token, from train_step's five sums."""
    task, text, tasks, texts, _ = sums.tolist()
    return (task + text) / max(1, tasks + texts)
