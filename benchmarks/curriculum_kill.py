#!/usr/bin/env python
"""Does a curriculum that is killed twice end as one that is left alone?

    python -m benchmarks.curriculum_kill                # a few minutes on two CPU cores
    python -m benchmarks.curriculum_kill --ranks 2      # under torchrun
    python -m benchmarks.curriculum_kill --help

Three stages on sums that are made here (fine-tuning, TraceRL with responses that grow, an evaluation that is a gate)
run once undisturbed, and once with SIGKILL to all of the job at two random moments. Every start is the same command
line. Then everything that was recorded is compared, but for what a clock measured, number by number without any
tolerance, and so are the weights and optimizer states of the last checkpoint. Exit code 1: they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import yaml

from megatron_dlm.training.history import read_history

ROOT = Path(__file__).resolve().parents[1]
OF_A_CLOCK = ("perf/", "memory/", "seconds")
STAGES = ("warm", "rl-1", "rl-2", "check")
LAST = "rl-2"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    folder, draw = options.output, random.Random(options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder)
    began = time.monotonic()
    start(folder, "whole", options.ranks).wait_for(None)
    whole = options.seconds or time.monotonic() - began
    print(f"undisturbed: {whole:.0f} s")
    began, spent = time.monotonic(), 0.0
    for number in range(options.kills):
        # Of what is left, so that the last start has something to do
        moment = draw.uniform(0.15, 0.6) * max(whole - 0.5 * spent, 0.4 * whole)
        job = start(folder, "parts", options.ranks)
        job.wait_for(moment)
        spent += moment
        print(f"kill {number + 1}: after {moment:.0f} s, {where(folder / 'parts')}")
        job.kill()
    start(folder, "parts", options.ranks).wait_for(None)
    print(f"killed {options.kills} times: {time.monotonic() - began:.0f} s in all")
    differing = compare(folder / "whole", folder / "parts")
    for text in differing:
        print(f"DIFFERS: {text}")
    print("The same metrics and the same last checkpoint." if not differing else f"{len(differing)} differences.")
    return 1 if differing else 0


class Job:
    """All processes of one start."""

    def __init__(self, words: list[str], log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.log = log

    def wait_for(self, seconds: float | None) -> None:
        """So long, or to its end; one that ends badly ends this program."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        if code:
            raise SystemExit(f"a start of the curriculum has ended with exit code {code}; {self.log} has what it said")

    def kill(self) -> None:
        """SIGKILL to the launcher and the controllers; their stages, which get none, have to end with them."""
        jobs = [self.process.pid, *(pid for pid in children(self.process.pid) if _is_controller(pid))]
        stages = [pid for job in jobs for pid in children(job) if b"stage.yaml" in _command_line(pid)]
        for pid in jobs:
            _end(pid)
        self.process.wait()
        deadline = time.monotonic() + 30
        while any(_is_there(pid) for pid in stages):
            if time.monotonic() > deadline:
                raise SystemExit("a stage has outlived its curriculum")
            time.sleep(0.05)


def start(folder: Path, name: str, ranks: int) -> Job:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = ["-m", "megatron_dlm", "curriculum", "--config", str(folder / "curriculum.yaml")]
    return Job([*launcher, *words, "--set", f"save={folder / name}"], folder / f"{name}.log")


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(word) for word in task.read_text().split()]
        except OSError:
            continue
        found += [one for child in below for one in (child, *children(child))]
    return found


