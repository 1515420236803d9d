"""A few rows times a matrix, against the same in float64 and against its plain twin, on ugly sizes.

Without a CUDA device Triton's interpreter runs the kernel (tests/conftest.py); its bfloat16 is wrong, so that is for
the tests marked gpu. On a GPU float32 takes the plain twin, so there float16 is what tests the kernel.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from kernels import linear as file
from kernels.linear import linear, plain
from model import RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}  # of float16 up to four roundings, doubled by the square
AROUND = [(norm, relu2, residual) for norm in (0, 1) for relu2 in (0, 1) for residual in (0, 1)]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Whatever the kernel does not write shows up as NaN, and no scratch is left from another test."""
    empty = torch.empty

    def poisoned(*args, **options):
        t = empty(*args, **options)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poisoned)
    file._scratch.cache_clear()


@pytest.fixture
def tile(monkeypatch):
    """tile(BN, BK, split): the kernel's choice is this one."""
    return lambda BN, BK, split: monkeypatch.setattr(file, "tiles", lambda N, int8: (BN, BK, 4, 3, split))


def inputs(b, N, K, dtype, int8=False, norm=False, relu2=False, residual=False, size=1.0, seed=0):
    """Random arguments of `linear` by name; int8 weights take every code from -128 to 127 if they are many enough, and
    behind the last of others lies NaN."""
    torch.manual_seed(seed)
    given = dict(x=(size * torch.randn(b, K, device=DEVICE)).to(dtype), relu2=bool(relu2))
    if int8:
        codes = (torch.arange(N * K, device=DEVICE) - 128)[torch.randperm(N * K, device=DEVICE)] % 256 - 128
        given["weight"] = codes.to(torch.int8).view(N, K)
        given["scale"] = (torch.rand(N, device=DEVICE) + 0.5) / (74 * K**0.5)  # 74: the spread of the codes
    else:
        whole = torch.full((N * K + 300,), math.nan, device=DEVICE, dtype=dtype)
        given["weight"] = whole[: N * K].view(N, K).copy_(torch.randn(N, K, device=DEVICE) / K**0.5)
    if norm:
        given["norm"] = RMSNorm(K, 1e-5).to(DEVICE, dtype)
        given["norm"].weight.data = (1 + 0.3 * torch.randn(K, device=DEVICE)).to(dtype)
    if residual:
        given["residual"] = torch.randn(b, N, device=DEVICE).to(dtype)
    return given


