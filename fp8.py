"""FP8: the matrix products of training with eight-bit operands.

Why. A tensor core multiplies eight-bit numbers twice as fast as sixteen-bit ones, and they are half the bytes to move.
The report's base model was pretrained this way from the first token to the last. This file does it on any device,
rounding for rounding: operands become codes of eight bits and scales, and only `product` makes numbers of them again.

What eight bits hold. E4M3 is a sign, 4 bits of exponent (bias 7) and 3 of mantissa: 253 different numbers. The largest
is 1.75 * 2^8 = 448, there is no infinity, the smallest normal one is 2^-6, and below it steps of 2^-9 go down to zero.
Neighbours are an eighth to a sixteenth of their size apart, so rounding moves a number by at most a sixteenth, and a
matrix of random ones by 2.6 %. The scale hardly matters for that: these are floating-point numbers. It matters for the
range: of numbers that share a scale, those below 1/28,672 of the largest lose digits, and 1/458,752 of it is zero.

Hence the tiles. A tensor's largest number may be an outlier that sends all others to zero. So a scale is shared by few
numbers: 128 x 128 of a weight, 1 x 128 of an activation or a gradient, and an outlier costs its own tile only. The
rule (`multipliers`): the largest number of a tile becomes 448 or, with a power of two, something in (224, 448].
Powers of two move no digits. Their rounding costs 2.65 % instead of 2.57 %, but what they scale is exact in bfloat16.

Which way a tile lies. A product sums over one dimension, and a scale can be taken out of a part of the sum only if the
whole part shares it: tiles lie along the dimension that is summed over. A linear layer Y = X W^T has three products,
with X (t, k), W (n, k) and G = dY (t, n):

    fprop   Y  = X W^T     sums over k     X    1 x 128 along k       W    128 x 128
    dgrad   dX = G W       sums over n     G    1 x 128 along n       W^T  the same 128 x 128, turned around
    wgrad   dW = G^T X     sums over t     G^T  1 x 128 along t       X^T  1 x 128 along t

So X and G are cut into tiles twice, in either direction, and each time from the numbers themselves: the first copy has
lost whatever stood beside an outlier (and, if scales are no powers of two, would be rounded again everywhere). A square
block can be turned around, so the weight is rounded once. dW is float32 like the master weight it is for, and the
optimizer never sees eight bits.

What stays as it was: embedding, head, norms, convolution, scan, attention's own products, and the first and last four
matmuls of the stack (`convert_`). In eval mode a layer is the plain nn.Linear that the saved folder holds: FP8 is how
training multiplies, not what the model is.

Why by hand, and what the libraries do better. Transformer Engine and torchao quantise in fused kernels and multiply on
tensor cores: that is what eight bits are for. Here every rounding can be looked at, on a laptop, and every choice can
be swapped for another. Slower than bfloat16 it is, in exchange. Not emulated is the order of the sums: Hopper adds 128
products with fewer digits than float32 has, and only then goes on in float32. On Hopper a `Recipe` with impl "real" has
`kernels/fp8.py` make the same codes and the tensor cores multiply them.

Source: the report on pretraining (E4M3 for all tensors, these blocks and tiles, the eight matmuls left out), after
DeepSeek-V3 (arXiv 2412.19437). The report does not say which scales; the rule with powers of two, the rounding and the
saturation are those of Transformer Engine's Float8BlockScaling. This file must not know models.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

BLOCK = 128
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TILES = {  # rows and columns that share a scale, of an activation or gradient and of a weight; None: all there are
    "block": ((1, BLOCK), (BLOCK, BLOCK)),
    "row": ((1, None), (1, None)),
    "tensor": ((None, None), (None, None)),
}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Numbers to codes and back
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """A matrix as codes and scales: number = code * scale of its tile.

    codes (rows, columns) float8, filled up with zeros to whole tiles; scale (tiles down, tiles across) float32; tile:
    rows and columns that share a scale; shape: rows and columns without filling; power_of_two: all scales are.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    tile: tuple
    shape: tuple
    power_of_two: bool

    def t(self):
        """The transposed matrix, a view: nothing is rounded."""
        return replace(self, codes=self.codes.t(), scale=self.scale.t(), tile=self.tile[::-1], shape=self.shape[::-1])

    def numbers(self, dtype=torch.float32):
        """(rows, columns) in `dtype`, without filling. bfloat16 is exact if the scales are powers of two."""
        (rows, columns), (down, across), (r, c) = self.shape, self.scale.shape, self.tile
        values = _values(self.codes, dtype).view(down, r, across, c) * self.scale.to(dtype)[:, None, :, None]
        return values.view(self.codes.shape)[:rows, :columns]


