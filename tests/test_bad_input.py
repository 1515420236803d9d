"""Bad input to the three scripts: each gets one sentence and exit code 2, and leaves nothing half-written.

What a notebook or a program can pass to the functions behind the scripts is in the tests of those files.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disk import largest_file
from reference import ours
from safetensors.torch import load_file, save_file
from scripted import ours_vocabulary

import data
import evaluate
import generate
import resume
import train
from checkpoint import save_pretrained

SCRIPTS = {"train": train.main, "generate": generate.main, "evaluate": evaluate.main}
TEXT = "".join(
    f"{i} the rows of a table are read from the left to the right, and kept until the end\n" for i in range(200)
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = ours_vocabulary()
    save_pretrained(path / "whole", ours(vocab_size=tokenizer.vocab_size, seed=3), tokenizer)
    save_pretrained(path / "sharded", ours(vocab_size=tokenizer.vocab_size, seed=3), tokenizer, max_shard_bytes=100_000)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, model_folder):
    """A working directory with good and bad files in it: m (a model), text.txt, and what each case names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(model_folder / "whole", tmp_path / "m")
    Path("text.txt").write_text(TEXT)
    Path("nothing.txt").touch()
    Path("blanks.txt").write_text(" \n" * 9000)
    Path("short.txt").write_text("too short")
    Path("binary.txt").write_bytes(bytes(range(256)) * 99)
    Path("nul.txt").write_bytes(b"text\0" * 9000)
    Path("latin1.txt").write_bytes("é".encode("latin-1") * 20_000)
    Path("folder").mkdir()
    Path("mixed").mkdir()
    shutil.copy("text.txt", "mixed/a.txt")
    shutil.copy("binary.txt", "mixed/b.bin")
    Path("mine").mkdir()
    Path("mine/training.safetensors").write_bytes(b"this is not a training file")
    Path("other").mkdir()
    resume.save_training("other/training.safetensors", ours(vocab_size=300), None, {"step": 3, "config": {"steps": 9}})
    Path("stage").mkdir()
    resume.save_training("stage/training.safetensors", ours(vocab_size=300), None, {"pairs": 3})
    return tmp_path


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(script, flags, says, capsys, folder):
    """One sentence on stderr that holds `says`, exit code 2, and not a file changed."""
    before = contents(folder)
    assert SCRIPTS[script](flags) == 2
    printed = capsys.readouterr()
    last = printed.err.rstrip("\n").splitlines()[-1]
    assert last.startswith(f"{script}.py: ") and len(last) > 25 and says in last, printed.err
    told = [line for line in printed.err.splitlines() if line == last or not line.startswith(("m: ", "device "))]
    assert told == [last] and "Traceback" not in printed.err + printed.out
    assert contents(folder) == before


