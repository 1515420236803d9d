"""The scan of a Mamba-2 layer on a GPU: `mamba2.ssd_chunked` as Triton kernels. Forward here, backward beside it.

Two numbers first, for one layer of the released models on a row of 8192 tokens (128 heads of 80 channels, 8 groups,
state 128, bfloat16): reading x, dt, B, C and writing y moves 371 MB, 86 microseconds on a card that copies 4.3 TB a
second. The chunked form below spends 55 GFLOP, 70 microseconds at 785 TFLOP a second. So bytes are the floor, with
arithmetic close behind: whatever is read twice shows, and so does any time in which the card only waits.

The idea is that of mamba2.py. Cut the row into chunks of Q tokens. Inside a chunk every token reads every earlier one
directly, as in attention; from all earlier chunks it reads through one matrix, the state. With a_t = dt_t A and sums
of it inside a chunk, y_i = (decay up to i) C_i . state  +  sum over j <= i of (C_i . B_j) (decay from j to i) dt_j x_j.

Why the plain form is slow: it is a dozen matrix products and as many passes over (chunks, heads, Q, Q) tensors, the
decays and their products with C.B, each of which goes to memory and back. Here they exist in registers only.

The plan, three kernels:

1. `_decays`: everything that has no channel axis, once, in float32: steps, sums of decays, what they are exponents of.
2. `_walk`: the only thing that must happen in order. One program carries some columns of one head's state through the
   row and writes down, in x's dtype, the state before each chunk. Heads are many enough to fill a card.
3. `_mix`: given those states, all chunks are independent. One program takes one chunk and the heads of one group, one
   after the other; the products C.B are made once for the group.

That writes and reads the states, 168 MB each way, and reads x twice: 880 MB in all. A kernel that walks and mixes at
once would save that, but then everything is in order, and a head is all that a multiprocessor has to do while it waits.

What made these kernels fast, in the order of what it gained:

- Loads run two chunks (two heads) ahead of the arithmetic, from memory into shared memory; Triton sees to that in a
  loop with num_stages=3, but only for loads it can leave there until they are used. `_walk` loads B transposed for
  this one reason: loaded as it lies and then transposed, each step waited for memory (170 us instead of 120).
- A head of 80 channels is cut 64 + 16. Tiles are powers of two, and one of 128 wastes 3/8 of every product and of the
  shared memory in which the loads wait.
- Two vectors of a chunk are stored side by side (`BOTH`) and loaded as one tile. A vector shorter than the number of
  threads is loaded by Triton many times over, once for each thread that needs it.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

LOG2E = tl.constexpr(1.4426950408889634)
BIG = tl.constexpr(60.0)  # exponents are cut here: above the diagonal they overflow; a zero times 2^60 is still zero
TINY = tl.constexpr(1e-30)  # in the place of a step of zero, where its logarithm is taken

# `vectors` (6, b, h, chunks * Q), float32: what `_decays` leaves for each token and head. With a_t = step_t A, and all
# of it inside the token's chunk:
STEP = tl.constexpr(0)  # softplus(dt + dt_bias) within its limits
SINCE = tl.constexpr(1)  # decay from the chunk's start up to and with t: what of the incoming state t still sees
UNTIL = tl.constexpr(2)  # decay after t up to the chunk's end: what of t reaches the outgoing state
WRITE = tl.constexpr(3)  # step * until
BOTH = tl.constexpr(4)  # and 5, as pairs: acs, log2 of SINCE without regard to documents, and u = acs - log2(step)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Steps and decays: everything without a channel axis, once, in float32, with time as the fast axis.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _decays(
    dt, bias, A, seq, vectors, fade, l, h, chunks, dt_b, dt_l, low, high,
    Q: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dt (b, l, h) -> vectors (see above) and fade (b, h, chunks): the decay over the whole chunk, what survives of
    the incoming state. Zeros where another document is concerned. One program takes one chunk of one head."""
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
    plane = _plane(tl.num_programs(2), h, chunks, Q)
    at = row * (chunks * Q) + t
    tl.store(vectors + STEP * plane + at, d)
    tl.store(vectors + SINCE * plane + at, seen)
    tl.store(vectors + UNTIL * plane + at, reaches)
    tl.store(vectors + WRITE * plane + at, d * reaches)
    tl.store(vectors + BOTH * plane + 2 * at, so_far)
    tl.store(vectors + BOTH * plane + 2 * at + 1, so_far - tl.log2(tl.maximum(d, TINY)))
    tl.store(fade + row * chunks + c, survives)


