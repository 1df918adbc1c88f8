#!/usr/bin/env python
"""How fast responses are generated: the engine, the engine without each of its features, and the plain loop.

    python -m benchmarks.rollout                                                   # a small model, on whatever there is
    python -m benchmarks.rollout --preset 8b --device cuda --batches 64 128 256    # SDAR's sizes, for a GPU
    python -m benchmarks.rollout --help

The plain loop (benchmarks/plain_loop.py) generates one sequence at a time with a KV cache; it is given every n-th
request only, because its speed per token does not depend on the others. All contestants take turns in each round.
Before anything is timed they must give the same tokens at the same steps in float64, with a small model.

Exit code 1: they do not. 2: the command line cannot work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import torch

from benchmarks.rollout_cases import SIZES, Job, small_case
from benchmarks.rollout_report import limits, report, summary
from benchmarks.rollout_worker import Bench, Generated
from benchmarks.workers import Worker
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.config.model import ModelConfig
from megatron_dlm.config.rollout import CapacityConfig
from megatron_dlm.diffusion.trace import SamplingParams
from megatron_dlm.rollout.options import EngineOptions

PLAIN, ENGINE = "plain loop", "engine"
FEATURES = {"share_prompts": "prompts not shared", "fuse_commit": "commits apart", "masked_head": "head everywhere"}
"""Switches of EngineOptions, and what the engine is called without each."""

WEIGHTS = get_args(get_type_hints(CapacityConfig)["rollout_weights"])
BACKENDS = get_args(get_type_hints(CapacityConfig)["rollout_attention_backend"])
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True, slots=True)
class Contestant:
    """A line of the table.

    Attributes:
        requests: the plain loop takes every n-th, an engine the first n.
        options: None for the plain loop.
        weights: the engine's, as --rollout-weights says.
    """

    name: str
    threads: int
    requests: int
    options: EngineOptions | None = None
    weights: str = "trained"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        job = _job(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    began, results, engines = time.perf_counter(), [], _engines(options, job)
    if (complaint := _different(engines, job)) is not None:
        print(complaint, file=sys.stderr)
        return 1
    with _workers(job, apart=options.device == "cpu") as workers:
        shape, parameters, device = workers[ENGINE].ask("describe")
        print(
            f"{parameters / 1e6:.1f} million parameters, {options.dtype}; {device}; {job.prompts} prompts of "
            f"{options.prompt_lengths[0]} to {options.prompt_lengths[1]} tokens, {job.samples} responses of "
            f"{options.response_length} tokens to each, block {options.block_size}\n"
            f"engine: {options.batches[0]} running, {options.budgets[0]} tokens a pass, pages of "
            f"{options.page_sizes[0]}"
        )
        for remasking in options.remasking:
            until = None if options.seconds is None else began + options.seconds
            result = summary(remasking, _measure(remasking, engines, workers, options, until))
            limits(result, job, shape, options.dtype, device, options.bandwidth, options.flops)
            results.append(result)
            print("\n" + report(result))
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")
    if options.json:
        settings = dict(vars(options), parameters=parameters, device=device)
        Path(options.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokens per second of the rollout engine and of a plain loop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, several = parser.add_argument, dict(nargs="+", type=_positive)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes the GPU where there is one")
    add("--dtype", choices=("fp32", "bf16", "fp64"), help="of the model; bf16 on a GPU and fp32 elsewhere if not given")
    add("--threads", **several, help="all are tried, and the best compared; 1 and 2 on a CPU if not given")
    add("--repeats", type=_positive, default=3, help="rounds")
    add("--seconds", type=float, help="begin no further round after so many")
    add("--json", metavar="FILE", help="write all figures there")
    add("--prompts", type=_positive, default=64)
    add("--samples", type=_positive, default=8, help="responses per prompt")
    add("--prompt-lengths", nargs=2, type=_positive, default=[64, 192], metavar=("SHORTEST", "LONGEST"))
    add("--response-length", type=_positive, default=64)
    add("--plain-every", type=_positive, default=32, metavar="N", help="the plain loop takes every N-th request")
    add("--remasking", nargs="+", choices=("static", "dynamic"), default=["static", "dynamic"])
    add("--denoising-steps", type=_positive, help="most steps of a block; its size if not given")
    add("--threshold", type=float, default=0.9, help="confidence above which dynamic unmasks")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    engine = parser.add_argument_group(
        "engine", "The first value of a list is the engine's; it is measured with each of the others, too."
    )
    add = engine.add_argument
    add("--batches", **several, default=[256, 1, 16, 64], help="max_running_requests; few take fewer requests")
    add("--budgets", **several, help="max_tokens_per_pass; 8192 1024 on a GPU and 1024 8192 elsewhere if not given")
    add("--page-sizes", **several, default=[16, 4, 64], help="page_size")
    add("--rounds", **several, help="rounds_per_sync; 4 1 8 on a GPU and 1 elsewhere if not given")
    add("--attention-backends", nargs="+", choices=BACKENDS, default=["auto"], help="attention_backend")
    add("--cuda-graphs", action="store_true", help="measured with them, too; needs a GPU and FlashAttention")
    add("--samplers", nargs="+", choices=("torch", "triton"), help="triton torch on a GPU with triton, torch elsewhere")
    add("--weights", nargs="+", choices=WEIGHTS, default=["trained"], help="rollout_weights; fp8 needs bf16")
    add("--without", nargs="*", choices=FEATURES, default=list(FEATURES), help="measured with each of these off, too")
    model = parser.add_argument_group("model", "Random weights; a size that is given beats the preset's.")
    add = model.add_argument
    add("--preset", choices=SIZES, default="12m")
    for name in (*_SIZES, "vocab_size", "block_size"):
        add("--" + name.replace("_", "-"), type=_positive)
    add("--head-scale", type=float, default=20.0, help="standard deviation of the logits: the larger, the surer")
    add("--seed", type=int, default=1)
    limit = parser.add_argument_group("roofline", "Figures of the GPU where it is not a known one (roofline.py).")
    limit.add_argument("--bandwidth", type=float, help="bytes per second")
    limit.add_argument("--flops", type=float, help="per second, dense, in the precision of the model")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _job(options: argparse.Namespace) -> Job:
    """What is to be generated. Fills in what depends on the device or on other flags.

    Raises:
        ConfigError: the flags do not go together.
    """
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise ConfigError("--device cuda needs a GPU that torch can use, and there is none. Use --device cpu.")
    if options.device == "auto":
        options.device = "cuda" if gpu else "cpu"
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    options.threads = options.threads or ([1] if options.device == "cuda" else [1, 2][: os.cpu_count()])
    options.budgets = options.budgets or ([8192, 1024] if options.device == "cuda" else [1024, 8192])
    sizes = dict(SIZES[options.preset])
    sizes |= {name: getattr(options, name) for name in (*_SIZES, "vocab_size") if getattr(options, name) is not None}
    options.block_size = options.block_size or sizes.pop("block_size", 4)
    options.denoising_steps = options.denoising_steps or options.block_size
    options.rounds = options.rounds or ([4, 1, 8] if options.device == "cuda" else [1])
    has_triton = options.device == "cuda" and importlib.util.find_spec("triton") is not None
    options.samplers = options.samplers or (["triton", "torch"] if has_triton else ["torch"])
    _check(options, sizes)
    model = ModelConfig(
        **sizes | dict(block_size=options.block_size, bf16=options.dtype == "bf16", fp64=options.dtype == "fp64")
    )
    sampling = {
        remasking: SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            max_new_tokens=options.response_length,
            block_size=options.block_size,
            denoising_steps=options.denoising_steps,
            remasking=remasking,
            threshold=options.threshold,
            ignore_eos=True,  # a model of random weights never means to stop
        )
        for remasking in options.remasking
    }
    lengths = (options.prompt_lengths[0], options.prompt_lengths[1])
    return Job(model, options.head_scale, options.prompts, options.samples, lengths, sampling, options.seed)


def _check(options: argparse.Namespace, sizes: dict[str, Any]) -> None:
    """Raises ConfigError, before any work, when the command line cannot work."""
    shortest, longest = options.prompt_lengths
    if shortest > longest:
        raise ConfigError(f"--prompt-lengths {shortest} {longest} has the longest first. Swap them.")
    if options.denoising_steps > options.block_size:
        raise ConfigError(
            f"--denoising-steps {options.denoising_steps} is more than the {options.block_size} tokens of a block. "
            f"Use 1 to {options.block_size}."
        )
    heads, groups = sizes["num_attention_heads"], sizes["num_query_groups"]
    if heads % groups:
        raise ConfigError(f"--num-query-groups {groups} does not divide the {heads} attention heads. Use a divisor.")
    for name, good, range_ in (
        ("threshold", 0 <= options.threshold <= 1, "from 0 to 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "0 or a positive number"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("head_scale", 0 < options.head_scale < float("inf"), "a positive number"),
        ("bandwidth", options.bandwidth is None or options.bandwidth > 0, "a positive number"),
        ("flops", options.flops is None or options.flops > 0, "a positive number"),
    ):
        if not good:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {range_}.")
    if "fp8" in options.weights and options.dtype != "bf16":
        raise ConfigError(f"--weights fp8 needs --dtype bf16, and it is {options.dtype}. Give it, or leave fp8 out.")
    if (options.bandwidth is None) != (options.flops is None):
        raise ConfigError("--bandwidth and --flops belong together. Give both or none.")
    if options.cuda_graphs and options.device != "cuda":
        raise ConfigError("--cuda-graphs needs a GPU. Leave it out.")
    if options.json and (Path(options.json).is_dir() or not Path(options.json).resolve().parent.is_dir()):
        raise ConfigError(f"--json {options.json} cannot be written to. Give a file in a folder that exists.")


def _engines(options: argparse.Namespace, job: Job) -> list[Contestant]:
    """The engine, and its variants."""
    total, fused = options.prompts * options.samples, lambda name: name == "triton"
    base = EngineOptions(
        max_running_requests=options.batches[0],
        max_length=job.longest,
        max_tokens_per_pass=options.budgets[0],
        page_size=options.page_sizes[0],
        rounds_per_sync=options.rounds[0],
        attention_backend=options.attention_backends[0],
        fused_sampler=fused(options.samplers[0]),
    )
    found = [(ENGINE, base)]
    found += [(FEATURES[name], dataclasses.replace(base, **{name: False})) for name in options.without]
    found += [(f"{n} running", dataclasses.replace(base, max_running_requests=n)) for n in options.batches[1:]]
    found += [(f"{n} tokens a pass", dataclasses.replace(base, max_tokens_per_pass=n)) for n in options.budgets[1:]]
    found += [(f"pages of {n}", dataclasses.replace(base, page_size=n)) for n in options.page_sizes[1:]]
    found += [(f"{n} rounds", dataclasses.replace(base, rounds_per_sync=n)) for n in options.rounds[1:]]
    found += [(name, dataclasses.replace(base, attention_backend=name)) for name in options.attention_backends[1:]]
    found += [(f"sampler {one}", dataclasses.replace(base, fused_sampler=fused(one))) for one in options.samplers[1:]]
    if options.cuda_graphs:
        found.append(("CUDA graphs", dataclasses.replace(base, attention_backend="flash", cuda_graphs=True)))
    # Few sequences at a time are as slow as the plain loop: eight turns of them say enough, and whole groups.
    few = lambda one: min(total, max(8 * one.max_running_requests, 2 * options.samples))
    first, *others = options.weights
    made = [Contestant(name, options.threads[0], few(one), one, first) for name, one in found]
    for one in others:
        made.append(Contestant(f"weights {one}", options.threads[0], total, base, one))
        if options.cuda_graphs:
            graphs = dataclasses.replace(base, attention_backend="flash", cuda_graphs=True)
            made.append(Contestant(f"weights {one}, CUDA graphs", options.threads[0], total, graphs, one))
    return made


def _different(engines: Sequence[Contestant], job: Job) -> str | None:
    """Why speeds must not be compared; None if they may be."""
    small = small_case(job)
    with _workers(small, apart=False) as workers:
        # Kernels for GPUs know no float64; gpu_check.py holds the backends against each other.
        plain = dict(max_length=small.longest, attention_backend="sdpa", cuda_graphs=False)
        # Nor do weights in FP8, whose tokens are others: engines have the trained ones here.
        some = [one for one in engines if one.weights == engines[0].weights]
        cases = [(one.name, dataclasses.replace(one.options, **plain)) for one in some]
        complaints = workers[ENGINE].ask("different", cases)
    if not complaints:
        return None
    return "\n".join(["In float64 these do not give the plain loop's tokens, so no speed is compared:", *complaints])


@contextlib.contextmanager
def _workers(job: Job, apart: bool) -> Iterator[dict[str, Worker]]:
    """A process for either side; or one for both, which on a GPU compete for its memory."""
    first = Worker(Bench, job)
    workers = {ENGINE: first, PLAIN: Worker(Bench, job) if apart else first}
    try:
        yield workers
    finally:
        for worker in set(workers.values()):
            worker.close()


def _measure(
    remasking: str,
    engines: Sequence[Contestant],
    workers: dict[str, Worker],
    options: argparse.Namespace,
    until: float | None = None,
) -> dict[Contestant, list[Generated]]:
    """One run of each contestant per round; every other round backwards; but the first none that would begin after
    `until`, of `time.perf_counter`.

    The engine and the plain loop run with every number of threads, the engine's variants with its best in round one.
    """
    found: dict[Contestant, list[Generated]] = {}

    def take(contestants: Sequence[Contestant]) -> None:
        for one in contestants:
            if one.options is None:
                made = workers[PLAIN].ask("plain", remasking, one.requests, one.threads)
            else:
                made = workers[ENGINE].ask("engine", one.options, remasking, one.requests, one.threads, one.weights)
            found.setdefault(one, []).append(made)

    loops = [Contestant(PLAIN, threads, options.plain_every) for threads in options.threads]
    ours = [dataclasses.replace(engines[0], threads=threads) for threads in options.threads]
    everyone = [*loops, *ours]
    take(everyone)
    best = max(ours, key=lambda one: found[one][0].tokens_per_second)
    variants = [dataclasses.replace(one, threads=best.threads) for one in engines[1:]]
    take(variants)
    everyone += variants
    for repeat in range(1, options.repeats):
        if until is not None and time.perf_counter() > until:
            break
        take(everyone[::-1] if repeat % 2 else everyone)
    return found


if __name__ == "__main__":
    sys.exit(main())