def where(save: Path) -> str:
    """How far a run has come."""
    try:
        state = json.loads((save / "curriculum.json").read_text())
    except FileNotFoundError:
        return "before its first stage"
    running = state["running"]
    if running is None:
        return f"behind stage {len(state['done'])}"
    metrics = save / running / "metrics.jsonl"
    records = read_history(metrics) if metrics.exists() else []
    return f"in stage {running}, behind step {records[-1]['step'] if records else 0}"


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two runs."""
    found = []
    for stage in STAGES:
        left, right = (_records(save / stage / "metrics.jsonl") for save in (one, other))
        if left != right:
            found.append(f"{stage}: {len(left)} and {len(right)} records")
            found += [f"  {a} {b}" for a, b in zip(left, right) if a != b][:2]
    left, right = (_tensors(save / LAST) for save in (one, other))
    found += [f"{LAST}: tensors {name}" for name in left.keys() ^ right.keys()]
    found += [
        f"{LAST}: tensor {name}" for name in left.keys() & right.keys() if not bool((left[name] == right[name]).all())
    ]
    recorded = sum(len(_records(one / stage / "metrics.jsonl")) for stage in STAGES)
    print(f"compared: {recorded} records, {len(left)} tensors")
    return found


def make_data(folder: Path) -> None:
    """Sums, a tokenizer, and the description of the curriculum."""
    from megatron_dlm.data import quickstart

    if not (folder / "data").exists():
        quickstart.make(folder / "data", None, seed=0, num_train=200, num_test=20)
    data = folder / "data"
    rl = {"prompt_data": [str(data / "prompts.jsonl")], "num_rollout": 4, "num_steps_per_rollout": 2}
    rl |= {"min_group_accuracy": 0, "max_group_accuracy": 1, "overlong_margin": 0, "max_tokens_per_row": 512}
    heldout = [str(data / "heldout.jsonl")]
    content = {
        "save": str(folder / "run"),
        "defaults": {
            "model": {"model_preset": "tiny"},
            "tokenizer": {"tokenizer_model": str(data / "tokenizer")},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"save_interval": 1, "keep_last_n": 2},
            "rollout": {"rollout_max_prompt_len": 32, "rollout_max_response_len": 16},
            "reward": {"reward_workers": 1},
            "run": {"seed": 1},
        },
        "stages": [
            {
                "name": "warm",
                "command": "sft",
                "sft": {"data_path": [str(data / "sft.jsonl")], "train_iters": 60, "global_batch_size": 16},
                "checkpoint": {"save_interval": 10},
            },
            {
                "name": "rl",
                "command": "tracerl",
                "rl": rl,
                "rollout": {"rollout_batch_size": 8, "n_samples_per_prompt": 4},
                "curriculum": {"prompt_sampling": "difficulty"},
                "reward": {"format_reward": ".*[0-9].*"},
                "grow": {"rollout.rollout_max_response_len": [12, 16]},
            },
            {
                "name": "check",
                "command": "evaluate",
                "eval": {"eval_prompt_data": heldout, "eval_remasking": ["dynamic"]},
                "gate": {"metric": "eval/dynamic/responses", "at_least": 20},
            },
        ],
    }
    (folder / "curriculum.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def _records(path: Path) -> list[dict]:
    kept = lambda record: {name: value for name, value in record.items() if not name.startswith(OF_A_CLOCK)}
    return [kept(record) for record in read_history(path)]


def _tensors(save: Path) -> dict:
    """Of the newest checkpoint, optimizer state included."""
    import torch

    from megatron_dlm import platform
    from megatron_dlm.commands.common import quiet_libraries
    from megatron_dlm.config.parallel import ParallelConfig

    quiet_libraries()
    platform.install()
    from megatron.core import dist_checkpointing

    from megatron_dlm.parallel.groups import initialize

    if not torch.distributed.is_initialized():
        initialize(ParallelConfig(), seed=1)
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    with platform.cuda_calls_on_cpu():
        content = dist_checkpointing.load_plain_tensors(str(save / f"iter_{step:07d}"))
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _is_controller(pid: int) -> bool:
    return b"\0curriculum\0" in _command_line(pid)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/curriculum_kill"), help="folder of all that it makes")
    parser.add_argument("--kills", type=int, default=2, help="how often it is killed (default: 2)")
    parser.add_argument("--seconds", type=float, help="what the undisturbed run took, if it is in --output already")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the job (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
