"""bench.py's kernels and training: the arithmetic, the tables, RESULTS.md, refusals, and each path on a toy."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import bench
from benchmarks import eight_bits, floors, measure, sections, tables, timing, training
from benchmarks.floors import Scan
from benchmarks.timing import Bench
from device import choose_impl
from fp8 import Recipe
from model import PRESETS, ModelConfig
from sizes import count_parameters, flops_per_token

START, END = "<!-- bench kernels -->", "<!-- /bench kernels -->"

MAIN = Scan(1, 8192, 128, 80, 8, 128)
TOP = {"copy": 3.0e12, "matmul": 800e12, "spread": {}}


# ---- arithmetic


def test_bytes_are_those_of_the_tensors():
    s = Scan(2, 30, 6, 20, 3, 24)
    numbers = {name: torch.empty(size, dtype=torch.bfloat16).nbytes for name, size in
               dict(x=(2, 30, 6, 20), B=(2, 30, 3, 24), dt=(2, 30, 6)).items()}  # fmt: skip
    state = torch.empty(2, 6, 20, 24).nbytes
    assert floors.scan_bytes(s) == 2 * numbers["x"] + 2 * numbers["B"] + numbers["dt"] + state
    assert floors.scan_bytes(s, backward=True) == 3 * numbers["x"] + 4 * numbers["B"] + 2 * numbers["dt"]
    assert floors.conv_bytes(2, 30, 48) == 2 * torch.empty(2, 30, 48, dtype=torch.bfloat16).nbytes
    assert floors.conv_bytes(2, 30, 48, backward=True, size=4) == 3 * torch.empty(2, 30, 48).nbytes
    assert [floors.norm_bytes(kind, 3, 5) for kind in ("rms", "add", "gated")] == [60, 120, 90]
    assert [floors.norm_bytes(kind, 3, 5, True) for kind in ("rms", "add", "gated")] == [90, 120, 150]
    layer = sections.decode_layer(Bench("cpu", torch.bfloat16, 1), 2, 6, 20, 3, 24)
    tensors = {name: t.nbytes for name, t in layer.items() if torch.is_tensor(t)}
    out = 2 * 2 * 6 * 20
    assert floors.decode_bytes(2, 6, 20, 3, 24) == sum(tensors.values()) + tensors["ssm"] + tensors["window"] + out


def test_floor_of_the_12b_layer_is_its_bytes():
    ms, which = floors.floor_ms(floors.scan_bytes(MAIN), floors.scan_flops(MAIN), TOP)
    assert which == "bytes" and ms == pytest.approx(0.1255, abs=5e-4)
    assert floors.floor_ms(1, 800e9, TOP) == (pytest.approx(1.0), "FLOPs")


def test_scan_flops_are_the_model_s_with_its_chunk():
    scan = ModelConfig(
        hidden_size=1, intermediate_size=1, vocab_size=1, hybrid_override_pattern="M", mamba_num_heads=128,
        mamba_head_dim=80, n_groups=8, ssm_state_size=128, chunk_size=64,
    )  # fmt: skip
    counts = count_parameters(scan)
    products = flops_per_token(scan, MAIN.l) - 2 * (counts["mamba"] + counts["head"])
    assert floors.scan_flops(MAIN) == MAIN.l * products
    assert floors.scan_flops(MAIN, backward=True) == 2 * MAIN.l * products


def test_the_model_has_549_million_parameters():
    config = ModelConfig(**training.HYBRID_549M)
    assert round(count_parameters(config)["total"], -6) == 549_000_000
    assert config.hybrid_override_pattern.count("M") == 12 and config.mamba_inner == 2 * config.hidden_size


# ---- timing


def test_a_race_goes_on_without_those_who_fail():
    calls = []

    def fails_late():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no | more\nsecond line")

    def too_large():
        raise torch.OutOfMemoryError("tried to allocate")

    b = Bench("cpu", torch.float32, 3, say=lambda text: None)
    found = b.race({"a": lambda: None, "b": too_large, "c": fails_late}, {"d": "was wrong"})
    assert set(found["ms"]) == {"a"} == set(found["spread"]) and found["ms"]["a"] > 0
    assert found["failed"] == {"b": "out of memory", "c": "failed: RuntimeError no / more", "d": "was wrong"}


def test_contestants_take_turns():
    order = []
    b = Bench("cpu", torch.float32, 2)
    b.race({name: lambda name=name: order.append(name) for name in "ab"})
    assert "".join(order) == "ab" * 5


def test_whoever_differs_is_not_timed():
    x = torch.arange(4.0)
    runs = {"nano2": lambda: {"y": x * 1.2}, "PyTorch": lambda: {"y": x}, "mamba_ssm 64": lambda: {"y": x + math.nan}}
    failed = {}
    good = timing.checked(Bench("cpu", torch.float32, 1, say=lambda text: None), runs, failed)
    assert good == ["PyTorch"]
    assert failed == {"nano2": "not timed, differs: y off by 2.0e-01",
                      "mamba_ssm 64": "not timed, differs: y off by nan"}  # fmt: skip


def test_a_peer_whose_package_does_not_import_is_read_without_it(tmp_path, monkeypatch):
    (tmp_path / "halfpeer" / "ops").mkdir(parents=True)
    (tmp_path / "halfpeer" / "__init__.py").write_text('__version__ = "9.9"\nimport no_such_extension\n')
    (tmp_path / "halfpeer" / "ops" / "__init__.py").touch()
    (tmp_path / "halfpeer" / "ops" / "good.py").write_text("def f():\n    return 7\n")
    (tmp_path / "halfpeer" / "ops" / "bad.py").write_text("import no_such_compiler\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert timing.import_peer("halfpeer.ops.good").f() == 7
    assert timing.version_of("halfpeer") == "9.9"
    with pytest.raises(ImportError, match="no_such_compiler"):
        timing.import_peer("halfpeer.ops.bad")
    with pytest.raises(ImportError, match="no_such_package"):
        timing.import_peer("no_such_package.ops")
    for name in [name for name in sys.modules if name.startswith("halfpeer")]:
        del sys.modules[name]


# ---- every section, on a toy


SIZES = {
    "ceilings": dict(copy_bytes=2**12, matmul=8), "compile": Scan(1, 3, 1, 4, 1, 4),
    "scan": [Scan(1, 5, 2, 4, 1, 4)], "conv": [(1, 6, 16, 48)], "norm": [("rms", 2, 8), ("add", 2, 8),
    ("gated", 2, 8, 2, 20)], "decode": [(1, 2, 4, 1, 4)], "errors": [Scan(1, 5, 2, 4, 1, 4)],
}  # fmt: skip
HEADER = dict(card="Toy", torch="2", triton="3", date="2026-01-01", commit="abc", command="python bench.py kernels",
              peers={"mamba_ssm": "1.0"})  # fmt: skip


def fake_peers():
    """A scan of mamba_ssm's signature made of ours in PyTorch, a little off; a norm that runs out of memory."""

    def scan(x, dt, A, B, C, chunk, D, dt_bias, dt_softplus, return_final_states):
        assert dt_softplus and chunk in (2, 4)
        y, state = sections.plain_scan(dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias), chunk=chunk)
        return (y * 1.001, state) if return_final_states else y * 1.001

    def step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
        assert x.shape == dt.shape == z.shape and A.shape == state.shape[1:] and B.shape == C.shape

    def norm(*args, **options):
        raise torch.OutOfMemoryError

    return {"scan": scan, "step": step, "norm": norm}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a toy for the interpreter; with a GPU, run the command")
    out = tmp_path_factory.mktemp("record") / "deep" / "record.json"
    b = Bench("cpu", torch.float32, 1, fake_peers(), lambda text: None, (2, 4))
    only = [name for name in measure.SECTIONS if name != "compile"]
    made = measure.measure(b, only, SIZES, HEADER, out)
    assert json.loads(out.read_text()) == made
    return made


