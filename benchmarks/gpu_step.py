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
AGAIN = 3  # runs with other masks: one alone may come out close by chance


def step(job: Job, words: int, repeats: int, sheet: Sheet) -> None:
    """Phases of a step, in the trainer's precision bf16; then the differences where the trainer computes in FP8, and
    where the engine does.

    Args:
        words: of each judged text.
    """
    traces = _differences("bf16", job, sheet, repeats)
    try:
        sheet.put("reward", _judge(len(traces), words), f"{len(traces)} texts of {words} words, on the host")
    except (UserError, ImportError) as error:
        sheet.miss(error, "reward")
    half = dataclasses.replace(job, rollout=dataclasses.replace(job.rollout, rollout_weights="fp8"))
    for name, precision, other in (("fp8", "fp8", job), ("rollout fp8", "bf16", half)):
        try:
            _differences(precision, other, sheet, 0, name)
        except Exception as error:  # whatever a library says of this GPU
            sheet.lose(error, f"{name} largest", f"{name} mean")


def _differences(precision: str, job: Job, sheet: Sheet, repeats: int, name: str | None = None) -> list:
    """The traces of a rollout.

    Args:
        precision: the trainer's. repeats: updates that are timed, phase by phase. name: of the figures; `precision`.
    """
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
        sheet.put(f"{name or precision} largest", apart.max(), f"{len(apart):,} tokens")
        sheet.put(f"{name or precision} mean", apart.mean())
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
    """The same samples learned by heart in all precisions, from the same weights, with the same masks; and with other
    masks in bf16, which shows what is noise.
    """
    plain = ParallelConfig(**PRECISIONS["bf16"])
    bf16, note = _curve(model, plain, steps, 0)
    sheet.put("bf16", bf16, note)
    again = [_curve(model, plain, steps, number * steps)[0] for number in range(1, AGAIN + 1)]
    sheet.put("bf16 again", statistics.fmean(again), f"{min(again):.4g} to {max(again):.4g}")
    sheet.put("noise", noise := max(abs(one - bf16) for one in again))
    for name in ("te", "fp8"):
        try:
            other, note = _curve(model, ParallelConfig(**PRECISIONS[name]), steps, 0)
        except Exception as error:  # as in `step`
            sheet.lose(error, name, f"{name} in noise")
            continue
        sheet.put(name, other, note)
        put_in_noise(name, other - bf16, noise, sheet)


def put_in_noise(name: str, distance: float, noise: float, sheet: Sheet) -> None:
    """Args: distance: of a run in another precision from bf16."""
    if noise > 0:
        sheet.put(f"{name} in noise", abs(distance) / noise, f"{distance:+.2g} nats")
    else:
        sheet.miss(
            "runs in bf16 with other masks came out alike: there is no noise to compare with", f"{name} in noise"
        )


def _curve(model: ModelConfig, parallel: ParallelConfig, steps: int, later: int) -> tuple[float, str]:
    """Nats per token over the last steps, and a note. Args: later: steps whose masks are left out."""
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
        return statistics.fmean(losses[-LAST:]), f"from {losses[0]:.2f} in {steps} steps"
    finally:
        groups.destroy()


@dataclass(frozen=True, slots=True)
class Moved:
    """A refit: bytes that this rank received or copied, and seconds, the median."""

    bytes: int
    seconds: float


def refit_once(model: ModelConfig, tp: int, repeats: int) -> Moved:
    """Weights of a model that is trained on `tp` ranks, to engines that have all of it, in storage of their own: on one
    rank it is copied within it. Collective.
    """
    from benchmarks.common import build_state, open_session
    from megatron_dlm.parallel.groups import rollout_groups
    from megatron_dlm.rollout.refit import Refit
    from megatron_dlm.rollout.rig import rollout_model

    session = open_session(model, ParallelConfig(tensor_model_parallel_size=tp))
    state = build_state(session, None, 1, 1.0)
    engine = rollout_model(session, rollout_groups(session.groups, 1, 1))
    refit = Refit(state, engine, share=tp > 1)
    reports = [refit.run() for _ in range(repeats + 1)][1:]
    return Moved(reports[0].moved, statistics.median(one.seconds for one in reports))


def put_refit(name: str, moved: Mapping[int, Moved], sheet: Sheet) -> None:
    """The slowest rank counts. Args: name: of the figures. moved: by rank."""
    slowest = max(moved.values(), key=lambda one: one.seconds)
    sheet.put(f"{name} seconds", slowest.seconds, f"{slowest.bytes / 1e9:.3g} GB")
    sheet.put(name, slowest.bytes / slowest.seconds / 1e9, f"TP {len(moved)} to 1")
