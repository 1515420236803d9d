"""Files: released model folders in and out, and writing that survives a kill.

The idea. A *model folder* is what other programs read: config.json, one or several safetensors files, a tokenizer. The
names of our tensors are the released ones, so opening a folder is no translation: build the model without memory
(PyTorch's "meta" device), check every name, shape and dtype against the file headers, and only then read each tensor
straight to where it will live. The 9B needs its own 17 GB and nothing besides. config.json exists in two dialects, the
released one (`hybrid_override_pattern`) and that of transformers 5 (`layers_block_type`); we read both and write the
first.

A kill at any instant leaves the old folder or the new one. There is one trick: write to a new name, ask the disk to
really have it (fsync), then rename over the old name. A rename is all or nothing. A folder is several files, so these
are collected in a subfolder `.saving`, one rename to `.saved` makes them count, and then they move up one by one; a
reader looks into `.saved` first, and the next save finishes a move that was cut short.

Nothing here is ever unpickled: a pickle is a program, and opening one runs it. safetensors is 8 bytes of length, a JSON
header, and raw numbers. Reading is left to the safetensors library, which maps files and fills GPU memory directly. The
writer is written by hand (20 lines): the library's gathers whole files in host memory, leaves a temporary file with a
random name after a kill, and hides the disk's error number.

This file must not know training, nor where data comes from.
Sources: released config.json and tensor names; transformers 5.23 for the second dialect; the safetensors format notes.
"""

import errno
import json
import math
import os
import re
import shutil
import struct
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from model import LETTERS, ModelConfig, NemotronH
from tokenizer import Tokenizer


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. The message is one sentence: what, which numbers, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. config.json, in two dialects
# ---------------------------------------------------------------------------------------------------------------------

# Other spellings of our fields: the constructor names of the released configuration class, and older folders.
ALIASES = {
    "attention_head_dim": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}
# Sizes that a folder must state. Their defaults in ModelConfig are a toy's, so a default would be a guess.
REQUIRED = (
    "hidden_size vocab_size intermediate_size mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel "
    "num_attention_heads num_key_value_heads head_dim"
).split()
LAYER_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}

# Fields that would change the arithmetic, and the values this model computes; the first is the one we write. `expand`
# is ignored on purpose: the inner width is mamba_num_heads * mamba_head_dim, which the 9B has no `expand` for.
FIXED = {
    "model_type": ("nemotron_h",),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False,),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
}
ABSENT = {  # the same, for fields that the released files do not have at all
    "num_nextn_predict_layers": (0,), "quantization_config": (), "partial_rotary_factor": (), "rope_theta": (),
    "rope_scaling": (), "rope_parameters": (),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def config_from_dict(d):
    """The ModelConfig that a config.json describes, in either dialect. Unknown fields are ignored.

    Raises CheckpointError if a size is missing, a value has the wrong type, two fields contradict each other, or a
    field asks for arithmetic that this model does not do (tied embeddings, experts, rotary positions, ...): a model
    that is nearly the right one would only be quietly wrong.
    """
    if not isinstance(d, dict):
        raise CheckpointError(f"config.json must hold a JSON object; it holds a {type(d).__name__}")
    for name, known in (FIXED | ABSENT).items():
        if d.get(name) is not None and d[name] not in known:
            computed = f"only {known[0]!r} is computed here" if known else "this model has no such thing"
            raise CheckpointError(f"config.json has {name} {d[name]!r}, but {computed}: use another checkpoint")
    values = {"hybrid_override_pattern": _pattern(d)}
    for other, name in [(f.name, f.name) for f in fields(ModelConfig)] + list(ALIASES.items()):
        if name == "hybrid_override_pattern" or d.get(other) is None:
            continue
        if name in values and values[name] != d[other]:
            raise CheckpointError(f"config.json contradicts itself: {name} {values[name]!r} and {other} {d[other]!r}")
        values[name] = d[other]
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise CheckpointError(f"config.json does not state {', '.join(missing)}: add what the model was trained with")
    values.setdefault("chunk_size", 128)  # only a blocking of the sum
    if "time_step_limit" in values:
        values["time_step_limit"] = _time_step_limit(values["time_step_limit"])
    if isinstance(values.get("eos_token_id"), list):  # a list of tokens that end a text: the first is the main one
        values["eos_token_id"] = (values["eos_token_id"] or [ModelConfig.eos_token_id])[0]
    for name, value in values.items():
        kind = type(getattr(ModelConfig, name))
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"config.json has {name} {value!r}, which should be of type {kind.__name__}")
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _pattern(d):
    """The pattern string, from a string or a list of layer kinds, checked against num_hidden_layers."""
    pattern, kinds = d.get("hybrid_override_pattern"), d.get("layers_block_type", d.get("layer_types"))
    if kinds is not None:
        if not isinstance(kinds, list) or any(not isinstance(kind, str) or kind not in LAYER_KINDS for kind in kinds):
            names = "linear_attention, full_attention, mlp"
            raise CheckpointError(f"config.json has layers_block_type {kinds!r}; use a list of {names}")
        listed = "".join(LAYER_KINDS[kind] for kind in kinds)
        if pattern not in (None, listed):
            raise CheckpointError(
                f"config.json contradicts itself: hybrid_override_pattern {pattern} but layers_block_type {listed}"
            )
        pattern = listed
    if pattern is None:
        raise CheckpointError("config.json has neither hybrid_override_pattern nor layers_block_type: add the pattern")
    if not isinstance(pattern, str) or not pattern:
        raise CheckpointError(f"config.json has hybrid_override_pattern {pattern!r}; it must be a text like M-M*-M-")
    if "E" in pattern:
        raise CheckpointError(
            f"{pattern.count('E')} of the checkpoint's {len(pattern)} layers are mixtures of experts (MoE), which this "
            f"model does not have: use one made of {', '.join(f'{k} ({v})' for k, v in LETTERS.items())}"
        )
    layers = d.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise CheckpointError(
            f"config.json has num_hidden_layers {layers!r}, but the pattern {pattern} has {len(pattern)} letters: "
            "correct the wrong one"
        )
    return pattern


