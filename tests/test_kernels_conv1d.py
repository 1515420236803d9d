"""The Triton convolution against mamba2.causal_conv1d in float64: outputs, new window and every gradient.

Without a GPU the kernels run in Triton's interpreter, on small sizes. Memory is poisoned: what a kernel should have
written and has not is NaN.
"""

import pytest
import torch

pytest.importorskip("triton")

import mamba2
from kernels import conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    def poison(make):
        def made(*args, **options):
            t = make(*args, **options)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def documents(b, l, generator):
    """Runs of one to some tokens; the names come back (0 1 0), so a document may see an older one of its name."""
    edges = torch.rand(b, l, generator=generator) < torch.rand(1, generator=generator)
    return (edges.cumsum(1) % 2 * torch.randint(1, 3, (b, l), generator=generator)).to(DEVICE)


def randn(*shape, dtype, generator, margin=8):
    """A view of a wider tensor, as in_proj leaves it: rows are 2 * margin values further apart than they are long."""
    wide = torch.randn(*shape[:-1], shape[-1] + 2 * margin, generator=generator, device=generator.device)
    return wide.to(DEVICE, dtype)[..., margin : margin + shape[-1]]


def case(
    b, l, channels, k, dtype=torch.float32, bias=True, window=True, packed=False, seed=0, weights=None, fast=False
):
    """x, weight, bias, window, seq_idx and the upstream gradients of y and the new window."""
    generator = torch.Generator(DEVICE if fast else "cpu").manual_seed(seed)
    options = dict(dtype=dtype, generator=generator)
    x, dy = (randn(b, l, channels, margin=(22656 - channels) // 2 if fast else 8, **options) for _ in range(2))
    before, dnew = randn(b, k - 1, channels, **options), randn(b, k - 1, channels, **options)
    if dtype != torch.float32:
        dnew.zero_()  # autograd adds it to a dx that is rounded already: exact only in float32
    weight = randn(channels, 1, k, **options | dict(dtype=weights or dtype)).contiguous()
    offset = randn(channels, **options | dict(dtype=weights or dtype)).contiguous()
    cpu = torch.Generator().manual_seed(seed)
    ids = documents(b, l, cpu) if packed else None
    return [x, weight, offset if bias else None, before if window else None, ids], [dy, dnew]


def results(form, inputs, upstream):
    """y, the new window, and the gradients of x, weight, bias and window, where they exist."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs[:4]]
    y, new = form(*leaves, inputs[4])
    present = [t for t in leaves if t is not None]
    return [y, new, *torch.autograd.grad([y, new], present, upstream)]


def check(inputs, upstream):
    ours = results(conv1d.causal_conv1d, inputs, upstream)
    exact = [t if t is None or not t.is_floating_point() else t.double() for t in inputs]
    theirs = results(mamba2.causal_conv1d, exact, [t.double() for t in upstream])
    assert torch.equal(ours[1].double(), theirs[1])
    for t, r in zip(ours, theirs):
        close(t, r)
    for t, source in zip(ours[2:], [t for t in inputs[:4] if t is not None]):
        assert t.dtype == source.dtype
    return ours


def close(t, exact):
    """Every element within the rounding of its dtype, and 1e-5 of the largest for the sums of float32."""
    scale = exact.abs().max().item() if exact.numel() else 0
    torch.testing.assert_close(t.double(), exact, rtol=torch.finfo(t.dtype).eps, atol=1e-5 * scale)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "b, l, channels, k, bias, window",
    [
        (2, 1, 20, 4, True, True),
        (1, 1, 1, 2, False, False),
        (2, 2, 96, 4, True, False),
        (1, 3, 200, 3, False, True),
        (1, 63, 20, 2, True, True),
        (1, 65, 96, 3, True, False),
        (1, 9, 1200, 4, False, True),
        (1, 200, 200, 4, True, True),
    ],
)
def test_equals_the_plain_form(b, l, channels, k, bias, window, packed):
    check(*case(b, l, channels, k, bias=bias, window=window, packed=packed, seed=l))


def test_a_hundred_random_cases(monkeypatch):
    generator = torch.Generator().manual_seed(7)

    def pick(*choices):
        return choices[torch.randint(len(choices), (1,), generator=generator).item()]

    for seed in range(100):
        run = pick(4, 8, 12)
        monkeypatch.setattr(conv1d, "run_length", lambda *_, run=run: run)
        monkeypatch.setattr(conv1d, "RUN", run)
        inputs, (dy, dnew) = case(
            pick(1, 1, 2), pick(*range(1, 9), 13), pick(1, 5, 16, 33), pick(2, 3, 4, 4, 4, 7),
            pick(torch.float32, torch.float16, torch.bfloat16), pick(True, False), pick(True, False), pick(True, False),
            seed, pick(None, torch.float32),
        )  # fmt: skip
        dy = pick(dy, dy.contiguous(), dy.mT.contiguous().mT, dy[:1, :1].expand_as(dy))
        try:
            check(inputs, [dy, dnew])
        except AssertionError as error:
            raise AssertionError(
                f"case {seed}: runs of {run}, {[None if t is None else t.shape for t in inputs]}"
            ) from error


@pytest.mark.parametrize("lengths", [[1] * 5, [2, 1, 3, 1, 2], [9, 2, 5]])
def test_no_value_and_no_gradient_crosses_a_document_edge(lengths, monkeypatch):
    """Each document by itself gives the same numbers as all of them in one row."""
    monkeypatch.setattr(conv1d, "run_length", lambda *_: 8)
    monkeypatch.setattr(conv1d, "RUN", 8)
    (x, weight, bias, _, _), (dy, dnew) = case(1, sum(lengths), 20, 4, window=False)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(DEVICE)
    y, new, dx, dweight, dbias = results(conv1d.causal_conv1d, [x, weight, bias, None, ids], [dy, dnew])
    dx[:, -min(lengths[-1], 3) :] -= dnew[:, -min(lengths[-1], 3) :]  # what came through the new window
    parts = [
        results(conv1d.causal_conv1d, [px, weight, bias, None, None], [pdy, torch.zeros_like(dnew)])
        for px, pdy in zip(x.split(lengths, dim=1), dy.split(lengths, dim=1))
    ]
    close(y, torch.cat([p[0] for p in parts], dim=1).double())
    close(dx, torch.cat([p[2] for p in parts], dim=1).double())
    close(dweight, sum(p[3] for p in parts).double())
    close(dbias, sum(p[4] for p in parts).double())
    assert torch.equal(new, parts[-1][1])


def test_prefill_and_then_steps_equals_the_whole_row():
    (x, weight, bias, window, _), _ = case(2, 9, 20, 4)
    whole, last = conv1d.causal_conv1d(x, weight, bias, window)
    pieces = []
    for piece in x.split([5, 1, 2, 1], dim=1):
        y, window = conv1d.causal_conv1d(piece, weight, bias, window)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, dim=1), whole) and torch.equal(window, last)


def test_dx_into_a_given_strided_buffer():
    (x, weight, bias, window, ids), (dy, _) = case(2, 13, 20, 4, packed=True)
    wide = torch.full((2, 13, 50), 7.0, device=DEVICE)
    dx, dwindow, sums = conv1d.backward(dy, x, weight, bias, window.contiguous(), ids, dx=wide[..., 10:30])
    plain = conv1d.backward(dy, x, weight, bias, window.contiguous(), ids)
    for t, r in zip((wide[..., 10:30], dwindow, sums), plain):
        assert torch.equal(t, r)
    assert (wide[..., :10] == 7).all() and (wide[..., 30:] == 7).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_large_values_stay_finite():
    """exp(-v) overflows from v = -88 on; the SiLU and its slope are 0 there."""
    v = torch.tensor([-1e4, -200.0, -89.0, -20.0, 0.0, 20.0, 89.0, 1e4], device=DEVICE).view(1, 1, 8)
    weight = torch.tensor([0.0, 1.0], device=DEVICE).expand(8, 1, 2)
    y, _, dx, *_ = results(
        conv1d.causal_conv1d, [v, weight, None, None, None], [torch.ones_like(v), torch.zeros_like(v)]
    )
    exact = v.double().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(dx.double(), torch.autograd.grad(expected.sum(), exact)[0], rtol=1e-5, atol=1e-6)


def test_the_last_wave_is_nearly_full():
    """On 132 multiprocessors with 4 programs each: no shape of a training run leaves a third of the card idle."""
    for b, l in [(1, 2048), (1, 8192), (8, 2048), (3, 4096), (32, 512), (1, 131072)]:
        for strips in (12, 24, 30):
            run = conv1d.run_length(b, l, strips, 528)
            programs = b * strips * -(-l // run)
            assert run % conv1d.ROWS == 0
            assert programs / (-(-programs // 528) * 528) > 0.66, (b, l, strips, run)


def test_float64_is_refused():
    x = torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="torch.float64.*use mamba2.causal_conv1d"):
        conv1d.causal_conv1d(x, torch.zeros(4, 1, 4), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "b, l, channels, packed", [(1, 8192, 12288, False), (8, 2048, 12288, True), (2, 1000, 1300, True)]
)
def test_real_sizes_are_exact_and_repeat_to_the_bit(b, l, channels, packed, dtype):
    inputs, upstream = case(b, l, channels, 4, dtype, fast=True)
    if packed:  # documents of some 300 tokens
        inputs[4] = (torch.rand(b, l, generator=torch.Generator().manual_seed(1)) < 1 / 300).cumsum(1).to(DEVICE)
    first = check(inputs, upstream)
    for t, again in zip(first, results(conv1d.causal_conv1d, inputs, upstream)):
        assert torch.equal(t, again)


@pytest.mark.gpu
def test_more_than_two_to_the_31_values():
    """131,072 tokens in rows of 22,656: 2^31 values end at token 94,787. Windows of 256 tokens against float64."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    l, k, span = 131072, 4, 256
    (x, weight, bias, window, _), (dy, dnew) = case(1, l, 12288, k, torch.bfloat16, fast=True)
    y, _, dx, *_ = results(conv1d.causal_conv1d, [x, weight, bias, window, None], [dy, dnew])
    for s in (0, 94_787 - 128, l - span):
        before = window if s == 0 else x[:, s - k + 1 : s]
        e = min(s + span + k - 1, l)  # dx needs the k-1 tokens after it
        inputs = [t.double() for t in (x[:, s:e], weight, bias, before)] + [None]
        exact = results(mamba2.causal_conv1d, inputs, [dy[:, s:e].double(), dnew.double()])
        close(y[:, s:e], exact[0])
        close(dx[:, s : s + span], exact[2][:, :span])
