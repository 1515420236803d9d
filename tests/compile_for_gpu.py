"""Compile what a layer launches, forward, backward and decoding, for a GPU that is not here: a process of its own.

    python tests/compile_for_gpu.py 90 232448        compute capability, bytes of shared memory

Triton's interpreter accepts more than its compiler does. So the layer runs on meta tensors (shapes without numbers),
each launch is caught, and its kernel compiled down to machine code with the very options of that launch. Prints one
JSON line for each kernel: name, seconds, bytes of shared memory.
"""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import attend, decode, fp8, ssd
from kernels.cross_entropy import cross_entropy_
from mamba2 import Mamba2Mixer
from model import PRESETS, build
from quantize import quantize_

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
DONE = set()


def compile_launch(kernel, *args, grid=None, warmup=False, **given):
    """In the place of JITFunction.run: types instead of numbers, as the launcher would specialise them."""
    given = dict(zip(kernel.arg_names, args)) | given
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    options = {name: value for name, value in options.items() if value is not None}
    signature, constants, divisible = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = given.get(param.name, param.default)
        specialise = not param.do_not_specialize
        if param.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
        elif torch.is_tensor(value):
            signature[param.name], divisible[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32"
            if specialise and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    key = (kernel.fn.__module__, kernel.fn.__name__, str(signature), str(constants), str(divisible), str(options))
    if key not in DONE:
        DONE.add(key)
        start = time.time()
        done = triton.compile(ASTSource(kernel, signature, constants, divisible), target=TARGET, options=options)
        name = f"{key[0]}.{key[1]}"
        assert re.search(rb"ELF", done.asm["cubin"][:8]), name
        print(json.dumps([name, round(time.time() - start, 2), done.metadata.shared]), flush=True)


def layer(h, p, g, n, dtype, packed):
    """Forward, backward and one decode step of one mixer."""
    with torch.device("meta"):
        mixer = Mamba2Mixer(256, h, p, g, n, 4).to(dtype)
        mixer.impl = "triton"
        u = torch.empty(2, 300, 256, dtype=dtype, requires_grad=True)
        mixer(u, seq_idx=torch.empty(2, 300, dtype=torch.int64) if packed else None).sum().backward()
        if not packed:
            with torch.no_grad():
                state = mixer.new_state(2, "meta", dtype)
                mixer(u, state)
                mixer(u[:, :1], state)


@torch.no_grad()
def steps(meta):
    """One token of 1 and of 64 rows through a block of each kind and the head of the 9B, in 16 and in 8 bits; and
    attention's widest heads."""
    model = build(replace(PRESETS["nano-9b"], hybrid_override_pattern="M-*"), "meta", torch.bfloat16).use("triton")
    for int8 in (False, True):
        model = quantize_(model) if int8 else model
        for b in (1, 64):
            tokens = meta(b, dtype=torch.int64)
            model.step(tokens, model.new_cache(b, 5000), tokens, 4999)
    for dtype in (torch.bfloat16, torch.float32):
        cache, lengths = meta(2, 8, 1000, 256, dtype=dtype), meta(2, dtype=torch.int64)
        attend.attend(meta(2, 128, 256, dtype=dtype), cache, cache, lengths, parts=256)


if __name__ == "__main__":
    capability, shared = map(int, sys.argv[1:])
    TARGET = GPUTarget("cuda", capability, 32)
    JITFunction.run = compile_launch
    ssd.shared_memory = lambda device: shared
    fp8._native = lambda device, square: not square and capability >= 89
    decode._dependent = lambda device: capability >= 90
    layer(128, 80, 8, 128, torch.bfloat16, packed=False)  # the released models' layer
    layer(16, 64, 2, 64, torch.bfloat16, packed=True)
    for dtype in (torch.bfloat16, torch.float32):
        layer(2, 128, 1, 256, dtype, packed=False)  # the largest tiles there are
    meta = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
    tokens = meta(64, dtype=torch.int64), meta(64, dtype=torch.bool)
    cross_entropy_(meta(64, 131072, dtype=torch.bfloat16), *tokens)
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(300, 1296, dtype=dtype)
        fp8.quantise(x, (1, 128))
        fp8.quantise(x.t(), (1, 128), "e5m2", power_of_two=False)
        for tile in ((1, 128), (128, 128)):
            fp8.both(x, tile)
    steps(meta)
