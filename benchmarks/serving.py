"""`python bench.py decode | prefill | memory | loading | throughput`: full-size models on this card, of noise.

Time and memory do not depend on what the weights are, only on how many: so the models are built from their configs and
filled with noise, and rows are only said to be long where their contents do not matter. What is measured:

    decode       one step for some rows that hold 8k tokens: milliseconds, and the bytes it must move over that time
    prefill      seconds to the first token; for 128k tokens also under a hard cap on memory
    memory       the formula of sizes.py beside what PyTorch's allocator says, at 128k tokens
    loading      a folder of the 9B in several files: seconds, and what it takes of the host's memory
    throughput   the report's comparison: two models in the same memory, each with the largest batch that fits, in this
                 one engine; tokens a second, their ratio, beside the ratio of the rooflines and the report's

A cap is torch.cuda.set_per_process_memory_fraction: whoever asks for more gets an out-of-memory error, so what passes
fits a smaller card (as far as memory goes; the rest of a card, such as its speed, is this one's).

What is made of these numbers is in serving_command.py and serving_tables.py.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.sections import ROOT
from checkpoint import KEPT_WIDE, check_room, save_pretrained
from device import choose_impl
from engine import Engine
from model import PRESETS, ModelConfig, build
from quantize import quantize_
from sizes import flops_per_token, largest_batch, memory_bytes, step_bytes, work_bytes

GIB = 2**30
CAP = 22.06 * 0.95  # GiB, the report's: 95 % of what a 24 GB A10G has to give; 20.957
CONTEXT_CAP = CAP - 1.3  # less what the report sets aside for a vision model; 19.657
SMALL_CAP = 14.5  # of a 16 GB card, 14.9 GiB

FULL = dict(
    hybrid="nano-9b", large="nano-12b", transformer="qwen3-8b-shape", decode_rows=(1, 8, 16, 32), tokens=8192,
    context=131072, pairs=((1024, 1024), (1024, 8192), (8192, 1024), (8192, 16384)), steps=50, piece=4096,
    shard_bytes=5 * 10**9,
)  # fmt: skip
_tiny = ModelConfig(
    hidden_size=64, hybrid_override_pattern="M-M*-", vocab_size=256, intermediate_size=128, mamba_num_heads=4,
    mamba_head_dim=16, n_groups=2, ssm_state_size=16, conv_kernel=4, chunk_size=16, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
TINY = dict(
    hybrid=_tiny, large=replace(_tiny, hidden_size=80), transformer=replace(_tiny, hybrid_override_pattern="*-*-"),
    decode_rows=(1, 3), tokens=40, context=64, pairs=((6, 10), (10, 20)), steps=2, piece=16,
    shard_bytes=100_000,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------


def config_of(name):
    return PRESETS[name] if isinstance(name, str) else name


def random_model(config, bench, int8=False):
    """The model filled with noise, in the dtype and with the kernels that generate.py would take."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)  # so that no float32 copy ever exists
    try:
        model = build(config, bench.device, bench.dtype)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in KEPT_WIDE:
            parameter.data = parameter.data.float()
    if int8:
        quantize_(model)
    collect(bench)
    return model.eval().use(choose_impl("auto", bench.device, config)[0])


def collect(bench):
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def capped(bench, gib):
    """No more than this much memory from here to the end of the block; None: all there is."""
    if not bench.cuda or gib is None:
        yield
        return
    collect(bench)
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(bench.device).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak(bench):
    """GiB: (the most that tensors held, the most that was taken from the card)."""
    if not bench.cuda:
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def seconds(bench, run):
    bench.sync()
    start = time.perf_counter()
    run()
    bench.sync()
    return time.perf_counter() - start


def speak(engine, logits, steps):
    """Greedy steps whose tokens never leave the device."""
    for _ in range(steps):
        logits = engine.step(logits.argmax(-1))
    return logits


def step_seconds(bench, engine, tokens, steps, repeats=3):
    """Seconds of one step when every row holds about `tokens` tokens: the median of some runs of `steps` steps."""
    found, logits = [], torch.zeros(len(engine.lengths), 1, device=bench.device)
    for _ in range(repeats + 1):
        engine.lengths = [tokens] * len(engine.lengths)
        found.append(seconds(bench, lambda: speak(engine, logits, steps)) / steps)
    return statistics.median(found[1:])  # the first compiled and recorded


# ---------------------------------------------------------------------------------------------------------------------
# The sections: each yields rows of plain numbers
# ---------------------------------------------------------------------------------------------------------------------


