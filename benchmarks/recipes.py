#!/usr/bin/env python
"""From an autoregressive model to one of block diffusion, to larger blocks, and what an objective is worth: in small.

    python -m benchmarks.recipes                                 # all of it, for two seeds
    python -m benchmarks.recipes --parts conversion --seeds 1    # a part of it
    python -m benchmarks.recipes --help

For each seed a tiny autoregressive model learns sums that are worked out step by step. From there

  conversion   it becomes a model of blocks of 4, with its logits ahead of their tokens or in place, at once or by way
               of blocks of 1 and 2 (SDAR, Fast-dLLM v2, LLaDA2.0); beside it one goes on as it was for as many steps;
  growth       blocks of 4 grow to 16, at once (SDAR) or by way of 8 (TDAR), in equally many steps;
  objectives   with full attention, three ways to learn new samples: random masking, slices behind finished text, and
               the steps of traces that the model prefers (Table 1 of TraceRL, arXiv 2509.06949), on about as many
               tokens of rows: --draws gives random masking several masks of a sample, traces of which each step has a
               copy of its own are fewer. Beside them random masking with one mask, a fifth of these tokens.

Held-out problems are decoded greedily, one token per step (static) and all that are surer than 0.9 (dynamic).

--output keeps every run (settings, log, metrics.jsonl, checkpoint), report.md and figures.json. What is there already
is not run again. Exit code 1: a run failed; the report is of the others. 2: the command line cannot work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from benchmarks import recipe_stages as names
from benchmarks.recipe_stages import WAYS, Chain, chain
from benchmarks.rl_methods import positive, say
from benchmarks.rl_report import interval, markdown
from benchmarks.stages import Stage, environment, run
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.training.history import read_history


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model in blocks of one size. Attributes: accuracy, in percent, and tokens per step, by way of decoding;
    tokens: in the rows that it learned from, since the model that it was made of.
    """

    accuracy: Mapping[str, float]
    tokens_per_step: Mapping[str, float]
    tokens: float


Found = dict[tuple[str, int], dict[int, Figures]]
"""(model, block of decoding) -> seed -> its figures."""

