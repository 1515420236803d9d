"""Model folders: round trip, to transformers and back; a kill leaves the old or the new; bad input is told why."""

import errno
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from disk import Calls, Killed, halve, kill_points, killed_while_saving, largest_file, same, sentence
from reference import THREE_GROUPS, neutralise_dt_floor, ours, reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import hf_config
import resume
import safefile
from checkpoint import check_room, load_pretrained, save_pretrained
from device import free_bytes, room_gib
from hf_config import config_from_dict, config_to_dict
from model import PRESETS, ModelConfig, NemotronH
from sizes import memory_bytes, weights_bytes
from tokenizer import train_bpe

IDS = torch.randint(0, 263, (2, 37), generator=torch.Generator().manual_seed(5))


def edit_json(path, **changes):
    """Change (or, with ..., remove) fields of a JSON file."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "m", ours())
    return tmp_path / "m"


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, THREE_GROUPS, dict(use_bias=True, mlp_bias=True, attention_bias=True)])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 40_000, 1])
def test_round_trip(tmp_path, overrides, max_shard_bytes):
    model = ours(**overrides)
    save_pretrained(tmp_path / "a" / "b", model, max_shard_bytes=max_shard_bytes)
    loaded, tokenizer = load_pretrained(str(tmp_path / "a" / "b"))
    assert same(model, loaded) and loaded.config == model.config and tokenizer is None and not loaded.training
    assert torch.equal(model(IDS), loaded(IDS))
    weights = sorted(p.name for p in (tmp_path / "a" / "b").glob("*.safetensors"))
    if max_shard_bytes > 10**9:
        assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "a" / "b" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == weights
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
        for name, file in index["weight_map"].items():
            stored = load_file(tmp_path / "a" / "b" / file)  # the library reads what we wrote by hand
            assert torch.equal(stored[name], model.state_dict()[name])
            assert len(stored) == 1 or sum(t.numel() * 4 for t in stored.values()) <= max_shard_bytes
        assert len(weights) == (len(index["weight_map"]) if max_shard_bytes == 1 else len(weights)) and len(weights) > 2


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 60_000])
def test_transformers_opens_ours(tmp_path, max_shard_bytes):
    transformers = pytest.importorskip("transformers", reason="the reference implementation is a test extra")
    model = ours(**THREE_GROUPS)
    save_pretrained(tmp_path, model, max_shard_bytes=max_shard_bytes)
    hf, info = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert hf.dtype == torch.float32 and hf.config.time_step_limit[1] == math.inf
    with torch.no_grad():
        assert (neutralise_dt_floor(hf.eval())(IDS).logits - model(IDS)).abs().max() < 2e-5


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_we_open_what_transformers_saves(tmp_path, shard):
    model = ours(**THREE_GROUPS)
    hf = reference(model)
    hf.save_pretrained(tmp_path, max_shard_size=shard)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "layers_block_type" in written and "hybrid_override_pattern" not in written  # it is the other dialect
    loaded, _ = load_pretrained(tmp_path)
    assert same(model, loaded)
    with torch.no_grad():
        assert (hf(IDS).logits - loaded(IDS)).abs().max() < 2e-5


def test_released_folder_with_its_quirks(tmp_path):
    """bf16 weights, bare Infinity, torch_dtype, `embedding` in the singular, head_dim under its old name."""
    model = ours(torch.bfloat16)
    save_pretrained(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_json(
        tmp_path / "config.json", time_step_limit=[0.0, math.inf], head_dim=..., attention_head_dim=24, expand=2,
        auto_map={"AutoConfig": "x"}, bos_token_id=None, eos_token_id=[12, 2],
    )  # fmt: skip
    assert "Infinity]" in (tmp_path / "config.json").read_text()
    loaded, _ = load_pretrained(tmp_path)
    assert loaded.config == model.config
    wide = {n for n, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == {n for n in model.state_dict() if n.endswith((".A_log", ".D", ".dt_bias"))} and wide
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, model.state_dict()[n].to(p.dtype)) for n, p in loaded.named_parameters())
    assert torch.equal(loaded(IDS), model(IDS))  # both compute with the same bf16 values of A_log, D, dt_bias
    save_pretrained(tmp_path / "again", loaded)
    assert same(load_pretrained(tmp_path / "again")[0], loaded)


def test_in_memory_names_of_transformers(folder):
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.replace("backbone.", "model."): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors")
    assert same(load_pretrained(folder)[0], ours())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float64, "torch.float32"])
def test_dtype_asked_for(folder, dtype):
    loaded, _ = load_pretrained(folder, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert loaded.lm_head.weight.dtype == wanted
    assert loaded.backbone.layers[0].mixer.A_log.dtype == torch.promote_types(wanted, torch.float32)
    cache = loaded.new_cache(2, 40)
    with torch.no_grad():
        full = loaded(IDS)
        parts = torch.cat(
            [loaded(IDS[:, :20], cache=cache), *(loaded(IDS[:, i : i + 1], cache=cache) for i in (20, 21))], 1
        )
    assert (full[:, :22] - parts).abs().max() < {2: 0.2, 4: 1e-4, 8: 1e-10}[wanted.itemsize]


def test_loaded_weights_do_not_depend_on_the_file_any_more(folder):
    loaded, _ = load_pretrained(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        size = os.path.getsize(file.name)
        file.write(b"\xff" * size)
    assert same(loaded, ours())


def test_tokenizer_travels(tmp_path):
    tokenizer = train_bpe(["one and one is two"], 280)
    model = ours(vocab_size=301)
    save_pretrained(tmp_path, model, tokenizer)
    assert load_pretrained(tmp_path)[1].ranks == tokenizer.ranks
    save_pretrained(tmp_path, model)  # without one: what is there stays
    assert load_pretrained(tmp_path)[1].ranks == tokenizer.ranks
    sentence(lambda: save_pretrained(tmp_path / "x", ours(vocab_size=263), tokenizer), "280 ids", "263 rows")
    assert not (tmp_path / "x").exists()
    save_pretrained(tmp_path, ours(vocab_size=263))
    sentence(lambda: load_pretrained(tmp_path), "280 ids", "263 rows")
    (tmp_path / "tokenizer.json").write_text("{}")
    sentence(lambda: load_pretrained(tmp_path), "tokenizer")


def test_other_files_stay_and_old_shards_go(tmp_path):
    (tmp_path / "log.jsonl").write_text("kept")
    (tmp_path / "model_notes.safetensors").write_text("kept")
    for i, size in enumerate([20_000, 50_000, 10**9, 20_000]):
        save_pretrained(tmp_path, ours(seed=i), max_shard_bytes=size)
        assert same(load_pretrained(tmp_path)[0], ours(seed=i))
        weights = {p.name for p in tmp_path.glob("model*")} - {"model_notes.safetensors"}
        index = tmp_path / "model.safetensors.index.json"
        named = {index.name, *json.loads(index.read_text())["weight_map"].values()} if index.exists() else set()
        assert weights == (named or {"model.safetensors"})
        assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "model_notes.safetensors").read_text() == "kept"


def test_file_modes_follow_the_umask_and_readers_know_the_framework(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------

GOOD = config_to_dict(ModelConfig())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_the_dialect(preset):
    d = config_to_dict(PRESETS[preset], torch.bfloat16)
    text = json.dumps(d, allow_nan=False)  # strict JSON
    assert config_from_dict(json.loads(text)) == PRESETS[preset]
    assert d["torch_dtype"] == "bfloat16" and d["num_hidden_layers"] == len(d["hybrid_override_pattern"])


@pytest.mark.parametrize("kinds", [("linear_attention", "full_attention"), ("mamba", "attention")])
def test_layers_block_type(kinds):
    d = {k: v for k, v in GOOD.items() if k not in ("hybrid_override_pattern", "num_hidden_layers")}
    listed = [dict(zip("M*-", (*kinds, "mlp")))[letter] for letter in "M-M*-M-"]
    assert config_from_dict(d | {"layers_block_type": listed}).hybrid_override_pattern == "M-M*-M-"
    sentence(lambda: config_from_dict(d | {"layers_block_type": listed + ["moe"]}), "MoE", "1 of", "8 layers")
    sentence(lambda: config_from_dict(d | {"layers_block_type": ["conv"]}), "conv")
    sentence(lambda: config_from_dict(d | {"layers_block_type": "mlp"}), "list")
    sentence(lambda: config_from_dict(d | {"layers_block_type": []}), "pattern")
    sentence(lambda: config_from_dict(GOOD | {"layers_block_type": ["mlp"]}), "contradicts", "M-M*-M-")


@pytest.mark.parametrize("infinity", [math.inf, "Infinity", "inf", {"__float__": "Infinity"}])
def test_time_step_limit(infinity):
    assert config_from_dict(GOOD | {"time_step_limit": [0.0, infinity]}).time_step_limit == (0.0, math.inf)
    config = config_from_dict(GOOD | {"time_step_limit": [0, 0.5]})
    assert config.time_step_limit == (0.0, 0.5) and config_from_dict(config_to_dict(config)) == config


def test_aliases():
    other = {
        "attention_head_dim": ("head_dim", 48), "mamba_n_groups": ("n_groups", 4), "mamba_d_conv": ("conv_kernel", 3),
        "mamba_chunk_size": ("chunk_size", 8), "mamba_conv_bias": ("use_conv_bias", False),
        "mamba_dt_min": ("time_step_min", 0.002), "mamba_dt_max": ("time_step_max", 0.2),
        "mamba_dt_limit": ("time_step_limit", [0.0, 3.0]), "mamba_dt_init_floor": ("time_step_floor", 2e-4),
    }  # fmt: skip
    d = {k: v for k, v in GOOD.items() if k not in dict(other.values())} | {k: v for k, (_, v) in other.items()}
    config = config_from_dict(d)
    for name, value in other.values():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    sentence(lambda: config_from_dict(GOOD | {"mamba_d_conv": 3}), "contradicts", "conv_kernel 4", "3")
    assert config_from_dict({k: v for k, v in GOOD.items() if k != "chunk_size"}).chunk_size == 128


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hybrid_override_pattern": "M-MX"}, ["X"]),
        ({"hybrid_override_pattern": "M-E"}, ["MoE"]),
        ({"hybrid_override_pattern": ""}, ["M-M*-M-"]),
        ({"hybrid_override_pattern": 7}, ["7"]),
        ({"hybrid_override_pattern": None}, ["neither"]),
        ({"num_hidden_layers": 8}, ["8", "7 letters"]),
        ({"model_type": "llama"}, ["llama", "nemotron_h"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"residual_in_fp32": True}, ["residual_in_fp32"]),
        ({"sliding_window": 512}, ["sliding_window 512"]),
        ({"mlp_hidden_act": "gelu"}, ["gelu", "relu2"]),
        ({"mamba_hidden_act": "relu"}, ["relu", "silu"]),
        ({"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "128"}, ["'128'", "int"]),
        ({"hidden_size": 128.0}, ["128.0"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"conv_kernel": -1}, ["conv_kernel", "-1"]),
        ({"vocab_size": True}, ["True"]),
        ({"use_bias": 1}, ["use_bias", "bool"]),
        ({"layer_norm_epsilon": "tiny"}, ["tiny"]),
        ({"n_groups": 3}, ["multiple"]),
        ({"num_key_value_heads": 3}, ["multiple"]),
        ({"time_step_limit": [1, 0]}, ["time_step_limit"]),
        ({"time_step_limit": 0.1}, ["0.1"]),
        ({"time_step_limit": [0.0, {"__int__": 3}]}, ["__int__"]),
        ({"time_step_limit": [0.0, float("nan")]}, ["nan"]),
    ],
)
def test_configs_that_are_not_this_model(folder, change, words):
    sentence(lambda: config_from_dict(GOOD | change), *words)
    edit_json(folder / "config.json", **change)
    sentence(lambda: load_pretrained(folder), *words)


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are damaged
# ---------------------------------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def replace_by_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def swap_entry(name, make):
    return lambda folder: change_tensors(folder, lambda t: t.update({name: make(t[name])}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (shutil.rmtree, ["does not exist"]),
        (lambda f: (shutil.rmtree(f), f.write_text("x")), ["is a file"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text('{"hidden_size": 64,'), ["not valid JSON"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ["not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[" * 100_000), ["not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[1, 2]"), ["list"]),
        (lambda f: edit_json(f / "config.json", hidden_size=10**30), ["larger than any machine"]),
        (lambda f: edit_json(f / "config.json", torch_dtype="int8"), ["int8", "bfloat16"]),
        (lambda f: edit_json(f / "config.json", torch_dtype=["float32"]), ["dtype"]),
        (lambda f: (f / "model.safetensors").unlink(), ["neither"]),
        (replace_by_pickle, ["pytorch_model.bin", "never unpickled", "convert"]),
        (lambda f: halve(f / "model.safetensors"), ["cut short", "bytes"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["cut short", "(0 bytes)"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>404</html>"), ["safetensors"]),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)), ["safetensors"]),
        (lambda f: edit_json(f / "config.json", vocab_size=264), ["(263, 64)", "(264, 64)", "embeddings"]),
        (lambda f: edit_json(f / "config.json", intermediate_size=111), ["(64, 112)", "(64, 111)", "down_proj"]),
        (
            lambda f: edit_json(f / "config.json", hybrid_override_pattern="M-M*-M--", num_hidden_layers=8),
            ["lacks 3 of", "layers.7"],
        ),
        (
            lambda f: edit_json(f / "config.json", hybrid_override_pattern="M-M*-M", num_hidden_layers=6),
            ["3 tensors", "layers.6"],
        ),
        (lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")), ["lacks 1", "lm_head.weight"]),
        (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(2))), ["1 tensors", "extra"]),
        (
            lambda f: change_tensors(f, lambda t: t.update({"model.norm_f.weight": torch.ones(64)})),
            ["twice", "norm_f"],
        ),
        (swap_entry("lm_head.weight", lambda t: t.to(torch.int8)), ["I8", "lm_head.weight"]),
        (swap_entry("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)), ["F8_E4M3", "lm_head.weight"]),
        (swap_entry("lm_head.weight", lambda t: t.T.contiguous()), ["(64, 263)", "(263, 64)"]),
    ],
)
def test_damaged_folder(folder, damage, words):
    assert same(load_pretrained(folder)[0], ours())
    damage(folder)
    sentence(lambda: load_pretrained(folder), *words)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model-00002-of-00010.safetensors").unlink(), ["1 of the 10", "model-00002-of-00010"]),
        (lambda f: halve(f / "model-00003-of-00010.safetensors"), ["model-00003-of-00010", "cut short"]),
        (lambda f: halve(f / "model.safetensors.index.json"), ["index.json", "not valid JSON"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["weight_map"]),
        (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": "../m.safetensors"}), ["weight_map"]),
        (lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"a": 3}), ["weight_map"]),
        (
            lambda f: shutil.copy(f / "model-00001-of-00010.safetensors", f / "model-00004-of-00010.safetensors"),
            ["twice"],
        ),
    ],
)
def test_damaged_shards(tmp_path, damage, words):
    save_pretrained(tmp_path, ours(), max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*"))) == 10
    damage(tmp_path)
    sentence(lambda: load_pretrained(tmp_path), *words)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", 3.5, "cuda:99"] + ["cuda"] * (not torch.cuda.is_available()))
def test_devices_that_are_not_there(folder, device):
    sentence(lambda: load_pretrained(folder, device=device), str(device))


def test_bad_arguments(folder, tmp_path):
    sentence(lambda: load_pretrained(folder, dtype="int4"), "int4")
    sentence(lambda: load_pretrained(folder, dtype=torch.int64), "int64")
    for size in (0, -1, 2.5, True):
        sentence(lambda size=size: save_pretrained(tmp_path / "x", ours(), max_shard_bytes=size), repr(size))
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Writing that fails, or is cut short
# ---------------------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        sentence(lambda place=place: save_pretrained(place, ours()), str(place), "file is where a folder should be")
    assert os.listdir(tmp_path) == ["file"]
    real = open

    def refuse(path, mode="r", **options):
        if "w" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, mode, **options)

    monkeypatch.setattr("builtins.open", refuse)
    sentence(lambda: save_pretrained(tmp_path / "n", ours()), "Permission denied", "permissions")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    sentence(lambda: save_pretrained(tmp_path / "m", ours()), "permissions")


def test_disk_full(tmp_path):
    """A real limit in the middle of a file: what was there stays whole, and nothing half-written is left."""
    old, new = ours(seed=0), ours(seed=1)
    save_pretrained(tmp_path / "m", old)
    before = sorted(p for p in tmp_path.rglob("*"))
    with largest_file(200_000):
        sentence(lambda: save_pretrained(tmp_path / "m", new), "free some space")
        sentence(lambda: save_pretrained(tmp_path / "other", new), "free some space")
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert same(load_pretrained(tmp_path / "m")[0], old)


@pytest.mark.parametrize("old_size, new_size", [(10**9, 10**9), (60_000, 110_000), (10**9, 70_000), (70_000, 10**9)])
def test_kill_at_every_call_leaves_old_or_new_folder(tmp_path, old_size, new_size):
    """Weights, pattern, vocabulary and tokenizer all change, so that a mixture cannot pass for either."""
    old, new = (
        ours(vocab_size=290, hybrid_override_pattern="M-"),
        ours(seed=1, hybrid_override_pattern="M*-", vocab_size=301),
    )
    old_tokenizer, new_tokenizer = train_bpe(["aaaa bbbb"], 274), train_bpe(["one and one"], 276)
    new_tokenizer.chat_template = "new {{ x }}"
    seen = set()

    save_pretrained(tmp_path / "first", old, old_tokenizer, max_shard_bytes=old_size)

    def prepare():
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "m")

    def save():
        save_pretrained(tmp_path / "m", new, new_tokenizer, max_shard_bytes=new_size)

    prepare()
    for k, after in kill_points(save):
        prepare()
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, k, after)
            with pytest.raises(Killed):
                save()
        model, tokenizer = load_pretrained(tmp_path / "m")
        which = "new" if same(model, new) else "old"
        assert same(model, new if which == "new" else old), (k, after)
        wanted = new_tokenizer if which == "new" else old_tokenizer
        assert tokenizer.ranks == wanted.ranks and tokenizer.chat_template == wanted.chat_template, (k, after)
        seen.add(which)
        if not after:
            continue
        save()  # and the next save works, and tidies
        assert same(load_pretrained(tmp_path / "m")[0], new)
        assert not any(p.name.startswith(".") for p in (tmp_path / "m").iterdir())
    assert seen == {"old", "new"}


def test_files_reach_the_disk_before_their_names_do(tmp_path, monkeypatch):
    """A rename that overtakes the data would survive a power cut without it: each file is fsynced first, then renamed,
    then its folder is fsynced."""
    events, real_fsync, real_replace = [], os.fsync, os.replace
    inode = lambda x: os.stat(x).st_ino
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_ino)), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", inode(a))), real_replace(a, b))[1])
    save_pretrained(tmp_path / "m", ours(vocab_size=301), train_bpe(["one and one"], 276), max_shard_bytes=200_000)
    files, commit = [inode(p) for p in (tmp_path / "m").iterdir()], events.index(("fsync", inode(tmp_path / "m")))
    assert len(files) > 5
    for file in files:
        assert ("fsync", file) in events[:commit] and ("name", file) in events[commit:]
    (saved,) = {i for kind, i in events if kind == "name"} - set(files)  # the subfolder, by the rename that counts
    assert ("fsync", saved) in events[: events.index(("name", saved))]
    assert events[-1] == ("fsync", inode(tmp_path / "m"))


def test_real_kills(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save."""
    script = (
        "from reference import ours\nfrom checkpoint import *\n"
        "step = 0\n"
        "models = [ours(seed=i, hybrid_override_pattern=p) for i, p in enumerate(('M*-', 'M-M*-'))]\n"
        "while True:\n"
        "    step += 1\n"
        "    save_pretrained(sys.argv[1] + '/m', models[step % 2], max_shard_bytes=10**9 if step % 2 else 60_000)\n"
        "    if step == 1: print('go', flush=True)\n"
    )
    models = [ours(seed=i, hybrid_override_pattern=p) for i, p in enumerate(("M*-", "M-M*-"))]
    for _ in killed_while_saving(tmp_path, script):
        loaded = load_pretrained(tmp_path / "m")[0]
        assert any(same(loaded, model) for model in models)