def exactly(x, weight, scale=None, norm=None, relu2=False, residual=None):
    """The definition, in float64."""
    x, weight = x.double(), weight.double()
    if scale is not None:
        weight = weight * scale.double()[:, None]
    if norm is not None:
        x = x * (x.square().mean(1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    y = x @ weight.t()
    y = y.clamp_min(0).square() if relu2 else y
    return y if residual is None else y + residual.double()


def error(ours, theirs):
    """|ours - theirs| / |theirs|, also where both are zeros; NaN is never close."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


@torch.no_grad()
def check(given, tolerance=None):
    y = linear(**given)
    tolerance = tolerance or TOLERANCE[y.dtype]
    assert y.shape == (len(given["x"]), len(given["weight"])) and y.dtype == given["x"].dtype
    assert error(y, exactly(**given)) < tolerance
    assert error(y, plain(**given)) < 1.5 * tolerance
    return y


SIZES = [
    (1, 1, 1),
    (2, 33, 63),
    (5, 100, 64),
    (16, 33, 130),
    (17, 100, 257),
    (33, 33, 130),
    (64, 100, 257),
    (5, 1, 257),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("i", range(len(SIZES)), ids=str)
def test_ugly_sizes_with_all_that_can_stand_around(i, int8, dtype):
    for around in AROUND if i == 1 else AROUND[i % 4 :: 4]:
        check(inputs(*SIZES[i], dtype, int8, *around))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("b, K, around", [(1, 130, (1, 1, 0)), (5, 64, (1, 0, 1)), (17, 1, (1, 1, 1))])
def test_tall_matrices_with_the_norm_on_the_way(b, K, around, dtype):
    """x is so small that eps counts."""
    check(inputs(b, 8200, K, dtype, False, *around, size=0.02))


@torch.no_grad()
def test_a_tall_matrix_needs_no_launch_for_the_norm(monkeypatch):
    given = inputs(2, 8192, 33, torch.float16, norm=True)
    monkeypatch.setattr(RMSNorm, "forward", None)
    assert error(linear(**given), exactly(**given)) < TOLERANCE[torch.float16]


@torch.no_grad()
def test_more_than_64_rows_are_the_plain_twin(monkeypatch):
    monkeypatch.setattr(file, "_linear", None)
    for int8 in (False, True):
        given = inputs(65, 33, 63, torch.float32, int8, True, True, True)
        assert torch.equal(linear(**given), plain(**given))


def test_int8_is_spelled_out_in_one_pass():
    weight = torch.randint(-128, 128, (33, 2570), dtype=torch.int8, device=DEVICE)  # rows longer than a program's share
    scale = torch.rand(33, device=DEVICE)
    assert torch.equal(file.spell_out(weight, scale, torch.float32), weight * scale[:, None])


def every_code(N, dtype):
    """(weights, scale): every row has the codes -128 .. 127 in an order of its own; scales are powers of two."""
    codes = (torch.arange(256)[None, :] + 37 * torch.arange(N)[:, None]) % 256 - 128
    return codes.to(torch.int8).to(DEVICE), 2.0 ** -(torch.arange(N, device=DEVICE) % 5)


@torch.no_grad()
def read_codes(N, dtype):
    """Rows of x with a single one pick single weights out."""
    weight, scale = every_code(N, dtype)
    for one in torch.eye(256, dtype=dtype, device=DEVICE).split(64):
        expected = one.double() @ (weight.double() * scale.double()[:, None]).t()
        assert torch.equal(linear(one, weight, scale).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_code_is_itself_times_its_scale(dtype):
    read_codes(40, dtype)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("BN, BK", [(16, 256), (32, 16), (64, 64), (128, 32)])
@torch.no_grad()
def test_tiles_and_splits(tile, BN, BK, split):
    """Also K of one tile and less, where some parts of the walk have nothing to do, and K that divides evenly."""
    tile(BN, BK, split)
    for i, K in enumerate((1, BK, 4 * BK, 257)):
        given = inputs(5, 100, K, torch.float16, (i + split) % 2, *AROUND[2 * i], seed=i)
        y = check(given)
        assert torch.equal(linear(**given), y)
        if split > 1:
            _, counts = file._scratch(given["x"].device, split, 16, 100)
            assert counts.dtype == torch.int32 and not counts.any()


@torch.no_grad()
def test_parts_of_a_walk_are_added_in_float32(tile):
    """Four parts that cancel: in float16 little would be left of them."""
    tile(16, 16, 4)
    given = inputs(5, 20, 64, torch.float16)
    given["x"][:, :16], given["x"][:, 16:32] = 300, -300
    given["weight"][:, :32] = given["weight"][:, :1]
    assert error(linear(**given), exactly(**given)) < TOLERANCE[torch.float16]


@torch.no_grad()
def test_split_walks_norm_before_they_part(tile):
    """A part of a walk sees a part of the squares: tall matrices, too, are then normed by a launch of its own."""
    tile(128, 16, 2)
    check(inputs(3, 8192, 33, torch.float16, norm=True))


@torch.no_grad()
def test_only_the_last_to_come_writes(tile):
    """Where one more is waited for, nobody does."""
    tile(32, 16, 4)
    given = inputs(3, 100, 64, torch.float16)
    _, counts = file._scratch(given["x"].device, 4, 16, 100)
    counts.fill_(-1)
    assert linear(**given).isnan().all()
    assert (counts[: 4 * 32 : 32] == 3).all()


def test_scratch_is_not_made_inside_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call linear once with this shape before capturing"):
        file._scratch(torch.device("cuda:7"), 4, 16, 100)


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_rows_may_lie_apart(int8):
    """What is beside them belongs to somebody else, and is NaN."""
    given = inputs(5, 100, 63, torch.float16, int8, False, False, True)
    expected = linear(**given)
    wide = torch.full((7, 80), math.nan, dtype=torch.float16, device=DEVICE)
    for view in (wide[1:6, 3:66], wide.view(-1)[7:].as_strided((5, 63), (1, 7))):
        view.copy_(given["x"])
        assert torch.equal(linear(**given | dict(x=view)), expected)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("N, BN, split", [(100, 32, 1), (100, 32, 4), (8200, 512, 1)])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(tile, N, BN, split, int8):
    tile(BN, 32, split)
    given = inputs(5, N, 70, torch.float16, int8, True, True, True)
    given["norm"].impl = "triton"  # where it is a launch of its own, it must not look at the neighbours either
    together = linear(**given)
    for i in (0, 3, 4):
        alone = given | dict(x=given["x"][i : i + 1], residual=given["residual"][i : i + 1])
        assert torch.equal(linear(**alone)[0], together[i])
    given["x"][1], given["residual"][2] = math.nan, math.nan
    assert torch.equal(linear(**given)[[0, 3, 4]], together[[0, 3, 4]])


def test_errors_are_sentences_with_numbers():
    given = inputs(3, 20, 12, torch.float16, False, True, False, True)
    codes = inputs(3, 20, 12, torch.float16, True)

    def call(message, **other):
        with pytest.raises(ValueError, match=message):
            linear(**given | other)

    call(r"weight must be \(20, 12\), .* beside x \(3, 12\) and weight \(20, 11\)", weight=given["weight"][:, :11])
    call(r"weight must be \(20, 12\), contiguous.* strides \(1, 20\)", weight=given["weight"].t().contiguous().t())
    call(r"residual must be \(3, 20\).* got \(2, 20\)", residual=given["residual"][:2])
    call(r"the norm's weight must be \(12,\).* got \(13,\)", norm=RMSNorm(13, 1e-5))
    call(r"scale must be \(20,\).* got \(19,\)", weight=codes["weight"], scale=codes["scale"][:19])
    call("a scale belongs to int8 weights and to no others; weight is torch.int8", weight=codes["weight"])
    call("a scale belongs to int8 weights and to no others; weight is torch.float16", scale=codes["scale"])
    call("x and weight must be of one kind.* torch.float16 and torch.float32", weight=given["weight"].float())


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: bfloat16, the tiles that are really chosen, the shapes of the released 9B.
# ---------------------------------------------------------------------------------------------------------------------

BF16 = torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("b", [1, 8, 16, 32, 64])
@pytest.mark.parametrize(
    "N, K, around",
    [(4480, 10240, (0, 0, 1)), (8960, 4480, (1, 1, 0)), (8961, 4500, (1, 1, 1)), (65537, 1100, (1, 0, 0))],
)
@torch.no_grad()
def test_bfloat16_is_as_good_as_the_plain_twin(b, N, K, around, int8):
    """And the same to the bit, fifty times."""
    given = inputs(b, N, K, BF16, int8, *around)
    y, exact = linear(**given), exactly(**given)
    assert error(y, exact) < min(1e-2, 1.3 * error(plain(**given), exact))
    for _ in range(50):
        assert torch.equal(linear(**given), y)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [100, 8200, 65600])
def test_every_code_widened_to_bfloat16(N):
    read_codes(N, BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("N", [1024, 4480, 8960, 65537])
@torch.no_grad()
def test_a_row_of_sixteen_is_the_row_alone(N, int8):
    given = inputs(16, N, 4480, BF16, int8, True, False, True)
    given["norm"].impl = "triton"
    together = linear(**given)
    for i in (0, 7, 15):
        alone = given | dict(x=given["x"][i : i + 1], residual=given["residual"][i : i + 1])
        assert torch.equal(linear(**alone)[0], together[i])


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("b", [1, 16, 64])
@torch.no_grad()
def test_a_graph_of_an_mlp_gives_the_same_bits(b, int8):
    """Forty layers one after the other, on the same scratch."""
    up = inputs(b, 8960, 2240, BF16, int8, True, True)
    down = inputs(b, 2240, 8960, BF16, int8)

    def run(x):
        for _ in range(40):
            h = linear(**up | dict(x=x))
            x = linear(**down | dict(x=h, residual=x))
        return x

    expected = run(up["x"])
    x, graph = torch.zeros_like(up["x"]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    x.copy_(up["x"])
    for _ in range(20):
        graph.replay()
        assert torch.equal(y, expected) and y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_weights_past_31_bits(int8):
    """The last rows of a matrix of more than 2^31 numbers."""
    N, K = 2**31 // 8192 + 300, 8192
    weight = torch.zeros(N, K, dtype=torch.int8 if int8 else BF16, device=DEVICE)
    x = torch.randn(2, K, device=DEVICE).to(BF16)
    weight[-200:] = torch.randint(-9, 10, (200, K), device=DEVICE)
    y = linear(x, weight, torch.ones(N, device=DEVICE) if int8 else None)
    assert not y[:, :-200].any()
    assert error(y[:, -200:], exactly(x, weight[-200:])) < 4e-3
