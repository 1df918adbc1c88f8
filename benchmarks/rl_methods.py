#!/usr/bin/env python
"""TraceRL against other ways to learn from the same rewards: with a value model, from random masks, from coupled ones.

    python -m benchmarks.rl_methods                                      # 3 seeds, half an hour on two cores
    python -m benchmarks.rl_methods --arms tracerl coupled --seeds 1 2   # a part of it, or more of it
    python -m benchmarks.rl_methods --help

For each seed: data (sums of three numbers, with a teacher who slips), a tiny model fine-tuned on them, and from there
one run of `megatron-dlm tracerl` per method, with the same prompts, samples and RL steps. So methods are compared at
equal rollouts, and, on the same curves, at equal numbers of trained tokens. Everything but the method depends on the
seed alone: data, start, order of prompts, and the random numbers of rollouts and evaluations.

--output keeps every run (settings, log, metrics.jsonl, checkpoint), report.md, figures.json and curves.png. What is
there already is not run again. Exit code 1: a run failed; the report is of the others. 2: the command line cannot work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from benchmarks.rl_report import Curves, Runs, curves, draw, figures, tables
from benchmarks.stages import Stage, command, environment, run
from megatron_dlm.config.errors import ConfigError
from megatron_dlm.training.history import read_history


@dataclass(frozen=True, slots=True)
class Arm:
    """A method: what the report calls it, and its flags of `tracerl`."""

    title: str
    flags: tuple[str, ...]


ARMS = {
    "tracerl": Arm("TraceRL", ("--rl-method", "tracerl")),
    "value": Arm("TraceRL, value model", ("--rl-method", "tracerl", "--use-value-model", "--value-lr", "5e-4")),
    "random": Arm("random masking", ("--rl-method", "random_masking")),
    "random2": Arm("random masking, 2 draws", ("--rl-method", "random_masking", "--mask-draws", "2")),
    "coupled": Arm("coupled", ("--rl-method", "coupled")),
    "coupled2": Arm("coupled, 2 draws", ("--rl-method", "coupled", "--mask-draws", "2")),
    "dipo": Arm("DiPO", ("--rl-method", "dipo")),
    "slim": Arm("slim_rl", ("--rl-method", "slim_rl")),
    "espo": Arm("ESPO", ("--rl-method", "espo")),
    "ebpo": Arm("EBPO", ("--rl-method", "ebpo")),
}
"""A block of this task takes about two denoising steps, so TraceRL trains on about two noisy copies of it. So do random
masking with two draws, and coupled with one, a mask and its complement: they are about equal in tokens per step."""

BASE, DEFAULT_ARMS = "tracerl", ("tracerl", "value", "random", "random2", "coupled")
RESPONSE = ("--rollout-max-response-len", 20)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    began, (plan, arms) = time.monotonic(), stages(options)
    try:
        failed = run(plan, options.at_once, environment(options.threads, options.device), say)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    runs = collect(arms)
    if not runs:
        print("No run ended well; there is nothing to report.", file=sys.stderr)
        return 1
    text = report(runs, options, failed)
    print(f"\n{text}\n{time.monotonic() - began:.0f} seconds in all")
    (options.output / "report.md").write_text(text)
    (options.output / "figures.json").write_text(json.dumps(figures(runs), indent=1) + "\n")
    draw(runs, options.output / "curves.png")
    print(f"Curves: {options.output / 'curves.png'}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="TraceRL against other methods of RL, on a tiny model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=lambda text: Path(text).absolute(), default="runs/rl-methods", help="folder of all results")
    add("--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--seeds", nargs="+", type=positive, default=[1, 2, 3])
    add("--rl-steps", type=positive, default=24)
    add("--eval-interval", type=positive, default=2, help="RL steps between evaluations")
    add("--eval-prompts", type=positive, default=500, help="held-out problems")
    add("--prompts", type=positive, default=64, help="per RL step")
    add("--samples", type=positive, default=16, help="responses per prompt")
    add("--rl-lr", type=float, default=1e-4)
    add("--rl-flags", default="", help="more flags of tracerl, for all methods, as one argument")
    add_machine(parser)
    return parser


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Flags that experiments from a fine-tuned tiny model have in common."""
    add = parser.add_argument
    add("--sft-steps", type=positive, default=500, help="of the fine-tuning that each seed starts from")
    add("--slips", type=float, default=0.35, help="share of demonstrations that are wrong")
    add("--at-once", type=positive, default=2, help="runs at the same time")
    add("--threads", type=positive, default=1, help="of each run")
    add("--device", choices=("cpu", "auto"), default="cpu", help="auto takes a GPU where there is one")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def say(line: str) -> None:
    print(line, flush=True)


