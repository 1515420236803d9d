"""`python check_env.py`: what this machine has, what nano2 will do with it, and what is missing.

Exit code 0 if the main job can run, 1 if something it needs is missing.
"""

import importlib
import importlib.util
import os
import shutil
import sys


def main():
    print(f"python    {sys.version.split()[0]}" + ("" if sys.version_info >= (3, 10) else "   too old: 3.10 is needed"))
    missing = []
    for name in ("torch", "numpy", "tiktoken", "matplotlib", "safetensors", "jupyter"):
        found = importlib.util.find_spec(name) is not None
        version = (
            getattr(importlib.import_module(name), "__version__", "found") if found and name != "jupyter" else "found"
        )
        print(f"{name:<9} {version if found else 'MISSING'}")
        missing += [] if found else [name]
    if missing or sys.version_info < (3, 10):
        print(f"\nmissing: {', '.join(missing) or 'a newer Python'}. Install with: pip install -r requirements.txt")
        return 1

    import torch

    from device import choose_device, choose_dtype, peak_flops

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        print(f"\ntorch {torch.__version__} is too old: 2.11 or newer is needed. pip install -r requirements.txt")
        return 1
    device, why = choose_device("auto")
    dtype, dtype_why = choose_dtype("auto", device)
    print(f"\ndevice    {device}: {why}")
    print(f"dtype     {str(dtype)[6:]}: {dtype_why}")
    print(f"cores     {os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = peak_flops(device)
        print(f"memory    {free / 2**30:.1f} of {total / 2**30:.1f} GiB free on the GPU")
        print(
            f"peak      {f'{peak / 1e12:.0f} TFLOP/s in bfloat16' if peak else 'not in the table, so no MFU is shown'}"
        )
    optional = {
        "triton": "compiling for a GPU, and the kernels in kernels/",
        "transformers": "tests against the reference",
        "pytest": "make test",
    }
    for name, use in optional.items():
        found = importlib.util.find_spec(name) is not None
        print(f"{name:<12} {'found' if found else 'not found'} (optional: {use})")
    free = shutil.disk_usage(".").free / 2**30
    print(f"disk      {free:.1f} GiB free here" + ("" if free > 2 else "   the main job needs about 1 GiB"))
    preset = "nano-12m" if device.type == "cuda" else "nano-1m"
    print(f"\n`python train.py` will train {preset} here. README.md says how long that took on which machine.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
