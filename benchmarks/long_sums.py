#!/usr/bin/env python
"""Sums whose answers are worked out step by step: the task of benchmarks/recipes.py, with responses of some thirty
tokens, so that blocks of 16 have something to hold.

    python -m benchmarks.long_sums --output runs/long-sums --seed 1

    question "47+85+36+12", response "47+85=132;132+36=168;168+12=\\boxed{180}"

Written are the files of tools/make_quickstart_data.py. Nothing held out is trained on, in any order of its terms; the
supervised samples (sft.jsonl) and those for a second stage (more.jsonl) have no question in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import accumulate
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

import numpy as np

from megatron_dlm.data.jsonl import write_jsonl
from megatron_dlm.data.quickstart import OPERANDS, WHOLE_TOKENS, Split, write
from megatron_dlm.data.train_tokenizer import smallest_vocabulary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sums, worked out step by step.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write")
    add("--seed", type=int, default=1)
    add("--terms", type=int, default=4, help="of a sum")
    add("--num-train", type=int, default=20_000, help="supervised samples")
    add("--num-more", type=int, default=20_000, help="supervised samples for a second stage")
    add("--num-test", type=int, default=500, help="held-out problems")
    options = parser.parse_args(argv)
    wanted = options.num_test + options.num_train + options.num_more
    if 2 * wanted > comb(len(OPERANDS) + options.terms - 1, options.terms):  # drawn until all of them differ
        parser.error(f"there are too few sums of {options.terms} two-digit numbers for {wanted} samples")
    questions = draw(options.seed, options.terms, wanted)
    heldout = [
        {"question": _question(terms), "ground_truth_answer": str(sum(terms))}
        for terms in questions[: options.num_test]
    ]
    samples = [{"question": _question(terms), "response": worked_out(terms)} for terms in questions[options.num_test :]]
    first, more = samples[: options.num_train], samples[options.num_train :]
    size = write(Split(first, heldout[:1], heldout), options.output, smallest_vocabulary(WHOLE_TOKENS))
    write_jsonl(options.output / "more.jsonl", more)
    print(f"Wrote {len(first)} + {len(more)} samples and a tokenizer of {size} tokens to {options.output}.")
    return 0


def draw(seed: int, terms: int, count: int) -> list[tuple[int, ...]]:
    """So many sums, no two of them of the same terms."""
    rng = np.random.default_rng((seed, terms))
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(found) < count:
        for one in rng.integers(OPERANDS.start, OPERANDS.stop, (count, terms)).tolist():
            found.setdefault(tuple(sorted(one)), tuple(one))
    return list(found.values())[:count]


def worked_out(terms: Sequence[int]) -> str:
    """The response to a sum: each step, and the answer in a box."""
    sums = list(accumulate(terms))
    steps = [f"{before}+{one}=" for before, one in zip(sums, terms[1:])]
    done = "".join(f"{step}{after};" for step, after in zip(steps[:-1], sums[1:]))
    return f"{done}{steps[-1]}\\boxed{{{sums[-1]}}}"


def _question(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms))


if __name__ == "__main__":
    sys.exit(main())
