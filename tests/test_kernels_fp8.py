"""FP8 by kernels: the codes of `fp8.quantise` to the bit; a product that keeps to PyTorch's contract, and on Hopper the
product itself. Without Hopper the product is replaced by one that loops over blocks of codes."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import ours

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -r requirements-test.txt")

import device
import fp8
from fp8 import Fp8Linear, Recipe
from kernels import fp8 as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE, SQUARE = (1, 128), (128, 128)
K1, K2 = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128


def raw(codes):
    return codes.contiguous().view(torch.uint8).cpu()


def wide(rows, columns, dtype=torch.float32, seed=0):
    """Every exponent that E4M3 has, and more."""
    torch.manual_seed(seed)
    return (torch.randn(rows, columns) * torch.exp(4 * torch.randn(rows, columns))).to(dtype).to(DEVICE)


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same(x, tile, form="e4m3", power_of_two=True):
    """Whether kernel and plain PyTorch agree, filling included; the plain one is made on the CPU."""
    want, got = fp8.quantise(x.cpu(), tile, form, power_of_two), kernels.quantise(x, tile, form, power_of_two)
    r, c = want.codes.shape
    assert (got.tile, got.shape, got.power_of_two) == (want.tile, want.shape, want.power_of_two)
    assert got.codes.dtype == want.codes.dtype and got.codes.shape[1] == c and got.codes.shape[0] % 16 == 0
    assert torch.equal(raw(got.codes)[:r], raw(want.codes)) and not raw(got.codes)[r:].any()
    down = want.scale.shape[0]
    assert torch.equal(got.scale[:down].cpu(), want.scale) and (got.scale[down:] == 1).all()
    a, b = got.numbers().cpu(), want.numbers()
    assert torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))


# ----------------------------------------------------------------------------------------------------------------------
# Codes and scales


@pytest.mark.parametrize("tile", [TILE, SQUARE])
@pytest.mark.parametrize("form", fp8.FORMATS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_codes_of_plain_pytorch(tile, form, power_of_two, dtype):
    for rows, columns in [(1, 1), (1, 127), (3, 128), (5, 129), (129, 130), (40, 300)]:
        x = wide(rows, columns, dtype)
        same(x, tile, form, power_of_two)
        same(x.t(), tile, form, power_of_two)
    same(wide(20, 900, dtype)[::2, 3::3], tile, form, power_of_two)


@pytest.mark.parametrize("form", fp8.FORMATS)
def test_every_code_every_midpoint_and_their_neighbours(form):
    codes = torch.arange(128, dtype=torch.uint8).view(fp8.FORMATS[form]).float().numpy()
    steps = codes[np.isfinite(codes)]
    points = np.concatenate([steps, (steps[1:] + steps[:-1]) / 2])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(1e9))])
    points = points[points <= steps[-1]]
    rows = torch.from_numpy(np.concatenate([points, -points])).float()
    rows = F.pad(rows, (0, -len(rows) % 127)).view(-1, 127)
    x = torch.cat([torch.full((len(rows), 1), float(steps[-1])), rows], 1).to(DEVICE)  # so that nothing is scaled
    assert (kernels.quantise(x, TILE, form).scale == 1).all()
    same(x, TILE, form)


def test_zero_infinite_missing_and_extreme_numbers():
    x = wide(12, 256).cpu()
    x[0, :128], x[1, 5], x[2, 7], x[3, 9] = 0, float("inf"), float("nan"), float("-inf")
    x[4], x[5], x[6] = x[4] * 1e-44, x[5].sign() * 1e-45, x[6].sign() * 3.4e38
    x[7], x[8], x[9] = -0.0, 448 * 2.0**-9, torch.nextafter(torch.tensor(448 * 2.0**5), torch.tensor(1e9))
    x[10] = float("nan")
    for form in fp8.FORMATS:
        for power_of_two in (True, False):
            for tile in (TILE, SQUARE):
                same(x.to(DEVICE), tile, form, power_of_two)
                same(x[4:10].to(DEVICE), tile, form, power_of_two)


def test_a_weight_is_rounded_once_and_written_twice():
    for dtype in (torch.float32, torch.bfloat16):
        w = wide(130, 300, dtype)
        one, turned = kernels.both(w, SQUARE)
        assert one.codes.shape == (256, 384) and turned.codes.shape == (384, 256)
        assert one.codes.is_contiguous() and turned.codes.is_contiguous()
        assert torch.equal(raw(one.codes.t()), raw(turned.codes)) and torch.equal(one.scale.t(), turned.scale)
        assert torch.equal(one.numbers().cpu(), fp8.quantise(w.cpu(), SQUARE).numbers())
        assert torch.equal(turned.numbers(), one.numbers().t()) and turned.shape == (300, 130)


def test_one_reading_makes_both_copies():
    for rows, columns in [(1, 1), (17, 300), (129, 130)]:
        x = wide(rows, columns)
        x[0, :1] = float("nan")
        x[-1, -1] = float("inf")
        for got, view in zip(kernels.both(x, TILE, "e5m2", False), (x, x.t())):
            want = kernels.quantise(view, TILE, "e5m2", False)
            assert torch.equal(raw(got.codes), raw(want.codes)) and torch.equal(got.scale, want.scale)
            assert got.shape == want.shape and got.scale.stride() == want.scale.stride() and got.tile == TILE


def test_nothing_at_all():
    for shape in ((0, 130), (130, 0)):
        for tile in (TILE, SQUARE):
            same(torch.zeros(shape, device=DEVICE), tile)


# ----------------------------------------------------------------------------------------------------------------------
# The product's contract


def stand_in(a, b, scale_a, kind_a, scale_b, kind_b, swizzle_a, swizzle_b, output_dtype):
    """In the place of `scaled_mm`: PyTorch's own checks of shapes and strides, then a loop over blocks of codes with
    scales read in the documented order."""
    there = F.scaled_mm(
        *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (a, b)),
        torch.empty_strided(scale_a.shape, scale_a.stride(), device="meta"), kind_a,
        torch.empty_strided(scale_b.shape, scale_b.stride(), device="meta"), kind_b,
        swizzle_a, swizzle_b, output_dtype=output_dtype,
    )  # fmt: skip
    assert (kind_a, kind_b) != (K2, K2) and swizzle_a == swizzle_b == F.SwizzleType.NO_SWIZZLE
    (m, k), n = a.shape, b.shape[1]
    assert a.stride() == (k, 1) and b.stride() == (1, k) and m % 16 == n % 16 == k % 128 == 0
    total = torch.zeros(m, n, dtype=torch.float64)
    for j in range(k // 128):
        factor = []
        for scale, kind, size in ((scale_a, kind_a, m), (scale_b, kind_b, n)):
            if kind == K1:
                assert scale.shape == (size, k // 128) and scale.stride(0) == 1
                factor.append(scale[:, j])
            else:
                assert scale.shape == (-(-k // 512) * 4, size // 128) and scale.stride(0) == 1
                factor.append(scale[j].repeat_interleave(128))
        part = slice(128 * j, 128 * j + 128)
        block = a[:, part].float().double() @ b[part].float().double()
        total += block * factor[0].double()[:, None] * factor[1].double()
    assert there.shape == total.shape and there.dtype == output_dtype
    return total.to(output_dtype)


def layer(k, n, recipe, where="cpu"):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=True)
    linear.__class__, linear.recipe = Fp8Linear, recipe
    return linear.to(where)


def three(linear, x, g):
    x = x.clone().requires_grad_()
    linear.zero_grad(set_to_none=True)
    y = linear(x)
    y.backward(g.to(y.dtype))
    return y.detach(), x.grad, linear.weight.grad.clone()


@pytest.mark.parametrize("t, k, n", [(1, 1, 1), (100, 130, 300), (128, 128, 640), (17, 600, 15), (3, 513, 1296)])
@pytest.mark.parametrize("options", [{}, {"power_of_two": False}])
@pytest.mark.skipif(DEVICE == "cuda", reason="the product itself is tested where it runs")
def test_three_products_by_kernels_equal_the_emulated_ones(t, k, n, options, monkeypatch):
    monkeypatch.setattr(kernels.F, "scaled_mm", mocked := Mock(F.scaled_mm))
    torch.manual_seed(1)
    x, g = torch.randn(2, t, k) * torch.exp(2 * torch.randn(2, t, 1)), torch.randn(2, t, n)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3)):
        mocked.dtypes.clear()
        want, got = (three(layer(k, n, Recipe(impl=impl, **options)), x.to(dtype), g) for impl in ("emulate", "real"))
        assert mocked.dtypes == [dtype, dtype, torch.float32]  # y, dx, dw: the master weight's gradient is wide
        for name, a, b in zip(("y", "dx", "dw"), got, want):
            assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), name
            assert error(a, b) < (1e-6 if name == "dw" else limit), name


@pytest.mark.skipif(DEVICE == "cuda", reason="the product itself is tested where it runs")
def test_a_model_trains_alike_by_kernels(monkeypatch):
    monkeypatch.setattr(kernels.F, "scaled_mm", Mock(F.scaled_mm))
    torch.manual_seed(0)
    ids, grads = torch.randint(0, 263, (2, 20)), []
    for impl in ("emulate", "real"):
        model = ours(hybrid_override_pattern="M-M*-M-").train()
        assert fp8.convert_(model.backbone.layers, Recipe(impl=impl)) > 0
        with torch.autocast("cpu", torch.bfloat16):
            model(ids).float().log_softmax(-1)[..., 0].mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        assert error(grads[1][name], grads[0][name]) < 0.03, name  # a last digit that differs can change a code


class Mock:
    """Calls `stand_in`, whose own call of scaled_mm reaches the real one, and notes the dtypes."""

    def __init__(self, real):
        self.real, self.dtypes = real, []

    def __call__(self, *args, output_dtype, **given):
        if args[0].is_meta:
            return self.real(*args, output_dtype=output_dtype, **given)
        self.dtypes.append(output_dtype)
        return stand_in(*args, output_dtype=output_dtype, **given)


def test_the_checks_of_pytorch_see_a_wrong_order_of_scales():
    """So that passing them means something."""
    a, b = kernels.quantise(wide(32, 256), TILE), kernels.quantise(wide(48, 256), SQUARE)
    meta = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    good = kernels.scales_for_cublas(a), kernels.scales_for_cublas(b)
    assert good[0].shape == (32, 2) and good[0].stride() == (1, 32)
    assert good[1].shape == (4, 1) and good[1].stride() == (1, 4) and (good[1][2:] == 0).all()
    for bad in ((good[0].contiguous(), good[1]), (good[0], good[1][:2])):
        with pytest.raises(RuntimeError, match="blockwise scaling"):
            F.scaled_mm(meta(a.codes), meta(b.codes.t()), meta(bad[0]), K1, meta(bad[1]), K2)


def test_no_tokens():
    linear = layer(130, 70, Recipe(impl="real"), DEVICE)
    y, dx, dw = three(linear, torch.zeros(0, 130, device=DEVICE), torch.zeros(0, 70, device=DEVICE))
    assert y.shape == (0, 70) and dx.shape == (0, 130) and not dw.any()


def test_bad_input():
    with pytest.raises(ValueError, match="impl 'fast' is not one of emulate, real"):
        Recipe(impl="fast")
    with pytest.raises(ValueError, match="multiplies blocks only: use scaling 'block', or impl 'emulate' for 'row'"):
        Recipe("row", impl="real")
    with pytest.raises(ValueError, match="impl 'real' takes gradients in 'e4m3': PyTorch multiplies no e5m2 in blocks"):
        Recipe(gradients="e5m2", impl="real")
    for x, tile in ((torch.zeros(2, 3, 4), TILE), (torch.zeros(2, 3).half(), TILE), (torch.zeros(2, 3), (1, None))):
        with pytest.raises(ValueError, match="takes a matrix in float32 or bfloat16 and tiles"):
            kernels.quantise(x, tile)
    w = kernels.quantise(torch.zeros(2, 3, device=DEVICE), SQUARE)
    with pytest.raises(ValueError, match="one must have 1 x 128 tiles"):
        kernels.product(w, w, torch.float32)


def test_which_fp8_and_why(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert device.choose_fp8("off", cpu, torch.float16)[0] == "off"
    assert device.choose_fp8("emulate", cpu, torch.float32)[0] == "emulate"

    def refused(where, words):
        with pytest.raises(ValueError, match=f"--fp8 real cannot be had: .*{words}.*use --fp8 emulate"):
            device.choose_fp8("real", where, torch.bfloat16)

    refused(cpu, "needs a GPU")
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, answer=capability: answer)
        refused(gpu, f"this card has {capability[0]}.{capability[1]}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H100")
    for version in (None, "12.8"):
        monkeypatch.setattr(torch.version, "cuda", version)
        refused(gpu, "CUDA 12.9 or newer")
    for version in ("12.9", "13.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        choice, reason = device.choose_fp8("real", gpu, torch.bfloat16)
        assert choice == "real" and "NVIDIA H100" in reason and version in reason
    for wish in ("emulate", "real"):
        with pytest.raises(ValueError, match=f"--fp8 {wish} and float16 do not go together"):
            device.choose_fp8(wish, gpu, torch.float16)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    refused(gpu, "triton is not installed")
    monkeypatch.delattr(F, "scaled_mm")
    refused(gpu, "torch.nn.functional.scaled_mm")


# ----------------------------------------------------------------------------------------------------------------------
# On Hopper


@pytest.fixture
def hopper():
    try:
        device.choose_fp8("real", torch.device("cuda", 0), torch.bfloat16)
    except ValueError as why:
        pytest.skip(str(why))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(300, 200), (4096, 5120)])
def test_large_matrices_have_the_same_codes(rows, columns, dtype):
    """Alone and both ways, as compiled for this card: the interpreter has no compiler that could err."""
    x = wide(rows, columns, dtype)
    for tile in (TILE, SQUARE):
        pair = kernels.both(x, tile)
        for view, two in zip((x, x.t()), pair):
            want = fp8.quantise(view, tile)
            for got in (two, kernels.quantise(view, tile)):
                r, c = want.codes.shape
                assert torch.equal(raw(got.codes)[:r, :c], raw(want.codes)) and not raw(got.codes)[r:].any()
                assert torch.equal(got.scale[: want.scale.shape[0]], want.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("t, k, n", [(256, 512, 768), (100, 130, 300), (1000, 5120, 22656), (17, 600, 15), (1, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"power_of_two": False}])
def test_the_tensor_cores_and_the_emulation_agree_to_the_order_of_sums(t, k, n, options, hopper):
    torch.manual_seed(1)
    x, g = torch.randn(t, k, device="cuda"), torch.randn(t, n, device="cuda")
    for dtype in (torch.bfloat16, torch.float32):
        want, got = (
            three(layer(k, n, Recipe(impl=impl, **options), "cuda"), x.to(dtype), g) for impl in ("emulate", "real")
        )
        for name, a, b in zip(("y", "dx", "dw"), got, want):
            assert a.shape == b.shape and a.dtype == b.dtype, name
            assert error(a, b) < 1e-2, name


@pytest.mark.gpu
def test_a_compiled_layer_goes_on_behind_the_launches(hopper):
    x, g = torch.randn(256, 512, device="cuda"), torch.randn(256, 384, device="cuda")
    linear = layer(512, 384, Recipe(impl="real"), "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        want = three(linear, x, g)
        linear.compile(dynamic=False)
        got = three(linear, x, g)
    for a, b in zip(got, want):
        assert error(a, b) < 1e-2
