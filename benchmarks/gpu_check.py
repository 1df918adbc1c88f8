#!/usr/bin/env python
"""Does this GPU compute what the CPU computes? One command, one table.

    python benchmarks/gpu_check.py                  # float64, float32 (TF32 off) and bfloat16 on the GPU
    python benchmarks/gpu_check.py --device cpu     # the same checks with the CPU in its place

The oracle is a float64 run on the CPU, where sdpa computes the attention of rollouts. Every other attention backend
that serves the model here is held against sdpa, and the responses that it generates against the oracle's. Every run is
a process of its own (benchmarks/device_cases.py), because a process has one device for its life. With two GPUs or more,
tensor and data parallelism over NCCL are checked too; with `--device cpu --processes 2`, over gloo.

Exit code 0: all checks passed. 1: one failed, or a run did not end. 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np
import torch

from benchmarks.common import relative_difference, table
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.diffusion.trace import Trace

WORKER = Path(__file__).with_name("device_cases.py")
PRECISIONS = ("fp64", "fp32", "bf16")

# The largest difference from the oracle that each precision may show. Measured on a CPU, float32 differs by a tenth of
# these or less, bfloat16 by a half or less; its weights are rounded after each step, hence their large share.
TOLERANCES: dict[str, tuple[float, float, float]] = {
    "logits": (1e-10, 1e-5, 3e-2),
    "log-probabilities": (1e-9, 1e-4, 4e-1),
    "gradients": (1e-9, 1e-5, 1e-1),
    "losses": (1e-9, 1e-4, 1e-1),
    "gradient norms": (1e-9, 1e-4, 5e-2),
    "weights": (1e-7, 1e-3, 7e-1),
    "attention": (1e-10, 1e-5, 3e-2),
    "rollout, responses that differ": (0.0, 0.1, float("nan")),
    "rollout, log-probabilities": (1e-9, 1e-4, 4e-1),
    "rollout against trainer": (1e-9, 1e-4, 4e-1),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One process, or two, that compute all cases."""

    device: str
    precision: str
    layout: str = ""
    tp: int = 1
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.precision} {self.layout}".strip()


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    what: str
    run: str
    kind: str
    difference: float
    tolerance: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance  # not so for NaN


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cuda" and not gpus:
        print(
            "gpu_check needs a GPU that torch can use, and finds none; --device cpu runs the same checks on the CPU.",
            file=sys.stderr,
        )
        return 2
    processes = options.processes or (min(gpus, 2) if options.device == "cuda" else 1)
    if options.device == "cuda" and processes > gpus:
        print(f"--processes {processes} needs as many GPUs, and there are {gpus}.", file=sys.stderr)
        return 2
    began = time.perf_counter()
    checks, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        try:
            oracle = bench.cases(Run("cpu", "fp64"), disturb=0.0)
            for run in _runs(options, processes):
                results[run] = bench.cases(run, options.disturb)
                checks += compare(run, results[run], oracle, bench.judge({run: results[run]})[run])
                _write(options.json, checks)  # what is known by then, if it is ended
        except subprocess.CalledProcessError as error:
            print(f"A run did not end well (exit code {error.returncode}):\n{error.stderr}", file=sys.stderr)
            return 1
    print(f"{next(iter(results.values()))['device']} against the CPU in float64\n")
    print(report(checks))
    for run, found in results.items():
        for case, told in found.get("kernels", {}).items():
            if isinstance(told, str):
                print(f"not compared, {run.name}: {case}: {told}")
    failed = sum(not check.passed for check in checks)
    print(f"\n{len(checks) - failed} checks passed, {failed} failed; {time.perf_counter() - began:.0f} seconds")
    return 1 if failed else 0


def _write(path: str | None, checks: Sequence[Check]) -> None:
    if path:
        scratch = Path(f"{path}.new")
        scratch.write_text(json.dumps([asdict(check) | {"passed": check.passed} for check in checks]) + "\n")
        scratch.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare a GPU with the CPU, case by case.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what is compared with the CPU in float64")
    add("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--processes", type=int, choices=(1, 2), help="2 adds tensor and data parallelism; as many as there are GPUs")
    add("--num-layers", type=int, default=3)
    add("--hidden-size", type=int, default=256)
    add("--num-attention-heads", type=int, default=4)
    add("--num-query-groups", type=int, default=2)
    add("--kv-channels", type=int, default=64)
    add("--vocab-size", type=int, default=500)
    add("--json", metavar="FILE", help="write all checks there")
    add("--disturb", type=float, default=0.0, help="change the weights of what is compared by this share: it must fail")
    return parser


def _runs(options: argparse.Namespace, processes: int) -> Iterator[Run]:
    precisions = [precision for precision in PRECISIONS if precision in options.precision]
    # The CPU in float64 is the oracle itself: comparing it with itself says nothing, unless it was disturbed.
    yield from (
        Run(options.device, p) for p in precisions if options.device == "cuda" or p != "fp64" or options.disturb
    )
    if processes > 1:
        for precision in precisions:
            yield Run(options.device, precision, "TP 2", tp=2, processes=2)
            yield Run(options.device, precision, "DP 2", processes=2)