def test_every_section_runs(record):
    assert record["failed"] == {}
    for r in [r for name in ("scan", "conv", "norm", "decode") for r in record["sections"][name]]:
        assert r["ms"]["nano2"] > 0 and r["bytes"] > 0, r
    assert set(record["sections"]["scan"][1]["ms"]) == {"mamba_ssm 2", "mamba_ssm 4", "nano2", "PyTorch"}
    assert record["sections"]["norm"][0]["failed"] == {"mamba_ssm": "out of memory"}
    assert set(record["sections"]["decode"][0]["ms"]) == {"nano2", "mamba_ssm", "mamba_ssm in a graph"}
    e = record["sections"]["errors"][0]["errors"]
    assert set(e["nano2"]) == {"y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"}
    assert max(e["nano2"].values()) < 1e-4 and 5e-4 < e["mamba_ssm"]["y"] < 2e-3


def test_tables_are_made_from_the_record(record):
    text = tables.tables(json.loads(json.dumps(record)))
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith(" |") or set(line) == set("|-")
    heads = [t.splitlines() for t in text.split("\n\n") if t.startswith("|")]
    assert len(heads) == 5 and all(len({line.count("|") for line in lines}) == 1 for lines in heads)
    assert "commit abc, one Toy" in text and "| out of memory |" in text and "mamba_ssm (" in text


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(bench, sizes):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(measure, "conv", broken)
    monkeypatch.setattr(measure, "scan", lambda bench, sizes: [])
    b = Bench("cpu", torch.float32, 1, {}, lambda text: None)
    made = measure.measure(b, ["scan", "conv"], SIZES, HEADER, tmp_path / "r.json")
    assert made["failed"] == {"conv": "failed: RuntimeError an illegal memory access"}
    assert "conv was not measured: failed: RuntimeError an illegal memory access." in tables.tables(made)


