"""Several processes: the same losses, the same files, whoever holds what; and what a step needs in memory."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import ours
from safetensors.torch import load_file

import checkpoint
import data
import parallel
import train
from generate import answer
from mamba2 import Mamba2Mixer
from model import PRESETS, Block
from parallel import kept_bytes, training_bytes

CPU = torch.device("cpu")
TEXT = "the rows of a table are read from the left to the right, and what is read is kept until the end of the line\n"
FLAGS = (
    "--device cpu --preset nano-1m --length 64 --batch-rows 4 --vocab 384 --data-rows 40 --text-share 0.3 --lr 2e-4 "
    "--save-every 25 --log-every 1 --sample-every 0 --eval-count 0 --dtype float32"
).split()


# ---------------------------------------------------------------------------------------------------------------------
# Runs of one and of two processes


STOPPING = """
import os, signal, sys, train

real, calls = train.train_step, []

def step(*args):
    calls.append(0)
    if len(calls) == int(os.environ["STOP"]) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args)

train.train_step = step
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch("name", processes, *flags) runs train.py in the folder of that name, as new or as it was left, and returns
    the folder. stop: the step, counted from here, in which Ctrl-C is pressed."""
    root = tmp_path_factory.mktemp("runs")
    (root / "stopping.py").write_text(STOPPING)
    (root / "text.txt").write_text("".join(f"{i} {i * i} {TEXT}" for i in range(150)))
    base = [*FLAGS, "--text", str(root / "text.txt")]
    data.make(train.fill_in(train.parse([*base, "--out", str(root / "made")]), CPU), 1, lambda text: None)

    def go(name, processes, *flags, stop=0):
        out = root / name
        if not out.exists():
            shutil.copytree(root / "made" / "data", out / "data")
        distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(distributed if processes > 1 else []), str(root / "stopping.py"), *base]
        source = str(Path(train.__file__).parent)
        environment = dict(os.environ, OMP_NUM_THREADS="1", STOP=str(stop), PYTHONPATH=source)
        done = subprocess.run(
            [*command, "--out", str(out), *flags], capture_output=True, text=True, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (out / "printed").write_text(done.stdout)
        return out

    return go


@pytest.fixture(scope="module")
def one(launch):
    return launch("one", 1, "--steps", "50")


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["norm"]) for line in lines if "loss" in line}


def same(first, second, steps, weights=2e-4):
    """Losses and norms of every step, and every tensor that the two runs saved."""
    a, b = losses(first), losses(second)
    assert list(a) == list(b) == list(range(1, steps + 1))
    for step in a:
        assert a[step] == pytest.approx(b[step], rel=1e-4), step
    for name, limit in (("model.safetensors", weights), ("training.safetensors", weights)):
        x, y = load_file(first / name), load_file(second / name)
        assert x.keys() == y.keys()
        for key in x:
            if not key.startswith("random"):
                torch.testing.assert_close(x[key], y[key], rtol=0, atol=limit, msg=key)


def test_two_fsdp_processes_have_the_losses_of_one(launch, one):
    """With parts, and with layers computed again: 50 steps."""
    two = launch("two", 2, "--steps", "50", "--parallel", "fsdp", "--accumulate", "2", "--recompute", "layers")
    printed = (two / "printed").read_text()
    assert "fsdp: each of 2 holds one part in 2; layers keep their input only" in printed
    assert printed.count("step    50/50") == 1 and "held-out text: text" in printed
    assert losses(one)[50][0] < 0.7 * losses(one)[1][0]
    same(one, two, 50)
    model, tokenizer = checkpoint.load_pretrained(two)
    assert answer(model, tokenizer, "What is 1 + 2?", max_new_tokens=3).ids


def test_a_run_goes_on_with_other_processes_and_another_engine(launch):
    """From two to one, from one to two, from FSDP to DDP: ten steps in four lives are ten steps in one."""
    whole = launch("ten", 1, "--steps", "10")
    lives = [(2, "fsdp", 3), (1, "ddp", 3), (2, "fsdp", 2), (2, "ddp", 0)]
    at = 0
    for processes, engine, steps in lives:
        out = launch("lives", processes, "--steps", "10", "--parallel", engine, stop=steps)
        assert ("resume    at step" in (out / "printed").read_text()) == (at > 0)
        at = at + steps if steps else 10
        assert train.resume.peek_training(out / "training.safetensors")["step"] == at
        assert checkpoint.load_pretrained(out)[1].vocab_size == 384
    same(whole, out, 10, weights=5e-5)
    assert not list(out.glob(".*"))  # nothing half written


# ---------------------------------------------------------------------------------------------------------------------
# Two processes without a run: what each holds, and bfloat16

HELD = """
import json, os, sys
import torch, torch.distributed as dist
import fp8, parallel, train
from reference import ours
from test_train import packed_batch

