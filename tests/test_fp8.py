"""FP8: against an enumeration of all codes, against loops over blocks, and against the errors that theory expects."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn as nn
from reference import ours

import fp8
import train
from fp8 import Fp8Linear, Quantised, Recipe, convert_, describe, padded, product, quantise
from model import build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, ROW, TENSOR = (1, 128), (1, None), (None, None)
BITS = {"e4m3": (4, 7, 448.0), "e5m2": (5, 15, 57344.0)}  # bits of exponent, bias, largest finite


# ----------------------------------------------------------------------------------------------------------------------
# The oracle: what a code means, from its bits, and which code is nearest, by comparing


def decode(code, form):
    exponent_bits, bias, _ = BITS[form]
    mantissa_bits = 7 - exponent_bits
    sign, rest = -1.0 if code & 0x80 else 1.0, code & 0x7F
    exponent, mantissa = rest >> mantissa_bits, rest & (2**mantissa_bits - 1)
    if form == "e4m3" and rest == 0x7F:
        return math.nan
    if form == "e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def ladder(form):
    """The finite codes from zero up, in order: code i has the i-th value."""
    values = [decode(code, form) for code in range(128)]
    return np.array([v for v in values if math.isfinite(v)])


def nearest(values, form):
    """float64 array -> codes (uint8): to the nearest, ties to the even code, beyond the largest to the largest."""
    steps = ladder(form)
    size = np.minimum(np.abs(values), steps[-1])
    low = np.clip(np.searchsorted(steps, size, side="right") - 1, 0, len(steps) - 2)
    middle = (steps[low] + steps[low + 1]) / 2
    up = (size > middle) | ((size == middle) & (low % 2 == 1))
    codes = (low + up + 128 * np.signbit(values)).astype(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), codes)


def scale_up(amax, form="e4m3", power_of_two=True, input_largest=torch.finfo(torch.float32).max):
    """What a tile is multiplied with, as a Python number."""
    if not 0 < amax < math.inf:
        return 1.0
    with np.errstate(over="ignore"):
        m = float(min(np.float32(BITS[form][2]) / np.float32(amax), np.float32(input_largest)))
    return 2.0 ** (math.frexp(m)[1] - 1) if power_of_two else m


def naive(x, tile, form="e4m3", power_of_two=True):
    """(codes, what the codes stand for, what each number was multiplied with), three arrays of x's shape."""
    x = np.asarray(x.detach().float(), np.float32)
    (r, c), m = (tile[0] or x.shape[0], tile[1] or x.shape[1]), np.zeros(x.shape, np.float32)
    for i in range(0, x.shape[0], r):
        for j in range(0, x.shape[1], c):
            m[i : i + r, j : j + c] = scale_up(np.abs(x[i : i + r, j : j + c]).max(), form, power_of_two)
    codes = nearest((x * m).astype(np.float64), form)
    return codes, np.array([decode(code, form) for code in range(256)])[codes], m.astype(np.float64)


def naive_product(a, b, a_tile, b_tile, a_form="e4m3"):
    """a b^T, a loop over blocks of the summed dimension: the sum inside a block is of codes, then come the scales."""
    (_, a, a_m), (_, b, b_m) = naive(a, a_tile, a_form), naive(b, b_tile)
    total = np.zeros((a.shape[0], b.shape[0]))
    for j in range(0, a.shape[1], 128):
        block = slice(j, j + 128)
        total += (a[:, block] @ b[:, block].T) / a_m[:, j, None] / b_m[:, j]
    return torch.from_numpy(total)


def rounded(x, tile, form="e4m3", power_of_two=True):
    return quantise(x, tile, form, power_of_two).numbers()


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def raw(codes):
    return codes.contiguous().view(torch.uint8).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# What eight bits hold


@pytest.mark.parametrize("form", BITS)
def test_the_256_codes(form):
    values = torch.arange(256, dtype=torch.uint8).view(fp8.FORMATS[form])
    expected = torch.tensor([decode(code, form) for code in range(256)])
    assert torch.equal(values.float().nan_to_num(1e9), expected.nan_to_num(1e9))
    assert torch.equal(fp8._values(values, torch.float32).nan_to_num(1e9), expected.nan_to_num(1e9))
    assert ladder(form)[-1] == BITS[form][2] == torch.finfo(fp8.FORMATS[form]).max