# (flags, what the sentence says). All of them are told before a folder is made.
TRAIN = [
    ("--impl magic", "is not one of auto, torch, triton"),
    ("--preset nano-1g", "choose one of nano-1m"),
    ("--preset nano-12b", "GiB for weights"),
    ("--device cuda", "no CUDA device"),
    ("--device tpu", "auto, cpu, cuda"),
    ("--dtype int8", "float32, bfloat16, float16"),
    ("--dtype float16", "needs a GPU"),
    ("--compile maybe", "auto, on, off"),
    ("--steps 0", "at least 1; got 0"),
    ("--steps -1", "at least 1; got -1"),
    ("--steps many", "--steps"),
    ("--steps 1e3", "--steps"),
    ("--steps", "--steps"),
    ("--step 3", "--step"),
    ("--batch-rows 0", "--batch-rows"),
    ("--batch-rows 8 --accumulate 3", "--accumulate 3"),
    ("--accumulate 0", "--accumulate"),
    ("--length 10", "at least 64; got 10"),
    ("--length 64.5", "--length"),
    ("--lr 0", "above 0; got 0"),
    ("--lr -1", "above 0; got -1"),
    ("--lr nan", "above 0; got nan"),
    ("--lr inf", "above 0; got inf"),
    ("--clip 0", "--clip"),
    ("--weight-decay -0.1", "--weight-decay"),
    ("--weight-decay inf", "--weight-decay"),
    ("--warmup -0.5", "--warmup"),
    ("--warmup nan", "--warmup"),
    ("--warmup 0.7 --decay 0.7", "together at most 1"),
    ("--decay -1", "--decay"),
    ("--text-share 2", "between 0 and 1; got 2"),
    ("--text-share -0.1", "between 0 and 1"),
    ("--text-share nan", "between 0 and 1"),
    ("--vocab 100", "at least 272"),
    ("--vocab 0", "at least 272"),
    ("--vocab 2500", "lower it to"),
    ("--data-rows 0", "--data-rows"),
    ("--data-rows 1000000000000000", "free some space"),
    ("--seed -1", "--seed"),
    ("--seed 9223372036854775808", "--seed"),
    ("--log-every 0", "--log-every"),
    ("--sample-every -1", "--sample-every"),
    ("--save-every 0", "--save-every"),
    ("--eval-count -1", "--eval-count"),
    ("--vocab 280 --length 64", "too short"),
    ("--text no-such-file", "does not exist"),
    ("--text nothing.txt", "0 characters"),
    ("--text blanks.txt", "0 characters"),
    ("--text short.txt", "at least 10,000"),
    ("--text binary.txt", "not UTF-8"),
    ("--text latin1.txt", "byte 0"),
    ("--text nul.txt", "NUL"),
    ("--text folder", "0 files"),
    ("--text mixed", "b.bin is not UTF-8"),
    ("--text=", "--text is empty"),
    ("--out=", "--out is empty"),
    ("--out text.txt", "text.txt is a file"),
    ("--out text.txt/new", "text.txt is a file"),
    ("--out mine", "not a whole safetensors file"),
    ("--out other", "a run with other settings (preset 'auto' -> 'nano-1m'"),
    ("--out stage", "a run with other settings"),
    ("--out m/model.safetensors", "is a file"),
    ("--colour", "--colour"),
    ("extra", "extra"),
]
GENERATE = [
    ([""], "is empty"),
    ([" \t"], "is empty"),
    (["x", ""], "is empty"),
    (["x", "--thinking-budget", "-1"], "got -1"),
    (["x", "--thinking-budget", "two"], "--thinking-budget"),
    (["x", "--max-new-tokens", "0"], "got 0"),
    (["x", "--max-new-tokens", "200000"], "131072"),
    (["x", "--temperature", "-1"], "temperature"),
    (["x", "--temperature", "nan"], "temperature"),
    (["x", "--top-p", "0"], "top_p"),
    (["x", "--top-p", "1.5"], "top_p"),
    (["x", "--budget-rule", "soon"], "soon"),
    (["x", "--device", "cuda"], "no CUDA device"),
    (["x", "--device", "tpu"], "tpu"),
    (["x", "--dtype", "int8"], "int8"),
    (["x", "--checkpoint", "no-such-folder"], "does not exist"),
    (["x", "--checkpoint", "folder"], "config.json"),
    (["x", "--checkpoint", "text.txt"], "text.txt"),
    (["--file", "no-such-file"], "no-such-file"),
    (["--file", "folder"], "folder"),
    (["--file", "nothing.txt"], "is empty"),
    (["--file", "blanks.txt"], "is empty"),
    (["--file", "binary.txt"], "not UTF-8"),
    (["--file", "nul.txt"], "zero bytes"),
    (["--json"], "needs questions"),
    (["x", "--colour"], "--colour"),
    (["bad \udcff byte"], "UTF-8"),
]
EVALUATE = [
    ("--impl fast", "is not one of auto, torch, triton"),
    ("--count 0", "at least 1"),
    ("--count -3", "at least 1"),
    ("--count many", "--count"),
    ("--batch 0", "at least 1"),
    ("--families chess", "unknown task family 'chess'"),
    ("--families add chess", "choose one of add"),
    ("--device cuda", "no CUDA device"),
    ("--device tpu", "tpu"),
    ("--checkpoint no-such-folder", "no-such-folder"),
    ("--checkpoint folder", "config.json"),
    ("--checkpoint text.txt", "text.txt"),
    ("--colour", "--colour"),
]


@pytest.mark.parametrize("flags,says", TRAIN, ids=[flags for flags, _ in TRAIN])
def test_train_refuses(flags, says, here, capsys):
    usual = ["--device", "cpu", "--text", "text.txt", "--vocab", "320", "--out", "new", "--data-rows", "8"]
    refused("train", [*usual, *flags.split()], says, capsys, here)
    assert not Path("new").exists()


@pytest.mark.parametrize("flags,says", GENERATE, ids=[ascii(" ".join(flags)) for flags, _ in GENERATE])
def test_generate_refuses(flags, says, here, capsys):
    refused("generate", ["--checkpoint", "m", *flags], says, capsys, here)


