"""Training state: one file from which a run that was stopped goes on as if it had not been.

The idea. A training file is one safetensors file with everything that the next step depends on: weights, optimizer
moments (by parameter name, so their order does not matter), the random generators, and the loop's own numbers. A run
that is stopped and resumed ends with the same bits as one that was not; on a CPU the tests compare all of them.

It is one file so that it is one rename: a kill leaves the previous file or this one. Loading changes nothing unless
everything fits, so a wrong flag costs a sentence and not a run.

Why this is written by hand, and what the library does better. PyTorch's own saving is one line and takes any object,
but it pickles, and a pickle is a program that runs when it is opened. torch.distributed.checkpoint splits a state over
many machines. Here a state is named tensors and JSON, which any safetensors reader can look into.

This file must not know training loops: a loop is a dict of numbers to it.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from hf_config import config_to_dict
from safefile import STORED_AS, CheckpointError, fsync_folder, open_safetensors, write_safetensors, writing

FORMAT = "nano2-training-1"
HOW_NOT_WHAT = ("foreach", "fused", "capturable", "differentiable")  # how the optimizer computes: the new run decides


def save_training(path, model, optimizer, loop):
    """Write one file from which `load_training` continues to the bit. A kill leaves the previous file or this one.

    model: not wrapped (DDP's or torch.compile's inner module). optimizer: AdamW or any whose state is tensors, or None.
    loop: whatever else the next step depends on (step, data position, loss scale, ...): a dict of numbers, texts, True,
    None, lists and dicts; tuples come back as lists. The random generators of Python, numpy, PyTorch and the model's
    GPU are saved here. Raises CheckpointError.
    """
    path = Path(path)
    metadata = {"format": FORMAT, "loop": json.dumps(_plain(loop, "loop"))}
    metadata["config"] = json.dumps(config_to_dict(model.config, model.lm_head.weight.dtype))
    if optimizer is not None:
        metadata["optimizer"] = json.dumps({"class": type(optimizer).__name__, "groups": _groups(model, optimizer)})
    tensors = training_tensors(model, optimizer)
    kind, keys, *rest = np.random.get_state()
    metadata["random"] = json.dumps({"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]})
    tensors["random.cpu"] = torch.get_rng_state()
    device = model.lm_head.weight.device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name: what a kill leaves is overwritten
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_safetensors(temporary, tensors, metadata)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def training_tensors(model, optimizer=None):
    """{key: tensor} of a training file, without the random generators; as divided over processes as they are."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items() if optimizer else ():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"the optimizer's {kind} of {name} is a {type(value).__name__}, not a tensor")
            tensors[f"{kind}.{name}"] = value
    return tensors


def peek_training(path):
    """The `loop` dict of a training file; reads only its header."""
    return json.loads(_training_file(path)[1]["loop"])


