"""FP8 on Hopper: a kernel for codes and scales, and their product on the tensor cores.

`fp8.py` says what is computed, in plain PyTorch: quantising there is half a dozen passes over a matrix. Here it is one.
A program holds a tile of the matrix, and everything that the rule needs is in that tile: the largest magnitude, the
multiplier, the codes. It is read once and written once, a byte a number. The same bits as `fp8.quantise`, on any card.

- Tiles are 1 x 128, or 128 x 128 for a weight. A product wants both operands with the summed dimension last, so each
  matrix is needed both ways, and `both` makes the two copies of one reading: a square block is the same block when it
  is turned, so a weight is rounded once and written twice; rows are cut anew, with scales along the other axis.
- Powers of two need no division. With amax = f * 2^e, 448 / amax is 1.75 / f * 2^(8-e): rounded down, 2^(8-e), or half
  of it where f is above 1.75; all of it sums of exponents. Other scales divide (`div_rn`, the nearest float32).
- The card converts to eight bits in one instruction. Where there is none, and for weights (`_native` says why),
  rounding is integer arithmetic. The bits of a float32 are a number that grows with it: adding half of what will be cut
  off, less one when the last digit that stays is even, rounds to the nearest, ties to even, and carries into the
  exponent by itself. Below the smallest normal code, steps are all equal: adding 2^23 of them to the magnitude leaves
  float32 no digits for anything finer, and the sum's last digits are the code.

The product is cuBLAS's, through `torch.nn.functional.scaled_mm`. It wants A by rows and B by columns, which is both
with the summed dimension last, and scales in an order of its own: of 1 x 128 tiles those of neighbouring rows are
neighbours in memory, of blocks those along the summed dimension, filled up to a multiple of four. It needs compute
capability 9.0 and CUDA 12.9 (`device.choose_fp8`). Neighbouring operations are not fused with the kernel, and under
torch.compile a graph ends at every layer.

Source: the scale layouts are those of NVIDIA's cuBLAS documentation (1D 128-element and 2D 128x128 block scaling).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fp8 import BLOCK, FORMATS, TILES, Quantised

MANTISSA = {"e4m3": 3, "e5m2": 2}
ALIGNED = 16  # cuBLAS wants matrices whose sides are multiples of 16 bytes
ROWS, SQUARE = TILES["block"]  # (1, 128) and (128, 128)


@triton.jit
def _scales(amax, largest, input_largest, MANTISSA: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(multipliers, their reciprocals) of tiles, as `fp8.multipliers`. amax: the bits of the largest magnitudes."""
    scaled = (amax > 0) & (amax < 0x7F800000)  # below the bits of infinity, and so of NaN
    if POWER_OF_TWO:
        # largest / amax = 2^(top - e) * (1.75 / f) for amax = f * 2^e: a half of the power if f > 1.75
        TOP: tl.constexpr = 262 if MANTISSA == 3 else 269  # 448 is 1.75 * 2^8, 57,344 is 1.75 * 2^15; e has 127 added
        m = tl.minimum(TOP - (amax >> 23) - ((amax & 0x7FFFFF) > 0x600000).to(tl.int32), 254)
        m = tl.where(scaled, m, 127)
        decode = tl.where(m < 254, (254 - m) << 23, 0x400000)  # 2^-127 is no normal number
        return (m << 23).to(tl.float32, bitcast=True), decode.to(tl.float32, bitcast=True)
    size = tl.where(scaled, amax, 0x3F800000).to(tl.float32, bitcast=True)
    m = tl.minimum(tl.div_rn(tl.zeros_like(size) + largest, size), input_largest)
    m = tl.where(scaled, m, 1.0)
    return m, tl.div_rn(tl.zeros_like(m) + 1.0, m)


