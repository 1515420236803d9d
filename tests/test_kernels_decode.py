"""The decode kernel against the mixer it replaces: outputs, states and windows, step after step, on ugly sizes.

Without a CUDA device Triton's interpreter runs the kernel on the CPU (tests/conftest.py sees to it); it computes
bfloat16 wrongly, so here it is float32 and float16, and bfloat16 is for the tests marked gpu.
"""

import copy
import math
import random

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

from kernels import decode  # noqa: E402
from kernels.decode import mixer_step  # noqa: E402
from mamba2 import Mamba2Mixer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # b, h, p, g, n, k
    (1, 2, 20, 1, 16, 4),
    (3, 3, 24, 3, 24, 3),
    (1, 4, 80, 2, 16, 2),
    (2, 2, 80, 2, 64, 4),  # one program a head, rows in two tiles, 64 + 16
    (1, 2, 81, 1, 33, 2),  # two programs of 41 and 40 rows, in tiles of 32 + 16: some of theirs are the other's
    (1, 6, 1, 2, 5, 4),
    (1, 1, 128, 1, 33, 3),
]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Whatever the kernel does not write shows up as NaN."""
    empty = torch.empty

    def poisoned(*args, **options):
        t = empty(*args, **options)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the reference's convolution in full float32


def bare_mixer(h, p, g, n, k, dtype=torch.float32, seed=0, **options):
    """A mixer with random parameters and nothing before or after the part that the kernel does."""
    torch.manual_seed(seed)
    m = Mamba2Mixer(8, h, p, g, n, k, chunk_size=4, **options)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
        m.dt_bias -= 1
    m.in_proj, m.out_proj = nn.Identity(), nn.Identity()
    return m.to(DEVICE, dtype)


def random_state(m, b, dtype=torch.float32):
    state = m.new_state(b, DEVICE, dtype)
    state.window.normal_()
    state.ssm.normal_()
    return state


def copy_state(state, dtype=None):
    state = copy.copy(state)
    state.window, state.ssm = state.window.clone(), state.ssm.clone()
    if dtype is not None:
        state.window, state.ssm = state.window.to(dtype), state.ssm.to(dtype)
    return state


def projected(m, *lead, dtype=torch.float32):
    return torch.randn(*lead, 2 * m.inner + 2 * m.g * m.n + m.h, device=DEVICE).to(dtype)


def step(m, zxbcdt, state):
    return mixer_step(
        zxbcdt, state.window, state.ssm, m.conv1d.weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D, m.norm.weight, m.g,
        m.norm.eps, m.time_step_limit,
    )  # fmt: skip


def error(ours, theirs):
    """|ours - theirs| / |theirs|; NaN is never close."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def follow(m, b, steps, dtype=torch.float32, tolerance=5e-6):
    ours = random_state(m, b, dtype)
    theirs = copy_state(ours)
    for _ in range(steps):
        zxbcdt = projected(m, b, dtype=dtype)
        y = step(m, zxbcdt, ours)
        reference = m(zxbcdt[:, None], theirs)[:, 0]
        assert y.dtype == dtype and y.shape == reference.shape
        assert error(y, reference) < tolerance
        assert error(ours.ssm, theirs.ssm) < tolerance
        assert torch.equal(ours.window, theirs.window)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_twelve_steps_follow_the_mixer(shape):
    b, h, p, g, n, k = shape
    follow(bare_mixer(h, p, g, n, k), b, 12 if b * h < 5 else 4)


@torch.no_grad()
def test_a_state_wider_than_a_power_of_two():
    follow(bare_mixer(2, 20, 2, 130, 4), 1, 3)


