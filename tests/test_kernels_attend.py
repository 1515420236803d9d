"""One token that looks back, against attention.attend_explicit, with NaN in every place that is none of its business.

Without a CUDA device Triton's interpreter runs the kernels (tests/conftest.py); its bfloat16 is wrong, so that is for
the tests marked gpu.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from attention import attend_explicit
from kernels.attend import attend, default_parts, put

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = [1, 63, 64, 65, 200]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever the kernels do not write shows up as NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **options: real(*args, **options).fill_(math.nan))


def inputs(lengths, heads=4, kv_heads=2, e=24, dtype=torch.float32, longest=None, size=1.0, seed=0):
    """q, k, v, lengths; k and v are the middle of a larger cache, and NaN from lengths[i] on."""
    torch.manual_seed(seed)
    b, longest = len(lengths), longest or max(lengths) + 3
    q = (size * torch.randn(b, heads, e, device=DEVICE)).to(dtype)
    views = []
    for _ in range(2):
        whole = torch.full((b + 2, kv_heads, longest + 5, e), math.nan, device=DEVICE, dtype=dtype)
        for i, length in enumerate(lengths):
            whole[i + 1, :, :length] = torch.randn(kv_heads, length, e, device=DEVICE).to(dtype)
        views.append(whole[1:-1, :, :longest])
    return q, *views, torch.tensor(lengths, device=DEVICE)


def explicitly(q, k, v, lengths):
    """(b, heads, e): attend_explicit in float64, where it has it."""
    seen = torch.arange(k.shape[2], device=DEVICE) < lengths[:, None]
    k, v = (t.double().masked_fill(~seen[:, None, :, None], 0) for t in (k, v))
    return attend_explicit(q.double()[:, :, None], k, v, seen[:, None, None])[:, :, 0]


def error(ours, theirs):
    """The worst row's |ours - theirs| / |theirs|; NaN is never close."""
    off, size = ((t.double().flatten(1).norm(dim=1)) for t in (ours - theirs, theirs))
    return (off / size).max().item() if off.isfinite().all() else math.inf


def check(q, k, v, lengths, parts=None, tolerance=None):
    y = attend(q, k, v, lengths, parts)
    assert y.shape == q.shape and y.dtype == q.dtype
    assert error(y, explicitly(q, k, v, lengths)) < (tolerance or TOLERANCE[q.dtype])
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [None, 1, 3, 13])
def test_rows_of_different_lengths(parts, dtype):
    """13 parts are more than there are blocks of keys, and for the first row more than keys."""
    check(*inputs(LENGTHS, dtype=dtype), parts=parts)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (40, 8), (3, 3), (16, 1), (6, 2)])
@pytest.mark.parametrize("e", [1, 8, 24])
def test_heads(heads, kv_heads, e):
    check(*inputs([70, 5], heads, kv_heads, e), parts=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("e", [24, 48, 80, 128, 256])
def test_widths_of_a_head(e, dtype):
    check(*inputs([129, 64], e=e, dtype=dtype), parts=2)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_row(length):
    check(*inputs([length]))
    check(*inputs([length], longest=length), parts=4)  # the cache ends where the row does


def test_a_row_is_the_same_beside_others():
    q, k, v, lengths = inputs(LENGTHS)
    together = attend(q, k, v, lengths, parts=3)
    for i in range(len(LENGTHS)):
        alone = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], lengths[i : i + 1], parts=3)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_neither_overflow_nor_vanish(sign):
    """Scores from 290 to 590, all of one sign, rising or falling along the row: e^300 is no float32, and a score of 590
    is known to 3e-5 in float32."""
    q, k, v, lengths = inputs([200, 65], size=0.0)
    q += 10
    ramp = torch.linspace(1, 2, k.shape[2], device=DEVICE)[:, None]
    k.copy_(torch.where(k.isnan(), k, sign * 6 * ramp))
    assert (q[0, 0] @ k[0, 0, 0]).abs() / 24**0.5 > 250
    for parts in (1, 3):
        check(q, k, v, lengths, parts, tolerance=1e-4)


def test_lengths_of_32_bits_and_a_query_that_is_a_view():
    q, k, v, lengths = inputs(LENGTHS)
    expected = attend(q, k, v, lengths)
    assert torch.equal(attend(q, k, v, lengths.int()), expected)
    wide = torch.full((5, 24, 4, 2), math.nan, device=DEVICE)
    view = wide[..., 1].transpose(1, 2)
    view.copy_(q)
    assert torch.equal(attend(view, k, v, lengths), expected)


@pytest.mark.parametrize("e", [1, 20, 24, 64])
def test_put_writes_its_place_and_no_other(e):
    _, k_cache, v_cache, lengths = inputs([1, 6, 11], kv_heads=3, e=e, longest=12)
    before = [t._base.clone() for t in (k_cache, v_cache)]
    k, v = torch.randn(2, 3, e, 3, device=DEVICE).transpose(2, 3)  # heads of a token lie apart
    put(k, v, k_cache, v_cache, lengths)
    for cache, new, old in zip((k_cache, v_cache), (k, v), before):
        for row, length in enumerate([1, 6, 11]):
            old[row + 1, :, length] = new[row]
        assert torch.equal(cache._base.nan_to_num(9e9), old.nan_to_num(9e9))