def _time_step_limit(limit):
    """(low, high) floats. JSON has no infinity: folders say Infinity bare, as text, or as {"__float__": "Infinity"}."""
    try:
        numbers = tuple(float(v["__float__"] if isinstance(v, dict) else v) for v in limit)
        if len(numbers) == 2 and 0 <= numbers[0] <= numbers[1]:
            return numbers
    except (TypeError, ValueError, KeyError):
        pass
    raise CheckpointError(f"config.json has time_step_limit {limit!r}; it must be two numbers, low and high")


def config_to_dict(config, dtype=torch.float32):
    """The released dialect of config.json, as a dict of strict JSON.

    The released files contain a bare `Infinity`, which is not JSON; we write it as transformers 5 does. Only the
    fields that some reader uses are written: sizes, what a mixer computes, tokens, and the rules of initialisation.
    """
    d = asdict(config) | {name: known[0] for name, known in FIXED.items()}
    limit = [v if math.isfinite(v) else {"__float__": "Infinity"} for v in map(float, config.time_step_limit)]
    d |= {
        "architectures": ["NemotronHForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_hidden_layers,
        "time_step_limit": limit,
        "rms_norm_eps": config.layer_norm_epsilon,
        "mamba_proj_bias": config.use_bias,
        "rescale_prenorm_residual": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cache": True,
        "num_logits_to_keep": 1,
    }
    return dict(sorted(d.items()))


# ---------------------------------------------------------------------------------------------------------------------
# 2. safetensors, and writing that survives a kill
# ---------------------------------------------------------------------------------------------------------------------

STORED_AS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOATS = {name: dtype for dtype, name in STORED_AS.items() if dtype.is_floating_point}
HEADER_LIMIT = 100_000_000  # bytes; readers refuse more


def write_safetensors(path, tensors, metadata):
    """Write tensors {name: tensor on any device} and metadata {text: text}; return once the disk has them.

    One tensor at a time passes through host memory. Wide types come first, which keeps every tensor aligned.
    """
    order, header, end = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)), {"__metadata__": metadata}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        if tensors[name].dtype not in STORED_AS:
            raise CheckpointError(f"{name} is {tensors[name].dtype}, which is not written here: convert it first")
        header[name] = {"dtype": STORED_AS[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise CheckpointError(
            f"the header of {path.name} would be {len(text):,} bytes and readers stop at {HEADER_LIMIT:,}: "
            "keep long lists out of the loop's dict"
        )
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def _write_json(path, data):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(folder):
    """A rename is kept in the folder, and the folder, too, reaches the disk only when asked to."""
    if os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path):
    """Turn what the operating system says while `path` is written into a sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = "what was there before is untouched: free some space on this disk and save again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = "it may not be written to: choose another folder or change its permissions"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            why = "a file is where a folder should be, or the reverse: choose another name"
        else:
            why = "choose another place"
        raise CheckpointError(f"cannot write {path} ({error.strerror or error}); {why}") from None
    except ValueError as error:  # the tokenizer's own sentence
        raise CheckpointError(str(error)) from None


def open_safetensors(path, device="cpu"):
    """A safetensors file opened for reading; only its header is read and checked."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: check the path")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file ({error}): it is damaged or cut "
            "short; copy or make it again"
        ) from None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is no model folder: check the path") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        raise CheckpointError(f"{path} is not valid JSON ({error}): it is damaged or cut short") from None


