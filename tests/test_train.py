"""The main job: schedule, optimizer, gradients that do not depend on the split, runs that are stopped and go on."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import ours
from safetensors.torch import load_file

import checkpoint
import data
import device as machine
import train
from generate import answer
from model import PRESETS, build
from train import Objective, TrainConfig, fill_in, make_optimizer, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def handlers():
    """A run takes over two signals: give them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and optimizer


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = ours(attention_bias=True, mlp_bias=True, use_bias=True)
    optimizer = make_optimizer(model, 0.3, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(decayed + rest) == sorted(names.values())
    spared = [n for n in names.values() if n.endswith((".A_log", ".D", "bias")) or "norm" in n]
    assert sorted(rest) == sorted(spared)
    for kind in (".A_log", ".D", ".dt_bias", "conv1d.bias", "q_proj.bias", "up_proj.bias", "in_proj.bias",
                 "mixer.norm.weight", "0.norm.weight", "norm_f.weight"):  # fmt: skip
        assert any(n.endswith(kind) for n in rest), kind
    assert {"backbone.embeddings.weight", "lm_head.weight", "backbone.layers.0.mixer.conv1d.weight"} <= set(decayed)


# ----------------------------------------------------------------------------------------------------------------------
# One step


def packed_batch(rows, length, vocab=263, seed=0):
    """Random rows of documents with all three kinds of marks, unequally many in each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (rows, length))
    doc = np.sort(rng.integers(0, 4, (rows, length)), 1)
    kind = rng.choice([0, 0, 1, 2], (rows, length)) * (rng.random((rows, 1)) < 0.8)
    kind[0] = 1
    return [torch.from_numpy(a) for a in (ids, doc, kind.astype(np.uint8))]


def test_the_objective_is_five_sums():
    model, sizes = ours().double(), torch.rand(263)
    ids, doc, kind = packed_batch(3, 37)
    logp = model(ids, seq_idx=doc).log_softmax(-1)
    expected = [0.0] * 5
    for row in range(3):
        for t in range(1, 37):
            mark, nll = kind[row, t].item(), -logp[row, t - 1, ids[row, t]].item()
            if mark:
                expected[mark - 1] += nll
                expected[mark + 1] += 1
                expected[4] += sizes[ids[row, t]].item() * (mark == data.TEXT)
    assert Objective(model, sizes)(ids, doc, kind).tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[3] > 5


def gradient(accumulate, scale=None):
    """Gradient before the step, weights after it, statistics and norm."""
    model, config = ours(), TrainConfig(accumulate=accumulate, clip=1e9)
    optimizer, seen = make_optimizer(model, 1e-3, 0.1), {}
    enabled = dict(enabled=scale is not None, init_scale=scale or 1.0)
    scaler = torch.amp.GradScaler("cpu", **enabled)
    keep = lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    optimizer.register_step_pre_hook(keep)
    total, norm = train_step(
        Objective(model, torch.ones(263)), optimizer, scaler, packed_batch(8, 29), config, nullcontext, 1
    )
    assert all(p.grad is None for p in model.parameters())
    return seen, dict(model.named_parameters()), total, norm


@pytest.mark.parametrize("accumulate,scale", [(2, None), (4, None), (8, None), (2, 1024.0)])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(accumulate, scale):
    (whole, weights, sums, norm), (parts, weights2, sums2, norm2) = gradient(1), gradient(accumulate, scale)
    largest = max(g.abs().max() for g in whole.values())
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-5, atol=1e-6 * largest.item())
        clear = whole[name].abs() > 1e-4 * largest  # where the gradient is rounding noise, Adam's first step is too
        torch.testing.assert_close(weights[name][clear], weights2[name][clear], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums, sums2, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(norm, norm2, rtol=1e-5, atol=0)
    mean = (sums[0] + sums[1]) / (sums[2] + sums[3])
    assert 1 < mean < 20 and norm > 1e-3


def test_the_gradient_is_of_the_mean_and_is_clipped():
    whole, _, sums, norm = gradient(1)
    model = ours()
    ids, doc, kind = packed_batch(8, 29)
    logp = model(ids, seq_idx=doc)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    (-logp[kind[:, 1:] > 0].mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.grad, rtol=1e-4, atol=1e-5 * norm.item())
    model, seen = ours(), []
    optimizer = make_optimizer(model, 1e-3, 0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    objective, config = Objective(model, torch.ones(263)), TrainConfig(clip=0.01)
    _, told = train_step(objective, optimizer, scaler, packed_batch(8, 29), config, nullcontext, 1)
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3) and told.item() == pytest.approx(norm.item(), rel=1e-5)


def test_a_step_that_overflows_is_left_out_and_the_loss_scale_halved():
    model = ours()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**16), make_optimizer(model, 1e-3, 0.1)
    overflow = model.lm_head.weight.register_hook(lambda gradient: gradient + torch.inf)
    given = Objective(model, torch.ones(263)), optimizer, scaler, packed_batch(4, 29), TrainConfig(), nullcontext, 1
    train_step(*given)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()) and scaler.get_scale() == 2.0**15
    overflow.remove()
    train_step(*given)
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters()) and scaler.get_scale() == 2.0**15


def test_it_learns_a_handful_of_rows():
    torch.manual_seed(0)
    model = ours()
    batch, config = packed_batch(4, 33, vocab=40), TrainConfig(accumulate=2)
    objective, optimizer = Objective(model, torch.ones(263)), make_optimizer(model, 3e-3, 0.1)
    scaler, losses = torch.amp.GradScaler("cpu", enabled=False), []
    for _ in range(40):
        sums, _ = train_step(objective, optimizer, scaler, batch, config, nullcontext, 1)
        losses.append(((sums[0] + sums[1]) / (sums[2] + sums[3])).item())
    assert losses[-1] < 0.5 * losses[0], losses


# ----------------------------------------------------------------------------------------------------------------------
# Device and number format


def test_bfloat16_is_chosen_by_compute_capability(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a: True)  # as on a T4, where it is emulated
    for capability, expected in [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, it=capability: it)
        dtype, reason = machine.choose_dtype("auto", gpu)
        assert dtype == expected and f"compute capability {capability[0]}.{capability[1]}" in reason
    assert machine.choose_dtype("float32", gpu) == (torch.float32, "asked for")
    assert machine.choose_dtype("float16", gpu)[0] == torch.float16


def test_a_cpu_takes_bfloat16_only_where_it_is_fast(monkeypatch):
    for flags, expected in [
        (["sse", "amx_bf16"], torch.bfloat16),
        (["avx512_bf16"], torch.float32),
        ([], torch.float32),
    ]:
        monkeypatch.setattr(machine, "_cpu_flags", lambda it=flags: it)
        dtype, reason = machine.choose_dtype("auto", CPU)
        assert dtype == expected and "AMX" in reason
    assert machine.choose_dtype("bfloat16", CPU) == (torch.bfloat16, "asked for")
    with pytest.raises(ValueError, match="needs a GPU"):
        machine.choose_dtype("float16", CPU)


def test_the_device_and_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == (CPU, "PyTorch sees no CUDA device")
    assert machine.choose_device("cpu") == (CPU, "asked for")
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpu = torch.device("cuda", 3)
    assert machine.choose_device("auto") == machine.choose_device("cuda") == (gpu, "NVIDIA H100 80GB HBM3")
    assert used == [3, 3] and machine.choose_device("cpu")[0] == CPU
    assert machine.peak_flops(gpu) == 989e12 and machine.peak_flops(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA GeForce GTX 1080")
    assert machine.peak_flops(gpu) is None


def test_memory():
    assert 0.1 < machine.memory_gib(CPU) < machine.room_gib(CPU)


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_the_preset_fills_what_was_not_given():
    assert fill_in(TrainConfig(), CPU).preset == "nano-1m"
    assert fill_in(TrainConfig(), torch.device("cuda")).preset == "nano-12m"
    for preset in PRESETS:
        filled = fill_in(TrainConfig(preset=preset, steps=7), CPU)
        assert filled.steps == 7 and None not in {getattr(filled, f.name) for f in fields(filled) if f.name != "text"}
    assert fill_in(TrainConfig(data_rows=3, batch_rows=10), CPU).data_rows == 10


def test_every_setting_is_a_flag_with_a_help(capsys):
    assert train.parse([]) == TrainConfig()
    given = train.parse("--steps 3 --lr 1e-3 --text a/b --weight-decay 0 --preset nano-9m".split())
    assert given == TrainConfig(steps=3, lr=1e-3, text="a/b", weight_decay=0.0, preset="nano-9m")
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0 and "steps between saves (suits the preset)" in text
    assert all(f"--{f.name.replace('_', '-')} " in text for f in fields(TrainConfig))


# ----------------------------------------------------------------------------------------------------------------------
# Runs

TEXT = "the rows of a table are read from the left to the right, and what is read is kept until the end of the line\n"
FLAGS = (
    "--device cpu --preset nano-1m --length 96 --batch-rows 2 --vocab 384 --data-rows 15 --text-share 0.3 "
    "--steps 20 --save-every 6 --log-every 4 --sample-every 0 --eval-count 0"
).split()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a text and the data made from it, so that no run has to make them again."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{i} {i * i} {TEXT}" for i in range(150)))
    config = train.parse([*FLAGS, "--out", str(folder), "--text", str(folder / "text.txt")])
    data.make(fill_in(config, CPU), 1, lambda text: None)
    return folder


@pytest.fixture
def start(prepared, tmp_path, capsys):
    """start("name", *flags) runs `train.py` in this process; returns (exit code, out folder, what was printed)."""

    def go(name, *flags, code=0):
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(prepared / "data", out / "data")
        made = (out / "data" / "meta.json").stat().st_mtime_ns
        got = train.main([*FLAGS, "--out", str(out), "--text", str(prepared / "text.txt"), *flags])
        printed = capsys.readouterr()
        assert got == code, printed
        assert (out / "data" / "meta.json").stat().st_mtime_ns == made
        return out, printed.out + printed.err

    return go


def interrupt(monkeypatch, at, what=lambda: os.kill(os.getpid(), signal.SIGINT)):
    """Let something happen in the middle of step `at` of the next run, counted from the run's beginning."""
    real, patch = train.train_step, pytest.MonkeyPatch()
    calls = []

    def step(*args):
        calls.append(args)
        if len(calls) == at:
            patch.undo()
            what()
        return real(*args)

    patch.setattr(train, "train_step", step)


def logged(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def test_a_run_from_beginning_to_end(start):
    out, printed = start("whole", "--eval-count", "1", "--sample-every", "10", "--steps", "20")
    for words in ("device    cpu (asked for", "matrix products (", "nano-1m: M-M*-M-", "2 rows of 96 = 192 tokens",
                  "compile   off", "schedule  rate stays to step 12 (60%), falls to step 20 (100%), linear",
                  "step    20/20  loss", "<think>", "held-out text: text", "bits/byte", "tok/s",
                  "needle      retrieval", "all done in", f"generate.py --checkpoint {out}"):  # fmt: skip
        assert words in printed, words
    lines, (end,) = logged(out)
    assert [line["step"] for line in lines] == [1, 4, 8, 12, 16, 20]
    assert [line["tokens"] for line in lines] == [192 * line["step"] for line in lines]
    for line in lines:
        assert all(math.isfinite(line[k]) for k in ("loss", "task_loss", "bits_per_byte", "norm", "lr", "seconds"))
        assert line["tokens_per_second"] > 0 and line["memory_gib"] > 0 and 0 <= line["waiting"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"] and end["step"] == 20 and len(end["accuracy"]) == 15
    assert set(os.listdir(out)) == {"config.json", "curve.png", "data", "log.jsonl", "model.safetensors",
                                    "stable.safetensors", "tokenizer.json", "tokenizer_config.json",
                                    "training.safetensors"}  # fmt: skip
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = checkpoint.load_pretrained(out)
    assert tokenizer.vocab_size == 384 and answer(model, tokenizer, "What is 1 + 2?", max_new_tokens=3).ids


def test_twenty_steps_equal_ten_and_ten_more_to_the_bit(start, monkeypatch):
    whole, _ = start("whole")
    interrupt(monkeypatch, 10)
    # what is shown on the way may differ, and neither answering questions nor the lines of the log change the weights
    shown = ["--sample-every", "3", "--log-every", "5", "--save-every", "4"]
    halves, printed = start("halves", *shown)
    assert "stopped at step 10; saved in" in printed and "The same command goes on: python " in printed
    assert checkpoint.load_pretrained(halves)[1].vocab_size == 384  # what was stopped can already be asked
    assert train.resume.peek_training(halves / "training.safetensors")["step"] == 10
    _, printed = start("halves", *shown)
    assert "resume    at step 10 of 20" in printed
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    a, b = (load_file(out / "training.safetensors") for out in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any("exp_avg." in k for k in a)
    lines, ends = logged(halves)
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20] and len(ends) == 1
    assert [line["lr"] for line in lines[-1:]] == [logged(whole)[0][-1]["lr"]]
    assert sorted(os.listdir(whole)) == sorted(os.listdir(halves))


def test_a_crash_goes_back_to_the_last_save(start, monkeypatch):
    class Power(BaseException):
        pass

    def fail():
        raise Power

    whole, _ = start("whole", "--steps", "13", "--save-every", "5")
    interrupt(monkeypatch, 9, fail)
    with pytest.raises(Power):
        start("cut", "--steps", "13", "--save-every", "5")
    out = whole.parent / "cut"
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n[]\n{"step": 10, "accur')  # logged after the save, and cut by the kill
    _, printed = start("cut", "--steps", "13", "--save-every", "5")
    assert "resume    at step 5 of 13" in printed
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert [line["step"] for line in logged(out)[0]] == [1, 4, 8, 12, 13]


def test_a_finished_run_only_tells_its_results_again(start, monkeypatch):
    out, first = start("done", "--steps", "5")
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")}
    monkeypatch.setattr(train, "train_step", lambda *a: pytest.fail("trained again"))
    _, again = start("done", "--steps", "5")
    results = [re.search(r"held-out text: .*", printed).group() for printed in (first, again)]
    assert results[0] == results[1] and "resume    at step 5 of 5" in again
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".safetensors", ".json")} == before
    lines, ends = logged(out)
    assert [line["step"] for line in lines] == [1, 4, 5] and len(ends) == 1


def test_a_crash_while_the_last_save_is_made_loses_nothing(start, monkeypatch):
    for name in ("save_pretrained", "save_training"):

        def fail(*args):
            if "step" not in args[-1] or args[-1]["step"] == 5:
                raise KeyboardInterrupt

        def fail_pretrained(*args):
            raise KeyboardInterrupt

        where = train.checkpoint if name == "save_pretrained" else train.resume
        real = getattr(where, name)
        patched = fail_pretrained if name == "save_pretrained" else lambda *a: fail(*a) or real(*a)  # noqa: B023
        with monkeypatch.context() as patch:
            patch.setattr(where, name, patched)
            out, _ = start(name, "--steps", "5", "--save-every", "2", code=130)
        start(name, "--steps", "5", "--save-every", "2")
        assert checkpoint.load_pretrained(out)[0].config.vocab_size == 384
    a, b = (load_file(out.parent / name / "model.safetensors") for name in ("save_pretrained", "save_training"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_setting_in_the_same_folder_is_refused(start):
    out, _ = start("one", "--steps", "2")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    _, printed = start("one", "--steps", "3", code=2)
    assert "holds a run with other settings (steps 2 -> 3)" in printed and printed.count("\n") == 1
    _, printed = start("one", "--steps", "2", "--lr", "1e-3", "--seed", "1", code=2)
    assert "lr 0.002 -> 0.001, seed 0 -> 1" in printed
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_eight_bits_and_resume_to_the_bit(start, monkeypatch):
    plain, printed = start("plain", "--steps", "8")
    assert "fp8       off (" in printed
    eight = ["--steps", "8", "--fp8", "emulate"]
    whole, printed = start("whole", *eight)
    linears = [m for m in build("nano-1m", "meta").backbone.layers.modules() if type(m) is torch.nn.Linear]
    for words in ("fp8       emulate (asked for", f"fp8       {len(linears) - 8} of {len(linears)} matmuls",
                  "the other 8", "192 tokens are no multiple of 128: the products over tokens",
                  "filled up to 256", "the saved weights are judged as they are"):  # fmt: skip
        assert words in printed, words
    interrupt(monkeypatch, 4)
    halves, _ = start("halves", *eight)
    convert, asked = train.fp8.convert_, []
    with monkeypatch.context() as patch:  # as if on another machine, which has tensor cores: it goes on with the run
        patch.setattr(train, "choose_fp8", lambda *given: ("real", "pretended"))
        patch.setattr(train.fp8, "convert_", lambda stack, recipe: asked.append(recipe) or convert(stack))
        halves, printed = start("halves", "--steps", "8", "--fp8", "real")
    assert asked == [train.fp8.Recipe(impl="real")] and "fp8       real (pretended)" in printed
    assert "resume    at step 4 of 8" in printed
    files = [(out / "model.safetensors").read_bytes() for out in (whole, halves, plain)]
    assert files[0] == files[1] != files[2]
    a, b = (load_file(out / "training.safetensors") for out in (whole, halves))
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    losses = [[line["loss"] for line in logged(out)[0]] for out in (whole, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    _, printed = start("halves", "--steps", "8", code=2)
    assert "holds a run with other settings (fp8 'on' -> 'off')" in printed


def test_a_folder_from_before_a_flag_goes_on(start, monkeypatch):
    whole, _ = start("whole", "--steps", "8")
    interrupt(monkeypatch, 4)
    save = train.resume.save_training

    def older(file, model, optimizer, loop):
        save(file, model, optimizer, loop | {"config": {k: v for k, v in loop["config"].items() if k != "fp8"}})

    with monkeypatch.context() as patch:
        patch.setattr(train.resume, "save_training", older)
        halves, _ = start("halves", "--steps", "8")
    assert "fp8" not in train.resume.peek_training(halves / "training.safetensors")["config"]
    _, printed = start("halves", "--steps", "8", "--fp8", "emulate", code=2)
    assert "(fp8 'off' -> 'on')" in printed
    start("halves", "--steps", "8")
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()


def test_a_folder_made_before_a_flag_is_resumed_with_its_default(start, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "NOT_THE_RUN", train.NOT_THE_RUN | {"decay_shape"})
        interrupt(monkeypatch, 14)
        out, _ = start("old")
    assert "decay_shape" not in train.resume.peek_training(out / "training.safetensors")["config"]
    _, printed = start("old", "--decay-shape", "cosine", code=2)
    assert "holds a run with other settings (decay_shape 'linear' -> 'cosine')" in printed
    whole, _ = start("whole")
    _, printed = start("old")
    assert "resume    at step 14 of 20" in printed and "begun before --decay-shape" in printed
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_shape_of_the_fall(start):
    rates = {}
    for shape in ("linear", "minus_sqrt"):
        out, printed = start(shape, "--decay-shape", shape, "--log-every", "1", "--warmup", "0.1")
        assert f"falls to step 20 (100%), {shape}" in printed
        rates[shape] = [line["lr"] / 2e-3 for line in logged(out)[0]]
        expected = [train.schedule.wsd(step, 20, 0.1, 0.4, shape=shape) for step in range(20)]
        assert rates[shape] == pytest.approx(expected)
    assert rates["linear"][:13] == rates["minus_sqrt"][:13] and rates["linear"][13] > rates["minus_sqrt"][13]
    _, printed = start("none", "--decay-shape", "steps", code=2)
    assert "--decay-shape 'steps' is not one of linear, cosine, exponential, minus_sqrt" in printed


def test_a_loss_that_is_no_number_ends_the_run(start, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (real(*a)[0] * float("nan"), torch.tensor(1.0)))
    _, printed = start("nan", code=2)
    assert "train.py: the loss is nan at step 1: lower --lr (now 0.002)" in printed


def test_all_text_and_no_text(start, tmp_path, prepared, capsys):
    for share in ("0", "1"):
        flags = [*FLAGS, "--text", str(prepared / "text.txt"), "--out", str(tmp_path / share), "--steps", "2"]
        assert train.main([*flags, "--text-share", share]) == 0
        line = logged(tmp_path / share)[0][-1]
        assert (line["task_loss"] > 0) == (share == "0") and (line["bits_per_byte"] is not None) == (share == "1")


def test_two_processes_train_the_same_model_as_one(start, prepared, tmp_path):
    """Gradients averaged over two gloo processes of two parts each, against one process with the whole batch."""
    flags = "--steps 3 --batch-rows 8 --dtype float32 --lr 2e-4 --warmup 0 --decay 0 --log-every 1".split()
    one, _ = start("one", *flags)
    shutil.copytree(prepared / "data", tmp_path / "two" / "data")
    script, text = str(Path(train.__file__)), str(prepared / "text.txt")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *FLAGS]
    run += [*flags, "--accumulate", "2", "--text", text, "--out", str(tmp_path / "two")]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "processes: 2" in done.stdout and done.stdout.count("step     3/3") == 1  # one of them talks
    a, b = (load_file(out / "model.safetensors") for out in (one, tmp_path / "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    for first, second in zip(logged(one)[0], logged(tmp_path / "two")[0], strict=True):
        for key in ("step", "tokens", "loss", "task_loss", "bits_per_byte", "norm", "lr"):
            assert first[key] == pytest.approx(second[key], rel=1e-4), key


def test_a_batch_that_two_processes_cannot_share(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(["--device", "cpu", "--batch-rows", "8", "--out", str(tmp_path / "o")]) == 2
    assert "--batch-rows 8 cannot be split over 3 processes times 1 parts" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
