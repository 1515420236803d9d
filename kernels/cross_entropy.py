"""Cross-entropy of rows of logits, and in their place its gradient: one kernel, one program a row.

Two numbers first. 16,384 tokens against a vocabulary of 32,768 in bfloat16 are 1.07 GB of logits, to be read once and
written once: 0.45 ms at 4.8 TB/s. Compiled for Hopper a logit takes 13 instructions, two of them exponentials; 132
multiprocessors at 1.7 GHz (128 lanes and 16 exponentials a cycle) need 0.25 ms for the instructions and 0.32 ms for
the exponentials among them, at the same time. So the floor is bytes over bandwidth, with little room below it.

Why the plain form is slow: maximum, subtraction, exponential, sum, gather, scatter and the factor are a pass each, over
a float32 copy that is twice as large, and two more passes make that copy and narrow it again.

The idea: sum of exponentials and maximum can be carried along together. When a higher maximum m' turns up, the sum so
far is multiplied by exp(m - m'); so the loss of a row, logsumexp - logit of the target, takes one pass. The gradient,
softmax - onehot, needs the finished logsumexp and reads the row again, but soon: the row still lies in the L2 cache.
The plan of the kernel:

- a thread takes neighbouring logits of 16 bytes at once, and keeps a maximum and a sum of its own for each such run:
  the tile is (runs, neighbours) and only its last axis is reduced inside the loop. Threads meet once a row.
  A vocabulary or stride that is no multiple of 16 is read one logit at a time: right, and slower;
- exponentials are powers of two: exp(x - m) is a fused multiply-add and one exp2;
- a warp for each 4 KB of a row: with 64 warps on a multiprocessor and 132 of those, the rows under way are 35 MB
  together, where an H200's L2 cache has 50. A row above 128 KB has the 32 warps that a program can have: rows of 256 KB
  are 69 MB together, and part of their second reading must come from memory;
- the one of the onehot is put in at the end, by one store: no comparison for every logit;
- a row that is not learned needs no second reading: zeros are written;
- no program touches another's row: no atomics, two runs agree to the bit.

Milakov and Gimelshein 2018 (arXiv 1805.02867) describe the carried maximum; Liger Kernel (Hsu et al. 2024, arXiv
2410.10989) writes the gradient over the logits. `loss.py` has the same in plain PyTorch.
"""

import torch
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(
    logits, targets, learned, nll, stride, vocab,
    GRADIENT: tl.constexpr, RUNS: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """One row; tiles are (RUNS, NEIGHBOURS) consecutive logits."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    logits += row * stride
    column = tl.arange(0, RUNS)[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocab)
    hit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)  # before anything is overwritten

    peak = tl.full((RUNS, 1), float("-inf"), tl.float32)  # from here on powers of two: a fused multiply-add and an exp2
    total = tl.zeros((RUNS, 1), tl.float32)
    for start in tl.range(0, vocab, RUNS * NEIGHBOURS):
        c = start + column
        x = tl.load(logits + c, mask=c < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 1, keep_dims=True) * LOG2E)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: -inf - -inf would be NaN
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(x * LOG2E - shift), 1, keep_dims=True)
        peak = higher
    top = tl.max(peak)
    top = tl.where(top == float("-inf"), 0.0, top)
    lse = top + tl.log2(tl.sum(total * tl.exp2(peak - top)))
    tl.store(nll + row, lse * LN2 - hit)

    if GRADIENT:
        if tl.load(learned + row):
            for start in tl.range(0, vocab, RUNS * NEIGHBOURS):
                c = start + column
                x = tl.load(logits + c, mask=c < vocab, other=float("-inf")).to(tl.float32)
                tl.store(logits + c, tl.exp2(x * LOG2E - lse), mask=c < vocab)
            tl.debug_barrier()  # another thread has written there
            tl.store(logits + target, tl.exp2(hit * LOG2E - lse) - 1.0, mask=inside)
        else:
            for start in tl.range(0, vocab, RUNS * NEIGHBOURS):
                c = start + column
                tl.store(logits + c, tl.zeros((RUNS, NEIGHBOURS), tl.float32), mask=c < vocab)


def cross_entropy_(logits, targets, learned, gradient=True):
    """The losses nll (t,) float32, in nats, of logits (t, vocab) bfloat16, float16 or float32; `logits` is overwritten.

    targets (t,) int64 in [0, vocab): any other gives a NaN loss. learned (t,) bool: which rows have a gradient; a loss
    is returned for all. With `gradient` the logits become (softmax - onehot(target)) * learned, rounded to their dtype;
    without, they stay. Rows may lie apart (any stride of axis 0), logits of a row must be neighbours. Float32 inside. A
    NaN in a row makes its loss NaN; its gradient is zero where it is not learned. Wrong shapes, dtypes or devices:
    ValueError. Autograd does not see what happens here.
    """
    if logits.dim() != 2 or logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            "logits must be (tokens, vocabulary) in bfloat16, float16 or float32; "
            f"got {tuple(logits.shape)} in {logits.dtype}"
        )
    rows, vocab = logits.shape
    for name, t, dtype in (("targets", targets, torch.int64), ("learned", learned, torch.bool)):
        if t.shape != (rows,) or t.dtype != dtype or t.device != logits.device:
            raise ValueError(
                f"{name} must be ({rows},) in {dtype} on {logits.device}, one for each row of logits; "
                f"got {tuple(t.shape)} in {t.dtype} on {t.device}"
            )
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits of a row must be neighbours in memory (stride 1); got stride {logits.stride(1)}")
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    size = logits.element_size()
    warps = min(32, max(4, triton.next_power_of_2(vocab * size) // 4096))
    with torch.cuda.device_of(logits):
        _rows[(rows,)](
            logits, targets.contiguous(), learned.contiguous(), nll, logits.stride(0), vocab,
            GRADIENT=gradient, RUNS=2 * 32 * warps, NEIGHBOURS=16 // size, num_warps=warps,
        )  # fmt: skip
    return nll
