#!/usr/bin/env python
"""Larger blocks by TraceRL: does a model of block 4 that is expanded to 8 get back what a plain switch to 8 loses?

    python -m benchmarks.block_expansion             # 3 seeds; about as long as benchmarks.rl_methods
    python -m benchmarks.block_expansion --help

For each seed a tiny model is fine-tuned and improved by TraceRL, both with blocks of 4. That is the base. From it

  expanded   trains with blocks of 8, first on rollouts in blocks of 4, then on rollouts in blocks of 8;
  control    takes as many steps of TraceRL with blocks of 4;
  direct     (with --direct) takes as many steps with blocks of 8 in rollouts, too.

All are evaluated in blocks of 4 and of 8, whatever they were trained with: the base and the control in blocks of 8 are
the plain switch. Source of the recipe: TraceRL, arXiv 2509.06949, section 5.8 and Table 3.

Results are kept as those of benchmarks.rl_methods are, and exit codes are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from benchmarks.rl_methods import RESPONSE, add_machine, positive, rl_flags, say, start
from benchmarks.rl_report import interval, markdown
from benchmarks.stages import Stage, command, environment, run
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.training.history import read_history

SMALL, LARGE = BLOCKS = (4, 8)
BAND = ("--min-group-accuracy", 0, "--max-group-accuracy", 1)
"""After a switch nearly all answers are wrong: a band from 20 % to 80 %, the default, would leave hardly a group."""
WAYS = ("dynamic", "static")
BEGIN, BASE, HALFWAY, EXPANDED, CONTROL, DIRECT = "SFT", "base", "after phase 1", "expanded", "control", "direct"

Found = Mapping[tuple[str, int], Mapping[int, Mapping[str, float]]]
"""(model, block of decoding) -> seed -> its metrics."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    began, (plan, evaluations) = time.monotonic(), stages(options)
    try:
        failed = run(plan, options.at_once, environment(options.threads, options.device), say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    found = collect(evaluations)
    if not found:
        print("No evaluation ended well; there is nothing to report.", file=sys.stderr)
        return 1
    text = report(found, options, failed)
    print(f"\n{text}\n{time.monotonic() - began:.0f} seconds in all")
    (options.output / "report.md").write_text(text)
    lines = [{"model": model, "block": block, "seeds": seeds} for (model, block), seeds in found.items()]
    (options.output / "figures.json").write_text(json.dumps(lines, indent=1) + "\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="TraceRL from blocks of 4 to blocks of 8, on a tiny model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=lambda text: Path(text).absolute(), default="runs/block-expansion", help="folder of results")
    add("--seeds", nargs="+", type=positive, default=[1, 2, 3])
    add("--base-steps", type=positive, default=20, help="RL steps before the expansion, with blocks of 4")
    add("--phase-1", type=positive, default=16, help="RL steps with rollouts in blocks of 4, trained in blocks of 8")
    add("--phase-2", type=positive, default=44, help="RL steps with rollouts in blocks of 8, too")
    add("--phase-1-flags", default="--old-logprobs rollout", help="more flags of tracerl in phase 1, as one argument")
    add("--direct", action="store_true", help="all these steps with rollouts in blocks of 8, for comparison")
    add("--prompts", type=positive, default=64, help="per RL step")
    add("--samples", type=positive, default=16, help="responses per prompt")
    add("--eval-prompts", type=positive, default=500, help="held-out problems")
    add("--eval-samples", type=positive, default=2, help="responses to each of them")
    add("--rl-lr", type=float, default=1e-4)
    add_machine(parser)
    return parser


Evaluations = dict[tuple[str, int, int], Stage]  # (model, block of decoding, seed) -> its evaluation


def stages(options: argparse.Namespace) -> tuple[list[Stage], Evaluations]:
    """Everything that is to be run; and which of it are the evaluations."""
    per_seed, evaluations = [], {}
    for seed in dict.fromkeys(options.seeds):
        data, models = models_of(seed, options)
        per_seed.append([data, *models.values()])
        for model, stage in models.items():
            for block in BLOCKS:
                evaluations[model, block, seed] = evaluation(model, block, seed, stage, data, options)
    together = [stage for step in zip(*per_seed) for stage in step]  # all seeds advance, so that none waits at the end
    return [*together, *evaluations.values()], evaluations


def models_of(seed: int, options: argparse.Namespace) -> tuple[Stage, dict[str, Stage]]:
    """The data of a seed, and its models by name, each after those that it is made from."""
    data, sft = start(options.output, seed, options.sft_steps, options.slips, options.eval_prompts)

    def learn(name: str, since: Stage, *flags: object) -> Stage:
        folder = options.output / f"{name.replace(' ', '-')}-seed{seed}"
        return command(
            *(f"{name}, seed {seed}", folder, "tracerl", "--load", since.result),
            *rl_flags(data, seed, options.prompts, options.samples, options.rl_lr),
            *(*flags, "--save", folder / "result"),
            after=[since],
        )

    both = options.phase_1 + options.phase_2
    base = learn(BASE, sft, "--finetune", "--num-rollout", options.base_steps)
    half = learn(
        HALFWAY,
        base,
        *("--finetune", "--block-size", LARGE, "--rollout-block-size", SMALL, "--num-rollout", options.phase_1),
        *(*BAND, *options.phase_1_flags.split()),
    )
    models = {
        BEGIN: sft,
        BASE: base,
        HALFWAY: half,
        EXPANDED: learn(EXPANDED, half, *BAND, "--num-rollout", both),  # goes on: optimizer and place in the data
        CONTROL: learn(CONTROL, base, "--finetune", *BAND, "--num-rollout", both),
    }
    if options.direct:
        models[DIRECT] = learn(DIRECT, base, "--finetune", *BAND, "--block-size", LARGE, "--num-rollout", both)
    return data, models


def evaluation(model: str, block: int, seed: int, stage: Stage, data: Stage, options: argparse.Namespace) -> Stage:
    """A model on held-out problems, decoded (and attended to) in blocks of this size."""
    folder = options.output / f"eval-{model.replace(' ', '-')}-block{block}-seed{seed}"
    return command(
        *(f"{model} in blocks of {block}, seed {seed}", folder, "evaluate", "--load", stage.result, "--seed", seed),
        *("--rollout-block-size", block, *RESPONSE, "--eval-prompt-data", data.result / "heldout.jsonl"),
        *("--n-samples-per-eval-prompt", options.eval_samples, "--eval-remasking", *WAYS),
        after=[stage],
    )


def collect(evaluations: Evaluations) -> Found:
    """The metrics of all evaluations that ended well."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for (model, block, seed), stage in evaluations.items():
        if stage.seconds is not None:
            found.setdefault((model, block), {})[seed] = read_history(stage.metrics)[-1]
    return found


def report(found: Found, options: argparse.Namespace, failed: Sequence[Stage]) -> str:
    """The table, like Table 3 of the paper, and what was lost and came back."""
    head = ["model", "decoded in blocks of"]
    head += [title for way in WAYS for title in (f"{way}, %", "tokens per denoising step")]
    rows = [head]
    for (model, block), seeds in found.items():
        cells = [model, str(block)]
        for way in WAYS:
            cells.append(str(interval([100 * metrics[f"eval/{way}/accuracy"] for metrics in seeds.values()])))
            cells.append(f"{_mean(metrics[f'eval/{way}/tokens_per_step'] for metrics in seeds.values()):.2f}")
        rows.append(cells)
    lines = [
        f"Base: {options.base_steps} RL steps after SFT; then {options.phase_1} + {options.phase_2} steps of "
        f"{options.prompts} prompts x {options.samples} responses; {options.eval_prompts} held-out problems x "
        f"{options.eval_samples} responses, temperature 1; seeds {', '.join(map(str, options.seeds))}; 95 % intervals.",
        "",
        markdown(rows),
        "",
        *(line for way in WAYS for line in _recovery(found, way)),
        *(f"Missing: {stage.name}" for stage in failed),
    ]
    return "\n".join(lines) + "\n"


def _recovery(found: Found, way: str) -> list[str]:
    """In points, seed by seed: what the plain switch costs, and where the expanded model ends."""
    accuracy = {
        key: {seed: 100 * metrics[f"eval/{way}/accuracy"] for seed, metrics in seeds.items()}
        for key, seeds in found.items()
    }
    comparisons = (
        ("the plain switch of the base to 8", (BASE, LARGE), (BASE, SMALL)),
        ("the plain switch of the control to 8", (CONTROL, LARGE), (CONTROL, SMALL)),
        ("expanded in 8 against the base in 4", (EXPANDED, LARGE), (BASE, SMALL)),
        ("expanded in 8 against the control in 8", (EXPANDED, LARGE), (CONTROL, LARGE)),
        ("expanded in 8 against the control in 4", (EXPANDED, LARGE), (CONTROL, SMALL)),
    )
    lines = []
    for title, one, other in comparisons:
        seeds = sorted(accuracy.get(one, {}).keys() & accuracy.get(other, {}).keys())
        if seeds:
            points = interval([accuracy[one][seed] - accuracy[other][seed] for seed in seeds])
            lines.append(f"- {way}: {title}: {points.signed()} points")
    return lines


def _mean(values) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    sys.exit(main())
