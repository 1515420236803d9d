"""Measured speed, beside somebody else's code for the same thing.

A number alone says little, so every benchmark here runs its contestants in one process on the same weights and inputs,
checks first that they compute the same thing, takes turns between them (so that whatever else the machine is doing
hits all), and prints medians and the ratio. It prints what it ran on, because a figure without that is not a figure.

    python bench.py mixer               one Mamba-2 layer, forward and backward, on the CPU, against transformers
    python bench.py kernels             the Triton kernels on a GPU, against mamba_ssm, PyTorch and the floor
    python bench.py training            training steps of a 549 M model on a GPU: tokens/s, MFU, memory, a profile
    python bench.py fp8                 layers and a training step of the 12B's widths, eight-bit beside bf16
    python bench.py decode              a step of the 9B on a GPU, bf16 and int8, beside the bytes it must move
    python bench.py prefill             seconds to the first token, also of 128k tokens under a cap on memory
    python bench.py memory              the memory formula beside what is really held
    python bench.py loading             a folder of the 9B: seconds to open it, and the host's memory
    python bench.py throughput          the 9B against a transformer in the same memory: the report's headline
    python bench.py rollouts            tokens/s of many drawn answers, as reinforcement learning asks for them

All but the first are written in benchmarks/. This file must not be imported by anything:
it is a command. The other side of `mixer`, transformers' PyTorch path of NemotronH, is a test extra and not needed for
anything else. It is what most people run on a machine without a GPU; on a GPU its mixer calls the mamba_ssm kernels
instead, and that would be a different comparison.
"""

import argparse
import math
import os
import statistics
import sys
import time

import device  # noqa: F401  isort: skip  (before torch: how its threads wait)
import torch

from benchmarks import eight_bits, measure, rollouts, serving_command, training
from benchmarks.timing import cpu_name
from mamba2 import Mamba2Mixer
from model import PRESETS
from parallel import ENGINES, RECOMPUTE

MIXER_BAR = 2.0  # what this project set out to reach


def interleave(contestants, repeats):
    """Seconds of each call, {name: [seconds, ...]}: one call of each in turn, `repeats` times after one warm-up."""
    seconds = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# mixer: one Mamba-2 layer against transformers' PyTorch path
# ---------------------------------------------------------------------------------------------------------------------