@triton.jit
def _plane(batch, h, chunks, Q):
    """Numbers in one of the `vectors`."""
    return (batch * h).to(tl.int64) * (chunks * Q)


@triton.jit
def _softplus(v):
    """log(1 + e^v), with all digits also where e^v is far below 1: the rounding of 1 + e is divided out again."""
    e = tl.exp(tl.minimum(v, 20.0))
    one = 1.0 + e
    return tl.where(v > 20.0, v, tl.where(one == 1.0, e, tl.log(one) * (e / (one - 1.0))))


@triton.jit
def _load(base, rows, stride, columns, height, width):
    """The tile base[rows * stride + columns], zeros outside height and width. Offsets inside a tile fit in 32 bits;
    `base` (64 bits) has already moved to the tile's chunk."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], inside, other=0.0)


@triton.jit
def _store(base, rows, stride, columns, height, width, values):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), inside)


@triton.jit
def _channels(P: tl.constexpr, REST: tl.constexpr):
    """The channels of a head in two tiles, of P and of REST; REST 0 means that P holds them all."""
    return tl.arange(0, P), P + tl.arange(0, REST if REST else 16)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The walk: the state before each chunk. Backward it walks the other way with the gradient of the state.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _walk(
    v, k, vectors, fade, start, states, end, before, cross, l, h, chunks, v_b, v_l, k_b, k_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program carries N rows of one head's state S (n, p), transposed, through the row: S = fade S + (w k)^T v.

    Forward v, k, w = x, B, WRITE, and states (b, chunks, h, n, p) receives S before each chunk. REVERSE: v, k, w = dy,
    C, SINCE, states receives the gradient of S after each chunk, and cross (b, h, chunks, n) what the pairs across the
    whole chunk add to the gradient of its log-decay: fade * <S before, dS after>, still to be summed over n.
    start (b, h, p, n) or None; end (b, h, p, n).
    """
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q, ns = tl.arange(0, Q), tl.program_id(2) * N + tl.arange(0, N)
    ps, more = _channels(P, REST)
    row = b * h + head
    v += b * v_b + head * p
    k += b * k_b + (head // R) * n
    vectors += (SINCE if REVERSE else WRITE) * _plane(tl.num_programs(1), h, chunks, Q) + row * (chunks * Q)
    fade += row * chunks
    S, S_more = tl.zeros((N, P), tl.float32), tl.zeros((N, REST if REST else 16), tl.float32)
    if START:
        S = tl.trans(_load(start + row * (p * n), ps, n, ns, p, n))
        if REST:
            S_more = tl.trans(_load(start + row * (p * n), more, n, ns, p, n))
    keep = tl.load(fade + (chunks - 1 if REVERSE else 0))
    for i in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - i if REVERSE else i
        at, left = (c * Q).to(tl.int64), l - c * Q
        k_inside = (ns < n)[:, None] & (q < left)[None, :]
        K = tl.load(k + at * k_l + q[None, :] * k_l + ns[:, None], k_inside, other=0.0)  # (N, Q)
        V = _load(v + at * v_l, q, v_l, ps, left, p)
        if REST:
            V_more = _load(v + at * v_l, q, v_l, more, left, p)
        w = tl.load(vectors + at + q)
        coming = tl.load(fade + (tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, chunks - 1)))
        here = ((b * chunks + c) * h + head) * (p * n)
        _store(states + here, ns, p, ps, n, p, S)
        if REST:
            _store(states + here, ns, p, more, n, p, S_more)
        if REVERSE:
            across = tl.sum(_load(before + here, ns, p, ps, n, p).to(tl.float32) * S, axis=1)
            if REST:
                across += tl.sum(_load(before + here, ns, p, more, n, p).to(tl.float32) * S_more, axis=1)
            tl.store(cross + (row * chunks + c) * n + ns, keep * across, ns < n)
        wk = (K * w[None, :]).to(K.dtype)
        S = tl.dot(wk, V, S * keep, input_precision=PRECISION)
        if REST:
            S_more = tl.dot(wk, V_more, S_more * keep, input_precision=PRECISION)
        keep = coming
    _store(end + row * (p * n), ps, n, ns, p, n, tl.trans(S))
    if REST:
        _store(end + row * (p * n), more, n, ns, p, n, tl.trans(S_more))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The mix: what a chunk's tokens read from the incoming state and from each other. Forward y, backward dx.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["l", "chunks"])