# ---------------------------------------------------------------------------------------------------------------------
# 3. Model folders
# ---------------------------------------------------------------------------------------------------------------------

SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAVING, SAVED = ".saving", ".saved"  # see the top of the file
KEPT_WIDE = ("A_log", "D", "dt_bias")  # exp(dt * A) is compounded over thousands of tokens: float32 at least


def load_pretrained(folder, device="cpu", dtype=None):
    """Open a Hugging Face folder: (model in eval mode, tokenizer or None if there is no tokenizer.json).

    device: where the tensors go, each read straight to it. dtype: a torch dtype or its name; None takes the one that
    config.json names, else float32. A_log, D and dt_bias stay in float32 in a 16-bit model.
    Raises CheckpointError for anything missing, damaged, contradictory or not supported, before any weight is read.
    """
    folder, device = Path(folder), _device(device)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give the folder that holds config.json")
    d = _read_json(_find(folder, "config.json"))
    config = config_from_dict(d)
    dtype = _dtype(dtype or d.get("dtype") or d.get("torch_dtype") or "float32")
    try:
        with torch.device("meta"):
            model = NemotronH(config)
    except (RuntimeError, OverflowError, TypeError):
        raise CheckpointError(f"{folder} asks for tensors larger than any machine's memory: check it") from None
    sources = _match(
        folder, [open_safetensors(path, device) for path in _weight_files(folder)], dict(model.named_parameters())
    )
    try:
        for name, (file, key) in sources.items():
            parent, _, leaf = name.rpartition(".")
            kept = torch.promote_types(dtype, torch.float32) if leaf in KEPT_WIDE else dtype
            # On the CPU the library returns a view of the file; a copy stays right whatever happens to the file.
            tensor = file.get_tensor(key).to(kept, copy=device.type == "cpu")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
    except torch.OutOfMemoryError:
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize / 2**30
        raise CheckpointError(
            f"{folder} needs {size:.1f} GiB in {dtype}, more than {device} has free: use a smaller dtype or device cpu"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {name} of {folder} ({error})") from None
    return model.eval(), _load_tokenizer(folder, config)


def save_pretrained(folder, model, tokenizer=None, max_shard_bytes=5 * 10**9):
    """Write a folder that `load_pretrained` and transformers (5.15 and later) open.

    tokenizer None leaves a tokenizer that is already there alone. Weights above max_shard_bytes are split into several
    files with an index. Other files in the folder are not touched. If this fails or is killed, the folder holds either
    everything from before or everything new; see the top of the file. Raises CheckpointError.
    """
    folder = Path(folder)
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be a whole number of at least 1; got {max_shard_bytes!r}")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size} rows: "
            "save the tokenizer that the model was trained with"
        )
    tensors, shards, room = model.state_dict(), [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    names = [SINGLE] if len(shards) == 1 else [SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
    made, saving = not folder.exists(), folder / SAVING
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _finish(folder)
        try:
            shutil.rmtree(saving, ignore_errors=True)  # left by a kill
            saving.mkdir()
            for file, shard in zip(names, shards):
                write_safetensors(saving / file, shard, {"format": "pt"})
            if len(names) > 1:
                total = sum(t.numel() * t.element_size() for t in tensors.values())
                weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
                _write_json(saving / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            if tokenizer is not None:
                tokenizer.save(saving)
            _write_json(saving / "config.json", config_to_dict(model.config, model.lm_head.weight.dtype))
            fsync_folder(saving)
            os.replace(saving, folder / SAVED)  # from here on the new model counts
        except BaseException:
            shutil.rmtree(saving, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
        fsync_folder(folder)
        _finish(folder)


def _finish(folder):
    """Move the files of a complete `.saved` up into the folder. May be cut short anywhere and called again.

    First the old weight files go, and only then do the new ones move: so at every instant each new file is in one of
    the two places, and no old file of another name is mistaken for one of them.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return
    new = {path.name for path in saved.iterdir()}
    if new & {SINGLE, INDEX}:
        keep = {SINGLE} if SINGLE in new else {INDEX, *_read_json(saved / INDEX)["weight_map"].values()}
        ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and path.name not in keep:
                path.unlink()
    for name in sorted(new):
        os.replace(saved / name, folder / name)
    fsync_folder(folder)
    saved.rmdir()


def _find(folder, name):
    """Where the folder's file `name` is now: in `.saved` if a save was cut short while moving, else in the folder."""
    return folder / SAVED / name if (folder / SAVED / name).is_file() else folder / name


def _weight_files(folder):
    """The paths of the safetensors files of a folder."""
    for place in (folder / SAVED, folder):
        if (place / SINGLE).is_file():
            return [place / SINGLE]
        if (place / INDEX).is_file():
            index = _read_json(place / INDEX)
            files = index.get("weight_map") if isinstance(index, dict) else None
            files = sorted(set(files.values())) if isinstance(files, dict) and files else []
            if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
                raise CheckpointError(f"{place / INDEX} has no weight_map from tensor names to file names beside it")
            missing = [file for file in files if not _find(folder, file).is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder} lacks {len(missing)} of the {len(files)} weight files that its index names, the first "
                    f"being {missing[0]}: copy the rest of the checkpoint"
                )
            return [_find(folder, file) for file in files]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in pickle files only ({pickles[0]}), which are never unpickled, as that would "
            "run any program inside: convert to safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: copy the weights there")


def _match(folder, files, wanted):
    """{our name: (open file, its key)} for every tensor in `wanted`, checked by the headers alone."""
    sources = {}
    for file in files:
        for key in file.keys():
            name = "backbone." + key.removeprefix("model.") if key.startswith("model.") else key
            name = name.replace("backbone.embedding.", "backbone.embeddings.", 1)
            if name in sources:
                raise CheckpointError(f"{folder} holds the tensor {name} twice: remove one")
            sources[name] = file, key
    lacking, extra = [name for name in wanted if name not in sources], sorted(sources - wanted.keys())
    if lacking or extra:
        some = ", ".join((lacking or extra)[:3]) + ", ..." * (len(lacking or extra) > 3)
        what = f"lacks {len(lacking)} of the model's {len(wanted)} tensors"
        if not lacking:
            what = f"holds {len(extra)} tensors that the model of its config.json ({len(wanted)} tensors) does not have"
        raise CheckpointError(f"{folder} {what} ({some}): config and weights differ")
    for name, (file, key) in sources.items():
        header = file.get_slice(key)
        shape, stored = tuple(header.get_shape()), header.get_dtype()
        if shape != tuple(wanted[name].shape):
            asked = tuple(wanted[name].shape)
            raise CheckpointError(f"{name} has shape {shape} in {folder}, but its config.json asks for {asked}")
        if stored not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {stored} in {folder}; only {', '.join(FLOATS)} can be read: undo the quantisation"
            )
    return sources


def _load_tokenizer(folder, config):
    paths = [path for path in (_find(folder, name) for name in TOKENIZER_FILES) if path.is_file()]
    if not any(path.name == "tokenizer.json" for path in paths):
        return None
    try:
        if all(path.parent == folder for path in paths):
            tokenizer = Tokenizer.load(folder)
        else:  # a save was cut short between the two files: bring them together
            with tempfile.TemporaryDirectory() as together:
                for path in paths:
                    shutil.copy(path, together)
                tokenizer = Tokenizer.load(together)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} has a tokenizer that cannot be read: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} ids and a model of {config.vocab_size} rows: they do "
            "not belong together"
        )
    return tokenizer


def _dtype(dtype):
    dtype = DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise CheckpointError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    return dtype


def _device(device):
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise CheckpointError(f"unknown device {device!r}; use cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise CheckpointError(f"device {device} was asked for, but there are {count} CUDA devices: use device cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device
