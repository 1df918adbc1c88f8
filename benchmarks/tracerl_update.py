#!/usr/bin/env python
"""How long a TraceRL update takes, and how much memory, in three layouts of the same rollouts.

    python benchmarks/tracerl_update.py --help

The layouts are those of benchmarks/layouts.py. Each has a process of its own with the same weights; they update in
turn, so that a machine that slows down slows them all. Before anything is compared the gradients must be equal.
Exit code 1: they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch

from benchmarks.common import LAYOUTS, PACKED, relative_difference, table
from benchmarks.update_worker import PHASES, Bench, Generated, Job, Updated
from benchmarks.workers import Worker
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import RolloutConfig

TOLERANCE = {False: 1e-4, True: 5e-2}  # of gradients, by --bf16


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU that torch can use, and there is none.", file=sys.stderr)
        return 2
    layouts = [PACKED, *(layout for layout in LAYOUTS if layout in options.layouts and layout != PACKED)]
    began, results = time.perf_counter(), []
    with _workers(_job(options), layouts) as workers, tempfile.TemporaryDirectory() as folder:
        total, tables, device = workers[PACKED].ask("describe")
        print(
            f"{total / 1e6:.1f} million parameters, {tables / 1e6:.1f} of them embedding and head; "
            f"{'bfloat16' if options.bf16 else 'float32'}; {device}"
        )
        _warm_up(workers)
        for remasking in options.remasking:
            until = None if options.seconds is None else began + options.seconds
            result = _measure(remasking, layouts, workers, options.repeats, Path(folder), until)
            results.append(result)
            print("\n" + _report(result))
            if (complaint := unequal(result, TOLERANCE[options.bf16])) is not None:
                print(complaint, file=sys.stderr)
                return 1
            print(_speed_ups(result))
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")
    if options.json:
        settings = dict(vars(options), parameters=total, embedding_and_head=tables, device=device)
        Path(options.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Seconds and peak memory of a TraceRL update, packed and not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU where there is one")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="packed is always measured")
    add("--remasking", nargs="+", choices=("static", "dynamic"), default=["static", "dynamic"])
    add("--repeats", type=_positive, default=2, help="updates per layout and way of unmasking")
    add("--json", metavar="FILE", help="write all figures there")
    add("--bf16", action="store_true", help="parameters and computation in bfloat16")
    add("--prompts", type=_positive, default=2)
    add("--samples", type=_positive, default=2, help="responses per prompt")
    add("--prompt-length", type=_positive, default=32)
    add("--response-length", type=_positive, default=256)
    add("--block-size", type=_positive, default=4)
    add("--threshold", type=float, default=0.6, help="confidence above which dynamic unmasks")
    add("--max-tokens-per-row", type=_positive, default=2048)
    add("--num-layers", type=_positive, default=4)
    add("--hidden-size", type=_positive, default=320)
    add("--ffn-hidden-size", type=_positive, default=896)
    add("--num-attention-heads", type=_positive, default=5)
    add("--num-query-groups", type=_positive, default=1)
    add("--kv-channels", type=_positive, default=64)
    add("--seconds", type=float, help="begin no further round after so many")
    add("--vocab-size", type=_positive, default=8960)
    add("--head-scale", type=float, default=30.0, help="standard deviation of the random model's logits")
    add("--seed", type=int, default=1)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _job(options: argparse.Namespace) -> Job:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    model = ModelConfig(
        **{name: getattr(options, name) for name in sizes},
        vocab_size=options.vocab_size,
        block_size=options.block_size,
        max_position_embeddings=options.prompt_length + options.response_length + options.block_size,
        rotary_base=1e4,
        bf16=options.bf16,
    )
    rollout = RolloutConfig(rollout_max_response_len=options.response_length, threshold=options.threshold)
    return Job(
        model,
        options.head_scale,
        options.prompts,
        options.samples,
        options.prompt_length,
        dataclasses.replace(rollout, max_running_requests=min(256, options.prompts * options.samples)),
        options.max_tokens_per_row,
        options.seed,
    )


@contextlib.contextmanager
def _workers(job: Job, layouts: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """A worker for each layout; the same one for all on CUDA, whose memory they would compete for."""
    shared = torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    first = Worker(Bench, job)
    workers = {layout: first if shared or layout == PACKED else Worker(Bench, job) for layout in layouts}
    try:
        yield workers
    finally:
        for worker in {id(worker): worker for worker in workers.values()}.values():
            worker.close()


def _warm_up(workers: dict[str, Worker]) -> None:
    """A small rollout and an update of it: optimizer states are made, libraries loaded."""
    short = workers[PACKED].ask("generate", "static", 8).traces
    for layout, worker in workers.items():
        worker.ask("update", layout, short, None)


def _measure(
    remasking: str,
    layouts: Sequence[str],
    workers: dict[str, Worker],
    repeats: int,
    folder: Path,
    until: float | None = None,
) -> dict[str, Any]:
    """One rollout, and `repeats` rounds of updates in which each layout has its turn; but the first none that would
    begin after `until`, of `time.perf_counter`.
    """
    generated: Generated = workers[PACKED].ask("generate", remasking)
    traces = generated.traces
    updates: dict[str, list[Updated]] = {layout: [] for layout in layouts}
    for repeat in range(repeats):
        if repeat and until is not None and time.perf_counter() > until:
            break
        for layout in layouts if repeat % 2 == 0 else list(layouts)[::-1]:
            keep = str(folder / f"{layout}.pt") if repeat == 0 else None
            updates[layout].append(workers[layout].ask("update", layout, traces, keep))
    gradients = {layout: torch.load(folder / f"{layout}.pt") for layout in layouts}
    tokens = sum(len(trace.response_ids) for trace in traces)
    return {
        "remasking": remasking,
        "responses": len(traces),
        "response_tokens": tokens,
        "tokens_per_step": tokens / sum(trace.num_steps for trace in traces),
        "rollout_seconds": generated.seconds,
        "updates": {layout: [_plain(update) for update in found] for layout, found in updates.items()},
        "gradient_difference": {
            layout: relative_difference(gradients[layout], gradients[PACKED]) for layout in layouts if layout != PACKED
        },
    }


def _plain(update: Updated) -> dict[str, Any]:
    return dataclasses.asdict(update) | {"total": update.total}


def _median(updates: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(update["seconds"][name] if name in PHASES else update[name] for update in updates)


def _report(result: dict[str, Any]) -> str:
    """Medians of one way of unmasking, a line per layout; seconds."""
    lines = []
    for layout, updates in result["updates"].items():
        difference = result["gradient_difference"].get(layout)
        lines.append(
            [
                layout,
                str(updates[0]["rows"]),
                f"{updates[0]['tokens']:,}",
                *(f"{_median(updates, phase):.3f}" for phase in PHASES),
                f"{_median(updates, 'total'):.2f}",
                f"{max(update['peak'] for update in updates) / 2**20:.0f}",
                "" if difference is None else f"{difference:.1e}",
            ]
        )
    tokens, seconds = result["response_tokens"], result["rollout_seconds"]
    heading = (
        f"{result['remasking']}: {result['responses']} responses, {tokens:,} tokens, {result['tokens_per_step']:.2f} "
        f"per denoising step; rollout {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)"
    )
    header = ["layout", "rows", "tokens", *PHASES, "update (s)", "peak (MiB)", "gradient diff."]
    return f"{heading}\n{table(header, lines)}"


def unequal(result: dict[str, Any], tolerance: float) -> str | None:
    """Why the speeds of this result must not be compared; None if they may be."""
    too_far = [difference for difference in result["gradient_difference"].values() if not difference <= tolerance]
    if not too_far:
        return None
    return (
        f"The gradients of the layouts differ by {too_far[0]:.1e}, more than {tolerance:.0e}: they do not compute "
        "the same, so their speeds are not compared."
    )


def _speed_ups(result: dict[str, Any]) -> str:
    """Ratios of updates of the same round: medians, lowest and highest."""
    lines, packed = [], result["updates"][PACKED]
    for layout, updates in result["updates"].items():
        if layout == PACKED:
            continue
        ratios = [rival["total"] / ours["total"] for rival, ours in zip(updates, packed)]
        memory = max(update["peak"] for update in updates) / max(update["peak"] for update in packed)
        result.setdefault("speed_up", {})[layout] = ratios
        lines.append(
            f"packed is {statistics.median(ratios):.1f} times as fast as one text {layout} "
            f"({min(ratios):.1f} to {max(ratios):.1f} in {len(ratios)} rounds), which takes {memory:.2f} times its "
            "memory"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
