"""The README's commands work as printed. Training is cut short: its length is not what is tested here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--steps 12 --data-rows 400 --eval-count 1 --phase-eval 1 --sample-every 6 --save-every 6"


def commands():
    """Every line of every ```sh block, continuation lines joined, comments off."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def shortened(command):
    """The command to run here, or None with a reason for those that cannot or need not run here."""
    if command.startswith(("make test", "make notebooks", "make lint", "git clone", "cd ")):
        return None, "run by CI itself"
    if command.startswith(("python3 -m venv", "source ", "pip install")):
        return None, "set-up, done by make"
    if any(needed in command for needed in ("nano-12m", "out12", "cuda", "Nemotron-Nano")):
        return None, "needs a GPU or a released checkpoint"
    if "--reward gym" in command and importlib.util.find_spec("reasoning_gym") is None:
        return None, "needs an optional package"
    if command.startswith("make train"):
        return f'make train ARGS="{SHORT}"', ""
    if "train.py" in command:
        return command + " " + SHORT, ""
    if "prune.py" in command:
        return command + " --samples 8", ""
    if "sft.py" in command:
        return command + " --steps 3 --batch-rows 2 --skills-every 0 --eval-count 0", ""
    if "grpo.py" in command:
        return command + " --steps 1 --prompts 2 --group 2 --room 16 --eval-count 0", ""
    if "dpo.py" in command:
        return command + " --rounds 1 --episodes 4 --plays 2 --eval-count 0", ""
    if "reward.py" in command:
        return command + " --steps 2 --pairs 4 --eval-count 8", ""
    if "bench.py mixer" in command:
        return command + " --repeats 3 --chunk-sizes 64", ""
    if "bench.py rollouts" in command:
        return command + " --rows 8 --group 4 --repeats 1 --room 16", ""
    if "skills.py" in command:
        return command + " --count 1 --budgets 0 8", ""
    if "evaluate.py" in command:
        return command + " --count 1 --no-text", ""
    if "distill.py" in command:
        return command + " --steps 4 --eval-count 1", ""
    if "search.py --checkpoint" in command:
        return command + " --steps 2 --eval-count 1 --samples 4 --candidates 1", ""
    return command, ""


def test_the_readme_has_commands():
    assert len(commands()) > 8 and any(c.startswith("make train") for c in commands())


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path):
    copy = tmp_path / "nano2"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands():
        run, reason = shortened(command)
        print(f"$ {command}" + (f"   (not run: {reason})" if run is None else ""))
        if run is None:
            continue
        done = subprocess.run(
            ["bash", "-c", run], cwd=copy, env=os.environ | {"PATH": path}, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{run}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
