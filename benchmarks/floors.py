"""The arithmetic of `bench.py kernels`: bytes and operations that no version can do without.

Every input read once, every output written once; every product of the chunked form. Small functions, so that anybody
can redo the sum.
"""

from typing import NamedTuple


class Scan(NamedTuple):
    """The axes of one scan, in the letters of mamba2.py."""

    b: int
    l: int
    h: int
    p: int
    g: int
    n: int

    def __str__(self):
        return " ".join(f"{name}{size}" for name, size in zip(self._fields, self))


def scan_bytes(s, backward=False, size=2):
    """Bytes of a scan of `size`-byte numbers: x, B, C and dt in, y and the float32 state out. Backward (alone): x, B,
    C, dt and dy in, dx, dB, dC and ddt out. What has one number a head (A, D, dt_bias) is not worth counting."""
    x, key, dt = s.b * s.l * s.h * s.p, s.b * s.l * s.g * s.n, s.b * s.l * s.h
    if backward:
        return size * (3 * x + 4 * key + 2 * dt)
    return size * (2 * x + 2 * key + dt) + 4 * s.b * s.h * s.p * s.n


def scan_flops(s, backward=False, q=64):
    """Operations of a scan in chunks of q tokens, as matrix products, causal halves counted as halves. A token costs
    4 h p n for writing and reading the state, q g n for C.B and q h p for the mix inside the chunk. Backward (alone)
    is twice that: two products for each. Smaller chunks have less to do, but below 64 the matrix units idle."""
    token = 4 * s.h * s.p * s.n + q * (s.g * s.n + s.h * s.p)
    return s.b * s.l * token * (2 if backward else 1)


def conv_bytes(b, l, channels, backward=False, size=2):
    """x in, y out; backward (alone) x and dy in, dx out."""
    return size * b * l * channels * (3 if backward else 2)


NORM_TENSORS = {  # (forward, backward alone), each of rows x width numbers
    "rms": (2, 3),  # x -> y; x, dy -> dx
    "add": (4, 4),  # x, residual -> y, sum; sum, dy, dsum -> one gradient for both
    "gated": (3, 5),  # y, z -> out; y, z, dout -> dy, dz
}


def norm_bytes(kind, rows, width, backward=False, size=2):
    return size * rows * width * NORM_TENSORS[kind][backward]


def decode_bytes(b, h, p, g, n, k=4, size=2):
    """One token of one layer between the projections: the float32 state and the window read and written, the row of
    in_proj read, the row for out_proj written, the layer's small weights read once."""
    inner, channels = h * p, h * p + 2 * g * n
    row = (inner + channels + h) + 2 * (k - 1) * channels + inner
    weights = channels * (k + 1) + 3 * h + inner
    return b * (8 * inner * n + size * row) + size * weights


def floor_ms(bytes_, flops, ceilings):
    """(milliseconds, "bytes" or "FLOPs"): the longer of the two, at the measured rates."""
    moving, computing = bytes_ / ceilings["copy"] * 1e3, flops / ceilings["matmul"] * 1e3
    return (moving, "bytes") if moving >= computing else (computing, "FLOPs")
