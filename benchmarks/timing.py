"""Contestants in turns, on one clock: what every section of `bench.py kernels` needs, and peers if they are there.

mamba_ssm is no dependency: it is used if Python finds it, compiled or not (its Triton files need no compiler, though
its package asks for one).
"""

import importlib
import importlib.util
import math
import os
import platform
import re
import statistics
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

L2_BYTES = 60e6  # of an H100 or H200
OURS, PEER, PLAIN = "nano2", "mamba_ssm", "PyTorch"


def cpu_name():
    """The processor's own name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reason(error):
    """A failure in a few words, for a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__} {lines[0]}"[:100].replace("|", "/").strip()


class Bench:
    """What every section needs: device, dtype, a clock, the peers, and where to say what happens."""

    def __init__(self, device, dtype, repeats, peers=None, say=print, chunks=(64, 128, 256)):
        self.device, self.dtype, self.repeats, self.say = torch.device(device), dtype, repeats, say
        self.peers, self.chunks, self.best_chunk = peers or {}, chunks, {}
        self.cuda = self.device.type == "cuda"
        self.large = 6 * L2_BYTES if self.cuda else 0  # what certainly does not stay in the cache
        self.wipe = torch.empty(2**26, dtype=torch.int32, device=device) if self.cuda else None  # 268 MB

    def normal(self, *size, seed=None, dtype=None):
        """Random numbers, each time others; rounded to the bench's dtype unless another is given."""
        if seed is not None:
            torch.manual_seed(seed)
        return torch.randn(*size, device=self.device).to(dtype or self.dtype)

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def attempt(self, run, failed, name):
        """run()'s result, or None with the reason in failed[name]."""
        try:
            result = run()
            self.sync()
            return result
        except Exception as e:  # whatever somebody else's code may raise
            failed[name] = reason(e)
            self.say(f"    {name}: {failed[name]}")
        if self.cuda and failed[name] == "out of memory":
            torch.cuda.empty_cache()
        return None

    def race(self, contestants, failed=None, clears=1):
        """Milliseconds of each contestant, a function of no arguments, by taking turns: {"ms": {name: median},
        "spread": {name: relative}, "failed": {name: reason}}. Everything is measured twice; the spread is between the
        two. Before each run the L2 cache is filled with something else, `clears` times or as often as keeps the GPU
        busy until the slowest contestant's kernels are all launched: what is measured is the GPU's time."""
        failed = dict(failed or {})
        for name, run in contestants.items():
            for _ in range(3 if self.cuda else 1):  # compiling, tuning, finding memory
                if name not in failed:
                    self.attempt(run, failed, name)
        for name, run in contestants.items():
            if name not in failed:
                clears = max(clears, self.attempt(lambda run=run: self.wipes_over(run), failed, name) or 0)
        running = {name: run for name, run in contestants.items() if name not in failed}
        rounds = [{name: [] for name in running} for _ in range(2)]
        for marks in rounds:
            for _ in range(self.repeats):
                for name in list(running):
                    try:
                        marks[name].append(self.once(running[name], clears))
                    except Exception as e:
                        failed[name] = reason(e)
                        del running[name]
            self.sync()
        medians = {name: [statistics.median(map(self.elapsed, marks[name])) for marks in rounds] for name in running}
        return {
            "ms": {name: sum(both) / 2 for name, both in medians.items()},
            "spread": {name: abs(both[0] - both[1]) / min(both) for name, both in medians.items()},
            "failed": failed,
        }

    def wipes_over(self, run):
        """How many wipes keep the GPU busy while the CPU launches a run, with half as many again to spare."""
        if not self.cuda:
            return 0
        seconds = []
        for _ in range(5):
            self.sync()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        self.sync()
        for _ in range(10):
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            self.wipe.zero_()
        end = torch.cuda.Event(enable_timing=True)  # the last of ten: by then the CPU is ahead
        end.record()
        self.sync()
        return math.ceil(1.5 * statistics.median(seconds) / (start.elapsed_time(end) / 1e3))

    def once(self, run, clears):
        """The marks before and after one run: CUDA events, or the clock's time. The GPU begins empty, so that nobody
        profits from whoever came before."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return start, time.perf_counter()
        self.sync()
        for _ in range(clears):
            self.wipe.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return start, end

    def elapsed(self, marks):
        start, end = marks
        return start.elapsed_time(end) if self.cuda else (end - start) * 1e3

    def captured(self, calls):
        """One function that does all calls in order: the replay of a CUDA graph, so that launching costs next to
        nothing. On a CPU, the calls themselves."""
        if not self.cuda:
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay


def relative(a, b):
    """||a - b|| / ||b|| in float64."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def disagreement(found, expected, tolerance):
    """None, or what differs: two {name: tensor}. A NaN differs."""
    off = {name: relative(found[name], expected[name]) for name in expected}
    wrong = [f"{name} off by {error:.1e}" for name, error in off.items() if not error <= tolerance]
    return "not timed, differs: " + ", ".join(wrong) if wrong else None