def decode(bench, scale):
    """Steps of the 9B, and on a GPU also of its int8 form, for some batch sizes."""
    config, n = config_of(scale["hybrid"]), scale["tokens"]
    size = bench.dtype.itemsize
    for int8 in (False, True) if bench.cuda else (False,):
        model = random_model(config, bench, int8)
        for rows in scale["decode_rows"]:
            ms = {}
            for recorded in (True, False) if bench.cuda else (True,):
                engine = Engine(model, rows, n + scale["steps"] + 1, graph=recorded and bench.cuda)
                ms[recorded] = step_seconds(bench, engine, n, scale["steps"]) * 1e3
                del engine
            moved = step_bytes(config, [n + scale["steps"] / 2] * rows, size, size, int8=int8)
            made = dict(rows=rows, tokens=n, int8=int8, bits=8 * size, ms=ms[True], bytes=moved)
            yield made | dict(one_by_one_ms=ms[False] if bench.cuda else None)
            bench.say(f"    {'int8 ' * int8}{rows} rows: {ms[True]:.2f} ms")
        del model
        collect(bench)


def prefill(bench, scale):
    """First tokens: of `tokens` with pieces of two sizes; of the whole context under caps, also in int8; a refusal."""
    config, n, long = config_of(scale["hybrid"]), scale["tokens"], scale["context"]
    model = random_model(config, bench)
    for piece in (scale["piece"], n):
        yield first_token(bench, model, n, piece, None, repeats=3)
    yield first_token(bench, model, long, scale["piece"], CONTEXT_CAP)
    del model
    collect(bench)
    model = random_model(config, bench, int8=True)
    yield first_token(bench, model, n, scale["piece"], None, int8=True, repeats=3)
    yield first_token(bench, model, long, scale["piece"] // 2, SMALL_CAP, int8=True)
    del model
    large = config_of(scale["large"])
    with capped(bench, CONTEXT_CAP):
        try:
            check_room(large, bench.device, long, 1, work=work_bytes(large, scale["piece"]))
            said = "not refused"
        except ValueError as error:
            said = str(error)
    bench.say("    " + said)
    yield dict(tokens=long, cap=CONTEXT_CAP, refused=said)


def first_token(bench, model, tokens, piece, cap, int8=False, repeats=1):
    """One row: seconds of its prefill and of a step after it, and the most memory it took."""
    config = model.config
    with capped(bench, cap):
        engine = Engine(model, 1, tokens + 1 + 6 * 8, piece)
        prompt = torch.randint(config.vocab_size, (tokens,)).tolist()
        read = lambda: engine.start([0], [prompt]).argmax(-1)
        engine.start([0], [prompt[: 2 * piece + 1]])  # compiles
        found = [seconds(bench, read) for _ in range(repeats)]
        step = step_seconds(bench, engine, tokens, 8)
        held, taken = peak(bench)
        engine = None
    row = dict(
        tokens=tokens, piece=piece, cap=cap, int8=int8, seconds=statistics.median(found), step_ms=step * 1e3, held=held,
        taken=taken, flops=flops_per_token(config, tokens) * tokens,
    )  # fmt: skip
    bench.say(f"    {tokens} tokens in pieces of {piece}: {row['seconds']:.3f} s, peak {taken:.2f} GiB")
    collect(bench)
    return row


def memory(bench, scale):
    """Weights and the cache of one row, by formula and as held; and the peak of speaking at the end of the context."""
    hybrid, large, long = config_of(scale["hybrid"]), config_of(scale["large"]), scale["context"]
    pruned = replace(large, hybrid_override_pattern=hybrid.hybrid_override_pattern)
    models = {"12B": large, "12B, depth-pruned to 56 layers": pruned, "9B": hybrid}
    for name, config, int8 in [(*pair, False) for pair in models.items()] + [("9B, int8", hybrid, True)]:
        model = random_model(config, bench, int8)
        collect(bench)
        engine = Engine(model, 1, long, scale["piece"])
        held = torch.cuda.memory_allocated() if bench.cuda else 0
        engine.start([0], [[1] * (2 * scale["piece"])])
        engine.lengths = [long - 4]
        speak(engine, torch.zeros(1, 1, device=bench.device), 3)
        formula = memory_bytes(config, long, int8=int8)["total"]
        yield dict(model=name, tokens=long, formula=formula / GIB, held=held / GIB, peak=peak(bench)[0])
        bench.say(f"    {name}: formula {formula / GIB:.2f}, held {held / GIB:.2f} GiB")
        del model, engine
        collect(bench)


def throughput(bench, scale, every_step=True):
    """Both models at every pair of prompt and answer lengths. every_step False: steps only at five lengths on the way,
    with straight lines between them."""
    found = {}
    for side in ("transformer", "hybrid"):
        config = config_of(scale[side])
        model = random_model(config, bench)
        for prompt, answer in scale["pairs"]:
            with capped(bench, CAP):
                found[side, prompt, answer] = most_rows(bench, model, prompt, answer, scale, every_step)
            row = found[side, prompt, answer]
            bench.say(f"    {side} {prompt}/{answer}: {row['rows']} rows, {row['tokens_a_second']:.0f} tokens/s")
        del model
        collect(bench)
    for prompt, answer in scale["pairs"]:
        yield dict(prompt=prompt, answer=answer, **{s: found[s, prompt, answer] for s in ("transformer", "hybrid")})


def most_rows(bench, model, prompt, answer, scale, every_step):
    """The largest batch that really runs: from the formula's downwards, until nothing runs out of memory."""
    config = model.config
    most = largest_batch(config, CAP * GIB, prompt + answer) if bench.cuda else 2
    for rows in range(most, 0, -1):
        for piece in (1024, 512, 256):  # prompts in small pieces need less room, and more time
            try:
                found = run(bench, model, rows, prompt, answer, piece, scale, every_step)
                return dict(rows=rows, formula_rows=most, piece=piece) | found
            except torch.OutOfMemoryError:
                bench.say(f"    {rows} rows of {prompt}/{answer}, prompts in pieces of {piece}: out of memory")
            collect(bench)
    raise ValueError(f"not one row of {prompt} + {answer} tokens fits in {CAP:.2f} GiB beside the weights")


def run(bench, model, rows, prompt, answer, piece, scale, every_step):
    """All rows from the first token of the prompt to the last of the answer: seconds of both, tokens a second."""
    engine = Engine(model, rows, prompt + answer, min(prompt, piece))
    prompts = torch.randint(model.config.vocab_size, (rows, prompt)).tolist()
    engine.start([0], prompts[:1])
    speak(engine, torch.zeros(rows, 1, device=bench.device), 2)  # compiled, recorded; and all memory is taken
    logits = None

    def read():
        nonlocal logits
        logits = engine.start(range(rows), prompts)

    reading = seconds(bench, read)
    if every_step:
        speaking = seconds(bench, lambda: speak(engine, logits, answer - 1))
    else:
        at = [prompt + int(i * (answer - scale["steps"] - 1) / 4) for i in range(5)]
        times = [step_seconds(bench, engine, n, scale["steps"], 1) for n in at]
        speaking = (answer - 1) * (sum(times) - (times[0] + times[-1]) / 2) / 4
    held, taken = peak(bench)
    return dict(
        reading=reading, speaking=speaking, tokens_a_second=rows * answer / (reading + speaking), held=held, taken=taken
    )


LOAD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from checkpoint import load_pretrained
folder, device, int8 = sys.argv[2], sys.argv[3], sys.argv[4] == "1"
torch.zeros(1, device=device)
cuda = device == "cuda"
def host(line):
    return 1024 * next(int(text.split()[1]) for text in open("/proc/self/status") if text.startswith(line))
try:
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
except OSError:
    pass
before, start = host("VmRSS"), time.perf_counter()
model = load_pretrained(folder, device, int8=int8)
if cuda:
    torch.cuda.synchronize()
print(time.perf_counter() - start, host("VmHWM") - before, torch.cuda.max_memory_allocated() if cuda else 0)
"""


def loading(bench, scale):
    """A folder in the released layout, written here, opened by fresh processes."""
    config = config_of(scale["hybrid"])
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config, bench)
        save_pretrained(folder, model, max_shard_bytes=scale["shard_bytes"])
        del model
        collect(bench)
        files = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        for int8 in (False, True):
            words = [sys.executable, "-c", LOAD, str(ROOT), folder, bench.device.type, str(int(int8))]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"loading failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
            spent, host, taken = map(float, done.stdout.split())
            bits = 8 * bench.dtype.itemsize
            yield dict(
                int8=int8, bits=bits, shards=len(files), largest=max(files), seconds=spent, host=host, taken=taken
            )
            bench.say(f"    {'int8 ' * int8}{spent:.1f} s, host memory grew by {host / 1e9:.2f} GB")


SECTIONS = dict(decode=decode, prefill=prefill, memory=memory, loading=loading, throughput=throughput)