def start(run: Run, order: Path) -> None:
    """Run the worker's program on a job file, in as many processes as the run has, to its end.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    if run.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.processes)]
    subprocess.run(
        [sys.executable, *(launcher if run.processes > 1 else []), str(WORKER), str(order)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )


class Bench:
    """Starts runs and reads what they write."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.count = folder, 0
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")
        self.sizes = {name: getattr(options, name) for name in sizes}

    def cases(self, run: Run, disturb: float) -> dict[str, Any]:
        """All results of a run."""
        return self._start(run, disturb=disturb)

    def judge(self, results: dict[Run, dict[str, Any]]) -> dict[Run, dict[str, np.ndarray]]:
        """What the oracle thinks of rollouts of other runs: the log-probability of each of their tokens, by name."""
        rollouts = {
            (run, name): traces
            for run, found in results.items()
            for name, traces in found.items()
            if name.startswith("rollout, ")
        }
        judged = self._start(Run("cpu", "fp64"), judge={f"{n}": traces for n, traces in enumerate(rollouts.values())})
        by_run: dict[Run, dict[str, np.ndarray]] = {run: {} for run in results}
        for n, (run, name) in enumerate(rollouts):
            by_run[run][name] = judged[f"{n}"].numpy()
        return by_run

    def _start(self, run: Run, **job: Any) -> dict[str, Any]:
        self.count += 1
        order, out = self.folder / f"job{self.count}.pt", self.folder / f"out{self.count}.pt"
        model = ModelConfig(
            **self.sizes,
            ffn_hidden_size=2 * self.sizes["hidden_size"],
            block_size=4,
            max_position_embeddings=128,
            rotary_base=1e4,
            fp64=run.precision == "fp64",
            bf16=run.precision == "bf16",
        )
        torch.save({"model": model, "tp": run.tp, "out": str(out), "disturb": 0.0} | job, order)
        start(run, order)
        return torch.load(out, weights_only=False)


def compare(run: Run, found: dict[str, Any], oracle: dict[str, Any], judged: dict[str, np.ndarray]) -> list[Check]:
    """All checks of one run against the oracle.

    Args:
        judged: the oracle's log-probabilities for the tokens of `found`'s rollouts.
    """
    checks = []

    def check(what: str, tolerance: str, kind: str, difference: float, case: str) -> None:
        limit = TOLERANCES[tolerance][PRECISIONS.index(run.precision)]
        if limit == limit:  # NaN: the precision is not held to this
            checks.append(Check(what, run.name, kind, difference, limit, found["seconds"].get(case, 0.0)))

    for stage in ("sft", "tracerl"):
        case = f"logits, {stage}"
        scale = oracle[case].abs().max()
        check(case, "logits", "rel", ((found[case] - oracle[case]).abs().max() / scale).item(), case)
        case = f"gradients, {stage}"
        check(case, "gradients", "rel", relative_difference(found[case], oracle[case]), case)
    case = "log-probabilities"
    check(case, case, "abs", (found[case] - oracle[case]).abs().max().item(), case)
    for case in ("steps", "steps, distributed optimizer"):
        if case in found:
            mine, theirs = found[case], oracle["steps"]
            for name, series in (("losses", "losses"), ("gradient norms", "norms")):
                one, other = np.array(mine[series]), np.array(theirs[series])
                scale = np.maximum(np.abs(other), 1e-3 * np.abs(other).max())
                check(f"{case}: {name}", name, "rel", float((np.abs(one - other) / scale).max()), case)
            check(f"{case}: weights", "weights", "rel", relative_difference(mine["moved"], theirs["moved"]), case)
    for case in found:
        if case.startswith("attention, "):
            check(f"rollout {case} against sdpa", "attention", "abs", found[case], case)
    for case, told in found.get("kernels", {}).items():
        if not isinstance(told, str):
            checks.append(Check(case, run.name, "rel", *told, 0.0))
    for case in judged:
        way, traces = case.removeprefix("rollout, "), found[case]
        name = "rollout, responses that differ"
        expected = oracle[case.partition(" by ")[0]]  # whatever computes attention, the responses are the same
        check(f"{name}, {way}", name, "share", _share_that_differs(traces, expected), case)
        recorded = np.concatenate([trace.logprobs for trace in traces])
        name = "rollout, log-probabilities"
        check(f"{name}, {way}", name, "abs", float(np.abs(recorded - judged[case]).max()), case)
        name = "rollout against trainer"
        own = found[f"trainer, {way}"].numpy()
        check(f"{name}, {way}", name, "abs", float(np.abs(recorded - own).max()), f"{name}, {way}")
    return checks


def _share_that_differs(found: Sequence[Trace], expected: Sequence[Trace]) -> float:
    """Responses whose tokens or step maps are not the oracle's."""
    same = [
        np.array_equal(one.tokens, other.tokens) and np.array_equal(one.all_steps, other.all_steps)
        for one, other in zip(found, expected, strict=True)
    ]
    return 1 - sum(same) / len(same)


def report(checks: Sequence[Check]) -> str:
    lines = [
        [
            check.what,
            check.run,
            f"{check.difference:.1e}",
            check.kind,
            f"{check.tolerance:.0e}",
            "PASS" if check.passed else "FAIL",
            f"{check.seconds:.2f}",
        ]
        for check in checks
    ]
    return table(["check", "precision", "difference", "", "tolerance", "result", "seconds"], lines)


if __name__ == "__main__":
    sys.exit(main())
