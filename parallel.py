"""Several processes, one training run: who holds what, who computes what, and how much memory that takes.

What is trained costs 16 bytes a parameter: weight, gradient and Adam's two moments, each in float32. What the layers
remember for the backward comes on top, and grows with the tokens of a process. With N processes (torchrun):

    ddp     each holds all 16 bytes and computes its rows; gradients are averaged       16 P          + activations / N
    fsdp    each holds one Nth of every tensor; a layer is put together just before     16 P / N      + activations / N
            it is needed, forward and again backward, and taken apart after it          + a layer or two

Both compute the gradient of the one global batch. For the 12B, 16 P is 183 GiB: no GPU holds it, and two of 141 GB do
when it is divided (FSDP2, PyTorch's `fully_shard`; the idea is ZeRO-3's, Rajbhandari et al. 2019).

*Recomputing* is the other lever: a layer keeps only its input, and the backward runs its forward once more (activation
checkpointing, Chen et al. 2016; nothing is written to a disk). That is a third more work, and what is remembered
shrinks to one input for each layer, and one layer in full. `training_bytes` has both sums.

What travels, and in which number format. The float32 pieces are the master weights; autocast would round a matrix to
bfloat16 before multiplying, so a matrix is rounded *before* it travels, which is half the bytes and the same numbers.
(Rounding after it would also keep a 16-bit copy of every layer for the backward: the whole model again.) Norms, conv
and the SSM's A_log, D and dt_bias are used in float32 and travel so, and so do embedding and head. Gradients are summed
in float32. Each layer is therefore two groups of tensors, its matrices and its rest.

A matrix that trains in eight bits (fp8.py) travels in float32, twice the traffic of bfloat16, because rounded to that
first it would be rounded twice; and its codes stay, a byte a weight on every process, until the backward has used them
(or the layer is computed again). A byte a number would do for the way, too. But a scale belongs to 128 rows, and pieces
do not end where blocks do (22,656 rows of the 12B's in_proj are 88.5 blocks for each of two processes), so the
processes would have to agree on scales first. PyTorch has the place for such code (a tensor that says how it is
gathered), and not the code.

The order matters: recompute, then compile, then divide. A layer that is computed again must be one that is already put
together, and the compiled code must not contain the putting together. So a compiled layer is one group, and travels in
float32: with a second group inside, PyTorch would leave the layer uncompiled, and not say so.

Limits. Every process builds the whole model once, in float32, before it is divided: so all start alike, whatever their
number. Answering questions takes a whole copy on the first process. float16 is left to ddp: its loss scale would have
to look for overflow in every process. The engine is PyTorch's: what it does better than a page of our own is to fetch
the next layer while this one computes.

This file must not know data or training loops.
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as computed_again

import checkpoint
import resume
from device import room_gib
from loss import SLICE
from model import NemotronH
from safefile import whole, writing_order
from sizes import count_parameters

ENGINES = ("ddp", "fsdp")
RECOMPUTE = ("off", "layers")

# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def check(engine, recompute, dtype, world):
    """What the start-up report says of the two flags; ValueError for what cannot be had."""
    if engine not in ENGINES:
        raise ValueError(f"--parallel {engine!r} is not one of {', '.join(ENGINES)}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"--recompute {recompute!r} is not one of {', '.join(RECOMPUTE)}")
    if engine == "fsdp" and world > 1 and dtype == torch.float16:
        raise ValueError("--parallel fsdp does not scale losses, which --dtype float16 needs: use bfloat16 or ddp")
    told = {"ddp": f"each of {world} holds the whole model", "fsdp": f"each of {world} holds one part in {world}"}
    again = "; layers keep their input only and are computed again" if recompute == "layers" else ""
    return (f"{engine}: {told[engine]}" if world > 1 else "one process: nothing to divide") + again


def start(device, world):
    """Meet the other processes that torchrun started."""
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


# ---------------------------------------------------------------------------------------------------------------------
# Recompute, compile, divide
# ---------------------------------------------------------------------------------------------------------------------


def recompute_layers(model):
    """Let every layer keep only its input for the backward. Without gradients nothing changes."""
    for block in model.backbone.layers:
        block.forward = _again(block.forward)


def _again(forward):
    def run(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        # no layer draws random numbers, so there is no generator to wind back
        return computed_again(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def divide(objective, engine, device, dtype, world, compiled=False):
    """`objective` (a module with .model inside) as `world` processes train it; call before the optimizer is made.
    compiled: whether the layers are."""
    if world == 1:
        return objective
    if engine == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (world,))
    as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in objective.model.backbone.layers:
        if dtype != torch.float32 and not compiled:
            # of type nn.Linear: those that train in eight bits round their float32 weight themselves, and once
            matrices = [module for module in block.modules() if type(module) is nn.Linear]
            if matrices:
                fully_shard(matrices, mesh=mesh, mp_policy=rounded)
        fully_shard(block, mesh=mesh, mp_policy=as_it_is)
    fully_shard(objective.model.backbone.embeddings, mesh=mesh, mp_policy=as_it_is)
    return fully_shard(objective, mesh=mesh, mp_policy=as_it_is)  # the rest: the last norm and the head


def between_parts(objective, last):
    """The context for one part of an accumulated step. DDP waits for the last part to average gradients; FSDP adds
    every part's to its piece at once, because waiting would mean to hold the gradient whole."""
    return objective.no_sync() if isinstance(objective, DistributedDataParallel) and not last else nullcontext()