def start(folder: Path, seed: int, sft_steps: int, slips: float, eval_prompts: int) -> tuple[Stage, Stage]:
    """Data and fine-tuned model of a seed. The sizes are those of examples/quickstart.sh."""
    made = folder / f"data-seed{seed}"
    arguments = ("tools/make_quickstart_data.py", "--output", str(made / "result"), "--seed", str(seed))
    arguments += ("--slips", str(slips), "--num-test", str(eval_prompts))
    data = Stage(f"data, seed {seed}", made, arguments)
    tuned = folder / f"sft-seed{seed}"
    sft = command(
        *(f"SFT, seed {seed}", tuned, "sft", "--seed", seed, "--model-preset", "tiny", "--init-method-std", 0.08),
        *("--tokenizer-model", data.result / "tokenizer", "--data-path", data.result / "sft.jsonl"),
        *("--global-batch-size", 128, "--lr", 2e-3, "--adam-beta2", 0.99, "--max-tokens-per-row", 4608),
        *("--train-iters", sft_steps, "--lr-warmup-iters", min(20, sft_steps // 2), "--log-interval", 50),
        *("--save", tuned / "result"),
        after=[data],
    )
    return data, sft


def rl_flags(data: Stage, seed: int, prompts: int, samples: int, lr: float) -> tuple[object, ...]:
    """What the RL runs of a seed have in common."""
    return (
        *("--seed", seed, "--prompt-data", data.result / "prompts.jsonl", *RESPONSE, "--rollout-batch-size", prompts),
        *("--n-samples-per-prompt", samples, "--num-steps-per-rollout", 4, "--max-tokens-per-row", 4608, "--lr", lr),
    )


Arms = dict[tuple[str, int], Stage]  # (arm, seed) -> its run


def stages(options: argparse.Namespace) -> tuple[list[Stage], Arms]:
    """Everything that is to be run, fine-tuning first, then seed by seed; and which of it are the runs of RL."""
    seeds = list(dict.fromkeys(options.seeds))
    starts = {
        seed: start(options.output, seed, options.sft_steps, options.slips, options.eval_prompts) for seed in seeds
    }
    arms = {
        (arm, seed): arm_stage(arm, seed, starts[seed], options)
        for seed in seeds
        for arm in dict.fromkeys(options.arms)
    }
    return [*(pair[n] for n in (0, 1) for pair in starts.values()), *arms.values()], arms


def arm_stage(arm: str, seed: int, begin: tuple[Stage, Stage], options: argparse.Namespace) -> Stage:
    """The run of a method from the fine-tuned model of a seed."""
    data, sft = begin
    folder = options.output / f"{arm}-seed{seed}"
    return command(
        *(f"{ARMS[arm].title}, seed {seed}", folder, "tracerl", "--load", sft.result, "--finetune"),
        *rl_flags(data, seed, options.prompts, options.samples, options.rl_lr),
        *("--num-rollout", options.rl_steps, "--eval-prompt-data", data.result / "heldout.jsonl"),
        *("--eval-interval", options.eval_interval, "--save", folder / "result", "--no-save-optim"),
        *(*ARMS[arm].flags, *options.rl_flags.split()),
        after=[sft],
    )


def collect(arms: Arms) -> Runs:
    """The curves of all runs that ended well, by title and seed, in the order of the arms."""
    found: dict[str, dict[int, Curves]] = {}
    for (arm, seed), stage in arms.items():
        if stage.seconds is not None:
            found.setdefault(ARMS[arm].title, {})[seed] = curves(read_history(stage.metrics))
    return found


def report(runs: Runs, options: argparse.Namespace, failed: Sequence[Stage]) -> str:
    """The tables, and how to read them. Methods are compared with TraceRL, or with the first one if it is missing."""
    base = ARMS[BASE].title if ARMS[BASE].title in runs else next(iter(runs))
    lines = [
        f"{options.rl_steps} RL steps of {options.prompts} prompts x {options.samples} responses; "
        f"{options.eval_prompts} held-out problems, dynamic unmasking, temperature 1; "
        f"seeds {', '.join(map(str, options.seeds))}.",
        "",
        tables(runs, base),
        "",
        "Intervals are 95 % over seeds (Student's t). The end of a curve is its mean over the last fifth of the RL",
        "steps; at equal tokens, over the last fifth of the tokens that the shorter of two runs trained on. Roughness",
        "is the standard deviation of a curve's noise about its slow movement, in points, within a run; spread that",
        "of the gain since step 0 over seeds, averaged over evaluations.",
        *(f"Missing: {stage.name}" for stage in failed),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
