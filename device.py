"""Which device, which number format, and why: every script prints what is decided here before it starts.

Scripts import this file first: it says how torch's CPU threads wait, and that must be said before torch is loaded.
This file must not know models.
"""

# ruff: noqa: E402
import importlib.util
import os
import platform
import resource

# Threads that wait then sleep soon. By default they spin, and when anything else runs on a small machine, two spinning
# threads are many times slower than one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# GPU memory in pieces that can grow: what was freed can be used again for something larger.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

# bf16 matrix peak in FLOP/s, dense, from the makers' data sheets: what MFU is measured against
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def choose_device(wish):
    """(torch.device, reason)."""
    if wish not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {wish!r} is not one of auto, cpu, cuda")
    if wish == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was asked for and PyTorch sees no CUDA device: use --device cpu, or check_env.py"
        )
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), "asked for" if wish == "cpu" else "PyTorch sees no CUDA device"
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(index)
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def choose_dtype(wish, device):
    """(torch.dtype, reason). bfloat16 needs compute capability 8.0: older cards only emulate it, whatever
    torch.cuda.is_bf16_supported() says."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wish != "auto":
        if wish not in names:
            raise ValueError(f"--dtype {wish!r} is not one of auto, {', '.join(names)}")
        if wish == "float16" and device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU: use bfloat16 or float32 on a CPU")
        return names[wish], "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor}"
        return (
            torch.float16,
            f"compute capability {major}.{minor} has no bfloat16; losses are scaled, the scan is float32",
        )
    if "amx_bf16" in _cpu_flags():
        return torch.bfloat16, "this CPU has AMX: bfloat16 matrix products are faster"
    return torch.float32, "this CPU has no bfloat16 matrix unit (AMX)"


def choose_impl(wish, device, config=None, compiled=False):
    """("torch" or "triton", reason): who computes the Mamba-2 layers between their projections, the loss, and when
    nothing is trained the norms and decode steps, of a model with this ModelConfig; compiled: torch.compile will see
    the model."""
    if wish not in ("auto", "torch", "triton"):
        raise ValueError(f"--impl {wish!r} is not one of auto, torch, triton")
    if wish == "torch":
        return "torch", "asked for"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        missing = "the package triton is not installed"
    elif device.type != "cuda" and not interpreted:
        missing = "Triton needs a GPU (or TRITON_INTERPRET=1, to step through the kernels on a CPU)"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        missing = "Triton's kernels are made for compute capability 8.0 or newer"
    elif config and (config.mamba_head_dim > 128 or config.ssm_state_size > 256 or not 2 <= config.conv_kernel <= 4):
        missing = (
            f"its kernels hold head_dim up to 128, states up to 256 and 2 to 4 taps; this model has "
            f"{config.mamba_head_dim}, {config.ssm_state_size} and {config.conv_kernel}"
        )
    elif (
        config
        and "*" in config.hybrid_override_pattern
        and (config.head_dim > 256 or config.num_attention_heads > 16 * config.num_key_value_heads)
    ):
        missing = (
            f"its kernels take attention heads of up to 256, 16 for each key/value head; this model has "
            f"{config.num_attention_heads} of {config.head_dim} for {config.num_key_value_heads}"
        )
    elif wish == "triton":
        return "triton", "asked for"
    elif device.type == "cuda" and compiled and config and config.mamba_inner < 1024:
        missing = f"layers of {config.mamba_inner} channels were faster as torch.compile writes them, on an H200"
    elif device.type == "cuda":
        return "triton", "faster, measured on an H200; the first step takes some 12 s longer, to compile the kernels"
    else:
        missing = "the interpreter that TRITON_INTERPRET=1 asks for is slow: --impl triton takes it"
    if wish == "triton":
        raise ValueError(f"--impl triton cannot be had: {missing}; use --impl torch")
    return "torch", missing


def choose_fp8(wish, device, dtype):
    """("off", "emulate" or "real", reason): whether the inner matmuls train with eight-bit operands, and who multiplies
    them, beside matmuls in this dtype."""
    if wish not in ("off", "emulate", "real"):
        raise ValueError(f"--fp8 {wish!r} is not one of off, emulate, real")
    if wish == "off":
        return "off", "eight bits are taken only where --fp8 asks for them"
    if dtype == torch.float16:
        raise ValueError(
            f"--fp8 {wish} and float16 do not go together: eight bits saturate where the loss scaler waits for an "
            "infinity; use --dtype bfloat16 or float32, or --fp8 off"
        )
    if wish == "emulate":
        return "emulate", "asked for: the roundings of eight bits, multiplied as wider numbers"
    missing, cuda = None, torch.version.cuda or "0.0"
    if device.type != "cuda":
        missing = "it needs a GPU"
    elif torch.cuda.get_device_capability(device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(device)
        missing = f"PyTorch has it for compute capability 9.0 (Hopper) only; this card has {major}.{minor}"
    elif tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        missing = f"it needs CUDA 12.9 or newer; this PyTorch was built with {cuda}"
    elif not hasattr(torch.nn.functional, "scaled_mm"):
        missing = f"it needs torch.nn.functional.scaled_mm; torch {torch.__version__} has none"
    elif importlib.util.find_spec("triton") is None:
        missing = "the package triton is not installed"
    if missing:
        raise ValueError(f"--fp8 real cannot be had: {missing}; use --fp8 emulate, which rounds alike on any device")
    return "real", f"asked for; {torch.cuda.get_device_name(device)}, CUDA {cuda}"


def _cpu_flags():
    try:
        return next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
    except (OSError, StopIteration):
        return []


def room_gib(device):
    """All the memory there is: the card's, or the machine's; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return float("inf")


def free_bytes(device):
    """Bytes that new tensors can take. On a GPU: what is free on the card or kept in reserve by PyTorch, within the cap
    of torch.cuda.set_per_process_memory_fraction. On a CPU simply all there is (see `room_gib`)."""
    if device.type != "cuda":
        return room_gib(device) * 2**30
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    return max(0, min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - held))


def memory_gib(device):
    """The most memory held so far: on a GPU by tensors, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(device):
    """The card's bf16 matrix peak in FLOP/s, or None for a card that is not in the table, or a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK.items() if card in name), None)
