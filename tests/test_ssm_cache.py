"""A state kept in bfloat16: what it is, that nothing else changes, and the experiment that shows what it costs."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import ours

import mamba2
from checkpoint import save_pretrained
from mamba2 import ssd_step
from model import ModelConfig, build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))

import ssm_cache_twin as twin  # noqa: E402

IDS = torch.randint(0, 263, (2, 41), generator=torch.Generator().manual_seed(5))
BF16 = torch.bfloat16


def states(cache):
    return [layer.ssm for layer in cache.layers if hasattr(layer, "ssm")]


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_what_a_cache_is_kept_in(dtype):
    model = ours().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    default, narrow = model.new_cache(2, 9), model.new_cache(2, 9, BF16)
    assert states(default) and {s.dtype for s in states(default)} == {wide}
    assert {s.dtype for s in states(narrow)} == {BF16}
    for a, b in zip(default.layers, narrow.layers):
        for name in () if a is None else vars(a):
            assert name == "ssm" or getattr(a, name).dtype == getattr(b, name).dtype == dtype
    saved = sum(s.numel() for s in states(default)) * (wide.itemsize - 2)
    assert default.bytes() - narrow.bytes() == saved


def test_a_dtype_that_holds_no_state_is_refused():
    with pytest.raises(ValueError, match="ssm_dtype torch.int8 cannot hold a state: use None"):
        ours().new_cache(1, 4, torch.int8)


@pytest.mark.parametrize("pieces", [[1] * 12, [7, 1, 1, 9, 1], [41]])
@torch.inference_mode()
def test_a_narrow_state_is_a_wide_one_rounded_after_every_call(pieces):
    """Bit for bit: the arithmetic between two roundings is the float32 one."""
    model, start = ours(), 0
    narrow, wide = model.new_cache(2, 41, BF16), model.new_cache(2, 41)
    for l in pieces:
        ids = IDS[:, start : start + l]
        assert torch.equal(model(ids, narrow), model(ids, wide))
        start += l
        for a, b in zip(states(narrow), states(wide)):
            assert a.dtype == BF16 and torch.equal(a, b.to(BF16))
            b.copy_(a)


@torch.inference_mode()
def test_the_default_state_is_stepped_in_place(monkeypatch):
    """No second tensor for the usual case: a step writes into the memory that the cache has."""
    model, stepped = ours(), []

    def watched(S, *args):
        stepped.append(S.data_ptr())
        return ssd_step(S, *args)

    monkeypatch.setattr(mamba2, "ssd_step", watched)
    cache = model.new_cache(2, 9)
    model(IDS[:, :1], cache)
    assert stepped == [s.data_ptr() for s in states(cache)] and all(s.abs().sum() > 0 for s in states(cache))


@torch.inference_mode()
def test_the_kernels_see_no_narrow_state(monkeypatch):
    import kernels

    def refuse(*args):
        raise AssertionError("the kernel was called")

    plain, model = ours(), ours()
    for mixer in twin.mamba_layers(model):
        mixer.impl = "triton"
    monkeypatch.setitem(sys.modules, "kernels.mixer", SimpleNamespace(forward=refuse))
    monkeypatch.setattr(kernels, "mixer", sys.modules["kernels.mixer"], raising=False)
    a, b = plain.new_cache(2, 41, BF16), model.new_cache(2, 41, BF16)
    for ids in (IDS[:, :9], IDS[:, 9:10]):
        assert torch.equal(plain(ids, a), model(ids, b))
    for cache in (None, model.new_cache(2, 41)):
        with pytest.raises(AssertionError, match="the kernel was called"):
            model(IDS, cache)


@pytest.mark.parametrize("memory, fades", [(100, True), (255, True), (513, False), (1000, False)])
def test_where_a_rounded_state_stops_fading(memory, fades):
    """The arithmetic of the experiment's docstring, on all 128 numbers that bfloat16 has between 1 and 2."""
    held = (1 + torch.arange(128) / 128).to(BF16).view(1, 1, 1, 128)  # (b, h, p, n)
    zero = torch.zeros(1, 1, 1)
    B = torch.zeros(1, 1, 128)
    _, S = ssd_step(held.float(), zero, torch.tensor([[1 / memory]]), torch.tensor([-1.0]), B, B, torch.zeros(1))
    stays = S.to(BF16) == held
    assert not stays.any() if fades else stays.all()


# ---------------------------------------------------------------------------------------------------------------------
# The experiment
# ---------------------------------------------------------------------------------------------------------------------