def test_ratios_and_floors_in_the_scan_table():
    r = {"what": "s", "part": "forward", "bytes": 3e9, "flops": 4e11, "failed": {"PyTorch": "out of memory"},
         "ms": {"nano2": 2.0, "mamba_ssm 64": 7.0, "mamba_ssm 128": 5.0},
         "spread": {"nano2": 0.01, "mamba_ssm 64": 0.5, "mamba_ssm 128": 0.02}}  # fmt: skip
    cells = tables.scan_table([r], TOP).splitlines()[-1].strip("| ").split(" | ")
    assert cells == ["s", "forward", "2.000", "5.000 (128)", "2.50", "out of memory", "-", "1.000 (bytes)", "1.50",
                     "200.00", "2.0%"]  # fmt: skip
    share = tables.share_table([{**r, "ms": {"nano2": 1.25}}], TOP, ["PyTorch"]).splitlines()[-1]
    assert share == "| s | forward | 1,250.0 | 80% | out of memory | - | 1.0% |"


# ---- RESULTS.md and refusals


def test_only_what_is_between_the_markers_changes():
    text = f"# R\n{START}\nold\n{END}\nrest\n"
    assert tables.rewrite(text, "new") == f"# R\n{START}\nnew\n{END}\nrest\n"
    for bad in ("", START, f"{END} {START}", text + text):
        with pytest.raises(ValueError, match="must hold <!-- bench kernels -->"):
            tables.rewrite(bad, "new")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("kernels", "PyTorch sees none"),
        ("kernels --only scan", "PyTorch sees none"),
        ("kernels --only scam", "invalid choice: 'scam'"),
        ("kernels --write", "must hold"),
        ("kernels --source nothing.json", "nothing.json cannot be used"),
        ("kernels --source empty.json", "empty.json cannot be used"),
        ("training", "--tiny runs anywhere"),
        ("training --tiny --preset nano-1m", "two models"),
        ("training --preset nano-2m", "invalid choice: 'nano-2m'"),
        ("training --rows 0", "'0' is not a whole number of at least 1"),
        ("training --steps x", "'x' is not a whole number"),
        ("training --impl cuda", "invalid choice: 'cuda'"),
        ("nothing", "invalid choice: 'nothing'"),
        ("", "required: COMMAND"),
    ],
)
def test_refusals_are_one_sentence(flags, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "RESULTS.md").write_text("no markers")
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert bench.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: ") and says in err.rstrip("\n") and err.count("\n") == 1
    assert (tmp_path / "RESULTS.md").read_text() == "no markers"