@triton.jit
def _code(v, largest, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """Float32 to codes, as bytes. NATIVE: by the instruction for it."""
    if NATIVE:
        if MANTISSA == 3:
            return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return v.to(tl.float8e5).to(tl.uint8, bitcast=True)
    SHIFT: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(v), largest)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    STEPS: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA + 23)  # 2^23 of the smallest code
    small = (size + STEPS).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    code = tl.where(v == v, code, 0x7F) | ((v.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def _quantise(
    x, codes, turned, scale, turned_scale, rows, columns, filled, turned_filled, x_row, x_column, pitch, turned_pitch,
    scale_row, scale_column, turned_scale_row, turned_scale_column, largest, input_largest,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, POWER_OF_TWO: tl.constexpr, SQUARE: tl.constexpr,
    TURNED: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, COLUMNS): one scale for all of it if SQUARE, else one for each row. TURNED: the transposed tile as
    well, with the same codes if SQUARE, else with one scale for each column. Rows up to `filled`, and of the transposed
    one up to `turned_filled`, exist in the output."""
    tile_row, tile_column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # offsets may pass 2^31
    r = tile_row * ROWS + tl.arange(0, ROWS)
    c = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    v = tl.load(x + r[:, None] * x_row + c[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
    size = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # magnitudes compare as their bits do; NaN is beyond infinity

    amax = tl.max(size, 1)  # (ROWS,)
    if SQUARE:
        m, decode = _scales(tl.max(amax, 0), largest, input_largest, MANTISSA, POWER_OF_TWO)
        code = _code(v * m, largest, MANTISSA, BIAS, NATIVE)
    else:
        m, decode = _scales(amax, largest, input_largest, MANTISSA, POWER_OF_TWO)
        code = _code(v * m[:, None], largest, MANTISSA, BIAS, NATIVE)
    there = (r < filled)[:, None] & (c >= 0)[None, :]  # (ROWS, COLUMNS)
    tl.store(codes + r[:, None] * pitch + c[None, :], code, mask=there)
    if SQUARE:
        tl.store(scale + tile_row * scale_row + tile_column * scale_column, decode)
    else:
        tl.store(scale + r * scale_row + tile_column * scale_column, decode, mask=r < filled)

    if TURNED:
        if not SQUARE:
            m, decode = _scales(tl.max(size, 0), largest, input_largest, MANTISSA, POWER_OF_TWO)  # (COLUMNS,)
            code = _code(v * m[None, :], largest, MANTISSA, BIAS, NATIVE)
            place = turned_scale + c * turned_scale_row + tile_row * turned_scale_column
            tl.store(place, decode, mask=c < turned_filled)
        there = (c < turned_filled)[:, None] & (r >= 0)[None, :]  # (COLUMNS, ROWS)
        tl.store(turned + c[:, None] * turned_pitch + r[None, :], tl.trans(code), mask=there)


def _native(device, square):
    """Whether the card's own conversion to eight bits is taken: a third less time for 1 x 128 tiles. Not for square
    ones: what Triton 3.6 makes of it writes wrong codes into the turned copy of a float32 matrix (an H200, found by
    `test_large_matrices_have_the_same_codes`), and a weight's bytes take longer than its arithmetic anyway."""
    return not square and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _empty(rows, columns, tile, device):
    """Room for the codes and scales of a matrix: rows up to a multiple of 16 (128 in square blocks), whole tiles."""
    align = BLOCK if tile == SQUARE else ALIGNED
    filled, across = rows + -rows % align, -(-columns // BLOCK)
    codes = torch.empty(filled, across * BLOCK, dtype=torch.uint8, device=device)
    if tile == SQUARE:
        return codes, torch.empty(filled // BLOCK, across, dtype=torch.float32, device=device)
    return codes, torch.empty(across, filled, dtype=torch.float32, device=device).t()  # the outer dimension first


def _run(x, tile, form, power_of_two, both):
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16) or tile not in (ROWS, SQUARE):
        raise ValueError(
            f"the FP8 kernel takes a matrix in float32 or bfloat16 and tiles {ROWS} or {SQUARE}; got "
            f"{tuple(x.shape)} in {x.dtype}, {tile}"
        )
    (rows, columns), square, dtype = x.shape, tile == SQUARE, FORMATS[form]
    codes, scale = _empty(rows, columns, tile, x.device)
    turned, turned_scale = _empty(columns, rows, tile, x.device) if both else (codes, scale)
    height = BLOCK if both or square else 32
    if codes.numel():
        with torch.cuda.device_of(x):
            _quantise[(-(-codes.shape[0] // height), codes.shape[1] // BLOCK)](
                x, codes, turned, scale, turned_scale, rows, columns, codes.shape[0], turned.shape[0], *x.stride(),
                codes.stride(0), turned.stride(0), *scale.stride(), *turned_scale.stride(), torch.finfo(dtype).max,
                torch.finfo(x.dtype).max, MANTISSA=MANTISSA[form], BIAS=2 ** (6 - MANTISSA[form]) - 1,
                POWER_OF_TWO=power_of_two, SQUARE=square, TURNED=both, NATIVE=_native(x.device, square), ROWS=height,
                COLUMNS=BLOCK, num_warps=8 if height == BLOCK else 4,
            )  # fmt: skip
    one = Quantised(codes.view(dtype), scale, tile, (rows, columns), power_of_two)
    if not both:
        return one
    turned_scale = scale.t() if square else turned_scale
    return one, Quantised(turned.view(dtype), turned_scale, tile, (columns, rows), power_of_two)


def quantise(x, tile, form="e4m3", power_of_two=True):
    """`fp8.quantise` in one pass, to the bit, for tiles (1, 128) and (128, 128); of any strides.

    x (rows, columns) float32 or bfloat16, else ValueError. Rows of 1 x 128 tiles are filled up with zeros to a multiple
    of 16 (their scale is 1), and scales lie in memory as the product wants them.
    """
    return _run(x, tile, form, power_of_two, both=False)


def both(x, tile, form="e4m3", power_of_two=True):
    """(x, x^T), each cut into tiles along its rows, of one reading of x. Blocks of 128 x 128 have the same codes and
    scales in both; tiles of 1 x 128 have scales of their own, made from the numbers themselves."""
    return _run(x, tile, form, power_of_two, both=True)


def scales_for_cublas(q):
    """Scales of a Quantised in the order of `scaled_mm`: of 1 x 128 tiles (rows, tiles), rows the neighbours in memory;
    of blocks (tiles across, filled up to a multiple of 4; tiles down), those across the neighbours."""
    if q.tile == ROWS:
        return q.scale.t().contiguous().t()
    return F.pad(q.scale, (0, -q.scale.shape[1] % 4)).contiguous().t()


def product(a, b, dtype):
    """a b^T of two Quantised, a (m, k) and b (n, k), codes as this file makes them: (m, n) in `dtype`, bfloat16 or
    float32, by the tensor cores. At most one of the two in square blocks. Differs from `fp8.product` in the order of
    the sums."""
    kinds = {ROWS: F.ScalingType.BlockWise1x128, SQUARE: F.ScalingType.BlockWise128x128}
    if a.tile == b.tile == SQUARE:
        raise ValueError("a product of two matrices in 128 x 128 blocks does not exist: one must have 1 x 128 tiles")
    m, n = a.shape[0], b.shape[0]
    if not (m and n and a.shape[1]):
        return torch.zeros(m, n, dtype=dtype, device=a.codes.device)
    plain = F.SwizzleType.NO_SWIZZLE
    y = F.scaled_mm(
        a.codes, b.codes.t(), scales_for_cublas(a), kinds[a.tile], scales_for_cublas(b), kinds[b.tile], plain, plain,
        output_dtype=dtype,
    )  # fmt: skip
    return y[:m, :n].contiguous()