def _mix(
    a, k, v, states, vectors, D, seq, out, l, h, chunks, a_b, a_l, k_b, k_l, v_b, v_l, out_b, out_l,
    R: tl.constexpr, p: tl.constexpr, n: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    N: tl.constexpr, BACKWARD: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one chunk, all heads of one group, one after the other.

    y_i  = since_i (S C_i)  + sum over j <= i of (C_i . B_j) 2^(acs_i - u_j) x_j  + D x_i
    dx_j = write_j (dS B_j) + sum over i >= j of (C_i . B_j) 2^(acs_i - u_j) dy_i + D dy_j
    The products C.B are made once for the group. a, k, v = C, B, x forward, and B, C, dy backward.
    """
    c, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, ns, two = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, 2)
    ps, more = _channels(P, REST)
    start, left = (c * Q).to(tl.int64), l - c * Q
    a = _load(a + b * a_b + start * a_l + group * n, q, a_l, ns, left, n)
    k = _load(k + b * k_b + start * k_l + group * n, q, k_l, ns, left, n)
    sees = q[:, None] <= q[None, :] if BACKWARD else q[:, None] >= q[None, :]
    if PACKED:
        ids = tl.load(seq + b * l + start + tl.minimum(q, left - 1))
        sees &= ids[:, None] == ids[None, :]
    ak = tl.where(sees, tl.dot(a, tl.trans(k), input_precision=PRECISION), 0.0)  # (Q, Q)

    v += b * v_b + start * v_l
    out += b * out_b + start * out_l
    states += (b * chunks + c) * h * (p * n)
    plane = _plane(tl.num_programs(2), h, chunks, Q)
    for head in tl.range(group * R, group * R + R, num_stages=STAGES):
        row = (b * h + head) * (chunks * Q) + start
        S, V = _load(states + head * (p * n), ns, p, ps, n, p), _load(v + head * p, q, v_l, ps, left, p)
        if REST:
            S_more = _load(states + head * (p * n), ns, p, more, n, p)
            V_more = _load(v + head * p, q, v_l, more, left, p)
        acs, u = tl.split(tl.load(vectors + BOTH * plane + (row + q)[:, None] * 2 + two[None, :]))
        exponent = acs[None, :] - u[:, None] if BACKWARD else acs[:, None] - u[None, :]
        M = ak * tl.exp2(tl.minimum(exponent, BIG))
        M = tl.where(q[:, None] == q[None, :], M + tl.load(D + head).to(tl.float32), M).to(V.dtype)
        edge = tl.load(vectors + (WRITE if BACKWARD else SINCE) * plane + row + q)[:, None]
        y = tl.dot(a, S, input_precision=PRECISION) * edge  # (Q, P)
        _store(out + head * p, q, out_l, ps, left, p, tl.dot(M, V, y, input_precision=PRECISION))
        if REST:
            y = tl.dot(a, S_more, input_precision=PRECISION) * edge
            _store(out + head * p, q, out_l, more, left, p, tl.dot(M, V_more, y, input_precision=PRECISION))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The launches.
# ---------------------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How one shape is cut: chunk Q; a head in tiles of P and REST channels; padded state N, of which one walk carries
    WALK rows; tokens along each side of a block in `_pairs`; warps (of `_walk` and `_pairs`: 4); how many loads ahead
    the loops run."""

    Q: int
    P: int
    REST: int
    N: int
    WALK: int
    BLOCK: int
    warps: int = 4
    stages: int = 1


LARGE = 232448  # bytes of shared memory a program may take on a Hopper card; older ones have 101,376 or 166,912


@functools.cache
def shared_memory(device):
    """Bytes of shared memory that one program may take there; without a GPU (the interpreter) as on Hopper."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else LARGE


@functools.cache
def tiles(p, n, dtype, shared=LARGE):
    """Tile sizes by shape and card; nothing is tried out at run time, so the first step compiles each kernel once.

    Chunks of 128 tokens halve the traffic of states against 64. What does not fit into the registers and the shared
    memory of a multiprocessor (float32; a state of more than 128; an older card) takes smaller chunks.
    """
    power = lambda size: max(16, triton.next_power_of_2(size))
    P, REST, N = min(64, power(p)), power(p - 64) if p > 64 else 0, power(n)
    if dtype.itemsize == 4:
        Q = 32 if p * N <= 64 * 64 else 16
        return Tiles(Q, P, REST, N, min(N, 32), Q)
    if shared < LARGE and p * N > 64 * 256:
        return Tiles(32, P, REST, N, 64, 32)
    if shared < LARGE or N > 128:
        return Tiles(64, P, REST, N, min(N, 64), 64, stages=2 if N <= 128 else 1)
    return Tiles(128, P, REST, N, min(N, 64), 64, warps=8, stages=3 if p <= 96 else 2)


def ssd(
    x, dt, A, B, C, D, initial_state=None, seq_idx=None, chunk_size=None, dt_bias=None, time_step_limit=(0.0, math.inf)
):
    """Arguments and results as in `mamba2.ssd_chunked`: x (b, l, h, p), dt (b, l, h), A and D (h,), B and C
    (b, l, g, n), initial_state (b, h, p, n) or None, seq_idx (b, l) or None -> y (b, l, h, p), final state float32.

    With dt_bias (h,), dt is what in_proj made, and softplus(dt + dt_bias) is done inside; then, with or without it, dt
    is cut to time_step_limit. x, B and C are bfloat16, float16 or float32, all of one kind, and may be views into wider
    rows; in float16 no number of a state or of its gradient may pass 65,504, because those are stored in x's dtype.
    chunk_size is accepted and ignored: the tile sizes are chosen by shape. Raises ValueError for shapes or dtypes that
    do not fit.
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
    @once_differentiable
    def backward(ctx, dy, dfinal):
        from kernels.ssd_backward import scan_backward  # that file needs this one first

        x, dt, _, B, C, _, initial, *_ = saved = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dy = torch.zeros_like(x) if dy is None else dy
        dA, dD, dinitial, dbias = scan_backward(saved, ctx.limit, dy, dfinal, dx, ddt, dB, dC)
        return dx, ddt, dA, dB, dC, dD, None if initial is None else dinitial, None, dbias, None


def scan_forward(x, dt, A, B, C, D, initial, seq_idx, dt_bias, limit):
    """y (b, l, h, p), the final state (b, h, p, n), and what `scan_backward` needs."""
    _check(x, dt, A, B, C, D, initial, seq_idx, dt_bias)
    x, B, C, dt, A, D = rows(x), rows(B), rows(C), rows(dt), A.contiguous(), D.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    initial = None if initial is None else initial.float().contiguous()
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    tile = tiles(p, n, x.dtype, shared_memory(x.device))
    chunks = -(-l // tile.Q)
    with torch.cuda.device_of(x):
        vectors = torch.empty(6, b, h, chunks * tile.Q, dtype=torch.float32, device=x.device)
        fade = torch.empty(b, h, chunks, dtype=torch.float32, device=x.device)
        packed = seq_idx is not None
        _decays[chunks, h, b](
            dt, dt_bias, A, seq_idx, vectors, fade, l, h, chunks, *dt.stride()[:2], *limit,
            Q=tile.Q, SOFTPLUS=dt_bias is not None, PACKED=packed, num_warps=1,
        )  # fmt: skip
        shape = constants(x, B, tile)
        states = torch.empty(b, chunks, h, n, p, dtype=x.dtype, device=x.device)
        final = torch.empty(b, h, p, n, dtype=torch.float32, device=x.device)
        _walk[h, b, tile.N // tile.WALK](
            x, B, vectors, fade, initial, states, final, None, None, l, h, chunks, *x.stride()[:2], *B.stride()[:2],
            **shape, N=tile.WALK, REVERSE=False, START=initial is not None, num_warps=4,
        )  # fmt: skip
        y = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        _mix[chunks, g, b](
            C, B, x, states, vectors, D, seq_idx, y, l, h, chunks, *C.stride()[:2], *B.stride()[:2], *x.stride()[:2],
            *y.stride()[:2], **shape, N=tile.N, BACKWARD=False, PACKED=packed, num_warps=tile.warps,
        )  # fmt: skip
    return y, final, (x, dt, A, B, C, D, initial, seq_idx, dt_bias, vectors, fade, states)


def constants(x, B, tile):
    """What every kernel with a channel axis is told when it is compiled."""
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    # 16-bit products are exact in float32 whatever this says; float32 is split into three tf32 products
    precision = "tf32x3" if x.element_size() == 4 else "tf32"
    return dict(R=h // g, p=p, n=n, Q=tile.Q, P=tile.P, REST=tile.REST, PRECISION=precision, STAGES=tile.stages)


def rows(t):
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
    for name, t, want in (
        ("dt", dt, (b, l, h)), ("A", A, (h,)), ("B", B, (b, l, g, n)), ("C", C, (b, l, g, n)), ("D", D, (h,)),
        ("dt_bias", dt_bias, (h,)), ("seq_idx", seq_idx, (b, l)), ("initial_state", initial_state, (b, h, p, n)),
    ):  # fmt: skip
        if t is not None and t.shape != want:
            raise ValueError(f"{name} must have shape {want} beside x {tuple(x.shape)}; got {tuple(t.shape)}")
