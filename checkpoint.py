"""Files: released model folders in and out, and writing that survives a kill.

The idea. A *model folder* is what other programs read: config.json, one or several safetensors files, a tokenizer. The
names of our tensors are the released ones, so opening a folder is no translation: build the model without memory
(PyTorch's "meta" device), check every name, shape and dtype against the file headers and the sum against the room on
the device, and only then read each tensor straight to where it will live. Files are opened one after the other: what
was read of a mapped file counts as the process's memory until it is closed. So the 9B needs its own 17 GB and, on the
host, one file more. config.json exists in two dialects, the released one (`hybrid_override_pattern`) and that of
transformers 5 (`layers_block_type`); we read both and write the first (hf_config.py).

A kill at any instant leaves the old folder or the new one. There is one trick: write to a new name, ask the disk to
really have it (fsync), then rename over the old name. A rename is all or nothing. A folder is several files, so these
are collected in a subfolder `.saving`, one rename to `.saved` makes them count, and then they move up one by one; a
reader looks into `.saved` first, and the next save finishes a move that was cut short.

How single files are written and read is in safefile.py. This file must not know training, nor where data comes from.
Sources: released config.json and tensor names.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError

from device import free_bytes
from hf_config import DTYPES, config_from_dict, config_to_dict
from model import NemotronH
from quantize import Int8Linear, NotFinite, quantize_, quantize_rows
from safefile import (
    FLOATS,
    CheckpointError,
    fsync_folder,
    open_safetensors,
    read_json,
    write_json,
    write_safetensors,
    writing,
)
from sizes import fits, weights_bytes
from tokenizer import Tokenizer

SINGLE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAVING, SAVED = ".saving", ".saved"  # see the top of the file
KEPT_WIDE = ("A_log", "D", "dt_bias")  # exp(dt * A) is compounded over thousands of tokens: float32 at least


def load_pretrained(folder, device="cpu", dtype=None, int8=False):
    """Open a Hugging Face folder: (model in eval mode, tokenizer or None if there is no tokenizer.json).

    device: where the tensors go, each read straight to it; the host holds less than two of the files at a time (on the
    CPU: besides the model). dtype: a torch dtype or its name; None takes the one that config.json names, else float32.
    A_log, D and dt_bias stay in float32 in a 16-bit model. int8: round the matrices of Mamba and MLP layers to eight
    bits as they are read, so that the wide ones are never there together (quantize.py); the rest is in dtype.
    Raises CheckpointError for anything missing, damaged, contradictory, not supported or too large for the device,
    before any weight is read; and, with int8, for a weight that is not finite.
    """
    folder, device = Path(folder), _device(device)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give the folder that holds config.json")
    d = read_json(_find(folder, "config.json"))
    config = config_from_dict(d)
    dtype = _dtype(dtype or d.get("dtype") or d.get("torch_dtype") or "float32")
    try:
        with torch.device("meta"):
            model = NemotronH(config)
    except (RuntimeError, OverflowError, TypeError):
        raise CheckpointError(f"{folder} asks for tensors larger than any machine's memory: check it") from None
    paths = _weight_files(folder)
    seen = [_identity(path) for path in paths]
    keys = _match(folder, paths, dict(model.named_parameters()))
    try:
        check_room(config, device, 1, 1, int8, weight_bytes=dtype.itemsize)
    except ValueError as error:
        raise CheckpointError(f"{folder} is too large: {error}") from None
    if int8:
        quantize_(model)  # without memory still: the places that are filled below
    try:
        for path, before in zip(paths, seen):
            if _identity(path) != before:
                raise CheckpointError(f"{path} was replaced while {folder} was being read: open the folder again")
            with open_safetensors(path, device) as file:
                for name, key in keys[path].items():
                    parent, _, leaf = name.rpartition(".")
                    module = model.get_submodule(parent)
                    if isinstance(module, Int8Linear) and leaf == "weight":
                        module.weight, module.scale = quantize_rows(file.get_tensor(key))
                        continue
                    kept = torch.promote_types(dtype, torch.float32) if leaf in KEPT_WIDE else dtype
                    # On the CPU the library returns a view of the file; a copy outlives it.
                    tensor = file.get_tensor(key).to(kept, copy=device.type == "cpu")
                    setattr(module, leaf, nn.Parameter(tensor))
    except torch.OutOfMemoryError:
        size = weights_bytes(config, dtype.itemsize, int8) / 2**30
        raise CheckpointError(
            f"{folder} needs {size:.1f} GiB in {dtype}, more than {device} has free: use a smaller dtype or device cpu"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {name} of {folder} ({error})") from None
    except NotFinite as error:
        raise CheckpointError(f"{name} of {folder} cannot be int8: {error}") from None
    return model.eval(), _load_tokenizer(folder, config)


def check_room(config, device, tokens, rows, int8=False, weight_bytes=2, work=0, held=0):
    """Raise ValueError, in one sentence with what would fit (see `sizes.fits`), if the weights and `rows` rows of
    `tokens` tokens do not fit on the torch.device. held: bytes of the weights that are on it already; work: bytes to
    leave free beside them. A CPU refuses only what is larger than all the machine's memory."""
    cuda = device.type == "cuda"
    room, name = free_bytes(device) + held * cuda, str(device) if cuda else "this machine"
    lacking = fits(config, room, tokens, rows, int8, work, weight_bytes, name)
    if lacking:
        raise ValueError(lacking)


