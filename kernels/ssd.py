"""The scan of a Mamba-2 layer on a GPU: `mamba2.ssd_chunked` as eight small Triton kernels, backward included."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BIG = tl.constexpr(
    60.0
)  # exponents are cut here: above the diagonal they overflow, and a zero times 2^60 is still zero


# ---------------------------------------------------------------------------------------------------------------------
# 1. Steps and decays: everything without a channel axis, once, in float32, with time as the fast axis.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _decays(
    dt, bias, A, seq, step, acs, u, since, until, write, fade, l, h, chunks, dt_b, dt_l, low, high,
    Q: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dt (b, l, h) -> step, acs, u, since, until, write (b, h, chunks * Q) and fade (b, h, chunks), all float32.

    With a_t = step_t * A: acs is log2 of the decay from the chunk's start up to and with t, u = acs - log2(step),
    since = 2^acs (what of the incoming state t still sees), until = 2^(a after t) (what of t reaches the chunk's end),
    write = step * until, fade = 2^(all a) (what of the incoming state survives). Zeros where another document is
    concerned. One program takes one chunk of one head.
    """
    c, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = c * Q + tl.arange(0, Q)
    d = tl.load(dt + b * dt_b + t.to(tl.int64) * dt_l + head, t < l, other=0.0).to(tl.float32)
    if SOFTPLUS:
        d = _softplus(d + tl.load(bias + head).to(tl.float32))
    d = tl.where(t < l, tl.minimum(tl.maximum(d, low), high), 0.0)  # step 0 hides the tokens beyond the row's end
    a = d * (tl.load(A + head).to(tl.float32) * LOG2E)
    so_far, rest = tl.cumsum(a, axis=0), tl.cumsum(a, axis=0, reverse=True) - a  # up to and with t; after t
    seen, reaches, survives = tl.exp2(so_far), tl.exp2(rest), tl.exp2(tl.sum(a, axis=0))
    if PACKED:
        seq += b * l
        ids = tl.load(seq + tl.minimum(t, l - 1))
        first = tl.load(seq + tl.maximum(c * Q - 1, 0))  # the document of the incoming state
        end = tl.load(seq + tl.minimum(c * Q + Q, l) - 1)
        seen = tl.where(ids == first, seen, 0.0)
        reaches = tl.where(ids == end, reaches, 0.0)
        survives = tl.where(first == end, survives, 0.0)
    row = b * h + head
    at = row * (chunks * Q) + t
    tl.store(step + at, d)
    tl.store(acs + at, so_far)
    tl.store(u + at, so_far - tl.log2(d))
    tl.store(since + at, seen)
    tl.store(until + at, reaches)
    tl.store(write + at, d * reaches)
    tl.store(fade + row * chunks + c, survives)


@triton.jit
def _softplus(v):
    """log(1 + e^v), with all digits also where e^v is far below 1: the rounding of 1 + e is divided out again."""
    e = tl.exp(tl.minimum(v, 20.0))
    one = 1.0 + e
    return tl.where(v > 20.0, v, tl.where(one == 1.0, e, tl.log(one) * (e / (one - 1.0))))