def test_a_record_is_written_into_results(record, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "RESULTS.md").write_text(f"before\n{START}\n{END}\nafter\n")
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert bench.main(["kernels", "--source", str(tmp_path / "r.json"), "--write"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == f"before\n{START}\n{tables.tables(record)}\n{END}\nafter\n"


# ---- training


@pytest.mark.parametrize("packed", [False, True])
def test_training_on_a_toy(packed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    found = training.run(
        impl="torch", rows=2, length=16, steps=2, profile=packed, packed=packed, tiny=True, say=said.append
    )
    assert found["tokens_per_second"] > 0 and math.isfinite(found["loss"]) and found["first_step_seconds"] > 0
    assert found["parameters"] == count_parameters(ModelConfig(**training.TINY))["total"]
    flops = 3 * flops_per_token(ModelConfig(**training.TINY), 16)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / 989e12)
    assert any(line.startswith("speed") for line in said) and ("kernels" in found) == packed
    assert not packed or "longest kernels:" in said[-1]


def test_rows_are_one_document_unless_packed():
    torch.manual_seed(0)
    ids, doc, kind = training.make_batch(2, 3000, 50, False, "cpu")
    assert doc.eq(0).all() and ids.shape == doc.shape == kind.shape and kind.unique().tolist() == [2]
    doc = training.make_batch(2, 3000, 50, True, "cpu")[1]
    assert 2 < doc[0].max() < 40 and (doc.diff() >= 0).all()


def test_kernels_find_their_groups():
    names = {
        "ssd_walk": "scan", "_chunk_scan_bwd_dc_kernel": "scan", "conv1d_backward": "conv", "norm_forward": "norm",
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matmul", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "elementwise", "decode_mixer_step": "decode",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matmul", "triton_red_fused_add_mean": "elementwise", "strange": "other",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer", "ssd_gather": "scan",
    }  # fmt: skip
    assert {name: training.group_of(name) for name in names} == names
    text = training.profile_table({"ssd_walk": 3.0, "ssd_mix": 2.0, "strange": 5.0}, 12.0, top=2)
    assert "scan              5.00 ms   50.0%" in text and "ssd_mix" not in text and "10.0 ms of kernels" in text


def test_kernels_are_named_after_their_file(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    from kernels import conv1d, norm

    for module in (conv1d, norm):
        monkeypatch.setattr(module._forward, "_repr", None, raising=False)
    monkeypatch.setattr(jit, "JITFunction", type(norm._forward))  # in the interpreter they are of another class
    training.name_kernels()
    assert [module._forward._repr(None) for module in (conv1d, norm)] == ["conv1d_forward", "norm_forward"]


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--impl triton cannot be had"):
        choose_impl("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="--impl triton cannot be had"):
        training.run(impl="triton", tiny=True)


def test_the_head_start_is_that_of_the_slowest_to_launch():
    """On a toy without a GPU: who cannot be measured is out, and all others get the same."""
    bench, given = timing.Bench("cpu", torch.float32, 2), []
    quick, slow, broken = (lambda: 1), (lambda: 2), (lambda: 3)

    def wipes_over(run):
        if run is broken:
            raise RuntimeError("no kernel")
        return {quick: 2, slow: 5}[run]

    bench.wipes_over = wipes_over
    bench.once = lambda run, clears: (given.append((run(), clears)), (0.0, 1.0))[1]
    found = bench.race({"quick": quick, "broken": broken, "slow": slow})
    assert set(given) == {(1, 5), (2, 5)} and set(found["ms"]) == {"quick", "slow"}
    assert "no kernel" in found["failed"]["broken"]


def test_fp8_tables_are_those_of_the_record(capsys, tmp_path, monkeypatch):
    """The committed record gives the committed tables; a toy run gives a record of the same form."""
    results = (measure.ROOT / "RESULTS.md").read_text("utf-8")
    assert bench.main(["fp8", "--source", str(measure.ROOT / "assets" / "fp8.json")]) == 0
    assert capsys.readouterr().out.strip() in results
    assert bench.main(["fp8", "--tiny", "--out", str(tmp_path / "r.json"), "--commit", "abc"]) == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "commit abc" in printed and eight_bits.tables(record) in printed
    assert all(row["ms"].keys() == {"bf16", "trained", "fp8", "products", "quantising"} for row in record["layers"])
    plain, eight = (row["losses"] for row in record["steps"])
    assert plain != eight and plain == pytest.approx(eight, rel=0.01)
    (tmp_path / "bad.json").write_text('{"layers": []}')
    (tmp_path / "half.json").write_text(json.dumps(record | {"steps": record["steps"][1:]}))  # nothing to compare with
    for source in ("nowhere.json", str(tmp_path / "bad.json"), str(tmp_path / "half.json")):
        assert bench.main(["fp8", "--source", source]) == 2
        assert f"--source {source}" in capsys.readouterr().err
    assert bench.main(["fp8", "--tiny", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["fp8"]) == 2
    assert "fp8 is measured on a Hopper GPU" in capsys.readouterr().err


def test_fp8_shapes_are_those_of_the_12b():
    """By the formula: 8 of 136 matmuls stay, at either end in_proj, out_proj and an MLP's two."""
    found = eight_bits.shapes(PRESETS["nano-12b"])
    assert sum(count for _, count in found.values()) == 2 * 28 + 2 * 28 + 4 * 6 - 8
    assert found[5120, 22656] == ("in_proj", 26) and found[20480, 5120] == ("down_proj", 26)
    assert found[5120, 1024] == ("k_proj, v_proj", 12)


def test_products_that_are_no_numbers_are_not_timed(monkeypatch):
    real, calls = Recipe.product, []

    def broken(self, a, b, dtype):
        calls.append(0)
        return real(self, a, b, dtype) * (float("nan") if len(calls) == 2 else 1)  # dX only

    monkeypatch.setattr(Recipe, "product", broken)
    with pytest.raises(ValueError, match="off by nan from the emulated ones: not timed"):
        eight_bits.layer(timing.Bench("cpu", torch.bfloat16, 1), 64, 32, 16, "emulate")


def test_every_contestant_does_its_own_work(monkeypatch):
    """fp8: three matrices made codes both ways, and three products; the master weight is rounded from float32."""
    made, done, calls = [], [], {}
    both, product, real = Recipe._both, Recipe.product, timing.Bench.race
    monkeypatch.setattr(Recipe, "_both", lambda self, x, *given: (made.append(x), both(self, x, *given))[1])
    monkeypatch.setattr(Recipe, "product", lambda self, *given: (done.append(given), product(self, *given))[1])

    def race(self, contestants):
        for name, run in contestants.items():
            made.clear(), done.clear()
            found = run()
            calls[name] = len(made), len(done), [x.dtype for x in made]
            if name == "trained":
                calls["dtypes"] = [t.dtype for t in found]
        return real(self, contestants)

    monkeypatch.setattr(timing.Bench, "race", race)
    row = eight_bits.layer(timing.Bench("cpu", torch.bfloat16, 1), 64, 32, 16, "emulate")
    assert row["off"] == 0 and row["in"] == 64 and row["out"] == 32
    assert calls["fp8"] == (3, 3, [torch.bfloat16, torch.float32, torch.bfloat16])
    assert [calls[name][:2] for name in ("bf16", "trained", "products", "quantising")] == [
        (0, 0),
        (0, 0),
        (0, 3),
        (3, 0),
    ]
    assert calls["dtypes"] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_the_first_matmul_of_the_stack_stays(monkeypatch):
    converted = []
    real = eight_bits.fp8.convert_
    monkeypatch.setattr(
        eight_bits.fp8, "convert_", lambda stack, *a, **k: (real(stack, *a, **k), converted.append(stack))
    )
    eight_bits.steps(eight_bits.TINY_STACK, 1, 64, ("emulate",), 1, torch.device("cpu"), 1, False, lambda text: None)
    linears = [m for m in converted[0].modules() if isinstance(m, torch.nn.Linear)]
    assert [type(m) is torch.nn.Linear for m in linears] == [True] + [False] * (len(linears) - 1)


def test_training_on_two_processes(tmp_path):
    """Figures are of both together: twice the tokens, and each has its share of the peak."""
    script = tmp_path / "two.py"
    script.write_text(
        "import json, os, sys\n"
        "import parallel\n"
        "from benchmarks import training\n"
        "again, calls = parallel.recompute_layers, []\n"
        "parallel.recompute_layers = lambda model: (calls.append(0), again(model))\n"
        "found = training.run(rows=2, length=64, steps=2, tiny=True, engine='fsdp', recompute='layers')\n"
        "found['calls'] = len(calls)\n"
        "json.dump(found, open(sys.argv[1] + os.environ['RANK'], 'w'))\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(measure.ROOT))
    done = subprocess.run([*run, str(tmp_path / "found")], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fsdp: each of 2 holds one part in 2") == 1
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found{rank}").read_text())
        assert found["calls"] == 1 and math.isfinite(found["loss"])
        assert found["tokens_per_second"] == pytest.approx(2 * 2 * 64 / found["step_ms"] * 1e3)
        flops = 3 * flops_per_token(ModelConfig(**training.TINY), 64)
        assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / training.PEAK_FLOPS / 2)