COMPARISONS = {
    "conversion": [
        (one, 4, base, 1)
        for base in (names.AR, names.GOES_ON)
        for one in (names.KEPT, names.DROPPED, names.DROPPED_SLOWLY)
    ],
    "growth": [
        (names.BASE, 16, names.BASE, 4),
        (names.JUMP, 16, names.STAY, 4),
        (names.STEPWISE, 16, names.STAY, 4),
        (names.STEPWISE, 16, names.JUMP, 16),
    ],
    "objectives": [
        *((one, names.DECODED, names.FULL, names.DECODED) for one in names.OBJECTIVES),
        (names.SLICED, names.DECODED, names.RANDOM, names.DECODED),
        (names.TRACED, names.DECODED, names.RANDOM, names.DECODED),
        (names.TRACED_FINELY, names.DECODED, names.RANDOM, names.DECODED),
        (names.TRACED_FINELY, names.DECODED, names.TRACED, names.DECODED),
        (names.TRACED_FINELY, names.DECODED, names.SLICED, names.DECODED),
    ],
}
"""What is compared with what, seed by seed: (model, block, other model, its block)."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    began, chains = time.monotonic(), [chain(seed, options) for seed in dict.fromkeys(options.seeds)]
    try:
        failed = run(plan(chains), options.at_once, environment(options.threads, options.device), say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    found = collect(chains)
    if not found:
        print("No evaluation ended well; there is nothing to report.", file=sys.stderr)
        return 1
    text = report(found, options, failed)
    print(f"\n{text}\n{time.monotonic() - began:.0f} seconds in all")
    (options.output / "report.md").write_text(text)
    (options.output / "figures.json").write_text(json.dumps(as_json(found), indent=1) + "\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Conversion, growth of blocks and objectives of fine-tuning, on a tiny model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=lambda text: Path(text).absolute(), default="runs/recipes", help="folder of all results")
    add("--parts", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="what to compare")
    add("--seeds", nargs="+", type=positive, default=[1, 2])
    add("--terms", type=positive, default=4, help="of a sum; a response is about 11 tokens for each but the first")
    add("--eval-prompts", type=positive, default=300, help="held-out problems")
    add("--batch", type=positive, default=64, help="samples per optimizer step")
    add("--ar-steps", type=positive, default=600, help="of the autoregressive model")
    add("--switch-steps", type=positive, default=400, help="from autoregressive to blocks of 4")
    add("--growth-steps", type=positive, default=100, help="from blocks of 4 to 16")
    add("--full-steps", type=positive, default=500, help="from blocks of 4 to full attention, before the objectives")
    add("--full-draws", type=positive, default=2, help="masks of a sample in an update of these")
    add("--objective-steps", type=positive, default=50, help="on new samples, for each objective")
    add("--draws", type=positive, default=5, help="masks of a sample in an update of random masking")
    add("--lr", type=float, default=1e-3, help="of what follows the autoregressive model")
    add("--objective-lr", type=float, default=3e-4, help="on new samples")
    add("--at-once", type=positive, default=2, help="runs at the same time")
    add("--threads", type=positive, default=1, help="of each run")
    add("--device", choices=("cpu", "auto"), default="cpu", help="auto takes a GPU where there is one")
    return parser


def plan(chains: Sequence[Chain]) -> list[Stage]:
    """The stages of all seeds; what takes part in no evaluation is left out."""
    whole: dict[Path, Stage] = {}
    for one in chains:
        wanted: set[Path] = set()
        for stage in one.evaluations.values():
            wanted |= _needed(stage)
        for stage in one.stages():
            if stage.folder in wanted:
                whole.setdefault(stage.folder, stage)
    return list(whole.values())


def _needed(stage: Stage) -> set[Path]:
    return {stage.folder}.union(*(_needed(one) for one in stage.after))


def collect(chains: Sequence[Chain]) -> Found:
    """The figures of all evaluations that ended well."""
    found: Found = {}
    for one in chains:
        for (model, block), stage in one.evaluations.items():
            if stage.seconds is None:
                continue
            metrics = read_history(stage.metrics)[-1]
            learned = read_history(one.models[model].metrics)
            found.setdefault((model, block), {})[one.seed] = Figures(
                {way: 100 * metrics[f"eval/{way}/accuracy"] for way in WAYS},
                {way: metrics[f"eval/{way}/tokens_per_step"] for way in WAYS},
                sum(record.get("train/row_tokens", 0.0) for record in learned),
            )
    return found


def report(found: Found, options: argparse.Namespace, failed: Sequence[Stage]) -> str:
    """A table of all models, and the comparisons of each part."""
    rows = [["model", "block", "static, %", "dynamic, %", "tokens per dynamic step", "thousands of row tokens"]]
    for (model, block), seeds in found.items():
        cells = [str(interval([one.accuracy[way] for one in seeds.values()])) for way in WAYS]
        speed = sum(one.tokens_per_step["dynamic"] for one in seeds.values()) / len(seeds)
        tokens = sum(one.tokens for one in seeds.values()) / len(seeds) / 1000
        rows.append([model, str(block), *cells, f"{speed:.2f}", f"{tokens:.0f}"])
    lines = [
        f"Sums of {options.terms} numbers; {options.batch} samples per step; {options.eval_prompts} held-out problems, "
        f"greedy; seeds {', '.join(map(str, options.seeds))}; 95 % intervals over seeds (Student's t).",
        "",
        markdown(rows),
        "",
        *(line for part in options.parts for line in differences(found, part)),
        *(f"Missing: {stage.name}" for stage in failed),
    ]
    return "\n".join(lines) + "\n"


def differences(found: Found, part: str) -> list[str]:
    """The comparisons of a part, in points, seed by seed, for both ways of decoding."""
    lines = []
    for model, block, other, its_block in COMPARISONS[part]:
        one, two = found.get((model, block), {}), found.get((other, its_block), {})
        seeds = sorted(one.keys() & two.keys())
        if not seeds:
            continue
        points = [
            f"{way} {interval([one[seed].accuracy[way] - two[seed].accuracy[way] for seed in seeds]).signed()}"
            for way in WAYS
        ]
        lines.append(f"- {part}: {model} ({block}) against {other} ({its_block}): {', '.join(points)} points")
    return lines


def as_json(found: Found) -> list[dict]:
    return [
        {
            "model": model,
            "block": block,
            "seed": seed,
            "accuracy": dict(one.accuracy),
            "tokens_per_step": dict(one.tokens_per_step),
            "row_tokens": one.tokens,
        }
        for (model, block), seeds in found.items()
        for seed, one in seeds.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