@triton.jit
def _tile(base, rows, stride, columns, height, width):
    """The tile base[rows * stride + columns], zeros outside height and width. Offsets inside a tile fit in 32 bits;
    `base` (64 bits) has already moved to the tile's chunk."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], inside, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The walk: the state before each chunk. Backward it walks the other way with the gradient of the state.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _walk(
    v, k, weight, fade, start, states, end, before, cross, l, h, chunks, v_b, v_l, k_b, k_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    REVERSE: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program carries N columns of one head's state S (p, n) through the row: S = fade S + v^T (weight k).

    Forward v, k, weight = x, B, write, and states (b, chunks, h, p, n) receives S before each chunk. REVERSE:
    v, k, weight = dy, C, since, states receives the gradient of S after each chunk, and cross (n / N, b, h, chunks)
    what the pairs across the whole chunk add to the gradient of its log-decay: fade * <S before, dS after>.
    start (b, h, p, n) or None; end (b, h, p, n).
    """
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q, ps, ns = tl.arange(0, Q), tl.arange(0, P), tl.program_id(2) * N + tl.arange(0, N)
    v += b * v_b + head * p
    k += b * k_b + (head // R) * n
    row = b * h + head
    tile = ps[:, None] * n + ns[None, :]
    inside = (ps < p)[:, None] & (ns < n)[None, :]
    S = tl.load(start + row * (p * n) + tile, inside, other=0.0) if START else tl.zeros((P, N), tl.float32)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        start_l = (c * Q).to(tl.int64)
        V = _tile(v + start_l * v_l, q, v_l, ps, l - c * Q, p)
        K = _tile(k + start_l * k_l, q, k_l, ns, l - c * Q, n)
        at = row * (chunks * Q) + c * Q + q
        w = tl.load(weight + at)
        keep = tl.load(fade + row * chunks + c)
        here = ((b * chunks + c) * h + head) * (p * n) + tile
        tl.store(states + here, S.to(states.dtype.element_ty), inside)
        if REVERSE:
            past = tl.load(before + here, inside, other=0.0).to(tl.float32)
            part = tl.program_id(2) * tl.num_programs(1) * h + row
            tl.store(cross + part * chunks + c, keep * tl.sum(past * S))
        S = tl.dot(tl.trans(V), (K * w[:, None]).to(K.dtype), S * keep, input_precision=PRECISION)
    tl.store(end + row * (p * n) + tile, S, inside)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The mix: what a chunk's tokens read from the incoming state and from each other. Forward y, backward dx.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _mix(
    a, k, v, states, edge, mine, theirs, D, seq, out, l, h, chunks, a_b, a_l, k_b, k_l, v_b, v_l, out_b, out_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, BACKWARD: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one chunk, all heads of one group, one after the other.

    y_i  = since_i (S C_i)  + sum over j <= i of (C_i . B_j) 2^(acs_i - u_j) x_j  + D x_i
    dx_j = write_j (dS B_j) + sum over i >= j of (C_i . B_j) 2^(acs_i - u_j) dy_i + D dy_j
    The products C.B are made once for the group. a, k, v, edge, mine, theirs = C, B, x, since, acs, u forward, and
    B, C, dy, write, u, acs backward.
    """
    blocks: tl.constexpr = Q // ROWS
    c, group, b = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner, q = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS), tl.arange(0, Q)
    ps, ns = tl.arange(0, P), tl.arange(0, N)
    start, left = (c * Q).to(tl.int64), l - c * Q
    a = _tile(a + b * a_b + start * a_l + group * n, inner, a_l, ns, left, n)
    k = _tile(k + b * k_b + start * k_l + group * n, q, k_l, ns, left, n)
    sees = inner[:, None] <= q[None, :] if BACKWARD else inner[:, None] >= q[None, :]
    if PACKED:
        seq += b * l + start
        sees &= tl.load(seq + tl.minimum(inner, left - 1))[:, None] == tl.load(seq + tl.minimum(q, left - 1))[None, :]
    ak = tl.where(sees, tl.dot(a, tl.trans(k), input_precision=PRECISION), 0.0)  # (ROWS, Q)

    v += b * v_b + start * v_l
    out += b * out_b + start * out_l
    out_at, inside = inner[:, None] * out_l + ps[None, :], (inner < left)[:, None] & (ps < p)[None, :]
    states += (b * chunks + c) * h * (p * n)
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + c * Q
        S, V = _tile(states + head * (p * n), ps, n, ns, p, n), _tile(v + head * p, q, v_l, ps, left, p)
        between = tl.load(mine + row + inner)[:, None] - tl.load(theirs + row + q)[None, :]
        M = ak * tl.exp2(tl.minimum(-between if BACKWARD else between, BIG))
        M = tl.where(inner[:, None] == q[None, :], M + tl.load(D + head).to(tl.float32), M).to(V.dtype)
        y = tl.dot(a, tl.trans(S), input_precision=PRECISION) * tl.load(edge + row + inner)[:, None]  # (ROWS, P)
        y = tl.dot(M, V, y, input_precision=PRECISION)
        tl.store(out + head * p + out_at, y.to(out.dtype.element_ty), inside)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Backward only. The pairs: the gradient of C.B summed over a group's heads, and of the log-decays inside a chunk.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _pairs(
    C, B, x, dy, acs, step, seq, dCB, rows, columns, diagonal, l, h, chunks, c_b, c_l, b_b, b_l, x_b, x_l, dy_b, dy_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens i against all tokens j of their chunk, all heads of one group, one after the other.

    With d_ij = (dy_i . x_j) 2^(acs_i - acs_j) and its part of the loss G_ij = d_ij (C_i . B_j) step_j:
    dCB (b, chunks, g, Q, Q) gets the sum of d_ij step_j over heads; rows (b, h, chunks * Q) the sums of G over j;
    columns (Q / ROWS, b, h, chunks * Q) those of G / step over this program's i; diagonal, shaped as rows,
    dy_i . x_i.
    Rows and columns are sums of the same numbers, so that what should cancel between them does.
    """
    blocks: tl.constexpr = Q // ROWS
    c, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner, q = block * ROWS + tl.arange(0, ROWS), tl.arange(0, Q)
    ps, ns = tl.arange(0, P), tl.arange(0, N)
    start, left = (c * Q).to(tl.int64), l - c * Q
    a = _tile(C + b * c_b + start * c_l + group * n, inner, c_l, ns, left, n)
    k = _tile(B + b * b_b + start * b_l + group * n, q, b_l, ns, left, n)
    sees = inner[:, None] >= q[None, :]
    if PACKED:
        seq += b * l + start
        sees &= tl.load(seq + tl.minimum(inner, left - 1))[:, None] == tl.load(seq + tl.minimum(q, left - 1))[None, :]
    CB = tl.where(sees, tl.dot(a, tl.trans(k), input_precision=PRECISION), 0.0)
    total = tl.zeros((ROWS, Q), tl.float32)
    dy += b * dy_b + start * dy_l
    x += b * x_b + start * x_l
    columns += block.to(tl.int64) * (tl.num_programs(2) * h) * (chunks * Q)
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + c * Q
        Y, X = _tile(dy + head * p, inner, dy_l, ps, left, p), _tile(x + head * p, q, x_l, ps, left, p)
        between = tl.load(acs + row + inner)[:, None] - tl.load(acs + row + q)[None, :]
        d = tl.dot(Y, tl.trans(X), input_precision=PRECISION) * tl.exp2(tl.minimum(between, 0.0))
        w = tl.load(step + row + q)[None, :]
        total += d * w
        G = d * CB
        tl.store(rows + row + inner, tl.sum(G * w, axis=1))
        tl.store(columns + row + q, tl.sum(G, axis=0))
        tl.store(diagonal + row + inner, tl.sum(tl.where(inner[:, None] == q[None, :], d, 0.0), axis=1))
    dCB += ((b * chunks + c) * tl.num_programs(1) + group) * (Q * Q)
    tl.store(dCB + inner[:, None] * Q + q[None, :], tl.where(sees, total, 0.0).to(dCB.dtype.element_ty))


@triton.jit(do_not_specialize=["l", "chunks"])
def _gather(
    v, states, edge, weight, a, k, dCB, out, flow, l, h, chunks, v_b, v_l, a_b, a_l, k_b, k_l, out_b, out_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of C, or with KEYS of B: ROWS tokens, one group, summed over its heads.

    dC_i = sum over heads of since_i (dy_i S)        + sum over j of dCB_ij B_j   v, edge, a, k = dy, since, C, B
    dB_j = sum over heads of step_j until_j (x_j dS) + sum over i of dCB_ij C_i   v, edge, a, k = x, until, B, C
    flow (b, h, chunks * Q): since_i (dy_i S) . C_i, what the incoming state adds to the loss through token i, and
    until_j (x_j dS) . B_j, what token j adds through the outgoing state for each unit of its step.
    """
    blocks: tl.constexpr = Q // ROWS
    c, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner, q = block * ROWS + tl.arange(0, ROWS), tl.arange(0, Q)
    ps, ns = tl.arange(0, P), tl.arange(0, N)
    start, left = (c * Q).to(tl.int64), l - c * Q
    dCB += ((b * chunks + c) * tl.num_programs(1) + group) * (Q * Q)
    if KEYS:
        pairs = tl.trans(tl.load(dCB + q[:, None] * Q + inner[None, :]))
    else:
        pairs = tl.load(dCB + inner[:, None] * Q + q[None, :])
    a = _tile(a + b * a_b + start * a_l + group * n, inner, a_l, ns, left, n).to(tl.float32)
    k = _tile(k + b * k_b + start * k_l + group * n, q, k_l, ns, left, n)
    total = tl.dot(pairs, k, input_precision=PRECISION)  # (ROWS, N)
    v += b * v_b + start * v_l
    states += (b * chunks + c) * h * (p * n)
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + c * Q + inner
        V, S = _tile(v + head * p, inner, v_l, ps, left, p), _tile(states + head * (p * n), ps, n, ns, p, n)
        d = tl.dot(V, S, input_precision=PRECISION) * tl.load(edge + row)[:, None]
        total += d * tl.load(weight + row)[:, None] if KEYS else d
        tl.store(flow + row, tl.sum(d * a, axis=1))
    out += b * out_b + start * out_l + group * n
    inside = (inner < left)[:, None] & (ns < n)[None, :]
    tl.store(out + inner[:, None] * out_l + ns[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["l", "chunks"])
def _finish(
    dt, bias, A, step, rows, columns, outflow, inflow, cross, ddt, dA, dbias, l, h, chunks, dt_b, dt_l, ddt_b, ddt_l,
    low, high, Q: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt (b, l, h), and one dA and dbias (b, chunks, h) for each chunk, from the sums the other kernels left.

    A log-decay a_t meets every pair (written at j < t, read at i >= t), so its gradient is the sum of those pairs'
    parts of the loss: both inside the chunk; from before; to after; across. One program takes one chunk of one head.
    """
    c, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = c * Q + tl.arange(0, Q)
    row, heads = b * h + head, tl.num_programs(2).to(tl.int64) * h
    at = row * (chunks * Q) + t
    d, direct = tl.load(step + at), tl.zeros((Q,), tl.float32)
    for i in tl.static_range(BLOCKS):
        direct += tl.load(columns + i * heads * (chunks * Q) + at)
    reads = tl.load(rows + at) - d * direct + tl.load(outflow + at)
    flow = tl.load(inflow + at)
    a = tl.cumsum(reads, axis=0, reverse=True) + tl.cumsum(d * flow, axis=0) - d * flow
    for i in tl.static_range(PARTS):
        a += tl.load(cross + (i * heads + row) * chunks + c)
    out = (b * chunks + c) * h + head
    tl.store(dA + out, tl.sum(a * d, axis=0))
    g = a * tl.load(A + head).to(tl.float32) + direct + flow
    raw = tl.load(dt + b * dt_b + t.to(tl.int64) * dt_l + head, t < l, other=0.0).to(tl.float32)
    if SOFTPLUS:
        raw += tl.load(bias + head).to(tl.float32)
        g *= tl.sigmoid(raw)
        raw = _softplus(raw)
    g = tl.where((t < l) & (raw >= low) & (raw <= high), g, 0.0)
    tl.store(dbias + out, tl.sum(g, axis=0))
    tl.store(ddt + b * ddt_b + t.to(tl.int64) * ddt_l + head, g.to(ddt.dtype.element_ty), t < l)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The launches.
# ---------------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How one shape is cut: chunk Q; padded head P and state N; columns of the state that one walk carries (WALK);
    tokens a program takes in _mix (MIX) and in _pairs and _gather (ROWS); warps; depth of the software pipelines; the
    most registers a thread of _walk and _gather may take, or None."""

    Q: int
    P: int
    N: int
    WALK: int
    MIX: int
    ROWS: int
    warps: int = 8
    stages: int = 1
    registers: int | None = None


LARGE = 232448  # bytes of shared memory a program may take on a Hopper card; older ones have 101,376 or 166,912


@functools.cache
def shared_memory(device):
    """Bytes of shared memory that one program may take there; without a GPU (the interpreter) as on Hopper."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else LARGE


def tiles(p, n, dtype, shared=LARGE):
    """Tile sizes by shape and card; nothing is tried out at run time, so the first step compiles each kernel once.

    Chunks of 128 tokens halve the traffic of states against 64. What does not fit into the registers and the shared
    memory of a multiprocessor (float32; a state of more than 128; an older card) takes smaller chunks. With 128
    registers two programs share a multiprocessor, and one computes while the other waits for memory.
    """
    P, N = max(16, triton.next_power_of_2(p)), max(16, triton.next_power_of_2(n))
    if dtype.itemsize == 4:
        if shared < 4 * P * N + 2048:
            raise ValueError(
                f"float32 tiles of {P} x {N} (head_dim {p}, state size {n}) need {4 * P * N + 2048:,} bytes of shared "
                f"memory, and this GPU has {shared:,}: use bfloat16, or impl='torch'"
            )
        Q = 32 if P * N <= 64 * 64 else 16
        return Tiles(Q, P, N, min(N, 32), Q, Q)
    if shared < LARGE:
        return Tiles(64, P, N, min(N, 64), 64, 64 if N <= 128 else 32, stages=2 if N <= 128 else 1)
    if N > 128:
        return Tiles(64, P, N, 64, 64, 64)
    return Tiles(128, P, N, min(N, 64), 128, 64, stages=3 if P <= 64 else 2, registers=128)


def ssd(
    x, dt, A, B, C, D, initial_state=None, seq_idx=None, chunk_size=None, dt_bias=None, time_step_limit=(0.0, math.inf)
):
    """Arguments and results as in `mamba2.ssd_chunked`: x (b, l, h, p), dt (b, l, h), A and D (h,), B and C
    (b, l, g, n), initial_state (b, h, p, n) or None, seq_idx (b, l) or None -> y (b, l, h, p), final state float32.

    With dt_bias (h,), dt is what in_proj made, and softplus(dt + dt_bias), cut to time_step_limit, is done inside.
    x, B and C are bfloat16, float16 or float32, all of one kind, and may be views into wider rows; in float16 no number
    of a state may pass 65,504, because states are stored in x's dtype. chunk_size is accepted and ignored: the tile
    sizes are chosen by shape. Raises ValueError for shapes or dtypes that do not fit.
    """
    return _Scan.apply(x, dt, A, B, C, D, initial_state, seq_idx, dt_bias, time_step_limit)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial, seq_idx, dt_bias, limit):
        y, final, saved = scan_forward(x, dt, A, B, C, D, initial, seq_idx, dt_bias, limit)
        ctx.save_for_backward(*saved)
        ctx.limit = limit
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):
        x, dt, _, B, C, _, initial, *_ = saved = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dy = torch.zeros_like(x) if dy is None else dy
        dA, dD, dinitial, dbias = scan_backward(saved, ctx.limit, dy, dfinal, dx, ddt, dB, dC)
        return dx, ddt, dA, dB, dC, dD, None if initial is None else dinitial, None, dbias, None