@torch.no_grad()
def test_forty_random_shapes_and_their_neighbours():
    """Rows around the state and the window belong to somebody else: they keep their NaN."""
    draw = random.Random(1)
    for seed in range(40):
        g = draw.choice([1, 2, 3])
        h, p, n, k = g * draw.choice([1, 2]), draw.randint(1, 40), draw.randint(1, 70), draw.choice([2, 3, 4])
        b = 1 if h > 3 else draw.choice([1, 2])
        limit = draw.choice([(0.0, math.inf), (0.1, 0.4)])
        m = bare_mixer(h, p, g, n, k, seed=seed, use_conv_bias=draw.random() < 0.7, time_step_limit=limit)
        theirs, ours = random_state(m, b), m.new_state(b, DEVICE, torch.float32)
        around = []
        for name in ("window", "ssm"):
            inside = getattr(theirs, name)
            guarded = inside.new_full((b + 2, *inside.shape[1:]), math.nan)
            guarded[1:-1] = inside
            setattr(ours, name, guarded[1:-1])
            around += [guarded[0], guarded[-1]]
        zxbcdt = projected(m, b)
        case = f"b {b} h {h} p {p} g {g} n {n} k {k} {limit}"
        assert error(step(m, zxbcdt, ours), m(zxbcdt[:, None], theirs)[:, 0]) < 5e-6, case
        assert error(ours.ssm, theirs.ssm) < 5e-6 and torch.equal(ours.window, theirs.window), case
        assert all(t.isnan().all() for t in around), case


@torch.no_grad()
def test_prefill_then_steps_equals_the_full_forward():
    m = bare_mixer(4, 20, 2, 24, 4)
    zxbcdt = projected(m, 2, 13)
    full, state = m(zxbcdt), m.new_state(2, DEVICE, torch.float32)
    m(zxbcdt[:, :9], state)
    for t in range(9, 13):
        assert error(step(m, zxbcdt[:, t], state), full[:, t]) < 5e-6  # zxbcdt[:, t]: rows 13 apart


@torch.no_grad()
def test_options_of_the_mixer():
    follow(bare_mixer(4, 20, 2, 16, 4, use_conv_bias=False), 1, 3)
    narrow = bare_mixer(4, 20, 2, 16, 4, time_step_limit=(0.2, 0.3))
    follow(narrow, 1, 3)
    zxbcdt, state = projected(narrow, 1), random_state(narrow, 1)
    y = step(narrow, zxbcdt, copy_state(state))
    narrow.time_step_limit = (0.0, math.inf)
    assert error(step(narrow, zxbcdt, state), y) > 0.01  # the limit does something


@pytest.mark.parametrize("raw", [-80.0, -17.0, -9.0, -2.0, 0.0, 3.0, 19.9, 20.1, 95.0])
@torch.no_grad()
def test_small_and_large_steps_keep_their_digits(raw):
    """An empty state after one token is dt x B: a step of 1e-35 is as exact as one of 95 (with room for a fast exp)."""
    m = bare_mixer(2, 4, 1, 8, 2)
    m.dt_bias.zero_()
    zxbcdt = projected(m, 1)
    zxbcdt[:, -m.h :] = raw
    ours, theirs = m.new_state(1, DEVICE, torch.float32), m.double().new_state(1, DEVICE, torch.float64)
    m(zxbcdt.double()[:, None], theirs)
    step(m.float(), zxbcdt, ours)
    assert error(ours.ssm, theirs.ssm) < 1e-5


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32])
@torch.no_grad()
def test_float16_is_float32_inside(parameters):
    m = bare_mixer(4, 20, 2, 24, 4, dtype=parameters)
    exact = copy.deepcopy(m).double()
    ours = random_state(m, 2, torch.float16)
    theirs = copy_state(ours, torch.float64)
    for _ in range(4):
        zxbcdt = projected(m, 2, dtype=torch.float16)
        y = step(m, zxbcdt, ours)
        assert y.dtype == torch.float16
        assert error(y, exact(zxbcdt.double()[:, None], theirs)[:, 0]) < 4e-4  # one rounding, at the end
        assert ours.ssm.dtype == torch.float32 and error(ours.ssm, theirs.ssm) < 5e-6