@pytest.mark.parametrize("flags,says", EVALUATE, ids=[flags for flags, _ in EVALUATE])
def test_evaluate_refuses(flags, says, here, capsys):
    refused("evaluate", ["--checkpoint", "m", "--no-text", *flags.split()], says, capsys, here)


# ----------------------------------------------------------------------------------------------------------------------
# Model folders


def config(**changes):
    def damage(folder):
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (known | changes).items() if v != "gone"}))

    return damage


def tensors(change):
    def damage(folder):
        known = load_file(folder / "model.safetensors")
        change(known)
        save_file(known, folder / "model.safetensors")

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def gone(name):
    return lambda folder: (folder / name).unlink()


def sharded(then):
    def damage(folder):
        shutil.rmtree(folder)
        shutil.copytree(damage.source / "sharded", folder)
        then(folder)

    damage.sharded = True
    return damage


def second_shard(then):
    return sharded(lambda folder: then(sorted(folder.glob("model-*-of-*.safetensors"))[1]))


def bad_vocabulary(folder):
    known = json.loads((folder / "tokenizer.json").read_text())
    known["model"]["vocab"] = dict(list(known["model"]["vocab"].items())[:100])
    (folder / "tokenizer.json").write_text(json.dumps(known))


HEAD = "lm_head.weight"
FOLDERS = {
    "no config": (gone("config.json"), "config.json"),
    "config is not JSON": (write("config.json", b"{'a': 1}"), "not valid JSON"),
    "config is cut": (cut("config.json", 100), "not valid JSON"),
    "config is empty": (write("config.json", b""), "not valid JSON"),
    "config is binary": (write("config.json", bytes(range(128, 256))), "not valid JSON"),
    "config is a list": (write("config.json", b"[]"), "object"),
    "config without a size": (config(hidden_size="gone"), "hidden_size"),
    "unknown letters": (config(hybrid_override_pattern="M-X*-M-", num_hidden_layers=7), "X"),
    "experts": (config(hybrid_override_pattern="MEM*-M-", num_hidden_layers=7), "MoE"),
    "empty pattern": (config(hybrid_override_pattern="", num_hidden_layers=0), "hybrid_override_pattern"),
    "pattern of another length": (config(num_hidden_layers=9), "num_hidden_layers"),
    "negative size": (config(hidden_size=-64), "hidden_size"),
    "size is a text": (config(hidden_size="64"), "hidden_size"),
    "groups do not divide": (config(n_groups=3), "n_groups"),
    "another width": (config(hidden_size=96), "shape"),
    "tied embeddings": (config(tie_word_embeddings=True), "tie_word_embeddings"),
    "another model type": (config(model_type="llama"), "llama"),
    "no weights": (gone("model.safetensors"), "model.safetensors"),
    "weights are empty": (write("model.safetensors", b""), "safetensors"),
    "weights are cut": (cut("model.safetensors", 90_000), "cut short"),
    "header is cut": (cut("model.safetensors", 100), "cut short"),
    "weights are text": (write("model.safetensors", TEXT.encode()), "safetensors"),
    "a tensor is missing": (tensors(lambda t: t.pop(HEAD)), "lacks 1"),
    "a tensor too many": (tensors(lambda t: t.update(more=t[HEAD].clone())), "does not have"),
    "wrong shape": (tensors(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})), "shape"),
    "integers": (tensors(lambda t: t.update({HEAD: t[HEAD].to(torch.int32)})), "I32"),
    "no tokenizer": (gone("tokenizer.json"), "tokenizer"),
    "tokenizer is not JSON": (write("tokenizer.json", b"{"), "tokenizer"),
    "tokenizer is binary": (write("tokenizer.json", bytes(range(128, 256))), "tokenizer"),
    "tokenizer is empty": (write("tokenizer.json", b"{}"), "tokenizer"),
    "tokenizer has lost half": (bad_vocabulary, "tokenizer"),
    "a shard is missing": (second_shard(Path.unlink), "lacks 1 of the"),
    "a shard is cut": (second_shard(lambda path: path.write_bytes(path.read_bytes()[:5000])), "cut short"),
    "the index is broken": (sharded(write("model.safetensors.index.json", b"{")), "not valid JSON"),
    "the index is empty": (sharded(write("model.safetensors.index.json", b"{}")), "weight_map"),
}