def _rows(t):
    """t (b, l, ...) with everything after l lying together: any strides for b and l, else a copy."""
    inner = 1
    for size, stride in zip(t.shape[:1:-1], t.stride()[:1:-1]):
        if size > 1 and stride != inner:
            return t.contiguous()
        inner *= size
    return t


def _check(x, dt, A, B, C, D, initial_state, seq_idx, dt_bias):
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    if not (x.dtype == B.dtype == C.dtype and x.dtype in (torch.bfloat16, torch.float16, torch.float32)):
        raise ValueError(
            "the Triton scan takes x, B and C all in bfloat16, float16 or float32; got "
            f"{x.dtype}, {B.dtype} and {C.dtype}: cast them, or use impl='torch'"
        )
    if h % g or p > 128 or n > 256 or l < 1:
        raise ValueError(
            "the Triton scan takes at least 1 token, head_dim up to 128, state size up to 256 and the same number of "
            f"heads for each group; got {l} tokens, head_dim {p}, state size {n}, {h} heads in {g} groups: "
            "use impl='torch'"
        )
    want = dict(dt=(b, l, h), A=(h,), B=(b, l, g, n), C=(b, l, g, n), D=(h,), dt_bias=(h,), seq_idx=(b, l))
    want["initial_state"] = (b, h, p, n)
    given = dict(dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, seq_idx=seq_idx, initial_state=initial_state)
    for name, t in given.items():
        if t is not None and tuple(t.shape) != want[name]:
            raise ValueError(f"{name} must have shape {want[name]} beside x {tuple(x.shape)}; got {tuple(t.shape)}")


