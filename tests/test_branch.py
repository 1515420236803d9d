"""A decay leg from a stable checkpoint: the same to the bit where it should be, another where it is told to be."""

import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file

import data
import train
from schedule import wsd

FLAGS = (
    "--device cpu --preset nano-1m --length 64 --batch-rows 2 --vocab 384 --data-rows 60 --text-share 0.3 --steps 20 "
    "--warmup 0.1 --decay 0.4 --lr 3e-3 --log-every 1 --sample-every 0 --eval-count 0 --phase-eval 0 --save-every 1000"
).split()
SHOWN = "--device cpu --log-every 1 --sample-every 0 --eval-count 0 --phase-eval 0".split()  # all that a leg needs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text and the data of a run, with phases and without."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{i} {i * i} all that is read is kept to the end\n" for i in range(300)))
    for phases in ("", "0.6,0.9"):
        flags = [*FLAGS, "--out", str(folder / f"data{phases}"), "--text", str(folder / "text.txt"), "--phases", phases]
        data.make(train.fill_in(train.parse(flags), train.torch.device("cpu")), 1, lambda text: None)
    return folder


@pytest.fixture
def go(capsys, monkeypatch):
    """go(*flags) runs `train.py`; returns what was printed. stop: after how many steps of this life."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags, code=0, stop=None):
        real, calls = train.train_step, []

        def step(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", step)
            got = train.main([str(flag) for flag in flags])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        return printed

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def trunk(home, go, tmp_path):
    """trunk("name", *flags) runs a trunk; returns its folder."""

    def grow(name, *flags, **how):
        out, phases = tmp_path / name, "0.6,0.9" if "--phases" in flags else ""
        shutil.copytree(home / f"data{phases}" / "data", out / "data", dirs_exist_ok=True)
        go(*FLAGS, "--out", out, "--text", home / "text.txt", *flags, **how)
        return out

    return grow


def same_state(one, two):
    a, b = (load_file(out / "training.safetensors") for out in (one, two))
    return a.keys() == b.keys() and all(train.torch.equal(a[k], b[k]) for k in a)


def rates(out):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {e["step"] - 1: e["lr"] / 3e-3 for e in lines if "loss" in e}


@pytest.mark.parametrize("phases", [(), ("--phases", "0.6,0.9")])
def test_a_leg_without_wishes_repeats_the_trunks_end_to_the_bit(trunk, go, phases):
    out = trunk("trunk", *phases)
    assert train.resume.peek_training(out / "stable.safetensors")["step"] == 12
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    printed = go("--branch", out, "--out", out.parent / "leg", *SHOWN)
    assert "stable.safetensors at step 12 of 20" in printed and same_state(out, out.parent / "leg")
    assert rates(out) == rates(out.parent / "leg") and len(rates(out)) == 20  # the log of the trunk comes along
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_shorter_and_a_longer_leg_of_another_shape(trunk, go):
    out = trunk("trunk")
    for steps in (15, 30):
        leg = out.parent / str(steps)
        printed = go("--branch", out, "--out", leg, "--steps", steps, "--decay-shape", "minus_sqrt", *SHOWN)
        assert f"stays to step 12 ({12 / steps:.0%}), falls to step {steps} (100%), minus_sqrt" in printed
        expected = [wsd(t, 20, 0.1, 0.4) for t in range(13)]
        expected += [wsd(t, steps, 0, (steps - 12) / steps, shape="minus_sqrt") for t in range(13, steps)]
        assert list(rates(leg).values()) == pytest.approx(expected) and not same_state(out, leg)
    leg = out.parent / "later"  # stays up for longer, then falls; it keeps a stable state of its own
    go("--branch", out, "--out", leg, "--steps", "30", "--decay", "0.2", *SHOWN)
    assert rates(leg)[24] == 1.0 > rates(leg)[25]
    assert train.resume.peek_training(leg / "stable.safetensors")["step"] == 24


def test_a_leg_resumes_to_the_bit_without_its_trunk(trunk, go):
    out = trunk("trunk", "--phases", "0.6,0.9")
    flags = "--branch", out, "--steps", "32", "--decay-shape", "cosine", *SHOWN
    printed = go(*flags, "--out", out.parent / "whole")
    assert "2 from step 12 (38%), 3 from step 27 (84%)" in printed  # 18 of 12 to 20 is 27 of 12 to 32
    go(*flags, "--out", out.parent / "cut", stop=15)  # the boundary
    shutil.rmtree(out)
    assert "resume    at step 27 of 32" in go(*flags, "--out", out.parent / "cut")
    assert same_state(out.parent / "whole", out.parent / "cut")
    assert rates(out.parent / "whole") == rates(out.parent / "cut")
    printed = go(*flags, "--out", out.parent / "cut", "--steps", "40", code=2)
    assert "holds a run with other settings (steps 32 -> 40)" in printed
    printed = go(*flags, "--out", out.parent / "cut", "--weight-decay", "0.3", code=2)
    assert "--weight-decay 0.3 cannot be another than its trunk's (0.1)" in printed
    go(*flags, "--out", out.parent / "cut", "--warmup", "0.1")  # the trunk's own, said again


def test_a_run_stopped_in_its_stable_phase_and_one_of_constant_rate_can_be_branched(trunk, go):
    stopped = trunk("stopped", stop=7)
    leg = stopped.parent / "leg"
    assert "training.safetensors at step 7 of 10" in go("--branch", stopped, "--out", leg, "--steps", "10", *SHOWN)
    assert rates(leg)[7] == 1.0 > rates(leg)[8] > rates(leg)[9]
    constant = trunk("constant", "--decay", "0")
    assert not (constant / "stable.safetensors").exists()
    leg = constant.parent / "fallen"
    go("--branch", constant, "--out", leg, "--steps", "25", *SHOWN)
    assert rates(leg)[20] == 1.0 > rates(leg)[21] and len(rates(leg)) == 25


def test_what_is_no_branch_is_refused_with_a_sentence(trunk, go, home, tmp_path):
    out, new = trunk("trunk"), tmp_path / "new"
    for flags, words in [
        (("--branch", tmp_path / "none"), "holds no run"),
        (("--branch", out, "--out", out), "is --out itself"),
        (("--branch", out, "--lr", "1e-3"), "--lr 0.001 cannot be another than its trunk's (0.003)"),
        (("--branch", out, "--phases", "0.6,0.9"), "--phases 0.6,0.9 cannot be another than its trunk's ()"),
        (("--branch", out, "--steps", "12"), "--steps 12 is not behind the branch at step 12"),
        (("--branch", out, "--decay", "0.5"), "would begin at step 10, before the branch at step 12: give at most 0.4"),
    ]:
        printed = go("--out", new, *SHOWN, *flags, code=2)
        assert words in printed and printed.count("\n") == 1 and not new.exists()
    (out / "stable.safetensors").unlink()
    assert "its rate fell from step 12 on" in go("--branch", out, "--out", new, *SHOWN, code=2)
    rising = trunk("rising", "--warmup", "0.5", stop=4)
    assert "where its rate still rises" in go("--branch", rising, "--out", new, *SHOWN, code=2)
    assert not new.exists()


def test_a_leg_reads_the_trunks_data_or_none(trunk, go):
    out = trunk("trunk")
    meta = out / "data" / "meta.json"
    shutil.copytree(out, out.parent / "other")
    meta.write_text(meta.read_text().replace('"seed": 0', '"seed": 1'))  # what is there was made in another way ...
    state = train.resume.peek_training(out / "stable.safetensors")
    assert state["data"] != data.fingerprint(out / "data")
    printed = go("--branch", out, "--out", out.parent / "leg", *SHOWN)  # ... so it is made again as it was
    assert "data: 1/1 shards" in printed and same_state(out, out.parent / "leg")