@pytest.mark.parametrize("script", ["generate", "evaluate"])
@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_folders(script, name, here, model_folder, capsys):
    damage, says = FOLDERS[name]
    if hasattr(damage, "sharded"):
        damage.source = model_folder
    damage(here / "m")
    flags = ["x"] if script == "generate" else ["--no-text"]
    refused(script, ["--checkpoint", "m", *flags], says, capsys, here)


def test_token_ids_out_of_range():
    tokenizer = ours_vocabulary()
    model = ours(vocab_size=tokenizer.vocab_size)
    for bad in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(ValueError, match=f"token id {bad}, outside the model's vocabulary"):
            generate.generate(model, tokenizer, [[5, bad]])
        with pytest.raises(ValueError, match=f"token id {bad} is not in this vocabulary"):
            tokenizer.decode([bad])


def test_there_are_at_least_sixty():
    assert len(TRAIN) + len(GENERATE) + len(EVALUATE) + len(FOLDERS) >= 60
    for cases in (TRAIN, EVALUATE, [(" ".join(flags), says) for flags, says in GENERATE]):
        assert len({flags for flags, _ in cases}) == len(cases)


# ----------------------------------------------------------------------------------------------------------------------
# Disks


RUN = (
    "--device cpu --text text.txt --vocab 320 --length 96 --batch-rows 2 --data-rows 600 --steps 6 --save-every 1 "
    "--sample-every 0 --eval-count 0 --out run"
).split()


@pytest.fixture
def signals():
    """A run that ends in the middle leaves its signal handlers behind."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


def test_disk_full_while_saving(here, signals, capsys, monkeypatch):
    """The old checkpoint stays, nothing half-written is left, and with room again the run goes on from it."""
    real = train.train_step
    calls = []
    monkeypatch.setattr(train, "train_step", lambda *a: calls.append(1) or real(*a))
    with largest_file(1_000_000):
        assert train.main(RUN) == 2
    assert "free some space" in capsys.readouterr().err and len(calls) == 1
    assert sorted(os.listdir("run")) == ["data", "log.jsonl"]  # both whole: a run that has not been saved yet
    monkeypatch.setattr(train, "train_step", lambda *a: real(*a) if len(calls.append(1) or calls) < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(RUN)
    before = contents(here / "run")
    assert resume.peek_training("run/training.safetensors")["step"] == 2
    monkeypatch.setattr(train, "train_step", real)
    with largest_file(1_000_000):
        assert train.main(RUN) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("train.py: cannot write run/training.safetensors (File too large)")
    after = contents(here / "run")
    assert after.keys() == before.keys() and all(after[p] == before[p] for p in before if p.name != "log.jsonl")
    assert train.main(RUN) == 0
    assert "resume    at step 2 of 6" in capsys.readouterr().out
    shutil.move("run", "first")
    assert train.main(RUN) == 0
    assert Path("first/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


@pytest.mark.parametrize("size", [3000, 30_000, 100_000])  # in the tokenizer, in the text, in the rows
def test_disk_full_while_data_are_made(here, signals, capsys, size):
    with largest_file(size):
        refused("train", RUN, "cannot write", capsys, here)
    assert not Path("run").exists()


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where,name", [(os, "posix_fallocate"), (os, "fsync"), (os, "replace"), (data.np, "save")])
def test_no_space_left_while_data_are_made(here, capsys, monkeypatch, where, name):
    if not hasattr(where, name):
        pytest.skip(f"no {name} on this system")
    monkeypatch.setattr(where, name, full)
    refused("train", RUN, "No space left", capsys, here)
    assert not Path("run").exists()


def test_no_space_left_for_the_log(here, signals, capsys, monkeypatch):
    monkeypatch.setattr(train.Run, "record", full)
    assert train.main(RUN) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("train.py: ") and "No space left" in told[0]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written(here, capsys):
    Path("folder").chmod(0o500)
    refused("train", [*RUN, "--out", "folder"], "may not be written to", capsys, here)
    refused("train", [*RUN, "--out", "folder/new"], "may not be written to", capsys, here)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder where nobody can create one")
def test_folders_that_cannot_be_created(here, capsys):
    refused("train", [*RUN, "--out", "/proc/self/nano2"], "cannot", capsys, here)


# ----------------------------------------------------------------------------------------------------------------------
# As a user starts them


@pytest.mark.parametrize("script,flags", [("train", "--steps 0"), ("generate", "x"), ("evaluate", "--count 0")])
def test_as_processes(here, script, flags):
    path = Path(train.__file__).parent / f"{script}.py"
    done = subprocess.run([sys.executable, str(path), *flags.split()], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"{script}.py: ") and not Path("out").exists()