def test_window_edges():
    assert twin.window_edges(64) == [0, 8, 12, 16, 24, 32, 48, 64]
    for length in (2, 8, 9, 100, 4096):
        edges = twin.window_edges(length)
        assert edges[0] == 0 and edges[-1] == length and all(a < b for a, b in zip(edges, edges[1:]))


def test_memories_are_those_of_the_formula():
    """With in_proj zero, dt is softplus(dt_bias) at every position."""
    model = ours()
    for mixer in twin.mamba_layers(model):
        mixer.in_proj.weight.data.zero_()
    full, memories = twin.full_forward(model, IDS)
    expected = [1 / (F.softplus(m.dt_bias) * m.A_log.exp()) for m in twin.mamba_layers(model)]
    assert torch.allclose(memories.float(), torch.stack(expected), rtol=1e-5)
    assert full.dtype == torch.float64 and torch.allclose(full.float(), model(IDS), atol=1e-5)
    _, longer = twin.full_forward(twin.stretched(model, 16), IDS)
    assert torch.allclose(longer, memories * 16, rtol=1e-5)
    assert all(not m._forward_hooks for m in model.modules())


def test_drift_tells_the_caches_apart():
    torch.manual_seed(0)
    config = ModelConfig(hybrid_override_pattern="MM*-", hidden_size=64, vocab_size=300, intermediate_size=128)
    model = build(config).eval()
    found = {factor: twin.drift(twin.stretched(model, factor), IDS.repeat(1, 3)) for factor in (1, 256)}
    for row in found.values():
        assert len(row["heads"]) == 2 * 4 and len(row["float32"]["error"]) == len(twin.window_edges(123)) - 1
        assert max(row["float32"]["error"]) < 5e-6 and 5e-6 < min(row["bfloat16"]["error"])
        assert max(row["bfloat16"]["error"]) < 0.1
        assert all(0 < off < 1 for _, off in row["heads"])
        assert set(row["float32"]["changed"]) == {0}
        assert max(row["float32"]["kl"]) < min(row["bfloat16"]["kl"])
    first, last = (found[256]["bfloat16"]["error"][i] for i in (0, -1))
    assert last > 4 * first and last > found[1]["bfloat16"]["error"][-1]


@pytest.fixture
def folder(tmp_path, ours_tokenizer):
    config = dict(hybrid_override_pattern="M*", hidden_size=32, mamba_head_dim=16, ssm_state_size=8)
    torch.manual_seed(0)
    model = build(ModelConfig(vocab_size=ours_tokenizer.vocab_size, **config))
    save_pretrained(tmp_path / "out", model, ours_tokenizer)
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1}\n{"step": 7, "accuracy": {}}\n')
    return tmp_path / "out"


def test_the_script(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert twin.main(["--checkpoint", str(folder), "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["models"]] == ["at initialisation", "trained", "memory x 64"]
    assert result["trained_steps"] == 7 and result["edges"] == twin.window_edges(256)
    assert "--checkpoint out --quick" in result["command"]
    short, long = (min(m for m, _ in row["heads"]) for row in result["models"][1:])
    assert long > 10 * short  # not 64 times: what later layers read is another text
    assert "memory x 64" in capsys.readouterr().out and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--rows", "0"], "--rows at least 1"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--out", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_the_script_says_what_is_wrong(folder, capsys, flags, sentence):
    assert twin.main(["--checkpoint", str(folder), "--out", str(folder / "x.json"), *flags]) == 2
    assert sentence in capsys.readouterr().err and not (folder / "x.json").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path, capsys):
    save_pretrained(tmp_path / "m", ours())
    assert twin.main(["--checkpoint", str(tmp_path / "m"), "--out", str(tmp_path / "x.json")]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_the_figure_of_the_committed_result():
    matplotlib = pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((ROOT / "assets" / "ssm_cache.json").read_text())
    fig = twin.plot(result)
    left, right = fig.axes
    assert len(left.lines) == 2 * len(result["models"]) and len(right.lines) == len(result["models"])
    drawn = {line.get_label(): line.get_ydata() for line in left.lines}
    for row in result["models"]:
        assert list(drawn[row["name"]]) == row["bfloat16"]["error"]
    plt.close(fig)


def test_the_committed_result_is_complete():
    result = json.loads((ROOT / "assets" / "ssm_cache.json").read_text())
    names = ["at initialisation"] + ["trained" if f == 1 else f"memory x {f}" for f in twin.STRETCH]
    assert [row["name"] for row in result["models"]] == names and result["trained_steps"] > 0
    assert result["edges"] == twin.window_edges(result["steps"])
    for row in result["models"]:
        for cache in twin.CACHES:
            for values in row[cache].values():
                assert len(values) == len(result["edges"]) - 1 and all(map(math.isfinite, values))
