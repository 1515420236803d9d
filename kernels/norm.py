"""RMSNorm, with a residual added before or a gate applied before: three norms on a GPU, one kernel each way.

Two numbers first. At the 12B model's shape (8192 tokens of 5120 in bfloat16) a norm reads 84 MB and writes 84 MB, and
spends 4 FLOPs on each of its 42 M elements: one FLOP a byte, where the card could do ten or more. So the floor is bytes
over bandwidth, 39 us forward at 4.3 TB/s and 59 us backward (two tensors read, one written). Adding the residual makes
it four tensors each way; gating, three and five. Arithmetic is nearly free, passes over memory are all that counts.

Why the plain form is slow: each of its operations (widen, square, mean, scale, weight, narrow) is a pass of its own,
most of them over a float32 copy of the rows, and autograd keeps the wide copies for the backward pass.

The idea: a row (of the gated norm: one group of a row) fits into the registers of one program. It is read once,
reduced, scaled and written once. The plan of the kernels:

- tiles are powers of two, widths are not: a row is a tuple of a few equal pieces, unrolled when the kernel is compiled.
  5120 is 5 pieces of 1024 and leaves no thread idle; one tile of 8192 would idle three eighths of them;
- all loads are issued before the first use of any: waiting for memory once costs as much as waiting once for each. And
  before any store, because the compiler may not move a load over a store that could overwrite what it reads;
- narrow rows come several to a tile, so that a program still has enough to load;
- backward needs the inputs and 1/rms of each row (4 bytes a row), nothing else; the gate is computed again. With
  u = x, or x * SiLU(z), and r = 1/rms(u) and d = the gradient of the output u * r * w:

      du = r * (d * w) - u * r^3 * mean(d * w * u)        the mean is backward's own reduction over the row
      dw = sum over rows of d * u * r

- dw is a sum over rows. A fixed number of programs walks them, each with a sum of its own in registers; each writes it
  once and one torch sum adds them up. No atomics: two runs agree to the bit.

`model.RMSNorm` and `mamba2.GatedGroupRMSNorm` say the same and the tests hold them together. No second derivative.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

WIDEST = 16384  # channels of a row or group; above 10240 the backward kernel runs out of registers and slows down

# ---------------------------------------------------------------------------------------------------------------------
# The kernels. A row is `groups` runs of `width` channels; every run is normed by itself. Tiles are (ROWS, PIECE).
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(pointer, row, stride, rows, column, end, PIECES: tl.constexpr):
    """The pieces of ROWS rows as a tuple of tiles, with zeros outside of the tensor and of the group."""
    tiles = ()
    for i in tl.static_range(PIECES):
        c = column + i * column.shape[1]
        tiles += (tl.load(pointer + row * stride + c, mask=(row < rows) & (c < end), other=0.0),)
    return tiles


@triton.jit
def _forward(
    x, other, weight, out, stream, rstd, x_stride, other_stride, rows, eps, FIRST: tl.constexpr,
    groups: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One tile. FIRST, what comes before the norm: "none", "add" (other is the residual) or "gate" (other is z)."""
    group = tl.program_id(0) % groups  # neighbouring programs take neighbouring columns of the same rows
    row = (tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # row * stride may pass 2^31
    column, end = group * width + tl.arange(0, PIECE)[None, :], (group + 1) * width
    u = _load(x, row, x_stride, rows, column, end, PIECES)
    if FIRST != "none":
        o = _load(other, row, other_stride, rows, column, end, PIECES)
    v = ()
    squares = tl.zeros((ROWS, PIECE), tl.float32)
    for i in tl.static_range(PIECES):
        t = u[i].to(tl.float32)
        if FIRST == "add":  # rounded to the stream's dtype: the norm sees what the next block sees
            t = (t + o[i].to(tl.float32)).to(stream.dtype.element_ty).to(tl.float32)
        if FIRST == "gate":
            z = o[i].to(tl.float32)
            t *= z * tl.sigmoid(z)
        v += (t,)
        squares += t * t
    r = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / width + eps)  # (ROWS, 1)
    tl.store(rstd + row * groups + group, r, mask=row < rows)
    for i in tl.static_range(PIECES):
        c = column + i * PIECE
        mask = (row < rows) & (c < end)
        w = tl.load(weight + c, mask=c < end, other=0.0).to(tl.float32)
        tl.store(out + row * (groups * width) + c, v[i] * r * w, mask=mask)
        if FIRST == "add":
            tl.store(stream + row * (groups * width) + c, v[i], mask=mask)