def test_put_then_attend_is_one_token_more():
    q, k, v, lengths = inputs(LENGTHS, longest=210)
    new = torch.randn(2, 5, 2, 24, device=DEVICE)
    put(*new, k, v, lengths)
    rows = torch.arange(5)
    assert torch.equal(k[rows, :, lengths], new[0]) and torch.equal(v[rows, :, lengths], new[1])
    check(q, k, v, lengths + 1)


def test_parts_are_enough_for_a_card_and_not_too_small():
    cpu = torch.device("cpu")
    for b, kv_heads, longest in [(1, 1, 1), (1, 1, 10**6), (1, 8, 5000), (4, 2, 700), (64, 8, 10**6), (1, 2, 1025)]:
        parts = default_parts(b, kv_heads, longest, cpu)
        assert 1 <= parts <= 256
        assert parts == 1 or (parts - 1) * b * kv_heads < 16 and (parts - 1) * 256 < longest


def test_errors_are_sentences_with_numbers():
    q, k, v, lengths = inputs([3, 4])  # q (2, 4, 24), k (2, 2, 7, 24)

    def call(message, q=q, k=k, v=v, lengths=lengths):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, lengths)

    call("of one kind.* torch.float32, torch.float16", k=k.half())
    call("of one kind.* torch.float64", q.double(), k.double(), v.double())
    call("up to 16 query heads .* got 5 for 2", q=torch.zeros(2, 5, 24))
    call("up to 16 query heads .* got 34 for 2", q=torch.zeros(2, 34, 24))
    call("head_dim 257", *(torch.zeros(2, *shape, 257) for shape in ((4,), (2, 7), (2, 7))))
    call(r"lengths \(2,\) .* got .* and \(3,\)", lengths=torch.ones(3, dtype=torch.int64))
    call(r"k and v must be \(2, kv_heads, tokens, 24\).* got \(2, 2, 7, 24\), \(2, 2, 6, 24\)", v=v[:, :, :6])
    call(r"k and v must be \(2, .* got \(1, 2, 7, 24\)", k=k[:1], v=v[:1])
    apart = torch.zeros(2, 7, 2, 24).transpose(1, 2)
    call(r"one after the other in k and v; got strides \(336, 24, 48, 1\)", k=apart, v=apart)
    call("one after the other in k and v", v=v.contiguous())
    with pytest.raises(ValueError, match="one after the other"):
        put(q[:, :2], q[:, :2], apart, apart, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: bfloat16, the heads of the released 9B, long rows.
# ---------------------------------------------------------------------------------------------------------------------

BF16 = torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("b, longest", [(1, 20000), (8, 3000), (64, 300)])
@pytest.mark.parametrize("heads, kv_heads, e", [(40, 8, 128), (32, 8, 128), (4, 2, 48), (16, 1, 256)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_long_rows(b, longest, heads, kv_heads, e, dtype):
    lengths = [longest - (i * 997) % longest for i in range(b)]
    given = inputs(lengths, heads, kv_heads, e, dtype)
    y = check(*given)
    for _ in range(20):
        assert torch.equal(attend(*given), y)


@pytest.mark.gpu
def test_a_graph_finds_the_lengths_on_the_gpu():
    """Recorded once; replayed while the rows grow from 1 to 700 tokens, put after put."""
    q, k, v, lengths = inputs([1] * 8, 40, 8, 128, BF16, longest=702)
    new, now = torch.randn(2, 8, 8, 128, device=DEVICE).to(BF16), lengths.clone()

    def step(k, v, lengths):
        put(*new, k, v, lengths)
        return attend(q, k, v, lengths + 1)

    other_k, other_v = (t._base.clone()[1:-1, :, :702] for t in (k, v))
    step(other_k, other_v, now)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(k, v, lengths)
    for i in range(1, 701):
        lengths.copy_(now)
        new.copy_(torch.randn_like(new))
        graph.replay()
        if i % 50 == 0 or i < 5:
            assert error(y, explicitly(q, k, v, lengths + 1)) < TOLERANCE[BF16]
        assert torch.equal(y, step(other_k, other_v, now))
        now += 1


@pytest.mark.gpu
def test_heads_past_31_bits():
    """A head of 2^27 numbers, seventeen of them: the last lies beyond 2^31."""
    heads, tokens, e = 17, 2**20, 128
    k, v = (torch.zeros(1, heads, tokens, e, dtype=BF16, device=DEVICE) for _ in range(2))
    lengths = torch.tensor([70], device=DEVICE)
    q, small_k, small_v, _ = inputs([71], heads, heads, e, BF16)
    k[:, :, :70], v[:, :, :70] = small_k[:, :, :70], small_v[:, :, :70]
    put(small_k[:, :, 70], small_v[:, :, 70], k, v, lengths)
    assert torch.equal(
        attend(q, k, v, lengths + 1),
        attend(q, small_k, small_v, lengths + 1, default_parts(1, heads, tokens, k.device)),
    )
