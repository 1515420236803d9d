"""The causal convolution as two Triton kernels: same function as `mamba2.causal_conv1d`, one pass forward, one back.

Two numbers first, for one layer of the released 9B on a row of 8192 tokens: 12,288 channels in bfloat16 are 201 MB. The
forward must read x and write y, 403 MB; the backward must read x and dy and write dx, 604 MB. On a card that copies
4.3 TB a second that is 94 and 140 microseconds, and no kernel can be faster. The arithmetic, 8 FLOPs a value for the
taps, a dozen for the SiLU, twice that going back, comes to some 2 and 4 GFLOP. Compiled for a Hopper card it is 16 and
33 instructions a value, and in 94 and 140 microseconds the 132 multiprocessors of one at 1.98 GHz issue 31 and 46. So
this is a copy that happens to compute: touch memory once, and do not waste instructions.

The plain form touches it many times: it pads x into a new tensor, transposes it for conv1d, stores the sum before the
SiLU, and its backward revisits each of these. Written here instead:

- A program (Triton's word for one block of threads) owns a strip of channels and a run of tokens, and walks down the
  run. Channels are neighbours in memory and never meet in the arithmetic: each thread keeps a few to itself.
- The last k-1 rows stay in registers, so every value is loaded once and used k times. A run starts with the k-1 rows
  before it, which another program loads as well: k-1 rows in 64, or in some hundred going back.
- A load takes hundreds of nanoseconds to arrive. While one group of ROWS rows is computed, the next is on its way.
- Nearly every group is plain: inside the run, inside one document. Those run without a test. A group that touches an
  edge takes the other branch, row by row, with every test.
- The backward computes the sum before the SiLU again, because that is cheaper than writing and reading it. With it,
  d = dy * silu'(sum), and d_t flows to x_t, x_t-1, ... x_t-k+1: k-1 unfinished rows of dx wait in registers, and each
  step finishes one. So a program walks k-1 tokens past its run, to finish its last rows.
- dweight and dbias are sums over all tokens. Every program adds up its own run and writes k+1 rows; torch adds those
  up. No atomics, so the order of the additions, and with it the last bit, is always the same.
- x is a view into in_proj's output, 22,656 values from row to row. Strides cost nothing here. A long row of such a
  tensor has more than 2^31 values, so the start of a run is a 64-bit address; steps inside it are small.

All arithmetic is float32. Neither kernel has a second derivative.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

ROWS = 4  # tokens in a group
RUN = 64  # tokens a program walks in the forward: it begins quickly, and there is no last wave to wait for


@triton.jit
def _sigmoid(v):
    r = tl.rsqrt(1 + tl.exp2(v * -1.4426950408889634))  # a quotient takes twice the instructions of a squared rsqrt
    return r * r


@triton.jit
def _parameters(weight, bias, c, here, k: tl.constexpr):
    """The k taps as a tuple of strips, and the bias."""
    w = ()
    for i in tl.static_range(k):
        w += (tl.load(weight + c * k + i, mask=here, other=0).to(tl.float32),)
    offset = tl.zeros(c.shape, tl.float32)
    if bias is not None:
        offset += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    return w, offset


@triton.jit
def _before(x, x_token, window, channels, here, start, k: tl.constexpr):
    """The k-1 rows before the run, from x or, where the row begins, from the window."""
    past = ()
    for i in tl.static_range(k - 1):
        p = tl.load(x + (i + 1 - k) * x_token, mask=here & (start > 0), other=0).to(tl.float32)
        if window is not None:
            p += tl.load(window + i * channels, mask=here & (start == 0), other=0).to(tl.float32)
        past += (p,)
    return past


@triton.jit
def _group(x, x_token, here, left, ROWS: tl.constexpr):
    """ROWS rows from x on, of which `left` exist; the others are 0."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows += (tl.load(x + j * x_token, mask=here & (j < left), other=0),)
    return rows


@triton.jit
def _one_document(ids, ROWS: tl.constexpr, k: tl.constexpr):
    """Whether the ROWS rows from ids on and the k-1 before them are of one document."""
    same = True
    for j in tl.static_range(1 - k, ROWS):
        same = same & (tl.load(ids + j) == tl.load(ids))
    return same


@triton.jit
def _seen(rows, ids, start, k: tl.constexpr):
    """k rows, of which the last is the row ids points to: those of other documents become 0."""
    seen = ()
    for i in tl.static_range(k):
        same = tl.load(ids + tl.maximum(i + 1 - k, -start)) == tl.load(ids)  # the window is of the first document
        seen += (tl.where(same, rows[i], 0.0),)
    return seen


@triton.jit
def _add_products(sums, a, b, k: tl.constexpr):
    new = ()
    for i in tl.static_range(k):
        new += (sums[i] + a[i] * b[i],)
    return new


@triton.jit
def _dot(offset, w, taps, k: tl.constexpr):
    for i in tl.static_range(k):
        offset += w[i] * taps[i]
    return offset


