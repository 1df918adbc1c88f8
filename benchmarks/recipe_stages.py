"""The stages of benchmarks/recipes.py: which models are made of which, and how they are decoded.

One chain for each seed, all on sums that are worked out step by step (benchmarks/long_sums.py):

    autoregressive --> blocks of 4, in several ways --> blocks of 16, at once or by way of 8
                                                    \\-> full attention --> what is learned of new samples, by objective

Every arm of a comparison takes the same samples in the same order, from the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.stages import Stage, command

RESPONSE = 40  # longest response, and the canvas of full attention, in tokens
SLICE = 8  # tokens that one noisy copy of a sliced objective learns, and about those that one of a trace does
DECODED = 16  # blocks in which models of full attention decode, and in which traces are found
AR, GOES_ON = "autoregressive", "autoregressive, trained on"
KEPT, DROPPED = "shift kept", "shift dropped"
DROPPED_SLOWLY = "shift dropped, blocks 1 2 4"
JUMP, STEPWISE, STAY = "blocks of 16 at once", "blocks of 8, then 16", "blocks of 4 as before"
FULL, RANDOM, SLICED, TRACED = "full attention", "random masking", "sliced semi-AR", "trace"
RANDOM_ONCE, TRACED_FINELY = "random masking, one mask", "trace, step by step"
OBJECTIVES = (RANDOM, RANDOM_ONCE, SLICED, TRACED, TRACED_FINELY)
BASE = KEPT
"""The block-4 model that grows, and that becomes one of full attention."""

WAYS = ("static", "dynamic")


@dataclass(slots=True)
class Chain:
    """The stages of one seed. `models` by name, each after those it is made of; `evaluations` by model and block of
    decoding.
    """

    options: argparse.Namespace
    seed: int
    data: Stage
    models: dict[str, Stage] = field(default_factory=dict)
    evaluations: dict[tuple[str, int], Stage] = field(default_factory=dict)

    def learn(self, name: str, since: str | None, steps: int, rate: float, *flags: object, **more: object) -> None:
        """A model, fine-tuned from another one, or from nothing."""
        folder = self.options.output / f"{_file_name(name)}-seed{self.seed}"
        begin = () if since is None else ("--load", self.models[since].result, "--finetune")
        samples = more.get("samples", self.data.result / "sft.jsonl")
        after = [self.data if since is None else self.models[since], *more.get("after", ())]
        self.models[name] = command(
            *(f"{name}, seed {self.seed}", folder, "sft", "--seed", self.seed, *begin, "--data-path", samples),
            *("--global-batch-size", more.get("batch", self.options.batch), "--max-tokens-per-row", 4608),
            *("--adam-beta2", 0.99),
            *("--lr", rate, "--lr-decay-style", "cosine", "--min-lr", rate / 20, "--lr-warmup-iters", steps // 20),
            *("--train-iters", steps, "--log-interval", 50, "--save", folder / "result", "--no-save-optim", *flags),
            after=after,
        )

    def evaluate(self, name: str, block: int, *flags: object) -> None:
        """On held-out problems, greedily, in blocks of this size: one token per step, and as many as are sure."""
        folder = self.options.output / f"eval-{_file_name(name)}-block{block}-seed{self.seed}"
        stage = self.models[name]
        self.evaluations[name, block] = command(
            *(f"{name} in blocks of {block}, seed {self.seed}", folder, "evaluate", "--load", stage.result),
            *("--seed", self.seed, "--eval-prompt-data", self.data.result / "heldout.jsonl", "--eval-remasking", *WAYS),
            *("--rollout-max-response-len", RESPONSE, "--rollout-block-size", block, "--eval-temperature", 0, *flags),
            after=[stage],
        )

    def stages(self) -> Iterator[Stage]:
        """All of them, each after those that it builds on, and evaluations as soon as there is something to evaluate.
        Some come more than once.
        """
        for name, model in self.models.items():
            yield from model.after
            yield model
            yield from (stage for (of, _), stage in self.evaluations.items() if of == name)


def chain(seed: int, options: argparse.Namespace) -> Chain:
    """Everything of a seed that --parts asks for."""
    made = options.output / f"data-seed{seed}"
    arguments = ("benchmarks/long_sums.py", "--output", str(made / "result"), "--seed", str(seed))
    arguments += ("--terms", str(options.terms), "--num-test", str(options.eval_prompts))
    arguments += ("--num-more", str(options.objective_steps * options.batch))
    found = Chain(options, seed, Stage(f"data, seed {seed}", made, arguments))
    new = ("--model-preset", "tiny", "--init-method-std", 0.08, "--tokenizer-model", found.data.result / "tokenizer")
    causal = ("--block-size", 1, "--logit-shift", 1, "--sft-objective", "ar")
    found.learn(AR, None, options.ar_steps, 2e-3, *new, *causal)
    found.learn(BASE, AR, options.switch_steps, options.lr, "--block-size", 4)
    if "conversion" in options.parts:
        _conversion(found, causal)
    if "growth" in options.parts:
        _growth(found)
    if "objectives" in options.parts:
        _objectives(found)
    return found


def _conversion(chain: Chain, causal: tuple[object, ...]) -> None:
    options = chain.options
    steps, rate = options.switch_steps, options.lr
    slowly = ("--block-size", 4, "--block-size-schedule", f"1:{steps // 4}", f"2:{steps // 4}", "4")
    chain.learn(GOES_ON, AR, steps, rate, *causal)
    chain.learn(DROPPED, AR, steps, rate, "--block-size", 4, "--logit-shift", 0)
    chain.learn(DROPPED_SLOWLY, AR, steps, rate, *slowly, "--logit-shift", 0)
    for name in (AR, GOES_ON):
        chain.evaluate(name, 1)
    for name in (KEPT, DROPPED, DROPPED_SLOWLY):
        chain.evaluate(name, 4)


def _growth(chain: Chain) -> None:
    options = chain.options
    steps, rate = options.growth_steps, options.lr
    chain.learn(STAY, BASE, steps, rate)
    chain.learn(JUMP, BASE, steps, rate, "--block-size", 16)
    schedule = ("--block-size-schedule", f"8:{steps // 2}", "16")
    chain.learn(STEPWISE, BASE, steps, rate, "--block-size", 16, *schedule)
    chain.evaluate(BASE, 4)
    chain.evaluate(STAY, 4)
    for name in (BASE, JUMP, STEPWISE):
        chain.evaluate(name, 16)


def _objectives(chain: Chain) -> None:
    options, more = chain.options, chain.data.result / "more.jsonl"
    steps, rate = options.objective_steps, options.objective_lr
    canvas = ("--canvas-length", RESPONSE)
    chain.learn(
        *(FULL, BASE, options.full_steps, options.lr, "--full-attention", *canvas),
        *("--sft-objective", "random_masking", "--mask-draws", options.full_draws),
    )
    folder = chain.options.output / f"traces-seed{chain.seed}"
    traces = command(
        *(f"traces, seed {chain.seed}", folder, "trace", "--load", chain.models[FULL].result, "--input", more),
        *("--output", folder / "traces.jsonl", "--tokens-per-step", 2, "--trace-block-size", DECODED, *canvas),
        after=[chain.models[FULL]],
    )
    random = ("--sft-objective", "random_masking", "--mask-draws")
    sliced = ("--sft-objective", "semi_ar", "--slice-size", SLICE)
    merged = SLICE // 2  # steps of two tokens, so that a copy learns about as many as a slice has
    traced = ("--sft-objective", "trace", "--shrinkage")
    chain.learn(RANDOM, FULL, steps, rate, *canvas, *random, options.draws, samples=more)
    chain.learn(RANDOM_ONCE, FULL, steps, rate, *canvas, *random, 1, samples=more)
    chain.learn(SLICED, FULL, steps, rate, *canvas, *sliced, samples=more)
    of_traces = dict(samples=folder / "traces.jsonl", after=[traces])
    chain.learn(TRACED, FULL, steps, rate, *canvas, *traced, merged, **of_traces)
    fewer = max(1, options.batch // merged)  # samples, of which each has that many more copies
    chain.learn(TRACED_FINELY, FULL, steps, rate, *canvas, *traced, 1, batch=fewer, **of_traces)
    for name in (FULL, *OBJECTIVES):
        chain.evaluate(name, DECODED, "--no-prefix-cache")


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
