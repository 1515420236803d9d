"""Every kernel compiles for GPUs that are not here, within their shared memory (compile_for_gpu.py says how)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -r requirements-test.txt")

KERNELS = {
    "conv1d": {"_forward", "_backward"}, "norm": {"_forward", "_backward"}, "decode": {"_mixer_step"},
    "cross_entropy": {"_rows"}, "linear": {"_linear"}, "attend": {"_put", "_part", "_weigh"},
    "fp8": {"_quantise"},
    "ssd": {"_decays", "_walk", "_mix"},
    "ssd_backward": {"_pairs", "_gather", "_finish"},
}  # fmt: skip


@pytest.mark.parametrize("capability, shared", [(90, 232448), (89, 101376)], ids=["Hopper", "Ada"])
def test_all_kernels_compile(capability, shared, tmp_path):
    script = Path(__file__).parent / "compile_for_gpu.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(capability), str(shared)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == {f"kernels.{file}.{k}" for file, ks in KERNELS.items() for k in ks}
    assert all(used <= shared for _, _, used in compiled), compiled
