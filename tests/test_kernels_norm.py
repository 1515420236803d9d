"""The Triton norms against the plain ones of model.py and mamba2.py in float64: outputs and every gradient. Without a
GPU Triton's interpreter runs the kernels, one program after another; its bfloat16 is wrong, so that waits for a GPU."""

import math
import random

import pytest
import torch

pytest.importorskip("triton")

from kernels import norm
from mamba2 import GatedGroupRMSNorm
from model import RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, FULL = torch.float16, torch.float32
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-6}  # one rounding to nearest, and some room
KINDS = ["none", "add", "gate"]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN: an element that no kernel wrote fails its test."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*args, real=real, **options):
            t = real(*args, **options)
            return t.fill_(math.nan) if t.is_floating_point() else t

        monkeypatch.setattr(norm.torch, name, filled)


def tensor(shape, dtype, extra=0):
    """Random normal values; with `extra`, inside of longer and more rows whose other values are NaN."""
    *lead, width = shape
    rows = math.prod(lead)
    whole = torch.full((rows + 2 * bool(extra), width + extra), math.nan, device=DEVICE, dtype=dtype)
    whole = whole[1:-1] if extra else whole
    view = whole[:, extra // 2 : extra // 2 + width].view(shape)
    return view.copy_(torch.randn(shape, device=DEVICE)).requires_grad_()


def plain(kind, a, b, weight, groups, eps):
    if kind == "gate":
        return torch.func.functional_call(GatedGroupRMSNorm(a.shape[-1], groups, eps), {"weight": weight}, (a, b))
    s = a if kind == "none" else b + a
    out = torch.func.functional_call(RMSNorm(a.shape[-1], eps), {"weight": weight}, (s,))
    return out if kind == "none" else (out, s)


def twin(kind, a, b, weight, groups, eps):
    if kind == "gate":
        return norm.gated_group_rms_norm(a, b, weight, groups, eps)
    return norm.rms_norm(a, weight, eps) if kind == "none" else norm.add_rms_norm(a, b, weight, eps)


def outputs_and_gradients(form, inputs, upstream, kind, groups, eps):
    """[outputs..., gradients...]; an upstream gradient of None leaves that output out of the loss."""
    out = form(kind, *inputs, groups, eps)
    out = out if isinstance(out, tuple) else (out,)
    used = [(o, u.to(o.dtype)) for o, u in zip(out, upstream) if u is not None]
    wanted = [t for t in inputs if t is not None]
    outs, upstream = zip(*used)
    grads = torch.autograd.grad(outs, wanted, upstream, allow_unused=True)
    return [*out, *grads]


def compare(kind, inputs, groups=1, eps=1e-5, use=(True, True)):
    """Twin against the plain form in float64, on the same inputs and upstream gradients; returns the twin's results."""
    result_dtype = (inputs[0] if kind == "none" else inputs[1]).dtype
    upstream = [torch.randn(inputs[0].shape, device=DEVICE).to(result_dtype) if u else None for u in use]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    ours = outputs_and_gradients(twin, inputs, upstream, kind, groups, eps)
    reference = outputs_and_gradients(plain, wide, upstream, kind, groups, eps)
    expected = [result_dtype] * (len(ours) - sum(t is not None for t in inputs))
    expected += [t.dtype for t in inputs if t is not None]
    assert len(ours) == len(reference)
    for i, (a, b, dtype) in enumerate(zip(ours, reference, expected)):
        if b is None:
            assert a is None
            continue
        assert a.dtype == dtype and a.shape == b.shape
        tolerance = max(TOLERANCE[dtype], TOLERANCE[result_dtype] if kind == "add" else 0)  # the sum is rounded, too
        error = (a.double() - b).norm()
        assert error <= tolerance * b.norm(), f"result {i} of {kind}: {error:.2e} of {b.norm():.2e}"
    return ours


def inputs_for(kind, lead, width, dtypes=(FULL, FULL, FULL), extra=0):
    a, b, weight = dtypes
    return [
        tensor((*lead, width), a, extra),
        None if kind == "none" else tensor((*lead, width), b, extra),
        tensor((1, width), weight)[0].detach().requires_grad_(),
    ]


@pytest.mark.parametrize("rows, extra", [(1, 9), (3, 0), (65, 9)])
@pytest.mark.parametrize("kind, width", [*(("add", w) for w in (1, 20, 80, 200)), ("none", 640)])
def test_norms_equal_the_plain_ones(kind, width, rows, extra):
    torch.manual_seed(rows * width)
    compare(kind, inputs_for(kind, (rows,), width, extra=extra), eps=1e-5 if width > 1 else 0.3)


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("width, groups", [(1, 1), (6, 3), (160, 8), (160, 2), (400, 2)])
def test_gated_norm_equals_the_plain_one(width, groups, rows):
    torch.manual_seed(rows * width)
    inputs = inputs_for("gate", (rows,), width)
    inputs[1] = tensor((rows, width), FULL, extra=31)  # z as the first columns of a wider projection
    compare("gate", inputs, groups, eps=1e-5 if width // groups > 2 else 0.3)


@pytest.mark.parametrize("width", [1280, 4480, 10240, 16384])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_pieces(kind, width):
    torch.manual_seed(width)
    compare(kind, inputs_for(kind, (2,), width, extra=8))


DTYPES = {
    "none": [(HALF, HALF, HALF), (HALF, HALF, FULL)],
    "add": [(HALF, HALF, HALF), (HALF, FULL, FULL), (HALF, HALF, FULL)],
    "gate": [(HALF, HALF, HALF), (FULL, HALF, FULL), (FULL, HALF, HALF), (HALF, FULL, FULL)],
}


@pytest.mark.parametrize("kind, dtypes", [(kind, dtypes) for kind in KINDS for dtypes in DTYPES[kind]])
def test_dtypes(kind, dtypes):
    torch.manual_seed(3)
    compare(kind, inputs_for(kind, (2, 17), 120, dtypes, extra=4), groups=3 if kind == "gate" else 1)


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_addition_with_one_output_used(use, dtype):
    torch.manual_seed(4)
    x, residual, weight = inputs = inputs_for("add", (9,), 70, (HALF, dtype, FULL))
    _, stream, *_ = compare("add", inputs, use=use)
    assert torch.equal(stream, residual + x)  # to the bit: the stream of the plain model


def test_fuzz():
    rng = random.Random(5)
    torch.manual_seed(5)
    for _ in range(60):
        kind = rng.choice(KINDS)
        groups = rng.choice([1, 2, 3, 5, 8]) if kind == "gate" else 1
        width = groups * rng.choice([rng.randint(2, 40), rng.randint(41, 300), rng.randint(301, 600)])
        most = 2 + 600 // width
        lead = rng.choice([(), (rng.randint(1, most),), (2, rng.randint(1, most // 2))])
        eps = 1e-5 if width // groups > 8 else 0.3
        compare(kind, inputs_for(kind, lead, width, rng.choice(DTYPES[kind]), rng.choice([0, 3, 16])), groups, eps)


def test_the_norm_sees_the_rounded_stream():
    torch.manual_seed(12)
    x, residual, weight = inputs_for("add", (9,), 300, (HALF, HALF, FULL))
    normed, stream = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert (normed != norm.rms_norm(stream, weight, 1e-5)).float().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    ours = compare(kind, inputs_for(kind, (2, 0), 48), groups=2 if kind == "gate" else 1)
    assert torch.equal(ours[-1], torch.zeros(48, device=DEVICE))


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind):
    """Channels apart in memory, upstream gradients that are one number expanded."""
    torch.manual_seed(6)
    inputs = [None if t is None else t.detach() for t in inputs_for(kind, (4, 6), 30)]
    inputs[:2] = [None if t is None else t.transpose(0, 2).contiguous().transpose(0, 2) for t in inputs[:2]]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    compare(kind, inputs)
    grads = []
    for form in (twin, plain):
        out = form(kind, *inputs, 1, 1e-5)
        loss = sum(o.sum() for o in (out if isinstance(out, tuple) else (out,)))
        grads.append(torch.autograd.grad(loss, [t for t in inputs if t is not None]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_z_into_a_wider_buffer():
    torch.manual_seed(7)
    y, z, weight = (t.detach() for t in inputs_for("gate", (2, 9), 24))
    out, _, rstd = norm.forward("gate", y, z, weight, 3, 1e-5)
    wide, dz = torch.full((2, 9, 40), 7.0, device=DEVICE), torch.zeros_like(z)
    dy, dweight = norm.backward(out, None, y, z, weight, rstd, 3, wide[..., :24])
    again = norm.backward(out, None, y, z, weight, rstd, 3, dz)
    assert torch.equal(wide[..., :24], dz) and (wide[..., 24:] == 7).all() and dz.abs().min() > 0
    assert torch.equal(dy, again[0]) and torch.equal(dweight, again[1])


@pytest.mark.parametrize("kind", KINDS)
def test_saves_inputs_and_one_number_a_row(kind):
    inputs, saved = inputs_for(kind, (6,), 96), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = twin(kind, *inputs, 3 if kind == "gate" else 1, 1e-5)
    known = {t.data_ptr() for t in [*inputs, *(out if isinstance(out, tuple) else ())] if t is not None}
    extra = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() for t in extra) == (18 if kind == "gate" else 6)


def test_a_second_derivative_is_refused():
    x, _, weight = inputs_for("none", (3,), 16)
    (grad,) = torch.autograd.grad(norm.rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


def test_errors_are_sentences_with_numbers():
    x, w = torch.zeros(3, 12, device=DEVICE), torch.ones(12, device=DEVICE)
    with pytest.raises(TypeError, match="x must be bfloat16, float16 or float32; got torch.float64"):
        norm.rms_norm(x.double(), w, 1e-5)
    with pytest.raises(TypeError, match="weight must be float32 or .* torch.float16; got torch.bfloat16"):
        norm.rms_norm(x.half(), w.bfloat16(), 1e-5)
    with pytest.raises(TypeError, match="residual must be float32 .* torch.float32.* got torch.float16"):
        norm.add_rms_norm(x, x.half(), w, 1e-5)
    with pytest.raises(ValueError, match="weight must be contiguous with 12 values.*11"):
        norm.rms_norm(x, w[:11], 1e-5)
    with pytest.raises(ValueError, match=r"x \(2, 12\).*residual's shape \(3, 12\)"):
        norm.add_rms_norm(x[:2], x, w, 1e-5)
    with pytest.raises(ValueError, match=r"z's width 12 must be 5 equal groups of 1 to 16384 channels"):
        norm.gated_group_rms_norm(x, x, w, 5, 1e-5)
    with pytest.raises(ValueError, match="width 16385"):
        norm.rms_norm(torch.zeros(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE), 1e-5)
    with pytest.raises(ValueError, match="width 0"):
        norm.rms_norm(x[:, :0], w[:0], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: real sizes, bfloat16, bitwise repetition, offsets past 2^31.
# ---------------------------------------------------------------------------------------------------------------------

REAL = [("none", 5120, 1), ("none", 4480, 1), ("add", 5120, 1), ("add", 4480, 1), ("gate", 10240, 8)]
BF16 = torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, BF16, FULL), (HALF, HALF, HALF), (FULL, FULL, FULL)])
@pytest.mark.parametrize("kind, width, groups", REAL)
def test_real_sizes(kind, width, groups, dtypes):
    torch.manual_seed(8)
    inputs = inputs_for(kind, (8192,), width, dtypes)
    if kind == "gate":
        inputs[1] = torch.randn(8192, 22656, device=DEVICE).to(dtypes[1])[:, :width].requires_grad_()
    torch.manual_seed(9)
    first = compare(kind, inputs, groups)
    torch.manual_seed(9)
    for a, b in zip(first, compare(kind, inputs, groups)):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(BF16, FULL, FULL), (HALF, FULL, FULL)])
def test_mixed_precision_at_a_real_size(dtypes):
    torch.manual_seed(10)
    compare("add", inputs_for("add", (8192,), 5120, dtypes))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_offsets_past_31_bits(kind):
    torch.manual_seed(11)
    rows = torch.zeros(2**31 + 4096, dtype=HALF, device=DEVICE).as_strided((3, 512), (2**30, 1))
    inputs = inputs_for(kind, (3,), 512, (HALF, HALF, FULL))
    i = 0 if kind == "none" else 1
    inputs[i] = rows.copy_(inputs[i].detach()).requires_grad_()
    compare(kind, inputs, groups=2 if kind == "gate" else 1)
