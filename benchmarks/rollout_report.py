"""What benchmarks/rollout.py makes of its runs: medians, ratios, shares of what the hardware allows, a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import roofline
from benchmarks.common import table
from benchmarks.plain_loop import Shape
from benchmarks.rollout_cases import Job
from benchmarks.rollout_worker import Generated

_PHASES = {"model": ("model",), "sample": ("sample",), "host": ("schedule", "collect")}
"""Columns of seconds, and the engine's phases in each (EngineStats.seconds)."""
_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2}


def summary(remasking: str, rounds: Mapping[Any, Sequence[Generated]]) -> dict[str, Any]:
    """All figures of one way of unmasking, as plain data.

    Args:
        rounds: of each contestant (rollout.Contestant) a run per round. Contestants without options are plain loops,
            and the engine is the first with options, in as many numbers of threads as there are loops.
    """
    contestants = [_line(one, runs) for one, runs in rounds.items()]
    loops = [one for one in contestants if one["options"] is None]
    ours = [one for one in contestants if one["options"] is not None][: len(loops)]
    fastest = lambda some: max(some, key=lambda one: one["tokens_per_second"])
    loop, engine = fastest(loops), fastest(ours)
    for one in contestants:
        one["ratio"] = one["tokens_per_second"] / loop["tokens_per_second"]
    speed_up = {"best": _ratios(engine, loop)}
    speed_up |= {str(one["threads"]): _ratios(one, other) for one, other in zip(ours, loops)}
    return {
        "remasking": remasking,
        "contestants": contestants,
        "speed_up": speed_up,
        "threads": {"engine": engine["threads"], "plain loop": loop["threads"]},
    }


def _line(one: Any, runs: Sequence[Generated]) -> dict[str, Any]:
    speeds = [run.tokens_per_second for run in runs]
    last = dataclasses.asdict(runs[-1])
    counts = {name: value for name, value in last.items() if name not in ("seconds", "cpu_seconds", "phases")}
    phases = {name: statistics.median(run.phases[name] for run in runs) for name in runs[0].phases}
    return {
        "name": one.name,
        "threads": one.threads,
        "options": None if one.options is None else dataclasses.asdict(one.options),
        "weights": one.weights,
        "tokens_per_second": statistics.median(speeds),
        "all_tokens_per_second": speeds,
        "seconds": [run.seconds for run in runs],
        "cpu_seconds": [run.cpu_seconds for run in runs],
        "tokens_per_cpu_second": statistics.median(run.tokens / run.cpu_seconds for run in runs),
        **counts,
        "phases": phases,
    }


def _ratios(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Of the speeds of each round."""
    return [mine / theirs for mine, theirs in zip(one["all_tokens_per_second"], other["all_tokens_per_second"])]


def limits(
    result: dict[str, Any],
    job: Job,
    shape: Shape,
    dtype: str,
    device: str,
    bandwidth: float | None,
    flops: float | None,
) -> None:
    """Add to each contestant what the hardware allows (roofline.py), and the share of it that was reached.

    Nothing is added where the hardware is not known and no figures are given.
    """
    hardware = roofline.known(device) if bandwidth is None else roofline.Hardware(bandwidth, flops)
    if hardware is None:
        return
    sampling = job.sampling[result["remasking"]]
    for one in result["contestants"]:
        sequences = min(one["options"]["max_running_requests"], one["responses"]) if one["options"] else 1
        context = one["prompt_tokens"] / one["responses"] + sampling.max_new_tokens / 2
        given = _BYTES[dtype], hardware, sequences, context, sampling.block_size, one["weights"] == "fp8"
        seconds = roofline.seconds_of_a_pass(shape, *given)
        steps = one["steps"] / one["blocks"]
        one["limit"] = roofline.tokens_per_second(seconds, sequences, sampling.block_size, steps)
        one["share_of_limit"] = one["tokens_per_second"] / one["limit"]


def report(result: Mapping[str, Any]) -> str:
    """A line per contestant, medians over the rounds; and how many times as fast the engine is."""
    limited = "limit" in result["contestants"][0]
    header = ["", "threads", "responses", "tok/s", "ratio", "tok/CPU s", *(["limit", "reached"] if limited else [])]
    header += ["passes", "tok/fwd", "fwd/block", "steps/block", "prefilled", "of", *_PHASES]
    lines = []
    for one in result["contestants"]:
        share = [f"{one['limit']:,.0f}", f"{one['share_of_limit']:.0%}"] if limited else []
        lines.append(
            [
                one["name"],
                str(one["threads"]),
                str(one["responses"]),
                f"{one['tokens_per_second']:,.0f}",
                f"{one['ratio']:.2f}",
                f"{one['tokens_per_cpu_second']:,.0f}",
                *share,
                f"{one['passes']:,}",
                f"{one['tokens'] / one['forwards']:.2f}",
                f"{one['forwards'] / one['blocks']:.2f}",
                f"{one['steps'] / one['blocks']:.2f}",
                f"{one['prefilled']:,}",
                f"{one['prompt_tokens']:,}",
                *(_seconds(one["phases"], names) for names in _PHASES.values()),
            ]
        )
    text = [
        f"{result['remasking']} (tok: tokens of responses, fwd: forwards of a sequence; model, sample, host: seconds)",
        table(header, lines),
    ]
    threads, cases = result["threads"], result["speed_up"]
    for case, ratios in cases.items():
        if case == "best" and len(cases) == 2:
            continue  # there is one number of threads, which the other case tells
        how = (
            f"threads: {case}" if case != "best" else f"threads: {threads['engine']} and {threads['plain loop']}, best"
        )
        text.append(
            f"the engine is {statistics.median(ratios):.1f} times as fast as the plain loop "
            f"({min(ratios):.1f} to {max(ratios):.1f} in {len(ratios)} rounds; {how})"
        )
    return "\n".join(text)


def _seconds(phases: Mapping[str, float], names: Sequence[str]) -> str:
    return f"{sum(phases[name] for name in names):.2f}" if phases else ""