def load_training(path, model, optimizer=None):
    """Put model, optimizer and random generators back to where `save_training` was called; return its `loop`.

    Tensors go to whatever device the model is on, in place where they exist already. optimizer None restores the rest
    only. Nothing is changed unless everything fits. Raises CheckpointError, naming the difference, if the file was
    written by another model or another optimizer.
    """
    file, metadata = _training_file(path)
    keys = set(file.keys())
    groups = [] if optimizer is None else _groups(model, optimizer)
    saved_groups = _check_training(path, file, keys, metadata, model, optimizer, groups)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_piece(file.get_tensor(f"model.{name}"), tensor))
    kinds = {}  # of each parameter: exp_avg, exp_avg_sq, step
    for key in keys:
        kinds.setdefault(_owner(key), []).append(key.partition(".")[0])
    for live_group, group in zip([] if optimizer is None else optimizer.param_groups, groups):
        for option, value in saved_groups[frozenset(group["names"])]["options"].items():
            old = live_group.get(option)
            if isinstance(old, torch.Tensor):  # a learning rate that a captured graph reads
                old.fill_(value)
            else:
                live_group[option] = tuple(value) if isinstance(old, tuple) else value
        steps_on_device = live_group.get("fused") or live_group.get("capturable")  # else AdamW counts on the CPU
        for parameter, name in zip(live_group["params"], group["names"]):
            live, state = optimizer.state.pop(parameter, {}), {}
            for kind in kinds.get(name, ()):
                tensor = _piece(file.get_tensor(f"{kind}.{name}"), parameter)
                device = parameter.device if kind != "step" or steps_on_device else torch.device("cpu")
                old = live.get(kind)
                in_place = isinstance(old, torch.Tensor) and (old.dtype, old.device) == (tensor.dtype, device)
                state[kind] = old.copy_(tensor) if in_place else tensor.to(device, copy=True)
            if state:
                optimizer.state[parameter] = state

    generators = json.loads(metadata["random"])
    version, numbers, gauss = generators["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, numbers, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(file.get_tensor("random.cpu").clone())
    device = model.lm_head.weight.device
    if device.type == "cuda" and "random.cuda" in keys:
        torch.cuda.set_rng_state(file.get_tensor("random.cuda").clone(), device)
    return json.loads(metadata["loop"])


def _check_training(path, file, keys, metadata, model, optimizer, groups):
    """Compare a training file with what it is to be loaded into, by its header; return its groups by their names."""
    saved, now = json.loads(metadata["config"]), config_to_dict(model.config, model.lm_head.weight.dtype)
    twins = ("num_hidden_layers", "rms_norm_eps")  # say again what another field says
    differ = [name for name in now.keys() & saved.keys() - set(twins) if saved[name] != now[name]]
    if differ:
        told = ", ".join(f"{name} {saved[name]!r} (now {now[name]!r})" for name in sorted(differ)[:3])
        raise CheckpointError(
            f"{path} was written by another model, with {told}{', ...' if len(differ) > 3 else ''}: give the same "
            "preset and flags as then, or start in another folder"
        )
    wanted = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {key for key in keys if _owner(key)}
    odd = sorted(wanted.keys() ^ {key for key in keys if key.startswith("model.")})
    if odd:
        raise CheckpointError(
            f"{path} and the model differ in {len(odd)} tensors ({odd[0]}): it is from another version"
        )

    saved_groups = {}
    if optimizer is not None:
        if "optimizer" not in metadata:
            raise CheckpointError(f"{path} was saved without an optimizer: load it with optimizer=None")
        written = json.loads(metadata["optimizer"])
        if written["class"] != type(optimizer).__name__:
            raise CheckpointError(
                f"{path} holds a state of {written['class']}, this run has {type(optimizer).__name__}: use that"
            )
        saved_groups = {frozenset(group["names"]): group for group in written["groups"]}
        if saved_groups.keys() != {frozenset(group["names"]) for group in groups}:
            raise CheckpointError(
                f"{path} has {sum(map(len, saved_groups))} parameters in {len(saved_groups)} optimizer groups, this "
                f"run {sum(len(g['names']) for g in groups)} in {len(groups)}, or grouped otherwise: build the "
                "optimizer as it was built then"
            )
        parameters = dict(model.named_parameters())
        wanted |= {key: parameters[_owner(key)] for key in moments if _owner(key) in parameters}
    for key, target in wanted.items():
        shape, stored = tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()
        fits = shape == tuple(target.shape) and (key in moments or stored == STORED_AS[target.dtype])
        size = target.numel()  # a step is a count; means over rows or columns (lean.py) are lists
        lists = [(), (len(target),), (size // len(target),)] if key in moments and target.dim() else [()]
        if not fits and not (key in moments and shape in lists):
            raise CheckpointError(
                f"{path} holds {key} as {stored} {shape}, but this model needs {STORED_AS[target.dtype]} "
                f"{tuple(target.shape)}: it is from another version"
            )
    return saved_groups


def _training_file(path):
    """(open file, metadata) of a training file, checked to be one."""
    file = open_safetensors(Path(path))
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a training file of this version (it says {metadata.get('format')!r}, not {FORMAT!r}): "
            "model folders are opened with load_pretrained"
        )
    return file, metadata


def _piece(tensor, like):
    """This process's piece of a whole `tensor`, divided as `like` is (a DTensor); the whole if that is not divided."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:  # a step's count belongs to all
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _owner(key):
    """The parameter's name in the key of an optimizer tensor (exp_avg.lm_head.weight), else None."""
    kind, _, name = key.partition(".")
    return None if kind in ("model", "random") else name


def _groups(model, optimizer):
    """The optimizer's groups as JSON: [{"names": [...], "options": {"lr": ..., "betas": ...}}, ...]."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        strangers = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if strangers:
            raise CheckpointError(
                f"the optimizer holds {len(strangers)} parameters that are not this model's, the first of shape "
                f"{strangers[0]}: pass the inner model and the optimizer that was built from it"
            )
        options = {k: v for k, v in group.items() if k != "params" and k not in HOW_NOT_WHAT}
        options = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in options.items()}
        groups.append({"names": [names[id(p)] for p in group["params"]], "options": _plain(options, "optimizer group")})
    return groups


def _plain(value, where):
    """`value` if JSON gives it back unchanged (tuples as lists); else a sentence that names the place."""
    if value is None or isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins":
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; only texts can be keys: use {str(key)!r}")
        return {key: _plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: make it a number, a text, a list or a dict"
    )