def test_the_figures_of_e4m3():
    steps = ladder("e4m3")
    assert 2 * len(steps) - 1 == 253  # both signs, one zero
    assert steps[-1] == 448 == 1.75 * 2**8 and steps[8] == 2**-6 and set(np.diff(steps[:9])) == {2**-9}
    apart = np.diff(steps[8:]) / steps[8:-1]
    assert apart.max() == 1 / 8 and apart.min() > 1 / 16
    assert 448 / steps[8] == 28_672 and 448 / (steps[1] / 2) == 458_752


@pytest.mark.parametrize("form", BITS)
def test_rounding_at_every_code_and_every_midpoint(form):
    """And one float32 to either side of it. The largest number is among them, so nothing is scaled."""
    steps = ladder(form).astype(np.float32)
    middles = (steps[1:] + steps[:-1]) / 2
    points = np.concatenate([steps, middles])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))])
    points = np.concatenate([points, -points])
    points = points[np.abs(points) <= steps[-1]]
    q = quantise(torch.from_numpy(points)[None], ROW, form)
    assert q.scale.tolist() == [[1.0]]
    assert np.array_equal(raw(q.codes)[0], nearest(points.astype(np.float64), form))


def test_scales():
    """Powers of 448 and their neighbours, numbers at the ends of float32, and what has no scale."""
    exact = [448 * 2.0**k for k in (-120, -8, -1, 0, 1, 9)]
    amax = exact + [np.nextafter(np.float32(v), np.float32(s)) for v in exact for s in (0, np.inf)]
    amax += [0.0, math.inf, math.nan, 1e-45, 1e-38, 1.3e-36, 3.4e38, 1.0, 0.3, 223.9, 224.0, 225.0]
    amax = torch.tensor(amax, dtype=torch.float32)
    for largest in (torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max):
        for form in BITS:
            for power_of_two in (True, False):
                m = fp8.multipliers(amax, BITS[form][2], largest, power_of_two)
                expected = [scale_up(a, form, power_of_two, largest) for a in amax.tolist()]
                assert m.tolist() == expected
    m = fp8.multipliers(amax, 448.0, torch.finfo(torch.float32).max)
    brought_to = (amax * m)[(amax > 1e-35) & (amax < math.inf)]
    assert (brought_to > 224).all() and (brought_to <= 448.00003).all()  # one float32 above 448 rounds to 448


SHAPES = [(1, 1), (1, 127), (3, 128), (5, 129), (129, 130), (128, 256), (2, 15680)]


@pytest.mark.parametrize("tile", [BLOCK, (128, 128), ROW, TENSOR])
@pytest.mark.parametrize("form", BITS)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantise_equals_the_loop_over_tiles(tile, form, power_of_two):
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns) * torch.exp(4 * torch.randn(rows, columns))  # every exponent that E4M3 has
        q = quantise(x, tile, form, power_of_two)
        codes, values, m = naive(x, tile, form, power_of_two)
        assert np.array_equal(raw(q.codes)[:rows, :columns], codes), (rows, columns)
        tolerance = 0 if power_of_two else 2e-7  # 1 / multiplier is rounded
        np.testing.assert_allclose(q.numbers().numpy(), values / m, rtol=tolerance, atol=0)
        assert not raw(q.codes)[rows:].any() and not raw(q.codes)[:, columns:].any()  # filling
        again = rounded(q.numbers(), tile, form, power_of_two)
        if power_of_two:
            assert torch.equal(again, q.numbers())  # numbers that codes hold lose nothing


def test_bit_equal_to_the_cast():
    """Under the rule, PyTorch's own cast to float8_e4m3fn gives the same numbers."""
    torch.manual_seed(1)
    x = 3 * torch.randn(256, 384)
    down = 2.0 ** torch.floor(torch.log2(448 / x.view(2, 128, 3, 128).abs().amax((1, 3)).double()))
    down = down.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(rounded(x, (128, 128)), (x * down).to(torch.float8_e4m3fn).float() / down)