def checked(bench, runs, failed, tolerance=3e-2, reference=PLAIN):
    """The names whose results ({name: function -> {quantity: tensor}}) agree with the reference's (or, where that
    fails, with the first that runs); the others get their reason into `failed`."""
    good, expected = [], None
    for name in sorted(runs, key=lambda name: name != reference):
        found = bench.attempt(runs[name], failed, name)
        if found is None:
            continue
        expected = found if expected is None else expected
        wrong = disagreement(found, expected, tolerance)
        if wrong:
            failed[name] = wrong
            bench.say(f"    {name}: {wrong}")
        else:
            good.append(name)
    return [name for name in runs if name in good]


def import_peer(module):
    """The module. If only its package's own __init__ fails (mamba_ssm's wants a compiled extension that the Triton
    files do not need), the module without that __init__. ImportError with the reason if neither works."""
    try:
        return importlib.import_module(module)
    except Exception as e:
        first = e
    package = module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(str(first)) from first
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    try:
        return importlib.import_module(module)
    except Exception as e:
        raise ImportError(f"{first}; without the package's __init__: {e}") from e


def version_of(package):
    """The version that a package's __init__ states, also of a bare source tree."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    paths = list(spec.submodule_search_locations) if spec else list(sys.modules[package].__path__)
    found = re.search(r"__version__ = [\"'](.+?)[\"']", (Path(paths[0]) / "__init__.py").read_text("utf-8"))
    return found.group(1) if found else "of unknown version"


PEERS = {
    "scan": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "step": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "norm": ("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn"),
    "conv": ("causal_conv1d", "causal_conv1d_fn"),
}


def load_peers(say):
    """({what: function} of those that import, {package: version or the reason why not})."""
    peers, about = {}, {}
    for what, (module, name) in PEERS.items():
        package = module.partition(".")[0]
        try:
            peers[what] = getattr(import_peer(module), name)
            about[package] = version_of(package)
        except Exception as e:
            why = (str(e).splitlines() or [repr(e)])[0][:200]
            about.setdefault(package, f"not importable ({why})")
            say(f"{module}.{name}: not importable ({why})")
    for package, what in about.items():
        say(f"{package}: {what}")
    tune_faster([m for name, m in sys.modules.items() if name.startswith("mamba_ssm.ops.triton") and m is not None])
    return peers, about


def tune_faster(modules):
    """Spend less on the peer's autotuning, which tries some ten configurations of each of its kernels for each shape:
    compile them side by side, and time each for 10 ms instead of 100. What it chooses from stays the same."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def prepare(tuner):
        choices = tuner.prune_configs  # called once for each shape, with the kernel's arguments in tuner.nargs

        def compiled(options):
            configs, arguments = choices(options), list(tuner.nargs.values())
            # errors stay in the futures: the tuner meets them again, and knows which to forgive
            wait([
                pool.submit(tuner.fn.run, *arguments, **{**options, **config.all_kwargs(), "warmup": True})
                for config in configs
            ])  # fmt: skip
            return configs

        tuner.prune_configs = compiled
        tuner._do_bench = lambda call, quantiles: do_bench(call, warmup=3, rep=10, quantiles=quantiles)

    for tuner in {id(t): t for m in modules for t in vars(m).values() if isinstance(t, Autotuner)}.values():
        prepare(tuner)