def _layout(x, B, tile, seq_idx):
    """What every kernel with a channel axis is told of the shape."""
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    # 16-bit products are exact in float32 whatever this says; float32 is split into three tf32 products
    common = dict(R=h // g, p=p, n=n, Q=tile.Q, P=tile.P, PRECISION="tf32x3" if x.element_size() == 4 else "tf32")
    return common | dict(num_warps=tile.warps), dict(PACKED=seq_idx is not None)


def scan_forward(x, dt, A, B, C, D, initial, seq_idx, dt_bias, limit):
    """y (b, l, h, p), the final state (b, h, p, n), and what `scan_backward` needs."""
    _check(x, dt, A, B, C, D, initial, seq_idx, dt_bias)
    x, B, C, dt = (_rows(t) for t in (x, B, C, dt))
    initial = None if initial is None else initial.float().contiguous()
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    tile = tiles(p, n, x.dtype, shared_memory(x.device))
    chunks = triton.cdiv(l, tile.Q)
    shape, packed = _layout(x, B, tile, seq_idx)
    vectors = x.new_empty(6, b, h, chunks * tile.Q, dtype=torch.float32)
    fade = x.new_empty(b, h, chunks, dtype=torch.float32)
    _decays[chunks, h, b](
        dt, dt_bias, A, seq_idx, *vectors, fade, l, h, chunks, *dt.stride()[:2], *limit,
        Q=tile.Q, SOFTPLUS=dt_bias is not None, num_warps=1, **packed,
    )  # fmt: skip
    step, acs, u, since, until, write = vectors
    states, final = x.new_empty(b, chunks, h, p, n), x.new_empty(b, h, p, n, dtype=torch.float32)
    _walk[h, b, tile.N // tile.WALK](
        x, B, write, fade, initial, states, final, None, None, l, h, chunks, *x.stride()[:2], *B.stride()[:2],
        **shape, N=tile.WALK, REVERSE=False, START=initial is not None, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    y = x.new_empty(x.shape)
    _mix[chunks * tile.Q // tile.MIX, g, b](
        C, B, x, states, since, acs, u, D, seq_idx, y, l, h, chunks, *C.stride()[:2], *B.stride()[:2], *x.stride()[:2],
        *y.stride()[:2], **shape, **packed, N=tile.N, ROWS=tile.MIX, BACKWARD=False, STAGES=tile.stages,
    )  # fmt: skip
    return y, final, (x, dt, A, B, C, D, initial, seq_idx, dt_bias, vectors, fade, states)


def scan_backward(saved, limit, dy, dfinal, dx, ddt, dB, dC):
    """Fills dx, ddt, dB, dC (shaped as x, dt, B, C; any strides for b and l) and returns dA, dD, dinitial, ddt_bias."""
    x, dt, A, B, C, D, initial, seq_idx, dt_bias, (step, acs, u, since, until, write), fade, states = saved
    (b, l, h, p), (g, n), chunks = x.shape, B.shape[2:], fade.shape[-1]
    tile = tiles(p, n, x.dtype, shared_memory(x.device))
    blocks, parts = tile.Q // tile.ROWS, tile.N // tile.WALK
    shape, packed = _layout(x, B, tile, seq_idx)
    dy = _rows(dy)
    dfinal = None if dfinal is None else dfinal.float().contiguous()

    def small(*size):
        return torch.empty(size, dtype=torch.float32, device=x.device)

    dstates, dinitial, cross = torch.empty_like(states), small(b, h, p, n), small(parts, b, h, chunks)
    _walk[h, b, parts](
        dy, C, since, fade, dfinal, dstates, dinitial, states, cross, l, h, chunks, *dy.stride()[:2], *C.stride()[:2],
        **shape, N=tile.WALK, REVERSE=True, START=dfinal is not None, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    _mix[chunks * tile.Q // tile.MIX, g, b](
        B, C, dy, dstates, write, u, acs, D, seq_idx, dx, l, h, chunks, *B.stride()[:2], *C.stride()[:2],
        *dy.stride()[:2], *dx.stride()[:2], **shape, **packed, N=tile.N, ROWS=tile.MIX, BACKWARD=True,
        STAGES=tile.stages,
    )  # fmt: skip
    shape.update(N=tile.N, ROWS=tile.ROWS, STAGES=tile.stages)
    dCB = x.new_empty(b, chunks, g, tile.Q, tile.Q)
    rows, diagonal, outflow, inflow = small(4, b, h, chunks * tile.Q)
    columns = small(blocks, b, h, chunks * tile.Q)
    _pairs[chunks * blocks, g, b](
        C, B, x, dy, acs, step, seq_idx, dCB, rows, columns, diagonal, l, h, chunks, *C.stride()[:2], *B.stride()[:2],
        *x.stride()[:2], *dy.stride()[:2], **shape, **packed,
    )  # fmt: skip
    _gather[chunks * blocks, g, b](
        dy, states, since, None, C, B, dCB, dC, outflow, l, h, chunks, *dy.stride()[:2], *C.stride()[:2],
        *B.stride()[:2], *dC.stride()[:2], **shape, KEYS=False, maxnreg=tile.registers,
    )  # fmt: skip
    _gather[chunks * blocks, g, b](
        x, dstates, until, step, B, C, dCB, dB, inflow, l, h, chunks, *x.stride()[:2], *B.stride()[:2],
        *C.stride()[:2], *dB.stride()[:2], **shape, KEYS=True, maxnreg=tile.registers,
    )  # fmt: skip
    sums = small(2, b, chunks, h)
    _finish[chunks, h, b](
        dt, dt_bias, A, step, rows, columns, outflow, inflow, cross, ddt, *sums, l, h, chunks, *dt.stride()[:2],
        *ddt.stride()[:2], *limit, Q=tile.Q, BLOCKS=blocks, PARTS=parts, SOFTPLUS=dt_bias is not None, num_warps=1,
    )  # fmt: skip
    dA, dbias = sums.sum((1, 2))
    dbias = None if dt_bias is None else dbias.to(dt_bias.dtype)
    return dA.to(A.dtype), diagonal.sum((0, 2)).to(D.dtype), dinitial, dbias