def test_powers_of_two_fit_bfloat16():
    """So a product in bfloat16 is rounded once, at the end. Other scales are multiplied in float32 for that."""
    torch.manual_seed(0)
    x, w = 1e-3 * torch.randn(64, 256), torch.randn(32, 256)
    q = quantise(x, BLOCK)
    assert torch.equal(q.numbers(torch.bfloat16).float(), q.numbers())
    for power_of_two in (True, False):
        a, b = quantise(x, BLOCK, power_of_two=power_of_two), quantise(w, (128, 128), power_of_two=power_of_two)
        once = (a.numbers().double() @ b.numbers().double().t()).bfloat16()
        assert error(product(a, b, torch.bfloat16), once) < 1e-4  # operands rounded as well: 2e-3


def test_zero_infinite_and_missing_numbers():
    x = torch.randn(4, 256)
    x[0, :128], x[1, 5], x[2, 7], x[3, 9] = 0, math.inf, math.nan, -math.inf
    q = quantise(x, BLOCK)
    assert q.scale[:, 0].tolist() == [1.0] * 4 and (q.scale[:, 1] < 0.1).all()
    y = q.numbers()
    assert (y[0, :128] == 0).all() and y[1, 5] == 448 and y[3, 9] == -448  # infinities saturate
    assert y[2, 7].isnan() and y.isnan().sum() == 1  # NaN stays, and stays alone
    untouched = x[:, 128:]
    assert torch.equal(y[:, 128:], rounded(untouched, BLOCK))
    assert torch.equal(rounded(torch.zeros(3, 5), (128, 128)), torch.zeros(3, 5))
    assert raw(quantise(torch.tensor([[-0.0, 1.0]]), BLOCK).codes)[0, 0] == 0x80
    assert rounded(torch.tensor([[math.inf, -math.inf, 1.0]]), BLOCK, "e5m2").tolist() == [[57344, -57344, 1]]


# ----------------------------------------------------------------------------------------------------------------------
# Errors that are known beforehand


def test_errors_of_normal_numbers():
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    for tile in (BLOCK, (128, 128), ROW, TENSOR):
        assert error(rounded(x, tile), x) == pytest.approx(0.0265, abs=1e-4)  # a Gaussian cannot tell them apart
    assert error(rounded(x, BLOCK, power_of_two=False), x) == pytest.approx(0.0257, abs=1e-4)
    assert error(rounded(x, BLOCK, "e5m2", False), x) == pytest.approx(0.0512, abs=2e-4)
    assert error(rounded(x, BLOCK, "e5m2"), x) == pytest.approx(0.0528, abs=2e-4)


@pytest.mark.parametrize(
    "size, tensor_error, tile_error", [(1e4, (0.04, 0.08), (0.025, 0.028)), (1e5, (0.35, 0.6), (0.03, 0.06))]
)
def test_outliers_cost_a_tensor_and_not_a_tile(size, tensor_error, tile_error):
    """Two columns of 4096 are large; the error is of the other columns."""
    torch.manual_seed(0)
    x = torch.randn(256, 4096)
    x[:, (100, 3000)] *= size
    rest = [j for j in range(4096) if j not in (100, 3000)]
    for power_of_two in (True, False):
        worst = error(rounded(x, TENSOR, power_of_two=power_of_two)[:, rest], x[:, rest])
        best = error(rounded(x, BLOCK, power_of_two=power_of_two)[:, rest], x[:, rest])
        assert tensor_error[0] < worst < tensor_error[1] and tile_error[0] < best < tile_error[1]


def test_gradients_of_many_sizes_need_tiles_or_more_exponent():
    """Rows whose sizes are spread like a log-normal with sigma 4, from 1e-5 to 1e5."""
    torch.manual_seed(0)
    places = (torch.arange(256) + 0.5) / 256
    g = torch.randn(256, 512) * torch.exp(4 * torch.special.ndtri(places))[:, None]

    def of_rows(tile, form):
        y = rounded(g, tile, form)
        return ((y - g).norm(dim=1) / g.norm(dim=1)).median().item(), (y == 0).all(1).float().mean().item()

    median, lost = of_rows(TENSOR, "e4m3")
    assert median > 0.3 and lost > 0.25
    median, lost = of_rows(TENSOR, "e5m2")
    assert median == pytest.approx(0.053, abs=0.001) and lost < 0.02
    assert of_rows(BLOCK, "e4m3") == (pytest.approx(0.0265, abs=3e-4), 0)