@triton.jit
def _forward(
    x, weight, bias, window, ids, y, x_row, x_token, l, channels, run,
    k: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(1) * run, tl.program_id(2).to(tl.int64)
    own = tl.minimum(run, l - start)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < channels
    x += row * x_row + start.to(tl.int64) * x_token + c
    y += (row * l + start) * channels + c
    if window is not None:
        window += row * (k - 1) * channels + c
    if ids is not None:
        ids += row * l + start
    w, offset = _parameters(weight, bias, c, here, k)
    past = _before(x, x_token, window, channels, here, start, k)
    coming = _group(x, x_token, here, own, ROWS)
    for t in range(0, own, ROWS):
        group = coming
        coming = _group(x + ROWS * x_token, x_token, here, own - t - ROWS, ROWS)
        plain = (t >= k - 1) & (t + ROWS <= own)
        if ids is not None:
            if plain:
                plain = _one_document(ids, ROWS, k)
        if plain:
            for j in tl.static_range(ROWS):
                past += (group[j].to(tl.float32),)
                v = _dot(offset, w, past, k)
                tl.store(y + j * channels, v * _sigmoid(v), mask=here)
                past = past[1:]
        else:
            for j in range(tl.minimum(ROWS, own - t)):
                past += (tl.load(x + j * x_token, mask=here, other=0).to(tl.float32),)
                taps = past
                if ids is not None:
                    taps = _seen(past, ids + j, start + t + j, k)
                v = _dot(offset, w, taps, k)
                tl.store(y + j * channels, v * _sigmoid(v), mask=here)
                past = past[1:]
        x += ROWS * x_token
        y += ROWS * channels
        if ids is not None:
            ids += ROWS


@triton.jit
def _gradient(dy, v):
    s = _sigmoid(v)
    return dy.to(tl.float32) * (s * (1 + v * (1 - s)))


@triton.jit
def _backward(
    x, dy, weight, bias, window, ids, dx, dwindow, sums, x_row, x_token, dy_row, dy_token, dx_row, dx_token,
    l, channels, run, k: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(1) * run, tl.program_id(2).to(tl.int64)
    own = tl.minimum(run, l - start)
    end = tl.minimum(run + k - 1, l - start)  # beyond the row dy reads 0, and all that follows from it is 0
    first = start.to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < channels
    x += row * x_row + first * x_token + c
    dy += row * dy_row + first * dy_token + c
    dx += row * dx_row + (first + 1 - k) * dx_token + c  # step t finishes row t - k + 1
    if window is not None:
        window += row * (k - 1) * channels + c
    if dwindow is not None:
        dwindow += row * (k - 1) * channels + c
    if ids is not None:
        ids += row * l + start
    w, offset = _parameters(weight, bias, c, here, k)
    past = _before(x, x_token, window, channels, here, start, k)
    nothing = tl.zeros([BLOCK], tl.float32)
    dbias, dw = nothing, (nothing,) * k
    due = (nothing,) * (k - 1)  # unfinished rows of dx
    coming, coming_dy = _group(x, x_token, here, end, ROWS), _group(dy, dy_token, here, end, ROWS)
    for t in range(0, own + k - 1, ROWS):
        group, group_dy = coming, coming_dy
        coming = _group(x + ROWS * x_token, x_token, here, end - t - ROWS, ROWS)
        coming_dy = _group(dy + ROWS * dy_token, dy_token, here, end - t - ROWS, ROWS)
        plain = (t >= k - 1) & (t + ROWS <= own)
        if ids is not None:
            if plain:
                plain = _one_document(ids, ROWS, k)
        if plain:
            for j in tl.static_range(ROWS):
                past += (group[j].to(tl.float32),)
                d = _gradient(group_dy[j], _dot(offset, w, past, k))
                dbias += d
                dw = _add_products(dw, (d,) * k, past, k)
                due = _add_products(due + (nothing,), (d,) * k, w, k)
                tl.store(dx + j * dx_token, due[0], mask=here)
                past, due = past[1:], due[1:]
        else:
            for j in range(tl.minimum(ROWS, own + k - 1 - t)):
                inside = here & (t + j < end)
                past += (tl.load(x + j * x_token, mask=inside, other=0).to(tl.float32),)
                taps = past
                if ids is not None:
                    taps = _seen(past, ids + tl.minimum(j, end - 1 - t), start + t + j, k)
                d = _gradient(tl.load(dy + j * dy_token, mask=inside, other=0), _dot(offset, w, taps, k))
                back = (d,) * k
                if ids is not None:
                    back = _seen(back, ids + tl.minimum(j, end - 1 - t), start + t + j, k)
                mine = tl.where(t + j < own, d, 0.0)
                dbias += mine
                dw = _add_products(dw, (mine,) * k, taps, k)
                due = _add_products(due + (nothing,), back, w, k)
                to = t + j - (k - 1)
                tl.store(dx + j * dx_token, due[0], mask=here & (to >= 0) & (to < own))
                if dwindow is not None:
                    tl.store(dwindow + (t + j) * channels, due[0], mask=here & (to < 0) & (start == 0))
                past, due = past[1:], due[1:]
        x += ROWS * x_token
        dy += ROWS * dy_token
        dx += ROWS * dx_token
        if ids is not None:
            ids += ROWS
    sums += (row * tl.num_programs(1) + tl.program_id(1)) * (k + 1) * channels + c
    for i in tl.static_range(k):
        tl.store(sums + i * channels, dw[i], mask=here)
    tl.store(sums + k * channels, dbias, mask=here)


@functools.lru_cache
def run_length(b, l, strips, slots):
    """Tokens a program walks in the backward, when `slots` programs run at once. The card works in waves of that many
    programs; a program costs its tokens and some 16 more to begin. Short runs balance the last wave, long runs begin
    less often."""

    def cost(n):  # n runs in a row
        return -(-b * strips * n // slots) * (l / n + 16)

    n = min(range(1, max(l // 64, 1) + 1), key=cost)
    return -(-l // (n * ROWS)) * ROWS


def _plan(x, k, run=None):
    """Grid, run, strip and launch options, for 4 neighbouring channels a thread.

    Both kernels then need up to 128 registers a thread (some 165 in the float32 backward), and a multiprocessor has
    65,536: 16 warps (12) at once, each with a group of loads on its way, 16 KB or more. More channels a thread would
    spill or leave fewer warps; fewer would spend more instructions on addresses."""
    b, l, channels = x.shape
    block = min(512, triton.next_power_of_2(channels))
    warps = max(block // 128, 1)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    strips = triton.cdiv(channels, block)
    run = run or run_length(b, l, strips, multiprocessors * (16 if x.itemsize == 2 else 12) // warps)
    run = max(run, triton.cdiv(k - 1, ROWS) * ROWS)  # so that the k-1 rows before a run are of one other run
    return (strips, triton.cdiv(l, run), b), run, dict(k=k, ROWS=ROWS, BLOCK=block, num_warps=warps, num_stages=1)


def forward(x, weight, bias, window, ids):
    """y (b, l, channels). x needs a last stride of 1; the others contiguous, weight (channels, 1, k)."""
    (b, l, channels), k = x.shape, weight.shape[-1]
    y = torch.empty(b, l, channels, dtype=x.dtype, device=x.device)
    grid, run, options = _plan(x, k, RUN)
    with torch.cuda.device_of(x):
        _forward[grid](x, weight, bias, window, ids, y, *x.stride()[:2], l, channels, run, **options)
    return y


def backward(dy, x, weight, bias, window, ids, dx=None):
    """dx, dwindow (None without a window) and the sums (k+1, channels) in float32: k rows of dweight, one of dbias.

    dx may be given, with any strides but a last one of 1: then it is written into."""
    (b, l, channels), k = x.shape, weight.shape[-1]
    dx = torch.empty(b, l, channels, dtype=x.dtype, device=x.device) if dx is None else dx
    dwindow = None if window is None else torch.empty_like(window)
    grid, run, options = _plan(x, k)  # long runs: every one of them writes k+1 rows of sums
    sums = torch.empty(b * grid[1], k + 1, channels, dtype=torch.float32, device=x.device)
    strides = *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2]
    _backward[grid](x, dy, weight, bias, window, ids, dx, dwindow, sums, *strides, l, channels, run, **options)
    return dx, dwindow, sums.sum(0)


class _ConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, window, ids):
        ctx.save_for_backward(x, weight, bias, window, ids)
        return forward(x, weight, bias, window, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, window, ids = ctx.saved_tensors
        dx, dwindow, sums = backward(_dense(dy), x, weight, bias, window, ids)
        dweight = sums[:-1].t().unsqueeze(1).to(weight.dtype, memory_format=torch.contiguous_format)
        return dx, dweight, None if bias is None else sums[-1].to(bias.dtype), dwindow, None


def _dense(t):
    return t if t.stride(-1) == 1 else t.contiguous()


def causal_conv1d(x, weight, bias, window=None, seq_idx=None):
    """Arguments and results as in `mamba2.causal_conv1d`, for bfloat16, float16 and float32.

    The new window may be a view of x."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"x is {x.dtype}, and this kernel computes in float32: use mamba2.causal_conv1d, or x in bfloat16, "
            "float16 or float32"
        )
    window = None if window is None else window.to(x.dtype).contiguous()
    ids = None if seq_idx is None else seq_idx.contiguous()
    y = _ConvSiLU.apply(_dense(x), weight.contiguous(), None if bias is None else bias.contiguous(), window, ids)
    return y, last_inputs(x, window, ids, weight.shape[-1])


def last_inputs(x, window, ids, k):
    """The next window (b, k-1, channels): the last k-1 inputs, zeros for those of another document than the last."""
    b, l, channels = x.shape
    last = x[:, max(l - k + 1, 0) :]
    if l < k - 1:
        before = x.new_zeros(b, k - 1 - l, channels) if window is None else window[:, l:]
        last = torch.cat([before, x], dim=1)
    if ids is not None:
        positions = torch.arange(l - k + 1, l, device=x.device).clamp_min(0)
        last = last * (ids[:, positions] == ids[:, -1:]).unsqueeze(-1)
    return last