def multipliers(amax, largest, input_largest, power_of_two=True):
    """What the numbers of a tile are multiplied with: largest / amax, rounded down to a power of two on demand.

    amax float32, the largest magnitude of each tile. Where it is zero, infinite or NaN: 1. A quotient that float32
    cannot hold becomes `input_largest`, the largest number of the dtype that is quantised.
    """
    m = (torch.full_like(amax, largest) / amax).clamp_max(input_largest)  # number / tensor would round twice
    if power_of_two:
        m = (m.view(torch.int32) & -0x800000).view(torch.float32)  # keep sign and exponent, drop the mantissa
    return torch.where((amax > 0) & (amax < torch.inf), m, 1.0)


def quantise(x, tile, form="e4m3", power_of_two=True):
    """Matrix x (rows, columns), of any float dtype, as Quantised in tiles of `tile` = (rows, columns; None for all).

    Rounds to the nearest code, ties to the even one, and saturates: numbers beyond the largest, infinities included,
    become the largest. NaN stays NaN. form: "e4m3" or "e5m2".
    """
    (rows, columns), largest = x.shape, torch.finfo(FORMATS[form]).max
    r, c = tile[0] or max(rows, 1), tile[1] or max(columns, 1)
    down, across = -(-rows // r), -(-columns // c)
    v = F.pad(x.float(), (0, across * c - columns, 0, down * r - rows)).contiguous().view(down, r, across, c)
    m = multipliers(v.abs().amax((1, 3), keepdim=True), largest, torch.finfo(x.dtype).max, power_of_two)
    codes = (v * m).clamp_(-largest, largest).to(FORMATS[form]).view(down * r, across * c)
    return Quantised(codes, m.reciprocal().view(down, across), (r, c), (rows, columns), power_of_two)


def _values(codes, dtype):
    """codes.to(dtype). On a CPU by a table of all 256 codes, which is five times as fast."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(dtype)
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view_as(codes)


def product(a, b, dtype):
    """a b^T of two Quantised, a (m, k) and b (n, k): (m, n) in `dtype`, summed in float32.

    Both operands lie as a tensor core wants them, with tiles along the last dimension: `kernels.fp8.product` takes this
    function's place where there is one.
    """
    narrow = a.power_of_two and b.power_of_two  # then bfloat16 holds every number
    with torch.autocast(a.codes.device.type, enabled=False):
        if narrow and dtype == torch.bfloat16:
            return a.numbers(dtype) @ b.numbers(dtype).t()
        if narrow and dtype == torch.float32 and a.codes.is_cuda:
            return torch.mm(a.numbers(torch.bfloat16), b.numbers(torch.bfloat16).t(), out_dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return (a.numbers(wide) @ b.numbers(wide).t()).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The three products of a linear layer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How operands are quantised; the defaults are the report's. Bad values raise ValueError.

    scaling: "block", or to compare, one scale a "row" or a "tensor". power_of_two False: scales of any float32.
    gradients: "e4m3", or "e5m2", two bits of mantissa and five of exponent (TE's "hybrid"). impl: "emulate", on any
    device, or "real", by the tensor cores of Hopper, for blocks and gradients in e4m3 only.
    """

    scaling: str = "block"
    power_of_two: bool = True
    gradients: str = "e4m3"
    impl: str = "emulate"

    def __post_init__(self):
        for name, choices in (("scaling", TILES), ("gradients", FORMATS), ("impl", ("emulate", "real"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.impl == "real" and self.scaling != "block":
            raise ValueError(
                f"impl 'real' multiplies blocks only: use scaling 'block', or impl 'emulate' for {self.scaling!r}"
            )
        if self.impl == "real" and self.gradients != "e4m3":
            raise ValueError(
                f"impl 'real' takes gradients in 'e4m3': PyTorch multiplies no {self.gradients} in blocks; use impl "
                "'emulate' for them"
            )

    def activation(self, x):
        """(x, x^T), Quantised, each from the numbers themselves with tiles along its rows."""
        return self._both(x, 0, "e4m3")

    def gradient(self, g):
        """(g, g^T), as `activation`."""
        return self._both(g, 0, self.gradients)

    def weight(self, w):
        """(w, w^T), Quantised. Square tiles are rounded once and turned; rows are cut anew, along the other side."""
        return self._both(w, 1, "e4m3")

    def _both(self, x, kind, form):
        tile = TILES[self.scaling][kind]
        if self.impl == "real":
            from kernels import fp8 as kernels

            return kernels.both(x, tile, form, self.power_of_two)
        one = quantise(x, tile, form, self.power_of_two)
        turned = one.t() if tile[0] == tile[1] else quantise(x.t(), tile, form, self.power_of_two)
        return one, turned

    def product(self, a, b, dtype):
        if self.impl == "real":
            from kernels import fp8 as kernels

            return kernels.product(a, b, dtype)
        return product(a, b, dtype)


class _Linear(torch.autograd.Function):
    """x (t, k), weight (n, k) -> (t, n) in x's dtype. Kept for the backward: codes only, of x^T and of the weight."""

    @staticmethod
    def forward(ctx, x, weight, recipe):
        (x_codes, x_turned), (w, w_turned) = recipe.activation(x), recipe.weight(weight)
        kept = x_turned, w_turned
        ctx.save_for_backward(*(t for q in kept for t in (q.codes, q.scale)))
        ctx.kept = [(q.tile, q.shape, q.power_of_two) for q in kept]
        ctx.recipe, ctx.dtypes = recipe, (x.dtype, torch.promote_types(weight.dtype, torch.float32))
        return recipe.product(x_codes, w, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        recipe, dx, dweight = ctx.recipe, None, None
        g, g_turned = recipe.gradient(grad)
        if ctx.needs_input_grad[0]:
            dx = recipe.product(g, Quantised(w_codes, w_scale, *ctx.kept[1]), ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dweight = recipe.product(g_turned, Quantised(x_codes, x_scale, *ctx.kept[0]), ctx.dtypes[1])
        return dx, dweight, None


_by_kernels = torch.compiler.disable(_Linear.apply)  # launches are not for the compiler: it goes on behind them


class Fp8Linear(nn.Linear):
    """An nn.Linear whose three products take FP8 operands while it trains; parameters and names are nn.Linear's.

    Under autocast x is rounded to autocast's dtype first, as in nn.Linear; the weight goes from its master copy to
    eight bits in one rounding. float16 raises ValueError: what overflows is saturated, and the loss scaler, which
    waits for infinities, would not see it.
    """

    recipe = Recipe()

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        if x.dtype == torch.float16:
            raise ValueError("FP8 hides float16's overflows from the loss scaler: use bfloat16 or float32 with FP8")
        apply = _by_kernels if self.recipe.impl == "real" else _Linear.apply
        y = apply(x.reshape(-1, x.shape[-1]), self.weight, self.recipe)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.recipe}"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Which layers
# ---------------------------------------------------------------------------------------------------------------------


def convert_(stack, recipe=None, first=4, last=4):
    """Let the nn.Linears of `stack` train in FP8, except the `first` and the `last` ones. Returns how many do.

    stack: the module that holds the layers, in their order, and neither embedding nor head. In place: modules and
    parameters stay the same objects under the same names, so optimizer and state dict notice nothing. A second call
    starts from plain layers again. ValueError if no layer is left to convert.
    """
    recipe = recipe or Recipe()
    linears = [module for module in stack.modules() if type(module) in (nn.Linear, Fp8Linear)]
    if min(first, last) < 0 or first + last >= len(linears):
        raise ValueError(
            f"the stack has {len(linears)} matmuls; without the first {first} and the last {last} none is left for "
            "FP8: use a deeper model, or lower first and last"
        )
    for i, module in enumerate(linears):
        inside = first <= i < len(linears) - last
        module.__class__ = Fp8Linear if inside else nn.Linear
        module.__dict__.pop("recipe", None)
        if inside:
            module.recipe = recipe
    return len(linears) - first - last


def padded(size):
    """`size` rounded up to whole blocks of 128: as many codes are kept, and multiplied by a tensor core."""
    return size + -size % BLOCK


def describe(stack):
    """Lines for the start-up report: how many layers multiply in which precision, and what is filled up with zeros."""
    linears = [(name, m) for name, m in stack.named_modules() if isinstance(m, nn.Linear)]
    inside = [(name, m) for name, m in linears if isinstance(m, Fp8Linear)]
    if not inside:
        return f"FP8 off: {len(linears)} matmuls as the dtype says"
    share = sum(m.weight.numel() for _, m in inside) / sum(m.weight.numel() for _, m in linears)
    recipe, rest = inside[0][1].recipe, len(linears) - len(inside)
    scales = "powers of two" if recipe.power_of_two else "any float32"
    lines = [
        f"{len(inside)} of {len(linears)} matmuls ({share:.0%} of the weights) in E4M3, gradients in "
        f"{recipe.gradients.upper()}; a scale for each {recipe.scaling}, {scales}; the other {rest} as the dtype says; "
        "master weights and their gradients float32"
    ]
    ragged = Counter()
    for name, m in inside if recipe.scaling == "block" else ():
        for side, size in (("in", m.in_features), ("out", m.out_features)):
            if size % BLOCK:
                ragged[name.rpartition(".")[2], side, size] += 1
    if ragged:
        sizes = [(m.in_features, m.out_features) for _, m in inside]
        more = sum(padded(i) * padded(o) for i, o in sizes) / sum(i * o for i, o in sizes) - 1
        told = ", ".join(f"{n} {side} {size} -> {padded(size)} ({k}x)" for (n, side, size), k in ragged.items())
        lines.append(f"filled up with zeros to multiples of {BLOCK}: {told}; {more:.0%} more codes")
    return "\n".join(lines)
