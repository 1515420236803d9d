"""The Triton cross-entropy against PyTorch's in float64: losses and gradients, written where the logits were. Without a
GPU Triton's interpreter runs the kernel; its bfloat16 is wrong, so that waits for a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kernels import cross_entropy
from kernels.cross_entropy import cross_entropy_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, FULL = torch.float16, torch.float32
# relative and absolute: one rounding and some room. In float32 it is the exponents that are rounded, before the one at
# the target is subtracted; float16 has steps of 2^-24 near zero
TOLERANCE = {torch.bfloat16: (1.01 * 2**-8, 1e-9), HALF: (1.01 * 2**-11, 2**-24), FULL: (4e-6, 5e-7)}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is NaN: a loss that the kernel did not write fails its test."""
    real = torch.empty
    monkeypatch.setattr(cross_entropy.torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))


def inputs_for(rows, vocab, dtype, scale=4.0):
    logits = (scale * torch.randn(rows, vocab, device=DEVICE)).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE) < 0.6


def plain(logits, targets, learned):
    """(nll, gradient) in float64."""
    wide = logits.detach().double().requires_grad_()
    nll = F.cross_entropy(wide, targets, reduction="none")
    return nll.detach(), torch.autograd.grad((nll * learned).sum(), wide)[0]


def compare(logits, targets, learned):
    nll, gradient = plain(logits, targets, learned)
    ours = cross_entropy_(logits, targets, learned)
    assert ours.dtype == FULL and ours.shape == targets.shape
    torch.testing.assert_close(ours.double(), nll, rtol=1e-6, atol=4e-6)
    rtol, atol = TOLERANCE[logits.dtype]
    torch.testing.assert_close(logits.double(), gradient, rtol=rtol, atol=atol)
    assert not logits[~learned].any()
    return ours


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 4096 + 3, 20001])  # 20001 in float32: 16 warps and 5 blocks
def test_equal_to_the_plain_form(vocab, dtype):
    torch.manual_seed(vocab)
    logits, targets, learned = inputs_for(5, vocab, dtype)
    targets[0], targets[1] = 0, vocab - 1
    learned[:3] = torch.tensor([True, True, False])
    compare(logits, targets, learned)


@pytest.mark.parametrize("learned", [False, True])
def test_all_or_nothing_learned(learned):
    torch.manual_seed(0)
    logits, targets, _ = inputs_for(4, 300, FULL)
    compare(logits, targets, torch.full((4,), learned, device=DEVICE))


@pytest.mark.parametrize("rising", [True, False])
def test_large_logits_rising_and_falling(rising):
    """Sums without a maximum overflow at 89; a maximum that is not carried along is wrong in one order or the other."""
    logits = torch.linspace(-1000, 1000, 9000, device=DEVICE).repeat(2, 1)
    logits = logits if rising else logits.flip(1).contiguous()
    targets = torch.tensor([0, 8999], device=DEVICE)
    nll, gradient = plain(logits, targets, torch.ones(2, device=DEVICE))
    ours = cross_entropy_(logits, targets, torch.ones(2, dtype=torch.bool, device=DEVICE))
    torch.testing.assert_close(ours.double(), nll, rtol=1e-6, atol=2e-4)  # float32 near 1000 has steps of 6e-5
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-3, atol=1e-6)


def test_without_gradient_the_logits_stay():
    torch.manual_seed(1)
    logits, targets, learned = inputs_for(3, 100, FULL)
    before = logits.clone()
    nll = cross_entropy_(logits, targets, learned, gradient=False)
    assert torch.equal(logits, before)
    assert torch.equal(nll, cross_entropy_(logits, targets, learned))


def test_rows_that_lie_apart():
    """Around each row are values that must neither be read nor written."""
    torch.manual_seed(2)
    whole = torch.full((6, 120), math.nan, device=DEVICE)
    logits = whole[1:-1, 5:105].copy_(inputs_for(4, 100, FULL)[0])
    _, targets, learned = inputs_for(4, 100, FULL)
    compare(logits, targets, learned)
    logits.fill_(math.nan)
    assert whole.isnan().all()