def save_pretrained(folder, model, tokenizer=None, max_shard_bytes=SHARD_BYTES):
    """Write a folder that `load_pretrained` and transformers (5.15 and later) open.

    tokenizer None leaves a tokenizer that is already there alone. Weights above max_shard_bytes are split into several
    files with an index. Other files in the folder are not touched. If this fails or is killed, the folder holds either
    everything from before or everything new; see the top of the file. Raises CheckpointError, also for an int8 model.
    """
    folder = Path(folder)
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be a whole number of at least 1; got {max_shard_bytes!r}")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size} rows: "
            "save the tokenizer that the model was trained with"
        )
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise CheckpointError(
            "the model's weights are int8, which is a way to load a folder and not to store one: save the model that "
            "was loaded without int8"
        )
    tensors = model.state_dict()
    shards = split(tensors, max_shard_bytes)
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
                write_json(saving / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            if tokenizer is not None:
                tokenizer.save(saving)
            write_json(saving / "config.json", config_to_dict(model.config, model.lm_head.weight.dtype))
            fsync_folder(saving)
            os.replace(saving, folder / SAVED)  # from here on the new model counts
        except BaseException:
            shutil.rmtree(saving, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
        fsync_folder(folder)
        _finish(folder)


def split(tensors, max_shard_bytes=SHARD_BYTES):
    """{name: tensor} as a list of such dicts, one for each file of a folder."""
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    return shards


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
        keep = {SINGLE} if SINGLE in new else {INDEX, *read_json(saved / INDEX)["weight_map"].values()}
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
            index = read_json(place / INDEX)
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


def _identity(path):
    """Which file this is and when it was last written; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _match(folder, paths, wanted):
    """{path: {our name: key in the file}} for every tensor in `wanted`, checked by the headers alone."""
    keys, headers = {path: {} for path in paths}, {}
    for path in paths:
        with open_safetensors(path) as file:
            for key in file.keys():
                name = "backbone." + key.removeprefix("model.") if key.startswith("model.") else key
                name = name.replace("backbone.embedding.", "backbone.embeddings.", 1)
                if name in headers:
                    raise CheckpointError(f"{folder} holds the tensor {name} twice: remove one")
                header = file.get_slice(key)
                keys[path][name], headers[name] = key, (tuple(header.get_shape()), header.get_dtype())
    lacking, extra = [name for name in wanted if name not in headers], sorted(headers.keys() - wanted.keys())
    if lacking or extra:
        some = ", ".join((lacking or extra)[:3]) + ", ..." * (len(lacking or extra) > 3)
        what = f"lacks {len(lacking)} of the model's {len(wanted)} tensors"
        if not lacking:
            what = f"holds {len(extra)} tensors that the model of its config.json ({len(wanted)} tensors) does not have"
        raise CheckpointError(f"{folder} {what} ({some}): config and weights differ")
    for name, (shape, stored) in headers.items():
        if shape != tuple(wanted[name].shape):
            asked = tuple(wanted[name].shape)
            raise CheckpointError(f"{name} has shape {shape} in {folder}, but its config.json asks for {asked}")
        if stored not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {stored} in {folder}; only {', '.join(FLOATS)} can be read: undo the quantisation"
            )
    return keys


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