def their_mixer(ours, chunk_size):
    """transformers' mixer with the weights of ours. Its clamp of dt at 0.001 (prefill only, an upstream quirk) is set
    to zero, as otherwise the two would not compute the same function. Raises ValueError if transformers is missing."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it explains for each layer that kernels are faster
    try:
        from transformers import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
    except ImportError as e:
        raise ValueError(
            f"mixer compares with transformers, which cannot be imported here ({e}); install it with "
            "pip install -r requirements-test.txt"
        ) from None
    config = NemotronHConfig(
        hidden_size=ours.in_proj.in_features, layers_block_type=["linear_attention"], mamba_num_heads=ours.h,
        mamba_head_dim=ours.p, n_groups=ours.g, ssm_state_size=ours.n, conv_kernel=ours.conv1d.kernel_size[0],
        chunk_size=chunk_size, layer_norm_epsilon=ours.norm.eps, use_bias=False, use_conv_bias=True,
    )  # fmt: skip
    theirs = NemotronHMamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    for name in ("time_step_limit", "time_step_min"):  # the first in transformers 5.23, the second in 5.15
        if hasattr(theirs, name):
            setattr(theirs, name, (0.0, math.inf) if name == "time_step_limit" else 0.0)
    return theirs


def forward_backward(mixer, u, grad):
    """Returns a function of no arguments: one forward and one backward, gradients of u and of every weight."""

    def run():
        u.grad = None
        mixer.zero_grad(set_to_none=True)
        y = mixer(u)
        y.backward(grad)
        return y.detach()

    return run


def bench_mixer(args):
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    b, l, d, shape = 4, 512, 256, dict(num_heads=16, head_dim=32, n_groups=4, state_size=32, conv_kernel=4)
    print(f"{cpu_name()}; {torch.get_num_threads()} threads; torch {torch.__version__}; float32")
    print(
        f"Mamba-2 mixer, forward + backward: b {b}, l {l}, hidden {d}, "
        + ", ".join(f"{k} {v}" for k, v in shape.items())
    )

    ours = Mamba2Mixer(d, **shape)
    with torch.no_grad():  # all parameters random: nothing may be equal by accident
        ours.dt_bias.normal_(-4, 2)
        ours.A_log.uniform_(0, math.log(16))
        ours.D.normal_(1, 0.3)
        ours.norm.weight.normal_(1, 0.3)
    u, grad = torch.randn(b, l, d, requires_grad=True), torch.randn(b, l, d)

    # chunk_size changes only the blocking. The released models say 128, and so does transformers' default; both sides
    # run at every size given, so that nobody has to take 128 for the fair one.
    contestants = {}
    for q in args.chunk_sizes:
        ours_q = Mamba2Mixer(d, **shape, chunk_size=q)
        ours_q.load_state_dict(ours.state_dict())
        contestants["nano2", q] = forward_backward(ours_q, u, grad)
        contestants["transformers", q] = forward_backward(their_mixer(ours, q), u, grad)
    with_grad = {key: (run(), u.grad.clone()) for key, run in contestants.items()}
    expected = with_grad["transformers", args.chunk_sizes[0]]
    for (name, q), found in with_grad.items():
        for what, x, y in zip(("outputs", "gradients of the input"), found, expected):
            off = ((x - y).abs().max() / y.abs().max()).item()
            if not off < 1e-4:
                raise ValueError(
                    f"{name} with chunks of {q}: {what} differ by {off:.1e} of the largest; nothing was timed"
                )
    print("outputs and input gradients agree to 1e-4 of the largest\n")

    seconds = interleave(contestants, args.repeats)
    median = {key: statistics.median(s) * 1e3 for key, s in seconds.items()}
    print("chunk   nano2 ms   transformers ms   ratio")
    for q in args.chunk_sizes:
        mine, other = median["nano2", q], median["transformers", q]
        print(f"{q:5d}   {mine:8.1f}   {other:15.1f}   {other / mine:5.2f}")
    best = {name: min((median[name, q], q) for q in args.chunk_sizes) for name in ("nano2", "transformers")}
    ratio = best["transformers"][0] / best["nano2"][0]
    print(f"\nmedians of {args.repeats} turns")
    same = args.chunk_sizes[-1]
    equal = median["transformers", same] / median["nano2", same]
    print(f"the same chunk size on both sides ({same}): nano2 is {equal:.2f}x faster; the bar is {MIXER_BAR:g}x")
    sizes = f"nano2 {best['nano2'][1]}, transformers {best['transformers'][1]}"
    print(f"each side at its best chunk size ({sizes}): nano2 is {ratio:.2f}x faster")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# kernels and training
# ---------------------------------------------------------------------------------------------------------------------


def bench_kernels(args):
    only = [name for name in measure.SECTIONS if name in args.only] if args.only else measure.SECTIONS
    return measure.run(only, args.write, args.quick, args.out, args.source, args.commit)


def bench_training(args):
    training.run(args.impl, args.compile, args.rows, args.length, args.steps, args.profile, args.packed, args.tiny,
                 args.preset, args.parallel, args.recompute)  # fmt: skip
    return 0


def bench_fp8(args):
    return eight_bits.command(args.write, args.out, args.source, args.commit, args.tiny)


def bench_serving(args):
    wishes = {k: v for k, v in vars(args).items() if k in ("sampled", "device", "preset", "rows", "tokens")}
    return serving_command.command(args.command, args.write, args.out, args.source, args.commit, args.tiny, **wishes)


# ---------------------------------------------------------------------------------------------------------------------


def bench_rollouts(args):
    rollouts.command(args.checkpoint, args.rows, args.group, args.room, args.repeats, args.device)
    return 0


class Parser(argparse.ArgumentParser):
    """A bad flag is one sentence, as any other bad input is."""

    def error(self, message):
        raise ValueError(f"{message}; see {self.prog} --help")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv=None):
    parser = Parser(description="Measured speed beside other people's code, on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    mixer = commands.add_parser(
        "mixer", help="one Mamba-2 layer on the CPU, forward + backward, against transformers' PyTorch path",
        description="Times both sides in turns and prints the ratios.",
    )  # fmt: skip
    mixer.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's own choice)")
    mixer.add_argument("--repeats", type=positive, default=15, help="timed turns of each side (default 15)")
    mixer.add_argument("--chunk-sizes", type=positive, nargs="+", default=[16, 32, 64, 128], metavar="Q",
                       help="chunk sizes for both sides; the last is the common one")  # fmt: skip
    mixer.add_argument("--seed", type=int, default=0, help="seed of weights and inputs (default 0)")
    mixer.set_defaults(run=bench_mixer)

    kernels = commands.add_parser(
        "kernels", help="the Triton kernels on a GPU, against mamba_ssm, PyTorch and the floor",
        description="Scan, convolution, norms and decoding: time, floor, errors, compile cost; minutes on a GPU.",
    )  # fmt: skip
    names = ", ".join(measure.SECTIONS)
    kernels.add_argument("--only", nargs="+", choices=measure.SECTIONS, metavar="SECTION",
                         help=f"only these of {names} (ceilings are always measured)")  # fmt: skip
    kernels.add_argument("--quick", action="store_true", help="fewer repeats, and fewer chunk sizes of mamba_ssm")
    kernels.add_argument("--write", action="store_true", help="put the tables into RESULTS.md, between its two markers")
    kernels.add_argument("--out", default="out/bench_kernels.json", help="where the record goes (%(default)s)")
    kernels.add_argument("--source", metavar="FILE", help="measure nothing: make the tables from this earlier record")
    kernels.add_argument("--commit", help="what to call the code's state where there is no git checkout")
    kernels.set_defaults(run=bench_kernels)

    steps = commands.add_parser(
        "training", help="training steps of a 549 M model on a GPU",
        description="tokens/s, MFU, memory, seconds to the first step. Lower --rows if memory runs out.",
    )  # fmt: skip
    steps.add_argument("--impl", choices=("auto", "torch", "triton"), default="auto",
                          help="who computes the Mamba-2 layers (auto)")  # fmt: skip
    steps.add_argument("--compile", action="store_true", help="torch.compile the blocks, as train.py can")
    steps.add_argument("--rows", type=positive, default=8, help="rows in a step (8)")
    steps.add_argument("--length", type=positive, default=2048, help="tokens in a row (2048)")
    steps.add_argument("--steps", type=positive, default=20, help="timed steps (20)")
    steps.add_argument("--profile", action="store_true", help="then a table of GPU time by kind of kernel")
    steps.add_argument("--packed", action="store_true", help="rows of several documents, as train.py's are")
    steps.add_argument("--tiny", action="store_true", help="a toy model instead, to try the command anywhere")
    steps.add_argument("--parallel", choices=ENGINES, default="ddp", help="under torchrun: who holds what (ddp)")
    steps.add_argument("--recompute", choices=RECOMPUTE, default="off", help="layers: keep their inputs only (off)")
    steps.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help="one of model.py's in place of the 549 M model"
    )
    steps.set_defaults(run=bench_training)

    eight = commands.add_parser(
        "fp8", help="eight-bit operands at the widths of the 12B, on a Hopper GPU",
        description="Three products of each layer, quantising included, and a whole training step; minutes on a GPU.",
    )  # fmt: skip
    eight.add_argument("--write", action="store_true", help="put the tables into RESULTS.md, between its two markers")
    eight.add_argument("--out", default="out/bench_fp8.json", help="where the record goes (%(default)s)")
    eight.add_argument("--source", metavar="FILE", help="measure nothing: make the tables from this earlier record")
    eight.add_argument("--commit", help="what to call the code's state where there is no git checkout")
    eight.add_argument("--tiny", action="store_true", help="toy sizes, emulated, to try the command anywhere")
    eight.set_defaults(run=bench_fp8)

    for name, help_ in dict(
        decode="a decode step of the 9B on a GPU, for some batch sizes, in bf16 and int8",
        prefill="seconds to the first token of 8k and 128k tokens, the second under a cap on memory",
        memory="the memory formula beside what is held, at 128k tokens",
        loading="a folder of the 9B written to the disk (18 GB) and opened: seconds, and the host's memory",
        throughput="the 9B against a transformer of its size in the same memory, at four pairs of lengths",
    ).items():
        part = commands.add_parser(name, help=help_, description=f"{help_}; random weights, minutes on a GPU.")
        part.add_argument("--write", action="store_true", help="put the table into RESULTS.md, between its two markers")
        part.add_argument("--out", default="out/bench_serving.json", help="the record it is added to (%(default)s)")
        part.add_argument("--source", metavar="FILE", help="measure nothing: make the table from this earlier record")
        part.add_argument("--commit", help="what to call the code's state where there is no git checkout")
        part.add_argument("--tiny", action="store_true", help="toy models instead, to try the command anywhere")
        if name == "throughput":
            part.add_argument(
                "--sampled", action="store_true", help="steps at five lengths instead of all: minutes less"
            )
        if name == "decode":
            part.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda, or cpu in float32")
            part.add_argument("--preset", choices=PRESETS, metavar="NAME", help="one of model.py's (nano-9b)")
            part.add_argument("--rows", type=positive, nargs="+", metavar="B", help="batch sizes (1 8 16 32)")
            part.add_argument("--tokens", type=positive, metavar="N", help="tokens that the rows hold (8192)")
        part.set_defaults(run=bench_serving)

    speak = commands.add_parser(
        "rollouts", help="tokens/s of many drawn answers, as reinforcement learning asks for them",
        description="rollout.py with a trained checkpoint, for several numbers of rows; a minute on a GPU.",
    )  # fmt: skip
    speak.add_argument("--checkpoint", default="out", help="folder of a trained model (out)")
    speak.add_argument("--rows", type=positive, nargs="+", metavar="B", help="answers at a time")
    speak.add_argument("--group", type=positive, default=16, help="answers to each prompt (16)")
    speak.add_argument("--room", type=positive, default=128, help="tokens of an answer at most (128)")
    speak.add_argument("--repeats", type=positive, default=5, help="timed calls of each size (5)")
    speak.add_argument("--device", default="auto", help="auto, cpu or cuda")
    speak.set_defaults(run=bench_rollouts)

    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except (ValueError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("bench.py: out of memory: lower --rows or --length", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
