"""A matrix times a few rows: what almost all of a decode step is, at the speed at which memory delivers the matrix.

Two numbers first. One token of the released 9B multiplies 121 matrices, 16.6 GB in bfloat16, each with a vector (or
with the 8 or 16 of a batch): two FLOPs a row and weight. A GPU that reads 4.3 TB/s and multiplies 800 TFLOP/s needs
3.9 ms for the bytes and 0.02 ms for the arithmetic of one row. So what counts is that memory never idles: enough bytes
on their way at any time, no waiting between one matrix and the next, nothing else read or written.

Why the plain form is slower: between two products stand small launches (norm, activation, sum), each longer than its
work; a product of one shape leaves part of the card without work at its end, and the next can only then begin.

The plan:

- the matrix W (outputs, inputs) is the tall operand: a program takes BN of its rows and walks along the inputs, BK at a
  time, with STAGES loads on their way; the rows of x, padded to 16, are the narrow operand. The padding costs nothing,
  because we wait for W;
- where there are too few rows of W for the whole card, the walk is cut into `split` parts, and the last program to
  finish adds the parts up, in a fixed order: results are the same to the bit from run to run;
- what stands before and after is done on the way. RMSNorm: multiply x by the norm's weight as it comes in, sum its
  squares as they come by, and scale the products at the end (a row's 1/rms is one factor for all of them). Squared ReLU
  and the residual are applied to what is about to be written. So an MLP is two launches;
- W may be int8 with a float32 scale for each of its rows (see quantize.py): it is widened on the way to the matrix
  unit, exactly, by a few integer operations and one subtraction for two weights.

What did not help (RESULTS.md): asking the L2 cache for the next matrix while the last programs of one end (programmatic
dependent launch), at any distance: 0.1 to 0.7 ms a step slower.

The plain twin is `plain` at the end: norm, product, activation, sum, each rounded to x's dtype where PyTorch rounds.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import ssd

MOST = 64  # rows of x that are still few


@triton.jit
def _widen(w, dtype: tl.constexpr):
    """int8 -> bfloat16, exactly, four at a time. With w = low 7 bits - 128 * sign: 0x4300 is 128 in bfloat16, and its
    last mantissa bit counts ones; so (0x4300 | low) - (0x4300 | sign << 7) is (128 + low) - (128 or 256). The second
    carries its minus (0xC300) and is added with a multiplication by one: Ampere and Ada cannot add without."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, high, low, one;
            mov.b32 one, 0x3F803F80;
            prmt.b32 a, $2, 0, 0x4140;
            prmt.b32 b, $2, 0, 0x4342;
            lop3.b32 high, a, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 low, a, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $0, high, one, low;
            lop3.b32 high, b, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 low, b, 0x00800080, 0xC300C300, 0xEA;
            fma.rn.bf16x2 $1, high, one, low;
            }""",
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return w.to(dtype)


@triton.jit(do_not_specialize=["b"])
def _linear(
    x, weight, scale, norm_weight, residual, out, parts, count, x_stride, b, N, K, eps,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    RELU2: tl.constexpr, EVEN: tl.constexpr, FAST_INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (N / BN, SPLIT). x (b, K), weight (N, K), out and residual (b, N), parts (SPLIT, ROWS, N) float32."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, ROWS)
    share = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    row = weight + n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BN, ROWS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(begin, end, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if EVEN:
            W = tl.load(row + k[None, :], (n < N)[:, None], other=0)
            X = tl.load(x + r[:, None] * x_stride + k[None, :], (r < b)[:, None], other=0.0)
        else:
            W = tl.load(row + k[None, :], (n < N)[:, None] & (k < end)[None, :], other=0)
            X = tl.load(x + r[:, None] * x_stride + k[None, :], (r < b)[:, None] & (k < end)[None, :], other=0.0)
        if norm_weight is not None:
            v = X.to(tl.float32)
            squares += tl.sum(v * v, 1)
            X = (v * tl.load(norm_weight + k, k < end, other=0.0).to(tl.float32)[None, :]).to(X.dtype)
        if scale is not None:
            if FAST_INT8:
                W = _widen(W, X.dtype)
            else:
                W = W.to(X.dtype)
        acc = tl.dot(W, tl.trans(X), acc, input_precision=PRECISION)
    inside = (n < N)[:, None] & (r < b)[None, :]
    last = True
    if SPLIT > 1:
        part = parts + r[None, :] * N + n[:, None]
        tl.store(part + tl.program_id(1) * ROWS * N, acc, inside)
        tl.debug_barrier()
        before = tl.atomic_add(count + tl.program_id(0) * 32, 1, sem="acq_rel", scope="gpu")
        last = before == SPLIT - 1
        if last:
            acc = tl.zeros((BN, ROWS), tl.float32)
            for i in tl.static_range(SPLIT):
                acc += tl.load(part + i * ROWS * N, inside, other=0.0, cache_modifier=".cg")
            tl.store(count + tl.program_id(0) * 32, 0)
    if last:
        if norm_weight is not None:
            acc *= tl.rsqrt(squares / K + eps)[None, :]
        if scale is not None:
            acc *= tl.load(scale + n, n < N, other=0.0)[:, None]
        y = acc.to(out.dtype.element_ty)  # rounded where PyTorch rounds
        if RELU2:
            y = tl.maximum(y, 0.0)
            y = (y.to(tl.float32) * y.to(tl.float32)).to(out.dtype.element_ty)
        at = r.to(tl.int64)[None, :] * N + n[:, None]
        if residual is not None:
            y = (y.to(tl.float32) + tl.load(residual + at, inside, other=0.0).to(tl.float32)).to(y.dtype)
        tl.store(out + at, y, inside)


@triton.jit
def _spell_out(weight, scale, out, K, BLOCK: tl.constexpr):
    """Grid (N, K / BLOCK)."""
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + n * K + k, k < K, other=0).to(tl.float32) * tl.load(scale + n)
    tl.store(out + n * K + k, w.to(out.dtype.element_ty), k < K)


def spell_out(weight, scale, dtype):
    """int8 weight (N, K) and scale (N,) float32 -> the matrix in `dtype`, in one pass: for many rows of x, where the
    arithmetic counts and the widened matrix is read from memory once more without harm."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _spell_out[len(weight), triton.cdiv(weight.shape[1], 2048)](weight, scale, out, weight.shape[1], BLOCK=2048)
    return out


