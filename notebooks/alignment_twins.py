"""Does alignment do what it is for? The report's chain of stages on nano-12m, and beside it each stage with one thing
left out.

    python notebooks/alignment_twins.py --seeds 3 --base out12 --out assets/alignment_twins.json

The chain of a seed, each link a script of its own that starts from the folder before:

    base -> sft1 -> sft2 -> sft3 -> ifrl -> dpo -> rlhf -> merge          (sft.py, grpo.py, dpo.py, merge.py)

and the controls:

    sft1, no empty thoughts   nothing ever had its thought taken away: is reasoning-off obeyed all the same?
    sft1, alone               the same examples in the same steps, one a row; and sft2 after it
    sft1, no reset            packed, and the state runs on from one example into the next; and sft2 after it
    sft3, no cut thoughts     no thought was ever cut off: what does a thinking budget do then?
    gym                       rewards only, on questions of reasoning-gym for which no thought was ever shown

Each run is a command; here is who waits for whom, which GPU is free, and what is read from the logs at the end. With
--base all seeds begin from that folder and differ in examples, rollouts and order; without it each has a base of its
own, trained first. What is done lies in --work, and a second call does what is missing.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device import choose_device  # isort: skip  (before torch)
import torch
from alignment_tables import figures, tables

import evaluate

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """after: the job whose folder is --checkpoint; needs: other jobs that must be there; command: script and flags, in
    which {name} is another job's folder; printed: what it tells is what it prints (JSON), not its log's last line."""

    after: str
    command: str
    needs: tuple = ()
    printed: bool = False


CHAIN = ("sft1", "sft2", "sft3", "ifrl", "dpo", "rlhf")
SWEEP = "0,0.3,0.4,0.5,0.6,0.7,1"
JOBS = {  # the longest way through is begun first
    "sft1": Job("base", "sft.py --stage 1"),
    "sft2": Job("sft1", "sft.py --stage 2"),
    "sft3": Job("sft2", "sft.py --stage 3"),
    "reward": Job("sft3", "reward.py"),
    "ifrl": Job("sft3", "grpo.py --reward instructions"),
    "dpo": Job("ifrl", "dpo.py"),
    "rlhf": Job("dpo", "grpo.py --reward preferences --judge {reward}", ("reward",)),
    "merge": Job("rlhf", "merge.py {dpo} {rlhf} --json --sweep " + SWEEP, ("dpo", "rlhf"), printed=True),
    "gym": Job("sft3", "grpo.py --reward gym"),
    "sft1, alone": Job("base", "sft.py --stage 1 --pack off"),
    "sft1, no reset": Job("base", "sft.py --stage 1 --reset off"),
    "sft1, no empty thoughts": Job("base", "sft.py --stage 1 --off 0"),
    "sft2, after alone": Job("sft1, alone", "sft.py --stage 2"),
    "sft2, after no reset": Job("sft1, no reset", "sft.py --stage 2"),
    "sft3, no cut thoughts": Job("sft2", "sft.py --stage 3 --cut 0"),
    "budget": Job("sft3", "skills.py --curve --json", printed=True),
    "budget, no cut thoughts": Job("sft3, no cut thoughts", "skills.py --curve --json", printed=True),
    "budget, sft2": Job("sft2", "skills.py --curve --json", printed=True),
}
KEPT = ("step", "reward", "well_formed", "length", "kl", "loss", "logprob_gap", "tokens_per_second", "success")


def folder(args, name, seed):
    if name == "base" and args.base:
        return Path(args.base)
    return Path(args.work) / f"{seed} {name}"


def command(args, name, seed):
    """The words of a job's command, after python."""
    if name == "base":
        words = ["train.py", "--preset", args.preset, "--out", str(folder(args, name, seed)), "--seed", str(seed)]
        return words + shlex.split(args.base_flags)
    job = JOBS[name]
    places = {other: str(folder(args, other, seed)) for other in (*JOBS, "base")}
    words = [word.format(**places) if "{" in word else word for word in job.command.split()]
    script = words[0]
    if script != "merge.py":
        words += ["--checkpoint", places[job.after]]
    if not job.printed:
        words += ["--out", places[name], "--seed", str(seed)]
        if script != "reward.py":
            words += ["--skills-every", "0", "--eval-count", str(args.count)]
        words += shlex.split(args.flags.get(script.removesuffix(".py"), ""))
    else:
        words += ["--count", str(args.count), "--seed", str(seed)]
    return words