def clip(parameters, limit):
    """Cut the gradient's norm, over all pieces of all processes, to `limit`; returns what it was."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in pieces
# ---------------------------------------------------------------------------------------------------------------------


def is_divided(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def help_save(model, optimizer, folder):
    """What every process but the first does while that one saves a divided model: give its pieces, in the order in
    which they are written. The checkpoint folder's come first, if `folder`, then the training state's."""
    if not is_divided(model):
        return
    files = [resume.training_tensors(model, optimizer)]
    for tensors in (checkpoint.split(model.state_dict()) if folder else []) + files:
        for name in writing_order(tensors):
            whole(tensors[name])


def plain_copy(model, rank):
    """On the first process a whole, undivided float32 copy of a divided model, to ask; None on the others, which must
    all call this too. An undivided model is its own copy."""
    if not is_divided(model):
        return model if rank == 0 else None
    copy = None
    if rank == 0:
        with torch.device("meta"):
            copy = NemotronH(model.config).use(model.impl)
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if rank == 0:
            parent, _, leaf = name.rpartition(".")
            setattr(copy.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    return copy


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def kept_bytes(config, letter, length, wide, impl="triton"):
    """Bytes a token that one layer of the pattern keeps for its backward, without the weights. wide: bytes of a number
    in the matrix products (2 or 4).

    Each layer keeps the stream and the normalised stream in float32 and what enters its first matrix. A Mamba layer
    then keeps in_proj's output, the convolved x|B|C, y before and after the gated norm, and a state for every chunk;
    with PyTorch's own operations about twice that. Attention keeps q, k, v, its output and, in a packed row, its mask.
    """
    c, around = config, (8 + wide) * config.hidden_size
    if letter == "-":
        return around + 2 * wide * c.intermediate_size
    if letter == "*":
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return around + wide * (2 * q + 2 * kv + length) + 4 * c.num_attention_heads
    states = c.mamba_inner * c.ssm_state_size // max(c.chunk_size, 64)
    inside = wide * (3 * c.mamba_inner + 2 * c.conv_channels + c.mamba_num_heads + states) + 24 * c.mamba_num_heads
    return around + inside * (1 if impl == "triton" else 2)


def training_bytes(config, tokens, length, wide=4, world=1, engine="ddp", recompute="off", impl="triton", fp8=False):
    """Bytes that each of `world` processes needs for a step in which it reads `tokens` tokens at a time, in rows of
    `length`: {"weights", "gradients", "adam", "gathered", "activations", "loss", "total"}. Rather more than less.

    gathered: what exists besides the float32 tensors to compute with. For ddp the 16-bit copies of all matrices; for
    fsdp, in float32, embedding, head and two layers, one at work and one being fetched, with one's gradient. With fp8
    the backward of a layer keeps its weights' codes, a byte a weight, whole on every process.
    """
    c, pattern, counts = config, config.hybrid_override_pattern, count_parameters(config)
    share = world if engine == "fsdp" else 1
    layer = max(counts[k] / max(1, pattern.count(x)) for k, x in (("mamba", "M"), ("attention", "*"), ("mlp", "-")))
    if engine == "fsdp" and world > 1:
        gathered = 4 * (counts["embedding"] + counts["head"]) + 3 * 4 * layer
    else:
        gathered = 0 if wide == 4 else wide * (counts["mamba"] + counts["attention"] + counts["mlp"] + counts["head"])
    kept = [kept_bytes(c, letter, length, wide, impl) for letter in pattern]
    a_token = sum(kept) if recompute == "off" else 4 * c.hidden_size * len(pattern) + max(kept)
    logits = 4 * c.vocab_size * tokens
    codes = fp8 * (layer if recompute == "layers" else counts["mamba"] + counts["attention"] + counts["mlp"])
    parts = {
        "weights": 4 * counts["total"] / share,
        "gradients": 4 * counts["total"] / share,
        "adam": 8 * counts["total"] / share,
        "gathered": gathered,
        "activations": a_token * tokens + codes,
        "loss": 3 * logits if logits <= SLICE else 3 * SLICE + 4 * counts["head"],  # see loss.py
    }
    parts = {name: int(size) for name, size in parts.items()}
    return parts | {"total": sum(parts.values())}


def describe_memory(parts):
    """One line for the start-up report."""
    gib = {k: f"{v / 2**30:.2f} GiB" if v >= 2**30 / 10 else f"{v / 2**20:.2f} MiB" for k, v in parts.items()}
    return (
        f"about {gib['total']} a process: weights {gib['weights']}, gradients {gib['gradients']}, Adam {gib['adam']}, "
        f"to compute with {gib['gathered']}, activations {gib['activations']}, loss {gib['loss']}"
    )


def check_room(parts, device, world, preset):
    """ValueError if weights, gradients and Adam alone (`training_bytes`) are more than all the memory there is: the
    card's, or the machine's, which all its processes share."""
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", world))
    need = sharing * (parts["weights"] + parts["gradients"] + parts["adam"]) / 2**30
    if need > room_gib(device):
        raise ValueError(
            f"--preset {preset} needs {need:.1f} GiB for weights, gradients and optimizer alone, and {device} has "
            f"{room_gib(device):.1f} GiB: choose a smaller preset, or divide it (torchrun with --parallel fsdp)"
        )