@torch.no_grad()
def test_a_launch_leaves_the_counters_at_zero():
    m = bare_mixer(6, 20, 3, 16, 4)
    step(m, projected(m, 2), random_state(m, 2))
    counts = decode._counts(torch.zeros(0, device=DEVICE).device, 6)
    assert counts.numel() == 6 * decode.APART and not counts.any()


def test_counters_are_not_made_inside_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="54321 counters .* before capturing"):
        decode._counts(torch.device("cuda:7"), 54321)


@torch.no_grad()
def test_errors_are_sentences_with_numbers():
    m = bare_mixer(4, 20, 2, 16, 4)
    zxbcdt, state = projected(m, 2), random_state(m, 2)

    def call(message, zxbcdt=zxbcdt, window=state.window, ssm=state.ssm, weight=m.conv1d.weight, g=2):
        with pytest.raises(ValueError, match=message):
            mixer_step(zxbcdt, window, ssm, weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D, m.norm.weight, g, 1e-5)

    call(r"four axes; got 3, shape \(4, 20, 16\)", ssm=state.ssm[0])
    call(r"p up to 128.* got p 20, n 16, k 5", weight=m.conv1d.weight.new_zeros(144, 1, 5))
    call(r"4 heads must be a multiple of n_groups 3", g=3)
    call(r"zxbcdt must be \(2, 228\).* got \(2, 227\)", zxbcdt=zxbcdt[:, 1:])
    call(r"ssm of shape .* torch.float16", ssm=state.ssm.half())
    call(r"zxbcdt of shape .* torch.float64", zxbcdt=zxbcdt.double())
    call(r"zxbcdt of shape .* has strides \(1, 2\)", zxbcdt=zxbcdt.t().contiguous().t())
    call(r"window of shape .* has strides", window=state.window.transpose(1, 2).contiguous().transpose(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU, at the shape of the released 9B.
# ---------------------------------------------------------------------------------------------------------------------


def released():
    return bare_mixer(128, 80, 8, 128, 4, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 8, 32])
@torch.no_grad()
def test_two_hundred_bfloat16_steps_against_float64(b):
    m = released()
    exact = copy.deepcopy(m).double()
    ours = random_state(m, b, torch.bfloat16)
    theirs = copy_state(ours, torch.float64)
    for _ in range(200):
        zxbcdt = projected(m, b, dtype=torch.bfloat16)
        y = step(m, zxbcdt, ours)
        assert error(y, exact(zxbcdt.double()[:, None], theirs)[:, 0]) < 4e-3  # bfloat16 rounds by 2e-3 on average
    assert error(ours.ssm, theirs.ssm) < 1e-4
    assert torch.equal(ours.window.double(), theirs.window)


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 8, 32])
@torch.no_grad()
def test_a_graph_and_a_second_run_give_the_same_bits(b):
    """Two layers in one graph, 200 replays, against 200 eager steps, made twice."""
    layers = [released(), bare_mixer(128, 80, 8, 128, 4, dtype=torch.bfloat16, seed=1)]
    inputs = projected(layers[0], 200, b, dtype=torch.bfloat16)
    start = [random_state(m, b, torch.bfloat16) for m in layers]

    def eager():
        states = [copy_state(s) for s in start]
        ys = [[step(m, zxbcdt, s) for m, s in zip(layers, states)] for zxbcdt in inputs]
        return ys, states

    (ys, states), (again, _) = eager(), eager()
    assert all(torch.equal(a, b) for pair, other in zip(ys, again) for a, b in zip(pair, other))

    slot, replayed = inputs[0].clone(), [copy_state(s) for s in start]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [step(m, slot, s) for m, s in zip(layers, replayed)]
    for zxbcdt, expected in zip(inputs, ys):
        slot.copy_(zxbcdt)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, expected))
    assert all(torch.equal(a.ssm, b.ssm) and torch.equal(a.window, b.window) for a, b in zip(replayed, states))