def beside(args, name, seed, suffix):
    """The file with that suffix beside a job's folder."""
    place = folder(args, name, seed)
    return place.with_name(place.name + suffix)


def finished(args, name, seed):
    if name == "base" and args.base:
        return True
    return beside(args, name, seed, ".seconds").exists()


def result(args, name, seed):
    """What a finished job has to tell."""
    told = {"seconds": float(beside(args, name, seed, ".seconds").read_text())}
    if JOBS[name].printed:
        lines = beside(args, name, seed, ".txt").read_text("utf-8").splitlines()
        printed = json.loads(next(line for line in lines if line.startswith("{")))
        return told | {k: v for k, v in printed.items() if k in ("skills", "curve", "sweep")}
    lines = (folder(args, name, seed) / "log.jsonl").read_text("utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    kept = [{k: e[k] for k in KEPT if k in e} for e in log[: -1 : max(1, len(log) // 60)]]
    return told | {"end": log[-1], "before": next((e for e in log if e.get("step") == 0), {}), "log": kept}


def launch(args, gpu, name, seed):
    """Run one job; what it says goes to files beside its folder. Returns its seconds, or None if it failed or was
    stopped: Ctrl-C reaches all jobs, and a script that saved and stopped has not failed, but is not done either."""
    start, words = time.time(), [sys.executable, *command(args, name, seed)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": str(args.threads)}
    with open(beside(args, name, seed, ".txt"), "w") as out, open(beside(args, name, seed, ".err"), "w") as err:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=out, stderr=err)
    if done.returncode:
        tail = beside(args, name, seed, ".err").read_text("utf-8")[-600:]
        print(f"{name}, seed {seed} failed ({done.returncode}): {tail}", flush=True)
        return None
    if name == "base" or not JOBS[name].printed:
        if not (folder(args, name, seed) / "config.json").exists():
            print(f"{name}, seed {seed} was stopped; a second call goes on with it", flush=True)
            return None
    took = time.time() - start
    temporary = beside(args, name, seed, ".seconds.tmp")  # who sees the file sees what is in it
    temporary.write_text(f"{took:.1f}")
    os.replace(temporary, beside(args, name, seed, ".seconds"))
    return took


def gpus(args):
    """The numbers of the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES of this process names them; or one place."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return [""]
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


URGENT = ("base", *CHAIN, "reward", "merge")  # each waits for the one before: they never wait for a place


def collect(args, record, out, say, begin=launch):
    """Every wanted job of every seed as soon as what it starts from is there: the chain at once, the others
    `together` at a time on each GPU; each where fewest are running."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    busy, lock = dict.fromkeys(gpus(args), 0), Lock()
    waiting = [(name, seed) for name in ("base", *args.jobs) for seed in seeds if not finished(args, name, seed)]
    running, failed = {}, set()

    def one(name, seed):
        with lock:
            gpu = min(busy, key=busy.get)
            busy[gpu] += 1
        try:
            took = begin(args, gpu, name, seed)
        finally:
            with lock:
                busy[gpu] -= 1
        if took is None:
            failed.add((name, seed))
        else:
            say(f"[{time.time() - args.started:4.0f} s] {name}, seed {seed}: {took:.0f} s")

    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        while waiting or running:
            for job in list(waiting):
                name, seed = job
                first = () if name == "base" else (JOBS[name].after, *JOBS[name].needs)
                urgent = name in URGENT and torch.cuda.is_available()
                if any((f, seed) in failed for f in first):
                    failed.add(job)
                    waiting.remove(job)
                elif all(finished(args, f, seed) for f in first):
                    if time.time() > args.until:
                        say(f"no time left for {name}, seed {seed}")
                        waiting.remove(job)
                    elif urgent or len(running) < args.together * len(busy):
                        running[pool.submit(one, name, seed)] = job
                        waiting.remove(job)
            if not running:
                for name, seed in waiting:
                    say(f"{name}, seed {seed}: what it starts from is not there")
                break
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                del running[future]
            gather(args, record, out)
    gather(args, record, out)


def gather(args, record, out):
    """Read all results that are there, and write the record."""
    runs = {(r["job"], r["seed"]): r for r in record["runs"]}
    for name in JOBS:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            if finished(args, name, seed):
                run = {"job": name, "seed": seed, "commit": args.commit} | result(args, name, seed)
                runs[name, seed] = runs.get((name, seed), run)
    record["runs"] = sorted(runs.values(), key=lambda r: (list(JOBS).index(r["job"]), r["seed"]))
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(record), "utf-8")
    os.replace(temporary, out)