# ----------------------------------------------------------------------------------------------------------------------
# The three products


def layer(k, n, recipe=None, bias=False, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    linear.__class__, linear.recipe = Fp8Linear, recipe or Recipe()
    return linear


def three(linear, x, g):
    """y, dx, dw."""
    x = x.clone().requires_grad_()
    linear.zero_grad(set_to_none=True)
    y = linear(x)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, linear.weight.grad.clone()


UGLY = [(1, 127, 129), (127, 129, 1), (129, 1, 128), (200, 257, 130), (3, 15680, 2), (3, 2, 15680), (128, 128, 128)]


@pytest.mark.parametrize("gradients", BITS)
@pytest.mark.parametrize("t, k, n", UGLY)
def test_the_three_products_equal_the_loops_over_blocks(t, k, n, gradients):
    linear = layer(k, n, Recipe(gradients=gradients))
    x, g = torch.randn(t, k) * torch.exp(2 * torch.randn(t, 1)), torch.randn(t, n) * torch.exp(2 * torch.randn(t, 1))
    weight = linear.weight.detach()
    expected = (
        naive_product(x, weight, BLOCK, (128, 128)),
        naive_product(g, weight.t(), BLOCK, (128, 128), gradients),
        naive_product(g.t(), x.t(), BLOCK, BLOCK, gradients),
    )
    for name, got, want in zip(("y", "dx", "dw"), three(linear, x, g), expected):
        assert error(got, want) < 2e-6, name


@pytest.mark.parametrize(
    "recipe, errors",
    [
        (Recipe(), (0.0375, 0.0375, 0.0375)),
        (Recipe("row"), (0.0375, 0.0375, 0.0375)),
        (Recipe("tensor"), (0.0375, 0.0375, 0.0375)),
        (Recipe(power_of_two=False), (0.0368, 0.0368, 0.0363)),
        (Recipe(gradients="e5m2"), (0.0375, 0.0591, 0.0591)),
        (Recipe(power_of_two=False, gradients="e5m2"), (0.0368, 0.0575, 0.0573)),
    ],
)
def test_errors_against_float64(recipe, errors):
    """Two operands' errors add up like lengths at right angles: sqrt(2) * 2.65 % is 3.75 %."""
    linear = layer(512, 384, recipe)
    with torch.no_grad():
        linear.weight.normal_()
    x, g, weight = torch.randn(512, 512), torch.randn(512, 384), linear.weight.detach().double()
    expected = x.double() @ weight.t(), g.double() @ weight, g.double().t() @ x.double()
    for name, got, want, size in zip(("y", "dx", "dw"), three(linear, x, g), expected, errors):
        assert error(got, want) == pytest.approx(size, abs=8e-4), name
    one = quantise(x, BLOCK).numbers().double() @ weight.t()  # a single rounded operand
    assert error(one, expected[0]) == pytest.approx(0.0265, abs=5e-4)


def test_the_weight_is_rounded_once_for_two_products():
    """An identity in the place of X, then of G, shows the weight that each product sees."""
    linear, one = layer(200, 200), torch.eye(200)
    with torch.no_grad():
        linear.weight[3, 7] = 1e4  # its block loses small numbers, and so must both products
    weight = linear.weight.detach()
    w, turned = linear.recipe.weight(weight)
    assert turned.codes.data_ptr() == w.codes.data_ptr() and turned.shape == (200, 200)
    y, dx, _ = three(linear, one, one)
    assert torch.equal(y.t(), dx) and torch.equal(dx, rounded(weight, (128, 128)))
    assert not torch.equal(dx, rounded(weight.t(), BLOCK).t())
    linear.recipe = Recipe("row")  # rows cannot be turned
    y, dx, _ = three(linear, one, one)
    assert torch.equal(y.t(), rounded(weight, ROW)) and torch.equal(dx, rounded(weight.t(), ROW).t())
    assert not torch.equal(y.t(), dx)


@pytest.mark.parametrize("scaling", ["block", "row"])
def test_nothing_is_rounded_twice(scaling):
    """One column of X, or G, is huge. Tiles along the columns keep the others out of its way, so dW sees all of them;
    a copy cut along the rows has lost its neighbours, and cutting that copy again brings nothing back."""
    tile, one = fp8.TILES[scaling][0], torch.eye(200)
    x, linear = torch.randn(200, 200), layer(200, 200, Recipe(scaling))
    x[:, 60] *= 1e7
    along_rows, along_columns = rounded(x, tile), rounded(x.t(), tile).t()
    twice = rounded(along_rows.t(), tile).t()
    of_columns = lambda y: (y - x).norm(dim=0) / x.norm(dim=0)
    _, _, dw = three(linear, x, one)
    assert torch.equal(dw, along_columns) and of_columns(dw).max() < 0.04
    assert of_columns(twice)[:60].min() > 0.9  # what a wgrad from fprop's copy would see
    _, dx, dw = three(linear, one, x)
    assert torch.equal(dw, along_columns.t())
    weight = linear.recipe.weight(linear.weight.detach())[1].numbers().t()
    assert error(dx, along_rows.double() @ weight.double()) < 1e-6


def test_rounding_twice_costs_digits_only_without_powers_of_two():
    """A power of two keeps the mantissa: what has been rounded once is still a code. Other scales round anew."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1024)
    for power_of_two, once, again in ((True, 0.0265, 0.0265), (False, 0.0257, 0.0363)):
        first = rounded(x, BLOCK, power_of_two=power_of_two)
        assert error(first, x) == pytest.approx(once, abs=2e-4)
        assert error(rounded(first.t(), BLOCK, power_of_two=power_of_two).t(), x) == pytest.approx(again, abs=2e-4)


def test_the_weights_gradient_is_float32():
    """Also from bfloat16: summed in float32, stored in float32, added up in float32."""
    linear, x, g = layer(160, 96), torch.randn(300, 160).bfloat16(), torch.randn(300, 96).bfloat16()
    y, dx, dw = three(linear, x, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert error(dw, naive_product(g.t(), x.t(), BLOCK, BLOCK)) < 1e-6  # bfloat16 would be off by 2e-3
    (linear(x) * g).sum().backward()
    assert torch.equal(linear.weight.grad, 2 * dw)


def test_autocast_rounds_the_input_and_not_the_weight():
    linear, x, g = layer(160, 96, bias=True), torch.randn(2, 150, 160), torch.randn(2, 150, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dw = three(linear, x, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    x16, g16, weight = x.flatten(0, 1).bfloat16(), g.flatten(0, 1).bfloat16(), linear.weight.detach()
    want = naive_product(x16, weight, BLOCK, (128, 128)).bfloat16() + linear.bias.bfloat16()
    torch.testing.assert_close(y.flatten(0, 1), want.bfloat16(), rtol=8e-3, atol=8e-3)
    exact = naive_product(g16, weight.t(), BLOCK, (128, 128))
    from_bfloat16 = naive_product(g16, weight.bfloat16().t(), BLOCK, (128, 128))
    assert error(dx.flatten(0, 1), exact) < 2.5e-3 < error(from_bfloat16, exact)  # 2e-3: the output is bfloat16
    assert error(dw, naive_product(g16.t(), x16.t(), BLOCK, BLOCK)) < 1e-6
    torch.testing.assert_close(linear.bias.grad, g16.float().sum(0), rtol=1e-2, atol=1e-1)


def test_only_what_is_asked_for():
    linear, x = layer(130, 70), torch.randn(3, 130)
    with torch.no_grad():
        y = linear(x)
    assert not y.requires_grad and torch.equal(y, linear(x))
    linear(x).sum().backward()  # the first layer's input needs no gradient
    linear.weight.requires_grad_(False)
    x.requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    dx = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    assert linear(x[0]).shape == (70,) and linear(x[:0]).shape == (0, 70)
    y, dx, dw = three(layer(130, 70), torch.zeros(0, 130), torch.zeros(0, 70))
    assert dx.shape == (0, 130) and torch.equal(dw, torch.zeros(70, 130))


def test_a_token_knows_only_itself():
    """A scale for the whole tensor is also a message from the future: a later token changes earlier outputs."""
    x = torch.randn(1, 40, 256)
    louder = x.clone()
    louder[:, -1] *= 1e6
    for scaling, same in (("block", True), ("row", True), ("tensor", False)):
        linear = layer(256, 64, Recipe(scaling))
        assert torch.equal(linear(x)[:, :-1], linear(louder)[:, :-1]) == same


def test_bad_input():
    with pytest.raises(ValueError, match="float16's overflows"):
        layer(8, 8)(torch.zeros(1, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="scaling 'blocks' is not one of block, row, tensor"):
        Recipe("blocks")
    with pytest.raises(ValueError, match="gradients 'e3m4' is not one of e4m3, e5m2"):
        Recipe(gradients="e3m4")


# ----------------------------------------------------------------------------------------------------------------------
# In the model


def names(stack):
    return [name for name, m in stack.named_modules() if type(m) is Fp8Linear]


def test_the_first_and_last_four_stay():
    with torch.device("meta"):
        stack = build("nano-12b", device="meta").backbone.layers
    assert convert_(stack) == 128
    plain = [name for name, m in stack.named_modules() if type(m) is nn.Linear]
    assert plain == [
        "0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.up_proj", "1.mixer.down_proj",
        "60.mixer.in_proj", "60.mixer.out_proj", "61.mixer.up_proj", "61.mixer.down_proj",
    ]  # fmt: skip
    assert {name.rpartition(".")[2] for name in names(stack)} == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_conversion_keeps_every_name_and_every_parameter():
    model = ours(mlp_bias=True)
    before, ids = {k: id(v) for k, v in model.named_parameters()}, torch.randint(0, 263, (2, 9))
    keys, logits = list(model.state_dict()), model.eval()(ids)
    assert convert_(model.backbone.layers, Recipe("row")) == len(names(model)) == 8
    assert {k: id(v) for k, v in model.named_parameters()} == before and list(model.state_dict()) == keys
    assert torch.equal(model.eval()(ids), logits)  # outside training: the layers that are saved
    assert 1e-3 < error(model.train()(ids), logits) < 0.1
    assert type(model.lm_head) is nn.Linear
    assert convert_(model.backbone.layers, first=0, last=15) == 1  # from the start, with another recipe
    assert names(model.backbone.layers) == ["0.mixer.in_proj"]
    assert model.backbone.layers[0].mixer.in_proj.recipe == Recipe()
    with pytest.raises(ValueError, match="the stack has 16 matmuls; without the first 8 and the last 8 none is left"):
        convert_(model.backbone.layers, first=8, last=8)


def test_describe_and_padding():
    assert [padded(n) for n in (1, 127, 128, 129, 15680)] == [128, 128, 128, 256, 15744]
    stack = build("nano-9b", device="meta").backbone.layers
    assert describe(stack) == "FP8 off: 120 matmuls as the dtype says"
    convert_(stack)
    text = describe(stack)
    assert text.startswith("112 of 120 matmuls (93% of the weights) in E4M3, gradients in E4M3; a scale for each block")
    assert "up_proj out 15680 -> 15744 (23x), down_proj in 15680 -> 15744 (23x); 0% more codes" in text
    convert_(stack, Recipe("tensor", power_of_two=False, gradients="e5m2"))
    assert "gradients in E5M2; a scale for each tensor, any float32; the other 8" in describe(stack)
    assert "\n" not in describe(stack)  # one scale for all: nothing is filled up
    small = build("nano-12m", device="meta").backbone.layers
    convert_(small)
    more = sum(padded(m.in_features) * padded(m.out_features) for m in small.modules() if type(m) is Fp8Linear)
    more /= sum(m.weight.numel() for m in small.modules() if type(m) is Fp8Linear)
    assert describe(small).endswith(f"{more - 1:.0%} more codes") and "in_proj out 1296 -> 1408 (8x)" in describe(small)


def packed(rows=4, length=48):
    """One batch as the loader makes it: ids, documents, kinds."""
    torch.manual_seed(3)
    doc = (torch.rand(rows, length) < 0.1).long().cumsum(1)
    return torch.randint(0, 263, (rows, length)), doc, torch.ones(rows, length, dtype=torch.uint8)


def trained(fp8_on, autocast, accumulate=1, steps=12):
    """Losses of a few steps of train.py's train_step on one batch, and the model."""
    model = ours().train()
    if fp8_on:
        convert_(model.backbone.layers)
    config = train.TrainConfig(accumulate=accumulate)
    optimizer = train.make_optimizer(model, 3e-3, 0.1)
    objective, scaler = train.Objective(model, torch.ones(263)), torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for _ in range(steps):
        sums, norm = train.train_step(objective, optimizer, scaler, packed(), config, autocast, 1)
        losses.append((sums[0] / sums[2]).item())
        assert math.isfinite(norm)
    return losses, model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_step_under_autocast(accumulate):
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    plain, _ = trained(False, autocast, accumulate)
    eight, model = trained(True, autocast, accumulate)
    assert eight != plain and plain[-1] < 0.2 * plain[0]
    assert abs(eight[0] / plain[0] - 1) < 0.01 and abs(eight[-1] / plain[-1] - 1) < 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_both_implementations_of_the_mixer():
    pytest.importorskip("triton")
    grads = []
    for impl in ("torch", "triton"):
        model = ours(hybrid_override_pattern="M-M*-M-").to(DEVICE).train().use(impl)
        convert_(model.backbone.layers)
        ids, doc, _ = (t[:1, :9].to(DEVICE) for t in packed())
        model(ids, seq_idx=doc).log_softmax(-1)[..., 0].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        assert error(grads[1][name], grads[0][name]) < 0.02, name  # a last digit that differs can change a code


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("row", False, "e5m2")])
def test_compiled_in_one_graph(recipe):
    """No graph break, and with the operators as they are, the same bits. (Inductor may keep a float32 where the plain
    layer rounds to bfloat16 first, which changes some codes.)"""
    torch.compiler.reset()
    linear, x, g = layer(200, 130, recipe, bias=True), torch.randn(2, 70, 200), torch.randn(2, 70, 130)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with autocast:
            plain = three(linear, x, g)
            x_ = x.clone().requires_grad_()
            linear.zero_grad(set_to_none=True)
            y = compiled(x_)
            y.backward(g.to(y.dtype))
        for a, b in zip(plain, (y, x_.grad, linear.weight.grad)):
            assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("form", BITS)
