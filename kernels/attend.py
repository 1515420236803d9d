"""One new token a row looks back at all cached ones: grouped-query attention for decoding, rows of different lengths.

Two numbers first. At 131,072 tokens of the released 9B (8 key/value heads of 128, bfloat16) one layer's keys and values
are 537 MB, and every one of them is needed: 125 microseconds at 4.3 TB a second. The arithmetic is 2 FLOPs for each of
the 5 query heads that share a number: 5 FLOPs a byte. So this is reading, once, as fast as memory allows.

Why the plain form is slow: PyTorch's attention takes one mask for a batch of unequal rows, reads the cache up to its
end even where rows are short, and repeats keys for each query head on some paths. And it wants the length when it is
launched; a step that is captured in a CUDA graph must find the lengths on the GPU.

The plan. One row and one key/value head is too little work for a card (8 programs at batch 1), so its keys are cut into
`parts`, and each program reads one part: scores of its query heads against BLOCK keys at a time, the softmax carried
along (a maximum and a sum, Milakov and Gimelshein 2018, arXiv 1805.02867), and what comes out is a part's answer with
its maximum and sum. A second, small kernel weighs the parts (Flash-Decoding, Dao et al. 2023). How many parts there are
is decided when the step is captured; how many keys a part has is decided by each row's length, when it runs.

The query heads that share a key/value head are padded to 16 rows, the smallest matrix product there is; the rest of
the tile is zeros that cost nothing, because memory is what we wait for. `attention.attend_explicit` is the same thing.
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(
    q, k, v, lengths, out, peak, total, scale, k_row, k_head, q_row,
    GROUP: tl.constexpr, HEADS: tl.constexpr, e: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Grid (parts, kv_heads, b). q (b, kv_heads * GROUP, e); k, v (b, kv_heads, longest, e), tokens one after the
    other; lengths (b,) + MORE: how many there are. out (b, kv_heads, parts, HEADS, E), peak and total (.., HEADS):
    float32."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32) + MORE
    share = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    begin = part * share
    end = tl.minimum(begin + share, length)
    heads, es, tokens = tl.arange(0, HEADS), tl.arange(0, E), tl.arange(0, BLOCK)
    own = (heads < GROUP)[:, None] & (es < e)[None, :]
    Q = tl.load(q + row * q_row + (head * GROUP + heads)[:, None] * e + es[None, :], own, other=0.0)
    k += row * k_row + head.to(tl.int64) * k_head
    v += row * k_row + head.to(tl.int64) * k_head
    m, s = tl.full((HEADS,), float("-inf"), tl.float32), tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, E), tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = (start + tokens).to(tl.int64)[:, None] * e + es[None, :]
        inside = (start + tokens < end)[:, None] & (es < e)[None, :]
        K, V = tl.load(k + at, inside, other=0.0), tl.load(v + at, inside, other=0.0)
        scores = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * (scale * LOG2E)  # (HEADS, BLOCK)
        scores = tl.where((start + tokens < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(m - higher)
        s = s * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(V.dtype), V, acc * fade[:, None], input_precision=PRECISION)
        m = higher
    here = ((row * tl.num_programs(1) + head) * parts + part) * HEADS + heads
    tl.store(out + here[:, None] * E + es[None, :], acc)
    tl.store(peak + here, m)
    tl.store(total + here, s)


@triton.jit
def _weigh(
    parts_out, peak, total, out, GROUP: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, parts: tl.constexpr,
    e: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Grid (GROUP, kv_heads, b): the parts of one query head, each worth 2^(its maximum), become one answer."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, es = tl.arange(0, PARTS), tl.arange(0, E)
    here = ((row * tl.num_programs(1) + head) * parts + i) * HEADS + tl.program_id(0)
    m = tl.load(peak + here, i < parts, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m))  # a part without keys has -inf and counts nothing
    s = tl.sum(tl.load(total + here, i < parts, other=0.0) * weight)
    acc = tl.load(parts_out + here[:, None] * E + es[None, :], (i < parts)[:, None], other=0.0)
    y = tl.sum(acc * weight[:, None], 0) / s
    at = (row * tl.num_programs(1) + head) * (GROUP * e) + tl.program_id(0) * e + es
    tl.store(out + at, y.to(out.dtype.element_ty), es < e)


@triton.jit
def _put(k, v, k_cache, v_cache, lengths, k_row, k_head, e: tl.constexpr, E: tl.constexpr):
    """Grid (kv_heads, b): one token's keys and values to their place."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    es = tl.arange(0, E)
    here = (row * tl.num_programs(0) + head) * e + es
    there = row * k_row + head.to(tl.int64) * k_head + tl.load(lengths + row).to(tl.int64) * e + es
    tl.store(k_cache + there, tl.load(k + here, es < e), es < e)
    tl.store(v_cache + there, tl.load(v + here, es < e), es < e)