def start_record(args, out):
    """What the record is about. ValueError if `out` holds another kind of runs."""
    record = {
        "command": "python notebooks/alignment_twins.py " + " ".join(map(shlex.quote, args.words)),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__,
        "date": date.today().isoformat(), "preset": args.preset, "count": args.count, "one base": bool(args.base),
        "flags": args.flags, "runs": [],
    }  # fmt: skip
    if out.exists():
        try:
            before = json.loads(out.read_text("utf-8"))
            before = before if isinstance(before["runs"], list) else None
        except (ValueError, KeyError, TypeError):
            before = None
        if before is None:
            raise ValueError(f"--out {out} is there already and no record of runs: give another")
        same = ("preset", "count", "card", "one base", "flags")
        if [before.get(k) for k in same] != [record[k] for k in same]:
            raise ValueError(f"--out {out} holds runs with other {', '.join(same)}: give another")
        record["runs"] = before["runs"]
    return record


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = evaluate.refuse
    parser.add_argument("--seeds", type=int, default=3, help="how often all is done (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="to add seeds to a record that is there (0)")
    parser.add_argument("--base", default="", help="a pretrained folder for all seeds; without it each trains its own")
    parser.add_argument("--preset", default="nano-12m", help="of a base that is trained here (nano-12m)")
    parser.add_argument("--base-flags", default="", help="more flags for train.py")
    for script in ("sft", "grpo", "dpo", "reward"):
        parser.add_argument(f"--{script}-flags", default="", help=f"more flags for {script}.py")
    parser.add_argument("--count", type=int, default=208, help="held-out prompts of each kind (208)")
    parser.add_argument("--out", default="assets/alignment_twins.json", help="where to write the results")
    parser.add_argument("--figures", metavar="PREFIX", help="also draw the figures, into PREFIX_skills.png and others")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB",
                        help=f"only these of: {'; '.join(JOBS)}")  # fmt: skip
    parser.add_argument("--together", type=int, help="jobs that share a GPU (4), or the CPU (1)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads of a job (2)")
    parser.add_argument("--seconds", type=float, help="begin no job after so many seconds; a second call goes on")
    parser.add_argument("--work", default="out/alignment_twins", help="folder for everything that is made")
    parser.add_argument("--commit", default="unknown", help="what to call the code's state in the record")
    parser.add_argument("--source", metavar="FILE", help="run nothing: print the tables of this earlier record")
    try:
        args = parser.parse_args(argv)
        args.words = sys.argv[1:] if argv is None else list(argv)
        if args.source:
            try:
                record = json.loads(Path(args.source).read_text("utf-8"))
                print(tables(record))
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise ValueError(f"--source {args.source} cannot be used: {type(e).__name__} {e}") from None
            if args.figures:
                figures(record, args.figures)
            return 0
        least = dict(seeds=1, first_seed=0, count=13, together=1, threads=1, seconds=0)
        for name, low in least.items():
            if getattr(args, name) is not None and not getattr(args, name) >= low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(args, name)}")
        if args.base and not (Path(args.base) / "config.json").exists():
            raise ValueError(f"--base {args.base} holds no checkpoint: train one with train.py")
        out = Path(args.out)
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
        args.flags = {s: getattr(args, f"{s}_flags") for s in ("sft", "grpo", "dpo", "reward")}
        args.together = args.together or (4 if choose_device("auto")[0].type == "cuda" else 1)
        args.started = time.time()
        args.until = args.started + args.seconds if args.seconds is not None else float("inf")
        args.work = str(Path(args.work).resolve())
        args.base = str(Path(args.base).resolve()) if args.base else ""
        Path(args.work).mkdir(parents=True, exist_ok=True)
        record = start_record(args, out)
        collect(args, record, out, lambda text: print(text, flush=True))
        print(f"wrote {out}: {len(record['runs'])} runs, {time.time() - args.started:.0f} s\n")
        print(tables(record))
        if args.figures:
            figures(record, args.figures)
    except (ValueError, OSError) as e:
        print(f"alignment_twins.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # jobs have saved by now
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