def test_nothing_unpickles():
    """No import of pickle, no torch.load or torch.save, in the source of whatever reads or writes files of weights."""
    sources = [Path(module.__file__).read_text() for module in (checkpoint, safefile, hf_config, resume)]
    source = "\n".join(sources)
    assert not re.search(r"torch\.(load|save)\b|^\s*(import|from) (pickle|shelve|joblib)|allow_pickle", source, re.M)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def folder_of_129_mib(folder, max_shard_bytes=5 * 10**9):
    """Nine matrices, eight of them of 16 MiB, in bfloat16; and a tiny model beside it."""
    config = ModelConfig(hidden_size=1024, intermediate_size=8192, hybrid_override_pattern="-" * 4, vocab_size=263)
    with torch.device("meta"):
        model = NemotronH(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    save_pretrained(folder, model, max_shard_bytes=max_shard_bytes)
    save_pretrained(folder / "tiny", ours())


def memory_while_opening(folder, device, field):
    """In a process of its own: (the largest value of /proc/self/status's `field` seen while the folder is opened, less
    that before, in MiB; the model's size in MiB)."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import torch; torch.set_num_threads(1)\n"
        "import checkpoint\n"
        f"def now(): return int(open('/proc/self/status').read().split('{field}:')[1].split()[0]) // 1024\n"
        f"checkpoint.load_pretrained(sys.argv[1] + '/tiny', '{device}')\n"  # what is imported late is not counted
        "samples, before = [], now()\n"
        "checkpoint.setattr = lambda *args: (setattr(*args), samples.append(now()))\n"  # as each weight is placed
        f"model, _ = checkpoint.load_pretrained(sys.argv[1], '{device}')\n"
        "print(max(samples) - before, sum(p.numel() for p in model.parameters()) * 2 // 2**20)\n"
    )
    root = Path(checkpoint.__file__).parent
    out = subprocess.run([sys.executable, "-c", script, str(folder), str(root)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return map(int, out.stdout.split())


@needs_proc
def test_opening_needs_little_memory(tmp_path):
    """While a folder is opened the process never holds a second copy of its weights, not even of one shard."""
    folder_of_129_mib(tmp_path)
    grown, size = memory_while_opening(tmp_path, "cpu", "RssAnon")
    assert size > 125 and 0.8 * size < grown < 1.2 * size, (grown, size)


@needs_proc
def test_shards_are_read_one_after_the_other(tmp_path):
    """With the mapped pages of files counted, too: the model and less than two shards."""
    folder_of_129_mib(tmp_path, max_shard_bytes=34 * 2**20)
    largest = max(p.stat().st_size for p in tmp_path.glob("*.safetensors")) // 2**20
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4 and largest >= 32
    grown, size = memory_while_opening(tmp_path, "cpu", "VmHWM")
    assert 0.8 * size < grown < size + 2 * largest, (grown, size, largest)


@needs_proc
@pytest.mark.gpu
def test_shards_go_to_the_gpu_one_after_the_other(tmp_path):
    """The host never holds two shards, let alone the model."""
    folder_of_129_mib(tmp_path, max_shard_bytes=34 * 2**20)
    largest = max(p.stat().st_size for p in tmp_path.glob("*.safetensors")) // 2**20
    grown, _ = memory_while_opening(tmp_path, "cuda", "VmHWM")
    assert grown < 2 * largest, (grown, largest)


@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_that_changes_while_it_is_read(tmp_path, monkeypatch, gone):
    """Half of one model and half of another would pass every check of names and shapes."""
    save_pretrained(tmp_path, ours(), max_shard_bytes=100_000)
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    real, done = setattr, []

    def place(*args):
        if not done:
            done.append(os.replace(second, tmp_path / "away"))
            if not gone:
                shutil.copy(tmp_path / "away", second)
        real(*args)

    monkeypatch.setattr(checkpoint, "setattr", place, raising=False)
    sentence(lambda: load_pretrained(tmp_path), second.name, "was replaced while", "open the folder again")


class Card:
    """A GPU that is not there: what torch says of its memory."""

    def __init__(self, patch, free, total=80 * 2**30, reserved=0, allocated=0, fraction=1.0):
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)


def test_free_bytes(monkeypatch):
    cuda = torch.device("cuda", 0)
    for numbers, expected in (
        (dict(free=30), 30),
        (dict(free=30, reserved=25, allocated=20), 35),  # what PyTorch keeps in reserve is free for us
        (dict(free=30, reserved=25, allocated=20, fraction=0.5), 30),  # 50 in all, of which 20 are taken
        (dict(free=30, reserved=25, allocated=20, fraction=0.1), 0),
        (dict(free=30, fraction=0.5), 30),
    ):
        Card(monkeypatch, total=100, **numbers)
        assert free_bytes(cuda) == expected
    assert 2**28 < free_bytes(torch.device("cpu")) == room_gib(torch.device("cpu")) * 2**30


def test_a_model_larger_than_the_gpu_is_refused_before_it_is_read(folder, monkeypatch):
    config = ours().config
    parts = memory_bytes(config, 1, 1, 4, 4)
    opened = []

    def recorded(path, device="cpu"):
        opened.append(torch.device(device).type)
        return safefile.open_safetensors(path)  # there is no such device

    monkeypatch.setattr(checkpoint, "open_safetensors", recorded)
    for numbers in (dict(free=parts["total"] - 1), dict(free=2**33, total=2 * parts["total"] - 3, fraction=0.5)):
        Card(monkeypatch, **numbers)
        said = sentence(
            lambda: load_pretrained(folder, "cuda"), str(folder), "is too large", "1 row of 1 token,", "cuda:0 has",
            f"{parts['weights'] / 2**20:.2f} MiB for its weights", "would fit: 16-bit weights",
        )  # fmt: skip
        assert set(opened) == {"cpu"}, said  # the headers
    Card(monkeypatch, free=parts["total"])
    loaded, _ = load_pretrained(folder, "cuda")
    assert opened[-1] == "cuda" and same(loaded, ours())


def test_a_model_larger_than_the_machine_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    sentence(lambda: load_pretrained(folder), "is too large", "this machine has 0.00 MiB", "would not fit")


def test_room_for_contexts(monkeypatch):
    config, cuda = PRESETS["nano-9b"], torch.device("cuda", 0)
    weights = weights_bytes(config)
    Card(monkeypatch, free=int(19.66 * 2**30))
    check_room(config, cuda, 131072, 1)
    for asked, words in (
        (dict(tokens=131072, rows=2), ["2 rows of 131,072 tokens", "cuda:0 has 19.66 GiB", "1 row of 131,072 tokens"]),
        (dict(tokens=131072, rows=1, work=2**30), ["about 1.00 GiB to work in", "int8 weights"]),
        (dict(tokens=131072, rows=1, weight_bytes=4), ["33.11 GiB for its weights", "16-bit weights"]),
    ):
        with pytest.raises(ValueError) as error:
            check_room(config, cuda, **asked)
        assert all(word in str(error.value) for word in words), error.value
    check_room(config, cuda, 131072, 2, int8=True)
    Card(monkeypatch, free=int(19.66 * 2**30) - weights, reserved=weights, allocated=weights)  # once they are there
    check_room(config, cuda, 131072, 1, held=weights)
    with pytest.raises(ValueError, match="for 2 rows"):
        check_room(config, cuda, 131072, 2, held=weights)


@pytest.mark.gpu
def test_gpu_folders(tmp_path):
    model = ours(seed=3).cuda()
    save_pretrained(tmp_path / "m", model)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        loaded, _ = load_pretrained(tmp_path / "m", device)
        assert same(loaded, model) and {p.device for p in loaded.parameters()} == {torch.device("cuda", 0)}
    half, _ = load_pretrained(tmp_path / "m", "cuda", "bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.backbone.layers[0].mixer.D.dtype == torch.float32