@functools.cache
def _scratch(device, split, rows, N):
    """Where parts of a product wait for each other, and the counts of who has come. A launch leaves zeros behind, so
    one pair serves all layers; calls on one device share it: give them one stream, or order the streams."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("call linear once with this shape before capturing it: its counters must outlive the graph")
    counts = torch.zeros(triton.cdiv(N, 16) * 32, dtype=torch.int32, device=device)
    return torch.empty(split, rows, N, dtype=torch.float32, device=device), counts


def tiles(N, int8):
    """BN, BK, warps, stages, split for a matrix of N outputs: what was fastest on an H200 for the shapes of the 9B. A
    matrix should be one wave of programs that all fit on the card at once, with 50 KB on their way on each
    multiprocessor: many outputs make tall tiles, few outputs low ones."""
    if N >= 65536:
        return 128, 128, 8, 3, 1
    if int8:
        return 32, 128, 2, 4, 4 if N < 8192 else 1
    return (16, 256, 1, 4, 1) if N < 8192 else (64, 64, 4, 6, 1)


def linear(x, weight, scale=None, norm=None, relu2=False, residual=None):
    """residual + act(norm(x) W^T) for a few rows: x (b, K), weight (N, K) -> (b, N) in x's dtype.

    scale (N,) float32: weight is int8, and row n of it counts scale[n] times. norm: an RMSNorm to go before (its weight
    (K,) and eps), or None. relu2: squared ReLU after the product. residual (b, N), added last, or None.
    More than MOST rows, or float32 on a GPU, go through `plain`. Can be captured in a CUDA graph after one call
    outside. No gradients. Raises ValueError for shapes that do not belong together.
    """
    (b, K), N = x.shape, weight.shape[0]
    expected = {"weight": (weight, (N, K)), "scale": (scale, (N,)), "residual": (residual, (b, N))}
    expected["the norm's weight"] = (None if norm is None else norm.weight, (K,))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must be {shape}, contiguous, beside x {tuple(x.shape)} and weight {tuple(weight.shape)}; got "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if (weight.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"a scale belongs to int8 weights and to no others; weight is {weight.dtype}")
    if scale is None and weight.dtype != x.dtype:
        raise ValueError(f"x and weight must be of one kind, or weight int8; got {x.dtype} and {weight.dtype}")
    if b > MOST or (x.dtype == torch.float32 and x.is_cuda):
        if scale is not None:
            weight, scale = spell_out(weight, scale, x.dtype), None
        return plain(x, weight, scale, norm, relu2, residual)
    BN, BK, warps, stages, split = tiles(N, scale is not None)
    # A launch of its own costs less than norming in each program; and a part of a walk knows a part of the squares.
    if norm is not None and (scale is not None or N < 8192 or split > 1):
        x, norm = norm(x), None
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = max(16, triton.next_power_of_2(b))
    stage = BK * (BN * weight.element_size() + rows * x.element_size())  # bytes; one is on its way to the registers
    stages = min(stages, 1 + ssd.shared_memory(x.device) // stage)
    out = torch.empty(b, N, dtype=x.dtype, device=x.device)
    parts, counts = (None, None) if split == 1 else _scratch(x.device, split, rows, N)
    with torch.cuda.device_of(x):
        _linear[triton.cdiv(N, BN), split](
            x, weight, scale, None if norm is None else norm.weight, residual, out, parts, counts, x.stride(0), b, N, K,
            0.0 if norm is None else float(norm.eps), ROWS=rows, BN=BN, BK=BK, SPLIT=split, STAGES=stages, RELU2=relu2,
            EVEN=K % (BK * split) == 0, FAST_INT8=x.device.type != "cpu",
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=warps,
        )  # fmt: skip
    return out


def plain(x, weight, scale=None, norm=None, relu2=False, residual=None):
    """What `linear` computes, one operation after the other."""
    if norm is not None:
        x = norm(x)
    if scale is not None:
        weight = (weight.float() * scale[:, None]).to(x.dtype)
    y = F.linear(x, weight)
    if relu2:
        y = F.relu(y).square()
    return y if residual is None else residual + y