def test_the_same_codes_on_a_gpu(form):
    torch.manual_seed(0)
    x = torch.randn(300, 700) * torch.exp(4 * torch.randn(300, 700))
    x[0, :128], x[1, 5], x[2, 7] = 0, math.inf, math.nan
    for tile in (BLOCK, (128, 128), TENSOR):
        for power_of_two in (True, False):
            here, there = (quantise(t, tile, form, power_of_two) for t in (x, x.cuda()))
            assert torch.equal(here.scale, there.scale.cpu())
            assert np.array_equal(raw(here.codes), raw(there.codes.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_products_on_a_gpu(autocast):
    linear, x, g = layer(700, 300), torch.randn(200, 700).bfloat16().float(), torch.randn(200, 300).bfloat16().float()
    here = three(linear, x, g)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        there = three(linear.cuda(), x.cuda(), g.cuda())
    for name, a, b in zip(("y", "dx", "dw"), here, there):
        limit = 3e-3 if autocast and name != "dw" else 2e-6
        assert error(b.cpu(), a) < limit, name


@pytest.mark.gpu
def test_a_product_of_codes_is_what_tensor_cores_make():
    """Blocks of codes and scales, multiplied by the card itself one block of 128 at a time."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 tensor cores here")
    a, b = quantise(torch.randn(256, 128).cuda(), BLOCK), quantise(torch.randn(128, 128).cuda(), (128, 128))
    one = torch.ones((), device="cuda")
    real = torch._scaled_mm(a.codes, b.codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16).float()
    assert isinstance(a, Quantised)
    assert error(real * a.scale * b.scale, product(a, b, torch.float32)) < 1e-2