@triton.jit
def _backward(
    x, z, weight, rstd, dout, dstream, dx, dother, partial, x_stride, z_stride, dout_stride, dstream_stride,
    dother_stride, rows, groups: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Every `step`-th tile. May be None: z without a gate; dstream without an addition; dother, the second gradient to
    write: with a gate that is dz, with an addition it is dx once more in another dtype."""
    group = tl.program_id(0) % groups
    first, step = tl.program_id(0) // groups, tl.num_programs(0) // groups
    column, end = group * width + tl.arange(0, PIECE)[None, :], (group + 1) * width
    dw = ()
    for _ in tl.static_range(PIECES):
        dw += (tl.zeros((ROWS, PIECE), tl.float32),)
    for tile in tl.range(first, tl.cdiv(rows, ROWS), step):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        r = tl.load(rstd + row * groups + group, mask=row < rows, other=0.0)
        d = _load(dout, row, dout_stride, rows, column, end, PIECES)
        u = _load(x, row, x_stride, rows, column, end, PIECES)
        if z is not None:
            gate = _load(z, row, z_stride, rows, column, end, PIECES)
        if dstream is not None:
            more = _load(dstream, row, dstream_stride, rows, column, end, PIECES)
        w = _load(weight, 0, 0, 1, column, end, PIECES)  # from the L1 cache, after the first time

        sums = ()
        total = tl.zeros((ROWS, PIECE), tl.float32)
        for i in tl.static_range(PIECES):
            du = d[i].to(tl.float32) * u[i].to(tl.float32)
            if z is not None:
                t = gate[i].to(tl.float32)
                du *= t * tl.sigmoid(t)
            sums += (dw[i] + du * r,)
            total += du * w[i].to(tl.float32)
        dw = sums
        k = tl.sum(total, 1, keep_dims=True) / width * r * r * r

        for i in tl.static_range(PIECES):
            c = column + i * PIECE
            mask = (row < rows) & (c < end)
            grad = d[i].to(tl.float32) * w[i].to(tl.float32) * r
            v = u[i].to(tl.float32)
            if z is not None:
                t = gate[i].to(tl.float32)
                s = tl.sigmoid(t)
                h = t * s  # SiLU(z), and its slope is s + h (1 - s)
                grad -= v * h * k
                tl.store(dother + row * dother_stride + c, grad * v * (s + h - h * s), mask=mask)
                grad *= h
            else:
                grad -= v * k
            if dstream is not None:
                grad += more[i].to(tl.float32)
            if z is None and dother is not None:
                tl.store(dother + row * dother_stride + c, grad, mask=mask)
            tl.store(dx + row * (groups * width) + c, grad, mask=mask)
    for i in tl.static_range(PIECES):
        c = column + i * PIECE
        tl.store(partial + first * (groups * width) + c, tl.sum(dw[i], 0, keep_dims=True), mask=c < end)


def _shape(width, neighbours):
    """The tile for a width: (constants of the kernel, warps). A thread takes `neighbours` channels of every piece. The
    fewest warps with at most 5 pieces: more would not fit into the registers, fewer leave too little to load."""
    warps = 1
    while width > 5 * 32 * neighbours * warps and warps < 16:
        warps *= 2
    piece = min(triton.next_power_of_2(width), 32 * neighbours * warps)
    pieces = triton.cdiv(width, piece)
    return dict(width=width, ROWS=max(1, 128 * neighbours // (piece * pieces)), PIECE=piece, PIECES=pieces), warps


def _rows(t):
    """(..., width) -> (rows, width), channels side by side, and the rows' stride: a view where strides allow one."""
    if t is None:
        return None, 0
    t = t.reshape(t.numel() // t.shape[-1], t.shape[-1])
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def forward(first, x, other, weight, groups, eps):
    """(normed, new residual or None, 1/rms (rows, groups) float32); other is None, the residual or z."""
    out = torch.empty(x.shape, dtype=(x if other is None else other).dtype, device=x.device)
    stream = torch.empty_like(out) if first == "add" else None
    (x, x_stride), (other, other_stride) = _rows(x), _rows(other)
    rows, channels = x.shape
    rstd = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    # Neighbours of 16 bytes: the widest load. At the released widths a thread takes at most 72 registers on Hopper:
    # 28 warps or more share a multiprocessor. Hence one program a tile: while some reduce, others load.
    shape, warps = _shape(channels // groups, 16 // out.element_size())
    with torch.cuda.device_of(x):
        _forward[(triton.cdiv(rows, shape["ROWS"]) * groups,)](
            x, other, weight, out, stream, rstd, x_stride, other_stride, rows, eps,
            FIRST=first, groups=groups, **shape, num_warps=warps,
        )  # fmt: skip
    return out, stream, rstd


def backward(dout, dstream, x, z, weight, rstd, groups, second=None):
    """(dx, dweight). `second` is the other gradient's tensor, filled here: with a gate, dz (of z's shape; its rows may
    be part of wider ones); with an addition, dx in another dtype if one is wanted."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors, strides = zip(*(_rows(t) for t in (x, z, dout, dstream)))
    rows, channels = tensors[0].shape
    second = None if second is None else second.view(rows, channels)
    # 16 warps of 32 threads with 128 registers each fill a multiprocessor; all its programs run at once, none waits for
    # a second round. 4 neighbours a thread (8 bytes of bfloat16; a warp's 256 still adjoin) fit a gated row into that.
    shape, warps = _shape(channels // groups, 4)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(triton.cdiv(rows, shape["ROWS"]), max(1, processors * (16 // warps) // groups))
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    x, z, dout, dstream = tensors
    with torch.cuda.device_of(x):
        _backward[(programs * groups,)](
            x, z, weight, rstd, dout, dstream, dx, second, partial, *strides, 0 if second is None else second.stride(0),
            rows, groups=groups, **shape, num_warps=warps, maxnreg=128,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, x, other, weight, groups, eps):
        ctx.set_materialize_grads(False)
        out, stream, rstd = forward(first, x, other, weight, groups, eps)
        ctx.first, ctx.groups, ctx.x_dtype = first, groups, x.dtype
        ctx.save_for_backward(x if stream is None else stream, other if first == "gate" else None, weight, rstd)
        return out if stream is None else (out, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstream=None):
        x, z, weight, rstd = ctx.saved_tensors
        if dout is None:  # at most the stream was used, and that is a plain sum
            return None, None if dstream is None else dstream.to(ctx.x_dtype), dstream, None, None, None
        second = None
        if z is not None or ctx.x_dtype != x.dtype:
            second = torch.empty(x.shape, dtype=ctx.x_dtype if z is None else z.dtype, device=x.device)
        dx, dweight = backward(dout, dstream, x, z, weight, rstd, ctx.groups, second)
        if ctx.first == "add":
            return None, dx if second is None else second, dx, dweight, None, None
        return None, dx, second, dweight, None, None


def rms_norm(x, weight, eps):
    """x / rms(x) * weight as `model.RMSNorm`: x (..., width) -> the same shape and dtype, float32 inside.

    x bfloat16, float16 or float32; weight (width,) float32 or of x's dtype: else TypeError. Width 1 to 16384: else
    ValueError. Gradients for x and weight."""
    _check(dict(x=x), weight)
    return _Norm.apply("none", x, None, weight, 1, eps)


def add_rms_norm(x, residual, weight, eps):
    """(normed, new_residual): new_residual = residual + x, normed = its RMSNorm, both in residual's dtype, which is
    float32 or x's (TypeError). The rest as in `rms_norm`; gradients for x, residual and weight."""
    _check(dict(x=x, residual=residual), weight)
    if residual.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"residual must be float32 or of x's dtype {x.dtype}, to hold the sum; got {residual.dtype}")
    return _Norm.apply("add", x, residual, weight, 1, eps)


def gated_group_rms_norm(y, z, weight, n_groups, eps):
    """y * SiLU(z), then RMSNorm over each of n_groups runs of channels: `mamba2.GatedGroupRMSNorm`. y, z (..., width)
    -> z's dtype; z may be a view of wider rows; y's dtype may differ. Group widths, weight, errors as in `rms_norm`.
    Gradients for y, z and weight."""
    _check(dict(y=y, z=z), weight, n_groups)
    return _Norm.apply("gate", y, z, weight, n_groups, eps)


def _check(tensors, weight, groups=1):
    name, last = list(tensors.items())[-1]  # its dtype is the result's
    width = last.shape[-1] if last.dim() else 0
    for other, t in tensors.items():
        if t.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{other} must be bfloat16, float16 or float32; got {t.dtype}")
        if t.shape != last.shape or t.device != weight.device:
            raise ValueError(
                f"{other} {tuple(t.shape)} on {t.device} must have {name}'s shape {tuple(last.shape)} and be on "
                f"{weight.device} as weight is"
            )
    if weight.dtype not in (torch.float32, last.dtype):
        raise TypeError(f"weight must be float32 or of {name}'s dtype {last.dtype}; got {weight.dtype}")
    if groups < 1 or width % groups or not 1 <= width // groups <= WIDEST:
        raise ValueError(f"{name}'s width {width} must be {groups} equal groups of 1 to {WIDEST} channels")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous with {width} values, one a channel; got {tuple(weight.shape)}")