def test_no_rows():
    logits, targets, learned = inputs_for(0, 100, FULL)
    assert cross_entropy_(logits, targets, learned).shape == (0,)


def test_minus_infinity_as_in_the_plain_form():
    torch.manual_seed(3)
    logits, targets, learned = inputs_for(4, 5000, FULL)
    learned[:] = True
    logits[0, :4500] = -math.inf  # the first block holds nothing else
    logits[1, 1:] = -math.inf
    logits[2, 7] = -math.inf
    logits[3] = -math.inf
    targets[:] = torch.tensor([4999, 0, 7, 0])  # certain in row 1, impossible in row 2, undefined in row 3
    nll, gradient = plain(logits, targets, learned)
    ours = cross_entropy_(logits, targets, learned)
    torch.testing.assert_close(ours.double(), nll, rtol=1e-6, atol=4e-6, equal_nan=True)
    assert ours[1].abs() < 1e-6 and ours[2] == math.inf and ours[3].isnan()
    torch.testing.assert_close(logits[:3].double(), gradient[:3], rtol=4e-6, atol=5e-7)


def test_what_is_wrong_gives_a_loss_that_is_no_number():
    torch.manual_seed(4)
    logits, targets, learned = inputs_for(5, 3000, FULL)
    logits[0, 2500] = math.nan
    logits[1, 3] = math.inf
    targets[:4] = torch.tensor([5, 5, -100, 3000])
    learned[:] = True
    neighbour = logits[4].clone()
    nll = cross_entropy_(logits, targets, learned)
    assert nll[:4].isnan().all() and logits[0].isnan().all()
    assert abs(nll[4] - F.cross_entropy(neighbour, targets[4])) < 1e-5


def test_two_runs_agree_to_the_bit():
    torch.manual_seed(5)
    logits, targets, learned = inputs_for(3, 6000, HALF)
    again = logits.clone()
    assert torch.equal(cross_entropy_(logits, targets, learned), cross_entropy_(again, targets, learned))
    assert torch.equal(logits, again)


def test_errors_are_sentences_with_numbers():
    logits, targets, learned = inputs_for(3, 10, FULL)
    with pytest.raises(ValueError, match=r"logits must be .* got \(3, 10\) in torch.float64"):
        cross_entropy_(logits.double(), targets, learned)
    with pytest.raises(ValueError, match=r"logits must be .* got \(1, 3, 10\)"):
        cross_entropy_(logits[None], targets, learned)
    with pytest.raises(ValueError, match=r"targets must be \(3,\) in torch.int64 .* got \(2,\)"):
        cross_entropy_(logits, targets[:2], learned)
    with pytest.raises(ValueError, match=r"targets must be .* got \(3,\) in torch.int32"):
        cross_entropy_(logits, targets.int(), learned)
    with pytest.raises(ValueError, match=r"learned must be \(3,\) in torch.bool .* in torch.float32"):
        cross_entropy_(logits, targets, learned.float())
    with pytest.raises(ValueError, match=r"neighbours in memory \(stride 1\); got stride 3"):
        cross_entropy_(torch.zeros(10, 3, device=DEVICE).t(), targets, learned)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: real sizes, bfloat16, offsets past 2^31.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, FULL])
@pytest.mark.parametrize("vocab", [32768, 32000 + 1, 131072])
def test_real_sizes(vocab, dtype):
    torch.manual_seed(6)
    logits, targets, learned = inputs_for(512, vocab, dtype)
    again = logits.clone()
    nll = compare(logits, targets, learned)
    assert torch.equal(nll, cross_entropy_(again, targets, learned)) and torch.equal(logits, again)


@pytest.mark.gpu
def test_offsets_past_31_bits():
    torch.manual_seed(7)
    rows = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 1000), (2**30, 1))
    logits, targets, learned = inputs_for(3, 1000, torch.bfloat16)
    learned[:] = True
    compare(rows.copy_(logits), targets, learned)
