"""The scan backward: six launches, of which two are the forward's own kernels running the other way.

Two numbers first, for the layer of ssd.py (8192 tokens, 128 heads of 80, 8 groups, state 128, bfloat16): reading x, dy,
B, C, dt and writing dx, dB, dC, ddt moves 575 MB, 134 microseconds at 4.3 TB a second; twice the forward's arithmetic
is 140 microseconds at 785 TFLOP a second.

The gradient of a recurrence is a recurrence that runs backwards, with the roles exchanged: dy writes, through C, into
the gradient dS of the state, and x reads it through B. So `_walk` with dy and C gives dS after each chunk, and `_mix`
with B, C, dy gives dx. What is left are sums over the heads of a group (dB, dC) and over everything (dt, A, dt_bias).

- `_pairs`: pairs of tokens of one chunk. For each head d_ij = (dy_i . x_j) 2^(acs_i - u_j), i at or after j. Summed
  over heads it is the gradient of C_i . B_j. Times C_i . B_j it is the pair's part G_ij of the loss, whose sums over
  rows and columns the decays need. A chunk is cut into quarters, and the one above the diagonal is left out.
- `_gather`: dC and dB, from the states and from `_pairs`. One program takes a chunk and loops over a group's heads.
- `_finish`: dt, A, dt_bias.

No atomics anywhere: sums that several programs share are written apart and added up in a fixed order.

**The gradient of the decays** is where most of the thought went. log-decay a_t multiplies every pair (written at j < t,
read at i >= t), so its gradient is the sum of those pairs' parts of the loss. The textbook says: sum over i >= t of
dy_i . y_i minus the same of dx and x. Both sums run over the row and all but cancel, and y and dx have been rounded to
16 bits: of dA nothing was left. Here the sum is put together from four parts that need not cancel: pairs inside the
chunk (rows minus columns of the same G, not rounded in between), pairs from earlier chunks into this one, from this
one into later ones, and across the whole chunk (<S before, dS after>, from the walk).
"""

import torch
import triton
import triton.language as tl

from kernels import ssd
from kernels.ssd import BIG, BOTH, SINCE, STEP, TINY, UNTIL, _channels, _load, _mix, _plane, _softplus, _store, _walk