dist.init_process_group("gloo")
rank, told = dist.get_rank(), {}
cases = [("fsdp", torch.float32, ""), ("fsdp", torch.bfloat16, ""), ("ddp", torch.bfloat16, "")]
cases += [("fsdp", torch.bfloat16, " fp8"), ("ddp", torch.bfloat16, " fp8")]
for engine, dtype, eight in cases:
    model = ours()
    if eight:
        fp8.convert_(model.backbone.layers, first=0, last=0)
    objective = parallel.divide(train.Objective(model, torch.ones(263)), engine, torch.device("cpu"), dtype, 2)
    optimizer = train.make_optimizer(model, 1e-3, 0.1)
    batch = [t[rank::2] for t in packed_batch(8, 29)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = lambda: torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    dtypes = {}
    def look(mixer, *_):
        dtypes.update({n: str(p.dtype) for n, p in mixer.named_parameters()})
    model.backbone.layers[0].mixer.norm.register_forward_pre_hook(lambda *_: look(model.backbone.layers[0].mixer))
    sums, norm = train.train_step(objective, optimizer, scaler, batch, train.TrainConfig(), autocast, 2)
    dist.all_reduce(sums)
    local = lambda t: getattr(t, "_local_tensor", t).numel()
    told[f"{engine} {dtype}{eight}"] = dict(
        held=sum(local(p) for p in model.parameters()),
        moments=sum(local(v) for s in optimizer.state.values() for v in s.values() if v.dim()),
        master=sorted({str(p.dtype) for p in model.parameters()}),
        loss=(sums[0] + sums[1]).item(), norm=norm.item(), dtypes=dtypes,
    )
    copy = parallel.plain_copy(model, rank)
    assert (copy is None) == (rank == 1)
    if rank == 0:
        told[f"{engine} {dtype}{eight}"]["copy"] = sum(p.numel() for p in copy.parameters())
everyone = [None, None]
dist.all_gather_object(everyone, told)
if rank == 0:
    json.dump(everyone, open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
"""


def test_what_each_process_holds_and_what_is_rounded(tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    here = Path(__file__).parent
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += [str(tmp_path / "held.py"), str(tmp_path / "told.json")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    total = sum(p.numel() for p in ours().parameters())
    kinds = [("fsdp", "torch.float32"), ("fsdp", "torch.bfloat16"), ("ddp", "torch.bfloat16")]
    for engine, dtype in [*kinds, ("fsdp", "torch.bfloat16 fp8"), ("ddp", "torch.bfloat16 fp8")]:
        both = [rank[f"{engine} {dtype}"] for rank in told]
        assert all(rank["master"] == ["torch.float32"] for rank in both) and both[0]["copy"] == total
        share = 1 if engine == "ddp" else 0.5
        for rank in both:
            assert rank["held"] == pytest.approx(share * total, rel=0.01)
            assert rank["moments"] == 2 * rank["held"]
        assert sum(rank["held"] for rank in both) == 2 * share * total
        rounded = {name for name, kind in both[0]["dtypes"].items() if kind == "torch.bfloat16"}
        assert rounded == (
            {"in_proj.weight", "out_proj.weight"} if (engine, dtype) == ("fsdp", "torch.bfloat16") else set()
        )
    for eight in ("", " fp8"):
        divided, doubled = (told[0][f"{engine} torch.bfloat16{eight}"] for engine in ("fsdp", "ddp"))
        assert divided["loss"] == pytest.approx(doubled["loss"], rel=1e-6)  # the same numbers, rounded before or after
        assert divided["norm"] == pytest.approx(doubled["norm"], rel=1e-3)
    assert divided["loss"] != told[0]["fsdp torch.bfloat16"]["loss"]
    assert told[0]["fsdp torch.bfloat16"]["loss"] != told[0]["fsdp torch.float32"]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are computed again


def saved_bytes(compute, parameters):
    """Bytes that `compute` keeps for its backward, each piece of memory once, parameters aside; and its result."""
    weights, kept, pieces = {p.untyped_storage().data_ptr() for p in parameters}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            pieces.append(tensor)  # alive, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return sum(kept.values()), result


def gradients(recompute):
    torch.manual_seed(0)
    model = ours(hybrid_override_pattern="M-M*-M-")
    if recompute:
        parallel.recompute_layers(model)
    ids, doc = torch.arange(2 * 96).view(2, 96) % 263, torch.arange(96).expand(2, 96) // 40
    kept, x = saved_bytes(lambda: model.features(ids, seq_idx=doc), model.parameters())
    x.square().sum().backward()
    return kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model


def test_layers_computed_again_keep_less_and_give_the_same_bits():
    plain, a, _ = gradients(False)
    again, b, model = gradients(True)
    assert a.keys() == b.keys() and len(a) > 30 and all(torch.equal(a[k], b[k]) for k in a)
    inputs = 7 * 2 * 96 * model.config.hidden_size * 4
    assert inputs <= again < 2 * inputs and again < plain / 8
    with torch.no_grad():  # asking is as it was
        ids = torch.arange(9)[None]
        assert torch.equal(model(ids), ours_like(model)(ids))


def ours_like(model):
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("letter", "M*-")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_a_layer_keeps_is_what_the_formula_says(letter, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    config, length = replace(PRESETS["nano-1m"], chunk_size=64), 128
    block = Block(config, letter)
    for module in block.modules():
        if hasattr(module, "impl"):
            module.impl = impl
    x = torch.randn(2, length, config.hidden_size, requires_grad=True)
    doc, mask = torch.zeros(2, length, dtype=torch.int64), torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    kept, _ = saved_bytes(lambda: block(x, None, 0, doc, mask), block.parameters())
    assert kept / (2 * length) == pytest.approx(
        kept_bytes(config, letter, length, 4, impl), rel=0.15 if isinstance(block.mixer, Mamba2Mixer) else 0.01
    )


def test_the_memory_formula():
    config, tokens = PRESETS["nano-12b"], 8192
    parts = {}
    for engine in parallel.ENGINES:
        for recompute in parallel.RECOMPUTE:
            parts[engine, recompute] = p = training_bytes(config, tokens, 8192, 2, 2, engine, recompute)
            assert p["total"] == sum(size for name, size in p.items() if name != "total")
            held = p["weights"] + p["gradients"] + p["adam"]
            assert held == 16 * 12_310_001_152 // (2 if engine == "fsdp" else 1)
    full, again = parts["fsdp", "off"]["activations"], parts["fsdp", "layers"]["activations"]
    inputs = 62 * 5120 * 4 * tokens
    assert inputs < again < full / 5 and full == parts["ddp", "off"]["activations"]
    assert parts["fsdp", "layers"]["total"] < 139 * 2**30 < parts["ddp", "layers"]["total"]
    eight = [training_bytes(config, tokens, 8192, 2, 2, "fsdp", r, fp8=True)["activations"] for r in ("off", "layers")]
    assert eight[0] - full > 10e9 > 1e9 > eight[1] - again > 0  # codes of all matrices; of one layer
    one = training_bytes(PRESETS["nano-1m"], 512, 256)
    assert (
        one["gathered"] == 0 and training_bytes(PRESETS["nano-1m"], 1024, 256)["activations"] == 2 * one["activations"]
    )
    assert "a process: weights 3." in parallel.describe_memory(one) and "MiB" in parallel.describe_memory(one)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_flags_that_cannot_be_had(capsys, tmp_path, monkeypatch):
    said = [
        ("--parallel zero", "--parallel 'zero' is not one of ddp, fsdp"),
        ("--recompute all", "--recompute 'all' is not one of off, layers"),
        (
            "--preset nano-12b --vocab 131072",
            "--preset nano-12b needs 183.4 GiB for weights, gradients and optimizer alone",
        ),
    ]
    monkeypatch.setattr(parallel, "room_gib", lambda device: 100.0)
    for flags, words in said:
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert train.main(["--device", "cpu", "--out", str(tmp_path / "o"), *flags.split()]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="fsdp does not scale losses, which --dtype float16 needs: use bfloat16"):
        parallel.check("fsdp", "off", torch.float16, 2)
    assert parallel.check("fsdp", "off", torch.float16, 1).startswith("one process")


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(parallel, "room_gib", lambda device: 150.0)
    gpu = torch.device("cuda", 0)
    half = training_bytes(PRESETS["nano-12b"], 64, 64, 2, 2, "fsdp")
    parallel.check_room(half, gpu, 2, "nano-12b")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="needs 183.4 GiB .* and cpu has 150.0 GiB"):
        parallel.check_room(half, CPU, 2, "nano-12b")
