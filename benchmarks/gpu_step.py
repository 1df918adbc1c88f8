"""A TraceRL step phase by phase, how far rollout and trainer are apart, loss curves of two precisions, and refit from
one layout to another.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch

from benchmarks.common import PACKED
from benchmarks.gpu_figures import Sheet
from benchmarks.gpu_training import PRECISIONS
from benchmarks.update_worker import PHASES, Bench, Job
from megatron_dlm import platform
from megatron_dlm.config.errors import UserError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.optimizer import OptimizerConfig
from megatron_dlm.config.parallel import ParallelConfig

LAST = 20  # steps whose mean is compared


def step(job: Job, words: int, repeats: int, sheet: Sheet) -> None:
    """Phases of a step, in the trainer's precision bf16; then the differences of both precisions.

    Args:
        words: of each judged text.
    """
    traces = _differences("bf16", job, sheet, repeats)
    try:
        sheet.put("reward", _judge(len(traces), words), f"{len(traces)} texts of {words} words, on the host")
    except (UserError, ImportError) as error:
        sheet.miss(error, "reward")
    try:
        _differences("fp8", job, sheet, 0)
    except (UserError, TypeError, torch.OutOfMemoryError) as error:
        sheet.miss(error, "fp8 largest", "fp8 mean")


def _differences(precision: str, job: Job, sheet: Sheet, repeats: int) -> list:
    """The traces of a rollout. Args: repeats: updates that are timed, phase by phase."""
    from megatron_dlm.parallel import groups
    from megatron_dlm.platform import te

    parallel = ParallelConfig(**PRECISIONS[precision])
    te.require(parallel)
    bench = Bench(dataclasses.replace(job, parallel=parallel))
    try:
        bench.generate("dynamic", 2 * job.model.block_size)  # kernels are compiled
        generated = bench.generate("dynamic")
        traces = generated.traces
        apart = bench.differences(traces)
        sheet.put(f"{precision} largest", apart.max(), f"{len(apart):,} tokens")
        sheet.put(f"{precision} mean", apart.mean())
        if repeats:
            tokens = sum(len(trace.response_ids) for trace in traces)
            sheet.put("rollout", generated.seconds, f"{len(traces)} responses, {tokens:,} tokens")
            updates = [bench.update(PACKED, traces, None) for _ in range(repeats + 1)][1:]
            for phase in PHASES:
                sheet.put(phase, statistics.median(update.seconds[phase] for update in updates))
            sheet.put("refit shared", bench.rig.refit().shared / 2**30, "one GPU: the engine reads training's weights")
        return traces
    finally:
        groups.destroy()
        del bench
        if platform.is_cuda():
            torch.cuda.empty_cache()


def _judge(count: int, words: int) -> float:
    """Seconds that the judge of mathematics needs for so many texts, warm."""
    from megatron_dlm.data.prompts import Prompt
    from megatron_dlm.rewards.code_options import CodeOptions
    from megatron_dlm.rewards.scorers import make_scorer

    prompt = Prompt("p", (1,), "1+1=", "2", "math")
    text = " ".join(["so"] * words) + " the answer is \\boxed{2}"
    with make_scorer("math", 2, 10.0, None, CodeOptions()) as scorer:
        if scorer.score([(prompt, text)])[0].correct != 1:
            raise UserError("the judge does not find the answer of the text that is timed")
        began = time.perf_counter()
        scorer.score([(prompt, text)] * count)
        return time.perf_counter() - began


def curves(model: ModelConfig, steps: int, sheet: Sheet) -> None:
    """The same samples learned by heart in both precisions, from the same weights, with the same masks."""
    for name, settings, later in (
        ("bf16", "bf16", 0),
        ("bf16 again", "bf16", steps),
        ("te", "te", 0),
        ("fp8", "fp8", 0),
    ):
        try:
            losses = _curve(model, ParallelConfig(**PRECISIONS[settings]), steps, later)
        except (UserError, TypeError, torch.OutOfMemoryError) as error:
            sheet.miss(error, name)
            continue
        last = losses[-LAST:]
        sheet.put(name, statistics.fmean(last), f"from {losses[0]:.2f} in {steps} steps")


def _curve(model: ModelConfig, parallel: ParallelConfig, steps: int, later: int) -> list[float]:
    """Nats per token of each step. Args: later: steps whose masks are left out."""
    from benchmarks.device_cases import Cases
    from megatron_dlm.parallel import groups
    from megatron_dlm.platform import te
    from megatron_dlm.training.step import train_step

    te.require(parallel)
    cases = Cases(model, parallel, 0.0)
    try:
        state, losses = cases.state(OptimizerConfig(lr=1e-3)), []
        for number in range(steps):
            metrics = train_step(state, *cases.sft_rows(state, later + number)[:3]).metrics
            losses.append(metrics["nll"] / max(metrics["targets"], 1))
        return losses
    finally:
        groups.destroy()


@dataclass(frozen=True, slots=True)
class Moved:
    """A refit: bytes that this rank received or copied, and seconds, the median."""

    bytes: int
    seconds: float


def refit_once(model: ModelConfig, tp: int, repeats: int) -> Moved:
    """Weights of a model that is trained on `tp` ranks, to engines that have all of it. Collective."""
    from benchmarks.common import build_state, open_session
    from megatron_dlm.config.rollout import RolloutConfig
    from megatron_dlm.rollout.rig import RolloutRig

    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    session = open_session(model, parallel)
    state = build_state(session, None, 1, 1.0)
    config = RolloutConfig(rollout_tensor_model_parallel_size=1, max_running_requests=4)
    rig = RolloutRig.open(session, state, config, 8, 8)
    reports = [rig.refit() for _ in range(repeats + 1)][1:]
    return Moved(reports[0].received + reports[0].copied, statistics.median(one.seconds for one in reports))


def put_refit(moved: Mapping[int, Moved], sheet: Sheet) -> None:
    """The slowest rank counts. Args: moved: by rank."""
    slowest = max(moved.values(), key=lambda one: one.seconds)
    sheet.put("seconds", slowest.seconds)
    sheet.put("bandwidth", slowest.bytes / slowest.seconds / 1e9, f"TP {len(moved)} to 1")