@triton.jit(do_not_specialize=["l", "chunks"])
def _pairs(
    C, B, x, dy, vectors, seq, dCB, rows, columns, diagonal, l, h, chunks, c_b, c_l, b_b, b_l, x_b, x_l, dy_b, dy_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    REST: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens i against BLOCK tokens j of a chunk, all heads of one group, one after the other.

    dCB (b, chunks, g, Q, Q) gets the sum of d_ij over heads; rows and columns (Q / BLOCK, b, h, chunks * Q) the sums
    of G over this program's j and i; diagonal (b, h, chunks * Q) dy_i . x_i. Q is one BLOCK or two; of the four blocks
    then the one above the diagonal has no program, and its places stay unwritten.
    """
    blocks: tl.constexpr = 1 if BLOCK == Q else 3
    c, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_block, column_block = (block + 1) // 2, block // 2  # (0, 0), (1, 0), (1, 1)
    i, j = row_block * BLOCK + tl.arange(0, BLOCK), column_block * BLOCK + tl.arange(0, BLOCK)
    ns = tl.arange(0, N)
    ps, more = _channels(P, REST)
    start, left = (c * Q).to(tl.int64), l - c * Q
    a = _load(C + b * c_b + start * c_l + group * n, i, c_l, ns, left, n)
    k = _load(B + b * b_b + start * b_l + group * n, j, b_l, ns, left, n)
    sees = i[:, None] >= j[None, :]
    if PACKED:
        seq += b * l + start
        sees &= tl.load(seq + tl.minimum(i, left - 1))[:, None] == tl.load(seq + tl.minimum(j, left - 1))[None, :]
    CB = tl.where(sees, tl.dot(a, tl.trans(k), input_precision=PRECISION), 0.0)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    dy += b * dy_b + start * dy_l
    x += b * x_b + start * x_l
    plane = _plane(tl.num_programs(2), h, chunks, Q)
    vectors += BOTH * plane
    rows += column_block * plane
    columns += row_block * plane
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + start
        Y, X = _load(dy + head * p, i, dy_l, ps, left, p), _load(x + head * p, j, x_l, ps, left, p)
        d = tl.dot(Y, tl.trans(X), input_precision=PRECISION)
        if REST:
            Y, X = _load(dy + head * p, i, dy_l, more, left, p), _load(x + head * p, j, x_l, more, left, p)
            d = tl.dot(Y, tl.trans(X), d, input_precision=PRECISION)
        own = tl.sum(tl.where(i[:, None] == j[None, :], d, 0.0), axis=1)
        tl.store(diagonal + row + i, own, (i >= 0) & (row_block == column_block))
        exponent = tl.load(vectors + (row + i) * 2)[:, None] - tl.load(vectors + (row + j) * 2 + 1)[None, :]
        d *= tl.exp2(tl.minimum(exponent, BIG))
        total += d
        G = d * CB
        tl.store(rows + row + i, tl.sum(G, axis=1))
        tl.store(columns + row + j, tl.sum(G, axis=0))
    dCB += ((b * chunks + c) * tl.num_programs(1) + group) * (Q * Q)
    tl.store(dCB + i[:, None] * Q + j[None, :], tl.where(sees, total, 0.0).to(dCB.dtype.element_ty))


@triton.jit(do_not_specialize=["l", "chunks"])
def _gather(
    v, states, vectors, a, k, dCB, out, flow, l, h, chunks, v_b, v_l, a_b, a_l, k_b, k_l, out_b, out_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of C, or with KEYS of B: one chunk, one group, summed over its heads.

    dC_i = sum over heads of since_i (dy_i S)        + sum over j of dCB_ij B_j   v, a, k = dy, C, B
    dB_j = sum over heads of step_j until_j (x_j dS) + sum over i of dCB_ij C_i   v, a, k = x, B, C
    flow (b, h, chunks * Q): since_i (dy_i S) . C_i, what the incoming state adds to the loss through token i, and
    until_j (x_j dS) . B_j, what token j adds through the outgoing state for each unit of its step.
    """
    c, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, ns = tl.arange(0, Q), tl.arange(0, N)
    ps, more = _channels(P, REST)
    start, left = (c * Q).to(tl.int64), l - c * Q
    dCB += ((b * chunks + c) * tl.num_programs(1) + group) * (Q * Q)
    pairs = tl.load(dCB + q[:, None] * Q + q[None, :], q[:, None] >= q[None, :], other=0.0)
    if KEYS:
        pairs = tl.trans(pairs)
    a = _load(a + b * a_b + start * a_l + group * n, q, a_l, ns, left, n).to(tl.float32)
    k = _load(k + b * k_b + start * k_l + group * n, q, k_l, ns, left, n)
    total = tl.dot(pairs, k, input_precision=PRECISION)  # (Q, N)
    v += b * v_b + start * v_l
    states += (b * chunks + c) * h * (p * n)
    plane = _plane(tl.num_programs(2), h, chunks, Q)
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + start
        V, S = _load(v + head * p, q, v_l, ps, left, p), _load(states + head * (p * n), ns, p, ps, n, p)
        d = tl.dot(V, tl.trans(S), input_precision=PRECISION)
        if REST:
            V, S = _load(v + head * p, q, v_l, more, left, p), _load(states + head * (p * n), ns, p, more, n, p)
            d = tl.dot(V, tl.trans(S), d, input_precision=PRECISION)
        d *= tl.load(vectors + (UNTIL if KEYS else SINCE) * plane + row + q)[:, None]
        total += d * tl.load(vectors + STEP * plane + row + q)[:, None] if KEYS else d
        tl.store(flow + row + q, tl.sum(d * a, axis=1))
    _store(out + b * out_b + start * out_l + group * n, q, out_l, ns, left, n, total)


@triton.jit(do_not_specialize=["l", "chunks"])
def _finish(
    dt, bias, A, vectors, rows, columns, outflow, inflow, cross, ddt, dA, dbias, l, h, chunks, dt_b, dt_l, ddt_b, ddt_l,
    low, high, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt (b, l, h), and one dA and dbias (b, chunks, h) for each chunk, from the sums the other kernels left: the four
    parts of each log-decay's gradient (see above). One program takes one chunk of one head."""
    c, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, ns = tl.arange(0, Q), tl.arange(0, N)
    t = c * Q + q
    row, plane = b * h + head, _plane(tl.num_programs(2), h, chunks, Q)
    at = row * (chunks * Q) + t
    step, reads, writes = tl.load(vectors + STEP * plane + at), tl.load(outflow + at), tl.zeros((Q,), tl.float32)
    for i in tl.static_range(Q // BLOCK):
        reads += tl.load(rows + i * plane + at, i <= q // BLOCK, other=0.0)
        writes += tl.load(columns + i * plane + at, i >= q // BLOCK, other=0.0)
    flow = tl.load(inflow + at)
    a = tl.cumsum(reads - writes, axis=0, reverse=True) + tl.cumsum(step * flow, axis=0) - step * flow
    a += tl.sum(tl.load(cross + (row * chunks + c) * n + ns, ns < n, other=0.0))
    out = (b * chunks + c) * h + head
    tl.store(dA + out, tl.sum(a * step, axis=0))
    g = a * tl.load(A + head).to(tl.float32) + writes / tl.maximum(step, TINY) + flow
    raw = tl.load(dt + b * dt_b + t.to(tl.int64) * dt_l + head, t < l, other=0.0).to(tl.float32)
    if SOFTPLUS:
        raw += tl.load(bias + head).to(tl.float32)
        g *= tl.sigmoid(raw)
        raw = _softplus(raw)
    g = tl.where((t < l) & (raw >= low) & (raw <= high), g, 0.0)
    tl.store(dbias + out, tl.sum(g, axis=0))
    tl.store(ddt + b * ddt_b + t.to(tl.int64) * ddt_l + head, g.to(ddt.dtype.element_ty), t < l)


def scan_backward(saved, limit, dy, dfinal, dx, ddt, dB, dC):
    """Fills dx, ddt, dB, dC (shaped as x, dt, B, C; any strides for b and l) and returns dA, dD, dinitial, ddt_bias.

    `saved` is the third result of `ssd.scan_forward`; limit its time_step_limit; dfinal (b, h, p, n) or None."""
    x, dt, A, B, C, D, initial, seq_idx, dt_bias, vectors, fade, states = saved
    (b, l, h, p), (g, n), chunks = x.shape, B.shape[2:], fade.shape[-1]
    tile = ssd.tiles(p, n, x.dtype, ssd.shared_memory(x.device))
    shape, packed = ssd.constants(x, B, tile), seq_idx is not None
    dy = ssd.rows(dy)
    dfinal = None if dfinal is None else dfinal.float().contiguous()

    def small(*size):
        return torch.empty(size, dtype=torch.float32, device=x.device)

    dstates, dinitial, cross = torch.empty_like(states), small(b, h, p, n), small(b, h, chunks, n)
    walk = shape | dict(N=tile.WALK)
    if tile.REST:  # it also loads the states: with a third stage two programs would not fit on a multiprocessor
        walk["STAGES"] = min(2, tile.stages)
    _walk[h, b, tile.N // tile.WALK](
        dy, C, vectors, fade, dfinal, dstates, dinitial, states, cross, l, h, chunks, *dy.stride()[:2],
        *C.stride()[:2], **walk, REVERSE=True, START=dfinal is not None, num_warps=4,
    )  # fmt: skip
    shape["N"] = tile.N
    _mix[chunks, g, b](
        B, C, dy, dstates, vectors, D, seq_idx, dx, l, h, chunks, *B.stride()[:2], *C.stride()[:2],
        *dy.stride()[:2], *dx.stride()[:2], **shape, BACKWARD=True, PACKED=packed, num_warps=tile.warps,
    )  # fmt: skip
    blocks, length = tile.Q // tile.BLOCK, chunks * tile.Q
    dCB = torch.empty(b, chunks, g, tile.Q, tile.Q, dtype=x.dtype, device=x.device)
    rows, columns = small(blocks, b, h, length), small(blocks, b, h, length)
    diagonal, outflow, inflow = small(b, h, length), small(b, h, length), small(b, h, length)
    _pairs[chunks * (1 if blocks == 1 else 3), g, b](
        C, B, x, dy, vectors, seq_idx, dCB, rows, columns, diagonal, l, h, chunks, *C.stride()[:2], *B.stride()[:2],
        *x.stride()[:2], *dy.stride()[:2], **shape, BLOCK=tile.BLOCK, PACKED=packed, num_warps=4,
    )  # fmt: skip
    _gather[chunks, g, b](
        dy, states, vectors, C, B, dCB, dC, outflow, l, h, chunks, *dy.stride()[:2], *C.stride()[:2],
        *B.stride()[:2], *dC.stride()[:2], **shape, KEYS=False, num_warps=tile.warps,
    )  # fmt: skip
    _gather[chunks, g, b](
        x, dstates, vectors, B, C, dCB, dB, inflow, l, h, chunks, *x.stride()[:2], *B.stride()[:2],
        *C.stride()[:2], *dB.stride()[:2], **shape, KEYS=True, num_warps=tile.warps,
    )  # fmt: skip
    sums = small(2, b, chunks, h)
    _finish[chunks, h, b](
        dt, dt_bias, A, vectors, rows, columns, outflow, inflow, cross, ddt, *sums, l, h, chunks, *dt.stride()[:2],
        *ddt.stride()[:2], *limit, n=n, N=tile.N, Q=tile.Q, BLOCK=tile.BLOCK, SOFTPLUS=dt_bias is not None,
        num_warps=1,
    )  # fmt: skip
    dA, dbias = sums.sum((1, 2))
    dbias = None if dt_bias is None else dbias.to(dt_bias.dtype)
    return dA.to(A.dtype), diagonal.sum((0, 2)).to(D.dtype), dinitial, dbias