def put(k, v, k_cache, v_cache, lengths):
    """Write k, v (b, kv_heads, e) into the caches (b, kv_heads, longest, e) at position lengths[i] of row i, which must
    be below `longest`. Layout of the caches as in `attend`."""
    b, kv_heads, e = k.shape
    _check_cache(k_cache, v_cache)
    with torch.cuda.device_of(k):
        _put[kv_heads, b](
            k.contiguous(), v.contiguous(), k_cache, v_cache, lengths, k_cache.stride(0), k_cache.stride(1), e=e,
            E=triton.next_power_of_2(e), num_warps=1,
        )  # fmt: skip


def _check_cache(k, v):
    if k.stride() != v.stride() or k.stride(3) != 1 or k.stride(2) != k.shape[3]:
        raise ValueError(f"the tokens of a head must lie one after the other in k and v; got strides {k.stride()}")


def default_parts(b, kv_heads, longest, device, block=64):
    """Parts that give each multiprocessor about two programs, at least four blocks of keys each at full length."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(triton.cdiv(2 * processors, b * kv_heads), triton.cdiv(longest, 4 * block), 256))


def attend(q, k, v, lengths, parts=None, more=0):
    """softmax(q k^T / sqrt(e)) v over the first lengths[i] + more cached tokens of row i.

    q (b, heads, e); k, v (b, kv_heads, longest, e), tokens of a head one after the other (views of a larger cache are
    fine); lengths (b,) int32 or int64 on the same device, with `more` from 1 to `longest`; query head j reads
    key/value head j // (heads / kv_heads). -> (b, heads, e) in q's dtype. bfloat16, float16 or float32; heads up to 16
    for each key/value head, e up to 256: else ValueError. Can be captured in a CUDA graph; no gradients.
    """
    (b, heads, e), (kv_heads, longest) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one kind, bfloat16, float16 or float32; got {q.dtype}, {k.dtype}")
    if heads % kv_heads or not 1 <= group <= 16 or e > 256:
        raise ValueError(
            f"attend takes up to 16 query heads for each key/value head and head_dim up to 256; got {heads} for "
            f"{kv_heads}, head_dim {e}"
        )
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != e or lengths.shape != (b,):
        raise ValueError(
            f"k and v must be ({b}, kv_heads, tokens, {e}) and lengths ({b},) beside q {tuple(q.shape)}; got "
            f"{tuple(k.shape)}, {tuple(v.shape)} and {tuple(lengths.shape)}"
        )
    _check_cache(k, v)
    q = q.contiguous()
    parts = parts or default_parts(b, kv_heads, longest, q.device)
    E, rows = max(16, triton.next_power_of_2(e)), 16
    out = torch.empty(b, kv_heads, parts, rows, E, dtype=torch.float32, device=q.device)
    peak, total = torch.empty(2, b, kv_heads, parts, rows, dtype=torch.float32, device=q.device)
    wide = q.dtype == torch.float32
    y = torch.empty_like(q)
    with torch.cuda.device_of(q):
        _part[parts, kv_heads, b](
            q, k, v, lengths, out, peak, total, e**-0.5, k.stride(0), k.stride(1), q.stride(0), GROUP=group, HEADS=rows,
            e=e, E=E, BLOCK=32 if wide or E > 128 else 64, PRECISION="tf32x3" if wide else "tf32",
            STAGES=1 if wide else 3, MORE=more, num_warps=4,
        )  # fmt: skip
        _weigh[group, kv_heads, b](
            out, peak, total, y, GROUP=group, HEADS=rows, PARTS=triton.next_power_of_2(parts), parts=parts, e=e, E=E,
            num_warps=4,
        )  # fmt: skip
    return y
